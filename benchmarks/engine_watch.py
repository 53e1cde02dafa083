"""Where the time of an engine's step goes: the model, the sampler, and the host's work around them.

A step ends when its sampler returns. Host time is what is left of a step without the model's forward and the sampler;
planning and committing in the cache, interpreting tokens, text and events are in it, and so is what the sampler is
handed. On CUDA the device is waited for at the end of each forward and each graph replay, so that its time is not taken
for the host's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import synchronize
from mvkernels.model.sampling import BranchView, Sampler


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. branches: how many the sampler was asked for; steady: as many as in the step before."""

    branches: int
    steady: bool
    model: float
    sampler: float
    host: float


class Watch:
    """Takes the times of steps while `watching`. clock: seconds, ascending."""

    def __init__(self, model: torch.nn.Module, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model, self.device, self.clock = model, device, clock
        self.steps: list[StepTime] = []
        self._last: tuple[float, int] | None = None  # end of the step before, and its branches
        self._depth = 0
        self._began = self._in_model = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the model, its parts that an engine may call alone, and the replay of CUDA graphs."""
        modules = {self.model, getattr(self.model, "base_model", self.model)}
        output = getattr(self.model, "get_output_embeddings", lambda: None)()
        modules |= {output} if output is not None else set()
        handles = [module.register_forward_pre_hook(lambda *_: self._enter()) for module in modules]
        handles += [module.register_forward_hook(lambda *_: self._leave(), always_call=True) for module in modules]
        replay = torch.cuda.CUDAGraph.replay

        def watched(graph: Any) -> None:
            self._enter()
            replay(graph)
            self._leave()

        torch.cuda.CUDAGraph.replay = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()

    def sampler(self, inner: Sampler) -> Sampler:
        """The sampler, timed."""

        def choose(views: Sequence[BranchView], logits: torch.Tensor) -> Sequence[int]:
            start = self.clock()
            chosen = inner(views, logits)
            end = self.clock()
            self._end_step(len(views), start, end)
            return chosen

        return choose

    def _enter(self) -> None:
        if self._depth == 0:
            self._began = self.clock()
        self._depth += 1

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            if not (self.device == "cuda" and torch.cuda.is_current_stream_capturing()):
                synchronize(self.device)
            self._in_model += self.clock() - self._began

    def _end_step(self, branches: int, start: float, end: float) -> None:
        if self._last is not None:
            before, last = self._last
            host = end - before - self._in_model - (end - start)
            self.steps.append(StepTime(branches, branches == last, self._in_model, end - start, host))
        self._last, self._in_model = (end, branches), 0.0
