"""The work of one decoding step: which rows attend to which pages. Host side, numpy; both backends start from it.

    task          rows [R], pages [P], counts [P]: every row attends to the first counts[p] keys of page pages[p], all p
    causal task   the same, but row i attends to the first base + i + 1 keys only: several new tokens of one node

Keys that many branches see are one task with the rows of all of them, so they are read once. Runs of keys that the same
rows see are folded into one task. A branch that adds one token attends to the whole of its own node (that token is its
last), so that node is folded like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class KeyRun:
    """Keys that lie in pages: of page pages[p] the first counts[p] tokens, [P] int32 both; `tokens` in all."""

    pages: Int32Array
    counts: Int32Array
    tokens: int

    @classmethod
    def of_node(cls, pages: Int32Array, tokens: int, page_size: int) -> KeyRun:
        """All pages full, but for the last that is written."""
        return cls(pages, page_counts(len(pages), tokens, page_size), tokens)


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
    """Rows, and the keys they attend to; the module's docstring has the legend. `base` is None unless causal."""

    rows: Int32Array
    pages: Int32Array
    counts: Int32Array
    base: int | None = None


@dataclass(frozen=True, eq=False)
class StepViews:
    """The entries of a step, and what backends derive from them, computed once for all layers."""

    entries: tuple[EntryView, ...]
    page_size: int
    total_rows: int
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = build()
        value: T = self._cache[key]
        return value

    def tasks(self) -> tuple[DecodeTask, ...]:
        return self.cached("tasks", lambda: build_tasks(self.entries))

    def visible_slots(self, entry: int) -> Int64Array:
        """Slots (page * page_size + offset) of all keys that the last row of an entry sees, oldest first."""
        view = self.entries[entry]
        runs = [*view.whole, view.own]
        return np.concatenate([page_slots(run.pages, run.counts, self.page_size) for run in runs])


def page_counts(num_pages: int, tokens: int, page_size: int) -> Int32Array:
    """Tokens in each of a node's pages, [P] int32: the first ones full, one may be ragged, the last ones empty."""
    first = np.arange(0, num_pages * page_size, page_size, dtype=np.int32)
    counts: Int32Array = np.clip(tokens - first, 0, page_size)
    return counts


def page_slots(pages: Int32Array, counts: Int32Array, page_size: int) -> Int64Array:
    """Slots of the first counts[p] keys of each page, in order, [sum(counts)] int64."""
    ends = np.cumsum(counts, dtype=np.int64)
    first = pages.astype(np.int64) * page_size - (ends - counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(first, counts) + np.arange(total, dtype=np.int64)


def build_tasks(entries: Sequence[EntryView]) -> tuple[DecodeTask, ...]:
    """The tasks of a step, in the order in which their nodes are first met: the same step gives the same tasks.

    Every row is in at least one task that shows it a key: its own.
    """
    folded: dict[tuple[int, ...], list[KeyRun]] = {}
    for run, indices in _readers(entries):
        folded.setdefault(tuple(indices), []).append(run)
    tasks = [
        DecodeTask(
            rows=_rows(entries, indices),
            pages=np.concatenate([run.pages for run in runs]),
            counts=np.concatenate([run.counts for run in runs]),
        )
        for indices, runs in folded.items()
    ]
    for index, entry in enumerate(entries):
        if entry.num_rows > 1:
            tasks.append(DecodeTask(_rows(entries, (index,)), entry.own.pages, entry.own.counts, entry.base))
    return tuple(tasks)


def _readers(entries: Sequence[EntryView]) -> list[tuple[KeyRun, list[int]]]:
    """Each run of keys that somebody sees whole, with the entries that do, ascending."""
    lists: dict[int, tuple[tuple[KeyRun, ...], list[int]]] = {}  # siblings share one list
    for index, entry in enumerate(entries):
        lists.setdefault(id(entry.whole), (entry.whole, []))[1].append(index)
    seen_by: dict[int, tuple[KeyRun, list[int]]] = {}
    for runs, indices in lists.values():
        for run in runs:
            if run.tokens:
                seen_by.setdefault(id(run), (run, []))[1].extend(indices)
    for index, entry in enumerate(entries):
        if entry.num_rows == 1:
            seen_by.setdefault(id(entry.own), (entry.own, []))[1].append(index)
    for _, indices in seen_by.values():
        indices.sort()
    return list(seen_by.values())


def _rows(entries: Sequence[EntryView], indices: Sequence[int]) -> Int32Array:
    return np.concatenate(
        [np.arange(entries[i].first_row, entries[i].first_row + entries[i].num_rows, dtype=np.int32) for i in indices]
    )
