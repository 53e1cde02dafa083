"""Backward of branch attention in Triton; `triton_forward` has the notation and the shared functions.

    delta_i = grad_out_i . out_i - grad_lse_i,   p_ij = exp(s_ij - lse_i),   ds_ij = p_ij (grad_out_i . v_j - delta_i)
    grad_q_i = scale sum_j ds_ij k_j,   grad_k_j = scale sum_i ds_ij q_i,   grad_v_j = sum_i p_ij grad_out_i

dq loops over the key tiles of a query tile. dkdv loops over the query heads of its key head, and over the query tiles
of a key tile. Neither needs atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mvkernels.mask_tensor import MaskTable
from mvkernels.ops.attention.config import DELTA_ROWS
from mvkernels.ops.attention.tables import attention_tables
from mvkernels.ops.attention.triton_forward import (
    LOG2E,
    NEVER,
    constants,
    dense_last,
    hide,
    launch_config,
    load_intervals,
    load_tile,
    program,
    reload,
    store_tile,
    strides,
)

PADDING: tl.constexpr = tl.constexpr(128)  # every block_m divides it


@triton.jit
def padded(total):
    """Round T up, so that a tile of row sums is loaded whole and in wide words."""
    return (total + PADDING - 1) // PADDING * PADDING


@triton.jit(do_not_specialize=["total"])
def delta_kernel(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, sums_ptr, total, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Grid: row tiles of the padded T * heads. out, grad_out [T, Hq, D], lse, grad_lse [Hq, T] contiguous.

    sums [Hq, 2, padded T]: lse in base 2, which is inf beyond T, so that every probability is 0 there; then delta.
    """
    tile, head = program(heads)
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    out = load_tile(out_ptr + head * D, start, heads * D, total, D, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    grad_out = load_tile(grad_out_ptr + head * D, start, heads * D, total, D, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + head * total + rows, mask=rows < total, other=0.0)
    lse = tl.load(lse_ptr + head * total + rows, mask=rows < total, other=float("inf"))
    sums_ptr += 2 * head * padded(total) + rows
    tl.store(sums_ptr, lse * LOG2E)
    tl.store(sums_ptr + padded(total), delta)


@triton.jit(do_not_specialize=["total"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, sums_ptr, dq_ptr, tiles_ptr, runs_ptr, rows_ptr, gaps_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, total, heads, group, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: query tiles * heads. dq, grad_out [T, Hq, D] contiguous; sums: see delta_kernel."""
    tile, head = program(heads)
    tile_ptr = tiles_ptr + tile * 5
    start = tl.load(tile_ptr) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr + head * stride_qh, start, stride_qt, total, D, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    grad_out = load_tile(grad_out_ptr + head * D, start, heads * D, total, D, BLOCK_M, BLOCK_D, True)
    sums_ptr += 2 * head * padded(total)
    lse = tl.load(sums_ptr + rows)
    delta = tl.load(sums_ptr + padded(total) + rows)
    k_ptr += head // group * stride_kh
    v_ptr += head // group * stride_vh
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for run in tl.range(tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), disable_licm=True):
        for n in range(tl.load(runs_ptr + 2 * run), tl.load(runs_ptr + 2 * run + 1)):
            k = load_tile(k_ptr, n * BLOCK_N, stride_kt, total, D, BLOCK_N, BLOCK_D, False)  # [BLOCK_N, BLOCK_D]
            v = load_tile(v_ptr, n * BLOCK_N, stride_vt, total, D, BLOCK_N, BLOCK_D, False)  # [BLOCK_N, BLOCK_D]
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None]  # [BLOCK_M, BLOCK_N]
            p = tl.exp2(s)
            dp = tl.dot(grad_out, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    PART: tl.constexpr = 32 if BLOCK_N > 32 else BLOCK_N
    PARTS: tl.constexpr = BLOCK_N // PART
    first, gap, gap_end = load_intervals(rows_ptr, rows, total, NEVER)
    for run in tl.range(tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), disable_licm=True):
        end = tl.load(runs_ptr + 2 * run + 1) * PARTS
        for n in tl.range(tl.load(runs_ptr + 2 * run) * PARTS, end, disable_licm=True):
            keys = n * PART + tl.arange(0, PART)
            k = load_tile(k_ptr, n * PART, stride_kt, total, D, PART, BLOCK_D, True)  # [PART, BLOCK_D]
            v = load_tile(v_ptr, n * PART, stride_vt, total, D, PART, BLOCK_D, True)  # [PART, BLOCK_D]
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None]  # [BLOCK_M, PART]
            # After the subtraction: a row without visible keys has lse -inf, and -inf - -inf would be NaN.
            p = tl.exp2(hide(s, keys, first, rows + 1, gap, gap_end, gaps_ptr))
            dp = tl.dot(grad_out, tl.trans(v), input_precision="ieee")  # [BLOCK_M, PART]
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    start = reload(tile_ptr) * BLOCK_M
    store_tile(dq_ptr + head * D, start, heads * D, total, dq * scale, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["total"])
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, sums_ptr, dk_ptr, dv_ptr, tiles_ptr, runs_ptr, keys_ptr, gaps_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, total, heads, group, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: key tiles * key heads. dk, dv [T, Hkv, D] and grad_out [T, Hq, D] contiguous; sums: see delta_kernel.

    Scores are computed transposed, keys by rows, so that dk and dv need no transposition of the probabilities. The mask
    is therefore read from the keys' side: which thread holds a key changes with the row of the tile only.
    """
    kv_heads = heads // group
    tile, kv_head = program(kv_heads)
    stride_dt = heads * D
    tile_ptr = tiles_ptr + tile * 5
    start = tl.load(tile_ptr) * BLOCK_N
    k = load_tile(k_ptr + kv_head * stride_kh, start, stride_kt, total, D, BLOCK_N, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr + kv_head * stride_vh, start, stride_vt, total, D, BLOCK_N, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    PART: tl.constexpr = 32 if BLOCK_M > 32 else BLOCK_M
    PARTS: tl.constexpr = BLOCK_M // PART

    for member in tl.range(group, disable_licm=True):
        head = kv_head * group + member
        q_head = q_ptr + head * stride_qh
        grad_head = grad_out_ptr + head * D
        sums_head = sums_ptr + 2 * head * padded(total)

        for run in tl.range(tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), disable_licm=True):
            for m in tl.range(tl.load(runs_ptr + 2 * run), tl.load(runs_ptr + 2 * run + 1), disable_licm=True):
                rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
                # CHECK, because the last tile of rows may be short: in a full tile every row before T sees every key.
                q = load_tile(q_head, m * BLOCK_M, stride_qt, total, D, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
                grad_out = load_tile(grad_head, m * BLOCK_M, stride_dt, total, D, BLOCK_M, BLOCK_D, True)
                lse = tl.load(sums_head + rows)
                delta = tl.load(sums_head + padded(total) + rows)
                s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :]  # [BLOCK_N, BLOCK_M]
                p = tl.exp2(s)
                dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, input_precision="ieee")
                dp = tl.dot(v, tl.trans(grad_out), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

        for run in tl.range(tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), disable_licm=True):
            end = tl.load(runs_ptr + 2 * run + 1) * PARTS
            for m in tl.range(tl.load(runs_ptr + 2 * run) * PARTS, end, disable_licm=True):
                rows = m * PART + tl.arange(0, PART)
                keys = start + tl.arange(0, BLOCK_N)
                last, gap, gap_end = load_intervals(keys_ptr, keys, total, 0)
                q = load_tile(q_head, m * PART, stride_qt, total, D, PART, BLOCK_D, True)  # [PART, BLOCK_D]
                grad_out = load_tile(grad_head, m * PART, stride_dt, total, D, PART, BLOCK_D, True)
                lse = tl.load(sums_head + rows)
                delta = tl.load(sums_head + padded(total) + rows)
                s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :]  # [BLOCK_N, PART]
                p = tl.exp2(hide(s, rows, keys, last, gap, gap_end, gaps_ptr))
                dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, input_precision="ieee")
                dp = tl.dot(v, tl.trans(grad_out), input_precision="ieee")  # [BLOCK_N, PART]
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    start = reload(tile_ptr) * BLOCK_N
    store_tile(dk_ptr + kv_head * D, start, kv_heads * D, total, dk * scale, D, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr + kv_head * D, start, kv_heads * D, total, dv, D, BLOCK_N, BLOCK_D)


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: MaskTable,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of q, k, v, contiguous, in their dtype; grad_lse [Hq, T] may be None."""
    total, heads, depth = q.shape
    kv_heads = k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if total == 0:
        return dq, dk, dv
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    rows = -(-total // PADDING.value) * PADDING.value
    sums = torch.empty((heads, 2, rows), dtype=torch.float32, device=q.device)
    config = launch_config(q)
    plan = attention_tables(table, config, q.device)
    shared = (*strides(q), *strides(k), *strides(v), total, heads, heads // kv_heads, scale, scale * LOG2E.value)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        delta_kernel[(heads * rows // DELTA_ROWS,)](
            out, grad_out, lse, None if grad_lse is None else grad_lse.contiguous(), sums, total, heads,
            D=depth, BLOCK_D=triton.next_power_of_2(depth), BLOCK_M=DELTA_ROWS, HAS_GRAD_LSE=grad_lse is not None,
        )  # fmt: skip
        tiles, runs = plan.dq
        dq_kernel[(heads * len(tiles),)](
            q, k, v, grad_out, sums, dq, tiles, runs, plan.rows, plan.gaps, *shared,
            **constants(depth, config.dq),
        )  # fmt: skip
        tiles, runs = plan.dkdv
        dkdv_kernel[(kv_heads * len(tiles),)](
            q, k, v, grad_out, sums, dk, dv, tiles, runs, plan.keys, plan.key_gaps, *shared,
            **constants(depth, config.dkdv),
        )  # fmt: skip
    return dq, dk, dv
