"""Page tables of branches on a device, and their merge: `BranchTables` and `merge_branches`.

This is `PagedKVCache.merge` on the device. The pages of a block's children are appended to their parent's page table,
and its next position becomes the highest of theirs (arXiv 2506.09991, section 4.2). No key or value moves, and the host
does not wait. A cache keeps its own page tables in this form (`cache.device`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mvkernels.errors import CacheError, require_type
from mvkernels.ops.backends import choose_backend
from mvkernels.ops.device import checked_device
from mvkernels.ops.merge.cpu import (
    ERROR_INVALID,
    ERROR_OVERFLOW,
    MAX_CAPACITY,
    NO_BLOCK,
    Int32Array,
    Int64Array,
    merge_cpu,
    split_blocks,
)
from mvkernels.ops.merge.cuda import cuda_reason


@dataclass(frozen=True, eq=False)
class BranchTables:
    """Page tables and positions of B branch slots with room for C entries each; int32, contiguous, on one device.

    A row lists the pages of one branch: what it wrote since it was forked, and what was merged into it. The pages that
    it sees of its parent are in the row of the parent.

    Attributes:
        pages: [B, C] page numbers of each row, in order.
        counts: [B, C] tokens written in each of these pages.
        used: [B] entries in use; the entries behind them are undefined.
        position: [B] next position; for a child without tokens, that of its parent.
        error: [1] bits for the blocks that `merge_branches` refused since the last `check`.

    Raises:
        ValueError: A tensor is of another shape, dtype or device, or not contiguous.
    """

    pages: torch.Tensor
    counts: torch.Tensor
    used: torch.Tensor
    position: torch.Tensor
    error: torch.Tensor

    def __repr__(self) -> str:
        branches, capacity = self.pages.shape
        return f"BranchTables({branches} branches, {capacity} pages each, {self.pages.device})"

    def __post_init__(self) -> None:
        if not isinstance(self.pages, torch.Tensor):
            raise ValueError(f"pages: expected a tensor, got {type(self.pages).__name__}")
        if self.pages.dim() != 2 or not 1 <= self.pages.shape[1] <= MAX_CAPACITY:
            raise ValueError(
                f"pages: expected shape [B, C] with C of 1 .. {MAX_CAPACITY}, got {list(self.pages.shape)}"
            )
        branches, capacity = self.pages.shape
        _check_tensor("pages", self.pages, (branches, capacity), self.pages.device)
        _check_tensor("counts", self.counts, (branches, capacity), self.pages.device)
        _check_tensor("used", self.used, (branches,), self.pages.device)
        _check_tensor("position", self.position, (branches,), self.pages.device)
        _check_tensor("error", self.error, (1,), self.pages.device)

    @classmethod
    def empty(cls, num_branches: int, capacity: int, device: torch.device | str = "cpu") -> BranchTables:
        """Make tables of branches without pages, with next position 0.

        Args:
            num_branches: B, at least 1.
            capacity: C, at least 1.
            device: Device of all tensors.

        Returns:
            Tables of zeros.

        Raises:
            ValueError: A size is out of range, or PyTorch does not have the device here.
        """
        if min(num_branches, capacity) < 1:
            raise ValueError(f"expected num_branches and capacity of at least 1, got {num_branches} and {capacity}")
        device = checked_device(device)
        shapes = ((num_branches, capacity), (num_branches, capacity), (num_branches,), (num_branches,), (1,))
        return cls(*(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))

    @property
    def num_branches(self) -> int:
        """B, the number of slots."""
        return self.pages.shape[0]

    @property
    def capacity(self) -> int:
        """C, the number of entries of a row."""
        return self.pages.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.pages.device

    def check(self) -> None:
        """Report the blocks that `merge_branches` refused since the last check; waits for the device.

        Raises:
            CacheError: A block had slots or lengths out of range, or did not fit into the row of its parent. It is
                unchanged.
        """
        found = int(self.error.item())
        self.error.zero_()
        if found & ERROR_INVALID:
            raise CacheError("merge_branches: expected slots and lengths in range, got a block with others: unchanged")
        if found & ERROR_OVERFLOW:
            expected = f"rows of at most {self.capacity} entries"
            raise CacheError(f"merge_branches: expected {expected}, got a block with more: it is unchanged")


def merge_branches(
    tables: BranchTables,
    parents: torch.Tensor,
    children: torch.Tensor,
    child_ptr: torch.Tensor,
    backend: str = "auto",
) -> None:
    """Merge children into their parents, for many blocks at once, in place.

    For each block:

        row(parent) = row(parent) + row(child 0) + row(child 1) + ...        used[child] = 0
        position[parent] = max(position[parent], position[child 0], ...)

    The blocks of one call must be disjoint; merge a nested block in a call before the block around it. A block that
    does not fit into the row of its parent is left unchanged, and `tables.check()` raises for it.

    Indices on the CPU are checked here. Indices on a GPU are not read by the host: a block with a slot out of range is
    refused in the same way, and blocks that are not disjoint have undefined results within the rows of their parents.
    On a GPU nothing waits for the device. With the indices there, nothing is allocated, so that the call can be
    captured into a CUDA graph after a first call on that device.

    Args:
        tables: Tables to change.
        parents: [M] int32, the slot of each block's parent; -1 stands for no block, so that M can be a capacity.
        children: [N] int32, the slots of the children, block after block.
        child_ptr: [M + 1] int32; the children of block m are children[child_ptr[m]:child_ptr[m + 1]]. All three are on
            the CPU or on the device of the tables.
        backend: "auto", "cpu", "cuda" (CuPy) or "reference" ("auto" never chooses it). A backend given by name never
            falls back.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, indices on the CPU are out of range or not disjoint,
            or `backend` is unknown.
        BackendError: The backend given by name cannot do this, or no backend of "auto" can; gives the reasons.

    Source: arXiv 2506.09991, section 4.2.
    """
    if not isinstance(tables, BranchTables):
        raise ValueError(f"tables: expected BranchTables, got {type(tables).__name__}")
    _check_indices(tables, parents, children, child_ptr)
    cpu = None if tables.device.type == "cpu" else f"expected tensors on cpu, got {tables.device.type}"
    reasons = {"cpu": cpu, "cuda": cuda_reason(tables.device), "reference": None}
    chosen = choose_backend(backend, reasons, auto=("cpu", "cuda"))
    state = (tables.pages, tables.counts, tables.used, tables.position, tables.error)
    indices = [index.to(tables.device) for index in (parents, children, child_ptr)]
    if chosen == "cuda":
        from mvkernels.ops.merge.cuda import launch_merge

        launch_merge(*state, *indices)
    elif chosen == "cpu":
        merge_cpu(*state, *indices)
    else:
        from mvkernels.reference.merge import merge

        merge(*state, *indices)


def _check_tensor(name: str, tensor: torch.Tensor, shape: Sequence[int], device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != torch.int32:
        raise ValueError(f"{name}: expected dtype torch.int32, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous storage, got strides {tensor.stride()}")


def _check_indices(
    tables: BranchTables, parents: torch.Tensor, children: torch.Tensor, child_ptr: torch.Tensor
) -> None:
    for name, index in (("parents", parents), ("children", children)):
        if not isinstance(index, torch.Tensor) or index.dim() != 1:
            got = list(index.shape) if isinstance(index, torch.Tensor) else type(index).__name__
            raise ValueError(f"{name}: expected a tensor of one dimension, got {got}")
    require_type(torch.Tensor, "tensor", child_ptr=child_ptr)
    on_host = parents.device.type == "cpu"
    for name, index, length in (
        ("parents", parents, len(parents)),
        ("children", children, len(children)),
        ("child_ptr", child_ptr, len(parents) + 1),
    ):
        _check_tensor(name, index, (length,), parents.device if on_host else tables.device)
    if not on_host:
        return
    if tables.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"parents: expected indices on {tables.device} while a CUDA graph is captured, got cpu")
    _check_blocks(tables.num_branches, *(index.numpy() for index in (parents, children, child_ptr)))


def _check_blocks(branches: int, parents: Int32Array, children: Int32Array, child_ptr: Int32Array) -> None:
    """Raise ValueError unless slots and ranges are valid and no slot occurs twice."""
    there = parents != NO_BLOCK
    _check_slots("parents", parents[there], branches, " or -1")
    first, last = child_ptr[:-1][there], child_ptr[1:][there]
    wrong = ((first < 0) | (last < first) | (last > len(children))).nonzero()[0]
    if len(wrong):
        got = f"{first[wrong[0]]} .. {last[wrong[0]]}"
        raise ValueError(f"child_ptr: expected ascending ranges within the {len(children)} children, got {got}")
    slots, owner, joined = split_blocks(parents, children, child_ptr)
    _check_slots("children", joined, branches, "")
    own = joined[joined == slots[owner]]
    if len(own):
        raise ValueError(f"children: expected children other than their parent, got {own[0]} among its own")
    twice = (np.bincount(np.concatenate([slots, joined]), minlength=branches) > 1).nonzero()[0]
    if len(twice):
        raise ValueError(f"expected every slot at most once among parents and children, got {twice[0]} again")


def _check_slots(name: str, slots: Int32Array | Int64Array, branches: int, other: str) -> None:
    wrong = slots[(slots < 0) | (slots >= branches)]
    if len(wrong):
        raise ValueError(f"{name}: expected slots of 0 .. {branches - 1}{other}, got {wrong[0]}")
