"""Norms, RoPE with append, and MLP gate of a decoder layer in Triton: one launch each.

    rms_norm        y = w (x / sqrt(mean(x^2) + eps)), the quotient rounded to the dtype before it is multiplied by w
    rotate_append   RoPE on queries and keys (`ops.rope`), and the keys and values of new tokens into their pages
    gate            silu(g) u, silu(g) rounded

Results are rounded where transformers rounds, except where the compiler contracts operations: in bf16 and fp16 some
results differ from transformers' by the last bit. Tensors are without gradients, on one device, of one dtype: fp32,
fp16 or bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GATE_BLOCK = 1024


@triton.jit
def norm_kernel(x_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr, eps, DIM: tl.constexpr, BLOCK: tl.constexpr,
                ADD: tl.constexpr):  # fmt: skip
    """Grid: rows of x [T, DIM]. ADD: normalise x + residual, and write it to sum."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < DIM
    x = tl.load(x_ptr + row * DIM + d, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype
    if ADD:
        residual = tl.load(residual_ptr + row * DIM + d, mask=inside, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * DIM + d, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    normed = (wide * scale).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * DIM + d, (weight * normed).to(dtype), mask=inside)


@triton.jit
def normed_head(x_ptr, weight_ptr, at, inside, scale, dtype: tl.constexpr, NORM: tl.constexpr):
    """Load elements `at` of a head in fp32; with NORM after its RMSNorm."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x = (x * scale).to(dtype).to(tl.float32)
        x = (tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32) * x).to(dtype).to(tl.float32)
    return x


@triton.jit
def rotated_head(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, eps, d, dtype: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Normalise and rotate a head [D] of queries or keys."""
    inside = d < D
    scale = 0.0
    if NORM:
        x = tl.load(x_ptr + d, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    first = d < D // 2
    x = normed_head(x_ptr, weight_ptr, d, inside, scale, dtype, NORM)
    partner = normed_head(x_ptr, weight_ptr, tl.where(first, d + D // 2, d - D // 2), inside, scale, dtype, NORM)
    partner = tl.where(first, -partner, partner)
    cos = tl.load(cos_ptr + d, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + d, mask=inside, other=0.0).to(tl.float32)
    return ((x * cos).to(dtype).to(tl.float32) + (partner * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def rotate_append_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, slots_ptr, out_ptr, k_cache_ptr, v_cache_ptr,
    eps, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid: rows, Hq + 2 Hkv: a program takes a head of a row. Slot -1: keys and values are not written."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    cos_ptr += row * D
    sin_ptr += row * D
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if head < HQ:
        at = (row * HQ + head) * D
        y = rotated_head(q_ptr + at, q_weight_ptr, cos_ptr, sin_ptr, eps, d, dtype, D, NORM)
        tl.store(out_ptr + at + d, y, mask=inside)
    else:
        slot = tl.load(slots_ptr + row)  # int64: a cache may hold more than 2**31 elements
        inside = d < tl.where(slot >= 0, D, 0)
        if head < HQ + HKV:
            at = (row * HKV + head - HQ) * D
            y = rotated_head(k_ptr + at, k_weight_ptr, cos_ptr, sin_ptr, eps, d, dtype, D, NORM)
            tl.store(k_cache_ptr + (slot * HKV + head - HQ) * D + d, y, mask=inside)
        else:
            head = head - HQ - HKV
            v = tl.load(v_ptr + (row * HKV + head) * D + d, mask=inside)
            tl.store(v_cache_ptr + (slot * HKV + head) * D + d, v, mask=inside)


@triton.jit(do_not_specialize=["numbers"])
def gate_kernel(g_ptr, u_ptr, out_ptr, numbers, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    wide = g.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(g.dtype).to(tl.float32)
    tl.store(out_ptr + at, (silu * u).to(g.dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise x [.., dim] with weight [dim]."""
    x = x.contiguous()
    return _norm(x, None, weight, eps)[1]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x and residual [.., dim]; returns the sum and its norm."""
    return _norm(x.contiguous(), residual.contiguous(), weight, eps)


def _norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, weight = torch.empty_like(x), weight.contiguous()
    total = x if residual is None else torch.empty_like(x)
    dim = x.shape[-1]
    rows, block = x.numel() // dim, triton.next_power_of_2(dim)
    if rows:
        with torch.cuda.device_of(x):
            norm_kernel[(rows,)](
                x, residual, weight, total, out, eps,
                DIM=dim, BLOCK=block, ADD=residual is not None, num_warps=norm_warps(block),
            )  # fmt: skip
    return total, out


def norm_warps(block: int) -> int:
    """Choose one to eight warps, for sixteen elements per thread."""
    return min(8, max(1, block // 512))


def rotate_warps(dim: int) -> int:
    """Choose the warps of a program that takes a head."""
    return 1 if dim <= 128 else 2


def rotate_append(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Apply RoPE to queries and keys, and write the keys and values of new tokens to their pages; returns the queries.

    qkv: q [N, Hq D], k and v [N, Hkv D]; cos, sin [N, D]; slots [N] int64 (-1: not written); caches [num_pages,
    page_size, Hkv, D]; all of these but qkv contiguous -> q [N, Hq, D]. D is even. norms: weights [D] of RMSNorms of
    each query and key before that, and their epsilon.
    """
    q, k, v = (x.contiguous() for x in qkv)
    rows, (kv_heads, dim) = len(slots), k_cache.shape[2:]
    heads = q.shape[1] // dim
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    q_weight, k_weight, eps = (None, None, 0.0) if norms is None else norms
    if rows:
        with torch.cuda.device_of(q):
            rotate_append_kernel[(rows, heads + 2 * kv_heads)](
                q, k, v, cos, sin, q_weight, k_weight, slots, out, k_cache, v_cache, eps,
                HQ=heads, HKV=kv_heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), NORM=norms is not None,
                num_warps=rotate_warps(dim),
            )  # fmt: skip
    return out


def gate(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Compute silu(g) u for g and u of one shape."""
    g, u = g.contiguous(), u.contiguous()
    out = torch.empty_like(g)
    numbers = g.numel()
    if numbers:
        with torch.cuda.device_of(g):
            gate_kernel[(triton.cdiv(numbers, GATE_BLOCK),)](g, u, out, numbers, BLOCK=GATE_BLOCK)
    return out
