"""The suites on the paged cache run, write what they measured, and time nothing that is wrong. None looks at a time."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
import typer
from typer.testing import CliRunner

import benchmarks.append
import benchmarks.decode
import benchmarks.decode_peers
import benchmarks.merge
import benchmarks.timing
from benchmarks.decode_cases import CASES, PAGE_SIZE, DecodeCase, Decoding, cases
from benchmarks.merge_tables import Tables
from benchmarks.peers import Shape
from benchmarks.run import main
from mvkernels import PagedKVCache
from mvkernels.ops.decode.tasks import DecodePath

SHAPE = Shape(64, 4, 2, 16, "float32", "cpu")
PEERS = ("ours", "split-kv", "sdpa-per-branch", "sdpa-batched", "sdpa-gather")
SMALL = ("--tokens", "64", "--rounds", "3", "--device", "cpu", "--quick")
DECODE = ("--suite", "decode", *SMALL)


@pytest.fixture(name="run")
def fixture_run(monkeypatch: pytest.MonkeyPatch):
    """Without the large buffers, of which no test reads a time."""
    monkeypatch.setattr(benchmarks.timing, "COLD_BYTES", 0)
    monkeypatch.setattr(benchmarks.decode, "COPY_BYTES", {"cpu": 2**10})
    monkeypatch.setattr(benchmarks.merge, "LAYERS", 2)
    app = typer.Typer()
    app.command()(main)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_decode_suite_writes_every_case_and_peer(run, tmp_path: Path) -> None:
    result = run(*DECODE, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "decode.csv")
    found = [(row["case"], row["branches"], row["prefix"], row["peer"]) for row in rows]
    timed = {peer: [row for row in found if row[3] == peer] for peer in PEERS}
    assert len(set(found)) == len(found) == sum(map(len, timed.values()))
    assert {row[0] for row in timed["ours"]} == set(CASES) and len(timed["ours"]) == 3 + 2 * 3
    assert len(timed["sdpa-batched"]) == len(timed["ours"]) == len(timed["split-kv"]) + 1  # not `single`
    assert len(timed["sdpa-gather"]) == 3
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"decode-{case}" for case in CASES}
    assert "…" not in result.output and all(f" {peer} " in result.output for peer in PEERS)
    assert all((row["path"] in get_args(DecodePath)) == (row["peer"] == "ours") for row in rows)
    for row in rows:
        branches, prefix, own = (int(row[name]) for name in ("branches", "prefix", "own"))
        unique = (prefix + branches * own) * 2 * 2 * 64 * 4
        assert math.isclose(float(row["gbps"]), unique / float(row["median_ms"]) / 1e6)
        each = {"ours": unique, "sdpa-gather": 3 * branches * (prefix + own) * 1024}
        traffic = each.get(row["peer"], branches * (prefix + own) * 1024)
        assert math.isclose(float(row["traffic_mb"]) * 2**20, traffic)
        assert row["peer"] != "ours" or float(row["ratio"]) == 1
        if row["case"] != "sweep":
            assert math.isclose(float(row["copy_share"]), float(row["gbps"]) / float(row["copy_gbps"]))
    goals = {(row["case"], row["peer"]): float(row["goal"]) for row in rows if row["goal"]}
    assert goals == {("shared", "sdpa-per-branch"): 6.0, ("single", "sdpa-per-branch"): 1 / 1.1}


@pytest.mark.parametrize("sizes", [(3, 20, 18), (2, 32, 1), (1, 33, 0), (1, 16, 5)])
def test_a_decode_case_is_the_same_paged_and_unpaged(sizes: tuple[int, int, int]) -> None:
    case = DecodeCase("shared", *sizes, SHAPE)
    run = Decoding(case)
    run.cache.check()
    for branch in range(case.branches):
        k, v = run.contiguous(branch)
        assert len(k) == case.length and torch.equal(run.cache.k[0].flatten(0, 1)[run.slots(branch)], k)
        assert torch.equal(run.cache.v[0].flatten(0, 1)[run.slots(branch)], v)
    cache, step = run.unshared()
    slots = torch.from_numpy(step.views.visible_slots(case.branches - 1))
    assert torch.equal(cache.k[0].flatten(0, 1)[slots], k) and torch.equal(cache.v[0].flatten(0, 1)[slots], v)
    assert not any(entry.whole for entry in step.views.entries)


def test_page_lists_for_other_kernels() -> None:
    """As their arguments mean it: full pages but for the last, which has `last_count` tokens."""
    run = Decoding(DecodeCase("shared", 3, 2 * PAGE_SIZE, PAGE_SIZE + 5, SHAPE))
    for branch in range(3):
        pages = torch.from_numpy(run.shared_pages).tolist() + run.own_pages(branch).tolist()
        slots = [page * PAGE_SIZE + i for page in pages for i in range(PAGE_SIZE)]
        assert slots[: len(slots) - PAGE_SIZE + run.last_count] == run.slots(branch).tolist()
    with pytest.raises(ValueError, match="multiple of 16 tokens, got 20"):
        _ = Decoding(DecodeCase("shared", 3, 20, 5, SHAPE)).shared_pages
    with pytest.raises(ValueError, match="expected branches with tokens"):
        DecodeCase("shared", 2, 20, 0, SHAPE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [(3, 32, 18), (1, 33, 0)])
def test_flex_under_the_mask_of_the_pages(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, as a CPU runs it: what it computes, not how fast."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    run = Decoding(DecodeCase("shared", *sizes, SHAPE))
    benchmarks.decode.gate.agree("flex", [benchmarks.decode_peers.flex_paged(run)()], [run.exact], "float32")


def test_cases_scale_with_the_tokens() -> None:
    shape = Shape(8192, 8, 2, 64, "float32", "cpu")
    full, half = cases(shape, False, None), cases(Shape(4096, 8, 2, 64, "float32", "cpu"), False, None)
    sizes = [(case.name, case.branches, case.prefix, case.own) for case in full[:3]]
    assert sizes == [("shared", 8, 8192, 256), ("single", 1, 8192, 0), ("small", 8, 1024, 128)]
    assert [2 * case.prefix for case in half] == [case.prefix for case in full] and len(full) == 3 + 18


def wrong_step(run: Decoding, *_: object) -> benchmarks.decode_peers.Call:
    """One key of the prefix too few."""
    k, v = (x.clone() for x in (run.cache.k[0], run.cache.v[0]))
    v.view(-1, *v.shape[2:])[run.slots(0)[3]] = 0
    return lambda: benchmarks.decode_peers.tree_decode(run.q, k, v, run.step)


def test_a_wrong_decode_is_not_timed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.decode_peers, "ours", wrong_step)
    result = run(*DECODE, "--case", "shared")
    assert result.exit_code == 1 and "ours: relative error of out" in result.output and " ms" not in result.output


def test_a_wrong_peer_is_left_out(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.decode_peers, "sdpa_batched", wrong_step)
    result = run(*DECODE, "--case", "single")
    assert result.exit_code == 0 and "sdpa-batched left out: WrongResultError" in result.output
    assert " sdpa-per-branch " in result.output


def failing_at(call: int, error: BaseException):
    """sdpa_batched, whose function raises at its nth call: 1 the check, 2 the warm-up, 3 the first round."""
    right = benchmarks.decode_peers.sdpa_batched

    def make(run: Decoding) -> benchmarks.decode_peers.Call:
        attend, calls = right(run), []

        def called() -> torch.Tensor:
            calls.append(1)
            if len(calls) == call:
                raise error
            return attend()

        return called

    return make


@pytest.mark.parametrize(("call", "verb"), [(1, "left out"), (2, "failed"), (4, "failed")])
def test_an_error_of_one_peer_does_not_stop_the_run(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: int, verb: str
) -> None:
    monkeypatch.setattr(benchmarks.decode_peers, "sdpa_batched", failing_at(call, RuntimeError("no such kernel")))
    result = run(*DECODE, "--case", "shared", "--case", "single", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"single (1 x 64): sdpa-batched {verb}: RuntimeError: no such kernel" in result.output
    rounds = {(row["case"], row["peer"]): row["rounds"] for row in read(tmp_path / "decode.csv")}
    for case in ("shared", "single"):
        assert rounds[case, "ours"] == rounds[case, "sdpa-gather"] == "3"
        assert rounds.get((case, "sdpa-batched")) == ("1" if call == 4 else None)


def test_a_run_that_is_stopped_writes_what_it_measured(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmarks.decode_peers, "sdpa_batched", failing_at(4, KeyboardInterrupt()))
    result = run(*DECODE, "--case", "shared", "--case", "single", "--out", str(tmp_path))
    assert result.exit_code == 130 and "stopped" in result.output
    rounds = {row["peer"]: row["rounds"] for row in read(tmp_path / "decode.csv")}  # of `shared`
    assert rounds == {"ours": "2", "split-kv": "2", "sdpa-per-branch": "2", "sdpa-batched": "1", "sdpa-gather": "1"}
    assert (tmp_path / "decode-shared.png").exists()


def test_the_merge_suite(run, tmp_path: Path) -> None:
    result = run("--suite", "merge", *SMALL, "--out", str(tmp_path))
    assert result.exit_code == 0 and "left out" not in result.output and "…" not in result.output, result.output
    rows = {(row["case"], row["what"]): row for row in read(tmp_path / "merge.csv")}
    block = ("fork", "merge", "fork + merge", "the parent's next step", "merge_branches (cpu)", "torch.cat (cpu)")
    assert {what for case, what in rows if case == "block"} == set(block)
    assert {what for case, what in rows if case == "sequence"} == {"block after 10", "block after 100"}
    assert all(float(row["median_ms"]) > 0 for row in rows.values())
    for what in ("fork", "merge", "fork + merge", "merge_branches (cpu)"):
        assert float(rows["block", what]["moved_mb"]) == 0
    copied = 33 * 64 * 2 * 2 * (2 * 64 * 4) / 2**20  # tokens, layers, keys and values, bytes of a token
    assert float(rows["block", "torch.cat (cpu)"]["moved_mb"]) == copied
    goals = {what: float(row["goal_ms"]) for (_, what), row in rows.items() if row["goal_ms"]}
    assert goals == {"fork + merge": 0.2, "plan + tasks": 1.0}
    assert (tmp_path / "merge.png").exists()


def test_a_merge_that_writes_a_page_is_not_timed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PagedKVCache.merge

    def merge(self: PagedKVCache, parent, children) -> None:
        right(self, parent, children)
        self.v[-1][3, 5, 1, 7] += 1

    monkeypatch.setattr(PagedKVCache, "merge", merge)
    result = run("--suite", "merge", *SMALL, "--case", "block")
    assert result.exit_code == 1 and "block: 4 bytes of keys and values changed" in result.output


@pytest.mark.parametrize("what", ["pages", "counts", "position"])
def test_tables_that_differ_from_the_cache_are_not_timed(what: str) -> None:
    tables = Tables("cpu", 3, 20, 16)
    tables.check()
    tables.check()  # restored
    getattr(tables.tables, what).view(-1)[0] += 100
    with pytest.raises(benchmarks.merge.WrongResultError, match=what):
        tables.check()


def test_the_append_suite(run, tmp_path: Path) -> None:
    result = run("--suite", "append", *SMALL, "--out", str(tmp_path))
    assert result.exit_code == 0 and "left out" not in result.output and "…" not in result.output, result.output
    rows = read(tmp_path / "append.csv")
    wanted = [(case, peer) for case in ("decode", "prefill") for peer in ("ours", "index-put", "copy")]
    assert [(row["case"], row["peer"]) for row in rows] == wanted
    assert {int(row["tokens"]) for row in rows} == {128, 8 * 64}
    for row in rows:
        seconds = float(row["median_ms"]) / 1e3
        assert math.isclose(float(row["tokens_per_s"]), int(row["tokens"]) / seconds)
        assert math.isclose(float(row["gbps"]), int(row["tokens"]) * 2 * 2 * (2 * 64 * 4) / seconds / 1e9)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"append-decode", "append-prefill"}


def test_an_append_to_the_wrong_slot_is_not_timed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmarks.append.Appending.ours

    def ours(self: benchmarks.append.Appending) -> None:
        right(self)
        self.stores[0][0] += 1

    monkeypatch.setattr(benchmarks.append.Appending, "ours", ours)
    result = run("--suite", "append", *SMALL)
    assert result.exit_code == 1 and "the storage is not as it should be" in result.output


def test_cases_belong_to_their_suite(run) -> None:
    assert run("--suite", "decode", "--case", "wide").exit_code == 2
    assert run("--suite", "merge", "--case", "shared").exit_code == 2


def test_what_undoes_a_call_runs_before_each() -> None:
    calls: list[str] = []
    times = benchmarks.timing.measure_device(lambda: calls.append("undo"), lambda: calls.append("do"), "cpu", 3)
    assert calls == ["undo", "do"] * 4 and len(times) == 3
