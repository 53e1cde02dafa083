"""Device tables of tree decode: tasks cut into tiles of rows and chunks of keys, and the order of their merge.

A task's keys are numbered by lanes: lane t is key t % page_size of the task's page t // page_size, so lanes beyond the
count of a ragged page hold no key. A work item is a tile of rows on one chunk of lanes; it writes one partial result
per row. All sizes are run-time values, so that nothing compiles again when branches come and go.

    work [W, 8] int32   first index into pages, first lane, end lane, first index into rows, rows in the tile,
                        limit: row i of the tile sees lanes <= limit + i, first partial, 0; longest first
    pages, counts [P]   of all tasks, one after the other, int32
    rows [R]            of all tasks, int32
    merge_ptr [N + 1]   partials of row r are merge_ids[merge_ptr[r]:merge_ptr[r + 1]], merged in that order, int32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mvkernels.ops.decode_tasks import DecodeTask, Int32Array, Int64Array

EVERYTHING = 2**30  # a limit that hides no lane; a tile's rows may be added to it
MIN_CHUNK = 256
PROGRAMS_PER_SM = 4
ALIGN = 64  # tables start at multiples of 256 bytes, for Triton compiles a pointer's alignment in


@dataclass(frozen=True)
class DecodeConfig:
    """Tile shape: block_m query heads of rows (rows_per_tile rows of `group` heads), block_n lanes at a time."""

    block_m: int
    block_n: int
    rows_per_tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, eq=False)
class DecodeTables:
    """The module's docstring has the legend; tensors share one upload."""

    work: torch.Tensor
    pages: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor
    merge_ptr: torch.Tensor
    merge_ids: torch.Tensor
    num_partials: int


def choose_config(group: int, head_dim: int, most_rows: int, element_size: int) -> DecodeConfig:
    """Two shapes per model: a narrow one while no task has more rows than fit into it, and a wide one."""
    full_precision = element_size > 2  # multiplied without tensor cores, out of registers: larger tiles spill
    narrow = max(16, 1 << (group - 1).bit_length())
    wide = max(64 if head_dim <= 128 and not full_precision else 32, narrow)
    block_m = narrow if most_rows * group <= narrow else wide
    block_n = 16 if full_precision else 64 if head_dim <= 128 else 32
    num_warps = 8 if block_m > (16 if full_precision else 64) else 4
    return DecodeConfig(block_m, block_n, block_m // group, num_warps, num_stages=2)


def choose_chunk(tasks: Sequence[DecodeTask], page_size: int, config: DecodeConfig, kv_heads: int, num_sms: int) -> int:
    """Lanes per chunk, so that there are some PROGRAMS_PER_SM programs per multiprocessor, all about as long."""
    total = sum(-(-len(task.rows) // config.rows_per_tile) * len(task.pages) * page_size for task in tasks) * kv_heads
    wanted = max(MIN_CHUNK, -(-total // (PROGRAMS_PER_SM * num_sms)))
    return -(-wanted // config.block_n) * config.block_n


def build_tables(
    tasks: Sequence[DecodeTask], page_size: int, total_rows: int, rows_per_tile: int, chunk: int, device: torch.device
) -> DecodeTables:
    """Cuts the tasks, numbers the partials, and uploads everything at once."""
    work, rows_of_partials = [], []
    first_page = first_row = first_partial = 0
    for task in tasks:
        items = _cut(task, page_size, rows_per_tile, chunk)
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
    merge_ptr = np.concatenate([[0], np.cumsum(np.bincount(by_row, minlength=total_rows))])
    arrays = [
        items[longest_first].reshape(-1),
        np.concatenate([task.pages for task in tasks]),
        np.concatenate([task.counts for task in tasks]),
        np.concatenate([task.rows for task in tasks]),
        merge_ptr,
        np.argsort(by_row, kind="stable"),  # stable: in the order of tasks and chunks
    ]
    table, pages, counts, rows, ptr, ids = _upload([np.asarray(array, dtype=np.int32) for array in arrays], device)
    return DecodeTables(table.view(-1, 8), pages, counts, rows, ptr, ids, num_partials=len(by_row))


def _cut(task: DecodeTask, page_size: int, rows_per_tile: int, chunk: int) -> Int64Array:
    """Work items of a task, [items, 8], with rows, pages and partials counted from the task's own first."""
    lanes = (len(task.pages) - 1) * page_size + int(task.counts[-1])
    tile, part = np.meshgrid(np.arange(0, len(task.rows), rows_per_tile), np.arange(0, lanes, chunk), indexing="ij")
    items = np.zeros((tile.size, 8), dtype=np.int64)
    items[:, 1] = part.reshape(-1)
    items[:, 2] = np.minimum(items[:, 1] + chunk, lanes)
    items[:, 3] = tile.reshape(-1)
    items[:, 4] = np.minimum(len(task.rows) - items[:, 3], rows_per_tile)
    items[:, 5] = EVERYTHING if task.base is None else task.base + items[:, 3]
    # The last row of a tile sees the most: lanes up to limit + rows - 1.
    items[:, 2] = np.minimum(items[:, 2], items[:, 5] + items[:, 4])
    return items[items[:, 1] < items[:, 2]]


def _upload(arrays: Sequence[Int32Array], device: torch.device) -> list[torch.Tensor]:
    starts = np.cumsum([0, *(-(-len(array) // ALIGN) * ALIGN for array in arrays)])
    packed = np.zeros(int(starts[-1]), dtype=np.int32)
    for array, start in zip(arrays, starts[:-1], strict=True):
        packed[start : start + len(array)] = array
    tensor = torch.from_numpy(packed).to(device)
    return [tensor[start : start + len(array)] for array, start in zip(arrays, starts[:-1].tolist(), strict=True)]
