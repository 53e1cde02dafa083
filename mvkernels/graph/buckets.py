"""Buckets of decode steps for `DecodeGraph`: each has memory at fixed addresses, and a CUDA graph that runs over it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mvkernels.cache.step import Step
from mvkernels.errors import BackendError
from mvkernels.graph.fixed_step import PAGES, FixedStep, Laid, upload
from mvkernels.graph.fixed_step import Bucket as Key

#: Most buckets. A run needs ten to thirty (`ops.decode.buffers`); each graph has logits [rows, V] and driver nodes.
MOST = 64
#: Steps of a bucket that run without a graph before the capture: they compile and allocate, which a capture must not.
WARM_UPS = 1

Replay = Callable[[], torch.Tensor]


@dataclass(eq=False)
class Bucket:
    """Memory and graph of one bucket.

    Attributes:
        memory: Tensors of the steps.
        ids: [1, rows] int64, token ids.
        replay: Runs the captured step and returns its logits; None before the capture.
        runs: Number of steps that have run.
    """

    memory: FixedStep
    ids: torch.Tensor
    replay: Replay | None = None
    runs: int = 0

    def take(self, ids: torch.Tensor) -> None:
        """Copy the token ids of a step, [T] int32 or int64 on any device. Ids behind them keep their old values."""
        upload(self.ids[0, : len(ids)], ids)


class Buckets:
    """The buckets of a model and a cache on a device; their graphs share one memory pool.

    Attributes:
        captures: Number of graphs captured so far.
        uploaded_bytes: Bytes copied for plans so far.
        pages: Room for page tables, where they are not on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = self.uploaded_bytes = 0
        self.pages = PAGES
        self._kept: OrderedDict[Key, Bucket] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def lay(self, laid: Laid, step: Step, keep: Sequence[int]) -> Bucket:
        """Copy a step into the memory of its bucket; returns the bucket."""
        bucket = self._kept.get(laid.bucket)
        if bucket is None:
            memory = FixedStep(laid, step)
            ids = torch.zeros((1, memory.rows), dtype=torch.int64, device=self.device)
            bucket = self._kept[laid.bucket] = Bucket(memory, ids)
            self._drop()
        self.pages = max(self.pages, laid.bucket.capacity.pages)
        self._kept.move_to_end(laid.bucket)
        self.uploaded_bytes += bucket.memory.lay(laid, step, keep)
        return bucket

    def run(self, bucket: Bucket, function: Replay) -> torch.Tensor:
        """Run a step of the bucket once: `function` itself, or its graph."""
        if bucket.replay is None and bucket.runs >= WARM_UPS:
            bucket.replay = self.record(function)
            self.captures += 1
        if bucket.replay is not None:
            logits = bucket.replay()
        else:
            with self._beside():
                logits = function()
        bucket.runs += 1
        return logits

    def record(self, function: Replay) -> Replay:
        """Capture a function as a CUDA graph, without running it."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # thread_local: other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                logits = function()
        except BaseException as error:
            self.clear()  # the pool is in an undefined state
            # The first error is the cause: ending a failed capture raises another one.
            first = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
            if isinstance(first, BackendError) or not isinstance(first, RuntimeError):  # the model's own
                raise first from None
            raise BackendError(f"DecodeGraph: the step cannot be captured as a CUDA graph: {first}") from error

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay

    def clear(self) -> None:
        """Free all buckets."""
        self._wait()
        self._kept.clear()
        self._pool = None

    def _drop(self) -> None:
        """Free the least recently used buckets beyond `MOST`."""
        while len(self._kept) > MOST:
            self._wait()
            self._kept.popitem(last=False)

    def _wait(self) -> None:
        """Wait for the device, because a running graph must not be destroyed."""
        if self.device.type == "cuda" and any(bucket.replay is not None for bucket in self._kept.values()):
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Run on the stream of the captures, so that what libraries allocate per stream exists before them."""
        if self.device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            here.wait_stream(self._stream)
