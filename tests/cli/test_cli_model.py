"""The commands that load or make a model, on a tiny one with random weights; the embedded model where it is meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvkernels import BranchLayout, TagTokens
from mvkernels.grammar import TAGS
from mvkernels.model import Engine, Generation, GenerationConfig
from mvkernels.model.checkpoint.names import EMBEDDED
from mvkernels.model.tasks import arithmetic
from tests.cli.test_cli import ROOT, assert_one_line_error, invoke
from tests.engine.test_trace_html import data_of
from tests.support.tiny_model import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tests.test_files import full_disk

# The model has random weights and would never write a block: this prompt ends where two paths begin.
BLOCK = "sum <Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n</Goal>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untagged") / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(tags=False).save_pretrained(folder)
    return folder


def generate_json(*arguments: object) -> list[dict]:
    """One document a line."""
    result = invoke("generate", "--json", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_generate_is_what_the_engine_generates(checkpoint: Path):
    """Every option reaches the engine: the same config by hand gives the same text and figures."""
    options = ("--max-critical-path", 40, "--temperature", 0.8, "--top-k", 20, "--top-p", 0.9, "--seed", 3)
    [found] = generate_json(BLOCK, "--model", checkpoint, "--raw", "--max-tokens", 120, "--logprobs", 1, *options)
    config = GenerationConfig(max_new_tokens=120, max_critical_path=40, temperature=0.8, top_k=20, top_p=0.9, seed=3)
    [expected] = Engine.from_pretrained(checkpoint).generate([BLOCK], replace(config, logprobs=1))
    assert expected.text.count("</Path>") == 2 and any(expected.logprobs) and expected.parallelism > 1
    assert Generation.from_json(json.dumps(found)) == expected
    run = found.pop("run")
    assert found == expected.to_dict()
    assert run["prompt"] == BLOCK and run["correct"] is None and run["seconds"] > 0
    assert run["tokens_per_second"] == pytest.approx(expected.total_tokens / run["seconds"])


def test_a_page_of_the_same_runs(checkpoint: Path, tmp_path: Path):
    page = tmp_path / "out.html"
    options = ("--model", checkpoint, "--raw", "--max-critical-path", 40, "--html", page)
    shown = invoke("generate", BLOCK, *options, "--compare")
    assert shown.exit_code == 0 and shown.stdout.splitlines()[-1] == f"page: {page}", shown.output
    compared = data_of(page.read_text(encoding="utf-8"))
    assert [run["name"] for run in compared["runs"]] == ["parallel", "one path at a time"]
    assert compared["prompt"] == BLOCK
    [found] = generate_json(BLOCK, *options, "--logprobs", 2)
    data = data_of(page.read_text(encoding="utf-8"))
    [run] = data["runs"]
    for name in ("texts", "steps_of", "steps"):
        assert run[name] == found[name] == compared["runs"][0][name], name
    exact = [value if value is None else round(value, 4) for value in found["logprobs"]]
    assert run["logprobs"] == exact == compared["runs"][0]["logprobs"]
    tops = [top and [[token, round(value, 4)] for token, value in top] for top in found["top_logprobs"]]
    assert run["top_logprobs"] == tops
    lengths = {0 if top is None else len(top) for top in run["top_logprobs"]}
    assert lengths == {0, 2} and {len(top) for top in compared["runs"][0]["top_logprobs"] if top} == {5}
    assert run["seconds"] == found["run"]["seconds"]
    tokenizer = Engine.from_pretrained(checkpoint).tokenizer
    assert data["names"] and all(tokenizer.decode([int(token)]) == text for token, text in data["names"].items())


def test_neither_a_full_disk_nor_a_closed_pipe_costs_both(checkpoint: Path, tmp_path: Path):
    """The answer is printed though the page cannot be written, and the page is written though nothing reads."""
    page = tmp_path / "out.html"
    page.write_text("before")
    options = ("--model", checkpoint, "--max-tokens", 90, "--raw", "--json", "--html", page)
    with full_disk(4096):
        done = invoke("generate", BLOCK, *options)
    assert done.exit_code == 2 and json.loads(done.stdout)["run"]["name"] == "parallel"
    assert done.stderr.splitlines()[-1].endswith(f"File too large: '{page}'")
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"] and page.read_text() == "before"
    words = [sys.executable, "-m", "mvkernels", "generate", BLOCK, *map(str, options)]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(words, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.returncode == 141 and "Traceback" not in ended.stderr and "Exception" not in ended.stderr
    assert data_of(page.read_text(encoding="utf-8"))["prompt"] == BLOCK


def test_every_option_reaches_the_config(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    stream = Engine.stream

    def spy(self, prompts, config):
        seen.append(config)
        return stream(self, prompts, config)

    monkeypatch.setattr(Engine, "stream", spy)
    limits = ("--max-tokens", 5, "--max-critical-path", 4, "--max-width", 3, "--max-depth", 2, "--sequential")
    limits += ("--max-path-tokens", 300, "--max-seconds", 90, "--no-grammar")
    sampling = ("--temperature", 0.5, "--top-p", 0.6, "--top-k", 7, "--seed", 9)
    sampling += ("--min-p", 0.1, "--repetition-penalty", 1.2, "--logprobs", 3)
    sampling += ("--stop", "a,b", "--stop", "c", "--eos-token-id", 5, "--eos-token-id", 6)
    generate_json("two", "--model", checkpoint, *limits, *sampling)
    generate_json("two", "--model", checkpoint, "--max-tokens", 5)
    assert seen == [
        GenerationConfig(
            max_new_tokens=5,
            max_critical_path=4,
            max_width=3,
            max_depth=2,
            max_path_tokens=300,
            max_seconds=90,
            grammar=False,
            temperature=0.5,
            top_p=0.6,
            top_k=7,
            min_p=0.1,
            repetition_penalty=1.2,
            logprobs=3,
            seed=9,
            stop=("a,b", "c"),
            eos_token_ids=(5, 6),
            sequential=True,
        ),
        GenerationConfig(max_new_tokens=5),
    ]


def test_compare_gives_one_text_in_more_steps(checkpoint: Path):
    runs = generate_json(BLOCK, "--model", checkpoint, "--raw", "--max-critical-path", 40, "--compare")
    assert [run["run"]["name"] for run in runs] == ["parallel", "one path at a time"]
    assert runs[0]["text"] == runs[1]["text"]
    assert runs[0]["steps"] < runs[1]["steps"]
    [alone] = generate_json(BLOCK, "--model", checkpoint, "--raw", "--max-critical-path", 40, "--sequential")
    assert (alone["run"]["name"], alone["steps"], alone["text"]) == (
        "one path at a time",
        runs[1]["steps"],
        runs[1]["text"],
    )


def test_generate_prints_paths_answer_and_figures(checkpoint: Path):
    options = ("--model", checkpoint, "--raw", "--max-critical-path", 40, "--compare")
    result = invoke("generate", BLOCK, *options, "--full")
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.stdout.splitlines()
    merged = next(i for i, line in enumerate(lines) if line.startswith("merged"))
    assert any(line.startswith("    1 | ") for line in lines[:merged])
    assert any(line.startswith("    2 | ") for line in lines[:merged])
    assert "<Conclusion>" in "\n".join(lines[merged:])
    [parallel] = [line.split() for line in lines[merged:] if line.startswith("parallel ")]
    [one_path] = [line.split() for line in lines[merged:-1] if line.startswith("one path at a time ")]
    assert len(parallel) == 7 and parallel[1:4] == one_path[5:8], "tokens, critical path and parallelism are equal"
    assert int(parallel[4]) < int(one_path[8]), "in more steps"
    assert lines[-1] == "one path at a time gave the same text"
    short = invoke("generate", BLOCK, *options).stdout.splitlines()
    assert short[: merged - 1] == lines[: merged - 1] and not any("<Conclusion>" in line for line in short)


def test_a_chat_template_is_applied_unless_raw(checkpoint: Path):
    prompts = [
        generate_json("two", "--model", checkpoint, "--max-tokens", 1, *raw)[0]["run"]["prompt"]
        for raw in ((), ("--raw",))
    ]
    assert prompts == [[{"role": "user", "content": "two"}], "two"]
    assert "user" in CHAT_TEMPLATE or "role" in CHAT_TEMPLATE


def test_a_tokenizer_without_tags_generates_and_says_so(untagged: Path):
    [found] = generate_json("two", "--model", untagged, "--max-tokens", 4)
    run = found["run"]
    assert (run["name"], found["total_tokens"]) == ("one chain, no blocks", 4)
    assert len(run["notes"]) == 1 and "generates sequentially" in run["notes"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = invoke("generate", "two", "--model", untagged, "--max-tokens", 4)
    assert shown.exit_code == 0 and shown.stdout.startswith("note: the engine generates sequentially")


def test_generate_with_bad_input(checkpoint: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((checkpoint / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"no pickle is ever opened")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:100])
    for folder, part in (
        (tmp_path / "nothing", "expected a local model folder or a .gguf file"),
        (empty, "without *.safetensors"),
        (pickled, "pickled weights are not loaded"),
        (broken, "expected a readable causal language model"),
    ):
        assert_one_line_error(invoke("generate", "two", "--model", folder), part, str(folder))
    on = ("--model", checkpoint)
    assert_one_line_error(invoke("generate", *on), "expected a PROMPT")
    assert_one_line_error(invoke("generate", "", *on, "--raw"), "expected at least one token")
    assert_one_line_error(invoke("generate", "two", *on, "--max-tokens", 0), "max_new_tokens", "at least 1", "got 0")
    assert_one_line_error(invoke("generate", "two", *on, "--top-p", 2), "top_p", "got 2.0")
    assert_one_line_error(invoke("generate", "two", *on, "--temperature", -1), "temperature", "got -1.0")
    assert_one_line_error(invoke("generate", "two", *on, "--min-p", 2), "min_p", "got 2.0")
    assert_one_line_error(invoke("generate", "two", *on, "--logprobs", -1), "logprobs", "got -1")
    missing = tmp_path / "none" / "out.html"
    assert_one_line_error(
        invoke("generate", "two", *on, "--html", missing), "--html", "expected a folder", str(missing.parent)
    )
    assert_one_line_error(
        invoke("generate", "two", *on, "--html", tmp_path), "--html", "expected a file", str(tmp_path)
    )
    assert_one_line_error(invoke("generate", "two", *on, "--dtype", "int8"), "--dtype", "bfloat16", "'int8'")
    assert_one_line_error(invoke("generate", "two", *on, "--device", "abacus"), "--device", "'abacus'")
    assert_one_line_error(invoke("generate", "two", *on, "--device", "cuda:99"), "expected a GPU that PyTorch sees")
    for device in ("cuda:99", torch.device("cuda", 99)):
        with pytest.raises(ValueError, match="expected a GPU that PyTorch sees, got 'cuda:99': it sees"):
            Engine.from_pretrained(checkpoint, device=device)
        with pytest.raises(ValueError, match="expected a device that PyTorch has here, got 'cuda:99'"):
            BranchLayout.causal(2).to(device)
    assert_one_line_error(invoke("generate", "two", *on, "--compare", "--sequential"), "--compare or --sequential")
    assert_one_line_error(invoke("generate", "a </Path> b", *on, "--raw"), "expected", "found </Path>")
    assert_one_line_error(invoke("generate", "two " * 600, *on, "--raw"), "critical path", "512")


def test_generate_shows_no_traceback_in_a_process_of_its_own(tmp_path: Path):
    command = [sys.executable, "-m", "mvkernels", "generate", "two", "--model", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("mvkernels: error: expected a folder with")


def test_add_tags_makes_a_model_that_generates_with_tags(untagged: Path, tmp_path: Path):
    out = tmp_path / "tagged"
    result = invoke("add-tags", untagged, out)
    assert result.exit_code == 0, (result.output, result.exception)
    engine = Engine.from_pretrained(out)
    assert isinstance(engine.tags, TagTokens)
    for tag, number in zip(TAGS, engine.tags.ids, strict=True):
        assert f"{tag} {number}" in result.stdout
    assert json.loads((out / "config.json").read_text())["multiverse"] == {"semantics": "canonical", "tags": [*TAGS]}
    assert_one_line_error(invoke("add-tags", untagged, out), "expected a target", str(out))
    assert_one_line_error(invoke("add-tags", tmp_path / "nothing", tmp_path / "other"), "expected a local model folder")


def test_env_lists_versions_and_backends():
    found = invoke("env", "--json")
    assert found.exit_code == 0, (found.output, found.exception)
    environment = json.loads(found.stdout)
    import torch
    import transformers

    assert environment["packages"]["torch"] == torch.__version__
    assert environment["packages"]["transformers"] == transformers.__version__
    for operation in ("multiverse_attention", "tree_decode"):
        reasons = environment["backends"][operation]["cpu"]
        assert reasons["cpu"] is None and reasons["reference"] is None
        assert (reasons["triton"] is None) == (os.environ.get("TRITON_INTERPRET") == "1")
    kernels = environment["cpu_kernels"]
    assert (kernels["folder"] is None) == (environment["backends"]["tree_decode"]["cpu"]["native"] is not None)
    shown = invoke("env")
    assert "CPU kernels" in shown.stdout
    assert shown.exit_code == 0 and "tree_decode" in shown.stdout and torch.__version__ in shown.stdout


def test_the_embedded_model_answers_a_fresh_problem():
    assert (EMBEDDED / "config.json").exists(), "the embedded model is missing"
    parallel, sequential, chain = generate_json("--seed", 11, "--compare")
    problem = next(arithmetic.generate(11, "test"))
    known = parallel["run"]
    assert known["prompt"] == problem.prompt() and known["expected_answer"] == problem.answer
    assert chain["run"]["prompt"] == problem.prompt(parallel=False)
    assert parallel["text"] == sequential["text"] and parallel["finish_reason"] == "stop"
    assert known["correct"] == arithmetic.grade(parallel["text"], problem)
    assert parallel["steps"] < sequential["steps"]
    assert "<Parallel>" not in chain["text"] and chain["run"]["correct"] == arithmetic.grade(chain["text"], problem)
    [asked] = generate_json(problem.question)
    assert asked["run"]["prompt"] == [{"role": "user", "content": problem.question}]
    assert asked["text"] == parallel["text"], "the chat template asks for a parallel answer"


def test_the_embedded_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the current folder has; a folder of that name is written `./embedded`, or passed as a path."""
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path)
    engine = Engine.from_pretrained("embedded")
    assert engine.model.config.name_or_path == str(EMBEDDED)
    for folder in ("./embedded", Path("embedded")):
        with pytest.raises(ValueError, match="without"):
            Engine.from_pretrained(folder)
    assert_one_line_error(invoke("generate", "two", "--model", "./embedded"), "without *.safetensors")
    [named] = generate_json("--model", "embedded", "--seed", 11, "--max-tokens", 5)
    [unnamed] = generate_json("--seed", 11, "--max-tokens", 5)
    assert named["token_ids"] == unnamed["token_ids"] and named["run"]["notes"] == []
    (tmp_path / "sum.txt").write_text("1+1")
    for command in ("inspect", "stats"):
        assert "tokens" in invoke(command, "sum.txt", "--tokenizer", "embedded").stdout
        assert_one_line_error(invoke(command, "sum.txt", "--tokenizer", "./embedded"), "cannot load a tokenizer from")
    assert invoke("add-tags", "embedded", "tagged").exit_code == 0 and (tmp_path / "tagged" / "config.json").exists()


def test_a_question_that_the_model_was_not_trained_for_is_asked_with_a_note(tmp_path: Path):
    note = "embedded was trained on arithmetic alone (sums of 2 to 5 terms"
    [sum_] = generate_json("Compute 47*38 + (125+60) + 904.", "--max-tokens", 4)
    assert sum_["run"]["notes"] == []
    twelve = " + ".join(["12*34"] * 12)
    for prompt in (f"Compute {twelve}.", "What is the capital of France?"):
        found = invoke("generate", prompt, "--max-tokens", 4)
        [line] = [line for line in found.stdout.splitlines() if line.startswith("note: ")]
        assert note in line and "this prompt is none of these: expect wrong answers" in line
        piped = invoke("generate", prompt, "--max-tokens", 4, "--json")
        assert note in piped.stderr and [note in one for one in json.loads(piped.stdout)["run"]["notes"]] == [True]
    options = ("--problems", 2, "--max-tokens", 4, "--mode", "sequential")
    for what, noted in (("sat", True), ("arithmetic", False)):
        found = invoke("evaluate", what, *options, "--out", tmp_path / what)
        assert found.exit_code == 0, (found.output, found.exception)
        table = (tmp_path / what / "table.md").read_text()
        assert (note in table, note in found.stderr) == (noted, noted)
        assert ("2 of 2 questions are none of these" in table) == noted


TINY = ("--tokens-per-step", 300, "--hidden-size", 32, "--layers", 1, "--intermediate-size", 32)


def test_train_makes_a_model_that_generates(tmp_path: Path):
    out = tmp_path / "trained"
    result = invoke("train", out, "--steps", 2, "--warmup-steps", 1, *TINY, "--seed", 4, "--quiet")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout.startswith(f"{out}: ") and "parameters, trained in" in result.stdout.splitlines()[-1]
    recipe = json.loads((out / "recipe.json").read_text())
    given = {"steps": 2, "warmup_steps": 1, "tokens_per_step": 300, "hidden_size": 32, "layers": 1, "seed": 4}
    assert {name: recipe[name] for name in given} == given
    assert json.loads((out / "config.json").read_text())["multiverse"]["task"] == "arithmetic"
    assert generate_json("Compute 1+1.", "--model", out, "--max-tokens", 3)[0]["total_tokens"] == 3


def test_bad_input_is_said_before_the_imports_that_take_seconds(tmp_path: Path):
    recipe, full = tmp_path / "my.toml", tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    recipe.write_text('model = "nowhere"\ndata = ["nowhere"]\n')
    commands = [
        (["train", tmp_path / "new", "--steps", 0], "steps: expected"),
        (["train", full], "expected a new or empty folder"),
        (["train", full, "--resume"], "expected a folder with the checkpoint"),
        (["tune", tmp_path / "none.toml", tmp_path / "new"], "expected a recipe"),
        (["tune", recipe, tmp_path / "new", "--lora-rank", -1], "lora_rank: expected"),
        (["train", recipe, tmp_path / "new", "--data", "x"], "mvkernels tune RECIPE OUT"),
        (["tune", recipe, tmp_path / "new"], "expected a local model folder"),
        (["tune", recipe, tmp_path / "new", "--model", EMBEDDED], "data: expected"),
        (["tune", recipe, full, "--model", EMBEDDED, "--data", ROOT / "tests" / "no.jsonl"], "data: expected"),
        (["add-tags", tmp_path / "none", tmp_path / "new"], "expected a local model folder"),
        (["add-tags", EMBEDDED, full], "expected a target that does not exist"),
    ]
    script = (
        "import json, sys\nfrom mvkernels.__main__ import app\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n        app(words)\n"
        "    except SystemExit as end:\n        print(end.code, 'torch' in sys.modules)\n"
    )
    words = json.dumps([[str(word) for word in command] for command, _ in commands])
    done = subprocess.run([sys.executable, "-c", script, words], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2 False"] * len(commands), done.stderr
    for line, (_, message) in zip(done.stderr.splitlines(), commands, strict=True):
        assert line.startswith("mvkernels: error: ") and message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "my.toml"]


def test_train_with_bad_input(tmp_path: Path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "recipe.json").write_text("[1]")
    assert_one_line_error(invoke("train", full), "expected a new or empty folder", str(full))
    assert_one_line_error(invoke("train", full, "--resume"), "expected a recipe in", str(full))
    assert_one_line_error(invoke("train", tmp_path / "new", "--resume"), "expected a folder with the checkpoint")
    assert_one_line_error(invoke("train", tmp_path / "new", "--steps", 0), "steps", "got 0")
    assert_one_line_error(invoke("train", tmp_path / "new", "--hidden-size", 33), "a multiple of 32", "got 33")
    assert not (tmp_path / "new").exists()
