"""Row blocks and key spans for the CPU backend, from an `IntervalMask`.

A plan is a list of calls. A call is dense attention of consecutive rows on the concatenation of a few key spans. There
are two levels of row blocks. Up to GROUP_ROWS rows share one call on the keys that all of them see. Blocks of up to
BLOCK_ROWS rows inside them compute the rest, or one masked call of the whole group if that costs less, as with many
short paths. Long segments are cut on their own, so that the rest of a block is a causal square. Only blocks of several
short segments need a mask.

The own key of every row is in the last call of its block, so that no call has a row without visible keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mvkernels.mask import IntervalMask

GROUP_ROWS = 1024
BLOCK_ROWS = 256
SHORT_SEGMENT = 64  # segments below this many rows share a block with their neighbours
MASKED_KEYS = 1536  # most keys of a masked call of a whole group, so that its mask stays small
CALL_KEYS = 8192  # most keys of a dense call; keys and values that are not contiguous are copied
# The backward takes fewer keys at a time, so that allocations stay small and keys and gradients stay in the cache.
BACKWARD_KEYS = 1024

DENSE, CAUSAL, MASKED, CAUSAL_MASKED = 0, 1, 2, 3
SQUARES = (CAUSAL, CAUSAL_MASKED)  # the keys are the rows; no two squares share one

Spans = list[tuple[int, int]]


class Call(NamedTuple):
    """Attention of the rows first .. last - 1 on the keys of `spans`. fresh: the first call of its rows."""

    first: int
    last: int
    kind: int  # DENSE | CAUSAL | MASKED | CAUSAL_MASKED (the keys are the rows, and some of those below are hidden)
    fresh: bool
    spans: Spans


def cpu_plan(mask: IntervalMask) -> list[Call]:
    """Plan the calls that cover every visible (row, key) pair of a mask exactly once."""
    return list(_calls(mask))


def _calls(mask: IntervalMask) -> Iterator[Call]:
    cuts = _block_cuts(mask)
    for blocks in _group(mask, cuts):
        first, last = cuts[blocks[0]], cuts[blocks[-1] + 1]
        seen = [_seen(mask, cuts[b], cuts[b + 1]) for b in blocks]
        shared: Spans = clip(seen[0][0], first) if len(blocks) > 1 else []
        for every, _, _ in seen[1:]:
            shared = intersect(shared, every)
        apart: list[Call] = []
        for b, (every, some, causal) in zip(blocks, seen, strict=True):
            rows = cuts[b], cuts[b + 1]
            fresh = not shared
            dense = subtract(clip(every, rows[0]), shared)
            for spans in chunks(dense, CALL_KEYS):
                apart.append(Call(*rows, DENSE, fresh, spans))
                fresh = False
            rest = subtract(some, union(shared, dense))
            kind = MASKED if rest != [rows] else CAUSAL if causal else CAUSAL_MASKED
            apart.append(Call(*rows, kind, fresh, rest))
        for i, spans in enumerate(chunks(shared, CALL_KEYS)):
            yield Call(first, last, DENSE, i == 0, spans)
        # Keys that only some rows of the group see: block by block, or in one call if that costs less.
        some_see: Spans = []
        for _, some, _ in seen:
            some_see = union(some_see, some)
        rest = subtract(some_see, shared)
        kind = MASKED if rest != [(first, last)] else CAUSAL_MASKED if _hides(mask, first, last) else CAUSAL
        together = Call(first, last, kind, not shared, rest)
        fits = len(blocks) > 1 and _num_keys(rest) <= MASKED_KEYS
        yield from [together] if fits and _cost(together) < sum(map(_cost, apart)) else apart


def _hides(mask: IntervalMask, first: int, last: int) -> bool:
    """Whether a row of [first, last) does not see an earlier row of that range."""
    begin = np.searchsorted(mask.segment_starts, first, side="right") - 1
    end = np.searchsorted(mask.segment_starts, last, side="left")
    gaps = mask.gaps[mask.gap_ptr[begin] : mask.gap_ptr[end]]
    return bool((gaps[:, 1] > first).any() or (mask.first_key[begin:end] > first).any())


def _num_keys(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def _cost(call: Call) -> float:
    """Estimate the time of a call, in (row, key) pairs of a large dense call.

    Measured with 8 heads of 64 on two x86 cores. The flash kernels use smaller row blocks in calls of fewer rows, and
    skip pairs above the diagonal in blocks of 512 keys.
    """
    rows, keys = call.last - call.first, _num_keys(call.spans)
    square = call.kind in SQUARES and rows >= 768
    pace = 1.0 if rows >= 768 else 1.15 if rows >= 192 else 1.7
    return 8000 + rows * keys * pace * (0.8 if square else 1.0)


def _block_cuts(mask: IntervalMask) -> list[int]:
    """Return the borders of row blocks: long segments alone, short ones together, at most BLOCK_ROWS rows each."""
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


def _group(mask: IntervalMask, cuts: list[int]) -> list[range]:
    """Group consecutive blocks, at most GROUP_ROWS rows each.

    A group preferably ends with a document, else where the fewest keys are hidden, so that its rows share more of them.
    """
    segments = np.searchsorted(mask.segment_starts, cuts[:-1], side="right") - 1
    gaps = np.diff(mask.gap_ptr)[segments].tolist()
    begins = (mask.first_key[segments] == cuts[:-1]).tolist()
    groups: list[range] = []
    block = 0
    while block < len(cuts) - 1:
        end = bisect_right(cuts, cuts[block] + GROUP_ROWS) - 1
        end = max(end, block + 1)
        inside = range(block + 1, end + 1)
        documents = [e for e in inside if e < len(begins) and begins[e] and cuts[e] - cuts[block] >= BLOCK_ROWS]
        late = [e for e in inside if e < len(gaps) and cuts[e] - cuts[block] >= GROUP_ROWS * 3 // 4]
        if documents:
            end = documents[0]
        elif late and end < len(gaps):
            end = min(late, key=lambda e: (gaps[e], -e))
        groups.append(range(block, end))
        block = end
    return groups


def _seen(mask: IntervalMask, first: int, last: int) -> tuple[Spans, Spans, bool]:
    """Return the keys that all rows of [first, last) see, those that some row sees, and whether rows are causal."""
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


def chunks(spans: Spans, size: int) -> Iterator[Spans]:
    """Cut the spans into lists of at most `size` keys."""
    part: Spans = []
    room = size
    for start, stop in spans:
        while start < stop:
            taken = min(room, stop - start)
            part.append((start, start + taken))
            start, room = start + taken, room - taken
            if room == 0:
                yield part
                part, room = [], size
    if part:
        yield part
