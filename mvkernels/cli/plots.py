"""The plot of ``mvkernels inspect``: mask and positions. A long trace is averaged into cells, never built T x T.

A cell (r, c) of the picture is the share of visible pairs among rows edges[r] .. edges[r + 1] - 1 and keys
edges[c] .. edges[c + 1] - 1. Up to ``MAX_CELLS`` tokens every cell is one pair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mvkernels._lazy import import_for
from mvkernels.cli.files import require_file
from mvkernels.mask import IntervalMask
from mvkernels.model.files import whole_file

MAX_CELLS = 800
#: What matplotlib can write on every machine.
PICTURES = (".png", ".pdf", ".svg", ".svgz", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")
FloatArray = npt.NDArray[np.float64]


def mask_density(mask: IntervalMask, cells: int = MAX_CELLS) -> FloatArray:
    """Share of visible pairs in each cell, [n, n] with n = min(cells, T), exact. O(segments x n + n x n)."""
    total = mask.total_tokens
    n = min(cells, total)
    edges = np.arange(n + 1, dtype=np.int64) * total // max(n, 1)
    widths = np.diff(edges)
    grid = np.zeros((n, n))
    for s in range(mask.num_segments):
        start, end = int(mask.segment_starts[s]), int(mask.segment_starts[s + 1])
        if start == end:
            continue
        first, last = int(np.searchsorted(edges, start, "right")) - 1, int(np.searchsorted(edges, end, "left"))
        rows = np.diff(edges[first : last + 1].clip(start, end)).astype(np.float64)  # [cells of the segment]
        before = last if first == 0 else first + 1
        grid[first:last, :before] += np.outer(rows, keys_before(mask, s, edges[: before + 1]))
        triangle = np.tril(np.outer(rows, rows), -1)
        np.fill_diagonal(triangle, rows * (rows + 1) / 2)
        grid[first:last, first:last] += triangle
    density: FloatArray = grid / np.outer(widths, widths)
    return density


def keys_before(mask: IntervalMask, segment: int, edges: npt.NDArray[np.int64]) -> FloatArray:
    """How many keys between two edges, before the segment's first row, its rows see: [len(edges) - 1].

    The count of visible keys below x is piecewise linear in x, with its corners at the gaps.
    """
    gaps = mask.gaps[mask.gap_ptr[segment] : mask.gap_ptr[segment + 1]].astype(np.int64)
    start, first = int(mask.segment_starts[segment]), int(mask.first_key[segment])
    corners = np.concatenate([[first], gaps.reshape(-1), [start]])
    steps = np.diff(corners)
    steps[1::2] = 0  # within a gap nothing is added
    counts = np.concatenate([[0], np.cumsum(steps)])
    below: FloatArray = np.interp(edges, corners, counts)
    return np.diff(below)


def check_plot(out: Path) -> None:
    """Raises ValueError where no plot can be written to ``out``, ImportError without matplotlib; before any work."""
    require_file(out, "--plot")
    if out.suffix.lower() not in PICTURES:
        raise ValueError(f"--plot: expected a name that ends with one of {', '.join(PICTURES)}, got {out}")
    import_for("--plot", "matplotlib")


def plot_layout(mask: IntervalMask, positions: npt.NDArray[Any], unit: str, title: str, out: Path) -> None:
    """Writes mask and positions to ``out``, which `check_plot` has checked (the suffix chooses the format).

    Raises ValueError for an empty trace.
    """
    figure_module: Any = import_for("--plot", "matplotlib.figure")
    total = mask.total_tokens
    if not total:
        raise ValueError("expected a trace to plot, got an empty one")
    figure = figure_module.Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)

    density = mask_density(mask)
    left.imshow(density, cmap="Blues", vmin=0, vmax=1, extent=(0, total, total, 0), interpolation="nearest")
    left.set(title="mask (dark: visible)", xlabel=f"key ({unit})", ylabel=f"query ({unit})")

    index = np.unique(np.linspace(0, max(total - 1, 0), num=min(total, 4000)).astype(np.int64))
    right.plot(index, index, color="0.75", linewidth=1, label="causal")
    right.plot(index, positions[index], color="tab:blue", linewidth=0, marker=".", markersize=2, label="this trace")
    right.set(title="positions", xlabel=f"index ({unit})", ylabel="position")
    right.legend(frameon=False, markerscale=4)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(out) as scratch:
        figure.savefig(scratch, format=out.suffix[1:].lower(), dpi=150)
