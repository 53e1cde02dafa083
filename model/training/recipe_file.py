"""A recipe on disk, and the folder of a run: new, or to be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

RECIPE_FILE = "recipe.json"
CHECKPOINTS = "checkpoints"


class RecipeFile:
    """A recipe (a frozen dataclass of plain values) that is kept beside the model it makes."""

    def save(self, path: Path) -> None:
        """Writes the recipe as JSON."""
        path.write_text(json.dumps(self._values(), indent=2) + "\n", encoding="utf-8")

    def require_equal(self, path: Path) -> None:
        """Raises ValueError when the recipe in this file is another: resuming would not give what either gives."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in json.loads(json.dumps(self._values())).items():
            if saved.get(name) != value:
                raise ValueError(f"resume: expected {name}={saved.get(name)!r} as in {path}, got {value!r}")

    def _require(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _values(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # the recipes are dataclasses, this is not


def prepare_folder(recipe: RecipeFile, folder: Path, resume: bool) -> Path | None:
    """Checks the output folder and writes the recipe there; the checkpoint to resume from, or None.

    Raises ValueError where `folder` is not empty and `resume` is not set, or where there is nothing to resume or
    another recipe was interrupted there.
    """
    saved = folder / RECIPE_FILE
    if resume:
        steps = sorted((folder / CHECKPOINTS).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        if not saved.exists() or not steps:
            raise ValueError(f"resume: expected a folder with the checkpoint of an interrupted run, got {folder}")
        recipe.require_equal(saved)
        return steps[-1]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output: expected a new or empty folder, or one to resume, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(saved)
    return None
