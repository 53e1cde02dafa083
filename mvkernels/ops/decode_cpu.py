"""Tree decode on the CPU: PyTorch's own flash kernel on the keys of each task, merged by log-sum-exp.

    lse = log sum_t exp(lse_t);   out = sum_t exp(lse_t - lse) out_t       over the pieces t that a row attends to

Keys that lie in one piece are used where they lie; short scattered runs are gathered. The query heads that share a
key-value head become rows of one problem, so that each key is read once for all of them. Pieces are merged in one
fixed order: the same step gives the same bits. Keys beyond a node's length are never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mvkernels.ops.attention_cpu import accumulator_dtype, positive_scale
from mvkernels.ops.decode_tasks import DecodeTask, Int32Array, Int64Array, StepViews, page_slots

# Runs of consecutive slots shorter than this are copied together instead of being attended to one by one: a call costs
# some 30 us, about what copying 256 tokens of 2 heads of 128 costs.
VIEW_TOKENS = 256

Index = slice | torch.Tensor
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, eq=False)
class Piece:
    """One call: these rows attend to the keys in these slots; `causal`: as many rows as keys, row i sees i + 1."""

    rows: Index
    slots: Index
    causal: bool


def decode_cpu(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, views: StepViews, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [N, Hq, D] in q's dtype and lse [Hq, N] float32 (float64 for float64), natural log."""
    pieces = views.cached("cpu pieces", lambda: [piece for task in views.tasks() for piece in plan_pieces(task, views)])
    sign, scale = positive_scale(scale)
    q = q.contiguous() if sign == 1 else q.contiguous() * sign
    keys, values = (cache.view(-1, *cache.shape[2:]) for cache in (k_cache, v_cache))
    accumulate = accumulator_dtype(q.dtype)
    out = torch.zeros(q.shape, dtype=accumulate)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=accumulate)
    for piece in pieces:
        part, part_lse = _attend(q[piece.rows], keys[piece.slots], values[piece.slots], piece.causal, scale)
        before = lse[piece.rows]
        after = torch.logaddexp(before, part_lse)
        out[piece.rows] = out[piece.rows] * _weight(before - after) + part * _weight(part_lse - after)
        lse[piece.rows] = after
    return out.to(q.dtype), lse.t().contiguous()


def _weight(log: torch.Tensor) -> torch.Tensor:
    return log.exp()[..., None]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [R, Hq, D], k and v [L, Hkv, D] -> out [R, Hq, D], lse [R, Hq]."""
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # [1, Hkv, L, D]
    if causal:
        out, lse = _flash(q.transpose(0, 1)[None], k, v, 0.0, True, scale=scale)
        return out[0].transpose(0, 1), lse[0].t()
    # Row r, head h = kv_head * G + g  ->  row r * G + g of problem kv_head.
    packed = q.view(rows, kv_heads, heads // kv_heads, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
    out, lse = _flash(packed, k, v, 0.0, False, scale=scale)
    out = out[0].view(kv_heads, rows, -1, dim).transpose(0, 1).reshape(rows, heads, dim)
    return out, lse[0].view(kv_heads, rows, -1).transpose(0, 1).reshape(rows, heads)


def plan_pieces(task: DecodeTask, views: StepViews) -> list[Piece]:
    """The calls that a task takes. A causal task is the tokens before the step, and a causal square of the new ones."""
    rows = _index(task.rows.astype(np.int64))
    slots = page_slots(task.pages, task.counts, views.page_size)
    if task.base is None:
        return [Piece(rows, part, False) for part in _split(slots)]
    before = [Piece(rows, part, False) for part in _split(slots[: task.base])]
    return [*before, Piece(rows, _index(slots[task.base :]), True)]


def _split(slots: Int64Array) -> list[Index]:
    """Long runs of consecutive slots as slices, all others together as one index."""
    if not len(slots):
        return []
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(slots) != 1) + 1, [len(slots)]])
    lengths = np.diff(bounds)
    if len(lengths) == 1:
        return [_index(slots)]
    parts = [_index(slots[bounds[run] : bounds[run + 1]]) for run in np.flatnonzero(lengths >= VIEW_TOKENS)]
    short = np.repeat(lengths < VIEW_TOKENS, lengths)
    return [*parts, _index(slots[short])] if short.any() else parts


def _index(numbers: Int32Array | Int64Array) -> Index:
    """A slice where the numbers are consecutive, else the numbers."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == len(numbers) and bool((np.diff(numbers) == 1).all()):
        return slice(first, last + 1)
    return torch.from_numpy(np.ascontiguousarray(numbers))
