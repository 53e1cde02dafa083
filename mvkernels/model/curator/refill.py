"""Stage 4: which sentences belong to which step; code puts them back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mvkernels.model.curator.answers import Wrong, answer_data, lines_of, one_line, read_number

_LINE = re.compile(r"(S\d+(?:\.\d+)?)\b(?!\.\d)[^:]*:\s*\[?(\d+)\]?(?:\s*(?:-+|–|—|\.\.+|to)\s*\[?(\d+)\]?)?\s*\.?$")

#: Step -> its first and its last sentence.
Ranges = Mapping[str, tuple[int, int]]


def read_ranges(answer: str, needed: Mapping[str, int], first: int, last: int) -> Ranges:
    """The sentences of each step. needed: the steps in order, with the number of sentences that each needs at least.

    Raises Wrong unless the ranges are all of `first` to `last`, in order, without a gap.
    """
    found: dict[str, tuple[int, int]] = {}
    for item in answer_data(answer, "refill", _from_lines)["ranges"]:
        step = one_line(item["step"])
        if step in found:
            raise Wrong(f"{step} is there twice.")
        found[step] = item["first"], item["last"]
    if list(found) != list(needed):
        raise Wrong(f"Expected a line for each of {', '.join(needed)}, in this order; got {', '.join(found)}.")
    expected = first
    for step, (begin, end) in found.items():
        if begin > expected:
            raise Wrong(f"{_these(expected, min(begin - 1, last))} no step: {step} begins with {begin}.")
        if begin < expected:
            raise Wrong(f"{step} begins with sentence {begin}; expected {expected}, right behind the step before it.")
        if end - begin + 1 < needed[step]:
            raise Wrong(f"{step} has the sentences {begin}-{end}; it needs at least {needed[step]}.")
        expected = end + 1
    if expected <= last:
        raise Wrong(f"{_these(expected, last)} no step.")
    if expected > last + 1:
        raise Wrong(f"The last sentence is {last}, got {expected - 1}.")
    return found


def _these(first: int, last: int) -> str:
    return f"Sentence {first} belongs to" if first == last else f"Sentences {first}-{last} belong to"


def _from_lines(text: str) -> Any:
    ranges = []
    for line in lines_of(text):
        match = _LINE.match(line)
        if match is None:
            raise Wrong(f'Expected lines of the form "S1: 1-4", got "{line[:80]}".')
        step, first, last = match.groups()
        ranges.append({"step": step, "first": read_number(first), "last": read_number(last or first)})
    return {"ranges": ranges}
