"""RMSNorms in one call give what the norms give, and leave training alone."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mvkernels import hf_norm
from mvkernels.hf_norm import fuse_norms, same_code, unfuse_norms
from mvkernels.model import Engine
from mvkernels.ops.dense.layer import layer_reason, rms_norm
from tests.support.tiny_model import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(layer_reason() is not None, reason=str(layer_reason()))
IDS = torch.arange(40).view(1, 40) % 7


def fused(model: nn.Module) -> int:
    return sum("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("dim", [1, 15, 16, 63, 64, 576, 1000])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_kernel(rows: int, dim: int) -> None:
    """Against fp64; a row has the same bits alone, and in rows that are not contiguous."""
    x, weight = 3 * torch.randn(rows, 2, dim)[:, 1], torch.randn(dim)
    exact = weight.double() * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    found = rms_norm(x, weight, 1e-5)
    assert float((found - exact).abs().max()) <= 2e-6 * float(exact.abs().max())
    assert torch.equal(found, torch.cat([rms_norm(row, weight, 1e-5) for row in x.split(1)]))
    assert not rms_norm(torch.zeros(rows, dim), weight, 1e-5).any()


def test_many_rows_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(100, 24), torch.randn(24)
    alone = rms_norm(x, weight, 1e-6)
    monkeypatch.setattr("mvkernels.ops.dense.layer.NUMBERS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(rms_norm(x, weight, 1e-6), alone)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm])
def test_norms_that_take_part(kind: type[nn.Module]) -> None:
    norm = kind(24, 1e-3)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 24)
    with torch.inference_mode():
        expected = norm(x)
        assert fused(fuse_norms(norm)) == 1
        assert torch.allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(norm(x), rms_norm(x, norm.weight, 1e-3))
        norm.weight.zero_()
        assert not norm(x).any()  # the weight is read in every call
        half = x.bfloat16()
        assert torch.equal(norm(half), kind.forward(norm, half))
    assert torch.equal(norm(x), kind.forward(norm, x))  # with gradients
    assert norm(x).requires_grad


def test_norms_that_take_none() -> None:
    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    others = LlamaRMSNorm(8)
    others.forward = lambda hidden_states: hidden_states
    model = nn.Sequential(Shifted(8), others, nn.RMSNorm(8), nn.LayerNorm(8))
    assert fused(fuse_norms(model)) == 1  # that was so before
    assert fused(unfuse_norms(model)) == 1


def test_training_and_undoing_and_copies() -> None:
    plain, model = tiny_model(), fuse_norms(tiny_model())
    count = fused(model)
    assert count == sum(type(module).__name__.endswith("RMSNorm") for module in model.modules()) > 0
    for one in (plain, model):
        one(IDS, labels=IDS).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        norms = [module for module in other.modules() if "forward" in module.__dict__]
        assert len(norms) == count and all(module.forward.args[0] is module for module in norms)
    with torch.inference_mode():
        expected = plain(IDS).logits
        assert torch.allclose(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert fused(unfuse_norms(fuse_norms(model))) == 0
        assert torch.equal(model(IDS).logits, expected)


def test_without_a_compiler_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_norm, "layer_reason", lambda: "not here")
    assert fused(fuse_norms(tiny_model())) == 0


@pytest.mark.parametrize("fast", [False, True])
def test_the_engine_fuses_them_with_its_linear_layers(fast: bool) -> None:
    engine = Engine(tiny_model(), tiny_tokenizer(), fast_linear=fast)
    assert (engine.model.model.norm.__dict__.get("forward") is not None) == fast


def test_the_same_code_calls_the_same_code() -> None:
    """However deep, and where functions call one another."""
    source = "def f(x):\n    return g(x) if x else 0\n\ndef g(x):\n    return f(x - 1)\n"
    first, second, other = {}, {}, {}
    for text, into in ((source, first), (source, second), (source.replace("- 1", "- 2"), other)):
        exec(text, into)
    assert same_code(first["f"], second["f"]) and not same_code(first["f"], other["f"])
    assert not same_code(functools.wraps(first["f"])(lambda x: x), second["f"])
