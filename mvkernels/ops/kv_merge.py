"""merge_branches: the page tables of children joined into their parents', on one device, in place.

    pages, counts [B, C]   page numbers of each branch's own list, in order, and the tokens written in each
    used [B]               entries in use
    position [B]           next position
    error [1]              the bits ERROR_*, set and never cleared
    parents [M]            slot of each block's parent; NO_BLOCK: no block
    children [N]           slots of the children, block after block
    child_ptr [M + 1]      block m's are children[child_ptr[m]:child_ptr[m + 1]]; not read where there is no block

All int32, contiguous. Of each block:

    row(parent) = row(parent) + row(child 0) + row(child 1) + ...        used[child] = 0
    position[parent] = max(position[parent], position[child 0], ...)

A block with a number out of range, or whose parent's row would not hold it all, is left as it is and sets its bit.
Blocks of one call are disjoint: no slot occurs twice.
"""

from __future__ import annotations

import torch

NO_BLOCK = -1
ERROR_OVERFLOW = 1
ERROR_INVALID = 2
# Prefix sums over the rows that one pass of the kernel joins stay below 2**31.
MAX_CAPACITY = 2**22


def split_blocks(
    parents: torch.Tensor, children: torch.Tensor, child_ptr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parents of the blocks that there are [m], and each of their children's block [n] and slot [n], int64.

    On the CPU; ranges must lie within `children`.
    """
    there = (parents != NO_BLOCK).nonzero()[:, 0]
    first = child_ptr[there].long()
    sizes = child_ptr[there + 1].long() - first
    owner = torch.repeat_interleave(torch.arange(len(there)), sizes)
    within = torch.arange(len(owner)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return parents[there].long(), owner, children[first[owner] + within].long()


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
    """All blocks at once, with PyTorch's CPU operators. The slots are in range, and the blocks disjoint."""
    capacity = pages.shape[1]
    slots, owner, joined = split_blocks(parents, children, child_ptr)
    base, lengths = used[slots].long(), used[joined].long()
    total = base.new_zeros(len(slots)).index_add_(0, owner, lengths)
    broken = (base < 0) | (base > capacity)
    broken[owner[(lengths < 0) | (lengths > capacity)]] = True
    overflow = ~broken & (base + total > capacity)
    error |= ERROR_INVALID * int(broken.any()) | ERROR_OVERFLOW * int(overflow.any())

    merged = ~(broken | overflow)
    kept = merged[owner]
    owner, joined, lengths = owner[kept], joined[kept], lengths[kept]
    total = torch.where(merged, total, 0)
    highest = position[slots].scatter_reduce_(0, owner, position[joined], "amax")
    starts = lengths.cumsum(0) - lengths  # of each child among all entries that are copied
    within = torch.arange(int(lengths.sum())) - torch.repeat_interleave(starts, lengths)
    target = slots[owner] * capacity + base[owner] + starts - (total.cumsum(0) - total)[owner]
    to = torch.repeat_interleave(target, lengths) + within
    source = torch.repeat_interleave(joined * capacity, lengths) + within
    for table in (pages.view(-1), counts.view(-1)):
        table[to] = table[source]
    used[joined] = 0
    used[slots[merged]] = (base + total)[merged].int()
    position[slots[merged]] = highest[merged]
