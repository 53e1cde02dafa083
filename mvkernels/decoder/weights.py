"""Weights of the architectures that this package runs itself, taken from a model that transformers has loaded.

transformers handles checkpoint formats (safetensors, shards, GGUF) and tied heads. Only its tensors are used, without a
copy. The rest of the model (hooks, replaced forwards, adapters) is not run, so a model that has any is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from mvkernels.rope import Rope

#: Causal models by their transformers class: RMSNorm, RoPE on halves of a head, GQA, gated SiLU; with the biases of
#: Qwen2, or of a config, and the query and key norms of Qwen3.
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_PLAIN_MODULES = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU, SiLUActivation)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Hooks of these modules change nothing: they record requested outputs, and check the inputs of a patched model.
_HARMLESS_HOOKS = ("transformers.", "mvkernels.")


class Linear(NamedTuple):
    """weight [outputs, inputs]; bias [outputs] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Layer(NamedTuple):
    """One decoder layer. before, after: weights [hidden] of the norms before attention and before the MLP."""

    before: torch.Tensor
    q: Linear
    k: Linear
    v: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    after: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[tuple[Linear, ...], ...]:
        """The layer's linear layers, grouped by input."""
        return (self.q, self.k, self.v), (self.o,), (self.gate, self.up), (self.down,)


@dataclass(frozen=True, eq=False)
class Weights:
    """Tensors of one dtype on one device, without gradients, and the sizes of the model.

    scale: of attention scores. window: most tokens that a row may see, or None.
    """

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Linear
    rope: Rope
    eps: float
    scale: float
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def linear_numbers(self) -> int:
        """Count the elements of the matrices that every row is multiplied with."""
        linears = [one for layer in self.layers for group in layer.linears for one in group]
        return sum(one.weight.numel() for one in (*linears, self.head))


def weights_reason(model: PreTrainedModel) -> str | None:
    """Return why `take_weights` refuses a model, with the name of the part, or None."""
    family = FAMILIES.get(type(model).__name__)
    source = f"transformers.models.{family}.modeling_{family}"
    if family is None or type(model).__module__ != source:
        return f"expected an architecture of {', '.join(FAMILIES)}, got {type(model).__name__}"
    config: Any = model.config
    if config.hidden_act not in ("silu", "swish"):
        return f"expected hidden_act 'silu', got {config.hidden_act!r}"
    for name, module in model.named_modules():
        if (reason := _module_reason(module, source)) is not None:
            return f"{name or 'model'}: {reason}"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype not in _DTYPES:
            return f"{name}: expected a plain floating-point weight, got {type(parameter).__name__} {parameter.dtype}"
        if (parameter.dtype, parameter.device) != (model.dtype, model.device):
            expected = f"{model.dtype} on {model.device} as the first weight"
            return f"{name}: expected {expected}, got {parameter.dtype} on {parameter.device}"
    try:
        rope = Rope.from_config(config)
    except ValueError as error:
        return str(error)
    base: Any = model.base_model
    attention = base.layers[0].self_attn
    if 2 * len(rope.inv_freq) != attention.head_dim:
        return f"expected RoPE on all {attention.head_dim} dimensions of a head, got {2 * len(rope.inv_freq)}"
    return None


def _module_reason(module: nn.Module, source: str) -> str | None:
    kind = type(module)
    if kind not in _PLAIN_MODULES and kind.__module__ != source:
        return f"expected a module of transformers' own, got {kind.__name__} (quantised, an adapter or replaced)"
    if "forward" in module.__dict__:
        return "expected the forward of its class, got one that was replaced"
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function = getattr(hook, "func", hook)
        if not (getattr(function, "__module__", None) or "").startswith(_HARMLESS_HOOKS):
            return f"expected no forward hooks, got {getattr(function, '__name__', type(function).__name__)}"
    return None


def take_weights(model: PreTrainedModel) -> Weights:
    """Take the tensors of a model without a copy.

    Args:
        model: A causal language model on one device for which `weights_reason` is None.

    Returns:
        Its weights and sizes.

    Raises:
        ValueError: The reason of `weights_reason`.
    """
    if (reason := weights_reason(model)) is not None:
        raise ValueError(reason)
    config: Any = model.config
    base: Any = model.base_model
    first = base.layers[0].self_attn
    return Weights(
        embedding=_detached(base.embed_tokens.weight),
        layers=tuple(map(_layer, base.layers)),
        norm=_detached(base.norm.weight),
        head=_linear(model.get_output_embeddings()),
        rope=Rope.from_config(config, model.device),
        eps=config.rms_norm_eps,
        scale=first.scaling,
        heads=first.q_proj.out_features // first.head_dim,
        kv_heads=first.k_proj.out_features // first.head_dim,
        head_dim=first.head_dim,
        window=_window(config),
    )


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        before=_detached(layer.input_layernorm.weight),
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        q_norm=None if q_norm is None else _detached(q_norm.weight),
        k_norm=None if k_norm is None else _detached(k_norm.weight),
        o=_linear(attention.o_proj),
        after=_detached(layer.post_attention_layernorm.weight),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
    )


def _linear(linear: Any) -> Linear:
    return Linear(_detached(linear.weight), None if linear.bias is None else _detached(linear.bias))


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous()


def _window(config: Any) -> int | None:
    """Return the sliding window if any layer has one: Mistral's all, Qwen's by layer type, Llama's never."""
    window: int | None = getattr(config, "sliding_window", None) or None
    slides = config.model_type == "mistral" or "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return window if slides and config.model_type != "llama" else None
