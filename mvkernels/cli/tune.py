"""``mvkernels tune``: a base model tuned on traces by a recipe, or what that would train on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mvkernels.cli.options import Fields, Given, Quiet
from mvkernels.cli.train import Resume, resumable, seconds_text
from mvkernels.model.training.allocator import keep_freed_memory
from mvkernels.model.training.recipe_file import check_folder
from mvkernels.model.training.traces import read_examples
from mvkernels.model.training.tuning_recipe import TuningRecipe, find_recipe, load_recipe

if TYPE_CHECKING:
    from mvkernels.model.training.tuning import TuningData

CHART = "losses.png"


def run(
    context: typer.Context,
    recipe_file: Annotated[
        Path,
        typer.Argument(
            help="A TOML file, or one that comes with the package: multiverse-32b.toml, smollm2-lora.toml.",
            metavar="RECIPE",
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(help="New folder for the model; with --resume, the interrupted one.", metavar="OUT")
    ] = None,
    *,
    given: Annotated[Given, Fields(TuningRecipe, defaults=None)],
    resume: Resume = False,
    quiet: Quiet = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the mixture of each pass, train nothing; needs no OUT.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad traces out, and count them.")] = False,
) -> None:
    """Train by the recipe and print what came out; with `dry_run` print the mixture and train nothing."""
    recipe = load_recipe(find_recipe(recipe_file), given)
    recipe.check_inputs()
    if not dry_run and out is None:
        raise ValueError("tune RECIPE OUT: expected a folder OUT for the model, got none")
    _check_first_records(recipe, skip_bad)
    if dry_run:
        from mvkernels.model.training.tuning import read_data, recipe_tokenizer

        data = read_data(recipe, recipe_tokenizer(recipe), skip_bad)
        _print_mixture(recipe, data)
        return
    assert out is not None
    first = os.environ.get("RANK", "0") == "0"
    if first:  # the other processes may find the folder begun
        check_folder(recipe, out, resume)
    with resumable(out, [*context.obj, *([] if resume else ["--resume"])]):
        from mvkernels.model.training import tune  # takes seconds, so bad input is said before

        keep_freed_memory()
        result = tune(recipe, out, resume=resume, skip_bad=skip_bad, progress=not quiet)
    if not first:
        return
    _print_skipped(result.skipped)
    held_out = [loss for _, loss in result.held_out_losses]
    measured = f", held-out loss {held_out[0]:.4f} -> {held_out[-1]:.4f}" if held_out else ""
    print(
        f"{result.folder}: {result.trained} of {result.parameters} parameters trained in "
        f"{seconds_text(result.seconds)}, last loss {result.losses[-1][1]:.4f}{measured}"
    )
    curves = {"trained on": result.losses, "held out": result.held_out_losses}
    from mvkernels.cli import charts

    if charts.left_out():
        print(charts.left_out(), file=sys.stderr)
    charts.losses({name: points for name, points in curves.items() if points}, result.folder / CHART, "losses")


def _check_first_records(recipe: TuningRecipe, skip_bad: bool) -> None:
    """Raises ValueError for data that is none, as the first record shows, before PyTorch is imported."""
    for path in recipe.data:
        first = next(read_examples([path]), None)
        if isinstance(first, ValueError) and not skip_bad:
            raise first


def _print_mixture(recipe: TuningRecipe, data: TuningData) -> None:
    from rich.console import Console
    from rich.table import Table

    mixture = data.mixture
    table = Table(title="mixture: documents and tokens of each pass")
    headings = (
        "pass",
        "share",
        "Multiverse",
        "sequential",
        "Multiverse tokens",
        "sequential tokens",
        "labelled tokens",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, one in enumerate(mixture.passes, start=1):
        counts = (one.parallel, one.sequential, one.parallel_tokens, one.sequential_tokens, one.labelled)
        table.add_row(str(number), f"{one.share:g}", *(f"{count:,}" for count in counts))
    # As wide as it is, also into a file: a table that is cut says nothing.
    Console(width=max(110, Console().width)).print(table)
    longest = max(sum(len(document.ids) for document in row) for row in mixture.rows)
    print(
        f"{mixture.steps} steps of {recipe.documents_per_step} documents in {mixture.rows_per_step} rows; "
        f"longest row {longest:,} of {recipe.tokens_per_row:,} tokens; {mixture.repeated} documents repeated to fill "
        f"the last step; {len(data.held_out)} held out"
    )
    _print_skipped(data.skipped)


def _print_skipped(skipped: Sequence[str]) -> None:
    if skipped:
        print(f"skipped {len(skipped)} bad traces:")
        for reason in skipped:
            print(f"  {reason}")
