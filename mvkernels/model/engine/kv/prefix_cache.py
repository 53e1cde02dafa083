"""PrefixCache: beginnings of requests whose keys and values are in pages, for others that begin in the same way.

A *part* of a request is a page of its trunk, or a whole block together with the tokens before it that fill no page
(`prefix_chunks`). A *piece* is a part that is in the cache. Pieces form a tree: a request may begin with a piece if it
begins with all pieces before it, and its next part has the same key: the same tokens at the same positions, in the same
structure. Keys are compared as they are, not as hashes, and stored keys are rotated by their positions; so the same
tokens elsewhere, or behind another path, are another piece.

    held    by a request that sees the piece, or by a held piece behind it
    idle    not held. Its pages count as available: they are evicted when pages are needed, least recently used first,
            and a piece only after those behind it

Of a chain of pieces the last one has a branch of the cache that sees them all; where a request begins further up, or
the end of the chain is given up, `PagedKVCache.fork_at` makes another. No key or value moves, and none is owned twice.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Branch


class Part(NamedTuple):
    """One part of a request. given, passed: what its trunk has of tokens and blocks at the end of the part.

    least: tokens that the trunk must have in the cache for the part to be whole there: one behind a join. pages,
    tokens: of this part alone.
    """

    key: bytes
    given: int
    passed: int
    least: int
    pages: int
    tokens: int


@dataclass(eq=False, slots=True)
class Piece:
    """A part in the cache. seen: tokens up to its end. holders: requests whose last piece it is, and held pieces right
    behind it. used: when a request last began with it. handle: a branch that sees all of it, and nothing else.
    """

    parent: Piece | None
    part: Part
    seen: int
    used: int
    handle: Branch | None = None
    holders: int = 0
    children: dict[bytes, Piece] = field(default_factory=dict)


class PrefixCache:
    """See the module's docstring. What raises leaves everything as it was.

    size         pieces in the cache. idle_pages: pages of those that no request uses
    hits         tokens that requests found here instead of computing them
    version      changes whenever other pieces can be found
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.size = self.idle_pages = self.hits = self.version = 0
        self.root = Piece(None, Part(b"", 0, 0, 0, 0, 0), 0, 0, holders=1)
        self._coming: dict[tuple[Piece, bytes], object] = {}
        self._clock = count(1)
        self._oldest: list[tuple[int, int, Piece]] = []  # idle pieces with none behind them, and some that were such
        self._pushed = count()

    # ---- requests begin

    def find(self, parts: Sequence[Part]) -> tuple[Piece, int]:
        """The last piece that a request of these parts begins with, and how many they are."""
        piece = self.root
        for found, part in enumerate(parts):
            behind = piece.children.get(part.key)
            if behind is None:
                return piece, found
            piece = behind
        return piece, len(parts)

    def begin(self, piece: Piece) -> Branch:
        """A branch that sees all up to the end of a piece, for a request that holds it."""
        self._touch(piece)
        if piece is self.root:
            return self.cache.new()
        branch = self._branch(piece)
        self.hits += piece.seen
        return branch

    def announce(self, piece: Piece, key: bytes, owner: object) -> None:
        """The owner is about to compute the part behind a piece."""
        self._coming.setdefault((piece, key), owner)

    def withdraw(self, piece: Piece, key: bytes, owner: object) -> None:
        """It is there, or never comes."""
        if self._coming.get((piece, key)) is owner:
            del self._coming[piece, key]

    def is_coming(self, piece: Piece, key: bytes) -> bool:
        """Whether some request is about to compute the part behind a piece."""
        return (piece, key) in self._coming

    # ---- what is there

    def add(self, piece: Piece, parts: Sequence[Part], branch: Branch) -> Piece:
        """The parts that stand behind a piece in the list of `branch`, in the cache; returns the last one of them.

        Where another request has brought the same first one, its pages stay the only ones, and none is added.
        """
        if not parts or parts[0].key in piece.children:
            return piece
        seen = piece.seen + sum(part.tokens for part in parts)
        handle = self.cache.fork_at(branch, seen)
        self._touch(piece)
        for part in parts:
            piece.children[part.key] = behind = Piece(piece, part, piece.seen + part.tokens, piece.used)
            piece = behind
            self.idle_pages += part.pages
        piece.handle = handle
        self.size += len(parts)
        self._push(piece)
        self.version += 1
        return piece

    def hold(self, piece: Piece) -> None:
        """A request begins with a piece, and all before it."""
        at: Piece | None = piece
        while at is not None:
            at.holders += 1
            if at.holders > 1:
                return
            self.idle_pages -= at.part.pages
            at = at.parent

    def release(self, piece: Piece) -> None:
        """It ends, or has to wait."""
        at: Piece | None = piece
        while at is not None:
            at.holders -= 1
            if at.holders:
                break
            self.idle_pages += at.part.pages
            at = at.parent
        self._push(piece)

    # ---- pages go back

    def evict(self, pages: int, least: int = 1) -> bool:
        """Gives up so many idle pages, or all there are, or none if they are fewer than `least`. Whether any came."""
        if self.idle_pages < max(least, 1):
            return False
        wanted = max(self.idle_pages - pages, 0)
        while self.idle_pages > wanted:
            self._give_up(self._next(), self.idle_pages - wanted)
        return True

    def clear(self) -> None:
        """Gives up all that no request uses."""
        self.evict(self.idle_pages)

    def _next(self) -> Piece:
        """The idle piece with none behind it that was not used for longest."""
        while True:
            used, _, piece = self._oldest[0]
            if self._may_go(piece) and piece.used == used:
                return piece
            heapq.heappop(self._oldest)

    def _may_go(self, piece: Piece) -> bool:
        return piece.handle is not None and not piece.holders and not piece.children

    def _give_up(self, last: Piece, wanted: int) -> None:
        """A piece goes, with those before it that were used as long ago, until so many pages have come."""
        first, pages, going = last, last.part.pages, 1
        before = last.parent
        while (
            pages < wanted
            and before is not None
            and not before.holders
            and before.handle is None
            and before.used == last.used
            and len(before.children) == 1
        ):
            first, before = before, before.parent
            pages, going = pages + first.part.pages, going + 1
        assert before is not None and last.handle is not None
        alone = len(before.children) == 1
        if alone and before is not self.root and before.handle is None:
            before.handle = self.cache.fork_at(last.handle, before.seen)
        self.cache.free(last.handle)
        last.handle = None
        del before.children[first.part.key]
        self.idle_pages -= pages
        self.size -= going
        self.version += 1
        self._push(before)

    # ---- inside

    def _branch(self, piece: Piece) -> Branch:
        below = piece
        while below.handle is None:
            below = next(iter(below.children.values()))
        return self.cache.fork_at(below.handle, piece.seen)

    def _touch(self, piece: Piece) -> None:
        now = next(self._clock)
        at: Piece | None = piece
        while at is not None:
            at.used = now
            at = at.parent

    def _push(self, piece: Piece) -> None:
        if self._may_go(piece):
            heapq.heappush(self._oldest, (piece.used, next(self._pushed), piece))
        if len(self._oldest) > 4 * (self.size + 16):  # drop those that went or were used since
            left = {at: (used, number, at) for used, number, at in self._oldest if self._may_go(at) and at.used == used}
            self._oldest = sorted(left.values())
