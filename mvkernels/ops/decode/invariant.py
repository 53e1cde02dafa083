"""Batch-invariant tasks, which do not depend on the other entries of the step; slower than free sharing.

The page table of a branch is cut into chunks of a fixed number of pages, counted from its start, and partial results
are merged by position. Entries share a chunk only if it is the same chunk of both page tables. So the computation for a
branch, piece by piece and in its order, follows from its own page table alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mvkernels.ops.decode.tasks import DecodeTask, EntryView, KeyRun, entry_rows

CHUNK_TOKENS = 1024  # with tiles of 64 query rows, partial results are an eighth of the keys and values that are read


def invariant_tasks(entries: Sequence[EntryView], page_size: int) -> tuple[DecodeTask, ...]:
    """Make a task for each chunk that any entry sees, earlier ones first; causal if some row does not see it whole."""
    per_chunk = max(1, CHUNK_TOKENS // page_size)
    found: dict[tuple[object, ...], tuple[int, KeyRun, int | None, list[int]]] = {}
    for index, entry in enumerate(entries):
        runs = [*(run for run in entry.whole if run.tokens), entry.own]
        pages, counts = (np.concatenate([getattr(run, name) for run in runs]) for name in ("pages", "counts"))
        base = sum(run.tokens for run in runs) - entry.num_rows
        before = 0  # keys in the chunks so far
        for chunk, first in enumerate(range(0, len(pages), per_chunk)):
            part = slice(first, first + per_chunk)
            run = KeyRun(pages[part], counts[part], int(counts[part].sum()))
            if not run.tokens:
                break
            key: tuple[object, ...] = (chunk, run.pages.tobytes(), run.counts.tobytes())
            limit = None
            if before + run.tokens > base + 1:  # the first of several rows does not see the last key
                key, limit = (chunk, index), base - before
            found.setdefault(key, (chunk, run, limit, []))[3].append(index)
            before += run.tokens
    # A stable sort: the chunks of an entry stay in order.
    ordered = sorted(found.values(), key=lambda item: item[0])
    return tuple(
        DecodeTask(entry_rows(entries, indices), (run,), limit, shared=len(indices) > 1)
        for _, run, limit, indices in ordered
    )
