"""What a caller holds while his requests run: events as they come, one after the other or awaited."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from weakref import WeakMethod

from mvkernels.model.engine.core import Core, Submission
from mvkernels.model.engine.output.events import Event, FinishEvent
from mvkernels.model.engine.request import Request
from mvkernels.model.engine.sampling.sampler import Sampler


def _weak(receive: Callable[[list[Event], bool], None]) -> Callable[[list[Event], bool], None]:
    """The same method, as long as its object lives: that the loop knows of a stream does not keep it alive."""
    found = WeakMethod(receive)

    def deliver(events: list[Event], ended: bool) -> None:
        method = found()
        if method is None:
            raise RuntimeError("expected a stream that is read, got one that was dropped")
        method(events, ended)

    return deliver


class Stream(Iterator[Event]):
    """Events of some requests. The thread that asks for the next event makes the steps; the first `next` begins.

    only_ends: FinishEvents alone. What a sampler of the caller's raises comes out of `next`.
    """

    def __init__(self, core: Core, requests: Sequence[Request], sampler: Sampler, only_ends: bool = False) -> None:
        self._core, self._only_ends = core, only_ends
        for request in requests:
            request.tells_tokens = not only_ends
        self._events: deque[Event] = deque()
        self._call = Submission(requests, sampler, _weak(self._receive))
        self._joined = False
        self._ended = not requests

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        self._join()
        if not self._events:
            self._core.until(lambda: bool(self._events) or self._ended)
        if self._events:
            return self._events.popleft()
        error, self._call.error = self._call.error, None
        raise StopIteration if error is None else error

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._joined and not self._ended:
            self._core.cancel(self._call)
            self._core.tidy()

    def cancel(self) -> None:
        """The requests that have not ended end with "cancelled"; what is left to tell can still be read."""
        self._join()
        self._core.cancel(self._call)

    def close(self) -> None:
        """Ends everything and gives every page back; there are no more events."""
        if self._joined and not self._ended:
            self._core.cancel(self._call)
            if not self._core.within_step():
                self._core.until(lambda: self._ended, steps=False)
        self._ended, self._call.error = True, None
        self._events.clear()

    def _join(self) -> None:
        if not self._joined and not self._ended:
            self._joined = True
            self._core.join(self._call)

    def _receive(self, events: list[Event], ended: bool) -> None:
        self._events += [e for e in events if isinstance(e, FinishEvent)] if self._only_ends else events
        self._ended = self._ended or ended


class AsyncStream(AsyncIterator[Event]):
    """The same for `async for`, with steps made by a thread in the background. The first event asked for begins.

    Leaving it early, by `aclose`, at the end of `async with`, or as the task that waits for an event is cancelled,
    ends everything and gives every page back.
    """

    def __init__(self, core: Core, requests: Sequence[Request], sampler: Sampler) -> None:
        self._core = core
        self._events: deque[Event] = deque()
        self._call = Submission(requests, sampler, _weak(self._receive), background=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._more = asyncio.Event()
        self._ended = not requests

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Event:
        self._join()
        try:
            await self._until_there_is_more()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if self._events:
            return self._events.popleft()
        error, self._call.error = self._call.error, None
        raise StopAsyncIteration if error is None else error

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._loop is not None and not self._ended:
            self._core.cancel(self._call)

    def cancel(self) -> None:
        """The requests that have not ended end with "cancelled"; what is left to tell can still be read."""
        self._join()
        self._core.cancel(self._call)

    async def aclose(self) -> None:
        """Ends everything and gives every page back; there are no more events."""
        if self._loop is not None and not self._ended:
            self._core.cancel(self._call)
            while not self._ended:
                self._events.clear()
                await self._until_there_is_more()
        self._ended, self._call.error = True, None
        self._events.clear()
        self._more.set()

    async def _until_there_is_more(self) -> None:
        while not self._events and not self._ended:
            self._more.clear()
            await self._more.wait()

    def _join(self) -> None:
        if self._loop is None and not self._ended:
            self._loop = asyncio.get_running_loop()
            self._core.join(self._call)

    def _receive(self, events: list[Event], ended: bool) -> None:
        """In the thread that made the step."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._tell, events, ended)

    def _tell(self, events: list[Event], ended: bool) -> None:
        self._events.extend(events)
        self._ended = self._ended or ended
        self._more.set()
