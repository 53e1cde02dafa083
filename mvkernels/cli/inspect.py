"""``mvkernels inspect``: the tree of a trace, its tokens, critical path, parallelism, mask density and blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mvkernels.cli.files import load_tokenizer
from mvkernels.cli.options import Json, Tokenizer
from mvkernels.errors import GrammarError
from mvkernels.grammar import INDEX_PATTERN, Block, Trace, parse_text
from mvkernels.model.curator.trace_files import StoredTrace, read_traces
from mvkernels.tags import TagTokens

if TYPE_CHECKING:
    import numpy as np

    from mvkernels.layout import BranchLayout
    from mvkernels.mask import IntervalMask


class Semantics(StrEnum):
    """As `mvkernels.grammar.SEMANTICS`, for typer."""

    canonical = "canonical"
    released = "released"


# Columns that one level of nesting takes in the tree, and that a label needs.
INDENT, LABEL = 8, 32


@dataclass(frozen=True)
class BlockFigures:
    """One block. Lengths are in tokens; ``name`` is ``2`` for the second block of the trunk, ``2.1/3`` for the third
    block in path 1 of block 2. ``saved``: positions spared, against the paths one after the other."""

    name: str
    depth: int
    start: int
    tokens: int
    path_tokens: list[int]
    saved: int
    outlines: list[str]


@dataclass(frozen=True, eq=False)
class Inspection:
    """What is known of one trace. ``unit`` is ``tokens``, or ``words`` where no tokenizer was given."""

    trace: Trace
    layout: BranchLayout
    unit: str
    semantics: str
    blocks: list[BlockFigures]

    @property
    def mask(self) -> IntervalMask:
        return self.layout.mask

    @property
    def density(self) -> float:
        """Visible (row, key) pairs against those of a causal mask of the same length; of an empty trace, 1."""
        total = self.layout.total_tokens
        return self.mask.visible_pairs() / (total * (total + 1) // 2) if total else 1.0


def inspect_text(text: str, tokenizer_path: str | FilePath | None = None, semantics: str = "canonical") -> Inspection:
    """Parses and lays out a trace in the text format; by words, or exactly with a tokenizer.

    Canonical semantics cut the text at the tags (``TagTokens.encode``); released semantics encode it in one piece, as
    the released code does. Raises GrammarError for a malformed trace, ValueError for a tokenizer without the tags.
    """
    parsed, words = parse_text(text)
    outlines = outline_texts(parsed.blocks, words)
    tags = None if tokenizer_path is None else TagTokens.from_tokenizer(load_tokenizer(tokenizer_path))
    from mvkernels.model.curator.statistics import lay_out  # imports PyTorch, which a malformed trace does without

    trace, layout = lay_out(text, tags, semantics)
    positions = layout.position_ids.cpu().numpy()
    blocks = block_figures(trace.blocks, outlines, positions, semantics)
    return Inspection(trace, layout, "words" if tokenizer_path is None else "tokens", semantics, blocks)


def walk(blocks: Sequence[Block]) -> list[tuple[Block, str, int]]:
    """All blocks in the order of the text, with name and depth (from 1). No recursion: traces nest to any depth."""
    found: list[tuple[Block, str, int]] = []
    pending = [(block, str(number), 1) for number, block in reversed(list(enumerate(blocks, start=1)))]
    while pending:
        block, name, depth = pending.pop()
        found.append((block, name, depth))
        inner = [
            (nested, f"{name}.{path_number}/{number}", depth + 1)
            for path_number, path in enumerate(block.paths, start=1)
            for number, nested in enumerate(path.blocks, start=1)
        ]
        pending += reversed(inner)
    return found


def outline_texts(blocks: Sequence[Block], words: Sequence[str]) -> list[list[str]]:
    """Per block, in the order of `walk`, the text of each outline without its index."""
    return [
        [INDEX_PATTERN.sub("", " ".join(words[start + 1 : end - 1]), count=1).strip() for start, end in block.outlines]
        for block, _name, _depth in walk(blocks)
    ]


def block_figures(
    blocks: Sequence[Block], outlines: Sequence[list[str]], positions: np.ndarray, semantics: str
) -> list[BlockFigures]:
    figures = []
    for (block, name, depth), texts in zip(walk(blocks), outlines, strict=True):
        assert block.goal_end is not None and block.end is not None  # a strict parse closes every block
        goal, last = block.goal_end - 1, block.end - 1
        # In both semantics positions run on by one from </Conclusion> to </Parallel>: what they lag behind is saved.
        saved = (last - goal) - int(positions[last] - positions[goal])
        lengths = []
        for path in block.paths:
            assert path.open is not None and path.end is not None
            lengths.append(path.end - (path.open if semantics == "released" else path.start))
        figures.append(BlockFigures(name, depth, block.start, block.end - block.start, lengths, saved, texts))
    return figures


def summary(inspection: Inspection) -> dict[str, object]:
    layout = inspection.layout
    return {
        "unit": inspection.unit,
        "semantics": inspection.semantics,
        "tokens": layout.total_tokens,
        "critical_path": layout.critical_path,
        "parallelism": layout.parallelism,
        "visible_pairs": inspection.mask.visible_pairs(),
        "mask_density": inspection.density,
        "blocks": [asdict(block) for block in inspection.blocks],
    }


def tree_view(inspection: Inspection, title: str, width: int) -> Tree:
    """A rich tree: per block its paths, per path its length and outline; as deep as ``width`` columns can show."""
    max_depth = max(1, (width - LABEL) // INDENT)
    root = Tree(Text(f"{title}  {inspection.layout.total_tokens} {inspection.unit}", style="bold"))
    branches: dict[str, Tree] = {}  # name of a path -> its branch
    for (block, name, depth), figures in zip(walk(inspection.trace.blocks), inspection.blocks, strict=True):
        if depth > max_depth:
            continue
        parent = branches[name.rpartition("/")[0]] if "/" in name else root
        paths = f"{len(block.paths)} path" + ("s" if len(block.paths) != 1 else "")
        node = parent.add(
            Text.assemble(
                ("parallel ", "cyan"),
                (name, "bold cyan"),
                f"  {paths} at {figures.start}, {figures.tokens} {inspection.unit}, {figures.saved} saved",
            )
        )
        for number, (length, outline) in enumerate(zip(figures.path_tokens, figures.outlines, strict=True), start=1):
            line = Text.assemble(
                (f"path {number}", "green"), f"  {length}  ", (outline, "dim"), no_wrap=True, overflow="ellipsis"
            )
            branches[f"{name}.{number}"] = node.add(line)
            if block.paths[number - 1].blocks and depth == max_depth:
                branches[f"{name}.{number}"].add(Text("deeper blocks are not shown", style="dim"))
    return root


def block_table(inspection: Inspection) -> Table:
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for column, justify in (("block", "left"), ("depth", "right"), ("paths", "right"), ("path lengths", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("saved", justify="right")
    for block in inspection.blocks:
        lengths = " ".join(map(str, block.path_tokens))
        table.add_row(block.name, str(block.depth), str(len(block.path_tokens)), lengths, str(block.saved))
    return table


def stored_trace(file: FilePath, number: int) -> tuple[StoredTrace, str, bool]:
    """The trace of a file or folder with that number, from 1, its text, and whether another follows.

    Raises ValueError where there is none, or no trace in its place.
    """
    if number < 1:
        raise ValueError(f"--trace: expected at least 1, got {number}")
    stored = []
    for there, one in enumerate(read_traces([file]), start=1):  # a file without a trace is an error of theirs
        if there >= number:
            stored.append(one)
        if there > number:
            break
    if not stored:
        raise ValueError(f"--trace: expected 1 to {there}, the traces in {file}, got {number}")
    if stored[0].text is None:
        raise ValueError(f"{stored[0].name}: {stored[0].error}")
    return stored[0], stored[0].text, len(stored) > 1


def run(
    file: Annotated[FilePath, typer.Argument(help="Traces: a text file, .jsonl, .parquet, or a folder of such.")],
    tokenizer: Tokenizer = None,
    plot: Annotated[FilePath | None, typer.Option(help="Draw mask and positions to this file.")] = None,
    semantics: Annotated[Semantics, typer.Option(help="The layout to use.")] = Semantics.canonical,
    trace: Annotated[int, typer.Option(help="Which trace of a file or folder with several, from 1.")] = 1,
    as_json: Json = False,
) -> None:
    """Print the figures of one trace of a file or folder, and draw its mask and positions."""
    if plot is not None:
        from mvkernels.cli.plots import check_plot, plot_layout

        check_plot(plot)
    stored, text, more = stored_trace(file, trace)
    try:
        inspection = inspect_text(text, tokenizer, semantics)
    except GrammarError as error:
        raise ValueError(f"{stored.name}: {error}") from None
    title = FilePath(stored.name).name
    if plot is not None:
        plot_layout(inspection.mask, inspection.layout.position_ids.cpu().numpy(), inspection.unit, title, plot)
    if as_json:
        place = {"file": str(stored.file), "record": stored.record}
        print(json.dumps({**place, **summary(inspection)}, indent=1, ensure_ascii=False))
        return
    console = Console()
    layout = inspection.layout
    console.print(tree_view(inspection, title, console.width))
    console.print()
    if inspection.blocks:
        console.print(block_table(inspection))
        console.print()
    pairs = inspection.mask.visible_pairs()
    for name, value in (
        (inspection.unit, str(layout.total_tokens)),
        ("critical path", str(layout.critical_path)),
        ("parallelism", f"{layout.parallelism:.3f}"),
        ("mask density", f"{inspection.density:.3f} of causal ({pairs} visible pairs)"),
        *([("plot", str(plot))] if plot is not None else []),
        *([("next trace", f"--trace {trace + 1}")] if more else []),
    ):
        console.print(f"{name:<14} {value}", highlight=False, soft_wrap=True)
