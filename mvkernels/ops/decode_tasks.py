"""The work of one decoding step: which rows attend to which pages. Host side, numpy; both backends start from it.

    task          rows [R], pages [P], counts [P]: every row attends to the first counts[p] keys of page pages[p], all p
    causal task   the same, but row i attends to the first base + i + 1 keys only: several new tokens of one node

Keys that many branches see are one task with the rows of all of them, so they are read once. Runs of keys that the same
rows see are folded into one task. What only one branch sees is one task, which ends with the branch's own node; with
several new tokens it is causal. A branch that adds one token attends to the whole of its own node.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
T = TypeVar("T")
DecodePath = Literal["shared", "split", "direct"]


@dataclass(frozen=True, eq=False)
class KeyRun:
    """Keys that lie in pages: of page pages[p] the first counts[p] tokens, [P] int32 both; `tokens` in all.

    place: where the run's first page stands in the step's `DevicePages`, the others right after it; None where the
    step has none.
    """

    pages: Int32Array
    counts: Int32Array
    tokens: int
    place: int | None = None

    @classmethod
    def of_node(cls, pages: Int32Array, tokens: int, page_size: int, place: int | None = None) -> KeyRun:
        """All pages full, but for the last that is written."""
        return cls(pages, page_counts(len(pages), tokens, page_size), tokens, place)


@dataclass(frozen=True, eq=False)
class DevicePages:
    """Page lists that live on the device, at addresses that never change: pages and counts [E] int32, flat."""

    pages: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, eq=False)
class EntryView:
    """What the rows of one entry see: rows first_row .. first_row + num_rows - 1 are the last tokens of `own`.

    Row r of the entry sees every key of `whole`, and the first own.tokens - num_rows + r + 1 tokens of `own`.
    Keys that several entries see are one and the same KeyRun; so is `whole` where several entries share it.
    """

    first_row: int
    num_rows: int
    own: KeyRun
    whole: tuple[KeyRun, ...]

    @property
    def base(self) -> int:
        return self.own.tokens - self.num_rows


@dataclass(frozen=True, eq=False)
class DecodeTask:
    """Rows, and the keys they attend to; the module's docstring has the legend. `base` is None unless causal.

    runs: what `pages` and `counts` are made of, in order. shared: the rows are of several entries.
    """

    rows: Int32Array
    runs: tuple[KeyRun, ...]
    base: int | None = None
    shared: bool = False

    @property
    def tokens(self) -> int:
        return sum(run.tokens for run in self.runs)

    @cached_property
    def pages(self) -> Int32Array:
        return self.runs[0].pages if len(self.runs) == 1 else np.concatenate([run.pages for run in self.runs])

    @cached_property
    def counts(self) -> Int32Array:
        return self.runs[0].counts if len(self.runs) == 1 else np.concatenate([run.counts for run in self.runs])


# share(rows of each entry that sees them, runs of keys): see `build_tasks`.
Share = Callable[[Sequence[int], Sequence[KeyRun]], bool]


@runtime_checkable
class AdvancingTables(Protocol):
    """Tables on a device that turn into those of the next step by work on the device alone."""

    def advance(self, cursor: torch.Tensor) -> None: ...


@dataclass(frozen=True, eq=False)
class StepViews:
    """The entries of a step, and what backends derive from them, computed once for all layers.

    reserve: how many steps of one more token each the entries' own pages had room for at first; their rows stay the
    same. index: how many of them have passed. device_pages: holds the pages and counts of every run at its `place`
    already, with this step's tokens; None where a backend has to upload them.
    """

    entries: tuple[EntryView, ...]
    page_size: int
    total_rows: int
    reserve: int = 0
    index: int = 0
    device_pages: DevicePages | None = None
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = build()
        value: T = self._cache[key]
        return value

    def advance_tables(self, cursor: torch.Tensor) -> None:
        """Device tables that count tokens count one more for each entry; cursor [1] int64: how many steps on."""
        for value in self._cache.values():
            if isinstance(value, AdvancingTables):
                value.advance(cursor)

    def advanced(self) -> StepViews:
        """The views of the next step. Tables that have advanced on the device stay; what the host derived goes."""
        entries = tuple(
            replace(entry, own=KeyRun.of_node(entry.own.pages, entry.own.tokens + 1, self.page_size, entry.own.place))
            for entry in self.entries
        )
        kept = {key: value for key, value in self._cache.items() if isinstance(value, AdvancingTables)}
        return replace(self, entries=entries, index=self.index + 1, _cache=kept)

    def tasks(self) -> tuple[DecodeTask, ...]:
        """The tasks in which all keys that several entries see are read once."""
        return self.cached("tasks", lambda: build_tasks(self.entries))

    def visible_slots(self, entry: int) -> Int64Array:
        """Slots (page * page_size + offset) of all keys that the last row of an entry sees, oldest first."""
        view = self.entries[entry]
        runs = [*view.whole, view.own]
        return np.concatenate([page_slots(run.pages, run.counts, self.page_size) for run in runs])


def page_counts(num_pages: int, tokens: int, page_size: int) -> Int32Array:
    """Tokens in each of a node's pages, [P] int32: the first ones full, one may be ragged, the last ones empty."""
    counts = np.full(num_pages, page_size, np.int32)
    full, rest = divmod(tokens, page_size)
    if full < num_pages:
        counts[full] = rest
        counts[full + 1 :] = 0
    return counts


def page_slots(pages: Int32Array, counts: Int32Array, page_size: int) -> Int64Array:
    """Slots of the first counts[p] keys of each page, in order, [sum(counts)] int64."""
    ends = np.cumsum(counts, dtype=np.int64)
    first = pages.astype(np.int64) * page_size - (ends - counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(first, counts) + np.arange(total, dtype=np.int64)


def build_tasks(entries: Sequence[EntryView], share: Share | None = None) -> tuple[DecodeTask, ...]:
    """The tasks of a step, shared ones first, in the order in which their keys are first met: the same step gives the
    same tasks. Every row is in at least one task that shows it a key.

    share: whether to read keys once for all entries that see them; where it says no, each has them in its own task.
    None: always.
    """
    grouped: dict[tuple[int, ...], list[KeyRun]] = {}
    private: list[list[KeyRun]] = [[] for _ in entries]
    for run, indices in _readers(entries):
        if len(indices) == 1:
            private[indices[0]].append(run)
        else:
            grouped.setdefault(tuple(indices), []).append(run)
    tasks = []
    covered: set[int] = set()  # own nodes of one token's entry that others see too: already in a task
    for readers, runs in grouped.items():
        own = [i for i in readers if any(run is entries[i].own for run in runs)]
        if share is None or share([entries[i].num_rows for i in readers], runs):
            tasks.append(DecodeTask(entry_rows(entries, readers), tuple(runs), shared=True))
            covered.update(own)
            continue
        for i in readers:
            private[i] += [run for run in runs if run is not entries[i].own]
    for index, entry in enumerate(entries):
        seen = private[index]
        base = None if entry.num_rows == 1 else sum(run.tokens for run in seen) + entry.base
        if index not in covered:
            seen.append(entry.own)
        if seen:
            tasks.append(DecodeTask(entry_rows(entries, (index,)), tuple(seen), base))
    return tuple(tasks)


def _readers(entries: Sequence[EntryView]) -> list[tuple[KeyRun, list[int]]]:
    """Each run of keys that somebody sees whole, with the entries that do, ascending, oldest keys first.

    An own node is among them where another entry sees it; then its entry of one token sees it whole too.
    """
    lists: dict[int, tuple[tuple[KeyRun, ...], list[int]]] = {}  # siblings share one list
    for index, entry in enumerate(entries):
        lists.setdefault(id(entry.whole), (entry.whole, []))[1].append(index)
    seen_by: dict[int, tuple[KeyRun, list[int]]] = {}
    for runs, indices in lists.values():
        for run in runs:
            if run.tokens:
                seen_by.setdefault(id(run), (run, []))[1].extend(indices)
    for index, entry in enumerate(entries):
        if entry.num_rows == 1 and id(entry.own) in seen_by:
            seen_by[id(entry.own)][1].append(index)
    for _, indices in seen_by.values():
        indices.sort()
    return list(seen_by.values())


def entry_rows(entries: Sequence[EntryView], indices: Sequence[int]) -> Int32Array:
    """The rows of some entries, one entry after the other."""
    return np.concatenate(
        [np.arange(entries[i].first_row, entries[i].first_row + entries[i].num_rows, dtype=np.int32) for i in indices]
    )
