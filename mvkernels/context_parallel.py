"""Context parallelism: one long row over several processes; each computes some of the query tiles.

Rows are cut into tiles. Every process gets the same number of tiles (or one less), chosen so that all have about the
same number of visible keys. Keys and values are gathered; queries stay. A process calls the one-process attention with
a mask that is the layout's for its own rows. In the tiles of other processes a row sees only its tile: one diagonal
block per tile, whose outputs and gradients are dropped. The gradients of keys and values are summed over the processes.

Communication per layer: one all-gather of keys and values in the forward, one all-reduce of their gradients in the
backward. Each process needs memory for all T rows of q, k, v and out.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from mvkernels.errors import described
from mvkernels.layout import BranchLayout
from mvkernels.mask import IntervalMask

TILE_ROWS = 256


@dataclass(frozen=True, eq=False)
class ContextSplit:
    """The rows that each process computes.

    Attributes:
        rows: For each rank its rows, [T_r] int64, ascending.
        pairs: For each rank the number of (row, key) pairs that it computes.
        masks: For each rank the mask of its forward.
    """

    rows: tuple[npt.NDArray[np.int64], ...]
    pairs: tuple[int, ...]
    masks: tuple[IntervalMask, ...]


def split_context(layout: BranchLayout, ranks: int, tile_rows: int = TILE_ROWS) -> ContextSplit:
    """Split the rows of a layout over processes, balanced by visible keys; the same result on every process.

    Process r passes `x[split.rows[r]]` of every tensor with one row per token: ids, positions, q, k, v. For equal
    shapes on all ranks, the number of tiles (layout.total_tokens / tile_rows) should be a multiple of `ranks`.

    Args:
        layout: The whole layout, of T tokens.
        ranks: Number of processes, at least 1.
        tile_rows: Rows of a tile, at least 1.

    Returns:
        The rows of each rank.

    Raises:
        ValueError: There are fewer tiles than ranks, or `ranks` is below 1.
    """
    tokens = layout.total_tokens
    starts = np.arange(0, tokens, max(tile_rows, 1))
    if ranks < 1 or tile_rows < 1 or len(starts) < ranks:
        raise ValueError(
            f"expected at least one tile of {tile_rows} rows for each of {ranks} ranks, got {tokens} tokens"
        )
    return layout.cached(("context split", ranks, tile_rows), lambda: _split(layout.mask, starts, ranks))


def _split(mask: IntervalMask, starts: npt.NDArray[np.int64], ranks: int) -> ContextSplit:
    ends = np.append(starts[1:], mask.total_tokens)
    costs = np.add.reduceat(_visible_keys(mask), starts)
    most = -(-len(starts) // ranks)
    owners = np.zeros(len(starts), dtype=np.int64)
    counts = [0] * ranks
    heap = [(0, rank) for rank in range(ranks)]
    for tile in np.argsort(-costs, kind="stable"):
        cost, rank = heapq.heappop(heap)
        owners[tile] = rank
        counts[rank] += 1
        if counts[rank] < most:
            heapq.heappush(heap, (cost + int(costs[tile]), rank))
    owner_of_row = np.repeat(owners, ends - starts)
    rows = tuple(np.flatnonzero(owner_of_row == rank) for rank in range(ranks))
    pairs = tuple(int(costs[owners == rank].sum()) for rank in range(ranks))
    masks = tuple(_part(mask, starts, owners == rank) for rank in range(ranks))
    return ContextSplit(rows, pairs, masks)


def _visible_keys(mask: IntervalMask) -> npt.NDArray[np.int64]:
    """Count the keys that each row sees, [T]."""
    widths = np.diff(mask.gaps, axis=1).reshape(-1).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(widths)])
    hidden = before[mask.gap_ptr[1:]] - before[mask.gap_ptr[:-1]]
    offset = np.repeat(mask.first_key + hidden, np.diff(mask.segment_starts))
    visible: npt.NDArray[np.int64] = np.arange(1, mask.total_tokens + 1) - offset
    return visible


def _part(mask: IntervalMask, starts: npt.NDArray[np.int64], own: npt.NDArray[np.bool_]) -> IntervalMask:
    """Restrict a mask to the tiles that are `own`; in other tiles a row sees the rows of its tile up to itself."""
    cuts = np.unique(np.concatenate([mask.segment_starts, starts]))
    segments = np.searchsorted(mask.segment_starts, cuts[:-1], side="right") - 1
    tiles = np.searchsorted(starts, cuts[:-1], side="right") - 1
    kept = own[tiles]
    counts = np.where(kept, np.diff(mask.gap_ptr)[segments], 0)
    gaps = [mask.gaps[mask.gap_ptr[s] : mask.gap_ptr[s + 1]] for s, keep in zip(segments, kept, strict=True) if keep]
    return IntervalMask(
        segment_starts=cuts.astype(np.int32),
        first_key=np.where(kept, mask.first_key[segments], starts[tiles]).astype(np.int32),
        gap_ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        gaps=np.concatenate([np.empty((0, 2), np.int32), *gaps]).astype(np.int32),
        total_tokens=mask.total_tokens,
    )


class GatheredInputs(NamedTuple):
    """Inputs of the attention of one process: q, k, v [T, heads, D], where rows of q from other processes are zero.

    layout: its mask is the whole layout's for this process's rows, and their own tile for other rows.
    rows: [T_r] int64, the rows of this process.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: BranchLayout
    rows: torch.Tensor


def gather_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BranchLayout, group: dist.ProcessGroup
) -> GatheredInputs:
    """Gather keys and values over the group; in the backward, the gradients of each rank's rows return to it.

    Args:
        q: [T_r, Hq, D], the rows of this rank (`split_context`).
        k: [T_r, Hkv, D], as v.
        v: [T_r, Hkv, D].
        layout: The whole layout, of T tokens.
        group: The processes; all must make the call.

    Returns:
        Inputs of T rows for the attention of this process.

    Raises:
        ValueError: A shape or dtype does not fit.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    split = split_context(layout, ranks)
    own = len(split.rows[rank])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[0] != own:
            expected = f"[{own}, heads, head_dim], the rows of rank {rank} of {ranks} (split_context)"
            got = list(x.shape) if isinstance(x, torch.Tensor) else described(x)
            raise ValueError(f"{name}: expected shape {expected}, got {got}")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"expected k and v of one shape and dtype, got {list(k.shape)} and {list(v.shape)}")
    part = layout.cached(
        ("context layout", ranks, rank, str(layout.device)), lambda: replace(layout, mask=split.masks[rank], _made=None)
    )
    rows = torch.from_numpy(split.rows[rank]).to(q.device)
    heads = k.shape[1]
    everything: torch.Tensor = _Gather.apply(torch.cat([k, v], dim=1), split, group)  # type: ignore[no-untyped-call]
    whole = q.new_zeros((layout.total_tokens, *q.shape[1:])).index_copy(0, rows, q)
    return GatheredInputs(whole, everything[:, :heads], everything[:, heads:], part, rows)


class _Gather(torch.autograd.Function):
    """[T_r, H, D] of each rank -> [T, H, D] on all ranks, in the layout's order; the backward sums their gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, split: ContextSplit, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.split, ctx.group = split, group
        most = max(map(len, split.rows))
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, most - len(x))).contiguous()
        parts = [torch.empty_like(padded) for _ in split.rows]
        dist.all_gather(parts, padded, group=group)
        out = x.new_empty((sum(map(len, split.rows)), *x.shape[1:]))
        for rows, part in zip(split.rows, parts, strict=True):
            out[torch.from_numpy(rows).to(x.device)] = part[: len(rows)]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # A sum over all ranks, of which each rank keeps its rows: every backend of torch.distributed has all_reduce.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        rows = ctx.split.rows[dist.get_rank(ctx.group)]
        return total[torch.from_numpy(rows).to(total.device)], None, None
