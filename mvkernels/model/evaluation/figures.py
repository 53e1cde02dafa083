"""From samples to figures: a summary of each run, its Markdown table, and curves over budgets.

Reported together, always: accuracy with its standard error, tokens, critical path, # parallel and wall-clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from mvkernels.model.evaluation.samples import Sample
from mvkernels.model.evaluation.statistics import pass_at_k, standard_error

#: What a budget can be on.
MEASURES: dict[str, Callable[[Sample], float]] = {
    "critical path": lambda sample: sample.critical_path,
    "seconds": lambda sample: sample.seconds,
}


@dataclass(frozen=True)
class Summary:
    """The figures of one run. error: of pass@1. pass_at: k -> pass@k. Means are over questions.

    parallelism: the mean of tokens / critical path. exact: share of samples that are the trained trace, None where it
    is not known. stopped: share of samples that no budget ended.
    """

    name: str
    questions: int
    samples: int
    accuracy: float
    error: float
    pass_at: dict[int, float]
    tokens: float
    critical_path: float
    parallelism: float
    seconds: float
    stopped: float
    exact: float | None


def by_question(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of each question, in order."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.question, []).append(sample)
    return groups


def accuracies(samples: Sequence[Sample]) -> list[float]:
    """The share of right samples of each question, in order."""
    return [fmean(sample.correct for sample in group) for group in by_question(samples).values()]


def summarize(name: str, samples: Sequence[Sample]) -> Summary:
    """The figures of a run whose questions all have the same number of samples, n: pass@k for k = 1, 2, 4, .. n.

    Raises ValueError for a run without samples, or with other numbers of them.
    """
    groups = by_question(samples)
    counts = {len(group) for group in groups.values()}
    if len(counts) != 1:
        raise ValueError(f"{name}: expected the same number of samples of each question, got {sorted(counts)}")
    (n,) = counts
    right = [sum(sample.correct for sample in group) for group in groups.values()]
    ks = [k for k in (1 << i for i in range(n.bit_length())) if k < n] + [n]
    exact = [sample.exact for sample in samples if sample.exact is not None]
    return Summary(
        name=name,
        questions=len(groups),
        samples=n,
        accuracy=fmean(accuracies(samples)),
        error=standard_error(accuracies(samples)),
        pass_at={k: fmean(pass_at_k(c, n, k) for c in right) for k in ks},
        tokens=fmean(sample.tokens for sample in samples),
        critical_path=fmean(sample.critical_path for sample in samples),
        parallelism=fmean(sample.parallelism for sample in samples),
        seconds=fmean(sample.seconds for sample in samples),
        stopped=fmean(sample.finish_reason == "stop" for sample in samples),
        exact=fmean(exact) if exact else None,
    )


def markdown_table(summaries: Sequence[Summary]) -> str:
    """The runs as one Markdown table."""
    ks = sorted({k for one in summaries for k in one.pass_at} - {1})
    names = [
        "run",
        "questions",
        "pass@1",
        *(f"pass@{k}" for k in ks),
        "tokens",
        "critical path",
        "# parallel",
        "seconds",
    ]
    exact = any(one.exact is not None for one in summaries)
    names += ["whole trace right"] if exact else []
    rows = []
    for one in summaries:
        count = f"{one.questions}" if one.samples == 1 else f"{one.questions} x {one.samples}"
        cells = [one.name, count, f"{percent(one.accuracy)} ± {100 * one.error:.2f}"]
        cells += [percent(one.pass_at[k]) if k in one.pass_at else "" for k in ks]
        cells += [f"{one.tokens:.1f}", f"{one.critical_path:.1f}", f"{one.parallelism:.2f}", f"{one.seconds:.2f}"]
        cells += ["" if one.exact is None else percent(one.exact)] if exact else []
        rows.append(cells)
    return markdown(names, rows)


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rules = ["---", *("---:" for _ in names[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, rules, *rows)) + "\n"


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def budget_curve(samples: Sequence[Sample], measure: str, budgets: Sequence[float]) -> list[float]:
    """pass@1 for each budget on a measure: a sample counts when it is right and has ended within the budget.

    Of greedy answers this is what runs with each budget give, without running them: a budget changes nothing before it
    ends an answer, and an answer that was cut is not right. Raises ValueError for a measure that does not exist.
    """
    if measure not in MEASURES:
        raise ValueError(f"budget: expected one of {tuple(MEASURES)}, got {measure!r}")
    taken = MEASURES[measure]
    return [fmean(sample.correct and taken(sample) <= budget for sample in samples) for budget in budgets]
