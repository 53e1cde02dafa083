"""Tree decode on the CPU by a compiled kernel, `native.cpp`.

`plan_items` turns the tasks of a step into work items of the kernel, once for all layers: tiles of lanes on runs of
pages, and the merges of partial results of rows that have several. One call computes a whole layer. The plan of a step
made by `PagedKVCache.advance` is that of the previous step, with one more token in the page of each entry.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mvkernels.ops.decode.invariant import invariant_tasks
from mvkernels.ops.decode.tasks import AdvancingPlan, DecodePath, DecodeTask, Int32Array, KeyRun, StepViews, build_tasks
from mvkernels.ops.native import native_library, native_reason

SOURCE = Path(__file__).with_name("native.cpp")
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_DIM = 256
EVERYTHING = 2**30  # a limit that hides no key

Index = npt.NDArray[np.signedinteger[Any]]

# Sharing costs one more partial result per row, and its merge: the time of this many keys for a tile of lanes.
SHARE_TOKENS = 64
MIN_CHUNK = 256  # with 32 lanes, partial results are then an eighth of the keys and values that are read
ITEMS_A_THREAD = 4  # for load balance
APPEND_BYTES = 2**17  # for fewer, one thread takes less time than waking others


class Cut(NamedTuple):
    """What determines how work is cut. lanes: of a tile."""

    group: int
    kv_heads: int
    threads: int
    lanes: int
    invariant: bool


class _Plan(ctypes.Structure):
    """`Plan` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("items", "pages", "counts", "rows")),
        *((name, ctypes.c_void_p) for name in ("merge_rows", "merge_ends", "merge_ids", "partials", "partial_lse")),
        *((name, ctypes.c_int32) for name in ("num_items", "num_merges", "num_rows", "heads", "kv_heads")),
        *((name, ctypes.c_int32) for name in ("dim", "page_size", "num_threads", "invariant")),
    )


@dataclass(eq=False)
class NativePlan(AdvancingPlan):
    """The kernel's work for a step; the fields of its `Plan`, int32.

    items [I, 7]: of `Item`. num_partials: rows of partial results. own [E]: where the pages of each entry's own node
    begin in `pages`, for later steps; empty if an entry is in no task or in several. tokens [E]: in each own node.
    """

    items: Int32Array
    pages: Int32Array
    counts: Int32Array
    rows: Int32Array
    merge_rows: Int32Array
    merge_ends: Int32Array
    merge_ids: Int32Array
    num_partials: int
    own: Int32Array
    tokens: Int32Array
    path: DecodePath
    cut: Cut
    _bound: dict[int, _Plan] = field(default_factory=dict, repr=False)
    _spaces: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    _advance: Callable[[], None] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": {}, "_spaces": {}, "_advance": None}  # the addresses are not those of a copy

    def bound(self, total_rows: int, page_size: int, dim: int) -> _Plan:
        """Return the kernel's `Plan` with memory for the partial results: the same for all layers and later steps."""
        if dim not in self._bound:
            cut, heads = self.cut, self.cut.group * self.cut.kv_heads
            if dim not in self._spaces:
                size = self.num_partials * heads * (dim + 1)
                self._spaces[dim] = torch.empty(size, dtype=torch.float32, device="cpu")
            arrays = (self.items, self.pages, self.counts, self.rows, self.merge_rows, self.merge_ends, self.merge_ids)
            addresses = [array.ctypes.data for array in arrays]
            first = self._spaces[dim].data_ptr()
            sizes = (
                len(self.items),
                len(self.merge_rows),
                total_rows,
                heads,
                cut.kv_heads,
                dim,
                page_size,
                cut.threads,
                cut.invariant,
            )
            self._bound[dim] = _Plan(*addresses, first, first + 4 * self.num_partials * heads * dim, *sizes)
        return self._bound[dim]

    def advanced(self, views: StepViews) -> NativePlan | None:
        """Advance the plan in place by one token per entry; None where the next step needs a new plan."""
        if self.cut.invariant or not len(self.own):
            return None
        if self._advance is None:
            addresses = (array.ctypes.data for array in (self.counts, self.own, self.tokens))
            self._advance = functools.partial(_kernel()[0].advance, *addresses, len(self.own), views.page_size)
        self._advance()
        return self


@functools.cache
def _kernel() -> tuple[ctypes.CDLL, int]:
    """Load the library; returns it and the lanes of a tile."""
    library = native_library(SOURCE)
    pointers = [ctypes.c_void_p] * 6
    library.tree_decode.argtypes = [pointers[0], ctypes.c_int32, *pointers[1:], ctypes.c_float]
    library.tree_decode.argtypes[2:7] = pointers[:5]
    library.tree_decode.restype = None
    long = ctypes.c_int64
    library.append.argtypes = [
        pointers[0], long, long, long, *(pointers[0], long, long) * 2, *pointers[:2], ctypes.c_int32
    ]  # fmt: skip
    library.append.restype = None
    library.advance.argtypes = [*pointers[:3], ctypes.c_int32, ctypes.c_int32]
    library.advance.restype = None
    return library, int(library.max_lanes())


@functools.cache
def compile_reason() -> str | None:
    """Return why the kernel cannot be compiled here, or None. Compiles it at the first call."""
    return native_reason(SOURCE)


def function() -> int:
    """Return the address of `void tree_decode(plan, element, q, k, v, out, lse, scale)`, for other kernels."""
    return ctypes.cast(_kernel()[0].tree_decode, ctypes.c_void_p).value or 0


def decode_native(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    views: StepViews,
    scale: float,
    batch_invariant: bool = False,
    with_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute out [N, Hq, D] in q's dtype; with_lse: also lse [Hq, N] float32 in natural logarithm, else None."""
    rows, heads, dim = q.shape
    page_size, kv_heads = k_cache.shape[1:3]
    plan = plan_items(views, heads // kv_heads, kv_heads, batch_invariant)
    q = q.contiguous()
    out = torch.empty_like(q)
    lse = torch.empty(heads, rows, dtype=torch.float32, device="cpu") if with_lse else None
    bound = plan.bound(rows, page_size, dim)
    addresses = (x.data_ptr() for x in (q, k_cache, v_cache, out))
    _kernel()[0].tree_decode(
        ctypes.addressof(bound), ELEMENTS[q.dtype], *addresses, None if lse is None else lse.data_ptr(), scale
    )
    return out, lse


def append_native(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write k_new, v_new [N, Hkv, D], contiguous in D, to slots [N] int64 of contiguous caches; skip slot -1."""
    rows, heads, dim = k_new.shape
    size = k_new.element_size()
    new = [x for one in (k_new, v_new) for x in (one.data_ptr(), one.stride(0) * size, one.stride(1) * size)]
    threads = torch.get_num_threads() if k_new.numel() * size >= APPEND_BYTES else 1
    targets = (k_cache.data_ptr(), v_cache.data_ptr())
    _kernel()[0].append(slots.data_ptr(), rows, heads, dim * size, *new, *targets, threads)


def plan_items(views: StepViews, group: int, kv_heads: int, batch_invariant: bool = False) -> NativePlan:
    """Plan the work items of a step, once for all layers."""
    cut = Cut(group, kv_heads, torch.get_num_threads(), _kernel()[1], batch_invariant)
    return views.cached(("native", cut), lambda: _plan(views, cut))


def _plan(views: StepViews, cut: Cut) -> NativePlan:
    if cut.invariant:
        tasks = invariant_tasks(views.entries, views.page_size)
    else:
        tasks = build_tasks(views.entries, lambda rows, runs: _worth_sharing(rows, runs, cut))
    runs = [run for task in tasks for run in task.runs]
    pages, counts, ends = _join(runs, views.page_size)
    num_runs = np.array([len(task.runs) for task in tasks])
    page_ends = ends[np.cumsum(num_runs)]  # of each task
    page_begins = np.concatenate([[0], page_ends[:-1]])
    num_rows = np.array([len(task.rows) for task in tasks])
    row_begins = np.cumsum(num_rows) - num_rows
    bases = np.array([EVERYTHING if task.base is None else task.base for task in tasks])

    per_piece = _pages_a_piece(tasks, num_rows, views.page_size, cut)
    pieces = np.maximum(-(-(page_ends - page_begins) // per_piece), 1)
    task = np.repeat(np.arange(len(tasks)), pieces)  # of each piece
    piece = np.arange(len(task)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first_page = page_begins[task] + piece * per_piece
    before = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    limits = np.minimum(bases[task] - (before[first_page] - before[page_begins[task]]), EVERYTHING)
    limits[bases[task] == EVERYTHING] = EVERYTHING

    rows = np.concatenate([task.rows for task in tasks]).astype(np.int32)
    partials, merges, num_partials = _partials(rows, row_begins, num_rows, task, views.total_rows)
    tiles = -(-num_rows[task] * cut.group // cut.lanes)
    which = np.repeat(np.arange(len(task)), tiles)
    first_lane = (np.arange(len(which)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * cut.lanes
    columns = (
        first_page[which],
        np.minimum(per_piece, page_ends[task] - first_page)[which],
        row_begins[task[which]],
        first_lane,
        np.minimum(num_rows[task[which]] * cut.group - first_lane, cut.lanes),
        limits[which],
        partials[which],
    )
    shared = any(task.shared for task in tasks)
    path: DecodePath = "shared" if shared else "split" if len(merges[0]) else "direct"
    items = np.stack(columns, axis=1).astype(np.int32)
    own, tokens = _own(views, runs, ends), np.array([entry.own.tokens for entry in views.entries], np.int32)
    return NativePlan(items, pages, counts, rows, *merges, num_partials, own, tokens, path, cut)


def _worth_sharing(rows: Sequence[int], runs: Sequence[KeyRun], cut: Cut) -> bool:
    """Whether to read keys once, in tiles shared by entries: it must save more than another merge costs."""
    apart = sum(-(-count * cut.group // cut.lanes) for count in rows)
    together = -(-sum(rows) * cut.group // cut.lanes)
    return (apart - together) * sum(run.tokens for run in runs) >= SHARE_TOKENS


def _pages_a_piece(tasks: Sequence[DecodeTask], num_rows: Int32Array, page_size: int, cut: Cut) -> int:
    """Choose the pages of a piece, so that all threads have work; batch-invariant tasks are cut already."""
    if cut.invariant or cut.threads == 1:
        return EVERYTHING
    tiles = -(-num_rows * cut.group // cut.lanes)
    work = int((tiles * np.array([task.tokens for task in tasks])).sum()) * cut.kv_heads
    tokens = max(MIN_CHUNK, work // (cut.threads * ITEMS_A_THREAD * cut.kv_heads))
    return -(-tokens // page_size)


def _join(runs: Sequence[KeyRun], page_size: int) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Concatenate pages and counts of runs; also returns [1 + runs] where each begins and the last one ends.

    Counts that no run has yet are made at once for all.
    """
    sizes = np.array([len(run.pages) for run in runs])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    pages = np.concatenate([run.pages for run in runs]).astype(np.int32, copy=False)
    if any(run.counted for run in runs):
        return pages, np.concatenate([run.counts for run in runs]).astype(np.int32, copy=True), ends
    tokens = np.repeat(np.array([run.tokens for run in runs]) + ends[:-1] * page_size, sizes)
    counts = np.clip(tokens - np.arange(len(pages)) * page_size, 0, page_size).astype(np.int32)
    return pages, counts, ends


def _partials(
    rows: Int32Array, row_begins: Int32Array, num_rows: Int32Array, task: Index, total_rows: int
) -> tuple[Int32Array, tuple[Int32Array, Int32Array, Int32Array], int]:
    """Number the partial results of each piece.

    Returns the first partial result of each piece, or -1 where it writes the result itself; merge_rows, merge_ends and
    merge_ids; the number of partial results. task: of each piece.
    """
    sizes = num_rows[task]
    ends = np.cumsum(sizes)
    places = np.repeat(row_begins[task] - (ends - sizes), sizes) + np.arange(int(ends[-1]))
    row = rows[places]  # of each result, piece by piece
    counts = np.bincount(row, minlength=total_rows)
    several = np.logical_or.reduceat(counts[row] > 1, ends - sizes)  # of each piece: whether some row has others
    kept = np.where(several, sizes, 0)
    first = np.where(several, np.cumsum(kept) - kept, -1)
    merged = row[np.repeat(several, sizes)]
    order = np.argsort(merged, kind="stable")
    merge_rows, numbers = np.unique(merged, return_counts=True)
    found = tuple(array.astype(np.int32) for array in (merge_rows, np.cumsum(numbers), order))
    return first, found, len(merged)  # type: ignore[return-value]


def _own(views: StepViews, runs: Sequence[KeyRun], ends: Int32Array) -> Int32Array:
    """`NativePlan.own`."""
    places: dict[int, list[int]] = {id(entry.own): [] for entry in views.entries}
    for run, place in zip(runs, ends.tolist(), strict=False):
        if id(run) in places:
            places[id(run)].append(place)
    alone = all(len(found) == 1 for found in places.values()) and all(entry.num_rows == 1 for entry in views.entries)
    return np.array([places[id(entry.own)][0] for entry in views.entries] if alone else [], np.int32)
