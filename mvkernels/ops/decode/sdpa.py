"""Tree decode by PyTorch's flash kernel for CPUs: gather the keys of each task, attend, merge by log-sum-exp.

    lse = log sum_t exp(lse_t);   out = sum_t exp(lse_t - lse) out_t       over the partial results t of a row

For CPUs without a C++ compiler, and for fp64. Keys that several entries see are read once. The order of merging is
fixed: the same step gives the same bits with the same number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mvkernels.ops.attention.cpu import positive_scale
from mvkernels.ops.decode.tasks import DecodePath, DecodeTask, Int32Array, Int64Array, StepViews, run_slots

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the kernel: rows [R] and slots [L], int64. Consecutive slots are a slice: keys are not copied.

    causal: R = L, and row i sees the first i + 1 keys.
    """

    rows: torch.Tensor
    slots: torch.Tensor | slice
    causal: bool = False


def decode_sdpa(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, views: StepViews, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of the rows of a step over all keys that they see.

    Args:
        q: [N, Hq, D].
        k_cache: [num_pages, page_size, Hkv, D], as v_cache.
        v_cache: Values, in the same pages.
        views: What each entry of the step sees.
        scale: Of the scores.

    Returns:
        out [N, Hq, D] in q's dtype and lse [Hq, N] float32 (float64 for float64), natural log.
    """
    calls, _ = plan_calls(views)
    sign, scale = positive_scale(scale)
    keys, values = (cache.view(-1, *cache.shape[2:]) for cache in (k_cache, v_cache))
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape, dtype=dtype)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
    for call in calls:
        part, part_lse = _attend(sign * q[call.rows], keys[call.slots], values[call.slots], call.causal, scale)
        part, part_lse = part.to(dtype), part_lse.to(dtype)
        known = lse[call.rows]
        merged = torch.logaddexp(known, part_lse)
        old, new = (known - merged).exp()[..., None], (part_lse - merged).exp()[..., None]
        out[call.rows] = out[call.rows] * old + part * new
        lse[call.rows] = merged
    return out.to(q.dtype), lse.T


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [R, Hq, D], k and v [L, Hkv, D] -> out [R, Hq, D] and lse [R, Hq].

    Unless causal, the query heads that share a key-value head become rows, so that each key is read once for all.
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if causal:
        out, lse = _flash(q.transpose(0, 1)[None], k, v, 0.0, True, scale=scale)
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    q = q.view(rows, kv_heads, -1, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
    out, lse = _flash(q, k, v, 0.0, False, scale=scale)
    out, lse = out.view(kv_heads, rows, -1, dim), lse.view(kv_heads, rows, -1)
    return out.transpose(0, 1).reshape(rows, heads, dim), lse.transpose(0, 1).reshape(rows, heads)


def plan_calls(views: StepViews) -> tuple[list[Call], DecodePath]:
    """Return the calls of a step, made once for all layers, and its path."""
    return views.cached("sdpa", lambda: _plan(views))


def _plan(views: StepViews) -> tuple[list[Call], DecodePath]:
    tasks = views.tasks()
    calls = [call for task in tasks for call in _task_calls(task, views.page_size)]
    if any(task.shared for task in tasks):
        return calls, "shared"
    return calls, "direct" if sum(len(call.rows) for call in calls) == views.total_rows else "split"


def _task_calls(task: DecodeTask, page_size: int) -> list[Call]:
    """A causal task is the keys that all rows see, a square, and those keys again for the rows after the square."""
    slots = run_slots(task.runs, page_size)
    if task.base is None:
        return [_call(task.rows, slots)]
    before, first = max(task.base, 0), max(-task.base, 0)  # keys that all rows see, and rows that see none
    square = slots[before : before + len(task.rows) - first]
    last = first + len(square)
    calls = [_call(task.rows, slots[:before]), _call(task.rows[first:last], square, causal=True)]
    if last < len(task.rows):
        calls.append(_call(task.rows[last:], square))
    return calls if before else calls[1:]


def _call(rows: Int32Array, slots: Int64Array, causal: bool = False) -> Call:
    index = torch.from_numpy(rows.astype(np.int64))
    if len(slots) and bool((np.diff(slots) == 1).all()):
        return Call(index, slice(int(slots[0]), int(slots[-1]) + 1), causal)
    return Call(index, torch.from_numpy(slots), causal)
