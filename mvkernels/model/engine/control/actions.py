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
    """The caller writes these kinds on `branch` next; spaces are newlines, and the index is `index`."""

    branch: int
    kinds: tuple[Kind, ...]
    index: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FinishPath:
    """The path `branch` has ended with its `</Path>`. reason: why the engine wrote that, None where it did not."""

    branch: int
    reason: str | None = None


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
