"""What every training here shares: packed rows on transformers' `Trainer`, and its bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from mvkernels import BranchLayout
from mvkernels.model.training.loss import chunked_loss

# What PyTorch says on a CPU, where it has no type of its own for it.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bar for each file that it writes, which would break up the bar of the training."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def only_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch is one packed row."""
    return rows[0]


class PackedTrainer(Trainer):
    """Rows in their order, the layout on the model's device, and the traces of a row named when it fails.

    A row: input_ids, labels, position_ids [1, T], branch_layout; and "names", what its documents are called, or not.
    """

    def __init__(self, progress: bool, **named: Any) -> None:
        super().__init__(data_collator=only_row, **named)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if progress and self.is_world_process_zero():
            self.add_callback(Bar())
        self._names: list[str] = []
        self._tokens = 0

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        with self._named_failures():
            return super().training_step(*arguments, **named)

    def prediction_step(self, *arguments: Any, **named: Any) -> Any:
        with self._named_failures():
            return super().prediction_step(*arguments, **named)

    def compute_loss(self, model: Any, *arguments: Any, **named: Any) -> Any:
        with chunked_loss(model):
            return super().compute_loss(model, *arguments, **named)

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Out of memory: ValueError that says in which row, of which documents and tokens."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            text = str(error)
            memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not self._names or not (memory or any(part in text for part in _OUT_OF_MEMORY)):
                raise
            names = ", ".join(self._names)
            raise ValueError(
                f"expected a row that fits into memory, ran out of it after step {self.state.global_step} in a row of "
                f"{self._tokens} tokens of {names}: lower tokens_per_row, or set gradient_checkpointing"
            ) from error

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # The rows are in the order of the recipe already; so a resumed run need not make those that it skips.
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        self._names = inputs.pop("names", [])
        self._tokens = inputs["input_ids"].shape[1]
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        layout: BranchLayout = prepared["branch_layout"]
        prepared["branch_layout"] = layout.to(self.args.device)
        return prepared


class Bar(TrainerCallback):
    """A progress bar with the last logged loss."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.4f}", refresh=False)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.close()
