"""Linear layers with few rows of input on the CPU, fp32: see `linear_native.cpp`, which is compiled where it runs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from mvkernels.ops.native import native_library, native_reason

SOURCE = Path(__file__).with_name("linear_native.cpp")
_FIRST = 1024  # numbers of a weight that tell nearly always


class _Layer(ctypes.Structure):
    """`Layer` of the kernel."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("narrow", ctypes.c_void_p),
        ("outer", ctypes.c_int64), ("column", ctypes.c_int64),
    )  # fmt: skip


class LinearLayers:
    """Layers with the same input: weights [outer, inner] and biases [outer] or None, contiguous fp32 on the CPU.

    They are used where they lie, and must outlive this. outer: the sum of theirs. narrow: weights of which bf16 has all
    numbers are also kept in it; with few rows these are read, in half the time, and give the same bits. most_rows: with
    more, the products of PyTorch are as fast.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], narrow: bool = False
    ) -> None:
        self.outer, self.inner = 0, weights[0].shape[1]
        self.narrow = [weight.bfloat16() if narrow and is_bf16(weight) else None for weight in weights]
        layers = []
        for tensors in zip(weights, biases, self.narrow, strict=True):
            places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            layers.append(_Layer(*places, len(tensors[0]), self.outer))
            self.outer += len(tensors[0])
        self._layers = (_Layer * len(layers))(*layers)
        self.most_rows = _kernel()[2]

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [.., inner] -> [.., outer], the layers' results side by side; no gradients.

        residual: as the result, contiguous; added to it. A row has the same bits within 1 to 8 rows, and from 9 on.
        """
        library, few, _ = _kernel()
        x = x.contiguous()
        rows = x.numel() // self.inner
        out = x.new_empty(*x.shape[:-1], self.outer)
        if not rows:
            return out
        space = x.new_empty(library.space_numbers(rows, self.inner)) if rows > few else None
        library.linear(
            self._layers, len(self._layers), x.data_ptr(), rows, self.inner, out.data_ptr(), self.outer,
            None if residual is None else residual.data_ptr(), None if space is None else space.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out


def is_bf16(weight: torch.Tensor) -> bool:
    """Whether bf16 has every number of an fp32 tensor: those of a checkpoint that was published in it."""
    bits = weight.view(torch.int32).flatten()
    return not any(bool((part & 0xFFFF).any()) for part in (bits[:_FIRST], bits))


def few_rows() -> int:
    """Up to how many rows narrow weights are read."""
    return _kernel()[1]


@functools.cache
def linear_reason() -> str | None:
    """Why the kernel cannot be compiled here, or None. Compiles it at the first call."""
    return native_reason(SOURCE)


@functools.cache
def _kernel() -> tuple[ctypes.CDLL, int, int]:
    """The library, up to how many rows are few, and how many it is for."""
    library = native_library(SOURCE)
    pointer, long, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.space_numbers.argtypes, library.space_numbers.restype = [long, long], long
    library.linear.argtypes = [
        pointer, short, pointer, long, long, pointer, long, pointer, pointer, short
    ]  # fmt: skip
    library.linear.restype = None
    return library, int(library.few_rows()), int(library.most_rows())
