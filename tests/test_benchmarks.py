"""The benchmark suite runs, writes what it measured, and times nothing that is wrong. No test looks at a time."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

import benchmarks.attention
from benchmarks import cases
from benchmarks.run import main


@pytest.fixture(name="run")
def fixture_run():
    import typer

    app = typer.Typer()
    app.command()(main)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_the_attention_suite_writes_every_case_and_peer(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVKERNELS_DATA", str(tmp_path / "nowhere"))
    result = run("--tokens", "288", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    with (tmp_path / "out" / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["case"], row["peer"], row["direction"]) for row in rows}
    peers = ("ours", "sdpa-dense", "sdpa-causal")
    wanted = {(case, peer, d) for case in cases.SYNTHETIC for peer in peers for d in ("forward", "backward")}
    assert found == wanted | {("shared-prompt", "apart", d) for d in ("forward", "backward")}
    assert all(float(row["median_ms"]) > 0 and "torch" in row["where"] for row in rows)
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {f"attention-{case}" for case in cases.SYNTHETIC}


@pytest.mark.parametrize("name", cases.SYNTHETIC)
@pytest.mark.parametrize("tokens", [700, 2048])
def test_cases_have_the_tokens_asked_for(name: str, tokens: int) -> None:
    assert cases.SYNTHETIC[name](tokens).total_tokens == tokens


def test_what_is_wrong_is_not_timed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmarks.attention.multiverse_attention
    monkeypatch.setattr(
        benchmarks.attention, "multiverse_attention", lambda q, k, v, _: right(q, k, v, cases.causal(len(q)))
    )
    result = run("--tokens", "288", "--device", "cpu")
    assert isinstance(result.exception, AssertionError) and "nothing was timed" in str(result.exception)
    assert " ms" not in result.output


def test_bad_options_are_refused(run) -> None:
    assert run("--suite", "other").exit_code == 2
    assert run("--device", "tpu").exit_code == 2
