"""Tables and charts of the suites on the paged cache: decode, merge, append."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.append import AppendRow
from benchmarks.decode import DecodeRow
from benchmarks.merge import MergeRow
from benchmarks.report import figure_text, make_table


def decode(rows: Sequence[DecodeRow]) -> Table:
    """Each peer's time over ours: above 1, ours is faster."""
    table = make_table(
        "decode: time of the peer / time of ours, medians over the rounds",
        ("case", "branches", "peer", "ratio", "p20-p80", "goal", "of goal", "ms"),
        ("GB/s", "of copy", "traffic MB"),
        caption="branches x shared prefix + own tokens. GB/s: keys and values that some branch sees, each once, over "
        "the time; of copy: its share of what a large copy reads and writes in the same rounds. of goal: met from 1 on."
        " In brackets: which way ours took",
    )
    for row in rows:
        sizes = f"{row.branches} x {row.prefix} + {row.own}"
        goal = "-" if row.goal is None else f">= {row.goal:.2f}"
        spread = f"{figure_text(row.ratio_p20)}-{figure_text(row.ratio_p80)}"
        figures = (figure_text(row.of_goal), f"{row.median_ms:.3f}", f"{row.gbps:.1f}", figure_text(row.copy_share))
        peer = f"{row.peer} ({row.path})" if row.path else row.peer
        table.add_row(row.case, sizes, peer, figure_text(row.ratio), spread, goal, *figures, f"{row.traffic_mb:.1f}")
    return table


def merge(rows: Sequence[MergeRow]) -> Table:
    table = make_table(
        "fork, merge and planning, us",
        ("case", "what", "us", "p20-p80", "moved MB", "goal", "of goal", "ratio", "against"),
        caption="moved MB: keys and values, in all layers. of goal: met from 1 on. ratio: time over that of the row "
        "named beside it",
    )
    for row in rows:
        spread = f"{_us(row.p20_ms)}-{_us(row.p80_ms)}"
        goal = "-" if row.goal_ms is None else f"< {row.goal_ms * 1e3:.0f}"
        figures = (_us(row.median_ms), spread, figure_text(row.moved_mb, 1), goal, figure_text(row.of_goal))
        table.add_row(
            row.case, row.what, *figures, figure_text(row.ratio, 2 if (row.ratio or 0) < 100 else 0), row.against
        )
    return table


def append(rows: Sequence[AppendRow]) -> Table:
    """Each peer's time over ours: above 1, ours is faster."""
    table = make_table(
        "append: time of the peer / time of ours, medians over the rounds",
        ("case", "branches", "tokens", "peer", "ratio", "p20-p80", "us", "tokens/s", "GB/s"),
        caption="GB/s: keys and values read and written over the time",
    )
    for row in rows:
        spread = f"{figure_text(row.ratio_p20)}-{figure_text(row.ratio_p80)}"
        figures = (f"{row.median_ms * 1e3:.1f}", f"{row.tokens_per_s:.3g}", f"{row.gbps:.2f}")
        table.add_row(row.case, str(row.branches), str(row.tokens), row.peer, figure_text(row.ratio), spread, *figures)
    return table


def plot_decode(rows: Sequence[DecodeRow], folder: Path) -> None:
    """decode-CASE.png: a bar for each peer; decode-sweep.png: lines of the ratio, for each length of the prefix."""
    for case in dict.fromkeys(row.case for row in rows if row.case != "sweep"):
        _bars([row for row in rows if row.case == case], f"decode, {case}", folder / f"decode-{case}.png")
    sweep = [row for row in rows if row.case == "sweep" and row.ratio is not None and row.peer != "ours"]
    if not sweep:
        return
    pyplot = _pyplot()
    peers = list(dict.fromkeys(row.peer for row in sweep))
    figure, axes = pyplot.subplots(
        1, len(peers), figsize=(5 * len(peers), 4), sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, peer in zip(axes[0], peers, strict=True):
        for prefix in dict.fromkeys(row.prefix for row in sweep):
            line = [row for row in sweep if (row.peer, row.prefix) == (peer, prefix)]
            axis.plot([r.branches for r in line], [r.ratio for r in line], marker="o", label=f"{prefix} tokens")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set(title=f"against {peer}", xlabel="branches", ylabel="time of the peer / time of tree_decode")
    axes[0][0].legend(title="prefix")
    figure.savefig(folder / "decode-sweep.png", dpi=120)
    pyplot.close(figure)


def plot_merge(rows: Sequence[MergeRow], folder: Path) -> None:
    """merge.png: a bar for each row, on a logarithmic axis."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1.2), constrained_layout=True)
    axis.barh([f"{row.case}: {row.what}" for row in rows], [row.median_ms * 1e3 for row in rows])
    for place, row in enumerate(rows):
        if row.goal_ms is not None:
            axis.plot([row.goal_ms * 1e3] * 2, [place - 0.45, place + 0.45], color="black")
    axis.set(title="fork, merge and planning; lines: goals", xlabel="us (median)", xscale="log")
    axis.invert_yaxis()
    figure.savefig(folder / "merge.png", dpi=120)
    pyplot.close(figure)


def plot_append(rows: Sequence[AppendRow], folder: Path) -> None:
    """append-CASE.png: a bar for each peer."""
    for case in dict.fromkeys(row.case for row in rows):
        _bars([row for row in rows if row.case == case], f"append, {case}", folder / f"append-{case}.png")


def _us(ms: float) -> str:
    return f"{ms * 1e3:.1f}" if ms < 1 else f"{ms * 1e3:.0f}"


def _bars(rows: Sequence[DecodeRow | AppendRow], title: str, path: Path) -> None:
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 0.4 * len(rows) + 1.2), constrained_layout=True)
    errors = [[r.median_ms - r.p20_ms for r in rows], [r.p80_ms - r.median_ms for r in rows]]
    axis.barh([row.peer for row in rows], [row.median_ms for row in rows], xerr=errors)
    axis.set(title=title, xlabel="ms (median, p20 to p80)")
    axis.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot():  # type: ignore[no-untyped-def]
    """Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
