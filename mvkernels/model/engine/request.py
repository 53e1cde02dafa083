"""One request while it runs: its branches, its budgets, its text. It knows no model, and the cache only through `kv`.

The structure is always ahead of the cache: the whole prompt is read when the request is made, and what the engine
writes is there as soon as it is due. `kv` says which tokens a step may take.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any, NamedTuple

import torch

from mvkernels.cache.cache import PagedKVCache
from mvkernels.grammar import FIRST_TAG, Kind
from mvkernels.model.engine.control.actions import Action, Finish, FinishPath, Force, Fork, Merge, Warn
from mvkernels.model.engine.control.interpreter import Budget, Interpreter
from mvkernels.model.engine.control.masks import TokenMasks
from mvkernels.model.engine.control.state import TAKES_TEXT, UNLIMITED, State
from mvkernels.model.engine.control.writer import TagWriter
from mvkernels.model.engine.kv.prefix_cache import PrefixCache
from mvkernels.model.engine.kv.request_kv import Entry, RequestKV
from mvkernels.model.engine.output.events import (
    Event,
    FinishEvent,
    ForkEvent,
    MergeEvent,
    PathEndEvent,
    TextEvent,
    TokenEvent,
)
from mvkernels.model.engine.output.text_stream import TextStream
from mvkernels.model.engine.output.transcript import BranchRecord, Transcript
from mvkernels.model.engine.prompt_job import PromptJob
from mvkernels.model.engine.sampling.logprobs import TokenLogprob
from mvkernels.model.engine.sampling.penalties import SeenTokens
from mvkernels.model.engine.sampling.sampler import BranchView, branch_key

_TAG_BYTES = re.compile(rb"[\x04-\x0f]")


class _Known(NamedTuple):
    """What a sampler saw of a branch the last time, and what the kinds that may come and the state were then."""

    kinds: int | None
    state: State
    view: BranchView


class Request:
    """Drives one interpreter. For each step: `advance`, then `entries` says which tokens go into it, `sent` that they
    are in the cache (`unsent`: that they are not), `views` what a sampler sees of the branches that want a token, and
    `take` takes one.

    `events` collects what happened, tokens only while `tells_tokens`; `finish_reason` is set when the request has
    ended, which may be at once.

    writer, masks: None for a tokenizer without tags. prefixes: where it finds and leaves its beginning.
    weights_version: what its generation says. Raises ValueError where the prompt leaves the model no position, and
    where it leaves blocks open that cannot be closed within the budgets.
    """

    def __init__(
        self,
        job: PromptJob,
        cache: PagedKVCache,
        tokenizer: Any,
        writer: TagWriter | None,
        masks: TokenMasks | None,
        prefixes: PrefixCache | None = None,
        weights_version: int = 0,
    ) -> None:
        config = job.config
        self.weights_version = weights_version
        self.job, self.config, self.tokenizer, self.writer = job, config, tokenizer, writer
        self.masks = masks if config.grammar else None
        self.interpreter = Interpreter(
            config.max_depth if writer else 0,
            config.max_width,
            grammar=config.grammar and writer is not None,
            prices=writer.prices if writer else None,
        )
        self.kv = RequestKV(cache, prefixes, lambda number: self.branches[number].positions)
        self.transcript = Transcript(self.interpreter)
        self.branches = self.transcript.branches
        self.branches.append(BranchRecord(0, job.key, self.kv.tokens(0)))
        if config.repetition_penalty != 1:
            self.branches[0].seen = SeenTokens()
        self.events: list[Event] = []
        self.tells_tokens = True
        self.warnings: list[str] = []
        self.finish_reason: str | None = None
        self.steps = 0
        # Tokens that are no text, or that may be more than that.
        self._special = job.eos if writer is None else job.eos.union(writer.tags.ids)
        self._views: dict[int, _Known] = {}
        self._touched: list[int] = [0]  # branches with new tokens, whose budgets were not looked at yet
        self._started = monotonic()
        self._begin(self._replay(job.ids))

    # ---- the prompt

    def _begin(self, due: list[Action]) -> None:
        """From here on tokens are generated. due: what the end of the prompt asks for."""
        interp, config = self.interpreter, self.config
        self.prompt_critical_path = interp.critical_path
        end, reason = self.job.max_positions, "max_positions"
        if interp.critical_path + 1 > end:
            raise ValueError(
                f"prompt {self.job.index}: expected a critical path of at most {end - 1} tokens, as the model has "
                f"{end} positions, got {interp.critical_path}"
            )
        if config.max_critical_path is not None and interp.critical_path + config.max_critical_path <= end:
            end, reason = interp.critical_path + config.max_critical_path, "max_critical_path"
        interp.begin(Budget(config.max_new_tokens, end, reason, config.max_path_tokens or UNLIMITED))
        self._run(due)
        for b in list(self.branches):
            if self.writer is not None and interp.is_running(b.number):
                self._run(self._write(b, self.writer.rest_of_prefix(interp, b.number, b.tokens)))
        self._touched = [b.number for b in self.branches]
        self._require_room()
        self._settle()

    def _replay(self, ids: Sequence[int]) -> list[Action]:
        """Read the prompt; returns what its end asks for."""
        interp = self.interpreter
        if self.writer is None:
            interp.feed(0, Kind.TEXT, given=True, count=len(ids))
            self._read(self.branches[0], ids)
            return []
        kinds, trailing = self.writer.tags.kinds(ids), self.writer.prices.trailing_kinds
        number, first = 0, 0
        due: list[Action] = []
        while first < len(ids):
            kind, end = Kind(kinds[first]), first + 1
            trails = due and trailing == (kind,)  # a newline of released semantics belongs to what has ended
            if due and not trails:
                self._run([action for action in due if not isinstance(action, Force)])
                number, due = self._following(number, due), []
            if interp.state(number) in TAKES_TEXT and kind < FIRST_TAG:
                found = _TAG_BYTES.search(kinds, first)
                kind, end = Kind.TEXT, found.start() if found else len(ids)
            actions = interp.feed(number, kind, given=True, count=end - first)
            self._read(self.branches[number], ids[first:end])
            if trails:
                due = [action for action in due if not (isinstance(action, Force) and action.kinds == trailing)]
            elif not all(isinstance(action, Force) for action in actions):
                due = actions
            first = end
        return due

    def _following(self, number: int, actions: list[Action]) -> int:
        """The branch on which a prompt goes on."""
        for action in reversed(actions):
            match action:
                case Merge():
                    return action.parent
                case Fork():
                    return action.children[0]
                case FinishPath():
                    return number + 1  # paths of a block have consecutive numbers
        return number

    def _require_room(self) -> None:
        """Raises ValueError where closing what the prompt leaves open does not fit into the budgets."""
        interp, config = self.interpreter, self.config
        if self.writer is not None and config.max_path_tokens is not None:
            least = [interp.paths_due(b.number) for b in self.branches]
            if config.max_depth:
                least.append(self.writer.prices.empty_path((1,))[1])
            if config.max_path_tokens < max(least):
                expected = f"at least {max(least)}, which an empty path takes, or max_depth=0"
                raise ValueError(f"max_path_tokens: expected {expected}, got {config.max_path_tokens}")
        short = {"max_new_tokens": -interp.spare()} if interp.spare() < 0 else {}
        for b in self.branches:
            if interp.state(b.number) is not State.CLOSED and interp.room(b.number) < 0:
                reason = interp.end_reason(b.number)
                short[reason] = max(short.get(reason, 0), -interp.room(b.number))
        for name, missing in short.items():
            value = self.job.max_positions if name == "max_positions" else getattr(config, name)
            expected = f"{name} of at least {value + missing}, which closing the blocks that it leaves open takes"
            raise ValueError(f"prompt {self.job.index}: expected {expected}, got {value}")

    # ---- between steps

    def advance(self) -> None:
        """Before each step, where there is a `max_seconds`: what the clock ends."""
        limit = self.config.max_seconds
        if self.finish_reason is None and limit is not None and monotonic() - self._started >= limit:
            self._run(self.interpreter.close_all("max_seconds"))
            self._settle()

    def wants_token(self, number: int) -> bool:
        """Whether the sampler is to be asked for the branch, once what was handed out is in the cache."""
        return self.interpreter.is_running(number) and self.kv.has_all(number)

    def entries(self, max_tokens: int, max_branches: int | None = None, max_pages: int | None = None) -> list[Entry]:
        """Tokens that go into the next step, none before one that it depends on; see `RequestKV.entries`."""
        interp = self.interpreter
        if not self.config.sequential:
            return self.kv.entries(max_tokens, max_branches, max_pages)
        running = [b.number for b in self.branches if interp.is_running(b.number)]
        first = min(running, key=interp.path, default=None)
        return self.kv.entries(
            max_tokens, max_branches, max_pages, lambda number: number == first or not interp.is_running(number)
        )

    def new_tokens(self, entry: Entry) -> list[int]:
        """The tokens of an entry."""
        return self.branches[entry.branch].tokens[entry.first : entry.first + entry.count]

    def positions(self, entry: Entry) -> list[int]:
        """Where they stand."""
        return self.branches[entry.branch].positions[entry.first : entry.first + entry.count]

    def sent(self) -> None:
        """The tokens of the latest `entries` are in the cache now."""
        self.steps += 1
        self.kv.sent()

    def unsent(self) -> None:
        """They are not, and are to be handed out again."""
        self.kv.unsent()

    def views(self, numbers: Sequence[int], again: bool = False) -> list[BranchView]:
        """What a sampler sees of these branches, whose logits are good, in the order in which `take` comes for them.

        again: whether the views of the step before may come again, changed, as the sampler keeps none.
        """
        self.kv.confirm()
        interp = self.interpreter
        choices: Sequence[int | None] = interp.allowed(numbers) if self.masks is not None else [None] * len(numbers)
        if not again:
            return [self._view(number, kinds) for number, kinds in zip(numbers, choices, strict=True)]
        views = []
        for number, kinds in zip(numbers, choices, strict=True):
            known, state = self._views.get(number), interp.state(number)
            if known is None or known.kinds != kinds or known.state is not state:
                known = self._views[number] = _Known(kinds, state, self._view(number, kinds))
            else:
                known.view.drawn, known.view.position = self.branches[number].drawn, interp.position(number)
            views.append(known.view)
        return views

    def _view(self, number: int, kinds: int | None) -> BranchView:
        """kinds: that may come, as `Interpreter.allowed` has them; None: all, but for those that limits forbid."""
        b, interp = self.branches[number], self.interpreter
        banned: tuple[int, ...] = ()
        allowed: tuple[torch.Tensor | None, bytes | None] = None, None
        if kinds is not None and self.masks is not None:
            allowed = self.masks.row(kinds, self.job.eos)
        elif self.writer is not None:
            banned = tuple(self.writer.tags.id(kind) for kind in interp.banned(number))
        return BranchView(
            request=self.job.index,
            path=interp.path(number),
            drawn=b.drawn,
            position=interp.position(number),
            state=interp.state(number).value,
            config=self.config,
            banned=banned,
            allowed=allowed[0],
            key=b.key,
            read_context=lambda: self.transcript.context(number),
            seen=b.seen,
            allowed_bytes=allowed[1],
        )

    def take(self, number: int, token: int, logprob: TokenLogprob | None = None) -> None:
        """The sampler chose `token` on a branch; logprob: of it, where the config asks. Nothing comes of it where the
        branch has been closed meanwhile.
        """
        interp = self.interpreter
        if self.finish_reason is not None or not interp.is_running(number):
            return
        b = self.branches[number]
        b.drawn += 1
        actions, piece = self._push(b, token, sampled=True, logprob=logprob)
        if actions is None and not self.job.stop:
            return
        self._touched.append(number)
        if actions:
            self._run(actions)
        if self.finish_reason is None and interp.is_running(number):
            ended = self._stopped(b, token, piece)
            if ended is not None:
                self._run(interp.close(number, ended))
        self._settle()

    def finish(self, reason: str, error: str | None = None) -> None:
        """End the request here, whatever is open. Its caller gives the pages back."""
        self.finish_reason = reason
        for b in self.branches:
            self._tell_rest(b)
        generation = self.transcript.generation(
            prompt_length=len(self.job.ids),
            logprobs=self.config.logprobs,
            canonical=self.writer is None or self.writer.semantics == "canonical",
            finish_reason=reason,
            critical_path=self.interpreter.critical_path - self.prompt_critical_path,
            steps=self.steps,
            warnings=list(self.warnings),
            error=error,
            request_id=str(self.job.index),
            weights_version=self.weights_version,
        )
        self.events.append(FinishEvent(self.job.index, generation))

    # ---- tokens

    def _push(
        self, b: BranchRecord, token: int, sampled: bool, logprob: TokenLogprob | None = None
    ) -> tuple[list[Action] | None, str]:
        """A generated token comes on `b`; returns what the interpreter asks for, and its text. None: nothing, and no
        budget ends here, as nearly always. sampled: by the model; else the engine's own.
        """
        number, interp = b.number, self.interpreter
        if b.text is None:
            b.text = TextStream(self.tokenizer, self.transcript.context(number))
        ends = sampled and token in self.job.eos  # what the engine writes is never an end of text
        piece, position = b.text.push(token, ends), interp.position(number)
        if self.tells_tokens:
            path = interp.path(number)
            self.events.append(
                TokenEvent(self.job.index, path, token, piece, position, not sampled, number, *(logprob or ()))
            )
        plain = token not in self._special and interp.text(number)
        if plain:
            actions = None
        else:
            kind = Kind.TEXT if ends or self.writer is None else self.writer.tags.kind(token)
            actions = interp.feed(number, kind)
        self.kv.extend(number, token)  # it lengthens b.tokens
        b.add(position, sampled, self.steps, piece, logprob)
        if b.seen is not None:
            b.seen.add(token)
        return actions, piece

    def _tell_rest(self, b: BranchRecord) -> None:
        """Tell the text that is held back where `b` ends or forks: with its last token, else in an event of its own."""
        rest = b.text.flush() if b.text is not None else ""
        if not rest:
            return
        b.pieces[-1] += rest
        if not self.tells_tokens:
            return
        for event in reversed(self.events):
            if type(event) is TokenEvent and event.branch == b.number:
                event.text += rest
                return
        self.events.append(TextEvent(self.job.index, self.interpreter.path(b.number), rest, b.number))

    def _read(self, b: BranchRecord, tokens: Sequence[int]) -> None:
        """Tokens of the prompt that the interpreter has read on `b` just now."""
        self.kv.extend(b.number, *tokens)
        b.add_given(len(tokens), self.interpreter.position(b.number))
        if b.seen is not None:
            b.seen.add(*tokens)

    def _write(self, b: BranchRecord, tokens: Iterable[int]) -> list[Action]:
        """The engine's own tokens; returns what the last of them asks for."""
        actions: list[Action] = []
        for token in tokens:
            more, _ = self._push(b, token, sampled=False)
            actions += more or ()
        b.heard = ""
        self._touched.append(b.number)
        return actions

    def _run(self, actions: Iterable[Action]) -> None:
        """Do what the interpreter asks for, and what that asks for, in order."""
        queue = deque(actions)
        while queue and self.finish_reason is None:
            match action := queue.popleft():
                case Force():
                    assert self.writer is not None  # without tags nothing is forced
                    tokens = self.writer.tokens(action.kinds, action.index)
                    queue.extendleft(reversed(self._write(self.branches[action.branch], tokens)))
                case Fork():
                    self._fork(self.branches[action.branch], action.children)
                case FinishPath():
                    number = action.branch
                    self._tell_rest(self.branches[number])
                    path, position = self.interpreter.path(number), self.interpreter.position(number)
                    self.events.append(PathEndEvent(self.job.index, path, position, number, action.reason))
                case Merge():
                    self._merge(self.branches[action.parent], action.children)
                case Warn():
                    self.warnings.append(action.message)
                case Finish():
                    self.finish(action.reason)

    def _fork(self, b: BranchRecord, children: tuple[int, ...]) -> None:
        self._tell_rest(b)
        self.kv.fork(b.number, children)
        ordinal = self.interpreter.ordinal(b.number)
        for i, child in enumerate(children, start=1):
            seen = None if b.seen is None else b.seen.fork()
            self.branches.append(BranchRecord(child, branch_key(b.key, ordinal, i), self.kv.tokens(child), seen=seen))
        path = self.interpreter.path(b.number)
        self.events.append(ForkEvent(self.job.index, path, len(children), b.number, children))

    def _merge(self, b: BranchRecord, children: tuple[int, ...]) -> None:
        self.kv.merge(b.number)
        if b.seen is not None:
            b.seen.join(child.seen for number in children if (child := self.branches[number]).seen is not None)
        position = self.interpreter.position(b.number)
        self.events.append(MergeEvent(self.job.index, self.interpreter.path(b.number), position, b.number))

    # ---- ends

    def _settle(self) -> None:
        """Close the branches with new tokens that have no room for another."""
        interp = self.interpreter
        while self.finish_reason is None and self._touched:
            number = self._touched.pop()
            # An end of text or a stop string that ended a path may have been the last token of all.
            reason = interp.hit(number) if interp.is_running(number) or interp.spare() < 1 else None
            if reason == "max_new_tokens":
                self._run(interp.close_all(reason))
            elif reason is not None:
                self._run(interp.close(number, reason))

    def _stopped(self, b: BranchRecord, token: int, piece: str) -> str | None:
        """Why the branch ends with this token, or None."""
        on_trunk = self.interpreter.parent(b.number) is None
        if token in self.job.eos:
            return "stop" if on_trunk else "end of text"
        if not self.job.stop:
            return None
        assert b.text is not None
        b.heard += piece
        heard = b.heard + b.text.held()
        complete = [stop for stop in self.job.stop if stop in heard]
        if not complete:
            b.heard = b.heard[-max(map(len, self.job.stop)) :]  # the longest one may have begun
            return None
        found = min(complete, key=heard.find)  # a token may complete several
        b.heard = ""
        return "stop" if on_trunk else f"stop string {found!r}"
