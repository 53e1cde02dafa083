"""A step of the paged KV cache: new tokens of some branches, with the slots reserved for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from mvkernels.cache.nodes import Contents, PageLog, Target, contents_of
from mvkernels.errors import BranchError, StaleStep
from mvkernels.ops.decode.tasks import DevicePages, EntryView, KeyRun, StepViews

if TYPE_CHECKING:
    from mvkernels.cache.device import DeviceTables
    from mvkernels.cache.nodes import Link, Node


class BranchStore(Protocol):
    """The cache behind a handle: `PagedKVCache`."""

    num_pages: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def next_position(self, branch: Branch) -> int: ...
    def num_tokens(self, branch: Branch) -> int: ...


@dataclass(frozen=True, eq=False)
class Branch:
    """Handle of a branch, from `PagedKVCache.new`, `fork` or `fork_at`; compared by identity.

    Attributes:
        cache: The cache that made it.
        id: Number of the branch, unique in its cache.
    """

    cache: BranchStore
    id: int

    def __repr__(self) -> str:
        try:
            return f"Branch({self.id}, {self.num_tokens} tokens, next position {self.next_position})"
        except BranchError:
            return f"Branch({self.id}, gone)"

    @property
    def next_position(self) -> int:
        """Position of the next token. Raises BranchError when the branch was freed."""
        return self.cache.next_position(self)

    @property
    def num_tokens(self) -> int:
        """Number of committed tokens that the next token will see. Raises BranchError when the branch was freed."""
        return self.cache.num_tokens(self)


@dataclass(eq=False, slots=True)  # not frozen, which doubles the time: one is made per entry and step
class PlannedNode:
    """The change of a node when its entry is committed.

    `pages` are reserved for it: the first ones for the tokens of the entry, the others for those of the steps to come.
    """

    node: Node
    start: int
    base: int
    num_tokens: int
    pages: list[int]


@dataclass(eq=False)
class StepState:
    """Why a step can no longer be used; None while it is open."""

    closed: str | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """New tokens of some branches, one row each; the rows of an entry are consecutive.

    Made by `PagedKVCache.plan`. Only the first five attributes are for callers.

    Attributes:
        total_rows: N, the number of new tokens.
        entries: (branch, number of tokens), in the order of `plan`.
        row_offsets: First row of each entry.
        positions: [N] int32, position of each row.
        slots: [N] int64, page * page_size + offset, where `append` writes the row.
        views: What each entry sees (`ops.decode.tasks`), shared by all layers.
        planned: The changes of `commit`; after an advance, those of the next step.
        state: Whether the step is open.
        ahead: [1 + reserve, N] int64, slots of this step and those to come, for `PagedKVCache.advance`; None where it
            cannot advance: an entry has several tokens, or sees tokens of another entry.
        cursor: [1] int64, the row of `ahead` of this step.
        index: The same number on the host.
        spare: Whether some rows are not written; their slots are -1.
    """

    total_rows: int
    entries: tuple[tuple[Branch, int], ...]
    row_offsets: tuple[int, ...]
    positions: torch.Tensor
    slots: torch.Tensor
    views: StepViews = field(repr=False)
    planned: tuple[PlannedNode, ...] = field(repr=False)
    state: StepState = field(repr=False)
    ahead: torch.Tensor | None = field(default=None, repr=False)
    cursor: torch.Tensor | None = field(default=None, repr=False)
    index: int = 0
    spare: bool = False

    def __repr__(self) -> str:
        branches = f"{len(self.entries)} branch{'es' if len(self.entries) != 1 else ''}"
        return f"Step({self.total_rows} rows of {branches}, {self.state.closed or 'open'})"

    @cached_property
    def longest_context(self) -> int:
        """Most tokens that any row sees, itself included."""
        return max(sum(run.tokens for run in (*view.whole, view.own)) for view in self.views.entries)

    @cached_property
    def reserved_pages(self) -> int:
        """Number of pages reserved for this step and those to come."""
        return sum(len(planned.pages) for planned in self.planned)

    def advance_tensors(self) -> None:
        """Advance the tensors of the step to the next one in place: device work only, without a host sync.

        `PagedKVCache.advance` calls it. A CUDA graph captures it with the step that follows.

        Raises:
            ValueError: The step was not planned with a reserve and one token per entry.
        """
        if self.ahead is None or self.cursor is None:
            raise ValueError(
                "expected a step with one token for each branch that was planned with reserve=, got another"
            )
        self.cursor.add_(1)
        self.positions.add_(1)
        self.slots.copy_(self.ahead.index_select(0, self.cursor)[0])
        self.views.advance_tables(self.cursor)

    def require_open(self) -> None:
        """Raise unless the step is open: not committed, not rolled back, and its tree unchanged.

        Raises:
            StaleStep: The step is closed.
        """
        if self.state.closed is not None:
            raise StaleStep(f"expected an open step, got one that was {self.state.closed}")


def require_pairs(entries: Sequence[tuple[Branch, int]], reserve: int) -> None:
    """Raise ValueError unless `entries` are pairs of a branch and an integer, and `reserve` is an integer."""
    try:
        kinds: set[type] = {type(reserve), *(type(count) for _, count in entries)}
    except (TypeError, ValueError):
        raise ValueError(f"plan: expected (branch, number of tokens) pairs, got {entries!r}") from None
    if not all(issubclass(kind, Integral) for kind in kinds):
        raise ValueError(f"plan: expected integer numbers of tokens, got {entries!r} and a reserve of {reserve!r}")


def make_step(
    entries: tuple[tuple[Branch, int], ...],
    planned: Sequence[PlannedNode],
    page_size: int,
    device: torch.device,
    reserve: int = 0,
    tables: DeviceTables | None = None,
) -> Step:
    """Make the open step that commits `planned`, entry by entry. Reads the nodes as they are now, and changes none.

    reserve: number of further steps that the pages of `planned` are for. tables: page tables of the cache on its
    device, which are updated for this step.
    """
    whole = _Lists(planned, page_size, reserve, tables)
    views: list[EntryView] = []
    positions: list[int] = []
    slots: list[int] = []
    row_offsets: list[int] = []
    for p in planned:
        row_offsets.append(len(positions))
        views.append(EntryView(len(positions), p.num_tokens, whole.runs[p.node], whole.seen_by(p.node.chain)))
        # In plain Python: most entries have one token, for which a NumPy array costs more than everything else here.
        pages, before = p.node.pages, len(p.node.pages)
        for token in range(p.base, p.base + p.num_tokens):
            place, offset = divmod(token, page_size)
            page = pages[place] if place < before else p.pages[place - before]
            positions.append(p.start + token)
            slots.append(page * page_size + offset)
    row = len(positions)
    tensors = (
        torch.tensor(positions, dtype=torch.int32).to(device),
        torch.tensor(slots, dtype=torch.int64).to(device),
    )
    ahead = cursor = None
    if whole.reserve:
        ahead = torch.from_numpy(_slots_ahead(planned, whole.runs, reserve, page_size)).to(device)
        cursor = torch.zeros(1, dtype=torch.int64, device=device)
    return Step(
        total_rows=row,
        entries=entries,
        row_offsets=tuple(row_offsets),
        positions=tensors[0],
        slots=tensors[1],
        views=StepViews(tuple(views), page_size, row, whole.reserve, device_pages=whole.device_pages),
        planned=tuple(planned),
        state=StepState(),
        ahead=ahead,
        cursor=cursor,
    )


def next_step(step: Step) -> Step:
    """Make the step after one whose tensors and plans have advanced: one more token of the same branches."""
    return Step(
        total_rows=step.total_rows,
        entries=step.entries,
        row_offsets=step.row_offsets,
        positions=step.positions,
        slots=step.slots,
        views=step.views.advanced(),
        planned=step.planned,
        state=StepState(),
        ahead=step.ahead,
        cursor=step.cursor,
        index=step.index + 1,
        spare=step.spare,
    )


def _slots_ahead(
    planned: Sequence[PlannedNode], runs: Mapping[Node, KeyRun], reserve: int, page_size: int
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Compute the slots of each entry in this step and those after it, [1 + reserve, N]."""
    tokens = np.arange(1 + reserve, dtype=np.int64)
    columns = [
        runs[p.node].pages[(p.base + tokens) // page_size].astype(np.int64) * page_size + (p.base + tokens) % page_size
        for p in planned
    ]
    return np.stack(columns, axis=1)


class _Lists:
    """The lists of a step's entries as runs of keys. Nodes that several entries see are one run.

    The end of a list is read node by node, because its nodes can still grow, in this step too. Before the last link
    with an `after` the list is fixed and kept in logs, which are cut where the list of an entry ends.

    runs            of the planned nodes, with the tokens of the step, and of other nodes in the ends of lists
    reserve         of the step; 0 where it cannot advance: an entry has several tokens, or sees tokens of another entry
    device_pages    page tables of the cache on its device, if they hold the whole step
    """

    def __init__(
        self, planned: Sequence[PlannedNode], page_size: int, reserve: int, tables: DeviceTables | None
    ) -> None:
        self.page_size = page_size
        self._near: dict[int, tuple[Contents | None, list[Node]]] = {}
        ends: dict[PageLog, set[int]] = {}
        for p in planned:
            chain = p.node.chain
            if id(chain) in self._near:  # siblings share a chain
                continue
            fixed, _ = self._near[id(chain)] = self._split(chain)
            for contents in fixed.back() if fixed is not None else ():
                ends.setdefault(contents.log, set()).add(contents.end)
        self._cuts = {log: sorted(ends[log]) for log in ends}
        near = {node: None for _, nodes in self._near.values() for node in nodes}
        alone = all(p.num_tokens == 1 and p.node not in near for p in planned)
        self.reserve = reserve if alone else 0
        held = {p.node: self._held(p) for p in planned}
        self.device_pages: DevicePages | None = None
        if tables is not None:
            self.device_pages = tables.sync(held, [*near, *(log.first for log in self._cuts)])
        self._tables = tables if self.device_pages is not None else None
        self.runs = {
            node: KeyRun.of_node(target.pages, target.tokens, page_size, self._place(node))
            for node, target in held.items()
        }
        self._logs: dict[tuple[PageLog, int], KeyRun] = {}
        self._lists: dict[int, tuple[KeyRun, ...]] = {}

    def seen_by(self, chain: Link | None) -> tuple[KeyRun, ...]:
        """Return the list up to a link of a planned node's chain, oldest first; the same tuple for the same link."""
        if id(chain) not in self._lists:
            fixed, near = self._near[id(chain)]
            runs = [self._node_run(node) for node in near]
            for contents in fixed.back() if fixed is not None else ():
                runs += reversed(self._log_runs(contents))
            self._lists[id(chain)] = tuple(reversed(runs))
        return self._lists[id(chain)]

    def _held(self, planned: PlannedNode) -> Target:
        """Compute what a planned node holds with its tokens, in pages with room for those of the steps to come."""
        tokens = planned.base + planned.num_tokens
        size = -(-(tokens + self.reserve) // self.page_size)
        pages = planned.node.page_array()
        if size > len(pages):
            added = planned.pages[: size - len(pages)]
            pages = np.concatenate([pages, np.array(added, dtype=np.int32)])
        return Target(pages, tokens, planned.start + tokens)

    def _split(self, link: Link | None) -> tuple[Contents | None, list[Node]]:
        """Split a list into its fixed part and the nodes behind it, the last first."""
        near = []
        while link is not None and not link.after:
            near.append(link.node)
            link = link.before
        return contents_of(link, self.page_size), near

    def _place(self, node: Node) -> int | None:
        return None if self._tables is None else self._tables.place(node)

    def _node_run(self, node: Node) -> KeyRun:
        if node not in self.runs:
            pages = node.page_array()
            self.runs[node] = KeyRun.of_node(pages, node.length, self.page_size, self._place(node))
        return self.runs[node]

    def _log_runs(self, contents: Contents) -> list[KeyRun]:
        """Return the log's entries up to the end of the contents, in pieces between the ends of all lists."""
        found, first = [], 0
        for last in self._cuts[contents.log]:
            if last > contents.end:
                break
            if (contents.log, last) not in self._logs:
                pages, counts = contents.log.slice(first, last)
                # The nodes of a log are contiguous on the device too.
                begin = self._place(contents.log.first)
                place = None if begin is None else begin + first
                self._logs[contents.log, last] = KeyRun(pages, counts, int(counts.sum()), place)
            found.append(self._logs[contents.log, last])
            first = last
        return found
