"""The parts of a request under which the prefix cache keeps its beginning, and where the request stands there."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from mvkernels.cache.step import Branch
from mvkernels.model.engine.kv.cursor import Block, Cursor, inside
from mvkernels.model.engine.kv.prefix_cache import Part, Piece, PrefixCache

# What a key has in place of a token, which is never negative.
_BLOCK, _PATH, _END = -1, -2, -3

Positions = Callable[[int], Sequence[int]]


class RequestPrefix:
    """One request's view of a PrefixCache. trunk: its cursor 0. positions: of a cursor's tokens, by number.

    The request begins with the pieces up to `piece`, which it holds from `hold` to `end` and whose pages its branch
    sees from `begin` on.
    """

    def __init__(self, cache: PrefixCache, trunk: Cursor, positions: Positions) -> None:
        self.cache, self.piece = cache, cache.root
        self.pages = 0  # of the pieces, while they are held
        self._trunk, self._positions = trunk, positions
        self._parts: list[Part] = []
        self._depth = 0  # parts up to `piece`
        self._held = False
        self._looked = (-1, -1)
        self._announced: tuple[Piece, bytes] | None = None

    # ---- before it runs

    def is_coming(self) -> bool:
        """Whether another request is about to compute more of what this one begins with."""
        self._look()
        parts = self._parts
        return self._may_begin_behind(self._depth) and self.cache.is_coming(self.piece, parts[self._depth].key)

    def hold(self) -> int:
        """Keeps the pieces that there are from being given up, and announces the next one; returns their pages."""
        if not self._held:
            self._look()
            self.cache.hold(self.piece)
            self._held = True
            self.pages = sum(part.pages for part in self._parts[: self._depth])
            if self._depth < len(self._parts):
                self._announced = self.piece, self._parts[self._depth].key
                self.cache.announce(*self._announced, self)
        return self.pages

    def begin(self) -> tuple[Branch, Part]:
        """The request's branch, and what it has there: what the pieces hold in all."""
        self.hold()
        branch = self.cache.begin(self.piece)
        given, passed = self.piece.part.given, self.piece.part.passed
        return branch, Part(b"", given, passed, given, self.pages, self.piece.seen)

    # ---- while it runs

    def share(self, branch: Branch, given: int, passed: int) -> None:
        """The trunk's first `given` tokens and `passed` blocks are in the cache, in the list of `branch`."""
        self._read_on()
        end = self._depth
        while end < len(self._parts) and self._parts[end].least <= given and self._parts[end].passed <= passed:
            end += 1
        added = self._parts[self._depth : end]
        last = self.cache.add(self.piece, added, branch)
        if last is not self.piece:
            self.cache.hold(last)
            self.cache.release(self.piece)
            self.piece, self._depth = last, end
            self.pages += sum(part.pages for part in added)
        self._withdraw()

    def end(self) -> None:
        """The request gives up its branch, and with it the pieces."""
        self._withdraw()
        if self._held:
            self.cache.release(self.piece)
        self._held = False
        self.piece, self.pages, self._depth, self._looked = self.cache.root, 0, 0, (-1, -1)

    # ---- inside

    def _withdraw(self) -> None:
        if self._announced is not None:
            self.cache.withdraw(*self._announced, self)
            self._announced = None

    def _look(self) -> None:
        """Finds the pieces, unless nothing has changed. At least one token of the trunk is left to compute."""
        now = self.cache.version, len(self._trunk.tokens)
        if self._held or self._looked == now:
            return
        self._looked = now
        self._read_on()
        last = len(self._parts)
        while last and not self._may_begin_behind(last - 1):
            last -= 1
        self.piece, self._depth = self.cache.find(self._parts[:last])

    def _may_begin_behind(self, index: int) -> bool:
        """Whether the part is one that the request may begin behind."""
        return index < len(self._parts) and self._parts[index].given < len(self._trunk.tokens)

    def _read_on(self) -> None:
        """Adds the parts that the structure has meanwhile."""
        trunk, size = self._trunk, self.cache.cache.page_size
        given, passed = (self._parts[-1].given, self._parts[-1].passed) if self._parts else (0, 0)
        positions = self._positions(trunk.number)
        while True:
            block = trunk.blocks[passed] if passed < len(trunk.blocks) else None
            limit = len(trunk.tokens) if block is None else block.at
            while given + size <= limit:
                key = array("q", trunk.tokens[given : given + size])
                key.extend(positions[given : given + size])
                given += size
                self._parts.append(Part(key.tobytes(), given, passed, given, 1, size))
            if block is None or not block.merged:
                return
            self._parts.append(self._block_part(block, given, passed + 1))
            given, passed = block.at, passed + 1

    def _block_part(self, block: Block, given: int, passed: int) -> Part:
        """A whole block with the tokens of the trunk before it, from `given` on, which fill no page."""
        key = array("q", [_BLOCK])
        self._write(key, self._trunk, given, block.at)
        work: list[tuple[Cursor, int, int] | None] = [(cursor, 0, 0) for cursor in reversed(block.children)]
        while work:
            item = work.pop()
            if item is None:
                key.append(_END)
                continue
            cursor, first, index = item
            if not first and not index:
                key.append(_PATH)
                work.append(None)
            if index == len(cursor.blocks):
                self._write(key, cursor, first, len(cursor.tokens))
                continue
            inner = cursor.blocks[index]
            self._write(key, cursor, first, inner.at)
            key.append(_BLOCK)
            work.append((cursor, inner.at, index + 1))
            work.append(None)
            work += [(child, 0, 0) for child in reversed(inner.children)]
        size = self.cache.cache.page_size
        pages, tokens = -(-(block.at - given) // size), block.at - given
        for cursor in inside(block):
            tokens += len(cursor.tokens)
            ends = [inner.at for inner in cursor.blocks]
            pages += sum(-(-(b - a) // size) for a, b in zip([0, *ends], [*ends, len(cursor.tokens)], strict=True))
        return Part(key.tobytes(), block.at, passed, block.at + 1, pages, tokens)

    def _write(self, key: array[int], cursor: Cursor, first: int, last: int) -> None:
        """Tokens and positions of a run."""
        key.extend(cursor.tokens[first:last])
        key.extend(self._positions(cursor.number)[first:last])
