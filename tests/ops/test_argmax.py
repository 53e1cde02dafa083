"""The likeliest token of each row: by C++ and by PyTorch, beside NaN and equals, wherever rows lie."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from mvkernels.model.engine.sampling.logits import StepLogits
from mvkernels.ops.dense import layer as layer_native
from mvkernels.ops.dense.argmax import likeliest


class Way(NamedTuple):
    """compiled: whether every logits are looked at by C++, else none are. calls: how often they were."""

    compiled: bool
    calls: list[torch.Tensor]


@pytest.fixture(params=[True, False], ids=["compiled", "pytorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    if request.param and (reason := layer_native.layer_reason()) is not None:
        pytest.skip(reason)
    calls: list[torch.Tensor] = []
    inner = layer_native.likeliest
    monkeypatch.setattr(layer_native, "NUMBERS", 0 if request.param else math.inf)
    monkeypatch.setattr(layer_native, "is_compiled", lambda: False)
    monkeypatch.setattr(layer_native, "likeliest", lambda logits: calls.append(logits) or inner(logits))
    return Way(request.param, calls)


@pytest.mark.parametrize("compiled", [True, False])
def test_few_are_looked_at_by_what_is_compiled_already(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if (reason := layer_native.layer_reason()) is not None:
        pytest.skip(reason)
    assert layer_native.is_compiled()
    calls: list[torch.Tensor] = []
    inner = layer_native.likeliest
    monkeypatch.setattr(layer_native, "is_compiled", lambda: compiled)
    monkeypatch.setattr(layer_native, "likeliest", lambda logits: calls.append(logits) or inner(logits))
    assert likeliest(torch.tensor([[1.0, 3.0, 2.0]]))[0].tolist() == [1]
    assert len(calls) == compiled


@pytest.mark.parametrize("size", [1, 15, 63, 64, 65, 255, 256, 257, 511, 512, 1000, 1023, 1024, 1025, 2500])
def test_it_is_the_first_of_its_equals_at_any_place(way: Way, size: int) -> None:
    logits = torch.randn(40, size, generator=torch.Generator().manual_seed(size)).round()  # many equal ones
    logits[0], logits[1, -1], logits[2, :-1] = 0, 99, -math.inf
    logits[3, size // 2 :] = math.nan
    logits[4, -3:] = 99
    logits[5] = -math.inf
    logits[6, -1] = math.nan
    logits[7, size // 3] = math.inf
    tokens, values = likeliest(logits)
    assert len(way.calls) == way.compiled
    wanted = [max(range(size), key=lambda i: (row[i] != row[i], row[i])) for row in logits.tolist()]
    assert tokens.tolist() == wanted
    torch.testing.assert_close(values, logits[range(40), wanted], rtol=0, atol=0, equal_nan=True)


def test_rows_may_lie_apart(way: Way) -> None:
    whole = torch.randn(9, 700, generator=torch.Generator().manual_seed(0))
    for part in (whole[::2, 5:600], whole[:, :1], whole.T, whole[:0]):
        tokens, values = likeliest(part)
        assert tokens.tolist() == [int(row.argmax()) for row in part] and torch.equal(values, part.amax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_of_a_step(way: Way, dtype: torch.dtype) -> None:
    values = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[1, 200] = values[4, 0] = math.nan
    logits = StepLogits.of(values)
    assert len(logits) == 6 and logits.bad_rows == [1, 4]
    assert logits.tokens[1] == 200 and logits.tokens[4] == 0
    good = logits.rows([5, 0])
    assert good.tokens == values[[5, 0]].argmax(-1).tolist() and not good.bad_rows
    assert good.highest == values[[5, 0]].amax(-1).tolist() and torch.equal(good.values, values[[5, 0]])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_on_a_gpu(dtype: torch.dtype) -> None:
    """Also the first of its equals, which bf16 has many of."""
    values = torch.randn(65, 151_936, generator=torch.Generator().manual_seed(2)).to(dtype)
    values[3, 70_000:] = math.nan
    there = StepLogits.of(values.to("cuda"))
    here = StepLogits.of(values.float())
    assert there.tokens == here.tokens and there.bad_rows == here.bad_rows == [3]
    assert there.highest[4:] == here.highest[4:]
    assert there.rows([9, 2]).values.device.type == "cuda"
