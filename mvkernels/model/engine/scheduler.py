"""Continuous batching: which requests run, and what of them goes into the next step. Plain Python, no tensors.

    waiting    holds nothing in the cache. The oldest is admitted first, as soon as there are pages for all that it has,
               and one for every request that runs; but not while another one computes what it begins with, too
    running    takes part in every step; its waiting paths keep their pages. Decode has priority; prefill and
               recomputation fill the rest of the step
    preempted  when pages run out, unused prefixes go first, then the youngest request. It waits again, and once it is
               admitted all that it has is computed again, in as few steps as its structure allows. The oldest is never
               preempted, so there is always one that gets on

Requests depend on one another in nothing but the tokens of a step and pages: a long path delays no other request.

*Progress.* While a request has not ended, every `schedule` hands out a token, or ends a request. A step that is empty
at its end has been offered whole, with all its tokens and all free pages, to every request that still runs. One of them
is the oldest: it preempts all others before it does without pages, and once it is alone it takes part of what it has,
or ends. So tokens and pages that one request leaves go to the next one in the same step: those kept for requests that
are behind go back to those that decode, as the request that they were kept for may itself have been preempted.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from mvkernels.model.engine.kv.request_kv import Entry, RequestKV


class Schedulable(Protocol):
    """What the scheduler knows of a request."""

    @property
    def kv(self) -> RequestKV: ...

    def entries(self, max_tokens: int, max_branches: int | None, max_pages: int | None) -> list[Entry]:
        """What it puts into the next step, as `RequestKV.entries`."""
        ...

    def finish(self, reason: str) -> None:
        """It ends here; `kv` keeps its pages until they are asked for."""
        ...


R = TypeVar("R", bound=Schedulable)

# One token in so many of a step is for prompts, if there are any.
_PROMPT_SHARE = 8


@dataclass
class _Step(Generic[R]):
    """A step while it is put together. tokens: how many more fit. free: pages that it may take. pages: that it takes so
    far. chosen: of each request its entries, their new pages and tokens.
    """

    tokens: int
    free: int
    pages: int = 0
    chosen: dict[R, tuple[list[Entry], int, int]] = field(default_factory=dict)

    def add(self, request: R, entries: list[Entry], pages: int, tokens: int) -> None:
        self.chosen[request] = entries, pages, tokens
        self.pages += pages
        self.tokens -= tokens

    def drop(self, request: R) -> None:
        _, pages, tokens = self.chosen.pop(request, ((), 0, 0))
        self.pages -= pages
        self.tokens += tokens


class Scheduler(Generic[R]):
    """See the module's docstring.

    free_pages       number of pages that the next step may take. make_room: frees so many unused pages, or none if
                     they are fewer than its second argument; returns whether any came. failed: called with a request
                     whose side of the cache raised an error; removes the request
    max_step_tokens  tokens of a step. max_step_width: branches of one request in a step; they take turns
    max_requests     requests that run at once
    """

    def __init__(
        self,
        free_pages: Callable[[], int],
        make_room: Callable[[int, int], bool],
        failed: Callable[[R, Exception], None],
        max_step_tokens: int,
        max_step_width: int,
        max_requests: int,
    ) -> None:
        self.max_step_tokens, self.max_step_width, self.max_requests = max_step_tokens, max_step_width, max_requests
        self.preemptions = 0  # how often a request had to make room
        self._free_pages, self._make_room, self._failed = free_pages, make_room, failed
        self._arrivals = 0
        self._arrived: dict[R, int] = {}
        self._waiting: list[R] = []  # the oldest first, as in all lists
        self._running: list[R] = []
        self._admitted: set[R] = set()  # those that run
        self._behind: set[R] = set()  # of those, the ones that were not once all in the cache since
        self._turn = 0

    def __len__(self) -> int:
        """Requests that were added and not removed."""
        return len(self._arrived)

    def __iter__(self) -> Iterator[R]:
        """Those that run, then those that wait."""
        yield from self._running
        yield from self._waiting

    @property
    def running(self) -> tuple[R, ...]:
        """The requests that run, the oldest first."""
        return tuple(self._running)

    def add(self, request: R) -> None:
        """A request joins; it waits until it is admitted."""
        self._arrivals += 1
        self._arrived[request] = self._arrivals
        self._waiting.append(request)

    def remove(self, request: R) -> None:
        """The request has ended. Its pages are its own concern."""
        if self._arrived.pop(request, None) is None:
            return
        (self._running if request in self._admitted else self._waiting).remove(request)
        self._admitted.discard(request)
        self._behind.discard(request)

    def preempt(self, request: R) -> None:
        """A request that runs gives its pages back, and waits."""
        request.kv.unsent()
        try:
            request.kv.evict()
        except Exception as error:
            return self._failed(request, error)
        self._running.remove(request)
        self._admitted.discard(request)
        self._behind.discard(request)
        insort(self._waiting, request, key=self._arrived.__getitem__)
        self.preemptions += 1
        return None

    def sent(self, requests: Iterable[R]) -> None:
        """What `schedule` chose of them is in the cache."""
        if self._behind:
            self._behind.difference_update([request for request in requests if not request.kv.unsent_tokens])

    def schedule(self) -> list[tuple[R, list[Entry]]]:
        """What goes into the next step: of some requests some entries. They are to be `sent` or taken back.

        A request that is alone and has no page for any of its tokens ends with "out_of_pages". Empty only where a
        request has ended, or none is there.
        """
        self._admit()
        step: _Step[R] = _Step(self.max_step_tokens, self._free_pages())
        decoding = list(self._running)
        behind: list[R] = []
        kept = 0  # for prefill, however many requests decode
        if self._behind:
            decoding = [request for request in self._running if request not in self._behind]
            behind = [request for request in self._running if request in self._behind]
            kept = min(max(self.max_step_tokens // _PROMPT_SHARE, 1), sum(r.kv.unsent_tokens for r in behind))
            step.tokens -= kept
        first = self._turn % max(len(decoding), 1)  # where they do not all fit into one step, they take turns
        decoding = decoding[first:] + decoding[:first]
        served = self._offer(decoding, step)
        step.tokens += kept
        self._offer(behind, step)
        served += self._offer(decoding[served:], step)
        if served < len(decoding):
            self._turn = first + served
        return [(request, entries) for request, (entries, _, _) in step.chosen.items()]

    def _offer(self, requests: list[R], step: _Step[R]) -> int:
        """Lets requests put something into the step, one after the other while there are tokens; how many of them."""
        for served, request in enumerate(requests):
            if step.tokens <= 0:
                return served
            self._choose(request, step)
        return len(requests)

    def _admit(self) -> None:
        for request in tuple(self._waiting):
            if len(self._running) >= self.max_requests:
                return
            if self._running and request.kv.awaits_prefix():
                continue
            try:
                if not self._has_room(request.kv):
                    return
            except Exception as error:
                self._failed(request, error)
                continue
            self._waiting.remove(request)
            insort(self._running, request, key=self._arrived.__getitem__)
            self._admitted.add(request)
            self._behind.add(request)

    def _has_room(self, kv: RequestKV) -> bool:
        """Whether there are pages for a waiting request. If no request runs, it is admitted with what there is."""
        promised = sum(other.kv.hold_prefix() for other in self._behind) + len(self._running)
        wanted = kv.hold_prefix() + promised
        while (missing := wanted - self._free_pages()) > 0:
            if not self._make_room(missing, missing):
                if self._running:
                    kv.release_prefix()
                return not self._running
        return True

    def _choose(self, request: R, step: _Step[R]) -> None:
        """Add the tokens of a request to the step. Younger requests may lose their pages and their part of it."""
        kv = request.kv
        while request in self._admitted:  # it may have been preempted meanwhile, or have ended
            try:
                entries = request.entries(step.tokens, self.max_step_width, step.free - step.pages)
                if kv.short and self._make_room(kv.short, 1):
                    kv.unsent()
                    step.free = self._free_pages()
                    continue
            except Exception as error:
                self._failed(request, error)
                step.free = self._free_pages()
                return None
            if not kv.starved or (entries and len(self._running) == 1):
                return step.add(request, entries, kv.new_pages, kv.step_tokens) if entries else kv.unsent()
            kv.unsent()
            youngest = self._running[-1]
            if youngest is request and len(self._running) == 1:
                return request.finish("out_of_pages")
            step.drop(youngest)
            self.preempt(youngest)
            step.free = self._free_pages()
        return None
