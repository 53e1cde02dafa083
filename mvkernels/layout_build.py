"""From structure to runs of tokens: the walk behind `BranchLayout`. One run has consecutive positions and one list of
gaps.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from mvkernels.grammar import FIRST_TAG, Kind, Tree

MAX_TOKENS = 2**31 - 1  # positions and offsets are int32
Gaps = tuple[tuple[int, int], ...]
_END = object()  # of a sequence


@dataclass
class Runs:
    """Runs of tokens in order; none is empty.

    starts: first token. positions: position of the first token. gaps: half-open intervals of hidden keys.
    predecessors: the token that predicts the run's first, -1 for none or several.
    """

    starts: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    gaps: list[Gaps] = field(default_factory=list)
    predecessors: list[int] = field(default_factory=list)
    total_tokens: int = 0

    def add(self, length: int, position: int, gaps: Gaps, predecessor: int) -> None:
        if self.total_tokens + length > MAX_TOKENS:
            raise ValueError(f"expected at most {MAX_TOKENS} tokens, got {self.total_tokens + length} or more")
        if length:
            self.starts.append(self.total_tokens)
            self.positions.append(position)
            self.gaps.append(gaps)
            self.predecessors.append(predecessor)
            self.total_tokens += length


@dataclass
class _Fork:
    """A block that is being walked."""

    paths: Iterator[Any]
    start: int  # first token of its first path
    position: int  # where each path starts
    predecessor: int
    gaps: Gaps
    rest: Iterator[Any]  # what follows the block in its sequence
    highest: int = 0
    ends: set[int] = field(default_factory=set)


def tree_runs(tree: Tree) -> Runs:
    """Canonical runs of a tree. Raises ValueError where the tree is malformed. No recursion: depth has no limit."""
    runs = Runs()
    items = _items(tree)
    position, predecessor = 0, -1
    gaps = Gaps()
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


def _open_fork(block: Any, start: int, position: int, predecessor: int, gaps: Gaps, rest: Iterator[Any]) -> _Fork:
    if not isinstance(block, (list, tuple)) or not block:
        got = reprlib.repr(block)  # safe for any depth
        raise ValueError(f"tree: expected a text length or a block (a list of at least one sequence), got {got}")
    return _Fork(iter(block), start, position, predecessor, gaps, rest)


def _next_path(fork: _Fork, cursor: int) -> tuple[Iterator[Any], Gaps]:
    """The next path's items and what it does not see: the paths before it, as one interval. StopIteration after the
    last.
    """
    items = _items(next(fork.paths))
    hidden = ((fork.start, cursor),) if cursor > fork.start else ()
    return items, fork.gaps + hidden


@dataclass
class _ReleasedBlock:
    goal_position: int = 0
    closed: list[tuple[int, int]] = field(default_factory=list)  # spans of the paths that have ended
    path_start: int = 0
    highest: int = -1  # highest position of a `</Path>`


def released_runs(kinds: bytes) -> Runs:
    """Runs in the layout of the released Multiverse training code, for kinds that `grammar.parse` accepts.

    A path's span is `<Path>` to `</Path>` inclusive. Positions go up by one from token to token, except `<Path>` =
    position of its block's `</Goal>` + 1, and `<Conclusion>` = 1 + the highest position of the block's `</Path>`
    tokens.
    """
    runs = Runs()
    blocks: list[_ReleasedBlock] = []
    gaps_of: list[Gaps] = [()]  # what is hidden in the open paths, from the outside in
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
            blocks.append(_ReleasedBlock())
        elif kind == Kind.GOAL_END:
            blocks[-1].goal_position = here
        elif kind == Kind.PATH:
            cut(offset, blocks[-1].goal_position + 1)
            blocks[-1].path_start = offset
            gaps_of.append(gaps_of[-1] + tuple(blocks[-1].closed))
        elif kind == Kind.PATH_END:
            cut(offset + 1, here + 1)
            gaps_of.pop()
            blocks[-1].closed.append((blocks[-1].path_start, offset + 1))
            blocks[-1].highest = max(blocks[-1].highest, here)
        elif kind == Kind.CONCLUSION:
            cut(offset, blocks[-1].highest + 1)
        elif kind == Kind.PARALLEL_END:
            blocks.pop()
    cut(len(kinds), 0)
    return runs
