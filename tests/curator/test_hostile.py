"""Whatever a model answers or an endpoint replies: that answer is wrong, is asked for again, hurts no other chain."""

from __future__ import annotations

import asyncio
import copy
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvkernels.model.curator.answers import LONGEST, Wrong
from mvkernels.model.curator.asking import Answer, Message
from mvkernels.model.curator.budget import Budget
from mvkernels.model.curator.cache import AnswerCache
from mvkernels.model.curator.chains import Chain
from mvkernels.model.curator.endpoint import Endpoint, EndpointBusy
from mvkernels.model.curator.groups import read_groups
from mvkernels.model.curator.job import EndpointSettings, Job, Limits, Rules, State
from mvkernels.model.curator.mapreduce import read_mapreduce
from mvkernels.model.curator.pipeline import Pipeline
from mvkernels.model.curator.prompts import STAGES, Form
from mvkernels.model.curator.refill import read_ranges
from mvkernels.model.curator.run import curate
from mvkernels.model.curator.structure import read_structure
from mvkernels.model.curator.summary import read_summary
from tests.curator import script as curator_script
from tests.curator.cases import COUNTING, many, records, traces, write_jsonl
from tests.curator.server import Server

for _name in ("openai", "rapidfuzz", "pyarrow"):
    pytest.importorskip(_name, reason=f"needs the curate extra: {_name} is not installed")


class Script:
    """The scripted curator, which notes its right answers; `spoil` may put another text in the place of one."""

    def __init__(self, spoil: Callable[[str, str], str] = lambda stage, right: right) -> None:
        self.spoil = spoil
        self.right: dict[str, str] = {}

    async def answer(self, messages: list[Message], form: Form) -> Answer:
        asked = max(i for i, one in enumerate(messages) if one["content"].startswith("# Stage "))
        right = self.right[form.name] = curator_script.answer(messages[: asked + 1], True)
        return Answer(self.spoil(form.name, right), True, 10, 1)


def curated(chain: tuple[str, str, str], script: Script) -> tuple[bool, dict[str, Any]]:
    return asyncio.run(Pipeline(script, Rules()).curate(Chain("id", *chain)))


SCRIPT = Script()
assert curated(COUNTING, SCRIPT)[0]
RIGHT = {stage: json.loads(text) for stage, text in SCRIPT.right.items()}
STEPS = read_summary(SCRIPT.right["summary"], 7)
GROUPS = read_groups(SCRIPT.right["groups"], STEPS)
#: Stage -> what reads its answers.
READ: dict[str, Callable[[str], object]] = {
    "summary": lambda answer: read_summary(answer, 7),
    "groups": lambda answer: read_groups(answer, STEPS),
    "structure": lambda answer: read_structure(answer, STEPS, GROUPS),
    "refill": lambda answer: read_ranges(answer, {step.id: 1 for step in STEPS}, 1, 7),
    "mapreduce": lambda answer: read_mapreduce(answer, 2, range(2, 6)),
}
#: JSON texts that stand where something else should.
ODD = (
    *("null", "true", "1.5", "-1", "1e999", "NaN", "-Infinity", "1" * 5000, "1" * 300, "2147483648", "[]", "{}"),
    *('"1 (the first)"', '"\\ud800"', '"\ud800"', '""', '" "', '"\\u0000"', '"S1"', '"</Path>"', '[["S1"]]'),
    *("[" * 60_000, "[" * 60_000 + "]" * 60_000, "[" * 100 + "]" * 100, '{"a":' * 60_000, '{"a": 1, "a": 2}', "", "}"),
    f'"{"9" * 5000}"',
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of each part of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from places(item)


def one_part_odd(stage: str) -> Iterator[str]:
    """The right answer of a stage, with each part of it in turn replaced by each odd text."""
    for place in range(len([*places(RIGHT[stage])])):
        value = copy.deepcopy(RIGHT[stage])
        container, key = [*places(value)][place]
        container[key] = "HERE"
        for odd in ODD:
            yield json.dumps(value).replace('"HERE"', odd)


#: Whole answers that are none, for every stage.
NO_ANSWER = {
    **{f"odd {i}": text for i, text in enumerate(ODD) if text},
    "deep": '{"steps": ' + '[{"a": ' * 60_000,
    "large": '{"steps": "' + "x" * 2_000_000 + '"}',
    "large lines": "S1: a\n" * (LONGEST // 6 + 1),
    "blanks": "Outline" + " " * (LONGEST - 8) + "x",
    "digits": f"S{'1' * 5000}: a",
    "edit": f"Outline 1: a\nEdit {'9' * 5000}: b",
    "nested tags": "<Parallel>\n<Path>\n" * 20_000,
    "steps": "S1\n" * 50_000,
    "needs": "S1 <- S2\n" * 20_000,
    "group": "S1 || " * 50_000,
    "reasoning": "<think>S1: a",
    "twice": '{"steps": [], "steps": [{"id": "S1", "text": "a"}]}',
    "half": "S1: \udc80",
    "empty": "",
}


@pytest.mark.parametrize("stage", STAGES)
def test_one_odd_part_makes_an_answer_wrong_or_stays_a_text(stage: str) -> None:
    READ[stage](json.dumps(RIGHT[stage]))
    for answer in one_part_odd(stage):
        try:
            found = READ[stage](answer)
        except Wrong as wrong:
            str(wrong).encode()
        else:
            repr(found).encode()  # a half surrogate pair in it could be written to no file


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_no_answer_is_wrong(stage: str) -> None:
    for name, answer in NO_ANSWER.items():
        with pytest.raises(Wrong):
            pytest.fail(f"{name}: {READ[stage](answer)!r:.200}")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "text", "step", "first"]), inner)
    ),
    max_leaves=12,
)
WORDS = st.sampled_from(
    ["S1", "S2.1", "S9", ": ", " <- ", " || ", " + ", "\n", "1-4", "Outline 1: ", "Edit 3: ", "Conclusion: ", "none",
     "<Parallel>\n", "</Parallel>\n", "<Path>\n", "</Path>\n", "```\n", "<think>", "</think>", "{", "}", '"', "\ud800"]
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(answer=st.lists(WORDS, max_size=30).map("".join) | VALUES.map(json.dumps) | st.data())
def test_any_answer_is_read_or_wrong(stage: str, answer: Any) -> None:
    if not isinstance(answer, str):  # a right answer with a part of any value
        value = copy.deepcopy(RIGHT[stage])
        container, key = answer.draw(st.sampled_from([*places(value)]))
        container[key] = answer.draw(VALUES)
        answer = json.dumps(value)
    try:
        READ[stage](answer)
    except Wrong as wrong:
        str(wrong).encode()


# ---- whole chains


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_answer_is_asked_for_again_and_then_right_or_the_chain_rejected(stage: str) -> None:
    asked: list[str] = []

    def once(at: str, right: str) -> str:
        asked.append(at)
        return (
            '{"ranges": [{"step": "S1", "first": "1 (the first)"}]}'
            if asked.count(stage) == 1 and at == stage
            else right
        )

    good, record = curated(COUNTING, Script(once))
    assert good and record["tries"][stage] == 2 and record["trace"] == curated(COUNTING, Script())[1]["trace"]
    for bad in ("large", "nested tags", "digits", "half"):
        good, record = curated(COUNTING, Script(lambda at, right, bad=bad: NO_ANSWER[bad] if at == stage else right))
        assert not good and record["stage"] == stage and len(record["attempts"]) == 3
        assert len(record["reason"]) < 3000


#: What bad chains are answered, each always in one stage.
BAD = {
    "types": ("refill", '{"ranges": [{"step": "S1", "first": "1 (the first)", "last": 2}]}'),
    "deep": ("summary", NO_ANSWER["deep"]),
    "digits": ("refill", f"S1: 1-{'9' * 5000}"),
    "number": ("mapreduce", f'{{"outlines": [], "edits": [], "conclusion": {"1" * 5000}}}'),
    "half": ("mapreduce", '{"outlines": ["a", "\\ud800"], "edits": [], "conclusion": "\\udc00"}'),
    "large": ("groups", NO_ANSWER["large"]),
    "tags": ("structure", NO_ANSWER["nested tags"]),
    "list": ("groups", "[1, [2]]"),
    "reasoning": ("structure", "<think>\nS1\nS2"),
    "empty": ("summary", ""),
}


class Hostile(Server):
    """Answers a chain whose question is the name of a bad answer with that, in its stage."""

    def text(self, messages: list[dict[str, str]], structured: bool) -> str:
        said = json.dumps(messages)
        request = next(one["content"] for one in messages[::-1] if one["content"].startswith("# Stage "))
        for name, (stage, bad) in BAD.items():
            if f"<{name}>" in said and curator_script.stage_of(request) == stage:
                return bad
        return super().text(messages, structured)


def run(server: Server, source: Path, out: Path) -> State:
    where = EndpointSettings(server.url, "curator", timeout=20, backoff=0.01, retries=1)
    return asyncio.run(curate(Job(source, out, where, concurrency=4)))


def test_bad_answers_reject_their_chains_and_all_others_finish(tmp_path: Path) -> None:
    bad = [(f"<{name}>", f"This is about <{name}>. {COUNTING[1]}", "") for name in BAD]
    source, out = write_jsonl(tmp_path / "in.jsonl", [*bad, *many(4)]), tmp_path / "out"
    with Hostile() as server:
        state = run(server, source, out)
        assert (state.ended, state.done, state.rejected) == ("complete", len(BAD) + 4, len(BAD))
        asked = server.requests
        assert run(server, source, out).ended == "complete" and server.requests == asked
    rejected = {one["question"]: one for one in records(out / "rejected.jsonl")}
    for name, (stage, _) in BAD.items():
        one = rejected[f"<{name}>"]
        assert one["stage"] == stage and len(one["attempts"]) == 3, name
    assert len(traces(out)) == 4
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(out / "traces.parquet").num_rows == 4
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f"&lt;{name}&gt;" in page for name in BAD)
    with sqlite3.connect(out / "cache.sqlite") as cache:
        assert all(text.encode() or True for (text,) in cache.execute("SELECT text FROM answers"))


#: Parts of a reply, each with the answer that comes of it: a text, or None where there is no answer to be had.
REPLIES: dict[str, tuple[dict[str, Any] | str, Answer | None]] = {
    "parts": (
        {"message": {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}]}},
        Answer("a", True, 3, 4),
    ),
    "object": ({"message": {"content": {"steps": []}}}, Answer('{"steps": []}', True, 3, 4)),
    "number": ({"message": {"content": 7}}, Answer("7", True, 3, 4)),
    "nothing": ({"message": {"content": None, "refusal": None}}, Answer("", True, 3, 4)),
    "refusal": ({"message": {"content": None, "refusal": "no"}}, Answer("no", True, 3, 4)),
    "half": ({"message": {"content": "a \ud800"}}, Answer("a ?", True, 3, 4)),
    "counts": ({"usage": {"prompt_tokens": 10**30, "completion_tokens": "4"}}, Answer("right", True, 2, 1)),
    "no counts": ({"usage": {"prompt_tokens": True, "completion_tokens": -1}}, Answer("right", True, 2, 1)),
    "usage": ({"usage": [1]}, Answer("right", True, 1, 1)),
    "length": ({"finish_reason": "length"}, Answer("right", False, 3, 4)),
    "reason": ({"finish_reason": ["length"]}, Answer("right", True, 3, 4)),
    "message": ({"message": "right"}, None),
    "choices": ('{"choices": {"0": {"message": {"content": "a"}}}}', None),
    "no object": ("[1]", None),
    "page": ("<html>", None),
    "deep": ('{"choices": ' + "[" * 60_000, None),
    "digits": ('{"created": ' + "1" * 5000 + "}", None),
}


class Replying(Server):
    """Replies with the part of REPLIES that the request names."""

    async def _reply(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        part, _ = REPLIES[json.loads(body)["messages"][0]["content"].strip()]
        if isinstance(part, str):
            text = part.encode()
            writer.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text))
            writer.write(text)
            await writer.drain()
            return True
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "right"}}
        reply = {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
        (reply if "usage" in part else choice).update(part)
        return await self._send(writer, 200, reply)


def test_every_reply_is_an_answer_or_none(tmp_path: Path) -> None:
    said: list[str] = []

    async def ask_all(url: str) -> dict[str, Answer | None]:
        where = EndpointSettings(url, "m", backoff=0.001, retries=1)
        endpoint = Endpoint(where, AnswerCache(tmp_path / "cache"), Budget(Limits()), 100, said.append)
        found: dict[str, Answer | None] = {}
        for name in REPLIES:
            message = {"role": "user", "content": name}
            try:
                found[name] = await endpoint.answer([message], Form("summary", {}, "", ""))
                assert await endpoint.answer([message], Form("summary", {}, "", "")) == found[name]  # from the cache
            except EndpointBusy as busy:
                assert str(busy).startswith(url)
                found[name] = None
        await endpoint.close()
        return found

    with Replying() as server:
        found = asyncio.run(ask_all(server.url))
    assert found == {name: answer for name, (_, answer) in REPLIES.items()}
    assert len(said) == 1 and said[0].startswith(
        f"{server.url}: the reply has no answer in it; next try in 0.0 s, 1 left"
    )
