"""Decoder layers on a CPU in fp32: all of them in one call of the compiled kernels (`ops.dense.stack`).

Matrices that bf16 represents exactly (of checkpoints published in bf16) are also kept in bf16 and read from there, half
the memory traffic: by the CPU's matrix units (AMX) if it has them, else for up to 8 rows, with the bits of fp32. Steps
of more than 512 rows (64 without AVX-512) run in PyTorch, whose products are as fast there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Step
from mvkernels.decode import native_reason
from mvkernels.decoder.torch import TorchDecoder
from mvkernels.decoder.weights import Layer, Linear, Weights
from mvkernels.ops.dense.layer import layer_reason, rms_norm
from mvkernels.ops.dense.linear import LinearLayers, few_rows, is_bf16, linear_reason
from mvkernels.ops.dense.linear_amx import MOST_ROWS, TileLayers, tiles_reason
from mvkernels.ops.dense.product import Product
from mvkernels.ops.dense.stack import DecoderLayer, DecoderStep, Heads, Workspace, addresses, run_layers, structs
from mvkernels.ops.native import warn_if_busy


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.workspace = Workspace()


class NativeDecoder(TorchDecoder):
    """See the module's docstring. narrow: whether bf16 copies are kept."""

    kind: ClassVar[str] = "native"
    capture_reason = "expected a model on cuda, got cpu"

    def __init__(self, weights: Weights, backend: str = "auto", narrow: bool = True) -> None:
        super().__init__(weights, backend)
        warn_if_busy()
        self._narrow = narrow
        self._own = _PerThread()
        self.refresh()

    def refresh(self) -> None:
        weights, narrow = self.weights, self._narrow
        sizes = Heads(weights.heads, weights.kv_heads, weights.head_dim, weights.scale)
        self._layers = [_layer(layer, sizes, weights.eps, narrow) for layer in weights.layers]
        self._head = product((weights.head,), narrow)
        self._most_rows = min(self._head.most_rows, *(layer.most_rows for layer in self._layers))
        # Consecutive layers share a call, unless bf16 represents only some of them exactly.
        self._runs: list[tuple[int, int, Any]] = []
        first = 0
        for _, group in groupby(self._layers, key=lambda layer: layer.shape):
            alike = list(group)
            self._runs.append((first, first + len(alike), structs(alike)))
            first += len(alike)

    def layers(
        self, x: torch.Tensor, positions: torch.Tensor, cache: PagedKVCache, step: Step, batch_invariant: bool
    ) -> torch.Tensor:
        if len(x) > self._most_rows:
            return super().layers(x, positions, cache, step, batch_invariant)
        tables = self.weights.rope.tables(positions)
        for first, last, layers in self._runs:
            plan = DecoderStep(
                self._layers[first], self._own.workspace, tables, step.slots, step.views, cache.page_size, len(x),
                batch_invariant,
            )  # fmt: skip
            run_layers(layers, plan, x, addresses(cache.k[first:last]), addresses(cache.v[first:last]))
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self._most_rows:
            return super().logits(x)
        return self._head(rms_norm(x, self.weights.norm, self.weights.eps))


def native_decoder_reason(q: torch.Tensor, backend: str) -> str | None:
    """Return why the kernels cannot run layers with queries like q [0, heads, dim] here, or None. May compile them."""
    if not q.is_cpu or q.dtype is not torch.float32:
        return f"expected torch.float32 weights on cpu, got {q.dtype} on {q.device.type}"
    if backend not in ("auto", "native"):
        return f"expected the attention backend 'auto' or 'native', got {backend!r}"
    if q.shape[2] % 2:
        return f"expected an even head dimension, got {q.shape[2]}"
    return native_reason(q) or layer_reason() or linear_reason()


def narrow_rows() -> int:
    """Return up to how many rows bf16 copies of matrices are read here; 0: never."""
    if linear_reason() is not None:
        return 0
    return MOST_ROWS if tiles_reason() is None else few_rows()


def product(linears: Sequence[Linear], narrow: bool) -> Product:
    """Make one product of linear layers with the same input. narrow: whether bf16 copies may be kept."""
    weights, biases = [one.weight for one in linears], [one.bias for one in linears]
    if narrow and tiles_reason() is None and all(is_bf16(one) and bool(one.isfinite().all()) for one in weights):
        return TileLayers(weights, biases)
    return LinearLayers(weights, biases, narrow)


def _layer(layer: Layer, heads: Heads, eps: float, narrow: bool) -> DecoderLayer:
    products = [product(group, narrow) for group in layer.linears]
    norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm, eps)
    return DecoderLayer(products, [(layer.before, eps), (layer.after, eps)], heads, norms)
