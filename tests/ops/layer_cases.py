"""Small models whose decoder layers are fused in one way or another, and steps over a paged cache that compare them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from mvkernels import PagedKVCache, hf_layers, hf_stack

CONFIGS = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 24}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 24}),
}
IDS = torch.arange(100).view(1, 100) % 97


def plain_model(name: str, **changes: Any) -> Any:
    """A model of two layers; norms and biases are random too."""
    kind, own = CONFIGS[name]
    sizes = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **own, **changes})).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if "norm" in tensor_name or "bias" in tensor_name:
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return model


def make_cache(model: Any, pages: int = 64) -> PagedKVCache:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = (pages, 4, config.num_hidden_layers, config.num_key_value_heads, head_dim)
    return PagedKVCache(*sizes, model.dtype, model.device)


def steps(model: Any, **more: Any) -> list[torch.Tensor]:
    """Logits of a prompt, then of three steps of two branches of it, the last with a second token in one."""
    cache = make_cache(model)
    root = cache.new()
    found = []

    def step(*entries: Any) -> None:
        planned = cache.plan(entries)
        rows = planned.total_rows + more.get("spare", 0)
        given = {"batch_invariant": True} if more.get("batch_invariant") else {}
        ids = IDS[:, len(found) : len(found) + rows].to(model.device)
        with torch.inference_mode():
            logits = model(ids, paged_kv=(cache, planned), **given).logits[0]
        cache.commit(planned)
        found.append(logits[: planned.total_rows])

    step((root, 7))
    first, second = cache.fork(root, 2)
    for tokens in (1, 1, 2):
        step((first, tokens), (second, 1))
    return found


def fused(model: nn.Module) -> int:
    """How many layers are."""
    return sum(isinstance(module.__dict__.get("forward"), hf_layers.FusedLayer) for module in model.modules())


def stacked(model: nn.Module) -> int:
    """How many base models run all their layers in one call."""
    return sum(isinstance(module.__dict__.get("forward"), hf_stack.FusedStack) for module in model.modules())


def count_runs(monkeypatch: pytest.MonkeyPatch, way: str) -> list[int]:
    """A list that gets the number of rows of each layer that runs fused, be it with all others. way: the method that
    runs one by itself.
    """
    seen: list[int] = []
    run, run_all = getattr(hf_layers.FusedLayer, way), hf_stack.FusedStack.run

    def counted(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(x.shape[1])
        return run(self, x, *args, **kwargs)

    def counted_all(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.extend([x.shape[1]] * len(self.layers))
        return run_all(self, x, *args, **kwargs)

    monkeypatch.setattr(hf_layers.FusedLayer, way, counted)
    monkeypatch.setattr(hf_stack.FusedStack, "run", counted_all)
    return seen


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= 2e-5 * float(other.abs().max())
