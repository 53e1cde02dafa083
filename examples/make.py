"""Write traces.jsonl: a few problems of each task with their traces. `python examples/make.py`, in the checkout."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from mvkernels.model.tasks import TASKS

FILE = Path(__file__).resolve().parent / "traces.jsonl"
#: Of each task; small ones, so that a line can be read.
COUNT, MOST = 6, 3


def lines() -> list[str]:
    """One JSON object a line, with the columns that `mvkernels curate` writes too."""
    found = []
    for task in TASKS.values():
        small = (problem for problem in task.generate("examples", "train") if problem.size <= MOST)
        for number, problem in enumerate(islice(small, COUNT), start=1):
            columns = {"question": problem.question, "answer": problem.expected, "trace": problem.parallel_trace}
            found.append(json.dumps({"id": f"{task.name}-{number}", **columns}))
    return found


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
