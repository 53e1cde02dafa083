"""RMSNorm on the CPU in one call, fp32: see `norm_native.cpp`, which is compiled where it runs."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from mvkernels.ops.native import native_library, native_reason

SOURCE = Path(__file__).with_name("norm_native.cpp")
NUMBERS = 2**15  # fewer take one thread less time than others need to wake up


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [.., dim] -> w x / sqrt(mean(x^2) + eps), alike; weight [dim]. All fp32 on the CPU; no gradients."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    dim, numbers = len(weight), x.numel()
    threads = torch.get_num_threads() if numbers >= NUMBERS else 1
    _kernel()(x.data_ptr(), weight.data_ptr(), eps, numbers // dim, dim, out.data_ptr(), threads)
    return out


@functools.cache
def norm_reason() -> str | None:
    """Why the kernel cannot be compiled here, or None. Compiles it at the first call."""
    return native_reason(SOURCE)


@functools.cache
def _kernel() -> ctypes._NamedFuncPointer:
    kernel = native_library(SOURCE).rms_norm
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    kernel.argtypes = [pointer, pointer, ctypes.c_float, long, long, pointer, ctypes.c_int32]
    kernel.restype = None
    return kernel
