"""Write the new keys and values of a step into their slots of the paged KV cache: `append_rows`.

    k_cache[slot // page_size, slot % page_size] = k_new[row]   for slot = slots[row]; v alike

k_cache, v_cache: [num_pages, page_size, Hkv, D]; k_new, v_new: [N, Hkv, D]; slots: [N] int64, all different except for
-1. Rows with slot -1 are not written: a CUDA graph has as many rows as the largest step that it serves. With a rotation
(`ops.rope`) the keys are rotated in the same launch.
"""

from __future__ import annotations

import torch

from mvkernels.ops.backends import choose_backend, triton_reason
from mvkernels.ops.decode.native import append_native, compile_reason
from mvkernels.ops.rope import Rotation, check_rotation, rotate_rows, rotation_reason


def append_rows(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    slots: torch.Tensor,
    backend: str = "auto",
    rotation: Rotation | None = None,
    spare: bool = True,
) -> None:
    """Check the arguments, choose a backend, and write. Raises ValueError and BackendError.

    spare: whether some slots may be -1.
    """
    expected = (slots.shape[0], *k_cache.shape[2:])
    for name, new, stored in (("k_new", k_new, k_cache), ("v_new", v_new, v_cache)):
        if tuple(new.shape) != expected:
            raise ValueError(f"{name}: expected shape [rows, Hkv, D] = {list(expected)}, got {list(new.shape)}")
        if new.dtype != stored.dtype:
            raise ValueError(f"{name}: expected the cache's dtype {stored.dtype}, got {new.dtype}")
        if new.device != stored.device:
            raise ValueError(f"{name}: expected the cache's device {stored.device}, got {new.device}")
        if torch.is_grad_enabled() and new.requires_grad:
            raise ValueError(f"{name}: expected a tensor outside autograd, got one that requires grad: use no_grad()")
    triton = triton_reason(k_cache.device)
    if rotation is not None:
        check_rotation(rotation, k_new)
        triton = triton or rotation_reason(k_new.dtype)
    device = k_cache.device.type
    reasons = {
        "cpu": None if device == "cpu" else f"expected tensors on cpu, got {device}",
        "triton": triton,
        "reference": None,
    }
    if choose_backend(backend, reasons, auto=("cpu", "triton")) == "triton":
        from mvkernels.ops.decode.append_triton import launch_append

        launch_append(k_cache, v_cache, k_new, v_new, slots, rotation)
        return
    if _compiled_fits(k_cache, v_cache, k_new, v_new, slots) and rotation is None and backend != "reference":
        append_native(k_cache, v_cache, k_new, v_new, slots)
        return
    with torch.no_grad():
        k_new = k_new if rotation is None else rotate_rows(k_new, rotation)
        if spare:
            written = slots >= 0
            slots, k_new, v_new = slots[written], k_new[written], v_new[written]
        for stored, new in ((k_cache, k_new), (v_cache, v_new)):
            stored.view(-1, *stored.shape[2:]).index_put_((slots,), new)


def _compiled_fits(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor, slots: torch.Tensor
) -> bool:
    """Whether the compiled CPU kernel can write these rows: it does what indexing does, in one call."""
    return (
        k_cache.device.type == slots.device.type == "cpu"
        and slots.dtype == torch.int64
        and slots.is_contiguous()
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and (k_new.stride(2) == v_new.stride(2) == 1 or k_new.shape[2] == 1)
        and compile_reason() is None
    )
