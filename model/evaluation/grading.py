"""Graders of answers to questions that no program made: mathematics by math-verify, and the letter of a choice."""

from __future__ import annotations

import re
from typing import Any

from mvkernels._lazy import import_for

_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}?\s*\}")
_NAMED = re.compile(r"\banswer\b\W*(?:is|:)?\W*\(?([A-Z])\b", re.IGNORECASE)
_ALONE = re.compile(r"\s*\(?([A-Z])[).]?\s*")


def same_math(text: str, expected: str) -> bool:
    """Whether the last answer in a text is mathematically the same as `expected`, by math-verify.

    expected: LaTeX or a plain number. Only what stands behind the last `</Think>` counts, where there is that tag.
    Raises ImportError without math-verify.
    """
    library: Any = import_for("grading mathematics", "math_verify")
    # Its own limits of time need SIGALRM, which only the main thread has.
    options = {"parsing_timeout": None}
    gold = library.parse(f"${expected}$", **options) or library.parse(expected, **options)
    return bool(library.verify(gold, library.parse(behind_thinking(text), **options), timeout_seconds=None))


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
