"""``mvkernels stats``: the figures of sets of traces, as a table each, and their distributions as a chart."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mvkernels.cli import charts
from mvkernels.cli.files import load_tokenizer, require_writable
from mvkernels.cli.options import Json, Tokenizer, Traces
from mvkernels.model.curator.statistics import Spread, TraceFigures, measures, spreads, trace_figures
from mvkernels.model.curator.trace_files import read_traces
from mvkernels.model.files import write_whole
from mvkernels.tags import TagTokens


def file_sets(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Name -> paths: a folder, a JSONL or a Parquet file is a set of its own; files of one trace are one together."""
    sets: dict[str, list[Path]] = {}
    single: list[Path] = []
    for path in dict.fromkeys(files):
        if path.is_dir() or path.suffix in (".jsonl", ".parquet"):
            sets[str(path)] = [path]
        else:
            single.append(path)
    if single:
        sets[str(single[0]) if len(single) == 1 else f"{len(single)} files"] = single
    return sets


def run(
    files: Traces,
    tokenizer: Tokenizer = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures as JSON, and a chart of them.")] = None,
    as_json: Json = False,
) -> None:
    """Print a table for each set of traces. A malformed trace is left out, and named on stderr.

    Raises:
        ValueError: A set has no good trace, or the figures cannot be written.
    """
    if out is not None:
        require_writable(out, "--out")
    tags = None if tokenizer is None else TagTokens.from_tokenizer(load_tokenizer(tokenizer))
    unit = "words" if tags is None else "tokens"
    values: dict[str, dict[str, list[float]]] = {}
    report: list[dict[str, object]] = []
    console = Console()
    for name, paths in file_sets(files).items():
        figures: list[TraceFigures] = []
        bad = 0
        for stored in read_traces(paths):
            try:
                if stored.text is None:
                    raise ValueError(stored.error)
                figures.append(trace_figures(stored.text, tags))
            except ValueError as error:
                bad += 1
                print(f"mvkernels: left out: {stored.name}: {error}", file=sys.stderr)
        if not figures:
            raise ValueError(f"expected at least one good trace, got none in {name}")
        values[name] = measures(figures, unit)
        found = spreads(values[name])
        summary = {measure: asdict(one) for measure, one in found.items()}
        report.append({"set": name, "unit": unit, "traces": len(figures), "left_out": bad, "measures": summary})
        if not as_json:
            console.print(_table(name, len(figures), bad, found))
            console.print()
    if as_json:
        print(json.dumps(report, indent=1))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        figures_file, chart = out / "statistics.json", out / "distributions.png"
        write_whole(figures_file, json.dumps(report, indent=1) + "\n")
        charts.distributions(values, chart, "Traces")
        said = [f"figures: {figures_file}", charts.left_out() or f"chart: {chart}"]
        print("\n".join(said), file=sys.stderr if as_json else sys.stdout)


def _table(name: str, traces: int, bad: int, found: dict[str, Spread]) -> Table:
    title = f"{name}: {traces} trace" + "s" * (traces != 1) + (f", {bad} left out" if bad else "")
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for column in ("mean", "median", "min", "max"):
        table.add_column(column, justify="right")
    for measure, one in found.items():
        digits = 2 if measure == "# parallel" else 0
        edges = [f"{value:.{digits}f}" for value in (one.min, one.max)]
        table.add_row(Text(measure), f"{one.mean:.{max(digits, 1)}f}", f"{one.median:.{max(digits, 1)}f}", *edges)
    return table
