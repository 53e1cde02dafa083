"""Reading what the user named: a text file, a tokenizer. Every failure is one clear ValueError or OSError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvkernels._lazy import import_for


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError where it is missing, a folder, unreadable, or no text."""
    if path.is_dir():
        raise ValueError(f"expected a text file, got a folder: {path}")
    if not path.exists():
        raise ValueError(f"expected a text file, found nothing at {path}")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got other bytes at offset {error.start} of {path}") from None
    if "\0" in text:
        raise ValueError(f"expected UTF-8 text, got a binary file: {path}")
    return text


def load_tokenizer(path: Path) -> Any:
    """A transformers tokenizer from a ``tokenizer.json`` file, or from a folder that has one.

    Raises ValueError where there is none, ImportError where transformers is missing.
    """
    if not path.exists():
        raise ValueError(f"expected a tokenizer.json file or a folder with one, found nothing at {path}")
    transformers: Any = import_for("a tokenizer", "transformers")
    try:
        if path.is_dir() and (path / "tokenizer_config.json").exists():
            return transformers.AutoTokenizer.from_pretrained(str(path))
        file = path / "tokenizer.json" if path.is_dir() else path
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # tokenizers raises the bare Exception for a file that it cannot read
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load a tokenizer from {path}: {reason}") from None
