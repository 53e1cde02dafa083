"""Norms, RoPE, MLP gate and argmax of a decoder on the CPU, by compiled kernels (`layer.cpp`).

All tensors are fp32 on the CPU, without gradients. `rotate_append` and `gate` are parts of a whole layer (see
`ops.dense.stack`); they are exposed for tests.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from mvkernels.ops.native import native_library, native_reason

SOURCE = Path(__file__).with_name("layer.cpp")
NUMBERS = 2**15  # for fewer, one thread takes less time than waking others


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute w x / sqrt(mean(x^2) + eps) for x [.., dim] and weight [dim]."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    dim, numbers = len(weight), x.numel()
    kernels().rms_norm(
        x.data_ptr(), weight.data_ptr(), eps, numbers // dim, dim, out.data_ptr(), _threads(numbers)
    )  # fmt: skip
    return out


def rotate_append(
    qkv: torch.Tensor,
    heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Apply RoPE to queries and keys, and write the keys and values of new tokens to their pages; returns the queries.

    qkv [N, (Hq + 2 Hkv) D], cos, sin [N, D], slots [N] int64 (-1: not written), caches [num_pages, page_size, Hkv, D],
    all contiguous -> q [N, Hq, D]. D is even, at most 256. norms: weights [D] of RMSNorms of each query and key before
    that, and their epsilon.
    """
    rows = len(slots)
    kv_heads, dim = k_cache.shape[2:]
    q = qkv.new_empty(rows, heads, dim)
    weights = (None, None, 0.0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr(), norms[2])
    kernels().rotate_append(
        qkv.data_ptr(), rows, qkv.shape[-1], heads, kv_heads, dim, cos.data_ptr(), sin.data_ptr(), *weights,
        slots.data_ptr(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), _threads(qkv.numel()),
    )  # fmt: skip
    return q


def gate(gu: torch.Tensor) -> torch.Tensor:
    """Compute silu(g) u for gu [N, 2 dim], g and u side by side, contiguous -> [N, dim]."""
    rows, dim = len(gu), gu.shape[1] // 2
    out = gu.new_empty(rows, dim)
    kernels().gate(gu.data_ptr(), rows, dim, out.data_ptr(), _threads(gu.numel()))
    return out


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ([n] int64 place, [n] value) of the first NaN of each row, else of the first of its largest numbers.

    logits [n, V] with contiguous rows, V at least 1.
    """
    rows, size = logits.shape
    index = torch.empty(rows, dtype=torch.int64)
    value = logits.new_empty(rows)
    kernels().likeliest(
        logits.data_ptr(), rows, logits.stride(0), size, index.data_ptr(), value.data_ptr(), _threads(logits.numel())
    )  # fmt: skip
    return index, value


def _threads(numbers: int) -> int:
    return torch.get_num_threads() if numbers >= NUMBERS else 1


@functools.cache
def layer_reason() -> str | None:
    """Return why the kernels cannot be compiled here, or None. Compiles them at the first call."""
    return native_reason(SOURCE)


def is_compiled() -> bool:
    """Whether the kernels were compiled or refused before, so that a call costs no time."""
    return layer_reason.cache_info().currsize > 0


@functools.cache
def kernels() -> ctypes.CDLL:
    """Load the library."""
    library = native_library(SOURCE)
    pointer, long, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.rms_norm.argtypes = [pointer, pointer, ctypes.c_float, long, long, pointer, short]
    library.rotate_append.argtypes = [
        pointer, *[long] * 5, *[pointer] * 4, ctypes.c_float, *[pointer] * 4, short
    ]  # fmt: skip
    library.gate.argtypes = [pointer, long, long, pointer, short]
    library.likeliest.argtypes = [pointer, *[long] * 3, pointer, pointer, short]
    library.decoder_layer.argtypes = [pointer] * 6
    library.decoder_layers.argtypes = [pointer, ctypes.c_int64, *[pointer] * 4]
    layers = library.decoder_layer, library.decoder_layers
    for kernel in (library.rms_norm, library.rotate_append, library.gate, library.likeliest, *layers):
        kernel.restype = None
    return library
