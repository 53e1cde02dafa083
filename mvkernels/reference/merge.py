"""merge of page tables, entry by entry, by definition.

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
    """In place, block after block. pages, counts [B, C]; used, position [B]; error [1]; parents [M]; children [N];
    child_ptr [M + 1]. A parent of -1 stands for no block. A block that is refused changes nothing and sets its bit in
    `error`: INVALID for a slot, range or length that cannot be, OVERFLOW for more than C entries in the parent's row.
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
    """The bit of `error` for a block that cannot be merged, else 0."""
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
