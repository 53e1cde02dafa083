"""Loading the model that a command names, and what is wrong with that before PyTorch is imported."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mvkernels._lazy import import_for
from mvkernels.model.checkpoint.files import require_checkpoint
from mvkernels.model.checkpoint.names import EMBEDDED, EMBEDDED_NAME, checkpoint_path, require_device, trained_task
from mvkernels.model.settings import option

if TYPE_CHECKING:
    from mvkernels.model import Engine

DTYPES = ("float32", "bfloat16", "float16", "float64")
#: The devices that a model can be put on: those of the attention backends.
DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Placement:
    """How a model is loaded, and where to; None: as `Engine.from_pretrained` does."""

    dtype: str | None = option(None, "Of the weights: float32, bfloat16, float16.")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...")
    device_map: str | None = option(None, "As in transformers: auto, balanced, ...")


def check_model(model: str, placement: Placement) -> None:
    """Raises ValueError for arguments that `load_engine` could not use, before PyTorch is imported."""
    dtype, device, device_map = placement.dtype, placement.device, placement.device_map
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if device is not None and not DEVICE.fullmatch(device):
        raise ValueError(f"--device: expected cpu, cuda or a numbered one such as cuda:0, got {device!r}")
    if device is not None and device_map is not None:
        raise ValueError(f"expected --device or --device-map, got both: {device!r} and {device_map!r}")
    if checkpoint_path(model) == EMBEDDED and not (EMBEDDED / "config.json").exists():
        raise ValueError(f"expected the embedded model in {EMBEDDED}, found none; name a model with --model")
    require_checkpoint(checkpoint_path(model))


def load_engine(model: str, placement: Placement) -> tuple[Engine, list[str]]:
    """Load the engine of a checkpoint; stderr shows what is being loaded, which takes seconds.

    Args:
        model: Checkpoint as on the command line.
        placement: As on the command line, checked by `check_model`.

    Returns:
        The engine, and the warnings of loading that a user can act on.

    Raises:
        ValueError: The device is not in this machine; also what `Engine.from_pretrained` raises.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("loading") as status:
            return _load(model, placement, lambda what: status.update(f"loading {what}"))
    return _load(model, placement, lambda what: print(f"loading {what} ...", file=sys.stderr, flush=True))


def _load(model: str, placement: Placement, show: Callable[[str], None]) -> tuple[Engine, list[str]]:
    show("PyTorch")
    import torch

    dtype, device = placement.dtype, placement.device
    require_device(device)
    if model == EMBEDDED_NAME and "OMP_NUM_THREADS" not in os.environ:
        # Its layers are too small to share among threads, which on a busy machine wait for one another a hundredfold.
        torch.set_num_threads(1)
    show("transformers")
    transformers_logging: Any = import_for("mvkernels generate", "transformers.utils.logging")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    from mvkernels.model import Engine

    show(f"the model: {model}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        engine = Engine.from_pretrained(
            model,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            device_map=placement.device_map,
        )
    said = (str(warning.message) for warning in caught)
    notes = [text for text in said if "generates sequentially" in text or text.startswith("mvkernels: ")]
    return engine, notes


def untrained(questions: Sequence[str], model: str) -> list[str]:
    """A note where questions are none of the only task that the model was trained on, or an empty list."""
    task = trained_task(checkpoint_path(model))
    others = [question for question in questions if task is not None and not task.covers(question)]
    if task is None or not others:
        return []
    which = "this prompt is" if len(questions) == 1 else f"{len(others)} of {len(questions)} questions are"
    return [f"{model} was trained on {task.name} alone ({task.range}), and {which} none of these: expect wrong answers"]
