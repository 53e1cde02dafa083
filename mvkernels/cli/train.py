"""``mvkernels train``: the recipe that made the embedded model, from nothing."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mvkernels.cli.options import Fields, Given, Quiet
from mvkernels.model.training.allocator import keep_freed_memory
from mvkernels.model.training.recipe import Recipe
from mvkernels.model.training.recipe_file import RECIPE_FILE, check_folder, read_recipe

Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")]


def make_recipe(out: Path, given: Mapping[str, Any], resume: bool) -> Recipe:
    """The recipe with the given fields; what is not given is the default, or with ``resume`` as in the interrupted run.

    Raises ValueError for a field out of range, and where the saved recipe cannot be read.
    """
    file = out / RECIPE_FILE
    if resume and file.exists():
        try:
            return Recipe(**{**read_recipe(file), **given})
        except TypeError as error:
            raise ValueError(f"resume: expected a recipe in {file}, got a file that is none: {error}") from None
    return Recipe(**given)


@contextmanager
def resumable(out: Path, words: Sequence[str]) -> Iterator[None]:
    """Where Ctrl-C ends a run into `out`, say the command that goes on with it; exit status 130.

    words: the arguments of that command.
    """
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["mvkernels", *words])
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            again = "launch it as before, with --resume"
        if os.environ.get("RANK", "0") == "0":
            begun = (out / RECIPE_FILE).exists()
            print(f"interrupted; {f'to go on: {again}' if begun else 'nothing is written yet'}", file=sys.stderr)
        raise SystemExit(130) from None


def run(
    out: Annotated[Path, typer.Argument(help="New folder for the model; with --resume, the interrupted one.")],
    given: Annotated[Given, Fields(Recipe)],
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train and save to `out`; print what came out."""
    recipe = make_recipe(out, given, resume)
    check_folder(recipe, out, resume)
    with resumable(out, ["train", str(out), "--resume", *(["--quiet"] if quiet else [])]):
        from mvkernels.model.training import train  # takes seconds, so bad input is said before

        keep_freed_memory()
        result = train(recipe, out, resume=resume, progress=not quiet)
    print(
        f"{result.folder}: {result.parameters} parameters, trained in {seconds_text(result.seconds)}, "
        f"last loss {result.losses[-1][1]:.4f}"
    )


def seconds_text(seconds: float) -> str:
    """Seconds as they are read: short times with a decimal."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
