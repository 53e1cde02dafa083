"""Reading a tokenizer that the user named, and whether what the user named can be written.

Every failure is one clear ValueError or ImportError.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mvkernels._lazy import import_for
from mvkernels.model.checkpoint.files import hub_hint
from mvkernels.model.checkpoint.names import checkpoint_path


def require_file(path: Path, option: str) -> None:
    """Raises ValueError where a file cannot be written to, before the work whose result it is to hold."""
    if path.is_dir():
        raise ValueError(f"{option}: expected a file, got a folder: {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: expected a folder to write to, found none at {path.parent}")
    if not os.access(path if path.exists() and not path.is_file() else path.parent, os.W_OK):
        raise ValueError(f"{option}: expected a file that can be written, got {path}: no permission")


def load_tokenizer(name: str | Path) -> Any:
    """A transformers tokenizer from a ``tokenizer.json`` file, or from a folder that has one, or ``embedded``.

    Raises ValueError where there is none, ImportError where transformers is missing.
    """
    path = checkpoint_path(name)
    if not path.exists():
        raise ValueError(
            f"expected a tokenizer.json file or a folder with one, found nothing at {path}{hub_hint(path)}"
        )
    transformers: Any = import_for("a tokenizer", "transformers")
    try:
        if path.is_dir() and (path / "tokenizer_config.json").exists():
            return transformers.AutoTokenizer.from_pretrained(str(path))
        file = path / "tokenizer.json" if path.is_dir() else path
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # tokenizers raises the bare Exception for a file that it cannot read
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load a tokenizer from {path}: {reason}") from None


def require_writable(folder: Path, option: str) -> None:
    """Raises ValueError where a folder is none, or cannot be made or written to. option: that names it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{option}: expected a folder, got a file: {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: expected a folder that can be written to, got {folder}: no permission in {there}")
