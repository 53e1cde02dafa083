"""Matrix units for tests: the processor's, and the same in software where it has none."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mvkernels.decoder import native
from mvkernels.ops.dense import linear_amx as linear_tiles
from mvkernels.ops.dense.linear_amx import SOURCE
from mvkernels.ops.native import native_library

_HEADER = Path(__file__).with_name("tiles_in_software.h")


def software() -> ctypes.CDLL:
    """The kernel on units in software."""
    # The header's hash is in the flags, as they tell one compiled library from another.
    known = hashlib.sha256(_HEADER.read_bytes()).hexdigest()
    return native_library(SOURCE, "-include", str(_HEADER), f"-DTILES_{known}")


def use_software(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `TileLayers` run in software, and `NativeDecoder` take it."""
    library = software()
    monkeypatch.setattr(linear_tiles, "native_library", lambda source: library)
    monkeypatch.setattr(linear_tiles, "_kernel", linear_tiles._kernel.__wrapped__)
    for module in (linear_tiles, native):
        monkeypatch.setattr(module, "tiles_reason", lambda: None)


def as_bf16(model: Any) -> Any:
    """The model, its weights rounded to numbers of bf16, as of a checkpoint that was published in it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def takes_tiles(decoder: native.NativeDecoder) -> bool:
    """Whether all matrices of a decoder are multiplied on matrix units."""
    products = [*(one for layer in decoder._layers for one in layer.products), decoder._head]
    return all(isinstance(one, linear_tiles.TileLayers) for one in products)
