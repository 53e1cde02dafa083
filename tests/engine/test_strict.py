"""Strict mode: a request's tokens and log-probabilities are the same, bit for bit, whoever shares its steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

import pytest
import torch

from mvkernels import BranchLayout, patch_model
from mvkernels.decoder.hosted import HostedDecoder
from mvkernels.errors import BackendError
from mvkernels.model import Engine, Generation, GenerationConfig
from mvkernels.model.checkpoint.loading import EMBEDDED
from mvkernels.model.engine.kv.request_kv import Entry
from mvkernels.model.engine.memory import make_cache
from mvkernels.model.engine.runner import Runner
from mvkernels.model.tasks.arithmetic import generate
from mvkernels.ops.decode.native import compile_reason
from mvkernels.ops.dense.linear_amx import tiles_reason
from tests.engine.cases import CASES, by_request, check_pages, config_for, follow
from tests.ops.tiles import as_bf16, takes_tiles, use_software
from tests.support.tiny_model import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(compile_reason() is not None, reason=str(compile_reason()))

NAMES = [*CASES, "nested", "two paths", "no block"]
PROMPTS = ["the product" + " of parts" * (7 * i % 11) + " so" * (i % 3) for i in range(len(NAMES))]


def bits(out: Generation) -> tuple[object, ...]:
    """All that is to be the same. Floats are compared as they are."""
    return out.token_ids, out.text, out.logprobs, out.top_logprobs, out.finish_reason


def tiny(strict: bool = True, **options: object) -> Engine:
    # Wide enough for activation functions to be cut between two threads.
    model = tiny_model(intermediate_size=1024) if options.pop("wide", False) else tiny_model()
    return Engine(model, tiny_tokenizer(), page_size=4, strict=strict, **options)


def run(engine: Engine, chosen: Sequence[int]) -> list[Generation]:
    """Some of the requests at once: each with a script, what it leaves open drawn at a temperature of its own."""
    configs = [
        config_for(
            engine,
            temperature=(0.0, 0.7, 1.3)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            repetition_penalty=(1.0, 1.2)[i % 4 == 3],
            seed=i,
            logprobs=2,
        )
        for i in chosen
    ]
    samplers = by_request([follow(engine, CASES[NAMES[i]]) for i in chosen])
    outs = engine.generate([PROMPTS[i] for i in chosen], configs, samplers)
    check_pages(engine)
    return outs


@pytest.mark.parametrize(
    ("threads", "products", "counts"),
    [(1, "native", (3, 6, 10)), (2, "hosted", (3,)), (2, "tiles", (3,))],
    ids=["native", "hosted, 2 threads", "matrix units, 2 threads"],
)
def test_alone_and_among_others(
    threads: int, products: str, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with pages so short that requests are preempted, and with steps of few tokens that cut prompts elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if products == "tiles" and tiles_reason() is not None:
            use_software(monkeypatch)
        decoder = "hosted" if products == "hosted" else "own"
        engine, small = (tiny(wide=True, decoder=decoder, num_pages=pages) for pages in (None, 90))
        for one in (engine, small):
            if products == "tiles":
                as_bf16(one.model)
        alone: dict[int, object] = {}
        order = random.Random(threads)
        for count in counts:
            chosen = order.sample(range(len(NAMES)), count)
            alone |= {i: bits(run(engine, [i])[0]) for i in chosen if i not in alone}
            for one in (engine, small):
                for i, out in zip(chosen, run(one, chosen), strict=True):
                    assert bits(out) == alone[i], f"{NAMES[i]} among {count}"
        assert small.preemptions > 0 or max(counts) < 6
        assert (products == "hosted") == (engine.decoder == "hosted")
        assert products == "hosted" or takes_tiles(engine._decoder) == (products == "tiles")
    finally:
        torch.set_num_threads(before)


def test_the_embedded_model_with_few_pages() -> None:
    """Blocks that it writes itself, at a temperature, with preemption."""
    engine = Engine.from_pretrained(EMBEDDED, strict=True)
    small = Engine(engine.model, engine.tokenizer, strict=True, num_pages=40, max_step_tokens=64)
    prompts = [problem.prompt() for problem in islice(generate(6, "test"), 3)]
    configs = [
        GenerationConfig(max_critical_path=70, temperature=0.8, seed=i, logprobs=1) for i in range(len(prompts) * 3)
    ]
    prompts = prompts * 3
    alone = [bits(engine.generate(*pair)[0]) for pair in zip(prompts, configs, strict=True)]
    for one, count in ((engine, 2), (engine, 5), (small, 9)):
        outs = one.generate(prompts[-count:], configs[-count:])
        assert [bits(out) for out in outs] == alone[-count:]
        check_pages(one)
    assert small.preemptions > 0
    assert any(out.layout.has_branches for out in outs)


def test_a_row_has_the_same_bits_in_every_place_and_in_prompts_cut_anywhere() -> None:
    """The logits of one token, from a step of its own and as the last of pieces of a prompt of 1100 tokens, which is
    more than one chunk of batch-invariant decoding."""
    logits = []
    ids = [13 * i % 250 for i in range(1100)]
    for pieces in ([64] * 18, [63, 1, 2, 33] * 12, [7] * 158):
        model = patch_model(tiny_model(max_positions=2048))
        cache = make_cache(model, 4, 300)
        runner = Runner(HostedDecoder(model), cache, constant_rows=64)
        branch, done = cache.new(), 0
        for piece in pieces:
            taken = ids[done : done + piece]
            if taken:
                entry = Entry(0, branch, done, len(taken))
                logits_now = runner.run([entry], taken, None, [0]).values
            done += len(taken)
        logits.append(logits_now)
    assert done == len(ids) and all(torch.equal(one, logits[0]) for one in logits)


def test_what_a_forward_refuses() -> None:
    model = patch_model(tiny_model())
    cache = make_cache(model, 4, 10)
    runner = Runner(HostedDecoder(model), cache, constant_rows=4)
    with pytest.raises(ValueError, match="expected at most 4 tokens in a step, got 5"):
        runner.run([Entry(0, cache.new(), 0, 5)], [1] * 5, None, [0])
    layout = BranchLayout.causal(3)
    with pytest.raises(ValueError, match="expected batch_invariant=True beside paged_kv="):
        model(torch.tensor([[1, 2, 3]]), branch_layout=layout, batch_invariant=True)
    step = cache.plan([(cache.new(), 2)])
    with pytest.raises(ValueError, match=r"expected inputs of shape \[1, 2\]"):
        model(torch.tensor([[1, 2, 3]]), paged_kv=(cache, step))
    cache.k[0].fill_(7.0)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 9, 9]]), paged_kv=(cache, step), batch_invariant=True).logits
    assert torch.isfinite(logits).all()
    assert int((cache.k[0] != 7.0).any(-1).any(-1).sum()) == 2, "spare rows are written nowhere"


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({"graph": True}, {}, "graph=True replays"),
        ({"backend": "cpu"}, {}, "expected the attention backend 'auto' or 'native', got 'cpu'"),
        ({}, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
    ],
    ids=["graph", "backend", "rope"],
)
def test_what_it_cannot_be_had_with(options: dict[str, object], changes: dict[str, object], reason: str) -> None:
    with pytest.raises(BackendError, match=f"strict=True cannot be kept: {reason}"):
        Engine(tiny_model(**changes), tiny_tokenizer(), strict=True, **options)
