"""The page lists of a cache on its device: `BranchTables` of one size at fixed addresses, for the cache's whole life.

The host structure is the authority. When a step is planned, `sync` brings the tables up to it, the tokens of the step
counted, by as little as it takes: one small upload, new entries and changed counts in one scatter, merges by
`merge_branches`, without the pages of the children, and a second scatter for what comes after them. What the host does
for that stands in `cache.rows`. The host never waits for the device, and reads nothing from it.

Everything runs on the current stream: plan a step on the stream on which the one before it has run, or wait for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise

import numpy as np
import torch

from mvkernels.branch_tables import BranchTables, merge_branches
from mvkernels.cache.nodes import Node, Target
from mvkernels.cache.rows import Rows, Update
from mvkernels.errors import BackendError
from mvkernels.ops.decode.tasks import DevicePages
from mvkernels.ops.merge.cuda import cuda_reason

MOST_ENTRIES = 2**21  # by default: 16 MiB
LONGEST = 4096
MOST_ROWS = 1024


def default_size(num_pages: int) -> tuple[int, int]:
    """The rows and the entries of each that a cache of so many pages has by default: at most 16 MiB in all.

    A row has room for every page there is, up to 4096: 64 Ki tokens in pages of 16, of one branch with all that was
    merged into it. There are 512 rows or more, up to 1024.
    """
    capacity = min(num_pages, LONGEST)
    return min(MOST_ENTRIES // capacity, MOST_ROWS), capacity


class DeviceTables:
    """Tables of num_rows rows with `capacity` entries each, on `device`. Raises ValueError when they cannot be made.

    tables          what is there: a slot is a row of `cache.rows`, a branch's own list
    pages           the same page lists, flat
    merge_reason    why merges are not done on the device but uploaded, or None: there is no kernel for it
    device_merges   blocks merged on the device so far; `rows` counts what was uploaded
    """

    def __init__(self, num_rows: int, capacity: int, page_size: int, device: torch.device) -> None:
        if min(num_rows, capacity) < 1 or num_rows * capacity >= 2**30:
            expected = "at least 1 row of at least 1 entry, and fewer than 2**30 entries"
            raise ValueError(f"table_size: expected {expected}, got {num_rows} rows of {capacity}")
        self.rows = rows = Rows(num_rows, capacity, page_size)
        with torch.inference_mode(False):  # or nothing could be written to it outside of that mode
            self._words = words = torch.zeros(rows.error_at + 1, dtype=torch.int32, device=device)
        pages, counts = (words[first : first + num_rows * capacity] for first in (0, rows.counts_at))
        used, position = (words[first : first + num_rows] for first in (rows.used_at, rows.position_at))
        shape = (num_rows, capacity)
        self.tables = BranchTables(pages.view(shape), counts.view(shape), used, position, words[rows.error_at :])
        self.pages = DevicePages(pages, counts)
        self.merge_reason = None if device.type == "cpu" else cuda_reason(device)
        self.device_merges = 0
        self._lost = False

    def sync(self, targets: Mapping[Node, Target], seen: Collection[Node]) -> DevicePages | None:
        """The tables with what `targets` say of the nodes that a step grows, and with the rows of the nodes `seen`.

        None where they do not fit. After an error of the device all of it is written again at the next call; after an
        interrupt while the host followed the tree, nothing says any more what stands in which row: None from then on.
        """
        if self._lost:
            return None
        try:
            update = self._update(targets, seen, merging=self.merge_reason is None)
            try:
                self._run(update)
            except (BackendError, ImportError) as error:  # a CuPy that cannot be loaded is found out here
                self.merge_reason = str(error)
                self.rows.forget()
                update = self._update(targets, seen, merging=False)
                self._run(update)
        except BaseException:
            self.rows.forget()
            raise
        return self.pages if update.complete else None

    def _update(self, targets: Mapping[Node, Target], seen: Collection[Node], merging: bool) -> Update:
        self._lost = True  # until it is through
        update = self.rows.update(targets, seen, merging)
        self._lost = False
        return update

    def _run(self, update: Update) -> None:
        """One upload: addresses (int64) and values of both scatters, then slots and ranges of each call's blocks."""
        early, late = update.early, update.late
        indices = []
        for blocks in update.calls:
            indices.append([parent for parent, _ in blocks])
            indices.append([child for _, children in blocks for child in children])
            indices.append(np.cumsum([0, *(len(children) for _, children in blocks)]).tolist())
        writes = len(early) + len(late)
        size = 3 * writes + sum(map(len, indices))
        if not size:
            return
        on_gpu = self._words.device.type == "cuda"
        staged = torch.empty(size, dtype=torch.int32, pin_memory=on_gpu)
        words = staged.numpy()
        words[: 2 * writes].view(np.int64)[:] = [*early, *late]
        words[2 * writes : 3 * writes] = [*early.values(), *late.values()]
        words[3 * writes :] = [slot for index in indices for slot in index]
        there = staged.to(self._words.device, non_blocking=True)
        at, values = there[: 2 * writes].view(torch.int64), there[2 * writes : 3 * writes]
        self._scatter(at[: len(early)], values[: len(early)])
        ends = np.cumsum([3 * writes, *map(len, indices)]).tolist()
        parts = [there[first:last] for first, last in pairwise(ends)]
        for call, blocks in enumerate(update.calls):
            parents, children, child_ptr = parts[3 * call : 3 * call + 3]
            merge_branches(self.tables, parents, children, child_ptr)
            self.device_merges += len(blocks)
        self._scatter(at[len(early) :], values[len(early) :])

    def _scatter(self, at: torch.Tensor, values: torch.Tensor) -> None:
        if len(at):
            self._words.index_copy_(0, at, values)
