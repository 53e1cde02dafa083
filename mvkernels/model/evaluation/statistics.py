"""The figures that evaluations report, and fits of curves. Plain numbers in, plain numbers out.

pass@k is the unbiased estimate of arXiv 2107.03374: 1 - C(n - c, k) / C(n, k) of c right samples among n. Standard
errors are over questions: samples of one question are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def pass_at_k(right: int, samples: int, k: int) -> float:
    """The chance that one of k samples is right, from `right` of `samples`. Raises ValueError for a k that is none."""
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(
            f"pass@k: expected 1 <= k <= samples and 0 <= right <= samples, got {k=}, {samples=}, {right=}"
        )
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; nan of fewer than two."""
    if len(values) < 2:
        return math.nan
    import numpy as np  # here, for commands check their arguments before they need it

    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions. difference: of the means, first less second, with its standard error.

    better, worse: questions on which the first was better, and the second. p: of the exact sign test on them.
    """

    difference: float
    error: float
    better: int
    worse: int
    p: float


def paired_test(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compares two models question by question: McNemar's exact test where there is one sample a question.

    Raises ValueError for lists of other lengths, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"expected as many questions twice, at least one, got {len(first)} and {len(second)}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    total = better + worse
    tail = sum(math.comb(total, i) for i in range(min(better, worse) + 1))
    return Paired(
        difference=sum(differences) / len(differences),
        error=standard_error(differences),
        better=better,
        worse=worse,
        p=min(1.0, 2 * tail / 2**total),
    )


@dataclass(frozen=True)
class Fit:
    """y = a + b f(x). r2: share of the variance that it explains; 1 where there is none."""

    a: float
    b: float
    r2: float


def fit(x: Sequence[float], y: Sequence[float], of: Callable[[float], float] = float) -> Fit:
    """Least squares of y = a + b of(x); as it is, a line. Raises ValueError for fewer than two different x."""
    import numpy as np

    places = np.array([of(value) for value in x])
    values = np.array(y, dtype=np.float64)
    if len(places) != len(values) or len(np.unique(places)) < 2:
        raise ValueError(f"fit: expected at least two different x with a y each, got {len(places)} and {len(values)}")
    b, a = np.polyfit(places, values, 1)
    spread = float(((values - values.mean()) ** 2).sum())
    rest = float(((values - a - b * places) ** 2).sum())
    return Fit(float(a), float(b), 1 - rest / spread if spread else 1.0)


def inverse_fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """y = a + b / x: a step's fixed share and what parallel branches divide."""
    return fit(x, y, lambda value: 1 / value)


def exponential_fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """ln y = a + b x; the factor a step is e^b. Raises ValueError for y that are not positive."""
    if min(y, default=1) <= 0:
        raise ValueError(f"fit: expected positive values, got {min(y)}")
    return fit(x, [math.log(value) for value in y])
