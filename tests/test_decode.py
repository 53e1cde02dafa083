"""Tree decode on the CPU against the reference, which decodes one branch at a time from unpaged tensors.

Caches hold NaN wherever nothing was written, so a key beyond a node's end would show in the result.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvkernels.decode import decode_path, tree_decode
from mvkernels.errors import BackendError, StaleStep
from mvkernels.ops.backends import choose_backend
from mvkernels.ops.decode import invariant as decode_invariant
from mvkernels.ops.decode import sdpa as decode_sdpa
from mvkernels.ops.decode.tasks import EntryView, KeyRun, build_tasks
from tests.cache.world import World, may_grow, poisoned_cache
from tests.ops.decode_cases import CASES, NATIVE, assert_batch_invariant, assert_decodes, expected, queries

BACKENDS = [NATIVE, "cpu", "reference"]


def make_world(page_size=3, kv_heads=2, head_dim=16, dtype=torch.float32, layers=1, tokens=400, seed=0) -> World:
    pages = -(-tokens // page_size) + 60
    return World(poisoned_cache(pages, page_size, layers, kv_heads, head_dim, dtype), seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("case", CASES)
def test_case(case, page_size, backend):
    w = make_world(page_size)
    step = w.write(CASES[case](w))
    q = queries(w, step.total_rows, 6)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend=backend, return_lse=True)
    assert_decodes(w, step, q, out, lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 1), (4, 4, 24), (7, 1, 64), (12, 2, 128)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtype_and_heads(dtype, heads, kv_heads, head_dim, backend):
    w = make_world(16, kv_heads, head_dim, dtype)
    step = w.write(CASES["ending_children_with_merged_parent"](w))
    q = queries(w, step.total_rows, heads)
    if backend == "native" and dtype == torch.float64:
        with pytest.raises(BackendError, match="expected dtype float32, bfloat16, float16, got torch"):
            tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend=backend)
        return
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend=backend, return_lse=True)
    assert_decodes(w, step, q, out, lse)


@st.composite
def tree_steps(draw):
    """A world after random steps, and entries that may grow together: leaves, fresh children, ending children."""
    w = make_world(
        page_size=draw(st.sampled_from([1, 3, 16, 64, 256])),
        kv_heads=draw(st.sampled_from([1, 2])),
        head_dim=draw(st.sampled_from([4, 16])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 1000)),
        tokens=6000,
    )
    widths = [1, 2, 3, 4, 32]
    tokens = st.sampled_from([1, 1, 1, 2, 5, 17])
    w.step((w.new(), draw(st.integers(1, 40))))
    depth = {branch: 0 for branch in w.live}
    for _ in range(draw(st.integers(0, 6))):
        branch = draw(st.sampled_from(list(w.live)))
        if w.children[branch]:
            if not any(w.children[child] for child in w.children[branch]):
                w.merge(branch)
        elif depth[branch] < 4:
            width = draw(st.sampled_from(widths))
            widths = widths[:4] if width == 32 else widths
            depth.update(dict.fromkeys(w.fork(branch, width), depth[branch] + 1))
        growing = [b for b in (*w.live, *w.merged) if may_grow(w.mirror(b)) and draw(st.booleans())]
        for branch in growing:  # one after the other: what was planned first may stop the others
            if (branch in w.live or branch in w.merged) and may_grow(w.mirror(branch)):
                w.step((branch, draw(tokens)))
    leaves = [b for b in w.live if not w.children[b]]
    parents = [b for b in w.live if w.children[b] and may_grow(w.mirror(b)) and draw(st.booleans())]
    ending = [b for b in w.merged if draw(st.booleans())]
    chosen = [b for b in leaves if draw(st.booleans())] or leaves[:1]
    # A node is made after all that it sees, so in this order no entry stops a later one.
    order = sorted({*parents, *ending, *chosen}, key=lambda b: w.cache._state(b).tail.id)
    return w, [(branch, draw(tokens)) for branch in order]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@given(tree_steps(), st.sampled_from([1, 2, 3, 7]))
def test_random_trees(backend, world_and_entries, group):
    w, entries = world_and_entries
    step = w.write(entries)
    q = queries(w, step.total_rows, group * w.cache.num_kv_heads)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend=backend, return_lse=True)
    assert_decodes(w, step, q, out, lse)
    w.commit(step)
    w.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_and_scale_are_kept_apart(backend):
    w = make_world(layers=3)
    step = w.write(CASES["siblings"](w))
    q = queries(w, step.total_rows, 4)
    stores = zip(w.cache.k, w.cache.v, strict=True)
    found = [tree_decode(q, k, v, step, 0.7, backend, return_lse=True) for k, v in stores]
    for layer, (out, lse) in enumerate(found):  # after all of them: layers gather into the same memory
        assert_decodes(w, step, q, out, lse, layer, scale=0.7)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("case", ["prefill_on_prefix", "siblings"])
@pytest.mark.parametrize("backend", [NATIVE, "cpu"])
def test_a_scale_of_either_sign(case, scale, backend):
    w = make_world()
    step = w.write(CASES[case](w))
    q = queries(w, step.total_rows, 4)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, scale, backend, return_lse=True)
    assert_decodes(w, step, q, out, lse, scale=scale)


@pytest.mark.parametrize("backend", [NATIVE, "cpu"])
def test_the_same_step_has_the_same_bits(backend):
    w = make_world(page_size=3)
    step = w.write(CASES["nested"](w))
    q = queries(w, step.total_rows, 6)
    once = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend=backend)
    step.views._cache.clear()
    assert torch.equal(once, tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_queries(backend):
    w = make_world()
    step = w.write(CASES["requests"](w))
    wide = torch.randn(1, 6, step.total_rows, 2 * w.cache.head_dim, generator=w.generator)
    q = wide[0].transpose(0, 1)[..., ::2]
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend=backend, return_lse=True)
    assert_decodes(w, step, q, out, lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scattered_pages(backend):
    """Two branches that grow by turns own every other page."""
    w = make_world(page_size=4)
    a, b = w.new(), w.new()
    w.step((a, 19))
    for _ in range(8):
        w.step((a, 3), (b, 5))
    step = w.write([(b, 1), (a, 6)])
    q = queries(w, step.total_rows, 2)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend=backend, return_lse=True)
    assert_decodes(w, step, q, out, lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_used_again_hide_what_they_held(backend):
    """A freed branch's keys stay in memory; the page's next owner sees its own tokens only."""
    w = make_world(page_size=16)
    first = w.new()
    w.step((first, 40))
    w.free(first)
    step = w.write([(w.new(), 3)])
    assert step.slots.tolist() == [0, 1, 2]
    q = queries(w, 3, 2)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend=backend, return_lse=True)
    assert_decodes(w, step, q, out, lse)


def test_long_prefill_takes_one_call():
    w = make_world(page_size=16, tokens=4096)
    step = w.write([(w.new(), 3000)])
    [call], path = decode_sdpa.plan_calls(step.views)
    assert call.causal and call.slots == slice(0, 3000) and path == "direct"
    q = queries(w, 3000, 2)
    out = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="cpu")
    exact, _ = expected(w, step, q, 0, torch.float64)
    assert (out - exact).abs().max() < 1e-5


@pytest.mark.parametrize(("prefix", "branches", "path"), [(2000, 4, "shared"), (600, 1, "direct")])
def test_keys_of_several_branches_are_read_once(prefix, branches, path):
    w = make_world(page_size=16, tokens=3000)
    root = w.new()
    w.step((root, prefix))
    children = w.fork(root, branches)
    w.step(*((child, 30) for child in children))
    step = w.write([(child, 1) for child in children])
    q = queries(w, branches, 4)
    arguments = (q, w.cache.k[0], w.cache.v[0], step)
    assert decode_path(*arguments, backend="cpu") == path
    every_slot = torch.arange(w.cache.num_pages * 16)
    assert sum(len(every_slot[call.slots]) for call in decode_sdpa.plan_calls(step.views)[0]) == prefix + 31 * branches
    assert decode_path(*arguments, backend="reference") == "direct"
    assert_decodes(w, step, q, *tree_decode(*arguments, backend="cpu", return_lse=True))


@pytest.mark.parametrize("page_size", [3, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 64), (14, 2, 8), (40, 1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [NATIVE])
def test_batch_invariance(page_size, heads, kv_heads, head_dim, dtype, backend, monkeypatch):
    monkeypatch.setattr(decode_invariant, "CHUNK_TOKENS", 16)
    assert_batch_invariant(make_world(page_size, kv_heads, head_dim, dtype), backend, heads)


@pytest.mark.parametrize("backend", [NATIVE, "reference"])
def test_batch_invariant_decoding_of_every_case(backend):
    for case in CASES:
        w = make_world(page_size=3)
        step = w.write(CASES[case](w))
        q = queries(w, step.total_rows, 6)
        arguments = (q, w.cache.k[0], w.cache.v[0], step)
        out, lse = tree_decode(*arguments, backend=backend, return_lse=True, batch_invariant=True)
        assert_decodes(w, step, q, out, lse)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.triton)])
def test_other_backends_refuse_batch_invariance(backend):
    w = make_world()
    step = w.write(CASES["siblings"](w))
    arguments = (queries(w, step.total_rows, 4), w.cache.k[0], w.cache.v[0], step)
    for call in (tree_decode, decode_path):
        with pytest.raises(BackendError, match=f"backend '{backend}' cannot do this: it is not batch-invariant"):
            call(*arguments, backend=backend, batch_invariant=True)


# -- tasks -------------------------------------------------------------------------------------------------------


def node(first_page: int, length: int, page_size: int = 4) -> KeyRun:
    pages = torch.arange(first_page, first_page + -(-length // page_size), dtype=torch.int32)
    return KeyRun.of_node(pages.numpy(), length, page_size)


def test_a_shared_node_is_one_task_and_nodes_with_the_same_rows_are_folded():
    goal, old_path, empty = node(0, 10), node(3, 5), node(0, 0)
    whole = (goal, empty, old_path)
    tails = [node(10, 3), node(20, 1), node(30, 9)]
    entries = [
        EntryView(0, 1, tails[0], whole), EntryView(1, 1, tails[1], whole), EntryView(2, 4, tails[2], whole)
    ]  # fmt: skip
    shared, first, second, causal = build_tasks(entries)
    assert shared.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert shared.pages.tolist() == [0, 1, 2, 3, 4] and shared.counts.tolist() == [4, 4, 2, 4, 1]
    assert (first.rows.tolist(), first.counts.tolist(), first.base) == ([0], [3], None)
    assert (second.rows.tolist(), second.counts.tolist()) == ([1], [1])
    assert (causal.rows.tolist(), causal.counts.tolist(), causal.base) == ([2, 3, 4, 5], [4, 4, 1], 5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["shared", "apart", "some shared", "invariant"])
def test_every_row_sees_each_of_its_keys_in_exactly_one_task(case, how, monkeypatch):
    monkeypatch.setattr(decode_invariant, "CHUNK_TOKENS", 9)
    w = make_world(page_size=3)
    step = w.write(CASES[case](w))
    entries = step.views.entries
    tasks = {
        "shared": lambda: build_tasks(entries),
        "apart": lambda: build_tasks(entries, lambda *_: False),
        "some shared": lambda: build_tasks(entries, lambda rows, runs: len(runs) % 2 == 0),
        "invariant": lambda: decode_invariant.invariant_tasks(entries, 3),
    }[how]()
    assert how != "apart" or not any(task.shared for task in tasks)
    for entry, view in enumerate(step.views.entries):
        for row in range(view.num_rows):
            seen = []
            for task in tasks:
                for place in (task.rows == view.first_row + row).nonzero()[0]:
                    slots = [p * 3 + i for p, c in zip(task.pages, task.counts, strict=True) for i in range(c)]
                    seen += slots if task.base is None else slots[: max(0, task.base + place + 1)]
            wanted = step.views.visible_slots(entry).tolist()
            assert sorted(seen) == sorted(wanted[: len(wanted) - view.num_rows + row + 1])


# -- errors ------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit():
    w = make_world(page_size=3, kv_heads=2, head_dim=16)
    step = w.write([(w.new(), 4)])
    q, k, v = queries(w, 4, 4), w.cache.k[0], w.cache.v[0]
    cases = [
        ((q[:3], k, v), r"q: expected shape \[4, Hq, D\], got \[3, 4, 16\]"),
        ((q[0], k, v), r"q: expected shape \[4, Hq, D\]"),
        ((q[:, :3], k, v), "multiple of 2 key-value heads, got 3"),
        ((q, k[..., :8], v), r"k_layer: expected shape \[num_pages, 3, Hkv, 16\]"),
        ((q, k[:, :2], v), r"k_layer: expected shape \[num_pages, 3, Hkv, 16\]"),
        ((q, k, v[:5]), "v_layer: expected k_layer's shape"),
        ((q.half(), k, v), "k_layer: expected q's dtype torch.float16, got torch.float32"),
        ((q, k, v.to("meta")), "v_layer: expected q's device cpu, got meta"),
        ((q, k, v.transpose(0, 1).contiguous().transpose(0, 1)), "v_layer: expected contiguous"),
        ((q.clone().requires_grad_(), k, v), "outside autograd"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            tree_decode(*arguments, step)
    with torch.no_grad():
        tree_decode(q.clone().requires_grad_(), k, v, step)
    with pytest.raises(ValueError, match="expected one of 'auto', 'native', 'cpu', 'triton', 'reference', got 'flash'"):
        tree_decode(q, k, v, step, backend="flash")
    w.commit(step)
    with pytest.raises(StaleStep, match="was committed"):
        tree_decode(q, k, v, step)


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    w = make_world()
    step = w.write([(w.new(), 2)])
    q = queries(w, 2, 2)
    with pytest.raises(BackendError, match="'triton' cannot do this: "):
        tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="triton")
    with pytest.raises(BackendError, match="'triton' cannot do this: "):
        w.cache.append(0, torch.zeros(2, 2, 16), torch.zeros(2, 2, 16), step, backend="triton")


def test_auto_gives_every_reason():
    reasons = {"fast": "too small", "slow": None, "other": "no such device"}
    assert choose_backend("auto", reasons) == "slow"
    with pytest.raises(BackendError, match="no backend fits: fast: too small; other: no such device"):
        choose_backend("auto", reasons, auto=("fast", "other"))
    with pytest.raises(BackendError, match="'other' cannot do this: no such device"):
        choose_backend("other", reasons)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_that_is_not_finite(scale, backend):
    w = make_world()
    step = w.write(CASES["siblings"](w))
    q = queries(w, step.total_rows, 4)
    with pytest.raises(ValueError, match=f"scale: expected a finite number, got {scale}"):
        tree_decode(q, w.cache.k[0], w.cache.v[0], step, scale, backend)


def test_storage_with_other_pages_than_the_cache():
    w = make_world()
    step = w.write(CASES["siblings"](w))
    q, pages = queries(w, step.total_rows, 4), w.cache.num_pages
    short = w.cache.k[0][:1]
    with pytest.raises(ValueError, match=f"k_layer: expected the {pages} pages of the step's cache, got 1"):
        tree_decode(q, short, short, step)
