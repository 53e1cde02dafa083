"""The pictures and figures of README.md and docs/benchmarks.md are those of the code, the engine and the CSV files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from benchmarks import figures
from mvkernels.model.checkpoint.names import EMBEDDED
from mvkernels.model.engine.output.trace_html import TEMPLATE
from tests.cli.test_cli import ROOT, invoke

README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the command of the picture prints today."""
    done = invoke(*figures.COMMAND, tmp_path_factory.mktemp("figures") / "trace.html")
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def cells_of(label: str) -> list[str]:
    """The cells behind the first one, of the only row of a table in docs/benchmarks.md that begins so."""
    [row] = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", BENCHMARKS, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def table(path: str) -> list[dict[str, str]]:
    with (RESULTS / path).open(newline="") as file:
        return [*csv.DictReader(file)]


def value(rows: list[dict[str, str]], column: str, **wanted: object) -> float:
    [found] = {row[column] for row in rows if all(row[name] == str(one) for name, one in wanted.items())}
    return float(found)


def test_the_pictures_are_of_today(lines: list[str]) -> None:
    """Else: python -m benchmarks.figures."""
    assert figures.read_origin(figures.TRACE) == figures.trace_origin(lines)
    assert figures.read_origin(figures.LOSSES) == figures.losses_origin()
    assert figures.read_origin(figures.BLOCK) == figures.block_origin()
    assert f"```\n{figures.EXAMPLE.read_text(encoding='utf-8')}```" in README
    guide = (ROOT / "docs" / "guides" / "generation.md").read_text(encoding="utf-8")
    assert f"mvkernels {' '.join(figures.COMMAND)} " in guide


def test_a_picture_knows_what_it_was_made_of(lines: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    """Another step, another token or another page is another origin; seconds are not, and the picture is whole."""
    origin = figures.trace_origin(lines)
    slower = [json.dumps(found | {"run": found["run"] | {"seconds": 9e9}}) for found in map(json.loads, lines)]
    assert figures.trace_origin(slower) == origin
    for field in ("steps_of", "token_ids"):
        other = json.loads(lines[0])
        other[field][-1] += 1
        assert figures.trace_origin([json.dumps(other), *lines[1:]]) != origin
    copy = tmp_path / "trace.png"
    png = figures.TRACE.read_bytes()
    figures.write_picture(copy, png, {"steps": 352})
    assert figures.read_origin(copy) == origin  # the first one, as the file has two now
    bare = png[:8] + png[-12:]
    figures.write_picture(copy, bare, {"steps": 352})
    assert figures.read_origin(copy) == {"steps": 352} and copy.read_bytes().endswith(png[-12:])
    with pytest.raises(ValueError, match=r"trace.png: expected a PNG file, got b'no'"):
        figures.write_picture(copy, b"no", {})
    page = tmp_path / "trace.html"
    page.write_text(TEMPLATE.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    monkeypatch.setattr(figures, "TEMPLATE", page)
    assert figures.trace_origin(lines) != origin


def test_the_figures_of_the_demo_are_the_engines(lines: list[str]) -> None:
    for line, name in zip(lines, ("parallel", "one path at", "one chain,"), strict=True):
        found = json.loads(line)
        [stated] = re.findall(rf"^{name} +(\d+) +(\d+) +([\d.]+) +(\d+) +[\d.]+ +\d+ +(\w+)$", README, re.MULTILINE)
        figures_ = (found["total_tokens"], found["critical_path"], f"{found['parallelism']:.2f}", found["steps"])
        assert stated == (*map(str, figures_), "right" if found["run"]["correct"] else "wrong"), name
    assert f"\nCompute {json.loads(lines[0])['run']['prompt'].split('Compute ')[1].split('. ')[0]}.\n" in README


def test_the_size_of_the_embedded_model() -> None:
    parameters = 0
    for file in EMBEDDED.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            shapes = (weights.get_slice(name).get_shape() for name in weights.keys())  # noqa: SIM118
            parameters += sum(rows * (rest[0] if rest else 1) for rows, *rest in shapes)
    assert f"It has {parameters / 1e6:.2f} M parameters" in README


def test_the_headlines_are_from_the_tables() -> None:
    """Label of a row in README.md -> the row and the cell of docs/benchmarks.md that its ratio comes from."""
    places = {
        "attention forward + backward, one prompt with 16 responses, 8192 tokens": ("one prompt, 16 responses", 1),
        "attention forward + backward, causal, 8192 tokens": ("causal", 2),
        "decode, 32 branches x 8192 shared + 64 own tokens": ("32 x 8192 + 64", 1),
        "decode, 32 branches x 32768 shared + 512 own tokens": ("32 x 32768 + 512", 2),
        "16 requests with SmolLM2-135M, fp32": ("16", 2),
        "one request with SmolLM2-135M, fp32": ("1", 1),
        "a block of 8 paths, Qwen2.5-7B shape": ("7B", 2),
    }
    stated = dict(re.findall(r"^\| (.*?) \| .* \| .* \| ([\d.]+) \|$", README, re.MULTILINE))
    assert stated == {label: cells_of(row)[cell] for label, (row, cell) in places.items()}


def test_the_tables_are_those_of_the_results() -> None:
    attention = table("cpu/attention.csv")
    for label, case in {
        "published traces, packed": "real",
        "causal": "causal",
        "narrow: blocks of three paths of 100 tokens": "narrow",
        "nested: four paths that split into four": "nested",
        "wide: 16 paths": "wide",
        "one prompt, 16 responses": "shared-prompt",
    }.items():
        wanted = {"case": case, "direction": "forward+backward", "tokens": 6334 if case == "real" else 8192}
        share = value(attention, "visible_share", peer="sdpa-dense", **wanted)
        ratios = [value(attention, "ratio", peer=peer, **wanted) for peer in ("sdpa-dense", "sdpa-causal")]
        assert cells_of(label) == [f"{number:.2f}" for number in (share, *ratios)], label
    peers = ("sdpa-per-branch", "sdpa-batched", "flex-paged")
    for file, label, case, branches, prefix in (
        ("cpu", "8 x 8192 + 256", "shared", 8, 8192),
        ("cpu", "32 x 8192 + 64", "sweep", 32, 8192),
        ("cpu", "32 x 2048 + 64", "sweep", 32, 2048),
        ("cpu", "1 x 8192 (nothing shared)", "single", 1, 8192),
        ("h200", "32 x 32768 + 512", "shared", 32, 32768),
        ("h200", "1 x 32768 (nothing shared)", "single", 1, 32768),
    ):
        rows, place = table(f"{file}/decode.csv"), {"case": case, "branches": branches, "prefix": prefix}
        stated = cells_of(label)
        if file == "h200":
            assert stated.pop(0) == f"{value(rows, 'median_ms', peer='ours', **place):.3f}"
        assert stated == [f"{value(rows, 'ratio', peer=peer, **place):.2f}" for peer in peers[: len(stated)]], label
    engine = table("cpu/engine.csv")
    for requests in (8, 16):
        place = {"case": "batch", "requests": requests}
        ratios = [value(engine, "ratio", peer=peer, **place) for peer in ("generate-padded", "continuous-batching")]
        speed = value(engine, "tokens_per_s", peer="ours", **place)
        assert cells_of(str(requests)) == [f"{speed:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
    for task, label in (("arithmetic", "sums of products"), ("sat", "3-SAT by recursive branching")):
        found = json.loads((RESULTS / "reproduce" / task / "results.json").read_text())
        shares: dict[str, list[str]] = {}
        for one in found["accuracy"]:
            shares.setdefault(one["name"].rpartition(", ")[2], []).append(f"{100 * one['accuracy']:.2f}")
        stated = [", ".join(shares[mode]) + " %" for mode in ("parallel", "zero", "sequential")]
        parallelism = next(one["parallelism"] for one in found["accuracy"] if one["name"].endswith("parallel"))
        speedup = f"{found['wall-clock']['speedup']:.2f}x as fast"
        assert cells_of(label) == [*stated, f"{parallelism:.2f}", speedup], label
