"""RequestKV: the cache side of one request. It is told of tokens, forks and merges, and says what goes into a step.

The structure grows first, as fast as the interpreter reads it; the cache follows, with a cursor on each branch:

    extend, fork, merge     the structure: one more token, paths that begin, paths that have joined
    entries                 tokens that may go into the next step, on which branches; what they follow comes before
                            them, in this step or an earlier one, and the cache forks and merges when their turn comes
    sent, unsent            that step was committed, or it was not and the cursors go back
    confirm                 what was sent gave good logits, so others may begin with it
    evict                   every page goes back and every cursor to 0: what comes next is the whole request again,
                            token for token and position for position

So a prompt's replay, decoding and the recomputation of a request that had to make room are one thing. A step takes as
much as the cache allows (`cache.cache`, "Growing"): a branch's tokens up to where it forks, with the first ones of its
paths; the last tokens of paths, with the first ones behind their join; but only one run of tokens of each branch.

With a PrefixCache, a request that enters the cache begins behind what it finds there, as if that had been sent; and
leaves there what was confirmed: its prompt with the first token that is sampled behind it, the rest when it is evicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Branch
from mvkernels.model.engine.kv.cursor import Block, Cursor, inside
from mvkernels.model.engine.kv.prefix_cache import Part, PrefixCache
from mvkernels.model.engine.kv.prefix_chunks import Positions, RequestPrefix


@dataclass(slots=True)  # not frozen, which makes them three times as slow to create
class Entry:
    """Tokens first .. first + count - 1 of a branch go into a step; handle: the cache's."""

    branch: int
    handle: Branch
    first: int
    count: int


class RequestKV:
    """See the module's docstring. Branches are numbers of the caller's; 0 is the trunk, and there from the beginning.

    prefixes: where beginnings of requests are kept; for that `positions` says where the tokens of a branch stand. It
    holds nothing in the cache before the first `entries`. Figures, all kept as they change:

    unsent_tokens   tokens that are not handed out
    most_pages      pages of the whole structure. num_pages: those that are in the cache
    step_tokens     that the latest `entries` hand out
    new_pages       that these take. short: how many more they would have taken, had there been any
    starved         whether they left a branch out for want of pages
    """

    def __init__(
        self, cache: PagedKVCache, prefixes: PrefixCache | None = None, positions: Positions | None = None
    ) -> None:
        self.cache = cache
        self.unsent_tokens = self.most_pages = self.num_pages = 0
        self.step_tokens = self.new_pages = self.short = 0
        self.starved = False
        self._trunk = Cursor(0, reached=True)
        self._prefix = None
        if prefixes is not None and positions is not None:
            self._prefix = RequestPrefix(prefixes, self._trunk, positions)
        self._confirmed: tuple[int, int] | None = None  # tokens and blocks of the trunk
        self._cursors: dict[int, Cursor] = {0: self._trunk}
        self._ready: dict[Cursor, None] = {}  # reached, with tokens; the longest waiting first
        self._due: list[Cursor] = []  # reached, and to fork or to join before the next step
        # What has an entry in the step that is made, with its `given` and `filled` of before.
        self._step: list[tuple[Cursor, int, int]] | None = None
        self._queue: deque[Cursor] = deque()
        # What else `unsent` restores: cursors one by one, and the rest as it was.
        self._undo: list[tuple[Any, str, Any]] = []
        self._before: tuple[dict[Cursor, None], list[Cursor], int, int] = ({}, [], 0, 0)

    # ---- the structure

    def tokens(self, branch: int) -> list[int]:
        """The branch's own tokens so far; `extend` lengthens this list."""
        return self._cursors[branch].tokens

    def extend(self, branch: int, *tokens: int) -> None:
        """More tokens on a branch that no open block stands behind."""
        cursor = self._growing(branch)
        size, blocks = self.cache.page_size, cursor.blocks
        first = len(cursor.tokens) - (blocks[-1].at if blocks else 0)
        self.most_pages += -(-(first + len(tokens)) // size) - -(-first // size)
        cursor.tokens += tokens
        self.unsent_tokens += len(tokens)
        if cursor.reached and cursor.passed == len(blocks):
            self._ready[cursor] = None

    def fork(self, branch: int, children: Sequence[int]) -> None:
        """Paths with fresh numbers begin behind what the branch has."""
        cursor = self._growing(branch)
        fresh = [number for number in children if number not in self._cursors]
        if not children or len({*fresh}) < len(children):
            raise ValueError(f"fork: expected fresh numbers of branches, got {list(children)}")
        block = Block(len(cursor.tokens), [])
        for number in children:
            self._cursors[number] = child = Cursor(number, cursor, block)
            block.children.append(child)
        if cursor.through and cursor not in self._due:
            self._due.append(cursor)
        cursor.blocks.append(block)

    def merge(self, branch: int) -> None:
        """The paths of the branch's open block have ended; the branch goes on behind them."""
        self._between_steps()
        cursor = self._cursors[branch]
        if not cursor.blocks or cursor.blocks[-1].merged:
            raise ValueError(f"merge: expected a branch with an open block, got {branch}")
        block = cursor.blocks[-1]
        for child in block.children:
            if child.blocks and not child.blocks[-1].merged:
                raise ValueError(f"merge: expected paths without open blocks, got {child.number} with one")
        block.merged = True
        if cursor.passed == len(cursor.blocks) - 1 and block.children[0].handle is not None:
            block.left = sum(not child.through for child in block.children)
            if not block.left:
                self._due.append(cursor)

    def has_all(self, branch: int) -> bool:
        """Whether the branch's last token was handed out, and nothing stands behind it."""
        cursor = self._cursors[branch]  # as `cursor.through`, without another call
        return cursor.reached and cursor.given == len(cursor.tokens) and cursor.passed == len(cursor.blocks)

    # ---- steps

    def entries(
        self,
        max_tokens: int,
        max_branches: int | None = None,
        max_pages: int | None = None,
        may: Callable[[int], bool] | None = None,
    ) -> list[Entry]:
        """What goes into the next step, in the order in which it is to be planned; then `sent` or `unsent`.

        The branches that have waited longest come first. At most max_tokens tokens of max_branches branches, in
        max_pages new pages. may: which branches are allowed. Raises what the cache raises; nothing is handed out then.
        """
        self._between_steps()
        if self._trunk.handle is None:
            self._enter()
        self._before = self._ready, self._due, self.unsent_tokens, self.num_pages
        self._ready = self._ready.copy()
        self._step, self.starved, self.short = [], False, 0
        try:
            return self._entries(max_tokens, max_branches, max_pages, may)
        except BaseException:
            self.unsent()
            raise

    def _entries(
        self, tokens: int, branches: int | None, pages: int | None, may: Callable[[int], bool] | None
    ) -> list[Entry]:
        assert self._step is not None
        due, self._due = self._due, []
        for cursor in due:
            self._settle(cursor)
        ready, step, size = self._ready, self._step, self.cache.page_size
        queue = self._queue = deque(ready)
        out: list[Entry] = []
        left, taken = tokens, 0
        while queue and left > 0 and (branches is None or len(out) < branches):
            cursor = queue.popleft()
            if may is not None and not may(cursor.number):
                continue
            first, filled = cursor.given, cursor.filled
            forks = cursor.passed < len(cursor.blocks)
            limit = cursor.limit if forks else len(cursor.tokens)
            count = min(limit - first, left)
            room = -filled % size
            if count > room:
                new = -(-(count - room) // size)
                if pages is not None and new > pages - taken:
                    self.short += new - (pages - taken)
                    new = pages - taken
                    count = room + new * size
                    if not count:
                        self.starved = True
                        continue
                taken += new
            assert cursor.handle is not None
            out.append(Entry(cursor.number, cursor.handle, first, count))
            step.append((cursor, first, filled))
            cursor.in_step = True
            cursor.given, cursor.filled = first + count, filled + count
            left -= count
            del ready[cursor]
            if first + count < limit:
                ready[cursor] = None  # behind those that had no turn
            elif forks or (cursor.home is not None and cursor.home.merged):
                self._settle(cursor)
        self.step_tokens, self.new_pages = tokens - left, taken
        self.unsent_tokens -= tokens - left
        self.num_pages += taken
        return out

    def sent(self) -> None:
        """The step was committed."""
        for cursor, _, _ in self._step or ():
            cursor.in_step = False
        self._step = None
        if self._undo:
            self._undo.clear()

    def unsent(self) -> None:
        """The step was not committed: its tokens are to be handed out again. Without a step it changes nothing."""
        if self._step is None:
            return
        for cursor, given, filled in reversed(self._step):  # what one passed in this step it passed before its tokens
            cursor.given, cursor.filled = given, filled
        for item, name, value in reversed(self._undo):
            setattr(item, name, value)
        self._ready, self._due, self.unsent_tokens, self.num_pages = self._before
        self.sent()

    def confirm(self) -> None:
        """Behind tokens that were sent, good logits came: so all that they see is good. At first that is the prompt."""
        first, self._confirmed = self._confirmed is None, (self._trunk.given, self._trunk.passed)
        if first:
            self._share()

    def evict(self) -> None:
        """Gives every page back; what is handed out next is the whole request again."""
        self._between_steps()
        if self._trunk.handle is not None:
            self._share()
            self.cache.evict(self._trunk.handle)
        if self._prefix is not None:
            self._prefix.end()
        self._confirmed = None
        self.unsent_tokens = self.num_pages = 0
        for cursor in self._cursors.values():
            cursor.handle, cursor.given, cursor.passed, cursor.filled, cursor.reached = None, 0, 0, 0, False
            self.unsent_tokens += len(cursor.tokens)
            for block in cursor.blocks:
                block.forked = block.joined = False
        self._trunk.reached = True
        self._ready.clear()
        self._due = [self._trunk]

    # ---- beginnings that others have computed

    def awaits_prefix(self) -> bool:
        """Whether another request is about to compute more of what this one begins with, and it had better wait."""
        return self._prefix is not None and self._trunk.handle is None and self._prefix.is_coming()

    def hold_prefix(self) -> int:
        """Keeps what it finds of its beginning from being given up; the pages that it still needs for all that it has.
        It has entered the cache, or `release_prefix` comes.
        """
        if self._prefix is None or self._trunk.handle is not None:
            return self.most_pages - self.num_pages
        return self.most_pages - self._prefix.hold()

    def release_prefix(self) -> None:
        """It does not enter the cache now."""
        if self._prefix is not None and self._trunk.handle is None:
            self._prefix.end()

    def _enter(self) -> None:
        """The trunk's branch of the cache, behind what is there already."""
        if self._prefix is None:
            self._trunk.handle = self.cache.new()
            return
        self._trunk.handle, found = self._prefix.begin()
        if found.tokens:
            self._pass(found)

    def _pass(self, found: Part) -> None:
        """So much of the trunk is in the cache, as if it had been sent."""
        trunk = self._trunk
        trunk.given, trunk.passed = found.given, found.passed
        self.unsent_tokens -= found.tokens
        self.num_pages += found.pages
        for block in trunk.blocks[: found.passed]:
            for cursor in inside(block):
                cursor.given, cursor.passed, cursor.reached = len(cursor.tokens), len(cursor.blocks), True
        self._ready.clear()
        self._due = [trunk]

    def _share(self) -> None:
        if self._prefix is not None and self._confirmed is not None and self._trunk.handle is not None:
            self._prefix.share(self._trunk.handle, *self._confirmed)

    # ---- inside

    def _between_steps(self) -> None:
        if self._step is not None:
            raise RuntimeError("expected the step before to be sent or taken back, got one that is made still")

    def _growing(self, branch: int) -> Cursor:
        if self._step is not None:
            self._between_steps()
        cursor = self._cursors[branch]
        if (cursor.blocks and not cursor.blocks[-1].merged) or (cursor.home is not None and cursor.home.merged):
            raise ValueError(f"expected a branch that may grow, got {branch}, which has ended or waits for its paths")
        return cursor

    def _set(self, item: Cursor | Block, name: str, value: object) -> None:
        self._undo.append((item, name, getattr(item, name)))
        setattr(item, name, value)

    def _settle(self, cursor: Cursor) -> None:
        """Go on where all tokens before a cursor are handed out: here, and at the cursors that waited for them."""
        work = [cursor]
        while work:
            cursor = work.pop()
            block = cursor.blocks[cursor.passed] if cursor.passed < len(cursor.blocks) else None
            if cursor.given < cursor.limit:
                self._ready[cursor] = None
                self._queue.append(cursor)
            elif block is not None and cursor.reached:
                self._begin(cursor, block)
                work += reversed(block.children)
            elif block is not None:  # all of its paths are through
                if cursor.in_step:  # its tokens before the fork are in this step, and it can have no others
                    self._due.append(cursor)
                    continue
                self._join(cursor, block)
                work.append(cursor)
            elif cursor.home is not None and cursor.home.merged:
                self._set(cursor.home, "left", cursor.home.left - 1)
                if not cursor.home.left:
                    assert cursor.parent is not None
                    work.append(cursor.parent)

    def _begin(self, cursor: Cursor, block: Block) -> None:
        """The paths of a block may begin."""
        assert cursor.handle is not None
        if not block.forked:
            handles = self.cache.fork(cursor.handle, len(block.children))
            for child, handle in zip(block.children, handles, strict=True):
                child.handle = handle
            block.forked = True
        self._set(cursor, "reached", False)
        self._set(block, "left", len(block.children))
        for child in block.children:
            self._set(child, "reached", True)

    def _join(self, cursor: Cursor, block: Block) -> None:
        """A branch goes on behind the paths of a block."""
        assert cursor.handle is not None
        if not block.joined:
            self.cache.merge(cursor.handle, [child.handle for child in block.children if child.handle is not None])
            block.joined = True
        self._set(cursor, "passed", cursor.passed + 1)
        self._set(cursor, "filled", 0)
        self._set(cursor, "reached", True)
