"""Linear layers with bf16 weights and fp32 products on a CPU's matrix units: see `linear_tiles.cpp`, compiled here."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from mvkernels.ops.native import native_library, native_reason

SOURCE = Path(__file__).with_name("linear_tiles.cpp")
OUTPUTS, STEP = 16, 32  # of a tile of weights
MOST_ROWS = 512  # with more, the parts of x leave the cache
_REASONS = {
    1: "expected a processor with AMX and a compiler that knows it",
    2: "the system keeps AMX from this process",
}


class TileLayers:
    """Layers with the same input: weights [outer, inner] fp32 of which bf16 has all numbers, biases [outer] or None.

    They are copied, in bf16. outer: the sum of theirs. A row has the same bits with any number of rows.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        self.outer, self.inner, self.most_rows = sum(map(len, weights)), weights[0].shape[1], MOST_ROWS
        whole = torch.cat([weight.detach().bfloat16() for weight in weights])
        whole = torch.nn.functional.pad(whole, (0, -self.inner % STEP, 0, -self.outer % OUTPUTS))
        outer, inner = whole.shape
        tiles = whole.view(outer // OUTPUTS, OUTPUTS, inner // STEP, STEP // 2, 2)
        self.weight = tiles.permute(0, 2, 3, 1, 4).contiguous()
        self.bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in pairs])

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [.., inner] fp32 -> [.., outer], the layers' results side by side; no gradients.

        residual: as the result, contiguous; added to it.
        """
        library = _kernel()
        x = x.contiguous()
        rows = x.numel() // self.inner
        out = x.new_empty(*x.shape[:-1], self.outer)
        if not rows:
            return out
        parts = x.new_empty(library.space_numbers(rows, self.inner), dtype=torch.int16)
        library.linear(
            self.weight.data_ptr(), None if self.bias is None else self.bias.data_ptr(), self.outer, x.data_ptr(), rows,
            self.inner, out.data_ptr(), None if residual is None else residual.data_ptr(), parts.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out


@functools.cache
def tiles_reason() -> str | None:
    """Why there are no matrix units to be used here, or None. Compiles the kernel at the first call."""
    if (reason := native_reason(SOURCE)) is not None:
        return reason
    return _REASONS.get(native_library(SOURCE).tiles_state())


@functools.cache
def _kernel() -> ctypes.CDLL:
    if (reason := tiles_reason()) is not None:  # to ask is also what lets this process use them
        raise RuntimeError(f"{SOURCE.name}: {reason}")
    library = native_library(SOURCE)
    pointer, long, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.space_numbers.argtypes, library.space_numbers.restype = [long, long], long
    library.linear.argtypes = [pointer, pointer, long, pointer, long, long, pointer, pointer, pointer, short]
    library.linear.restype = None
    return library
