"""Fused decoder layers in Triton: on a GPU, or in the interpreter with a model that is patched for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from mvkernels import patch_model
from mvkernels.hf_layers import fuse_layers, unfuse_layers
from mvkernels.hf_norm import fuse_norms
from mvkernels.model import Engine, GenerationConfig
from tests.conftest import interpreting
from tests.ops.layer_cases import CONFIGS, IDS, assert_same, count_runs, fused, plain_model, steps
from tests.support.tiny_model import tiny_model, tiny_tokenizer

layer_triton = pytest.importorskip("mvkernels.ops.dense.layer_triton", reason="needs triton")
pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
# The interpreter rounds to bfloat16 in its own way.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model that is patched for Triton."""
    return patch_model(plain_model(name).to(DEVICE, dtype), "triton")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_runs(monkeypatch, "_run_triton")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_the_layers(name: str, runs: list[int]) -> None:
    model = make_model(name)
    expected = steps(model)
    assert not runs and fused(fuse_layers(model)) == 2
    assert_same(steps(model), expected)
    assert runs == [7, 7, 2, 2, 2, 2, 3, 3]
    assert fused(unfuse_layers(model)) == 0
    assert all(map(torch.equal, steps(model), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_byte_dtypes(name: str, dtype: torch.dtype, runs: list[int]) -> None:
    """Rounded where the layers round: but for the order of a norm's sum the logits are the same."""
    model = make_model(name, dtype)
    expected = steps(model)
    fuse_layers(fuse_norms(model))
    for found, wanted in zip(steps(model), expected, strict=True):
        assert float((found - wanted).float().norm() / wanted.float().norm()) <= 4 * torch.finfo(dtype).eps
    assert len(runs) == 8


def test_gradients_and_other_forwards_are_those_of_the_layers(runs: list[int]) -> None:
    model, plain = fuse_layers(make_model("qwen2")), make_model("qwen2")
    ids = IDS.to(DEVICE)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    for one in (model, plain):
        one(ids, labels=ids).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not runs


def test_parts_that_are_hooked_are_called(runs: list[int]) -> None:
    model = fuse_layers(make_model("llama"))
    called: list[str] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: called.append("hook"))
    steps(model)
    assert len(called) == 4 and runs == [7, 2, 2, 3]  # the second layer


def test_the_engine_fuses_them(runs: list[int]) -> None:
    config = GenerationConfig(max_new_tokens=4, eos_token_ids=(), stop=())
    found = []
    for fast in (False, True):
        model = tiny_model(heads=2, kv_heads=1).to(DEVICE)
        engine = Engine(model, tiny_tokenizer(), backend="triton", fast_linear=fast)
        found.append([one.token_ids for one in engine.generate(["a b", "12 + 3"], config)])
        assert (fused(engine.model) == 2) == fast == bool(runs)
    assert found[0] == found[1]


# ---- the kernels


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
