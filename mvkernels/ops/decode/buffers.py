"""Tables of tree decode at fixed addresses, with room for other steps than the one they hold: what a CUDA graph reads.

A graph holds addresses and the sizes of its launches. So the tables of a step are copied into buffers of some capacity,
and the same graph serves every step that fits. What is beyond the step's own does nothing: work items without rows;
rows without keys, which get 0 and -inf; and slot -1, where nothing is appended.

    cursor [1]          steps since the tables were laid, -1 before the first
    state [4, N]        of each row: its token's number in its own node, where that node's first page stands in `pages`
                        (-1: a row beyond the step's own), its position, and whether it is its entry's last row
    positions, slots    [N] int32 and int64: derived from these by `advance`, for the step that comes next

All tables are int32 and parts of one tensor: a plan is one copy. `advance` is work on the device alone, and the first
thing in a graph: it sets what step number `cursor` + 1 needs, and adds to nothing, so that the step for which tables
are laid is derived in the same way as those after it.

Buckets. Capacities are rounded up, so that few graphs serve many steps. What padding costs decides how coarsely:

    rows        1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ...: less than half are beyond the step's own, from 16 on less
                than a third. As long as reading the weights takes longer than multiplying by them (some hundred rows
                of 16 bit, see BALANCE) they cost little; beyond, every product, norm and logit shows them
    work        with a merge: 2^c times two programs for each multiprocessor, for which plans cut most steps. An item
                without rows ends after a few instructions, and comes last, when there is room beside the others
    partials    with a merge: 2^c times 16 a row, the same c: what is too many for either takes the next. They cost
                memory only, one layer's at a time: 16 x 32 heads x 128 x 4 bytes a row are 256 KiB
    direct      where every row has one partial there are no more items than rows, and no merge
    pages       only where the lists are not on the device already: from 4096 on, and as many as were ever needed
    tile        of the plan: one to four for a model

So a batch size has a graph for "direct", if it ever is, and in most cases one or two for each tile with a merge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mvkernels.ops.decode.cost_model import EVERYTHING, DecodeConfig, DecodePlan, Shape
from mvkernels.ops.decode.tables import ALIGN, DecodeTables, TableArrays
from mvkernels.ops.decode.tasks import DevicePages, Int32Array, StepViews

AnyInts = npt.NDArray[np.signedinteger[Any]]
PROGRAMS = 2  # for each multiprocessor, in the smallest bucket with a merge
PARTIALS = 16  # for each row, likewise
PAGES = 4096


class Capacity(NamedTuple):
    """Of buffers. partials: 0 where every row has one and nothing is merged; pages: 0 where they are on the device."""

    rows: int
    work: int
    partials: int
    pages: int


class Bucket(NamedTuple):
    """Steps that one graph serves. lists: the addresses of the device's page lists, where they are used."""

    capacity: Capacity
    config: DecodeConfig
    lists: tuple[int, int] | None


def bucket_of(plan: DecodePlan, arrays: TableArrays, views: StepViews, shape: Shape, pages: int = PAGES) -> Bucket:
    """The smallest bucket that the tables of a plan fit into. pages: no fewer than these."""
    rows = round_rows(views.total_rows)
    work, partials = rows, 0
    if plan.path != "direct":
        work = _power(-(-PROGRAMS * shape.num_sms // shape.kv_heads))
        partials = max(work, PARTIALS * rows)
        while work < len(arrays.work) or partials < len(arrays.merge_ids):
            work, partials = 2 * work, 2 * partials
    lists = None
    if arrays.pages is None and views.device_pages is not None:
        lists = (views.device_pages.pages.data_ptr(), views.device_pages.counts.data_ptr())
    pages = 0 if arrays.pages is None else _power(max(pages, len(arrays.pages)))
    return Bucket(Capacity(rows, work, partials, pages), plan.config, lists)


def round_rows(rows: int) -> int:
    """Up to a power of two, or from 16 on to one and a half of one."""
    power = _power(rows)
    return power // 4 * 3 if power > 16 and rows <= power // 4 * 3 else power


def _power(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, eq=False)
class DecodeBuffers:
    """The module's docstring has the legend. packed: what a plan writes, in one copy; keep [N]: rows that it names."""

    capacity: Capacity
    page_size: int
    packed: torch.Tensor
    starts: dict[str, int]
    cursor: torch.Tensor
    state: torch.Tensor
    keep: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: DecodeTables

    @classmethod
    def empty(
        cls, bucket: Bucket, page_size: int, device: torch.device, lists: DevicePages | None = None
    ) -> DecodeBuffers:
        """Buffers for the steps of a bucket; `lists` where it has page lists on the device."""
        rows, work, partials, pages = bucket.capacity
        sizes = {
            "cursor": 1, "state": 4 * rows, "keep": rows, "work": 8 * work, "rows": partials or rows,
            "merge_ptr": rows + 1, "merge_ids": partials, "pages": pages, "counts": pages,
        }  # fmt: skip
        starts, end = {}, 0
        for name, size in sizes.items():
            starts[name], end = end, end + -(-size // ALIGN) * ALIGN
        packed = torch.zeros(end, dtype=torch.int32, device=device)
        part = {name: packed[start : start + sizes[name]] for name, start in starts.items()}
        where = DevicePages(part["pages"], part["counts"]) if lists is None else lists
        tables = DecodeTables(
            bucket.config, "split" if partials else "direct", part["work"].view(-1, 8), where.pages, where.counts,
            part["rows"], part["merge_ptr"], part["merge_ids"], partials,
        )  # fmt: skip
        positions = torch.zeros(rows, dtype=torch.int32, device=device)
        slots = torch.full((rows,), -1, dtype=torch.int64, device=device)
        state = part["state"].view(4, rows)
        return cls(
            bucket.capacity, page_size, packed, starts, part["cursor"], state, part["keep"], positions, slots, tables
        )

    def lay(self, arrays: TableArrays, views: StepViews, positions: Int32Array, keep: Int32Array) -> int:
        """Copies the tables of a step here; its bucket is this one's. Returns how many bytes went to the device.

        positions [rows]: of the step for which the views are; keep: numbers of rows, no more than there are.
        """
        parts = self._padded(arrays, views.total_rows)
        parts |= {"cursor": np.array([-1]), "state": self._state(arrays, views, positions), "keep": keep}
        packed = np.zeros(len(self.packed), dtype=np.int32)
        for name, part in parts.items():
            flat = np.reshape(part, -1)
            packed[self.starts[name] : self.starts[name] + len(flat)] = flat
        upload(self.packed, torch.from_numpy(packed))
        return packed.nbytes

    def advance(self) -> None:
        """Positions, slots and counts of the step after the last one, or of the first. Device work only."""
        from mvkernels.ops.decode.triton import launch_advance

        self.cursor.add_(1)
        tables = self.tables
        launch_advance(self.state, self.cursor, tables.pages, tables.counts, self.positions, self.slots, self.page_size)

    def padded(self, views: StepViews, key: object) -> StepViews:
        """The views of a step over these tables, found under `key`."""
        return replace(views, total_rows=self.capacity.rows, _cache={key: self.tables})

    def _state(self, arrays: TableArrays, views: StepViews, positions: Int32Array) -> Int32Array:
        state = np.zeros((4, self.capacity.rows), dtype=np.int32)
        state[1] = -1
        for entry, places in zip(views.entries, arrays.own, strict=True):
            first, end = entry.first_row, entry.first_row + entry.num_rows
            state[0, first:end] = np.arange(entry.base, entry.own.tokens)
            state[1, first:end] = places[0]
            state[3, end - 1] = 1
        state[2, : len(positions)] = positions
        return state

    def _padded(self, arrays: TableArrays, rows: int) -> dict[str, AnyInts]:
        """The tables, with what the rows beyond the step's own need."""
        capacity = self.capacity
        work, item_rows = arrays.work, arrays.rows
        if not capacity.partials:  # these rows are written by items of theirs
            per_tile = self.tables.config.rows_per_tile
            first = np.arange(rows, capacity.rows, per_tile)
            spare = np.zeros((len(first), 8), dtype=np.int64)
            spare[:, 3] = spare[:, 6] = first
            spare[:, 4] = np.minimum(capacity.rows - first, per_tile)
            spare[:, 5] = EVERYTHING
            work, item_rows = np.concatenate([work, spare]), np.concatenate([item_rows, np.arange(rows, capacity.rows)])
        merge_ptr = np.pad(arrays.merge_ptr, (0, capacity.rows - rows), mode="edge")
        parts: dict[str, AnyInts] = {"work": work, "rows": item_rows, "merge_ptr": merge_ptr}
        if capacity.partials:
            parts["merge_ids"] = arrays.merge_ids
        if arrays.pages is not None and arrays.counts is not None:
            parts |= {"pages": arrays.pages, "counts": arrays.counts}
        return parts


def upload(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies into a tensor; from the host to a GPU without waiting for it."""
    if target.is_cuda and not source.is_cuda:
        # A copy of our own, of pinned memory too: the caller may write to his again before this has been read. The
        # allocator keeps it until then.
        staged = torch.empty(source.shape, dtype=target.dtype, pin_memory=True)
        source = staged.copy_(source)
    target.copy_(source, non_blocking=True)
