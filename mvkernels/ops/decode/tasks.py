"""The work of one decoding step: which rows attend to which pages. Host side, numpy; both backends start from it.

    task          rows [R], pages [P], counts [P]: every row attends to the first counts[p] keys of page pages[p], all p
    causal task   the same, but row i attends to the first base + i + 1 keys only: several new tokens of one node

Keys that many branches see are one task with the rows of all of them, so they are read once. Runs of keys that the same
rows see are folded into one task. What only one branch sees is one task, which ends with the branch's own node; with
several new tokens it is causal. A branch that adds one token attends to the whole of its own node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
T = TypeVar("T")
DecodePath = Literal["shared", "split", "direct"]


class KeyRun:
    """Keys that lie in pages: of page pages[p] the first counts[p] tokens, [P] int32 both; `tokens` in all.

    place: where the run's first page stands in the step's `DevicePages`, the others right after it; None where the
    step has none. A step makes one for every entry: so counts that follow from the tokens are made when asked for.
    """

    __slots__ = ("_counts", "_page_size", "pages", "place", "tokens")

    def __init__(self, pages: Int32Array, counts: Int32Array | None, tokens: int, place: int | None = None) -> None:
        self.pages, self.tokens, self.place = pages, tokens, place
        self._counts = counts
        self._page_size = 0

    @classmethod
    def of_node(cls, pages: Int32Array, tokens: int, page_size: int, place: int | None = None) -> KeyRun:
        """All pages full, but for the last that is written."""
        run = cls(pages, None, tokens, place)
        run._page_size = page_size
        return run

    def longer(self, tokens: int, page_size: int) -> KeyRun:
        """The run with so many more tokens, in pages that it has already."""
        return KeyRun.of_node(self.pages, self.tokens + tokens, page_size, self.place)

    @property
    def counted(self) -> bool:
        """Whether there are counts already."""
        return self._counts is not None

    @property
    def counts(self) -> Int32Array:
        if self._counts is None:
            self._counts = page_counts(len(self.pages), self.tokens, self._page_size)
        return self._counts


@dataclass(frozen=True, eq=False)
class DevicePages:
    """Page lists that live on the device, at addresses that never change: pages and counts [E] int32, flat."""

    pages: torch.Tensor
    counts: torch.Tensor


@dataclass(eq=False, slots=True)  # not frozen: one is made for every entry of a step, and that takes twice the time
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


class DecodeTask:
    """Rows, and the keys they attend to; the module's docstring has the legend. `base` is None unless causal.

    runs: what `pages` and `counts` are made of, in order. shared: the rows are of several entries. tokens: keys in all.
    """

    __slots__ = ("_counts", "_pages", "base", "rows", "runs", "shared", "tokens")

    def __init__(
        self, rows: Int32Array, runs: tuple[KeyRun, ...], base: int | None = None, shared: bool = False
    ) -> None:
        self.rows, self.runs, self.base, self.shared = rows, runs, base, shared
        self.tokens = sum([run.tokens for run in runs])
        self._pages: Int32Array | None = None
        self._counts: Int32Array | None = None

    @property
    def pages(self) -> Int32Array:
        if self._pages is None:
            self._pages = join_runs(self.runs, "pages")
        return self._pages

    @property
    def counts(self) -> Int32Array:
        if self._counts is None:
            self._counts = join_runs(self.runs, "counts")
        return self._counts


def join_runs(runs: Sequence[KeyRun], name: Literal["pages", "counts"]) -> Int32Array:
    """One of the arrays of some runs, one run after the other."""
    return getattr(runs[0], name) if len(runs) == 1 else np.concatenate([getattr(run, name) for run in runs])


# share(rows of each entry that sees them, runs of keys): see `build_tasks`.
Share = Callable[[Sequence[int], Sequence[KeyRun]], bool]


class AdvancingTables(ABC):
    """Tables on a device that turn into those of the next step by work on the device alone."""

    @abstractmethod
    def advance(self, cursor: torch.Tensor) -> None: ...


class AdvancingPlan(ABC):
    """What the host derived from a step, and can turn into that of the next with less work than making it anew.

    advanced: the plan of the next step, which may be the same object: the step that it was of is closed then.
    """

    @abstractmethod
    def advanced(self, views: StepViews) -> AdvancingPlan | None: ...


@dataclass(frozen=True, eq=False)
class StepViews:
    """The entries of a step, and what backends derive from them, computed once for all layers.

    planned: those of the step that was planned. reserve: for how many steps of one more token each their own pages had
    room then; the rows stay the same. index: how many of these steps have passed. device_pages: holds the pages and
    counts of every run at its `place` already, with this step's tokens; None where a backend has to upload them.
    """

    planned: tuple[EntryView, ...]
    page_size: int
    total_rows: int
    reserve: int = 0
    index: int = 0
    device_pages: DevicePages | None = None
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def entries(self) -> tuple[EntryView, ...]:
        """What each entry of this step sees."""
        if not self.index:
            return self.planned
        return tuple(
            EntryView(view.first_row, view.num_rows, view.own.longer(self.index, self.page_size), view.whole)
            for view in self.planned
        )

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = build()
        value: T = self._cache[key]
        return value

    def advance_tables(self, cursor: torch.Tensor) -> None:
        """Device tables that count tokens count one more for each entry; cursor [1] int64: how many steps on."""
        tables = [value for value in self._cache.values() if isinstance(value, AdvancingTables)]
        if tables:
            with torch.inference_mode():  # whatever mode they were made in
                for value in tables:
                    value.advance(cursor)

    def advanced(self) -> StepViews:
        """The views of the next step. Tables that have advanced on the device stay, plans of the host advance."""
        kept: dict[Hashable, Any] = {k: value for k, value in self._cache.items() if isinstance(value, AdvancingTables)}
        following = StepViews(
            self.planned, self.page_size, self.total_rows, self.reserve, self.index + 1, self.device_pages, kept
        )
        for key, value in self._cache.items():
            if isinstance(value, AdvancingPlan) and (plan := value.advanced(following)) is not None:
                kept[key] = plan
        return following

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


def run_slots(runs: Sequence[KeyRun], page_size: int) -> Int64Array:
    """Slots of all keys of some runs, one run after the other. Counts that no run has yet are made at once for all."""
    pages = join_runs(runs, "pages")
    if len(runs) == 1 or any(run.counted for run in runs):
        return page_slots(pages, join_runs(runs, "counts"), page_size)
    sizes = np.array([len(run.pages) for run in runs])
    ends = np.cumsum(sizes)
    tokens = np.repeat(np.array([run.tokens for run in runs]) + (ends - sizes) * page_size, sizes)
    counts = np.clip(tokens - np.arange(len(pages)) * page_size, 0, page_size)
    return page_slots(pages, counts.astype(np.int32), page_size)


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
        found = {id(run) for run in runs}
        own = [i for i in readers if id(entries[i].own) in found]
        if share is None or share([entries[i].num_rows for i in readers], runs):
            tasks.append(DecodeTask(entry_rows(entries, readers), tuple(runs), shared=True))
            covered.update(own)
            continue
        for i in readers:
            private[i] += [run for run in runs if run is not entries[i].own] if own else runs
    for index, entry in enumerate(entries):
        seen = private[index]
        base = None if entry.num_rows == 1 else sum(run.tokens for run in seen) + entry.base
        if index not in covered:
            seen.append(entry.own)
        if seen:
            tasks.append(DecodeTask(entry_rows(entries, (index,)), tuple(seen), base))
    return tuple(tasks)


def _readers(entries: Sequence[EntryView]) -> list[tuple[KeyRun, list[int]]]:
    """Each run of keys that some entry sees whole, with these entries, ascending, oldest keys first.

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
    """The rows of some entries, given in ascending order, one entry after the other."""
    if indices[-1] - indices[0] == len(indices) - 1:
        last = entries[indices[-1]]
        return np.arange(entries[indices[0]].first_row, last.first_row + last.num_rows, dtype=np.int32)
    return np.concatenate([entry_rows(entries, (index,)) for index in indices])
