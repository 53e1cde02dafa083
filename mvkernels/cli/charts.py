"""The charts of ``evaluate`` and ``reproduce``: curves over budgets, latency over # parallel, speed-ups, growth.

Of ``stats``: distributions. Of ``train``: losses. Without matplotlib nothing is drawn and nothing fails: a chart is
beside a result, which no missing package may cost. `left_out` says so in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mvkernels._lazy import import_for, missing_message
from mvkernels.model.evaluation.figures import MEASURES, budget_curve
from mvkernels.model.evaluation.samples import Sample
from mvkernels.model.evaluation.statistics import Fit, inverse_fit
from mvkernels.model.files import whole_file

_POINTS = 200


def left_out() -> str:
    """Why no chart is drawn, and how to get what it needs, in one line; "" where charts are drawn. Imports nothing."""
    return "" if find_spec("matplotlib") else f"no charts: {missing_message('a chart', 'matplotlib')}"


def budgets(runs: Mapping[str, Sequence[Sample]], out: Path, title: str) -> None:
    """Accuracy over budgets, a line a run: on the critical path at the left, on seconds at the right."""
    if left_out():
        return
    import numpy as np  # here, for commands check their arguments before they need it

    figure, panels = _figure(title, len(MEASURES))
    for axes, (measure, taken) in zip(panels, MEASURES.items(), strict=True):
        top = max(taken(sample) for samples in runs.values() for sample in samples)
        limits = np.linspace(0, top * 1.02, _POINTS)
        for name, samples in runs.items():
            axes.plot(
                limits,
                [100 * y for y in budget_curve(samples, measure, limits.tolist())],
                label=name,
                drawstyle="steps-post",
            )
        unit = "tokens" if measure == "critical path" else "wall-clock"
        axes.set(xlabel=f"budget: {measure} ({unit})", ylabel="right (%)", ylim=(0, 102), xlim=(0, None))
    panels[0].legend(frameon=False)
    _save(figure, out)


def latency(runs: Mapping[str, Sequence[Sample]], out: Path, title: str) -> Fit | None:
    """Milliseconds a token over # parallel, a dot an answer, and the fitted a + b / x, which is returned.

    None, and no curve, where all answers are as parallel. The answers are to have run alone.
    """
    every = [sample for samples in runs.values() for sample in samples]
    spread = [sample.parallelism for sample in every]
    fitted = inverse_fit(spread, [1e3 * one.seconds / one.tokens for one in every]) if len(set(spread)) > 1 else None
    if left_out():
        return fitted
    import numpy as np

    figure, (axes,) = _figure(title, 1)
    for name, samples in runs.items():
        y = [1e3 * sample.seconds / sample.tokens for sample in samples]
        axes.plot([sample.parallelism for sample in samples], y, ".", alpha=0.5, label=name)
    if fitted is not None:
        x = np.linspace(min(spread), max(spread), _POINTS)
        label = f"{fitted.a:.3f} + {fitted.b:.3f} / x, R² = {fitted.r2:.2f}"
        axes.plot(x, fitted.a + fitted.b / x, color="0.2", label=label)
    axes.set(xlabel="# parallel (tokens / critical path)", ylabel="ms / token", ylim=(0, None))
    axes.legend(frameon=False)
    _save(figure, out)
    return fitted


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    out: Path,
    title: str,
    labels: tuple[str, str],
    logarithmic: str = "",
) -> None:
    """One line a series over the same x. labels: of both axes. logarithmic: "x", "y", or both."""
    if left_out():
        return
    figure, (axes,) = _figure(title, 1)
    for name, values in series.items():
        axes.plot(x, values, marker="o", label=name)
    if "x" in logarithmic:
        axes.set_xscale("log", base=2)
    if "y" in logarithmic:
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(0, None)
    axes.set_xticks(x, [str(value) for value in x])
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(frameon=False)
    _save(figure, out)


def losses(curves: Mapping[str, Sequence[tuple[int, float]]], out: Path, title: str) -> None:
    """A line for each curve of (step, loss)."""
    if left_out():
        return
    figure, (axes,) = _figure(title, 1)
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.legend(frameon=False)
    _save(figure, out)


def distributions(sets: Mapping[str, Mapping[str, Sequence[float]]], out: Path, title: str) -> None:
    """A histogram a measure, four in a row. sets: name -> measure -> values; a share of each set, so that sets compare.

    A measure whose values are few whole numbers has a bar each. Raises ValueError without a set.
    """
    if not sets:
        raise ValueError("distributions: expected at least one set, got none")
    if left_out():
        return
    import numpy as np

    names = [*next(iter(sets.values()))]
    figure, panels = _figure(title, min(4, len(names)), rows=-(-len(names) // 4))
    for axes, name in zip(panels, names, strict=False):
        drawn = {label: values[name] for label, values in sets.items() if values[name]}
        every = np.concatenate([*map(np.asarray, drawn.values())]) if drawn else np.zeros(1)
        low, high = every.min(), every.max()
        whole = bool((every == every.round()).all()) and high - low < 20
        if whole:
            axes.set_xticks(np.arange(low, high + 1, max(1, (high - low) // 8)))
            bins = np.arange(low - 0.5, high + 1)
        else:
            bins = np.linspace(low, high, 25) if high > low else np.array([low - 0.5, low + 0.5])
        if drawn:
            weights = [np.full(len(values), 100 / len(values)) for values in drawn.values()]
            axes.hist([*drawn.values()], bins=bins, weights=weights, label=[*drawn], rwidth=0.8 if whole else None)
        axes.set(xlabel=name, ylabel="share (%)")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    if len(sets) > 1:
        panels[0].legend(frameon=False)
    _save(figure, out)


def _figure(title: str, panels: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure, and its panels row by row. panels: in a row."""
    figure_module: Any = import_for("charts", "matplotlib.figure")
    figure = figure_module.Figure(figsize=(5.5 * panels, 4 * rows), layout="constrained")
    figure.suptitle(title)
    panels_ = figure.subplots(rows, panels, squeeze=False).ravel()
    for axes in panels_:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels_


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as scratch:
        figure.savefig(scratch, format=out.suffix[1:], dpi=120)
