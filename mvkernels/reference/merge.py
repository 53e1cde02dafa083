"""Merge of page tables by definition, entry by entry.

row(parent) = row(parent) + row(child 0) + row(child 1) + ...        used[child] = 0
position[parent] = max(position[parent], position[child 0], ...)
"""

from __future__ import annotations

import torch

OVERFLOW = 1
INVALID = 2


def merge(
    pages: torch.Tensor,
    counts: torch.Tensor,
    used: torch.Tensor,
    position: torch.Tensor,
    error: torch.Tensor,
    parents: torch.Tensor,
    children: torch.Tensor,
    child_ptr: torch.Tensor,
) -> None:
    """Merge page tables in place, block after block.

    A block that is refused changes nothing and sets a bit of `error`: INVALID for a slot, range or length out of range,
    OVERFLOW for more than C entries in the row of its parent.

    Args:
        pages: [B, C] page numbers.
        counts: [B, C] tokens in each page.
        used: [B] entries in use.
        position: [B] next position.
        error: [1] bits of refused blocks.
        parents: [M] slots; -1 stands for no block.
        children: [N] slots.
        child_ptr: [M + 1]; the children of block m are children[child_ptr[m]:child_ptr[m + 1]].
    """
    for block in range(len(parents)):
        parent = int(parents[block])
        if parent == -1:
            continue
        why = refusal(used, pages.shape[1], parent, children, int(child_ptr[block]), int(child_ptr[block + 1]))
        if why:
            error[0] = int(error[0]) | why
            continue
        for child in children[int(child_ptr[block]) : int(child_ptr[block + 1])].tolist():
            for entry in range(int(used[child])):
                pages[parent, int(used[parent])] = pages[child, entry]
                counts[parent, int(used[parent])] = counts[child, entry]
                used[parent] += 1
            used[child] = 0
            position[parent] = max(int(position[parent]), int(position[child]))


def refusal(used: torch.Tensor, capacity: int, parent: int, children: torch.Tensor, first: int, last: int) -> int:
    """Return the bit of `error` for a block that cannot be merged, else 0."""
    branches = range(len(used))
    if parent not in branches or not 0 <= first <= last <= len(children):
        return INVALID
    joined = children[first:last].tolist()
    if any(child not in branches or child == parent for child in joined):
        return INVALID
    lengths = [int(used[slot]) for slot in (parent, *joined)]
    if any(not 0 <= length <= capacity for length in lengths):
        return INVALID
    return OVERFLOW if sum(lengths) > capacity else 0
