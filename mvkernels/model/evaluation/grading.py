"""Graders of answers to questions that no program made: mathematics by math-verify, and the letter of a choice."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from typing import Any

from mvkernels._lazy import import_for

_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}?\s*\}")
_NAMED = re.compile(r"\banswer\b\W*(?:is|:)?\W*\(?([A-Z])\b", re.IGNORECASE)
#: What math-verify may take to read an expression, and to compare two; then it gives up, and the answer is wrong.
_SECONDS = 5
_ALONE = re.compile(r"\s*\(?([A-Z])[).]?\s*")


def require_graders(graders: Iterable[Callable[[str], bool]]) -> None:
    """Raises ImportError where one of them needs math-verify and it is missing: before anything is asked."""
    if any(getattr(grader, "func", None) is same_math for grader in graders):
        import_for("grading mathematics", "math_verify")


def same_math(text: str, expected: str) -> bool:
    """Whether the last answer in a text is mathematically the same as `expected`, by math-verify.

    expected: LaTeX or a plain number. Only what stands behind the last `</Think>` counts, where there is that tag.
    Raises ImportError without math-verify.
    """
    library: Any = import_for("grading mathematics", "math_verify")
    # Its limits of time are alarms, which only the main thread gets; elsewhere it must do without.
    limited = threading.current_thread() is threading.main_thread()
    limit = _SECONDS if limited else None
    gold = library.parse(f"${expected}$", parsing_timeout=limit) or library.parse(expected, parsing_timeout=limit)
    found = library.parse(behind_thinking(text), parsing_timeout=limit)
    return bool(library.verify(gold, found, timeout_seconds=limit))


def choice_in(text: str, letters: str) -> str | None:
    """The letter that a text chooses: the last boxed one, else the last that is called the answer, else the whole text.

    Only what stands behind the last `</Think>` counts. None where there is no letter of `letters`.
    """
    text = behind_thinking(text)
    whole = _ALONE.fullmatch(text)
    for found in (_BOXED.findall(text), _NAMED.findall(text), [] if whole is None else [whole[1]]):
        chosen = [letter.upper() for letter in found if letter.upper() in letters]
        if chosen:
            return chosen[-1]
    return None


def behind_thinking(text: str) -> str:
    """What stands behind the last `</Think>`; the whole text without that tag."""
    return text.rpartition("</Think>")[2]
