"""append on a GPU: one program per (row, part of a row), keys and values together; and RoPE, fused or alone.

    k_cache[slots[row], e] = k_new[row, e // D, e % D]   for the Hkv * D elements e of a row; v alike; none for slot -1

k_new, v_new: [N, Hkv, D], any strides of rows and heads; caches: [capacity, Hkv * D] contiguous; slots: [N] int64.
With a rotation the keys are rotated before the write (`ops.rope`): positions [N], inv_freq [HALF] float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mvkernels.ops.rope import Rotation

BLOCK_E = 1024


# Strides of a transposed [Hkv, N, D] change with N, so they must not specialize the kernel.
@triton.jit(do_not_specialize=["stride_kn", "stride_kh", "stride_vn", "stride_vh"])
def append_kernel(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, slots_ptr, stride_kn, stride_kh, stride_vn, stride_vh,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)  # int64: a cache may hold more than 2**31 elements
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    inside = e < tl.where(slot >= 0, HEADS * D, 0)
    head = (e // D).to(tl.int64)
    d = e % D
    k = tl.load(k_new_ptr + row * stride_kn + head * stride_kh + d, mask=inside)
    v = tl.load(v_new_ptr + row * stride_vn + head * stride_vh + d, mask=inside)
    tl.store(k_ptr + slot * (HEADS * D) + e, k, mask=inside)
    tl.store(v_ptr + slot * (HEADS * D) + e, v, mask=inside)


@triton.jit
def cos_sin(angle):
    """Compute cos and sin in fp32, to 2e-7 for angles up to 1e5.

    The angle is reduced by pi / 2 in three parts; then the polynomials are those of Cephes. libdevice's functions
    branch through local memory for large angles.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = tl.fma(quarters, -1.5703125, angle)
    r = tl.fma(quarters, -4.837512969970703125e-4, r)
    r = tl.fma(quarters, -7.549789948768648e-8, r)
    z = r * r
    sin = r + r * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cos = 1.0 - 0.5 * z + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2)
    quadrant = quarters.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    return tl.where((quadrant == 1) | (quadrant == 2), -c, c), tl.where(quadrant >= 2, -s, s)


@triton.jit
def rotated(x_ptr, d, inside, position, inv_freq_ptr, scaling, HALF: tl.constexpr):
    """Rotate elements d of heads, in fp32; x_ptr [BLOCK_E] points to each, and its partner is HALF away."""
    turns = inside & (d < 2 * HALF)
    first = d < HALF
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(x_ptr + tl.where(first, HALF, -HALF), mask=turns, other=0.0).to(tl.float32)
    inv_freq = tl.load(inv_freq_ptr + tl.where(first, d, d - HALF), mask=turns, other=0.0)
    cos, sin = cos_sin(position.to(tl.float32) * inv_freq)
    y = x * (cos * scaling) + tl.where(first, -partner, partner) * (sin * scaling)
    return tl.where(d < 2 * HALF, y, x)


@triton.jit(do_not_specialize=["stride_kn", "stride_kh", "stride_vn", "stride_vh"])
def append_rotated_kernel(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, slots_ptr, positions_ptr, inv_freq_ptr, scaling,
    stride_kn, stride_kh, stride_vn, stride_vh,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    position = tl.load(positions_ptr + row)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    inside = e < tl.where(slot >= 0, HEADS * D, 0)
    head = (e // D).to(tl.int64)
    d = e % D
    k = rotated(
        k_new_ptr + row * stride_kn + head * stride_kh + d, d, inside, position, inv_freq_ptr, scaling, HALF=HALF
    )
    v = tl.load(v_new_ptr + row * stride_vn + head * stride_vh + d, mask=inside)
    tl.store(k_ptr + slot * (HEADS * D) + e, k.to(k_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + slot * (HEADS * D) + e, v, mask=inside)


@triton.jit(do_not_specialize=["stride_n", "stride_h"])
def rotate_kernel(
    x_ptr, out_ptr, positions_ptr, inv_freq_ptr, scaling, stride_n, stride_h,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < HEADS * D
    head = (e // D).to(tl.int64)
    d = e % D
    y = rotated(x_ptr + row * stride_n + head * stride_h + d, d, inside, position, inv_freq_ptr, scaling, HALF=HALF)
    tl.store(out_ptr + row * (HEADS * D) + e, y.to(out_ptr.dtype.element_ty), mask=inside)


def launch_append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    slots: torch.Tensor,
    rotation: Rotation | None = None,
) -> None:
    """Write in place, in one launch. The caller has checked shapes, dtypes and devices (`ops.decode.append`)."""
    rows, heads, dim = k_new.shape
    k_new, v_new, slots = _contiguous_elements(k_new), _contiguous_elements(v_new), slots.contiguous()
    block, grid = _parts(rows, heads, dim)
    strides = (k_new.stride(0), k_new.stride(1), v_new.stride(0), v_new.stride(1))
    with torch.cuda.device_of(k_cache):
        if rotation is None:
            append_kernel[grid](
                k_new, v_new, k_cache, v_cache, slots, *strides, HEADS=heads, D=dim, BLOCK_E=block
            )  # fmt: skip
        else:
            append_rotated_kernel[grid](
                k_new, v_new, k_cache, v_cache, slots, *_contiguous(rotation), *strides,
                HEADS=heads, D=dim, HALF=rotation.inv_freq.shape[0], BLOCK_E=block,
            )  # fmt: skip


def launch_rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate x [N, heads, D]; contiguous. The caller has checked shapes, dtypes and devices (`rope.rotate`)."""
    rows, heads, dim = x.shape
    x = _contiguous_elements(x)
    block, grid = _parts(rows, heads, dim)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        rotate_kernel[grid](
            x, out, *_contiguous(rotation), x.stride(0), x.stride(1),
            HEADS=heads, D=dim, HALF=rotation.inv_freq.shape[0], BLOCK_E=block,
        )  # fmt: skip
    return out


def _contiguous_elements(new: torch.Tensor) -> torch.Tensor:
    return new.detach() if new.stride(2) == 1 else new.detach().contiguous()


def _contiguous(rotation: Rotation) -> Rotation:
    return Rotation(rotation.positions.contiguous(), rotation.inv_freq.contiguous(), rotation.scaling)


def _parts(rows: int, heads: int, dim: int) -> tuple[int, tuple[int, int]]:
    """Return the elements of a program, and the grid."""
    block = min(BLOCK_E, triton.next_power_of_2(heads * dim))
    return block, (rows, triton.cdiv(heads * dim, block))
