"""The training suite on a tiny model: it writes every peer, and times nothing of which the losses differ."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the hf extra: transformers is not installed")

import benchmarks.engine_models
from benchmarks import training
from benchmarks.run import main

TOKENS = 300


@pytest.fixture(name="run")
def fixture_run(monkeypatch: pytest.MonkeyPatch):
    small = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    config = {**benchmarks.engine_models.SMOLLM2_CONFIG, **small, "num_key_value_heads": 1}
    monkeypatch.setattr(benchmarks.engine_models, "SMOLLM2_CONFIG", config)
    app = typer.Typer()
    app.command()(main)
    options = ("--suite", "training", "--device", "cpu", "--tokens", str(TOKENS), "--rounds", "3", "--case", "narrow")
    return lambda *arguments: CliRunner().invoke(app, [*options, *arguments])


def test_the_suite_writes_every_peer(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training, "_attention_mb", lambda *_: 0.5
    )  # measured in a process of its own: test_memory_suite
    result = run("--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    with (tmp_path / "training.csv").open() as file:
        rows = {row["peer"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"packed", "one-by-one", "sdpa-dense"}
    assert {(row["documents"], row["tokens"], row["rounds"]) for row in rows.values()} == {("3", str(TOKENS), "3")}
    packed = rows["packed"]
    assert float(packed["ratio"]) == 1.0 and float(packed["mask_mb"]) == pytest.approx(TOKENS**2 / 2**20)
    assert float(packed["memory_ratio"]) == pytest.approx(float(packed["mask_mb"]) / float(packed["attention_mb"]))


def test_every_way_has_the_same_gradients(run) -> None:
    """What is timed is the same work: losses and gradients of packed rows, of single rows and of dense masks."""
    documents = training.documents("nested", 96 * training.DOCUMENTS)
    assert documents is not None
    found = []
    for rows, dense in (
        ([documents], False),
        ([[one] for one in documents], False),
        ([[one] for one in documents], True),
    ):
        model = training.make_model("cpu") if dense else training.patch_model(training.make_model("cpu"))
        step = training.Step(model, rows, "cpu", dense)
        loss = step.losses()
        found.append((loss, model.model.layers[0].self_attn.q_proj.weight.grad))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


def test_nothing_is_timed_where_losses_differ(run, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = training.Step.losses
    monkeypatch.setattr(training.Step, "losses", lambda self: losses(self) * (1.1 if self.dense else 1.0))
    result = run()
    assert result.exit_code == 1 and "expected the same loss from all peers" in result.output
