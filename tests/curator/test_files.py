"""What the curator reads and writes: formats and columns of chains, files that a kill cut, the cache, the endpoint."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from errno import ECONNREFUSED
from pathlib import Path
from typing import Any

import pytest

from mvkernels.model.curator.asking import Answer
from mvkernels.model.curator.budget import Budget, BudgetUsedUp
from mvkernels.model.curator.cache import AnswerCache
from mvkernels.model.curator.chains import ChainReader, Columns
from mvkernels.model.curator.endpoint import Endpoint, retry_after
from mvkernels.model.curator.job import EndpointSettings, Job, Limits, State, without_credentials
from mvkernels.model.curator.outputs import OutputFolder, read_lines, repair
from mvkernels.model.curator.prompts import Form
from mvkernels.model.curator.run import curate
from tests.curator.cases import COUNTING, many, records, traces, write_jsonl
from tests.curator.server import Server

for _name in ("openai", "rapidfuzz", "pyarrow"):
    pytest.importorskip(_name, reason=f"needs the curate extra: {_name} is not installed")

ROWS = [{"question": f"q{i}", "chain": f"c{i}", "answer": f"a{i}"} for i in range(5)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_chains(tmp_path: Path, suffix: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        lines = [json.dumps(row) for row in ROWS]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[ {', '.join(lines)} ]\n")
    reader = ChainReader(path, limit=4)
    found = list(reader)
    assert [(one.question, one.text, one.answer) for one in found] == [(f"q{i}", f"c{i}", f"a{i}") for i in range(4)]
    assert len({one.id for one in found}) == 4 and [one.id for one in ChainReader(path)][:4] == [
        one.id for one in found
    ]
    assert reader.count() == 4


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question": "q", "deepseek_thinking_trajectory": "t", "solution": "s", "thinking_trajectories": ["u"]},
            "q t s",
        ),
        ({"problem": "q", "thinking_trajectories": ["t", "u"], "answer": "s"}, "q t s"),
        ({"response": "<think>t</think>\ns", "label_counts": {}}, " t s"),
        ({"response": "<think>t</think>\ns", "thinking_process": "t2", "answer": None}, " t2 "),
        ({"prompt": "q", "chain": " a <think> b </think>"}, "q  a <think> b </think> "),
        ({"question": "q", "chain": "half a pair: \ud800", "answer": ""}, "q half a pair: ? "),
    ],
)
def test_known_columns_are_found(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [chain] = ChainReader(path)
    assert f"{chain.question} {chain.text} {chain.answer}" == expected and not chain.problem


def test_columns_can_be_named_and_wrong_files_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [COUNTING])
    [chain] = ChainReader(path, Columns(chain="answer", answer="chain"))
    assert (chain.text, chain.answer) == (COUNTING[2], COUNTING[1])
    (tmp_path / "no.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "no.json").write_text('{"a": 1}')
    (tmp_path / "no.parquet").write_text("no")
    for name, message in {
        "no.jsonl": "expected a column with chains .* got a",
        "empty.jsonl": "expected at least one chain, got none",
        "no.json": "expected a JSON list",
        "no.parquet": "expected a Parquet file",
        "nothing.jsonl": "expected a .jsonl, .json or .parquet file",
    }.items():
        with pytest.raises(ValueError, match=message):
            list(ChainReader(tmp_path / name))


def test_a_json_list_is_read_item_by_item(tmp_path: Path) -> None:
    """The items before the place where a list of several chunks is cut have come by then."""
    path = tmp_path / "in.json"
    text = json.dumps([{"chain": "x" * 300_000 + str(i)} for i in range(8)])
    path.write_text(text[:-400_000])
    found = []
    with pytest.raises(ValueError, match="got one that is cut or malformed"):
        for chain in ChainReader(path):
            found.append(chain.text[-1])
    assert found == list("012345")


@pytest.mark.parametrize("torn", [b"", b'{"id": "b', b"x" * 200_000])
def test_a_torn_line_is_taken_away_and_whole_ones_stay(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + torn)
    repair(path)
    assert [one["id"] for one in read_lines(path)] == ["a"]
    path.write_bytes(torn)
    repair(path)
    assert path.read_bytes() == b""


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text('{"id": "a"}\nno\n')
    with pytest.raises(ValueError, match=r"traces.jsonl:2: expected a JSON object with an id"):
        OutputFolder(tmp_path)
    (tmp_path / "traces.jsonl").write_text('{"id": "a"}\n')
    (tmp_path / "rejected.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match="the chain a is there twice"):
        OutputFolder(tmp_path)
    (tmp_path / "cache.sqlite").write_text("no database, and long enough to be none" * 10)
    with pytest.raises(ValueError, match="expected an SQLite database"):
        AnswerCache(tmp_path / "cache.sqlite")


def test_rejected_chains_are_done_again_when_that_is_asked_for(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", many(4)), tmp_path / "out"
    with Server() as server:
        run(server, source, out)
        whole = traces(out)
        kept, moved = (out / "traces.jsonl").read_text().splitlines()[:3], records(out / "traces.jsonl")[3]
        (out / "traces.jsonl").write_text("\n".join(kept) + "\n")
        (out / "rejected.jsonl").write_text(json.dumps({"id": moved["id"], "stage": "x", "reason": "y"}) + "\n")
        assert run(server, source, out).here == 0
        state = asyncio.run(curate(Job(source, out, EndpointSettings(server.url, "curator"), retry_rejected=True)))
    assert (state.here, state.rejected) == (1, 0) and traces(out) == whole
    assert len([*out.glob("rejected-*.jsonl")]) == 1


def test_the_cache_keeps_answers_and_counts_them(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "cache.sqlite")
    assert cache.get("k") is None and cache.spent() == (0, 0, 0)
    cache.put("k", "summary", "m", Answer("text", False, 5, 7))
    cache.note("fact", "yes")
    again = AnswerCache(tmp_path / "cache.sqlite")  # while the first is open: as after a kill
    assert again.get("k") == Answer("text", False, 5, 7) and again.spent() == (1, 5, 7) and again.fact("fact") == "yes"


MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
FORM = Form("summary", {"type": "object"}, "plain", "structured")
#: What a change makes another request. answer_tokens: below, for an answer that was cut.
OTHER_SETTINGS = {"model": "other", "temperature": 0.5, "structured": False}
SAME_SETTINGS = {"base_url": "", "key": "other", "retries": 1, "timeout": 3.0, "backoff": 2.0, "answer_tokens": 500}
OTHER_MESSAGES = {
    "system": [{**MESSAGES[0], "content": "t"}, MESSAGES[1]],
    "user": [MESSAGES[0], {**MESSAGES[1], "content": "v"}],
    "role": [{**MESSAGES[0], "role": "user"}, MESSAGES[1]],
    "order": [{**MESSAGES[0], "content": "u"}, {**MESSAGES[1], "content": "s"}],
    "longer": [*MESSAGES, {"role": "assistant", "content": "a"}, MESSAGES[1]],
    "shorter": MESSAGES[1:],
    "border": [{**MESSAGES[0], "content": "su"}, {**MESSAGES[1], "content": ""}],
}
OTHER_FORMS = {
    "name": Form("groups", FORM.schema, FORM.plain, FORM.structured),
    "schema": Form(FORM.name, {"type": "array"}, FORM.plain, FORM.structured),
    "words": Form(FORM.name, FORM.schema, FORM.plain, "other"),
}


@pytest.mark.parametrize("complete", [True, False], ids=["whole", "cut"])
def test_every_field_of_a_request_is_in_the_key_of_its_answer(tmp_path: Path, complete: bool) -> None:
    """The same request is asked once, and any other anew: other settings, messages or form."""
    assert {*OTHER_SETTINGS, *SAME_SETTINGS} == {field.name for field in fields(EndpointSettings)}, "one is untested"
    sent: list[dict[str, Any]] = []

    class Counting(Server):
        def _completion(self, request: dict[str, Any]) -> dict[str, Any]:
            sent.append(request)
            message = {"role": "assistant", "content": str(len(sent))}
            choice = {"index": 0, "finish_reason": "stop" if complete else "length", "message": message}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            return {"model": request["model"], "choices": [choice], "usage": usage}

    async def main(servers: list[Server]) -> None:
        cache = AnswerCache(tmp_path / "cache")
        usual = EndpointSettings(servers[0].url, "m")

        async def ask(settings: EndpointSettings, messages: list[dict[str, str]], form: Form) -> tuple[str, int]:
            endpoint = Endpoint(settings, cache, Budget(Limits()), 8)
            answer = await endpoint.answer(messages, form)
            await endpoint.close()
            return answer.text, endpoint.sent

        first = await ask(usual, MESSAGES, FORM)
        others = [(replace(usual, **{name: value}), MESSAGES, FORM) for name, value in OTHER_SETTINGS.items()]
        others += [(replace(usual, temperature=0.0), MESSAGES, FORM)]
        others += [(usual, messages, FORM) for messages in OTHER_MESSAGES.values()]
        others += [(usual, MESSAGES, form) for form in OTHER_FORMS.values()]
        others += [] if complete else [(replace(usual, answer_tokens=500), MESSAGES, FORM)]
        for other in others:
            answer = await ask(*other)
            assert answer == (str(len(sent)), 1), f"{other} was taken for another request"
            assert await ask(*other) == (answer[0], 0)
        for name, value in {**SAME_SETTINGS, "base_url": servers[1].url}.items():
            if complete or name != "answer_tokens":
                assert await ask(replace(usual, **{name: value}), MESSAGES, FORM) == (first[0], 0), name

    with Counting() as one, Counting() as two:
        asyncio.run(main([one, two]))
    assert two.requests == 0


def test_a_budget_waits_for_requests_in_flight() -> None:
    async def main() -> None:
        budget = Budget(Limits(max_tokens=100))
        first = await budget.hold(50, 10)
        waiting = asyncio.create_task(budget.hold(50, 10))
        await asyncio.sleep(0)
        assert not waiting.done()
        await budget.settle(first, 20, 10)
        second = await waiting
        await budget.settle(second, 50, 10)
        with pytest.raises(BudgetUsedUp, match=r"90 of --max-tokens-total 100, and the next request may take 11"):
            await budget.hold(10, 1)
        assert await budget.hold(9, 1)

    asyncio.run(main())


def test_retry_after_is_read_as_servers_write_it() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after({"retry-after": "3"}) == 3 and retry_after({"retry-after-ms": "250"}) == 0.25
    assert 25 < (retry_after({"retry-after": later}) or 0) <= 30
    assert retry_after({}) is None and retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "-5"}) == 0


def test_urls_lose_what_is_secret() -> None:
    assert without_credentials("https://me:secret@host:1/v1?key=secret#x") == "https://host:1/v1"
    assert without_credentials("http://host/v1/a@b") == "http://host/v1/a@b"


def run(server: Server, source: Path, out: Path, **settings: Any) -> State:
    settings = {"timeout": 2, "backoff": 0.01, "retries": 2, **settings}
    return asyncio.run(curate(Job(source, out, EndpointSettings(server.url, "curator", "secret-key", **settings))))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the key \(status 401\)"),
        (404, "has no model 'curator', or is no such endpoint"),
        (400, r"refused 10 requests in a row"),
        (503, r"requests in a row were not answered within 2 retries each; the last one: status 503"),
    ],
)
def test_an_endpoint_that_cannot_be_used_stops_the_run(tmp_path: Path, status: int, message: str) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", many(18)), tmp_path / "out"
    with Server(status=status) as server, pytest.raises(ValueError, match=message) as caught:
        run(server, source, out)
    assert "secret-key" not in str(caught.value)
    assert json.loads((out / "manifest.json").read_text())["state"] == "endpoint"
    assert records(out / "rejected.jsonl") == []
    with Server() as server:
        state = run(server, source, out)
    assert state.ended == "complete" and state.done == 18


def test_chains_that_are_not_answered_for_are_left_for_the_next_run(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", many(4)), tmp_path / "out"
    with Server(status=500) as server:
        state = run(server, source, out)
        assert (state.ended, state.done, state.unfinished) == ("unfinished", 0, 4) and server.requests == 4 * 3
        assert f"4 chains were not answered for (the last one: {server.url}: status 500: " in state.message
    with Server() as server:
        assert run(server, source, out).done == 4


def test_an_endpoint_that_fails_is_named_at_once_with_the_error_and_the_next_try(tmp_path: Path) -> None:
    """One line for each kind of failure, however often it comes; never the key."""
    source = write_jsonl(tmp_path / "in.jsonl", many(4))
    said: list[str] = []

    def curated(url: str) -> State:
        settings = EndpointSettings(url, "curator", "secret-key", retries=3, timeout=2, backoff=0.01)
        return asyncio.run(curate(Job(source, tmp_path / "out", settings), say=said.append))

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        port = closed.getsockname()[1]
        state = curated(f"http://me:secret-key@127.0.0.1:{port}/v1?key=secret-key")
    assert state.unfinished == 4 and f"(the last one: http://127.0.0.1:{port}/v1: Connection error. " in state.message
    assert len(said) == 1, said
    assert said[0].startswith(f"http://127.0.0.1:{port}/v1: Connection error. ") and f"Errno {ECONNREFUSED}" in said[0]
    assert said[0].endswith("; next try in 0.0 s, 3 left for this request")

    faults = iter(["429", "500", None, "cut", "500", "cut", "429"])  # of requests in order, however many run at once

    class Failing(Server):
        def _http_fault(self, body: bytes) -> str | None:
            return next(faults, None)

    with Failing(retry_after=0.01) as server:
        assert curated(server.url).ended == "complete"
    assert [line.partition(": ")[0] for line in said[1:]] == [server.url] * 3
    for part in ("status 429: ", "status 500: ", "Connection error. "):  # in any order: four requests at once
        assert [part in line and "; next try in 0.0 s" in line for line in said[1:]].count(True) == 1, said
    assert "secret" not in "".join(said) + state.message


def test_a_pause_holds_for_all_requests(tmp_path: Path) -> None:
    """A 429 that names a second: nothing at all is sent within it, but for what was under way."""
    source = write_jsonl(tmp_path / "in.jsonl", many(18))
    sent: list[float] = []

    class Limited(Server):
        def _http_fault(self, body: bytes) -> str | None:
            sent.append(time.monotonic())
            return "429" if len(sent) == 8 else None

    with Limited(retry_after=1.0, delay=0.02) as server:
        assert run(server, source, tmp_path / "out").ended == "complete"
    assert len(sent) > 100 and not [at for at in sent if sent[7] + 0.3 < at < sent[7] + 0.9]


def test_a_request_that_is_refused_once_the_endpoint_works_rejects_its_chain(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [COUNTING, ("q", "too long. " * 2000, "")])

    class Small(Server):
        async def _reply(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
            if len(body) > 20_000:
                return await self._send(writer, 400, {"error": {"message": "context length exceeded"}})
            return await super()._reply(head, body, writer)

    with Small() as server:
        first = asyncio.run(curate(Job(source, tmp_path / "a", EndpointSettings(server.url, "m"), concurrency=1)))
        assert (first.ended, first.done, first.rejected) == ("complete", 2, 1)
        assert server.happened["no response_format"] == 0 and len(traces(tmp_path / "a")) == 1
    [rejected] = records(tmp_path / "a" / "rejected.jsonl")
    assert rejected["stage"] == "summary" and "context length exceeded" in rejected["reason"]


def test_answers_that_were_cut_are_asked_for_again_under_a_larger_limit(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", [COUNTING]), tmp_path / "out"
    with Server() as server:
        assert run(server, source, out, answer_tokens=20).rejected == 1
        [rejected] = records(out / "rejected.jsonl")
        assert rejected["reason"].startswith("The answer was cut") and len(rejected["attempts"]) == 3
        sent = server.requests
        whole = EndpointSettings(server.url, "curator", answer_tokens=400)
        state = asyncio.run(curate(Job(source, out, whole, retry_rejected=True)))
        assert (state.done, state.rejected) == (1, 0) and server.requests > sent
        sent = server.requests
        (out / "traces.jsonl").unlink()
        asyncio.run(curate(Job(source, out, EndpointSettings(server.url, "curator", answer_tokens=9000))))
        assert server.requests == sent, "a whole answer holds under any limit"


def test_the_newer_name_of_the_limit_is_used_where_the_older_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [COUNTING])

    class Newer(Server):
        async def _reply(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
            if "max_tokens" in json.loads(body):
                self.happened["older"] += 1
                message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
                return await self._send(writer, 400, {"error": {"message": message}})
            return await super()._reply(head, body, writer)

    with Newer() as server:
        assert run(server, source, tmp_path / "out").ended == "complete" and server.happened["older"] == 1
    assert len(traces(tmp_path / "out")) == 1
