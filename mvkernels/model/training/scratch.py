"""`train`: makes a small causal language model with branch attention from nothing, on generated problems.

The loop is transformers' `Trainer`: packed rows through `patch_model`, checkpoints, exact resumption. On one machine
the same recipe gives the same losses and weights, interrupted or not.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from mvkernels import patch_model, unpatch_model
from mvkernels.model.checkpoint.add_tags import CONFIG_KEY, multiverse_entry
from mvkernels.model.files import whole_folder
from mvkernels.model.tasks import Task, task_named
from mvkernels.model.tasks.common import PARALLEL_ENDING
from mvkernels.model.training.checkpoints import CHECKPOINTS
from mvkernels.model.training.data import PackedProblems
from mvkernels.model.training.optimizer import MuonAdamW
from mvkernels.model.training.recipe import HEAD_SIZE, Recipe
from mvkernels.model.training.recipe_file import prepare_folder
from mvkernels.model.training.tokenizer import build_tokenizer
from mvkernels.model.training.trainer import PackedTrainer, quiet

MAX_POSITIONS = 4096
TRAINING_FILE = Recipe.outcome


@dataclass(frozen=True)
class TrainingRun:
    """What came out; TRAINING_FILE in the folder has the same. losses: (step, mean loss since the last one). seconds:
    of training, up to the last logged loss, those before an interruption included and what had to be done again not
    counted. clock: the same at each logged loss. threads: that PyTorch had.
    """

    folder: Path
    losses: tuple[tuple[int, float], ...]
    parameters: int
    seconds: float
    clock: tuple[float, ...] = ()
    threads: int = 1


def train(
    recipe: Recipe,
    output_dir: str | Path,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingRun:
    """Trains a model by `recipe` and saves it with its tokenizer, configs and recipe in `output_dir`.

    resume: go on from the last whole checkpoint of an interrupted run in `output_dir`; without one, from the first
    step. progress: show a bar. callbacks: of transformers' Trainer, besides. Raises ValueError when `output_dir` is not
    empty and `resume` is not set, or when there is nothing to resume or another recipe was interrupted there; OSError,
    which names the file or folder, where it cannot be written.
    """
    folder = Path(output_dir)
    checkpoint = prepare_folder(recipe, folder, resume)
    set_seed(recipe.seed)
    tokenizer = make_tokenizer(task_named(recipe.task))
    model = make_model(recipe, tokenizer)
    optimizer = MuonAdamW(model, recipe.learning_rate, recipe.weight_decay, recipe.embedding_learning_rate)
    trainer = PackedTrainer(
        model=patch_model(model),
        args=_arguments(recipe, folder),
        train_dataset=PackedProblems(recipe, tokenizer),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(recipe))),
        progress=progress,
        callbacks=[_Clock(), *callbacks],
    )
    with quiet():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    unpatch_model(model).config.use_cache = True  # the trainer has turned it off
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in logged)
    clock = tuple(float(entry["seconds"]) for entry in logged)
    result = TrainingRun(folder, losses, model.num_parameters(), clock[-1], clock, torch.get_num_threads())
    known = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "folder"}
    with quiet(), whole_folder(folder, ("config.json", TRAINING_FILE)) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / TRAINING_FILE).write_text(json.dumps(known) + "\n", encoding="utf-8")
    shutil.rmtree(folder / CHECKPOINTS)
    return result


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """The tokenizer of a task: always the same. Its chat template asks for parallel thinking."""
    problem = next(task.generate(0, "train"))
    words = re.findall(r" ?[A-Za-z]+", problem.prompt(parallel=True) + problem.prompt(parallel=False))
    return build_tokenizer([*words, *task.words], task.added, chat_ending=PARALLEL_ENDING)


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A model with random weights, from torch's generator, of the sizes in the recipe."""
    heads = recipe.hidden_size // HEAD_SIZE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        initializer_range=0.5 * recipe.hidden_size**-0.5,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The task, so that other questions are not asked without a word: `checkpoint.trained_task`.
    setattr(config, CONFIG_KEY, {**multiverse_entry(), "task": recipe.task})
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=not torch.accelerator.is_available(),
        max_grad_norm=1.0,
        logging_steps=recipe.log_every,
        save_strategy="steps",
        save_steps=recipe.save_every,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )


def _schedule(recipe: Recipe) -> Callable[[int], float]:
    """Share of the peak learning rate at a step: up along a straight line, down along another to 0."""

    def share(step: int) -> float:
        rising = (step + 1) / recipe.warmup_steps if recipe.warmup_steps else 1.0
        return min(1.0, rising) * (1 - step / recipe.steps)

    return share


class _Clock(TrainerCallback):
    """Writes into the log how long the training has taken, which a resumed run reads there and goes on from."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        before = float(state.log_history[-1].get("seconds", 0)) if state.log_history else 0.0
        self.started = time.perf_counter() - before

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.log_history[-1]["seconds"] = time.perf_counter() - self.started
