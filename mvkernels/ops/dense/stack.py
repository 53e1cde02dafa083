"""Whole decoder layers over the paged KV cache on the CPU, one or several per call: `decoder_layer` of `layer.cpp`.

A layer gets its kernels for products and attention as function pointers. Intermediate results are in a workspace, the
same for all layers and steps: it stays in the processor's caches, and only the output of a layer is allocated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mvkernels.ops.decode import native as decode_native
from mvkernels.ops.decode.tasks import StepViews
from mvkernels.ops.dense import layer as layer_native
from mvkernels.ops.dense.product import Product

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LINE = 16  # numbers of a cache line
_PRODUCTS = ("qkv", "out", "gates", "down")
_BUFFERS = ("normed", "projected", "q", "attended", "mixed", "opened", "gated")


class _Product(ctypes.Structure):
    _fields_ = (("run", _POINTER), ("what", _POINTER))


class _Layer(ctypes.Structure):
    """`DecoderLayer` of the kernel."""

    _fields_ = (
        *((name, _Product) for name in _PRODUCTS),
        *((name, _POINTER) for name in ("attend", "before", "after", "q_norm", "k_norm")),
        *((name, _FLOAT) for name in ("before_eps", "after_eps", "head_eps", "scale")),
        *((name, _LONG) for name in ("hidden", "heads", "kv_heads", "dim", "inner")),
    )


class _Step(ctypes.Structure):
    """`DecoderStep` of the kernel."""

    _fields_ = (
        *((name, _POINTER) for name in ("cos", "sin", "slots", "plan")),
        *((name, _LONG) for name in ("rows", "planned")),
        *((name, _POINTER) for name in (*_BUFFERS, "space")),
        ("num_threads", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Heads:
    """Sizes of a layer's attention. scale: of its scores."""

    heads: int
    kv_heads: int
    dim: int
    scale: float

    def suit(self, products: Sequence[Product]) -> bool:
        """Whether a layer's products (qkv, out, gates, down) fit together and to these heads."""
        qkv, out, gates, down = products
        return (
            qkv.outer == (self.heads + 2 * self.kv_heads) * self.dim
            and out.inner == self.heads * self.dim
            and gates.outer == 2 * down.inner
            and qkv.inner == out.outer == gates.inner == down.outer
        )


class DecoderLayer:
    """The weights of one layer; not copied, and must outlive this object.

    products: qkv, out, gates, down; they suit the heads. norms: (weight [hidden], epsilon) before attention and before
    the MLP. head_norms: weights [dim] of the norms of queries and keys, and their epsilon, or None.
    """

    def __init__(
        self,
        products: Sequence[Product],
        norms: Sequence[tuple[torch.Tensor, float]],
        heads: Heads,
        head_norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    ) -> None:
        self.products, self.heads = tuple(products), heads
        self.hidden, self.inner = self.products[0].inner, self.products[3].inner
        self.most_rows = min(one.most_rows for one in products)
        (before, before_eps), (after, after_eps) = norms
        q_norm, k_norm, head_eps = (None, None, 0.0) if head_norms is None else head_norms
        places = [None if x is None else x.data_ptr() for x in (before, after, q_norm, k_norm)]
        self.struct = _Layer(
            *(_Product(one.function, one.what) for one in products), decode_native.function(), *places,
            before_eps, after_eps, head_eps, heads.scale,
            self.hidden, heads.heads, heads.kv_heads, heads.dim, self.inner,
        )  # fmt: skip
        self._function = layer_native.kernels().decoder_layer
        #: Layers of equal shape can share a `DecoderStep`.
        self.shape = heads, *((type(one), one.inner, one.outer) for one in self.products)
        self._sizes: tuple[int, tuple[int, ...]] = (-1, ())

    def sizes(self, rows: int) -> tuple[int, ...]:
        """Return the number of elements of each workspace buffer, in order, and of the products' own workspace."""
        known, sizes = self._sizes
        if known != rows:
            attended = self.heads.heads * self.heads.dim
            qkv, _, gates, _ = self.products
            widths = (self.hidden, qkv.outer, attended, attended, self.hidden, gates.outer, self.inner)
            space = max(one.space_bytes(rows) for one in self.products)
            sizes = (*(rows * width for width in widths), -(-space // 4))
            self._sizes = rows, sizes
        return sizes

    def __call__(
        self, x: torch.Tensor, step: DecoderStep, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        """Run the layer: x [rows, hidden] fp32 -> the same shape; new keys and values go into the caches.

        All contiguous, no gradients.
        """
        out = torch.empty_like(x)
        self._function(
            ctypes.byref(self.struct), step.reference, x.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
            out.data_ptr(),
        )  # fmt: skip
        return out


def structs(layers: Sequence[DecoderLayer]) -> ctypes.Array[ctypes.c_void_p]:
    """Return the addresses of layers, for `run_layers`; the layers must outlive the result."""
    return (_POINTER * len(layers))(*(ctypes.addressof(layer.struct) for layer in layers))


def addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Return the addresses of tensors."""
    return (_POINTER * len(tensors))(*map(torch.Tensor.data_ptr, tensors))


def run_layers(
    layers: ctypes.Array[ctypes.c_void_p],
    step: DecoderStep,
    x: torch.Tensor,
    k_caches: ctypes.Array[ctypes.c_void_p],
    v_caches: ctypes.Array[ctypes.c_void_p],
) -> None:
    """Run layers of one `shape` on x [rows, hidden] fp32 in place; new keys and values go into their caches.

    All contiguous, no gradients.
    """
    layer_native.kernels().decoder_layers(layers, len(layers), step.reference, x.data_ptr(), k_caches, v_caches)


class Workspace:
    """Memory that consecutive steps share; one for each thread that runs steps."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")

    def of(self, sizes: Sequence[int]) -> list[int]:
        """Return addresses of buffers of these sizes, each on its own cache lines. Earlier addresses become invalid."""
        lines = [-(-size // _LINE) for size in sizes]
        total = (sum(lines) + 1) * _LINE  # one more line, for alignment
        if not total <= len(self._memory) <= 4 * total:
            self._memory = torch.empty(total, dtype=torch.float32, device="cpu")
        place = -(-self._memory.data_ptr() // (4 * _LINE)) * 4 * _LINE
        found = []
        for count in lines:
            found.append(place)
            place += count * _LINE * 4
        return found


class DecoderStep:
    """What the layers of a step share: rotations cos and sin [rows, dim], and the visible keys.

    rows: rows of x, at least one, those of the step first. Others are not written and attend to nothing. The tensors
    must outlive this object.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        workspace: Workspace,
        rotations: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        views: StepViews,
        page_size: int,
        rows: int,
        batch_invariant: bool = False,
    ) -> None:
        heads = layer.heads
        # Kept alive, because the kernel has their addresses.
        self._plan = decode_native.plan_items(views, heads.heads // heads.kv_heads, heads.kv_heads, batch_invariant)
        self._bound = self._plan.bound(views.total_rows, page_size, heads.dim)
        self.sizes = layer.sizes(rows)
        cos, sin = rotations
        self._struct = _Step(
            cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), ctypes.addressof(self._bound), rows, len(slots),
            *workspace.of(self.sizes), torch.get_num_threads(),
        )  # fmt: skip
        self.reference = ctypes.byref(self._struct)
