"""``mvkernels curate``: chains of thought become Multiverse traces, by a language model at an endpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvkernels.cli.options import Fields, Given, Json, Quiet
from mvkernels.model.curator.chains import ChainReader, Columns
from mvkernels.model.curator.job import EndpointSettings, Job, Limits, Rules, State, changes_since
from mvkernels.model.curator.outputs import REJECTED, TRACES

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = "Exit status: 0 all chains done, 3 a budget used up, 4 some requests not answered, 130 interrupted."
DEFAULT_KEY = "OPENAI_API_KEY"
#: Exit status by how a run ended; an endpoint that cannot be used is bad input, 2.
STATUS = {"complete": 0, "budget": 3, "unfinished": 4, "interrupted": 130}


def key_of(variable: str | None) -> str:
    """The key in the environment; "none" where there is none in the usual variable, as for local servers.

    Raises ValueError where a variable was named and is not set, and for a key that no HTTP header can hold.
    """
    key = os.environ.get(variable or DEFAULT_KEY, "").strip()
    if variable and not key:
        raise ValueError(f"--api-key-env: expected the environment to have {variable}, it has not")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"expected a key of printable ASCII characters in {variable or DEFAULT_KEY}, got others")
    return key or "none"


def run(
    source: Annotated[
        Path, typer.Argument(help="Chains of thought: .jsonl, .json (a list) or .parquet", metavar="INPUT")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the traces; one that has some goes on.", metavar="OUT")],
    endpoint: Annotated[Given, Fields(EndpointSettings)],
    columns: Annotated[Given, Fields(Columns)],
    settings: Annotated[Given, Fields(Job)],
    rules: Annotated[Given, Fields(Rules)],
    limits: Annotated[Given, Fields(Limits)],
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key. Default: OPENAI_API_KEY, or no key.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Curate, show the progress, and print what came out; exit with the status of how the run ended.

    Raises:
        ValueError: Arguments or the input are bad, or the endpoint cannot be used.
    """
    if not {"base_url", "model"} <= endpoint.keys():
        raise ValueError("expected curate INPUT OUT --base-url URL --model NAME")
    ChainReader(source)
    if endpoint.get("answer_tokens") == 0:
        endpoint["answer_tokens"] = None
    where = EndpointSettings(key=key_of(api_key_env), **endpoint)
    job = Job(source, out, where, Columns(**columns), rules=Rules(**rules), limits=Limits(**limits), **settings)
    from rich.console import Console

    from mvkernels.model.curator.run import curate

    console = Console(stderr=True, markup=False)

    def say(message: str) -> None:
        console.print(f"note: {message}", style="yellow", highlight=False, soft_wrap=True)

    for change in changes_since(job):
        say(change)
    import asyncio

    with bar(console, quiet) as watch:
        state = asyncio.run(curate(job, watch, say))
    print(json.dumps(asdict(state)) if as_json else report(job, state))
    status = STATUS.get(state.ended, 1)
    if status:
        raise SystemExit(status)


def report(job: Job, state: State) -> str:
    """What a run did, in a few lines."""
    good = state.done - state.rejected
    cost = f", cost {state.cost:.4f}" if state.cost else ""
    lines = [
        f"{job.out}: {good} traces in {TRACES} ({state.warned} with warnings), {state.rejected} chains in {REJECTED}",
        f"{state.here} chains in {state.seconds:.1f} s, {state.tokens_here:,} tokens; "
        f"in all {state.tokens:,} tokens{cost}",
    ]
    return "\n".join([*lines, *([state.message] if state.message else [])])


@contextmanager
def bar(console: Console, quiet: bool) -> Iterator[Callable[[State], None]]:
    """A progress bar on the console; what it gives is told the state."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )  # fmt: skip

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("curate", total=None, more="")

        def watch(state: State) -> None:
            if state.here == 0:  # what is done already is no measure of how fast this run is
                progress.reset(task, total=state.total, completed=state.done, more="")
                return
            rate = state.tokens_here / max(state.seconds, 1e-9)
            more = f"{state.rejected} rejected  {rate:,.0f} tokens/s" + (
                f"  cost {state.cost:.2f}" if state.cost else ""
            )
            progress.update(task, completed=state.done, total=state.total, more=more)

        yield watch
