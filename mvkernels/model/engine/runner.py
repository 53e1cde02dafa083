"""Runner: one step of the model over the paged cache, committed whole or not at all."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch.nn.functional import pad

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Branch, Step
from mvkernels.decoder.decoder import Decoder
from mvkernels.graph.graph import DecodeGraph
from mvkernels.model.engine.kv.request_kv import Entry
from mvkernels.model.engine.sampling.logits import StepLogits

# Steps of the same branches that pages are set aside for, once these have come twice in a row: they need no planning.
_RESERVE = 32


class BadLogits(RuntimeError):
    """The model's logits have NaN.

    logits: all of them. committed: whether the step was committed all the same, as those of CUDA graphs are.
    """

    def __init__(self, logits: StepLogits, committed: bool) -> None:
        super().__init__("expected logits without NaN, got NaN")
        self.logits, self.committed = logits, committed


class Runner:
    """Runs a decoder over a paged cache, both on one device.

    graph: a DecodeGraph of both, through which steps go unless they have to be run with care; None: none do.
    constant_rows: of every forward, with spare ones where a step has fewer tokens (it may not have more), and attention
    that is batch-invariant: what a row gives then depends on no other row. None: as many as the step has tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedKVCache,
        graph: DecodeGraph | None = None,
        constant_rows: int | None = None,
    ) -> None:
        self.decoder, self.cache, self.graph, self.constant_rows = decoder, cache, graph, constant_rows
        self._latest: list[tuple[Branch, int]] = []  # what the latest step had
        self._ahead: Step | None = None  # the step after it, where it was opened already

    def run(
        self,
        entries: Sequence[Entry],
        ids: Sequence[int],
        positions: Sequence[int] | None,
        rows: Sequence[int],
        careful: bool = False,
    ) -> StepLogits:
        """One step. entries: what it adds, in planning order. ids: all new tokens, entry by entry.

        positions: of the tokens; None: as the cache has them. rows: the entries whose last token's logits are wanted;
        they come as the model has them. careful: no graph, so that nothing is committed where logits are bad.
        Raises what the cache and the model raise, and BadLogits; nothing was committed then, unless that says so.
        """
        planned = [(entry.handle, entry.count) for entry in entries]
        if self.graph is not None and positions is None and not careful:
            logits = self.graph.run(planned, ids)
            if len(rows) < len(logits):
                logits = logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)]
            return _checked(logits, committed=True)
        step = self._open(planned)
        try:
            found = _checked(self._forward(step, ids, positions, rows), committed=False)
            self._close(step)
        except BaseException:
            if step.state.closed is None:
                with suppress(Exception):  # a step that stays open is discarded by the next one
                    self.cache.rollback(step)
            raise
        return found

    def free_pages(self) -> int:
        """How many pages the next step may take: those that a step has set aside for later are among them."""
        return self.cache.num_available_pages

    def use(self, decoder: Decoder) -> None:
        """Replace the decoder by one for the same cache; what was captured and set aside is given up."""
        self.decoder = decoder
        if self.graph is not None:
            self.graph.decoder = decoder
        self.reset()

    def reset(self) -> None:
        """Give up what was captured and set aside."""
        if self.graph is not None:
            self.graph.reset()
        self._latest, step, self._ahead = [], self._ahead, None
        if step is not None and step.state.closed is None:
            self.cache.rollback(step)

    def _open(self, planned: list[tuple[Branch, int]]) -> Step:
        """The step of these entries: planned, or there already because it follows one of the same branches."""
        again, self._latest = planned == self._latest, planned
        step, self._ahead = self._ahead, None
        if again and step is not None and step.state.closed is None:  # the tree has not changed since
            return step
        reserve = _RESERVE if again and self.constant_rows is None and all(count == 1 for _, count in planned) else 0
        if self.cache.num_available_pages < len(planned) * (reserve // self.cache.page_size + 2):
            reserve = 0
        with torch.inference_mode():  # as what the model derives from the step's tensors, which advance in place
            return self.cache.plan(planned, reserve)

    def _close(self, step: Step) -> None:
        """Commits a step that has run; opens the next one of its branches where pages are set aside for it."""
        if step.index < step.views.reserve:
            with torch.inference_mode():
                self._ahead = self.cache.advance(step)
        else:
            self.cache.commit(step)

    def _forward(
        self, step: Step, ids: Sequence[int], positions: Sequence[int] | None, rows: Sequence[int]
    ) -> torch.Tensor:
        device = self.cache.device
        tokens = torch.frombuffer(array("q", ids), dtype=torch.int64).to(device)  # a list takes three times as long
        where = step.positions if positions is None else torch.tensor(positions, dtype=torch.int32, device=device)
        kept: torch.Tensor | None = None
        if len(rows) < len(ids) or self.constant_rows is not None:  # else the logits of all tokens, by default
            last = [step.row_offsets[row] + step.entries[row][1] - 1 for row in rows]
            kept = torch.tensor(last or [0], device=device)
            if self.constant_rows is not None:
                if len(ids) > self.constant_rows:
                    raise ValueError(f"expected at most {self.constant_rows} tokens in a step, got {len(ids)}")
                tokens, where, kept = (pad(x, (0, self.constant_rows - len(x))) for x in (tokens, where, kept))
        invariant = self.constant_rows is not None
        with torch.inference_mode():
            return self.decoder.forward(tokens, where, self.cache, step, kept, invariant)[: len(rows)]


def _checked(values: torch.Tensor, committed: bool) -> StepLogits:
    """The logits. Raises BadLogits."""
    logits = StepLogits.of(values)
    if logits.bad_rows:
        raise BadLogits(logits, committed)
    return logits
