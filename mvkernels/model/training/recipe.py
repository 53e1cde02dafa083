"""The recipe of the embedded model: all that decides its weights, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mvkernels.model.settings import option
from mvkernels.model.tasks import task_named
from mvkernels.model.training.recipe_file import RecipeFile

#: Head size of the model; the hidden size is a multiple of it.
HEAD_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Recipe(RecipeFile):
    """How a model is trained from nothing. The defaults train the embedded model.

    Attributes:
        task: The problems that it learns: a name in `mvkernels.model.tasks.TASKS`.
        steps: Optimizer steps, one packed row of documents each.
        tokens_per_step: Tokens of a row. It is filled with fresh problems; the last one is cut.
        learning_rate: Peak, of the layers' matrices (Muon); it falls linearly to 0.
        embedding_learning_rate: Peak, of all other parameters (AdamW).
        weight_decay: Of the layers' matrices.
        warmup_steps: Steps in which the learning rates rise to their peaks.
        sequential_share: Share of problems written as one chain, without blocks; 1 trains an autoregressive model.
        bare_share: Share of the parallel problems whose prompt ends with the question.
        hidden_size: Channels of the model, a multiple of 32; heads have 32.
        layers: Decoder layers.
        intermediate_size: Channels of the feed-forward part.
        rope_theta: Base of the rotary positions: small if near tokens matter; a large one leaves more channels for
            tokens that are found by content, hundreds of tokens away.
        bf16: Whether matrix products are in bf16 (autocast); weights, and attention on a CPU, are in fp32.
        seed: Of the initial weights and of the problems.
        log_every: Steps between two logged losses.
        save_every: Steps between two checkpoints to resume from.

    Raises:
        ValueError: A value is out of range.
    """

    outcome: ClassVar[str] = "training.json"

    task: str = option("arithmetic", "The problems that it learns: arithmetic, sat.")
    steps: int = option(3600, "Optimizer steps.")
    tokens_per_step: int = option(3072, "Tokens of one packed row.")
    learning_rate: float = option(6e-3, "Peak, of the layers' matrices.")
    embedding_learning_rate: float = option(3e-3, "Peak, of all other parameters.")
    weight_decay: float = option(0.05, "Of the layers' matrices.")
    warmup_steps: int = option(100, "Steps up to the peak.")
    sequential_share: float = option(0.4, "Share of problems written without blocks.")
    bare_share: float = option(0.1, "Share of the parallel problems whose prompt ends with the question.")
    hidden_size: int = option(128, "A multiple of 32.")
    layers: int = option(5, "Decoder layers.")
    intermediate_size: int = option(512, "Of the feed-forward part.")
    rope_theta: float = option(1000.0, "Base of the rotary positions.")
    bf16: bool = option(True, "Whether matrix products are in bf16.")
    seed: int = option(0, "Of the initial weights and the problems.")
    log_every: int = option(20, "Steps between two logged losses.")
    save_every: int = option(200, "Steps between two checkpoints to resume from.")

    def __post_init__(self) -> None:
        task_named(self.task)
        for name in ("steps", "tokens_per_step", "hidden_size", "layers", "intermediate_size", "log_every"):
            self._require(
                name, "a whole number >= 1", isinstance(getattr(self, name), int) and getattr(self, name) >= 1
            )
        for name in ("learning_rate", "embedding_learning_rate", "rope_theta"):
            self._require(name, "a finite number > 0", math.isfinite(getattr(self, name)) and getattr(self, name) > 0)
        self._require("weight_decay", "a number in [0, 1)", 0 <= self.weight_decay < 1)
        self._require("warmup_steps", f"0 to {self.steps} (the steps)", 0 <= self.warmup_steps <= self.steps)
        for name in ("sequential_share", "bare_share"):
            self._require(name, "a number in [0, 1]", 0 <= getattr(self, name) <= 1)
        self._require("hidden_size", f"a multiple of {HEAD_SIZE}", self.hidden_size % HEAD_SIZE == 0)
        self._require(
            "save_every",
            f"a multiple of log_every, {self.log_every}",
            self.save_every >= 1 and self.save_every % self.log_every == 0,
        )
