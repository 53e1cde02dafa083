"""append on a GPU: one program per (row, part of a row), keys and values together.

    k_cache[slots[row], e] = k_new[row, e // D, e % D]   for the Hkv * D elements e of a row; v alike

k_new, v_new: [N, Hkv, D], any strides of rows and heads; caches: [capacity, Hkv * D] contiguous; slots: [N] int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_E = 1024


# Strides of a transposed [Hkv, N, D] change with N: no variant of the kernel may depend on them.
@triton.jit(do_not_specialize=["stride_kn", "stride_kh", "stride_vn", "stride_vh"])
def append_kernel(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, slots_ptr, stride_kn, stride_kh, stride_vn, stride_vh,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)  # int64: a cache may hold more than 2**31 elements
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    inside = e < HEADS * D
    head = (e // D).to(tl.int64)
    d = e % D
    k = tl.load(k_new_ptr + row * stride_kn + head * stride_kh + d, mask=inside)
    v = tl.load(v_new_ptr + row * stride_vn + head * stride_vh + d, mask=inside)
    tl.store(k_ptr + slot * (HEADS * D) + e, k, mask=inside)
    tl.store(v_ptr + slot * (HEADS * D) + e, v, mask=inside)


def launch_append(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor, slots: torch.Tensor
) -> None:
    """Writes in place. The caller has checked shapes, dtypes and devices (`ops.append`)."""
    rows, heads, dim = k_new.shape
    k_new, v_new = (new.detach() if new.stride(2) == 1 else new.detach().contiguous() for new in (k_new, v_new))
    block = min(BLOCK_E, triton.next_power_of_2(heads * dim))
    strides = (k_new.stride(0), k_new.stride(1), v_new.stride(0), v_new.stride(1))
    with torch.cuda.device_of(k_cache):
        append_kernel[(rows, triton.cdiv(heads * dim, block))](
            k_new, v_new, k_cache, v_cache, slots, *strides, HEADS=heads, D=dim, BLOCK_E=block
        )
