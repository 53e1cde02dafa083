"""The command line: ``mvkernels`` and ``python -m mvkernels``. A subcommand's module is imported when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

import mvkernels
from mvkernels.cli import fail, one_line_errors
from mvkernels.cli.options import with_fields

SUMMARY = "Language models that write in parallel branches: generate, inspect, train, evaluate."
#: Subcommand -> what it does. The function `run` of its module in `mvkernels.cli` has its arguments and options.
COMMANDS = {
    "inspect": "Show a trace: its tree, tokens, critical path, parallelism, mask density and blocks.",
    "generate": "Generate: show every path as it grows, the merged answer, and what it took.",
    "check": "Check traces: grammar (errors, exit status 1) and paths that refer to each other (warnings).",
    "stats": "Show the figures of sets of traces: "
    "tokens, critical path, # parallel, blocks, paths, depth, width, lengths.",
    "add-tags": "Extend a model and its tokenizer by the twelve control tags.",
    "train": "Train the embedded model from nothing, on generated problems; the defaults are its recipe.",
    "tune": "Tune a base model on traces, by a recipe; every field of the recipe is an option.",
    "curate": "Curate: chains of thought become traces, in five stages of questions to a model; a rerun goes on.",
    "evaluate": "Evaluate: accuracy, tokens, critical path and wall-clock, asked in parallel and without.",
    "reproduce": "Train from nothing, evaluate, and write the tables and figures; goes on where it was interrupted.",
    "env": "Show versions, the GPU, and which backends can run here and why the others cannot.",
}
#: After Ctrl-C these commands say how an interrupted run continues.
GOES_ON = dict.fromkeys(("evaluate", "reproduce"), "the same command goes on with what is done")
PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,  # rich takes longer to import than all else that an error in the arguments needs
}


class Subcommand(TyperCommand):
    """A name and a summary, until it is called: the list of commands and an unknown one import no module."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert info_name is not None
        if info_name == "train" and any(word.endswith(".toml") for word in args):
            fail("train makes a model from nothing; with a recipe: mvkernels tune RECIPE OUT")
        with one_line_errors():
            command = load_command(info_name)
        return command.make_context(info_name, args, parent, obj=[info_name, *args], **extra)


def load_command(name: str) -> Any:
    """Import a subcommand's module.

    Returns:
        The click command. Its context's `obj` is the words of the command line, from the subcommand on.
    """
    module = import_module(f"mvkernels.cli.{name.replace('-', '_')}")
    run = one_line_errors(GOES_ON.get(name, ""))(with_fields(module.run))
    single = typer.Typer(**PLAIN)
    single.command(name, help=COMMANDS[name], epilog=getattr(module, "EPILOG", None))(run)
    return get_command(single)


app = typer.Typer(name="mvkernels", help=SUMMARY, no_args_is_help=True, pretty_exceptions_enable=False, **PLAIN)
for name, summary in COMMANDS.items():
    app.command(name, cls=Subcommand, help=summary)(lambda: None)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mvkernels {mvkernels.__version__}")
        raise typer.Exit


@app.callback(help=SUMMARY)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that stand before a subcommand."""


def main() -> None:
    """Run the command line: the entry point of the console script."""
    try:
        app(prog_name="mvkernels")
    except KeyboardInterrupt:  # before a command has begun, such as in typer's own imports
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
