"""`mvkernels reproduce` on models of a few steps: every cell is done once, and an interrupted run goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvkernels.cli import reproduce, reproduce_cells
from mvkernels.cli.reproduce_cells import FULL, QUICK, Cells, Scale
from mvkernels.cli.reproduce_report import Report
from mvkernels.model.tasks import sat
from mvkernels.model.training.data import PackedProblems
from mvkernels.model.training.scratch import make_tokenizer

TINY = Scale(
    {"arithmetic": 2, "sat": 1},
    problems=2,
    alone=2,
    growth=1,
    batch_sizes=(1, 2),
    shrink={
        **{"steps": 4, "warmup_steps": 1, "log_every": 2, "save_every": 2},
        **{"hidden_size": 32, "layers": 1, "intermediate_size": 32, "tokens_per_step": 600},
    },
    max_tokens=16,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted twice: behind a training, and within the answers of a cell."""
    folder = tmp_path_factory.mktemp("reproduce")
    said: list[str] = []
    cells = Cells(folder, TINY, said.append)
    steps = cells.run()
    assert next(steps) == "arithmetic-multiverse-0" and next(steps) == "arithmetic-multiverse-0-parallel"
    steps.close()
    cut = folder / "samples" / "arithmetic-multiverse-0-parallel.jsonl"
    cut.write_text("\n".join(cut.read_text().splitlines()[:-1]) + "\n")
    done = [*cells.run()]
    # 3 pairs of models with 3 runs, the problems alone of 2 tasks, batch sizes, growth.
    assert len(done) == 3 * (2 + 3) + 2 + 2
    assert sum(line.startswith("training") for line in said) == 6
    return folder


def test_a_second_run_does_nothing(work: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    said: list[str] = []
    assert [*Cells(work, TINY, said.append).run()]
    assert not any(line.startswith("training") for line in said)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")} == before


@pytest.mark.parametrize("task", ["arithmetic", "sat"])
def test_the_report_has_every_table_and_chart(work: Path, tmp_path: Path, task: str) -> None:
    report = Report(Cells(work, TINY, print), task, tmp_path / "out")
    report.write("here")
    assert report.missing == []
    text = (tmp_path / "out" / task / "README.md").read_text()
    own = "Growth: unsatisfiable instances" if task == "sat" else "Speed-up over batch size"
    for heading in ("Models", "Accuracy", "Wall-clock", own):
        assert f"\n## {heading}\n" in text
    assert text.startswith(f"# Multiverse in miniature: {task}\n") and f"| {task}-multiverse-0 |" in text
    assert ("| parallel, all seeds |" in text) == ("| multiverse, seed 1, zero | 2 |" in text) == (task != "sat")
    pictures = {path.name for path in (tmp_path / "out" / task).glob("*.png")}
    assert pictures == {"budgets.png", "latency.png", "growth.png" if task == "sat" else "batches.png"}
    assert all(f"]({name})" in text for name in pictures)
    figures = json.loads((tmp_path / "out" / task / "results.json").read_text())
    assert figures["wall-clock"]["speedup"] > 0
    assert task == "sat" or set(figures["batch sizes"]) == {"1", "2"}


def test_the_report_without_matplotlib(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures, without links to charts that are not there."""
    for name, missing in (("with", False), ("without", True)):
        if missing:
            monkeypatch.setitem(sys.modules, "matplotlib", None)
        Report(Cells(work, TINY, print), "sat", tmp_path / name).write("here")
    files = {name: {path.name for path in (tmp_path / name / "sat").iterdir()} for name in ("with", "without")}
    assert files["without"] == {"README.md", "results.json"} and len(files["with"]) == 5
    results = [(tmp_path / name / "sat" / "results.json").read_text() for name in ("with", "without")]
    assert results[0] == results[1]
    texts = {name: (tmp_path / name / "sat" / "README.md").read_text() for name in ("with", "without")}
    assert "Latency of a token" in texts["without"] or 'latency_fit": null' in results[0]
    assert "![" in texts["with"] and "![" not in texts["without"]


def test_what_is_not_run_yet_is_named_and_left_out(tmp_path: Path) -> None:
    report = Report(Cells(tmp_path / "work", TINY, print), "arithmetic", tmp_path / "out")
    report.write("here")
    text = (tmp_path / "out" / "arithmetic" / "README.md").read_text()
    assert "## Not run yet" in text and "`arithmetic-multiverse-0`" in text and "## Accuracy" not in text


def test_models_of_another_recipe_are_refused(work: Path) -> None:
    other = replace(TINY, shrink={**TINY.shrink, "steps": 6})
    with pytest.raises(ValueError, match=r"resume: expected steps=4 as in .*recipe.json, got 6"):
        next(Cells(work, other, print).run())


def test_the_scales_make_valid_recipes_below_the_limit_of_parameters() -> None:
    for scale in (FULL, QUICK):
        recipes = [Cells(Path(), scale, print).recipe(*model) for model in Cells(Path(), scale, print).models()]
        assert len(recipes) == 2 * sum(scale.seeds.values())
        assert {recipe.sequential_share for recipe in recipes} == {*reproduce_cells.CHAINS.values(), 1.0}
        assert len({(r.hidden_size, r.layers, r.tokens_per_step) for r in recipes}) == 1  # one architecture
        assert len({r.steps for r in recipes if r.task == "arithmetic"}) == 1


def test_both_kinds_see_about_as_many_problems() -> None:
    """Of sat the Multiverse model takes more steps, as its traces are longer."""
    seen = {}
    for kind in reproduce_cells.KINDS:
        recipe = Cells(Path(), FULL, print).recipe("sat", kind, 0)
        data = PackedProblems(recipe, make_tokenizer(sat.TASK))
        seen[kind] = recipe.steps * sum(data[i]["input_ids"][0].tolist().count(data.end_of_text) for i in range(60))
    assert 0.8 < seen["multiverse"] / seen["autoregressive"] < 1.2


def test_models_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own; what is left for the run behind them is done there."""
    monkeypatch.setattr(reproduce, "_of_model", of_tiny_model)
    monkeypatch.setattr(reproduce, "QUICK", replace(TINY, seeds={"arithmetic": 1, "sat": 1}, batch_sizes=(1,)))
    reproduce.run(tmp_path / "out", tmp_path / "work", quick=True, jobs=2, task="arithmetic")
    models = tmp_path / "work" / "models"
    assert {path.name for path in models.iterdir()} == {"arithmetic-multiverse-0", "arithmetic-autoregressive-0"}
    processes = {(path / "process").read_text() for path in models.iterdir()}
    assert str(os.getpid()) not in processes
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["arithmetic"]
    assert "## Not run yet" not in (tmp_path / "out" / "arithmetic" / "README.md").read_text()
    with pytest.raises(ValueError, match="--jobs: expected at least 1, got 0"):
        reproduce.run(tmp_path / "out", tmp_path / "work", quick=True, jobs=0)
    with pytest.raises(ValueError, match="--task: expected arithmetic or sat, got 'chess'"):
        reproduce.run(tmp_path / "out", tmp_path / "work", quick=True, task="chess")


def of_tiny_model(work: Path, quick: bool, task: str, kind: str, seed: int) -> None:
    assert torch.get_num_threads() == max(1, (os.cpu_count() or 1) // 2)
    for _ in Cells(work, TINY, print, progress=False).of_model(task, kind, seed):
        pass
    (work / "models" / f"{task}-{kind}-{seed}" / "process").write_text(str(os.getpid()))


def test_an_interrupt_ends_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when their models are trained; and none of them sees it, so that none prints a traceback."""
    monkeypatch.setattr(reproduce, "_of_model", interrupts)
    monkeypatch.setattr(Cells, "models", lambda cells: iter([("arithmetic", "multiverse", 0)]))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            reproduce.run(tmp_path / "out", tmp_path, quick=True, jobs=2)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "began").read_text() == str(signal.SIG_IGN)
    assert not (tmp_path / "ended").exists() and multiprocessing.active_children() == []


def interrupts(work: Path, quick: bool, task: str, kind: str, seed: int) -> None:
    (work / "began").write_text(str(signal.getsignal(signal.SIGINT)))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(15)
    (work / "ended").touch()
