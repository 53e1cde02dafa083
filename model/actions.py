"""What the interpreter asks its caller to do. Branches are numbered within a request; 0 is the trunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from mvkernels.grammar import Kind


@dataclass(frozen=True, slots=True)
class Fork:
    """`branch` waits from here on while the fresh `children` run."""

    branch: int
    children: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Force:
    """The caller writes these kinds on `branch` next; spaces are newlines, the index is that of the branch's path."""

    branch: int
    kinds: tuple[Kind, ...]


@dataclass(frozen=True, slots=True)
class FinishPath:
    """The path `branch` has ended with its `</Path>`."""

    branch: int


@dataclass(frozen=True, slots=True)
class Merge:
    """All paths of the block have ended: `parent` goes on behind them."""

    parent: int
    children: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The request has ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Warn:
    """Something in `branch` was not as the grammar has it."""

    branch: int
    message: str


Action: TypeAlias = Fork | Force | FinishPath | Merge | Finish | Warn

OPENING_KINDS = (Kind.SPACE, Kind.PATH, Kind.SPACE, Kind.INDEX, Kind.INDEX_END)
JOINING_KINDS = (Kind.SPACE, Kind.CONCLUSION, Kind.SPACE)
