"""The seam between the engine and a model: one forward over the paged cache.

    forward(ids [T], positions [T], cache, step, rows, batch_invariant) -> logits [rows, V]

Runner and DecodeGraph see nothing else of a model. `hosted.py` runs transformers' modules behind it; the other
executors run the layers of `weights.py` themselves: `torch.py` anywhere, `native.py` on CPUs, `triton.py` on GPUs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Step
from mvkernels.errors import BackendError


class Decoder(ABC):
    """A model as the engine runs it. One forward at a time.

    Attributes:
        kind: the executor: "native", "triton", "torch" or "hosted".
        dtype, device: of its weights, its cache and its logits.
        heads: query heads of a layer.
        vocabulary: V.
        window: most tokens that a row may see, or None.
        capture_reason: why its steps cannot be captured as CUDA graphs, or None.
    """

    kind: ClassVar[str]
    dtype: torch.dtype
    device: torch.device
    heads: int
    vocabulary: int
    window: int | None
    capture_reason: str | None = None

    @abstractmethod
    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedKVCache,
        step: Step,
        rows: torch.Tensor | None = None,
        batch_invariant: bool = False,
    ) -> torch.Tensor:
        """Run the rows of an open step: append their keys and values, and compute logits.

        Args:
            ids: [T] int64 token ids, on `device`; T is step.total_rows, with batch_invariant=True at least that: spare
                rows behind the step's are written nowhere and attend to nothing.
            positions: [T] int32 or int64, for RoPE.
            cache: of the model's layers, heads, dtype and device.
            step: an open step of the cache.
            rows: [n] int64, the rows whose logits are wanted; None: all.
            batch_invariant: as in `tree_decode`.

        Returns:
            Logits [n, V] in `dtype`.

        Raises:
            ValueError: for arguments that do not fit.
            StaleStep: unless the step is open.
            BackendError: for a context beyond the sliding window, or what the attention backend cannot do.
        """

    def refresh(self) -> None:
        """Make what was derived from weights again, after they were written to in place."""
        return None


def check_window(window: int, step: Step) -> None:
    """Raise BackendError where a row of the step sees more tokens than a sliding window has."""
    if step.longest_context > window:
        expected = f"expected a sequence within the sliding window of {window} tokens"
        raise BackendError(f"branch attention: {expected}, got {step.longest_context} tokens")
