"""The branches of a request as its side of the cache sees them: what they have, and how far the cache has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from mvkernels.cache.step import Branch


@dataclass(slots=True, eq=False)
class Block:
    """Paths that fork from a branch behind its first `at` tokens.

    merged: the structure has joined them. forked, joined: the cache has; a step that is taken back does not undo this.
    left: of a merged block, the paths whose last tokens were not handed out yet.
    """

    at: int
    children: list[Cursor]
    merged: bool = False
    forked: bool = False
    joined: bool = False
    left: int = 0


@dataclass(slots=True, eq=False)
class Cursor:
    """Where a branch stands in the cache. tokens: its own. home: the block that it is a path of.

    given: tokens handed out, in the cache or in the step that is made. passed: blocks behind it, handed out too.
    filled: tokens handed out since the last fork or join, in the node that the cache writes.
    reached: what its next token follows was handed out. in_step: it has an entry in this step.
    """

    number: int
    parent: Cursor | None = None
    home: Block | None = None
    tokens: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    handle: Branch | None = None
    given: int = 0
    passed: int = 0
    filled: int = 0
    reached: bool = False
    in_step: bool = False

    @property
    def limit(self) -> int:
        """Tokens that it has before it forks next."""
        return self.blocks[self.passed].at if self.passed < len(self.blocks) else len(self.tokens)

    @property
    def through(self) -> bool:
        """Whether all that it has was handed out."""
        return self.reached and self.passed == len(self.blocks) and self.given == len(self.tokens)


def inside(block: Block) -> list[Cursor]:
    """The paths of a block, and those of all blocks in them. A loop, because depth has no limit."""
    found = [*block.children]
    for cursor in found:
        for inner in cursor.blocks:
            found += inner.children
    return found
