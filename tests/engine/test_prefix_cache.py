"""The prefix cache: what requests share, what they must not, and what is given up for whom."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from mvkernels import PagedKVCache
from mvkernels.grammar import Kind
from mvkernels.model import Engine, Generation, GenerationConfig
from mvkernels.model.checkpoint.loading import EMBEDDED
from mvkernels.model.tasks.arithmetic import generate
from mvkernels.ops.decode.native import compile_reason
from tests.engine.cases import (
    CASES,
    TOLERANCE,
    by_request,
    check_pages,
    config_for,
    follow,
    preempted_before_every_step,
)
from tests.engine.cases import plain as plain_sampler
from tests.support.tiny_model import tiny_model, tiny_tokenizer

PAGE = 4
PLAIN = GenerationConfig(max_new_tokens=12, eos_token_ids=(), stop=(), max_depth=0, logprobs=0)


def make(**options: object) -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), page_size=PAGE, **options)


class Rows:
    """Counts the tokens that a model computes."""

    def __init__(self, engine: Engine) -> None:
        self.count = 0
        decoder = engine._decoder
        forward = decoder.forward

        def counted(ids: torch.Tensor, *args: Any) -> torch.Tensor:
            self.count += len(ids)
            return forward(ids, *args)

        decoder.forward = counted

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


def assert_same(found: Generation, expected: Generation, tolerance: float = TOLERANCE) -> None:
    """Token for token, and nearly the same log-probabilities."""
    assert (found.token_ids, found.text, found.finish_reason) == (
        expected.token_ids, expected.text, expected.finish_reason,
    )  # fmt: skip
    for one, other in zip(found.logprobs or [], expected.logprobs or [], strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or abs(one - other) < tolerance


def tokens(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(20, 280) for _ in range(count)]


def test_the_second_request_computes_what_is_new() -> None:
    engine, plain = make(), make(prefix_cache=False)
    rows = Rows(engine)
    prompt = tokens(23)
    [first] = engine.generate([prompt], PLAIN)
    assert rows.take() == 23 + 11 and engine.prefix_hits == 0
    [again] = engine.generate([prompt], PLAIN)
    assert rows.take() == 3 + 11 and engine.prefix_hits == 20  # five whole pages
    [other] = engine.generate([prompt[:10] + tokens(9, 1)], PLAIN)
    assert rows.take() == 11 + 11 and engine.prefix_hits == 20 + 8
    [expected] = plain.generate([prompt], PLAIN)
    assert plain.prefix_hits == 0
    assert_same(first, expected)
    assert_same(again, expected)
    assert_same(other, plain.generate([prompt[:10] + tokens(9, 1)], PLAIN)[0])
    check_pages(engine)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    engine = make()
    rows = Rows(engine)
    prompt = tokens(4 * PAGE)
    [first] = engine.generate([prompt], PLAIN)
    rows.take()
    [again] = engine.generate([prompt], PLAIN)
    assert rows.take() == PAGE + 11  # the last page, for the logits behind it
    assert_same(again, first)


def test_the_next_turn_of_a_chat_begins_behind_the_last_one() -> None:
    engine, plain = make(), make(prefix_cache=False)
    rows = Rows(engine)
    [first] = engine.generate([tokens(9)], PLAIN)
    rows.take()
    turn = first.token_ids + tokens(5, 2)
    [second] = engine.generate([turn], PLAIN)
    assert rows.take() < 5 + PAGE + 12 + 1
    assert_same(second, plain.generate([turn], PLAIN)[0])


def test_whole_blocks_are_found_again() -> None:
    """A prompt with the merged blocks of an earlier answer."""
    engine, plain = make(), make(prefix_cache=False)
    rows = Rows(engine)
    [whole] = engine.generate("the product", config_for(engine), follow(engine, CASES["nested"]))
    rows.take()
    cut = len(whole.token_ids) - 1
    prompt = whole.token_ids[:cut]
    [behind] = engine.generate([prompt], PLAIN)
    assert rows.take() < len(prompt) // 2 + 12
    assert_same(behind, plain.generate([prompt], PLAIN)[0])
    check_pages(engine)


def test_the_same_tokens_elsewhere_are_no_hit() -> None:
    """At other positions, and where one token in the first page differs."""
    engine = make()
    prompt = tokens(20)
    engine.generate([prompt], PLAIN)
    before = engine.prefix_hits
    engine.generate([tokens(1, 3) + prompt], PLAIN)
    engine.generate([[prompt[0] + 1, *prompt[1:]]], PLAIN)
    assert engine.prefix_hits == before


def test_tokens_behind_a_block_are_not_found_behind_its_text() -> None:
    """Without the tag that makes paths of it, the rest of an answer stands elsewhere and sees all before it."""
    engine, plain = make(), make(prefix_cache=False)
    [out] = engine.generate("the product", config_for(engine), follow(engine, CASES["two paths"]))
    first = engine.tags.id(Kind.PARALLEL)
    cut = out.token_ids.index(first)
    tags = {*engine.tags.ids}
    flat = out.token_ids[:cut] + [token for token in out.token_ids[cut:] if token not in tags]
    before = engine.prefix_hits
    [found] = engine.generate([flat], PLAIN)
    assert engine.prefix_hits - before == cut // PAGE * PAGE
    assert_same(found, plain.generate([flat], PLAIN)[0])


@pytest.mark.parametrize("prompt_tokens", [3, 16, 30])
def test_samples_of_a_prompt_compute_it_once(prompt_tokens: int) -> None:
    engine, plain = make(), make(prefix_cache=False)
    rows = Rows(engine)
    config = GenerationConfig(max_new_tokens=6, eos_token_ids=(), stop=(), max_depth=0, temperature=1.0, logprobs=0)
    prompt = tokens(prompt_tokens)
    outs = engine.generate([prompt], config, n=8)
    shared = (prompt_tokens - 1) // PAGE * PAGE
    assert rows.take() == shared + 8 * (prompt_tokens - shared + 5)
    for one, other in zip(outs, plain.generate([prompt], config, n=8), strict=True):
        assert_same(one, other)
    assert len({tuple(one.token_ids) for one in outs}) > 1
    check_pages(engine)


def test_prefixes_go_before_any_request_does() -> None:
    """Pages that only prefixes hold are there for whoever needs them; nobody is preempted for them."""
    engine, plain = make(num_pages=20), make(prefix_cache=False)
    for seed in range(6):
        prompt = tokens(40, seed)
        assert_same(engine.generate([prompt], PLAIN)[0], plain.generate([prompt], PLAIN)[0])
        engine.cache.check()
        assert engine.available_pages == engine.cache.num_pages
    assert engine.preemptions == 0
    check_pages(engine)


def test_the_prefix_that_was_not_used_for_longest_goes_first() -> None:
    engine = make(num_pages=24)
    first, second = tokens(28, 0), tokens(28, 1)  # seven pages each
    config = replace(PLAIN, max_new_tokens=1)
    for prompt in (first, second, first):
        engine.generate([prompt], config)
    engine.generate([tokens(60, 2)], config)  # 15 pages, of which 10 are free
    found = []
    for prompt in (first, second):
        before = engine.prefix_hits
        engine.generate([prompt], config)
        found.append(engine.prefix_hits - before)
    assert found == [24, 8]


def test_a_request_that_is_computed_again_finds_what_it_had() -> None:
    """Preempted before every step: only the last page, and the paths that are open, are computed again."""
    engine, plain = make(), make(prefix_cache=False)
    [expected] = plain.generate("the product", config_for(plain), follow(plain, CASES["one after the other"]))
    counts = []
    for other in (engine, plain):
        rows, before = Rows(other), other.preemptions
        with preempted_before_every_step():
            [out] = other.generate("the product", config_for(other), follow(other, CASES["one after the other"]))
        assert_same(out, expected)
        assert other.preemptions - before > 10
        counts.append(rows.take())
        check_pages(other)
    assert counts[0] < counts[1] / 2


def test_random_requests_with_common_beginnings_and_few_pages() -> None:
    """The same text as without the cache, with preemptions, evictions and hits; the cache is whole after each step."""
    engine, plain = make(num_pages=110, max_step_tokens=40), make(prefix_cache=False)
    forward = engine._decoder.forward

    def checked(*args: Any) -> torch.Tensor:
        engine.cache.check()
        return forward(*args)

    engine._decoder.forward = checked
    draw = random.Random(0)
    beginnings = [tokens(40, seed) for seed in range(3)]
    blocks = {}
    for name in CASES:  # whole answers, which others begin with
        [out] = plain.generate("the product", config_for(plain), follow(plain, CASES[name]))
        blocks[name] = out.token_ids[:-1]
    for _ in range(3):
        names = [draw.choice(list(CASES)) for _ in range(6)]
        prompts = [
            (blocks[draw.choice(names)] if draw.random() < 0.4 else draw.choice(beginnings)[: draw.randrange(2, 40)])
            + tokens(draw.randrange(4), 9)
            for _ in names
        ]
        configs = [config_for(engine, logprobs=0)] * len(names)
        outs = engine.generate(prompts, configs, by_request([follow(engine, CASES[name]) for name in names]))
        for prompt, name, out in zip(prompts, names, outs, strict=True):
            assert_same(out, plain.generate([prompt], configs[0], follow(plain, CASES[name]))[0])
        assert engine.available_pages == engine.cache.num_pages
    assert engine.prefix_hits > 300 and engine.preemptions > 3
    check_pages(engine)


@pytest.mark.skipif(compile_reason() is not None, reason=str(compile_reason()))
def test_a_strict_engine_has_the_same_bits_behind_what_it_finds() -> None:
    """Cold and warm, each alone and all at once with few pages, where they are preempted."""
    engine, plain = make(strict=True, num_pages=90), make(strict=True, prefix_cache=False)
    config, names = config_for(engine, logprobs=0, temperature=0.8), ["nested", "two paths", "nested", "small nested"]
    prompts = ["the product", "the product of the parts", "the product of the sum", "the product of the parts"]
    pairs = list(zip(prompts, names, strict=True))
    alone = [plain.generate(prompt, config, follow(plain, CASES[name]))[0] for prompt, name in pairs]
    rounds = []
    for together in (False, True, True):
        before = engine.prefix_hits, engine.preemptions
        if together:
            sampler = by_request([follow(engine, CASES[name]) for name in names])
            outs = engine.generate(prompts, config, sampler)
        else:
            outs = [engine.generate(prompt, config, follow(engine, CASES[name]))[0] for prompt, name in pairs]
        for out, wanted in zip(outs, alone, strict=True):
            assert out.token_ids == wanted.token_ids and out.logprobs == wanted.logprobs
        rounds.append((engine.prefix_hits - before[0], engine.preemptions - before[1]))
    assert all(hits for hits, _ in rounds) and all(preempted for _, preempted in rounds[1:]), rounds
    check_pages(engine)


def test_released_semantics() -> None:
    """Positions of the engine's own are part of what is compared."""
    engine, plain = make(semantics="released"), make(semantics="released", prefix_cache=False)
    for case in ("two paths", "nested"):
        [whole] = engine.generate("the product", config_for(engine), follow(engine, CASES[case]))
        for cut in (len(whole.token_ids) - 1, len(whole.token_ids) // 2):
            prompt = [whole.token_ids[:cut]]
            config = config_for(engine, max_new_tokens=60, logprobs=0)
            before = engine.prefix_hits
            outs = [e.generate(prompt, config, plain_sampler(e))[0] for e in (engine, plain)]
            assert_same(*outs)
            assert engine.prefix_hits > before
    check_pages(engine)


def test_the_embedded_model_has_the_same_answers() -> None:
    """Problems with one beginning, in parallel; all of it is found the second time."""
    engine, plain = (Engine.from_pretrained(EMBEDDED, page_size=PAGE, prefix_cache=on) for on in (True, False))
    prompts = [problem.prompt() for problem in islice(generate(2, "test"), 6)]
    config = GenerationConfig(max_new_tokens=300, logprobs=0)
    expected = plain.generate(prompts, config)
    for _ in range(2):
        for out, wanted in zip(engine.generate(prompts, config), expected, strict=True):
            assert_same(out, wanted, 1e-3)
    assert engine.prefix_hits and any(out.layout.has_branches for out in expected)
    check_pages(engine)


@pytest.mark.parametrize("kind", ["exception", "NaN"])
@pytest.mark.parametrize("graph", [False, True])
def test_what_failed_is_not_found(kind: str, graph: bool) -> None:
    """Neither what was never computed nor, in pieces of a prompt whose logits nobody asked for, what is no number."""
    engine, plain = make(max_step_tokens=8, graph=graph, decoder="hosted"), make(prefix_cache=False)
    prompt = tokens(23)

    def spoil(module: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        if kind == "exception" and args[0].shape[1] < 8:
            raise RuntimeError("a fault")
        return torch.full_like(out, torch.nan) if kind == "NaN" else out

    hook = engine.model.model.layers[0].register_forward_hook(spoil)
    [failed] = engine.generate([prompt], PLAIN)
    hook.remove()
    assert failed.finish_reason == "error"
    [out] = engine.generate([prompt], PLAIN)
    assert engine.prefix_hits == 0
    assert_same(out, plain.generate([prompt], PLAIN)[0])
    check_pages(engine)


@pytest.mark.parametrize("name", ["fork_at", "free"])
def test_a_fault_at_any_call_of_the_cache(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It ends one request at most; the others, and the prefixes, are what they are without."""
    engine, plain = make(num_pages=24), make(prefix_cache=False)
    function, prompts = getattr(PagedKVCache, name), [tokens(30, 1), tokens(20, 1), tokens(30, 2), tokens(30, 1)]
    expected = plain.generate(prompts, PLAIN)
    left, calls, failed = 0, 0, 0

    def fault(*args: object, **options: object) -> object:
        nonlocal left, calls
        left, calls = left - 1, calls + 1
        if left == -1:
            raise OSError("a fault")
        return function(*args, **options)

    at = most = 0
    while at <= most:
        left, calls = at, 0
        with monkeypatch.context() as patch:
            patch.setattr(PagedKVCache, name, fault)
            outs = engine.generate(prompts, PLAIN)
        wrong = [out for out in outs if out.finish_reason == "error"]
        assert len(wrong) <= 1 and all(out.error == "OSError: a fault" for out in wrong)
        for out, wanted in zip(outs, expected, strict=True):
            if out not in wrong:
                assert_same(out, wanted)
        assert engine.available_pages == engine.cache.num_pages
        engine.cache.check()
        at, most, failed = at + 1, max(most, calls), failed + len(wrong)
    assert failed and most > 5
    check_pages(engine)


def test_weights_that_change_make_prefixes_void() -> None:
    engine = make()
    prompt = tokens(23)
    engine.generate([prompt], PLAIN)
    with torch.no_grad():
        engine.model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    [out] = engine.generate([prompt], PLAIN)
    assert engine.prefix_hits == 0
    other = Engine(engine.model, engine.tokenizer, page_size=PAGE, prefix_cache=False)
    assert_same(out, other.generate([prompt], PLAIN)[0])


def test_weights_that_lie_where_others_have_lain() -> None:
    """The second of two replacements would come to lie where the first weights did, if their memory were not held."""
    engine = make()
    engine.model.extra = torch.nn.Parameter(torch.zeros(2**17 + 16, 64), requires_grad=False)
    prompt = tokens(23)
    for _ in range(3):
        engine.generate([prompt], PLAIN)
        assert engine.prefix_hits == 0
        for _ in range(2):
            engine.model.extra.data = torch.zeros(2**17 + 16, 64)


def test_prefixes_are_cleared_on_request() -> None:
    engine = make()
    prompt = tokens(23)
    engine.generate([prompt], PLAIN)
    engine.clear_prefixes()
    assert engine.cache.num_free_pages == engine.cache.num_pages
    engine.generate([prompt], PLAIN)
    assert engine.prefix_hits == 0


def test_a_cancelled_stream_leaves_only_prefixes() -> None:
    engine = make()
    for stop in (1, 5, 9):
        with engine.stream([tokens(20)], PLAIN) as events:
            for _, _ in zip(range(stop), events, strict=False):
                pass
        engine.cache.check()
        assert engine.available_pages == engine.cache.num_pages
    check_pages(engine)
