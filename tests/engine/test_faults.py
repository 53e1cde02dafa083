"""The engine when something goes wrong or is left: page shortage, faults, streams, bad prompts; text as it grows."""

from __future__ import annotations

import warnings

import pytest
import torch

from mvkernels import OutOfPages
from mvkernels.model import Engine, Generation, GenerationConfig
from mvkernels.model.engine.engine import FinishEvent
from tests.engine.cases import CASES, CONCLUDE, check_pages, config_for, follow, goal, plain
from tests.support.tiny_model import END, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("all_pages_come_back")


# ---- pages


def test_whoever_has_to_make_room_is_computed_again(engine: Engine) -> None:
    config = config_for(engine, max_new_tokens=40)
    expected = [engine.generate(prompt, config, plain(engine))[0] for prompt in ("the", "two", "so")]
    pages = [-(-len(out.token_ids) // 4) for out in expected]
    small = Engine(engine.model, engine.tokenizer, page_size=4, num_pages=pages[0] + pages[1] + 3)
    outs = small.generate(["the", "two", "so"], config, plain(small))
    assert small.preemptions > 0
    assert [out.finish_reason for out in outs] == ["max_new_tokens"] * 3
    assert [out.token_ids for out in outs] == [out.token_ids for out in expected]
    check_pages(small)


def test_a_request_that_is_alone_and_has_no_page_ends_with_its_text(engine: Engine) -> None:
    config = config_for(engine, max_new_tokens=40)
    [expected] = engine.generate("the", config, plain(engine))
    small = Engine(engine.model, engine.tokenizer, page_size=4, num_pages=5)
    outs = small.generate(["the", "two"], config, plain(small))
    assert [out.finish_reason for out in outs] == ["out_of_pages"] * 2
    assert outs[0].token_ids == expected.token_ids[:21], "all that fits, and the token that was sampled behind it"
    check_pages(small)


def test_a_prompt_that_never_fits_is_an_error(engine: Engine) -> None:
    small = Engine(engine.model, engine.tokenizer, page_size=4, num_pages=3)
    with pytest.raises(OutOfPages, match="prompt 1: expected at most 3 pages to be needed, got 4"):
        small.generate([[20] * 4, [20] * 13])


def test_pages_by_themselves_are_enough_for_the_widest_output(engine: Engine) -> None:
    """As many nodes as tokens can make: blocks of empty paths, one after the other, in pages of many tokens."""
    big = Engine(engine.model, engine.tokenizer, page_size=64)
    case = {"": f"{goal('1:', '2:', '3:', '4:')}{CONCLUDE}" * 3 + END}
    case |= {str(i): "</Path></Path></Path>" for i in range(1, 5)}
    [whole] = big.generate("the", config_for(engine), follow(big, case))
    assert whole.finish_reason == "stop"
    [out] = big.generate("the", config_for(engine, max_new_tokens=whole.total_tokens), follow(big, case))
    assert out.token_ids == whole.token_ids
    check_pages(big)


# ---- faults and streams


def test_a_stream_left_half_way_returns_its_pages(engine: Engine) -> None:
    events = list(engine.stream("the", config_for(engine), follow(engine, CASES["nested"])))
    for count in range(0, len(events), 19):
        stream = engine.stream("the", config_for(engine), follow(engine, CASES["nested"]))
        assert [next(stream) for _ in range(count)] == events[:count]
        stream.close()
        check_pages(engine)


def test_two_streams_at_once(engine: Engine) -> None:
    names = ["two paths", "nested"]
    alone = [engine.generate("the", config_for(engine), follow(engine, CASES[name]))[0] for name in names]
    streams = [engine.stream("the", config_for(engine), follow(engine, CASES[name])) for name in names]
    ends: list[Generation] = []
    while streams:
        for stream in list(streams):
            event = next(stream, None)
            if event is None:
                streams.remove(stream)
            elif isinstance(event, FinishEvent):
                ends.append(event.generation)
    assert sorted(out.text for out in ends) == sorted(out.text for out in alone)


@pytest.mark.parametrize("at", [0, 1, 30, 45])
def test_an_exception_in_a_sampler_comes_out_and_returns_the_pages(engine: Engine, at: int) -> None:
    sampler, calls = follow(engine, CASES["nested"]), 0

    def fails(views, logits):
        nonlocal calls
        calls += 1
        if calls > at:
            raise RuntimeError("no luck")
        return sampler(views, logits)

    with pytest.raises(RuntimeError, match="no luck"):
        engine.generate("the", config_for(engine), fails)
    check_pages(engine)
    assert engine.generate("the", config_for(engine), follow(engine, CASES["two paths"]))[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1, 2], "expected 1 tokens, one for each branch, got 2"), ([300], "from 0 to 299, got 300"), ([-1], "got -1")],
)
def test_a_bad_sampler_is_named(engine: Engine, tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"sampler: .*{message}"):
        engine.generate("the", config_for(engine), lambda views, logits: tokens)


def test_training_mode_is_restored(engine: Engine) -> None:
    engine.model.train()
    engine.generate("the", config_for(engine, max_new_tokens=2))
    assert engine.model.training and all(module.training for module in engine.model.modules())
    engine.model.eval()


# ---- prompts


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "at least one token, got an empty prompt"),
        ([[]], "expected texts, chats or lists of token ids"),
        ([20, 300], "from 0 to 299, got 300"),
        (7, "expected a text, a list of prompts, or token ids, got int"),
        ([None], "expected texts, chats or lists of token ids, got None"),
    ],
    ids=["empty text", "no ids", "id out of range", "number", "none"],
)
def test_bad_prompts(engine: Engine, prompts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts)
    with pytest.raises(ValueError, match=message):
        engine.stream(prompts)


def test_prompts_in_every_form(engine: Engine) -> None:
    config = config_for(engine, max_new_tokens=5)
    ids = engine.tokenizer.encode("two digits")
    array = torch.tensor(ids).numpy()
    forms = ["two digits", ["two digits"], ids, [ids], torch.tensor(ids), [torch.tensor(ids)], array, [*array]]
    outs = [engine.generate(form, config, plain(engine)) for form in forms]
    assert all(len(out) == 1 and out[0].token_ids == outs[0][0].token_ids for out in outs)
    messages = [{"role": "user", "content": "two digits"}]
    chat = engine.tokenizer.encode("user: two digits\nbot: ")
    outs = engine.generate([messages, messages], config, plain(engine))
    for out in (engine.chat(messages, config, plain(engine)), *outs):
        assert out.token_ids[: out.prompt_length] == chat
    assert engine.generate([]) == []
    with pytest.raises(ValueError, match="one config for each of 2 prompts, got 1"):
        engine.generate(["two", "so"], [config])
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="a tokenizer with a chat template, got one without"):
        Engine(engine.model, tokenizer).chat(messages)


def test_a_begin_of_text_token_comes_before_a_text_and_not_before_a_chat(engine: Engine) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    other = Engine(engine.model, tokenizer)
    config = config_for(engine, max_new_tokens=1)
    assert other.generate("two <Think>\n", config)[0].token_ids[:-1] == [0, *engine.tags.encode("two <Think>\n")]
    [out] = other.generate([[{"role": "user", "content": "a"}]], config)
    assert out.token_ids[:-1] == engine.tags.encode("user: a\nbot: ")


# ---- without tags


def test_without_tags_it_is_greedy_generate_token_for_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tags=False)
    prompts = ["two digits", "the sum of the parts is", "so"]
    model.generation_config.pad_token_id = 0
    expected = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        expected.append(model.generate(ids, do_sample=False, max_new_tokens=32)[0].tolist())
    with pytest.warns(UserWarning, match="sequentially.*without <Think>"):
        engine = Engine(model, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once, not at every call
        config = GenerationConfig(max_new_tokens=32)
        together = engine.generate(prompts, config)
        alone = [engine.generate(prompt, config)[0] for prompt in prompts]
    assert [out.token_ids for out in together] == [out.token_ids for out in alone] == expected
    for out in together:
        assert out.parallelism == 1.0 and out.critical_path == out.total_tokens == out.steps == 32
        assert not out.layout.has_branches
    check_pages(engine)


# ---- pages


@pytest.mark.parametrize(("page_size", "num_pages"), [(0, None), (-4, None), (4, 0), (4, -1)])
def test_pages_out_of_range(page_size: int, num_pages: int | None) -> None:
    with pytest.raises(ValueError, match=f"at least 1.*got {page_size} and {num_pages}"):
        Engine(tiny_model(), tiny_tokenizer(), page_size=page_size, num_pages=num_pages)


def test_pages_that_do_not_fit_into_memory(engine: Engine, monkeypatch) -> None:
    def refuse(shape, **options):
        raise RuntimeError(f"[enforce fail] DefaultCPUAllocator: can't allocate memory for {shape}")

    full = Engine(engine.model, engine.tokenizer, page_size=4)
    monkeypatch.setattr("mvkernels.cache.cache.torch.empty", refuse)
    with pytest.raises(OutOfPages, match=r"that fits into memory, got .* pages of 4 tokens: lower num_pages"):
        full.generate("the")
