"""CPU kernels between the products of a decoder, and products of few rows, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvkernels.ops.dense.layer import gate, layer_reason, rms_norm, rotate_append
from mvkernels.ops.dense.linear import LinearLayers, is_bf16, linear_reason

needs_layer = pytest.mark.skipif(layer_reason() is not None, reason=str(layer_reason()))
needs_linear = pytest.mark.skipif(linear_reason() is not None, reason=str(linear_reason()))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


# ---- between the products


@needs_layer
@pytest.mark.parametrize("dim", [1, 15, 16, 63, 64, 576, 1000])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_rms_norm(rows: int, dim: int) -> None:
    """Against fp64; a row has the same bits alone, and in rows that are not contiguous."""
    x, weight = 3 * torch.randn(rows, 2, dim)[:, 1], torch.randn(dim)
    exact = weight.double() * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    found = rms_norm(x, weight, 1e-5)
    assert float((found - exact).abs().max()) <= 2e-6 * float(exact.abs().max())
    assert torch.equal(found, torch.cat([rms_norm(row, weight, 1e-5) for row in x.split(1)]))
    assert not rms_norm(torch.zeros(rows, dim), weight, 1e-5).any()


@needs_layer
def test_norms_of_many_rows_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(100, 24), torch.randn(24)
    alone = rms_norm(x, weight, 1e-6)
    monkeypatch.setattr("mvkernels.ops.dense.layer.NUMBERS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(rms_norm(x, weight, 1e-6), alone)


@needs_layer
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "dim"), [(1, 9, 3, 64), (5, 2, 2, 6), (70, 4, 1, 256)])
def test_rotate_append(rows: int, heads: int, kv_heads: int, dim: int, normed: bool) -> None:
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
    cos, sin = torch.randn(2, rows, dim)
    weights = torch.randn(2, dim)
    slots = torch.randperm(3 * rows)[:rows]
    slots[rows // 2] = -1
    caches = torch.full((2, 3 * rows, 1, kv_heads, dim), torch.nan)
    norms = (weights[0], weights[1], 1e-5) if normed else None
    found = rotate_append(qkv, heads, cos, sin, slots, caches[0], caches[1], norms)
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    for given, weight, rotated in ((q, weights[0], found), (k, weights[1], caches[0, slots, 0])):
        given = given.view(rows, -1, dim)
        given = rms_norm(given, weight, 1e-5) if normed else given
        expected = given * cos[:, None] + rotate_half(given) * sin[:, None]
        written = torch.ones(rows, dtype=torch.bool) if rotated is found else slots >= 0
        assert torch.allclose(rotated[written], expected[written], rtol=1e-5, atol=1e-5)
    assert torch.equal(caches[1, slots[slots >= 0], 0], v.view(rows, kv_heads, dim)[slots >= 0])
    assert int((~caches[0].isnan()).any(-1).any(-1).sum()) == int((slots >= 0).sum())  # and nowhere else


@needs_layer
@pytest.mark.parametrize("dim", [1, 15, 16, 96, 1000])
@pytest.mark.parametrize("rows", [1, 40])
def test_gate(rows: int, dim: int) -> None:
    """Against fp64; a row has the same bits alone. Large numbers neither overflow nor become NaN."""
    gu = 5 * torch.randn(rows, 2 * dim)
    gu[0, 0] = 1e4 if rows == 1 else -1e4
    g, u = gu.double().chunk(2, 1)
    exact = g * torch.sigmoid(g) * u
    found = gate(gu)
    assert torch.allclose(found.double(), exact, rtol=2e-6, atol=1e-30)
    assert torch.equal(found, torch.cat([gate(row) for row in gu.split(1)]))
    assert gate(torch.full((1, 2), torch.nan)).isnan().all()


# ---- products


@needs_linear
@pytest.mark.parametrize("inner", [1, 15, 16, 100, 257])
@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 16, 17, 32, 33, 65])
def test_the_kernel_of_few_rows(inner: int, rows: int) -> None:
    """Several layers at once, with and without a bias; nothing beside the result is written."""
    sizes = (1, 47, 48, 131)
    weights, biases = [torch.randn(n, inner) for n in sizes], [None, torch.randn(47), None, torch.randn(131)]
    layers, x = LinearLayers(weights, biases), torch.randn(2 * rows, inner)[::2]
    exact = [
        nn.functional.linear(x.double(), w.double(), b if b is None else b.double())
        for w, b in zip(weights, biases, strict=True)
    ]
    found = layers(x)
    assert close(found.double(), torch.cat(exact, -1), 2e-6)
    # A row has the same bits with fewer others, within 1 to 8 and from 9 on.
    if rows <= 8:
        assert torch.equal(torch.cat([layers(row[None]) for row in x]), found)
    else:
        assert torch.equal(layers(torch.cat([x, x]))[rows:], found) and torch.equal(layers(x[-9:]), found[-9:])


@needs_linear
@pytest.mark.parametrize("inner", [1, 15, 16, 257])
@pytest.mark.parametrize("rows", [*range(1, 9), 9, 33])
def test_narrow_weights_give_the_same_bits(inner: int, rows: int) -> None:
    """Also beside a layer whose weights are not."""
    weights = [torch.randn(131, inner).bfloat16().float(), torch.randn(48, inner)]
    biases = [None, torch.randn(48)]
    x = torch.randn(rows, inner)
    wide, narrow = LinearLayers(weights, biases), LinearLayers(weights, biases, narrow=True)
    assert [part is not None for part in narrow.narrow] == [True, False] and wide.narrow == [None, None]
    assert torch.equal(wide(x), narrow(x))
    if rows <= 8:  # it is the copy that is read
        assert narrow.narrow[0] is not None
        narrow.narrow[0].zero_()
        assert not narrow(x)[:, :131].any() and not torch.equal(wide(x), narrow(x))


def test_which_weights_are_bf16() -> None:
    weight = torch.randn(40, 60).bfloat16().float()
    weight[3, 7], weight[4, 8], weight[5, 9] = -0.0, torch.inf, torch.nan
    assert is_bf16(weight)
    for place in ((0, 1), (39, 59)):
        other = weight.clone()
        other[place] = 1 + 2**-8
        assert not is_bf16(other)


@needs_linear
def test_residuals_one_vector_and_no_rows() -> None:
    weight, bias = torch.randn(5, 8), torch.randn(5)
    layers, x, residual = LinearLayers([weight], [bias]), torch.randn(3, 8), torch.randn(3, 5)
    assert close(layers(x, residual=residual), residual + nn.functional.linear(x, weight, bias), 2e-6)
    assert close(layers(x[0]), nn.functional.linear(x[0], weight, bias), 2e-6)
    assert layers(x[:0]).shape == (0, 5)
