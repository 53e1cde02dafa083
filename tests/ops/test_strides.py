"""Every operand of every kernel with strides of its own, unlike all others', and NaN between what is to be read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from mvkernels.layout import BranchLayout
from mvkernels.mask_tensor import find_mask_table
from mvkernels.ops.attention.schema import OPS
from mvkernels.ops.decode.append import append_rows
from mvkernels.ops.dense import layer as layer_native
from mvkernels.ops.dense.linear import LinearLayers, linear_reason
from mvkernels.ops.rope import Rotation
from mvkernels.reference.attention import attention as reference_attention
from mvkernels.reference.rope import rotate as reference_rotate
from mvkernels.rope import Rope, rotate
from tests.conftest import interpreting
from tests.test_attention import poisoned

__all__ = ["poisoned"]
GPU = torch.cuda.is_available() and not interpreting()
BACKENDS = ["cpu", pytest.param("triton", marks=pytest.mark.triton)]


class Apart:
    """Makes copies of tensors that lie apart from one another: the order of their dimensions in memory, and the gaps
    between what stands in them, are others for each; the last dimension is dense if told so. Gaps have NaN, or -1.
    """

    def __init__(self, backend: str) -> None:
        self.device = "cuda" if GPU and backend == "triton" else "cpu"
        self._numbers = itertools.count(1)
        self._strides: set[tuple[int, ...]] = set()

    def __call__(self, x: torch.Tensor, dense_last: bool = True, swap: bool = False) -> torch.Tensor:
        """swap: the first dimension is the inner one of the first two, as of heads that were transposed."""
        number = next(self._numbers)
        order = [1, 0, *range(2, x.dim())] if swap else list(range(x.dim()))
        sizes = [x.shape[d] + number for d in order]
        if not dense_last:
            sizes.append(1 + number)
        fill = math.nan if x.is_floating_point() else -1
        store = torch.full(sizes, fill, dtype=x.dtype, device=self.device)
        view = store if dense_last else store[..., 0]
        view = view.permute([order.index(d) for d in range(x.dim())])[tuple(slice(0, size) for size in x.shape)]
        view.copy_(x)
        assert not view.is_contiguous() and view.stride() not in self._strides
        self._strides.add(view.stride())
        return view


def normal(seed: int, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- attention ---------------------------------------------------------------------------------------------------------

#: Rows of full tiles, partial ones and both in all three kernels, a short last tile, two paths that do not see each
#: other, and, in a second document, rows that see nothing of the first.
TREES = ([33, [[10], [8]], 15], [6])


def visible_pairs(layout: BranchLayout) -> torch.Tensor:
    return layout.dense_mask().cpu()


@pytest.mark.triton
def test_all_kernels_have_full_and_partial_tiles() -> None:
    from mvkernels.ops.attention.config import attention_config
    from mvkernels.ops.attention.tables import attention_tables

    layout = BranchLayout.pack([BranchLayout.from_tree(tree) for tree in TREES])
    config = attention_config(32, 4, None)
    tables = attention_tables(find_mask_table(layout.mask_table), config, torch.device("cpu"))
    for tiles, _ in (tables.forward, tables.dq, tables.dkdv):
        assert (tiles[:, 1] < tiles[:, 2]).any() and (tiles[:, 3] < tiles[:, 4]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_attention_and_its_gradients(backend: str) -> None:
    """The heads of q and v lie apart, and the tokens of k and the gradient."""
    layout = BranchLayout.pack([BranchLayout.from_tree(tree) for tree in TREES])
    total, heads, kv_heads, dim = layout.total_tokens, 4, 2, 32
    sizes = [(total, heads, dim), (total, kv_heads, dim), (total, kv_heads, dim), (total, heads, dim)]
    plain = [normal(seed, *size) for seed, size in enumerate(sizes)]
    grad_lse = normal(9, heads, total)

    exact = [x.double().requires_grad_() for x in plain[:3]]
    wanted = reference_attention(*exact, visible_pairs(layout))
    wanted_grads = torch.autograd.grad(wanted, exact, [plain[3].double(), grad_lse.double()])

    apart = Apart(backend)
    q, k, v, grad_out = (apart(x, swap=place in (0, 2)) for place, x in enumerate(plain))
    table = layout.mask_table
    forward, backward = OPS[backend]
    out, lse = forward(q, k, v, table, dim**-0.5)
    out_apart, lse_apart, grad_lse = apart(out), apart(lse, swap=True), apart(grad_lse)
    grads = backward(grad_out, grad_lse, q, k, v, out_apart, lse_apart, table, dim**-0.5)
    for name, got, expected in zip(
        ("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), (*wanted, *wanted_grads), strict=True
    ):
        torch.testing.assert_close(got.cpu().double(), expected.detach(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("loose", ["q", "kv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_of_one_head_for_all(backend: str, loose: str) -> None:
    """Strides of 0, as `expand` gives them, of heads and of tokens; and a last dimension of `loose` not dense."""
    layout = BranchLayout.from_tree([5, [[3], [2]], 2])
    total = layout.total_tokens
    apart = Apart(backend)
    q = apart(normal(0, total, 4, 32), "q" not in loose)
    k = apart(normal(1, total, 1, 32), "k" not in loose).expand(total, 2, 32)
    v = apart(normal(2, 1, 2, 32), "v" not in loose).expand(total, 2, 32)
    grad_out = torch.ones(1, 1, 1, device=q.device).expand(total, 4, 32)
    exact = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    wanted, _ = reference_attention(*exact, visible_pairs(layout))
    forward, backward = OPS[backend]
    out, lse = forward(q, k, v, layout.mask_table, 32**-0.5)
    grads = backward(grad_out, None, q, k, v, out, lse, layout.mask_table, 32**-0.5)
    wanted_grads = torch.autograd.grad(wanted, exact, torch.ones_like(wanted))
    for got, expected in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(got.cpu().double(), expected.detach(), rtol=1e-4, atol=1e-4)


# -- append and rotation -----------------------------------------------------------------------------------------------


#: How new rows lie in memory: row after row, head after head, or with a last dimension that is not dense.
WAYS: dict[str, dict[str, bool]] = {"rows": {}, "heads": {"swap": True}, "loose": {"dense_last": False}}


@pytest.mark.parametrize("ways", [*itertools.product(("rows", "heads"), repeat=2), ("loose", "loose")], ids="-".join)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_append(backend: str, rotated: bool, ways: Sequence[str]) -> None:
    apart = Apart(backend)
    rows, heads, dim = 5, 3, 12
    k, v = normal(0, rows, heads, dim), normal(1, rows, heads, dim)
    slots, positions = torch.tensor([7, 0, -1, 11, 4]), torch.tensor([3, 0, 9, 70, 2])
    inv_freq = 10000.0 ** -(torch.arange(4) / 4)
    caches = [torch.full((4, 3, heads, dim), math.nan, device=apart.device) for _ in range(2)]
    rotation = Rotation(apart(positions, False), apart(inv_freq, False), 1.5) if rotated else None
    k_new, v_new = (apart(x, **WAYS[way]) for x, way in zip((k, v), ways, strict=True))
    append_rows(*caches, k_new, v_new, apart(slots, False), backend, rotation)
    k = reference_rotate(k, positions, inv_freq, 1.5) if rotated else k
    for cache, new in zip(caches, (k, v), strict=True):
        wanted = torch.full((12, heads, dim), math.nan)
        wanted[slots[slots >= 0]] = new[slots >= 0]
        torch.testing.assert_close(cache.cpu().flatten(0, 1), wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_rotate(backend: str, way: str) -> None:
    apart = Apart(backend)
    x, inv_freq = normal(0, 5, 3, 12), 10000.0 ** -(torch.arange(4) / 4)
    for positions in (torch.tensor([3, 0, 9, 70, 2]), torch.tensor([6]).expand(5)):
        given = apart(positions, False) if positions.stride(0) else positions.to(apart.device)
        got = rotate(apart(x, **WAYS[way]), given, Rope(apart(inv_freq, False), 1.5), backend)
        torch.testing.assert_close(got.cpu(), reference_rotate(x, positions, inv_freq, 1.5), rtol=1e-5, atol=1e-5)


# -- what stands between the products of a layer -----------------------------------------------------------------------


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def backends() -> list[object]:
    compiled = pytest.mark.skipif(layer_native.layer_reason() is not None, reason=str(layer_native.layer_reason()))
    return [pytest.param("native", marks=compiled), pytest.param("triton", marks=pytest.mark.triton)]


def layers(backend: str) -> object:
    if backend == "native":
        return layer_native
    from mvkernels.ops.dense import layer_triton

    return layer_triton


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("backend", backends())
def test_norms(backend: str, swap: bool) -> None:
    module, apart = layers(backend), Apart(backend)
    x, residual, weight = normal(0, 4, 24), normal(1, 4, 24), normal(2, 24)
    assert_close = torch.testing.assert_close
    assert_close(module.rms_norm(apart(x, swap=swap), apart(weight, False), 1e-5).cpu(), norm(x, weight))
    if backend == "triton":
        total, got = module.add_rms_norm(apart(x, swap=swap), apart(residual), apart(weight, False), 1e-5)
        assert_close(total.cpu(), x + residual)
        assert_close(got.cpu(), norm(x + residual, weight))


@pytest.mark.triton
@pytest.mark.parametrize("swap", [False, True])
def test_gate_in_triton(swap: bool) -> None:
    apart = Apart("triton")
    g, u = normal(0, 5, 24), normal(1, 5, 24)
    got = layers("triton").gate(apart(g, swap=swap), apart(u))
    torch.testing.assert_close(got.cpu(), torch.nn.functional.silu(g) * u)


@pytest.mark.triton
@pytest.mark.parametrize("norms", [False, True])
def test_rotate_append_in_triton(norms: bool) -> None:
    """q, k and v as parts of one product; more query heads than key heads."""
    apart = Apart("triton")
    rows, heads, kv_heads, dim = 4, 6, 2, 8
    q, k, v = (normal(seed, rows, n * dim) for seed, n in enumerate((heads, kv_heads, kv_heads)))
    cos, sin = normal(3, rows, dim), normal(4, rows, dim)
    weights = normal(5, dim), normal(6, dim)
    slots = torch.tensor([5, -1, 0, 3])
    caches = [torch.full((2, 3, kv_heads, dim), math.nan, device=apart.device) for _ in range(2)]
    given = (*(weight.to(apart.device) for weight in weights), 1e-5) if norms else None
    tables = [x.to(apart.device) for x in (cos, sin, slots)]
    out = layers("triton").rotate_append(
        (apart(q), apart(k, swap=True), apart(v)), *tables, *caches, given
    )  # fmt: skip

    def turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.view(rows, -1, dim)
        x = norm(x, weight) if norms else x
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * cos[:, None] + half * sin[:, None]

    torch.testing.assert_close(out.cpu(), turned(q, weights[0]), rtol=1e-5, atol=1e-5)
    for cache, new in zip(caches, (turned(k, weights[1]), v.view(rows, -1, dim)), strict=True):
        wanted = torch.full((6, kv_heads, dim), math.nan)
        wanted[slots[slots >= 0]] = new[slots >= 0]
        torch.testing.assert_close(cache.cpu().flatten(0, 1), wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(layer_native.layer_reason() is not None, reason=str(layer_native.layer_reason()))
def test_likeliest() -> None:
    apart = Apart("native")
    logits = normal(0, 3, 41)
    index, value = layer_native.likeliest(apart(logits))
    assert torch.equal(index, logits.argmax(1)) and torch.equal(value, logits.amax(1))


@pytest.mark.skipif(linear_reason() is not None, reason=str(linear_reason()))
@pytest.mark.parametrize("rows", [3, 11])
def test_products(rows: int) -> None:
    """x of any strides; weights and residual are contiguous by contract (`pack_linear` sees to it)."""
    apart = Apart("native")
    x, weights, residual = normal(0, rows, 24), [normal(1, 7, 24), normal(2, 5, 24)], normal(3, rows, 12)
    wanted = x @ torch.cat(weights).T + residual
    product = LinearLayers(weights, [None, None])
    for given in (apart(x), apart(x, swap=True), apart(x, False)):
        torch.testing.assert_close(product(given, residual), wanted, rtol=1e-4, atol=1e-4)


# -- tables of a mask --------------------------------------------------------------------------------------------------


def test_a_mask_table_of_any_stride() -> None:
    layout = BranchLayout.pack([BranchLayout.from_tree(tree) for tree in TREES])
    strided = torch.stack([layout.mask_table, torch.full_like(layout.mask_table, 7)], dim=1)[:, 0]
    found = find_mask_table(strided).mask
    for name in ("segment_starts", "first_key", "gap_ptr", "gaps"):
        assert getattr(found, name).tolist() == getattr(layout.mask, name).tolist(), name
