"""``mvkernels reproduce``: trains models from nothing, evaluates them, and writes the paper's tables and figures."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from rich.console import Console

from mvkernels.commands.env import package_version
from mvkernels.commands.reproduce_cells import FULL, QUICK, Cells
from mvkernels.commands.reproduce_report import Report

OUT = Path("benchmarks/results/reproduce")
WORK = Path("runs/reproduce")
QUICK_SUFFIX = "-quick"


def run(out: Path | None, work: Path | None, quick: bool) -> None:
    """Does what is not done yet in ``work``, cell by cell, and writes the report on all that is done after each."""
    scale = QUICK if quick else FULL
    suffix = QUICK_SUFFIX if quick else ""
    out = out or OUT.with_name(OUT.name + suffix)
    work = work or WORK.with_name(WORK.name + suffix)
    for folder in (out, work):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"expected a folder, got a file: {folder}")
    console = Console(stderr=True, highlight=False)
    cells = Cells(work, scale, console.print)
    where = f"torch {package_version('torch')}, {platform.machine()}, {torch.get_num_threads()} threads"
    for name in cells.run():
        console.print(f"done: {name}")
        Report(cells, out).write(where)
    console.print(f"{out}/README.md")
