"""All layers in one call give what they give one by one, bit for bit, and only where nobody looks between them."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from mvkernels import BackendError, PagedKVCache, hf_stack, patch_model
from mvkernels.hf_layers import fuse_layers, unfuse_layers
from mvkernels.hf_linear import pack_linear, unpack_linear
from mvkernels.hf_norm import fuse_norms
from mvkernels.ops.dense.layer import layer_reason
from tests.ops.layer_cases import CONFIGS, IDS, assert_same, fused, make_cache, plain_model, stacked, steps

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


def give_new_hooks(model: Any) -> None:
    norm = model.model.norm
    norm._forward_hooks = OrderedDict()
    norm.register_forward_hook(lambda _, __, out: 2 * out)


def give_new_parameters(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    norm._parameters = {"weight": nn.Parameter(3 * norm.weight.detach())}


def wrapped(forward: Any) -> Any:
    @functools.wraps(forward)
    def thrice(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.last_hidden_state = 3 * out.last_hidden_state
        return out

    return thrice


class Wrapped(LlamaModel):
    forward = wrapped(LlamaModel.forward)


class Doubling(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(ids)


class Clamped(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.clamp(-0.1, 0.1)


TOUCHES: dict[str, Callable[[Any], Any]] = {
    "new hooks": give_new_hooks,
    "new parameters": give_new_parameters,
    "another class": lambda model: setattr(model.model, "__class__", Wrapped),
    "another class of the embedding": lambda model: setattr(model.model.embed_tokens, "__class__", Doubling),
    "largest embedding": lambda model: setattr(model.model.embed_tokens, "max_norm", 0.5),
    "another scale": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.9),
    "weight norm": lambda model: nn.utils.weight_norm(model.model.layers[0].mlp.down_proj),
    "pruned": lambda model: prune.l1_unstructured(model.model.layers[0].mlp.down_proj, "weight", 0.5),
    "parametrized": lambda model: register_parametrization(model.model.layers[0].mlp.up_proj, "weight", Clamped()),
    "parametrized bias": lambda model: register_parametrization(model.model.layers[0].mlp.up_proj, "bias", Clamped()),
    "parametrized norm": lambda model: register_parametrization(
        model.model.layers[1].input_layernorm, "weight", Clamped()
    ),
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
    for _ in range(3):
        assert_same(steps(model), steps(plain))
    taken = {"new parameters", "another class of the embedding", "largest embedding"}
    assert bool(calls) == (name in taken)


def prompt(model: Any, cache: PagedKVCache | None = None, **more: Any) -> dict[str, Any]:
    """The arguments of a forward over the first three tokens."""
    cache = make_cache(model) if cache is None else cache
    return {"input_ids": IDS[:, :3], "paged_kv": (cache, cache.plan([(cache.new(), 3)])), **more}


ASKED: dict[str, Callable[[Any], Any]] = {
    "hidden states": lambda model: model(**prompt(model, output_hidden_states=True)).hidden_states,
    "a tuple": lambda model: model.model(**prompt(model, return_dict=False))[:1],
    "embeddings": lambda model: [
        model(**prompt(model, input_ids=None, inputs_embeds=model.model.embed_tokens(IDS[:, :3]))).logits
    ],
    "another argument": lambda model: [model(**prompt(model, num_items_in_batch=3)).logits],
}


@pytest.mark.parametrize("name", ASKED)
def test_whatever_else_is_asked_for_is_given(name: str, calls: list[int]) -> None:
    model, plain = make_model(), patch_model(plain_model("llama"))
    steps(model)
    assert len(calls) == 4
    calls.clear()
    with torch.inference_mode():
        assert_same(ASKED[name](model), ASKED[name](plain))
    assert not calls


@pytest.mark.parametrize("flag", ["output_hidden_states", "return_dict"])
def test_whatever_the_config_asks_for_is_given(flag: str, calls: list[int]) -> None:
    model, plain = make_model(), patch_model(plain_model("llama"))
    for one in (model, plain):
        setattr(one.config, flag, flag != "return_dict")
    with torch.inference_mode():
        found, expected = (one.model(**prompt(one)) for one in (model, plain))
    assert type(found) is type(expected) and not calls
    assert_same(*((out[0], *(out.hidden_states if flag != "return_dict" else ())) for out in (found, expected)))


def test_what_is_said_to_be_off_is_off(calls: list[int]) -> None:
    """And ids may come without their name."""
    model = make_model()
    with torch.inference_mode():
        expected = model.model(**prompt(model)).last_hidden_state
        named = prompt(model, output_hidden_states=False, output_attentions=None, return_dict=True)
        assert torch.equal(model.model(**named).last_hidden_state, expected)
        ids, rest = named.pop("input_ids"), prompt(model)
        del rest["input_ids"]
        assert torch.equal(model.model(ids, **rest).last_hidden_state, expected)
    assert len(calls) == 3


def test_fewer_layers_of_a_cache_of_all(calls: list[int]) -> None:
    model, plain = make_model(), patch_model(plain_model("llama"))
    caches = [make_cache(one) for one in (model, plain)]
    found = []
    for one, cache in zip((model, plain), caches, strict=True):
        one.config.num_hidden_layers = 1
        with torch.inference_mode():
            found.append([one(**prompt(one, cache)).logits])
    assert_same(*found)
    assert not calls


def test_gradients_and_other_dtypes_go_through_the_layers(calls: list[int]) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="expected a tensor outside autograd"):
        model(**prompt(model))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(**prompt(model)).logits.isfinite().all()
    assert not calls


def test_a_forward_that_somebody_has_wrapped(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """Before the layers are fused, or afterwards: it is called."""
    expected = steps(make_model())
    monkeypatch.setattr(LlamaModel, "forward", wrapped(LlamaModel.forward))
    model = make_model()
    assert stacked(model) == 0
    with torch.no_grad():
        model.lm_head.weight /= 3
    assert_same(steps(model), expected)
    monkeypatch.undo()
    calls.clear()
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight /= 3
    monkeypatch.setattr(LlamaModel, "forward", wrapped(LlamaModel.forward))
    assert_same(steps(model), expected)
    monkeypatch.undo()
    assert not calls


def test_layers_that_are_called_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    expected, kind, seen = steps(model), type(model.model.layers[0]), []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return nn.Module.__call__(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", call)
    assert all(map(torch.equal, steps(model), expected)) and len(seen) == 8


def test_pages_that_are_replaced_between_two_steps(calls: list[int]) -> None:
    model, plain = make_model(), patch_model(plain_model("llama"))
    found = []
    for one in (model, plain):
        cache = make_cache(one)
        branch = cache.new()
        with torch.inference_mode():
            for _ in range(3):
                step = cache.plan([(branch, 3)])
                found.append(one(IDS[:, :3], paged_kv=(cache, step)).logits)
                cache.commit(step)
                cache.k, cache.v = (tuple(x.clone() for x in pages) for pages in (cache.k, cache.v))
    assert_same(found[:3], found[3:])
    assert len(calls) == 3


@pytest.mark.parametrize("width", [40, 64])
def test_embeddings_of_another_width_are_refused(width: int) -> None:
    model = make_model()
    model.model.embed_tokens.weight = nn.Parameter(torch.randn(97, width))
    with pytest.raises(RuntimeError):
        steps(model)


def test_layers_that_rotate_in_another_way() -> None:
    """Ernie's have the code of Llama's, but another function of the same name."""
    ernie = pytest.importorskip("transformers.models.ernie4_5")
    sizes = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ernie.Ernie4_5Config(vocab_size=97, num_key_value_heads=2, pad_token_id=None, **sizes)
    config.head_dim = 12
    plain = patch_model(AutoModelForCausalLM.from_config(config).eval())
    model = fuse_layers(fuse_norms(pack_linear(copy.deepcopy(plain))))
    assert fused(model) == 0
    assert_same(steps(model), steps(plain))


CACHES: dict[str, Callable[[], PagedKVCache]] = {
    "another dtype": lambda: PagedKVCache(8, 4, 2, 2, 12, torch.bfloat16),
    "fewer layers": lambda: PagedKVCache(8, 4, 1, 2, 12),
    "fewer heads": lambda: PagedKVCache(8, 4, 2, 1, 12),
    "smaller heads": lambda: PagedKVCache(8, 4, 2, 2, 8),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_that_do_not_fit_are_refused(name: str, calls: list[int]) -> None:
    """By the layers themselves: nothing is written beside a cache."""
    model = make_model()
    with torch.inference_mode(), pytest.raises(Exception, match="expected"):
        model(**prompt(model, CACHES[name]()))
    assert not calls


def test_steps_that_do_not_fit_are_refused(calls: list[int]) -> None:
    model = make_model()
    cache, other = make_cache(model), make_cache(model)
    step = cache.plan([(cache.new(), 3)])
    with torch.inference_mode():
        for ids in (IDS[:, :2], IDS[:, :4], IDS[:, :6].view(2, 3)):
            with pytest.raises(ValueError, match="expected inputs of shape"):
                model(ids, paged_kv=(cache, step))
        with pytest.raises(Exception, match="expected"):
            model(IDS[:, :3], paged_kv=(other, step))
        cache.rollback(step)
        with pytest.raises(Exception, match="expected an open step"):
            model(IDS[:, :3], paged_kv=(cache, step))
    assert not calls


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
        expected = steps(unfuse_layers(copy.deepcopy(model)))
        calls.append(-1)
        assert_same(steps(model), expected)

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


@pytest.mark.parametrize("way", ["strides", "dtype"])
def test_norms_that_lie_otherwise_at_the_same_place(way: str, calls: list[int]) -> None:
    model = make_model()
    norm = model.model.layers[0].input_layernorm
    memory = torch.randn(96) if way == "strides" else torch.ones(96)
    norm.weight.data = memory[:48]
    steps(model)
    assert len(calls) == 4
    norm.weight.data = memory[::2] if way == "strides" else memory.view(torch.bfloat16)[:48]
    assert_same(steps(model), steps(unfuse_layers(copy.deepcopy(model))))
    assert len(calls) == 4


def test_weights_that_lie_otherwise_at_the_same_place(calls: list[int]) -> None:
    model = make_model()
    linear = model.model.layers[1].self_attn.o_proj
    steps(model)
    linear.weight.data = linear.weight.data.t()
    assert_same(steps(model), steps(unpack_linear(unfuse_layers(copy.deepcopy(model)))))


def test_weights_that_have_gone_are_not_kept() -> None:
    model = make_model()
    steps(model)
    storages = [StorageWeakRef(one.untyped_storage()) for one in model.parameters()]
    model.to("meta")
    gc.collect()
    assert all(one.expired() for one in storages)


def test_one_step_by_itself_behind_one_of_all(calls: list[int]) -> None:
    """What the layers of a step share is given up when all of them run together, with other rows."""
    model = make_model()
    expected = steps(make_model())
    calls.clear()
    cache = make_cache(model)
    root = cache.new()
    for place, tokens in enumerate((7, 40, 1)):
        hook = model.model.layers[1].register_forward_hook(lambda *_: None) if place != 1 else None
        step = cache.plan([(root, tokens)])
        with torch.inference_mode():
            logits = model(IDS[:, :tokens], paged_kv=(cache, step)).logits[0]
        cache.rollback(step)
        if place == 0:
            assert torch.equal(logits, expected[0])
        if hook is not None:
            hook.remove()
    assert calls == [40]


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
