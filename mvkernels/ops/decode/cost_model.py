"""Cost model of tree decode: it cuts a step into tiles of rows and chunks of keys (split-KV, cascade).

A task's keys are numbered by lanes: lane t is key t % page_size of page t // page_size of its list, so lanes beyond the
count of a ragged page hold no key. If the page tables are on the device already, the runs of a task may be apart there:
it is read in segments, and lanes are numbered from the first page of each. A work item is a tile of rows on one chunk
of a segment; it gives one partial result per row. `ops.decode.tables` has the tables made from a plan. All sizes are
run-time values, so that nothing compiles again when branches come and go.

The unit of cost is the time in which one multiprocessor reads one lane (a key and a value of one head) with its share
of the memory bandwidth. The figures are an H200's, from its data sheet: 4.8 TB/s, 132 multiprocessors. Those of an item
and a merge are estimates, not measurements.

    tile       of m query rows (rows x heads that share keys) on a lane: max(1, m / BALANCE). Up to 184 rows of 16 bit
               the kernel is bound by memory: padding to 64 rows takes 35% of its time, to 128 rows 70%. So the smallest
               tile that minimises tiles times lanes is taken.
    partial    4 bytes a number, written and read again, against keys and values of 2: 2 lanes a query row, which is
               2 rows / chunk of what is read; at 16 lanes a row or more it is an eighth or less.
    item       ITEM_BYTES: a program that starts, loads its rows and waits for its first keys
    merge      MERGE_BYTES: the second launch, and its first loads; none where every row has one partial
    step       (sum of tiles + items + partials) / multiprocessors + longest item + merge     (Graham's bound)

The chunk length with the least time is taken. Keys that several entries see are read once for all of them if that is
less than reading them for each entry; without sharing the whole step is costed too (short prefixes, few branches).
Segments that are apart are items and partials of their own in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mvkernels.ops.decode.tasks import (
    DecodePath,
    DecodeTask,
    EntryView,
    Int32Array,
    KeyRun,
    StepViews,
    build_tasks,
)

EVERYTHING = 2**30  # a limit that hides no lane, and a chunk that cuts none; a tile's rows may be added to it
BALANCE = {2: 184, 4: 28}  # bytes of an element -> query rows for which arithmetic takes as long as reading
ITEM_BYTES = 64 * 1024  # 1.8 us of one multiprocessor's share
MERGE_BYTES = 128 * 1024  # 3.6 us
CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, EVERYTHING)
TILES = (16, 32, 64, 128)


class Shape(NamedTuple):
    """Sizes that the plan of a step depends on. group: query heads per key-value head; element_size in bytes."""

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


class Segment(NamedTuple):
    """Keys of a task that are contiguous in a page table; row i of the task sees lanes <= limit + i.

    rows: of the task. place: index of the first page in the step's device pages; None where the whole task is one
    segment, and its page table is uploaded.
    """

    rows: int
    lanes: int
    limit: int
    place: int | None


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """How a step is decoded: tasks, tiles, and chunks of `chunk` lanes. time: in lanes.

    segments: of each task.
    """

    tasks: tuple[DecodeTask, ...]
    segments: tuple[tuple[Segment, ...], ...]
    config: DecodeConfig
    chunk: int
    path: DecodePath
    time: float


# -- the plan ----------------------------------------------------------------------------------------------------


def tile_shapes(shape: Shape) -> list[DecodeConfig]:
    """Return the tiles that a model can use, the smallest first."""
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


def plan_decode(views: StepViews, shape: Shape) -> DecodePlan:
    """Return the plan with the least time by the cost model."""
    entries = final_entries(views)
    apart = _plan_tasks(build_tasks(entries, lambda *_: False), views, shape)
    placed = views.device_pages is not None
    tasks = build_tasks(entries, lambda rows, runs: _saves(rows, runs, views.page_size, shape, placed))
    if not any(task.shared for task in tasks):
        return apart
    together = _plan_tasks(tasks, views, shape)
    return together if together.time < apart.time else apart


def path_of(tasks: Sequence[DecodeTask], direct: bool) -> DecodePath:
    return "shared" if any(task.shared for task in tasks) else "direct" if direct else "split"


def final_entries(views: StepViews) -> tuple[EntryView, ...]:
    """Return the entries as they are when the reserve is used up: tables hold the lanes of all steps."""
    left = views.reserve - views.index
    if not left:
        return views.entries
    return tuple(
        replace(entry, own=KeyRun.of_node(entry.own.pages, entry.own.tokens + left, views.page_size, entry.own.place))
        for entry in views.entries
    )


def _saves(rows: Sequence[int], runs: Sequence[KeyRun], page_size: int, shape: Shape, placed: bool) -> bool:
    """Whether reading keys once for entries with these numbers of rows costs less than reading them for each.

    placed: in page tables on the device, where runs that are not contiguous are segments of their own either way.
    """
    lanes = sum(_lanes(run.counts, page_size) for run in runs)
    segments = len(_side_by_side(runs)) if placed else 1
    item = ITEM_BYTES / shape.lane_bytes * segments
    partials = sum(rows) * shape.group * _partial_lanes(shape) * segments
    tile = tile_shapes(shape)[-1].rows_per_tile
    apart: float = sum(-(-count // tile) for count in rows) * lanes
    if placed:
        apart += len(rows) * item + partials
    return -(-sum(rows) // tile) * (lanes + item) + partials < apart


def _plan_tasks(tasks: tuple[DecodeTask, ...], views: StepViews, shape: Shape) -> DecodePlan:
    """Choose tile and chunk with the least time for these tasks."""
    placed = views.device_pages is not None
    segments = tuple(_placed(task, views.page_size) if placed else (_whole(task, views.page_size),) for task in tasks)
    every = [segment for parts in segments for segment in parts]
    rows, lanes = np.array([segment.rows for segment in every]), np.array([segment.lanes for segment in every])
    once = int(rows.sum()) == views.total_rows  # every row is in at least one task
    # A tile of a causal task sees what its last row sees: on average about half of the new tokens.
    seen = lanes - np.array([segment.rows // 2 if segment.limit < EVERYTHING else 0 for segment in every])
    item = ITEM_BYTES / shape.lane_bytes

    def reading(config: DecodeConfig) -> float:
        tiles = -(-rows // config.rows_per_tile)
        return float((tiles * (seen * max(1.0, config.block_m / shape.balance) + item)).sum())

    config = min(tile_shapes(shape), key=reading)
    weight = max(1.0, config.block_m / shape.balance)
    tiles = -(-rows // config.rows_per_tile)
    chunks = np.array(sorted({-(-chunk // config.block_n) * config.block_n for chunk in CHUNKS}))[:, None]
    pieces = -(-seen // np.minimum(chunks, seen))  # [chunks, segments]
    direct: npt.NDArray[np.bool_] = np.logical_and(np.all(chunks >= lanes, axis=1), once)
    partials = np.where(direct, 0, (pieces * rows).sum(1)) * shape.group * _partial_lanes(shape)
    work = (tiles * seen).sum() * weight + (pieces * tiles).sum(1) * item + partials
    longest = np.minimum(chunks, lanes).max(1) * weight
    time = work * shape.kv_heads / shape.num_sms + longest + np.where(direct, 0, MERGE_BYTES / shape.lane_bytes)
    best = int(time.argmin())
    path = path_of(tasks, bool(direct[best]))
    return DecodePlan(tasks, segments, config, int(chunks[best, 0]), path, float(time[best]))


def _partial_lanes(shape: Shape) -> float:
    return 2 * 4 * shape.head_dim / shape.lane_bytes


# -- segments ----------------------------------------------------------------------------------------------------


def _whole(task: DecodeTask, page_size: int) -> Segment:
    """Make one segment of a task whose pages are uploaded contiguously."""
    limit = EVERYTHING if task.base is None else _lane_of(task.base, task.counts, page_size)
    return Segment(len(task.rows), _lanes(task.counts, page_size), limit, None)


def _placed(task: DecodeTask, page_size: int) -> tuple[Segment, ...]:
    """Make segments of a task whose pages are on the device already."""
    found, before = [], 0  # before: keys of the task so far
    for runs in _side_by_side(task.runs):
        counts = runs[0].counts if len(runs) == 1 else np.concatenate([run.counts for run in runs])
        tokens = sum(run.tokens for run in runs)
        limit = EVERYTHING
        if task.base is not None and task.base < before + tokens:  # else every row sees all of these keys
            limit = _lane_of(task.base - before, counts, page_size)
        found.append(Segment(len(task.rows), _lanes(counts, page_size), limit, runs[0].place))
        before += tokens
    return tuple(found)


def _side_by_side(runs: Sequence[KeyRun]) -> list[list[KeyRun]]:
    """Group runs whose pages are contiguous on the device. Raises ValueError for a run without a place."""
    groups: list[list[KeyRun]] = []
    end = None
    for run in runs:
        if run.place is None:
            raise ValueError(f"expected runs of keys with a place in the device pages, got {run.tokens} keys without")
        if groups and run.place == end:
            groups[-1].append(run)
        else:
            groups.append([run])
        end = run.place + len(run.pages)
    return groups


def _lanes(counts: Int32Array, page_size: int) -> int:
    """Count lanes up to the last key; pages behind it are reserved and still empty."""
    last = len(counts) - 1
    while last and not counts[last]:
        last -= 1
    return last * page_size + int(counts[last])


def _lane_of(key: int, counts: Int32Array, page_size: int) -> int:
    """Return the lane of a key; for a key before the first, the negative distance."""
    if key < 0:
        return key
    ends = np.cumsum(counts)
    page = int(np.searchsorted(ends, key, side="right"))
    return page * page_size + key - int(ends[page] - counts[page])
