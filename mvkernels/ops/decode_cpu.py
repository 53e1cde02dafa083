"""Tree decode on the CPU: PyTorch's own flash kernel on the keys of each task, merged by log-sum-exp.

    lse = log sum_t exp(lse_t);   out = sum_t exp(lse_t - lse) out_t       over the partial results t of a row

Keys that lie in one piece are used where they lie; scattered ones are gathered, and the short lists of many branches
are attended to by one call. The query heads that share a key-value head become rows of one problem, so that each key is
read once for all of them. The flash kernel works on (batch, head, block of rows) in parallel: where those are fewer
than the threads, long runs of keys are cut into a batch of parts. The order is fixed: the same step gives the same
bits with the same number of threads. Keys beyond a node's length are never read.

Batch-invariant: the flash kernel gives a row the same bits at each place of a block of 32 rows, but not in blocks of
another size, so that rows are padded to whole blocks, and each block is a problem of its own. Where a vector of
PyTorch's exp and log ends depends on the shape; so each entry's rows are merged apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mvkernels.ops.attention_cpu import accumulator_dtype, positive_scale
from mvkernels.ops.decode_invariant import invariant_tasks
from mvkernels.ops.decode_tasks import (
    DecodePath,
    DecodeTask,
    Int32Array,
    Int64Array,
    KeyRun,
    StepViews,
    build_tasks,
    page_slots,
)

# What a call costs, in tokens that are gathered and attended to meanwhile.
CALL_TOKENS = 256
# Sharing takes a call and the merge.
SHARE_TOKENS = 2 * CALL_TOKENS
PART_TOKENS = 512  # of a part at least: what the flash kernel takes at a time
BLOCK_ROWS = 32

Index = slice | torch.Tensor
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the flash kernel. `rows` of the step, and the slots of the keys that they attend to.

    parts     1, or how many parts the keys are cut into: a partial of each for every row
    causal    as many rows as keys, row i sees i + 1
    lists     the rows are of one list of keys each: slots [rows x longest], padded with slots of the same list
    bias      with lists of unequal lengths: [rows, 1, 1, longest] of 0, or -inf at the padding
    """

    rows: Index
    slots: Index
    num_rows: int
    parts: int = 1
    causal: bool = False
    lists: bool = False
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Merge:
    """Rows with the same number of partials: ids [partials of a row, rows], in the order in which they are merged."""

    rows: Index
    ids: torch.Tensor


@dataclass(frozen=True, eq=False)
class CallPlan:
    """The calls of a step, and the merges of their partial results; none where one call gives all rows in order."""

    calls: tuple[Call, ...]
    merges: tuple[Merge, ...]
    path: DecodePath
    blocks: bool


def decode_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    views: StepViews,
    scale: float,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [N, Hq, D] in q's dtype and lse [Hq, N] float32 (float64 for float64), natural log."""
    kv_heads = k_cache.shape[2]
    plan = plan_calls(views, q.shape[1] // kv_heads, kv_heads, batch_invariant)
    sign, scale = positive_scale(scale)
    q = q.contiguous() if sign == 1 else q.contiguous() * sign
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    found = [_attend(q, keys, values, call, plan.blocks, scale) for call in plan.calls]
    part, part_lse = found[0] if len(found) == 1 else (torch.cat(both) for both in zip(*found, strict=True))
    if not plan.merges:
        return part.to(q.dtype), part_lse.t().contiguous()
    part = part.to(accumulator_dtype(q.dtype))
    if len(plan.merges) == 1:
        out, lse = _merge(part, part_lse, plan.merges[0].ids)
    else:
        out, lse = torch.empty_like(q, dtype=part.dtype), torch.empty(q.shape[:2], dtype=part.dtype)
        for merge in plan.merges:
            out[merge.rows], lse[merge.rows] = _merge(part, part_lse, merge.ids)
    return out.to(q.dtype), lse.t().contiguous()


def _merge(part: torch.Tensor, part_lse: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """part [S, Hq, D], part_lse [S, Hq], ids [P, R] -> out [R, Hq, D], lse [R, Hq]."""
    if len(ids) == 1:
        return part[ids[0]], part_lse[ids[0]]
    if len(ids) == 2:
        (first, second), (lse, further) = (part[line] for line in ids), (part_lse[line] for line in ids)
        weight = torch.sigmoid(further - lse)
        return torch.lerp(first, second, weight[..., None]), torch.logaddexp(lse, further)
    lses = part_lse[ids]
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp_()
    out = part[ids[0]] * weights[0, ..., None]
    for place in range(1, len(ids)):  # one after the other: a sum over [P, R, Hq, D] would hold all of it
        out.addcmul_(part[ids[place]], weights[place, ..., None])
    return out, lse


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: Call, blocks: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partials of a call: out [parts x rows, Hq, D] and lse [parts x rows, Hq]."""
    rows = q[call.rows]
    count, heads, dim = rows.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    k, v = _take(keys, call), _take(values, call)  # [1, parts or lists, Hkv, L, D]
    if call.causal:
        out, lse = _flash(rows.transpose(0, 1)[None], k, v, 0.0, True, scale=scale)
        return out[0].transpose(0, 1), lse[0].t()
    if call.lists and not blocks:
        packed = rows.view(count, kv_heads, group, dim)
        out, lse = _flash(packed, k, v, 0.0, False, attn_mask=_bias(call, q), scale=scale)
        return out.reshape(count, heads, dim), lse.reshape(count, heads)
    # Row r, head h = kv_head * G + g  ->  row r * G + g of problem kv_head.
    packed = rows.view(count, kv_heads, group, dim).transpose(0, 1).reshape(1, kv_heads, count * group, dim)
    if blocks:
        packed, k, v = _in_blocks(packed, k, v)
    elif call.parts > 1:
        packed = packed.expand(call.parts, -1, -1, -1)
    out, lse = _flash(packed, k, v, 0.0, False, attn_mask=_bias(call, q), scale=scale)
    if blocks:
        out = out.transpose(0, 1).reshape(1, kv_heads, -1, dim)[:, :, : count * group]
        lse = lse.transpose(0, 1).reshape(1, kv_heads, -1)[:, :, : count * group]
    parts = call.parts
    out = out.reshape(parts, kv_heads, count, group, dim).transpose(1, 2).reshape(parts * count, heads, dim)
    return out, lse.reshape(parts, kv_heads, count, group).transpose(1, 2).reshape(parts * count, heads)


def _take(cache: torch.Tensor, call: Call) -> torch.Tensor:
    """The keys or values of a call, [1, parts or lists; Hkv; tokens; D]; a view where they lie in one piece."""
    _, heads, dim = cache.shape
    if isinstance(call.slots, torch.Tensor):
        found = cache.view(-1, heads * dim).index_select(0, call.slots)
        return found.view(call.num_rows if call.lists else 1, -1, heads, dim).transpose(1, 2)
    found = cache[call.slots]
    if call.parts == 1:
        return found.transpose(0, 1)[None]
    step, length = part_lengths(len(found), call.parts)
    token = heads * dim
    return found.as_strided((call.parts, heads, length, dim), (step * token, dim, token, 1))


def _bias(call: Call, q: torch.Tensor) -> torch.Tensor | None:
    return None if call.bias is None else call.bias.to(q.dtype)


def _in_blocks(
    packed: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, Hkv, rows, D] -> [blocks, Hkv, 32, D], the last block padded; each reads the same keys."""
    _, heads, rows, dim = packed.shape
    blocks = -(-rows // BLOCK_ROWS)
    packed = torch.nn.functional.pad(packed[0], (0, 0, 0, blocks * BLOCK_ROWS - rows))
    packed = packed.view(heads, blocks, BLOCK_ROWS, dim).transpose(0, 1)
    return packed, k.expand(blocks, -1, -1, -1), v.expand(blocks, -1, -1, -1)


# -- the plan ----------------------------------------------------------------------------------------------------


def plan_calls(views: StepViews, group: int, kv_heads: int, batch_invariant: bool = False) -> CallPlan:
    """What `decode_cpu` does for a step, made once for all layers."""
    threads = torch.get_num_threads()

    def build() -> CallPlan:
        if batch_invariant:
            tasks = invariant_tasks(views.entries, views.page_size)
            calls = [call for task in tasks for call in task_calls(task, views.page_size)]
        else:
            tasks = build_tasks(views.entries, _worth_sharing)
            calls = _in_lists(tasks, views.page_size)
            calls = [_in_parts(call, group, kv_heads, threads) for call in calls]
        entries = [view.num_rows for view in views.entries] if batch_invariant else [views.total_rows]
        merges = _plan_merges(calls, np.repeat(np.arange(len(entries)), entries))
        shared = any(task.shared for task in tasks)
        direct = sum(call.num_rows * call.parts for call in calls) == views.total_rows
        path: DecodePath = "shared" if shared else "direct" if direct else "split"
        return CallPlan(tuple(calls), merges, path, batch_invariant)

    return views.cached(("cpu", group, kv_heads, threads, batch_invariant), build)


def _worth_sharing(rows: Sequence[int], runs: Sequence[KeyRun]) -> bool:
    return (len(rows) - 1) * sum(run.tokens for run in runs) >= SHARE_TOKENS


def task_calls(task: DecodeTask, page_size: int) -> list[Call]:
    """The calls that a task takes. A causal task is the keys that all rows see, a square in which row i sees i + 1 keys
    and, where the rows are more than the new keys, those keys for the rows after it.
    """
    slots = page_slots(task.pages, task.counts, page_size)
    if task.base is None:
        return [_call(task.rows, part) for part in _split(slots)]
    before, first = max(task.base, 0), max(-task.base, 0)  # keys that all rows see, and rows that see none
    calls = [_call(task.rows, part) for part in _split(slots[:before])]
    square = slots[before : before + len(task.rows) - first]
    last = first + len(square)
    calls.append(_call(task.rows[first:last], _index(square), causal=True))
    if last < len(task.rows):
        calls += [_call(task.rows[last:], part) for part in _split(square)]
    return calls


def _call(rows: Int32Array, slots: Index, causal: bool = False) -> Call:
    return Call(_index(rows.astype(np.int64)), slots, len(rows), causal=causal)


def _in_lists(tasks: Sequence[DecodeTask], page_size: int) -> list[Call]:
    """The calls of all tasks. Tasks of one row and few keys are put together: longest first, while padding is cheap."""
    calls, short = [], []
    for task in tasks:
        if len(task.rows) == 1 and task.base is None and task.tokens < 2 * CALL_TOKENS:
            short.append(task)
        else:
            calls += task_calls(task, page_size)
    short.sort(key=lambda task: -task.tokens)
    while short:
        longest = short[0].tokens
        taken = 1
        while taken < len(short) and (len(short) - taken) * (longest - short[taken].tokens) <= CALL_TOKENS:
            taken += 1
        part, short = short[:taken], short[taken:]
        calls += [_lists_call(part, longest, page_size)] if taken > 1 else task_calls(part[0], page_size)
    return calls


def _lists_call(tasks: Sequence[DecodeTask], longest: int, page_size: int) -> Call:
    rows = np.concatenate([task.rows for task in tasks]).astype(np.int64)
    lengths = np.array([task.tokens for task in tasks])
    slots = np.empty((len(tasks), longest), dtype=np.int64)
    for line, task in zip(slots, tasks, strict=True):
        found = page_slots(task.pages, task.counts, page_size)
        line[: len(found)] = found
        line[len(found) :] = found[-1]
    bias = None
    if lengths.min() < longest:
        hidden = torch.from_numpy(np.arange(longest) >= lengths[:, None])
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
    return Call(_index(rows), torch.from_numpy(slots.reshape(-1)), len(rows), lists=True, bias=bias)


def _in_parts(call: Call, group: int, kv_heads: int, threads: int) -> Call:
    """Cuts the keys of a call that would leave threads idle."""
    if call.causal or call.lists or not isinstance(call.slots, slice):
        return call
    tokens = call.slots.stop - call.slots.start
    parts = min(-(-threads // (kv_heads * -(-call.num_rows * group // BLOCK_ROWS))), tokens // PART_TOKENS)
    if parts < 2:
        return call
    step, length = part_lengths(tokens, parts)
    bias = None
    if length > step:
        bias = torch.zeros(parts, 1, 1, length)
        bias[:-1, ..., step:] = -torch.inf
    return Call(call.rows, call.slots, call.num_rows, parts, bias=bias)


def part_lengths(tokens: int, parts: int) -> tuple[int, int]:
    """(from one part's first key to the next one's, keys in a part): the last part has what is left over."""
    step = tokens // parts
    return step, tokens - (parts - 1) * step


def _plan_merges(calls: Sequence[Call], groups: Int64Array) -> tuple[Merge, ...]:
    """Rows by their number of partials, those of each group apart; groups [N] ascend. Nothing where the partials are
    the rows, in order.
    """
    total_rows = len(groups)
    rows = [np.arange(total_rows)[_array(call.rows)] for call in calls]
    by_row = np.concatenate([np.tile(part, call.parts) for part, call in zip(rows, calls, strict=True)])
    if len(by_row) == total_rows and bool((by_row == np.arange(total_rows)).all()):
        return ()
    order = np.argsort(by_row, kind="stable")  # stable: in the order of the calls
    counts = np.bincount(by_row, minlength=total_rows)
    first = np.cumsum(counts) - counts
    merges = []
    for group, count in np.unique(np.stack([groups, counts]), axis=1).T:
        chosen = np.flatnonzero((groups == group) & (counts == count))
        ids = order[first[chosen] + np.arange(count)[:, None]]
        merges.append(Merge(_index(chosen), torch.from_numpy(ids)))
    return tuple(merges)


def _array(index: Index) -> slice | Int64Array:
    return index if isinstance(index, slice) else index.numpy()


def _split(slots: Int64Array) -> list[Index]:
    """Long runs of consecutive slots as slices, all others together as one index."""
    if not len(slots):
        return []
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(slots) != 1) + 1, [len(slots)]])
    lengths = np.diff(bounds)
    if len(lengths) == 1:
        return [_index(slots)]
    parts = [_index(slots[bounds[run] : bounds[run + 1]]) for run in np.flatnonzero(lengths >= CALL_TOKENS)]
    short = np.repeat(lengths < CALL_TOKENS, lengths)
    return [*parts, _index(slots[short])] if short.any() else parts


def _index(numbers: Int32Array | Int64Array) -> Index:
    """A slice where the numbers are consecutive, else the numbers."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == len(numbers) and bool((np.diff(numbers) == 1).all()):
        return slice(first, last + 1)
    return torch.from_numpy(np.ascontiguousarray(numbers))
