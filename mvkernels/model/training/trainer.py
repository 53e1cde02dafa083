"""What every training here shares: packed rows on transformers' `Trainer`, and its bar."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from mvkernels import BranchLayout
from mvkernels.model.files import errors_name
from mvkernels.model.training.checkpoints import UNFINISHED, publish
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
        self.add_callback(LastLoss())
        self._bar = Bar() if progress and self.is_world_process_zero() else None
        if self._bar is not None:
            self.add_callback(self._bar)
        self._names: list[str] = []
        self._tokens = 0
        self._saving = False

    def train(self, *arguments: Any, **named: Any) -> Any:
        try:
            return super().train(*arguments, **named)
        finally:
            if self._bar is not None:
                self._bar.close()  # also where it is interrupted: what is printed next stands on a line of its own

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        with self._named_failures():
            return super().training_step(*arguments, **named)

    def prediction_step(self, *arguments: Any, **named: Any) -> Any:
        with self._named_failures():
            return super().prediction_step(*arguments, **named)

    def compute_loss(self, model: Any, *arguments: Any, **named: Any) -> Any:
        with chunked_loss(model):
            return super().compute_loss(model, *arguments, **named)

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save beside the checkpoints, by every process; the first one moves it among them when it is whole."""
        folder, name = Path(str(self.args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        scratch, first = folder / UNFINISHED, self.args.should_save
        try:
            if first:
                shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            self.accelerator.wait_for_everyone()
            self._saving = True
            with errors_name(folder / name, scratch / name):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if first:
                    publish(scratch / name, folder)
            self.accelerator.wait_for_everyone()
        finally:
            self._saving = False
            if first:
                shutil.rmtree(scratch, ignore_errors=True)

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


class LastLoss(TrainerCallback):
    """Log the loss of the last steps too, where their number is no multiple of the steps between two logged losses."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class Bar(TrainerCallback):
    """A progress bar with the last logged loss."""

    bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training")
        for entry in state.log_history:  # of a resumed run
            self._show(entry)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self._show(logs or {})

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _show(self, logs: dict[str, Any]) -> None:
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.4f}")
