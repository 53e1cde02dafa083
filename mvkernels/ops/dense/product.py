"""Interface of the CPU kernels for products of rows with the weights of linear layers that share their input.

The library of a kernel has a struct that describes the weights, and two functions of it:

    int64_t space_bytes(what, rows)                                     workspace bytes that `product` needs, at an
                                                                        address that is a multiple of 64
    void product(what, x, rows, y, residual, space, num_threads)        y = residual + x W^T + b, of at least one row

so that other kernels can call the function with the struct (`ops.dense.stack`).
"""

from __future__ import annotations

import ctypes

import torch


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the two functions; returns the library."""
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    library.space_bytes.argtypes, library.space_bytes.restype = [pointer, long], long
    library.product.argtypes = [pointer, pointer, long, *[pointer] * 3, ctypes.c_int32]
    library.product.restype = None
    return library


class Product:
    """Linear layers that are multiplied together.

    inner, outer: sizes of x and of the result. most_rows: with more rows PyTorch's products are as fast. function,
    what: addresses of the kernel and its struct.
    """

    def __init__(self, library: ctypes.CDLL, what: ctypes.Structure, inner: int, outer: int, most_rows: int) -> None:
        self.inner, self.outer, self.most_rows = inner, outer, most_rows
        self._library, self._struct = library, what
        self.what = ctypes.addressof(what)
        self.function = ctypes.cast(library.product, ctypes.c_void_p).value

    def space_bytes(self, rows: int) -> int:
        """Return the workspace bytes for a product of so many rows."""
        return int(self._library.space_bytes(self.what, rows))

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x [.., inner] fp32 -> [.., outer], the results of the layers side by side; no gradients.

        residual: as the result, contiguous; added to it.
        """
        x = x.contiguous()
        rows = x.numel() // self.inner
        out = x.new_empty(*x.shape[:-1], self.outer)
        if not rows:
            return out
        size = self.space_bytes(rows)
        space = x.new_empty(size, dtype=torch.uint8) if size else None
        self._library.product(
            self.what, x.data_ptr(), rows, out.data_ptr(), None if residual is None else residual.data_ptr(),
            None if space is None else space.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out
