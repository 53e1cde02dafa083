"""Packed causal attention by the flash-attn packages if installed, for layouts without branches.

FlashAttention-3 (module flash_attn_interface, Hopper) is preferred to FlashAttention-2 (module flash_attn).
"""

from __future__ import annotations

import importlib.util

import torch

MODULES = ("flash_attn_interface", "flash_attn")
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256

# At import: torch.compile can trace a name, but not the search for a package.
INSTALLED = tuple(name for name in MODULES if importlib.util.find_spec(name) is not None)


def module_for(capability: tuple[int, int]) -> str | None:
    """Return the installed module that runs on a GPU of this compute capability, or None."""
    return next((name for name in INSTALLED if name != "flash_attn_interface" or capability[0] == 9), None)


def is_faster(capability: tuple[int, int]) -> bool:
    """Return whether flash-attn is preferred to the Triton kernels on a causal layout, by published measurements.

    FlashAttention-2 on Ampere is 1.3 to 2.5 times as fast as FlashAttention in Triton (arXiv 2307.08691, section 4.1,
    A100). FlashAttention-3 is preferred on Hopper (arXiv 2407.08608, section 4.1, H100); FlashAttention-2 is not,
    because it does not use Hopper's new instructions.
    """
    module = module_for(capability)
    return module == "flash_attn_interface" or (module == "flash_attn" and capability[0] == 8)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Attend: q [T, Hq, D], k, v [T, Hkv, D], cu_seqlens [documents + 1] int32 -> out; deterministic backward."""
    name = module_for(torch.cuda.get_device_capability(q.device))
    assert name is not None, "the caller checked that a module is installed"
    # Import statements, because torch.compile can trace them, but not import_module.
    if name == "flash_attn":
        from flash_attn import flash_attn_varlen_func
    else:
        from flash_attn_interface import flash_attn_varlen_func
    result = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True, deterministic=True
    )
    # Some releases of FlashAttention-3 always return (out, lse).
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out
