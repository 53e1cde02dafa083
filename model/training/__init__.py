"""Training of the embedded model from nothing: `train(Recipe(), folder)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mvkernels._lazy import lazy_names

__all__ = ["Recipe", "TrainingRun", "train"]

if TYPE_CHECKING:
    from mvkernels.model.training.recipe import Recipe
    from mvkernels.model.training.run import TrainingRun, train
else:
    _EXPORTS = {
        "Recipe": "mvkernels.model.training.recipe",
        "TrainingRun": "mvkernels.model.training.run",
        "train": "mvkernels.model.training.run",
    }
    __getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
