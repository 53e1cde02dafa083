"""Stage 5: outlines, sentences written anew so that each path stands alone, conclusions; and the trace as a text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mvkernels.grammar import INDEX_PATTERN, TAG_PATTERN
from mvkernels.model.curator.answers import Wrong, answer_data, one_line, read_number
from mvkernels.model.curator.refill import Ranges
from mvkernels.model.curator.sentences import Sentences
from mvkernels.model.curator.structure import Node, ParallelBlock, steps_of

_LINE = re.compile(r"[\s>*#-]*(Outline|Edit|Conclusion)\s*+\[?+(\d*+)\]?+[^\w:]*+:\**\s*(.*)", re.IGNORECASE)


@dataclass(frozen=True)
class BlockText:
    """What a model adds to a block. edits: number of a sentence -> its new words."""

    outlines: tuple[str, ...]
    edits: Mapping[int, str]
    conclusion: str


def read_mapreduce(answer: str, paths: int, sentences: range) -> BlockText:
    """The texts of a block of so many paths, whose sentences are those numbers. Raises Wrong."""
    data = answer_data(answer, "mapreduce", lambda text: _from_lines(text, paths))
    outlines = [one_line(text) for text in data["outlines"]]
    if len(outlines) != paths:
        numbers = ", ".join(map(str, range(1, len(outlines) + 1)))
        raise Wrong(f"Expected the outlines 1 to {paths}, got {numbers or 'none'}.")
    edits: dict[int, str] = {}
    for edit in data["edits"]:
        if edit["sentence"] in edits:
            raise Wrong(f"edit {edit['sentence']} is there twice.")
        edits[edit["sentence"]] = edit["text"].strip()
    conclusion = data["conclusion"].strip()
    named = [(f"outline {number}", text) for number, text in enumerate(outlines, start=1)]
    named += [(f"edit {number}", text) for number, text in edits.items()]
    for name, text in (*named, ("conclusion", conclusion)):
        if not text:
            raise Wrong(f"{name} has no text.")
        tag = TAG_PATTERN.search(text)
        if tag is not None:
            raise Wrong(f"{name} has the tag {tag.group()}; write words only.")
    strange = sorted(number for number in edits if number not in sentences)
    if strange:
        raise Wrong(f"Sentence {strange[0]} is not in this block, which has {sentences[0]} to {sentences[-1]}.")
    return BlockText(tuple(map(_without_index, outlines)), edits, conclusion)


def _from_lines(text: str, paths: int) -> Any:
    fields: dict[tuple[str, int], list[str]] = {}
    last: list[str] | None = None
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is not None:
            key = match.group(1).lower(), read_number(match.group(2) or "0")
            if key in fields:
                raise Wrong(f"{' '.join(map(str, key))} is there twice.")
            last = fields[key] = [match.group(3)]
        elif last is not None:
            last.append(line)  # a text of several lines
        elif line.strip():
            raise Wrong(f'Expected "Outline 1: ..." first, got "{line[:80]}".')
    texts = {key: "\n".join(lines) for key, lines in fields.items()}
    numbers = [number for kind, number in texts if kind == "outline"]
    if numbers != list(range(1, paths + 1)):
        raise Wrong(f"Expected the outlines 1 to {paths}, got {', '.join(map(str, numbers)) or 'none'}.")
    if ("conclusion", 0) not in texts:
        raise Wrong('Expected a line "Conclusion: ...", got none.')
    edits = [{"sentence": number, "text": text} for (kind, number), text in texts.items() if kind == "edit"]
    return {"outlines": [texts["outline", n] for n in numbers], "edits": edits, "conclusion": texts["conclusion", 0]}


def _without_index(text: str) -> str:
    """An outline without the index that the trace's own text gives it, where more than that is left."""
    match = INDEX_PATTERN.match(text)
    return (text[match.end() :].strip() or text) if match else text


@dataclass(frozen=True)
class Draft:
    """All that makes a trace: its structure, the sentences of its steps, and the texts of its blocks.

    layers: the edits of each block, the latest last; of two edits of a sentence the later one holds.
    """

    sentences: Sentences
    nodes: tuple[Node, ...]
    ranges: Ranges
    texts: dict[int, BlockText]
    layers: dict[int, dict[int, str]] = field(default_factory=dict)

    @property
    def edits(self) -> dict[int, str]:
        """Number of a sentence -> its new words."""
        return {number: words for layer in self.layers.values() for number, words in layer.items()}

    def put(self, block: ParallelBlock, text: BlockText, alone: bool) -> None:
        """Takes the texts of a block. alone: the other blocks' edits of its sentences are taken back."""
        self.texts[block.number] = text
        self.layers.pop(block.number, None)
        if alone:
            span = self.block_span(block)
            for number, layer in self.layers.items():
                self.layers[number] = {at: words for at, words in layer.items() if at not in span}
        self.layers[block.number] = dict(text.edits)

    def span(self, nodes: Sequence[Node]) -> range:
        """The numbers of the sentences of some adjacent nodes."""
        steps = list(steps_of(nodes))
        return range(self.ranges[steps[0]][0], self.ranges[steps[-1]][1] + 1)

    def block_span(self, block: ParallelBlock) -> range:
        return self.span([block])

    def trace(self) -> str:
        """In the text format."""
        return "<Think>\n" + self._text(self.nodes, "") + "\n</Think>\n"

    def block_trace(self, block: ParallelBlock) -> str:
        """A block alone, as if it stood outside of all others."""
        return self._text([block], "") + "\n"

    def _text(self, nodes: Sequence[Node], prefix: str) -> str:
        edits = self.edits
        parts: list[str] = []
        pending: list[Node] = []
        for node in [*nodes, None]:
            if isinstance(node, str):
                pending.append(node)
                continue
            if pending:  # steps that stand side by side: their text as it was, line breaks and all
                span = self.span(pending)
                parts.append(self.sentences.text(span[0], span[-1], edits))
                pending = []
            if node is not None:
                parts.append(self._block(node, prefix))
        return "\n".join(parts)

    def _block(self, block: ParallelBlock, prefix: str) -> str:
        text = self.texts[block.number]
        lines = ["<Parallel>", "<Goal>"]
        for number, outline in enumerate(text.outlines, start=1):
            lines += ["<Outline>", f"{prefix}{number}: {outline}", "</Outline>"]
        lines.append("</Goal>")
        for number, path in enumerate(block.paths, start=1):
            inner = self._text(path, f"{prefix}{number}.")
            gap = "\n" if inner.startswith("<Parallel>") else " "
            lines += ["<Path>", f"{prefix}{number}:{gap}{inner}", "</Path>"]
        lines += ["<Conclusion>", text.conclusion, "</Conclusion>", "</Parallel>"]
        return "\n".join(lines)


def block_at(text: str, first: int, line: int) -> int:
    """The number of the innermost block at a line of a block's text.

    first: the number of the block; those inside it follow in the order of their beginnings.
    """
    innermost, opened = [first], first
    for words in text.split("\n")[:line]:
        if words == "<Parallel>":
            innermost.append(opened)
            opened += 1
        elif words == "</Parallel>":
            innermost.pop()
    return innermost[-1]
