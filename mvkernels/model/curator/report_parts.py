"""The parts of a curation report that are drawn: a histogram as SVG, a trace as nested boxes. Everything is escaped."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from mvkernels.errors import GrammarError
from mvkernels.grammar import INDEX_PATTERN, TAG_PATTERN, TAGS, parse_text

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 340, 150, 36, 18, 8
_BINS, _WIDEST = 24, 48
#: Element of the text format -> what stands above its box; a tag that is not here has no words.
_LABELS = {"Goal": "goal", "Conclusion": "conclusion", "Think": "thinking"}


def number(value: float, digits: int = 2) -> str:
    """`1,234`, `0.12`, `3`: whole numbers without a fraction."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.{digits}f}"


def bins_of(values: Sequence[float]) -> list[tuple[float, float, int]]:
    """(from, to, count) of each bar: one a whole number where these are few, else as many bars of equal width.

    values: at least one, all finite. The last bin has its upper edge in it.
    """
    low, high = min(values), max(values)
    if high - low < _BINS and all(float(value).is_integer() for value in values):
        edges = [low + i for i in range(round(high - low) + 1)]
        counts = [0] * len(edges)
        for value in values:
            counts[round(value - low)] += 1
        return [(edge, edge, count) for edge, count in zip(edges, counts, strict=True)]
    width = high / _BINS - low / _BINS
    if width == 0:
        return [(low, high, len(values))]
    counts = [0] * _BINS
    for value in values:
        counts[min(max(int(value / width - low / width), 0), _BINS - 1)] += 1
    return [(low + i * width, low + (i + 1) * width, count) for i, count in enumerate(counts)]


def histogram(title: str, values: Sequence[float], unit: str = "traces") -> str:
    """A figure with its caption. values: of each `unit`; those that are not finite are left out."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return f'<figure class="card"><figcaption>{escape(title)}<small>unknown</small></figcaption></figure>'
    bins = bins_of(values)
    most = max(count for *_, count in bins)
    mean, median = statistics.fmean(values), statistics.median(values)
    facts = f"mean {number(mean)} · median {number(median)} · {number(len(values))} {unit}"
    step = (_WIDTH - _LEFT) / len(bins)
    tall = _HEIGHT - _BOTTOM - _TOP
    parts = []
    for i, (first, last, count) in enumerate(bins):
        height = tall * count / most
        name = number(first) if first == last else f"{number(first)} to {number(last)}"
        wide = min(0.8 * step, _WIDEST)
        x, y = _LEFT + (i + 0.5) * step - wide / 2, _TOP + tall - height
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{height:.1f}">'
            f"<title>{escape(name)}: {number(count)}</title></rect>"
        )
    base = _TOP + tall
    parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{base}" y2="{base}"/>')
    ends: list[tuple[float, float, str]] = [(bins[0][0], _LEFT, "start"), (bins[-1][1], _WIDTH, "end")]
    if len(bins) == 1:
        ends = [(bins[0][0], _LEFT + step / 2, "middle")]
    elif bins[0][0] == bins[0][1]:  # a bar a number: its name stands below it
        ends = [(bins[i][0], _LEFT + (i + 0.5) * step, "middle") for i in range(0, len(bins), -(-len(bins) // 12))]
    for value, x, anchor in ends:
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{number(value)}</text>')
    parts.append(f'<text x="{_LEFT - 4}" y="{_TOP + 9}" text-anchor="end">{number(most)}</text>')
    label = escape(f"{title}: {facts}")
    return (
        f'<figure class="card"><figcaption>{escape(title)}<small>{facts}</small></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def trace_boxes(text: str) -> str:
    """A trace as boxes in boxes: thinking, goals, paths with their index, conclusions. A malformed one: plain text."""
    try:
        parse_text(text)
    except GrammarError as error:
        return f'<p class="wrong">{escape(str(error))}</p><pre>{escape(text)}</pre>'
    parts: list[str] = []
    previous = ""
    for piece in TAG_PATTERN.split(text):
        if piece not in TAGS:
            said = piece.strip()
            index = INDEX_PATTERN.match(said) if previous == "<Path>" else None
            if index is not None:
                parts.append(f'<div class="label">path {escape(index[1])}</div>')
                said = said[index.end() :].strip()
            if said:
                parts.append(f'<div class="t">{escape(said)}</div>')
            continue
        name = piece.strip("</>")
        if piece.startswith("</"):
            parts.append("</div>")
        else:
            box = "block" if name == "Parallel" else name.lower()
            label = f'<div class="label">{_LABELS[name]}</div>' if name in _LABELS else ""
            parts.append(f'<div class="{box}">{label}')
        previous = piece
    return "".join(parts)
