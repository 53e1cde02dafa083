"""Worlds that tests and benchmarks of tree decode share: each makes some branches and returns the entries of a step."""

from __future__ import annotations

import torch

from mvkernels.reference.decode import attend
from tests.cache_world import World


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
