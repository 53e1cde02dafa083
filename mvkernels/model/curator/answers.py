"""From what a model writes to the data that a stage checks: reasoning and fences removed, JSON or lines read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mvkernels.model.curator.prompts import SCHEMAS
from mvkernels.model.json_input import parse_json, shown


class Wrong(ValueError):
    """An answer cannot be used; the message says why, in words that the model can act on."""


#: Characters of an answer without its reasoning. Twice the longest chain that is curated by default.
LONGEST = 400_000
_LARGEST = 10**9  # of a number in an answer; numbers count steps, paths and sentences
_FENCE = re.compile(r"```[\w-]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_FENCED_JSON = re.compile(r"^```[\w-]*\n\s*(\{.*?)\n?```", re.DOTALL | re.MULTILINE)
# Where JSON is written by hand, formulas stand in it as they are: \( is no escape, and \frac begins like one.
_LONE_BACKSLASH = re.compile(
    r"(\\\\|\\[\"/]|\\u[0-9a-fA-F]{4})|\\(?=[bfrt][A-Za-z]|n(?:u\b|eq?\b|abla|ot|eg|i\b|mid|leq|geq)|[^bfnrtu]|u)"
)
_MARKUP = re.compile(r"^[\s>]*(?:[-*•]\s+)?(?:#+\s+)?")

_BOLD = re.compile(r"^\*\*(.*?)\*\*")


def answer_data(answer: str, stage: str, from_lines: Callable[[str], Any]) -> Any:
    """Read an answer, in either of its two forms, as data of one form.

    Args:
        answer: What the model wrote: lines or a JSON object, with or without reasoning before it and a fence around it.
        stage: One of `prompts.STAGES`.
        from_lines: Reads lines as data of the same form.

    Returns:
        Data of the form of `prompts.SCHEMAS[stage]`.

    Raises:
        Wrong: The answer is empty, too long or no text, or malformed, or of another form.
    """
    text = _without_reasoning(answer)
    if len(text) > LONGEST:
        raise Wrong(f"The answer has {len(text)} characters; it may have {LONGEST} at most.")
    fenced = _FENCE.match(text) or _FENCED_JSON.search(text)
    if fenced:
        text = fenced.group(1).strip()
    if not text:
        raise Wrong("The answer is empty.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Wrong("The answer has half a surrogate pair in it, which is no character.") from None
    if not text.startswith("{"):
        return from_lines(text)
    try:
        value = parse_json(_LONE_BACKSLASH.sub(lambda match: match.group(1) or "\\\\", text))
    except ValueError as error:
        raise Wrong(f"The answer is no complete JSON object: {error}.") from None
    return _as_asked(value, SCHEMAS[stage], "")


def _without_reasoning(answer: str) -> str:
    """What stands behind `</think>`; the prompt's template may have written the opening tag already."""
    text = answer.strip()
    if not text.startswith("{"):  # in JSON the tag can be part of a text
        text = text.rpartition("</think>")[2].strip()
    if text.startswith("<think>"):
        raise Wrong("The answer is reasoning only; end it, and then answer.")
    return text


def _as_asked(value: Any, schema: dict[str, Any], where: str) -> Any:
    """The part of a JSON value that a schema of `prompts` describes. Raises Wrong where it has another form."""
    if schema["type"] == "object" and isinstance(value, dict):
        named = {name: f"{where}.{name}" if where else name for name in schema["properties"]}
        missing = [name for name in named if name not in value]
        if missing:
            raise Wrong(f"The JSON object has not the form that was asked for: {named[missing[0]]} is missing.")
        return {name: _as_asked(value[name], schema["properties"][name], at) for name, at in named.items()}
    if schema["type"] == "array" and isinstance(value, list):
        return [_as_asked(item, schema["items"], f"{where}[{i}]") for i, item in enumerate(value)]
    if schema["type"] == "string" and isinstance(value, str):
        return value
    if schema["type"] == "integer":
        if isinstance(value, str) and value.isdecimal():
            return read_number(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST:
            return value
    kind = {"object": "an object", "array": "a list", "string": "a text", "integer": "a number"}[schema["type"]]
    raise Wrong(f"The JSON object has not the form that was asked for: {where}: expected {kind}, got {shown(value)}.")


def read_number(digits: str) -> int:
    """The number that digits in an answer stand for. Raises Wrong for one that is too large to count anything."""
    if len(digits) >= len(str(_LARGEST)):
        raise Wrong(f"{digits[:20]}... is too large a number.")
    return int(digits)


def lines_of(text: str) -> list[str]:
    """The lines that are not empty, without the marks of lists and headings, and of bold type at their beginning."""
    lines = (_BOLD.sub(r"\1", _MARKUP.sub("", line)).strip() for line in text.splitlines())
    return [line for line in lines if line]


def one_line(text: str) -> str:
    """A text of a JSON object as one line."""
    return " ".join(text.split())
