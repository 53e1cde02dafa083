"""Tables of fixed capacity: other steps through the same memory, by kernels that are launched for its capacity.

The kernels run on a GPU, or tiny in the interpreter. Unwritten keys, outputs and partial results hold NaN.
The interpreter takes 10 ms and more a program, so most tests have few steps
and one KV head, and unusual page sizes have few cases.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mvkernels.decode import tree_decode
from mvkernels.graph.fixed_step import FixedStep, plan_fixed
from mvkernels.ops.decode import buffers as decode_buffers
from mvkernels.ops.decode import cost_model as decode_tiles
from mvkernels.ops.decode import tables as decode_tables
from mvkernels.ops.decode.buffers import round_rows
from mvkernels.ops.decode.tasks import DevicePages, KeyRun, StepViews
from tests.cache.world import World, poisoned_cache
from tests.ops.decode_cases import CASES, assert_decodes, queries

decode_triton = pytest.importorskip("mvkernels.ops.decode.triton", reason="needs triton")
from tests.ops.test_decode_triton import (  # noqa: E402
    DEVICE,
    SIZES,
    make_world,
    poisoned_outputs,  # noqa: F401
    small_chunks,  # noqa: F401
    views_of,
)

pytestmark = pytest.mark.triton


@pytest.fixture
def roomy(monkeypatch):
    """Buckets in which every step of up to 24 rows fits: one with a merge, and one without."""
    shapes = decode_tiles.tile_shapes
    monkeypatch.setattr(decode_tiles, "tile_shapes", lambda shape: shapes(shape)[:1])
    monkeypatch.setattr(decode_buffers, "PARTIALS", 32)
    monkeypatch.setattr(decode_buffers, "round_rows", lambda rows: 24)
    power = decode_buffers._power
    monkeypatch.setattr(decode_buffers, "_power", lambda number: max(32, power(number)))


def put_on_device(views: StepViews, apart: bool) -> StepViews:
    """The same views with all pages on the device: in the order of the lists, or with something between all runs."""
    runs, end, placed = {}, 7, {}
    for entry in views.entries:
        for run in (*entry.whole, entry.own):
            if id(run) not in runs:
                runs[id(run)] = KeyRun(run.pages, run.counts, run.tokens, end)
                placed[end] = run
                end += len(run.pages) + 3 * apart
    pages, counts = np.full((2, end), 10**6, np.int32)  # pages that are nobody's: reading one crashes
    for place, run in placed.items():
        pages[place : place + len(run.pages)], counts[place : place + len(run.pages)] = run.pages, run.counts
    lists = {id(entry.whole): tuple(runs[id(run)] for run in entry.whole) for entry in views.entries}
    entries = tuple(replace(entry, own=runs[id(entry.own)], whole=lists[id(entry.whole)]) for entry in views.entries)
    there = DevicePages(torch.from_numpy(pages).to(DEVICE), torch.from_numpy(counts).to(DEVICE))
    return replace(views, planned=entries, device_pages=there)


def decode(w: World, step, group: int = 2) -> None:
    """A written step: against the reference. group: query heads for each KV head."""
    heads = group * w.cache.num_kv_heads
    q = queries(w, step.total_rows, heads)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="triton", return_lse=True)
    assert_decodes(w, step, q, out, lse)


def decode_fixed(w: World, fixed: FixedStep, step) -> None:
    """The same, through the memory of a fixed step that was laid and advanced; rows beyond the step's own are 0."""
    rows = step.total_rows
    assert torch.equal(fixed.positions[:rows], step.positions) and torch.equal(fixed.slots[:rows], step.slots)
    assert (fixed.slots[rows:] == -1).all() and (fixed.positions[rows:] == 0).all()
    q = queries(w, fixed.rows, 2 * w.cache.num_kv_heads)
    inside = fixed.step(step)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], inside, backend="triton", return_lse=True)
    fixed.check(inside)
    assert_decodes(w, step, q[:rows], out[:rows], lse[:, :rows])
    assert (out[rows:] == 0).all() and torch.isneginf(lse[:, rows:]).all()


LISTS = {"uploaded": None, "side by side": False, "apart": True}


def placed(step, lists: str):
    apart = LISTS[lists]
    return step if apart is None else replace(step, views=put_on_device(step.views, apart))


# -- page lists on the device --------------------------------------------------------------------------------------


SOME_SIZES = [("siblings", 1), ("nested", 3), ("requests", 16)]


@pytest.mark.parametrize(
    ("case", "page_size", "lists"),
    [*((*size, "apart") for size in SIZES), *((*size, "side by side") for size in SOME_SIZES)],
)
def test_page_lists_on_the_device(case, page_size, lists, small_chunks):  # noqa: F811
    """Runs that stand apart are read apart, each from its own first lane; new tokens see what is before them only."""
    w = make_world(page_size)
    decode(w, placed(w.write(CASES[case](w), append="triton"), lists))


@pytest.mark.parametrize(
    ("case", "page_size", "through"),
    [*((*size, "fixed memory") for size in SIZES), *((*size, "its own") for size in SOME_SIZES)],
)
def test_the_lists_that_a_cache_keeps(case, page_size, through):
    """Two steps of a branch each, the second from the lists as the first has left them."""
    w = World(poisoned_cache(-(-200 // page_size) + 20, page_size, 1, 1, 16, torch.float32, DEVICE, (32, 256)))
    step = w.write(CASES[case](w), append="triton")
    for _ in range(2):
        assert step.views.device_pages is not None
        if through == "its own":
            decode(w, step)
        else:
            decode_fixed(w, lay(w, step), step)
        w.commit(step)
        step = w.write([(step.entries[-1][0], 1)], append="triton")


@pytest.mark.parametrize("page_size", [3, 16])
def test_a_cache_whose_steps_advance_in_fixed_memory(page_size):
    w = World(poisoned_cache(-(-200 // page_size) + 20, page_size, 1, 1, 16, torch.float32, DEVICE, (32, 256)))
    step = forked(w, 2)
    for _ in range(2):  # a plan, and what it has left on the device read by the next one
        memory = lay(w, step)
        for index in range(3):
            if index:
                following = w.cache.advance(step, tensors=False)
                w.bury()
                memory.advance()
                step = replace(following, positions=memory.positions[:3].clone(), slots=memory.slots[:3].clone())
                w.cache._open = step
                w.fill(step, step.entries)
            decode_fixed(w, memory, step)
        w.commit(step)
        step = w.write(step.entries, append="triton", reserve=2)


def test_the_lists_on_the_device_are_not_uploaded(monkeypatch):
    uploads = []
    upload = decode_tables._upload

    def watch(arrays, device):
        uploads.append(arrays)
        return upload(arrays, device)

    monkeypatch.setattr(decode_tables, "_upload", watch)
    w = make_world(3)
    decode(w, placed(w.write(CASES["siblings"](w), append="triton"), "apart"))
    decode(w, w.write([(w.new(), 3)], append="triton"))
    assert [len(arrays) for arrays in uploads] == [4, 6]


def test_a_run_without_a_place_is_an_error():
    w = make_world(3)
    step = w.write([(w.new(), 3)], append="triton")
    nowhere = torch.zeros(9, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected runs of keys with a place in the device pages, got 3 keys without"):
        decode(w, replace(step, views=replace(step.views, device_pages=DevicePages(nowhere, nowhere))))


def forked(w: World, reserve: int):
    """Three paths of unequal length, about to take `reserve` steps more than one."""
    root = w.new()
    w.step((root, 9))
    a, b, c = w.fork(root, 3)
    w.step((a, 3), (c, 15))
    return w.write([(c, 1), (a, 1), (b, 1)], append="triton", reserve=reserve)


def advance(w: World, step):
    """Like `World.advance`, which counts tokens on the device itself, in place of the tables that are tested here."""
    following = w.cache.advance(step)
    w.bury()
    w.fill(following, step.entries)
    return following


@pytest.mark.parametrize(("first_asked", "page_size"), [(0, 3), (0, 16), (2, 1), (2, 3)])
def test_counts_on_the_device_advance(page_size, first_asked, small_chunks):  # noqa: F811
    """By several tables at once, and by ones that are made some steps later."""
    w = make_world(page_size, kv_heads=1)
    step = placed(forked(w, 4), "apart")
    for index in range(5):
        if index >= first_asked:
            decode(w, step)
            decode(w, step, group=1)
        if index < 4:
            step = advance(w, step)


def test_the_cost_model_counts_segments():
    """Two pages lists that stand apart are two items and two partials of each row; side by side they are one."""
    views = views_of([(300, 1)] * 200)
    shape = decode_tiles.Shape(4, 8, 128, 2, 132)
    plans = {
        name: decode_tiles.plan_decode(views if apart is None else put_on_device(views, apart), shape)
        for name, apart in LISTS.items()
    }
    assert {name: plan.path for name, plan in plans.items()} == {
        "uploaded": "direct", "side by side": "direct", "apart": "split",
    }  # fmt: skip
    assert plans["uploaded"].time == plans["side by side"].time < plans["apart"].time
    assert {len(parts) for parts in plans["apart"].segments} == {2}
    shared = views_of([(8192, 8)])
    assert decode_tiles.plan_decode(put_on_device(shared, True), shape).path == "shared"


# -- memory that steps go through ----------------------------------------------------------------------------------


def lay(w: World, step, memory: FixedStep | None = None) -> FixedStep:
    """A step in the memory, or in some of its own, and advanced to."""
    laid = plan_fixed(step, 2 * w.cache.num_kv_heads)
    memory = memory or FixedStep(laid, step)
    memory.lay(laid, step)
    memory.advance()
    return memory


@pytest.mark.parametrize(
    ("case", "page_size", "lists"),
    [*((*size, "uploaded") for size in SIZES), *((*size, lists) for size in SOME_SIZES for lists in list(LISTS)[1:])],
)
def test_a_step_with_rows_to_spare(case, page_size, lists):
    """As planned without a test's help: short steps are read in one piece, and the spare rows by items of theirs."""
    w = make_world(page_size)
    step = placed(w.write(CASES[case](w), append="triton"), lists)
    memory = lay(w, step)
    assert memory.rows == round_rows(step.total_rows)
    decode_fixed(w, memory, step)


OTHER_TREES = (
    "siblings", "requests", "one_token", "nested", "parent_with_fresh_children", "ending_children_with_merged_parent",
    "one_token", "merged_and_forked_again", "requests",
)  # fmt: skip


def test_one_memory_for_other_trees(small_chunks, roomy):  # noqa: F811
    """What stood there before, larger or smaller, is gone; nothing moves."""
    memories, addresses = {}, {}
    for case in OTHER_TREES:
        w = make_world(3, kv_heads=1)
        step = w.write(CASES[case](w), append="triton")
        bucket = plan_fixed(step, 2).bucket
        memory = memories[bucket] = lay(w, step, memories.get(bucket))
        decode_fixed(w, memory, step)
        tables = memory.step(step).views.cached(memory._key, lambda: None)
        tensors = (memory.positions, memory.slots, *(t for t in vars(tables).values() if isinstance(t, torch.Tensor)))
        now = [tensor.data_ptr() for tensor in tensors]
        assert addresses.setdefault(bucket, now) == now
    assert len(memories) == 2


@pytest.mark.parametrize(
    ("merged", "page_size", "lists"),
    [
        (True, 1, "side by side"), (True, 3, "uploaded"), (True, 16, "apart"),
        (False, 1, "uploaded"), (False, 3, "apart"), (False, 16, "side by side"),
    ],
)  # fmt: skip
def test_steps_that_advance_in_fixed_memory(page_size, lists, merged, request):
    """The first is the one that was laid: `advance` before each step, and over page borders."""
    if merged:
        request.getfixturevalue("small_chunks")
    w = make_world(page_size, kv_heads=1)
    step = placed(forked(w, 4), lists)
    memory = lay(w, step)
    for index in range(5):
        if index:
            step = advance(w, step)
            memory.advance()
        decode_fixed(w, memory, step)
    # Of three lists only one can stand right behind what all of them see.
    assert (memory.bucket.capacity.partials > 0) == (merged or lists != "uploaded")


def test_the_last_row_of_an_entry_counts_its_page():
    """Whichever program or thread writes last: only one row of an entry writes at all."""
    pages = torch.tensor([9, 4, 6, 3], dtype=torch.int32, device=DEVICE)
    counts = torch.full((4,), 77, dtype=torch.int32, device=DEVICE)
    rows = [(3, 1, 50, 1), (1, 1, 48, 0), (2, 1, 49, 0), (0, 0, 7, 1), (0, -1, 5, 0)]  # token, place, position, last
    state = torch.tensor(rows, dtype=torch.int32, device=DEVICE).T.contiguous()
    cursor = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    positions, slots = (torch.full((5,), 99, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.int64))
    decode_triton.launch_advance(state, cursor, pages, counts, positions, slots, 3)
    assert positions.tolist() == [52, 50, 51, 9, 0]
    assert slots.tolist() == [6 * 3 + 2, 6 * 3 + 0, 6 * 3 + 1, 9 * 3 + 2, -1]
    assert counts.tolist() == [3, 77, 3, 77]


def test_rows_to_spare_are_appended_nowhere():
    w = make_world(3)
    step = forked(w, 2)
    before = [tensor.clone() for tensor in (*w.cache.k, *w.cache.v)]
    memory = lay(w, step)
    assert memory.rows == 4
    rows = torch.randn(4, 2, 16, generator=w.generator).to(DEVICE)
    w.cache.append(0, rows, rows + 1, memory.step(step), backend="triton")
    for tensor, old, new in zip((*w.cache.k, *w.cache.v), before, (rows, rows + 1), strict=True):
        found, old = tensor.flatten(0, 1), old.flatten(0, 1)
        assert torch.equal(found[step.slots], new[:3])
        found[step.slots] = old[step.slots]
        assert torch.equal(found.nan_to_num(9.0), old.nan_to_num(9.0))


def test_a_step_of_another_bucket_is_refused():
    w = make_world(3)
    step = forked(w, 2)
    memory = lay(w, step)
    w.cache.rollback(step)
    other = w.cache.plan([(w.cache.new(), 5)])
    with pytest.raises(ValueError, match=r"expected a step of bucket .*rows=4.*, got one of .*rows=8"):
        memory.lay(plan_fixed(other, 4), other)


def test_buckets_are_few():
    """Batch sizes are rounded up by less than half of the bucket; lists of tables by powers of two."""
    sizes = [round_rows(rows) for rows in range(1, 1025)]
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(rows <= size < 2 * rows for rows, size in enumerate(sizes, 1))
    assert all(size - rows < size / 3 for rows, size in enumerate(sizes, 1) if rows > 16)
    shape = decode_tiles.Shape(4, 8, 128, 2, 132)
    buckets = set()
    for own in range(20, 4000, 60):
        for branches in range(9, 17):
            views = views_of([(2048, branches)], own=own)
            plan = decode_tiles.plan_decode(views, shape)
            buckets.add(decode_buffers.bucket_of(plan, decode_tables.table_arrays(plan, views), views, shape))
    assert len({bucket.capacity._replace(pages=0) for bucket in buckets}) <= 3, buckets
    assert {bucket.capacity.pages for bucket in buckets} == {4096, 8192}
