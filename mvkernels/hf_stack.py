"""All decoder layers of a transformers model in one call, for decoding on a CPU.

Between two fused layers (`hf_layers`) transformers' loop, PyTorch's modules and the look at whether everything is still
as it was take time in which no weight is read, and a step of a small model lasts hardly longer than that reading. So
the forward of the base model looks once for all layers, and hands them to `decoder_layers` of `layer_native.cpp`.

It does so under the conditions under which each layer would run by itself, where nobody listens between the layers.
Otherwise the base model's forward is what it was.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from mvkernels.hf_norm import is_rms_norm, same_code
from mvkernels.kv_cache import PagedKVCache
from mvkernels.kv_step import Step
from mvkernels.ops.decoder_native import DecoderLayer, DecoderStep, addresses, run_layers, structs

if TYPE_CHECKING:
    from mvkernels.hf_layers import FusedLayer

_MODELS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
# What `patch_model` hands to the base model in a step over the paged cache. Where anything else is asked for, the
# model's own forward knows.
_KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "paged_kv", "branch_backend", "batch_invariant"}
_OUTPUTS = ("output_hidden_states", "output_attentions")


class Parts:
    """Modules as they hang together, with the forwards that they have of their own; without hooks, which would want to
    be called. parents: whose children they are.
    """

    def __init__(self, parents: Iterable[nn.Module]) -> None:
        self._children = [(parent, name, part) for parent in parents for name, part in parent.named_children()]
        self._found = [where.get(name) for where, name in self._places]

    @cached_property
    def _places(self) -> list[tuple[dict[str, Any], str]]:
        """Where each part hangs, and its own forward where it has one."""
        hang: list[tuple[Any, str]] = [(parent._modules, name) for parent, name, _ in self._children]
        return hang + [(part.__dict__, "forward") for _, _, part in self._children]

    @cached_property
    def _hooks(self) -> list[dict[int, Any]]:
        return [hooks for _, _, part in self._children for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    def __getstate__(self) -> dict[str, Any]:
        return {"_children": self._children, "_found": self._found}  # a copy's modules have dictionaries of their own

    def untouched(self) -> bool:
        """Whether all of it is as it was."""
        if any(self._hooks) or module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
            return False
        return [where.get(name) for where, name in self._places] == self._found


class Weights:
    """The parameters of modules, and whether they are still those that they were, unwritten."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._tensors: list[torch.Tensor | None] = []
        self._kept: list[torch.Tensor] = []  # aliases: so that no other tensor comes to lie where they are
        self._counting: list[torch.Tensor] = []  # those that count how often they are written to
        self._state: list[int] = []

    @cached_property
    def _places(self) -> list[tuple[dict[str, Any], str]]:
        return [(one._parameters, name) for one in self._modules for name in one._parameters]

    def __getstate__(self) -> list[nn.Module]:
        return self._modules

    def __setstate__(self, modules: list[nn.Module]) -> None:
        Weights.__init__(self, modules)

    def changed(self) -> bool:
        """Whether they are others, or have others numbers, than when `remember` was called."""
        tensors = [where.get(name) for where, name in self._places]
        same = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        return not same or self._look() != self._state

    def remember(self) -> None:
        """They are as they should be."""
        self._tensors = [where.get(name) for where, name in self._places]
        known = [tensor for tensor in self._tensors if tensor is not None]
        self._kept = [tensor.detach() for tensor in known]
        self._counting = [tensor for tensor in known if not tensor.is_inference()]
        self._state = self._look()

    def _look(self) -> list[int]:
        addresses = [tensor.data_ptr() for tensor in self._tensors if tensor is not None]
        return addresses + [tensor._version for tensor in self._counting]


def stack_layers(model: nn.Module, layers: Sequence[FusedLayer]) -> None:
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
        ):
            module.forward = FusedStack(module, layers)


class _Made(NamedTuple):
    """What is made of the layers. structs: where they are, for the kernel."""

    epsilons: list[float]
    layers: list[DecoderLayer]
    structs: Any
    most_rows: int


class FusedStack:
    """The forward of a base model, with all decoder layers in one call. layers: theirs, which share a frame."""

    def __init__(self, base: Any, layers: Sequence[FusedLayer]) -> None:
        self.base, self.layers, self.frame = base, list(layers), layers[0].frame
        self.parts = Parts([module for module in base.modules() if next(module.children(), None) is not None])
        self.norms = [norm for layer in layers for norm in (*layer.norms, *layer.head_norms)]
        groups = [group for layer in layers for group in (layer.qkv, layer.out, layer.gates, layer.down)]
        self.weights = Weights([*(linear for group in groups for linear in group), *self.norms])
        self.window: int | None = min((layer.window for layer in layers if layer.window is not None), default=None)
        self.indices = [layer.index for layer in layers]
        self._forget()

    def _forget(self) -> None:
        # Each in one piece, as several threads may make steps.
        self._made: _Made | None = None
        self._caches: tuple[weakref.ref[PagedKVCache], Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self._fits(kwargs) and (made := self._make()).layers:
            cache, step = kwargs["paged_kv"]
            x = nn.functional.embedding(kwargs["input_ids"], self.base.embed_tokens.weight)
            tables = self.base.rotary_emb.forward(x, position_ids=kwargs["position_ids"])
            few = x.shape[1] <= made.most_rows
            if few and x.dtype is torch.float32 and self.layers[0].rotates(tables, x):
                self.run(x, made, cache, step, tables, kwargs.get("batch_invariant", False))
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
        frame, known = self.frame, self._caches
        frame.native = None  # its memory may be given to this one
        native = DecoderStep(
            made.layers[0], frame.workspace, tables, step.slots, step.views, cache.page_size, x.shape[1],
            batch_invariant,
        )  # fmt: skip
        if known is None or known[0]() is not cache:
            k, v = (addresses([pages[index] for index in self.indices]) for pages in (cache.k, cache.v))
            known = self._caches = weakref.ref(cache), k, v
        run_layers(made.structs, native, x, known[1], known[2])

    def _fits(self, kwargs: dict[str, Any]) -> bool:
        """Whether every layer would run in the kernels, and nobody looks at what lies between them."""
        ids, paged = kwargs.get("input_ids"), kwargs.get("paged_kv")
        if paged is None or ids is None or kwargs.get("branch_backend") not in ("auto", "native"):
            return False
        cache, step = paged
        config, layer = self.base.config, self.layers[0]
        return (
            ids.is_cpu
            and kwargs.get("position_ids") is not None
            and all(key in _KNOWN or value is None for key, value in kwargs.items())
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not any(getattr(config, name, False) for name in _OUTPUTS)
            and getattr(config, "return_dict", True)
            and config.num_hidden_layers == len(self.layers)
            and step.state.closed is None
            and ids.shape[0] == 1
            and step.total_rows <= ids.shape[1]
            and step.entries[0][0].cache is cache
            and cache.dtype is torch.float32
            and cache.device.type == "cpu"
            and cache.head_dim == layer.head_dim
            and cache.num_kv_heads == layer.kv_heads
            and max(self.indices) < cache.num_layers
            and (self.window is None or step.longest_context <= self.window)
            and not any(layer.dropout and layer.layer.training for layer in self.layers)
            and self.parts.untouched()
        )

    def _make(self) -> _Made:
        """The layers as they are now; none where the kernels do not multiply all of them, in one shape."""
        epsilons = [norm.variance_epsilon for norm in self.norms]
        made = self._made
        if made is None or made.epsilons != epsilons or self.weights.changed():
            layers = [native for layer in self.layers if (native := layer.native_layer()) is not None]
            if len(layers) < len(self.layers) or len({one.shape for one in layers}) > 1:
                layers = []
            most_rows = min((one.most_rows for one in layers), default=0)
            made = self._made = _Made(epsilons, layers, structs(layers), most_rows)
            self.weights.remember()
        return made
