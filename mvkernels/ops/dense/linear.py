"""Linear layers in fp32 for small batches on the CPU, by a compiled kernel (`linear.cpp`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from mvkernels.ops.dense.product import Product, declare
from mvkernels.ops.native import native_library, native_reason

SOURCE = Path(__file__).with_name("linear.cpp")
_FIRST = 1024  # elements checked first: enough to reject almost every other weight


class _Layer(ctypes.Structure):
    """`Layer` of the kernel."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("narrow", ctypes.c_void_p),
        ("outer", ctypes.c_int64), ("column", ctypes.c_int64),
    )  # fmt: skip


class _Layers(ctypes.Structure):
    """`Layers` of the kernel."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)), ("num_layers", ctypes.c_int64),
        ("inner", ctypes.c_int64), ("outer", ctypes.c_int64),
    )  # fmt: skip


class LinearLayers(Product):
    """Layers with the same input: weights [outer, inner] and biases [outer] or None, contiguous fp32 on the CPU.

    The tensors are not copied and must outlive this object. narrow: weights that bf16 represents exactly are also kept
    in bf16; with few rows these are read, in half the time, and give the same bits. A row has the same bits within 1 to
    8 rows, and from 9 on.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], narrow: bool = False
    ) -> None:
        self.narrow = [weight.bfloat16() if narrow and is_bf16(weight) else None for weight in weights]
        layers, outer, inner = [], 0, weights[0].shape[1]
        for tensors in zip(weights, biases, self.narrow, strict=True):
            places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            layers.append(_Layer(*places, len(tensors[0]), outer))
            outer += len(tensors[0])
        self._layers = (_Layer * len(layers))(*layers)
        library = _kernel()
        super().__init__(
            library, _Layers(self._layers, len(layers), inner, outer), inner, outer, int(library.most_rows())
        )


def few_rows() -> int:
    """Return up to how many rows bf16 weights are read."""
    return int(_kernel().few_rows())


def is_bf16(weight: torch.Tensor) -> bool:
    """Whether bf16 represents every element of an fp32 tensor exactly, as for checkpoints published in bf16."""
    bits = weight.view(torch.int32).flatten()
    return not any(bool((part & 0xFFFF).any()) for part in (bits[:_FIRST], bits))


@functools.cache
def linear_reason() -> str | None:
    """Return why the kernel cannot be compiled here, or None. Compiles it at the first call."""
    return native_reason(SOURCE)


@functools.cache
def _kernel() -> ctypes.CDLL:
    return declare(native_library(SOURCE))
