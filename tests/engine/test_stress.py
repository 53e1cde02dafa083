"""Many requests, any output, faults anywhere: everything ends, nothing leaks, and nobody else's text changes.

`MVKERNELS_FULL=1` runs the full sizes: 1000 requests with few pages, 10000 of random tokens, a fault at every call.
"""

from __future__ import annotations

import copy
import os
import random
from dataclasses import replace

import pytest
import torch

from mvkernels import PagedKVCache
from mvkernels.decoder import native
from mvkernels.decoder.torch import TorchDecoder
from mvkernels.model import Engine, Generation
from mvkernels.model.engine.request import Request
from mvkernels.model.evaluation.stress import Summary, any_tokens, main, same_text, serve
from mvkernels.ops.decode.native import compile_reason
from mvkernels.ops.dense.layer import layer_reason
from tests.engine.cases import CASES, by_request, check_pages, config_for, follow, plain

FULL = bool(os.environ.get("MVKERNELS_FULL"))
pytestmark = [pytest.mark.timeout(0)] if FULL else []


# ---- pages are short, callers leave


def test_many_requests_with_tags_cancels_and_few_pages(engine: Engine) -> None:
    count, chosen = 1000 if FULL else 60, random.Random(0)
    small = Engine(engine.model, engine.tokenizer, page_size=4, num_pages=100, max_step_tokens=64)
    names = list(CASES)
    alone: dict[tuple[str, str], Generation] = {}
    streams, wanted = [], []
    for _ in range(count):
        name, prompt = chosen.choice(names), "the product" + " of parts" * chosen.choice([0, 1, 5, 20])
        if (name, prompt) not in alone:
            [alone[name, prompt]] = engine.generate(prompt, config_for(engine), follow(engine, CASES[name]))
        streams.append(small.stream(prompt, config_for(small), follow(small, CASES[name])))
        wanted.append(alone[name, prompt])
    served = serve(streams, chosen)
    assert set(served.ends) == set(range(count)) - served.closed and served.cancelled and served.closed
    for number, out in served.ends.items():
        expected = wanted[number]
        if out.finish_reason == "cancelled":
            assert number in served.cancelled
        else:
            assert out.finish_reason == "stop" and out.token_ids == expected.token_ids and out.text == expected.text
    assert small.preemptions > count / 20
    check_pages(small)


# ---- any output at all: the command, with fewer requests


@pytest.mark.parametrize("grammar", [True, False], ids=["grammar", "any token"])
def test_a_model_of_random_tokens(engine: Engine, grammar: bool) -> None:
    count, summary = 5000 if FULL else 150, Summary("")
    any_tokens(engine.model, engine.tokenizer, count, 0, summary, grammar)
    assert summary.requests == count and summary.forked > count / 20 and summary.preemptions and summary.closed
    assert set(summary.reasons) == {"stop", "max_new_tokens", "max_critical_path", "cancelled"}


@pytest.mark.skipif(compile_reason() is not None, reason=str(compile_reason()))
def test_the_text_is_that_of_the_request_alone(engine: Engine) -> None:
    summary = Summary("")
    same_text(engine.model, engine.tokenizer, 40, 0, summary)
    assert summary.requests == 40 and summary.forked > 4 and summary.preemptions


def test_the_command_says_how_to_see_a_violation_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--requests", "4", "--same", "0", "--seed", "3"]) == 0
    assert "any tokens, grammar      2 requests" in capsys.readouterr().out
    monkeypatch.setattr(PagedKVCache, "num_free_pages", 1)
    assert main(["--requests", "4", "--same", "0", "--seed", "3"]) == 1
    said = capsys.readouterr().out
    assert "any tokens, grammar: Violation: expected 160 free pages and no bytes moved, got 1 and 0" in said
    assert "stress --seed 3 --same 0 --requests 4" in said


# ---- faults

NAMES = ["two paths", "nested", "small nested"]


def run_all(engine: Engine) -> list[Generation]:
    sampler = by_request([follow(engine, CASES[name]) for name in NAMES])
    return engine.generate(["the", "two", "so"], config_for(engine), sampler)


def check_others(outs: list[Generation], expected: list[Generation], faulty: set[int], error: str) -> None:
    for number, (out, wanted) in enumerate(zip(outs, expected, strict=True)):
        if number in faulty:
            assert out.finish_reason == "error" and error in str(out.error)
            assert Generation.from_json(out.to_json()) == out
        else:
            assert out.finish_reason == "stop" and out.token_ids == wanted.token_ids and out.error is None


class Fault:
    """Raises at one call of a function, and counts the calls."""

    def __init__(self, function, at: int) -> None:
        self.function, self.left, self.calls = function, at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        self.left -= 1
        if self.left == -1:
            raise OSError("a fault")
        return self.function(*args, **kwargs)


CALLS = ["new", "fork", "merge", "plan", "append", "run_layers", "commit", "rollback", "free", "evict"]


@pytest.mark.parametrize("name", CALLS)
def test_a_fault_at_any_call_of_the_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It comes once: requests that share the step get on in its second run; one that is alone with it ends.

    The native decoder appends within `run_layers`, a hosted one by `append`.
    """
    expected = run_all(engine)
    owner: object = PagedKVCache
    if name == "run_layers":
        owner = native
        if layer_reason() is not None:
            pytest.skip(str(layer_reason()))
    decoder = "hosted" if name == "append" else "auto"
    small = Engine(copy.deepcopy(engine.model), engine.tokenizer, page_size=4, num_pages=80, decoder=decoder)
    run_all(small)
    at, failed, calls = 0, 0, 1
    while at < calls:
        fault = Fault(getattr(owner, name), at)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, fault=fault, **kwargs: fault(*args, **kwargs))
            outs = run_all(small)
        faulty = {number for number, out in enumerate(outs) if out.finish_reason == "error"}
        check_others(outs, expected, faulty, "OSError: a fault")
        assert len(faulty) <= 1
        failed += len(faulty)
        calls = max(calls, fault.calls)
        check_pages(small)
        at += 1 if FULL or name in ("new", "fork", "merge", "evict", "rollback") else max(calls // 12, 1)
    assert failed or name in ("rollback", "free", "evict")


@pytest.mark.parametrize(
    ("kind", "graph"), [("exception", False), ("NaN", False), ("memory", False), ("exception", True), ("NaN", True)]
)
def test_a_fault_at_any_call_of_the_model(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str, graph: bool
) -> None:
    """Through a DecodeGraph NaN is met when the step is committed: those whose logits have it are computed again."""
    expected = run_all(engine)
    other = Engine(engine.model, engine.tokenizer, page_size=4, graph=graph)
    left, forward = 0, TorchDecoder.forward

    def faulty_forward(self, *args):
        nonlocal left
        left -= 1
        logits = forward(self, *args)
        if left != -1:
            return logits
        if kind == "NaN":
            return torch.full_like(logits, torch.nan)
        raise RuntimeError("a fault") if kind == "exception" else torch.OutOfMemoryError("a fault")

    monkeypatch.setattr(TorchDecoder, "forward", faulty_forward)
    for at in range(0, max(out.steps for out in expected), 1 if FULL else 6):
        left = at
        outs = run_all(other)
        faulty = {number for number, out in enumerate(outs) if out.finish_reason == "error"}
        names = {"exception": "RuntimeError: a fault", "NaN": "BadLogits", "memory": "OutOfMemoryError: a fault"}
        check_others(outs, expected, faulty, names[kind])
        assert len(faulty) <= 1 and left < 0 and not (graph and kind == "NaN" and faulty)
        check_pages(other)


@pytest.mark.parametrize("kind", ["exception", "NaN", "take", "views"])
@pytest.mark.parametrize(("culprit", "graph"), [(0, False), (1, False), (2, False), (1, True)])
def test_a_fault_that_stays_is_found_with_its_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str, culprit: int, graph: bool
) -> None:
    """Whatever step the request is in fails, from its 11th token on; others have the same text."""
    expected = run_all(engine)
    marked = engine.tokenizer.encode("\x07")[0]
    names, spoiled = NAMES, follow(engine, CASES[NAMES[culprit]])

    def spoil(views, logits):
        chosen = spoiled(views, logits)
        return [
            marked if view.drawn == 10 and not view.path else token for view, token in zip(views, chosen, strict=True)
        ]

    forward = TorchDecoder.forward

    def spoiled_forward(self, ids, positions, cache, step, rows=None, batch_invariant=False):
        if kind == "exception" and (ids == marked).any():
            raise RuntimeError("spoiled")
        logits = forward(self, ids, positions, cache, step, rows, batch_invariant)
        if kind == "NaN":
            logits[(ids if rows is None else ids[rows]) == marked] = torch.nan
        return logits

    if kind in ("take", "views"):
        method = getattr(Request, kind)

        def raises(self, number, *args):
            if self.job.index == culprit and self.steps >= 15:
                raise RuntimeError("spoiled")
            return method(self, number, *args)

        monkeypatch.setattr(Request, kind, raises)
    samplers = [
        spoil if i == culprit and kind in ("exception", "NaN") else follow(engine, CASES[name])
        for i, name in enumerate(names)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(TorchDecoder, "forward", spoiled_forward)
        other = Engine(engine.model, engine.tokenizer, page_size=4, graph=graph)
        outs = other.generate(["the", "two", "so"], config_for(engine), by_request(samplers))
    check_pages(other)
    check_others(outs, expected, {culprit}, "BadLogits" if kind == "NaN" else "RuntimeError: spoiled")
    assert (
        outs[culprit].token_ids[: outs[culprit].prompt_length + 10]
        == expected[culprit].token_ids[: outs[culprit].prompt_length + 10]
    )
    check_pages(engine)


def test_a_step_that_needs_too_much_memory_is_made_in_halves(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_all(engine)
    forward = TorchDecoder.forward

    def small_forward(self, ids, *args):
        if len(ids) > 12:
            raise torch.OutOfMemoryError("too many rows")
        return forward(self, ids, *args)

    monkeypatch.setattr(TorchDecoder, "forward", small_forward)
    check_others(run_all(engine), expected, set(), "")
    check_pages(engine)


def test_an_outcome_that_cannot_be_told_ends_the_call(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate("the", replace(config_for(engine), max_new_tokens=2), plain(engine))
    check_pages(engine)
