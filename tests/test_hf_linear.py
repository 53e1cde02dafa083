"""Fast linear layers give what the layers give, follow their weights, and leave training alone: compiled and packed."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from mvkernels import hf_linear
from mvkernels.hf_linear import pack_linear, unpack_linear
from mvkernels.model import Engine, GenerationConfig
from mvkernels.ops.dense.linear import LinearLayers, is_bf16, linear_reason
from mvkernels.ops.dense.linear_amx import TileLayers, tiles_reason
from tests.ops.tiles import as_bf16, takes_tiles, use_software
from tests.support.tiny_model import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not hf_linear._takes(torch.float32), reason="needs PyTorch with oneDNN")
unrounded_model = tiny_model
IDS = torch.arange(40).view(1, 40) % 7


@pytest.fixture(autouse=True, params=["tiles", "compiled", "packed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways of multiplying fp32 weights; "tiles": those of bf16 on matrix units."""
    if request.param == "packed":
        monkeypatch.setattr(hf_linear, "linear_reason", lambda: "not here")
    elif linear_reason() is not None:
        pytest.skip(str(linear_reason()))
    elif request.param == "compiled":
        monkeypatch.setattr(hf_linear, "tiles_reason", lambda: "not here")
    else:
        monkeypatch.setitem(globals(), "tiny_model", lambda **named: as_bf16(unrounded_model(**named)))
        if tiles_reason() is not None:
            use_software(monkeypatch)
    return request.param


# Relative to the logits; fp32 with another order of summation was seen to differ by 3e-6.
TOLERANCE = 1e-5


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def packs(model: nn.Module) -> set[hf_linear._Pack]:
    return {module.forward.func for module in model.modules() if "forward" in module.__dict__}


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 40])
def test_the_logits_are_those_of_the_layers(rows: int, way: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_()  # Qwen2's projections have one, o_proj has none
    if way == "tiles":
        as_bf16(model)
    expected = logits(model, IDS[:, :rows])
    assert pack_linear(model) is model
    assert close(logits(model, IDS[:, :rows]), expected)
    assert takes_tiles(model) == (way == "tiles")
    assert close(logits(model, IDS[0, :rows].view(rows, 1)), logits(unpack_linear(model), IDS[0, :rows].view(rows, 1)))


def test_layers_with_the_same_input_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pack_linear(tiny_model())
    assert sorted(len(pack.layers) for pack in packs(model)) == [1, 1, 1, 1, 1, 2, 2, 3, 3]
    calls: list[int] = []
    product = hf_linear._Pack._product

    def counted(self: Any, *args: Any) -> torch.Tensor:
        calls.append(len(self.layers))
        return product(self, *args)

    monkeypatch.setattr(hf_linear._Pack, "_product", counted)
    logits(model)
    assert sorted(calls) == [1, 1, 1, 1, 1, 2, 2, 3, 3]
    assert all(pack._latest is None for pack in packs(model))  # nothing of the step is kept


def test_a_layer_that_is_called_with_another_input() -> None:
    attention = tiny_model().model.layers[0].self_attn
    x, y = torch.randn(2, 1, 5, 64)
    with torch.no_grad():
        expected = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(x), attention.k_proj(x)]
        pack_linear(attention)
        found = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(x), attention.k_proj(x)]
    assert all(close(one, other) for one, other in zip(found, expected, strict=True))


def test_weights_that_change_are_packed_again() -> None:
    model = pack_linear(tiny_model())
    before = logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = logits(model)
    assert not close(trained, before, 1e-3)
    assert close(trained, logits(unpack_linear(model)))
    pack_linear(model)
    logits(model)
    other = tiny_model(seed=1)
    model.load_state_dict(other.state_dict(), assign=True)
    assert close(logits(model), logits(other))


def test_weights_that_lie_where_others_have_lain(way: str) -> None:
    """They are large enough for memory of their own, which goes back to the system and comes again."""
    sizes = (2**17 + 16, 64)
    layer = pack_linear(as_bf16(nn.Linear(*sizes[::-1], bias=False)).requires_grad_(False))
    x = torch.rand(3, 64)
    with torch.no_grad():
        for value in (1.0, 3.0):
            layer(x)
            for _ in range(2):  # the first is given up with the second
                layer.weight.data = torch.full(sizes, value)
            assert close(layer(x), (value * x.sum(1, keepdim=True)).expand(-1, sizes[0]))


def test_threads_that_call_a_layer_for_the_first_time(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has made is there for its product while the next one, who has found nothing, makes it again."""
    x = torch.randn(3, 64)
    make, turns = hf_linear._Pack._make, itertools.cycle((0, 0.002, 0.004, 0.006))

    def late(self: Any, *args: Any) -> Any:
        time.sleep(next(turns))
        return make(self, *args)

    monkeypatch.setattr(hf_linear._Pack, "_make", late)
    barrier = threading.Barrier(4, timeout=60)

    def run(layer: nn.Module) -> list[torch.Tensor]:
        barrier.wait()
        with torch.inference_mode():
            return [layer(x) for _ in range(40)]

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            layer = pack_linear(as_bf16(nn.Linear(64, 96)))
            expected = nn.functional.linear(x, layer.weight, layer.bias)
            for found in pool.map(run, [layer] * 4):
                assert all(close(one, expected) for one in found)


def test_training_is_what_it_was() -> None:
    plain, packed = tiny_model().train(), pack_linear(tiny_model()).train()
    logits(packed)
    for model in (plain, packed):
        model(IDS, labels=IDS).loss.backward()
    for one, other in zip(plain.parameters(), packed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(packed(IDS).logits, plain(IDS).logits)


def test_unpacking_leaves_nothing_behind() -> None:
    model = tiny_model()
    expected = logits(model)
    pack_linear(model)
    logits(model)
    assert unpack_linear(model) is model
    assert not packs(model) and torch.equal(logits(model), expected)
    assert unpack_linear(model) is model


def test_packed_models_are_copied_and_pickled() -> None:
    model = pack_linear(tiny_model())
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(packs(other)) == len(packs(model)) and not packs(other) & packs(model)
        assert torch.equal(logits(other), expected)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert not logits(other).any() and torch.equal(logits(model), expected)


def test_what_takes_no_part() -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(4, 4), nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, device="meta"))
    assert not packs(pack_linear(model))
    moved = pack_linear(nn.Sequential(nn.Linear(4, 4))).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(moved(x), nn.functional.linear(x, moved[0].weight, moved[0].bias))


def test_one_vector_and_no_rows() -> None:
    layer = nn.Linear(8, 5)
    vector, none = torch.randn(8), torch.randn(0, 8)
    with torch.no_grad():
        expected = layer(vector)
        pack_linear(layer)
        assert close(layer(vector), expected) and layer(none).shape == (0, 5)


def test_bf16_weights_are_an_opt_in() -> None:
    with pytest.raises(ValueError, match=r"expected torch\.float32, torch\.bfloat16 or None, got torch\.float16"):
        pack_linear(tiny_model(), torch.float16)
    if not hf_linear._takes(torch.bfloat16):
        with pytest.raises(ValueError, match="expected a CPU with bf16"):
            pack_linear(tiny_model(), torch.bfloat16)
        pytest.skip("needs a CPU with bf16 instructions")
    model = tiny_model()
    expected = logits(model)
    found = logits(pack_linear(model, torch.bfloat16))
    assert all(pack.compiled() is None for pack in packs(model))
    assert found.dtype == torch.float32 and close(found, expected, 0.1) and not close(found, expected, 1e-4)
    assert close(logits(pack_linear(model)), expected)


def test_which_way_is_taken(way: str) -> None:
    model = pack_linear(tiny_model())
    logits(model)
    for pack in packs(model):
        assert (pack.made().compiled is not None, pack.made().packed is not None) == (way != "packed", way == "packed")


def test_layers_that_are_not_contiguous_are_packed() -> None:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.randn(8, 8).T)
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = layer(x)
        assert close(pack_linear(layer)(x), expected)
    assert next(iter(packs(layer))).compiled() is None


@pytest.mark.parametrize("inner", [1, 15, 16, 100, 257])
@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 16, 17, 32, 33, 65])
def test_the_kernel_of_few_rows(inner: int, rows: int) -> None:
    """Several layers at once, with and without a bias; nothing beside the result is written."""
    if linear_reason() is not None:
        pytest.skip(str(linear_reason()))
    sizes = (1, 47, 48, 131)
    weights, biases = [torch.randn(n, inner) for n in sizes], [None, torch.randn(47), None, torch.randn(131)]
    layers, x = LinearLayers(weights, biases), torch.randn(2 * rows, inner)[::2]
    exact = [
        nn.functional.linear(x.double(), w.double(), b if b is None else b.double())
        for w, b in zip(weights, biases, strict=True)
    ]
    found = layers(x)
    assert close(found.double(), torch.cat(exact, -1), 2e-6)
    # A row has the same bits with fewer others, within 1 to 8 and from 9 on.
    if rows <= 8:
        assert torch.equal(torch.cat([layers(row[None]) for row in x]), found)
    else:
        assert torch.equal(layers(torch.cat([x, x]))[rows:], found) and torch.equal(layers(x[-9:]), found[-9:])


@pytest.mark.parametrize("inner", [1, 15, 16, 257])
@pytest.mark.parametrize("rows", [*range(1, 9), 9, 33])
def test_narrow_weights_give_the_same_bits(inner: int, rows: int) -> None:
    """Also beside a layer whose weights are not."""
    if linear_reason() is not None:
        pytest.skip(str(linear_reason()))
    weights = [torch.randn(131, inner).bfloat16().float(), torch.randn(48, inner)]
    biases = [None, torch.randn(48)]
    x = torch.randn(rows, inner)
    wide, narrow = LinearLayers(weights, biases), LinearLayers(weights, biases, narrow=True)
    assert [part is not None for part in narrow.narrow] == [True, False] and wide.narrow == [None, None]
    assert torch.equal(wide(x), narrow(x))
    if rows <= 8:  # it is the copy that is read
        assert narrow.narrow[0] is not None
        narrow.narrow[0].zero_()
        assert not narrow(x)[:, :131].any() and not torch.equal(wide(x), narrow(x))


def test_which_weights_are_bf16() -> None:
    weight = torch.randn(40, 60).bfloat16().float()
    weight[3, 7], weight[4, 8], weight[5, 9] = -0.0, torch.inf, torch.nan
    assert is_bf16(weight)
    for place in ((0, 1), (39, 59)):
        other = weight.clone()
        other[place] = 1 + 2**-8
        assert not is_bf16(other)


def test_infinite_weights_stay_off_matrix_units(way: str) -> None:
    """They would meet the zeros that rows are filled up with."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3, 7] = torch.inf
    found = logits(pack_linear(model), IDS[:, :9])
    assert not takes_tiles(model) and not found[..., :3].isnan().any()


def test_narrow_weights_follow_theirs(way: str) -> None:
    model = as_bf16(tiny_model())
    expected = logits(model, IDS[:, :4])
    pack_linear(model)
    assert close(logits(model, IDS[:, :4]), expected)
    made = [pack.compiled() for pack in packs(model)]
    assert {type(one) for one in made} == {{"tiles": TileLayers, "compiled": LinearLayers}.get(way, type(None))}
    assert all(part is not None for one in made for part in getattr(one, "narrow", ()))
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + 2**-9)
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    changed = logits(model, IDS[:, :4])
    assert not close(changed, expected, 1e-3) and close(changed, logits(unpack_linear(model), IDS[:, :4]))
    logits(pack_linear(model, narrow=False), IDS[:, :4])
    assert all(part is None for pack in packs(model) if pack.compiled() for part in pack.compiled().narrow)


def test_narrow_weights_where_there_is_room(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = hf_linear.narrow_bytes(tiny_model())
    assert size == sum(2 * m.weight.numel() for m in tiny_model().modules() if type(m) is nn.Linear)
    on_tiles = way == "tiles"
    for memory, strict, fits in ((8 * size, False, True), (8 * size - 8, False, False), (8 * size, True, on_tiles)):
        monkeypatch.setattr("mvkernels.model.engine.memory._machine_memory", lambda memory=memory: memory)
        engine = Engine(tiny_model(), tiny_tokenizer(), strict=strict, fast_linear=True)
        layer: Any = engine.model.get_output_embeddings()
        assert layer.forward.func.narrow is (fits and way != "packed")  # which reads no other weights


def test_the_engine_generates_the_same() -> None:
    tokenizer = tiny_tokenizer()
    config = GenerationConfig(max_new_tokens=60, eos_token_ids=(), stop=())
    plain = Engine(tiny_model(), tokenizer).generate(["a b", "12 + 3"], config)
    packed = Engine(pack_linear(tiny_model()), tokenizer).generate(["a b", "12 + 3"], config)
    assert [one.token_ids for one in plain] == [one.token_ids for one in packed]
