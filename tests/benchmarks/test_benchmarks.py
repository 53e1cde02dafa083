"""The benchmark suites run, write what they measured, and time nothing that is wrong. No test looks at a time."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import benchmarks.gate
import benchmarks.peers
from benchmarks import cases, report
from benchmarks.attention import MASK_BUILD
from benchmarks.flex import FlexMask
from benchmarks.memory import MemoryRow
from benchmarks.run import main
from benchmarks.timing import MIN_ROUNDS, Contender, Spread, measure_rounds, peak_mb
from mvkernels import BranchLayout
from tests.support.trees import trees

TIMED = ("forward", "backward", "forward+backward")
SMALL = ("--tokens", "288", "--rounds", "3", "--device", "cpu", "--quick")


@pytest.fixture(name="run")
def fixture_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MVKERNELS_DATA", str(tmp_path / "nowhere"))
    app = typer.Typer()
    app.command()(main)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_attention_suite_writes_every_case_and_peer(run, tmp_path: Path) -> None:
    result = run("--tokens", "288", "--rounds", "3", "--device", "cpu", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "attention.csv")
    peers = ("ours", "sdpa-dense", "sdpa-causal")
    wanted = {(case, peer, d) for case in cases.TREES for peer in peers for d in TIMED}
    wanted |= {("shared-prompt", "apart", d) for d in TIMED} | {("shared-prompt", "apart", MASK_BUILD)}
    wanted |= {(case, peer, MASK_BUILD) for case in cases.TREES for peer in ("ours", "sdpa-dense", "flex")}
    assert sorted((row["case"], row["peer"], row["direction"]) for row in rows) == sorted(wanted)
    assert all(float(row["median_ms"]) > 0 and "torch" in row["where"] for row in rows)
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"attention-{case}" for case in cases.TREES}
    prepared = {(row["case"], row["what"]) for row in read(tmp_path / "preparation.csv")}
    assert {case for case, _ in prepared} == {*cases.TREES} and len(prepared) == 5 * len(cases.TREES)
    assert "…" not in result.output
    assert all(f" {peer} " in result.output for peer in (*peers, "apart", "flex"))


def test_the_area_of_a_peer_is_that_of_its_own_mask(run, tmp_path: Path) -> None:
    assert run(*SMALL, "--case", "wide", "--out", str(tmp_path)).exit_code == 0
    rows = {(row["peer"], row["direction"]): row for row in read(tmp_path / "attention.csv")}
    visible = int(cases.synthetic("wide", 288).dense_mask().sum())
    for peer, pairs in (("ours", visible), ("sdpa-dense", visible), ("sdpa-causal", 288 * 289 // 2)):
        row = rows[peer, "forward+backward"]
        assert int(row["pairs"]) == pairs
        work = 14 * pairs * int(row["heads"]) * int(row["head_dim"])
        assert math.isclose(float(row["tflops"]), work / float(row["median_ms"]) / 1e9)
        assert math.isclose(float(row["pair_ratio"]), pairs / visible / float(row["ratio"]))
    assert float(rows["ours", "forward"]["ratio"]) == 1


@pytest.mark.parametrize("name", cases.TREES)
@pytest.mark.parametrize("tokens", [700, 2048])
def test_cases_have_the_tokens_asked_for(name: str, tokens: int) -> None:
    assert cases.builders(tokens)[name]().total_tokens == tokens


def test_shared_prompt_of_2048_with_16_responses_of_1024() -> None:
    assert cases.shared_prompt(18432) == [2048, [[1024]] * 16]
    assert set(cases.apart(18432).cu_seqlens.diff().tolist()) == {3072}
    assert cases.apart(18432).num_documents == 16


@pytest.mark.real_data
def test_published_traces_fit_or_the_shortest_stands_alone() -> None:
    pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")
    for tokens, expected in ((32768, range(25000, 32769)), (100, range(101, 5000))):
        layout = cases.builders(tokens)["real"]()
        assert layout.total_tokens in expected and layout.has_branches


@given(st.lists(trees(max_length=12), min_size=1, max_size=3))
def test_the_mask_function_for_flex_shows_what_the_layout_shows(documents: list) -> None:
    layout = BranchLayout.pack([BranchLayout.from_tree(tree) for tree in documents])
    if layout.total_tokens:
        assert torch.equal(FlexMask(layout, "cpu").dense(), layout.dense_mask())


def test_what_is_wrong_is_not_timed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmarks.peers.multiverse_attention
    blind = lambda q, k, v, _, backend: right(q, k, v, BranchLayout.causal(len(q)))  # noqa: E731
    monkeypatch.setattr(benchmarks.peers, "multiverse_attention", blind)
    result = run(*SMALL)
    assert result.exit_code == 1 and "narrow: ours: relative error of out" in result.output
    assert "nothing was timed" in result.output and " ms" not in result.output


def one_key_too_many(layout: BranchLayout, device: str) -> benchmarks.peers.Peer:
    mask = layout.dense_mask()
    row, key = (~mask.triu(1) & ~mask & torch.ones_like(mask).tril()).nonzero()[-1]
    mask[row, key] = True
    attend = lambda q, k, v: benchmarks.peers.sdpa(q, k, v, attn_mask=mask)  # noqa: E731
    return benchmarks.peers.Peer("sdpa-dense", layout, lambda: attend)


def test_a_peer_that_sees_one_key_too_many_is_left_out(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.peers, "sdpa_dense", one_key_too_many)
    result = run(*SMALL, "--case", "wide")
    assert result.exit_code == 0 and "wide: sdpa-dense left out: WrongResultError: " in result.output
    assert " sdpa-dense " not in result.output.partition("left out")[2] and " sdpa-causal " in result.output


def test_results_at_full_length_are_compared_with_ours(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.gate, "check_case", lambda *_: {})
    monkeypatch.setattr(benchmarks.peers, "sdpa_dense", one_key_too_many)
    assert "wide: sdpa-dense left out: WrongResultError: " in run(*SMALL, "--case", "wide").output


def failing_at(call: int, error: BaseException):
    """sdpa_causal, whose function raises at its nth call."""
    right = benchmarks.peers.sdpa_causal

    def make(name: str, layout: BranchLayout, backend: object) -> benchmarks.peers.Peer:
        peer = right(name, layout, backend)
        calls = []

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == call:
                raise error
            return peer.make()(q, k, v)

        return benchmarks.peers.Peer(name, layout, lambda: attend, causal=True)

    return make


@pytest.mark.parametrize(("call", "verb"), [(1, "left out"), (2, "failed"), (4, "failed")])
def test_an_error_of_one_peer_does_not_stop_the_run(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: int, verb: str
) -> None:
    monkeypatch.setattr(benchmarks.peers, "sdpa_causal", failing_at(call, RuntimeError("no such kernel")))
    result = run(*SMALL, "--case", "wide", "--case", "nested", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"wide: sdpa-causal {verb}: RuntimeError: no such kernel" in result.output
    rows = read(tmp_path / "attention.csv")
    for case in ("wide", "nested"):
        times = {
            row["peer"]: int(row["rounds"]) for row in rows if (row["case"], row["direction"]) == (case, "forward")
        }
        assert times == {"ours": 3, "sdpa-dense": 3} | ({"sdpa-causal": 1} if call == 4 else {})


def test_a_run_that_is_stopped_writes_what_it_measured(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmarks.peers, "sdpa_causal", failing_at(4, KeyboardInterrupt()))
    result = run(*SMALL, "--case", "wide", "--case", "nested", "--out", str(tmp_path))
    assert result.exit_code == 130 and "stopped" in result.output
    rounds = {
        row["peer"]: int(row["rounds"]) for row in read(tmp_path / "attention.csv") if row["direction"] == "forward"
    }
    assert rounds == {"ours": 2, "sdpa-dense": 2, "sdpa-causal": 1}
    assert (tmp_path / "attention-wide.png").exists()


def test_a_row_is_in_the_file_as_soon_as_it_is_known(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    path.write_text("of an earlier run")
    file = report.CsvFile(path, "here")
    for count in (1, 2):
        file.write(MemoryRow("wide", 10 * count, 1, 1, 8, "float32", 1.0, 2.0, 3.0, 4.0))
        assert [row["tokens"] for row in read(path)] == ["10", "20"][:count]
    assert read(path)[0]["where"] == "here"


def test_contenders_take_turns_and_leave() -> None:
    calls: list[str] = []

    def call(name: str, fails_at: int = 0):
        def called() -> None:
            calls.append(name)
            if fails_at and calls.count(name) == fails_at:
                raise ValueError(name)

        return called

    a, b, c = (Contender(name, {"forward": call(name, fails)}) for name, fails in (("a", 0), ("b", 4), ("c", 1)))
    measure_rounds([a, b, c], "cpu", rounds=9, seconds=60)
    assert calls == [*"abc", *"ab" * 3, *"a" * 6]  # warm-up, three rounds with an error in the last, the rest
    assert (len(a.times["forward"]), len(b.times["forward"])) == (9, 2)
    assert a.error is None and isinstance(b.error, ValueError) and isinstance(c.error, ValueError)
    measure_rounds([a], "cpu", rounds=9, seconds=0)
    assert len(a.times["forward"]) == MIN_ROUNDS


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of the resident set comes from Linux")
def test_peak_memory_is_that_of_the_call_alone() -> None:
    kept = torch.ones(2**24)
    peak = peak_mb(lambda: torch.ones(2**24).sum(), "cpu")  # 64 MB, gone when it returns
    if peak is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 60 < peak < 90 and kept.sum() == 2**24


def test_memory_suite(run, tmp_path: Path) -> None:
    result = run("--suite", "memory", "--tokens", "512", "--device", "cpu", "--case", "wide", "--out", str(tmp_path))
    if "clear_refs" in result.output:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    [row] = read(tmp_path / "memory.csv")
    four_tensors = 4 * 512 * 8 * 64 * 4 / 2**20
    assert (float(row["inputs_mb"]), float(row["results_mb"])) == (four_tensors, four_tensors)
    assert math.isclose(float(row["extra_mb"]), float(row["peak_mb"]) - four_tensors) and "wide" in result.output


def test_a_real_fault_in_a_memory_case_is_reported(run) -> None:
    result = run("--suite", "memory", "--tokens", "-5", "--device", "cpu", "--case", "causal")
    assert "causal: left out: ValueError" in result.output


def test_quick_benchmarks_run_and_are_no_part_of_the_tests() -> None:
    pytest.importorskip("pytest_benchmark", reason="needs the dev extra: pytest-benchmark is not installed")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    once = subprocess.run(
        [*command, "benchmarks/test_quick.py", "--benchmark-disable"], cwd=root, capture_output=True, text=True
    )
    assert once.returncode == 0 and "12 passed" in once.stdout, once.stdout
    config = (root / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in config


def test_bad_options_are_refused(run) -> None:
    assert run("--suite", "other").exit_code == 2
    assert run("--device", "tpu").exit_code == 2
    assert run("--case", "other").exit_code == 2


def test_tiles_of_all_kernels_are_timed() -> None:
    """Each candidate once at least, the shipped one first; and nothing is imported on a machine without a GPU."""
    from benchmarks.tiles import CANDIDATES, configurations
    from mvkernels.ops.attention.config import KernelConfig, attention_config

    for head_dim, lists in CANDIDATES.items():
        found = configurations(head_dim)
        assert found[0] == attention_config(head_dim, 2, (9, 0))
        for kernel, tiles in lists.items():
            assert {getattr(config, kernel) for config in found} == {KernelConfig(*sizes) for sizes in tiles}
