"""Linear layers with bf16 weights and fp32 products on the matrix units of a CPU (AMX), by `linear_amx.cpp`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from mvkernels.ops.dense.product import Product, declare
from mvkernels.ops.native import native_library, native_reason

SOURCE = Path(__file__).with_name("linear_amx.cpp")
OUTPUTS, STEP = 16, 32  # of a tile of weights
MOST_ROWS = 512  # with more, the parts of x leave the cache
_REASONS = {
    1: "expected a processor with AMX and a compiler that knows it",
    2: "the system keeps AMX from this process",
}


class _Layers(ctypes.Structure):
    """`Layers` of the kernel."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("outer", ctypes.c_int64), ("inner", ctypes.c_int64),
    )  # fmt: skip


class TileLayers(Product):
    """Layers with the same input: weights [outer, inner] fp32 that bf16 represents exactly, biases [outer] or None.

    The weights are copied to bf16. A row has the same bits with any number of rows.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        outer, inner = sum(map(len, weights)), weights[0].shape[1]
        whole = torch.cat([weight.detach().bfloat16() for weight in weights])
        whole = torch.nn.functional.pad(whole, (0, -inner % STEP, 0, -outer % OUTPUTS))
        tiles = whole.view(len(whole) // OUTPUTS, OUTPUTS, whole.shape[1] // STEP, STEP // 2, 2)
        self.weight = tiles.permute(0, 2, 3, 1, 4).contiguous()
        self.bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in pairs])
        bias = None if self.bias is None else self.bias.data_ptr()
        super().__init__(_kernel(), _Layers(self.weight.data_ptr(), bias, outer, inner), inner, outer, MOST_ROWS)


@functools.cache
def tiles_reason() -> str | None:
    """Return why AMX cannot be used here, or None. Compiles the kernel at the first call."""
    if (reason := native_reason(SOURCE)) is not None:
        return reason
    return _REASONS.get(native_library(SOURCE).tiles_state())


@functools.cache
def _kernel() -> ctypes.CDLL:
    if (reason := tiles_reason()) is not None:  # the check also requests permission to use AMX
        raise RuntimeError(f"{SOURCE.name}: {reason}")
    return declare(native_library(SOURCE))
