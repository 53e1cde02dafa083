"""A decoder that runs transformers' own modules: any model that `patch_model` accepts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Step
from mvkernels.decoder.decoder import Decoder
from mvkernels.hf import is_patched, patched_backend


class HostedDecoder(Decoder):
    """A causal language model in its current state at each forward: hooks and adapters take effect.

    Args:
        model: A model patched by `patch_model`.

    Raises:
        ValueError: The model is not patched.
    """

    kind: ClassVar[str] = "hosted"

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel) or not is_patched(model):
            raise ValueError(f"model: expected a model patched by patch_model, got {type(model).__name__}")
        self.model, self.dtype, self.device = model, model.dtype, model.device
        config = model.config.get_text_config()
        self.heads, self.vocabulary = config.num_attention_heads, config.vocab_size
        self.window = getattr(config, "sliding_window", None) or None
        self.capture_reason = self._capture_reason()

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedKVCache,
        step: Step,
        rows: torch.Tensor | None = None,
        batch_invariant: bool = False,
    ) -> torch.Tensor:
        if not is_patched(self.model):  # which ignores `paged_kv` silently
            raise ValueError("expected the model as the engine has patched it, got one that was unpatched meanwhile")
        options: dict[str, Any] = {} if rows is None else {"logits_to_keep": rows}
        if batch_invariant:
            options["batch_invariant"] = True
        logits: torch.Tensor = self.model(
            input_ids=ids[None], position_ids=positions[None], paged_kv=(cache, step), use_cache=False, **options
        ).logits[0]
        return logits

    def _capture_reason(self) -> str | None:
        rope = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        if rope.get("rope_type") == "dynamic":
            return "rope_type 'dynamic' decides on the host, in every forward pass, by the longest sequence"
        backend = patched_backend(self.model)
        if backend not in ("auto", "triton"):
            return f"expected a model patched with backend 'auto' or 'triton', got {backend!r}"
        return None
