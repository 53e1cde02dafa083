"""The mask as one int32 tensor, the argument of the attention ops, and a registry of what backends derive from it.

    table [N]: T, S, G, 0, then segment_starts [S + 1], first_key [S], gap_ptr [S + 1], gaps [2 G], then zeros

(see `mask.IntervalMask`). N is one of a few sizes, so that torch.compile does not see a new shape with every layout.

The ops are functions of this tensor. Derived data, above all tile plans, are made on the host once and found again by
the address of the tensor: a `MaskTable` is registered for its lifetime, and keeps the tensor alive. For any other
tensor, such as a copy, an op reads the mask back from the device; the result is the same. Training, compiled or not,
does not take that path. The last few of these masks are kept and compared by content, because the tensor may be written
again, and not every writer increments its version (Inductor reuses buffers, NumPy shares memory).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from itertools import accumulate, pairwise
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch

from mvkernels.mask import IntervalMask

Value = TypeVar("Value")

HEADER = 4
_SMALLEST = 4096  # 16 KB: about 800 segments, more than most rows of packed documents have
_KEPT = 8  # masks of tensors that are not registered: for the backward that follows a forward


class MaskTable:
    """A mask, its tensor on one device, and a cache of derived data that all devices share."""

    def __init__(self, mask: IntervalMask, device: torch.device, cache: dict[Hashable, Any] | None = None) -> None:
        with torch.inference_mode(False):  # autograd saves the tensor, and would refuse one made in inference mode
            tensor = torch.from_numpy(pack(mask)).to(device)
        self._enter(mask, tensor, {} if cache is None else cache)
        _registered[_address(tensor)] = self

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> MaskTable:
        """Read a mask from a tensor that may be written again later: from a copy, which is not registered.

        Raises ValueError when it is no mask table.
        """
        with torch.inference_mode(False):
            copied = tensor.detach().clone()
        table = cls.__new__(cls)
        table._enter(unpack(copied), copied, {})
        return table

    def _enter(self, mask: IntervalMask, tensor: torch.Tensor, cache: dict[Hashable, Any]) -> None:
        self.mask = mask
        self.tensor = tensor
        self._cache = cache
        self._version = tensor._version

    def _is_of(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor at this address is the one of this table, not written since."""
        same = self.tensor.numel() == tensor.numel() and not tensor.is_inference()
        return same and self._version == tensor._version

    def to(self, device: torch.device | str) -> MaskTable:
        """Copy the mask to another device; derived data are shared."""
        target = torch.device(device)
        return self if self.tensor.device == target else MaskTable(self.mask, target, self._cache)

    def cached(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """Return `build()`, computed once per key for the mask's lifetime. Keys of device data must name the device."""
        if key not in self._cache:
            # Autograd refuses tensors made in inference mode, and a layout may be evaluated first and trained on later.
            with torch.inference_mode(False):
                self._cache[key] = build()
        value: Value = self._cache[key]
        return value

    def __reduce__(self) -> tuple[type[MaskTable], tuple[IntervalMask, torch.device]]:
        """Register copies and pickles anew, without derived data."""
        return MaskTable, (self.mask, self.tensor.device)


def find_mask_table(tensor: torch.Tensor) -> MaskTable:
    """Find the registered table of a tensor, or make one from it.

    For a CUDA tensor that is not registered the host waits, to compare it with the last ones and to read it. Raises
    ValueError when the tensor is no mask table.
    """
    found = _registered.get(_address(tensor))
    if found is not None and found._is_of(tensor):
        return found
    with _lock:
        kept = [table for table in reversed(_kept) if table.tensor.device == tensor.device]
    for table in kept:
        if table.tensor.dtype == tensor.dtype and torch.equal(table.tensor, tensor):
            return table
    table = MaskTable.of_tensor(tensor)
    with _lock:
        _kept.append(table)
    return table


def pack(mask: IntervalMask) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Write a mask as the table of this module, [N] int32."""
    parts = (mask.segment_starts, mask.first_key, mask.gap_ptr, mask.gaps.reshape(-1))
    header = np.array([mask.total_tokens, mask.num_segments, len(mask.gaps), 0], np.int32)
    filled = np.concatenate([header, *parts])
    table = np.zeros(max(_SMALLEST, 1 << (len(filled) - 1).bit_length()), np.int32)
    table[: len(filled)] = filled
    return table


def unpack(table: torch.Tensor) -> IntervalMask:
    """Read a mask from a table: the inverse of `pack`. Raises ValueError when the tensor is no mask table."""
    if table.dtype != torch.int32 or table.dim() != 1 or table.numel() < HEADER:
        raise ValueError(f"expected a mask table, int32 [N], got {table.dtype} {list(table.shape)}")
    values = table.detach().cpu().numpy()
    total, segments, gaps, _ = header = values[:HEADER].tolist()
    ends = list(accumulate([HEADER, segments + 1, segments, segments + 1, 2 * gaps]))
    if min(total, segments, gaps) < 0 or ends[-1] > len(values):
        raise ValueError(f"expected a mask table, got a tensor that begins with {header}")
    starts, first_key, gap_ptr, flat = (values[a:b].copy() for a, b in pairwise(ends))
    return IntervalMask(starts, first_key, gap_ptr, flat.reshape(-1, 2), total)


def _address(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.data_ptr()


# A registered table holds its tensor, so that no other tensor can have its address while the entry stands.
_registered: WeakValueDictionary[tuple[str, int], MaskTable] = WeakValueDictionary()
_kept: deque[MaskTable] = deque(maxlen=_KEPT)
_lock = threading.Lock()
