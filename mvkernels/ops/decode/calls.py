"""The calls of the flash kernel that decode a step on the CPU, and the merges of their results: see `ops.decode.sdpa`.

What is chosen: keys that several entries see are read once where that is worth another call and the merge. Tasks of one
row and few keys are gathered into one call. The kernel works on (batch, head, block of rows) in parallel: where those
are fewer than the threads, long runs of keys are cut into a batch of parts.

A step that follows by `PagedKVCache.advance` takes the plan of the step before it, with one more key for each entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from mvkernels.ops.decode.invariant import invariant_tasks
from mvkernels.ops.decode.tasks import (
    AdvancingPlan,
    DecodePath,
    DecodeTask,
    Int32Array,
    Int64Array,
    KeyRun,
    StepViews,
    build_tasks,
    run_slots,
)

# What a call costs, in tokens that are gathered and attended to meanwhile: about 60 us, and 0.1 us a token of 1 KB.
CALL_TOKENS = 512
# Sharing takes a call and the merge.
SHARE_TOKENS = 2 * CALL_TOKENS
PART_TOKENS = 512  # of a part at least: what the flash kernel takes at a time
BLOCK_ROWS = 32

Index = slice | torch.Tensor


class Cut(NamedTuple):
    """What decides how many parts keys are cut into."""

    group: int
    kv_heads: int
    threads: int


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the flash kernel. `rows` of the step, and the slots of the keys that they attend to.

    parts     1, or how many parts the keys are cut into: a partial of each for every row
    causal    as many rows as keys, row i sees i + 1
    lists     the rows are of one list of keys each: slots [rows x longest], padded in front with the first slot of each
    bias      with parts or lists of unequal lengths: [parts or rows, 1, 1, longest] of 0, or -inf at the padding
    grows     the last key, of each list, is the newest of the row's own
    """

    rows: Index
    slots: Index
    num_rows: int
    parts: int = 1
    causal: bool = False
    lists: bool = False
    bias: torch.Tensor | None = None
    grows: bool = False


@dataclass(frozen=True, eq=False)
class Merge:
    """Rows with the same number of partials: ids [partials of a row, rows], in the order in which they are merged."""

    rows: Index
    ids: torch.Tensor


@dataclass(frozen=True, eq=False)
class CallPlan(AdvancingPlan):
    """The calls of a step, and the merges of their partial results.

    stacked: where the partials of every call are those of all rows, in order: how many of each row; then there are no
    `merges`. cut: None for batch-invariant decoding, in which rows are attended to in blocks of one size. gathered: the
    most keys that a call gathers.
    """

    calls: tuple[Call, ...]
    merges: tuple[Merge, ...]
    stacked: int
    path: DecodePath
    cut: Cut | None
    gathered: int = field(init=False)
    _spaces: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        gathered = max((len(call.slots) for call in self.calls if isinstance(call.slots, torch.Tensor)), default=0)
        object.__setattr__(self, "gathered", gathered)

    def space(self, which: int, like: torch.Tensor) -> torch.Tensor:
        """Where keys (which 0) or values (1) of a cache [num_pages, page_size, Hkv, D] are gathered: [tokens, Hkv * D].

        The same memory for all layers and the steps that follow: fresh memory is mapped page by page as it is written.
        """
        found = self._spaces.get(which)
        tokens, token = self.gathered, like.shape[2] * like.shape[3]
        if found is None or found.dtype != like.dtype or found.shape[1] != token or len(found) < tokens:
            found = self._spaces[which] = like.new_empty(tokens * 9 // 8, token)
        return found

    def advanced(self, views: StepViews) -> CallPlan | None:
        """The plan of the next step, in which each entry has one token more; None where it has to be made anew."""
        if self.cut is None:
            return None
        calls = []
        for call in self.calls:
            grown = _grown(call, views, self.cut) if call.grows else call
            if grown is None:
                return None
            calls.append(grown)
        return replace(self, calls=tuple(calls))


def plan_calls(views: StepViews, group: int, kv_heads: int, batch_invariant: bool = False) -> CallPlan:
    """What `ops.decode.sdpa` does for a step, made once for all layers."""
    cut = Cut(group, kv_heads, torch.get_num_threads())
    key = ("cpu", cut, batch_invariant)
    return views.cached(key, lambda: _plan_invariant(views, group) if batch_invariant else _plan(views, cut))


def _plan(views: StepViews, cut: Cut) -> CallPlan:
    tasks = build_tasks(views.entries, _worth_sharing)
    calls = [_in_parts(call, cut) for call in _in_lists(tasks, views.page_size)]
    shared = any(task.shared for task in tasks)
    rows = slice(0, views.total_rows)
    if all(call.rows == rows for call in calls):
        stacked = sum(call.parts for call in calls)
        return CallPlan(tuple(calls), (), stacked, "shared" if shared else "direct" if stacked == 1 else "split", cut)
    order = np.repeat(np.arange(len(calls)), [call.parts * call.num_rows for call in calls])
    merges = _plan_merges(calls, order, np.zeros(views.total_rows, np.int64))
    direct = len(merges) == 1 and len(merges[0].ids) == 1
    return CallPlan(tuple(calls), merges, 0, "shared" if shared else "direct" if direct else "split", cut)


def _worth_sharing(rows: Sequence[int], runs: Sequence[KeyRun]) -> bool:
    return (len(rows) - 1) * sum(run.tokens for run in runs) >= SHARE_TOKENS


# -- calls -------------------------------------------------------------------------------------------------------


def task_calls(task: DecodeTask, page_size: int) -> list[Call]:
    """The calls that a task takes. A causal task is the keys that all rows see, a square in which row i sees i + 1 keys
    and, where the rows are more than the new keys, those keys for the rows after it.
    """
    slots = run_slots(task.runs, page_size)
    if task.base is None:
        return [_call(task.rows, part, grows=not task.shared and _ends(part) == slots[-1]) for part in _split(slots)]
    before, first = max(task.base, 0), max(-task.base, 0)  # keys that all rows see, and rows that see none
    calls = [_call(task.rows, part) for part in _split(slots[:before])]
    square = slots[before : before + len(task.rows) - first]
    last = first + len(square)
    calls.append(_call(task.rows[first:last], _index(square), causal=True))
    if last < len(task.rows):
        calls += [_call(task.rows[last:], part) for part in _split(square)]
    return calls


def _call(rows: Int32Array, slots: Index, causal: bool = False, grows: bool = False) -> Call:
    return Call(_index(rows.astype(np.int64)), slots, len(rows), causal=causal, grows=grows)


def _in_lists(tasks: Sequence[DecodeTask], page_size: int) -> list[Call]:
    """The calls of all tasks. Tasks of one row and few keys are put together: longest first, while padding is cheap.

    What one entry sees comes first, and what many see last.
    """
    lists: list[Call] = []
    short: list[DecodeTask] = []
    apart: list[DecodeTask] = []
    for task in tasks:
        few = len(task.rows) == 1 and task.base is None and task.tokens < 2 * CALL_TOKENS
        (short if few else apart).append(task)
    short.sort(key=lambda task: -task.tokens)
    while short:
        longest, taken = short[0].tokens, 1
        while taken < len(short) and (len(short) - taken) * (longest - short[taken].tokens) <= CALL_TOKENS:
            taken += 1
        if taken > 1:
            lists.append(_lists_call(sorted(short[:taken], key=_first_row), page_size))
        else:
            apart.append(short[0])
        short = short[taken:]
    apart.sort(key=lambda task: (task.shared, 0 if task.shared else _first_row(task)))
    return lists + [call for task in apart for call in task_calls(task, page_size)]


def _first_row(task: DecodeTask) -> int:
    return int(task.rows[0])


def _lists_call(tasks: Sequence[DecodeTask], page_size: int) -> Call:
    rows = np.concatenate([task.rows for task in tasks]).astype(np.int64)
    found = run_slots([run for task in tasks for run in task.runs], page_size)
    lengths = np.array([task.tokens for task in tasks])
    longest, bias = int(lengths.max()), None
    if lengths.min() < longest:
        hidden = np.arange(longest) < longest - lengths[:, None]
        slots = np.repeat(found[np.cumsum(lengths) - lengths], longest).reshape(hidden.shape)
        slots[~hidden] = found
        bias = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), -torch.inf)[:, None, None]
        found = slots.reshape(-1)
    grows = not any(task.shared for task in tasks)
    return Call(_index(rows), torch.from_numpy(found), len(rows), lists=True, bias=bias, grows=grows)


def _in_parts(call: Call, cut: Cut) -> Call:
    """Cuts the keys of a call that would leave threads idle."""
    if call.causal or call.lists or not isinstance(call.slots, slice):
        return call
    tokens = call.slots.stop - call.slots.start
    problems = cut.kv_heads * -(-call.num_rows * cut.group // BLOCK_ROWS)
    parts = min(-(-cut.threads // problems), tokens // PART_TOKENS)
    if parts < 2:
        return call
    step, length = part_lengths(tokens, parts)
    bias = None
    if length > step:
        bias = torch.zeros(parts, 1, 1, length)
        bias[:-1, ..., step:] = -torch.inf
    return replace(call, parts=parts, bias=bias)


def part_lengths(tokens: int, parts: int) -> tuple[int, int]:
    """(from one part's first key to the next one's, keys in a part): the last part has what is left over."""
    step = tokens // parts
    return step, tokens - (parts - 1) * step


def _grown(call: Call, views: StepViews, cut: Cut) -> Call | None:
    """The call with the newest key of each of its rows, one row an entry; None where a new plan would have others."""
    own = [views.entries[row].own for row in np.arange(views.total_rows)[_array(call.rows)]]
    last = [run.tokens - 1 for run in own]
    newest = [
        int(run.pages[token // views.page_size]) * views.page_size + token % views.page_size
        for run, token in zip(own, last, strict=True)
    ]
    if isinstance(call.slots, slice):
        if newest != [call.slots.stop]:
            return None
        longer = _in_parts(replace(call, slots=slice(call.slots.start, newest[0] + 1), parts=1, bias=None), cut)
        return longer if longer.parts == call.parts else None
    slots = call.slots.view(call.num_rows if call.lists else 1, -1)
    slots = torch.cat([slots, torch.tensor(newest)[:, None]], 1)
    if call.lists:
        if slots.shape[1] >= 2 * CALL_TOKENS:
            return None
    elif slots.shape[1] >= CALL_TOKENS and bool((slots[0, -CALL_TOKENS:].diff() == 1).all()):
        return None
    bias = None if call.bias is None else torch.nn.functional.pad(call.bias, (0, 1))
    return replace(call, slots=slots.view(-1), bias=bias)


def _split(slots: Int64Array) -> list[Index]:
    """Long runs of consecutive slots as slices, all others together as one index."""
    if not len(slots):
        return []
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(slots) != 1) + 1, [len(slots)]])
    lengths = np.diff(bounds)
    if len(lengths) == 1:
        return [_index(slots)]
    parts = [_index(slots[bounds[run] : bounds[run + 1]]) for run in np.flatnonzero(lengths >= CALL_TOKENS)]
    short = np.repeat(lengths < CALL_TOKENS, lengths)
    return [*parts, _index(slots[short])] if short.any() else parts


def _index(numbers: Int32Array | Int64Array) -> Index:
    """A slice where the numbers are consecutive, else the numbers."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == len(numbers) and bool((np.diff(numbers) == 1).all()):
        return slice(first, last + 1)
    return torch.from_numpy(np.ascontiguousarray(numbers))


def _ends(index: Index) -> int:
    return int(index.stop if isinstance(index, slice) else index[-1] + 1) - 1


def _array(index: Index) -> slice | Int64Array:
    return index if isinstance(index, slice) else index.numpy()


# -- merges ------------------------------------------------------------------------------------------------------


def _plan_merges(calls: Sequence[Call], order: Int64Array, groups: Int64Array) -> tuple[Merge, ...]:
    """Rows by their number of partials, those of each group apart.

    order: of the partials of a row, call by call, [partials]; groups [N] ascend.
    """
    total_rows = len(groups)
    rows = [np.arange(total_rows)[_array(call.rows)] for call in calls]
    by_row = np.concatenate([np.tile(part, call.parts) for part, call in zip(rows, calls, strict=True)])
    sequence = np.lexsort((order, by_row))  # stable
    counts = np.bincount(by_row, minlength=total_rows)
    first = np.cumsum(counts) - counts
    merges = []
    for group, count in np.unique(np.stack([groups, counts]), axis=1).T:
        chosen = np.flatnonzero((groups == group) & (counts == count))
        ids = sequence[first[chosen] + np.arange(count)[:, None]]
        merges.append(Merge(_index(chosen), torch.from_numpy(ids)))
    return tuple(merges)


# -- batch-invariant ---------------------------------------------------------------------------------------------


def _plan_invariant(views: StepViews, group: int) -> CallPlan:
    """Chunk by chunk, whoever sees it. Chunks of the same length are problems of the same shape: one after the other in
    memory they are parts of one call, and those of one row are lists of one call.
    """
    tasks = invariant_tasks(views.entries, views.page_size)
    calls: list[Call] = []
    orders: list[list[int]] = []  # of each call: places in `tasks`, where an entry meets its chunks in order
    last_calls: dict[bytes, int] = {}  # rows -> their last call
    short: dict[int, list[int]] = {}  # tokens -> tasks of one row

    def add(call: Call, places: list[int]) -> None:
        calls.append(call)
        orders.append(places)

    for place, task in enumerate(tasks):
        if task.base is not None:
            for call in task_calls(task, views.page_size):
                add(call, [place] * call.num_rows)
            continue
        slots = _index(run_slots(task.runs, views.page_size))
        gathered = isinstance(slots, torch.Tensor) or task.tokens < 2 * CALL_TOKENS
        if len(task.rows) == 1 and group <= BLOCK_ROWS and gathered:
            short.setdefault(task.tokens, []).append(place)
            continue
        places, rows = [place] * len(task.rows), task.rows.tobytes()
        last = last_calls.get(rows)
        longer = None if last is None else _with_part(calls[last], slots, task.tokens)
        if last is None or longer is None:
            last_calls[rows] = len(calls)
            add(_call(task.rows, slots), places)
        else:
            calls[last] = longer
            orders[last] += places
    for places in short.values():
        add(_lists_call([tasks[place] for place in places], views.page_size), places)
    entries = np.repeat(np.arange(len(views.entries)), [view.num_rows for view in views.entries])
    merges = _plan_merges(calls, np.concatenate([np.array(places) for places in orders]), entries)
    path: DecodePath = "shared" if any(task.shared for task in tasks) else "split"
    if path == "split" and all(len(merge.ids) == 1 for merge in merges):
        path = "direct"
    return CallPlan(tuple(calls), merges, 0, path, None)


def _with_part(call: Call, slots: Index, tokens: int) -> Call | None:
    """The call with so many tokens more, where they are one more part of it."""
    run = call.slots
    if not isinstance(run, slice) or not isinstance(slots, slice) or run.stop != slots.start:
        return None
    if run.stop - run.start != call.parts * tokens:
        return None
    return replace(call, slots=slice(run.start, slots.stop), parts=call.parts + 1)
