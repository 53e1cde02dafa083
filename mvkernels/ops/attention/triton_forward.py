"""Forward of branch attention in Triton, and the functions that it shares with the backward.

    s_ij = scale q_i . k_j over the visible j;  lse_i = log sum_j exp(s_ij);  out_i = sum_j exp(s_ij - lse_i) v_j

Notation: T rows, Hq query heads, Hkv key heads, D head dim; tiles of BLOCK_M rows by BLOCK_N keys; BLOCK_D is the power
of two that holds D. q, k, v may have any strides but need stride 1 in the last dimension; out [T, Hq, D] and lse [Hq,
T] are contiguous.

One program computes one query tile of one head, over the runs of key tiles in the tile plan. Full tiles come first,
without mask code. Partial tiles test the mask by a loop over the gaps of the rows. The longest tiles start first. There
are no atomics and the order of every sum is fixed, so results are reproducible bit by bit. No property of a layout is a
compile-time constant: a kernel is compiled once per head dim, dtype and configuration.

Tiles fill the registers. So partial runs are processed in parts of at most 32 keys (dkdv: rows), which leaves room for
the mask. Values that are cheap to compute are not kept through a loop: see `reload`, and `disable_licm`, which keeps
the compiler from moving invariant code out of a loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mvkernels.mask_tensor import MaskTable
from mvkernels.ops.attention.config import AttentionConfig, KernelConfig, attention_config
from mvkernels.ops.attention.tables import attention_tables
from mvkernels.ops.backends import triton_interpreted

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
NEVER: tl.constexpr = tl.constexpr(2**31 - 1)  # as first visible key: no key is visible


@triton.jit
def program(heads):
    """Return tile and head of this program. Heads run fastest, so that heads that share keys run at the same time.

    One axis, because the other two of a grid end at 65535.
    """
    return tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)


@triton.jit
def reload(ptr):
    """Load a value a second time, so that what was derived from the first load is not kept in registers until then."""
    return tl.load(ptr, volatile=True)


@triton.jit
def load_tile(base_ptr, start, stride, total, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
              CHECK: tl.constexpr):  # fmt: skip
    """Rows start .. start + BLOCK - 1 of a [total, D] matrix; 0 beyond D, and with CHECK also beyond total."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    # In 64 bits, because T * H * D may exceed 2**31. From the row each time: offsets within a tile would occupy
    # registers throughout the loops.
    ptrs = base_ptr + dims[None, :] + (start + rows).to(tl.int64)[:, None] * stride  # [BLOCK, BLOCK_D]
    if CHECK:
        inside = (start + rows < total)[:, None]
        if BLOCK_D != D:
            inside = inside & (dims < D)[None, :]
        return tl.load(ptrs, mask=inside, other=0.0)
    if BLOCK_D != D:
        return tl.load(ptrs, mask=(dims < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_tile(base_ptr, start, stride, total, tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a tile: the inverse of load_tile with CHECK."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + dims[None, :] + (start + rows).to(tl.int64)[:, None] * stride  # [BLOCK, BLOCK_D]
    inside = (start + rows < total)[:, None] & (dims < D)[None, :]
    tl.store(ptrs, tile.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_intervals(table_ptr, items, total, beyond):
    """Load the columns of a row or key table: a bound (`beyond` for items out of range), first gap, end of the gaps."""
    live = items < total
    ptrs = table_ptr + tl.cast(items, tl.int64) * 3
    bound = tl.load(ptrs, mask=live, other=beyond)
    gap = tl.load(ptrs + 1, mask=live, other=0)
    gap_end = tl.load(ptrs + 2, mask=live, other=0)
    return bound, gap, gap_end


@triton.jit
def hide(s, others, low, high, gap, gap_end, gaps_ptr):
    """Scores s [A, B], with -inf where b of `others` [B] is below low[a], not below high[a], or in a gap of a.

    Each gap is cut out of s itself: a mask beside it, kept through the loop, would take as many registers again.
    """
    others = others[None, :]  # [1, B]
    s = tl.where((others >= low[:, None]) & (others < high[:, None]), s, float("-inf"))
    for _ in range(tl.max(gap_end - gap)):
        live = gap < gap_end
        hidden_from = tl.load(gaps_ptr + 2 * gap, mask=live, other=0)
        hidden_to = tl.load(gaps_ptr + 2 * gap + 1, mask=live, other=0)  # an empty gap where there is none left
        s = tl.where((others < hidden_from[:, None]) | (others >= hidden_to[:, None]), s, float("-inf"))
        gap += 1
    return s


@triton.jit
def fold(s, scale, v, acc, top, norm, BLIND: tl.constexpr):
    """Add scores s [BLOCK_M, BLOCK_N] and values v [BLOCK_N, BLOCK_D] to the running softmax (online softmax).

    s times scale >= 0 has base 2. The scale is applied with the subtraction, in one instruction, and never to s itself.
    BLIND: a row may see nothing yet; it keeps norm 0 and a top of -inf, where exp2(-inf - -inf) would give NaN.
    """
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    base = new_top
    if BLIND:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * scale - base[:, None])
    decay = tl.exp2(top - base)
    norm = norm * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_top, norm


@triton.jit(do_not_specialize=["total"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, runs_ptr, rows_ptr, gaps_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, total, heads, group, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: query tiles * heads. scale_log2: scale * log2(e). tiles, runs, rows, gaps: see attention_tables."""
    tile, head = program(heads)
    tile_ptr = tiles_ptr + tile * 5
    start = tl.load(tile_ptr) * BLOCK_M
    q = load_tile(q_ptr + head * stride_qh, start, stride_qt, total, D, BLOCK_M, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    k_ptr += head // group * stride_kh
    v_ptr += head // group * stride_vh
    # A negative scale flips the sign of q, which is exact, so that the largest score is the largest after scaling.
    q = tl.where(scale_log2 < 0, -q, q)
    scale_log2 = tl.abs(scale_log2)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)

    for run in range(tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)):
        for n in range(tl.load(runs_ptr + 2 * run), tl.load(runs_ptr + 2 * run + 1)):
            k = load_tile(k_ptr, n * BLOCK_N, stride_kt, total, D, BLOCK_N, BLOCK_D, False)  # [BLOCK_N, BLOCK_D]
            v = load_tile(v_ptr, n * BLOCK_N, stride_vt, total, D, BLOCK_N, BLOCK_D, False)  # [BLOCK_N, BLOCK_D]
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            acc, top, norm = fold(s, scale_log2, v, acc, top, norm, False)

    rows = start + tl.arange(0, BLOCK_M)
    PART: tl.constexpr = 32 if BLOCK_N > 32 else BLOCK_N
    PARTS: tl.constexpr = BLOCK_N // PART
    first, gap, gap_end = load_intervals(rows_ptr, rows, total, NEVER)
    for run in range(tl.load(tile_ptr + 3), tl.load(tile_ptr + 4)):
        end = tl.load(runs_ptr + 2 * run + 1) * PARTS
        for n in tl.range(tl.load(runs_ptr + 2 * run) * PARTS, end, disable_licm=True):
            keys = n * PART + tl.arange(0, PART)
            k = load_tile(k_ptr, n * PART, stride_kt, total, D, PART, BLOCK_D, True)  # [PART, BLOCK_D]
            v = load_tile(v_ptr, n * PART, stride_vt, total, D, PART, BLOCK_D, True)  # [PART, BLOCK_D]
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_M, PART]
            s = hide(s, keys, first, rows + 1, gap, gap_end, gaps_ptr)
            acc, top, norm = fold(s, 1.0, v, acc, top, norm, True)

    norm = tl.where(norm == 0.0, 1.0, norm)  # a row that sees nothing: out 0, lse -inf
    start = reload(tile_ptr) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    store_tile(out_ptr + head * D, start, heads * D, total, acc / norm[:, None], D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + head * total + rows, (top + tl.log2(norm)) * LN2, mask=rows < total)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: MaskTable,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute q [T, Hq, D], k and v [T, Hkv, D] -> out [T, Hq, D], lse [Hq, T] fp32."""
    total, heads, depth = q.shape
    out = torch.empty((total, heads, depth), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    if total == 0:
        return out, lse
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    config = launch_config(q)
    plan = attention_tables(table, config, q.device)
    tiles, runs = plan.forward
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[(heads * len(tiles),)](
            q, k, v, out, lse, tiles, runs, plan.rows, plan.gaps,
            *strides(q), *strides(k), *strides(v), total, heads, heads // k.shape[1], scale * LOG2E.value,
            **constants(depth, config.forward),
        )  # fmt: skip
    return out, lse


def launch_config(q: torch.Tensor) -> AttentionConfig:
    """Return the configuration for tensors like q [T, Hq, D], on its device."""
    capability = None if triton_interpreted() else torch.cuda.get_device_capability(q.device)
    return attention_config(q.shape[2], q.dtype.itemsize, capability)


def constants(depth: int, config: KernelConfig) -> dict[str, int | None]:
    """Return the compile-time arguments and launch options of a kernel for one configuration."""
    return {
        "D": depth,
        "BLOCK_D": triton.next_power_of_2(depth),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.maxnreg,
        "enable_fp_fusion": True,  # scores are scaled and shifted in one FMA; later Tritons need the option
    }


def dense_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: torch.Tensor) -> tuple[int, int]:
    """Return the strides of tokens and heads."""
    return x.stride(0), x.stride(1)
