"""Small models of the four families, and steps over a paged cache through a decoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from mvkernels import PagedKVCache, patch_model
from mvkernels.decoder.decoder import Decoder

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
#: Every family, with and without biases, query and key norms, a tied head, each kind of RoPE, and a window.
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, biases, llama3": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama, tied, linear": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "mistral, window, head of 20": (MistralConfig, {"sliding_window": 24, "head_dim": 20}),
    "qwen2, tied, yarn": (Qwen2Config, {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3, head of 24": (Qwen3Config, {"head_dim": 24}),
    "qwen3, biases, tied": (Qwen3Config, {"attention_bias": True, "tie_word_embeddings": True}),
}
FAMILIES = [name for name in MODELS if name in ("llama", "qwen3, head of 24") or "," in name]
IDS = torch.arange(400) * 31 % 97


def make_model(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of two layers whose weights bf16 has too; norms and biases are random as well."""
    kind, own = MODELS[name]
    sizes = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **own, **changes})).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if "norm" in tensor_name or "bias" in tensor_name:
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
            tensor.copy_(tensor.bfloat16())
    return model.to(dtype)


def make_cache(decoder: Any, config: Any, pages: int = 64) -> PagedKVCache:
    """decoder: anything with a dtype and a device."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = (pages, 4, config.num_hidden_layers, config.num_key_value_heads, head_dim)
    return PagedKVCache(*sizes, decoder.dtype, decoder.device)


def steps(
    decoder: Decoder, config: Any, batch_invariant: bool = False, spare: int = 0, wanted: Any = None
) -> list[torch.Tensor]:
    """Logits of a prompt, of uneven steps of two branches that fork from it, and of the parent after their merge.

    wanted: rows whose logits are asked for, or None for all.
    """
    cache = make_cache(decoder, config)
    root = cache.new()
    found: list[torch.Tensor] = []

    def step(*entries: Any) -> None:
        planned = cache.plan(entries)
        rows = planned.total_rows + spare
        first = sum(map(len, found))
        ids = IDS[first : first + rows].to(decoder.device)
        positions = torch.nn.functional.pad(planned.positions, (0, spare))
        with torch.inference_mode():
            logits = decoder.forward(ids, positions, cache, planned, wanted, batch_invariant)
        cache.commit(planned)
        found.append(logits[: planned.total_rows])

    step((root, 7))
    first, second = cache.fork(root, 2)
    for tokens in (1, 1, 3):
        step((first, tokens), (second, 1))
    cache.merge(root, [first, second])
    step((root, 2))
    step((root, 1))
    cache.check()
    return found


def sequences(found: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([logits.double() for logits in found])


def exact(model: Any) -> torch.Tensor:
    """The logits of `steps` in float64, by transformers' modules and eager attention."""
    import copy

    from mvkernels.decoder.hosted import HostedDecoder

    wide = copy.deepcopy(model).double()
    return sequences(steps(HostedDecoder(patch_model(wide, "reference")), model.config))


def eager(model: Any) -> torch.Tensor:
    """The same in the model's dtype."""
    import copy

    from mvkernels.decoder.hosted import HostedDecoder

    return sequences(steps(HostedDecoder(patch_model(copy.deepcopy(model), "reference")), model.config))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
