"""A run of the curator as one static page: counts and costs, figures, traces beside their originals, what was rejected.

Read are `traces.jsonl`, `rejected.jsonl` and `manifest.json`, line by line and twice: once for the figures, once for
what is shown. The page needs no script and loads nothing; every text in it is escaped. A field that is missing, or is
not what it should be, is unknown; a line that is no JSON object (the last one of an interrupted run) is counted.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mvkernels.model.curator.report_parts import histogram, number, trace_boxes
from mvkernels.model.curator.statistics import TraceFigures, trace_figures
from mvkernels.model.files import whole_file
from mvkernels.model.json_input import parse_json

TEMPLATE = Path(__file__).with_name("report.html")
#: At most so many traces, and so many rejected chains, are shown in full: from all over the file, evenly.
SHOWN = 200
_REASONS = 50
_SUMMARY = 160

Record = Mapping[str, Any]


@dataclass
class _Totals:
    """What the first pass over both files finds."""

    traces: int = 0
    rejected: int = 0
    unreadable: int = 0
    malformed: int = 0
    warned: int = 0
    parallelism: list[float] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    tries: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)


def write_report(out: Path) -> Path:
    """Writes `report.html` into the folder of a run, and returns its path. A page that was there is replaced at once.

    out: with traces.jsonl, rejected.jsonl, or both, and manifest.json where there is one. Raises ValueError where
    there is neither. Memory does not grow with the texts, time is linear in them.
    """
    traces, rejected = out / "traces.jsonl", out / "rejected.jsonl"
    if not traces.is_file() and not rejected.is_file():
        raise ValueError(f"expected traces.jsonl or rejected.jsonl of a curation, found neither in {out}")
    manifest, note = _manifest(out / "manifest.json")
    totals = _count(traces, rejected)
    head, _, tail = TEMPLATE.read_text(encoding="utf-8").partition("<!--BODY-->\n")
    report = out / "report.html"
    # JSON can hold half a surrogate pair, which UTF-8 cannot.
    with whole_file(report) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as page:
        page.write(head)
        page.writelines(_overview(manifest, totals, note))
        page.writelines(_charts(totals))
        page.writelines(_shown_traces(traces, totals.traces))
        page.writelines(_shown_rejects(rejected, totals))
        page.write(tail)
    return report


def _records(file: Path) -> Iterator[Record | None]:
    """The objects of a JSONL file; None for a line that is none."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = parse_json(line, strict=False)
            except ValueError:
                record = None
            yield record if isinstance(record, dict) else None


def _manifest(file: Path) -> tuple[Record, str]:
    """The manifest, and what is wrong with it."""
    if not file.is_file():
        return {}, "There is no manifest.json: model, tokens and costs are unknown."
    record = next(_records_of_text(file.read_bytes()), None)
    return (record, "") if record is not None else ({}, "manifest.json is no JSON object: its contents are unknown.")


def _records_of_text(data: bytes) -> Iterator[Record]:
    try:
        record = parse_json(data, strict=False)
    except ValueError:
        return
    if isinstance(record, dict):
        yield record


def _count(traces: Path, rejected: Path) -> _Totals:
    totals = _Totals()
    for record in _records(traces):
        if record is None:
            totals.unreadable += 1
            continue
        totals.traces += 1
        totals.warned += bool(record.get("warnings"))
        distance = _float(record.get("distance"))
        if distance is not None:
            totals.distances.append(distance)
        for stage, tries in _mapping(record.get("tries")).items():
            count = _float(tries)
            if count is not None:
                totals.tries[str(stage)].append(count)
        figures = _figures(record)
        if figures is None:
            totals.malformed += 1
            continue
        totals.parallelism.append(figures.parallelism)
        totals.depths.append(figures.depth)
        totals.widths += figures.widths
    for record in _records(rejected):
        if record is None:
            totals.unreadable += 1
            continue
        totals.rejected += 1
        reason = _text(record.get("reason")) or "unknown"
        totals.reasons[_text(record.get("stage")) or "unknown", _short(reason)] += 1
    return totals


def _figures(record: Record) -> TraceFigures | None:
    try:
        return trace_figures(_text(record.get("trace")))
    except ValueError:
        return None


def _overview(manifest: Record, totals: _Totals, note: str) -> Iterator[str]:
    said = [_text(manifest.get("model")) or "model unknown", _without_password(_text(manifest.get("base_url")))]
    versions = manifest.get("prompts")
    named = ", ".join(f"{name} {_text(version)}" for name, version in _mapping(versions).items())
    prompts = named if isinstance(versions, dict) else _text(versions)
    said.append(f"prompts: {prompts}" if prompts else "")
    spans = "".join(f"<span>{escape(one)}</span>" for one in said if one)
    yield f"<header><h1>Curation report</h1>{spans}</header>\n"
    counts, tokens = _mapping(manifest.get("counts")), _mapping(manifest.get("tokens"))
    traces = _float(counts.get("traces"), totals.traces)
    rejected = _float(counts.get("rejected"), totals.rejected)
    figures = {
        "chains in": _float(counts.get("in", counts.get("chains"))),
        "traces": traces,
        "rejected": rejected,
        "with warnings": totals.warned,
        "prompt tokens": _float(tokens.get("prompt")),
        "completion tokens": _float(tokens.get("completion")),
        "cost": _float(manifest.get("cost")),
        "seconds": _seconds(manifest),
    }
    shown = {name: "unknown" if value is None else number(value) for name, value in figures.items()}
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in shown.items())
    yield f'<dl class="figures">{rows}</dl>\n'
    notes = [note] if note else []
    if totals.unreadable:
        notes.append(f"{number(totals.unreadable)} lines are no JSON objects, and left out.")
    if totals.malformed:
        notes.append(f"{number(totals.malformed)} traces are malformed, and not in the figures of their structure.")
    if (traces, rejected) != (totals.traces, totals.rejected):
        files = f"{number(totals.traces)} traces and {number(totals.rejected)} rejected chains"
        notes.append(f"The files hold {files}, not as many as manifest.json says.")
    if notes:
        yield '<ul class="notes">' + "".join(f"<li>{escape(one)}</li>" for one in notes) + "</ul>\n"


def _charts(totals: _Totals) -> Iterator[str]:
    yield "<h2>Figures<small># parallel: words over the critical path</small></h2>\n<div class=charts>\n"
    yield histogram("# parallel", totals.parallelism) + "\n"
    yield histogram("Depth", totals.depths) + "\n"
    yield histogram("Width", totals.widths, "blocks") + "\n"
    yield histogram("Distance to the original", totals.distances) + "\n"
    for stage, tries in totals.tries.items():
        yield histogram(f"Tries: {_short(stage)}", tries) + "\n"
    yield "</div>\n"


def _sampled(file: Path, total: int) -> Iterator[Record]:
    """At most SHOWN of the records, evenly from all over the file."""
    count = min(total, SHOWN)
    chosen = {i * total // count for i in range(count)}
    readable = (record for record in _records(file) if record is not None)
    yield from (record for i, record in enumerate(readable) if i in chosen)


def _shown_traces(file: Path, total: int) -> Iterator[str]:
    yield f"<h2>Traces<small>{_share(total)}; the original at the left</small></h2>\n"
    for record in _sampled(file, total):
        figures = _figures(record)
        distance = _float(record.get("distance"))
        facts = [] if figures is None else [f"# parallel {number(figures.parallelism)}", f"depth {figures.depth}"]
        facts += [] if distance is None else [f"distance {distance:.3f}"]
        warnings = [_text(one) for one in _list(record.get("warnings"))]
        facts += [f"{len(warnings)} warning" + "s" * (len(warnings) > 1)] if warnings else []
        yield from _opening(record, facts)
        if record.get("answer") is not None:
            yield f'<div class="question"><h3>Answer</h3>{escape(_text(record["answer"]))}</div>'
        if warnings:
            yield '<ul class="notes">' + "".join(f"<li>{escape(one)}</li>" for one in warnings) + "</ul>"
        original = (
            f'<div class="side" tabindex="0"><h3>Original</h3><pre>{escape(_text(record.get("original")))}</pre></div>'
        )
        trace = f'<div class="side" tabindex="0"><h3>Trace</h3>{trace_boxes(_text(record.get("trace")))}</div>'
        yield f'<div class="sides">{original}{trace}</div></div></details>\n'


def _shown_rejects(file: Path, totals: _Totals) -> Iterator[str]:
    yield f"<h2>Rejected<small>{_share(totals.rejected)}, with every attempt</small></h2>\n"
    if totals.reasons:
        yield '<div class="card reasons"><table><tr><th>stage</th><th>reason</th><th class="number">chains</th></tr>'
        most = totals.reasons.most_common(_REASONS)
        rows = [(stage, reason, count) for (stage, reason), count in most]
        if len(totals.reasons) > len(most):
            rest = totals.rejected - sum(count for *_, count in rows)
            rows.append(("", f"{number(len(totals.reasons) - len(most))} other reasons", rest))
        for stage, reason, count in rows:
            yield f'<tr><td>{escape(stage)}</td><td>{escape(reason)}</td><td class="number">{number(count)}</td></tr>'
        yield "</table></div>\n"
    for record in _sampled(file, totals.rejected):
        attempts = _list(record.get("attempts"))
        stage = _text(record.get("stage")) or "unknown"
        yield from _opening(record, [stage, f"{len(attempts)} attempt" + "s" * (len(attempts) != 1)])
        yield f'<p class="wrong">{escape(_text(record.get("reason")) or "reason unknown")}</p>'
        for i, attempt in enumerate(map(_mapping, attempts), start=1):
            wrong = attempt.get("wrong")
            reasons = "\n".join(map(_text, wrong)) if isinstance(wrong, list) else _text(wrong)
            yield f'<div class="attempt"><h3>Attempt {i}: {escape(_text(attempt.get("stage")) or "stage unknown")}</h3>'
            yield f'<p class="wrong">{escape(reasons)}</p>' if reasons else ""
            yield f"<pre>{escape(_text(attempt.get('answer')))}</pre></div>"
        yield f'<div class="attempt"><h3>Original</h3><pre>{escape(_text(record.get("original")))}</pre></div>'
        yield "</div></details>\n"


def _opening(record: Record, facts: Iterable[str]) -> Iterator[str]:
    """Of a chain: its summary line, and its question."""
    question = _text(record.get("question"))
    name = f"<b>{escape(_text(record.get('id')) or 'unknown')}</b>"
    said = f'<span class="said">{escape(_short(question))}</span>'
    yield f'<details class="card"><summary>{name}{said}<span class="facts">{escape(" · ".join(facts))}</span></summary>'
    yield f'<div class="inside"><div class="question"><h3>Question</h3>{escape(question)}</div>'


def _share(total: int) -> str:
    return f"{number(total)} in all" if total <= SHOWN else f"{SHOWN} of {number(total)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SUMMARY else text[: _SUMMARY - 1] + "…"


def _text(value: object) -> str:
    """A text as it is; what is no text as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _float(value: object, default: float | None = None) -> float | None:
    """The number, where it is one that sums and bars can be made of."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100:
        return float(value)
    return default


def _seconds(manifest: Record) -> float | None:
    """Of the whole curation, or of its runs together, where each has its own."""
    each = [_float(_mapping(run).get("seconds")) for run in _list(manifest.get("runs"))]
    known = [seconds for seconds in each if seconds is not None]
    return _float(manifest.get("seconds"), sum(known) if known else None)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _without_password(url: str) -> str:
    """The URL without what stands before an `@` in its host part: a page is passed on."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
