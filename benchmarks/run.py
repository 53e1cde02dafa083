"""Run a suite: CSV, a bar chart per case, and a table of ratios.

python -m benchmarks.run --suite attention [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

import csv
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import attention

console = Console()

SHAPES = {
    "cpu": attention.Shape(8192, 8, 8, 64, "float32", "cpu"),
    "cuda": attention.Shape(32768, 64, 8, 128, "bfloat16", "cuda"),
}
DENSE_LIMIT = 16384


def main(
    suite: Annotated[str, typer.Option(help="which suite: attention")] = "attention",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one")] = "",
    quick: Annotated[bool, typer.Option(help="fewer tokens and repeats")] = False,
    tokens: Annotated[int, typer.Option(help="tokens per case; default: 8192 on cpu, 32768 on cuda")] = 0,
    case: Annotated[list[str] | None, typer.Option(help="only this case; may be repeated")] = None,
    repeats: Annotated[int, typer.Option(help="timed calls; default 5 on cpu, 20 on cuda")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for the CSV and the plots")] = None,
) -> None:
    """Time a suite and print what it says."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if suite != "attention":
        raise typer.BadParameter(f"expected attention, got {suite}", param_hint="--suite")
    if device not in SHAPES or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"expected cpu, or cuda where there is one, got {device}", param_hint="--device")
    base = SHAPES[device]
    count = tokens or (base.tokens // 4 if quick else base.tokens)
    shape = attention.Shape(count, base.heads, base.kv_heads, base.head_dim, base.dtype, device)
    times = repeats or {"cpu": 5, "cuda": 20}[device] // (2 if quick else 1)
    console.print(
        f"{where(device)}; {count} tokens, {shape.heads} query and {shape.kv_heads} key-value heads of "
        f"{shape.head_dim}, {shape.dtype}; medians of {times}"
    )
    rows = []
    for row in attention.run(shape, times, DENSE_LIMIT, case):
        rows.append(row)
        console.print(
            f"{row.case:14} {row.peer:12} {row.direction:9} {row.median_ms:10.2f} ms  {row.tflops:8.3f} TFLOP/s"
        )
    console.print(summary(rows))
    if out is not None:
        write(rows, out, device)


def where(device: str) -> str:
    """Machine and versions, in one line."""
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def summary(rows: list[attention.Row]) -> Table:
    """Each peer's time over ours, forward and backward together: above 1, ours is faster."""
    table = Table(title="time of the peer / time of ours")
    for heading in ("case", "visible / causal", "peer", "forward", "backward", "both", "peak MB", "ours, peak MB"):
        table.add_column(heading, justify="left" if heading in ("case", "peer") else "right")
    times = {(row.case, row.peer, row.direction): row for row in rows}
    for case, peer in dict.fromkeys((row.case, row.peer) for row in rows):
        if peer == "ours":
            continue
        pairs = [(times[case, peer, d], times[case, "ours", d]) for d in ("forward", "backward")]
        ratios = [theirs.median_ms / mine.median_ms for theirs, mine in pairs]
        both = sum(theirs.median_ms for theirs, _ in pairs) / sum(mine.median_ms for _, mine in pairs)
        memory = [max((row.peak_mb or 0.0) for row in side) for side in zip(*pairs, strict=True)]
        share = pairs[0][1].visible_share
        table.add_row(case, f"{share:.2f}", peer, *(f"{x:.2f}" for x in (*ratios, both)), *(f"{x:.0f}" for x in memory))
    return table


def write(rows: list[attention.Row], folder: Path, device: str) -> None:
    """attention.csv with the versions in it, and one bar chart per case."""
    folder.mkdir(parents=True, exist_ok=True)
    extra = {"where": where(device)}
    with (folder / "attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *extra])
        writer.writeheader()
        writer.writerows({**asdict(row), **extra} for row in rows)
    try:
        import matplotlib
    except ImportError:
        console.print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for case in dict.fromkeys(row.case for row in rows):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
        for axis, direction in zip(axes, ("forward", "backward"), strict=True):
            chosen = [row for row in rows if (row.case, row.direction) == (case, direction)]
            errors = [[r.median_ms - r.p20_ms for r in chosen], [r.p80_ms - r.median_ms for r in chosen]]
            axis.barh([r.peer for r in chosen], [r.median_ms for r in chosen], xerr=errors)
            axis.set(title=f"{case}, {direction}", xlabel="ms (median, p20 to p80)")
            axis.invert_yaxis()
        figure.savefig(folder / f"attention-{case}.png", dpi=120)
        pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
