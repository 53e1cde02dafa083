"""Interface between the engine and a model, `Decoder`: one forward over the paged KV cache.

    forward(ids [T], positions [T], cache, step, rows, batch_invariant) -> logits [rows, V]

Runner and DecodeGraph use nothing else of a model. `hosted.py` runs transformers' modules behind it. The other
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
        kind: The executor: "native", "triton", "torch" or "hosted".
        dtype: Dtype of its weights, its cache and its logits.
        device: Device of its weights, its cache and its logits.
        heads: Query heads of a layer.
        vocabulary: V.
        window: Most tokens that a row may see, or None.
        capture_reason: Why its steps cannot be captured as CUDA graphs, or None.
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
            ids: [T] int64 token ids, on `device`. T is step.total_rows. With batch_invariant=True it may be more: spare
                rows behind those of the step are not written and attend to nothing.
            positions: [T] int32 or int64, for RoPE.
            cache: KV cache of the model's layers, heads, dtype and device.
            step: An open step of the cache.
            rows: [n] int64, the rows to compute logits of; None: all.
            batch_invariant: As in `tree_decode`.

        Returns:
            Logits [n, V] in `dtype`.

        Raises:
            ValueError: The arguments do not fit together.
            StaleStep: The step is not open.
            BackendError: The context exceeds the sliding window, or the attention backend cannot compute this.
        """

    def refresh(self) -> None:
        """Make data derived from weights again, after the weights were written in place."""
        return None


def check_window(window: int, step: Step) -> None:
    """Raise BackendError if a row of the step sees more tokens than the sliding window."""
    if step.longest_context > window:
        expected = f"expected a sequence within the sliding window of {window} tokens"
        raise BackendError(f"branch attention: {expected}, got {step.longest_context} tokens")
