"""Arguments are checked before PyTorch is imported, which takes seconds: no bad one is said after them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.cli.test_cli import ROOT

# Runs every case in one process, for nothing of it imports PyTorch; the first that does would hide those behind it.
PROGRAM = """
import contextlib, io, json, sys
from typer.main import get_command
from mvkernels.__main__ import app
command = get_command(app)
for arguments, part in json.loads(sys.argv[1]):
    shown, status = io.StringIO(), None
    with contextlib.redirect_stderr(shown):
        try:
            command.main(arguments, "mvkernels")
        except SystemExit as ended:
            status = ended.code
    assert status == 2 and part in " ".join(shown.getvalue().split()), (arguments, part, status, shown.getvalue())
    heavy = {"torch", "transformers", "triton", *(["numpy"] if "--plot" not in arguments else [])} & sys.modules.keys()
    assert not heavy, (arguments, heavy)
"""


def test_bad_arguments_are_refused_before_pytorch_is_imported(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "pickled").mkdir()
    files = {
        "full/file": "",
        "trace.txt": "<Parallel>",
        "text.txt": "no tag",
        "not.jsonl": "{",
        "empty.jsonl": "\n",
        "other.jsonl": '{"question": "1+1?", "answer": "2"}\n',
        "bad.toml": "model = ",
        "field.toml": 'model = "embedded"\ndata = ["other.jsonl"]\nlearning = 1\n',
        "value.toml": 'model = "embedded"\ndata = ["other.jsonl"]\nsteps = "many"\n',
        "model.toml": 'model = "nowhere"\ndata = ["other.jsonl"]\n',
        "data.toml": 'model = "embedded"\ndata = ["nowhere"]\n',
        "record.toml": f'model = "embedded"\ndata = ["{tmp_path}/not.jsonl"]\n',
        "bad.cnf": "p cnf",
        "digits.cnf": f"p cnf {'9' * 5000} 1\n",
        "pickled/pytorch_model.bin": "",
        "samples/samples-parallel.jsonl": "{}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def at(name: str) -> str:
        return str(tmp_path / name)

    cases: list[tuple[list[str], str]] = [
        (["nope"], "nope"),
        (["generate", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "x", "--max-tokens", "0"], "max_new_tokens: expected at least 1"),
        (["generate", "x", "--dtype", "int8"], "--dtype: expected one of float32"),
        (["generate", "x", "--device", "abacus"], "--device: expected cpu, cuda"),
        (["generate", "x", "--device", "cpu", "--device-map", "auto"], "--device or --device-map"),
        (["generate", "x", "--model", at("nowhere")], "expected a local model folder or a .gguf file"),
        (["generate", "x", "--model", "Qwen/Qwen2.5-7B"], "hf download Qwen/Qwen2.5-7B --local-dir Qwen2.5-7B"),
        (["generate", "x", "--model", at("pickled")], "without *.safetensors"),
        (["generate", "x", "--compare", "--sequential"], "--compare or --sequential"),
        (["generate", "x", "--full", "--json"], "--full or --json"),
        (["generate", "x", "--html", at("nowhere/page.html")], "--html: expected a folder"),
        (["evaluate", "chess"], "expected arithmetic, sat, or a file"),
        (["evaluate", at("nowhere.jsonl")], "nowhere.jsonl"),
        (["evaluate", at("not.jsonl")], "line 1: expected a JSON object"),
        (["evaluate", at("empty.jsonl")], "expected at least one question"),
        (["evaluate", at("bad.cnf")], "expected 'p cnf VARIABLES CLAUSES'"),
        (["evaluate", "--mode", "fast"], "--mode: expected one of parallel"),
        (["evaluate", "--problems", "0"], "--problems: expected at least 1"),
        (["evaluate", "-n", "2"], "expected a temperature above 0"),
        (["evaluate", "--out", at("text.txt")], "expected a folder, got a file"),
        (["evaluate", "--out", at("text.txt/below")], "expected a folder, got a file"),
        (["evaluate", "--model", "Qwen/Qwen2.5-7B", "--out", at("new")], "hf download"),
        (["evaluate", "--out", at("samples"), "--mode", "parallel"], "expected samples of version"),
        (["evaluate", "--problems", "9" * 25], "--problems: expected at most 100000 of arithmetic"),
        (["evaluate", at("digits.cnf")], "expected 'p cnf VARIABLES CLAUSES', got 'p cnf 9999"),
        (["inspect", at("text.txt"), "--trace", "9" * 25], "--trace: expected 1 to 1, the traces in"),
        (["inspect", at("nowhere")], "found nothing at"),
        (["inspect", at("trace.txt")], "expected <Goal>"),
        (["inspect", at("text.txt"), "--tokenizer", at("nowhere")], "tokenizer.json"),
        (["check", at("nowhere")], "found nothing at"),
        (["stats", at("nowhere")], "found nothing at"),
        (["stats", at("trace.txt")], "expected at least one good trace"),
        (["stats", at("text.txt"), "--out", at("text.txt")], "expected a folder, got a file"),
        (["stats", at("text.txt"), "--tokenizer", at("nowhere")], "tokenizer.json"),
        (["curate", at("other.jsonl"), at("new")], "--base-url URL"),
        (["curate", "--check", at("other.jsonl")], "--check"),
        (
            ["curate", at("nowhere"), at("new"), "--base-url", "http://localhost:1/v1", "--model", "m"],
            "input: expected a .jsonl",
        ),
        (["add-tags", at("nowhere"), at("new")], "expected a local model folder"),
        (["add-tags", "embedded", at("full")], "expected a target that does not exist"),
        (["train", at("full")], "expected a new or empty folder"),
        (["train", at("new"), "--resume"], "resume: expected a folder"),
        (["train", at("new"), "--steps", "0"], "steps: expected a whole number"),
        (["train", at("new"), "--task", "chess"], "task: expected one of"),
        (["train", "a.toml", at("new")], "mvkernels tune RECIPE OUT"),
        (["train", "a.toml", at("new"), "--data", "x", "--dry-run"], "mvkernels tune RECIPE OUT"),
        (["tune", "nowhere.toml", at("new")], "expected a recipe: a TOML file"),
        (["tune", at("bad.toml"), at("new")], "expected a recipe in TOML"),
        (["tune", at("field.toml"), at("new")], "learning: expected a field of a recipe"),
        (["tune", at("value.toml"), at("new")], "steps: expected a whole number"),
        (["tune", at("model.toml"), at("new")], "expected a local model folder"),
        (["tune", at("data.toml"), at("new")], "data: expected a .jsonl"),
        (["tune", at("record.toml"), at("new")], "expected a JSON object on the line"),
        (["tune", at("record.toml"), "--dry-run"], "expected a JSON object on the line"),
        (["tune", at("record.toml")], "expected a folder OUT"),
        (["tune", "smollm2-lora.toml", at("new"), "--model", "embedded", "--nope", "1"], "--nope"),
        (["tune", "smollm2-lora.toml", at("new"), "--lora-rank", "x"], "--lora-rank"),
        (["tune", "smollm2-lora.toml", at("new"), "--passes", "0.5,x"], "--passes"),
        (["tune", "smollm2-lora.toml", at("new"), "--lora-rank", "-1"], "lora_rank: expected a whole number"),
        (["tune", "smollm2-lora.toml", at("new")], "expected a local model folder"),
        (["reproduce", "--jobs", "0"], "--jobs: expected at least 1"),
        (["reproduce", "--task", "chess"], "--task: expected arithmetic or sat"),
        (["reproduce", "--out", at("text.txt")], "expected a folder, got a file"),
    ]
    commands = ("generate", "evaluate", "inspect", "check", "stats", "curate", "add-tags", "env", "reproduce", "train")
    cases += [([name, "--nope"], "--nope") for name in commands]
    cases += [  # at the end, for they import numpy
        (["inspect", at("text.txt"), "--plot", at("nowhere/a.png")], "--plot: expected a folder to write to"),
        (["inspect", at("text.txt"), "--plot", at("a.nope")], "expected a name that ends with one of .png"),
    ]
    command = [sys.executable, "-c", PROGRAM, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({name.partition("/")[0] for name in files})
