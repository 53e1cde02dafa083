"""CSV files that grow row by row, tables and bar charts."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.attention import MASK_BUILD, Row
from benchmarks.memory import MemoryRow
from benchmarks.preparation import PreparationRow
from benchmarks.training import TrainingRow

WIDTH = 132  # no table is wider; a narrower terminal wraps lines, which loses nothing
WORDS = ("case", "peer", "what", "against")  # columns of text
BOTH = "forward+backward"


def console() -> Console:
    """At least WIDTH columns, for rich cuts names where a table does not fit."""
    return Console(width=max(WIDTH, Console().width), highlight=False)


class CsvFile:
    """A CSV to which every row is written at once, so that a run that is killed leaves what it measured."""

    def __init__(self, path: Path, where: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an earlier run's rows are not this one's
        self.path = path
        self.where = where

    def write(self, row: Any) -> None:
        """row: an instance of one dataclass; `where` (machine and versions) is added as the last column."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow([*(field.name for field in fields(row)), "where"])
            writer.writerow([*asdict(row).values(), self.where])
            file.flush()
            os.fsync(file.fileno())


def ratios(rows: Sequence[Row]) -> Table:
    """Each peer's time over ours: above 1, ours is faster."""
    table = make_table(
        "time of the peer / time of ours, medians over the rounds",
        ("case", "visible", "peer", "forward", "backward", "both", "p20-p80", "per pair"),
        ("TFLOP/s", "ours", "peak MB", "ours"),
        caption="visible: of the causal pairs. per pair: ours per visible pair / the peer per pair of its own mask",
    )
    found = {(row.case, row.peer, row.direction): row for row in rows}
    for case, peer in dict.fromkeys((row.case, row.peer) for row in rows):
        both, mine = found.get((case, peer, BOTH)), found.get((case, "ours", BOTH))
        if peer == "ours" or both is None or mine is None:
            continue
        parts = [found[case, peer, direction].ratio for direction in ("forward", "backward")]
        spread = f"{figure_text(both.ratio_p20)}-{figure_text(both.ratio_p80)}"
        speed = (f"{row.tflops:.2f}" for row in (both, mine))
        peaks = (figure_text(row.peak_mb, 0) for row in (both, mine))
        figures = (*map(figure_text, [*parts, both.ratio]), spread, figure_text(both.pair_ratio))
        table.add_row(case, f"{both.visible_share:.2f}", peer, *figures, *speed, *peaks)
    return table


def set_up(rows: Sequence[Row]) -> Table:
    """The building of masks, compilation, and the whole way to the first result."""
    table = make_table(
        "set-up: from nothing to the end of the first forward and backward, ms",
        ("case", "peer", "tokens", MASK_BUILD, "compile", "set-up"),
        caption="compile: what the first calls take beyond the mask and later calls",
    )
    whole = {(row.case, row.peer, row.tokens): row for row in rows if row.direction == BOTH}
    masks = {(row.case, row.peer, row.tokens): row for row in rows if row.direction == MASK_BUILD}
    for key in dict.fromkeys((row.case, row.peer, row.tokens) for row in rows):
        mask, both = masks.get(key), whole.get(key)
        build = None if mask is None else mask.median_ms
        times = (None, None) if both is None else (both.compile_ms, both.setup_ms)
        table.add_row(key[0], key[1], str(key[2]), figure_text(build), *(figure_text(x, 0) for x in times))
    return table


def preparation(rows: Sequence[PreparationRow]) -> Table:
    table = make_table(
        "a fresh layout, on the host: ms, 20th to 80th percentile in brackets",
        ("case", "what", "tokens", "segments", "ms"),
    )
    for row in rows:
        spread = f"{row.median_ms:.2f} [{row.p20_ms:.2f}-{row.p80_ms:.2f}]"
        table.add_row(row.case, row.what, str(row.tokens), str(row.segments), spread)
    return table


def memory(rows: Sequence[MemoryRow]) -> Table:
    table = make_table(
        "peak memory of forward + backward beyond inputs, outputs and gradients, MB",
        ("case", "tokens", "inputs", "outputs and gradients", "extra"),
    )
    for row in rows:
        sizes = (row.inputs_mb, row.results_mb, row.extra_mb)
        table.add_row(row.case, str(row.tokens), *(f"{size:.1f}" for size in sizes))
    return table


def training(rows: Sequence[TrainingRow]) -> Table:
    """Each peer's time over that of the packed row: above 1, packing is faster."""
    table = make_table(
        "an optimizer step on several documents: time of the peer / time of one packed row",
        ("case", "documents", "tokens", "peer", "ratio", "p20-p80", "goal", "of goal", "tokens/s"),
        ("attention MB", "mask MB"),
        caption="attention: what forward and backward take beyond inputs, outputs and gradients; mask: dense, boolean",
    )
    for row in rows:
        spread = f"{figure_text(row.ratio_p20)}-{figure_text(row.ratio_p80)}"
        goal = "-" if row.goal is None else f">= {row.goal:.2f}"
        figures = (figure_text(row.of_goal), f"{row.tokens_per_s:.1f}")
        sizes = (figure_text(row.attention_mb, 1), figure_text(row.mask_mb, 1))
        counts = (str(row.documents), str(row.tokens))
        table.add_row(row.case, *counts, row.peer, figure_text(row.ratio), spread, goal, *figures, *sizes)
    return table


def plot(rows: Sequence[Row], folder: Path) -> None:
    """attention-CASE.png: one bar chart a case. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directions = ("forward", "backward", BOTH)
    for case in dict.fromkeys(row.case for row in rows if row.direction in directions):
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.5), sharey=True, constrained_layout=True)
        for axis, direction in zip(axes, directions, strict=True):
            chosen = [row for row in rows if (row.case, row.direction) == (case, direction)]
            errors = [[r.median_ms - r.p20_ms for r in chosen], [r.p80_ms - r.median_ms for r in chosen]]
            axis.barh([r.peer for r in chosen], [r.median_ms for r in chosen], xerr=errors)
            axis.set(title=f"{case}, {direction}", xlabel="ms (median, p20 to p80)")
        axes[0].invert_yaxis()
        figure.savefig(folder / f"attention-{case}.png", dpi=120)
        pyplot.close(figure)


def make_table(title: str, *headings: tuple[str, ...], caption: str | None = None) -> Table:
    """One line for a heading and for each row; numbers to the right."""
    table = Table(title=title, caption=caption)
    for heading in (name for group in headings for name in group):
        table.add_column(heading, justify="left" if heading in WORDS else "right", no_wrap=True)
    return table


def figure_text(value: float | None, digits: int = 2) -> str:
    """The number, or - for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}"
