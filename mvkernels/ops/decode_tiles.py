"""Device tables of tree decode: how a step is cut into tiles of rows and chunks of keys, and the order of their merge.

A task's keys are numbered by lanes: lane t is key t % page_size of the task's page t // page_size, so lanes beyond the
count of a ragged page hold no key. A work item is a tile of rows on one chunk of lanes; it writes one partial result
per row. Where each row has one, they are numbered as the rows are: entries are taken in order. All sizes are run-time
values, so that nothing compiles again when branches come and go.

    work [W, 8] int32   first index into pages, first lane, end lane, first index into rows, rows in the tile,
                        limit: row i of the tile sees lanes <= limit + i, first partial, 0; longest first
    pages, counts [P]   of all tasks, one after the other, int32
    rows [R]            of all tasks, int32
    merge_ptr [N + 1]   partials of row r are merge_ids[merge_ptr[r]:merge_ptr[r + 1]], merged in that order, int32

The cost model. Its unit is the time in which one of the multiprocessors reads one lane (a key and a value of one head)
with its share of the memory bandwidth; the figures are an H200's, from its data sheet: 4.8 TB/s, 132 multiprocessors.
Those of an item and a merge are estimates, not measurements.

    tile       of m query rows (rows x heads that share keys) on a lane: max(1, m / BALANCE). Up to 184 rows of 16 bit
               the memory is what counts: padding to 64 rows takes 35% of its time, to 128 rows 70%. So the smallest
               tile is taken that keeps the number of tiles, times their lanes, least.
    partial    4 bytes a number, written and read again, against keys and values of 2: 2 lanes a query row, which is
               2 rows / chunk of what is read; at 16 lanes a row or more it is an eighth or less.
    item       ITEM_BYTES: a program that starts, loads its rows and waits for its first keys
    merge      MERGE_BYTES: the second launch, and its first loads; none where every row has one partial
    step       (sum of tiles + items + partials) / multiprocessors + longest item + merge     (Graham's bound)

Chunks: the length with the least time. Keys that several entries see are read once for all of them where that is less
than reading them apart, and the whole step is taken apart where that is less (short prefixes, few branches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mvkernels.ops.decode_invariant import invariant_tasks
from mvkernels.ops.decode_tasks import (
    DecodePath,
    DecodeTask,
    EntryView,
    Int32Array,
    Int64Array,
    KeyRun,
    StepViews,
    build_tasks,
)

EVERYTHING = 2**30  # a limit that hides no lane, and a chunk that cuts none; a tile's rows may be added to it
BALANCE = {2: 184, 4: 28}  # bytes of an element -> query rows whose arithmetic takes as long as the reading
ITEM_BYTES = 64 * 1024  # 1.8 us of one multiprocessor's share
MERGE_BYTES = 128 * 1024  # 3.6 us
CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, EVERYTHING)
TILES = (16, 32, 64, 128)
INVARIANT_TILE = 64
ALIGN = 64  # tables start at multiples of 256 bytes, for Triton compiles a pointer's alignment in


class Shape(NamedTuple):
    """What the plan of a step depends on beside its views. group: query heads per key-value head; sizes in bytes."""

    group: int
    kv_heads: int
    head_dim: int
    element_size: int
    num_sms: int

    @property
    def lane_bytes(self) -> int:
        return 2 * self.head_dim * self.element_size

    @property
    def balance(self) -> int:
        return BALANCE[2 if self.element_size <= 2 else 4]


@dataclass(frozen=True)
class DecodeConfig:
    """Tile shape: block_m query heads of rows (rows_per_tile rows of `group` heads), block_n lanes at a time."""

    block_m: int
    block_n: int
    rows_per_tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """How a step is decoded: what is read for whom, in which tiles, `chunk` lanes at a time. time: in lanes."""

    tasks: tuple[DecodeTask, ...]
    config: DecodeConfig
    chunk: int
    path: DecodePath
    time: float


@dataclass(frozen=True, eq=False)
class DecodeTables:
    """The module's docstring has the legend; tensors share one upload, but for `ahead`.

    ahead [1 + reserve, E] int64: where in `counts` the page stands that the step's token of each entry goes to; None
    where no step is to come.
    """

    config: DecodeConfig
    path: DecodePath
    work: torch.Tensor
    pages: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor
    merge_ptr: torch.Tensor
    merge_ids: torch.Tensor
    num_partials: int
    ahead: torch.Tensor | None = None
    ones: torch.Tensor | None = None

    def advance(self, cursor: torch.Tensor) -> None:
        """The page that each entry writes in step `cursor` ([1] int64) holds one token more. Device work only."""
        if self.ahead is None or self.ones is None:
            raise ValueError("expected tables of a step with tokens in reserve, got others")
        self.counts.index_add_(0, self.ahead.index_select(0, cursor)[0], self.ones)


# -- the plan ----------------------------------------------------------------------------------------------------


def tile_shapes(shape: Shape) -> list[DecodeConfig]:
    """The tiles that a model may use, the smallest first."""
    full_precision = shape.element_size > 2  # multiplied without tensor cores, out of registers: larger tiles spill
    long = shape.head_dim > 128
    narrow = max(16, 1 << (shape.group - 1).bit_length())
    widest = (16 if long else 32) if full_precision else (64 if long else 128)
    configs = []
    for block_m in (narrow, *(tile for tile in TILES if narrow < tile <= widest)):
        num_warps = 8 if block_m > (16 if full_precision else 32 if long else 64) else 4
        block_n = 16 if full_precision else 32 if long or block_m * shape.head_dim > 64 * 128 else 64
        configs.append(DecodeConfig(block_m, block_n, block_m // shape.group, num_warps, num_stages=2))
    return configs


def plan_decode(views: StepViews, shape: Shape, batch_invariant: bool = False) -> DecodePlan:
    """The plan with the least time by the cost model; for batch-invariant decoding one that does not look at it."""
    entries = final_entries(views)
    if batch_invariant:
        tasks = invariant_tasks(entries, views.page_size)
        configs = tile_shapes(shape)
        config = next((c for c in configs if c.block_m >= INVARIANT_TILE), configs[-1])
        return DecodePlan(tasks, config, EVERYTHING, path_of(tasks, False), 0.0)
    apart = _plan_tasks(build_tasks(entries, lambda *_: False), views, shape)
    tasks = build_tasks(entries, lambda rows, runs: _saves(rows, runs, views.page_size, shape))
    if not any(task.shared for task in tasks):
        return apart
    together = _plan_tasks(tasks, views, shape)
    return together if together.time < apart.time else apart


def path_of(tasks: Sequence[DecodeTask], direct: bool) -> DecodePath:
    return "shared" if any(task.shared for task in tasks) else "direct" if direct else "split"


def final_entries(views: StepViews) -> tuple[EntryView, ...]:
    """The entries as they will be when the reserve is used up: tables hold the lanes of all steps."""
    left = views.reserve - views.index
    if not left:
        return views.entries
    return tuple(
        replace(entry, own=KeyRun.of_node(entry.own.pages, entry.own.tokens + left, views.page_size))
        for entry in views.entries
    )


def _saves(rows: Sequence[int], runs: Sequence[KeyRun], page_size: int, shape: Shape) -> bool:
    """Whether reading keys once for entries with so many rows takes less than each reading them with its own."""
    lanes = sum(_lanes(run.pages, run.counts, page_size) for run in runs)
    tile = tile_shapes(shape)[-1].rows_per_tile
    apart = sum(-(-count // tile) for count in rows) * lanes
    partials = sum(rows) * shape.group * _partial_lanes(shape)
    return -(-sum(rows) // tile) * (lanes + ITEM_BYTES / shape.lane_bytes) + partials < apart


def _plan_tasks(tasks: tuple[DecodeTask, ...], views: StepViews, shape: Shape) -> DecodePlan:
    """Tile and chunk with the least time for these tasks."""
    rows = np.array([len(task.rows) for task in tasks])
    lanes = np.array([_lanes(task.pages, task.counts, views.page_size) for task in tasks])
    once = int(rows.sum()) == views.total_rows  # every row is in at least one task
    # A tile of a causal task sees what its last row sees: on average about half of the new tokens.
    seen = lanes - np.array([len(task.rows) // 2 if task.base is not None else 0 for task in tasks])
    item = ITEM_BYTES / shape.lane_bytes

    def reading(config: DecodeConfig) -> float:
        tiles = -(-rows // config.rows_per_tile)
        return float((tiles * (seen * max(1.0, config.block_m / shape.balance) + item)).sum())

    config = min(tile_shapes(shape), key=reading)
    weight = max(1.0, config.block_m / shape.balance)
    tiles = -(-rows // config.rows_per_tile)
    chunks = np.array(sorted({-(-chunk // config.block_n) * config.block_n for chunk in CHUNKS}))[:, None]
    pieces = -(-seen // np.minimum(chunks, seen))  # [chunks, tasks]
    direct: npt.NDArray[np.bool_] = np.logical_and(np.all(chunks >= lanes, axis=1), once)
    partials = np.where(direct, 0, (pieces * rows).sum(1)) * shape.group * _partial_lanes(shape)
    work = (tiles * seen).sum() * weight + (pieces * tiles).sum(1) * item + partials
    longest = np.minimum(chunks, lanes).max(1) * weight
    time = work * shape.kv_heads / shape.num_sms + longest + np.where(direct, 0, MERGE_BYTES / shape.lane_bytes)
    best = int(time.argmin())
    return DecodePlan(tasks, config, int(chunks[best, 0]), path_of(tasks, bool(direct[best])), float(time[best]))


def _partial_lanes(shape: Shape) -> float:
    return 2 * 4 * shape.head_dim / shape.lane_bytes


def _lanes(pages: Int32Array, counts: Int32Array, page_size: int) -> int:
    return (len(pages) - 1) * page_size + int(counts[-1])


# -- the tables --------------------------------------------------------------------------------------------------


def build_tables(plan: DecodePlan, views: StepViews, device: torch.device) -> DecodeTables:
    """Cuts the tasks, numbers the partials, and uploads everything at once."""
    tasks = plan.tasks
    work, rows_of_partials = [], []
    first_page = first_row = first_partial = 0
    for task in tasks:
        items = _cut(task, views.page_size, plan.config.rows_per_tile, plan.chunk)
        partials = np.cumsum(items[:, 4]) - items[:, 4]
        # Partial by partial, which row of the task it belongs to.
        within = np.arange(int(items[:, 4].sum())) - np.repeat(partials, items[:, 4])
        rows_of_partials.append(task.rows[np.repeat(items[:, 3], items[:, 4]) + within])
        items[:, 0] = first_page
        items[:, 3] += first_row
        items[:, 6] = first_partial + partials
        work.append(items)
        first_page, first_row = first_page + len(task.pages), first_row + len(task.rows)
        first_partial += len(within)
    items = np.concatenate(work)
    longest_first = np.argsort(items[:, 1] - items[:, 2], kind="stable")
    by_row = np.concatenate(rows_of_partials)
    merge_ptr = np.concatenate([[0], np.cumsum(np.bincount(by_row, minlength=views.total_rows))])
    pages = np.concatenate([task.pages for task in tasks])
    counts = np.concatenate([task.counts for task in tasks])
    ahead, ones = None, None
    if views.reserve:
        ahead = torch.from_numpy(_lay_ahead(views, pages, counts)).to(device)
        ones = torch.ones(len(views.entries), dtype=torch.int32, device=device)
    arrays = [
        items[longest_first].reshape(-1),
        pages,
        counts,
        np.concatenate([task.rows for task in tasks]),
        merge_ptr,
        np.argsort(by_row, kind="stable"),  # stable: in the order of tasks and chunks
    ]
    uploaded = _upload([np.asarray(array, dtype=np.int32) for array in arrays], device)
    table, pages_there, counts_there, rows, ptr, ids = uploaded
    return DecodeTables(
        plan.config, plan.path, table.view(-1, 8), pages_there, counts_there, rows, ptr, ids, len(by_row), ahead, ones
    )


def _lay_ahead(views: StepViews, pages: Int32Array, counts: Int32Array) -> Int64Array:
    """Sets the counts of the entries' own pages back to this step's, and returns `DecodeTables.ahead`.

    In a step with a reserve an entry's own pages stand in one task only.
    """
    place = np.zeros(int(pages.max()) + 1, dtype=np.int64)
    place[pages] = np.arange(len(pages))
    columns = []
    steps = np.arange(1 + views.reserve) - views.index
    for entry in views.entries:
        counts[place[entry.own.pages]] = entry.own.counts
        token = np.maximum(entry.own.tokens - 1 + steps, 0)  # steps that are past are not asked for
        columns.append(place[entry.own.pages[token // views.page_size]])
    return np.stack(columns, axis=1)


def _cut(task: DecodeTask, page_size: int, rows_per_tile: int, chunk: int) -> Int64Array:
    """Work items of a task, [items, 8], with rows, pages and partials counted from the task's own first."""
    lanes = _lanes(task.pages, task.counts, page_size)
    chunk = min(chunk, lanes)
    tile, part = np.meshgrid(np.arange(0, len(task.rows), rows_per_tile), np.arange(0, lanes, chunk), indexing="ij")
    items = np.zeros((tile.size, 8), dtype=np.int64)
    items[:, 1] = part.reshape(-1)
    items[:, 2] = np.minimum(items[:, 1] + chunk, lanes)
    items[:, 3] = tile.reshape(-1)
    items[:, 4] = np.minimum(len(task.rows) - items[:, 3], rows_per_tile)
    items[:, 5] = EVERYTHING if task.base is None else _lane_of(task.base, task.counts, page_size) + items[:, 3]
    # The last row of a tile sees the most: lanes up to limit + rows - 1.
    items[:, 2] = np.minimum(items[:, 2], items[:, 5] + items[:, 4])
    return items[items[:, 1] < items[:, 2]]


def _lane_of(key: int, counts: Int32Array, page_size: int) -> int:
    """The lane of a task's key; of one before the task's first, how many lanes before."""
    if key < 0:
        return key
    ends = np.cumsum(counts)
    page = int(np.searchsorted(ends, key, side="right"))
    return page * page_size + key - int(ends[page] - counts[page])


def _upload(arrays: Sequence[Int32Array], device: torch.device) -> list[torch.Tensor]:
    starts = np.cumsum([0, *(-(-len(array) // ALIGN) * ALIGN for array in arrays)])
    packed = np.zeros(int(starts[-1]), dtype=np.int32)
    for array, start in zip(arrays, starts[:-1], strict=True):
        packed[start : start + len(array)] = array
    tensor = torch.from_numpy(packed).to(device)
    return [tensor[start : start + len(array)] for array, start in zip(arrays, starts[:-1].tolist(), strict=True)]
