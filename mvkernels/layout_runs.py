"""Runs of tokens from a structure, for `BranchLayout`. A run has consecutive positions and one list of gaps."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from mvkernels.grammar import FIRST_TAG, Kind, Tree

MAX_TOKENS = 2**31 - 1  # positions and offsets are int32
_END = object()  # of a sequence
#: Most gaps of all runs of a document. They grow with the square of the depth and, in released semantics, of a block's
#: paths, because the newlines between paths are visible: 2**22 is 2896 such paths, and 32 MiB.
MAX_GAPS = 2**22
MAX_DEPTH = 2**17  # of a tree; a list that contains itself never ends


@dataclass(frozen=True, eq=False, slots=True)
class Gaps:
    """Half-open intervals of hidden keys: `before`, then one more. Runs share them, so a walk needs linear memory."""

    before: Gaps | None
    first: int
    end: int
    count: int


def _hide(before: Gaps | None, first: int, end: int) -> Gaps:
    return Gaps(before, first, end, 1 if before is None else before.count + 1)


@dataclass
class Runs:
    """Runs of tokens in order; none is empty.

    Attributes:
        starts: First token of each run.
        positions: Position of the first token.
        gaps: Hidden keys of each run; None if it sees all.
        predecessors: The token that predicts the first token of the run; -1 for none or several.
        total_tokens: Of all runs.
        total_gaps: Of all runs.
    """

    starts: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    gaps: list[Gaps | None] = field(default_factory=list)
    predecessors: list[int] = field(default_factory=list)
    total_tokens: int = 0
    total_gaps: int = 0

    def add(self, length: int, position: int, gaps: Gaps | None, predecessor: int) -> None:
        """Add a run. Raises ValueError beyond what int32 offsets or memory hold."""
        if self.total_tokens + length > MAX_TOKENS:
            raise ValueError(f"expected at most {MAX_TOKENS} tokens, got {self.total_tokens + length} or more")
        if length:
            self.starts.append(self.total_tokens)
            self.positions.append(position)
            self.gaps.append(gaps)
            self.predecessors.append(predecessor)
            self.total_tokens += length
            self.total_gaps += gaps.count if gaps is not None else 0
            if self.total_gaps > MAX_GAPS:
                raise ValueError(
                    f"expected a mask of at most {MAX_GAPS} gaps, got more by token {self.total_tokens}: they grow "
                    "with the square of the depth, and in released semantics with the square of a block's paths"
                )

    def gap_arrays(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return gap_ptr [runs + 1] and gaps [G, 2], as in `IntervalMask`."""
        flat: list[int] = []
        written: dict[Gaps, int] = {}  # where the gaps of a run begin; the next run's often continue them
        ends = [0]
        for gaps in self.gaps:
            new: list[int] = []
            known = gaps
            while known is not None and known not in written:
                new += (known.end, known.first)
                known = known.before
            start = len(flat)
            if known is not None:
                flat += flat[written[known] : written[known] + 2 * known.count]
            flat += reversed(new)
            if gaps is not None:
                written[gaps] = start
            ends.append(len(flat) // 2)
        return np.array(ends, dtype=np.int32), np.array(flat, dtype=np.int32).reshape(-1, 2)


@dataclass
class _Fork:
    """A block during the walk."""

    paths: Iterator[Any]
    start: int  # first token of its first path
    position: int  # where each path starts
    predecessor: int
    gaps: Gaps | None
    rest: Iterator[Any]  # what follows the block in its sequence
    highest: int = 0
    ends: set[int] = field(default_factory=set)


def tree_runs(tree: Tree) -> Runs:
    """Compute the canonical runs of a tree, without recursion. Raises ValueError where the tree is malformed."""
    runs = Runs()
    items = _items(tree)
    position, predecessor = 0, -1
    gaps: Gaps | None = None
    forks: list[_Fork] = []
    while True:
        item = next(items, _END)
        if isinstance(item, (int, Integral)):  # numpy's integers are no int
            if item < 0 or isinstance(item, bool):
                raise ValueError(f"tree: expected a text length >= 0, got {reprlib.repr(item)}")
            item = int(item)
            runs.add(item, position, gaps, predecessor)
            position += item
            predecessor = runs.total_tokens - 1 if item else predecessor
        elif item is not _END:
            if len(forks) >= MAX_DEPTH:
                raise ValueError(f"tree: expected blocks nested at most {MAX_DEPTH} deep, got more")
            forks.append(_open_fork(item, runs.total_tokens, position, predecessor, gaps, items))
            items = iter(())
            forks[-1].highest = position
            items, gaps = _next_path(forks[-1], runs.total_tokens)
        elif not forks:
            return runs
        else:
            fork = forks[-1]
            fork.highest = max(fork.highest, position)
            fork.ends.add(predecessor)
            try:
                items, gaps = _next_path(fork, runs.total_tokens)
                position, predecessor = fork.position, fork.predecessor
            except StopIteration:
                forks.pop()
                items, gaps, position = fork.rest, fork.gaps, fork.highest
                predecessor = fork.ends.pop() if len(fork.ends) == 1 else -1


def _items(sequence: Any) -> Iterator[Any]:
    if not isinstance(sequence, (list, tuple)):
        raise ValueError(f"tree: expected a sequence (a list of text lengths and blocks), got {reprlib.repr(sequence)}")
    return iter(sequence)


def _open_fork(
    block: Any, start: int, position: int, predecessor: int, gaps: Gaps | None, rest: Iterator[Any]
) -> _Fork:
    if not isinstance(block, (list, tuple)) or not block:
        got = reprlib.repr(block)  # safe for any depth
        raise ValueError(f"tree: expected a text length or a block (a list of at least one sequence), got {got}")
    return _Fork(iter(block), start, position, predecessor, gaps, rest)


def _next_path(fork: _Fork, cursor: int) -> tuple[Iterator[Any], Gaps | None]:
    """Return the next path's items and its gaps: the paths before it are one hidden interval.

    Raises StopIteration after the last path.
    """
    items = _items(next(fork.paths))
    return items, _hide(fork.gaps, fork.start, cursor) if cursor > fork.start else fork.gaps


@dataclass
class _ReleasedBlock:
    hidden: Gaps | None  # in its next path: what is hidden in the block, then the paths that have ended
    goal_position: int = 0
    path_start: int = 0
    highest: int = -1  # highest position of a `</Path>`


def released_runs(kinds: bytes) -> Runs:
    """Compute the runs of the released Multiverse training code, for kinds that `grammar.parse` accepts.

    The span of a path is `<Path>` to `</Path>` inclusive. Positions go up by one from token to token, with two
    exceptions. `<Path>` has the position of its block's `</Goal>` + 1. `<Conclusion>` has 1 + the highest position of
    the block's `</Path>` tokens.
    """
    runs = Runs()
    blocks: list[_ReleasedBlock] = []
    gaps_of: list[Gaps | None] = [None]  # hidden keys of the open paths, outermost first
    start, position = 0, 0  # of the run that is being read

    def cut(offset: int, next_position: int) -> None:
        nonlocal start, position
        runs.add(offset - start, position, gaps_of[-1], start - 1)
        start, position = offset, next_position

    for offset, kind in enumerate(kinds):
        if kind < FIRST_TAG:
            continue
        here = position + offset - start
        if kind == Kind.PARALLEL:
            blocks.append(_ReleasedBlock(gaps_of[-1]))
        elif kind == Kind.GOAL_END:
            blocks[-1].goal_position = here
        elif kind == Kind.PATH:
            cut(offset, blocks[-1].goal_position + 1)
            blocks[-1].path_start = offset
            gaps_of.append(blocks[-1].hidden)
        elif kind == Kind.PATH_END:
            cut(offset + 1, here + 1)
            gaps_of.pop()
            blocks[-1].hidden = _hide(blocks[-1].hidden, blocks[-1].path_start, offset + 1)
            blocks[-1].highest = max(blocks[-1].highest, here)
        elif kind == Kind.CONCLUSION:
            cut(offset, blocks[-1].highest + 1)
        elif kind == Kind.PARALLEL_END:
            blocks.pop()
    cut(len(kinds), 0)
    return runs
