"""What ``mvkernels reproduce`` writes from its cells: tables in Markdown, the same figures as JSON, and the charts.

What has not been run yet is left out, and named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mvkernels.cli import charts
from mvkernels.cli.reproduce_cells import ASKED, KINDS, Cells, model_name
from mvkernels.model.evaluation.figures import accuracies, markdown, markdown_table, percent, summarize
from mvkernels.model.evaluation.samples import Sample, read_samples
from mvkernels.model.evaluation.statistics import exponential_fit, fit, paired_test
from mvkernels.model.files import write_whole
from mvkernels.model.json_input import parse_json
from mvkernels.model.tasks import sat
from mvkernels.model.training.recipe import Recipe

FIRST, LAST = KINDS
QUICK_NOTE = "With `--quick`: the models have hardly learned, and the figures show that everything runs, nothing else."


class Report:
    """The report on a task's cells that are done, in a folder of its name in `out`."""

    def __init__(self, cells: Cells, task: str, out: Path) -> None:
        self.cells, self.task, self.out = cells, task, out / task
        self.missing: list[str] = []
        self.figures: dict[str, Any] = {}

    def write(self, where: str) -> None:
        """Writes README.md, results.json and the charts. where: on what it was run."""
        self.out.mkdir(parents=True, exist_ok=True)
        parts = [
            f"# Multiverse in miniature: {self.task}",
            f"Written by `mvkernels reproduce`, from nothing: {where}.",
            *([QUICK_NOTE] if self.cells.scale.shrink else []),
            *self._training(),
            *self._accuracy(self.task),
            *self._alone(self.task),
            *(self._growth() if self.task == "sat" else self._batches()),
        ]
        if self.missing:
            parts += ["## Not run yet", ", ".join(f"`{name}`" for name in self.missing)]
        write_whole(self.out / "README.md", "\n\n".join(part.strip("\n") for part in parts) + "\n")
        write_whole(self.out / "results.json", json.dumps(self.figures, indent=1) + "\n")

    # ---- models

    def _training(self) -> list[str]:
        rows = []
        for task, kind, seed in self.cells.models():
            if task != self.task:
                continue
            name = model_name(task, kind, seed)
            file = self.cells.work / "models" / name / Recipe.outcome
            if not file.exists():
                self.missing.append(name)
                continue
            found = parse_json(file.read_bytes())
            recipe = self.cells.recipe(task, kind, seed)
            pace = seconds_per_step(found["clock"], recipe)
            rows.append(
                [
                    name,
                    f"{found['parameters'] / 1e6:.2f} M",
                    f"{recipe.steps}",
                    f"{recipe.steps * recipe.tokens_per_step / 1e6:.1f} M",
                    f"{found['losses'][-1][1]:.4f}",
                    f"{found['seconds'] / 60:.1f}",
                    f"{pace * recipe.steps / 60:.1f}",
                    f"{found['threads']}",
                ]
            )
            self.figures[f"training {name}"] = {"minutes": found["seconds"] / 60, "loss": found["losses"][-1][1]}
        names = [
            "model",
            "parameters",
            "steps",
            "tokens",
            "last loss",
            "minutes",
            "minutes at the median pace",
            "threads",
        ]
        note = "Minutes are of the wall clock, whatever else the machine did; the median pace is that of most steps."
        return ["## Models", markdown(names, rows), note] if rows else []

    # ---- accuracy

    def _accuracy(self, task: str) -> list[str]:
        summaries, tests = [], []
        pooled: dict[str, list[float]] = {}
        for seed in range(self.cells.scale.seeds[task]):
            right: dict[str, list[float]] = {}
            for kind, modes in ASKED.items():
                for mode in modes:
                    name = f"{model_name(task, kind, seed)}-{mode}"
                    samples = self._complete(name, self.cells.scale.problems)
                    if samples is not None:
                        summaries.append(summarize(f"{kind}, seed {seed}, {mode}", samples))
                        right[mode] = accuracies(samples)
            if "sequential" in right:
                for mode in ASKED[FIRST]:
                    if mode in right:
                        pooled.setdefault(mode, []).extend(right[mode])
                        pooled.setdefault(f"{mode} base", []).extend(right["sequential"])
                        tests.append(_test_row(f"{mode}, seed {seed}", right[mode], right["sequential"]))
        if not summaries:
            return []
        for mode in ASKED[FIRST]:
            if self.cells.scale.seeds[task] > 1 and mode in pooled:
                tests.append(_test_row(f"{mode}, all seeds", pooled[mode], pooled[f"{mode} base"]))
        self.figures["accuracy"] = [asdict(one) for one in summaries]
        parts = [
            "## Accuracy",
            f"The same {self.cells.scale.problems} unseen problems for every model, greedy, "
            f"{self.cells.scale.batch} at once.",
            markdown_table(summaries),
        ]
        if tests:
            names = ["Multiverse less autoregressive", "points", "better", "worse", "p (sign test)"]
            parts.append(markdown(names, tests))
        return parts

    # ---- wall-clock

    def _alone(self, task: str) -> list[str]:
        found = {kind: self._complete(f"alone-{model_name(task, kind, 0)}", self.cells.scale.alone) for kind in KINDS}
        runs = {kind: samples for kind, samples in found.items() if samples is not None}
        if len(runs) != len(KINDS):
            return []
        seconds = {kind: fmean(sample.seconds for sample in samples) for kind, samples in runs.items()}
        gains = [b.seconds / a.seconds for a, b in zip(runs[FIRST], runs[LAST], strict=True)]
        charts.budgets(runs, self.out / "budgets.png", f"{task}: accuracy within a budget")
        fitted = charts.latency(runs, self.out / "latency.png", f"{task}: latency over # parallel")
        speedup = seconds[LAST] / seconds[FIRST]
        self.figures["wall-clock"] = {
            "seconds": seconds,
            "speedup": speedup,
            "median_speedup": median(gains),
            "latency_fit": None if fitted is None else asdict(fitted),
        }
        text = (
            f"{len(gains)} problems, one at a time, both models in turn: {seconds[FIRST]:.3f} s a problem "
            f"in parallel, {seconds[LAST]:.3f} s autoregressive, {speedup:.2f}x as fast (median of the problems "
            f"{median(gains):.2f}x)."
        )
        if fitted is not None:
            text += f" Latency of a token: {fitted.a:.3f} + {fitted.b:.3f} / # parallel ms (R² = {fitted.r2:.2f})."
        table = markdown_table([summarize(*pair) for pair in runs.items()])
        return ["## Wall-clock", table, text, *self._pictures("budgets", "latency")]

    def _batches(self) -> list[str]:
        path = self.cells.work / "batches.json"
        if not path.exists():
            self.missing.append("batch sizes")
            return []
        found = {int(size): row for size, row in parse_json(path.read_bytes()).items()}
        rows = [
            [str(size), f"{row[FIRST]:.2f}", f"{row[LAST]:.2f}", f"{row[LAST] / row[FIRST]:.2f}"]
            for size, row in found.items()
        ]
        self.figures["batch sizes"] = found
        if len(found) > 1:
            speedups = {"speed-up": [row[LAST] / row[FIRST] for row in found.values()]}
            labels = ("problems at once", "seconds autoregressive / seconds in parallel")
            charts.lines(list(found), speedups, self.out / "batches.png", "speed-up over batch size", labels, "x")
        names = ["problems at once", "seconds in parallel", "seconds autoregressive", "speed-up"]
        return ["## Speed-up over batch size", markdown(names, rows), *self._pictures("batches")]

    # ---- growth

    def _growth(self) -> list[str]:
        low, high = sat.SIZES
        sizes = list(range(low, high + 1))
        table: dict[str, dict[int, list[Sample]]] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            for size in sizes:
                samples = self._complete(f"growth-{size}-{model_name('sat', kind, 0)}", self.cells.scale.growth)
                if samples is not None:
                    table[kind][size] = samples
        parts = ["## Growth: unsatisfiable instances"]
        series: dict[str, list[float]] = {}
        for kind, by_size in table.items():
            if len(by_size) < len(sizes):
                continue
            summaries = [summarize(f"{kind}, {size} variables", by_size[size]) for size in sizes]
            path, tokens = [one.critical_path for one in summaries], [one.tokens for one in summaries]
            line, curve = fit(sizes, path), exponential_fit(sizes, tokens)
            series |= {f"{kind}: tokens": tokens, f"{kind}: critical path": path} if kind == FIRST else {kind: tokens}
            self.figures[f"growth {kind}"] = {
                "summaries": [asdict(one) for one in summaries],
                "critical_path_line": asdict(line),
                "tokens_exponential": asdict(curve),
            }
            answers = [sample for samples in by_size.values() for sample in samples]
            parts += [
                markdown_table(summaries),
                f"{kind}: critical path {line.a:.1f} + {line.b:.1f} n (R² = {line.r2:.4f}); tokens times "
                f"{exp(curve.b):.2f} with each variable (R² of the logarithm {curve.r2:.4f}); "
                f"{percent(fmean(sample.correct for sample in answers))} right.",
            ]
        if not series:
            return []
        labels = ("variables", "tokens")
        charts.lines(sizes, series, self.out / "growth.png", "refutations of random 3-SAT", labels, "y")
        return [*parts, *self._pictures("growth")]

    def _pictures(self, *names: str) -> list[str]:
        """Links to the charts, where they are drawn."""
        return [] if charts.left_out() else ["\n".join(f"![{name}]({name}.png)" for name in names)]

    def _complete(self, name: str, count: int) -> list[Sample] | None:
        """The samples of a cell, or None where it is not done."""
        path = self.cells.samples(name)
        samples = read_samples(path) if path.exists() else []
        if len(samples) == count:
            return sorted(samples, key=lambda sample: int(sample.question.rpartition("-")[2]))
        self.missing.append(name)
        return None


def seconds_per_step(clock: Sequence[float], recipe: Recipe) -> float:
    """The median over the logged intervals."""
    paces = [(b - a) / recipe.log_every for a, b in pairwise(clock)]
    return median(paces) if paces else clock[-1] / recipe.steps


def _test_row(name: str, first: Sequence[float], second: Sequence[float]) -> list[str]:
    found = paired_test(first, second)
    points = f"{100 * found.difference:+.2f} ± {100 * found.error:.2f}"
    return [name, points, str(found.better), str(found.worse), f"{found.p:.3g}"]
