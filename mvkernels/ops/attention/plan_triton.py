"""The device twin of `attention_tables.build_tables`: everything the attention kernels read of a mask, made on the GPU
from the mask's table (see `mask_tensor`). For tables that the host has no mask of: the mask is never copied back.

One program owns one item and walks the opposite items that may concern it, CHUNK at a time, as one vector of states:

    ROWS      item: a query tile     opposite: key tiles      runs of FULL and of PARTIAL pairs
    COLUMNS   item: a key tile       opposite: query tiles    runs of FULL and of PARTIAL pairs
    HIDDEN    item: a class of keys  opposite: segments       runs of segments that do not see the keys, as FULL

Neighbours of one state form a run. A first launch counts the runs of each item, a cumulative sum gives each item its
place, and a second launch writes them; so the order is fixed and there are no atomics. The host waits three times, for
a few bytes: the header of the table, the number of classes, and the numbers of runs, which are the sizes of what it
allocates. Nothing about a layout, nor a tile size, is a compile-time constant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mvkernels.mask_tensor import HEADER, split_table
from mvkernels.ops.attention import tile_plan as plan
from mvkernels.ops.attention.config import AttentionConfig, KernelConfig
from mvkernels.ops.attention.tables import AttentionTables, RunTables

EMPTY: tl.constexpr = tl.constexpr(plan.EMPTY)
PARTIAL: tl.constexpr = tl.constexpr(plan.PARTIAL)
FULL: tl.constexpr = tl.constexpr(plan.FULL)
STARTS: tl.constexpr = tl.constexpr(HEADER)  # where segment_starts stands in the table

ROWS, COLUMNS, HIDDEN = 0, 1, 2
CHUNK = 64  # opposite items at a time
NUM_WARPS = 1  # so that the sums and maxima over a chunk need no barrier


@triton.jit
def pair_states(table_ptr, segment_ptr, row, row_end, key, key_end, live):
    """State of the pairs of rows row .. row_end - 1 and keys key .. key_end - 1, all [CHUNK]; EMPTY where not live.

    Segment by segment of the rows, gap by gap. Of a segment's rows in the pair the last sees most: if it sees none of
    the keys, none does; the first sees least: if it sees them all, all do.
    """
    segments = tl.load(table_ptr + 1)
    starts_ptr = table_ptr + STARTS
    first_ptr = starts_ptr + segments + 1
    gap_ptr_ptr = first_ptr + segments
    gaps_ptr = gap_ptr_ptr + segments + 1

    live = live & (row < row_end)
    segment = tl.load(segment_ptr + row, mask=live, other=0)
    segment_end = tl.load(segment_ptr + row_end - 1, mask=live, other=-1) + 1
    touched = live & ~live
    covered = live
    for _ in range(tl.max(segment_end - segment)):
        here = segment < segment_end
        start = tl.maximum(tl.load(starts_ptr + segment, mask=here, other=0), row)
        stop = tl.minimum(tl.load(starts_ptr + segment + 1, mask=here, other=0), row_end)
        here = here & (start < stop)
        seen_from = tl.load(first_ptr + segment, mask=here, other=0)
        gap = tl.load(gap_ptr_ptr + segment, mask=here, other=0)
        gap_end = tl.load(gap_ptr_ptr + segment + 1, mask=here, other=0)
        covered = covered & ((key >= seen_from) & (key_end <= start + 1) | ~here)
        for _ in range(tl.max(gap_end - gap)):
            more = gap < gap_end
            hidden_from = tl.load(gaps_ptr + 2 * gap, mask=more, other=0)
            hidden_to = tl.load(gaps_ptr + 2 * gap + 1, mask=more, other=0)
            touched = touched | (more & (tl.maximum(key, seen_from) < tl.minimum(key_end, hidden_from)))
            covered = covered & ((key_end <= hidden_from) | (key >= hidden_to) | ~more)
            seen_from = tl.where(more, hidden_to, seen_from)
            gap += 1
        touched = touched | (here & (tl.maximum(key, seen_from) < tl.minimum(key_end, stop)))
        segment += 1
    return tl.where(covered, FULL, tl.where(touched, PARTIAL, EMPTY))


@triton.jit
def add_runs(runs_ptr, begun, opposite, before, now, STATE: tl.constexpr, FILL: tl.constexpr):
    """Counts the runs of STATE that begin in a chunk on top of `begun`; with FILL, writes which ends fall into it."""
    begins = (now == STATE) & (before != STATE)
    if FILL:
        # As many runs have begun where one ends as where it began.
        run_ptrs = runs_ptr + 2 * (begun + tl.cumsum(begins.to(tl.int32), 0) - 1)
        tl.store(run_ptrs, opposite, mask=begins)
        tl.store(run_ptrs + 1, opposite, mask=(now != STATE) & (before == STATE))
    return begun + tl.sum(begins.to(tl.int32))


@triton.jit(do_not_specialize=["items", "block_m", "block_n"])
def runs_kernel(
    table_ptr, segment_ptr, items_ptr, counts_ptr, places_ptr, runs_ptr, items, block_m, block_n,
    KIND: tl.constexpr, FILL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: items. segment [T]: segment of each row. items [3, N]: first row or key of the item, first and end of the
    opposite items to look at; all others are EMPTY to it.

    Without FILL writes counts [3, N]: full runs, partial runs, pairs that are not empty.
    With it writes runs [R, 2], the full ones of the item from places[0, item] on, the partial ones from [1, item].
    """
    item = tl.program_id(0)
    at = tl.load(items_ptr + item)
    first = tl.load(items_ptr + items + item)
    end = tl.load(items_ptr + 2 * items + item)
    total = tl.load(table_ptr)
    lanes = tl.arange(0, CHUNK)
    full, partial, work, carried = 0, 0, 0, EMPTY
    if FILL:
        full = tl.load(places_ptr + item)
        partial = tl.load(places_ptr + items + item)
    for chunk in range(first, end + 1, CHUNK):  # as far as `end` itself, which is EMPTY and ends the last run
        opposite = chunk + lanes
        live = opposite < end
        if KIND == 0:  # ROWS
            row = tl.zeros_like(lanes) + at
            row_end = row + block_m
            key = opposite * block_n
            key_end = key + block_n
        elif KIND == 1:  # COLUMNS
            row = opposite * block_m
            row_end = row + block_m
            key = tl.zeros_like(lanes) + at
            key_end = key + block_n
        else:  # HIDDEN: the rows of a segment
            row = tl.load(table_ptr + STARTS + opposite, mask=live, other=0)
            row_end = tl.load(table_ptr + STARTS + opposite + 1, mask=live, other=0)
            key = tl.zeros_like(lanes) + at
            key_end = key + 1
        now = pair_states(table_ptr, segment_ptr, row, tl.minimum(row_end, total), key, key_end, live)
        if KIND == 2:
            now = tl.where(live & (now == EMPTY), FULL, EMPTY)
        before = tl.where(lanes == 0, carried, tl.gather(now, tl.maximum(lanes - 1, 0), 0))
        carried = tl.sum(tl.where(lanes == CHUNK - 1, now, 0))
        full = add_runs(runs_ptr, full, opposite, before, now, FULL, FILL)
        partial = add_runs(runs_ptr, partial, opposite, before, now, PARTIAL, FILL)
        work += tl.sum((now != EMPTY).to(tl.int32))
    if not FILL:
        tl.store(counts_ptr + item, full)
        tl.store(counts_ptr + items + item, partial)
        tl.store(counts_ptr + 2 * items + item, work)


def device_tables(table: torch.Tensor, config: AttentionConfig) -> AttentionTables:
    """The tables of a mask, from its table [N] int32, on the same device. Equal to what `build_tables` makes.

    Raises ValueError when the tensor is no mask table.
    """
    with torch.cuda.device_of(table):  # Triton launches on the current device
        return _derive(table.contiguous(), config)


def _derive(table: torch.Tensor, config: AttentionConfig) -> AttentionTables:
    total, starts, first_key, gap_ptr, gaps = split_table(table)
    tokens = torch.arange(total, dtype=torch.int32, device=table.device)
    segment = torch.searchsorted(starts, tokens, right=True, out_int32=True) - 1  # of each row
    # No segment from this one on sees the key: documents follow one another, so first_key never falls.
    segment_end = torch.searchsorted(first_key, tokens, right=True, out_int32=True)
    last_row = starts[segment_end]
    borders = torch.cat([tokens[:1], gaps.reshape(-1)]).unique()  # keys between two of them are one class

    def items(kind: int, block_m: int, block_n: int) -> torch.Tensor:
        if kind == ROWS:
            at = tokens[::block_m]
            return torch.stack(
                [at, first_key[segment[at]] // block_n, _tiles((at + block_m).clamp(max=total), block_n)]
            )
        if kind == COLUMNS:
            at = tokens[::block_n]
            return torch.stack([at, at // block_m, _tiles(last_row[(at + block_n).clamp(max=total) - 1], block_m)])
        inside = borders.clamp(max=total - 1)
        return torch.stack([borders, segment[inside] + 1, segment_end[inside]])

    def sizes(kind: int, kernel: KernelConfig) -> tuple[int, int, int]:
        return kind, kernel.block_m, kernel.block_n

    forward, dq, dkdv = sizes(ROWS, config.forward), sizes(ROWS, config.dq), sizes(COLUMNS, config.dkdv)
    hidden = (HIDDEN, 1, 1)
    jobs = {job: items(*job) for job in (forward, dq, dkdv, hidden)}
    counts = {job: _launch(table, segment, job, where) for job, where in jobs.items()}
    totals = torch.stack([count[:2].sum() for count in counts.values()]).tolist()
    made = {}
    for (job, where), size in zip(jobs.items(), totals, strict=True):
        ends = counts[job][:2].flatten().cumsum(0, dtype=torch.int32).view(2, -1)
        places = ends - counts[job][:2]
        runs = torch.empty((size, 2), dtype=torch.int32, device=table.device)
        _launch(table, segment, job, where, places, runs)
        tile = torch.arange(where.shape[1], dtype=torch.int32, device=table.device)
        rows = torch.stack([tile, places[0], ends[0], places[1], ends[1]], dim=1)
        made[job] = rows, runs, torch.argsort(counts[job][2], descending=True, stable=True)

    def run_tables(job: tuple[int, int, int]) -> RunTables:
        tiles, runs, longest_first = made[job]
        return RunTables(tiles[longest_first], runs)

    classes, hidden_segments, _ = made[hidden]
    key_class = torch.searchsorted(borders, tokens, right=True) - 1
    return AttentionTables(
        run_tables(forward),
        run_tables(dq),
        run_tables(dkdv),
        rows=torch.stack([first_key, gap_ptr[:-1], gap_ptr[1:]], dim=1)[segment],
        gaps=gaps.clone(),  # begins on 16 bytes, as every tensor of its own
        keys=torch.cat([last_row[:, None], classes[:, 1:3][key_class]], dim=1),
        key_gaps=starts[hidden_segments],
    )


def _tiles(tokens: torch.Tensor, block: int) -> torch.Tensor:
    """Number of tiles that hold so many tokens."""
    return (tokens + (block - 1)) // block


def _launch(
    table: torch.Tensor,
    segment: torch.Tensor,
    job: tuple[int, int, int],
    items: torch.Tensor,
    places: torch.Tensor | None = None,
    runs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Counts the runs, [3, N]; or with the places of the items, writes them."""
    kind, block_m, block_n = job
    counts = torch.empty_like(items)
    runs_kernel[(items.shape[1],)](
        table, segment, items, counts, counts if places is None else places, counts if runs is None else runs,
        items.shape[1], block_m, block_n, KIND=kind, FILL=runs is not None, CHUNK=CHUNK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return counts
