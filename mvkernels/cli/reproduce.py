"""``mvkernels reproduce``: trains models from nothing, evaluates them, and writes the paper's tables and figures."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from itertools import chain
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mvkernels.cli import charts
from mvkernels.cli.env import package_version
from mvkernels.cli.files import require_writable
from mvkernels.cli.reproduce_cells import FULL, QUICK, Cells, Scale, forget_engines, model_name
from mvkernels.cli.reproduce_report import Report

OUT = Path("benchmarks/results/reproduce")
WORK = Path("runs/reproduce")
QUICK_SUFFIX = "-quick"


def run(
    out: Annotated[
        Path | None, typer.Option(help="Folder for tables and figures. Default: benchmarks/results/reproduce.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for models and samples, to go on from. Default: runs/reproduce.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Everything once, on models that hardly learn.")] = False,
    jobs: Annotated[int, typer.Option(help="Models trained and asked at the same time; the cores are shared.")] = 1,
    task: Annotated[str | None, typer.Option(help="Only this task: arithmetic or sat.")] = None,
) -> None:
    """Do what is not done yet in `work`, cell by cell, and after each write the report on all that is done.

    With several jobs each model has a process of its own; what is timed runs alone afterwards. Each task has a report
    of its own.
    """
    if jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {jobs}")
    scale = _scale(quick, task)
    suffix = QUICK_SUFFIX if quick else ""
    out = out or OUT.with_name(OUT.name + suffix)
    work = work or WORK.with_name(WORK.name + suffix)
    require_writable(out, "--out")
    require_writable(work, "--work")
    import torch

    console = Console(stderr=True, highlight=False, markup=False)
    if charts.left_out():
        console.print(f"note: {charts.left_out()}", soft_wrap=True)
    cells = Cells(work, scale, console.print)
    threads = torch.get_num_threads()
    where = f"torch {package_version('torch')}, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
    with closing(_side_by_side(cells, quick, jobs)) as models:
        for name in chain(models, cells.run()):
            console.print(f"done: {name}")
            for one in scale.seeds:
                Report(cells, one, out).write(where)
    for one in scale.seeds:
        console.print(f"{out}/{one}/README.md")


def _scale(quick: bool, task: str | None) -> Scale:
    """Raises ValueError for a task that it has not."""
    scale = QUICK if quick else FULL
    if task is None:
        return scale
    if task not in scale.seeds:
        raise ValueError(f"--task: expected {' or '.join(scale.seeds)}, got {task!r}")
    return replace(scale, seeds={task: scale.seeds[task]})


def _side_by_side(cells: Cells, quick: bool, jobs: int) -> Generator[str, None, None]:
    """The cells that need one model, so many models at a time; names each model when all of its are done.

    jobs: of one, nothing is done here.
    """
    if jobs == 1:
        return
    import torch

    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        models = [*cells.models()]
        # The processes inherit that Ctrl-C is ignored, for each would print a traceback. They are ended below.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = {pool.submit(_of_model, cells.work, quick, *model): model_name(*model) for model in models}
        signal.signal(signal.SIGINT, handler)
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            for process in active_children():  # else the error is said when their models are trained
                process.terminate()
            raise


def _of_model(work: Path, quick: bool, task: str, kind: str, seed: int) -> None:
    console = Console(stderr=True, highlight=False, markup=False)
    for _ in Cells(work, QUICK if quick else FULL, console.print, progress=False).of_model(task, kind, seed):
        pass
    forget_engines()  # this process goes on with other models
