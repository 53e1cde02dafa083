"""Timing in rounds and peak memory of a call, on the CPU and on CUDA devices.

Every peer is called once a round, one after the other, so that other load on the machine affects all alike and the
ratio of two times of one round is meaningful. CUDA: events around each call, the L2 cache overwritten before it.
CPU: the wall clock around each call.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

_FLUSH_BYTES = 256 * 2**20  # several times the largest L2 of a GPU
COLD_BYTES = 2**29  # several times the last cache of most CPUs
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
MIN_ROUNDS = 3


@dataclass
class Contender:
    """One that takes part. calls: direction -> what to time, which must leave nothing behind that grows.

    times: direction -> ms of each round; peaks: direction -> MB, see `peak_mb`. error: why it left, if it did.
    """

    name: str
    calls: dict[str, Callable[[], object]]
    times: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    error: Exception | None = None

    def both(self) -> list[float]:
        """ms of all directions together, by round."""
        return [sum(row) for row in zip(*self.times.values(), strict=False)]


@dataclass(frozen=True)
class Spread:
    """The median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        return cls(_quantile(ordered, 0.5), _quantile(ordered, 0.2), _quantile(ordered, 0.8))


def ratio_spread(times: Sequence[float], mine: Sequence[float]) -> Spread | None:
    """Of times over mine, round by round; None where there is no round that both took part in."""
    ratios = [one / own for one, own in zip(times, mine, strict=False)]
    return Spread.of(ratios) if ratios else None


def measure_rounds(
    contenders: Sequence[Contender],
    device: str,
    rounds: int,
    seconds: float,
    cold: bool = False,
    warm: bool = True,
) -> None:
    """Fill `times` and `peaks`, `error` of those that raise. Stopped by a KeyboardInterrupt, what there is stays.

    rounds: at most so many; a contender leaves once its calls took `seconds` together, but not before MIN_ROUNDS.
    cold: on a CPU too, the caches are overwritten before each call. warm: whether each is called once before the first
    round, for its peak of memory too; without, it must be warm already.
    """
    for contender in contenders:
        contender.times = {direction: [] for direction in contender.calls}
    live = list(contenders)
    for contender in contenders if warm else ():
        try:
            for direction, call in contender.calls.items():
                contender.peaks[direction] = peak_mb(call, device)  # and the warm-up
        except Exception as error:
            _leave(contender, error, live)
    run_round = _CudaRound() if device == "cuda" else _CpuRound(COLD_BYTES if cold else 0)
    for done in range(rounds):
        run_round(live)
        if done + 1 >= MIN_ROUNDS:
            live = [one for one in live if sum(map(sum, one.times.values())) < seconds * 1e3]


def measure(call: Callable[[], object], device: str, repeats: int, seconds: float = 2.0) -> list[float]:
    """ms of a call that is timed alone, after one warm-up: for what runs on the host. On CUDA, waits for the GPU.

    repeats: at most so many; none begins after `seconds`, but the first.
    """
    call()
    times: list[float] = []
    while len(times) < repeats and (not times or sum(times) < seconds * 1e3):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measure_device(
    before: Callable[[], object], call: Callable[[], object], device: str, repeats: int, seconds: float = 2.0
) -> list[float]:
    """ms of the device's work in a call, after one warm-up. before: what undoes the call before, not timed.

    On CUDA the device is kept busy meanwhile, so that the time which the host takes to queue a call does not show.
    """
    before()
    call()
    if device != "cuda":
        return _measure_after(before, call, repeats, seconds)
    busy = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(16):  # about a millisecond
            busy.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def _measure_after(
    before: Callable[[], object], call: Callable[[], object], repeats: int, seconds: float
) -> list[float]:
    times: list[float] = []
    while len(times) < repeats and (not times or sum(times) < seconds * 1e3):
        before()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def captured(call: Callable[[], object], device: str) -> tuple[Callable[[], object], Exception | None]:
    """The call as the replay of a CUDA graph, as engines run it; or itself, with the error where it is no graph."""
    if device != "cuda":
        return call, None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return partial(_replay, graph, call), None
    except Exception as error:
        torch.cuda.synchronize()
        return call, error.with_traceback(None)


def _replay(graph: torch.cuda.CUDAGraph, call: Callable[[], object]) -> None:
    """call: what was captured, kept with the graph, for it holds the memory that the graph reads."""
    graph.replay()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _leave(contender: Contender, error: Exception, live: list[Contender]) -> None:
    contender.error = error.with_traceback(None)  # its frames hold tensors
    contender.calls = {}
    live.remove(contender)


class _CpuRound:
    def __init__(self, flush_bytes: int) -> None:
        self.flush = torch.empty(flush_bytes, dtype=torch.int8)

    def __call__(self, live: list[Contender]) -> None:
        for contender in [*live]:
            try:
                for direction, call in contender.calls.items():
                    self.flush.zero_()
                    start = time.perf_counter()
                    call()
                    contender.times[direction].append((time.perf_counter() - start) * 1e3)
            except Exception as error:
                _leave(contender, error, live)


class _CudaRound:
    """A whole round is queued before the host waits, so that the GPU does not wait for the host."""

    def __init__(self) -> None:
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, live: list[Contender]) -> None:
        marks = []
        for contender in [*live]:
            try:
                for direction, call in contender.calls.items():
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    self.flush.zero_()
                    start.record()
                    call()
                    end.record()
                    marks.append((contender.times[direction], start, end))
            except Exception as error:
                _leave(contender, error, live)
        torch.cuda.synchronize()
        for times, start, end in marks:
            times.append(start.elapsed_time(end))


def _quantile(ordered: list[float], share: float) -> float:
    """Linear between the two nearest."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def peak_mb(call: Callable[[], object], device: str) -> float | None:
    """The peak of memory during a call beyond what was there before it, in MB (2**20); None where unknown.

    CUDA: what PyTorch's allocator handed out. CPU: the resident set, from Linux.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the call would be served from what was freed before
        _CLEAR.write_text("5")  # resets the high-water mark of the resident set
    except (OSError, AttributeError):
        call()
        return None
    before = _resident_kb("VmRSS")
    call()
    return max(0.0, (_resident_kb("VmHWM") - before) / 1024)


def _resident_kb(field_name: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field_name + ":"):
            return float(line.split()[1])
    raise RuntimeError(f"{_STATUS}: expected a line {field_name}, got none")
