"""A generation as one self-contained HTML page: a timeline of its paths, block by block, and its text.

The page is `trace.html` with the data in it as JSON; its script makes text nodes of every string, and its policy lets
it load nothing. So a model's text stays text.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvkernels.model.engine.output.generation import Generation

TEMPLATE = Path(__file__).with_name("trace.html")
_MARKS = re.compile(r"<!--(TITLE|DATA|PLAIN)-->")


@dataclass(frozen=True)
class TracedRun:
    """One generation of the page. seconds: what it took, or None where that was not measured."""

    name: str
    generation: Generation
    seconds: float | None = None


def trace_page(
    runs: Sequence[TracedRun],
    prompt: str = "",
    title: str = "mvkernels trace",
    decode: Callable[[int], str] | None = None,
) -> str:
    """The page. runs: at least one, of the same prompt. decode: the text of a token id, for the likeliest tokens.

    Raises ValueError without a run.
    """
    if not runs:
        raise ValueError("trace_page: expected at least one run, got none")
    names = {token for run in runs for top in run.generation.top_logprobs or () for token, _ in top or ()}
    data = {
        "prompt": prompt,
        "title": title,
        "names": {} if decode is None else {str(token): decode(token) for token in sorted(names)},
        "runs": [_run(run) for run in runs],
    }
    # Inside a script element only `<` could end it.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    plain = "\n\n".join(run.generation.text for run in runs)
    parts = {"TITLE": html.escape(title), "DATA": embedded, "PLAIN": html.escape(plain)}
    return _MARKS.sub(lambda mark: parts[mark[1]], TEMPLATE.read_text(encoding="utf-8"))


def _run(run: TracedRun) -> dict[str, Any]:
    g = run.generation
    found = g.to_dict()
    kept = ("finish_reason", "error", "warnings", "total_tokens", "critical_path", "parallelism", "steps", "texts")
    first = g.prompt_length
    return {
        "name": run.name,
        "seconds": run.seconds,
        **{name: found[name] for name in (*kept, "steps_of")},
        "logprobs": None if g.logprobs is None else [_short(value) for value in found["logprobs"]],
        "top_logprobs": None
        if g.top_logprobs is None
        else [top and [[token, _short(value)] for token, value in top] for top in found["top_logprobs"]],
        "ids": found["token_ids"][first:],
        "positions": g.layout.position_ids[first:].tolist(),
        "sampled": g.layout.sampled[first:].astype(int).tolist(),
        "branches": _branches(g),
    }


def _short(logprob: float | str | None) -> float | str | None:
    """With the digits that the page shows: all of them are two thirds of a long page."""
    return round(logprob, 4) if isinstance(logprob, float) else logprob


def _branches(g: Generation) -> list[dict[str, Any]]:
    """Trunk and paths, each behind the one that it begins in, with its path and with its parts in order.

    A part is a pair of numbers, a half-open range of generated tokens, or {"block": the numbers of its branches}.
    """
    branches: list[dict[str, Any]] = [{"path": [], "parts": []}]
    cursor = -g.prompt_length
    work = [(0, iter(g.tree))]
    while work:
        number, items = work[-1]
        item = next(items, None)
        if item is None:
            work.pop()
        elif isinstance(item, int):
            if cursor + item > 0 and item:
                branches[number]["parts"].append([max(cursor, 0), cursor + item])
            cursor += item
        else:
            children = range(len(branches), len(branches) + len(item))
            branches += [{"path": [*branches[number]["path"], i + 1], "parts": []} for i in range(len(item))]
            branches[number]["parts"].append({"block": [*children]})
            work += reversed([(child, iter(path)) for child, path in zip(children, item, strict=True)])
    return branches
