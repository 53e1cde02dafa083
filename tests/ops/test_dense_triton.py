"""Kernels of Triton between the products of a decoder: on a GPU, or in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from tests.conftest import interpreting

layer_triton = pytest.importorskip("mvkernels.ops.dense.layer_triton", reason="needs triton")
pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
# The interpreter rounds to bfloat16 in its own way.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def rows_of(*sizes: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to a last bit here and there, where sums differ in their order."""
    assert found.dtype is expected.dtype and found.shape == expected.shape
    eps = torch.finfo(found.dtype).eps
    largest = float(expected.abs().max()) if len(expected) else 0.0
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=2 * eps * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 48, 896, 3584])
@pytest.mark.parametrize("rows", [1, 5])
def test_norms(rows: int, dim: int, dtype: torch.dtype) -> None:
    x, residual = rows_of(1, rows, dim, dtype=dtype), rows_of(1, rows, dim, dtype=dtype, seed=1)
    norm = LlamaRMSNorm(dim, 1e-5).to(DEVICE, dtype)
    norm.weight.data.copy_(rows_of(dim, dtype=dtype, seed=2))
    with torch.no_grad():
        assert_rounded(layer_triton.rms_norm(x, norm.weight, 1e-5), norm(x))
        total, normed = layer_triton.add_rms_norm(x, residual, norm.weight, 1e-5)
        assert torch.equal(total, residual + x)
        assert_rounded(normed, norm(residual + x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "dim"), [(1, 9, 3, 64), (5, 2, 2, 6), (7, 4, 1, 256)])
def test_rotate_append(
    rows: int, heads: int, kv_heads: int, dim: int, normed: bool, dtype: torch.dtype
) -> None:  # fmt: skip
    q, k, v = (rows_of(rows, n * dim, dtype=dtype, seed=n) for n in (heads, kv_heads, kv_heads))
    cos, sin = rows_of(2, rows, dim, dtype=dtype, seed=5)
    weights = rows_of(2, dim, dtype=dtype, seed=6)
    slots = torch.randperm(3 * rows)[:rows].to(DEVICE)
    slots[rows // 2] = -1
    caches = torch.full((2, 3 * rows, 1, kv_heads, dim), torch.nan, dtype=dtype, device=DEVICE)
    norms = (weights[0], weights[1], 1e-5) if normed else None
    found = layer_triton.rotate_append((q, k, v), cos[None], sin[None], slots, caches[0], caches[1], norms)
    for given, weight, rotated in ((q, weights[0], found), (k, weights[1], caches[0, slots, 0])):
        given = given.view(rows, -1, dim)
        if normed:
            norm = LlamaRMSNorm(dim, 1e-5).to(DEVICE, dtype)
            norm.weight.data.copy_(weight)
            given = norm(given).detach()
        expected = given * cos[:, None] + rotate_half(given) * sin[:, None]
        written = torch.ones_like(slots, dtype=torch.bool) if rotated is found else slots >= 0
        assert_rounded(rotated[written], expected[written])
    assert torch.equal(caches[1, slots[slots >= 0], 0], v.view(rows, kv_heads, dim)[slots >= 0])
    assert int((~caches[0].isnan()).any(-1).any(-1).sum()) == int((slots >= 0).sum())  # and nowhere else


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numbers", [1, 1000, 5000])
def test_gate(numbers: int, dtype: torch.dtype) -> None:
    """Large numbers neither overflow nor become NaN."""
    g, u = 5 * rows_of(1, numbers, dtype=dtype), rows_of(1, numbers, dtype=dtype, seed=1)
    g[0, 0] = -1e4
    assert_rounded(layer_triton.gate(g, u), torch.nn.functional.silu(g) * u)
    assert layer_triton.gate(torch.full_like(g, torch.nan), u).isnan().all()
