"""Tree decode on the CPU: PyTorch's own flash kernel on the keys of each task, merged by log-sum-exp.

    lse = log sum_t exp(lse_t);   out = sum_t exp(lse_t - lse) out_t       over the partial results t of a row

`ops.decode.calls` plans the calls of a step, once for all layers. Keys that lie in one piece are used where they lie;
scattered ones are gathered, and the short lists of many branches are attended to by one call. The query heads that
share a key-value head become rows of one problem, so that each key is read once for all of them. Keys beyond a node's
length are never read. The order is fixed: the same step gives the same bits with the same number of threads.

This is for where native.py cannot run: without a C++ compiler, and in fp64. Where the time goes: of the 2.3 ms of
8 branches on 8192 shared and 256 own tokens (8 query and 2 key-value heads of 64, fp32, caches overwritten before, two
cores with AVX-512) 1.6 are the kernel on the shared keys, of which 1.1 stay when they are in the caches; 0.4 are the
own lists, gathered and attended to, and the rest is the dispatch of small ops, whose code is cold as well.

Inside, rows are [R, G, Hkv, D] (head = kv_head * G + g): so the kernel writes them, whichever way they were packed.
"""

from __future__ import annotations

import torch

from mvkernels.ops.attention.cpu import positive_scale
from mvkernels.ops.decode.calls import BLOCK_ROWS, Call, CallPlan, part_lengths, plan_calls
from mvkernels.ops.decode.tasks import StepViews

MERGE_NUMBERS = 2**20  # partial results that a merge holds at once

Partials = tuple[torch.Tensor, torch.Tensor]
Merged = tuple[torch.Tensor, torch.Tensor | None]
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def decode_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    views: StepViews,
    scale: float,
    batch_invariant: bool = False,
    with_lse: bool = True,
) -> Merged:
    """out [N, Hq, D] in q's dtype; with_lse also lse [Hq, N] float32 (float64 for float64), natural log, else None."""
    rows, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    plan = plan_calls(views, group, kv_heads, batch_invariant)
    sign, scale = positive_scale(scale)
    dtype = q.dtype
    # Each op that is not needed counts: in a model the code of every op comes from memory, 10 to 30 us for the first.
    if not q.is_contiguous():
        q = q.contiguous()
    if sign != 1:
        q = q * sign
    q = q.view(rows, kv_heads, group, dim)
    found = [_attend(q, k_cache, v_cache, call, plan, scale) for call in plan.calls]
    out, lse = _merge(found, plan, rows, with_lse)
    out = out.transpose(1, 2).reshape(rows, heads, dim)
    if out.dtype != dtype:
        out = out.to(dtype)
    return out, lse.permute(2, 1, 0).reshape(heads, rows) if with_lse and lse is not None else None


# -- calls -------------------------------------------------------------------------------------------------------


def _attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, call: Call, plan: CallPlan, scale: float
) -> Partials:
    """q [N, Hkv, G, D]. Partials of a call: out [parts x rows, G, Hkv, D] and lse [parts x rows, G, Hkv]."""
    count, parts = call.num_rows, call.parts
    rows = q if count == len(q) and isinstance(call.rows, slice) else q[call.rows]
    _, kv_heads, group, dim = rows.shape
    k, v = _take(k_cache, call, plan, 0), _take(v_cache, call, plan, 1)  # [parts or lists or 1, Hkv, L, D]
    if call.causal:
        out, lse = _flash(rows.view(count, -1, dim).transpose(0, 1)[None], k, v, 0.0, True, scale=scale)
        out, lse = out[0].view(kv_heads, group, count, dim), lse[0].view(kv_heads, group, count)
        return out.permute(2, 1, 0, 3), lse.permute(2, 1, 0)
    bias = None if call.bias is None else call.bias.to(q.dtype)
    batched = call.lists or count == 1
    if not batched:  # row r, head h = kv_head * G + g  ->  row r * G + g of problem kv_head
        rows = rows.transpose(0, 1).reshape(1, kv_heads, count * group, dim)
    if plan.cut is None:
        out, lse = _attend_in_blocks(rows, k, v, scale)
    else:
        rows = rows if parts == 1 else rows.expand(parts, -1, -1, -1)
        out, lse = _flash(rows, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if batched:
        return out.transpose(1, 2), lse.transpose(1, 2)
    shape = (parts * count, group, kv_heads)
    return out.transpose(1, 2).reshape(*shape, dim), lse.transpose(1, 2).reshape(shape)


def _take(cache: torch.Tensor, call: Call, plan: CallPlan, which: int) -> torch.Tensor:
    """The keys (which 0) or values (1) of a call, [parts, lists or 1; Hkv; tokens; D]; a view where they lie so."""
    heads, dim = cache.shape[2:]
    token = heads * dim
    if isinstance(call.slots, torch.Tensor):
        space = plan.space(which, cache)[: len(call.slots)]
        torch.index_select(cache.view(-1, token), 0, call.slots, out=space)
        batch = call.num_rows if call.lists else 1
        return space.view(batch, len(call.slots) // batch, heads, dim).transpose(1, 2)
    first = cache.storage_offset() + call.slots.start * token
    step, length = part_lengths(call.slots.stop - call.slots.start, call.parts)
    return cache.as_strided((call.parts, heads, length, dim), (step * token, dim, token, 1), first)


def _attend_in_blocks(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Partials:
    """The same bits for a row whatever else is there: rows [B, Hkv, R, D] are padded to blocks of 32 rows, and each
    block is a problem of its own. k, v [P, Hkv, L, D]: B lists, or P parts for the rows of B = 1.

    The kernel gives a row the same bits at each place of a block, but not in blocks of another size. Where there is one
    problem in all, it runs outside the threads of the others, and the multiplication of 16-bit types takes another way
    (seen with AVX512_BF16), which sums in another order: so there are never less than two.
    """
    batch, heads, count, dim = rows.shape
    blocks = -(-count // BLOCK_ROWS)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, blocks * BLOCK_ROWS - count))
    if batch > 1 or blocks == 1:  # lists of one block each, or one block for all parts
        found = [_two_or_more(rows.expand(len(k), -1, -1, -1), k, v, scale)]
    else:
        rows = rows.view(heads, blocks, BLOCK_ROWS, dim).transpose(0, 1)
        if len(k) == 1:
            out, lse = _two_or_more(rows, k.expand(blocks, -1, -1, -1), v.expand(blocks, -1, -1, -1), scale)
            found = [(out[i : i + 1], lse[i : i + 1]) for i in range(blocks)]
        else:
            found = [_two_or_more(block.expand(len(k), -1, -1, -1), k, v, scale) for block in rows]
    if len(found) == 1:
        ((out, lse),) = found
    else:
        out, lse = (torch.cat(both, 2) for both in zip(*found, strict=True))
    return out[:, :, :count], lse[:, :, :count]


def _two_or_more(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Partials:
    if rows.shape[0] * rows.shape[1] > 1:
        return _flash(rows, k, v, 0.0, False, scale=scale)  # type: ignore[no-any-return]
    out, lse = _flash(*(x.expand(2, -1, -1, -1) for x in (rows, k, v)), 0.0, False, scale=scale)
    return out[:1], lse[:1]


# -- merges ------------------------------------------------------------------------------------------------------


def _merge(found: list[Partials], plan: CallPlan, total_rows: int, with_lse: bool) -> Merged:
    """out [N, G, Hkv, D] and, with_lse, lse [N, G, Hkv] of the partials of all calls."""
    if plan.stacked == 1:
        return found[0]
    if found[0][0].dtype != found[0][1].dtype:  # 16 bit
        found = [(out.to(lse.dtype), lse) for out, lse in found]
    if plan.stacked == 2 == len(found):
        return _merge_two(*found[0], *found[1], with_lse)
    part, part_lse = found[0] if len(found) == 1 else (torch.cat(both) for both in zip(*found, strict=True))
    if plan.stacked:
        shape = (plan.stacked, total_rows)
        return _merge_many(part.view(*shape, *part.shape[1:]), part_lse.view(*shape, *part_lse.shape[1:]), with_lse)
    out = part.new_empty(total_rows, *part.shape[1:])
    lse = part_lse.new_empty(total_rows, *part_lse.shape[1:]) if with_lse else None
    for merge in plan.merges:
        out[merge.rows], merged = _merge_ids(part, part_lse, merge.ids, with_lse)
        if lse is not None and merged is not None:
            lse[merge.rows] = merged
    return out, lse


def _merge_ids(part: torch.Tensor, part_lse: torch.Tensor, ids: torch.Tensor, with_lse: bool) -> Merged:
    """part [S, G, Hkv, D], part_lse [S, G, Hkv], ids [P, R] -> out [R, G, Hkv, D], lse [R, G, Hkv]."""
    partials, rows = ids.shape
    if partials == 1:
        return part[ids[0]], part_lse[ids[0]]
    if partials == 2:
        first, second = ids
        return _merge_two(part[first], part_lse[first], part[second], part_lse[second], with_lse)
    step = max(1, MERGE_NUMBERS // (partials * part[0].numel()))
    pieces = [ids[:, first : first + step] for first in range(0, rows, step)]
    found = [_merge_many(part[piece], part_lse[piece], with_lse) for piece in pieces]
    if len(found) == 1:
        return found[0]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found if lse is not None])


def _merge_two(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, with_lse: bool
) -> Merged:
    weight = (other_lse - lse).sigmoid_()
    return torch.lerp(out, other, weight[..., None]), torch.logaddexp(lse, other_lse) if with_lse else None


def _merge_many(part: torch.Tensor, part_lse: torch.Tensor, with_lse: bool) -> Merged:
    """part [P, R, G, Hkv, D], part_lse [P, R, G, Hkv] -> out [R, G, Hkv, D], lse [R, G, Hkv]."""
    weights = part_lse.softmax(0)
    return (part * weights[..., None]).sum(0), part_lse.logsumexp(0) if with_lse else None
