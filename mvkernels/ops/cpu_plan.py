"""Row blocks and key spans for the CPU backend, from an `IntervalMask`.

A plan is a list of calls; a call is dense attention of consecutive rows on the concatenation of a few key spans. Two
levels of row blocks: up to GROUP_ROWS rows share one call on the keys that all of them see, and blocks of up to
BLOCK_ROWS rows inside them do the rest. Long segments are cut on their own, so that the rest of a block is a causal
square; only blocks of several short segments need a mask.

Every row's own key is in the last call of its block, so that no call has a row that sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mvkernels.ops.mask import Int32Array, IntervalMask

GROUP_ROWS = 1024
BLOCK_ROWS = 256
SHORT_SEGMENT = 64  # segments below this many rows share a block with their neighbours
CALL_KEYS = 4096  # longer key runs are cut, so that what one call of the backward allocates stays small

DENSE, CAUSAL, MASKED = 0, 1, 2

Spans = list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class CpuPlan:
    """calls [C, 4] int32: first row, last row (exclusive), DENSE | CAUSAL | MASKED, 1 if it is the first of its rows.

    span_ptr [C + 1], spans [K, 2] int32: the keys of call c are the half-open spans[span_ptr[c]:span_ptr[c + 1]].
    """

    calls: Int32Array
    span_ptr: Int32Array
    spans: Int32Array


def cpu_plan(mask: IntervalMask) -> CpuPlan:
    """The calls that cover every visible (row, key) pair of a mask exactly once."""
    calls: list[tuple[int, int, int, int]] = []
    keys: list[Spans] = []
    for rows, kind, fresh, spans in _calls(mask):
        calls.append((*rows, kind, int(fresh)))
        keys.append(spans)
    ptr = np.cumsum([0] + [len(spans) for spans in keys], dtype=np.int32)
    flat = np.array([span for spans in keys for span in spans], np.int32).reshape(-1, 2)
    return CpuPlan(np.array(calls, np.int32).reshape(-1, 4), ptr, flat)


def _calls(mask: IntervalMask) -> Iterator[tuple[tuple[int, int], int, bool, Spans]]:
    cuts = _block_cuts(mask)
    for blocks in _group(cuts):
        first, last = cuts[blocks[0]], cuts[blocks[-1] + 1]
        seen = [_seen(mask, cuts[b], cuts[b + 1]) for b in blocks]
        shared: Spans = clip(seen[0][0], first) if len(blocks) > 1 else []
        for every, _, _ in seen[1:]:
            shared = intersect(shared, every)
        for i, spans in enumerate(chunks(shared)):
            yield (first, last), DENSE, i == 0, spans
        for b, (every, some, causal) in zip(blocks, seen, strict=True):
            rows = cuts[b], cuts[b + 1]
            fresh = not shared
            dense = subtract(clip(every, rows[0]), shared)
            for spans in chunks(dense):
                yield rows, DENSE, fresh, spans
                fresh = False
            rest = subtract(some, union(shared, dense))
            yield rows, CAUSAL if causal and rest == [rows] else MASKED, fresh, rest


def _block_cuts(mask: IntervalMask) -> list[int]:
    """Borders of row blocks: long segments on their own, short ones together, at most BLOCK_ROWS rows each."""
    cuts = [0]
    for start, stop in zip(mask.segment_starts[:-1].tolist(), mask.segment_starts[1:].tolist(), strict=True):
        if stop - start >= SHORT_SEGMENT and start > cuts[-1]:
            cuts.append(start)
        while stop - cuts[-1] > BLOCK_ROWS:
            cuts.append(cuts[-1] + BLOCK_ROWS)
        if stop - start >= SHORT_SEGMENT:
            cuts.append(stop)
    if cuts[-1] < mask.total_tokens:
        cuts.append(mask.total_tokens)
    return cuts


def _group(cuts: list[int]) -> list[list[int]]:
    """Consecutive blocks together, at most GROUP_ROWS rows each."""
    groups: list[list[int]] = []
    for block in range(len(cuts) - 1):
        if groups and cuts[block + 1] - cuts[groups[-1][0]] <= GROUP_ROWS:
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def _seen(mask: IntervalMask, first: int, last: int) -> tuple[Spans, Spans, bool]:
    """The keys that every row of [first, last) sees, those that some row sees, and whether no row hides another."""
    every: Spans = [(0, last)]
    some: Spans = []
    causal = True
    segment = int(np.searchsorted(mask.segment_starts, first, side="right")) - 1
    while segment < mask.num_segments and (start := max(first, int(mask.segment_starts[segment]))) < last:
        stop = min(last, int(mask.segment_starts[segment + 1]))
        gaps = mask.gaps[mask.gap_ptr[segment] : mask.gap_ptr[segment + 1]].tolist()
        spans = subtract([(int(mask.first_key[segment]), stop)], [(a, b) for a, b in gaps])
        if start < stop:
            every = intersect(every, clip(spans, start + 1))
            some = union(some, spans)
            causal = causal and spans[-1][0] <= first
        segment += 1
    return every, some, causal


# ---- sets of keys as ascending, disjoint, non-empty half-open spans


def clip(spans: Spans, stop: int) -> Spans:
    return [(a, min(b, stop)) for a, b in spans if a < stop]


def intersect(left: Spans, right: Spans) -> Spans:
    found: Spans = []
    i = j = 0
    while i < len(left) and j < len(right):
        first, last = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if first < last:
            found.append((first, last))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return found


def subtract(spans: Spans, hidden: Spans) -> Spans:
    found: Spans = []
    j = 0
    for start, stop in spans:
        while j < len(hidden) and hidden[j][1] <= start:
            j += 1
        k = j
        while k < len(hidden) and hidden[k][0] < stop:
            if start < hidden[k][0]:
                found.append((start, hidden[k][0]))
            start = max(start, hidden[k][1])
            k += 1
        if start < stop:
            found.append((start, stop))
    return found


def union(left: Spans, right: Spans) -> Spans:
    found: Spans = []
    for start, stop in sorted(left + right):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def chunks(spans: Spans) -> Iterator[Spans]:
    """The spans in lists of at most CALL_KEYS keys."""
    part: Spans = []
    room = CALL_KEYS
    for start, stop in spans:
        while start < stop:
            taken = min(room, stop - start)
            part.append((start, start + taken))
            start, room = start + taken, room - taken
            if room == 0:
                yield part
                part, room = [], CALL_KEYS
    if part:
        yield part
