"""Public names that are imported on first use (PEP 562), with an error that names missing dependencies."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping

# Optional distribution (top-level import name) -> the extra of this package that installs it.
EXTRAS: dict[str, str] = {
    "transformers": "hf",
    "accelerate": "hf",
    "safetensors": "hf",
    "gguf": "hf",
    "tokenizers": "hf",
    "peft": "train",
    "tensorboard": "train",
    "triton": "cuda",
    "cupy": "cuda",
    "matplotlib": "plot",
    "math_verify": "eval",
    "openai": "curate",
    "rapidfuzz": "curate",
    "pyarrow": "curate",
}


def missing_message(wanted: str, module: str) -> str:
    """Format the error for a missing module: what was requested, what it needs, and how to install that."""
    extra = EXTRAS.get(module)
    how = f"pip install 'mvkernels[{extra}]'" if extra else f"pip install {module}"
    return f"{wanted} needs {module}, which is not installed: {how}"


def import_for(wanted: str, module: str) -> object:
    """Import ``module`` for the public name ``wanted``.

    Raises ImportError with the missing optional distribution and the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if top not in EXTRAS:
            raise
        raise ImportError(missing_message(wanted, top), name=top) from error


def lazy_names(package: str, exports: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of ``package``. ``exports``: public name -> module that defines it.

    A name that maps to ``package.name`` is that submodule itself.
    """

    def get(name: str) -> object:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = exports[name]
        loaded = import_for(f"{package}.{name}", module)
        value = loaded if module == f"{package}.{name}" else getattr(loaded, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *exports})

    return get, names
