"""The pictures of the documents, made from current code and data: ``python -m benchmarks.figures [--check]``.

docs/trace.png is the page of `mvkernels generate --seed 5 --compare`, as chromium shows it. docs/block.png is the plot
of `mvkernels inspect examples/block.txt`. benchmarks/results/smollm2-lora/losses.png is drawn from the CSV file beside
it. Each picture holds, in a text chunk, a hash of its input. `--check` compares that with the current input and draws
nothing; the tests do so too. The charts of benchmarks/results come from `benchmarks.run` and `mvkernels reproduce`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mvkernels.cli import charts
from mvkernels.cli.plots import plot_layout
from mvkernels.layout import BranchLayout
from mvkernels.model import Generation
from mvkernels.model.checkpoint.loading import load_tokenizer
from mvkernels.model.checkpoint.names import EMBEDDED
from mvkernels.model.engine.output.trace_html import TEMPLATE, TracedRun, trace_page
from mvkernels.model.files import whole_file
from mvkernels.tags import TagTokens

ROOT = Path(__file__).resolve().parent.parent
#: The command whose page the picture shows; it stands in docs/guides/generation.md.
COMMAND = ("generate", "--seed", "5", "--compare", "--json", "--html")
TRACE = ROOT / "docs" / "trace.png"
BLOCK = ROOT / "docs" / "block.png"
EXAMPLE = ROOT / "examples" / "block.txt"
LOSSES = ROOT / "benchmarks" / "results" / "smollm2-lora" / "losses.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = (1150, 1000)
_KEYWORD = b"mvkernels"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Origin = dict[str, object]


def answers() -> list[str]:
    """The lines of JSON that the command prints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mvkernels", *COMMAND, str(Path(folder, "trace.html"))]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def trace_origin(lines: Sequence[str]) -> Origin:
    """What the picture of the page is made of: tokens and steps of each run, and a hash of all that has no rounding.

    lines: as `answers` gives them.
    """
    found = [json.loads(line) for line in lines]
    exact = [[run[name] for name in ("token_ids", "texts", "steps_of", "layout", "steps")] for run in found]
    page = TEMPLATE.read_bytes() + json.dumps(exact).encode()
    figures = {run["run"]["name"]: [run["total_tokens"], run["critical_path"], run["steps"]] for run in found}
    return {"figures": figures, "sha256": hashlib.sha256(page).hexdigest()}


def draw_trace(lines: Sequence[str]) -> None:
    """Raises ValueError without a browser. Without the seconds: they are of one machine and one moment."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise ValueError(f"{TRACE.name}: expected {', '.join(BROWSERS)} on the PATH, found none")
    runs = [TracedRun(json.loads(line)["run"]["name"], Generation.from_json(line)) for line in lines]
    prompt = json.loads(lines[0])["run"]["prompt"].partition(" Think")[0]
    with tempfile.TemporaryDirectory() as folder:
        page, picture = Path(folder, "trace.html"), Path(folder, "trace.png")
        page.write_text(trace_page(runs, prompt), encoding="utf-8")
        size = f"--window-size={SIZE[0]},{SIZE[1]}"
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000")
        profile = f"--user-data-dir={Path(folder, 'profile')}"
        command = [browser, *flags, size, profile, f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        write_picture(TRACE, picture.read_bytes(), trace_origin(lines))


def block_layout() -> BranchLayout:
    """The layout of the example, one token a character in the embedded vocabulary."""
    tags = TagTokens.from_tokenizer(load_tokenizer(EMBEDDED))
    return BranchLayout.from_token_ids(tags.encode(EXAMPLE.read_text(encoding="utf-8")), tags)


def block_origin() -> Origin:
    layout = block_layout()
    exact = np.concatenate([layout.position_ids.numpy(), layout.mask.gaps.reshape(-1), layout.mask.segment_starts])
    return {"sha256": hashlib.sha256(exact.astype("<i4").tobytes()).hexdigest()}


def draw_block() -> None:
    """Raises ImportError without matplotlib."""
    layout = block_layout()
    plot_layout(layout.mask, layout.position_ids.numpy(), "tokens", EXAMPLE.name, BLOCK)
    write_picture(BLOCK, BLOCK.read_bytes(), block_origin())


def losses_origin() -> Origin:
    return {"sha256": hashlib.sha256(LOSSES.with_suffix(".csv").read_bytes()).hexdigest()}


def draw_losses() -> None:
    """Raises ValueError without matplotlib."""
    if charts.left_out():
        raise ValueError(charts.left_out())
    with LOSSES.with_suffix(".csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    columns = {"trained on": "loss", "held out": "held_out_loss"}
    curves = {
        name: [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        for name, column in columns.items()
    }
    charts.losses(curves, LOSSES, "losses")
    write_picture(LOSSES, LOSSES.read_bytes(), losses_origin())


def write_picture(path: Path, png: bytes, origin: Origin) -> None:
    """Writes a PNG file with its origin in a text chunk before the last one. Raises ValueError for what is no PNG."""
    last = png[-12:]
    if not png.startswith(_SIGNATURE) or last[4:8] != b"IEND":
        raise ValueError(f"{path}: expected a PNG file, got {png[:8]!r}")
    body = b"tEXt" + _KEYWORD + b"\0" + json.dumps(origin).encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    with whole_file(path) as scratch:
        scratch.write_bytes(png[:-12] + chunk + last)


def read_origin(path: Path) -> Origin | None:
    """What a picture was made of; None where it does not say."""
    png = path.read_bytes()
    at = len(_SIGNATURE)
    while at + 12 <= len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        if kind == b"tEXt" and body.startswith(_KEYWORD + b"\0"):
            found: Origin = json.loads(body.partition(b"\0")[2])
            return found
        at += 12 + length
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the pictures that are out of date, or name them with --check. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="draw nothing; exit status 1 if a picture is out of date")
    check = parser.parse_args(arguments).check
    lines = answers()
    pictures: dict[Path, tuple[Origin, Callable[[], None]]] = {
        TRACE: (trace_origin(lines), lambda: draw_trace(lines)),
        BLOCK: (block_origin(), draw_block),
        LOSSES: (losses_origin(), draw_losses),
    }
    old = [path for path, (origin, _) in pictures.items() if read_origin(path) != origin]
    for path in old:
        if not check:
            pictures[path][1]()
        print(f"{path.relative_to(ROOT)}: {'old' if check else 'made'}")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
