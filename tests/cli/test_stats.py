"""Statistics of traces, against the layout and by hand; traces from every format; the commands check and stats."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mvkernels.grammar import parse_text
from mvkernels.layout import BranchLayout
from mvkernels.model.curator.checks import content_distance
from mvkernels.model.curator.statistics import Spread, measures, spread, spreads, trace_figures
from mvkernels.model.curator.trace_files import read_traces
from mvkernels.model.training.traces import read_examples
from mvkernels.tags import TagTokens
from tests.cli.test_cli import TRACE, assert_one_line_error, invoke
from tests.support.tiny_model import tiny_tokenizer

PLAIN = "No block at all."
BAD = TRACE.replace("1.2: two", "1.3: two")
DEPENDENT = TRACE.replace("2: Four and", "2: Similarly,")


def write_jsonl(file: Path, records: list[object]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def write_parquet(file: Path, records: list[dict[str, object]], rows: int | None = None) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="needs the curate extra: pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(records)[:rows], file)
    return file


def test_figures_by_hand_and_by_the_layout() -> None:
    found = trace_figures(TRACE)
    trace, words = parse_text(TRACE)
    layout = BranchLayout.from_tree(trace.tree)
    assert (found.tokens, found.critical_path, found.parallelism) == (
        len(words),
        layout.critical_path,
        layout.parallelism,
    )
    # <Path> 1.1: one </Path>: 4 words; <Path> 1.2: two, which is more </Path>: 7; path 2: 8; path 1: 6 and the block.
    assert (found.blocks, found.paths, found.depth, found.widths) == (2, 4, 2, (2, 2))
    assert found.path_lengths == (6 + 30, 8, 4, 7)
    # The shorter path of each block is saved.
    assert found.critical_path == len(words) - 8 - 4


def test_figures_with_a_tokenizer_count_its_tokens() -> None:
    found = trace_figures(TRACE, TagTokens.from_tokenizer(tiny_tokenizer()))
    assert found.tokens > trace_figures(TRACE).tokens
    assert found.widths == (2, 2) and 1 < found.parallelism < 2


def test_a_trace_without_blocks_has_no_widths() -> None:
    found = trace_figures(PLAIN)
    assert (found.tokens, found.critical_path, found.parallelism, found.depth) == (4, 4, 1.0, 0)
    names = spreads(measures([found], "words"))
    assert "width (of a block)" not in names and "words of a path" not in names and names["blocks"].max == 0
    assert trace_figures("").parallelism == 1.0


def test_spread_by_hand() -> None:
    assert spread([4, 1, 2, 9]) == Spread(4, 4.0, 3.0, 1, 9)
    with pytest.raises(ValueError, match="at least one value"):
        spread([])


def test_every_format_gives_the_same_traces(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"trace": TRACE, "original": "one"}, {"trace": PLAIN, "original": None}]
    jsonl, parquet = write_jsonl(tmp_path / "a.jsonl", [*records]), write_parquet(tmp_path / "b.parquet", records)
    (tmp_path / "c.xml").write_text(TRACE)
    (tmp_path / "d.txt").write_text(PLAIN)
    (tmp_path / "e.py").write_text("not read")
    found = [(one.name, one.text, one.original, one.error) for one in read_traces([tmp_path])]
    assert found == [
        (f"{jsonl}:1", TRACE, "one", None),
        (f"{jsonl}:2", PLAIN, None, None),
        (f"{parquet}:1", TRACE, "one", None),
        (f"{parquet}:2", PLAIN, None, None),
        (f"{tmp_path / 'c.xml'}", TRACE, None, None),
        (f"{tmp_path / 'd.txt'}", PLAIN, None, None),
    ]


def test_text_is_the_column_where_there_is_no_trace(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": TRACE}, {"text": PLAIN, "trace": TRACE}])
    assert [one.text for one in read_traces([jsonl])] == [TRACE, TRACE]
    parquet = write_parquet(tmp_path / "b.parquet", [{"text": TRACE}])
    assert [one.text for one in read_traces([parquet])] == [TRACE]


def test_a_bad_record_is_an_error_in_its_place(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"trace": PLAIN}, [1], {"other": 1}, {"trace": 3}, {"trace": " "}])
    file.write_text(file.read_text() + "\n{broken\n" + "[" * 100_000 + "\n" + json.dumps({"trace": PLAIN}))
    found = [*read_traces([file])]
    assert [one.record for one in found] == [1, 2, 3, 4, 5, 7, 8, 9]
    assert [one.text for one in found] == [PLAIN, *[None] * 6, PLAIN]
    errors = [one.error or "" for one in found[1:-1]]
    for error, part in zip(
        errors, ("got list", "got neither", "got int", "an empty one", "JSON object", "JSON object"), strict=True
    ):
        assert part in error


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("a.parquet", b"no parquet", ["expected a Parquet file"]),
        ("a.xml", b"\xff\xfe", ["expected UTF-8 text", "offset 0"]),
        ("a.jsonl", b'{"trace": "\xff"}', ["expected UTF-8 text", "line 1"]),
        ("a.txt", b"a\0b", ["binary file"]),
    ],
)
@pytest.mark.parametrize("command", ["check", "stats"])
def test_a_file_of_other_bytes_is_one_line(
    command: str, name: str, data: bytes, parts: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    assert_one_line_error(invoke(command, tmp_path / name), name, *parts)


@pytest.mark.parametrize("command", ["check", "stats"])
def test_nothing_to_read_is_one_line(command: str, tmp_path: Path) -> None:
    assert_one_line_error(invoke(command, tmp_path), "expected a folder with", str(tmp_path))
    assert_one_line_error(invoke(command, tmp_path / "none.xml"), "found nothing at")
    parquet = write_parquet(tmp_path / "a.parquet", [{"other": "x"}])
    assert_one_line_error(invoke(command, parquet), 'a column "trace" or "text", got other')
    for name in ("empty.xml", "empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("\n \n")
        assert_one_line_error(
            invoke(command, tmp_path / name), f"expected at least one trace, got none in {tmp_path}", name
        )
    parquet = write_parquet(tmp_path / "empty.parquet", [{"trace": "x"}], rows=0)
    assert_one_line_error(invoke(command, parquet), "expected at least one trace, got none in", "empty.parquet")


def test_a_folder_of_the_curator_holds_its_traces_once(tmp_path: Path) -> None:
    """Its Parquet file has the same traces, and the rejected chains have none."""
    write_jsonl(tmp_path / "traces.jsonl", [{"trace": TRACE}])
    write_jsonl(tmp_path / "rejected.jsonl", [{"id": "a", "stage": "summary"}])
    write_parquet(tmp_path / "traces.parquet", [{"trace": TRACE}])
    assert [one.name for one in read_traces([tmp_path])] == [f"{tmp_path / 'traces.jsonl'}:1"]
    assert [one.name for one in read_examples([tmp_path])] == [f"{tmp_path / 'traces.jsonl'}:1"]  # type: ignore[union-attr]


def test_check_prints_a_line_a_finding_and_a_table(tmp_path: Path) -> None:
    (tmp_path / "good.xml").write_text(DEPENDENT)
    line = DEPENDENT.split("\n").index("2: Similarly, five are nine.") + 1
    result = invoke("check", tmp_path / "good.xml")
    assert result.exit_code == 0, result.output  # a reference is a warning
    first, *rest = result.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'good.xml'}: line {line}, path 2: warning: 'Similarly' ")
    assert "malformed" in rest[0] and "good.xml" in "".join(row.split("  ")[0] for row in rest)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"trace": PLAIN}, {"trace": BAD}, {"nothing": 1}])
    result = invoke("check", bad)
    assert result.exit_code == 1
    second, third, *_ = result.stdout.splitlines()
    where = BAD.split("\n").index("1.3: two, which is more") + 1
    assert second.startswith(f"{bad}:2: line {where}, path 1.2: error: expected the index '1.2:', found '1.3:'")
    assert third.startswith(f"{bad}:3: error: expected a trace")


def test_check_as_json(tmp_path: Path) -> None:
    pytest.importorskip("rapidfuzz", reason="needs the curate extra: rapidfuzz is not installed")
    file = write_jsonl(
        tmp_path / "a.jsonl",
        [{"trace": DEPENDENT, "original": "x"}, {"trace": TRACE, "original": "y"}, {"trace": BAD, "original": ""}],
    )
    (tmp_path / "b.xml").write_text(PLAIN)
    result = invoke("check", "--json", tmp_path, tmp_path / "b.xml")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    folder, alone = found["files"]
    assert (folder["traces"], folder["paths"], folder["malformed"]) == (4, 12, 1)
    assert (folder["dependent"], folder["warnings"], folder["compared"]) == (1, 1, 2)
    distances = [content_distance(DEPENDENT, "x"), content_distance(TRACE, "y")]
    assert folder["distance"] == pytest.approx(sum(distances) / 2)
    assert alone == {**alone, "file": str(tmp_path / "b.xml"), "traces": 1, "malformed": 0, "distance": None}
    places = [(one["file"], one["record"], one["path"], one["kind"], one["severity"]) for one in found["findings"]]
    assert places == [(str(file), 1, "2", "independence", "warning"), (str(file), 3, "1.2", "grammar", "error")]


def test_stats_has_a_table_a_set_and_writes_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    (tmp_path / "a.xml").write_text(TRACE)
    (tmp_path / "b.xml").write_text(PLAIN)
    records = write_jsonl(tmp_path / "c.jsonl", [{"trace": TRACE}, {"trace": BAD}])
    out = tmp_path / "out"
    result = invoke("stats", tmp_path / "a.xml", records, tmp_path / "b.xml", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert "left out: " in result.stderr and f"{records}:2: line" in result.stderr
    jsonl, single = json.loads(result.stdout)
    assert json.loads((out / "statistics.json").read_text()) == [jsonl, single]
    assert (jsonl["set"], jsonl["traces"], jsonl["left_out"], jsonl["unit"]) == (str(records), 1, 1, "words")
    assert (single["set"], single["traces"], single["left_out"]) == ("2 files", 2, 0)
    words = [len(parse_text(text)[1]) for text in (TRACE, PLAIN)]
    measure = single["measures"]["words"]
    assert measure == {"count": 2, "mean": sum(words) / 2, "median": sum(words) / 2, "min": 4, "max": words[0]}
    assert single["measures"]["width (of a block)"]["count"] == 2
    assert single["measures"]["# parallel"]["min"] == 1
    assert (out / "distributions.png").read_bytes().startswith(b"\x89PNG")
    assert result.stderr.splitlines()[-2:] == [
        f"figures: {out / 'statistics.json'}",
        f"chart: {out / 'distributions.png'}",
    ]
    shown = invoke("stats", tmp_path / "a.xml", "--tokenizer", tokenizer_file(tmp_path))
    assert shown.exit_code == 0, shown.output
    assert "tokens of a path" in shown.stdout and "1 trace" in shown.stdout


def test_stats_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "a.xml").write_text(TRACE)
    out = tmp_path / "out"
    result = invoke("stats", tmp_path / "a.xml", "--out", out)
    assert result.exit_code == 0 and "words of a path" in result.stdout, result.output
    assert result.stdout.splitlines()[-2:] == [
        f"figures: {out / 'statistics.json'}",
        "no charts: a chart needs matplotlib, which is not installed: pip install 'mvkernels[plot]'",
    ]
    assert [path.name for path in out.iterdir()] == ["statistics.json"]


def tokenizer_file(folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(str(folder / "tokenizer"))
    return folder / "tokenizer"


def test_stats_without_a_good_trace_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.xml").write_text(BAD)
    result = invoke("stats", tmp_path / "bad.xml")
    assert result.exit_code == 2 and "expected at least one good trace, got none in" in result.stderr
    (tmp_path / "good.xml").write_text(TRACE)
    assert_one_line_error(invoke("stats", tmp_path / "good.xml", "--out", tmp_path / "bad.xml"), "--out", "got a file")


@pytest.mark.real_data
def test_published_traces_as_published(data_dir: Path) -> None:
    result = invoke("stats", data_dir / "multiverse_1k", "--tokenizer", data_dir / "qwen2.5_tokenizer", "--json")
    [found] = json.loads(result.stdout)
    measure = found["measures"]
    assert (found["traces"], measure["tokens"]["min"], measure["tokens"]["max"]) == (16, 3449, 16839)
    assert measure["depth"]["max"] == 2 and measure["tokens of a path"]["count"] == 289
    checked = invoke("check", data_dir / "multiverse_1k", "--json")
    assert checked.exit_code == 0
    [row] = json.loads(checked.stdout)["files"]
    assert (row["traces"], row["paths"], row["malformed"], row["warnings"]) == (16, 289, 0, 28)
