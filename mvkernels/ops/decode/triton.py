"""Tree decode in Triton: one launch over (work item, kv head), one fixed-order merge; no atomics: reproducible bits.

If every row has one partial, the first launch writes the result, and there is no second.

    partial: m = max_t s_t, l = sum_t 2^(s_t - m), out = sum_t 2^(s_t - m) v_t / l, lse2 = m + log2(l)
             with s_t = scale log2(e) q . k_t over the lanes t of a chunk that a row sees; without any: 0, -inf
    merge:   lse2 = log2 sum_p 2^lse2_p,  out = sum_p 2^(lse2_p - lse2) out_p,  lse = ln(2) lse2

q, out [N, Hq, D]; k, v [pages, page_size, Hkv, D]; partial out [S, Hq, D] and lse2 [S, Hq], fp32; all contiguous.
A tile packs rows and the query heads of one kv head: line m of a tile is head m % GROUP of row m // GROUP.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from mvkernels.ops.decode.cost_model import Shape, plan_decode
from mvkernels.ops.decode.tables import DecodeTables, build_tables
from mvkernels.ops.decode.tasks import StepViews

LOG2_E = math.log2(math.e)
MERGE_BLOCK = 8  # partials that a program merges at a time
ADVANCE_BLOCK = 128


@triton.jit(do_not_specialize=["num_rows"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, work_ptr, pages_ptr, counts_ptr, rows_ptr, scale_log2, num_rows,
    HQ: tl.constexpr, HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """DIRECT: part and part_lse are the step's out and lse, natural log; else partial results.

    An item without lanes gives its rows 0 and -inf; one without rows loads and stores nothing. Tables of fixed capacity
    have such items. A branch around the rest would cost registers, and with them occupancy.
    """
    item_ptr = work_ptr + tl.program_id(0) * 8
    kv_head = tl.program_id(1)
    first_page = tl.load(item_ptr + 0)
    first_lane = tl.load(item_ptr + 1)
    end_lane = tl.load(item_ptr + 2)
    first_row = tl.load(item_ptr + 3)
    tile_rows = tl.load(item_ptr + 4)
    limit = tl.load(item_ptr + 5)
    first_partial = tl.load(item_ptr + 6)

    m = tl.arange(0, BLOCK_M)
    r = m // GROUP  # [BLOCK_M], row within the tile
    head = kv_head * GROUP + m % GROUP
    live = r < tile_rows
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    row = tl.load(rows_ptr + first_row + r, mask=live, other=0).to(tl.int64)
    q_mask = live[:, None] & in_d[None, :]
    q = tl.load(q_ptr + (row * HQ + head)[:, None] * D + d[None, :], mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(first_lane, end_lane, BLOCK_N):
        lane = start + tl.arange(0, BLOCK_N)
        in_chunk = lane < end_lane
        place = lane // PAGE_SIZE
        offset = lane - place * PAGE_SIZE
        page = tl.load(pages_ptr + first_page + place, mask=in_chunk, other=0).to(tl.int64)
        count = tl.load(counts_ptr + first_page + place, mask=in_chunk, other=0)
        written = in_chunk & (offset < count)
        # int64: a cache may hold more than 2**31 elements. Lanes without a key are masked.
        at = ((page * PAGE_SIZE + offset) * HKV + kv_head)[:, None] * D + d[None, :]  # [BLOCK_N, BLOCK_D]
        kv_mask = written[:, None] & in_d[None, :]
        k = tl.load(k_ptr + at, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        seen = written[None, :] & (lane[None, :] <= (limit + r)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        weights = tl.exp2(scores - shift[:, None])
        keep = tl.exp2(top - shift)
        v = tl.load(v_ptr + at, mask=kv_mask, other=0.0)
        acc = acc * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * keep + tl.sum(weights, 1)
        top = new_top

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    lse2 = tl.where(empty, float("-inf"), top + tl.log2(divisor))
    number = (first_partial + r).to(tl.int64)  # of the partial; where each row has one, also of the row
    partial = number * HQ + head
    if DIRECT:
        tl.store(part_lse_ptr + head.to(tl.int64) * num_rows + number, lse2 * 0.6931471805599453, mask=live)
    else:
        tl.store(part_lse_ptr + partial, lse2, mask=live)
    out = (acc / divisor[:, None]).to(part_ptr.dtype.element_ty)
    tl.store(part_ptr + partial[:, None] * D + d[None, :], out, mask=q_mask)


@triton.jit(do_not_specialize=["num_rows"])
def merge_kernel(
    part_ptr, part_lse_ptr, merge_ptr_ptr, merge_ids_ptr, out_ptr, lse_ptr, num_rows,
    HQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    one = tl.arange(0, 1)
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    begin = tl.load(merge_ptr_ptr + row)
    end = tl.load(merge_ptr_ptr + row + 1)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_P):
        live = start + p < end
        partial = tl.load(merge_ids_ptr + start + p, mask=live, other=0).to(tl.int64) * HQ + head
        lse2 = tl.load(part_lse_ptr + partial, mask=live, other=float("-inf"))  # [BLOCK_P]
        mask = live[:, None] & in_d[None, :]
        out = tl.load(part_ptr + partial[:, None] * D + d[None, :], mask=mask, other=0.0)  # [BLOCK_P, BLOCK_D]
        new_top = tl.maximum(top, tl.max(lse2, 0, keep_dims=True))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # chunks that the row does not see
        keep = tl.exp2(top - shift)
        weight = tl.exp2(lse2 - shift)
        acc = acc * keep + tl.sum(out * weight[:, None], 0)
        total = total * keep + tl.sum(weight, 0, keep_dims=True)
        top = new_top
    # A row without visible keys, such as a spare row in buffers of fixed capacity: 0, -inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    at = (row * HQ + head) * D + d
    tl.store(out_ptr + at, (acc / divisor).to(out_ptr.dtype.element_ty), mask=in_d)
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(divisor)) * 0.6931471805599453)
    tl.store(lse_ptr + head.to(tl.int64) * num_rows + row + one, lse)


@triton.jit(do_not_specialize=["num_rows"])
def advance_kernel(
    state_ptr, cursor_ptr, pages_ptr, counts_ptr, positions_ptr, slots_ptr, num_rows,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set positions, slots and counts to step number `cursor`, in tables of fixed capacity (buffers.py).

    The count is that of the page that the last row of an entry writes.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = r < num_rows
    cursor = tl.load(cursor_ptr)
    token = tl.load(state_ptr + r, mask=inside, other=0) + cursor
    place = tl.load(state_ptr + num_rows + r, mask=inside, other=-1)
    position = tl.load(state_ptr + 2 * num_rows + r, mask=inside, other=0) + cursor
    last = tl.load(state_ptr + 3 * num_rows + r, mask=inside, other=0)
    live = place >= 0
    at = place + token // PAGE_SIZE
    offset = token % PAGE_SIZE
    page = tl.load(pages_ptr + at, mask=live, other=0).to(tl.int64)
    tl.store(slots_ptr + r, tl.where(live, page * PAGE_SIZE + offset, -1), mask=inside)
    tl.store(positions_ptr + r, tl.where(live, position, 0), mask=inside)
    tl.store(counts_ptr + at, offset + 1, mask=live & (last == 1))


def decode_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    views: StepViews,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute out [N, Hq, D] in q's dtype and lse [Hq, N] float32, natural log. The caller checks the arguments."""
    rows, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    tables = plan_tables(views, heads, kv_heads, dim, q.element_size(), q.device)
    config, direct = tables.config, tables.path == "direct"
    q = q.detach().contiguous()
    out = torch.empty_like(q)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    part, part_lse = out, lse
    if not direct:
        part = torch.empty((tables.num_partials, heads, dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((tables.num_partials, heads), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(dim))
    with torch.cuda.device_of(q):
        decode_kernel[(tables.work.shape[0], kv_heads)](
            q, k_cache, v_cache, part, part_lse, tables.work, tables.pages, tables.counts, tables.rows, scale * LOG2_E,
            rows, HQ=heads, HKV=kv_heads, GROUP=heads // kv_heads, D=dim, PAGE_SIZE=views.page_size,
            BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, DIRECT=direct,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if not direct:
            merge_kernel[(rows, heads)](
                part, part_lse, tables.merge_ptr, tables.merge_ids, out, lse, rows,
                HQ=heads, D=dim, BLOCK_D=block_d, BLOCK_P=MERGE_BLOCK, num_warps=2,
            )  # fmt: skip
    return out, lse


def launch_advance(
    state: torch.Tensor,
    cursor: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    page_size: int,
) -> None:
    """Write positions, slots and counts in place; `ops.decode.buffers` describes the arguments."""
    rows = state.shape[1]
    with torch.cuda.device_of(state):
        advance_kernel[(triton.cdiv(rows, ADVANCE_BLOCK),)](
            state, cursor, pages, counts, positions, slots, rows, PAGE_SIZE=page_size, BLOCK=ADVANCE_BLOCK
        )


def plan_tables(
    views: StepViews,
    heads: int,
    kv_heads: int,
    dim: int,
    element_size: int,
    device: torch.device,
) -> DecodeTables:
    """Return the device tables of a step, made once for all layers, and for the reserved steps."""

    def build() -> DecodeTables:
        shape = decode_shape(heads, kv_heads, dim, element_size, device)
        return build_tables(plan_decode(views, shape), views, device)

    return views.cached(tables_key(heads, kv_heads, dim, element_size, device), build)


def tables_key(heads: int, kv_heads: int, dim: int, element_size: int, device: torch.device) -> tuple[object, ...]:
    """Return the key under which the views of a step keep its tables."""
    return ("triton", heads, kv_heads, dim, element_size, device)


def decode_shape(heads: int, kv_heads: int, dim: int, element_size: int, device: torch.device) -> Shape:
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return Shape(heads // kv_heads, kv_heads, dim, element_size, sms)
