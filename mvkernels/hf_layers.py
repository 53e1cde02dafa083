"""Decoder layers of transformers models in few calls each, for decoding: `fuse_layers` and its undoing.

transformers runs a decoder layer as some fifty operations and ten modules. With few rows each takes longer to start
than to compute; together they take as long as reading the layer's weights, or longer. A fused layer hands the same
tensors to the kernels of this library: norm, projections, rotation and append, tree decode, projection onto the
residual; norm, projections, gate, projection onto the residual.

It does so in steps over the paged cache (`paged_kv=`, see `patch_model`) without gradients: on a CPU in fp32 with up to
512 rows (64 without AVX-512), in one call, or all layers of a model in one (`hf_stack`); on a GPU in Triton, in some
fifteen launches. Otherwise, under autocast or torch.compile, and where a part of the layer was hooked or replaced, the
layer is what it was.
"""

from __future__ import annotations

import operator
import threading
import weakref
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Step
from mvkernels.decode import MAX_HEAD_DIM, TRITON_DTYPES, native_reason, tree_decode
from mvkernels.hf import is_patched, patched_backend
from mvkernels.hf_linear import pack_of
from mvkernels.hf_norm import is_rms_norm, same_code
from mvkernels.hf_parts import Parts
from mvkernels.hf_stack import FusedStack, stack_layers
from mvkernels.ops.backends import triton_reason
from mvkernels.ops.dense.layer import layer_reason
from mvkernels.ops.dense.product import Product
from mvkernels.ops.dense.stack import DecoderLayer, DecoderStep, Heads, Workspace

Model = TypeVar("Model", bound=nn.Module)

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
GATES = ("gate_proj", "up_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def fuse_layers(model: Model) -> Model:
    """Let the decoder layers of a model take few calls each, in place; returns it. Calling it again changes nothing.

    A layer takes part that computes what Llama's does, in the very same code, as those of Qwen2, Qwen3 and Mistral do,
    and, on a CPU, whose linear layers `pack_linear` lets be multiplied where they lie. Where neither a C++ compiler is
    nor a GPU that Triton knows, it changes nothing. On a CPU all layers of a model are one call where nobody listens
    between them; transformers' hooks do, which a model keeps once it was asked for `output_hidden_states`.
    """
    unfuse_layers(model)
    frame = Frame()
    compiled = []
    for module in model.modules():
        if _is_llama_layer(module):
            fused = FusedLayer(module, frame)
            has_kernels = fused.has_kernels()
            if has_kernels or fused.has_triton(model):
                module.forward = fused
            if has_kernels:
                compiled.append(fused)
    if compiled:
        stack_layers(model, compiled)
    return model


def unfuse_layers(model: Model) -> Model:
    """Restore the layers that `fuse_layers` changed; returns the model."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedLayer | FusedStack):
            del module.__dict__["forward"]
    return model


def _is_llama_layer(module: Any) -> bool:
    if "forward" in module.__dict__ or not _same(module, LlamaDecoderLayer):
        return False
    attention: Any = getattr(module, "self_attn", None)
    mlp: Any = getattr(module, "mlp", None)
    return (
        any(_same(attention, kind) for kind in (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention))
        and _same(mlp, LlamaMLP)
        and isinstance(mlp.act_fn, SiLUActivation | nn.SiLU)
        and all(is_rms_norm(getattr(module, name, None)) for name in NORMS)
        and all(is_rms_norm(norm) for norm in _head_norms(attention))
    )


def _head_norms(attention: Any) -> list[Any]:
    """Of Qwen3's queries and keys."""
    return [attention.q_norm, attention.k_norm] if _same(attention, Qwen3Attention) else []


def _same(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module computes what modules of a kind do."""
    return module is not None and same_code(type(module).forward, kind.forward)


class Frame(threading.local):
    """What the layers of a model have found out in this forward, so that each need not look at it again: that their
    kernels fit this step, these tables of rotations and this kind of x. Every thread has its own.
    """

    def __init__(self) -> None:
        self.workspace = Workspace()
        self._kind: tuple[Any, ...] = ()
        self._known: tuple[weakref.ref[Any], ...] = ()
        self.native: DecoderStep | None = None

    def __reduce__(self) -> tuple[type[Frame], tuple[()]]:
        return Frame, ()  # a copy finds out for itself

    def knows(self, kind: tuple[Any, ...], *found: Any) -> bool:
        """Whether `remember` was last told of just these objects, which still exist, and of this kind."""
        return kind == self._kind and all(map(operator.is_, (one() for one in self._known), found))

    def remember(self, kind: tuple[Any, ...], *found: Any) -> None:
        self._kind, self._known, self.native = kind, tuple(map(weakref.ref, found)), None


class FusedLayer:
    """A decoder layer's forward. frame: shared by the layers of a model."""

    def __init__(self, layer: Any, frame: Frame) -> None:
        self.layer, self.frame = layer, frame
        self.native: DecoderLayer | None = None
        self.made_of: list[Any] = []
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = [getattr(layer, name) for name in NORMS]
        self.qkv = [getattr(attention, name) for name in PROJECTIONS]
        self.gates = [getattr(mlp, name) for name in GATES]
        self.out, self.down = [attention.o_proj], [mlp.down_proj]
        # Theirs as long as their forwards are, which `_untouched` looks at.
        self.packs = [pack_of(layers) for layers in (self.qkv, self.out, self.gates, self.down)]
        self.head_norms = _head_norms(attention)
        self.head_dim, self.index = attention.head_dim, attention.layer_idx
        self.heads, self.kv_heads = (
            linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj)
        )
        # Read here, as transformers' configs are slow to read.
        config = attention.config
        self.window = getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None)
        self.dropout = attention.attention_dropout
        self.parts = Parts([layer, attention, mlp])

    def has_kernels(self) -> bool:
        """Whether the kernels for the CPU know such sizes, and multiply such layers."""
        queries = torch.empty(0, self.heads, self.head_dim)
        if layer_reason() is not None or native_reason(queries) is not None:
            return False
        return self.head_dim % 2 == 0 and self.linear() is not None

    def has_triton(self, model: nn.Module) -> bool:
        """Whether Triton's may be asked for: on a GPU, and in its interpreter by name."""
        device = self.norms[0].weight.device
        if device.type == "cpu":
            by_name = isinstance(model, PreTrainedModel) and is_patched(model) and patched_backend(model) == "triton"
            if not by_name:
                return False
        return triton_reason(device) is None and self.head_dim % 2 == 0 and self.head_dim <= MAX_HEAD_DIM

    def linear(self) -> list[Product] | None:
        """The kernels on the layer's weights as they are now; None where it is multiplied in another way."""
        found = [pack and pack.compiled() for pack in self.packs]
        return None if None in found else found  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "native": None, "made_of": []}  # addresses, which mean nothing in a copy

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("paged_kv") is not None and not args and self._fits(hidden_states, kwargs):
            if hidden_states.is_cpu and kwargs.get("branch_backend") in ("auto", "native"):
                native = self.native_layer() if hidden_states.dtype is torch.float32 else None
                if native is not None and hidden_states.shape[1] <= native.most_rows:
                    return self._run(hidden_states, native, **kwargs)
            elif kwargs.get("branch_backend") in ("auto", "triton") and triton_reason(hidden_states.device) is None:
                return self._run_triton(hidden_states, **kwargs)
        plain: torch.Tensor = type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        return plain

    def native_layer(self) -> DecoderLayer | None:
        """The layer for the CPU's kernels, with the weights as they are now; None where these do not multiply it."""
        linear = self.linear()
        if linear is None or not self._norms_suit(torch.float32, torch.device("cpu")):
            return None
        norms = [(norm._parameters["weight"], norm.variance_epsilon) for norm in (*self.norms, *self.head_norms)]
        scale = self.layer.self_attn.scaling
        made_of = [*linear, scale, *((weight.data_ptr(), len(weight), eps) for weight, eps in norms)]
        if made_of != self.made_of:
            of_heads = (norms[2][0], norms[3][0], norms[2][1]) if self.head_norms else None
            sizes = Heads(self.heads, self.kv_heads, self.head_dim, scale)
            whole = all(len(weight) == linear[0].inner for weight, _ in norms[:2])
            whole = whole and all(len(weight) == self.head_dim for weight, _ in norms[2:])
            suits = whole and sizes.suit(linear)
            self.native = DecoderLayer(linear, norms[:2], sizes, of_heads) if suits else None
            self.made_of = made_of
        return self.native

    def _fits(self, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the kernels do what the layer would, to the letter of `attention_forward`."""
        cache, step = kwargs["paged_kv"]
        return (
            x.is_contiguous()
            and self.without_gradients(x.device.type)
            and step.state.closed is None
            and self._knows(x, cache, step, kwargs)
            and self.index < cache.num_layers
            and (self.window is None or step.longest_context <= self.window)
            and not self.drops_out()
            and self._untouched(x)
        )

    def _knows(self, x: torch.Tensor, cache: PagedKVCache, step: Step, kwargs: dict[str, Any]) -> bool:
        """Whether the step is one of the cache's, and both and the tables of rotations of the kind of x."""
        tables = kwargs["position_embeddings"]
        kind = x.dtype, x.device, x.shape, self.head_dim, self.kv_heads, kwargs.get("batch_invariant", False)
        if self.frame.knows(kind, cache, step, *tables):
            return True
        fits = (
            x.dtype in TRITON_DTYPES
            and x.shape[0] == 1
            and self.rotates(tables, x)
            and self.suits_step(cache, step, x.shape[1], x.dtype, x.device)
        )
        if fits:
            self.frame.remember(kind, cache, step, *tables)
        return fits

    def drops_out(self) -> bool:
        """Whether attention would leave some of its weights out, which is refused."""
        return bool(self.dropout and self.layer.self_attn.training)

    @staticmethod
    def without_gradients(device_type: str) -> bool:
        """Whether nothing is recorded, traced or computed in another dtype."""
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return not recorded and not torch.is_autocast_enabled(device_type)

    def suits_step(self, cache: PagedKVCache, step: Step, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a step is one of the cache's, with no more rows, and the cache has such heads and such numbers."""
        return (
            step.total_rows <= rows
            and step.entries[0][0].cache is cache
            and cache.dtype is dtype
            and cache.device == device
            and cache.head_dim == self.head_dim
            and cache.num_kv_heads == self.kv_heads
        )

    def rotates(self, tables: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> bool:
        """Whether these are the cosines and sines of all numbers of a head."""
        shape = (1, x.shape[1], self.head_dim)
        return all(
            table.dtype is x.dtype and table.device == x.device and table.shape == shape and table.is_contiguous()
            for table in tables
        )

    def _untouched(self, x: torch.Tensor) -> bool:
        """Whether the parts are those that were fused, without hooks, which would want to be called."""
        if not self.parts.untouched():
            return False
        return self._norms_suit(x.dtype, x.device) and len(self.norms[0].weight) == x.shape[-1]

    def _norms_suit(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether all norms have parameters as kernels read them, and queries and keys one epsilon."""
        weights = [norm._parameters.get("weight") for norm in (*self.norms, *self.head_norms)]
        return len({norm.variance_epsilon for norm in self.head_norms}) < 2 and all(
            one is not None and one.dtype is dtype and one.device == device and one.is_contiguous() for one in weights
        )

    def _run(
        self,
        x: torch.Tensor,
        native: DecoderLayer,
        paged_kv: tuple[PagedKVCache, Step],
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        batch_invariant: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """x [1, T, hidden] -> alike. T may exceed the step's rows: the others attend to nothing."""
        cache, step = paged_kv
        rows, frame = x.shape[1], self.frame
        if frame.native is None or frame.native.sizes != native.sizes(rows):
            frame.native = None  # its memory may be given to the next one
            frame.native = DecoderStep(
                native, frame.workspace, position_embeddings, step.slots, step.views, cache.page_size, rows,
                batch_invariant,
            )  # fmt: skip
        return native(x, frame.native, cache.k[self.index], cache.v[self.index])

    def _run_triton(
        self,
        x: torch.Tensor,
        paged_kv: tuple[PagedKVCache, Step],
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        branch_backend: str,
        batch_invariant: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The same in Triton; the products are those of the layer's own modules."""
        from mvkernels.ops.dense import layer_triton

        cache, step = paged_kv
        before, after = self.norms
        rows, k, v = x.shape[1], cache.k[self.index], cache.v[self.index]
        x = x[0]
        cos, sin = position_embeddings
        normed = layer_triton.rms_norm(x, before.weight, before.variance_epsilon)
        qkv = tuple(linear(normed) for linear in self.qkv)
        q = layer_triton.rotate_append(qkv, cos, sin, step.slots, k, v, self._norms_of_heads())
        scale = self.layer.self_attn.scaling
        attended = tree_decode(q, k, v, step, scale, branch_backend, batch_invariant=batch_invariant).flatten(1)
        if rows > step.total_rows:
            attended = nn.functional.pad(attended, (0, 0, 0, rows - step.total_rows))
        [out], [down] = self.out, self.down
        x, normed = layer_triton.add_rms_norm(out(attended), x, after.weight, after.variance_epsilon)
        x = x + down(layer_triton.gate(*(linear(normed) for linear in self.gates)))
        return x[None]

    def _norms_of_heads(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        if not self.head_norms:
            return None
        of_q, of_k = self.head_norms
        return of_q.weight, of_k.weight, of_q.variance_epsilon
