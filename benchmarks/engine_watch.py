"""Where the time of an engine's step goes: the model, the sampler, and the host's work around them.

A step ends when its sampler returns. The sampler's time is also that of the one pass over the logits that finds NaN and
each row's likeliest token. Host time is what is left of a step without that and the model's forward;
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
from unittest.mock import patch

import torch

from benchmarks.timing import synchronize
from mvkernels.decoder.decoder import Decoder
from mvkernels.model.engine import choice
from mvkernels.model.engine.sampling.logits import StepLogits
from mvkernels.model.engine.sampling.sampler import BranchView


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

    def __init__(self, decoder: Decoder, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.decoder, self.device, self.clock = decoder, device, clock
        self.steps: list[StepTime] = []
        self._last: tuple[float, int] | None = None  # end of the step before, and its branches
        self._depth = 0
        self._began = self._in_model = self._in_sampler = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Patch the decoder's forward, the replay of CUDA graphs, and the sampler."""
        forward = self.decoder.forward

        def forwarded(*args: Any) -> torch.Tensor:
            self._enter()
            try:
                return forward(*args)
            finally:
                self._leave()

        replay = torch.cuda.CUDAGraph.replay

        def watched(graph: Any) -> None:
            self._enter()
            replay(graph)
            self._leave()

        look = StepLogits.of

        def looked(values: torch.Tensor) -> StepLogits:
            start = self.clock()
            found = look(values)
            self._in_sampler += self.clock() - start
            return found

        with (
            patch.object(self.decoder, "forward", forwarded),
            patch.object(torch.cuda.CUDAGraph, "replay", watched),
            patch.object(StepLogits, "of", looked),
            patch.object(choice, "sample_step", self.sampler(choice.sample_step)),
        ):
            yield

    def sampler(self, inner: Callable[[Sequence[BranchView], Any], Any]) -> Callable[..., Any]:
        """A sampler, timed. The engine's own is while `watching`."""

        def choose(views: Sequence[BranchView], logits: Any) -> Any:
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
            sampler = self._in_sampler + end - start
            host = end - before - self._in_model - sampler
            self.steps.append(StepTime(branches, branches == last, self._in_model, sampler, host))
        self._last, self._in_model, self._in_sampler = (end, branches), 0.0, 0.0
