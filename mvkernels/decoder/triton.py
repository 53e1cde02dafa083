"""Decoder layers on a GPU: PyTorch's products, and one Triton launch for each operation between them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.functional import linear, pad

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Step
from mvkernels.decode import backend_reasons, tree_decode
from mvkernels.decoder.torch import TorchDecoder


class TritonDecoder(TorchDecoder):
    """See the module's docstring."""

    kind: ClassVar[str] = "triton"
    capture_reason = None

    def layers(
        self, x: torch.Tensor, positions: torch.Tensor, cache: PagedKVCache, step: Step, batch_invariant: bool
    ) -> torch.Tensor:
        from mvkernels.ops.dense import layer_triton

        weights, size, eps = self.weights, step.total_rows, self.weights.eps
        cos, sin = weights.rope.tables(positions[:size], x.dtype)
        normed = layer_triton.rms_norm(x, weights.layers[0].before, eps)
        for index, layer in enumerate(weights.layers):
            k, v = cache.k[index], cache.v[index]
            qkv = linear(normed, *layer.q)[:size], linear(normed, *layer.k)[:size], linear(normed, *layer.v)[:size]
            norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm, eps)
            q = layer_triton.rotate_append(qkv, cos, sin, step.slots, k, v, norms)
            out = tree_decode(q, k, v, step, weights.scale, "triton", batch_invariant=batch_invariant).flatten(1)
            if len(x) > size:
                out = pad(out, (0, 0, 0, len(x) - size))
            x, normed = layer_triton.add_rms_norm(linear(out, *layer.o), x, layer.after, eps)
            out = linear(layer_triton.gate(linear(normed, *layer.gate), linear(normed, *layer.up)), *layer.down)
            following = weights.layers[index + 1].before if index + 1 < len(weights.layers) else weights.norm
            x, normed = layer_triton.add_rms_norm(out, x, following, eps)
        return normed

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, *self.weights.head)  # `layers` has normed it


def triton_decoder_reason(q: torch.Tensor, backend: str) -> str | None:
    """Return why Triton's kernels do not run layers with queries like q [0, heads, dim], or None.

    On a CPU, in its interpreter, they only run if requested by name.
    """
    if backend not in ("auto", "triton"):
        return f"expected the attention backend 'auto' or 'triton', got {backend!r}"
    if q.is_cpu and backend == "auto":
        return "expected weights on a GPU, got them on cpu"
    if q.shape[2] % 2:
        return f"expected an even head dimension, got {q.shape[2]}"
    return backend_reasons(q)["triton"]
