"""Decoder layers in plain PyTorch: any device and dtype, no compiler. The other executors are tested against it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.functional import embedding, linear, pad, rms_norm, silu

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Step
from mvkernels.decode import tree_decode
from mvkernels.decoder.decoder import Decoder, check_window
from mvkernels.decoder.weights import Layer, Weights
from mvkernels.rope import rotate


class TorchDecoder(Decoder):
    """Embedding, layers, norm and head of `Weights`. Other executors override `layers` and `logits`.

    Args:
        weights: The tensors of a model; not copied.
        backend: Backend of `tree_decode` and `PagedKVCache.append`.
    """

    kind: ClassVar[str] = "torch"
    capture_reason: str | None = "expected the decoder 'triton' or 'hosted', got 'torch'"

    def __init__(self, weights: Weights, backend: str = "auto") -> None:
        self.weights, self.backend = weights, backend
        self._append_backend = "auto" if backend == "native" else backend  # a backend of `tree_decode` only
        self.dtype, self.device = weights.dtype, weights.device
        self.heads, self.vocabulary, self.window = weights.heads, len(weights.head.weight), weights.window

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedKVCache,
        step: Step,
        rows: torch.Tensor | None = None,
        batch_invariant: bool = False,
    ) -> torch.Tensor:
        self._check(ids, positions, cache, step, batch_invariant)
        if torch.is_autocast_enabled(self.device.type):  # the cache and the kernels have the weights' dtype
            with torch.autocast(self.device.type, enabled=False):
                return self.forward(ids, positions, cache, step, rows, batch_invariant)
        x = self.layers(embedding(ids, self.weights.embedding), positions, cache, step, batch_invariant)
        return self.logits(x if rows is None else x[rows])

    def layers(
        self, x: torch.Tensor, positions: torch.Tensor, cache: PagedKVCache, step: Step, batch_invariant: bool
    ) -> torch.Tensor:
        """Run all layers on x [T, hidden], which may be overwritten; returns the output of the last."""
        for index, layer in enumerate(self.weights.layers):
            x = x + self._attention(index, layer, self._norm(x, layer.before), positions, cache, step, batch_invariant)
            normed = self._norm(x, layer.after)
            x = x + linear(silu(linear(normed, *layer.gate)) * linear(normed, *layer.up), *layer.down)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits [n, V] of x [n, hidden]."""
        return linear(self._norm(x, self.weights.norm), *self.weights.head)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x if weight is None else rms_norm(x, x.shape[-1:], weight, self.weights.eps)

    def _attention(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedKVCache,
        step: Step,
        batch_invariant: bool,
    ) -> torch.Tensor:
        weights, size = self.weights, step.total_rows
        q, k, v = (linear(x, *one)[:size].view(size, -1, weights.head_dim) for one in (layer.q, layer.k, layer.v))
        q, k = (
            rotate(self._norm(heads, norm), positions[:size], weights.rope)
            for heads, norm in ((q, layer.q_norm), (k, layer.k_norm))
        )
        cache.append(index, k, v, step, self._append_backend)
        pages = cache.k[index], cache.v[index]
        out = tree_decode(q, *pages, step, weights.scale, self.backend, batch_invariant=batch_invariant).flatten(1)
        if len(x) > size:
            out = pad(out, (0, 0, 0, len(x) - size))
        return linear(out, *layer.o)

    def _check(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: PagedKVCache, step: Step, batch_invariant: bool
    ) -> None:
        """Check the sizes by which the kernels read and write."""
        step.require_open()
        weights, rows = self.weights, step.total_rows
        if ids.dim() != 1 or len(ids) < rows or (len(ids) > rows and not batch_invariant):
            raise ValueError(f"ids: expected the step's {rows} rows, got shape {list(ids.shape)}")
        if positions.shape != ids.shape:
            raise ValueError(f"positions: expected shape {list(ids.shape)}, got {list(positions.shape)}")
        if step.entries[0][0].cache is not cache:
            raise ValueError("step: expected one of this cache, got one of another")
        sizes = len(weights.layers), weights.kv_heads, weights.head_dim, self.dtype, self.device
        found = cache.num_layers, cache.num_kv_heads, cache.head_dim, cache.dtype, cache.device
        if found != sizes:
            raise ValueError(f"cache: expected (layers, heads, head size, dtype, device) {sizes}, got {found}")
        if weights.window is not None:
            check_window(weights.window, step)
