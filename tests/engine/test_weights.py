"""Which decoder an engine has, and its weights: replaced between steps, taken again, noticed when they changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from mvkernels import BackendError, is_patched
from mvkernels.decoder.native import NativeDecoder
from mvkernels.model import Engine, Generation, GenerationConfig
from mvkernels.ops.dense.layer import layer_reason
from tests.ops.tiles import as_bf16
from tests.support.tiny_model import tiny_model, tiny_tokenizer

CONFIG = GenerationConfig(max_new_tokens=12, eos_token_ids=(), stop=(), max_depth=0)
PROMPT = [7 * i % 250 for i in range(23)]
OWN = "native" if layer_reason() is None else "torch"


def make(seed: int = 0, **options: Any) -> Engine:
    """Weights that bf16 has: the native decoder reads copies of them, which must not be old ones."""
    return Engine(as_bf16(tiny_model(seed)), tiny_tokenizer(), page_size=4, **options)


def tokens(engine: Engine) -> list[int]:
    [out] = engine.generate([PROMPT], CONFIG)
    assert engine.cache is not None and engine.available_pages == engine.cache.num_pages
    engine.cache.check()
    return out.token_ids


WANTED = {seed: tokens(make(seed)) for seed in (0, 3)}


def test_the_engine_names_its_decoder() -> None:
    engine, hosted = make(), make(decoder="hosted")
    assert (engine.decoder, hosted.decoder, make(decoder="own").decoder) == (OWN, "hosted", OWN)
    assert not is_patched(engine.model) and is_patched(hosted.model)
    assert tokens(engine) == tokens(hosted) == WANTED[0] != WANTED[3]
    assert make(backend="cpu").decoder == "torch"
    with pytest.raises(ValueError, match="decoder: expected one of 'auto', 'own', 'hosted', got 'native'"):
        make(decoder="native")


def test_a_model_that_it_does_not_know() -> None:
    model = tiny_model(hidden_act="gelu")
    expected = re.escape(
        "decoder 'own' cannot run this model: expected hidden_act 'silu', got 'gelu'; decoder=\"hosted\""
    )
    with pytest.raises(BackendError, match=expected):
        Engine(model, tiny_tokenizer(), decoder="own")
    with pytest.warns(UserWarning, match="expected hidden_act 'silu', got 'gelu'") as caught:
        assert Engine(model, tiny_tokenizer()).decoder == "hosted"
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("decoder", ["own", "hosted"])
@pytest.mark.parametrize("graph", [False, True])
def test_weights_are_replaced(decoder: str, graph: bool) -> None:
    engine = make(decoder=decoder, graph=graph)
    new = as_bf16(tiny_model(3)).state_dict()
    assert tokens(engine) == WANTED[0] and engine.weights_version == 0
    hits = engine.prefix_hits
    engine.update_weights((name, values.double()) for name, values in new.items())
    assert engine.weights_version == 1
    [out] = engine.generate([PROMPT], CONFIG)
    assert out.token_ids == WANTED[3] and engine.prefix_hits == hits == 0
    assert out.weights_version == json.loads(out.to_json())["weights_version"] == 1
    assert Generation.from_json(out.to_json()).weights_version == 1
    assert tokens(engine) == WANTED[3] and engine.prefix_hits > hits


def test_weights_before_the_first_request() -> None:
    engine = make()
    engine.update_weights(as_bf16(tiny_model(3)).state_dict())
    assert tokens(engine) == WANTED[3] and engine.weights_version == 1


def test_a_generation_of_older_json_has_a_version() -> None:
    [out] = make().generate([PROMPT], CONFIG)
    found = out.to_dict()
    del found["weights_version"]
    assert Generation.from_dict(found).weights_version == 0
    found["weights_version"] = "1"
    with pytest.raises(ValueError, match="expected weights_version of type int"):
        Generation.from_dict(found)


def test_weights_that_are_replaced_while_requests_run() -> None:
    """What they have so far is computed again; keys of the old weights are found by none that come later."""
    engine, expected = make(), make(3)
    stream = engine.stream([PROMPT], CONFIG)
    events = [next(stream) for _ in range(5)]
    engine.update_weights(as_bf16(tiny_model(3)).state_dict())
    assert engine.preemptions == 1
    out = [*events, *stream][-1].generation
    assert out.finish_reason == "max_new_tokens" and out.weights_version == 0
    drawn = sum(out.token_ids[i] == WANTED[0][i] for i in range(len(PROMPT), len(PROMPT) + 4))
    assert drawn == 4, "tokens that were there stay"
    # What follows is what the new weights give behind them: a fresh engine says so.
    known = next(i for i in range(len(PROMPT), len(WANTED[0])) if out.token_ids[i] != WANTED[0][i])
    rest = GenerationConfig(max_new_tokens=len(out.token_ids) - known, eos_token_ids=(), stop=(), max_depth=0)
    assert expected.generate([out.token_ids[:known]], rest)[0].token_ids == out.token_ids
    assert tokens(engine) == WANTED[3]


def renamed(state: dict[str, Any], name: str, new: str) -> None:
    state[new] = state.pop(name)


UP = "model.layers.0.mlp.up_proj.weight"
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda state: state.pop(UP), f"{UP}: expected values for it, got none (1 tensors are missing)"),
    "foreign": (lambda state: renamed(state, UP, UP + ".lora_A"), f"{UP}.lora_A: expected a name of the model's"),
    "shape": (lambda state: state.update({UP: state[UP].T}), f"{UP}: expected floating-point values of shape [96, 64]"),
    "integers": (lambda state: state.update({UP: state[UP].int()}), f"{UP}: expected floating-point values"),
    "no tensor": (
        lambda state: state.update({UP: [1.0]}),
        f"{UP}: expected floating-point values of shape [96, 64], got",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_change_nothing(name: str) -> None:
    change, message = WRONG[name]
    engine, state = make(), as_bf16(tiny_model(3)).state_dict()
    change(state)
    tokens(engine)
    hits = engine.prefix_hits
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.update_weights(state)
    assert engine.weights_version == 0 and tokens(engine) == WANTED[0] and engine.prefix_hits > hits


def test_tied_weights_have_one_name_or_two() -> None:
    def tied(seed: int) -> Any:
        model = tiny_model(seed)
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    engine, wanted = (Engine(tied(seed), tiny_tokenizer(), page_size=4) for seed in (0, 3))
    state = tied(3).state_dict()
    engine.update_weights(state)
    assert tokens(engine) == tokens(wanted)
    engine.update_weights({name: values for name, values in state.items() if name != "lm_head.weight"})
    assert tokens(engine) == tokens(wanted)
    with pytest.raises(ValueError, match=r"expected the values of .*, to which it is tied, got others"):
        engine.update_weights({**state, "lm_head.weight": state["lm_head.weight"] + 1})


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "written to": lambda model, other: [
        p.copy_(q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    ],
    "assigned": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "replaced layers": lambda model, other: (
        setattr(model, "model", other.model) or setattr(model, "lm_head", other.lm_head)
    ),
    "data": lambda model, other: [
        setattr(p, "data", q.data) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    ],
}


@pytest.mark.parametrize("decoder", ["own", "hosted"])
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_parameters_that_changed_are_noticed_between_runs(name: str, decoder: str) -> None:
    """Also after a stream was opened, and before its first step. The prefixes of the old ones are not found."""
    for opened in (False, True):
        engine = make(decoder=decoder)
        assert tokens(engine) == WANTED[0]
        stream = engine.stream([PROMPT], CONFIG) if opened else None
        CHANGES[name](engine.model, as_bf16(tiny_model(3)))
        found = [*stream][-1].generation.token_ids if stream is not None else tokens(engine)
        assert found == WANTED[3] and engine.weights_version == 1 and engine.prefix_hits == 0


def test_what_is_not_noticed_is_taken_by_reload() -> None:
    """Writes through `.data`."""
    engine = make()
    assert tokens(engine) == WANTED[0]
    for parameter, other in zip(engine.model.parameters(), as_bf16(tiny_model(3)).parameters(), strict=True):
        parameter.data.copy_(other)
    engine.reload()
    assert tokens(engine) == WANTED[3] and engine.weights_version == 1


def test_reload_looks_at_the_modules_again() -> None:
    """Hooks that come later take no part; then the model has to be hosted."""
    engine, strict = make(), make(decoder="own")
    for one in (engine, strict):
        tokens(one)
        one.model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: 5 * out)
        assert tokens(one) == WANTED[0]
    with pytest.warns(UserWarning, match="expected no forward hooks"):
        engine.reload()
    assert engine.decoder == "hosted" and tokens(engine) != WANTED[0]
    with pytest.raises(BackendError, match="expected no forward hooks"):
        strict.reload()
    assert strict.decoder == OWN and tokens(strict) == WANTED[0] and strict.weights_version == 0


@pytest.mark.skipif(OWN != "native", reason="needs a C++ compiler")
def test_a_model_that_moves_to_another_dtype() -> None:
    engine = make()
    tokens(engine)
    engine.model.double()
    assert tokens(engine) == WANTED[0]
    assert engine.decoder == "torch" and engine.cache is not None and engine.cache.dtype is torch.float64
    engine.model.float()
    assert tokens(engine) == WANTED[0] and isinstance(engine._decoder, NativeDecoder)


def test_a_sampler_cannot_replace_weights() -> None:
    engine = make()

    def sampler(views: Any, logits: torch.Tensor) -> list[int]:
        engine.update_weights(tiny_model(3).state_dict())
        return [1] * len(views)

    with pytest.raises(RuntimeError, match="expected a call from outside of a step"):
        engine.generate([PROMPT], CONFIG, sampler)
    assert engine.weights_version == 0 and tokens(engine) == WANTED[0]


def test_a_parameter_of_another_kind_is_refused_by_name() -> None:
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(96, 64).char(), requires_grad=False)
    with pytest.raises(BackendError, match=re.escape(f"{UP}: expected a plain floating-point weight")):
        Engine(model, tiny_tokenizer(), decoder="own")
