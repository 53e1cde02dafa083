"""Fused decoder layers give what the layers give over the paged cache, and are the layers everywhere else."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

from mvkernels import BackendError, PagedKVCache, hf_layers, patch_model
from mvkernels.hf_layers import fuse_layers, unfuse_layers
from mvkernels.hf_linear import pack_linear, unpack_linear
from mvkernels.model import Engine, GenerationConfig
from mvkernels.ops.dense.layer import gate, layer_reason, rms_norm, rotate_append
from mvkernels.ops.dense.linear import LinearLayers
from mvkernels.ops.dense.linear_amx import TileLayers, tiles_reason
from tests.ops.layer_cases import CONFIGS, IDS, assert_same, count_runs, fused, make_cache, plain_model, steps
from tests.ops.tiles import as_bf16, takes_tiles, use_software
from tests.support.tiny_model import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(layer_reason() is not None, reason=str(layer_reason()))


def make_model(name: str, **changes: Any) -> Any:
    """A patched model with packed linear layers."""
    return pack_linear(patch_model(plain_model(name, **changes)))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_runs(monkeypatch, "_run")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_the_layers(name: str, runs: list[int]) -> None:
    model = make_model(name)
    expected = steps(model)
    assert not runs
    assert fuse_layers(model) is model and fused(model) == 2
    assert_same(steps(model), expected)
    assert runs == [7, 7, 2, 2, 2, 2, 3, 3]
    assert fused(unfuse_layers(fuse_layers(model))) == 0
    assert all(map(torch.equal, steps(model), expected))


def test_layers_on_matrix_units(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has the same bits with others beside it, however many."""
    if tiles_reason() is not None:
        use_software(monkeypatch)
    model = pack_linear(patch_model(as_bf16(plain_model("llama"))))
    expected = steps(unpack_linear(model))
    assert_same(steps(fuse_layers(pack_linear(model))), expected)
    assert len(runs) == 8 and takes_tiles(model)
    some, more = (steps(model, batch_invariant=True, spare=spare) for spare in (0, 20))
    assert all(map(torch.equal, some, more))


def test_layers_that_are_multiplied_in_different_ways(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer on matrix units, the other not: what a step shares does not suit both."""
    if tiles_reason() is not None:
        use_software(monkeypatch)
    model = make_model("llama", intermediate_size=200)
    as_bf16(model.model.layers[1])
    expected = steps(unpack_linear(model))
    assert_same(steps(fuse_layers(pack_linear(model))), expected)
    assert len(runs) == 8
    kinds = [type(layer.mlp.down_proj.forward.func.compiled()) for layer in model.model.layers]
    assert kinds == [LinearLayers, TileLayers]


def test_threads_that_make_steps_at_once() -> None:
    """Each over a cache of its own, with one model, layer by layer in turn: nothing of a step is the other's."""
    model = fuse_layers(make_model("llama"))
    expected = steps(model)
    barrier = threading.Barrier(2, timeout=60)
    workspaces: dict[int, set[int]] = {}

    def wait(layer: Any, *_: Any) -> None:
        workspaces.setdefault(threading.get_ident(), set()).add(id(layer.forward.frame.workspace))
        barrier.wait()

    for layer in model.model.layers:
        layer.register_forward_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(steps, model) for _ in range(2)]:
            assert all(map(torch.equal, found.result(), expected))
    one, other = workspaces.values()
    assert len(one) == len(other) == 1 and one != other


def test_a_step_is_looked_at_anew_in_each_forward(runs: list[int]) -> None:
    """What the first layer has found holds for no other dtype, step or cache."""
    model = fuse_layers(make_model("llama"))
    cache = make_cache(model)
    step = cache.plan([(cache.new(), 2)])
    with torch.inference_mode():
        found = [model(IDS[:, :2], paged_kv=(cache, step)).logits for _ in range(2)]
        assert torch.equal(*found) and len(runs) == 4
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS[:, :2], paged_kv=(cache, step))
        assert len(runs) == 4
    with pytest.raises(Exception, match="expected"), torch.inference_mode():
        model(IDS[:, :2], paged_kv=(make_cache(model), step))
    assert len(runs) == 4


def test_a_layer_on_another_device_is_looked_at_by_itself() -> None:
    model = fuse_layers(make_model("llama"))
    first, second = (layer.forward for layer in model.model.layers)
    cache = PagedKVCache(8, 4, 2, 2, 12, device="meta")
    tables = tuple(torch.empty(1, 2, 12, device="meta") for _ in range(2))
    kwargs = {"paged_kv": (cache, cache.plan([(cache.new(), 2)])), "position_embeddings": tables}
    with torch.inference_mode():
        assert first._knows(torch.empty(1, 2, 48, device="meta"), *kwargs["paged_kv"], kwargs)
        assert not second._fits(torch.randn(1, 2, 48), kwargs)


def test_sizes_and_epsilons_that_change(runs: list[int]) -> None:
    """Fewer heads, and another epsilon for keys than for queries: the layer is what it was. A narrower MLP is not."""
    model = fuse_layers(make_model("qwen2"))
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = nn.Parameter(linear.weight[:20].clone())
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :20].clone())
        attention.q_proj.weight = nn.Parameter(attention.q_proj.weight[:24].clone())
        attention.q_proj.bias = nn.Parameter(attention.q_proj.bias[:24].clone())
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :24].clone())
    found = steps(model)
    assert len(runs) == 4
    assert_same(found, steps(unpack_linear(unfuse_layers(model))))
    model = make_model("qwen3")
    for layer in model.model.layers:
        layer.self_attn.k_norm.variance_epsilon = 1.0
    assert_same(steps(fuse_layers(model)), steps(unfuse_layers(model)))


def test_another_default_dtype(runs: list[int]) -> None:
    """What the kernels add up in is fp32 all the same."""
    model = fuse_layers(make_model("llama"))
    expected = steps(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = steps(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected)) and len(runs) == 16


def test_no_paged_cache_said_aloud() -> None:
    model = make_model("llama")
    with torch.inference_mode():
        expected = model(IDS[:, :3], paged_kv=None).logits
        assert torch.equal(fuse_layers(model)(IDS[:, :3], paged_kv=None).logits, expected)


def test_spare_rows_and_batch_invariance(runs: list[int]) -> None:
    """A row has the same bits with others and spare ones beside it; those see nothing."""
    model = make_model("llama")
    expected = steps(model, batch_invariant=True)
    fuse_layers(model)
    assert_same(steps(model, batch_invariant=True, spare=5), expected)
    assert runs[:2] == [12, 12]
    cache = make_cache(model)
    one, other = cache.new(), cache.new()
    logits = []
    with torch.inference_mode():
        for entries in ([(one, 3)], [(other, 3), (cache.new(), 6)]):
            planned = cache.plan(entries)
            ids = torch.nn.functional.pad(IDS[:, : planned.total_rows] % 3, (0, 20 - planned.total_rows))
            logits.append(model(ids, paged_kv=(cache, planned), batch_invariant=True).logits[0, :3])
            cache.commit(planned)
    assert torch.equal(*logits)


def test_what_is_not_fused(runs: list[int]) -> None:
    """Gradients, many rows, training forwards, another dtype: the layer is what it was."""
    model, plain = fuse_layers(make_model("qwen2")), make_model("qwen2")
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        many = model.model.layers[0].forward.linear()[0].most_rows + 1
        cache, other = make_cache(model, many), make_cache(model, many)
        step, same = (one.plan([(one.new(), many)]) for one in (cache, other))
        ids = torch.arange(many)[None] % 11
        assert torch.equal(model(ids, paged_kv=(cache, step)).logits, plain(ids, paged_kv=(other, same)).logits)
    for one in (model, plain):
        one(IDS, labels=IDS).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    cache = PagedKVCache(8, 4, 2, 2, 12, torch.bfloat16)
    with torch.inference_mode():
        assert model.bfloat16()(IDS[:, :5], paged_kv=(cache, cache.plan([(cache.new(), 5)]))).logits.isfinite().all()
    assert not runs


def test_the_sliding_window_is_still_refused() -> None:
    model = fuse_layers(make_model("mistral"))
    cache = make_cache(model)
    step = cache.plan([(cache.new(), 25)])
    with torch.inference_mode(), pytest.raises(BackendError, match="sliding window of 24 tokens, got 25"):
        model(IDS[:, :25], paged_kv=(cache, step))


def test_a_step_that_is_closed_is_still_refused() -> None:
    model = fuse_layers(make_model("llama"))
    cache = make_cache(model)
    step = cache.plan([(cache.new(), 2)])
    cache.rollback(step)
    with torch.inference_mode(), pytest.raises(Exception, match="expected an open step"):
        model(IDS[:, :2], paged_kv=(cache, step))


def test_parts_that_are_hooked_or_replaced_are_called(runs: list[int]) -> None:
    model = fuse_layers(make_model("llama"))
    first, second = model.model.layers
    called: list[str] = []
    hook = first.mlp.register_forward_hook(lambda *_: called.append("hook"))
    steps(model)
    assert len(called) == 4 and runs == [7, 2, 2, 3]  # the second layer
    hook.remove()
    second.self_attn.o_proj = nn.Sequential(second.self_attn.o_proj)  # as adapters wrap layers
    first.mlp.forward = lambda x: called.append("forward") or type(first.mlp).forward(first.mlp, x)
    runs.clear()
    steps(model)
    assert called[4:] == ["forward"] * 4 and not runs


def test_layers_that_take_no_part() -> None:
    assert fused(fuse_layers(make_model("llama", hidden_act="gelu"))) == 0
    assert fused(fuse_layers(make_model("llama", head_dim=258, num_attention_heads=2))) == 0
    plain = patch_model(AutoModelForCausalLM.from_config(make_model("llama").config))
    assert fused(fuse_layers(plain)) == 0  # its linear layers are not packed
    model = make_model("llama")
    model.model.layers[0].forward = lambda *args, **kwargs: None
    assert fused(fuse_layers(model)) == 1


def test_without_a_compiler_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_layers, "layer_reason", lambda: "not here")
    assert fused(fuse_layers(make_model("llama"))) == 0


def test_weights_that_change_are_followed(runs: list[int]) -> None:
    model = fuse_layers(make_model("qwen3"))
    steps(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        model.model.layers[1].self_attn.k_norm.weight = nn.Parameter(torch.ones(24))
    found = steps(model)
    assert len(runs) == 16
    assert_same(found, steps(unfuse_layers(model)))


def test_copies(runs: list[int]) -> None:
    model = fuse_layers(make_model("llama"))
    expected = steps(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = other.model.layers[0]
        assert layer.forward.layer is layer and layer.forward.qkv[0] is layer.self_attn.q_proj
        runs.clear()
        assert all(map(torch.equal, steps(other), expected)) and len(runs) == 8
        layer.mlp.register_forward_pre_hook(lambda *_: None)
        runs.clear()
        steps(other)
        assert len(runs) == 4


@pytest.mark.parametrize("strict", [False, True])
def test_the_engine_fuses_them(strict: bool, runs: list[int]) -> None:
    config = GenerationConfig(max_new_tokens=30, eos_token_ids=(), stop=())
    found = []
    for fast in (False, True):
        engine = Engine(tiny_model(), tiny_tokenizer(), fast_linear=fast, strict=strict)
        found.append([one.token_ids for one in engine.generate(["a b", "12 + 3"], config)])
        assert (fused(engine.model) == 2) == fast == bool(runs)
    assert found[0] == found[1]


# ---- the kernels


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "dim"), [(1, 9, 3, 64), (5, 2, 2, 6), (70, 4, 1, 256)])
def test_rotate_append(rows: int, heads: int, kv_heads: int, dim: int, normed: bool) -> None:
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
    cos, sin = torch.randn(2, rows, dim)
    weights = torch.randn(2, dim)
    slots = torch.randperm(3 * rows)[:rows]
    slots[rows // 2] = -1
    caches = torch.full((2, 3 * rows, 1, kv_heads, dim), torch.nan)
    norms = (weights[0], weights[1], 1e-5) if normed else None
    found = rotate_append(qkv, heads, cos, sin, slots, caches[0], caches[1], norms)
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    for given, weight, rotated in ((q, weights[0], found), (k, weights[1], caches[0, slots, 0])):
        given = given.view(rows, -1, dim)
        given = rms_norm(given, weight, 1e-5) if normed else given
        expected = given * cos[:, None] + rotate_half(given) * sin[:, None]
        written = torch.ones(rows, dtype=torch.bool) if rotated is found else slots >= 0
        assert torch.allclose(rotated[written], expected[written], rtol=1e-5, atol=1e-5)
    assert torch.equal(caches[1, slots[slots >= 0], 0], v.view(rows, kv_heads, dim)[slots >= 0])
    assert int((~caches[0].isnan()).any(-1).any(-1).sum()) == int((slots >= 0).sum())  # and nowhere else


@pytest.mark.parametrize("dim", [1, 15, 16, 96, 1000])
@pytest.mark.parametrize("rows", [1, 40])
def test_gate(rows: int, dim: int) -> None:
    """Against fp64; a row has the same bits alone. Large numbers neither overflow nor become NaN."""
    gu = 5 * torch.randn(rows, 2 * dim)
    gu[0, 0] = 1e4 if rows == 1 else -1e4
    g, u = gu.double().chunk(2, 1)
    exact = g * torch.sigmoid(g) * u
    found = gate(gu)
    assert torch.allclose(found.double(), exact, rtol=2e-6, atol=1e-30)
    assert torch.equal(found, torch.cat([gate(row) for row in gu.split(1)]))
    assert gate(torch.full((1, 2), torch.nan)).isnan().all()
