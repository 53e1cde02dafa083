"""A recipe on disk, and the folder of a run: new, or to be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from mvkernels.model.files import is_free, whole_folder
from mvkernels.model.json_input import parse_json, shown
from mvkernels.model.training.checkpoints import CHECKPOINTS, newest_whole

RECIPE_FILE = "recipe.json"


class RecipeFile:
    """A recipe (a frozen dataclass of plain values) that is kept beside the model it makes.

    outcome: name of the file that a finished run has in its folder.
    """

    outcome: ClassVar[str]

    def save(self, path: Path) -> None:
        """Write the recipe as JSON.

        Args:
            path: The file.

        Raises:
            OSError: It cannot be written.
        """
        path.write_text(json.dumps(self._values(), indent=2) + "\n", encoding="utf-8")

    def require_equal(self, path: Path) -> None:
        """Check that a saved recipe is this one, so that resuming a run gives the same model.

        Args:
            path: The file of the saved recipe.

        Raises:
            ValueError: The saved recipe is another, or the file holds none.
        """
        saved = read_recipe(path)
        for name, value in json.loads(json.dumps(self._values())).items():
            if saved.get(name) != value:
                raise ValueError(f"resume: expected {name}={shown(saved.get(name))} as in {path}, got {value!r}")

    def _require(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _values(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # the recipes are dataclasses, this is not


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a saved recipe. Raises ValueError, naming the file, for one that is none."""
    try:
        saved = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"resume: expected a recipe in {path}, got a file that is none: {error}") from None
    if not isinstance(saved, dict):
        raise ValueError(f"resume: expected a recipe in {path}, got {shown(saved)}")
    return saved


def check_folder(recipe: RecipeFile, folder: Path, resume: bool) -> None:
    """Check the output folder of a run, without changing it.

    Raises:
        ValueError: It is not empty and `resume` is not set; or there is nothing to resume, or another recipe was
            interrupted there.
    """
    saved = folder / RECIPE_FILE
    if resume:
        finished = (folder / recipe.outcome).exists() and newest_whole(folder / CHECKPOINTS) is None
        if finished or not saved.exists():
            raise ValueError(
                f"resume: expected a folder with the checkpoint of an interrupted run, got {folder}"
                + (", whose run is finished" if finished else "")
            )
        recipe.require_equal(saved)
    elif not is_free(folder):
        raise ValueError(f"output: expected a new or empty folder, or one to resume, got {folder}")


def prepare_folder(recipe: RecipeFile, folder: Path, resume: bool) -> Path | None:
    """Check the output folder, and write the recipe into a new one.

    Returns:
        The checkpoint to resume from. None: the run begins at the first step, as it also does where it was interrupted
        before its first checkpoint.

    Raises:
        ValueError: As `check_folder`.
    """
    check_folder(recipe, folder, resume)
    if resume:
        return newest_whole(folder / CHECKPOINTS)
    with whole_folder(folder, (RECIPE_FILE,)) as scratch:
        recipe.save(scratch / RECIPE_FILE)
    return None
