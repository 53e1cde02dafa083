"""Linear layers on matrix units: fp32 results of bf16 weights, on the processor's units and on the same in software."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import nn

from mvkernels.ops.dense import linear_amx as linear_tiles
from mvkernels.ops.dense.linear_amx import SOURCE, TileLayers, tiles_reason
from mvkernels.ops.native import native_reason
from tests.ops.tiles import software, use_software

#: Relative to the largest result; the order of sums alone makes half of it.
TOLERANCE = 2e-6

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="needs g++")


@pytest.fixture(autouse=True, params=["processor", "software"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.manual_seed(0)
    if request.param == "processor":
        if tiles_reason() is not None:
            pytest.skip(str(tiles_reason()))
    else:
        assert native_reason(SOURCE) is None  # it compiles, whether or not the processor has them
        assert software().tiles_state() == 0
        use_software(monkeypatch)
    return request.param


def random_layers(inner: int, *sizes: int) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    weights = [torch.randn(size, inner).bfloat16().float() for size in sizes]
    return weights, [torch.randn(size) if place % 2 else None for place, size in enumerate(sizes)]


def exact(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> torch.Tensor:
    pairs = [(w.double(), None if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    return torch.cat([nn.functional.linear(x.double(), w, b) for w, b in pairs], -1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("inner", [1, 31, 32, 100, 257])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 33, 49])
def test_products_are_those_of_fp32(inner: int, rows: int) -> None:
    """Several layers at once, with and without a bias, onto what is there or not; with one thread and with two."""
    weights, biases = random_layers(inner, 1, 47, 48, 131)
    layers, x = TileLayers(weights, biases), torch.randn(2 * rows, inner)[::2]
    expected = exact(x, weights, biases)
    found = layers(x)
    assert found.shape == (rows, 227) and error(found, expected) <= TOLERANCE
    residual = torch.randn(rows, 227)
    assert error(layers(x, residual=residual), expected + residual) <= TOLERANCE
    # A row has the same bits by itself.
    assert torch.equal(torch.cat([layers(row[None]) for row in x]), found)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(layers(x), found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e30])
def test_all_bits_of_a_number_count(scale: float) -> None:
    """Of x none is rounded away: a weight of one gives x back."""
    x = torch.randn(5, 40) * scale
    x[0, :4] = torch.tensor([0.0, -0.0, 3.4028e38, -3.4028e38])
    assert torch.equal(TileLayers([torch.eye(40)], [None])(x), x)


def test_what_is_not_finite() -> None:
    """Infinity and NaN come through, and stay in their row."""
    x = torch.ones(4, 40)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    x.view(torch.int32)[3, 6] = 0x7F800001  # NaN that would be infinity without its last bits
    found = TileLayers([torch.ones(3, 40)], [None])(x)
    assert torch.equal(found[0], torch.full((3,), 40.0))
    assert torch.equal(found[1], torch.full((3,), torch.inf)) and found[2:].isnan().all()


def test_no_rows_and_more_dimensions() -> None:
    weights, biases = random_layers(24, 10)
    layers = TileLayers(weights, biases)
    assert layers(torch.empty(0, 24)).shape == (0, 10)
    x = torch.randn(2, 3, 24)
    assert torch.equal(layers(x).view(6, 10), layers(x.view(6, 24)))


def test_a_refusal_of_the_system_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, state: int) -> None:
            self.tiles_state = lambda: state

    for state, said in ((0, None), (1, "expected a processor with AMX"), (2, "the system keeps AMX")):
        monkeypatch.setattr(linear_tiles, "native_library", lambda source, state=state: Refusing(state))
        # Both are asked anew.
        monkeypatch.setattr(linear_tiles, "tiles_reason", tiles_reason.__wrapped__)
        monkeypatch.setattr(linear_tiles, "_kernel", getattr(linear_tiles._kernel, "__wrapped__", linear_tiles._kernel))
        reason = linear_tiles.tiles_reason()
        assert reason is None if said is None else said in reason
        if said is not None:
            with pytest.raises(RuntimeError, match=said):
                TileLayers([torch.eye(3)], [None])
