"""The figures of traces: how many blocks and paths, how wide, deep and long, how parallel; and of sets of traces.

Lengths and # parallel are those of the layout (DESIGN.md, section 1.2): by tokens of a tokenizer, or by words.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mvkernels as mk
from mvkernels.grammar import FIRST_TAG, TAGS, Block, Kind, Trace, parse, parse_text
from mvkernels.tags import TagTokens

#: A vocabulary of words: a tag's id is its kind, and every other word has the id of text.
WORD_TAGS = TagTokens(ids=tuple(range(FIRST_TAG, FIRST_TAG + len(TAGS))))


@dataclass(frozen=True)
class TraceFigures:
    """One trace; lengths in tokens or words, tags included. depth: blocks inside one another.

    widths: paths of each block. path_lengths: of each path with its tags and inner blocks.
    """

    tokens: int
    critical_path: int
    parallelism: float
    depth: int
    widths: tuple[int, ...]
    path_lengths: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return len(self.widths)

    @property
    def paths(self) -> int:
        return len(self.path_lengths)


@dataclass(frozen=True)
class Spread:
    """Of values: how many, and mean, median, least and greatest."""

    count: int
    mean: float
    median: float
    min: float
    max: float


def lay_out(text: str, tags: TagTokens | None = None, semantics: str = "canonical") -> tuple[Trace, mk.BranchLayout]:
    """A trace in the text format, parsed and laid out. tags: with their tokenizer; None: by words.

    Canonical semantics cut the text at the tags (`TagTokens.encode`); released semantics encode it in one piece, as the
    released code does. Raises GrammarError for a malformed trace.
    """
    trace, words = parse_text(text)
    if tags is None:
        kind_of = dict(zip(TAGS, WORD_TAGS.ids, strict=True))
        tags, ids = WORD_TAGS, [kind_of.get(word, int(Kind.TEXT)) for word in words]
    else:
        released = semantics == "released"
        ids = tags.tokenizer.encode(text, add_special_tokens=False) if released else tags.encode(text)
        trace = parse(tags.kinds(ids))
    return trace, mk.BranchLayout.from_token_ids(ids, tags, semantics=semantics)


def trace_figures(text: str, tags: TagTokens | None = None) -> TraceFigures:
    """The figures of a trace in the text format, canonically laid out. tags, errors: as of `lay_out`."""
    trace, layout = lay_out(text, tags)
    widths: list[int] = []
    lengths: list[int] = []
    depth = 0
    level: list[Block] = [*trace.blocks]
    while level:
        depth += 1
        widths += [len(block.paths) for block in level]
        paths = [path for block in level for path in block.paths]
        lengths += [path.end - path.start for path in paths if path.end is not None]
        level = [inner for path in paths for inner in path.blocks]
    return TraceFigures(
        layout.total_tokens, layout.critical_path, layout.parallelism, depth, tuple(widths), tuple(lengths)
    )


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("spread: expected at least one value, got none")
    return Spread(len(values), statistics.fmean(values), float(statistics.median(values)), min(values), max(values))


def measures(figures: Iterable[TraceFigures], unit: str = "tokens") -> dict[str, list[float]]:
    """What a table or a chart shows of a set of traces: the name of each measure -> its values.

    Of each trace tokens, critical path, # parallel, blocks, paths, depth; of each block its width, of each path its
    length: the last two are empty where no trace has a block. unit: what the lengths count, `tokens` or `words`.
    """
    found = [*figures]
    return {
        unit: [one.tokens for one in found],
        "critical path": [one.critical_path for one in found],
        "# parallel": [one.parallelism for one in found],
        "blocks": [one.blocks for one in found],
        "paths": [one.paths for one in found],
        "depth": [one.depth for one in found],
        "width (of a block)": [width for one in found for width in one.widths],
        f"{unit} of a path": [length for one in found for length in one.path_lengths],
    }


def spreads(values: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """The spread of each measure that has values."""
    return {name: spread(found) for name, found in values.items() if found}
