"""Timing and peak memory of a call, on the CPU and on CUDA devices.

CUDA: events around each call, the L2 cache overwritten before it. CPU: the wall clock around each call. Both report
the median and the 20th and 80th percentile over the repeats.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_FLUSH_BYTES = 256 * 2**20  # several times the largest L2 of a GPU
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, and the peak of memory beyond what was there before it, in MB; None where unknown."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_mb: float | None


def measure(call: Callable[[], object], device: str, repeats: int, warmup: int = 1) -> Timing:
    """Time `call`, which must leave nothing behind that grows. repeats: timed calls."""
    for _ in range(warmup):
        call()
    peak = _peak_mb(call, device)
    times = sorted(_cuda_times(call, repeats) if device == "cuda" else _cpu_times(call, repeats))
    return Timing(_quantile(times, 0.5), _quantile(times, 0.2), _quantile(times, 0.8), peak)


def _cpu_times(call: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _cuda_times(call: Callable[[], object], repeats: int) -> list[float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _quantile(ordered: list[float], share: float) -> float:
    """Linear between the two nearest."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _peak_mb(call: Callable[[], object], device: str) -> float | None:
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
        return None
    before = _resident_kb("VmRSS")
    call()
    return max(0.0, (_resident_kb("VmHWM") - before) / 1024)


def _resident_kb(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1])
    raise RuntimeError(f"{_STATUS}: expected a line {field}, got none")
