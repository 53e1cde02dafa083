"""Stage 3: the steps in their order, with blocks around the paths of parallel groups."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mvkernels.model.curator.answers import Wrong, answer_data, lines_of, one_line
from mvkernels.model.curator.groups import Group, Paths, paths_text
from mvkernels.model.curator.summary import Step, main_of

_TAGS = ("<Parallel>", "</Parallel>", "<Path>", "</Path>")
_PIECE = re.compile(r"</?(?:Parallel|Path)>|S\d+(?:\.\d+)?(?=\b)")
#: Blocks inside one another.
DEEPEST = 2


@dataclass(frozen=True)
class ParallelBlock:
    """number: of the block in the chain, from 1, in the order of their beginnings."""

    number: int
    paths: tuple[tuple[Node, ...], ...]


#: A step by its id, or a block.
Node: TypeAlias = "str | ParallelBlock"


def blocks_of(nodes: Sequence[Node]) -> Iterator[ParallelBlock]:
    """All blocks, each behind the blocks inside it."""
    for node in nodes:
        if isinstance(node, ParallelBlock):
            for path in node.paths:
                yield from blocks_of(path)
            yield node


def steps_of(nodes: Sequence[Node]) -> Iterator[str]:
    """The ids of the steps, in order."""
    for node in nodes:
        if isinstance(node, ParallelBlock):
            for path in node.paths:
                yield from steps_of(path)
        else:
            yield node


def read_structure(answer: str, steps: Sequence[Step], groups: Sequence[Group]) -> tuple[Node, ...]:
    """The structure of an answer. Raises Wrong.

    Steps whose substeps are not parallel come as one. Without a block, no group held on second thought.
    """
    data = answer_data(answer, "structure", lambda text: {"lines": text.splitlines()})
    nodes = _nodes(_pieces("\n".join(map(one_line, data["lines"]))))
    nodes = _without_headings(nodes, {step.id: set(step.leaves) for step in steps})
    got = list(steps_of(nodes))
    there = set(got)
    expected = [leaf for step in steps for leaf in ((step.id,) if step.id in there else step.leaves)]
    if got != expected:
        where = next((i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), None)
        if where is None:
            more = [f"{step} is missing" for step in expected[len(got) :][:1]]
            more += [f"{step} is there once too often" for step in got[len(expected) :][:1]]
            raise Wrong(f"Every step stands in the structure once, in its order: {', '.join(more)}.")
        raise Wrong(
            f"Every step stands in the structure once, in its order: expected {expected[where]}, got {got[where]}."
        )
    _check_blocks(nodes, steps, {group.paths for group in groups})
    return _renumbered(_joined(nodes, steps))


def _pieces(text: str) -> list[str]:
    pieces = []
    for line in lines_of(text):
        found = _PIECE.findall(line)
        if not found:
            raise Wrong(f'Expected a step or one of {", ".join(_TAGS)} on each line, got "{line[:80]}".')
        # Behind a step there may be its text, which may name other steps.
        cut = next((i for i, piece in enumerate(found) if piece not in _TAGS), len(found) - 1)
        pieces += found[: cut + 1] + [piece for piece in found[cut + 1 :] if piece in _TAGS]
    return pieces


def _nodes(pieces: Sequence[str]) -> tuple[Node, ...]:
    """The pieces as a tree. Raises Wrong where tags do not fit together."""
    trunk: list[Node] = []
    open_tags: list[str] = []
    sequences: list[list[Node]] = [trunk]
    paths: list[list[tuple[Node, ...]]] = []
    for piece in pieces:
        inside = open_tags[-1] if open_tags else ""
        if piece == "<Parallel>" and inside != "<Parallel>":
            if len(paths) == DEEPEST:
                raise Wrong(f"Blocks are nested {DEEPEST} deep at most.")
            open_tags.append(piece)
            paths.append([])
        elif piece == "<Path>" and inside == "<Parallel>":
            open_tags.append(piece)
            sequences.append([])
        elif piece == "</Path>" and inside == "<Path>":
            open_tags.pop()
            paths[-1].append(tuple(sequences.pop()))
        elif piece == "</Parallel>" and inside == "<Parallel>":
            open_tags.pop()
            sequences[-1].append(ParallelBlock(0, tuple(paths.pop())))
        elif piece not in _TAGS and inside != "<Parallel>":
            sequences[-1].append(piece)
        else:
            raise Wrong(f"{piece} cannot stand {'within ' + inside if inside else 'outside of a block'}.")
    if open_tags:
        raise Wrong(f"{open_tags[-1]} is not closed.")
    return tuple(trunk)


def _without_headings(nodes: Sequence[Node], leaves: dict[str, set[str]]) -> tuple[Node, ...]:
    """The nodes without divided steps that are followed by their substeps."""
    kept: list[Node] = []
    following: str | None = None
    for node in reversed(nodes):
        if isinstance(node, ParallelBlock):
            kept.append(ParallelBlock(0, tuple(_without_headings(path, leaves) for path in node.paths)))
        elif following is None or following == node or following not in leaves.get(node, ()):
            kept.append(node)
        following = next(steps_of([node]), following)
    return tuple(reversed(kept))


def _check_blocks(nodes: Sequence[Node], steps: Sequence[Step], groups: set[Paths]) -> None:
    for node in nodes:
        if not isinstance(node, ParallelBlock):
            continue
        paths = _as_group(node, steps)
        if len(paths) < 2 or paths not in groups:
            known = "; ".join(map(paths_text, sorted(groups)))
            raise Wrong(f"The block {paths_text(paths)} is no parallel group of your analysis ({known}).")
        for path in node.paths:
            _check_blocks(path, steps, groups)


def _as_group(block: ParallelBlock, steps: Sequence[Step]) -> Paths:
    """The paths in terms of main steps, or of substeps where all are of one step."""
    flat = [tuple(steps_of(path)) for path in block.paths]
    mains = {main_of(step) for path in flat for step in path}
    if len(mains) == 1 and all("." in step for path in flat for step in path):
        return tuple(flat)
    count = Counter(step for path in flat for step in path)
    whole = {step.id for step in steps if step.id in count or all(leaf in count for leaf in step.leaves)}
    return tuple(
        tuple(dict.fromkeys(main_of(step) if main_of(step) in whole else step for step in path)) for path in flat
    )


def _joined(nodes: Sequence[Node], steps: Sequence[Step]) -> tuple[Node, ...]:
    """The same, with the substeps of a step as that step where all stand in one sequence with no block."""
    divided = {step.leaves: step.id for step in steps if step.substeps}
    joined: list[Node] = []
    for node in nodes:
        if isinstance(node, ParallelBlock):
            joined.append(ParallelBlock(0, tuple(_joined(path, steps) for path in node.paths)))
            continue
        joined.append(node)
        for leaves, whole in divided.items():
            if node == leaves[-1] and tuple(joined[-len(leaves) :]) == leaves:
                joined[-len(leaves) :] = [whole]
    return tuple(joined)


def _renumbered(nodes: Sequence[Node], counter: list[int] | None = None) -> tuple[Node, ...]:
    counter = [0] if counter is None else counter
    found: list[Node] = []
    for node in nodes:
        if isinstance(node, ParallelBlock):
            counter[0] += 1
            number = counter[0]
            found.append(ParallelBlock(number, tuple(_renumbered(path, counter) for path in node.paths)))
        else:
            found.append(node)
    return tuple(found)
