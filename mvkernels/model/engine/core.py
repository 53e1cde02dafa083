"""The loop: calls join with their requests at any time, and one step after the other serves all of them.

    schedule   which tokens of which requests go into the step                       (scheduler.py, kv/request_kv.py)
    run        the model over them, keys and values into the pages                   (runner.py)
    sample     one token for every branch that wants one                             (sampling/sampler.py)
    take       each token through its request's interpreter: forks, merges, ends     (request.py)

A thread that waits for a result makes the next step, one thread at a time: the callers of `generate` and `stream`, and
a background thread while there are calls of `astream`. Joining and cancelling wait for no step.

Faults. An error of the model or the cache, or NaN logits, undoes the step. It is run again in halves, by requests,
until one is alone with the fault: that one ends with "error". If the sampler of a caller raises, only its call ends.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from mvkernels.model.engine.choice import Asked, choose
from mvkernels.model.engine.kv.prefix_cache import PrefixCache
from mvkernels.model.engine.kv.request_kv import Entry, RequestKV
from mvkernels.model.engine.output.events import Event
from mvkernels.model.engine.request import Request
from mvkernels.model.engine.runner import BadLogits, Runner
from mvkernels.model.engine.sampling.logits import StepLogits
from mvkernels.model.engine.sampling.sampler import Sampler, sample
from mvkernels.model.engine.scheduler import Scheduler

# The background thread ends after so many seconds without calls.
_PATIENCE = 5.0

_Batch = list[tuple[Request, list[Entry]]]


class Submission:
    """Requests that came together, with their sampler.

    deliver: gets the events of a step, and whether the call has ended; RuntimeError from it cancels the call.
    background: whether no thread waits in `Core.until` for it. error: what ended it before its requests had ended.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        sampler: Sampler,
        deliver: Callable[[list[Event], bool], None],
        background: bool = False,
    ) -> None:
        self.requests, self.sampler, self.deliver, self.background = tuple(requests), sampler, deliver, background
        self.open = set(requests)
        self.error: BaseException | None = None
        self.ended = False


class Core:
    """See the module's docstring.

    wake, rest   called before the first step and after the last one, as often as work comes and ends
    limits       those of the scheduler, by name
    own_positions: whether the requests say where their tokens stand; else the cache does
    prefix_cache: whether beginnings of requests stay in the cache, as `prefixes`, for others
    """

    def __init__(
        self,
        runner: Runner,
        wake: Callable[[], None],
        rest: Callable[[], None],
        limits: dict[str, int],
        own_positions: bool = False,
        prefix_cache: bool = True,
    ) -> None:
        self.prefixes = PrefixCache(runner.cache) if prefix_cache else None
        self.runner, self._wake, self._rest, self._own_positions = runner, wake, rest, own_positions
        self.scheduler: Scheduler[Request] = Scheduler(runner.free_pages, self._make_room, self._fail, **limits)
        self._turn = threading.Condition()
        self._stepping: int | None = None  # the thread that makes a step
        self._thread: threading.Thread | None = None
        self._background = 0  # calls that no thread waits for
        self._inbox: deque[tuple[Submission, bool]] = deque()  # calls that join: True; that are cancelled: False
        self._calls: dict[Request, Submission] = {}
        self._timed: list[Request] = []
        self._touched: dict[Request, Submission] = {}  # with events to deliver, or an end
        self._suspects: set[Request] = set()  # their logits were NaN in a step that was committed
        self._unfreed: list[RequestKV] = []  # of ended requests, whose pages the cache refused to take back
        self._awake = False

    # ---- from any thread

    def join(self, call: Submission) -> None:
        """The requests of a call take part from the next step on."""
        self._inbox.append((call, True))
        if not call.background:
            return
        with self._turn:
            self._background += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="mvkernels-engine", daemon=True)
                self._thread.start()
            self._turn.notify_all()

    def cancel(self, call: Submission) -> None:
        """The open requests of a call that has joined end with "cancelled", before the next step."""
        self._inbox.append((call, False))

    def until(self, holds: Callable[[], bool], steps: bool = True) -> None:
        """Make steps until `holds`; while another thread makes one, wait. steps: False only admits and removes calls.

        Raises RuntimeError within a step: a sampler cannot wait for what comes after it.
        """
        while not holds():
            with self._turn:
                if self.within_step():
                    raise RuntimeError("expected a call from outside of a step, got one from a sampler of this engine")
                if self._stepping is not None:
                    self._turn.wait()
                    continue
                self._stepping = threading.get_ident()
            self._make_step(steps)

    def tidy(self) -> None:
        """Remove cancelled calls, unless a step is running, which removes them itself."""
        with self._turn:
            if self._stepping is not None:
                return
            self._stepping = threading.get_ident()
        self._make_step(steps=False)

    def between_steps(self, change: Callable[[], None]) -> None:
        """Changes something while no step is made. Raises RuntimeError within a step."""
        with self._turn:
            if self.within_step():
                raise RuntimeError("expected a call from outside of a step, got one from a sampler of this engine")
            self._turn.wait_for(lambda: self._stepping is None)
            self._stepping = threading.get_ident()
        try:
            change()
        finally:
            with self._turn:
                self._stepping = None
                self._turn.notify_all()

    def change_weights(self, change: Callable[[], None]) -> None:
        """Change the model while no step is made. Keys and values of the old weights go: prefixes are given up, and
        requests that run are computed again. Raises RuntimeError within a step.
        """

        def all_of_it() -> None:
            for request in self.scheduler.running:
                self.scheduler.preempt(request)
            if self.prefixes is not None:
                self.prefixes.clear()
            change()

        self.between_steps(all_of_it)

    @property
    def busy(self) -> bool:
        """Whether there are requests that have not ended."""
        return bool(len(self.scheduler) or self._inbox)

    def within_step(self) -> bool:
        """Whether this thread is making a step now."""
        return self._stepping == threading.get_ident()

    def _serve(self) -> None:
        """The background thread."""
        try:
            while True:
                with self._turn:
                    if not self._turn.wait_for(lambda: self._background > 0, _PATIENCE):
                        self._thread = None
                        return
                self.until(lambda: self._background == 0)
        except BaseException:
            self._thread = None
            raise

    # ---- one step

    def _make_step(self, steps: bool) -> None:
        """This thread's turn, which it has taken."""
        try:
            self._step(steps)
        finally:
            with self._turn:
                self._stepping = None
                self._turn.notify_all()

    def _step(self, steps: bool) -> None:
        try:
            self._take_in()
            if steps and len(self.scheduler):
                self._serve_all()
                self._take_in()
        except Exception as error:  # of no particular request: all of them end
            self._abort(error)
        except BaseException:  # an interrupt: what was on its way is computed again
            for request in self.scheduler.running:
                self.scheduler.preempt(request)
            raise
        finally:
            self._deliver()
            if self._awake and not len(self.scheduler):
                self._awake = False
                self._rest()

    def _serve_all(self) -> None:
        if not self._awake:
            self._wake()
            self._awake = True
        self._advance()
        work = self.scheduler.schedule()
        self._end_those_that_have(self.scheduler.running)
        if work:
            self._run(work)
        elif not self._touched:
            raise RuntimeError("expected some request to have tokens for the next step, got none")

    def _take_in(self) -> None:
        """Admit and remove the calls that joined or were cancelled since the last step."""
        unfreed, self._unfreed = self._unfreed, []
        for kv in unfreed:
            self._free(kv)
        while self._inbox:
            call, joins = self._inbox.popleft()
            for request in call.requests:
                if joins:
                    self._calls[request] = self._touched[request] = call
                    self.scheduler.add(request)
                    if request.config.max_seconds is not None:
                        self._timed.append(request)
                elif request in self._calls:
                    self._finish(request, "cancelled")
            if joins:
                self._end_those_that_have(call.requests)

    def _advance(self) -> None:
        """What the clock ends."""
        self._timed = [request for request in self._timed if request in self._calls]
        for request in self._timed:
            try:
                request.advance()
            except Exception as error:
                self._fail(request, error)
        self._end_those_that_have(self._timed)

    def _run(self, work: _Batch) -> None:
        """Run the step, or its halves if it fails. Suspected requests run alone."""
        batches = [[part] for part in work if part[0] in self._suspects]
        others = [part for part in work if part[0] not in self._suspects] if batches else work
        batches += [others] if others else []
        while batches:
            batch = batches.pop()
            bad: list[int] = []
            try:
                asked, logits = self._forward(batch)
            except BadLogits as error:
                if not error.committed:
                    batches += self._halves(batch, error)
                    continue
                asked, logits, bad = self._asked(batch)[0], error.logits, error.logits.bad_rows
            except Exception as error:
                batches += self._halves(batch, error)
                continue
            for request, _ in batch:
                request.sent()
            self.scheduler.sent(request for request, _ in batch)
            self._sample(self._without(asked, bad) if bad else asked, logits)

    def _halves(self, batch: _Batch, error: Exception) -> list[_Batch]:
        """What to run in place of a step that failed, the last first; a request that is alone has failed itself."""
        half = len(batch) // 2
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        if half:
            return [batch[half:], batch[:half]]
        [(request, entries)] = batch
        tokens = sum(entry.count for entry in entries)
        if tokens > 1 and isinstance(error, torch.OutOfMemoryError):  # less of it at once
            request.unsent()
            return [[(request, request.entries(tokens // 2, self.scheduler.max_step_width))]]
        self._fail(request, error)
        return []

    def _forward(self, batch: _Batch) -> tuple[list[Asked], StepLogits]:
        """Runs some requests' part of a step. Returns which branches want a token, and their logits, row by row."""
        asked, rows = self._asked(batch)
        entries: list[Entry] = []
        ids: list[int] = []
        for request, own in batch:
            entries += own
            for entry in own:
                ids += request.new_tokens(entry)
        positions = None
        if self._own_positions:
            positions = [place for request, own in batch for entry in own for place in request.positions(entry)]
        careful = batch[0][0] in self._suspects
        return asked, self.runner.run(entries, ids, positions, rows, careful)

    def _asked(self, batch: _Batch) -> tuple[list[Asked], list[int]]:
        """Which branches want a token, and where their entries stand among all of the step."""
        found: list[Asked] = []
        rows: list[int] = []
        place = 0
        for request, own in batch:
            numbers, first = [], len(rows)
            for entry in own:
                if request.wants_token(entry.branch):
                    numbers.append(entry.branch)
                    rows.append(place)
                place += 1
            found.append(Asked(request, numbers, first))
        return found, rows

    def _without(self, asked: list[Asked], bad: list[int]) -> list[Asked]:
        """Preempt requests with NaN logits in a committed step, to recompute them alone. Returns the others."""
        left = []
        for part in asked:
            if any(part.row <= row < part.row + len(part.numbers) for row in bad):
                self.scheduler.preempt(part.request)
                self._suspects.add(part.request)
            else:
                left.append(part)
        return left

    # ---- tokens

    def _sample(self, asked: list[Asked], logits: StepLogits) -> None:
        """Next tokens for the branches that were asked for; each caller's sampler sees its own rows only."""
        calls = self._calls
        groups: dict[Submission | None, list[Asked]] = {}
        for part in asked:
            if not part.numbers:
                continue
            call = calls[part.request]
            own = call.sampler is sample
            try:
                part.views = part.request.views(part.numbers, own)
            except Exception as error:
                self._fail(part.request, error)
                continue
            group = groups.get(None if own else call)
            if group is None:
                group = groups[None if own else call] = []
            group.append(part)
        if self._suspects:
            self._suspects.difference_update([part.request for part in asked if part.views])
        work = list(groups.items())
        while work:
            caller, group = work.pop()
            try:
                chosen = choose(None if caller is None else caller.sampler, group, logits)
            except Exception as error:
                half = len(group) // 2
                if caller is not None:
                    self._break(caller, error)
                elif half:
                    work += [(None, group[half:]), (None, group[:half])]
                else:
                    self._fail(group[0].request, error)
                continue
            for request, number, token, logprob in chosen:
                if request in calls:
                    try:
                        request.take(number, token, logprob)
                    except Exception as error:
                        self._fail(request, error)
            for request in [part.request for part in group]:
                if request.finish_reason is not None:
                    self._end(request)
                elif request.events:
                    self._touched[request] = calls[request]

    # ---- ends

    def _end_those_that_have(self, requests: Iterable[Request]) -> None:
        for request in [request for request in requests if request.finish_reason is not None]:
            self._end(request)

    def _fail(self, request: Request, error: Exception) -> None:
        """The request is at fault for an error."""
        self._finish(request, "error", f"{type(error).__name__}: {error}")

    def _finish(self, request: Request, reason: str, error: str | None = None) -> None:
        request.kv.unsent()
        try:
            request.finish(reason, error)
        except Exception as worse:  # then there is no outcome to tell of
            self._calls[request].error = worse
        self._end(request)

    def _break(self, call: Submission, error: BaseException) -> None:
        """The call ends here, and its requests without an outcome."""
        call.error = error
        for request in tuple(call.open):
            if request in self._calls:
                self._end(request)

    def _abort(self, error: Exception) -> None:
        for call in {*self._calls.values()}:
            self._break(call, error)
        self.runner.reset()

    def _end(self, request: Request) -> None:
        """The request takes part no more, and its pages go back."""
        call = self._calls.pop(request, None)
        if call is None:
            return
        self.scheduler.remove(request)
        self._suspects.discard(request)
        self._free(request.kv)
        self._touched[request] = call
        call.open.discard(request)

    def _free(self, kv: RequestKV) -> None:
        kv.unsent()
        try:
            kv.evict()
        except Exception:  # tried again before the next step
            self._unfreed.append(kv)

    def _make_room(self, pages: int, least: int) -> bool:
        """Evict unused prefixes before any request is preempted."""
        return self.prefixes is not None and self.prefixes.evict(pages, least)

    def _deliver(self) -> None:
        """Tells every call what has happened to its requests."""
        touched, self._touched = self._touched, {}
        events: dict[Submission, list[Event]] = {call: [] for call in touched.values()}
        for request, call in touched.items():
            events[call] += request.events
            request.events = []
        for call, own in events.items():
            if not call.open and not call.ended:
                call.ended = True
                if call.background:
                    with self._turn:
                        self._background -= 1
            try:
                call.deliver(own, call.ended)
            except RuntimeError:  # an event loop that is closed
                if not call.ended:
                    self.cancel(call)
