"""The files in examples/: the scripts and the notebook run, the commands read the data."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest

from mvkernels.model.curator.chains import ChainReader
from tests.cli.test_cli import invoke

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
#: Script -> lines that it prints only where its own check holds.
SCRIPTS = {
    "attention": ["equal: True"],
    "generate": [
        "trunk forks into 3 paths",
        "finished: stop, after 2 forks",
        " trunk | 3440",
        "with a budget: max_critical_path, critical path 150",
        "well formed: True",
    ],
    "kv_cache": ["position after the merge: [150] of 181 tokens", "bytes of KV moved: 0", "equal: True"],
    "shared_prompt": ["equal: True"],
    "train": ["7 traces, 3781 tokens, 3253 labels", "the loss falls: True"],
    "tree_verification": [
        "accepted tokens of the drafts: [1, 3, 2], kept: draft 1",
        "continues as greedy decoding does: True",
    ],
}
MOST_LINES = 60


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_and_find_what_they_check(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    missing = [line for line in SCRIPTS[name] if line not in printed]
    assert not missing, printed


def test_every_script_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, "make"}
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in listed for path in EXAMPLES.iterdir() if path.name not in ("README.md", "make.py"))


def test_the_notebook_prints_what_it_shows():
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
            pictures = [output for output in cell["outputs"] if output["output_type"] == "display_data"]
            shown = "".join(line for output in cell["outputs"] for line in output.get("text", ()))
            assert pictures or printed.getvalue() == shown


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
