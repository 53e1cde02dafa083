"""All layers in one call give what they give one by one, bit for bit, and only where nobody looks between them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from mvkernels import BackendError, hf_stack, patch_model
from mvkernels.hf_layers import fuse_layers, unfuse_layers
from mvkernels.hf_linear import pack_linear, unpack_linear
from mvkernels.hf_norm import fuse_norms
from mvkernels.ops.layer_native import layer_reason
from tests.layer_cases import CONFIGS, IDS, assert_same, make_cache, plain_model, stacked, steps

pytestmark = pytest.mark.skipif(layer_reason() is not None, reason=str(layer_reason()))


def make_model(name: str = "llama", **changes: Any) -> Any:
    return fuse_layers(fuse_norms(pack_linear(patch_model(plain_model(name, **changes)))))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of all layers."""
    seen: list[int] = []
    run = hf_stack.FusedStack.run

    def counted(self: Any, x: torch.Tensor, *args: Any) -> None:
        seen.append(x.shape[1])
        run(self, x, *args)

    monkeypatch.setattr(hf_stack.FusedStack, "run", counted)
    return seen


def one_by_one(model: Any, **more: Any) -> list[torch.Tensor]:
    """The same steps with somebody between the layers."""
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    found = steps(model, **more)
    hook.remove()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bits_as_layer_by_layer(name: str, calls: list[int]) -> None:
    model = make_model(name)
    assert stacked(model) == 1
    expected = one_by_one(model)
    assert not calls
    assert all(map(torch.equal, steps(model), expected)) and calls == [7, 2, 2, 3]
    expected = one_by_one(model, batch_invariant=True, spare=5)
    found = steps(model, batch_invariant=True, spare=5)
    assert all(map(torch.equal, found, expected)) and calls[4:] == [12, 7, 7, 8]
    assert stacked(unfuse_layers(model)) == 0


def hook_on(find: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    """A hook that doubles what the module gives."""
    return lambda model: find(model).register_forward_hook(lambda _, __, out: 2 * out)


def replace_layer(model: Any) -> None:
    layers = model.model.layers
    layers[0] = copy.deepcopy(layers[1])


def replace_norm(model: Any) -> None:
    norm = model.model.norm
    norm.forward = lambda x: 3 * type(norm).forward(norm, x)


TOUCHES: dict[str, Callable[[Any], Any]] = {
    "embedding": hook_on(lambda model: model.model.embed_tokens),
    "layer": hook_on(lambda model: model.model.layers[1]),
    "inside": hook_on(lambda model: model.model.layers[1].mlp.down_proj),
    "norm": hook_on(lambda model: model.model.norm),
    "rotations": lambda model: model.model.rotary_emb.register_forward_hook(lambda _, __, out: (out[1], out[0])),
    "another layer": replace_layer,
    "another norm": replace_norm,
    "fewer layers": lambda model: setattr(model.config, "num_hidden_layers", 1),
    "unpacked": unpack_linear,
}


@pytest.mark.parametrize("name", TOUCHES)
def test_whatever_is_touched_takes_part(name: str, calls: list[int]) -> None:
    model, plain = make_model(), patch_model(plain_model("llama"))
    steps(model)
    calls.clear()
    TOUCHES[name](model)
    TOUCHES[name](plain)
    assert_same(steps(model), steps(plain))
    assert not calls


def test_whatever_else_is_asked_for_is_given(calls: list[int]) -> None:
    """The states between the layers, tuples, embeddings of the caller's own; gradients; other weights by autocast."""
    model, plain = make_model(), patch_model(plain_model("llama"))

    def both(run: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
        caches = [make_cache(one) for one in (model, plain)]
        return tuple(
            run(one, {"paged_kv": (cache, cache.plan([(cache.new(), 3)]))})
            for one, cache in zip((model, plain), caches, strict=True)
        )

    ids = IDS[:, :3]
    with torch.inference_mode():
        found, expected = both(lambda one, paged: one(ids, output_hidden_states=True, **paged).hidden_states)
        assert len(found) == 3
        assert_same(found, expected)
        assert_same(*both(lambda one, paged: one(ids, return_dict=False, **paged)[:1]))
        assert_same(*both(lambda one, paged: [one.model(ids, return_dict=False, **paged)[0]]))
        embeds = torch.randn(1, 3, 48)
        assert_same(*both(lambda one, paged: [one(inputs_embeds=embeds, **paged).logits]))
        with torch.autocast("cpu", torch.bfloat16):
            assert all(one.logits.isfinite().all() for one in both(lambda one, paged: one(ids, **paged)))
    assert not calls
    with torch.inference_mode():
        assert_same(*both(lambda one, paged: [one.model(ids, **paged).last_hidden_state]))
    assert calls == []  # the hooks that collect hidden states stay
    model = make_model()
    for one in (model, plain):
        one.config.output_hidden_states = True
    with torch.inference_mode():
        assert_same(*both(lambda one, paged: one.model(ids, **paged).hidden_states))
        for one in (model, plain):
            one.config.output_hidden_states = False
        assert not calls

        def first_layer(one: Any, paged: dict[str, Any]) -> list[torch.Tensor]:
            one.config.num_hidden_layers = 1
            return [one(ids, **paged).logits]

        model = make_model()
        assert_same(*both(first_layer))
    assert not calls
    with pytest.raises(Exception, match="attention_mask"), torch.inference_mode():
        both(lambda one, paged: one(ids, attention_mask=torch.ones(1, 3), **paged))


def test_training_with_dropout(calls: list[int]) -> None:
    model = make_model(attention_dropout=0.5)
    steps(model)
    assert len(calls) == 4
    with pytest.raises(BackendError, match="no attention dropout"):
        steps(model.train())
    assert len(calls) == 4


def test_weights_that_change(calls: list[int]) -> None:
    """Written to, replaced, and replaced again where the ones before had lain."""
    model = make_model("qwen3")
    steps(model)
    linear, norm = model.model.layers[1].mlp.down_proj, model.model.layers[0].input_layernorm

    def check() -> None:
        found = steps(model)
        calls.append(-1)
        assert_same(found, steps(copy.deepcopy(unfuse_layers(copy.deepcopy(model)))))

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
        check()
        for _ in range(6):  # the second often lies where the one before the first did
            for _ in range(2):
                linear.weight = nn.Parameter(torch.randn_like(linear.weight))
            for _ in range(2):
                linear.weight.data = torch.randn_like(linear.weight)
            check()
        norm.weight.data = norm.weight.data * 2
        check()
        norm.variance_epsilon = 0.5
        check()
        model.model.norm.variance_epsilon = 0.1
        check()
    assert calls.count(-1) == 10 and len(calls) == 4 + 10 * 5
    with torch.no_grad():
        norm.weight.data = norm.weight.data.bfloat16()
    calls.clear()
    with torch.inference_mode():
        steps(model)
    assert not calls


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched_by_themselves(way: Callable[[Any], Any], calls: list[int]) -> None:
    model = make_model()
    expected = steps(model)
    other = way(model)
    calls.clear()
    assert all(map(torch.equal, steps(other), expected)) and len(calls) == 4
    assert other.model.forward.base is other.model
    calls.clear()
    mlp = other.model.layers[0].mlp
    mlp.forward = lambda x: torch.zeros_like(x)
    with torch.no_grad():
        assert not torch.equal(steps(other)[0], expected[0])
    assert not calls
    steps(model)
    assert len(calls) == 4


def test_threads_at_once() -> None:
    """With one model, each over a cache of its own, and weights whose kernels are made by whoever comes first."""
    model = make_model()
    expected = steps(copy.deepcopy(model))
    barrier = threading.Barrier(4, timeout=60)

    def run() -> list[list[torch.Tensor]]:
        barrier.wait()
        return [steps(model) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for found in [pool.submit(run) for _ in range(4)]:
            for one in found.result():
                assert all(map(torch.equal, one, expected))


def test_models_of_which_a_layer_takes_no_part() -> None:
    model = pack_linear(patch_model(plain_model("llama")))
    model.model.layers[0].mlp.act_fn = nn.GELU()
    assert stacked(fuse_layers(model)) == 0
    assert stacked(fuse_layers(patch_model(plain_model("llama")))) == 0  # not packed
    model = make_model()
    assert stacked(model) == stacked(fuse_layers(model)) == 1
    assert stacked(fuse_layers(model.model)) == 1
