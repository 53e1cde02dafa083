"""Where the page lists of a cache stand in tables on a device: bookkeeping on the host, no tensors.

    row     what a branch owns: its nodes since it was forked, in order, with those of the branches merged into it. In
            the tables it has a slot, the number of a row there; or it is absent, and its nodes have no entries
    spot    of a node: its row, and its entries there

What happens to the tree is only noted. `Rows.update`, when a step is planned, follows it, and says what to write into
the tables for that, as {address: value} over the words of all of them:

    early   entries and counts that changed at the ends of rows, before any merge
    calls   blocks to be merged, (parent, children) each; those of one call are disjoint
    late    what comes after: first tokens behind a merge, and rows laid anew

A row is laid anew when a node that others follow in it has a page more or less, when a block cannot be merged in the
tables, and when it was absent: what has to move then, or was not there, is written from the nodes. A row longer than
the capacity is absent, and so is one for which the rows of the same step leave no slot. Else the slots go to those that
were used last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from mvkernels.cache.nodes import Node, Row, Spot, Target, resolve_start

Writes = dict[int, int]
Merge = tuple[Node, tuple[Node, ...], Node]
ALIGN = 64  # words: a kernel may count on the alignment of a table
FEW_MERGES = 1024


@dataclass(eq=False)
class Update:
    """The module's docstring has the legend. complete: whether all that was wanted is in the tables then."""

    early: Writes = field(default_factory=dict)
    calls: list[list[tuple[int, list[int]]]] = field(default_factory=list)
    late: Writes = field(default_factory=dict)
    complete: bool = True


class Rows:
    """The rows of one cache, in tables of num_rows rows with `capacity` entries each.

    uploaded_entries   page numbers written so far
    laid_anew          rows laid anew so far, but for those that no update had wanted before
    """

    def __init__(self, num_rows: int, capacity: int, page_size: int) -> None:
        self.num_rows, self.capacity, self.page_size = num_rows, capacity, page_size
        self.counts_at = -(-num_rows * capacity // ALIGN) * ALIGN  # addresses; pages begin at 0
        self.used_at = 2 * self.counts_at
        self.position_at = self.used_at + -(-num_rows // ALIGN) * ALIGN
        self.error_at = self.position_at + -(-num_rows // ALIGN) * ALIGN
        self.uploaded_entries = self.laid_anew = 0
        self._present: dict[int, Row] = {}
        self._free = list(range(num_rows))[::-1]
        self._merges: list[Merge] = []
        self._most_merges = FEW_MERGES
        self._changed: dict[Node, None] = {}
        # Of the update that is being made:
        self._now = 0
        self._targets: Mapping[Node, Target] = {}
        self._planned: tuple[dict[Node, int], dict[Node, int]] | None = None  # their starts and lengths
        self._idle: list[Row] | None = None

    # -- what happens to the tree ----------------------------------------------------------------------------------

    def merged(self, before: Node, tails: tuple[Node, ...], tail: Node) -> None:
        """The branches that write `tails` have joined the one that wrote `before` and goes on in `tail`."""
        if len(self._merges) >= self._most_merges:  # of branches that come and go while no step is planned
            self._merges = [merge for merge in self._merges if merge[0].refs]
            self._most_merges = max(FEW_MERGES, 2 * len(self._merges))
        self._merges.append((before, tails, tail))

    def changed(self, node: Node) -> None:
        """The node has fewer tokens or pages than an update was told, or has advanced on the device."""
        spot = node.spot
        if spot is not None:
            spot.paged = min(spot.paged, len(node.pages))
            spot.full = min(spot.full, node.length // self.page_size)
            spot.row.overlong = False
            self._changed[node] = None

    def split(self, node: Node, front: Node) -> None:
        """The first pages of the node are those of `front` now, which stands right before it."""
        spot = node.spot or Row().add(node)
        row, pages = spot.row, len(front.pages)
        if spot.entries < pages:
            self._remove(row, self._free)
        entries = min(spot.entries, pages)
        front.spot = before = Spot(front, row, spot.first, entries, min(spot.paged, pages), min(spot.full, pages))
        spot.first, spot.entries = spot.first + entries, spot.entries - entries
        spot.paged, spot.full = max(spot.paged - pages, 0), max(spot.full - pages, 0)
        row.spots.insert(row.spots.index(spot), before)
        row.alive += 1
        if node in self._changed:
            self._changed[front] = None

    def died(self, node: Node) -> None:
        """No branch sees the node any more."""
        if node.spot is not None:
            row = node.spot.row
            row.alive -= 1
            if not row.alive:
                self._remove(row, self._free)

    def forget(self) -> None:
        """The tables do not hold what they should: all rows are absent."""
        for row in [*self._present.values()]:
            self._remove(row, self._free)

    # -- a step ----------------------------------------------------------------------------------------------------

    def update(self, targets: Mapping[Node, Target], seen: Iterable[Node], merging: bool) -> Update:
        """What to write before a step that grows nodes to `targets`, and wants their rows and those of `seen`.

        merging: whether blocks can be merged in the tables.
        """
        self._now += 1
        self._targets, self._planned, self._idle = targets, None, None
        update = Update()
        left = dict.fromkeys([*targets, *self._changed])
        stale: dict[Row, None] = {}
        self._changed = {}
        if self._merges:
            left = self._write_ends(left, stale, update.early)
            stale = self._join_all(update, merging)
        left = self._write_ends(left, stale, update.late)
        stale.update((node.spot.row, None) for node in left if node.spot is not None)
        for row in stale:
            if row.slot is not None:
                self.laid_anew += 1
                self._lay_anew(row, left, update.late)
        wanted = {self._row_of(node): None for node in (*targets, *seen) if node.length or node in targets}
        update.complete = self._bring(wanted, update.late)
        self._targets, self._planned, self._idle = {}, None, None
        return update

    def place(self, node: Node) -> int:
        """Where the node's entries begin, among those of all rows; 0 where it has none."""
        spot = node.spot
        return 0 if spot is None or spot.row.slot is None else spot.row.slot * self.capacity + spot.first

    def _write_ends(self, nodes: Iterable[Node], stale: Collection[Row], writes: Writes) -> dict[Node, None]:
        """Writes what changed in rows where nothing has to move for it; returns the nodes of all others."""
        rows: dict[Row, list[Spot]] = {}
        left: dict[Node, None] = {}
        for node in nodes:
            spot = node.spot
            if spot is None or spot.row.slot is None or spot.row in stale:
                left[node] = None
            elif node.refs:
                rows.setdefault(spot.row, []).append(spot)
        for row, spots in rows.items():
            row.stamp = self._now
            if not self._write_end(row, spots, writes):
                left.update((spot.node, None) for spot in spots)
        return left

    def _write_end(self, row: Row, spots: list[Spot], writes: Writes) -> bool:
        """Whether at most one of the nodes has more entries or fewer, and no others stand behind it: they are written,
        or the row goes, because it does not fit any more.
        """
        resized = [spot for spot in spots if self._size(spot.node) != spot.entries]
        if resized:
            spot = resized[0]
            last = spot.first + spot.entries == row.end if spot.entries else spot is row.spots[-1]
            if len(resized) > 1 or not last:
                return False
            if not spot.entries:
                spot.first = row.end
            row.end = spot.first + self._size(spot.node)
            if row.end > self.capacity:
                row.overlong = True
                self._remove(row, self._free)
                return True
        for spot in spots:
            self._write_spot(row, spot, writes)
        self._write_row(row, writes, bool(resized))
        return True

    def _lay_anew(self, row: Row, changed: Collection[Node], writes: Writes) -> bool:
        """Writes what changed, and all that has to move or was absent. Returns whether the row fits; else it goes."""
        row.spots = [spot for spot in row.spots if spot.node.refs]
        sizes = [self._size(spot.node) for spot in row.spots]
        row.overlong = sum(sizes) > self.capacity
        if row.overlong:
            self._remove(row, self._free)
            return False
        row.stamp, row.end = self._now, 0
        for spot, size in zip(row.spots, sizes, strict=True):
            if not spot.entries or spot.first != row.end:
                spot.first = row.end
                spot.clear()
            if spot.entries != size or spot.node in changed:
                self._write_spot(row, spot, writes)
            row.end += size
        self._write_row(row, writes)
        return True

    def _bring(self, wanted: Collection[Row], writes: Writes) -> bool:
        """Gives a slot to each row that is absent, and writes it; returns whether all of them are there."""
        absent = [(row, row.stamp > 0) for row in wanted if row.slot is None]
        for row in wanted:  # before any of them may have to go for another
            row.stamp = self._now
        if len(wanted) > self.num_rows:
            return False
        for row, known in absent:
            if row.overlong or not self._take_slot(row, idle=True):
                return False
            self.laid_anew += known
            if not self._lay_anew(row, (), writes):
                return False
        return True

    # -- merges ----------------------------------------------------------------------------------------------------

    def _join_all(self, update: Update, merging: bool) -> dict[Row, None]:
        """Follows all merges, and plans those that the tables can do; returns the rows that others put out of order."""
        merges, self._merges = self._merges, []
        stale: dict[Row, None] = {}
        parents: list[Row] = []
        freed: list[int] = []  # not to be used again before the tables have merged
        for before, tails, tail in merges:
            if not before.refs:  # nobody sees anything of it any more
                continue
            parent = self._row_of(before)
            children = [self._row_of(node) for node in tails]
            outside = self._join(parent, children, update, merging, freed)
            if outside or any(child in stale for child in children):
                stale[parent] = None
            parent.add(tail)
            parents.append(parent)
        for parent in parents:
            parent.calls = 0
        self._free += freed
        return stale

    def _join(self, parent: Row, children: list[Row], update: Update, merging: bool, freed: list[int]) -> bool:
        """One merge; returns whether some nodes have to be written into the parent's row."""
        entries = sum(child.end for child in children)
        together = merging and entries > 0 and parent.end + entries <= self.capacity
        together = together and (parent.slot is not None or self._begin(parent, update.early))
        call = max(row.calls for row in (parent, *children))
        slots: list[int] = []
        outside = False
        for child in children:
            there = together and child.slot is not None
            for spot in child.spots:
                spot.row = parent
                if there:
                    spot.first += parent.end
                else:
                    spot.clear()
                    outside = outside or self._size(spot.node) > 0
            if child.slot is not None:
                if there and child.end:
                    slots.append(child.slot)
                    parent.end += child.end
                del self._present[child.slot]
                freed.append(child.slot)
                child.slot = None
            parent.spots += child.spots
            parent.alive += child.alive
        if slots and parent.slot is not None:
            update.calls += [[] for _ in range(call + 1 - len(update.calls))]
            update.calls[call].append((parent.slot, slots))
            parent.calls = call + 1
        return outside

    def _begin(self, row: Row, writes: Writes) -> bool:
        """Whether an absent row that has nothing yet gets a slot, for others to be merged into it."""
        if any(self._size(spot.node) for spot in row.spots if spot.node.refs):
            return False
        if not self._take_slot(row) or row.slot is None:
            return False
        writes |= {self.used_at + row.slot: 0, self.position_at + row.slot: 0}
        return True

    # -- inside ----------------------------------------------------------------------------------------------------

    def _row_of(self, node: Node) -> Row:
        """A node that no update has met yet is all that its branch owns."""
        return (node.spot or Row().add(node)).row

    def _size(self, node: Node) -> int:
        """The entries that the node should have."""
        target = self._targets.get(node)
        return len(node.pages) if target is None else len(target.pages)

    def _take_slot(self, row: Row, idle: bool = False) -> bool:
        """Gives a slot to a row, if there is one. idle: from a row that this update has no use for, if need be."""
        if idle and not self._free:
            if self._idle is None:  # the one that was used last comes first
                present = (other for other in self._present.values() if other.stamp < self._now)
                self._idle = sorted(present, key=lambda other: -other.stamp)
            if self._idle:
                self._remove(self._idle.pop(), self._free)
        if not self._free:
            return False
        row.slot, row.end = self._free.pop(), 0
        self._present[row.slot] = row
        return True

    def _remove(self, row: Row, free: list[int]) -> None:
        """The row is absent from now on."""
        if row.slot is not None:
            del self._present[row.slot]
            free.append(row.slot)
        row.slot, row.end = None, 0
        for spot in row.spots:
            spot.clear()

    def _write_spot(self, row: Row, spot: Spot, writes: Writes) -> None:
        """The node's pages and counts, from the first of each that may be wrong."""
        node, target = spot.node, self._targets.get(spot.node)
        if row.slot is None:
            return
        pages, tokens = (node.page_array(), node.length) if target is None else (target.pages, target.tokens)
        at, size = row.slot * self.capacity + spot.first, len(pages)
        if spot.paged < size:
            writes.update(zip(range(at + spot.paged, at + size), pages[spot.paged :].tolist(), strict=True))
            self.uploaded_entries += size - spot.paged
        if spot.full < size:
            at += self.counts_at
            full, rest = divmod(tokens, self.page_size)
            if spot.full < full:
                writes.update(dict.fromkeys(range(at + spot.full, at + full), self.page_size))
            if full < size:
                writes[at + full] = rest
                if full + 1 < size:
                    writes.update(dict.fromkeys(range(at + full + 1, at + size), 0))
            spot.full = full
        spot.entries = spot.paged = size

    def _write_row(self, row: Row, writes: Writes, resized: bool = True) -> None:
        """How many entries there are, and the next position of the branch that owns the row."""
        if row.slot is None:
            return
        if resized:
            writes[self.used_at + row.slot] = row.end
        node = row.spots[-1].node
        target = self._targets.get(node)
        if target is not None:
            position = target.position
        else:
            if self._planned is None:
                starts = {node: target.position - target.tokens for node, target in self._targets.items()}
                self._planned = starts, {node: target.tokens for node, target in self._targets.items()}
            position = resolve_start(node, *self._planned) + node.length
        writes[self.position_at + row.slot] = position
