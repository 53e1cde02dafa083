"""One request while it runs: its branches, its budgets, its text. It knows the cache's tree, and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mvkernels.grammar import FIRST_TAG, TAGS, Kind
from mvkernels.kv_cache import PagedKVCache
from mvkernels.kv_step import Branch
from mvkernels.layout import BranchLayout
from mvkernels.model.actions import JOINING_KINDS, OPENING_KINDS, Action, Finish, Force, Fork, Merge, Warn
from mvkernels.model.events import Event, FinishEvent, ForkEvent, Generation, MergeEvent, TokenEvent
from mvkernels.model.interpreter import Interpreter, State
from mvkernels.model.prompts import Given
from mvkernels.model.sampling import BranchView, branch_key
from mvkernels.model.task import Task
from mvkernels.model.text import TextStream
from mvkernels.tags import TagTokens

# Tokens before a branch's first that its text may depend on (see TextStream).
_TEXT_CONTEXT = 4


@dataclass
class _Branch:
    """A branch of the request. tokens, sampled, pieces: its own tokens, whether each was sampled, the text of each.

    heard: sampled text in which a stop string may begin. drawn: tokens sampled so far.
    """

    number: int
    key: str
    handle: Branch
    given: Given
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    text: TextStream | None = None
    heard: str = ""
    drawn: int = 0
    merged: bool = False


class Request:
    """Drives one interpreter. Between two model steps: `advance` replays the prompt, `entries` says which tokens go
    into the step, `sent` that they are in the cache, `views` which branches want a token, and `take` takes one.

    `events` collects what happened; `finish_reason` is set when the request has ended, and then its pages are free.
    """

    def __init__(self, task: Task, cache: PagedKVCache, tokenizer: Any, tags: TagTokens | None) -> None:
        self.task, self.config = task, task.config
        self.cache, self.tokenizer, self.tags = cache, tokenizer, tags
        self.interpreter = Interpreter(task.config.max_depth if tags else 0, task.config.max_width)
        self.branches = [_Branch(0, task.key, cache.new(), task.given)]
        self.pending: dict[int, list[int]] = {}  # branch -> tokens not in the cache yet, in causal order
        self._waiting: dict[int, list[Action]] = {}  # parent -> its merge, put off until its tokens are in the cache
        self.events: list[Event] = []
        self.warnings: list[str] = []
        self.finish_reason: str | None = None
        self.total_tokens = self.steps = 0
        wanted = task.config.max_critical_path
        self.end = task.max_positions if wanted is None else task.prompt_critical_path + wanted
        self.end_reason = "max_critical_path"
        if wanted is None or self.end > task.max_positions:
            self.end, self.end_reason = task.max_positions, "max_positions"
        self._banned = {kind: (tags.id(kind),) for kind in (Kind.PARALLEL, Kind.OUTLINE)} if tags else {}

    # ---- between steps

    def advance(self) -> None:
        """Do what had to wait for the last step, and replay the prompt; a fork's paths follow in the next step."""
        for parent in [parent for parent in self._waiting if parent not in self.pending]:
            self._apply(self._waiting.pop(parent))
        for branch in [b for b in self.branches if b.given.tokens]:
            if self.wants_token(branch.number):
                self._replay(branch)

    def wants_token(self, number: int) -> bool:
        """Whether the sampler is to be asked for the branch, once its tokens are in the cache."""
        return self.interpreter.is_running(number) and number not in self._waiting

    def entries(self) -> list[tuple[int, list[int]]]:
        """(branch, tokens) that go into the next step, none after one that depends on it."""
        if not self.config.sequential:
            return list(self.pending.items())
        running = [number for number in self.pending if self.interpreter.is_running(number)]
        first = min(running, key=self.interpreter.path, default=None)
        return [item for item in self.pending.items() if item[0] == first or item[0] not in running]

    def sent(self, numbers: Iterable[int]) -> None:
        """The tokens of these branches are in the cache now."""
        self.steps += 1
        for number in numbers:
            del self.pending[number]

    def handle(self, number: int) -> Branch:
        """The cache's handle of a branch."""
        return self.branches[number].handle

    def view(self, number: int) -> BranchView:
        """What a sampler sees of a branch."""
        b, interp = self.branches[number], self.interpreter
        banned = tuple(i for kind in interp.banned(number) for i in self._banned.get(kind, ()))
        return BranchView(
            request=self.task.index,
            path=interp.path(number),
            drawn=b.drawn,
            position=interp.position(number),
            state=interp.state(number).value,
            config=self.config,
            banned=banned,
            key=b.key,
            read_context=lambda: self.context(number),
        )

    def take(self, number: int, token: int) -> None:
        """The sampler chose `token` on a branch."""
        b = self.branches[number]
        b.drawn += 1
        kind = self._kind(token)
        width = self.interpreter.fork_width(number, kind)
        # Without room for what opens the paths the block stays text, and the branch ends as at its budget.
        cramped = self._cramped(number, width) if width else None
        piece = self._push(b, token, Kind.TEXT if cramped else kind, sampled=True)
        if self.finish_reason is not None or not self.wants_token(number):
            return self._check_budgets(b)
        ended = self._stopped(b, token, piece) or cramped
        if ended is not None:
            self._stop(b, ended)
        return self._check_budgets(b)

    def finish(self, reason: str) -> None:
        """End the request here, whatever is open, and give its pages back."""
        self.finish_reason = reason
        self.pending.clear()
        self.release()
        self.events.append(FinishEvent(self.task.index, self._generation(reason)))

    def release(self) -> None:
        """Give the pages back. May be called twice."""
        for b in self.branches:
            if not b.merged:
                self.cache.free(b.handle)
                b.merged = True

    def context(self, number: int) -> list[int]:
        """The tokens that a branch sees, oldest first."""
        parts: list[list[int]] = []
        below: int | None = None
        current: int | None = number
        while current is not None:
            parts.append(self._flat(current, lambda b: b.tokens, until=below))
            below, current = current, self.interpreter.parent(current)
        return [token for part in reversed(parts) for token in part]

    # ---- tokens

    def _kind(self, token: int) -> Kind:
        return self.tags.kind(token) if self.tags is not None and token not in self.task.eos else Kind.TEXT

    def _replay(self, b: _Branch) -> None:
        """Feed the prompt's tokens on `b`, up to where it forks or ends."""
        if not b.given.tokens:
            return
        while b.given.tokens and self.interpreter.is_running(b.number):
            token = b.given.tokens.popleft()
            self._record(b, token, "", sampled=False)
            self._apply(self.interpreter.feed(b.number, self._kind(token), within_limits=False))
        if self.finish_reason is not None or not self.wants_token(b.number):
            return
        rest = self._rest_of_prefix(b)
        if rest:
            self._force(b, rest)
        else:
            self._check_budgets(b)

    def _rest_of_prefix(self, b: _Branch) -> list[int]:
        """Where the prompt was cut within what the engine writes before a path or a conclusion: the rest of it."""
        items = self.interpreter.items(b.number)
        if len(items) == 1 and not self.interpreter.path(b.number):
            return []  # the trunk before its first block
        kinds = OPENING_KINDS if len(items) == 1 else JOINING_KINDS
        whole, last = self._forced_tokens(b.number, kinds), items[-1]
        assert isinstance(last, int)
        if whole[:last] == b.tokens[-last:]:
            return whole[last:]
        if self.interpreter.state(b.number) in (State.OPENING, State.JOINING):  # other whitespace than the engine's
            return self._forced_tokens(b.number, kinds[1:])
        return []

    def _push(self, b: _Branch, token: int, kind: Kind, sampled: bool) -> str:
        """A generated token comes on `b`; returns its text."""
        if b.text is None:
            b.text = TextStream(self.tokenizer, self.context(b.number)[-_TEXT_CONTEXT:], self.task.eos)
        piece = b.text.push(token)
        position, path = self.interpreter.position(b.number), self.interpreter.path(b.number)
        self.events.append(TokenEvent(self.task.index, path, token, piece, position, not sampled))
        self.total_tokens += 1
        self._record(b, token, piece, sampled)
        self._apply(self.interpreter.feed(b.number, kind))
        return piece

    def _record(self, b: _Branch, token: int, piece: str, sampled: bool) -> None:
        b.tokens.append(token)
        b.pieces.append(piece)
        b.sampled.append(sampled)
        self.pending.setdefault(b.number, []).append(token)

    def _force(self, b: _Branch, tokens: list[int], closing: bool = False) -> None:
        """Write `tokens` on `b`, unless they do not fit in: then the branch, or the request, ends here.

        closing: they end the branch, for which there is always a position left.
        """
        b.heard = ""
        if self.total_tokens + len(tokens) > self.config.max_new_tokens:
            return self.finish("max_new_tokens")
        if not closing and self.interpreter.position(b.number) + len(tokens) > self._limit(b.number):
            return self._stop(b, self.end_reason)
        for token in tokens:
            self._push(b, token, self._kind(token), sampled=False)
            if self.finish_reason is not None:
                return None
        return self._check_budgets(b)

    def _forced_tokens(self, number: int, kinds: tuple[Kind, ...], path: tuple[int, ...] | None = None) -> list[int]:
        index = ".".join(map(str, self.interpreter.path(number) if path is None else path))
        words = {Kind.SPACE: "\n", Kind.INDEX: index, Kind.INDEX_END: ":"}
        text = "".join(TAGS[kind - FIRST_TAG] if kind >= FIRST_TAG else words[kind] for kind in kinds)
        assert self.tags is not None  # without tags nothing forks
        return self.tags.encode(text)

    # ---- ends

    def _limit(self, number: int) -> int:
        """The position at which a branch must end, so that its `</Path>` and those around it still fit in."""
        return self.end - len(self.interpreter.path(number))

    def _check_budgets(self, b: _Branch) -> None:
        if self.finish_reason is not None:
            return
        if self.total_tokens >= self.config.max_new_tokens:
            self.finish("max_new_tokens")
        elif self.wants_token(b.number) and self.interpreter.position(b.number) >= self._limit(b.number):
            self._stop(b, self.end_reason)

    def _cramped(self, number: int, width: int) -> str | None:
        """Why `width` paths have no room behind the next token, or None when they have."""
        path = self.interpreter.path(number)
        lengths = [len(self._forced_tokens(number, OPENING_KINDS, (*path, i + 1))) for i in range(width)]
        if self.total_tokens + 1 + sum(lengths) > self.config.max_new_tokens:
            return "max_new_tokens"
        if self.interpreter.position(number) + 1 + max(lengths) > self._limit(number) - 1:
            return self.end_reason
        return None

    def _stopped(self, b: _Branch, token: int, piece: str) -> str | None:
        """Why the branch ends with this token, or None."""
        on_trunk = self.interpreter.parent(b.number) is None
        if token in self.task.eos:
            return "stop" if on_trunk else "end of text"
        if not self.task.stop:
            return None
        b.heard += piece
        found = next((stop for stop in self.task.stop if stop in b.heard), None)
        b.heard = b.heard[-max(map(len, self.task.stop)) :]
        if found is None:
            return None
        b.heard = ""
        return "stop" if on_trunk else f"stop string {found!r}"

    def _stop(self, b: _Branch, reason: str) -> None:
        if reason == "max_new_tokens":
            self.finish(reason)
        else:
            self._apply(self.interpreter.stop(b.number, reason))

    def _apply(self, actions: list[Action]) -> None:
        for i, action in enumerate(actions):
            if self.finish_reason is not None:
                return
            match action:
                case Fork():
                    self._fork(self.branches[action.branch], action.children)
                case Force():
                    b = self.branches[action.branch]
                    if not b.given.tokens:
                        tokens = self._forced_tokens(b.number, action.kinds)
                        self._force(b, tokens, closing=action.kinds == (Kind.PATH_END,))
                    elif action.kinds == JOINING_KINDS:  # the prompt has them; paths follow in the next step
                        self._replay(b)
                case Merge() if action.parent in self.pending:
                    self._waiting[action.parent] = actions[i:]
                    return
                case Merge():
                    self._merge(self.branches[action.parent], action.children)
                case Warn():
                    self.warnings.append(action.message)
                case Finish():
                    self.finish(action.reason)

    def _fork(self, b: _Branch, children: tuple[int, ...]) -> None:
        given = b.given.blocks.popleft() if b.given.blocks else []
        handles = self.cache.fork(b.handle, len(children))
        ordinal = self.interpreter.ordinal(b.number)
        for i, (child, handle) in enumerate(zip(children, handles, strict=True)):
            own = given[i] if i < len(given) else Given()
            self.branches.append(_Branch(child, branch_key(b.key, ordinal, i + 1), handle, own))
        self.events.append(ForkEvent(self.task.index, self.interpreter.path(b.number), len(children)))

    def _merge(self, b: _Branch, children: tuple[int, ...]) -> None:
        self.cache.merge(b.handle, [self.branches[child].handle for child in children])
        for child in children:
            self.branches[child].merged = True
        number = b.number
        position = self.interpreter.position(number)
        self.events.append(MergeEvent(self.task.index, self.interpreter.path(number), position))

    # ---- the outcome

    def _flat(self, number: int, read: Callable[[_Branch], list[Any]], until: int | None = None) -> list[Any]:
        """What `read` gives for every token of a branch and its paths, in sequence order, up to the fork of `until`."""
        out: list[Any] = []
        work = [(number, iter(self.interpreter.items(number)), 0)]
        while work:
            current, items, cursor = work.pop()
            values = read(self.branches[current])
            for item in items:
                if isinstance(item, int):
                    out += values[cursor : cursor + item]
                    cursor += item
                elif until in item:
                    return out
                else:
                    work.append((current, items, cursor))
                    work += [(child, iter(self.interpreter.items(child)), 0) for child in reversed(item)]
                    break
        return out

    def _generation(self, reason: str) -> Generation:
        ids = self._flat(0, lambda b: b.tokens)
        for b in self.branches:
            if b.text is not None:
                b.pieces[-1] += b.text.rest()
        return Generation(
            text="".join(self._flat(0, lambda b: b.pieces)),
            token_ids=ids,
            layout=BranchLayout.from_tree(self.interpreter.tree(), self._flat(0, lambda b: b.sampled)),
            prompt_length=len(self.task.ids),
            finish_reason=reason,
            total_tokens=self.total_tokens,
            critical_path=self.interpreter.critical_path - self.task.prompt_critical_path,
            steps=self.steps,
            warnings=list(self.warnings),
        )
