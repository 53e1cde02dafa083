"""The page tables of a cache on its device: `BranchTables` of one size, at fixed addresses for CUDA graphs.

The host structure is the authority. Fork, merge and free are only noted. `sync`, called by each plan, brings the tables
up to date with the tokens of the step counted. It never reads from the device and never waits for it.

    row     the nodes that a branch owns since its fork, with those of the branches merged into it
    slot    the number of a row in the tables; a row without one is absent, and is written whole when a step needs it

An update is one upload in three parts, {address: value} over the words of all tables:

    early   entries and counts at the ends of rows, before any merge
    calls   blocks for `merge_branches`, (parent, children) each; those of one call are disjoint. Nothing of the
            children is uploaded
    late    the first tokens after a merge, and whole rows

Whatever this does not cover makes a row absent: a change in the middle of it, a merge with an absent row, no kernel for
merges. If more slots are needed than are free, all rows become absent. If a row is too long, or a step needs more rows
than there are, `sync` returns None and the step's own page lists are uploaded.

Everything runs on the current stream: plan a step on the stream on which the one before it has run, or wait for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from mvkernels.branch_tables import BranchTables, merge_branches
from mvkernels.cache.nodes import Node, Row, Target, resolve_start
from mvkernels.errors import BackendError
from mvkernels.ops.decode.tasks import DevicePages
from mvkernels.ops.merge.cuda import cuda_reason

MOST_ENTRIES = 2**21  # by default: 16 MiB
LONGEST = 4096
MOST_ROWS = 1024
ALIGN = 64  # words: a kernel may count on the alignment of a table
FEW_MERGES = 1024

Writes = dict[int, int]


@dataclass(eq=False)
class Update:
    """The module's docstring has the legend. complete: whether the tables then hold all that was asked for."""

    early: Writes = field(default_factory=dict)
    calls: list[list[tuple[int, list[int]]]] = field(default_factory=list)
    late: Writes = field(default_factory=dict)
    complete: bool = True


def default_size(num_pages: int) -> tuple[int, int]:
    """(rows, entries of each) for a cache of so many pages: at most 16 MiB in all.

    A row has room for every page there is, up to 4096: 64 Ki tokens in pages of 16, of one branch with all that was
    merged into it. There are 512 rows or more, up to 1024.
    """
    capacity = min(num_pages, LONGEST)
    return min(MOST_ENTRIES // capacity, MOST_ROWS), capacity


class DeviceTables:
    """Tables of num_rows rows with `capacity` entries each, on `device`.

    Attributes:
        tables: The page tables; a slot is a row of them.
        pages: The same page lists, flat.
        merge_reason: Why merges are uploaded instead of done on the device, or None.

    Raises:
        ValueError: The size is not allowed.
    """

    def __init__(self, num_rows: int, capacity: int, page_size: int, device: torch.device) -> None:
        if min(num_rows, capacity) < 1 or num_rows * capacity >= 2**30:
            expected = "at least 1 row of at least 1 entry, and fewer than 2**30 entries"
            raise ValueError(f"table_size: expected {expected}, got {num_rows} rows of {capacity}")
        self.num_rows, self.capacity, self.page_size = num_rows, capacity, page_size
        self.counts_at = _aligned(num_rows * capacity)  # addresses; pages begin at 0
        self.used_at = 2 * self.counts_at
        self.position_at = self.used_at + _aligned(num_rows)
        error_at = self.position_at + _aligned(num_rows)
        with torch.inference_mode(False):  # or nothing could be written to it outside of that mode
            self._words = words = torch.zeros(error_at + 1, dtype=torch.int32, device=device)
        pages, counts = (words[first : first + num_rows * capacity] for first in (0, self.counts_at))
        used, position = (words[first : first + num_rows] for first in (self.used_at, self.position_at))
        shape = (num_rows, capacity)
        self.tables = BranchTables(pages.view(shape), counts.view(shape), used, position, words[error_at:])
        self.pages = DevicePages(pages, counts)
        self.merge_reason = None if device.type == "cpu" else cuda_reason(device)
        self._free = list(range(num_rows))[::-1]
        self._present: dict[int, Row] = {}
        self._merges: list[tuple[Node, tuple[Node, ...], Node]] = []
        self._most_merges = FEW_MERGES
        self._changed: dict[Node, None] = {}
        self._targets: Mapping[Node, Target] = {}  # of the update that is being made
        self._planned: tuple[dict[Node, int], dict[Node, int]] | None = None  # their starts and lengths
        self._lost = False

    # -- notes of what happens to the tree -----------------------------------------------------------------------

    def merged(self, before: Node, tails: tuple[Node, ...], tail: Node) -> None:
        """Note a merge: the branches that write `tails` into the one that wrote `before` and continues in `tail`."""
        if len(self._merges) >= self._most_merges:  # branches come and go, and no step is planned
            self._merges = [merge for merge in self._merges if merge[0].refs]
            self._most_merges = max(FEW_MERGES, 2 * len(self._merges))
        self._merges.append((before, tails, tail))

    def changed(self, node: Node) -> None:
        """Note that a node has other tokens than the last update counted: rolled back, truncated or advanced."""
        if node.row is not None:
            node.good = min(node.good, len(node.pages), node.length // self.page_size)
            self._changed[node] = None

    def split(self, node: Node, front: Node) -> None:
        """Note that the first pages of a node are those of `front` now, which stands right before it."""
        row, pages = _row_of(node), len(front.pages)
        if node.entries < pages:
            self._drop(row)
        front.row, front.first, front.entries, front.good = row, node.first, pages, min(node.good, pages)
        node.first, node.entries, node.good = node.first + pages, node.entries - pages, max(node.good - pages, 0)
        row.nodes.insert(row.nodes.index(node), front)
        if node in self._changed:
            self._changed[front] = None

    # -- a step --------------------------------------------------------------------------------------------------

    def sync(self, targets: Mapping[Node, Target], seen: Collection[Node]) -> DevicePages | None:
        """Bring the tables up to a step that grows nodes to `targets` and reads them and the nodes `seen`.

        Returns:
            The page lists, or None if they do not fit, and always after an interrupt in the middle of an update.
        """
        if self._lost:
            return None
        try:
            update = self._update(targets, seen)
            try:
                self._run(update)
            except (BackendError, ImportError) as error:  # a CuPy that cannot be loaded shows up here
                self.merge_reason = str(error)
                self._drop_all()
                update = self._update(targets, seen)
                self._run(update)
        except BaseException:
            self._drop_all()
            raise
        return self.pages if update.complete else None

    def place(self, node: Node) -> int:
        """Index of the node's first entry among those of all rows; 0 if it has none."""
        row = node.row
        return 0 if row is None or row.slot is None else row.slot * self.capacity + node.first

    def _update(self, targets: Mapping[Node, Target], seen: Iterable[Node]) -> Update:
        self._lost = True  # until it is through: an interrupt leaves merges half followed
        self._targets, self._planned = targets, None
        update = Update()
        ends: dict[Row | None, list[Node]] = {}
        for node in {**dict.fromkeys(targets), **self._changed}:
            if node.refs:
                ends.setdefault(node.row, []).append(node)
        self._changed = {}
        self._follow_merges(update, ends)
        for row, nodes in ends.items():
            if row is not None:
                self._write_ends(row, nodes, update.late)
        for node in ends.get(None, ()):  # in no row before: the first of a branch, or the first after a merge
            self._write_ends(_row_of(node), [node], update.late)
        rows = {_row_of(node): None for node in (*targets, *seen) if node.length or node in targets}
        update.complete = len(rows) <= self.num_rows
        if update.complete:
            if sum(row.slot is None for row in rows) > len(self._free):
                self._drop_all()
            absent = [row for row in rows if row.slot is None]
            update.complete = all([self._lay(row, update.late) for row in absent])
        self._targets, self._planned = {}, None
        self._lost = False
        return update

    def _follow_merges(self, update: Update, ends: dict[Row | None, list[Node]]) -> None:
        """Append the children's rows to their parents', on the device if all of them are present and fit."""
        merges, self._merges = self._merges, []
        touched: set[Row] = set()  # by the last call
        for before, tails, tail in merges:
            if not before.refs:  # no branch sees any of it
                continue
            parent, children = _row_of(before), [_row_of(node) for node in tails]
            for row in (parent, *children):
                self._write_ends(row, ends.pop(row, []), update.early)
            filled = [child for child in children if child.end or any(map(self._size, child.nodes))]
            block = [parent, *filled]
            fits = parent.end + sum(child.end for child in filled) <= self.capacity
            if filled and not (self.merge_reason is None and fits and all(row.slot is not None for row in block)):
                for row in block:
                    self._drop(row)
            elif filled:
                if not update.calls or touched.intersection(block):
                    update.calls.append([])
                    touched = set()
                slots = [row.slot for row in block if row.slot is not None]
                update.calls[-1].append((slots[0], slots[1:]))
                touched.update(block)
            for child in children:
                for node in child.nodes:
                    node.row, node.first = parent, node.first + parent.end
                parent.end += child.end
                parent.nodes += child.nodes
                self._drop(child)  # slots are taken again by late writes only
            parent.add(tail)

    def _write_ends(self, row: Row, nodes: Iterable[Node], writes: Writes) -> None:
        """Write nodes that changed, if at most the last one of the row has other entries; else the row goes."""
        if row.slot is None or not nodes:
            return
        resized = [node for node in nodes if self._size(node) != node.entries]
        if resized:
            node = resized[0]
            last = node.first + node.entries == row.end if node.entries else node is row.nodes[-1]
            first = node.first if node.entries else row.end
            if len(resized) > 1 or not last or first + self._size(node) > self.capacity:
                self._drop(row)
                return
            node.first, row.end = first, first + self._size(node)
        for node in nodes:
            self._write(row.slot, node, writes)
        self._write_row(row.slot, row, writes)

    def _lay(self, row: Row, writes: Writes) -> bool:
        """Write an absent row whole. Returns whether it fits."""
        row.nodes = [node for node in row.nodes if node.refs]
        if sum(map(self._size, row.nodes)) > self.capacity:
            return False
        row.slot = slot = self._free.pop()
        self._present[slot] = row
        for node in row.nodes:
            node.first, node.good = row.end, 0
            self._write(slot, node, writes)
            row.end += node.entries
        self._write_row(slot, row, writes)
        return True

    def _write(self, slot: int, node: Node, writes: Writes) -> None:
        """The node's pages and counts, from the first that is not known to be right and full."""
        target = self._targets.get(node)
        pages, tokens = (node.page_array(), node.length) if target is None else (target.pages, target.tokens)
        full, rest = divmod(tokens, self.page_size)
        at = slot * self.capacity + node.first
        for index, page in enumerate(pages[node.good :].tolist(), node.good):
            writes[at + index] = page
            writes[self.counts_at + at + index] = self.page_size if index < full else rest if index == full else 0
        node.entries, node.good = len(pages), min(full, len(pages))

    def _write_row(self, slot: int, row: Row, writes: Writes) -> None:
        """The number of entries, and the next position of the branch that owns the row."""
        node = row.nodes[-1]
        target = self._targets.get(node)
        if target is None and self._planned is None:
            starts = {node: target.position - target.tokens for node, target in self._targets.items()}
            self._planned = starts, {node: target.tokens for node, target in self._targets.items()}
        if target is not None:
            position = target.position
        else:
            assert self._planned is not None
            position = resolve_start(node, *self._planned) + node.length
        writes |= {self.used_at + slot: row.end, self.position_at + slot: position}

    def _size(self, node: Node) -> int:
        """The entries that the node should have."""
        target = self._targets.get(node)
        return len(node.pages) if target is None else len(target.pages)

    def _drop(self, row: Row) -> None:
        """Make a row absent."""
        if row.slot is not None:
            del self._present[row.slot]
            self._free.append(row.slot)
            row.slot, row.end = None, 0

    def _drop_all(self) -> None:
        for row in [*self._present.values()]:
            self._drop(row)

    # -- on the device -------------------------------------------------------------------------------------------

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
        staged = torch.empty(size, dtype=torch.int32, pin_memory=self._words.device.type == "cuda")
        words = staged.numpy()
        words[: 2 * writes].view(np.int64)[:] = [*early, *late]
        words[2 * writes : 3 * writes] = [*early.values(), *late.values()]
        words[3 * writes :] = [slot for index in indices for slot in index]
        there = staged.to(self._words.device, non_blocking=True)
        at, values = there[: 2 * writes].view(torch.int64), there[2 * writes : 3 * writes]
        self._scatter(at[: len(early)], values[: len(early)])
        ends = np.cumsum([3 * writes, *map(len, indices)]).tolist()
        parts = [there[first:last] for first, last in pairwise(ends)]
        for call in range(len(update.calls)):
            parents, children, child_ptr = parts[3 * call : 3 * call + 3]
            merge_branches(self.tables, parents, children, child_ptr)
        self._scatter(at[len(early) :], values[len(early) :])

    def _scatter(self, at: torch.Tensor, values: torch.Tensor) -> None:
        if len(at):
            self._words.index_copy_(0, at, values)


def _aligned(words: int) -> int:
    return -(-words // ALIGN) * ALIGN


def _row_of(node: Node) -> Row:
    """The row of a node. One that no update has met yet is all that its branch owns."""
    if node.row is None:
        Row().add(node)
    assert node.row is not None
    return node.row
