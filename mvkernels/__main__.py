"""The command line: ``mvkernels`` and ``python -m mvkernels``. A subcommand's module is imported when it is called."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import mvkernels
from mvkernels.commands import one_line_errors

app = typer.Typer(
    name="mvkernels",
    help="Language models that write in parallel branches: generate, inspect, train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Semantics(StrEnum):
    canonical = "canonical"
    released = "released"


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mvkernels {mvkernels.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Language models that write in parallel branches: generate, inspect, train."""


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A trace in the text format.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json, or a folder with one: count tokens instead of words.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw mask and positions to this file.")] = None,
    semantics: Annotated[Semantics, typer.Option(help="The layout to use.")] = Semantics.canonical,
    as_json: Json = False,
) -> None:
    """Show a trace: its tree, tokens, critical path, parallelism, mask density and blocks."""
    with one_line_errors():
        from mvkernels.commands import inspect as command

        command.run(file, tokenizer, plot, semantics.value, as_json)


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions, the GPU, and which backends can run here and why the others cannot."""
    with one_line_errors():
        from mvkernels.commands import env as command

        command.run(as_json)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="mvkernels")


if __name__ == "__main__":
    main()
