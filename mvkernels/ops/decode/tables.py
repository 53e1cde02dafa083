"""The tables that the kernels of tree decode read: a plan's work items, and the order in which partials are merged.

A work item is a tile of rows on one chunk of lanes (cost_model.py); it writes one partial result per row. Where each
row has one, they are numbered as the rows are: entries are taken in order.

    work [W, 8] int32   first index into pages, first lane, end lane, first index into rows, rows in the tile,
                        limit: row i of the tile sees lanes <= limit + i, first partial, 0; longest first
    pages, counts [P]   of all tasks, one after the other, int32; or those of the step's `DevicePages`
    rows [R]            of all tasks, int32
    merge_ptr [N + 1]   partials of row r are merge_ids[merge_ptr[r]:merge_ptr[r + 1]], merged in that order, int32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mvkernels.ops.decode.cost_model import EVERYTHING, DecodeConfig, DecodePlan
from mvkernels.ops.decode.tasks import (
    AdvancingTables,
    DecodePath,
    DevicePages,
    Int32Array,
    Int64Array,
    KeyRun,
    StepViews,
)

ALIGN = 64  # tables start at multiples of 256 bytes, for Triton compiles a pointer's alignment in


class TableArrays(NamedTuple):
    """The tables on the host, int64 but for pages and counts, which are None where they are on the device already.

    own: for each entry, where the pages of its own node stand in `pages`.
    """

    work: Int64Array
    rows: Int64Array
    merge_ptr: Int64Array
    merge_ids: Int64Array
    pages: Int32Array | None
    counts: Int32Array | None
    own: list[Int64Array]


@dataclass(frozen=True, eq=False)
class DecodeTables(AdvancingTables):
    """The module's docstring has the legend; tensors share one upload, but for `ahead` and device pages.

    ahead [1 + reserve, E] int64: where in `counts` the page stands that the step's token of each entry goes to; None
    where no step is to come. filled [1 + reserve, E] int32: how many tokens that page then holds.
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
    filled: torch.Tensor | None = None

    def advance(self, cursor: torch.Tensor) -> None:
        """The page that each entry writes in step `cursor` ([1] int64) holds one token more. Device work only.

        Counts are set, not added to: device pages may be advanced by several tables.
        """
        if self.ahead is None or self.filled is None:
            raise ValueError("expected tables of a step with tokens in reserve, got others")
        ahead, filled = (table.index_select(0, cursor)[0] for table in (self.ahead, self.filled))
        self.counts.index_copy_(0, ahead, filled)


def build_tables(plan: DecodePlan, views: StepViews, device: torch.device) -> DecodeTables:
    """The tables of a plan on the device, in one upload, and one more where the step has a reserve."""
    arrays = table_arrays(plan, views)
    ahead, filled = None, None
    if views.reserve:
        ahead, filled = (torch.from_numpy(array).to(device) for array in _lay_ahead(views, arrays.own))
        if arrays.counts is None:
            _catch_up(ahead, filled, views)
    parts = [arrays.work.reshape(-1), arrays.rows, arrays.merge_ptr, arrays.merge_ids]
    lists = [] if arrays.pages is None or arrays.counts is None else [arrays.pages, arrays.counts]
    narrow = [np.asarray(part, dtype=np.int32) for part in parts]
    work, rows, merge_ptr, merge_ids, *there = _upload(narrow + lists, device)
    pages = DevicePages(*there) if there else _device_pages(views)
    return DecodeTables(
        plan.config, plan.path, work.view(-1, 8), pages.pages, pages.counts, rows, merge_ptr, merge_ids,
        len(arrays.merge_ids), ahead, filled,
    )  # fmt: skip


def _device_pages(views: StepViews) -> DevicePages:
    if views.device_pages is None:
        raise ValueError("expected a step whose page lists are on the device, got one without")
    return views.device_pages


def table_arrays(plan: DecodePlan, views: StepViews) -> TableArrays:
    """Cuts the tasks into work items, and numbers the partials."""
    tasks = plan.tasks
    placed = plan.segments[0][0].place is not None
    task_rows = np.array([len(task.rows) for task in tasks])
    rows = np.concatenate([task.rows for task in tasks]).astype(np.int64)
    pages, counts = None, None
    if placed:
        own = [_places(entry.own) for entry in views.entries]
        first_page = np.array([segment.place for parts in plan.segments for segment in parts])
    else:
        pages, counts, own = _page_lists(plan, views)
        sizes = np.array([len(task.pages) for task in tasks])
        first_page = np.cumsum(sizes) - sizes
    number = np.array([len(parts) for parts in plan.segments])  # of segments, task by task
    first_row = np.repeat(np.cumsum(task_rows) - task_rows, number)
    work = _cut(plan, first_page, first_row)
    tile_rows = work[:, 4]
    work[:, 6] = np.cumsum(tile_rows) - tile_rows
    within = np.arange(int(tile_rows.sum())) - np.repeat(work[:, 6], tile_rows)
    by_row = rows[np.repeat(work[:, 3], tile_rows) + within]  # partial by partial
    merge_ptr = np.zeros(views.total_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(by_row, minlength=views.total_rows), out=merge_ptr[1:])
    longest_first = np.argsort(work[:, 1] - work[:, 2], kind="stable")
    merge_ids = np.argsort(by_row, kind="stable")  # stable: in the order of tasks and chunks
    return TableArrays(work[longest_first], rows, merge_ptr, merge_ids, pages, counts, own)


def _cut(plan: DecodePlan, first_page: Int64Array, first_row: Int64Array) -> Int64Array:
    """Work items [W, 8] of all segments, tile by tile; partials are not numbered yet."""
    every = [segment for parts in plan.segments for segment in parts]
    rows, lanes, limits = (np.array(column, dtype=np.int64) for column in list(zip(*every, strict=True))[:3])
    per_tile = plan.config.rows_per_tile
    chunks = np.minimum(lanes, plan.chunk)
    pieces = -(-lanes // chunks)
    items = -(-rows // per_tile) * pieces
    segment = np.repeat(np.arange(len(every)), items)
    tile, piece = np.divmod(np.arange(len(segment)) - np.repeat(np.cumsum(items) - items, items), pieces[segment])
    before = tile * per_tile  # rows of the task in earlier tiles
    work = np.zeros((len(segment), 8), dtype=np.int64)
    work[:, 0] = first_page[segment]
    work[:, 1] = piece * chunks[segment]
    work[:, 3] = first_row[segment] + before
    work[:, 4] = np.minimum(rows[segment] - before, per_tile)
    work[:, 5] = limits[segment] + np.where(limits[segment] < EVERYTHING, before, 0)
    # The last row of a tile sees the most: lanes up to limit + rows - 1.
    ends = np.minimum(work[:, 1] + chunks[segment], lanes[segment])
    work[:, 2] = np.minimum(ends, work[:, 5] + work[:, 4])
    kept: Int64Array = work[work[:, 1] < work[:, 2]]
    return kept


def _page_lists(plan: DecodePlan, views: StepViews) -> tuple[Int32Array, Int32Array, list[Int64Array]]:
    """Pages and counts of all tasks, and where the pages of each entry's own node stand there.

    Counts are those of this step. In a step with a reserve an entry's own pages stand in one task only.
    """
    pages = np.concatenate([task.pages for task in plan.tasks])
    counts = np.concatenate([task.counts for task in plan.tasks])
    place = np.zeros(int(pages.max()) + 1, dtype=np.int64)
    place[pages] = np.arange(len(pages))
    own = [place[entry.own.pages] for entry in views.entries]
    if views.reserve:
        for entry, places in zip(views.entries, own, strict=True):
            counts[places] = entry.own.counts
    return pages, counts, own


def _places(run: KeyRun) -> Int64Array:
    if run.place is None:
        raise ValueError(f"expected runs of keys with a place in the device pages, got {run.tokens} keys without")
    return np.arange(run.place, run.place + len(run.pages))


def _lay_ahead(views: StepViews, own: Sequence[Int64Array]) -> tuple[Int64Array, Int32Array]:
    """`DecodeTables.ahead` and `filled`."""
    steps = np.arange(1 + views.reserve) - views.index
    tokens = np.array([entry.own.tokens for entry in views.entries])
    last = np.maximum(tokens - 1 + steps[:, None], 0)  # steps that are past are not asked for
    page, offset = np.divmod(last, views.page_size)
    ahead = np.stack([places[page[:, entry]] for entry, places in enumerate(own)], axis=1)
    return ahead, (offset + 1).astype(np.int32)


def _catch_up(ahead: torch.Tensor, filled: torch.Tensor, views: StepViews) -> None:
    """Device pages as of a later step, where no tables have advanced them: they were made with the counts of the first.

    The places of one step are all different; those of a later step are written later.
    """
    counts = _device_pages(views).counts
    for step in range(1, views.index + 1):
        counts.index_copy_(0, ahead[step], filled[step])


def _upload(arrays: Sequence[Int32Array], device: torch.device) -> list[torch.Tensor]:
    starts = np.cumsum([0, *(-(-len(array) // ALIGN) * ALIGN for array in arrays)])
    packed = np.zeros(int(starts[-1]), dtype=np.int32)
    for array, start in zip(arrays, starts[:-1], strict=True):
        packed[start : start + len(array)] = array
    tensor = torch.from_numpy(packed).to(device)
    return [tensor[start : start + len(array)] for array, start in zip(arrays, starts[:-1].tolist(), strict=True)]
