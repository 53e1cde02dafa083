"""A few calls through pytest-benchmark, to compare two commits on one machine: `make bench-quick`.

Small enough for a minute; the suites of `benchmarks.run` are what figures come from.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import synthetic
from benchmarks.peers import Attention, Shape, Tensors, ours
from benchmarks.preparation import prepare
from benchmarks.timing import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"cpu": Shape(2048, 4, 2, 64, "float32", "cpu"), "cuda": Shape(8192, 32, 8, 128, "bfloat16", "cuda")}
SHAPE = SHAPES[DEVICE]
CASES = ("causal", "narrow", "wide", "nested")
LONG = 32768  # tokens of the layouts that are only prepared
ROUNDS = {"rounds": 10, "warmup_rounds": 2, "iterations": 1}


def attend(case: str) -> tuple[Attention, Tensors]:
    inputs = SHAPE.inputs(SHAPE.tokens)
    return ours("ours", synthetic(case, SHAPE.tokens), SHAPE).make(), inputs


def waiting(call: Callable[[], object]) -> Callable[[], None]:
    def called() -> None:
        call()
        synchronize(DEVICE)

    return called


@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(group="forward")
def test_forward(benchmark, case: str) -> None:
    function, inputs = attend(case)
    with torch.no_grad():
        benchmark.pedantic(waiting(lambda: function(*inputs)), **ROUNDS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(group="backward")
def test_backward(benchmark, case: str) -> None:
    function, inputs = attend(case)
    out = function(*inputs)
    grad = torch.randn_like(out)
    benchmark.pedantic(waiting(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)), **ROUNDS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(group="layout and tables")
def test_preparation(benchmark, case: str) -> None:
    def call() -> object:
        return prepare(synthetic(case, LONG), DEVICE, SHAPE.head_dim, getattr(torch, SHAPE.dtype).itemsize)

    benchmark.pedantic(waiting(call), **ROUNDS)
