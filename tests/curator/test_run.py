"""Whole runs of the curator against a local endpoint: traces, odd chains, faults, kills, budgets, real chains."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvkernels.model.curator.checks import check_trace, content_distance
from mvkernels.model.curator.job import EndpointSettings, Job, Limits, Rules, State
from mvkernels.model.curator.outputs import OutputFolder
from mvkernels.model.curator.run import curate
from mvkernels.model.training.traces import read_examples
from tests.cli.test_cli import invoke
from tests.curator.cases import COUNTING, COUNTING_TRACE, NESTED, SEQUENTIAL, many, records, traces, write_jsonl
from tests.curator.server import Faults, Server

for name in ("openai", "rapidfuzz", "pyarrow"):
    pytest.importorskip(name, reason=f"needs the curate extra: {name} is not installed")

ROOT = Path(__file__).resolve().parents[2]


def job(server: Server, source: Path, out: Path, **changes: Any) -> Job:
    settings = EndpointSettings(server.url, "curator", "secret-key", timeout=2, backoff=0.02)
    return replace(Job(source, out, settings), **changes)


def run(*args: Any, **changes: Any) -> State:
    return asyncio.run(curate(job(*args, **changes)))


def test_a_chain_becomes_a_trace(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [COUNTING, NESTED, SEQUENTIAL])
    with Server() as server:
        state = run(server, source, tmp_path / "out")
    assert (state.ended, state.done, state.rejected, state.warned) == ("complete", 3, 0, 1)
    found = {one["question"]: one for one in records(tmp_path / "out" / "traces.jsonl")}
    counting = found[COUNTING[0]]
    assert counting["trace"] == COUNTING_TRACE
    assert (counting["original"], counting["answer"]) == COUNTING[1:]
    assert counting["tries"] == dict.fromkeys(("summary", "groups", "structure", "refill", "mapreduce"), 1)
    assert 0 < counting["distance"] < 0.05 and counting["tokens"] > 0 and counting["warnings"] == []
    nested = found[NESTED[0]]["trace"]
    assert "\n2.1: Use the formula instead." in nested and r"\( \frac{5-1}{2} = 2 \)" in nested
    assert "as above.\n</Path>" not in nested and check_trace(nested) == []
    alone = found[SEQUENTIAL[0]]
    assert alone["trace"] == f"<Think>\n{SEQUENTIAL[1]}\n</Think>\n" and alone["warnings"] == ["no parallel step"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["traces"] == 3 and manifest["tokens"]["prompt"] + manifest["tokens"]["completion"] == (
        server.tokens
    )
    assert "<html" in (tmp_path / "out" / "report.html").read_text()


def test_parquet_and_jsonl_hold_the_same_and_training_reads_both(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [COUNTING, NESTED, SEQUENTIAL])
    with Server() as server:
        run(server, source, tmp_path / "out")
    import pyarrow.parquet

    lines = records(tmp_path / "out" / "traces.jsonl")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "traces.parquet").to_pylist()
    for row in rows:
        row["tries"] = {stage: count for stage, count in row["tries"].items() if count is not None}
    assert rows == lines
    examples = [
        [replace(one, name="") for one in read_examples([tmp_path / "out" / name]) if not isinstance(one, ValueError)]
        for name in ("traces.jsonl", "traces.parquet")
    ]
    assert examples[0] == examples[1] and len(examples[0]) == 3
    assert {(one.prompt, one.sequential) for one in examples[0]} == {c[:2] for c in (COUNTING, NESTED, SEQUENTIAL)}


def test_datasets_loads_the_parquet_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    with Server() as server:
        run(server, write_jsonl(tmp_path / "in.jsonl", [COUNTING]), tmp_path / "out")
    file = str(tmp_path / "out" / "traces.parquet")
    loaded = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[0]["trace"] == COUNTING_TRACE


def test_odd_chains_have_defined_outcomes(tmp_path: Path) -> None:
    long = "\n\n".join(f"Case {i}: we look at {i}. It gives {i * i}. " + "More words. " * 3 for i in range(1200))
    assert len(long) > 75_000
    odd: dict[str, tuple[str, str]] = {
        "empty": ("  \n", "input: expected a chain of thought, got an empty one"),
        "tags": ("a <Path> b. c.", "input: expected a chain without control tags, got <Path>"),
        "too long": ("a " * 60_000, "input: expected a chain of at most 110000 characters, got 120000"),
    }
    good = {"long": long, "think": f"<think>{COUNTING[1]}</think>The answer is 12.", "no end": "x " * 40_000}
    chains = [(name, text, "") for name, (text, _) in odd.items()] + [(name, text, "") for name, text in good.items()]
    source = write_jsonl(tmp_path / "in.jsonl", [*chains, COUNTING, COUNTING])
    with source.open("a") as file:
        file.write('{"question": "cut\n{"question": 1, "chain": "a. b."}\n["no object"]\n')
    with Server() as server:
        state = run(server, source, tmp_path / "out", rules=Rules(max_characters=110_000))
        longest = server.longest_answer
    assert state.ended == "complete" and state.done == 11
    rejected = {one["question"]: f"{one['stage']}: {one['reason']}" for one in records(tmp_path / "out/rejected.jsonl")}
    assert {name: rejected[name] for name in odd} == {name: reason for name, (_, reason) in odd.items()}
    assert rejected[""] == "input: expected a JSON object, got ['no object']"
    assert rejected["1"] == "input: question: expected a text, got int"
    found = {one["question"]: one for one in records(tmp_path / "out" / "traces.jsonl")}
    assert {one for one in found} == {*good, COUNTING[0]}
    assert found["think"]["trace"] == COUNTING_TRACE and found["think"]["answer"] == "The answer is 12."
    assert found["long"]["distance"] < 0.01 and found["long"]["trace"].count("<Parallel>") > 20
    assert longest < len(long) / 4, "no request may need the whole chain in its answer"
    ids = [one["id"] for one in records(tmp_path / "out" / "traces.jsonl") if one["question"] == COUNTING[0]]
    assert sorted(ids) == [min(ids), f"{min(ids)}-2"]


def test_chains_without_a_parallel_step_can_be_dropped(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [COUNTING, SEQUENTIAL])
    with Server() as server:
        run(server, source, tmp_path / "out", rules=Rules(drop_sequential=True))
    [rejected] = records(tmp_path / "out" / "rejected.jsonl")
    assert (rejected["original"], rejected["reason"]) == (SEQUENTIAL[1], "no parallel step")


def test_an_endpoint_without_structured_answers_gives_the_same_and_is_remembered(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", many(6))
    with Server() as structured:
        run(structured, source, tmp_path / "a")
    with Server(structured=False) as plain:
        run(plain, source, tmp_path / "b", concurrency=2)
        assert plain.happened["no response_format"] <= 2
        sent = plain.requests
        (tmp_path / "b" / "traces.jsonl").unlink()
        state = run(plain, source, tmp_path / "b")
        assert plain.requests == sent and state.here == 6, "a rerun costs nothing"
    assert traces(tmp_path / "a") == traces(tmp_path / "b")


@pytest.mark.parametrize("seed", range(2))
def test_faults_change_nothing_but_the_time(tmp_path: Path, seed: int) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", many(12))
    with Server() as server:
        run(server, source, tmp_path / "a")
    with Server(Faults(seed, http=0.3, answers=0.3), hang=2.5) as faulty:
        state = run(faulty, source, tmp_path / "b", concurrency=32)
    assert state.ended == "complete" and sum(faulty.happened.values()) > 30 and len(faulty.happened) > 5
    assert traces(tmp_path / "a") == traces(tmp_path / "b")
    assert any(sum(one["tries"].values()) > 5 for one in records(tmp_path / "b" / "traces.jsonl"))


def start(server: Server, source: Path, out: Path) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    arguments = ["curate", str(source), str(out), "--base-url", server.url, "--model", "curator", "--concurrency", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "secret-key"}
    return subprocess.Popen(
        [sys.executable, "-m", "mvkernels", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kill_and_rerun_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", many(16)), tmp_path / "out"
    with Server() as server:
        run(server, source, tmp_path / "whole")
    with Server(delay=0.02) as server:
        for least in (3, 9):
            process = start(server, source, out)
            wait_for(lambda least=least: lines_in(out / "traces.jsonl") >= least)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            with (out / "traces.jsonl").open("ab") as file:
                file.write(b'{"id": "torn')
        assert lines_in(out / "traces.jsonl") < 16
        state = run(server, source, out)
        assert max(server.seen.values()) <= 3 and sum(server.seen.values()) <= len(server.seen) + 2 * 4
    assert state.ended == "complete" and state.done == 16 and state.here < 13
    assert traces(out) == traces(tmp_path / "whole")
    runs = json.loads((out / "manifest.json").read_text())["runs"]
    assert [one["ended"] for one in runs] == ["running", "running", "complete"]


def test_ctrl_c_stops_cleanly(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", many(24)), tmp_path / "out"
    with Server(delay=0.02) as server:
        process = start(server, source, out)
        wait_for(lambda: lines_in(out / "traces.jsonl") >= 3)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "interrupted; run again to go on" in said and "Traceback" not in errors
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["state"] == "interrupted" and 0 < manifest["counts"]["traces"] < 24
        assert run(server, source, out).ended == "complete"
    assert len(traces(out)) == 24


def test_budgets_are_never_exceeded_and_the_run_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", many(8)), tmp_path / "out"
    prices = Limits(prompt_price=1.0, completion_price=2.0)
    with Server() as server:
        whole = run(server, source, tmp_path / "whole", limits=prices)
    with Server() as server:
        settings = replace(job(server, source, out).endpoint, answer_tokens=500)
        most = whole.tokens // 2
        state = run(server, source, out, endpoint=settings, limits=Limits(max_tokens=most))
        assert state.ended == "budget" and state.done < 8 and 0.7 * most < server.tokens <= most
        assert "the token budget is used up" in state.message and state.tokens == server.tokens
        dear = replace(prices, max_cost=0.8 * whole.cost)
        state = run(server, source, out, endpoint=settings, limits=dear)
        assert state.ended == "budget" and 0.6 * whole.cost < state.cost <= 0.8 * whole.cost
        assert run(server, source, out, endpoint=settings).ended == "complete"
        assert max(server.seen.values()) == 1, "nothing was paid for twice"
    assert traces(out) == traces(tmp_path / "whole")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", many(4)), tmp_path / "out"
    monkeypatch.setenv("SOME_KEY", "secret-key")
    with Server() as server:
        where = ("--base-url", server.url, "--model", "curator")
        common = ("curate", str(source), str(out), *where, "--api-key-env", "SOME_KEY")
        done = invoke(*common, "--limit", "3", "--concurrency", "2")
        assert done.exit_code == 0 and "3 traces in traces.jsonl" in done.stdout, done.output
        assert server.keys == {"Bearer secret-key"} and server.open_most <= 2
        done = invoke(*common, "--json")
        assert done.exit_code == 0 and json.loads(done.stdout)["here"] == 1
        done = invoke(*common, "--max-tokens-total", "10", "--retry-rejected")
        assert done.exit_code == 0, "nothing is left to pay for"
    for file in out.iterdir():
        assert b"secret-key" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--base-url", "localhost"), "--base-url: expected http://... or https://..., got 'localhost'"),
        (("--api-key-env", "NOT_THERE"), "--api-key-env: expected the environment to have NOT_THERE"),
        (("--max-cost", "1"), "--max-cost: expected --price-prompt and --price-completion beside it"),
        (("--concurrency", "0"), "--concurrency: expected at least 1, got 0"),
        (("--concurrency", "99999999999"), "--concurrency: expected at most 10000, got 99999999999"),
        (("--temperature", "nan"), "--temperature: expected a finite number, got nan"),
        (("--timeout", "inf"), "--timeout: expected a finite number, got inf"),
        (("--price-prompt", "nan"), "--price-prompt: expected a finite number, got nan"),
        (("--max-distance", "2"), "--max-distance: expected a number from 0 to 1, got 2"),
        (("--chain-column", "text"), "--chain-column: expected one of question, chain, answer, got 'text'"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: tuple[str, str], message: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [COUNTING])
    url = () if options[0] == "--base-url" else ("--base-url", "http://localhost:1/v1")
    done = invoke("curate", str(source), str(tmp_path / "out"), "--model", "m", *url, *options)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["openai", "rapidfuzz", "pyarrow"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [COUNTING])
    monkeypatch.setitem(sys.modules, module, None)
    done = invoke("curate", str(source), str(tmp_path / "out"), "--model", "m", "--base-url", "http://localhost:1/v1")
    wanted = f"curate needs {module}, which is not installed: pip install 'mvkernels[curate]'"
    assert done.exit_code == 2 and wanted in " ".join(done.stderr.split()), done.output
    assert not (tmp_path / "out").exists()


def test_a_folder_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [COUNTING])
    folder = OutputFolder(tmp_path / "out")
    with Server() as server:
        with pytest.raises(ValueError, match="another run works in"):
            run(server, source, tmp_path / "out")
        folder.close()
        assert run(server, source, tmp_path / "out").done == 1


@pytest.mark.real_data
def test_real_chains_with_and_without_faults(tmp_path: Path, data_dir: Path) -> None:
    source = data_dir / "chains" / "r1_distill_qwen_32b.json"
    with Server() as server:
        state = run(server, source, tmp_path / "a", limit=50)
    assert state.ended == "complete" and state.done == 50 and state.rejected <= 2
    found = records(tmp_path / "a" / "traces.jsonl")
    assert sum(not one["warnings"] for one in found) >= 48
    for one in found:
        assert check_trace(one["trace"]) == []
        assert content_distance(one["trace"], one["original"]) == pytest.approx(one["distance"], abs=1e-6)
        assert one["distance"] <= 0.05
    with Server(Faults(7, http=0.05, answers=0.2), structured=False, hang=2.5) as faulty:
        state = run(faulty, source, tmp_path / "b", concurrency=48, limit=50)
    assert state.ended == "complete" and state.done == 50
    assert traces(tmp_path / "a") == traces(tmp_path / "b")
