"""`train`: makes a small causal language model with branch attention from nothing, on generated problems.

The loop is transformers' `Trainer`: packed rows through `patch_model`, checkpoints, exact resumption. On one machine
the same recipe gives the same losses and weights, interrupted or not.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mvkernels import patch_model, unpatch_model
from mvkernels.model.tasks.arithmetic import PARALLEL_ENDING, generate
from mvkernels.model.tokens import CONFIG_KEY, multiverse_entry
from mvkernels.model.training.data import PackedProblems
from mvkernels.model.training.optimizer import MuonAdamW
from mvkernels.model.training.recipe import HEAD_SIZE, Recipe
from mvkernels.model.training.recipe_file import CHECKPOINTS, prepare_folder
from mvkernels.model.training.tokenizer import build_tokenizer
from mvkernels.model.training.trainer import PackedTrainer, quiet

MAX_POSITIONS = 4096
# Positions hardly go beyond 500: slow rotations would tell nothing apart.
ROPE_THETA = 1000.0


@dataclass(frozen=True)
class TrainingRun:
    """What came out. losses: (step, mean loss since the last one). seconds: of this call, without what was resumed."""

    folder: Path
    losses: tuple[tuple[int, float], ...]
    parameters: int
    seconds: float


def train(
    recipe: Recipe,
    output_dir: str | Path,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingRun:
    """Trains a model by `recipe` and saves it with its tokenizer, configs and recipe in `output_dir`.

    resume: go on from the last checkpoint of an interrupted run in `output_dir`. progress: show a bar. callbacks: of
    transformers' Trainer, besides. Raises ValueError when `output_dir` is not empty and `resume` is not set, or when
    there is nothing to resume or another recipe was interrupted there.
    """
    folder = Path(output_dir)
    checkpoint = prepare_folder(recipe, folder, resume)
    set_seed(recipe.seed)
    tokenizer = make_tokenizer()
    model = make_model(recipe, tokenizer)
    optimizer = MuonAdamW(model, recipe.learning_rate, recipe.weight_decay, recipe.embedding_learning_rate)
    trainer = PackedTrainer(
        model=patch_model(model),
        args=_arguments(recipe, folder),
        train_dataset=PackedProblems(recipe, tokenizer),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(recipe))),
        progress=progress,
        callbacks=list(callbacks),
    )
    started = time.perf_counter()
    with quiet():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - started
        unpatch_model(model).config.use_cache = True  # the trainer has turned it off
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder / CHECKPOINTS)
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    return TrainingRun(folder, losses, model.num_parameters(), seconds)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the task: always the same. Its chat template asks for parallel thinking."""
    problem = next(generate(0))
    words = re.findall(r" ?[A-Za-z]+", problem.prompt(parallel=True) + problem.prompt(parallel=False))
    return build_tokenizer([*words, " +", " ->"], chat_ending=PARALLEL_ENDING)


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
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.5 * recipe.hidden_size**-0.5,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    setattr(config, CONFIG_KEY, multiverse_entry())
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
        save_total_limit=1,
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
