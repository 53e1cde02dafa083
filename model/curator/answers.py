"""From what a model writes to the lines that a stage reads: reasoning, fences and JSON taken off."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any


class Wrong(ValueError):
    """An answer cannot be used; the message says why, in words that the model can act on."""


_FENCE = re.compile(r"\A```[\w-]*\n(.*?)\n?```\s*\Z", re.DOTALL)
# Where JSON is written by hand, formulas stand in it as they are: \( is no escape, and \frac begins like one.
_LONE_BACKSLASH = re.compile(
    r"(\\\\|\\[\"/]|\\u[0-9a-fA-F]{4})|\\(?=[bfrt][A-Za-z]|n(?:u\b|eq?\b|abla|ot|eg|i\b|mid|leq|geq)|[^bfnrtu]|u)"
)
_MARKUP = re.compile(r"^[\s>]*(?:[-*•]\s+)?(?:#+\s+)?")

_BOLD = re.compile(r"^\*\*(.*?)\*\*")


def answer_text(answer: str, from_json: Callable[[Any], str]) -> str:
    """The answer as plain lines. from_json: turns the stage's JSON object into these lines.

    Raises Wrong for an empty answer, and for JSON of another shape.
    """
    text = answer.rpartition("</think>")[2].strip()
    fenced = _FENCE.match(text)
    if fenced:
        text = fenced.group(1).strip()
    if not text:
        raise Wrong("The answer is empty.")
    if not text.startswith("{"):
        return text
    try:
        value = json.loads(_LONE_BACKSLASH.sub(lambda match: match.group(1) or "\\\\", text), strict=False)
    except json.JSONDecodeError as error:
        raise Wrong(f"The answer is no complete JSON object: {error}.") from None
    try:
        return from_json(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise Wrong(f"The JSON object has not the form that was asked for: {error!r}.") from None


def lines_of(text: str) -> list[str]:
    """The lines that are not empty, without the marks of lists and headings, and of bold type at their beginning."""
    lines = (_BOLD.sub(r"\1", _MARKUP.sub("", line)).strip() for line in text.splitlines())
    return [line for line in lines if line]


def one_line(text: object) -> str:
    """A text of a JSON object as one line. Raises TypeError for what is no text."""
    if not isinstance(text, str):
        raise TypeError(f"expected a text, got {text!r}")
    return " ".join(text.split())
