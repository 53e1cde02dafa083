"""``mvkernels train``: the recipe that made the embedded model, from nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvkernels.model.training import Recipe, train
from mvkernels.model.training.allocator import keep_freed_memory
from mvkernels.model.training.recipe_file import RECIPE_FILE


def make_recipe(out: Path, given: Mapping[str, Any], resume: bool) -> Recipe:
    """The recipe with the given fields; what is not given is the default, or with ``resume`` as in the interrupted run.

    Raises ValueError for a field out of range, and where the saved recipe cannot be read.
    """
    saved: dict[str, Any] = {}
    file = out / RECIPE_FILE
    if resume and file.exists():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            return Recipe(**{**saved, **given})
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"resume: expected a recipe in {file}, got a file that is none: {error}") from None
    return Recipe(**given)


def run(out: Path, given: Mapping[str, Any], resume: bool, quiet: bool) -> None:
    """Trains and saves to ``out``; prints what came out."""
    keep_freed_memory()
    result = train(make_recipe(out, given, resume), out, resume=resume, progress=not quiet)
    last = f", last loss {result.losses[-1][1]:.4f}" if result.losses else ""
    print(f"{result.folder}: {result.parameters} parameters, trained in {result.seconds:.0f} s{last}")
