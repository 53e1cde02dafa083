"""Stage 2: what each step needs, and the groups of adjacent steps that need nothing of one another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mvkernels.model.curator.answers import Wrong, answer_data, lines_of, one_line
from mvkernels.model.curator.summary import Step, main_of

_ID = r"S\d+(?:\.\d+)?"
_NEED = re.compile(rf"({_ID})\s*(?:<-+|←|<=)\s*(.*)")
_PATH = rf"{_ID}(?:\s*\+\s*{_ID})*"
_GROUP = re.compile(rf"({_PATH}(?:\s*\|\|\s*{_PATH})*)\s*(?:[:(–-]\s*(.*))?$")

#: A path is the ids of its steps.
Paths = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Group:
    """Two or more adjacent paths that can be worked on at the same time. All steps are main steps, or of one step."""

    paths: Paths
    reason: str


def read_groups(answer: str, steps: Sequence[Step]) -> tuple[Group, ...]:
    """The parallel groups of an answer: of main steps, and of the substeps of each step. Raises Wrong."""
    needs: dict[str, set[str]] = {}
    data = answer_data(answer, "groups", _from_lines)
    for need in data["needs"]:
        needs.setdefault(one_line(need["step"]), set()).update(map(one_line, need["uses"]))
    groups = [
        Group(tuple(tuple(map(one_line, path)) for path in group["paths"]), one_line(group["reason"]))
        for group in data["groups"]
    ]
    if not all(group.paths and all(group.paths) for group in groups):
        raise Wrong("A group has a path without steps.")
    known = {step.id for main in steps for step in (main, *main.substeps)}
    unknown = {step for need, used in needs.items() for step in (need, *used)} - known
    unknown |= {step for group in groups for path in group.paths for step in path} - known
    if unknown:
        raise Wrong(f"There is no step {', '.join(sorted(unknown))} in your tree.")
    _check_order(groups, steps)
    missing = [step for step in sorted(known, key=_order) if step not in needs]
    if missing:
        raise Wrong(f'The list "Needs" says nothing of {", ".join(missing)}.')
    for group in groups:
        _check_independent(group, needs)
    return tuple(group for group in groups if len(group.paths) > 1)


def _check_order(groups: Sequence[Group], steps: Sequence[Step]) -> None:
    """Every step exactly once, in order, and no group of steps that are no siblings."""
    found: dict[str, list[str]] = {}
    for group in groups:
        flat = [step for path in group.paths for step in path]
        parents = {_parent(step) for step in flat}
        if len(parents) > 1:
            raise Wrong(f"The group {paths_text(group.paths)} has steps of different levels or of different steps.")
        found.setdefault(parents.pop(), []).extend(flat)
    for parent, siblings in _levels(steps):
        got = found.get(parent, [])
        if got != siblings:
            raise Wrong(
                f"Expected every one of {', '.join(siblings)} in exactly one group, in this order; "
                f"got {', '.join(got) or 'none of them'}."
            )


def _check_independent(group: Group, needs: dict[str, set[str]]) -> None:
    for path in group.paths:
        for step in path:
            other = sorted(
                used for used in needs[step] if any(used in another for another in group.paths if another is not path)
            )
            if other:
                raise Wrong(
                    f"{step} needs {', '.join(other)}, as you say, so they cannot be on different paths of the group "
                    f"{paths_text(group.paths)}."
                )


def paths_text(paths: Paths) -> str:
    """`S2 || S3 + S4`."""
    return " || ".join(" + ".join(path) for path in paths)


def _levels(steps: Sequence[Step]) -> Iterator[tuple[str, list[str]]]:
    """Parent ("" for the main steps) and the ids of its steps."""
    yield "", [step.id for step in steps]
    for step in steps:
        if step.substeps:
            yield step.id, [substep.id for substep in step.substeps]


def _parent(step: str) -> str:
    return main_of(step) if "." in step else ""


def _order(step: str) -> tuple[int, ...]:
    return tuple(map(int, step[1:].split(".")))


def _from_lines(text: str) -> Any:
    needs: list[Any] = []
    groups: list[Any] = []
    for line in lines_of(text):
        need, grouped = _NEED.match(line), _GROUP.match(line)
        if need is not None:
            needs.append({"step": need.group(1), "uses": re.findall(_ID, need.group(2))})
        elif grouped is not None:
            paths = [re.findall(_ID, path) for path in grouped.group(1).split("||")]
            groups.append({"paths": paths, "reason": (grouped.group(2) or "").strip()})
    return {"needs": needs, "groups": groups}
