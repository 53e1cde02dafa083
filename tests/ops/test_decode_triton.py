"""Tree decode and append in Triton against the reference: on a GPU, or tiny in the interpreter.

Caches hold NaN wherever nothing was written, and so does every output and every partial result before the kernels run.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvkernels.decode import decode_path, tree_decode
from mvkernels.ops.decode import cost_model as decode_tiles
from mvkernels.ops.decode import invariant as decode_invariant
from mvkernels.ops.decode.tasks import EntryView, KeyRun, StepViews
from tests.cache.world import NAN, World, poisoned_cache
from tests.conftest import interpreting
from tests.ops.decode_cases import CASES, assert_decodes, queries

decode_triton = pytest.importorskip("mvkernels.ops.decode.triton", reason="needs triton")
pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fresh memory holds NaN: what a kernel forgets to write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of one key tile, and all keys shared, so that short nodes are cut and shared too."""
    monkeypatch.setattr(decode_tiles, "CHUNKS", (1,))
    monkeypatch.setattr(decode_tiles, "_saves", lambda *_: True)
    monkeypatch.setattr(decode_invariant, "CHUNK_TOKENS", 8)
    for name in ("ITEM_BYTES", "MERGE_BYTES"):
        monkeypatch.setattr(decode_tiles, name, 0)
    monkeypatch.setattr(decode_tiles, "_partial_lanes", lambda shape: 0)


def make_world(page_size, kv_heads=2, head_dim=16, dtype=torch.float32, tokens=200) -> World:
    pages = -(-tokens // page_size) + 20
    return World(poisoned_cache(pages, page_size, 1, kv_heads, head_dim, dtype, DEVICE))


def run(w: World, entries, heads: int, path: str | None = None) -> None:
    step = w.write(entries, append="triton")
    q = queries(w, step.total_rows, heads)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="triton", return_lse=True)
    assert_decodes(w, step, q, out, lse)
    assert path in (None, decode_path(q, w.cache.k[0], w.cache.v[0], step, "triton"))
    again = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="triton")
    assert torch.equal(out, again), "expected the same bits from the same step"


SIZES = [*((case, 3) for case in CASES), *(("nested", size) for size in (1, 16, 64)), ("requests", 16)]


@pytest.mark.parametrize(("case", "page_size"), SIZES)
def test_case(case, page_size, small_chunks):
    w = make_world(page_size)
    run(w, CASES[case](w), heads=4)


# The interpreter has no bfloat16 dot product.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 3), (7, 1, 40), (20, 1, 16), (6, 6, 64)])
def test_dtype_and_heads(dtype, heads, kv_heads, head_dim, small_chunks):
    w = make_world(16, kv_heads, head_dim, dtype)
    run(w, CASES["ending_children_with_merged_parent"](w), heads)


def tables_of(step):
    [tables] = [value for key, value in step.views._cache.items() if key[0] == "triton"]
    return tables


@pytest.mark.parametrize("case", ["prefill", "prefill_on_prefix", "siblings"])
def test_one_partial_for_each_row_and_no_merge(case, monkeypatch):
    """As chosen without a test's help: short lists are read apart, and the first launch writes the result."""
    monkeypatch.setattr(decode_triton, "merge_kernel", None)
    w = make_world(16)
    step = w.write(CASES[case](w), append="triton")
    q = queries(w, step.total_rows, 2)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="triton", return_lse=True)
    assert decode_path(q, w.cache.k[0], w.cache.v[0], step, backend="triton") == "direct"
    assert tables_of(step).num_partials == step.total_rows
    assert_decodes(w, step, q, out, lse)


def test_a_long_prefix_is_shared(monkeypatch):
    """As chosen for a GPU with few multiprocessors: with many, reading it three times takes no longer."""
    shape = decode_triton.decode_shape
    monkeypatch.setattr(decode_triton, "decode_shape", lambda *given: shape(*given)._replace(num_sms=1))
    w = make_world(16, tokens=600)
    root = w.new()
    w.step((root, 500))
    run(w, [(child, 1) for child in w.fork(root, 3)], heads=4, path="shared")


@pytest.mark.parametrize(("shared", "page_size"), [(True, 1), (True, 3), (True, 16), (False, 3), (False, 16)])
def test_steps_that_advance_on_the_device(page_size, shared, request, monkeypatch):
    """The tables of the first step serve those that follow, across page borders; nothing is uploaded again."""
    if shared:
        request.getfixturevalue("small_chunks")
    uploads = []
    build = decode_triton.build_tables
    monkeypatch.setattr(decode_triton, "build_tables", lambda *given: uploads.append(1) or build(*given))
    w = make_world(page_size, kv_heads=1)
    root = w.new()
    w.step((root, 9))
    a, b, c = w.fork(root, 3)
    w.step((a, 3), (c, 15))
    step = w.write([(c, 1), (a, 1), (b, 1)], append="triton", reserve=3)
    for index in range(4):
        if index:
            step = w.advance(step)
        if index != 1:  # tables that are first asked for, or used again, some steps later
            q = queries(w, 3, 2)
            arguments = (q, w.cache.k[0], w.cache.v[0], step)
            out, lse = tree_decode(*arguments, backend="triton", return_lse=True)
            assert_decodes(w, step, q, out, lse)
            assert (decode_path(*arguments, "triton") == "shared") is shared
    assert len(uploads) == 1
    w.commit(step)
    w.check()


def test_tables_that_are_first_built_in_a_later_step(small_chunks):
    w = make_world(3)
    root = w.new()
    w.step((root, 4))
    a, b = w.fork(root, 2)
    step = w.write([(a, 1), (b, 1)], append="triton", reserve=6)
    for _ in range(3):
        step = w.advance(step)
    for _ in range(3):
        q = queries(w, 2, 2)
        out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="triton", return_lse=True)
        assert_decodes(w, step, q, out, lse)
        step = w.advance(step)


@pytest.mark.parametrize(
    ("rows", "dtype", "block_m"),
    [(1, 2, 16), (4, 2, 16), (5, 2, 32), (16, 2, 64), (32, 2, 128), (4000, 2, 128), (4000, 4, 32)],
)
def test_tiles_hold_the_rows_of_a_long_task(rows, dtype, block_m):
    """As small as holds them, and the largest for a prefill: group 4, head dim 128, on 132 multiprocessors."""
    plan = plan_of([(8000, rows)], dtype)
    assert plan.config.block_m == block_m


def views_of(shared_by, own=50, page_size=16):
    """Steps over nodes of (tokens, branches that see it), each branch with `own` tokens."""
    entries, page = [], 0

    def node(tokens):
        nonlocal page
        pages = -(-tokens // page_size)
        page += pages
        return KeyRun.of_node(np.arange(page - pages, page, dtype=np.int32), tokens, page_size)

    for tokens, branches in shared_by:
        whole = (node(tokens),)
        entries += [EntryView(len(entries) + i, 1, node(own), whole) for i in range(branches)]
    return StepViews(tuple(entries), page_size, len(entries))


def plan_of(shared_by, element_size=2, own=50):
    return decode_tiles.plan_decode(views_of(shared_by, own), decode_tiles.Shape(4, 8, 128, element_size, 132))


def test_the_plan_is_the_cheaper_one():
    assert plan_of([(8192, 8)]).path == "shared"
    assert plan_of([(8192, 32), (4096, 32)]).path == "shared"
    assert plan_of([(40, 8)]).path == "direct"  # less than what a merge costs
    assert plan_of([(8192, 1)]).path == "split"  # nothing to share, but 8 heads on 132 multiprocessors
    assert plan_of([(300, 1)] * 200).path == "direct"  # enough branches to fill it
    assert plan_of([(8192, 1)]).chunk <= 512
    assert plan_of([(65536, 32)] * 8, own=2000).chunk >= 16 * 128  # partials: an eighth of what is read, or less


def test_append_takes_strided_rows():
    """Keys as a model has them, [Hkv, N, D] transposed, and a last dimension that is not contiguous."""
    w = make_world(3, kv_heads=2, head_dim=24)
    cache = w.cache
    step = cache.plan([(cache.new(), 5)])
    k_new = torch.randn(2, 5, 24, device=DEVICE).transpose(0, 1)
    v_new = torch.randn(5, 2, 48, device=DEVICE)[..., ::2]
    cache.append(0, k_new, v_new, step, backend="triton")
    for stored, new in ((cache.k[0], k_new), (cache.v[0], v_new)):
        rows = stored.flatten(0, 1)
        assert torch.equal(rows[step.slots], new)
        assert int(torch.isnan(rows).all(dim=(1, 2)).sum()) == len(rows) - 5


@pytest.mark.gpu
def test_nothing_compiles_again_when_branches_come_and_go():
    from mvkernels.ops.decode.triton import decode_kernel, merge_kernel

    w = make_world(16, kv_heads=2, head_dim=64, dtype=torch.bfloat16, tokens=600)
    root = w.new()
    w.step((root, 37))

    def variants() -> int:
        return sum(len(cache[0]) for kernel in (decode_kernel, merge_kernel) for cache in kernel.device_caches.values())

    counts = []
    for count in (1, 2, 3, 16, 31):  # from one row to more than fit a narrow tile
        children = w.fork(root, count)
        run(w, [(child, 1) for child in children], heads=8)
        counts.append(variants())
        for child in children:
            w.free(child)
    assert counts[-1] - counts[0] <= 1, f"expected one more variant, the wide tile, got {counts}"


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    """A layer of more than 2**31 elements: pages at its end are written and read."""
    w = World(poisoned_cache(2**15 + 64, 64, 1, 8, 128, torch.bfloat16, DEVICE))
    filler = w.cache.new()
    w.cache.commit(w.cache.plan([(filler, 64 * 2**15)]))
    root = w.new()
    w.step((root, 100))
    a, b = w.fork(root, 2)
    step = w.write([(a, 1), (b, 3)], append="triton")
    assert int(step.slots.min()) * 8 * 128 >= 2**31
    q = queries(w, 4, 32)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="triton", return_lse=True)
    assert_decodes(w, step, q, out, lse)
