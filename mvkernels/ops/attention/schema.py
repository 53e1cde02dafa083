"""The attention ops as PyTorch custom ops: schema, fake (shape-only) implementation, gradient.

    mvkernels::attention_cpu, mvkernels::attention_triton
        (q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D], mask_table, scale) -> (out [T, Hq, D], lse [Hq, T])
    mvkernels::attention_cpu_backward, mvkernels::attention_triton_backward
        (grad_out, grad_lse or None, q, k, v, out, lse, mask_table, scale) -> (grad_q, grad_k, grad_v)

mask_table: [N] int32, the mask of the layout (see `mask_tensor`). The op derives tile plans from it, once per mask.
lse is the natural logarithm, fp32 (fp64 for fp64 inputs), and has a gradient of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.errors import BackendError
from mvkernels.mask_tensor import find_mask_table
from mvkernels.ops.attention import cpu as attention_cpu

Grads = tuple[Tensor, Tensor, Tensor]
# Tile plans are made on the host and differ in size between masks. A CUDA graph, as torch.compile records it with
# mode="reduce-overhead", would replay the first layout forever.
TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("mvkernels::attention_cpu", mutates_args=(), device_types="cpu", tags=TAGS)
def attention_cpu_op(q: Tensor, k: Tensor, v: Tensor, mask_table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention_cpu.forward(q, k, v, find_mask_table(mask_table), scale)


@torch.library.custom_op("mvkernels::attention_cpu_backward", mutates_args=(), device_types="cpu", tags=TAGS)
def attention_cpu_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask_table: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_cpu.backward(grad_out, grad_lse, q, k, v, out, lse, find_mask_table(mask_table), scale)


@torch.library.custom_op("mvkernels::attention_triton", mutates_args=(), tags=TAGS)
def attention_triton_op(q: Tensor, k: Tensor, v: Tensor, mask_table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from mvkernels.ops.attention import triton_forward as attention_triton

    return attention_triton.forward(q, k, v, find_mask_table(mask_table), scale)


@torch.library.custom_op("mvkernels::attention_triton_backward", mutates_args=(), tags=TAGS)
def attention_triton_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask_table: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from mvkernels.ops.attention import triton_backward as attention_triton_backward

    table = find_mask_table(mask_table)
    return attention_triton_backward.backward(grad_out, grad_lse, q, k, v, out, lse, table, scale)


OPS = {
    "cpu": (attention_cpu_op, attention_cpu_backward_op),
    "triton": (attention_triton_op, attention_triton_backward_op),
}


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, mask_table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=attention_cpu.accumulator_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask_table: Tensor,
    scale: float,
) -> Grads:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _register(name: str) -> None:
    forward, backward = OPS[name]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask_table, scale = inputs
        # So that an unused lse has no gradient, instead of zeros that cost a pass.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, mask_table)
        ctx.scale = scale

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, mask_table = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        return *backward(grad_out, grad_lse, q, k, v, out, lse, mask_table, ctx.scale), None, None

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise BackendError('multiverse_attention has no second derivative; backend="reference" has')

    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    backward.register_autograd(refuse)
    forward.register_autograd(differentiate, setup_context=setup_context)


for _name in OPS:
    _register(_name)
