"""The kernel that is compiled for this CPU: how its work is cut, its plans, each vector width, and no compiler."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from mvkernels.decode import backend_reasons, decode_path, tree_decode
from mvkernels.errors import BackendError
from mvkernels.ops import native
from mvkernels.ops.decode import native as decode_native
from tests.cache.world import World
from tests.ops.decode_cases import CASES, assert_batch_invariant, assert_decodes, queries
from tests.test_decode import make_world

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which is not installed")


def decode(w: World, step, heads: int, **options):
    """Decodes with random queries and checks the result; returns it."""
    q = queries(w, step.total_rows, heads)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="native", return_lse=True, **options)
    assert_decodes(w, step, q, out, lse)
    return q, out, lse


def family(w: World, prefix: int, *own: int) -> list:
    """Branches with a common prefix and tokens of their own; the entries of a step that adds one to each."""
    root = w.new()
    w.step((root, prefix))
    children = w.fork(root, len(own))
    for child, tokens in zip(children, own, strict=True):
        if tokens:
            w.step((child, tokens))
    return [(child, 1) for child in children]


def test_it_compiles_here_and_auto_takes_it():
    assert decode_native.compile_reason() is None
    w = make_world()
    step = w.write(CASES["siblings"](w))
    q = queries(w, step.total_rows, 4)
    tree_decode(q, w.cache.k[0], w.cache.v[0], step)
    assert [key[0] for key in step.views._cache] == ["native"]


@pytest.mark.parametrize(
    ("prefix", "own", "threads", "path"),
    [
        (2000, (30,) * 4, 2, "shared"),
        (4, (30,) * 4, 2, "direct"),  # too few keys to be worth a merge
        (4, (2000,) * 4, 2, "split"),  # nothing to share, but threads to keep busy
        (4, (2000,) * 4, 1, "direct"),
        (2000, (0,), 3, "split"),
    ],
)
def test_the_way_that_a_step_takes(prefix, own, threads, path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    w = make_world(page_size=16, tokens=12000)
    step = w.write(family(w, prefix, *own))
    q, *_ = decode(w, step, 4)
    assert decode_path(q, w.cache.k[0], w.cache.v[0], step) == path


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (15, 1), (16, 1), (17, 1), (33, 1), (80, 2), (12, 12)])
def test_any_number_of_lanes(heads, kv_heads):
    """Tiles that are full, nearly full, of one vector and of two, and heads that several tiles share."""
    for branches in (1, 2, 9):
        w = make_world(page_size=16, kv_heads=kv_heads)
        decode(w, w.write(family(w, 130, *range(branches))), heads)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 9])
def test_few_lanes_one_by_one_or_side_by_side(group, dtype, head_dim, monkeypatch):
    """The same results, by other sums."""
    found = []
    for side_by_side in (False, True):
        w = make_world(page_size=16, head_dim=head_dim, kv_heads=2, dtype=dtype)
        root = w.new()
        w.step((root, 37))
        step = w.write([*family(w, 150, 3, 0), (root, 90), (w.new(), 2)])
        plan = decode_native.plan_items(step.views, group, 2)
        bound = plan.bound(step.total_rows, 16, head_dim)
        assert not bound.invariant
        bound.invariant = side_by_side
        found.append(decode(w, step, 2 * group)[1])
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    assert torch.allclose(*found, rtol=tolerance, atol=tolerance)
    assert group > 2 or dtype is not torch.float32 or not torch.equal(*found)


@pytest.mark.parametrize("head_dim", [1, 7, 8, 9, 100, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_head_dim(head_dim, dtype):
    w = make_world(page_size=5, head_dim=head_dim, dtype=dtype)
    decode(w, w.write(family(w, 70, 3, 0)), 4)


def test_causal_rows_over_many_blocks_pieces_and_tiles(monkeypatch):
    """Rows of one prompt whose keys are cut into pieces: some rows see nothing of some pieces."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(decode_native, "MIN_CHUNK", 48)
    monkeypatch.setattr(decode_native, "ITEMS_A_THREAD", 10**4)
    w = make_world(page_size=16, tokens=3000)
    root = w.new()
    w.step((root, 37))
    step = w.write([(root, 700)])
    decode(w, step, 4)
    assert len({tuple(item) for item in decode_native.plan_items(step.views, 2, 2).items[:, :2].tolist()}) > 5


def test_the_bits_do_not_depend_on_the_threads(monkeypatch):
    w = make_world(page_size=16, tokens=5000)
    step = w.write(family(w, 3000, *(30,) * 5))
    q = queries(w, step.total_rows, 8)
    plan = decode_native.plan_items(step.views, 4, 2)
    monkeypatch.setattr(decode_native, "plan_items", lambda *_: plan)
    found = []
    for threads in (1, 2, 5):
        plan._bound.clear()
        object.__setattr__(plan, "cut", plan.cut._replace(threads=threads))
        found.append(tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="native"))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("page_size", [3, 16])
def test_plans_advance_with_their_steps(page_size, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    build, built = decode_native._plan, []
    monkeypatch.setattr(decode_native, "_plan", lambda *given: built.append(1) or build(*given))
    w = make_world(page_size, tokens=3000)
    entries = [*family(w, 700, 5, 40, 0), *family(w, 300, 9), *family(w, 5, 0), (w.new(), 1)]
    step = w.write(entries, reserve=40)
    for _ in range(40):
        decode(w, step, 4)
        step = w.advance(step)
    assert len(built) == 1
    w.commit(step)


@pytest.mark.parametrize(("tuned", "lanes"), [("-march=x86-64", 8), ("-march=x86-64-v3", 16)])
def test_other_vector_widths(tuned, lanes, monkeypatch, tmp_path):
    """The source for processors with shorter vectors than this one's may have."""
    monkeypatch.setenv("MVKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_tuned", lambda: tuned)
    native._load.cache_clear()
    decode_native._kernel.cache_clear()
    try:
        assert decode_native._kernel()[1] == lanes
        for case in CASES:
            w = make_world(page_size=16)
            decode(w, w.write(CASES[case](w)), 6)
        w = make_world(page_size=16, head_dim=100, tokens=3000)
        decode(w, w.write(family(w, 1000, *range(9))), 14)
        assert_batch_invariant(make_world(16, 2, 16), "native", 4)
    finally:
        native._load.cache_clear()
        decode_native._kernel.cache_clear()


def test_another_default_dtype():
    """What the kernel writes to is fp32 all the same."""
    w = make_world(page_size=16, head_dim=16, tokens=3000)
    step = w.write(family(w, 1000, *range(9)))
    q = queries(w, 9, 4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="native", return_lse=True)
    finally:
        torch.set_default_dtype(torch.float32)
    [plan] = [value for value in step.views._cache.values() if isinstance(value, decode_native.NativePlan)]
    [space] = plan._spaces.values()
    assert len(space) and space.dtype == lse.dtype == torch.float32


def test_infinities_and_nan_reach_the_rows_that_see_them_and_no_others():
    w = make_world(page_size=4, kv_heads=1)
    first, second = w.new(), w.new()
    w.step((first, 9), (second, 6))
    step = w.write([(first, 1), (second, 1)])
    w.cache.k[0].view(-1, 16)[step.slots[0]] = torch.nan
    q = queries(w, 2, 2)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="native", return_lse=True)
    assert out[0].isnan().all() and lse[:, 0].isnan().all()
    assert out[1].isfinite().all() and lse[:, 1].isfinite().all()


# -- where it cannot be compiled ---------------------------------------------------------------------------------------

PROBE = """
import torch, mvkernels as mk
from mvkernels.decode import backend_reasons
cache = mk.PagedKVCache(4, 16, 1, 1, 8)
step = cache.plan([(cache.new(), 3)])
q = torch.ones(3, 1, 8)
cache.append(0, q, q, step)
print(mk.tree_decode(q, cache.k[0], cache.v[0], step).sum().item(), "|", backend_reasons(q)["native"])
try:
    mk.tree_decode(q, cache.k[0], cache.v[0], step, backend="native")
except mk.BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "expected the C++ compiler no-such-compiler, which is not installed"),
        ("false", "false failed"),
    ],
)
def test_without_a_compiler_auto_takes_the_next_backend_and_says_why(compiler, reason, tmp_path):
    env = {**os.environ, "CXX": compiler, "MVKERNELS_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0].startswith("24.0 | " + reason)
    assert lines[1].startswith("backend 'native' cannot do this: " + reason)
    assert not list(tmp_path.iterdir())
    assert run.stderr.count("UserWarning: mvkernels: no compiled CPU kernels: " + reason) == 1


def test_reasons_name_what_does_not_fit():
    meta = torch.empty(1, 1, 8, device="meta")
    assert backend_reasons(meta)["native"] == "expected tensors on cpu, got meta"
    assert backend_reasons(torch.empty(1, 1, 257))["native"] == "expected a head dimension of at most 256, got 257"
    w = make_world(dtype=torch.float64)
    step = w.write([(w.new(), 2)])
    q = queries(w, 2, 2)
    with pytest.raises(BackendError, match="'native' cannot do this: expected dtype float32, bfloat16, float16"):
        tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="native")
    assert np.isfinite(tree_decode(q, w.cache.k[0], w.cache.v[0], step).numpy()).all()  # auto: the next one


def test_a_copy_of_a_cache_between_two_steps():
    """With the step that is open: both go on by themselves."""
    w = make_world(16, tokens=600)
    step = w.write([*family(w, 100, 5, 40), (w.new(), 1)], reserve=9)
    for _ in range(3):
        decode(w, step, 4)
        step = w.advance(step)
    other = copy.deepcopy(w.cache)
    for _ in range(4):
        decode(w, step, 4)
        step = w.advance(step)
    copied = other._open
    assert (copied.index, step.index) == (3, 7) and torch.equal(copied.positions + 4, step.positions)
    for _ in range(4):
        copied = other.advance(copied)
    assert torch.equal(copied.positions, step.positions) and torch.equal(copied.slots, step.slots)
    for pages in (other.k[0], other.v[0]):
        pages.normal_()
    q = queries(w, copied.total_rows, 4)
    found, expected = (tree_decode(q, other.k[0], other.v[0], copied, backend=name) for name in ("native", "reference"))
    assert torch.allclose(found, expected, atol=1e-5)
