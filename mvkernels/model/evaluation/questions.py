"""What a model is asked and how its answers are graded: problems of a generated task, DIMACS files, local JSONL.

A JSONL file has one question a line, in one of these forms, told apart by their fields:

    {"question": ..., "answer": "... #### 18"}                                           GSM8K
    {"problem" or "question": ..., "answer": "3\\sqrt{2}"}                                MATH-500, AIME
    {"question": ..., "choices": [...], "answer": 2 or "C"}                              multiple choice
    {"Question": ..., "Correct Answer": ..., "Incorrect Answer 1": ..., 2, 3}            GPQA, shuffled by its text
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mvkernels.model.evaluation.grading import choice_in, same_math
from mvkernels.model.json_input import parse_json, shown
from mvkernels.model.tasks import GeneratedProblem, Task, grade
from mvkernels.model.tasks.sat import read_dimacs

BOXED = "Put your final answer within \\boxed{}."
CHOSEN = "Put the letter of your final answer within \\boxed{}."
_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@dataclass(frozen=True)
class Question:
    """text: what is asked, without an ending. expected: the right answer, to be read. grade: of what a model generated.

    raw: whether the prompt is the text itself; else it is a turn in the model's chat template, where it has one.
    size: of a generated problem. traces: what models were trained to answer, in blocks or without, where that is known.
    """

    id: str
    text: str
    expected: str
    grade: Callable[[str], bool]
    raw: bool = False
    size: int | None = None
    traces: tuple[str, ...] = ()


def generated_questions(
    task: Task, count: int, seed: int | str = 0, problems: Iterable[GeneratedProblem] | None = None
) -> list[Question]:
    """`count` unseen problems of a task. problems: take these instead of the test split's."""
    found = list(islice(task.generate(seed, "test") if problems is None else problems, count))
    return [_of_problem(f"{task.name}-{seed}-{place}", problem) for place, problem in enumerate(found)]


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSONL file, or the one of a DIMACS file (`.cnf`).

    Raises ValueError, naming file and line, for a line in none of the forms, and OSError where it cannot be read.
    """
    if path.suffix == ".cnf":
        return [_of_problem(path.stem, read_dimacs(path))]
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text in JSON may have other line ends in it
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected JSONL, got a file that is no text") from None
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {place}"
        try:
            row = parse_json(line, strict=False)
        except ValueError as error:
            raise ValueError(f"{where}: expected a JSON object, got {line[:60]!r}: {error}") from None
        found.append(_of_row(row, f"{path.stem}-{place}", where))
    if not found:
        raise ValueError(f"{path}: expected at least one question, got none")
    return found


def _of_problem(name: str, problem: GeneratedProblem) -> Question:
    return Question(
        id=name,
        text=problem.question,
        expected=problem.expected,
        grade=partial(grade, problem=problem),
        raw=True,
        size=problem.size,
        traces=(problem.parallel_trace, problem.sequential_trace),
    )


def _of_row(row: Any, name: str, where: str) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {shown(row)}")
    if all(isinstance(row.get(key), str) for key in _GPQA):
        return _multiple_choice(name, _text(row, where), *_shuffled([row[key] for key in _GPQA]))
    choices, answer = row.get("choices"), row.get("answer")
    if choices is not None:
        return _multiple_choice(name, _text(row, where), choices, _place(choices, answer, where))
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{where}: expected an answer, got {shown(answer)}")
    expected = answer.rpartition("####")[2].strip()
    return Question(name, f"{_text(row, where)}\n{BOXED}", expected, partial(same_math, expected=expected))


def _text(row: dict[str, Any], where: str) -> str:
    text = next((row[key] for key in ("problem", "question", "Question") if key in row), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected a problem or a question, got {shown(text)}")
    return text.strip()


def _multiple_choice(name: str, text: str, choices: Sequence[str], right: int) -> Question:
    letters = ascii_uppercase[: len(choices)]
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    return Question(
        name,
        f"{text}\n{listed}\n{CHOSEN}",
        letters[right],
        lambda answer: choice_in(answer, letters) == letters[right],
    )


def _shuffled(choices: list[str]) -> tuple[list[str], int]:
    """The choices in an order that hangs on their text alone, and the place of the first one."""
    order = list(range(len(choices)))
    random.Random("\n".join(choices)).shuffle(order)
    return [choices[place] for place in order], order.index(0)


def _place(choices: Any, answer: Any, where: str) -> int:
    """Which choice is right: named by its place from 0, its letter or its text."""
    if not (isinstance(choices, list) and 2 <= len(choices) <= len(ascii_uppercase)):
        raise ValueError(f"{where}: expected 2 to {len(ascii_uppercase)} choices, got {shown(choices)}")
    letters = ascii_uppercase[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return letters.index(answer)
    raise ValueError(f"{where}: expected the place, letter or text of a choice as the answer, got {shown(answer)}")
