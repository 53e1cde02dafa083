"""BranchTables: what branches own, as tables on a device; merge_branches: the merge of the paged cache on them.

The device twin of `PagedKVCache.merge`: the pages of a block's children are appended to their parent's list, and its
next position becomes the highest among them (arXiv 2506.09991, section 4.2). No key or value moves, and the host is
not asked. A cache keeps its own page lists in such tables (`cache.device`), and merges them so.
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
    """Page lists and positions of B branch slots, with room for C entries each; int32, contiguous, on one device.

    pages [B, C]     page numbers of the slot's own list, in order: what the branch wrote since it was forked, and what
                     was merged into it. What it sees of its parent is in its parent's row
    counts [B, C]    tokens written in each of those pages
    used [B]         entries in use; what stands behind them in a row means nothing
    position [B]     next position; of a child that has written nothing, its parent's
    error [1]        what `merge_branches` refused since the last `check`
    Raises ValueError when the tensors do not fit together.
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
        """Tables of branches that own nothing, with next position 0."""
        if min(num_branches, capacity) < 1:
            raise ValueError(f"expected num_branches and capacity of at least 1, got {num_branches} and {capacity}")
        device = checked_device(device)
        shapes = ((num_branches, capacity), (num_branches, capacity), (num_branches,), (num_branches,), (1,))
        return cls(*(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))

    @property
    def num_branches(self) -> int:
        """B."""
        return self.pages.shape[0]

    @property
    def capacity(self) -> int:
        """C."""
        return self.pages.shape[1]

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.pages.device

    def check(self) -> None:
        """Raises CacheError if `merge_branches` refused a block since the last check; waits for the device."""
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
    """Joins children into their parents, many blocks at once, in place. Of each block:

        row(parent) = row(parent) + row(child 0) + row(child 1) + ...        used[child] = 0
        position[parent] = max(position[parent], position[child 0], ...)

    parents [M]          slot of each block's parent; -1 stands for no block, so M may be a capacity
    children [N]         slots of the children, block after block
    child_ptr [M + 1]    block m's are children[child_ptr[m]:child_ptr[m + 1]], none or any number
                         All int32, all on the tables' device or all on the CPU
    backend              "auto", "cpu", "cuda" (CuPy) or "reference"; one asked for by name never falls back

    The blocks of a call are disjoint: a nested block is merged in a call before the one around it. A block whose
    parent's row would not hold it all is left as it is; `tables.check()` raises for it. Indices on the CPU are checked
    here; those on a GPU are not read by the host: a block with a slot out of range is refused in the same way, and
    blocks that are not disjoint have no defined result, but write no entry outside the rows of their parents.
    On a GPU nothing waits for the device, and with indices there nothing is allocated: the call can be captured into a
    CUDA graph once it has been made on that device.
    Raises ValueError for arguments that do not fit, and BackendError with the reason when the backend cannot do it.
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
    """Ranges, slots, and that no slot occurs twice."""
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
