"""The reference model: engine, sampling, training and tasks, on top of the public names of ``mvkernels`` only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ != "mvkernels.model":
    raise ImportError(f"this package is mvkernels.model and cannot be imported as {__name__!r}: import mvkernels.model")

from mvkernels._lazy import lazy_names

__all__ = ["Engine", "Generation", "GenerationConfig"]

if TYPE_CHECKING:
    from mvkernels.model.engine.engine import Engine, Generation, GenerationConfig
else:
    _EXPORTS = {name: "mvkernels.model.engine.engine" for name in __all__}
    __getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
