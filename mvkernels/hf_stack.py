"""All decoder layers of a transformers model in one call, for decoding on a CPU.

Between two fused layers (`hf_layers`) transformers' loop, PyTorch's modules and the look at whether everything is still
as it was take time in which no weight is read, and a step of a small model lasts hardly longer than that reading. So
the forward of the base model looks once for all layers, and hands them to `decoder_layers` of `layer.cpp`.

It does so under the conditions under which each layer would run by itself, where nobody listens between the layers.
Otherwise the base model's forward is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Step
from mvkernels.hf_norm import is_own, is_rms_norm, same_code
from mvkernels.hf_parts import Parts, Snapshot, Weights
from mvkernels.ops.dense.stack import DecoderLayer, DecoderStep, addresses, run_layers, structs

_MODELS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
# What `patch_model` hands to the base model in a step over the paged cache. Where more is said, the model's own forward
# knows what is meant.
_KNOWN = {
    *("input_ids", "attention_mask", "position_ids", "use_cache", "return_dict"),
    *("paged_kv", "branch_backend", "batch_invariant"),
}
_OUTPUTS = ("output_hidden_states", "output_attentions")


def stack_layers(model: nn.Module, layers: Sequence[Any]) -> None:
    """Lets the base model in `model` run these layers in one call, where they are all that it has."""
    for module in model.modules():
        own: Any = getattr(module, "layers", None)
        if (
            isinstance(own, nn.ModuleList)
            and len(own) > 0
            and [layer.layer for layer in layers] == list(own)
            and "forward" not in module.__dict__
            and any(same_code(type(module).forward, known.forward) for known in _MODELS)
            and type(getattr(module, "embed_tokens", None)) is nn.Embedding
            and is_rms_norm(getattr(module, "norm", None))
            and is_own(getattr(type(getattr(module, "rotary_emb", None)), "forward", None))
        ):
            module.forward = FusedStack(module, layers)


class _Made(NamedTuple):
    """What is made of the layers. numbers: epsilons and scales. structs: where they are, for the kernel."""

    numbers: list[float]
    weights: Snapshot
    layers: list[DecoderLayer]
    structs: Any
    most_rows: int


class FusedStack:
    """The forward of a base model, with all decoder layers in one call. layers: theirs, which share a frame."""

    def __init__(self, base: Any, layers: Sequence[Any]) -> None:
        self.base, self.layers, self.frame = base, list(layers), layers[0].frame
        self.kind = type(base)
        kinds = {type(module) for module in base.modules()}
        self.code = [(kind, kind.__call__, kind.forward) for kind in kinds]  # which somebody may replace, too
        self.parts = Parts([module for module in base.modules() if next(module.children(), None) is not None])
        self.norms = [norm for layer in layers for norm in (*layer.norms, *layer.head_norms)]
        groups = [group for layer in layers for group in (layer.qkv, layer.out, layer.gates, layer.down)]
        self.weights = Weights([*(linear for group in groups for linear in group), *self.norms])
        self.window: int | None = min((layer.window for layer in layers if layer.window is not None), default=None)
        self.indices = [layer.index for layer in layers]
        self.attentions = [layer.layer.self_attn for layer in layers]  # as `parts` sees that they are
        self.dropping = [layer for layer in layers if layer.dropout]
        self._forget()

    def _forget(self) -> None:
        self._made: _Made | None = None  # in one piece, as several threads may make steps

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {"input_ids": args[0], **kwargs} if len(args) == 1 else kwargs
        if len(args) < 2 and self._fits(named):
            ids, (cache, step), made = named["input_ids"], named["paged_kv"], self._make()
            if made.layers and ids.shape[1] <= made.most_rows:
                x = self.base.embed_tokens.forward(ids)
                tables = self.base.rotary_emb.forward(x, position_ids=named["position_ids"])
                fits = x.dtype is torch.float32 and x.shape[-1] == made.layers[0].hidden
                if fits and self.layers[0].rotates(tables, x):
                    self.run(x, made, cache, step, tables, named.get("batch_invariant", False))
                    return BaseModelOutputWithPast(last_hidden_state=self.base.norm.forward(x))
        return type(self.base).forward(self.base, *args, **kwargs)

    def run(
        self,
        x: torch.Tensor,
        made: _Made,
        cache: PagedKVCache,
        step: Step,
        tables: tuple[torch.Tensor, torch.Tensor],
        batch_invariant: bool = False,
    ) -> None:
        """x [1, T, hidden] becomes what the last layer gives. T may exceed the step's rows, as in `FusedLayer`."""
        frame = self.frame
        frame.native = None  # its memory may be given to this one
        native = DecoderStep(
            made.layers[0], frame.workspace, tables, step.slots, step.views, cache.page_size, x.shape[1],
            batch_invariant,
        )  # fmt: skip
        k, v = (addresses([pages[index] for index in self.indices]) for pages in (cache.k, cache.v))
        run_layers(made.structs, native, x, k, v)

    def _fits(self, kwargs: dict[str, Any]) -> bool:
        """Whether every layer would run in the kernels, and nobody looks at what lies between them."""
        ids, paged = kwargs.get("input_ids"), kwargs.get("paged_kv")
        if paged is None or ids is None or kwargs.get("branch_backend") not in ("auto", "native"):
            return False
        cache, step = paged
        config = self.base.config
        return (
            ids.is_cpu
            and ids.shape[0] == 1
            and kwargs.get("position_ids") is not None
            and all(key in _KNOWN or value is None or value is False for key, value in kwargs.items())
            and kwargs.get("return_dict") is not False
            and not any(getattr(config, name, False) for name in _OUTPUTS)
            and getattr(config, "return_dict", True)
            and config.num_hidden_layers == len(self.layers)
            and self.layers[0].without_gradients("cpu")
            and step.state.closed is None
            and self.layers[0].suits_step(cache, step, ids.shape[1], torch.float32, ids.device)
            and max(self.indices) < cache.num_layers
            and (self.window is None or step.longest_context <= self.window)
            and not any([layer.drops_out() for layer in self.dropping])
            and type(self.base) is self.kind
            and all([kind.__call__ is call and kind.forward is forward for kind, call, forward in self.code])
            and self.parts.untouched()
        )

    def _make(self) -> _Made:
        """The layers as they are now; none where the kernels do not multiply all of them, in one shape."""
        numbers = [norm.variance_epsilon for norm in self.norms]
        numbers += [attention.scaling for attention in self.attentions]
        made, weights = self._made, self.weights.now()
        if made is None or made.numbers != numbers or not made.weights.holds(weights):
            layers = [native for layer in self.layers if (native := layer.native_layer()) is not None]
            if len(layers) < len(self.layers) or len({one.shape for one in layers}) > 1:
                layers = []
            most_rows = min((one.most_rows for one in layers), default=0)
            made = self._made = _Made(numbers, Snapshot(weights), layers, structs(layers), most_rows)
        return made
