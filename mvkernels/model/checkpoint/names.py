"""What is known of a checkpoint before it is loaded: where it is, on what task it was trained, if its device exists.

Nothing here imports PyTorch before it is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mvkernels.model.tasks import TASKS, Task

#: The model that comes with the package, and its name for commands, recipes and `Engine.from_pretrained`.
EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
EMBEDDED_NAME = "embedded"


def checkpoint_path(name: str | Path) -> Path:
    """Where a checkpoint is.

    Args:
        name: A path, or the text ``embedded``. The text always means the model that comes with the package, whatever
            the current folder has; a folder of that name is written ``./embedded``, or passed as a `Path`.
    """
    return EMBEDDED if name == EMBEDDED_NAME else Path(name)


def trained_task(path: Path) -> Task | None:
    """The only task that a model was trained on, as the `multiverse` entry of its config.json names it.

    None where the entry names none, as for models that were tuned on traces, and where there is no such file.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name = config["multiverse"]["task"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None  # loading says what is wrong with the file
    return TASKS.get(name) if isinstance(name, str) else None


def require_device(device: Any) -> None:
    """Raise ValueError for a GPU that PyTorch does not see. device: as `torch.device` takes it, or None."""
    if device is None or not str(device).startswith("cuda"):
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(device).index or 0) >= count:
        build = ", and this build of PyTorch has no CUDA" if torch.version.cuda is None else ""
        raise ValueError(
            f"device: expected a GPU that PyTorch sees, got {str(device)!r}: it sees {count or 'none'}{build}"
        )
