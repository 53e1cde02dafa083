"""Tree decode and append in Triton against the reference: on a GPU, or tiny in the interpreter.

Caches hold NaN wherever nothing was written, and so does every output and every partial result before the kernels run.
"""

from __future__ import annotations

import pytest
import torch

from mvkernels.decode import tree_decode
from mvkernels.ops import decode_tiles
from tests.cache_world import NAN, World, poisoned_cache
from tests.conftest import interpreting
from tests.decode_cases import CASES, assert_decodes, queries

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
    """Chunks of one key tile, so that short nodes are split too."""
    monkeypatch.setattr(decode_tiles, "MIN_CHUNK", 1)
    monkeypatch.setattr(decode_tiles, "PROGRAMS_PER_SM", 10**6)


def make_world(page_size, kv_heads=2, head_dim=16, dtype=torch.float32, tokens=200) -> World:
    pages = -(-tokens // page_size) + 20
    return World(poisoned_cache(pages, page_size, 1, kv_heads, head_dim, dtype, DEVICE))


def run(w: World, entries, heads: int) -> None:
    step = w.write(entries, append="triton")
    q = queries(w, step.total_rows, heads)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="triton", return_lse=True)
    assert_decodes(w, step, q, out, lse)
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


def test_whole_chunks_and_one_partial_per_row():
    """The chunk length that is chosen without a test's help: every row of a prefill has one partial, merged alone."""
    w = make_world(16)
    step = w.write([(w.new(), 40)], append="triton")
    q = queries(w, 40, 2)
    out, lse = tree_decode(q, w.cache.k[0], w.cache.v[0], step, backend="triton", return_lse=True)
    (tables,) = [value[1] for key, value in step.views._cache.items() if key[0] == "triton"]
    assert tables.num_partials == 40
    assert_decodes(w, step, q, out, lse)


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
    from mvkernels.ops.decode_triton import decode_kernel, merge_kernel

    w = make_world(16, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
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
