"""What `DecodeGraph` keeps for each bucket of steps: memory of fixed addresses, and a CUDA graph that runs over it."""

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

#: A run meets some ten to thirty (`ops.decode.buffers`); each graph has its logits, [rows, V], and the driver's nodes.
MOST = 64
#: Steps of a bucket that run as they are before one is captured: what they compile, or allocate for good, may not
#: happen while a graph is captured.
WARM_UPS = 1

Replay = Callable[[], torch.Tensor]


@dataclass(eq=False)
class Bucket:
    """memory: of the steps; ids [1, rows] int64: their tokens. replay: runs the captured step, and gives its logits.

    runs: how many steps have run.
    """

    memory: FixedStep
    ids: torch.Tensor
    replay: Replay | None = None
    runs: int = 0

    def take(self, ids: torch.Tensor) -> None:
        """The tokens of a step, [T] int32 or int64 on any device. Behind them stay those of other steps, or zeros."""
        upload(self.ids[0, : len(ids)], ids)


class Buckets:
    """The buckets of a model and a cache on a device; the graphs share one memory pool.

    captures: how many graphs were captured so far. uploaded_bytes: copied for plans so far. pages: room for page lists,
    where they are not on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = self.uploaded_bytes = 0
        self.pages = PAGES
        self._kept: OrderedDict[Key, Bucket] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def lay(self, laid: Laid, step: Step, keep: Sequence[int]) -> Bucket:
        """The bucket of a step, whose memory then holds it."""
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
        """Runs a step of the bucket, once: as it is, or by a graph of the function."""
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
        """Captures a function as a CUDA graph, without running it."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # Other threads may use the GPU meanwhile: what they do is not ours to forbid.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                logits = function()
        except BaseException as error:
            self.clear()  # the pool is not as it should be
            # What went wrong first: ending a capture that has failed is an error of its own.
            first = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
            if isinstance(first, BackendError) or not isinstance(first, RuntimeError):  # the model's own
                raise first from None
            raise BackendError(f"DecodeGraph: the step cannot be captured as a CUDA graph: {first}") from error

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay

    def clear(self) -> None:
        """Gives all of it up."""
        self._wait()
        self._kept.clear()
        self._pool = None

    def _drop(self) -> None:
        """All but the latest."""
        while len(self._kept) > MOST:
            self._wait()
            self._kept.popitem(last=False)

    def _wait(self) -> None:
        """A graph that runs may not be destroyed."""
        if self.device.type == "cuda" and any(bucket.replay is not None for bucket in self._kept.values()):
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream that captures run on, so that what libraries keep for a stream is there before."""
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
