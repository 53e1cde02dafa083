"""Stage 1: the tree of steps, main steps `S1` and substeps `S2.1`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mvkernels.grammar import TAG_PATTERN
from mvkernels.model.curator.answers import Wrong, answer_data, lines_of, one_line, read_number

_ID = re.compile(r"S(\d+)(?:\.(\d+))?((?:\.\d+)*)")
_LINE = re.compile(rf"({_ID.pattern})\s*[:.)\-–]\s*(.*)")


@dataclass(frozen=True)
class Step:
    """id: `S2`, or `S2.1`. text: one line."""

    id: str
    text: str
    substeps: tuple[Step, ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """The ids of its substeps, or its own where it has none."""
        return tuple(step.id for step in self.substeps) or (self.id,)


#: Steps and substeps of a chain, so that no answer grows with the chain.
MOST_STEPS = 120


def main_of(step: str) -> str:
    """`S2` for `S2` and for `S2.1`."""
    return step.partition(".")[0]


def read_summary(answer: str, sentences: int) -> tuple[Step, ...]:
    """The main steps of an answer. sentences: how many the chain has. Raises Wrong."""
    found: list[tuple[str, str, list[Step]]] = []
    for step in answer_data(answer, "summary", _from_lines)["steps"]:
        name, text = one_line(step["id"]), TAG_PATTERN.sub("", one_line(step["text"])).strip()
        match = _ID.fullmatch(name)
        if match is None:
            raise Wrong(f'Expected steps S1, S1.1 and so on, got "{name[:80]}".')
        main, sub, deeper = match.groups()
        if deeper:
            raise Wrong(f"S{main}.{sub}{deeper} is a third level; there are two at most.")
        if not text:
            raise Wrong(f"{name[:80]} has no text.")
        if sub is None:
            if read_number(main) != len(found) + 1:
                raise Wrong(f"Expected S{len(found) + 1}, got S{main}: main steps are numbered one after the other.")
            found.append((f"S{main}", text, []))
            continue
        if not found or f"S{main}" != found[-1][0]:
            raise Wrong(f"S{main}.{sub} does not stand behind its step S{main}.")
        expected = len(found[-1][2]) + 1
        if read_number(sub) != expected:
            raise Wrong(f"Expected S{main}.{expected}, got S{main}.{sub}: substeps are numbered one after the other.")
        found[-1][2].append(Step(f"S{main}.{sub}", text))
    steps = tuple(Step(name, text, tuple(substeps)) for name, text, substeps in found)
    if not steps:
        raise Wrong('Expected lines of the form "S1: text", got none.')
    for step in steps:
        if len(step.substeps) == 1:
            raise Wrong(f"{step.id} has one substep; a step has two or more, or none.")
    total = sum(1 + len(step.substeps) for step in steps)
    if total > MOST_STEPS:
        raise Wrong(
            f"The tree has {total} steps; it may have {MOST_STEPS} at most, so let each stand for more sentences."
        )
    leaves = sum(len(step.leaves) for step in steps)
    if leaves > sentences:
        raise Wrong(f"There are {leaves} steps for {sentences} sentences; each step stands for at least one.")
    return steps


def summary_text(steps: Sequence[Step]) -> str:
    """The tree, a step a line, as the answer has it."""
    return "\n".join(f"{step.id}: {step.text}" for main in steps for step in (main, *main.substeps))


def _from_lines(text: str) -> Any:
    steps: list[Any] = []
    for line in lines_of(text):
        match = _LINE.match(line)
        if match is not None:
            steps.append({"id": match.group(1), "text": match.group(5)})
        elif not steps or line.startswith("S"):  # else a summary that continues in a second line: one line is enough
            raise Wrong(f'Expected lines of the form "S1: text", got "{line[:80]}".')
    return {"steps": steps}
