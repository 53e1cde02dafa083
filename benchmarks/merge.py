"""The merge suite: what fork, merge and the planning of a step cost, and what copying engines do instead.

block      fork and merge of 32 branches, on the host; merge_branches, their twin on tables; torch.cat of the branches'
           keys and values behind their parent's, in all layers. No byte of any page may have changed.
plan       the step of 128 branches in 16 requests anew, with what the backends derive from it
sequence   a block after 10 .. 2000 blocks of one request: fork, a step of its branches, merge, a step of its parent
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch

from benchmarks.attention import Effort
from benchmarks.decode_cases import PAGE_SIZE
from benchmarks.gate import WrongResultError, reason
from benchmarks.merge_tables import Tables
from benchmarks.peers import Shape
from benchmarks.timing import Spread, measure, measure_device
from mvkernels import PagedKVCache
from mvkernels.cache.step import Branch, Step
from mvkernels.ops.decode.tasks import build_tasks

CASES = ("block", "plan", "sequence")
BRANCHES = 32
LAYERS = 32
TOKENS = 2048  # of each branch, and of their parent
REPEATS = 50
REQUESTS, PATHS = 16, 8
AFTER = (10, 100, 1000, 2000)
WINDOW = 10  # blocks that are timed from each of these on
GOALS_MS = {"fork + merge": 0.2, "plan + tasks": 1.0}


@dataclass(frozen=True)
class MergeRow:
    """One line of merge.csv.

    what: on the host, unless a device is named, whose work is timed. moved_mb: keys and values copied, over all layers.
    ratio: time over that of the row that is named in `against`; goal_ms: what is aimed at; of_goal: goal over time, met
    from 1 on.
    """

    case: str
    what: str
    branches: int
    tokens: int
    layers: int
    repeats: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    moved_mb: float | None = None
    against: str = ""
    ratio: float | None = None
    goal_ms: float | None = None
    of_goal: float | None = None

    def line(self) -> str:
        return f"{self.case:9} {self.what:24} {self.median_ms * 1e3:12.1f} us"


def run(
    shape: Shape,
    effort: Effort,
    emit: Callable[[MergeRow], None],
    note: Callable[[str], None],
    only: list[str] | None = None,
) -> None:
    """shape.tokens: of each branch and of the parent, in `block`. Raises WrongResultError where a page changed or the
    tables differ from the cache. note: takes the reason when something is left out.
    """
    chosen = [name for name in CASES if not only or name in only]
    repeats = REPEATS // 5 if effort.quick else REPEATS
    if "block" in chosen:
        _block(shape, repeats, effort.seconds, emit, note)
    if "plan" in chosen:
        _plan(shape, repeats, emit)
    if "sequence" in chosen:
        _sequence(AFTER[:2] if effort.quick else AFTER, emit)


def _block(
    shape: Shape, repeats: int, seconds: float, emit: Callable[[MergeRow], None], note: Callable[[str], None]
) -> None:
    tokens, layers = shape.tokens, LAYERS
    pages = (1 + BRANCHES) * -(-tokens // PAGE_SIZE) + 1
    dtype = getattr(torch, shape.dtype)
    cache = PagedKVCache(pages, PAGE_SIZE, layers, shape.kv_heads, shape.head_dim, dtype, shape.device)
    sizes = {"case": "block", "branches": BRANCHES, "tokens": tokens, "layers": layers}
    moved = _bytes_that_changed(cache, lambda: _block_once(cache, tokens))
    if moved:
        raise WrongResultError(f"block: {moved} bytes of keys and values changed in a fork and merge, expected none")
    moved_mb = max(moved, cache.bytes_moved) / 2**20
    times = [_block_once(cache, tokens) for _ in range(repeats)]
    both = [first + second for first, second, _ in times]
    emit(_row("fork", [one[0] for one in times], **sizes, moved_mb=moved_mb))
    emit(_row("merge", [one[1] for one in times], **sizes, moved_mb=moved_mb))
    ours = _row("fork + merge", both, **sizes, moved_mb=moved_mb)
    emit(ours)
    emit(_row("the parent's next step", [one[2] for one in times], **sizes))
    tables = Tables(shape.device, BRANCHES, tokens, PAGE_SIZE)
    try:
        tables.check()
        spent = measure_device(tables.restore, tables.merge, shape.device, repeats)
        emit(_row(f"merge_branches ({shape.device})", spent, **sizes, moved_mb=0.0))
    except WrongResultError:
        raise
    except Exception as error:
        note(f"block: merge_branches left out: {reason(error)}")
    try:
        spent = measure(lambda: _copy_children(cache, tokens), shape.device, repeats, seconds)
    except Exception as error:  # there may be no memory left for the result
        note(f"block: torch.cat left out: {reason(error)}")
        return
    moved_mb = (1 + BRANCHES) * tokens * layers * 2 * cache.k[0][0, 0].nbytes / 2**20
    peer = _row(f"torch.cat ({shape.device})", spent, **sizes, moved_mb=moved_mb)
    emit(_compared(peer, ours))


def _block_once(cache: PagedKVCache, tokens: int) -> tuple[float, float, float]:
    """ms of fork, merge, and the parent's next step with its tasks. Every branch gets `tokens` tokens in between."""
    root = cache.new()
    cache.commit(cache.plan([(root, tokens)]))
    start = time.perf_counter()
    children = cache.fork(root, BRANCHES)
    forked = time.perf_counter()
    cache.commit(cache.plan([(child, tokens) for child in children]))
    merging = time.perf_counter()
    cache.merge(root, children)
    merged = time.perf_counter()
    derive_tasks(cache.plan([(root, 1)]))
    planned = time.perf_counter()
    cache.free(root)
    return (forked - start) * 1e3, (merged - merging) * 1e3, (planned - merged) * 1e3


def derive_tasks(step: Step) -> object:
    """What every backend starts from."""
    return build_tasks(step.views.entries)


def _bytes_that_changed(cache: PagedKVCache, call: Callable[[], object]) -> int:
    """In all pages of all layers. The contents are made anew from a seed, for a copy of them might not fit."""

    def contents(layer: int, like: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(like.device).manual_seed(layer)
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    stores = [*cache.k, *cache.v]
    for index, store in enumerate(stores):
        store.copy_(contents(index, store))
    call()
    changed = 0
    for index, store in enumerate(stores):
        changed += int((store != contents(index, store)).sum()) * store.element_size()
    return changed


def _copy_children(cache: PagedKVCache, tokens: int) -> None:
    """What engines with a contiguous cache for each branch do: one longer cache of the parent, layer by layer.

    The sources lie in the pages of the cache, one piece after the other: [tokens, Hkv, D] each.
    """
    for store in (*cache.k, *cache.v):
        pieces = store.flatten(0, 1)[: (1 + BRANCHES) * tokens].split(tokens)
        torch.cat(pieces)


def _plan(shape: Shape, repeats: int, emit: Callable[[MergeRow], None]) -> None:
    """Each request has a prompt, two blocks that are merged, and an open one."""
    pages = REQUESTS * (64 + 3 * PATHS * 4 + 2)
    cache = PagedKVCache(pages, PAGE_SIZE, 1, 1, 8, torch.float32, shape.device)  # the storage is not used
    entries: list[tuple[Branch, int]] = []
    for _ in range(REQUESTS):
        root = cache.new()
        cache.commit(cache.plan([(root, 512)]))
        for _ in range(2):
            children = cache.fork(root, PATHS)
            cache.commit(cache.plan([(child, 40) for child in children]))
            cache.merge(root, children)
            cache.commit(cache.plan([(root, 9)]))
        entries += [(child, 1) for child in cache.fork(root, PATHS)]
    cache.commit(cache.plan([(branch, 37) for branch, _ in entries]))

    def plan() -> Step:
        return cache.plan(entries)

    steps: dict[str, Callable[[], object]] = {"plan": plan, "plan + tasks": lambda: derive_tasks(plan())}
    derived = _derive(shape)
    if derived is not None:
        what, derive = derived
        steps[f"plan + {what}"] = lambda: derive(plan())
    for what, call in steps.items():
        spent = measure(call, shape.device, repeats)
        emit(_row(what, spent, case="plan", branches=len(entries), tokens=1, layers=1))


def _derive(shape: Shape) -> tuple[str, Callable[[Step], object]] | None:
    """What the backend of a GPU makes of a step before its first kernel; on a CPU little is left after the tasks."""
    if shape.device != "cuda":
        return None
    from mvkernels.ops.decode.triton import plan_tables

    heads = (shape.heads, shape.kv_heads, shape.head_dim, getattr(torch, shape.dtype).itemsize)
    return "tasks + tables", lambda step: plan_tables(step.views, *heads, torch.device("cuda"))


def _sequence(after: Sequence[int], emit: Callable[[MergeRow], None]) -> None:
    paths, tokens = 4, PAGE_SIZE
    cache = PagedKVCache((after[-1] + WINDOW) * (paths + 1), PAGE_SIZE, 1, 1, 8)
    root = cache.new()
    spent: dict[int, list[float]] = {number: [] for number in after}
    first: MergeRow | None = None
    for done in count():
        start = time.perf_counter()
        children = cache.fork(root, paths)
        step = cache.plan([(child, tokens) for child in children])
        derive_tasks(step)
        cache.commit(step)
        cache.merge(root, children)
        step = cache.plan([(root, 1)])
        derive_tasks(step)
        cache.commit(step)
        took = (time.perf_counter() - start) * 1e3
        for number in after:
            if number <= done < number + WINDOW:
                spent[number].append(took)
            if number + WINDOW == done + 1:
                row = _row(
                    f"block after {number}", spent[number], case="sequence", branches=paths, tokens=tokens, layers=1
                )
                first = first or row
                emit(_compared(row, first))
        if done + 1 == after[-1] + WINDOW:
            return


def _row(what: str, times: Sequence[float], **more: object) -> MergeRow:
    spread, goal = Spread.of(times), GOALS_MS.get(what)
    return MergeRow(
        what=what,
        repeats=len(times),
        median_ms=spread.median,
        p20_ms=spread.p20,
        p80_ms=spread.p80,
        goal_ms=goal,
        of_goal=goal and goal / spread.median,
        **more,
    )


def _compared(row: MergeRow, other: MergeRow) -> MergeRow:
    return replace(row, against=other.what, ratio=row.median_ms / other.median_ms)
