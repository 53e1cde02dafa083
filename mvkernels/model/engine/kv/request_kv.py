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
from mvkernels.model.engine.kv.cursor import Block, Line, inside
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
        self._trunk = Line(0, reached=True)
        self._prefix = None
        if prefixes is not None and positions is not None:
            self._prefix = RequestPrefix(prefixes, self._trunk, positions)
        self._confirmed: tuple[int, int] | None = None  # tokens and blocks of the trunk
        self._lines: dict[int, Line] = {0: self._trunk}
        self._ready: dict[Line, None] = {}  # reached, with tokens; the longest waiting first
        self._due: list[Line] = []  # reached, and to fork or to join before the next step
        # What has an entry in the step that is made, with its `given` and `filled` of before.
        self._step: list[tuple[Line, int, int]] | None = None
        self._queue: deque[Line] = deque()
        # What else `unsent` restores: cursors one by one, and the rest as it was.
        self._undo: list[tuple[Any, str, Any]] = []
        self._before: tuple[dict[Line, None], list[Line], int, int] = ({}, [], 0, 0)

    # ---- the structure

    def tokens(self, branch: int) -> list[int]:
        """The branch's own tokens so far; `extend` lengthens this list."""
        return self._lines[branch].tokens

    def extend(self, branch: int, *tokens: int) -> None:
        """More tokens on a branch that no open block stands behind."""
        line = self._growing(branch)
        size, blocks = self.cache.page_size, line.blocks
        first = len(line.tokens) - (blocks[-1].at if blocks else 0)
        self.most_pages += -(-(first + len(tokens)) // size) - -(-first // size)
        line.tokens += tokens
        self.unsent_tokens += len(tokens)
        if line.reached and line.passed == len(blocks):
            self._ready[line] = None

    def fork(self, branch: int, children: Sequence[int]) -> None:
        """Paths with fresh numbers begin behind what the branch has."""
        line = self._growing(branch)
        fresh = [number for number in children if number not in self._lines]
        if not children or len({*fresh}) < len(children):
            raise ValueError(f"fork: expected fresh numbers of branches, got {list(children)}")
        block = Block(len(line.tokens), [])
        for number in children:
            self._lines[number] = child = Line(number, line, block)
            block.children.append(child)
        if line.through and line not in self._due:
            self._due.append(line)
        line.blocks.append(block)

    def merge(self, branch: int) -> None:
        """The paths of the branch's open block have ended; the branch goes on behind them."""
        self._between_steps()
        line = self._lines[branch]
        if not line.blocks or line.blocks[-1].merged:
            raise ValueError(f"merge: expected a branch with an open block, got {branch}")
        block = line.blocks[-1]
        for child in block.children:
            if child.blocks and not child.blocks[-1].merged:
                raise ValueError(f"merge: expected paths without open blocks, got {child.number} with one")
        block.merged = True
        if line.passed == len(line.blocks) - 1 and block.children[0].handle is not None:
            block.left = sum(not child.through for child in block.children)
            if not block.left:
                self._due.append(line)

    def has_all(self, branch: int) -> bool:
        """Whether the branch's last token was handed out, and nothing stands behind it."""
        line = self._lines[branch]  # as `line.through`, without another call
        return line.reached and line.given == len(line.tokens) and line.passed == len(line.blocks)

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
        for line in due:
            self._settle(line)
        ready, step, size = self._ready, self._step, self.cache.page_size
        queue = self._queue = deque(ready)
        out: list[Entry] = []
        left, taken = tokens, 0
        while queue and left > 0 and (branches is None or len(out) < branches):
            line = queue.popleft()
            if may is not None and not may(line.number):
                continue
            first, filled = line.given, line.filled
            forks = line.passed < len(line.blocks)
            limit = line.limit if forks else len(line.tokens)
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
            assert line.handle is not None
            out.append(Entry(line.number, line.handle, first, count))
            step.append((line, first, filled))
            line.in_step = True
            line.given, line.filled = first + count, filled + count
            left -= count
            del ready[line]
            if first + count < limit:
                ready[line] = None  # behind those that had no turn
            elif forks or (line.home is not None and line.home.merged):
                self._settle(line)
        self.step_tokens, self.new_pages = tokens - left, taken
        self.unsent_tokens -= tokens - left
        self.num_pages += taken
        return out

    def sent(self) -> None:
        """The step was committed."""
        for line, _, _ in self._step or ():
            line.in_step = False
        self._step = None
        if self._undo:
            self._undo.clear()

    def unsent(self) -> None:
        """The step was not committed: its tokens are to be handed out again. Without a step it changes nothing."""
        if self._step is None:
            return
        for line, given, filled in reversed(self._step):  # what one passed in this step it passed before its tokens
            line.given, line.filled = given, filled
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
        for line in self._lines.values():
            line.handle, line.given, line.passed, line.filled, line.reached = None, 0, 0, 0, False
            self.unsent_tokens += len(line.tokens)
            for block in line.blocks:
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
            for line in inside(block):
                line.given, line.passed, line.reached = len(line.tokens), len(line.blocks), True
        self._ready.clear()
        self._due = [trunk]

    def _share(self) -> None:
        if self._prefix is not None and self._confirmed is not None and self._trunk.handle is not None:
            self._prefix.share(self._trunk.handle, *self._confirmed)

    # ---- inside

    def _between_steps(self) -> None:
        if self._step is not None:
            raise RuntimeError("expected the step before to be sent or taken back, got one that is made still")

    def _growing(self, branch: int) -> Line:
        if self._step is not None:
            self._between_steps()
        line = self._lines[branch]
        if (line.blocks and not line.blocks[-1].merged) or (line.home is not None and line.home.merged):
            raise ValueError(f"expected a branch that may grow, got {branch}, which has ended or waits for its paths")
        return line

    def _set(self, item: Line | Block, name: str, value: object) -> None:
        self._undo.append((item, name, getattr(item, name)))
        setattr(item, name, value)

    def _settle(self, line: Line) -> None:
        """Go on where all before a line's cursor is handed out: here, and on the lines that waited for it."""
        work = [line]
        while work:
            line = work.pop()
            block = line.blocks[line.passed] if line.passed < len(line.blocks) else None
            if line.given < line.limit:
                self._ready[line] = None
                self._queue.append(line)
            elif block is not None and line.reached:
                self._begin(line, block)
                work += reversed(block.children)
            elif block is not None:  # all of its paths are through
                if line.in_step:  # its tokens before the fork are in this step, and it can have no others
                    self._due.append(line)
                    continue
                self._join(line, block)
                work.append(line)
            elif line.home is not None and line.home.merged:
                self._set(line.home, "left", line.home.left - 1)
                if not line.home.left:
                    assert line.parent is not None
                    work.append(line.parent)

    def _begin(self, line: Line, block: Block) -> None:
        """The paths of a block may begin."""
        assert line.handle is not None
        if not block.forked:
            handles = self.cache.fork(line.handle, len(block.children))
            for child, handle in zip(block.children, handles, strict=True):
                child.handle = handle
            block.forked = True
        self._set(line, "reached", False)
        self._set(block, "left", len(block.children))
        for child in block.children:
            self._set(child, "reached", True)

    def _join(self, line: Line, block: Block) -> None:
        """A branch goes on behind the paths of a block."""
        assert line.handle is not None
        if not block.joined:
            self.cache.merge(line.handle, [child.handle for child in block.children if child.handle is not None])
            block.joined = True
        self._set(line, "passed", line.passed + 1)
        self._set(line, "filled", 0)
        self._set(line, "reached", True)
