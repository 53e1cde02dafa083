"""`tune`: supervised fine-tuning of a base model on traces, on one process or many (accelerate, torchrun).

The loop is transformers' `Trainer` on packed rows through `patch_model`. The loss of a step is the mean over its
labelled tokens, however they are divided into rows and processes. On one machine the same recipe gives the same losses,
interrupted or not. What is saved is a model that plain transformers loads (safetensors), or a peft adapter.
"""

from __future__ import annotations

import copy
import csv
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from mvkernels import TagTokens, patch_model, unpatch_model
from mvkernels._lazy import import_for
from mvkernels.model.checkpoint.add_tags import add_tag_tokens, add_tags, read_entry
from mvkernels.model.checkpoint.files import published_dtype
from mvkernels.model.checkpoint.loading import load_model, load_tokenizer
from mvkernels.model.checkpoint.names import checkpoint_path
from mvkernels.model.files import whole_folder
from mvkernels.model.training.checkpoints import CHECKPOINTS
from mvkernels.model.training.mixture import Mixture, PackedRows, make_mixture
from mvkernels.model.training.recipe_file import prepare_folder
from mvkernels.model.training.traces import EncodedExample, Encoder, encode_all, read_examples
from mvkernels.model.training.trainer import PackedTrainer, quiet
from mvkernels.model.training.tuning_recipe import TuningRecipe

LOSSES_FILE = TuningRecipe.outcome
_LOGS = "logs"


@dataclass(frozen=True)
class TuningData:
    """What a recipe trains on. skipped: why examples were left out, one line each."""

    mixture: Mixture
    held_out: tuple[EncodedExample, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class TuningRun:
    """What came out. losses: (step, mean loss of the step). held_out_losses: (step, mean of the traces' losses).

    trained, parameters: weights that were trained, and all. seconds: of this call, without what was resumed.
    """

    folder: Path
    losses: tuple[tuple[int, float], ...]
    held_out_losses: tuple[tuple[int, float], ...]
    trained: int
    parameters: int
    skipped: tuple[str, ...]
    seconds: float


def read_data(recipe: TuningRecipe, tokenizer: Any, skip_bad: bool = False) -> TuningData:
    """Read the data of a recipe, and pack it into rows for the processes of torchrun or accelerate.

    Args:
        recipe: The recipe.
        tokenizer: A tokenizer with the control tags (`recipe_tokenizer`).
        skip_bad: Leave bad traces out and list them in `skipped`.

    Returns:
        The mixture of packed rows and the held-out examples.

    Raises:
        ValueError: A trace is bad (the first one is named), or there is nothing to train on.
    """
    examples, skipped = encode_all(read_examples(recipe.data), Encoder(recipe, tokenizer), skip_bad)
    count = len(examples) - recipe.held_out
    if count < 1:
        raise ValueError(f"held_out: expected fewer than the {len(examples)} examples, got {recipe.held_out}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return TuningData(make_mixture(recipe, examples[:count], processes), tuple(examples[count:]), tuple(skipped))


def recipe_tokenizer(recipe: TuningRecipe, loaded: Any = None) -> Any:
    """The tokenizer of a recipe, with the control tags. Loads no weights. loaded: the same without them; kept so."""
    tokenizer = copy.deepcopy(loaded) if loaded is not None else load_tokenizer(recipe.tokenizer or recipe.model)
    if recipe.end_of_text:
        tokenizer.eos_token = recipe.end_of_text
    if add_tag_tokens(tokenizer) and recipe.lora_rank and not recipe.merge:
        raise ValueError(
            "merge = false: expected a base model with the control tags, which an adapter does not hold, got one "
            "without; `mvkernels add-tags` extends a model and its tokenizer"
        )
    return tokenizer


def tune(
    recipe: TuningRecipe,
    output_dir: str | Path,
    resume: bool = False,
    skip_bad: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> TuningRun:
    """Tune the base model of a recipe; save model (or adapter), tokenizer, recipe and losses.csv.

    Args:
        recipe: The recipe.
        output_dir: A new folder; with `resume`, the interrupted one.
        resume: Continue from the newest whole checkpoint; without one, from the first step.
        skip_bad: See `read_data`.
        progress: Show a bar.
        callbacks: Further callbacks of transformers' Trainer.

    Returns:
        The losses and figures of the run.

    Raises:
        ValueError: Bad data, a model that cannot be loaded, a folder that is not empty (with `resume`: nothing to
            resume), weights sharded otherwise than by FSDP2, or a row that does not fit into memory (its traces are
            named).
        OSError: The folder or a file in it cannot be written.
        ImportError: peft or tensorboard is asked for and missing.
    """
    folder = Path(output_dir)
    _check_sharding(recipe)
    if recipe.tensorboard:
        import_for("tensorboard = true", "tensorboard")
    published = load_tokenizer(recipe.tokenizer or recipe.model)
    tokenizer = recipe_tokenizer(recipe, published)
    data = read_data(recipe, tokenizer, skip_bad)
    args = _arguments(recipe, folder, data.mixture)
    with args.main_process_first(local=False):
        first = args.process_index == 0
        checkpoint = prepare_folder(recipe, folder, resume) if resume or first else None
    set_seed(recipe.seed)
    model = patch_model(_load(recipe, published, tokenizer))
    parameters = model.num_parameters()
    trained = _with_lora(recipe, model, tokenizer) if recipe.lora_rank else model
    trainer = PackedTrainer(
        progress=progress,
        model=trained,
        args=args,
        train_dataset=PackedRows(data.mixture.rows),
        eval_dataset=PackedRows([(example.parallel,) for example in data.held_out]) if data.held_out else None,
        callbacks=list(callbacks),
    )
    weights = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    started = time.perf_counter()
    with quiet():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    history = trainer.state.log_history
    # A resumed run evaluates once more where it begins.
    run = TuningRun(
        folder,
        tuple((int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry),
        tuple({int(entry["step"]): float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}.items()),
        weights,
        parameters,
        data.skipped,
        seconds,
    )
    with quiet():
        _save(recipe, trainer, model, tokenizer, run)
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return run


def _asked_for(name: str) -> bool:
    """Whether accelerate was launched with it."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true")


def _check_sharding(recipe: TuningRecipe) -> None:
    """Raises ValueError for ways to shard the weights that are not taken: only FSDP2, of all weights, is."""
    if _asked_for("DEEPSPEED"):
        raise ValueError("tune: expected FSDP2 or processes that hold the whole model each, got DeepSpeed")
    if not _asked_for("FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"tune: expected FSDP2 (accelerate launch --fsdp_version 2), got version {version}")
    if recipe.lora_rank:
        raise ValueError("lora_rank: expected 0 with FSDP, for an adapter is merged into whole weights, got "
                         f"{recipe.lora_rank}")  # fmt: skip


def _load(recipe: TuningRecipe, published: Any, tokenizer: Any) -> PreTrainedModel:
    """The base model in fp32, with rows for the control tags that its `published` tokenizer lacks, and their entry."""
    model = load_model(recipe.model, dtype=torch.float32)
    semantics = read_entry(model.config)
    if semantics not in (None, recipe.semantics):
        raise ValueError(f"semantics: expected {semantics!r} as the model was trained with, got {recipe.semantics!r}")
    add_tags(model, published, recipe.seed, recipe.semantics)
    model.config.eos_token_id = tokenizer.eos_token_id
    if model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def _with_lora(recipe: TuningRecipe, model: PreTrainedModel, tokenizer: Any) -> Any:
    peft: Any = import_for("lora_rank", "peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear",
        trainable_token_indices=list(TagTokens.from_tokenizer(tokenizer).ids),
    )
    return peft.get_peft_model(model, config)


def _arguments(recipe: TuningRecipe, folder: Path, mixture: Mixture) -> TrainingArguments:
    if recipe.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / _LOGS)  # transformers takes it from nowhere else
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True}
    checkpointing["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    args = TrainingArguments(
        **(checkpointing if recipe.gradient_checkpointing else {}),
        output_dir=str(folder / CHECKPOINTS),
        max_steps=mixture.steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=mixture.rows_per_step // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup_share * mixture.steps),
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        ddp_find_unused_parameters=False,
        seed=recipe.seed,
        use_cpu=not torch.accelerator.is_available(),
        eval_strategy="steps" if recipe.held_out else "no",
        eval_steps=recipe.evaluate_every or mixture.steps,
        eval_on_start=recipe.held_out > 0,
        prediction_loss_only=True,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_every,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if recipe.tensorboard else [],
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs want as many processes: a packed row cannot be split over them
    return args


def _save(recipe: TuningRecipe, trainer: PackedTrainer, model: PreTrainedModel, tokenizer: Any, run: TuningRun) -> None:
    """Weights in safetensors, the tokenizer, and the losses; by the first process.

    Every process calls it: with FSDP each has a part of the weights.
    """
    dtype = _saved_dtype(recipe)
    whole = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    saved: Any = unpatch_model(model)
    model.config.use_cache = True  # the trainer has turned it off
    config = "config.json"
    weights: dict[str, Any] = {}
    if whole is not None:
        model.config.dtype = dtype
        weights["state_dict"] = {name: tensor.to(dtype) for name, tensor in whole.items()}
    else:
        if recipe.lora_rank:
            adapted: Any = trainer.accelerator.unwrap_model(trainer.model)
            saved = adapted.merge_and_unload() if recipe.merge else adapted
            config = config if recipe.merge else "adapter_config.json"
        saved = saved.to(dtype)
    with whole_folder(run.folder, (config, LOSSES_FILE)) as scratch:
        saved.save_pretrained(scratch, **weights)
        tokenizer.save_pretrained(scratch)
        _write_losses(run, scratch / LOSSES_FILE)


def _saved_dtype(recipe: TuningRecipe) -> torch.dtype:
    """That of the recipe; else bf16 where it trains in that, or the dtype in which the base model was published."""
    name = recipe.dtype or (
        "bfloat16" if recipe.precision == "bf16" else published_dtype(checkpoint_path(recipe.model))
    )
    dtype: torch.dtype = getattr(torch, name or "float32")
    return dtype


def _write_losses(run: TuningRun, file: Path) -> None:
    """step, loss, held_out_loss: a line for each step that has one of them."""
    losses, held_out = dict(run.losses), dict(run.held_out_losses)
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["step", "loss", "held_out_loss"])
        for step in sorted({*losses, *held_out}):
            writer.writerow([step, losses.get(step, ""), held_out.get(step, "")])
