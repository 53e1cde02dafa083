"""Fine-tuning on traces: data, mixtures, packed losses, exact resumption, LoRA, precision, bad input."""

from __future__ import annotations

import csv
import gc
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from mvkernels import BranchLayout, TagTokens, mask_tensor, patch_model
from mvkernels.grammar import parse_text
from mvkernels.model import sequentialize as sequentialize_module
from mvkernels.model.checkpoint.add_tags import read_entry
from mvkernels.model.checkpoint.loading import load_checkpoint
from mvkernels.model.sequentialize import sequentialize
from mvkernels.model.training import TuningRecipe, TuningRun, load_recipe, traces, tune, tuning
from mvkernels.model.training.mixture import PackedRows, make_mixture
from mvkernels.model.training.traces import Encoder, encode_all, read_examples
from mvkernels.model.training.trainer import PackedTrainer
from mvkernels.model.training.tuning import LOSSES_FILE, read_data, recipe_tokenizer
from mvkernels.model.training.tuning_recipe import SHIPPED, find_recipe
from tests.cli.test_cli import assert_one_line_error, invoke
from tests.support.tiny_model import tiny_model, tiny_tokenizer
from tests.training.test_training import Interrupt

TRACE = (
    "<Think>\nWe add {0}.\n<Parallel>\n<Goal>\n<Outline>\n1: the sum\n</Outline>\n<Outline>\n2: parts\n</Outline>\n"
    "</Goal>\n<Path>\n1: the whole is {0}\n</Path>\n<Path>\n2: two parts {1}\n</Path>\n<Conclusion>\nso it is {0}\n"
    "</Conclusion>\n</Parallel>\n</Think>\nThe product is {1}."
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model without the control tags."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(tags=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "traces.jsonl"
    rows = [{"prompt": f"add {i}", "trace": TRACE.format("12 " * i, "34 " * (7 - i))} for i in range(7)]
    rows[2] = {"question": rows[2]["prompt"], "text": rows[2]["trace"], "sequential": "an own chain"}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def recipe(base: Path, data: Path) -> TuningRecipe:
    return TuningRecipe(
        model=str(base),
        data=(str(data),),
        held_out=1,
        passes=(0.0, 0.5, 1.0),
        documents_per_step=4,
        tokens_per_row=500,
        learning_rate=3e-3,
        evaluate_every=2,
        save_every=2,
        chat=False,
    )


@pytest.fixture(scope="module")
def whole(recipe: TuningRecipe, tmp_path_factory: pytest.TempPathFactory) -> TuningRun:
    return tune(recipe, tmp_path_factory.mktemp("whole") / "run", progress=False)


def test_both_losses_fall_and_are_written(whole: TuningRun) -> None:
    assert [step for step, _ in whole.losses] == [1, 2, 3, 4, 5]
    assert [step for step, _ in whole.held_out_losses] == [0, 2, 4, 5]
    assert whole.losses[-1][1] < whole.losses[0][1] - 0.3
    assert whole.held_out_losses[-1][1] < whole.held_out_losses[0][1] - 0.3
    with (whole.folder / LOSSES_FILE).open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), float(r["loss"])) for r in rows if r["loss"]] == list(whole.losses)
    assert whole.trained == whole.parameters


def test_what_is_saved_loads_in_plain_transformers(whole: TuningRun) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole.folder)
    tokenizer = AutoTokenizer.from_pretrained(whole.folder)
    assert isinstance(model, Qwen2ForCausalLM) and model.dtype == torch.float32 and model.config.use_cache
    assert read_entry(model.config) == "canonical"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(TagTokens.from_tokenizer(tokenizer).ids) == 12
    assert not (whole.folder / "checkpoints").exists()


def test_an_interrupted_run_resumes_to_the_same_losses_and_weights(
    recipe: TuningRecipe, whole: TuningRun, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, tmp_path / "run", progress=False, callbacks=[Interrupt(3)])
    resumed = tune(recipe, tmp_path / "run", resume=True, progress=False)
    assert resumed.losses == whole.losses and resumed.held_out_losses == whole.held_out_losses
    weights, expected = (load_file(run.folder / "model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_lora_is_merged_or_saved_apart_and_resumes(recipe: TuningRecipe, tmp_path: Path) -> None:
    lora = replace(recipe, lora_rank=4, lora_dropout=0.1, learning_rate=1e-2, gradient_checkpointing=True)
    run = tune(lora, tmp_path / "merged", progress=False)
    assert 0 < run.trained < run.parameters / 3
    assert run.held_out_losses[-1][1] < run.held_out_losses[0][1] - 0.1
    with pytest.raises(KeyboardInterrupt):
        tune(lora, tmp_path / "resumed", progress=False, callbacks=[Interrupt(3)])
    resumed = tune(lora, tmp_path / "resumed", resume=True, progress=False)
    assert resumed.losses == run.losses and resumed.held_out_losses == run.held_out_losses
    # The merged model is what was measured: its loss on what is held out is the last one.
    model, tokenizer = load_checkpoint(run.folder)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert held_out_loss(lora, model, tokenizer) == pytest.approx(run.held_out_losses[-1][1], rel=1e-4)
    with pytest.raises(ValueError, match=r"merge = false: expected a base model with the control tags"):
        tune(replace(lora, merge=False), tmp_path / "adapter", progress=False)
    # An adapter on a base that has the tags already: peft loads it, and it is what was measured.
    from peft import PeftModel

    tagged = replace(lora, model=str(run.folder), merge=False)
    adapter = tune(tagged, tmp_path / "adapter", progress=False)
    assert not (adapter.folder / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(load_checkpoint(run.folder)[0], adapter.folder).merge_and_unload()
    assert held_out_loss(lora, loaded, tokenizer) == pytest.approx(adapter.held_out_losses[-1][1], rel=1e-4)


def held_out_loss(recipe: TuningRecipe, model: object, tokenizer: object) -> float:
    rows = PackedRows([(example.parallel,) for example in read_data(recipe, tokenizer).held_out])
    inputs = {name: value for name, value in rows[0].items() if name != "names"}
    with torch.no_grad():
        return float(patch_model(model).eval()(**inputs).loss)


def test_bf16(recipe: TuningRecipe, tmp_path: Path) -> None:
    run = tune(replace(recipe, precision="bf16", steps=2, tensorboard=True), tmp_path / "run", progress=False)
    assert len(run.losses) == 2
    assert AutoModelForCausalLM.from_pretrained(run.folder).dtype == torch.bfloat16
    assert list((run.folder / "logs").rglob("events.out.*"))
    # What was published in bf16 stays so, with LoRA merged too, whatever it is trained in, unless the recipe says else.
    again = replace(recipe, model=str(run.folder), steps=1, lora_rank=2)
    for dtype, expected in (("", torch.bfloat16), ("float32", torch.float32)):
        saved = tune(replace(again, dtype=dtype), tmp_path / f"again{dtype}", progress=False).folder
        assert {tensor.dtype for tensor in load_file(saved / "model.safetensors").values()} == {expected}
        assert json.loads((saved / "config.json").read_text())["dtype"] == str(expected).partition(".")[2]


def test_the_loss_of_a_step_does_not_depend_on_its_rows(recipe: TuningRecipe, whole: TuningRun, tmp_path: Path) -> None:
    apart = replace(recipe, tokens_per_row=220, steps=2)
    data = read_data(apart, recipe_tokenizer(apart))
    together = read_data(recipe, recipe_tokenizer(recipe)).mixture.rows_per_step
    assert data.mixture.rows_per_step > together
    found = tune(replace(apart, warmup_share=0.0), tmp_path / "apart", progress=False).losses
    expected = tune(replace(recipe, warmup_share=0.0, steps=2), tmp_path / "together", progress=False).losses
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-4)


def test_documents(recipe: TuningRecipe) -> None:
    tokenizer = recipe_tokenizer(recipe)
    examples = list(read_examples(recipe.data))
    encoded, skipped = encode_all(examples, Encoder(recipe, tokenizer), skip_bad=False)
    assert not skipped and len(encoded) == 7
    text = tokenizer.decode(encoded[0].parallel.ids)
    head = "add 0 Think step by step and in parallel before answering.\n"
    assert text == head + examples[0].trace + tokenizer.eos_token
    layout = encoded[0].parallel.layout()
    assert layout.has_branches and not layout.sampled[: len(tokenizer.encode(head))].any()
    chain = tokenizer.decode(encoded[0].sequential.ids)
    assert (
        chain == f"add 0 Think step by step before answering.\n{sequentialize(examples[0].trace)}{tokenizer.eos_token}"
    )
    assert not encoded[0].sequential.layout().has_branches
    assert "an own chain" in tokenizer.decode(encoded[2].sequential.ids)
    ids = torch.tensor(encoded[0].parallel.ids)
    assert encoded[0].parallel.labelled == int((layout.labels(ids) >= 0).sum())


def test_an_encoded_example_keeps_no_mask_and_its_text_is_parsed_once(
    recipe: TuningRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    for module in (traces, sequentialize_module):
        monkeypatch.setattr(module, "parse_text", lambda text, real=parse_text: [parsed.append(text), real(text)][1])
    examples = list(read_examples(recipe.data))
    before = len(mask_tensor._registered)
    encoded, _ = encode_all(examples, Encoder(recipe, recipe_tokenizer(recipe)), skip_bad=False)
    assert parsed == [example.trace for example in examples] and len(encoded) == len(parsed)
    gc.collect()
    assert len(mask_tensor._registered) == before


def test_the_tokenizer_is_loaded_once(recipe: TuningRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    real = tuning.load_tokenizer
    monkeypatch.setattr(tuning, "load_tokenizer", lambda path: [loaded.append(path), real(path)][1])
    tune(replace(recipe, steps=1, warmup_share=0.0), tmp_path / "out", progress=False)
    assert loaded == [recipe.tokenizer or recipe.model]


def test_mixture(recipe: TuningRecipe) -> None:
    encoded, _ = encode_all(read_examples(recipe.data), Encoder(recipe, recipe_tokenizer(recipe)), skip_bad=False)
    mixture = make_mixture(replace(recipe, tokens_per_row=700), encoded)
    assert [(one.parallel, one.sequential) for one in mixture.passes] == [(0, 7), (4, 3), (7, 0)]
    assert (mixture.steps, mixture.repeated) == (6, 3)  # 21 documents in steps of 4
    assert mixture.passes[2].parallel_tokens == sum(len(example.parallel.ids) for example in encoded)
    for step in range(mixture.steps):
        rows = mixture.rows[step * mixture.rows_per_step : (step + 1) * mixture.rows_per_step]
        lengths = [sum(len(document.ids) for document in row) for row in rows]
        assert sum(map(len, rows)) == 4 and max(lengths) <= 700
    # No fewer rows would do.
    assert mixture.rows_per_step == 1 or any(
        sum(len(d.ids) for row in mixture.rows[i : i + mixture.rows_per_step] for d in row)
        > 700 * (mixture.rows_per_step - 1)
        for i in range(0, len(mixture.rows), mixture.rows_per_step)
    )
    assert make_mixture(recipe, encoded, processes=4).rows_per_step == 4
    with pytest.raises(ValueError, match=r"documents_per_step: expected at least one document for each of 5 processes"):
        make_mixture(recipe, encoded, processes=5)
    row = PackedRows(mixture.rows)[0]
    assert isinstance(row["branch_layout"], BranchLayout) and len(row["names"]) == row["branch_layout"].num_documents


def test_bad_traces_are_named_and_skipped_only_when_asked(recipe: TuningRecipe, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    good = json.dumps({"trace": TRACE.format(1, 2)})
    lines = [good, '{"trace": "<Think> open"}', "{no json", '{"prompt": "p"}', json.dumps({"trace": "a " * 600}), "[1]"]
    bad.write_text("\n".join(lines), encoding="utf-8")
    recipe = replace(recipe, data=(str(bad),), held_out=0)
    with pytest.raises(ValueError, match=r"bad.jsonl:2: line 1, token 2: expected text, <Parallel> or </Think>"):
        tune(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    data = read_data(recipe, recipe_tokenizer(recipe), skip_bad=True)
    assert [reason.split(": ")[0].rpartition(":")[2] for reason in data.skipped] == ["2", "3", "4", "5", "6"]
    assert "at most 500 tokens" in data.skipped[3]
    cut = read_data(replace(recipe, cut=True, tokens_per_document=150), recipe_tokenizer(recipe), skip_bad=True)
    assert len(cut.skipped) == 4
    with pytest.raises(ValueError, match=r"data: expected a .jsonl, .xml or .parquet file, .* got .*nowhere"):
        read_data(replace(recipe, data=("nowhere",)), recipe_tokenizer(recipe))


def test_out_of_memory_names_the_traces(recipe: TuningRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, *arguments: object, **named: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(PackedTrainer, "compute_loss", full)
    with pytest.raises(ValueError, match=r"ran out of it after step 0 in a row of \d+ tokens of .*traces.jsonl:\d+"):
        tune(recipe, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "got DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "expected FSDP2 .*got version 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "lora_rank: expected 0 with FSDP.*got 4"),
    ],
)
def test_ways_to_shard_that_are_refused(
    environment: dict[str, str], message: str, recipe: TuningRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        tune(replace(recipe, lora_rank=4), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_shipped_recipes_and_overrides(tmp_path: Path) -> None:
    paper = load_recipe(find_recipe("multiverse-32b.toml"))
    assert paper.passes == (0, 0, 0.1, 0.5, 0.5, 0.9, 1, 1) and paper.betas == (0.9, 0.95)
    assert (paper.learning_rate, paper.warmup_share, paper.weight_decay) == (1e-5, 0.05, 1e-4)
    assert (paper.documents_per_step, paper.tokens_per_row, paper.precision) == (16, 32768, "bf16")
    assert paper.gradient_checkpointing
    assert {path.name for path in SHIPPED.glob("*.toml")} == {"multiverse-32b.toml", "smollm2-lora.toml"}
    given = {"data": ("a.jsonl", "b"), "passes": [0, 1], "cut": True, "lora_rank": 8, "learning_rate": 1e-4}
    changed = load_recipe(find_recipe("multiverse-32b.toml"), given)
    assert (changed.data, changed.passes, changed.cut, changed.lora_rank) == (("a.jsonl", "b"), (0.0, 1.0), True, 8)
    assert changed.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nothing": 1}, r"nothing: expected a field of a recipe"),
        ({"lora_rank": "x"}, r"lora_rank: expected a whole number, got 'x'"),
        ({"passes": (2,)}, r"passes: expected shares in \[0, 1\]"),
        ({"passes": "1"}, r"passes: expected a list, got '1'"),
        ({"cut": "maybe"}, r"cut: expected true or false, got 'maybe'"),
        ({"precision": "fp8"}, r"precision: expected one of \('fp32', 'bf16'\), got 'fp8'"),
        ({"tokens_per_document": 99999}, r"tokens_per_document: expected at most tokens_per_row, 32768, got 99999"),
    ],
)
def test_bad_fields(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(find_recipe("multiverse-32b.toml"), given)


def test_interrupted_the_command_says_how_to_go_on(base: Path, data: Path, tmp_path: Path, interrupts: Any) -> None:
    """With everything that was given; and so it does go on."""
    file, out = tmp_path / "my recipe.toml", tmp_path / "an out"
    file.write_text(f'model = "{base}"\ndata = ["{data}"]\ntokens_per_row = 500\nchat = false\nsave_every = 1\n')
    words = ("--documents-per-step", 3, "--learning-rate", 0.001, "--quiet", "--steps=3")
    interrupts(2)
    stopped = invoke("tune", file, out, *words)
    assert stopped.exit_code == 130, stopped.output
    said = stopped.stderr.strip().splitlines()[-1]
    assert said.startswith("interrupted; to go on: mvkernels tune '") and "--resume" in said
    interrupts(0)
    done = invoke(*shlex.split(said.partition("mvkernels ")[2]))
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads((out / "recipe.json").read_text())["documents_per_step"] == 3
    with (out / LOSSES_FILE).open() as rows:
        assert [row["step"] for row in csv.DictReader(rows)] == ["1", "2", "3"]


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that has Ctrl-C come in the n-th row from now on (0: never)."""
    plain = PackedTrainer.training_step

    def at(number: int) -> None:
        rows = iter(range(1, 999))

        def step(self: PackedTrainer, *arguments: Any, **named: Any) -> Any:
            if next(rows) == number:
                raise KeyboardInterrupt
            return plain(self, *arguments, **named)

        monkeypatch.setattr(PackedTrainer, "training_step", step)

    return at


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Qwen/Qwen2.5-7B"}, "hf download Qwen/Qwen2.5-7B --local-dir Qwen2.5-7B"),
        ({"tokenizer": "nowhere"}, "expected a local model folder or a .gguf file, got nowhere"),
        ({"data": "nowhere"}, "data: expected a .jsonl, .xml or .parquet file, or a folder with some, got nowhere"),
        ({"precision": "fp8"}, "precision: expected one of"),
        ({"dtype": "fp8"}, "dtype: expected one of"),
        ({"steps": "9" * 5000}, "expected a recipe in TOML"),
        ({"passes": "[" * 9999}, "expected a recipe in TOML"),
    ],
    ids=["hub id", "tokenizer", "data", "precision", "dtype", "long number", "deep list"],
)
def test_bad_input_is_one_line(change: dict[str, str], message: str, base: Path, data: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "my.toml", tmp_path / "out"
    values = {"model": f'"{base}"', "data": f'["{data}"]'}
    values |= {name: value if name in ("steps", "passes") else f'"{value}"' for name, value in change.items()}
    file.write_text("".join(f"{name} = {value}\n" for name, value in values.items()))
    if "data" in change:
        file.write_text(file.read_text().replace('data = "nowhere"', 'data = ["nowhere"]'))
    assert_one_line_error(invoke("tune", file, out), message)
    assert not out.exists()


def test_the_command(base: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        f'model = "{base}"\ndata = ["{data}"]\ndocuments_per_step = 4\ntokens_per_row = 500\nchat = false\n'
    )
    shown = invoke("tune", file, "--dry-run", "--passes", "0.5,1", "--seed", 3)
    assert shown.exit_code == 0, shown.output
    assert "4 steps of 4 documents in 2 rows" in shown.output.replace("\n", " ")
    out = tmp_path / "out"
    result = invoke("tune", file, out, "--steps", 1, "--quiet", "--learning-rate", 0.001)
    assert result.exit_code == 0, (result.output, result.exception)
    saved = json.loads((out / "recipe.json").read_text())
    assert (saved["steps"], saved["learning_rate"], saved["passes"]) == (1, 0.001, [1.0])
    assert result.stdout.startswith(f"{out}: ")
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert_one_line_error(invoke("tune", file), "expected a folder OUT")
    assert_one_line_error(invoke("tune", tmp_path / "no.toml", out), "expected a recipe", "multiverse-32b.toml")
    assert_one_line_error(invoke("train", file, out, "--dry-run"), "mvkernels tune RECIPE OUT")
    file.write_text("model = ")
    assert_one_line_error(invoke("tune", file, "--dry-run"), "expected a recipe in TOML")


SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@pytest.mark.parametrize(
    ("processes", "module", "more"),
    [(2, "mvkernels", {}), (4, "tests.training.fsdp_cpu", SHARDED)],
    ids=["two hold the weights", "four share them"],
)
def test_processes_train_as_one(
    processes: int, module: str, more: dict[str, str], base: Path, data: Path, tmp_path: Path
) -> None:
    """As under torchrun, with gloo: each takes its rows, and the loss of a step is that of all of them; so are the
    weights.
    """
    file = tmp_path / "my.toml"
    file.write_text(
        f'model = "{base}"\ndata = ["{data}"]\nheld_out = 1\ndocuments_per_step = 4\ntokens_per_row = 500\n'
        "chat = false\nlearning_rate = 3e-3\npasses = [0.0, 1.0]\nsteps = 3\n"
    )
    alone = tune(load_recipe(file), tmp_path / "alone", progress=False)
    launch = [sys.executable, "-m", "tests.training.processes", str(processes), module]
    command = [*launch, "tune", str(file), str(tmp_path / "many"), "--quiet"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "many" / LOSSES_FILE).open() as rows:
        found = [float(row["loss"]) for row in csv.DictReader(rows) if row["loss"]]
    assert found == pytest.approx([loss for _, loss in alone.losses], rel=1e-5)
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("many", "alone"))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4)
