"""torch.compile: no graph break, the same results, and no compilation per length, depth or layout."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mvkernels import BranchLayout, multiverse_attention, patch_model
from tests.conftest import interpreting
from tests.support.tiny_model import tiny_model
from tests.support.trees import random_tree

TREES = [
    [5, [[3], [4]], 2],
    [9],
    [30, [[10], [2, [[3], [4]], 1]], 5],
    [1, [[1]] * 20, 2],
    [7, [[2, [[1, [[6], [5]], 2], [3]], 1], [8]], 3, [[4], [9]], 1],
    [160],
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Toy(torch.nn.Module):
    """Projections around the attention; lengths and layouts come from outside."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, (2 + 1 + 1) * 32)
        self.backend = backend

    def forward(self, x: torch.Tensor, layout: BranchLayout) -> torch.Tensor:
        q, k, v = self.project(x).view(len(x), 4, 32).split([2, 1, 1], dim=1)
        out, lse = multiverse_attention(q, k, v, layout, backend=self.backend, return_lse=True)
        return out.flatten(1).relu() * lse.t().repeat_interleave(32, dim=1)


def check_toy(backend: str, compiler: str, layouts: list[BranchLayout]) -> int:
    """Compare results and gradients with eager; returns the number of compilations."""
    torch.manual_seed(0)
    toy = Toy(backend)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(copy.deepcopy(toy), fullgraph=True, backend=counter)
    for layout in layouts:
        x = torch.randn(layout.total_tokens, 16)
        outcomes = []
        for module in (toy, compiled):
            module.zero_grad()
            out = module(x, layout)
            out.square().mean().backward()
            outcomes.append((out.detach(), *(p.grad.clone() for p in module.parameters())))
        for got, wanted in zip(*outcomes, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    return counter.frame_count


def test_a_toy_with_dynamic_lengths_compiles_twice() -> None:
    layouts = [BranchLayout.from_tree(tree) for tree in TREES]
    layouts += [BranchLayout.pack([layouts[0], layouts[3]]), BranchLayout.from_tree([300, [[7]] * 40, 2])]
    assert check_toy("cpu", "aot_eager", layouts) == 2


def test_twenty_random_layouts_compile_twice() -> None:
    layouts = [BranchLayout.from_tree(random_tree(seed)) for seed in range(20)]
    assert check_toy("cpu", "aot_eager", layouts) <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")
def test_inductor() -> None:
    assert check_toy("cpu", "inductor", [BranchLayout.from_tree(tree) for tree in TREES[:3]]) == 2


@pytest.mark.triton
@pytest.mark.skipif(not interpreting(), reason="CPU tensors")
def test_the_triton_backend_is_traced_too() -> None:
    assert (
        check_toy("triton", "aot_eager", [BranchLayout.from_tree(tree) for tree in ([3, [[2], [4]], 1], [5], [9])]) == 2
    )


def losses_and_gradients(
    run: Callable[..., torch.Tensor], parameters: list[torch.nn.Parameter], layout: BranchLayout
) -> list[torch.Tensor]:
    ids = torch.randint(0, 300, (1, layout.total_tokens), generator=torch.Generator().manual_seed(1))
    for parameter in parameters:
        parameter.grad = None
    logits = run(ids, branch_layout=layout, position_ids=layout.position_ids[None].long()).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in parameters)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_patched_model(checkpointing: bool) -> None:
    model = patch_model(tiny_model(layers=1)).train()  # the compiler traces every layer
    parameters = list(model.parameters())
    wanted = {str(tree): losses_and_gradients(model, parameters, BranchLayout.from_tree(tree)) for tree in TREES[:3]}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tree in TREES[:3]:
        found = losses_and_gradients(compiled, parameters, BranchLayout.from_tree(tree))
        for mine, theirs in zip(found, wanted[str(tree)], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


def test_autocast_in_a_compiled_model() -> None:
    model = patch_model(tiny_model()).train()
    layout = BranchLayout.from_tree(TREES[2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = losses_and_gradients(model, list(model.parameters()), layout)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = losses_and_gradients(compiled, list(model.parameters()), layout)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))
