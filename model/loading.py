"""A model and its tokenizer from a local folder (safetensors) or a GGUF file; never pickles, never foreign code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from mvkernels._lazy import missing_message

#: The model that comes with the package.
EMBEDDED = Path(__file__).resolve().parent / "embedded"


def load_checkpoint(
    path: str | Path, dtype: torch.dtype | None = None, device: str | None = None, device_map: Any = None
) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a local checkpoint: a folder with safetensors (sharded or not), or a GGUF file.

    dtype: None takes the checkpoint's. device and device_map: at most one; device_map goes to transformers.
    Raises ValueError with one line that says what was expected, whatever is wrong with the checkpoint.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"expected device or device_map, got both: {device!r} and {device_map!r}")
    path = Path(path)
    folder, extra = _locate(path, weights=True)
    if device_map is not None:
        _require("accelerate", path)
    common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, **extra}
    weights = {} if extra else {"use_safetensors": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **common)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if dtype is None else dtype, device_map=device_map, **weights, **common
        )
    except Exception as error:  # whatever a broken file makes transformers raise, the caller gets one line
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"expected a readable causal language model, got {path}: {reason}") from error
    if "gguf_file" in extra:
        _forget_quantization(model)
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model, tokenizer


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
    """The tokenizer alone: of a folder, a GGUF file, or a tokenizer.json. No weights are read.

    Raises ValueError with one line that says what was expected.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() and not (path / "tokenizer_config.json").exists() else path
    try:
        if file.suffix == ".json" and file.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(file))
        folder, extra = _locate(path, weights=False)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **extra)
    except Exception as error:  # as above
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"expected a tokenizer, got {path}: {reason}") from error


def _locate(path: Path, weights: bool) -> tuple[Path, dict[str, str]]:
    """The folder of a checkpoint, and what transformers must be told of a GGUF file in it."""
    if path.is_file() and path.suffix.lower() == ".gguf":
        _require("gguf", path)
        _require("accelerate", path)
        return path.parent, {"gguf_file": path.name}
    if not path.is_dir():
        raise ValueError(f"expected a local model folder or a .gguf file, got {path}, which is neither")
    if weights and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"expected a folder with config.json and *.safetensors, got {path} without *.safetensors (pickled "
            "weights are not loaded)"
        )
    return path, {}


def _require(module: str, path: Path) -> None:
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        raise ValueError(missing_message(f"loading {path}", module)) from error
