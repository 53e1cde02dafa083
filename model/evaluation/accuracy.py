"""Accuracy of a model on held-out problems of the arithmetic task, decoded in parallel and as one chain.

    python -m mvkernels.model.evaluation.accuracy [FOLDER] [--problems 200] [--seed 0]

The problems are of the test split, which training never sees, whatever its seed. In *parallel* the prompt asks for
blocks, and every path is decoded without its siblings; in *sequential* it asks for the same work in one chain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mvkernels.model.config import GenerationConfig
from mvkernels.model.engine import Engine
from mvkernels.model.events import Generation
from mvkernels.model.tasks.arithmetic import Problem, generate, grade

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
#: Tokens that an answer may have; the longest right one has under 1600.
MAX_NEW_TOKENS = 2048
_BATCH = 25
_SHOWN = 10


@dataclass(frozen=True)
class Accuracy:
    """One mode on some problems. Means are over the problems; tokens and critical path count generated tokens.

    mode: "parallel" or "sequential". wrong: the problems not solved, with what was generated. seconds: of the engine.
    """

    mode: str
    problems: int
    right: int
    mean_tokens: float
    mean_critical_path: float
    mean_parallelism: float
    seconds: float
    wrong: tuple[tuple[Problem, Generation], ...]

    @property
    def share(self) -> float:
        """Problems solved / problems."""
        return self.right / self.problems

    def __str__(self) -> str:
        return (
            f"{self.mode:<10}  {self.right}/{self.problems} right ({self.share:.1%})  "
            f"tokens {self.mean_tokens:.1f}  critical path {self.mean_critical_path:.1f}  "
            f"# parallel {self.mean_parallelism:.2f}  {self.seconds:.1f} s"
        )


def evaluate(engine: Engine, problems: Sequence[Problem], parallel: bool, batch: int = _BATCH) -> Accuracy:
    """Solve the problems greedily, `batch` at a time, and grade them. Raises ValueError without problems."""
    if not problems:
        raise ValueError("problems: expected at least one, got none")
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)
    results: list[Generation] = []
    started = time.perf_counter()
    for first in range(0, len(problems), batch):
        results += engine.generate([problem.prompt(parallel) for problem in problems[first : first + batch]], config)
    seconds = time.perf_counter() - started
    solved = [grade(result.text, problem) for problem, result in zip(problems, results, strict=True)]
    count = len(problems)
    return Accuracy(
        mode="parallel" if parallel else "sequential",
        problems=count,
        right=sum(solved),
        mean_tokens=sum(result.total_tokens for result in results) / count,
        mean_critical_path=sum(result.critical_path for result in results) / count,
        mean_parallelism=sum(result.parallelism for result in results) / count,
        seconds=seconds,
        wrong=tuple(pair for pair, right in zip(zip(problems, results, strict=True), solved, strict=True) if not right),
    )


def evaluate_embedded(n: int = 200, seed: int = 0, folder: str | Path = EMBEDDED) -> tuple[Accuracy, Accuracy]:
    """(parallel, sequential) accuracy of the embedded model, or of one in `folder`, on `n` held-out problems."""
    engine = Engine.from_pretrained(folder)
    problems = list(islice(generate(seed, "test"), n))
    return evaluate(engine, problems, parallel=True), evaluate(engine, problems, parallel=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each mode, and under it the first problems that were not solved."""
    parser = argparse.ArgumentParser(prog="python -m mvkernels.model.evaluation.accuracy", description=__doc__)
    parser.add_argument("folder", nargs="?", default=EMBEDDED, help="a trained model; default: the embedded one")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    options = parser.parse_args(arguments)
    for accuracy in evaluate_embedded(options.problems, options.seed, options.folder):
        print(accuracy)
        for problem, generation in accuracy.wrong[:_SHOWN]:
            answer = generation.text.rpartition("</Think>")[2].strip()
            print(f"  {problem.expression} = {problem.answer}, got {answer!r} ({generation.finish_reason})")


if __name__ == "__main__":
    main()
