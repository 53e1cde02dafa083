"""The command line: figures of `inspect` against the layout itself, errors of one line with exit status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from typer.testing import CliRunner

import mvkernels.__main__
from mvkernels.__main__ import app
from mvkernels.cli import evaluate, generate, inspect, reproduce
from mvkernels.cli.plots import mask_density
from mvkernels.grammar import parse_text
from mvkernels.layout import BranchLayout
from tests.test_files import full_disk

ROOT = Path(__file__).resolve().parents[2]

TRACE = """<Think>
We add two sums.
<Parallel>
<Goal>
<Outline>
1: The first sum.
</Outline>
<Outline>
2: The second sum.
</Outline>
</Goal>
<Path>
1: One and two
<Parallel>
<Goal>
<Outline>
1.1: Half of it.
</Outline>
<Outline>
1.2: The rest.
</Outline>
</Goal>
<Path>
1.1: one
</Path>
<Path>
1.2: two, which is more
</Path>
<Conclusion>
are three.
</Conclusion>
</Parallel>
</Path>
<Path>
2: Four and five are nine.
</Path>
<Conclusion>
Three and nine.
</Conclusion>
</Parallel>
</Think>
Twelve.
"""


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line_error(result, *parts: str) -> None:
    """Exit status 2, one line on stderr, but for what was being loaded, that says all `parts`; nothing on stdout."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1 and lines[0].startswith("mvkernels: error: "), result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    file = tmp_path / "trace.xml"
    file.write_text(TRACE)
    return file


def test_inspect_figures_are_those_of_the_layout(trace_file: Path):
    result = invoke("inspect", trace_file, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    trace, words = parse_text(TRACE)
    layout = BranchLayout.from_tree(trace.tree)
    assert figures["unit"] == "words" and figures["tokens"] == len(words) == layout.total_tokens
    assert figures["critical_path"] == layout.critical_path
    visible = int(layout.dense_mask().sum())
    assert figures["visible_pairs"] == visible
    assert figures["mask_density"] == visible / (len(words) * (len(words) + 1) / 2)


def test_inspect_blocks_by_hand(trace_file: Path):
    blocks = json.loads(invoke("inspect", trace_file, "--json").stdout)["blocks"]
    assert [block["name"] for block in blocks] == ["1", "1.1/1"]
    assert [block["depth"] for block in blocks] == [1, 2]
    # <Path> 1.1: one </Path>: 4 words; <Path> 1.2: two, which is more </Path>: 7. The shorter one is saved.
    assert blocks[1]["path_tokens"] == [4, 7] and blocks[1]["saved"] == 4
    # Path 1: <Path> 1: One and two (5), its block (35), </Path>. Path 2: <Path> 2: Four and five are nine. </Path> (8).
    assert blocks[0]["path_tokens"] == [5 + blocks[1]["tokens"] + 1, 8]
    assert blocks[0]["saved"] == 4 + 8
    assert blocks[0]["outlines"] == ["The first sum.", "The second sum."]


def test_inspect_prints_tree_table_and_figures(trace_file: Path):
    result = invoke("inspect", trace_file)
    assert result.exit_code == 0, result.output
    for part in ("trace.xml", "parallel 1 ", "parallel 1.1/1", "The second sum.", "critical path", "mask density"):
        assert part in result.stdout


def test_inspect_of_plain_text_has_no_blocks(tmp_path: Path):
    file = tmp_path / "plain.txt"
    file.write_text("no tag at all")
    figures = json.loads(invoke("inspect", file, "--json").stdout)
    assert (figures["tokens"], figures["critical_path"], figures["mask_density"]) == (4, 4, 1.0)
    assert figures["blocks"] == []


def test_inspect_of_deep_nesting(tmp_path: Path):
    """Deeper than Python recurses."""
    depth = 1500
    text = ""
    for level in range(depth):
        index = ".".join(["1"] * (level + 1))
        text += f"<Parallel> <Goal> <Outline> {index}: a </Outline> </Goal> <Path> {index}: "
    text += "</Path> <Conclusion> c </Conclusion> </Parallel> " * depth
    file = tmp_path / "deep.txt"
    file.write_text(text)
    figures = json.loads(invoke("inspect", file, "--json").stdout)
    assert figures["tokens"] == figures["critical_path"] == depth * 14
    assert len(figures["blocks"]) == depth
    result = invoke("inspect", file)
    assert result.exit_code == 0 and "deeper blocks are not shown" in result.stdout


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<Parallel>", ("expected <Goal>", "found the end")),
        (TRACE.replace("</Goal>", "", 1), ("expected <Outline> or </Goal>", "found <Path>")),
        (TRACE.replace("</Path>\n<Conclusion>", "<Conclusion>\n</Path>", 1), ("expected", "found <Conclusion>")),
        (TRACE.replace("2: Four", "3: Four"), ("expected the index '2:'", "found '3:'")),
        (TRACE.replace("1.2: two", "2: two"), ("expected the index '1.2:'", "found '2:'")),
        (TRACE.replace("</Outline>\n</Goal>", "</Outline>\nwords\n</Goal>", 1), ("line 11", "found text")),
    ],
    ids=["unclosed", "goal-not-closed", "misnested", "index-mismatch", "nested-index-mismatch", "text-between-parts"],
)
def test_inspect_of_a_malformed_trace(tmp_path: Path, text: str, parts: tuple[str, ...]):
    file = tmp_path / "bad.xml"
    file.write_text(text)
    assert_one_line_error(invoke("inspect", file), f"{file}: ", *parts)


@pytest.mark.parametrize("name", ["traces.jsonl", "."])
def test_inspect_shows_one_trace_of_those_that_curate_writes(tmp_path: Path, trace_file: Path, name: str):
    """By its number; in a run's folder the traces alone count."""
    lines = [{"id": "a", "question": "q", "trace": "<Think>\none two\n</Think>\n"}, {"trace": TRACE}, {"trace": 3}]
    out = tmp_path / "out"
    out.mkdir()
    (out / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "rejected.jsonl").write_text('{"id": "b", "stage": "summary"}\n')
    shown = invoke("inspect", out / name)
    assert shown.exit_code == 0 and "traces.jsonl:1  4 words" in shown.stdout, shown.output
    assert shown.stdout.splitlines()[-1] == "next trace     --trace 2"
    figures = json.loads(invoke("inspect", out / name, "--trace", 2, "--json").stdout)
    expected = json.loads(invoke("inspect", trace_file, "--json").stdout)
    assert (figures.pop("file"), figures.pop("record")) == (str(out / "traces.jsonl"), 2)
    assert (expected.pop("file"), expected.pop("record")) == (str(trace_file), None)
    assert figures == expected
    assert_one_line_error(invoke("inspect", out / name, "--trace", 3), "traces.jsonl:3: expected a trace, got int")
    assert_one_line_error(invoke("inspect", out / name, "--trace", 4), "--trace: expected 1 to 3", "got 4")
    assert_one_line_error(invoke("inspect", out / name, "--trace", 0), "--trace: expected at least 1, got 0")


def test_inspect_of_bad_files(tmp_path: Path, trace_file: Path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\x7fELF\xff\xfe\x00")
    assert_one_line_error(invoke("inspect", tmp_path / "nothing"), "found nothing at", "nothing")
    (tmp_path / "folder").mkdir()
    assert_one_line_error(invoke("inspect", tmp_path / "folder"), "expected a folder with .xml", "folder")
    (tmp_path / "empty.xml").write_text(" \n")
    assert_one_line_error(
        invoke("inspect", tmp_path / "empty.xml"), "expected at least one trace, got none in", "empty"
    )
    assert_one_line_error(invoke("inspect", binary), "expected UTF-8 text", "offset 4")
    assert_one_line_error(invoke("inspect", trace_file, "--tokenizer", binary), "cannot load a tokenizer from")
    assert_one_line_error(invoke("inspect", trace_file, "--tokenizer", tmp_path / "nothing"), "tokenizer.json")
    assert_one_line_error(invoke("inspect", trace_file, "--tokenizer", tmp_path), "cannot load a tokenizer from")


@pytest.mark.parametrize(
    ("words", "module", "called", "line"),
    [
        (["generate", "hi"], generate, "load_engine", "interrupted"),
        (["evaluate"], evaluate, "load_engine", "interrupted; the same command goes on with what is done"),
        (["reproduce"], reproduce, "Cells", "interrupted; the same command goes on with what is done"),
    ],
)
def test_interrupted_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], module: ModuleType, called: str, line: str
):
    def interrupt(*arguments: object):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, called, interrupt)
    result = invoke(*words)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", line + "\n"), result.exception


def test_interrupted_before_a_command_has_begun(monkeypatch: pytest.MonkeyPatch):
    def interrupt(prog_name: str):
        raise KeyboardInterrupt

    monkeypatch.setattr(mvkernels.__main__, "app", interrupt)
    with pytest.raises(SystemExit) as ended:
        mvkernels.__main__.main()
    assert ended.value.code == 130


def test_unknown_options_exit_with_2(trace_file: Path):
    for arguments in (["inspect"], ["inspect", trace_file, "--semantics", "other"], ["nope"], ["inspect", "--nope"]):
        result = invoke(*arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output


def test_no_traceback_in_a_process_of_its_own(tmp_path: Path):
    command = [sys.executable, "-m", "mvkernels", "inspect", str(tmp_path / "nothing.xml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert (done.returncode, done.stdout) == (2, "")
    message = f"expected a file with traces or a folder of such, found nothing at {tmp_path / 'nothing.xml'}"
    assert done.stderr == f"mvkernels: error: {message}\n"


@pytest.mark.parametrize(
    "tree",
    [[7], [3, [[5], [2]], 4], [[[4, [[1], [1], [3]], 2], [6]], 9], [40, [[11], [30], [1]], 5, [[17], [2]], 31]],
    ids=["causal", "two-paths", "nested", "two-blocks"],
)
@pytest.mark.parametrize("cells", [1, 3, 5, 16, 1000])
def test_mask_density_is_the_mean_over_each_cell(tree: list, cells: int):
    layout = BranchLayout.from_tree(tree)
    dense = layout.dense_mask().numpy().astype(float)
    n = min(cells, len(dense))
    edges = [i * len(dense) // n for i in range(n + 1)]
    expected = [[dense[edges[r] : edges[r + 1], edges[c] : edges[c + 1]].mean() for c in range(n)] for r in range(n)]
    np.testing.assert_allclose(mask_density(layout.mask, cells), expected, atol=1e-12)


def test_mask_density_of_a_pack():
    layout = BranchLayout.pack([BranchLayout.from_tree([3, [[5], [2]], 4]), BranchLayout.causal(6)])
    np.testing.assert_array_equal(mask_density(layout.mask), layout.dense_mask().numpy())


def test_plot_shows_the_mask(trace_file: Path, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    from matplotlib.image import imread

    out = tmp_path / "plot.png"
    result = invoke("inspect", trace_file, "--plot", out)
    assert result.exit_code == 0, result.output
    picture = imread(out)
    assert picture.shape[0] > 400 and picture.shape[1] > 800
    dark = (picture[..., 0] < 0.2) & (picture[..., 2] > 0.3) & (picture[..., 2] < 0.6)
    assert dark.mean() > 0.1, "expected the dark blue of visible pairs over a good part of the left half"


def test_a_plot_that_cannot_be_drawn_is_said_first(trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the trace is read: this one is none."""
    trace_file.write_text("</Path>")
    for plot, parts in (
        (tmp_path / "nowhere" / "plot.png", ("--plot: expected a folder to write to, found none at", "nowhere")),
        (tmp_path, ("--plot: expected a file, got a folder", str(tmp_path))),
        (tmp_path / "plot.docx", ("--plot: expected a name that ends with one of .png", "plot.docx")),
    ):
        assert_one_line_error(invoke("inspect", trace_file, "--plot", plot), *parts)
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    done = invoke("inspect", trace_file, "--plot", tmp_path / "plot.png")
    assert_one_line_error(done, "--plot needs matplotlib, which is not installed: pip install 'mvkernels[plot]'")


def test_a_plot_is_whole_or_not_there(trace_file: Path, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    out = tmp_path / "plot.png"
    with full_disk(4096):
        done = invoke("inspect", trace_file, "--plot", out)
    assert_one_line_error(done, f"File too large: '{out}'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.xml"]


@pytest.mark.parametrize("command", [("inspect", "--json"), ("check",)])
def test_a_full_standard_output_is_one_line(trace_file: Path, command: tuple[str, ...]):
    """Also at the very end of the process, where Python would say it in its own words."""
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "mvkernels", *command, str(trace_file)]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "mvkernels: error: standard output: No space left on device\n")


@pytest.mark.real_data
def test_inspect_of_every_real_trace(data_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Canonical by words and by tokens; released equals what the released code computes."""
    files = sorted((data_dir / "multiverse_1k").glob("*.xml"), key=lambda file: int(file.stem))
    assert len(files) == 16
    monkeypatch.setattr(inspect, "load_tokenizer", cache(inspect.load_tokenizer))  # the file is large
    monkeypatch.setattr(inspect.TagTokens, "from_tokenizer", cache(inspect.TagTokens.from_tokenizer))
    tokenizer = data_dir / "qwen2.5_tokenizer" / "tokenizer.json"
    for file in files:
        words = json.loads(invoke("inspect", file, "--json").stdout)
        tokens = json.loads(invoke("inspect", file, "--json", "--tokenizer", tokenizer).stdout)
        assert words["unit"] == "words" and tokens["unit"] == "tokens"
        for figures in (words, tokens):
            assert figures["critical_path"] < figures["tokens"]
            assert (
                figures["critical_path"] + sum(b["saved"] for b in figures["blocks"] if b["depth"] == 1)
                == (figures["tokens"])
            )
        released = json.loads(
            invoke("inspect", file, "--json", "--tokenizer", tokenizer, "--semantics", "released").stdout
        )
        published = json.loads((data_dir / "released_layout" / f"{file.stem}.json").read_text())
        assert released["tokens"] == len(published["tokens"])
        assert released["critical_path"] == max(published["position_ids"]) + 1
        assert released["visible_pairs"] == sum(published["visible_keys_per_row"])
        names = [[block["name"] for block in figures["blocks"]] for figures in (words, tokens)]
        assert names[0] == names[1]
