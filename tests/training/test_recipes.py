"""Every field of both recipes does what it says: optimizer groups, the rate of each step, labels, sizes, seeds."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from mvkernels import TagTokens
from mvkernels.model.checkpoint.add_tags import read_entry
from mvkernels.model.tasks import arithmetic, sat
from mvkernels.model.training import Recipe, TuningRecipe, train, tune
from mvkernels.model.training.data import PackedProblems, document_text, encode_document
from mvkernels.model.training.mixture import make_mixture
from mvkernels.model.training.optimizer import MuonAdamW, orthogonal
from mvkernels.model.training.scratch import make_tokenizer
from mvkernels.model.training.traces import Encoder, encode_all, read_examples
from mvkernels.model.training.tuning import read_data, recipe_tokenizer
from tests.support.tiny_model import tiny_model, tiny_tokenizer
from tests.training.test_tuning import TRACE

# No field has its default, and no two numbers are equal.
FROM_NOTHING = Recipe(
    task="sat", steps=7, tokens_per_step=120, learning_rate=0.004, embedding_learning_rate=0.005, weight_decay=0.06,
    warmup_steps=3, sequential_share=0.25, bare_share=0.75, hidden_size=64, layers=2, intermediate_size=48,
    rope_theta=555.0, bf16=False, seed=9, log_every=2, save_every=4,
)  # fmt: skip


class Seen(TrainerCallback):
    """What a training is made of; and then it ends, or goes on with the rate of every update noted."""

    def __init__(self, ends: bool = True) -> None:
        self.ends = ends
        self.rates: list[tuple[float, ...]] = []
        self.saved: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.args, self.model, self.groups = args, kwargs["model"], kwargs["optimizer"].param_groups
        self.weights = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.training = self.model.training
        if self.ends:
            raise KeyboardInterrupt

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(tuple(group["lr"] for group in kwargs["optimizer"].param_groups))

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)


def begun(recipe: Recipe | TuningRecipe, folder: Path) -> Seen:
    seen = Seen()
    run: Any = train if isinstance(recipe, Recipe) else tune
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder / "out", progress=False, callbacks=[seen])
    return seen


# --- the recipe of a model from nothing ---


def test_what_a_training_from_nothing_is_made_of(tmp_path: Path) -> None:
    seen = begun(FROM_NOTHING, tmp_path)
    config = seen.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (64, 2, 48)
    assert config.num_attention_heads == config.num_key_value_heads == 2 and config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == 555.0
    embeddings = seen.weights["model.embed_tokens.weight"]
    assert embeddings.shape == (len(make_tokenizer(sat.TASK)), 64)
    assert embeddings.std().item() == pytest.approx(0.5 / 8, rel=0.02)
    matrices, others = seen.groups
    assert matrices["muon"] and not others["muon"]
    assert (matrices["initial_lr"], matrices["weight_decay"], matrices["momentum"]) == (0.004, 0.06, 0.95)
    assert (others["initial_lr"], others["weight_decay"], others["betas"]) == (0.005, 0.0, (0.9, 0.98))
    assert {tuple(p.shape) for p in matrices["params"]} == {(64, 64), (48, 64), (64, 48)}
    assert len(matrices["params"]) == 2 * 7 and len(others["params"]) == len(seen.weights) - 14
    args = seen.args
    assert (args.max_steps, args.logging_steps, args.save_steps, args.seed, args.bf16) == (7, 2, 4, 9, False)
    assert args.max_grad_norm == 1.0 and args.gradient_accumulation_steps == 1
    # The weights are of the seed, and of nothing that was drawn before.
    torch.randn(3)
    again, other = begun(FROM_NOTHING, tmp_path / "b"), begun(replace(FROM_NOTHING, seed=8, bf16=True), tmp_path / "c")
    assert torch.equal(again.weights["model.embed_tokens.weight"], embeddings)
    assert not torch.equal(other.weights["model.embed_tokens.weight"], embeddings) and other.args.bf16


def test_the_rates_losses_and_checkpoints_of_each_step(tmp_path: Path) -> None:
    """The loss of a step is also logged where the steps are no multiple of `log_every`."""
    seen = Seen(ends=False)
    run = train(FROM_NOTHING, tmp_path / "out", progress=False, callbacks=[seen])
    shares = [1 / 3, 2 / 3 * 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    assert [rate for rate, _ in seen.rates] == pytest.approx([0.004 * share for share in shares], rel=1e-12)
    assert [rate for _, rate in seen.rates] == pytest.approx([0.005 * share for share in shares], rel=1e-12)
    assert [step for step, _ in run.losses] == [2, 4, 6, 7] and seen.saved == [4, 7]
    assert 0 < run.clock[0] < run.clock[1] < run.clock[2] < run.clock[3] == run.seconds


def test_without_warmup_the_first_step_has_the_peak(tmp_path: Path) -> None:
    """A training shorter than `log_every` has its loss too, and how long it took."""
    seen = Seen(ends=False)
    short = replace(FROM_NOTHING, warmup_steps=0, steps=2, log_every=20, save_every=20)
    run = train(short, tmp_path / "out", progress=False, callbacks=[seen])
    assert [rate for rate, _ in seen.rates] == pytest.approx([0.004, 0.002], rel=1e-12)
    assert [step for step, _ in run.losses] == [2] and run.seconds > 0
    assert json.loads((run.folder / "training.json").read_text())["losses"] == [list(run.losses[0])]


def rows(**changes: Any) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """The documents of a row of 6000 tokens: text, ids, labels."""
    recipe = replace(FROM_NOTHING, **{"task": "arithmetic", "tokens_per_step": 6000, **changes})
    tokenizer = make_tokenizer(arithmetic.TASK)
    row = PackedProblems(recipe, tokenizer)[1]
    found = []
    bounds = row["branch_layout"].cu_seqlens.tolist()
    assert bounds[-1] == row["input_ids"].shape[1] == recipe.tokens_per_step
    for start, end in pairwise(bounds):
        ids = row["input_ids"][0, start:end]
        found.append((tokenizer.decode(ids), ids, row["labels"][0, start:end]))
    return found


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.2, 0.01, 0.4), (0.8, 0.6, 0.99), (1.0, 1, 1)])
def test_shares_of_problems(share: float, least: float, most: float) -> None:
    chains = ["<Parallel>" not in text for text, _, _ in rows(sequential_share=share, tokens_per_step=16000)[:-1]]
    assert len(chains) > 15 and least <= sum(chains) / len(chains) <= most
    documents = rows(sequential_share=0.0, bare_share=share, tokens_per_step=16000)[:-1]
    bare = [" in parallel" not in text for text, _, _ in documents if "<Parallel>" in text]
    assert len(bare) > 10 and least <= sum(bare) / len(bare) <= most
    assert all("Think step by step before" in text for text, _, _ in documents if "<Parallel>" not in text)


def test_problems_and_styles_are_of_the_seed_and_the_row() -> None:
    def style(**changes: Any) -> list[bool]:
        return ["<Parallel>" in text for text, _, _ in rows(sequential_share=0.5, **changes)]

    assert rows(seed=1)[0][0] == rows(seed=1)[0][0] != rows(seed=2)[0][0]
    assert style(seed=1) == style(seed=1) != style(seed=2)
    assert "Can all" in rows(task="sat", tokens_per_step=200)[0][0]


def test_labels_of_a_problem_are_its_answer() -> None:
    """Every token of a chain from the newline behind the prompt on, with the end of text; of blocks also, but for what
    the engine writes. The first answer token is the newline that the prompt ends without.
    """
    tokenizer = make_tokenizer(arithmetic.TASK)
    tags = TagTokens.from_tokenizer(tokenizer)
    problem = next(arithmetic.generate(3))
    for parallel in (False, True):
        prompt, answer = document_text(problem, parallel)
        assert prompt + "\n" == problem.prompt(parallel) and answer.startswith("\n<Think>")
        document = encode_document(prompt, answer, tags, tokenizer.eos_token_id)
        assert document.prompt_length == len(tags.encode(prompt))
        assert document.ids[document.prompt_length] == tags.encode("\n")[0]
        assert document.ids == [*tags.encode(prompt), *tags.encode(answer), tokenizer.eos_token_id]
        assert document.cut(document.prompt_length - 1).prompt_length == document.prompt_length - 1
        assert document.cut(9).ids == document.ids[:9]
    for text, ids, labels in rows()[:-1]:
        head = text.index("\n<Think>")
        prompt_length = len(tags.encode(text[:head]))
        wanted = ids.clone()
        wanted[:prompt_length] = -100
        place = prompt_length
        forced = False
        for number in ids[prompt_length:].tolist():
            piece = tokenizer.decode([number])
            if piece in ("<Path>", "<Conclusion>"):
                wanted[place - 1 : place + 2] = -100  # with both newlines
                forced = piece == "<Path>"
            elif forced and wanted[place] != -100:  # the index up to its colon
                wanted[place] = -100
                forced = not piece.endswith(":")
            place += 1
        assert labels.tolist() == wanted.tolist(), text


def test_an_update_of_muon_and_adamw() -> None:
    """Both by their formulas, twice; only the matrices decay."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(6, 4), "embed": nn.Embedding(5, 6)})
    matrix, adamw = model["layer"].weight.detach().clone(), [model["layer"].bias, model["embed"].weight]
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in adamw]
    reference = torch.optim.AdamW(copies, lr=0.03, betas=(0.8, 0.7), eps=1e-8, weight_decay=0.0)
    optimizer = MuonAdamW(model, 0.02, 0.3, 0.03, momentum=0.6, betas=(0.8, 0.7))
    momentum = torch.zeros(4, 6)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        grad = model["layer"].weight.grad.clone()
        momentum = 0.6 * momentum + grad
        direction = orthogonal((grad + 0.6 * momentum)[None])[0]
        matrix = matrix * (1 - 0.02 * 0.3) - 0.02 * 0.2 * 6**0.5 * direction
        for copy, parameter in zip(copies, adamw, strict=True):
            copy.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(model["layer"].weight.detach(), matrix)
        torch.testing.assert_close([p.detach() for p in adamw], [p.detach() for p in copies])


# --- the recipe of a tuning ---


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two tokenizers of other vocabularies, and six traces."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer(tags=False).save_pretrained(folder / "model")
    tiny_tokenizer(tags=True).save_pretrained(folder / "tagged")
    lines = [{"prompt": f"add {i}", "trace": TRACE.format("12 " * (i + 1), "34")} for i in range(6)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def tuned(inputs: Path) -> TuningRecipe:
    """No number has its default."""
    return TuningRecipe(
        model=str(inputs / "model"), data=(str(inputs / "traces.jsonl"),), tokenizer=str(inputs / "tagged"),
        end_of_text="the", held_out=1, semantics="released", parallel_ending=" both", sequential_ending=" one",
        chat=False, passes=(1.0, 0.4), documents_per_step=2, tokens_per_row=400, steps=4, learning_rate=2e-3,
        warmup_share=0.3, weight_decay=0.07, betas=(0.8, 0.85), max_grad_norm=0.9, gradient_checkpointing=True,
        lora_rank=3, lora_alpha=12.0, lora_dropout=0.25, evaluate_every=3, log_every=2, save_every=4, seed=5,
    )  # fmt: skip


def test_what_a_tuning_is_made_of(tuned: TuningRecipe, tmp_path: Path) -> None:
    seen = begun(tuned, tmp_path)
    args = seen.args
    assert (args.max_steps, args.logging_steps, args.save_steps, args.eval_steps, args.seed) == (4, 2, 4, 3, 5)
    assert (args.max_grad_norm, args.bf16, args.lr_scheduler_type) == (0.9, False, "cosine")
    assert args.gradient_accumulation_steps == read_data(tuned, recipe_tokenizer(tuned)).mixture.rows_per_step
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    decayed, others = seen.groups
    assert (decayed["initial_lr"], decayed["weight_decay"]) == (2e-3, 0.07)
    assert (others["initial_lr"], others["weight_decay"]) == (2e-3, 0.0)
    assert all(group["betas"] == (0.8, 0.85) and group["eps"] == 1e-8 for group in seen.groups)
    model: Any = seen.model
    assert model.is_gradient_checkpointing and model.dtype == torch.float32
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 12.0, 0.25)
    assert sorted(config.trainable_token_indices) == sorted(TagTokens.from_tokenizer(recipe_tokenizer(tuned)).ids)
    layers = {name.split(".lora_A")[0].split("layers.")[1] for name in seen.weights if ".lora_A" in name}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {layer.split(".")[-1] for layer in layers} == {*kinds} and len(layers) == 2 * 7
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 12.0 / 3 and layer.lora_dropout["default"].p == 0.25
    assert read_entry(model.config) == "released" and model.config.eos_token_id == recipe_tokenizer(tuned).eos_token_id


def test_a_tuning_of_all_weights_without_what_is_off(tuned: TuningRecipe, tmp_path: Path) -> None:
    changes = {
        "lora_rank": 0,
        "gradient_checkpointing": False,
        "evaluate_every": 0,
        "tokenizer": "",
        "precision": "bf16",
    }
    plain = replace(tuned, **changes)
    seen, other = begun(plain, tmp_path / "a"), begun(replace(plain, seed=6), tmp_path / "b")
    assert not seen.model.is_gradient_checkpointing and seen.args.bf16 and seen.model.dtype == torch.float32
    assert seen.args.eval_steps == seen.args.max_steps
    assert not any("lora" in name for name in seen.weights)
    decayed, others = seen.groups
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in others["params"])
    # The rows of the new tags are of the seed, and the rest is the model.
    name = "model.embed_tokens.weight"
    base = tiny_model().state_dict()[name]
    known = len(tiny_tokenizer(tags=False))
    assert torch.equal(seen.weights[name][:known], base[:known])
    ids = TagTokens.from_tokenizer(recipe_tokenizer(plain)).ids
    assert not torch.equal(seen.weights[name][list(ids)], other.weights[name][list(ids)])


@pytest.mark.parametrize(("warmup_share", "warmup"), [(0.3, 2), (0.0, 0)])
def test_the_rates_of_each_step_of_a_tuning(
    warmup_share: float, warmup: int, tuned: TuningRecipe, tmp_path: Path
) -> None:
    """A straight line up to the peak, then half a cosine; and what is logged, measured and saved."""
    seen = Seen(ends=False)
    recipe = replace(tuned, lora_rank=0, warmup_share=warmup_share, steps=5, gradient_checkpointing=False)
    run = tune(recipe, tmp_path / "out", progress=False, callbacks=[seen])
    wanted = [
        step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (5 - warmup)))
        for step in range(5)
    ]
    assert [rate for rate, _ in seen.rates] == pytest.approx([2e-3 * share for share in wanted], rel=1e-12)
    assert [step for step, _ in run.losses] == [2, 4, 5] and [step for step, _ in run.held_out_losses] == [0, 3, 5]
    assert seen.saved == [4, 5]


def names_of(documents: Any) -> list[str]:
    return [document.name.rpartition(":")[2] for document in documents]


def test_the_documents_of_a_recipe(tuned: TuningRecipe, inputs: Path) -> None:
    tokenizer = recipe_tokenizer(tuned)
    assert tokenizer.eos_token == "the" and len(tokenizer.get_vocab()) == len(tiny_tokenizer())
    data = read_data(replace(tuned, held_out=2, steps=0), tokenizer)
    assert names_of(example.parallel for example in data.held_out) == ["5", "6"]
    trained = names_of(document for row in data.mixture.rows for document in row)
    assert set(trained) == {"1", "2", "3", "4"} and len(trained) == 8
    encoded, _ = encode_all(read_examples(tuned.data), Encoder(tuned, tokenizer), skip_bad=False)
    tags = TagTokens.from_tokenizer(tokenizer)
    for document, ending in ((encoded[0].parallel, " both"), (encoded[0].sequential, " one")):
        head = tags.encode(f"add 0{ending}\n")
        assert list(document.ids[: len(head)]) == head and document.ids[-1] == tokenizer.eos_token_id
        labels = document.layout().labels(torch.tensor(document.ids))
        # From the first token of the answer on, and none of the prompt.
        assert (labels[: len(head)] == -100).all() and labels[len(head)] == document.ids[len(head)]
        assert labels[-1] == document.ids[-1] and document.labelled == int((labels >= 0).sum())
    assert (encoded[0].sequential.layout().labels(torch.tensor(encoded[0].sequential.ids)) >= 0).sum() == len(
        encoded[0].sequential.ids
    ) - len(tags.encode("add 0 one\n"))
    canonical, _ = encode_all(
        read_examples(tuned.data), Encoder(replace(tuned, semantics="canonical"), tokenizer), skip_bad=False
    )
    released = encoded[0].parallel.layout().position_ids
    assert not torch.equal(canonical[0].parallel.layout().position_ids, released)
    asked, _ = encode_all(read_examples(tuned.data), Encoder(replace(tuned, chat=True), tokenizer), skip_bad=False)
    assert tokenizer.decode(asked[0].parallel.ids).startswith("user: add 0 both\nbot: ")


def test_the_longest_document(tuned: TuningRecipe) -> None:
    """`tokens_per_document`, else `tokens_per_row`: to the token."""
    tokenizer = recipe_tokenizer(tuned)
    examples = list(read_examples(tuned.data))
    longest = max(len(one.parallel.ids) for one in encode_all(examples, Encoder(tuned, tokenizer), False)[0])
    for field in ("tokens_per_document", "tokens_per_row"):
        fits = replace(tuned, **{field: longest})
        assert not encode_all(examples, Encoder(fits, tokenizer), skip_bad=True)[1]
        tight = replace(tuned, **{field: longest - 1})
        assert len(encode_all(examples, Encoder(tight, tokenizer), skip_bad=True)[1]) == 1
        cut, bad = encode_all(examples, Encoder(replace(tight, cut=True), tokenizer), skip_bad=True)
        assert not bad and max(len(one.parallel.ids) for one in cut) == longest - 1


def test_passes_steps_and_what_fills_the_last_step(tuned: TuningRecipe) -> None:
    recipe = replace(tuned, documents_per_step=4, steps=0, tokens_per_row=2000)
    tokenizer = recipe_tokenizer(recipe)
    encoded, _ = encode_all(read_examples(recipe.data), Encoder(recipe, tokenizer), skip_bad=False)
    parallel = {id(example.parallel) for example in encoded}
    mixture = make_mixture(recipe, encoded)
    assert [(one.share, one.parallel, one.sequential) for one in mixture.passes] == [(1.0, 6, 0), (0.4, 2, 4)]
    assert (mixture.steps, mixture.rows_per_step, mixture.repeated) == (3, 1, 0)
    # Rows are sorted by length, so a pass is compared as a set.
    drawn = [document for row in mixture.rows for document in row]
    assert sorted(names_of(drawn[:4]) + names_of(drawn[4:])) == sorted(2 * "123456")
    assert [id(document) in parallel for document in drawn[:4]] == [True] * 4
    # Twelve documents in steps of seven: the first two of the last pass come again.
    for share in (0.0, 1.0):
        short = replace(recipe, passes=(1 - share, share), documents_per_step=7)
        many = make_mixture(short, encoded)
        assert (many.steps, many.repeated) == (2, 2)
        order = make_mixture(replace(short, documents_per_step=1), encoded).rows
        last = [row[0] for row in order[6:12]]
        wanted = [*last[1:], *last[:2]]
        assert sorted(map(id, many.rows[1])) == sorted(map(id, wanted))
    assert make_mixture(replace(recipe, steps=2), encoded).steps == 2
    orders = [names_of(row[0] for row in make_mixture(replace(recipe, documents_per_step=1, seed=seed), encoded).rows)
              for seed in (5, 5, 6)]  # fmt: skip
    assert orders[0] == orders[1] != orders[2] and orders[0][:6] != orders[0][6:]
    fewest = max(sum(len(document.ids) for document in row) for row in mixture.rows)
    assert make_mixture(replace(recipe, tokens_per_row=fewest), encoded).rows_per_step == 1
    assert make_mixture(replace(recipe, tokens_per_row=fewest - 1), encoded).rows_per_step == 2


# What has its default in these recipes, and another value in a test above or in test_tuning.py.
OTHERWISE = {"merge", "tensorboard", "dtype", "precision", "cut", "tokens_per_document"}


def test_no_field_is_left_out(tuned: TuningRecipe) -> None:
    """A new field changes these recipes, or it is not noticed when it is ignored."""
    for recipe, plain in ((FROM_NOTHING, Recipe()), (tuned, TuningRecipe(model="m", data=("d",)))):
        defaults = {field.name for field in fields(recipe) if getattr(recipe, field.name) == getattr(plain, field.name)}
        assert defaults <= OTHERWISE
