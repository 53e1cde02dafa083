"""The files in examples/: what the commands find in them, and that they are what the script makes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from mvkernels.model.curator.chains import ChainReader
from tests.test_cli import invoke

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_traces_are_those_that_the_script_writes():
    made = runpy.run_path(str(EXAMPLES / "make.py"))
    assert (EXAMPLES / "traces.jsonl").read_text(encoding="utf-8").splitlines() == made["lines"]()


def test_traces_are_well_formed_nested_and_independent():
    found = invoke("check", EXAMPLES / "traces.jsonl", EXAMPLES / "trace.txt", "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert report["findings"] == [] and [file["traces"] for file in report["files"]] == [12, 1]
    blocks = json.loads(invoke("inspect", EXAMPLES / "trace.txt", "--json").stdout)["blocks"]
    assert [(block["name"], len(block["path_tokens"])) for block in blocks] == [("1", 2), ("1.1/1", 3)]


def test_chains_are_read_for_curation():
    chains = [*ChainReader(EXAMPLES / "chains.jsonl")]
    assert [chain.answer for chain in chains] == ["12", "149", "97"]
    assert all(chain.text.count("\n\n") == 3 and not chain.problem for chain in chains)


def test_the_embedded_model_is_tuned_on_the_traces(tmp_path: Path):
    pytest.importorskip("peft", reason="needs the train extra")
    options = ("--model", "embedded", "--data", EXAMPLES / "traces.jsonl", "--steps", 1, "--lora-rank", 0)
    result = invoke("tune", "smollm2-lora.toml", tmp_path / "tuned", *options, "--quiet")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "held-out loss" in result.stdout and (tmp_path / "tuned" / "model.safetensors").exists()
    entry = json.loads((tmp_path / "tuned" / "config.json").read_text())["multiverse"]
    assert "task" not in entry, "tuned on other traces, it is no model of one task"
