"""What the files of a checkpoint say before anything is loaded: whether they are there, whole, and of which dtype."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mvkernels._lazy import missing_message

#: The floating dtypes that weights are saved in.
DTYPES = ("float32", "bfloat16", "float16")
_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# A model on huggingface.co, as `Qwen/Qwen2.5-7B`.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# One of these holds the vocabulary of a tokenizer. Without any, transformers makes an empty one.
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("spm.model", "tekken.json", "*.tiktoken"),
)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, by its name."""
    return path.is_file() and path.suffix.lower() == ".gguf"


def require_checkpoint(path: Path, weights: bool = True, tokenizer: bool = True) -> None:
    """Check that a local checkpoint has its files: a GGUF file, or a folder.

    Args:
        path: Where it is said to be.
        weights: Whether it is to have config.json and whole *.safetensors.
        tokenizer: Whether it is to have a tokenizer.

    Raises:
        ValueError: It lacks something. One line that says what was expected, and what is there.
    """
    if is_gguf(path):
        for module in ("gguf", "accelerate"):
            require_module(module, path)
        return
    if not path.is_dir():
        raise ValueError(f"expected a local model folder or a .gguf file, got {path}, which is neither{hub_hint(path)}")
    if weights and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"expected a folder with config.json and *.safetensors, got {path} without *.safetensors (pickled "
            "weights are not loaded)"
        )
    if weights and not (path / "config.json").is_file():
        raise ValueError(f"expected a folder with config.json and *.safetensors, got {path} without config.json")
    if tokenizer and not any(any(path.glob(name)) for name in _VOCABULARIES):
        raise ValueError(
            f"expected a folder with a tokenizer (tokenizer.json), got {path} without one{_contents(path)}"
        )


def hub_hint(path: str | Path) -> str:
    """What a message adds where `path` may be meant as the name of a model on huggingface.co, or nothing."""
    name = str(path)
    if not _HUB_ID.fullmatch(name) or Path(name).parent.is_dir():
        return ""
    return f"; `hf download {name} --local-dir {name.partition('/')[2]}` gets the files of a model on huggingface.co"


def published_dtype(path: Path) -> str | None:
    """The dtype in which the weights of a checkpoint were published: "float32", "bfloat16" or "float16".

    Of a safetensors checkpoint it is the dtype that most weights have. Of a GGUF file too, where they are not
    quantized; quantized ones were made from 16 bits, and count as "bfloat16". None where most weights have another
    dtype. Reads the headers alone.

    Raises:
        ValueError: A file is damaged. It names the file.
    """
    found: Counter[str | None] = Counter()
    if is_gguf(path):
        require_module("gguf", path)
        from gguf import GGUFReader

        try:
            for tensor in GGUFReader(str(path)).tensors:
                found[_SAFETENSORS.get(tensor.tensor_type.name, "bfloat16")] += int(tensor.n_elements)
        except Exception as error:  # whatever damaged bytes make its parser raise
            raise ValueError(f"expected a readable GGUF file, got {path}: {one_line(error)}") from error
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else ():
        found += _count(file)
    return found.most_common(1)[0][0] if found else None


def _count(file: Path) -> Counter[str | None]:
    """The number of weights of each dtype in a safetensors file."""
    from safetensors import safe_open

    found: Counter[str | None] = Counter()
    try:
        with safe_open(file, "np") as tensors:
            for name in tensors.offset_keys():
                one: Any = tensors.get_slice(name)
                size = 1
                for length in one.get_shape():
                    size *= length
                found[_SAFETENSORS.get(one.get_dtype())] += size
    except Exception as error:  # SafetensorError is an Exception only; an empty file is an OSError
        raise ValueError(f"expected a whole safetensors file, got {file}: {one_line(error)}") from error
    return found


def _contents(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f": it has {shown}" if names else ": it is empty"


def one_line(error: Exception) -> str:
    """The message of an error on one line, whole."""
    return " ".join(str(error).split()) or type(error).__name__


def require_module(module: str, path: Path) -> None:
    """Raise ValueError where a package is missing that loading `path` needs."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(missing_message(f"loading {path}", module))
