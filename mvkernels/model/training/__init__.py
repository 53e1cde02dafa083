"""Training: the embedded model from nothing, `train(Recipe(), out)`; a base model on traces, `tune(recipe, out)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mvkernels._lazy import lazy_names

__all__ = ["Recipe", "TrainingRun", "TuningRecipe", "TuningRun", "load_recipe", "train", "tune"]

if TYPE_CHECKING:
    from mvkernels.model.training.recipe import Recipe
    from mvkernels.model.training.scratch import TrainingRun, train
    from mvkernels.model.training.tuning import TuningRun, tune
    from mvkernels.model.training.tuning_recipe import TuningRecipe, load_recipe
else:
    _EXPORTS = {
        "Recipe": "mvkernels.model.training.recipe",
        "TrainingRun": "mvkernels.model.training.scratch",
        "TuningRecipe": "mvkernels.model.training.tuning_recipe",
        "TuningRun": "mvkernels.model.training.tuning",
        "load_recipe": "mvkernels.model.training.tuning_recipe",
        "train": "mvkernels.model.training.scratch",
        "tune": "mvkernels.model.training.tuning",
    }
    __getattr__, __dir__ = lazy_names(__name__, _EXPORTS)
