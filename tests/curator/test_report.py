"""The report of a curation: complete, escaped, self-contained, robust against what is missing, streaming."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mvkernels.model.curator import report
from mvkernels.model.curator.report import write_report
from mvkernels.model.curator.report_parts import bins_of, histogram, trace_boxes
from tests.cli.test_cli import TRACE
from tests.test_grammar import TRACE as NESTED

HOSTILE = (
    "</pre></details></main><script>document.title='owned'</script><img src=x onerror=\"alert(1)\"><!--BODY-->&lt;"
)
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Elements as (name, attributes); texts in their place; every element is closed by its own name."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())


def trace_record(i: int, **changes: Any) -> dict[str, Any]:
    record = {"id": f"chain-{i}", "question": f"question {i}", "answer": "34", "original": f"original {i}"}
    more = {"trace": TRACE, "distance": 0.25, "tries": {"split": 2}, "tokens": {"prompt": 3}, "warnings": []}
    return {**record, **more, **changes}


def reject_record(i: int, **changes: Any) -> dict[str, Any]:
    attempts = [{"stage": "split", "answer": f"answer {i} {k}", "wrong": [f"wrong {i} {k}"]} for k in range(3)]
    record = {"id": f"reject-{i}", "question": "?", "original": f"lost {i}", "stage": "paths", "reason": "too far"}
    return {**record, "attempts": attempts, **changes}


MANIFEST = {
    "counts": {"in": 3, "traces": 2, "rejected": 1},
    "model": "some-model",
    "base_url": "https://user:secret@host.example:8000/v1",
    "prompts": {"split": "v3"},
    "tokens": {"prompt": 1234, "completion": 5678},
    "cost": 0.5,
    "seconds": 12.25,
}


def write_run(
    out: Path, traces: Iterable[Any] | None, rejected: Iterable[Any] | None = None, manifest: Any = None
) -> Path:
    out.mkdir(exist_ok=True)
    for name, records in (("traces.jsonl", traces), ("rejected.jsonl", rejected)):
        if records is not None:
            with (out / name).open("w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
    if manifest is not None:
        (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def page_of(out: Path) -> Page:
    path = write_report(out)
    assert path == out / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_has_counts_costs_chains_and_attempts(tmp_path: Path) -> None:
    warned = trace_record(1, warnings=["line 3, path 2: similarly", {"path": "1", "message": "as above"}])
    page = page_of(write_run(tmp_path, [trace_record(0), warned], [reject_record(0)], MANIFEST))
    words = page.words
    for name, value in (
        ("chains in", "3"),
        ("traces", "2"),
        ("rejected", "1"),
        ("with warnings", "1"),
        ("prompt tokens", "1,234"),
        ("completion tokens", "5,678"),
        ("cost", "0.50"),
        ("seconds", "12.25"),
    ):
        assert f"{name} {value}" in words
    assert "some-model https://host.example:8000/v1 prompts: split v3" in words and "secret" not in words
    for part in ("question 0", "original 1", "line 3, path 2: similarly", "as above", "distance 0.250", "2 warnings"):
        assert part in words
    for part in ("too far", "wrong 0 0", "answer 0 1", "answer 0 2", "lost 0", "paths · 3 attempts"):
        assert part in words
    assert "unknown" not in words and "not as many" not in words
    labels = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    names = [(label or "").partition(":")[0] for label in labels]
    assert names == ["# parallel", "Depth", "Width", "Distance to the original", "Tries"]
    assert labels[2] == "Width: mean 2 · median 2 · 4 blocks" and labels[3] == "Distance to the original: " + (
        "mean 0.25 · median 0.25 · 2 traces"
    )


def test_the_page_is_self_contained_and_needs_no_script(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, [trace_record(0)], [reject_record(0)], MANIFEST))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not any({"src", "href", "style"} & attributes.keys() for _, attributes in page.elements)
    [policy] = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in " ".join(page.texts)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "manifest.json",
        "rejected.jsonl",
        "report.html",
        "traces.jsonl",
    ]


def hostile(value: Any) -> Any:
    """The same with every text, also every key, replaced by a hostile one, or one put into the trace."""
    if isinstance(value, dict):
        return {name: hostile(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    if value == TRACE:
        return TRACE.replace("We add", HOSTILE + " We add").replace("1.1: one", f"1.1: {HOSTILE}")
    return HOSTILE if isinstance(value, str) else value


def test_every_text_stays_text(tmp_path: Path) -> None:
    traces = [hostile(trace_record(0, warnings=["x", {"y": "z"}], tries={"s": 1}))]
    traces[0]["tries"] = {HOSTILE: 1}
    rejected = [hostile(reject_record(0))]
    manifest = {**hostile(MANIFEST), "prompts": {HOSTILE: HOSTILE}, "base_url": "https://[" + HOSTILE}
    plain = page_of(write_run(tmp_path / "a", [trace_record(0, warnings=["x", {"y": "z"}])], [reject_record(0)]))
    page = page_of(write_run(tmp_path / "b", traces, rejected, manifest))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements} | {"span"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # id, question (twice), answer, original, two in the trace, two warnings; id, question (twice), original, stage
    # (facts, table), reason (twice), and stage, answer, wrong of three attempts; model, two of prompts; tries.
    assert " ".join(page.texts).count("document.title='owned'") >= 9 + 8 + 9 + 3 + 1


def test_paths_are_boxes_in_boxes_with_their_index() -> None:
    page = Page(trace_boxes(NESTED))
    kinds = [attributes["class"] for tag, attributes in page.elements if tag == "div"]
    assert kinds.count("path") == 3 and kinds.count("block") == 2 and kinds.count("outline") == 3
    assert page.words == (
        "Before goal 1: first 2: second path 1 one two path 2 a goal 2.1: inner path 2.1 deep "
        "conclusion c conclusion joined After"
    )
    inner = re.search(r'<div class="path"><div class="label">path 2</div>(.*)', trace_boxes(NESTED))
    assert inner is not None and '<div class="label">path 2.1</div>' in inner[1]
    broken = Page(trace_boxes("<Path>" + HOSTILE))
    assert {tag for tag, _ in broken.elements} == {"p", "pre"} and HOSTILE in broken.texts[1]


def test_missing_and_wrong_fields_are_unknown(tmp_path: Path) -> None:
    odd = {
        "id": 7,
        "trace": "<Path>",
        "distance": "far",
        "tries": [1],
        "warnings": 3,
        "question": None,
        "answer": {"a": [1]},
    }
    page = page_of(write_run(tmp_path, [{}, odd, {"distance": float("nan")}], [{}, {"attempts": [3, {}]}]))
    for part in (
        "There is no manifest.json",
        "chains in unknown",
        "cost unknown",
        "traces 3",
        "rejected 2",
        "1 traces are malformed",
        "model unknown",
        "Distance to the original unknown",
        '{"a": [1]}',
        "reason unknown",
    ):
        assert part in page.words
    (tmp_path / "manifest.json").write_text("[1]")
    assert "manifest.json is no JSON object" in page_of(tmp_path).words
    counts = {"in": 9, "traces": 8, "rejected": 1}
    (tmp_path / "manifest.json").write_text(json.dumps({"counts": counts, "cost": 10**400, "base_url": 3}))
    words = page_of(tmp_path).words
    assert "The files hold 3 traces and 2 rejected chains" in words and "cost unknown" in words


def test_a_run_in_pieces_is_summed(tmp_path: Path) -> None:
    pieces = {"counts": {"chains": 5}, "prompts": "v7", "runs": [{"seconds": 2.5}, {}, {"seconds": 4}]}
    words = page_of(write_run(tmp_path, [trace_record(0)], manifest=pieces)).words
    assert "chains in 5" in words and "prompts: v7" in words and "seconds 6.50" in words


def test_lines_that_are_no_objects_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path, [trace_record(0), [1], 3], [])
    with (tmp_path / "traces.jsonl").open("ab") as file:
        file.write(b'\n\xff\n{"id": "half')
    words = page_of(tmp_path).words
    assert "4 lines are no JSON objects" in words and "question 0" in words and "0 in all, with every attempt" in words


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    assert "half ?" in page_of(write_run(tmp_path, [trace_record(0, question="half \ud83d")])).words


def test_a_folder_of_no_run_is_refused_and_a_run_of_one_file_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected traces.jsonl or rejected.jsonl .*, found neither in"):
        write_report(tmp_path)
    assert "too far" in page_of(write_run(tmp_path, None, [reject_record(0)])).words


def test_an_old_page_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page_of(write_run(tmp_path, [trace_record(0)]))
    before = (tmp_path / "report.html").read_text()

    def fails(*_: object) -> Iterator[str]:
        yield "half"
        raise OSError("disk full")

    monkeypatch.setattr(report, "_shown_rejects", fails)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == before


def test_many_chains_stream_and_two_hundred_are_shown(tmp_path: Path) -> None:
    short = "<Parallel><Goal><Outline>1: a</Outline></Goal><Path>1: b</Path><Conclusion>c</Conclusion></Parallel>"
    long = "word " * 2000
    count = 2000
    records = (trace_record(i, trace=short, original=long, distance=i / count) for i in range(count))
    rejects = (reject_record(i, original=long, reason=f"reason {i % 70}") for i in range(count))
    write_run(tmp_path, records, rejects)
    assert (tmp_path / "traces.jsonl").stat().st_size > 20_000_000
    tracemalloc.start()
    path = write_report(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000  # the texts of both files are 40 MB
    page = path.read_text()
    shown = re.findall(r"<b>chain-(\d+)</b>", page)
    assert [*map(int, shown)] == [*range(0, count, 10)]
    assert len(re.findall(r"<b>reject-\d+</b>", page)) == 200
    assert "200 of 2,000; the original" in page and "mean 0.50 · median 0.50 · 2,000 traces" in page
    assert '<td>20 other reasons</td><td class="number">560</td>' in page


def test_bins_by_hand() -> None:
    assert bins_of([1, 3, 3, 2]) == [(1, 1, 1), (2, 2, 1), (3, 3, 2)]
    assert bins_of([0.5, 0.5]) == [(0.5, 0.5, 2)]
    bins = bins_of([0, 0.99, 24.0, 12.5])
    assert [(first, count) for first, _, count in bins if count] == [(0, 2), (12, 1), (23, 1)] and len(bins) == 24
    assert sum(count for *_, count in bins_of([1e308, -1e308, 0])) == 3
    assert sum(count for *_, count in bins_of([1.0, 1.0 + 2**-52])) == 2
    assert "unknown" in histogram("x", [float("nan")]) and "<svg" not in histogram("x", [])
    page = Page(histogram("a < b", [1, 2, 2], "blocks"))
    bars = [attributes for tag, attributes in page.elements if tag == "rect"]
    heights = [float(bar["height"] or 0) for bar in bars]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.1) and "a < b" in page.texts[0]


@pytest.mark.real_data
def test_published_traces_have_boxes(data_dir: Path) -> None:
    for file in sorted((data_dir / "multiverse_1k").glob("*.xml")):
        text = file.read_text(encoding="utf-8")
        kinds = [attributes["class"] for tag, attributes in Page(trace_boxes(text)).elements if tag == "div"]
        assert kinds.count("path") == text.count("<Path>") and kinds.count("goal") == text.count("<Goal>")
