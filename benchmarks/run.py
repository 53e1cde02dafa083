"""Run a suite: tables on the screen; with --out, CSV files that grow while it runs, and a bar chart per case.

python -m benchmarks.run --suite attention [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import (
    append,
    attention,
    decode,
    decode_cases,
    engine_report,
    memory,
    merge,
    preparation,
    report,
    report_cache,
    training,
)
from benchmarks.attention import Effort
from benchmarks.cases import TREES
from benchmarks.gate import WrongResultError
from benchmarks.peers import Shape

LAYOUTS = ("real", *TREES)
CASES = {
    "attention": LAYOUTS,
    "preparation": LAYOUTS,
    "memory": LAYOUTS,
    "decode": decode_cases.CASES,
    "merge": merge.CASES,
    "append": append.CASES,
    "engine": engine_report.CASES,
    "training": training.CASES,
}
LONG = 32768  # tokens at which preparation and memory are measured
SHAPES = {
    "cpu": Shape(8192, 8, 8, 64, "float32", "cpu"),
    "cuda": Shape(32768, 64, 8, 128, "bfloat16", "cuda"),
}
CACHE_SHAPES = {
    "cpu": Shape(8192, 8, 2, 64, "float32", "cpu"),
    "cuda": Shape(32768, 32, 8, 128, "bfloat16", "cuda"),
}
PREFILL = {"cpu": 1024, "cuda": 4096}  # tokens of each branch in the append suite
EFFORTS = {"cpu": Effort(5, 10.0), "cuda": Effort(10, 2.0)}
CACHE_EFFORTS = {"cpu": Effort(21, 3.0), "cuda": Effort(30, 2.0)}  # short calls
STEP_TOKENS = {"cpu": 12288, "cuda": 32768}  # of a training step
STEP_EFFORTS = {"cpu": Effort(3, 60.0), "cuda": Effort(10, 2.0)}
ENGINE_TOKENS = 256  # of a plain prompt
ENGINE_EFFORTS = {"cpu": Effort(5, 60.0), "cuda": Effort(5, 10.0)}  # long calls
TABLES: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "preparation": (report.preparation,),
    "memory": (report.memory,),
    "attention": (report.set_up, report.ratios),
    "decode": (report_cache.decode,),
    "merge": (report_cache.merge,),
    "append": (report_cache.append,),
    "engine": (engine_report.plain, engine_report.parallel, engine_report.host),
    "training": (report.training,),
}
PLOTS = {
    "attention": report.plot,
    "decode": report_cache.plot_decode,
    "merge": report_cache.plot_merge,
    "append": report_cache.plot_append,
    "engine": engine_report.plot,
}


def main(
    suite: Annotated[str, typer.Option(help=f"which suite: {', '.join(CASES)}")] = "attention",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    quick: Annotated[
        bool, typer.Option(help="a quarter of the tokens, fewer rounds, no FlexAttention on a CPU")
    ] = False,
    tokens: Annotated[
        int,
        typer.Option(
            help="tokens per case; default: 8192 on cpu and 32768 on cuda, preparation and memory: 32768; "
            "decode: of the shared prefix; merge: of each branch, 2048; append, prefill: of each branch, 1024 and "
            "4096; engine: of a single request, 256; each of several has a quarter, a path half; training: of a step, "
            "12288 and 32768"
        ),
    ] = 0,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help=f"only this case; may be repeated: {', '.join(LAYOUTS)}; decode: {', '.join(CASES['decode'])}; "
            f"merge: {', '.join(CASES['merge'])}; append: {', '.join(CASES['append'])}; "
            f"engine: {', '.join(CASES['engine'])} (cuda: all; cpu: without curve)"
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            help="timed calls of each peer, at most; default 5 and 10, decode and append 21 and 30, engine 5, "
            "training 3 and 10"
        ),
    ] = 0,
    seconds: Annotated[
        float,
        typer.Option(
            help="of timed calls, for each peer of a case; default 10 and 2, decode and append 3 and 2, engine 60 "
            "and 10, training 60 and 2"
        ),
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for CSV files and charts")] = None,
) -> None:
    """Measure a suite and print what it says.

    attention: multiverse_attention against what users have today, each case checked for correctness before it is
    timed; then the preparation suite. preparation: what building a layout and the tables derived from it costs.
    memory: the peak of forward + backward beyond inputs, outputs and gradients, each case in a fresh process.
    decode: tree_decode against decoding branch by branch. merge: fork, merge and planning, and copying instead.
    append: writing new keys and values into pages. engine: whole requests against transformers, blocks of parallel
    paths against the same tokens one path at a time, and the host's part in a step. training: an optimizer step on
    several documents in one row, against one document at a time. Where two defaults are given, they
    are those of cpu and cuda.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check(suite, device, case)
    on_cache = suite in ("decode", "merge", "append")
    shape = (CACHE_SHAPES if on_cache else SHAPES)[device]
    part = 4 if quick else 1
    shape = replace(shape, tokens=tokens or shape.tokens // part)
    special = {"engine": ENGINE_EFFORTS, "training": STEP_EFFORTS}
    default = special.get(suite, CACHE_EFFORTS if on_cache else EFFORTS)[device]
    fewer = max(3, default.rounds // part) if on_cache else 3
    effort = Effort(rounds or (fewer if quick else default.rounds), seconds or default.seconds / part, quick)
    screen = report.console()
    heads = f"; {shape.heads} query and {shape.kv_heads} key-value heads of {shape.head_dim}, {shape.dtype}"
    screen.print(where(device) + ("" if suite == "engine" else heads))
    run = Run(screen, out, where(device))
    long = tokens or LONG // part
    try:
        if suite == "attention":
            attention.run(shape, effort, run.sink("attention"), run.note, case)
        if suite in ("attention", "preparation"):
            preparation.run(long, 3 if quick else 10, run.sink("preparation"), case)
        if suite == "memory":
            memory.run(replace(shape, tokens=long), run.sink("memory"), run.note, case)
        if suite == "decode":
            decode.run(shape, effort, run.sink("decode"), run.note, case)
        if suite == "merge":
            shape = replace(shape, tokens=tokens or merge.TOKENS // part)
            merge.run(shape, effort, run.sink("merge"), run.note, case)
        if suite == "append":
            shape = replace(shape, tokens=tokens or PREFILL[device] // part)
            append.run(shape, effort, run.sink("append"), run.note, case)
        if suite == "training":
            shape = replace(shape, tokens=tokens or STEP_TOKENS[device] // part)
            training.run(shape, effort, run.sink("training"), run.note, case)
        if suite == "engine":
            from benchmarks import engine  # the others run without transformers

            engine.run(device, tokens or ENGINE_TOKENS // part, effort, run.sink("engine"), run.note, case)
    except KeyboardInterrupt:
        run.note("stopped; what follows is what was measured until then")
        raise typer.Exit(130) from None
    except WrongResultError as error:
        run.note(str(error))
        raise typer.Exit(1) from None
    finally:
        run.finish()


def _check(suite: str, device: str, cases: list[str] | None) -> None:
    if suite not in CASES:
        raise typer.BadParameter(f"expected one of {', '.join(CASES)}, got {suite}", param_hint="--suite")
    if device not in SHAPES or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"expected cpu, or cuda where there is one, got {device}", param_hint="--device")
    unknown = set(cases or ()) - set(CASES[suite])
    if unknown:
        raise typer.BadParameter(
            f"expected one of {', '.join(CASES[suite])}, got {', '.join(unknown)}", param_hint="--case"
        )


class Run:
    """Rows and notes as they come, and the tables at the end."""

    def __init__(self, screen: Any, folder: Path | None, where: str) -> None:
        self.screen = screen
        self.folder = folder
        self.where = where
        self.rows: dict[str, list[Any]] = {}

    def sink(self, name: str) -> Callable[[Any], None]:
        """What takes the rows of NAME.csv."""
        rows = self.rows.setdefault(name, [])
        file = None if self.folder is None else report.CsvFile(self.folder / f"{name}.csv", self.where)

        def take(row: Any) -> None:
            rows.append(row)
            if file is not None:
                file.write(row)
            if hasattr(row, "line"):
                self.screen.print(row.line())

        return take

    def note(self, text: str) -> None:
        self.screen.print(text, markup=False)

    def finish(self) -> None:
        """Print the tables and draw the charts of what there is."""
        for name in TABLES:
            for table in TABLES[name] if self.rows.get(name) else ():
                made = table(self.rows[name])
                if made is not None:  # a table of cases that did not run
                    self.screen.print(made)
        if self.folder is None:
            return
        try:
            for name in PLOTS:
                if self.rows.get(name):
                    PLOTS[name](self.rows[name], self.folder)
        except ImportError:
            self.note("no charts: matplotlib is not installed")


def where(device: str) -> str:
    """Machine and versions, in one line."""
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    typer.run(main)
