"""The package's own decoders give what transformers' modules give, from prompt to merge, in every executor."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

from mvkernels import BackendError, PagedKVCache, StaleStep, patch_model, unpatch_model
from mvkernels.decoder import native
from mvkernels.decoder.choose import make_decoder
from mvkernels.decoder.decoder import Decoder
from mvkernels.decoder.hosted import HostedDecoder
from mvkernels.decoder.native import NativeDecoder
from mvkernels.decoder.torch import TorchDecoder
from mvkernels.decoder.triton import TritonDecoder
from mvkernels.decoder.weights import take_weights
from mvkernels.ops.dense.layer import layer_reason
from mvkernels.ops.dense.linear import LinearLayers
from mvkernels.ops.dense.linear_amx import TileLayers, tiles_reason
from tests.decoder.cases import IDS, MODELS, distance, eager, exact, make_cache, make_model, sequences, steps
from tests.ops.tiles import use_software

needs_compiler = pytest.mark.skipif(layer_reason() is not None, reason=str(layer_reason()))


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Any:
    """Without what transformers has to say about the RoPE of small configs."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_exact_as_those_of_eager_modules(name: str, dtype: torch.dtype) -> None:
    """At most twice as far from float64, where transformers computes cosines in float32 and is not that exact."""
    model = make_model(name, dtype)
    expected = exact(model)
    bound = 2e-6 if dtype is torch.float64 else 2 * distance(eager(model), expected)
    decoders: list[Decoder] = [TorchDecoder(take_weights(model)), make_decoder(model, "own")]
    for decoder in decoders:
        assert distance(sequences(steps(decoder, model.config)), expected) <= bound
    assert decoders[1].kind == ("native" if dtype is torch.float32 and layer_reason() is None else "torch")


@needs_compiler
@pytest.mark.parametrize("tiles", [False, True], ids=["no tiles", "tiles"])
def test_rows_have_the_same_bits_with_spare_ones_beside_them(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tiles:
        monkeypatch.setattr(native, "tiles_reason", lambda: "not here")
    elif tiles_reason() is not None:
        use_software(monkeypatch)
    model = make_model("qwen3, biases, tied")
    decoder = NativeDecoder(take_weights(model))
    some, more = (sequences(steps(decoder, model.config, True, spare)) for spare in (9, 20))
    assert torch.equal(some, more)
    assert distance(some, exact(model)) <= 2 * distance(eager(model), exact(model))
    kinds = {type(one) for layer in decoder._layers for one in layer.products}
    assert kinds == {TileLayers if tiles else LinearLayers}


@pytest.mark.parametrize("kind", ["torch", "native", "hosted"])
def test_spare_rows_are_written_nowhere(kind: str) -> None:
    if kind == "native" and layer_reason() is not None:
        pytest.skip(str(layer_reason()))
    model = make_model()
    weights = take_weights(model)
    decoder: Decoder = {
        "torch": lambda: TorchDecoder(weights),
        "native": lambda: NativeDecoder(weights),
        "hosted": lambda: HostedDecoder(patch_model(model)),
    }[kind]()
    cache = make_cache(decoder, model.config)
    for pages in (*cache.k, *cache.v):
        pages.fill_(torch.nan)
    step = cache.plan([(cache.new(), 3)])
    with torch.inference_mode():
        logits = decoder.forward(IDS[:8], torch.arange(8), cache, step, torch.tensor([2, 0]), batch_invariant=True)
        assert logits.shape == (2, 97) and logits.isfinite().all()
        written = torch.stack([*cache.k, *cache.v]).isfinite().flatten(3).all(-1)
        assert written.sum() == 4 * 3 and int(torch.stack([*cache.k, *cache.v]).isfinite().sum()) == 4 * 3 * 2 * 12


@needs_compiler
def test_layers_that_are_multiplied_in_different_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that bf16 has not exactly stay off the matrix units: their layer runs in a call of its own."""
    if tiles_reason() is not None:
        use_software(monkeypatch)
    model = make_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1 + 2**-10)
        model.model.layers[2].mlp.up_proj.weight.mul_(1 + 2**-10)
    decoder = NativeDecoder(take_weights(model))
    assert [last - first for first, last, _ in decoder._runs] == [1, 1, 1]
    found, plain = (sequences(steps(one, model.config)) for one in (decoder, TorchDecoder(take_weights(model))))
    assert distance(found, plain) <= 1e-5


@needs_compiler
def test_infinite_weights_stay_off_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would meet the zeros that rows are filled up with."""
    if tiles_reason() is not None:
        use_software(monkeypatch)
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3, 7] = torch.inf
    decoder = NativeDecoder(take_weights(model))
    assert type(decoder._head) is LinearLayers
    assert not sequences(steps(decoder, model.config))[:, :3].isnan().any()


@needs_compiler
def test_more_rows_than_the_kernels_are_made_for() -> None:
    model = make_model("qwen2, tied, yarn")
    decoder, plain = NativeDecoder(take_weights(model)), TorchDecoder(take_weights(model))
    many = decoder._most_rows + 1
    found = []
    for one in (decoder, plain):
        cache = make_cache(one, model.config, many)
        step = cache.plan([(cache.new(), many)])
        with torch.inference_mode():
            found.append(one.forward(torch.arange(many) % 97, step.positions, cache, step))
    assert torch.equal(*found)


@needs_compiler
def test_copies_are_made_where_there_is_room_and_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    size = 2 * sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    for rows, tiles in ((8, False), (512, True)):
        monkeypatch.setattr(native, "tiles_reason", lambda tiles=tiles: None if tiles else "not here")
        if tiles and tiles_reason() is not None:
            use_software(monkeypatch)
        for copies, count, kept in (
            (size, rows, True),
            (None, 1, True),
            (size - 1, rows, False),
            (size, rows + 1, False),
        ):
            head = make_decoder(model, copies=copies, rows=count)._head
            assert (isinstance(head, TileLayers) or head.narrow[0] is not None) is kept


def test_threads_that_make_steps_at_once() -> None:
    """Each over a cache of its own, with one decoder: nothing of a step is the other's."""
    model = make_model()
    decoder = make_decoder(model)
    expected = sequences(steps(decoder, model.config))
    barrier = threading.Barrier(4, timeout=60)

    def run(_: int) -> torch.Tensor:
        barrier.wait()
        return torch.stack([sequences(steps(decoder, model.config)) for _ in range(10)])

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected.expand_as(found)) for found in pool.map(run, range(4)))


def test_another_default_dtype_and_autocast() -> None:
    """The weights' dtype is computed in all the same."""
    model = make_model()
    for decoder in (make_decoder(model), TorchDecoder(take_weights(model))):
        expected = sequences(steps(decoder, model.config))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sequences(steps(decoder, model.config)), expected)
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = steps(decoder, model.config)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(sequences(found), expected)


def test_the_decoder_reads_positions_of_its_own() -> None:
    """Those that the caller gives, not those of the cache."""
    model = make_model()
    found = []
    for decoder in (make_decoder(model), TorchDecoder(take_weights(model)), HostedDecoder(patch_model(model))):
        cache = make_cache(decoder, model.config)
        step = cache.plan([(cache.new(), 5)])
        with torch.inference_mode():
            found.append(decoder.forward(IDS[:5], torch.tensor([3, 1, 9, 200, 7]), cache, step))
    assert distance(found[0], found[2]) < 1e-5 and distance(found[1], found[2]) < 1e-5


CACHES = {
    "another dtype": lambda: PagedKVCache(8, 4, 2, 2, 12, torch.bfloat16),
    "fewer layers": lambda: PagedKVCache(8, 4, 1, 2, 12),
    "more layers": lambda: PagedKVCache(8, 4, 3, 2, 12),
    "fewer heads": lambda: PagedKVCache(8, 4, 2, 1, 12),
    "smaller heads": lambda: PagedKVCache(8, 4, 2, 2, 8),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_that_do_not_fit_are_refused(name: str) -> None:
    """Nothing is read or written beside a cache."""
    cache = CACHES[name]()
    step = cache.plan([(cache.new(), 3)])
    with torch.inference_mode(), pytest.raises(ValueError, match="cache: expected"):
        make_decoder(make_model()).forward(IDS[:3], step.positions, cache, step)


def test_steps_that_do_not_fit_are_refused() -> None:
    model = make_model()
    decoder = make_decoder(model)
    cache, other = (make_cache(decoder, model.config) for _ in range(2))
    step = cache.plan([(cache.new(), 3)])
    with torch.inference_mode():
        for count, invariant in ((2, False), (2, True), (4, False)):
            with pytest.raises(ValueError, match="ids: expected the step's 3 rows"):
                decoder.forward(IDS[:count], torch.arange(count), cache, step, None, invariant)
        with pytest.raises(ValueError, match="positions: expected shape"):
            decoder.forward(IDS[:3], step.positions[:2], cache, step)
        with pytest.raises(ValueError, match="step: expected one of this cache"):
            decoder.forward(IDS[:3], step.positions, other, step)
        with pytest.raises(IndexError):
            decoder.forward(IDS[:3] + 97, step.positions, cache, step)
        cache.rollback(step)
        with pytest.raises(StaleStep):
            decoder.forward(IDS[:3], step.positions, cache, step)


def test_contexts_beyond_a_sliding_window_are_refused() -> None:
    model = make_model("mistral, window, head of 20")
    for decoder in (make_decoder(model), HostedDecoder(patch_model(model))):
        cache = make_cache(decoder, model.config)
        branch = cache.new()
        for count, fits in ((24, True), (1, False)):
            step = cache.plan([(branch, count)])
            with torch.inference_mode():
                if fits:
                    decoder.forward(IDS[:count], step.positions, cache, step)
                    cache.commit(step)
                    continue
                with pytest.raises(BackendError, match="sliding window of 24 tokens, got 25"):
                    decoder.forward(IDS[:count], step.positions, cache, step)


def test_pages_that_are_replaced_between_two_steps() -> None:
    model = make_model()
    found = []
    for decoder in (make_decoder(model), TorchDecoder(take_weights(model))):
        cache = make_cache(decoder, model.config)
        branch = cache.new()
        with torch.inference_mode():
            for _ in range(3):
                step = cache.plan([(branch, 3)])
                found.append(decoder.forward(IDS[:3], step.positions, cache, step))
                cache.commit(step)
                cache.k, cache.v = (tuple(x.clone() for x in pages) for pages in (cache.k, cache.v))
    assert distance(sequences(found[:3]), sequences(found[3:])) < 1e-5


# ---- hosted


def test_a_hosted_model_is_the_patched_one() -> None:
    model = make_model("qwen3, head of 24")
    decoder = make_decoder(model, "hosted")
    assert decoder.kind == "hosted"
    cache = make_cache(decoder, model.config)
    for count in (7, 1):
        step = cache.plan([(cache.new(), count)])
        with torch.inference_mode():
            found = decoder.forward(IDS[:count], step.positions, cache, step)
            last = decoder.forward(IDS[:count], step.positions, cache, step, torch.tensor([count - 1]))
            expected = model(IDS[None, :count], paged_kv=(cache, step)).logits[0]
        assert torch.equal(found, expected) and distance(last, expected[-1:]) < 1e-6
        cache.commit(step)
    unpatch_model(model)
    with pytest.raises(ValueError, match="unpatched meanwhile"):
        steps(decoder, model.config)
    with pytest.raises(ValueError, match="expected a model patched by patch_model"):
        HostedDecoder(model)


def test_a_hosted_model_follows_its_modules() -> None:
    model = make_model()
    decoder = make_decoder(model, "hosted")
    before = sequences(steps(decoder, model.config))
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: 2 * out)
    assert not torch.equal(sequences(steps(decoder, model.config)), before)


# ---- Triton


@pytest.mark.triton
@pytest.mark.parametrize("name", ["llama, biases, llama3", "mistral, window, head of 20", "qwen3, head of 24"])
def test_triton_gives_what_torch_gives(name: str) -> None:
    """On one layer in the interpreter, or on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(name, num_hidden_layers=1).to(device)
    decoder = make_decoder(model, "own", "triton")
    assert isinstance(decoder, TritonDecoder) and decoder.kind == "triton"
    expected = sequences(steps(TorchDecoder(take_weights(model)), model.config))
    assert distance(sequences(steps(decoder, model.config)), expected) < 1e-5
    with pytest.raises(BackendError, match="it is not batch-invariant"):
        steps(decoder, model.config, batch_invariant=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_decoders_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype).to("cuda")
    decoder = make_decoder(copy.deepcopy(model), "own")
    assert decoder.kind == "triton"
    expected = exact(model)
    assert distance(sequences(steps(decoder, model.config)), expected) <= 2 * distance(eager(model), expected)
