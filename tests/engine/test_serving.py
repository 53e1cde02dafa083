"""The engine as a server: preemption, pieces of prompts, threads and tasks that share it, cancelling at any moment."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from contextlib import suppress

import pytest
import torch

from mvkernels.model import Engine
from mvkernels.model.engine.engine import FinishEvent, TokenEvent
from tests.engine.cases import (
    CASES,
    TOLERANCE,
    by_request,
    check_pages,
    config_for,
    follow,
    plain,
    preempted_before_every_step,
)
from tests.engine.lossless import Recorder, check_lossless

pytestmark = pytest.mark.usefixtures("all_pages_come_back")


# ---- preemption, prompts in pieces


@pytest.mark.parametrize("name", CASES)
def test_lossless_with_preemption_at_every_step(engine: Engine, name: str) -> None:
    [expected] = engine.generate("the product", config_for(engine), follow(engine, CASES[name]))
    recorder, before = Recorder(follow(engine, CASES[name])), engine.preemptions
    with preempted_before_every_step():
        [out] = engine.generate("the product", config_for(engine), recorder)
    assert engine.preemptions - before > len(recorder.seen) / 8
    assert out.token_ids == expected.token_ids and out.finish_reason == "stop"
    assert torch.equal(out.layout.position_ids, expected.layout.position_ids)
    assert check_lossless(engine, recorder, out, TOLERANCE) == len(recorder.seen)


@pytest.mark.parametrize(
    "limits", [{"max_step_tokens": 3}, {"max_step_width": 1}, {"max_requests": 1}, {"graph": True}], ids=str
)
def test_limits_of_a_step_change_no_token(engine: Engine, limits: dict[str, int]) -> None:
    names = list(CASES)
    other = Engine(engine.model, engine.tokenizer, page_size=4, **limits)
    prompts = ["the product " + "parts of the sum " * i for i in range(len(names))]
    alone = [
        engine.generate(prompt, config_for(engine), follow(engine, CASES[name]))[0]
        for prompt, name in zip(prompts, names, strict=True)
    ]
    recorder = Recorder(by_request([follow(other, CASES[name]) for name in names]))
    outs = other.generate(prompts, config_for(engine), recorder)
    for i, (out, expected) in enumerate(zip(outs, alone, strict=True)):
        assert out.token_ids == expected.token_ids and out.text == expected.text
        if names[i] == "nested":
            check_lossless(other, recorder, out, TOLERANCE, i)
    check_pages(other)


def test_a_long_prompt_does_not_hold_up_who_decodes(engine: Engine) -> None:
    other = Engine(engine.model, engine.tokenizer, page_size=4, max_step_tokens=16)
    order = []

    def watch(views, logits):
        order.extend(view.request for view in views)
        return plain(other)(views, logits)

    outs = other.generate(["so", [20] * 150], config_for(engine, max_new_tokens=20), watch)
    assert [out.steps for out in outs] == [20, 10 + 19], "15 tokens a step, the last ones with the first choice"
    assert order[:10] == [0] * 10 and order[10] == 1


@pytest.mark.parametrize("name", ["max_step_tokens", "max_step_width", "max_requests"])
def test_limits_out_of_range(engine: Engine, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        Engine(engine.model, engine.tokenizer, **{name: 0})


def test_pages_for_a_share_of_the_memory(engine: Engine) -> None:
    engine.generate("so", config_for(engine, max_new_tokens=1))
    assert engine.cache is not None and 1000 < engine.cache.num_pages <= 2**16


# ---- several samples


def test_samples_of_one_prompt(engine: Engine) -> None:
    config = config_for(engine, temperature=1.0, max_new_tokens=12)
    outs = engine.generate(["the product", "so"], config, plain(engine), n=3)
    assert len(outs) == 6 and len({out.text for out in outs[:3]}) == 3
    assert {tuple(out.token_ids[: out.prompt_length]) for out in outs[:3]} == {tuple(engine.tags.encode("the product"))}
    [first] = engine.generate("the product", config, plain(engine))
    assert first.token_ids == outs[0].token_ids, "the first sample is the one without n"
    again = engine.generate(["so", "the product"], config, plain(engine), n=3)
    assert [out.token_ids for out in again] == [out.token_ids for out in (*outs[3:], *outs[:3])]
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        engine.generate("so", n=0)


# ---- threads


def test_threads_share_the_steps(engine: Engine) -> None:
    names = list(CASES)
    alone = {name: engine.generate("the", config_for(engine), follow(engine, CASES[name]))[0] for name in names}
    outs: dict[str, list] = {name: [] for name in names}

    def work(name: str) -> None:
        for _ in range(3):
            outs[name] += engine.generate("the", config_for(engine), follow(engine, CASES[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert {name: [out.token_ids for out in found] for name, found in outs.items()} == {
        name: [alone[name].token_ids] * 3 for name in names
    }


def test_a_sampler_that_raises_ends_its_own_call(engine: Engine) -> None:
    """Of calls that share steps, the others go on; so they do when a stream is left."""

    def fails(views, logits):
        if any(view.drawn == 9 for view in views):
            raise KeyError("mine")
        return plain(engine)(views, logits)

    config = config_for(engine, max_new_tokens=30)
    [expected] = engine.generate("the", config, plain(engine))
    good, bad, left = (engine.stream("the", config, sampler) for sampler in (plain(engine), fails, plain(engine)))
    next(good), next(bad), next(left)
    assert len(engine._core.scheduler) == 3
    with pytest.raises(KeyError, match="mine"):
        list(bad)
    assert list(bad) == []
    del left
    gc.collect()
    assert len(engine._core.scheduler) == 1
    [end] = [event for event in good if isinstance(event, FinishEvent)]
    assert end.generation.token_ids == expected.token_ids


def test_a_sampler_cannot_wait_for_its_own_engine(engine: Engine) -> None:
    def asks(views, logits):
        engine.generate("so")

    with pytest.raises(RuntimeError, match="expected a call from outside of a step, got one from a sampler"):
        engine.generate("the", config_for(engine), asks)


def test_an_interrupt_loses_nothing_of_others(engine: Engine) -> None:
    config = config_for(engine, max_new_tokens=30)
    [expected] = engine.generate("the", config, plain(engine))
    stream = engine.stream("the", config, plain(engine))
    events = [next(stream) for _ in range(10)]

    def interrupted(views, logits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate("so", config, interrupted)
    events += stream
    assert events[-1].generation.token_ids == expected.token_ids
    assert sum(isinstance(event, TokenEvent) for event in events) == 30


def test_cancelling_keeps_the_text_so_far(engine: Engine) -> None:
    config = config_for(engine, max_new_tokens=30)
    [expected] = engine.generate("the", config, plain(engine))
    stream = engine.stream(["the", "so"], config, plain(engine))
    while sum(isinstance(event, TokenEvent) for event in (next(stream),)) and stream._core.scheduler.running:
        if all(request.steps == 7 for request in stream._call.requests):
            break
    stream.cancel()
    ends = [event.generation for event in stream if isinstance(event, FinishEvent)]
    assert [out.finish_reason for out in ends] == ["cancelled"] * 2
    assert ends[0].token_ids == expected.token_ids[: len(ends[0].token_ids)] and ends[0].total_tokens == 7
    assert list(stream) == []


def test_closing_before_the_first_event_and_after_the_last(engine: Engine) -> None:
    stream = engine.stream("the", config_for(engine, max_new_tokens=3), plain(engine))
    stream.close()
    assert list(stream) == []
    stream = engine.stream("the", config_for(engine, max_new_tokens=3), plain(engine))
    assert len(list(stream)) == 4
    stream.close()
    with engine.stream("the", config_for(engine, max_new_tokens=3), plain(engine)) as stream:
        next(stream)
    assert list(stream) == []


# ---- tasks


async def collect(stream) -> list:
    return [event async for event in stream]


def test_events_of_tokens_are_made_for_those_who_read_them(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(
        "mvkernels.model.engine.request.TokenEvent", lambda *given: made.append(given) or TokenEvent(*given)
    )
    [out] = engine.generate("the product", config_for(engine), follow(engine, CASES["nested"]))
    assert not made
    told = [*engine.stream("the product", config_for(engine), follow(engine, CASES["nested"]))]
    assert sum(isinstance(one, TokenEvent) for one in told) == len(made) == out.total_tokens


def test_tasks_share_one_batch(engine: Engine) -> None:
    names = list(CASES)
    alone = {
        name: list(engine.stream("the product", config_for(engine), follow(engine, CASES[name]))) for name in names
    }
    widest = 0

    def watched(name: str):
        sampler = follow(engine, CASES[name])

        def choose(views, logits):
            nonlocal widest
            widest = max(widest, len(engine._core.scheduler.running))
            return sampler(views, logits)

        return choose

    async def main() -> list[list]:
        streams = [engine.astream("the product", config_for(engine), watched(name)) for name in names]
        return await asyncio.gather(*map(collect, streams))

    for name, events in zip(names, asyncio.run(main()), strict=True):
        assert events == alone[name]
    assert widest == len(names)


def test_tasks_are_cancelled_at_any_moment(engine: Engine) -> None:
    alone = list(engine.stream("the", config_for(engine), follow(engine, CASES["nested"])))
    chosen = random.Random(0)

    async def one(kind: str) -> list:
        stream = engine.astream("the", config_for(engine), follow(engine, CASES["nested"]))
        events = []
        stop = chosen.randrange(len(alone))
        async for event in stream:
            events.append(event)
            if kind != "whole" and len(events) > stop:
                break
        if kind == "close":
            await stream.aclose()
            assert await collect(stream) == []
        elif kind == "cancel":
            stream.cancel()
            events += await collect(stream)
            assert events[-1].generation.finish_reason in ("cancelled", "stop")
        return events

    async def main() -> None:
        kinds = ["whole", "close", "drop", "cancel", "task", "context"] * 4
        tasks = [asyncio.create_task(one("whole" if kind in ("task", "context") else kind)) for kind in kinds]
        for kind, task in zip(kinds, tasks, strict=True):
            if kind == "task":
                await asyncio.sleep(chosen.random() / 20)
                task.cancel()
        for kind, task in zip(kinds, tasks, strict=True):
            with suppress(asyncio.CancelledError):
                events = await task
                if kind == "whole":
                    assert events == alone
        async with engine.astream("the", config_for(engine), follow(engine, CASES["nested"])) as stream:
            await anext(stream)
        del task, tasks
        gc.collect()

    asyncio.run(main())
    engine._core.until(lambda: not engine._core.busy, steps=False)


def test_an_event_loop_that_ends_cancels_what_it_left(engine: Engine) -> None:
    kept = []

    async def main() -> None:
        kept.append(engine.astream("the", config_for(engine), follow(engine, CASES["nested"])))
        await anext(kept[0])

    asyncio.run(main())
    [out] = engine.generate("the", config_for(engine, max_new_tokens=20), plain(engine))
    assert out.total_tokens == 20
    engine._core.until(lambda: not engine._core.busy, steps=False)
    check_pages(engine)


def test_a_sampler_that_raises_in_a_task(engine: Engine) -> None:
    def fails(views, logits):
        raise KeyError("mine")

    async def main() -> None:
        good = asyncio.create_task(collect(engine.astream("the", config_for(engine, max_new_tokens=9), plain(engine))))
        with pytest.raises(KeyError, match="mine"):
            await collect(engine.astream("the", config_for(engine), fails))
        assert (await good)[-1].generation.total_tokens == 9
        assert engine.generate("so", config_for(engine, max_new_tokens=2), plain(engine))[0].total_tokens == 2

    asyncio.run(main())


def test_bad_prompts_are_refused_before_anything_is_awaited(engine: Engine) -> None:
    with pytest.raises(ValueError, match="at least one token, got an empty prompt"):
        engine.astream("")
