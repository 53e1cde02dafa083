"""A model and its tokenizer from a local folder (safetensors) or a GGUF file; never pickles, never foreign code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from mvkernels.model.checkpoint.files import is_gguf, one_line, published_dtype, require_checkpoint, require_module
from mvkernels.model.checkpoint.names import EMBEDDED as EMBEDDED
from mvkernels.model.checkpoint.names import checkpoint_path, require_device

# No download, no code of a checkpoint's own.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_checkpoint(
    path: str | Path, dtype: torch.dtype | None = None, device: str | None = None, device_map: Any = None
) -> tuple[PreTrainedModel, Any]:
    """Load the model and the tokenizer of a local checkpoint.

    Args:
        path: A folder with safetensors (sharded or not), a GGUF file, or "embedded", the model of the package.
        dtype: Of the weights; None: as published.
        device: Device of the model. At most one of `device` and `device_map` is given.
        device_map: As transformers takes it.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: The checkpoint cannot be loaded; one line says what was expected.
    """
    path = checkpoint_path(path)
    require_checkpoint(path)
    folder, named = _named(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **named, **_LOCAL)
    except Exception as error:  # whatever a broken file makes transformers raise, the caller gets one line
        raise ValueError(
            f"expected a readable causal language model, got {path}, whose tokenizer cannot be loaded: "
            f"{one_line(error)}"
        ) from error
    return load_model(path, dtype, device, device_map), tokenizer


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | None = None, device_map: Any = None
) -> PreTrainedModel:
    """Load the model alone; the tokenizer may be missing.

    Args:
        path: See `load_checkpoint`.
        dtype: See `load_checkpoint`.
        device: See `load_checkpoint`.
        device_map: See `load_checkpoint`.

    Returns:
        The model.

    Raises:
        ValueError: The checkpoint cannot be loaded; one line says what was expected.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"expected device or device_map, got both: {device!r} and {device_map!r}")
    path = checkpoint_path(path)
    require_checkpoint(path, tokenizer=False)
    require_device(device)
    if device_map is not None:
        require_module("accelerate", path)
    folder, named = _named(path)
    weights = {} if named else {"use_safetensors": True}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if dtype is None else dtype, device_map=device_map, **weights, **named, **_LOCAL
        )
    except Exception as error:  # as above
        raise ValueError(f"expected a readable causal language model, got {path}: {_reason(path, error)}") from error
    if named:
        _forget_quantization(model)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model


def _forget_quantization(model: Any) -> None:
    """A GGUF file is unpacked when it is loaded. With the marks that stay, transformers would neither train plain
    weights nor save them.
    """
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if name in holder.__dict__:
            delattr(holder, name)
    model.__dict__["is_quantized"] = False


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer alone; no weights are read.

    Args:
        path: A folder, a GGUF file, a tokenizer.json, or "embedded".

    Returns:
        The tokenizer of transformers.

    Raises:
        ValueError: It cannot be loaded; one line says what was expected.
    """
    path = checkpoint_path(path)
    file = path / "tokenizer.json" if path.is_dir() and not (path / "tokenizer_config.json").exists() else path
    alone = file.suffix == ".json" and file.is_file()
    if not alone:
        require_checkpoint(path, weights=False)
    try:
        if alone:
            return PreTrainedTokenizerFast(tokenizer_file=str(file))
        folder, named = _named(path)
        return AutoTokenizer.from_pretrained(folder, **named, **_LOCAL)
    except Exception as error:  # as above
        raise ValueError(f"expected a tokenizer, got {path}: {one_line(error)}") from error


def _named(path: Path) -> tuple[Path, dict[str, str]]:
    """The folder of a checkpoint, and the name of a GGUF file in it."""
    return (path.parent, {"gguf_file": path.name}) if is_gguf(path) else (path, {})


def _reason(path: Path, error: Exception) -> str:
    """Why a model could not be loaded, in one line. transformers does not say which file is damaged."""
    try:
        if path.is_dir():
            published_dtype(path)
    except ValueError as damaged:
        return str(damaged)
    return one_line(error)
