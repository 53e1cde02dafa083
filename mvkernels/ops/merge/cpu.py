"""merge_branches: the page tables of children are appended to those of their parents, on one device, in place.

    pages, counts [B, C]   page numbers of each branch's own list, in order, and the tokens written in each
    used [B]               entries in use
    position [B]           next position
    error [1]              the bits ERROR_*, set and never cleared
    parents [M]            slot of each block's parent; NO_BLOCK: no block
    children [N]           slots of the children, block after block
    child_ptr [M + 1]      block m's are children[child_ptr[m]:child_ptr[m + 1]]; not read where there is no block

All int32, contiguous. For each block:

    row(parent) = row(parent) + row(child 0) + row(child 1) + ...        used[child] = 0
    position[parent] = max(position[parent], position[child 0], ...)

A block with a number out of range, or that does not fit into its parent's row, is left unchanged and sets its bit.
Blocks of one call are disjoint: no slot occurs twice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
NO_BLOCK = -1
ERROR_OVERFLOW = 1
ERROR_INVALID = 2
# Prefix sums over the rows that one pass of the kernel joins stay below 2**31.
MAX_CAPACITY = 2**22


def split_blocks(parents: Int32Array, children: Int32Array, child_ptr: Int32Array) -> tuple[Int64Array, ...]:
    """Return the parents of the existing blocks [m], and the block [n] and slot [n] of each of their children, int64.

    Ranges must lie within `children`.
    """
    there = (parents != NO_BLOCK).nonzero()[0]
    first = child_ptr[there].astype(np.int64)
    sizes = child_ptr[there + 1] - first
    owner = np.repeat(np.arange(len(there)), sizes)
    within = np.arange(len(owner)) - np.repeat(sizes.cumsum() - sizes, sizes)
    return parents[there].astype(np.int64), owner, children[first[owner] + within].astype(np.int64)


def merge_cpu(
    pages: torch.Tensor,
    counts: torch.Tensor,
    used: torch.Tensor,
    position: torch.Tensor,
    error: torch.Tensor,
    parents: torch.Tensor,
    children: torch.Tensor,
    child_ptr: torch.Tensor,
) -> None:
    """Merge all blocks at once by NumPy: most arrays are so short that PyTorch's call overhead would dominate.

    The slots are in range, and the blocks disjoint.
    """
    capacity = pages.shape[1]
    slots, owner, joined = split_blocks(parents.numpy(), children.numpy(), child_ptr.numpy())
    filled, next_position = used.numpy(), position.numpy()
    base, lengths = filled[slots].astype(np.int64), filled[joined].astype(np.int64)
    broken = (base < 0) | (base > capacity)
    broken[owner[(lengths < 0) | (lengths > capacity)]] = True
    total = np.zeros_like(base)
    np.add.at(total, owner, lengths)
    overflow = ~broken & (base + total > capacity)
    error |= ERROR_INVALID * int(broken.any()) | ERROR_OVERFLOW * int(overflow.any())

    merged = ~(broken | overflow)
    if not merged.all():
        kept = merged[owner]
        owner = (merged.cumsum() - 1)[owner[kept]]
        joined, lengths, slots, base, total = joined[kept], lengths[kept], slots[merged], base[merged], total[merged]
    highest = next_position[slots]
    np.maximum.at(highest, owner, next_position[joined])
    starts = lengths.cumsum() - lengths  # of each child among all entries that are copied
    target = slots[owner] * capacity + base[owner] + starts - (total.cumsum() - total)[owner]
    within = np.arange(int(lengths.sum()))
    to = within + np.repeat(target - starts, lengths)
    source = within + np.repeat(joined * capacity - starts, lengths)
    for tensor in (pages, counts):
        table = tensor.numpy().reshape(-1)
        table[to] = table[source]
    filled[joined] = 0
    filled[slots] = base + total
    next_position[slots] = highest
