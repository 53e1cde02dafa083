"""Which models the package runs itself, and what it says of the others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaForCausalLM, Qwen2Config

from mvkernels import BackendError, patch_model
from mvkernels.decoder.choose import make_decoder
from mvkernels.decoder.weights import take_weights, weights_reason
from tests.decoder.cases import MODELS, make_model


class Mine(LlamaForCausalLM):
    pass


class Quantised(nn.Linear):
    pass


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def neox() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return AutoModelForCausalLM.from_config(GPTNeoXConfig(num_attention_heads=2, **sizes))


def changed(change: Any, **options: Any) -> Any:
    model = make_model(**options)
    change(model.model.layers[1].mlp)
    return model


def rope(**parameters: Any) -> Any:
    return make_model(rope_parameters={"rope_theta": 1e4, **parameters}, max_position_embeddings=64)


REFUSED = {
    "family": (neox, "expected an architecture of LlamaForCausalLM, .*, got GPTNeoXForCausalLM"),
    "subclass": (lambda: Mine(make_model().config), "expected an architecture of .*, got Mine"),
    "activation": (lambda: make_model(hidden_act="gelu"), "expected hidden_act 'silu', got 'gelu'"),
    "dynamic": (lambda: rope(rope_type="dynamic", factor=2.0), "rope_type: expected one of .*, got 'dynamic'"),
    "longrope": (
        lambda: rope(rope_type="longrope", factor=2.0, short_factor=[1.0] * 6, long_factor=[2.0] * 6),
        "rope_type: expected one of .*, got 'longrope'",
    ),
    "quantised": (
        lambda: changed(lambda mlp: setattr(mlp, "up_proj", Quantised(48, 50, bias=False))),
        r"model\.layers\.1\.mlp\.up_proj: expected a module of transformers' own, got Quantised \(quantised",
    ),
    "an adapter": (
        lambda: changed(lambda mlp: setattr(mlp, "up_proj", nn.Sequential(mlp.up_proj))),
        r"model\.layers\.1\.mlp\.up_proj: expected .*, got Sequential",
    ),
    "integers": (
        lambda: changed(lambda mlp: setattr(mlp.up_proj, "weight", nn.Parameter(torch.ones(50, 48).char(), False))),
        r"model\.layers\.1\.mlp\.up_proj\.weight: expected a plain floating-point weight, got Parameter torch\.int8",
    ),
    "two dtypes": (
        lambda: changed(lambda mlp: mlp.up_proj.bfloat16()),
        r"model\.layers\.1\.mlp\.up_proj\.weight: expected torch\.float32 on cpu .*, got torch\.bfloat16 on cpu",
    ),
    "parametrized": (
        lambda: changed(lambda mlp: register_parametrization(mlp.up_proj, "weight", Doubled())),
        r"mlp\.up_proj: expected a module of transformers' own, got ParametrizedLinear",
    ),
    "pruned": (
        lambda: changed(lambda mlp: prune.l1_unstructured(mlp.up_proj, "weight", 0.5)),
        r"mlp\.up_proj: expected no forward hooks, got L1Unstructured",
    ),
    "hook": (
        lambda: changed(lambda mlp: mlp.register_forward_hook(lambda _, __, out: 2 * out)),
        r"model\.layers\.1\.mlp: expected no forward hooks, got <lambda>",
    ),
    "forward": (
        lambda: changed(lambda mlp: setattr(mlp, "forward", lambda x: x)),
        r"model\.layers\.1\.mlp: expected the forward of its class",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused_are_hosted_with_a_warning(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=reason):
        take_weights(model)
    expected = rf"decoder 'own' cannot run this model: .*{reason}.*; decoder=\"hosted\" runs transformers' modules"
    with pytest.raises(BackendError, match=expected) as caught:
        make_decoder(model, "own")
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=reason):
        assert make_decoder(model).kind == "hosted"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_decoder(model, "hosted").kind == "hosted"


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder: expected one of 'auto', 'own', 'hosted', got 'fast'"):
        make_decoder(make_model(), "fast")


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_taken_where_they_lie(name: str) -> None:
    model = make_model(name)
    weights = take_weights(model)
    taken = [weights.embedding, weights.norm, *weights.head]
    for layer in weights.layers:
        taken += [layer.before, layer.after, layer.q_norm, layer.k_norm]
        taken += [tensor for group in layer.linears for linear in group for tensor in linear]
    assert {x.data_ptr() for x in taken if x is not None} == {p.data_ptr() for p in model.parameters()}
    assert not any(x.requires_grad for x in taken if x is not None)
    rotary = model.model.rotary_emb
    assert torch.allclose(weights.rope.inv_freq, rotary.inv_freq, rtol=1e-6, atol=0)
    assert weights.rope.scaling == pytest.approx(rotary.attention_scaling)
    assert weights.window == (24 if name.startswith("mistral") else None)


def test_windows_of_some_layers() -> None:
    """Qwen's layers say which of them have one; Llama's have none, whatever a config says."""
    kind = {"use_sliding_window": True, "sliding_window": 8}
    for layers, window in ((1, 8), (2, None)):
        model = AutoModelForCausalLM.from_config(
            Qwen2Config(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=2, max_window_layers=layers, **kind)
        )  # fmt: skip
        assert take_weights(model).window == window
    assert take_weights(make_model("llama", sliding_window=4)).window is None


def test_hooks_that_change_nothing() -> None:
    """Those of `patch_model`, and those that transformers leaves behind where hidden states were asked for."""
    model = make_model()
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64), output_hidden_states=True)
    assert weights_reason(patch_model(model)) is None
