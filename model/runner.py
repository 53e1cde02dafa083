"""Runner: one step of the model over the paged cache, committed whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from transformers import PreTrainedModel

from mvkernels.kv_cache import PagedKVCache
from mvkernels.kv_step import Step
from mvkernels.model.request_kv import Entry


class BadLogits(RuntimeError):
    """The model's logits have NaN. Nothing of the step was committed."""


class Runner:
    """Runs a patched model over a paged cache, both on one device."""

    def __init__(self, model: PreTrainedModel, cache: PagedKVCache) -> None:
        self.model, self.cache = model, cache

    def run(
        self, entries: Sequence[Entry], ids: Sequence[int], positions: Sequence[int], rows: Sequence[int]
    ) -> torch.Tensor:
        """One step. entries: what it adds, in planning order. ids, positions: of all new tokens, entry by entry.

        rows: the entries whose last token's logits are wanted; they come as [n, V] float32. Raises what the cache and
        the model raise, and BadLogits; then nothing was committed.
        """
        step = self.cache.plan([(entry.handle, entry.count) for entry in entries])
        try:
            logits = self._forward(step, ids, positions, rows)
            if _has_nan(logits):
                raise BadLogits("expected logits without NaN, got NaN")
            self.cache.commit(step)
        except BaseException:
            if step.state.closed is None:
                with suppress(Exception):  # a step that stays open is discarded by the next one
                    self.cache.rollback(step)
            raise
        return logits

    def reset(self) -> None:
        """Whatever was set aside for the next step is free again."""

    def free_pages(self) -> int:
        """How many pages the next step may take."""
        return self.cache.num_free_pages

    def _forward(self, step: Step, ids: Sequence[int], positions: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        device, offsets = self.cache.device, step.row_offsets
        last = [offsets[row] + step.entries[row][1] - 1 for row in rows]
        with torch.inference_mode():
            logits: torch.Tensor = self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device, dtype=torch.int32),
                paged_kv=(self.cache, step),
                use_cache=False,
                logits_to_keep=torch.tensor(last or [0], device=device),
            ).logits[0, : len(rows)]
        return logits.float()


def _has_nan(logits: torch.Tensor) -> bool:
    """One pass that makes no mask: a sum is NaN where an element is, and where infinities meet."""
    return bool(logits.sum(dim=-1).isnan().any()) and bool(logits.isnan().any())
