"""Worlds that tests and benchmarks of tree decode share: each makes some branches and returns the entries of a step."""

from __future__ import annotations

import pytest
import torch

from mvkernels.decode import tree_decode
from mvkernels.ops.decode.native import compile_reason
from mvkernels.reference.decode import attend
from tests.cache.world import World

NATIVE = pytest.param("native", marks=pytest.mark.skipif(compile_reason() is not None, reason=str(compile_reason())))


def one_token(w: World):
    """The first token of all: nothing before it."""
    return [(w.new(), 1)]


def prefill(w: World):
    return [(w.new(), 37)]


def prefill_on_prefix(w: World):
    root = w.new()
    w.step((root, 21))
    return [(root, 30)]


def siblings(w: World):
    """Unequal paths, one of them empty and one of one token."""
    root = w.new()
    w.step((root, 19))
    a, b, c, d = w.fork(root, 4)
    w.step((a, 7), (b, 1), (d, 12))
    return [(a, 1), (b, 1), (c, 1), (d, 1)]


def parent_with_fresh_children(w: World):
    root = w.new()
    w.step((root, 5))
    children = w.fork(root, 3)
    return [(root, 2), (children[2], 5), (children[0], 1), (children[1], 4)]


def ending_children_with_merged_parent(w: World):
    root = w.new()
    w.step((root, 6))
    a, _, c = w.fork(root, 3)
    w.step((a, 5), (c, 9))
    w.merge(root)
    return [(c, 1), (a, 2), (root, 3)]


def merged_and_forked_again(w: World):
    root = w.new()
    w.step((root, 4))
    a, b = w.fork(root, 2)
    w.step((a, 3), (b, 6))
    w.merge(root)
    w.step((root, 2))
    c, d = w.fork(root, 2)
    w.step((c, 2), (d, 1))
    return [(c, 1), (d, 2)]


def nested(w: World):
    """Depth 4, merged inwards out while outer paths go on."""
    root = other = w.new()
    w.step((root, 10))
    chain = [root]
    for depth in range(4):
        inner, other = w.fork(chain[-1], 2)
        w.step((inner, 2 + depth), (other, 3))
        chain.append(inner)
    w.merge(chain[3])
    w.step((chain[3], 1))
    w.merge(chain[2])
    return [(chain[2], 2), *((b, 1) for b in w.children[chain[1]] if b is not chain[2])]


def requests(w: World):
    """Prompts of their own, prefill and decode in one step."""
    a, b, c = w.new(), w.new(), w.new()
    w.step((a, 33), (b, 2))
    return [(c, 17), (a, 1), (b, 3)]


CASES = {
    f.__name__: f
    for f in (
        one_token, prefill, prefill_on_prefix, siblings, parent_with_fresh_children,
        ending_children_with_merged_parent, merged_and_forked_again, nested, requests,
    )
}  # fmt: skip


def queries(w: World, rows: int, heads: int) -> torch.Tensor:
    """[rows, heads, D] in the cache's dtype."""
    q = torch.randn(rows, heads, w.cache.head_dim, generator=w.generator)
    return q.to(w.cache.dtype).to(w.cache.device)


def expected(w: World, step, q, layer: int, dtype: torch.dtype, scale=None):
    """out and lse of a written step, by the reference and one branch at a time, in `dtype`."""
    outs, lses = [], []
    for (branch, count), row in zip(step.entries, step.row_offsets, strict=True):
        keys, values = ((tensor + layer).to(q.device).to(dtype) for tensor in w.mirror(branch).visible())
        out, lse = attend(q[row : row + count].to(dtype), keys, values, scale)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def assert_decodes(w: World, step, q, out, lse, layer: int = 0, scale=None) -> None:
    """Error against float64 at most twice that of eager code in the same dtype, plus a floor of its rounding."""
    exact, exact_lse = expected(w, step, q, layer, torch.float64, scale)
    eager, eager_lse = expected(w, step, q, layer, q.dtype, scale)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    for got, near, true in ((out, eager, exact), (lse, eager_lse, exact_lse)):
        assert torch.isfinite(got).all()
        error = (got.double() - true).abs().max().item()
        bound = 2 * (near.double() - true).abs().max().item() + FLOOR[q.dtype] * max(1.0, true.abs().max().item())
        assert error <= bound, f"error {error:.3g} is over the bound {bound:.3g}"


def assert_batch_invariant(w: World, backend: str, heads: int = 4) -> None:
    """Branches of a tree, decoded alone and among others: the same bits, and right. Some prefill, some see a merge."""
    root = w.new()
    w.step((root, 37))
    paths = w.fork(root, 4)
    w.step((paths[0], 30), (paths[1], 1), (paths[3], 18))
    inner = w.fork(paths[0], 2)
    w.step((inner[0], 7), (inner[1], 20))
    w.merge(paths[0])
    w.step((paths[0], 2))
    leaves = [*w.fork(paths[0], 3), *paths[1:]]
    counts = dict(zip(leaves, (1, 1, 5, 1, 21, 1), strict=True))
    q = {branch: queries(w, counts[branch], heads) for branch in leaves}
    rows = {branch: w.new_rows(counts[branch], w.cache.num_kv_heads, w.cache.head_dim) for branch in leaves}
    found: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
    batches = [leaves, leaves[::-1], leaves[1:3], leaves[3:], *([branch] for branch in leaves)]
    for batch in batches:
        step = w.cache.plan([(branch, counts[branch]) for branch in batch])
        keys = torch.cat([rows[branch] for branch in batch]).to(w.cache.k[0])
        w.cache.append(0, keys, keys.flip(-1), step, backend="cpu" if backend == "native" else backend)
        queries_now = torch.cat([q[branch] for branch in batch])
        arguments = (queries_now, w.cache.k[0], w.cache.v[0], step)
        out, lse = tree_decode(*arguments, backend=backend, return_lse=True, batch_invariant=True)
        near, near_lse = tree_decode(*arguments, backend="reference", return_lse=True)
        tolerance = 1e-5 if out.dtype == torch.float32 else 5e-2  # right in the main: other tests are exact about it
        torch.testing.assert_close(out, near, rtol=0, atol=tolerance)
        torch.testing.assert_close(lse, near_lse, rtol=0, atol=tolerance)
        for branch, row in zip(batch, step.row_offsets, strict=True):
            part = slice(row, row + counts[branch])
            got = (out[part], lse[:, part])
            first = found.setdefault(branch, got)
            assert all(torch.equal(x, y) for x, y in zip(got, first, strict=True)), f"{branch} among {batch}"
        w.cache.rollback(step)
