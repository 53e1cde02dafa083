"""The Multiverse control-tag grammar: a strict, linear-time parser, independent of the tokenizer.

    sequence   := (item | think)*                 think := <Think> item* </Think>          item := text | parallel
    parallel   := <Parallel> goal path{n} conclusion </Parallel>
    goal       := <Goal> outline{n} </Goal>       outline := <Outline> text </Outline>     n >= 1
    path       := <Path> item* </Path>            conclusion := <Conclusion> text </Conclusion>

Only whitespace may stand between the parts of a block. The parser reads one *kind* per token, so it serves every
vocabulary and plain words alike. Source of the format: Multiverse, arXiv 2506.09991, section 4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeAlias

from mvkernels.errors import GrammarError

#: The twelve control tags, in the order of their kinds.
TAGS: tuple[str, ...] = tuple(
    form.format(name)
    for name in ("Think", "Parallel", "Goal", "Outline", "Path", "Conclusion")
    for form in ("<{}>", "</{}>")
)
TAG_PATTERN = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")
INDEX_PATTERN = re.compile(r"(\d+(?:\.\d+)*):")
#: What counts as whitespace, in text and in vocabularies.
WHITESPACE = " \t\n\r\f\v"
#: The layouts that a trace may be given: that of DESIGN.md, section 1.2, and that of the released code.
SEMANTICS = ("canonical", "released")

#: A sequence is a list of text lengths and blocks; a block is a list of sequences.
Tree: TypeAlias = Sequence[Any]


class Kind(IntEnum):
    """What a token is to the grammar; the control tags start at 4, in the order of `TAGS`."""

    TEXT = 0
    SPACE = 1
    INDEX = 2  # digits and dots only: part of a path index
    INDEX_END = 3  # the same with the closing colon
    THINK = 4
    THINK_END = 5
    PARALLEL = 6
    PARALLEL_END = 7
    GOAL = 8
    GOAL_END = 9
    OUTLINE = 10
    OUTLINE_END = 11
    PATH = 12
    PATH_END = 13
    CONCLUSION = 14
    CONCLUSION_END = 15

    __hash__ = int.__hash__  # Enum's own is Python, and kinds are looked up for every token


FIRST_TAG = int(Kind.THINK)
_SPACE_BYTE = bytes([Kind.SPACE])
_TAG_BYTES = re.compile(rb"[\x04-\x0f]")


def tag_name(kind: int) -> str:
    """Name a kind in messages: `</Goal>` for `Kind.GOAL_END`; `text` or `whitespace` for kinds that are no tag."""
    if kind >= FIRST_TAG:
        return TAGS[kind - FIRST_TAG]
    return ("text", "whitespace", "text", "text")[kind]


@dataclass(frozen=True, slots=True)
class Path:
    """One path of a block; offsets count tokens.

    Attributes:
        start: First token of the canonical span, which includes the whitespace before `<Path>`.
        open: Offset of `<Path>`; None if the trace ends before it.
        end: Offset behind `</Path>`; None if the path is open.
        blocks: Blocks nested in the path.
        tree: Structure of the path.
    """

    start: int
    open: int | None
    end: int | None
    blocks: tuple[Block, ...]
    tree: Tree = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Block:
    """One `<Parallel>` block; offsets count tokens.

    Attributes:
        start: Offset of `<Parallel>`.
        goal_end: Offset behind `</Goal>`; None if the goal is open.
        outlines: (start, end) spans, tags included; an open outline ends with the trace.
        paths: Paths so far, in order.
        conclusion: First token of the conclusion's canonical span, which includes the whitespace before `<Conclusion>`;
            or None.
        end: Offset behind `</Parallel>`; None if the block is open.
    """

    start: int
    goal_end: int | None
    outlines: tuple[tuple[int, int], ...]
    paths: tuple[Path, ...]
    conclusion: int | None
    end: int | None


@dataclass(frozen=True, slots=True)
class Trace:
    """A parsed list of tokens.

    Attributes:
        length: Number of tokens.
        blocks: The outermost blocks.
        tree: Structure without tokens, for `BranchLayout.from_tree`.
    """

    length: int
    blocks: tuple[Block, ...]
    tree: Tree = field(repr=False, compare=False)

    @property
    def is_open(self) -> bool:
        """Whether the trace ends inside a block."""
        return bool(self.blocks) and self.blocks[-1].end is None


class _OpenBlock:
    """A block while it is being read."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.goal_end: int | None = None
        self.outlines: list[tuple[int, int]] = []
        self.paths: list[Path] = []
        self.conclusion: int | None = None

    def close(self, end: int | None) -> Block:
        return Block(self.start, self.goal_end, tuple(self.outlines), tuple(self.paths), self.conclusion, end)


class _OpenPath:
    """A path (or, with `open_at` None, the trunk) while it is being read."""

    def __init__(self, start: int, open_at: int | None) -> None:
        self.start = start
        self.open_at = open_at
        self.blocks: list[Block] = []

    def tree(self, end: int) -> Tree:
        """Return the structure of the tokens from `start` to `end`. The trees of inner paths exist already."""
        items: list[Any] = []
        cursor = self.start
        for block in self.blocks:
            if not block.paths:
                continue  # still in its goal: all text so far
            items.append(block.paths[0].start - cursor)
            items.append([path.tree for path in block.paths])
            last = block.paths[-1].end
            cursor = block.conclusion if block.conclusion is not None else end if last is None else last
        items.append(end - cursor)
        return items

    def close(self, end: int | None, length: int) -> Path:
        stop = length if end is None else end
        return Path(self.start, self.open_at, end, tuple(self.blocks), self.tree(stop))


# States of the parser: the innermost open element. The states of _SPACE_ONLY allow no text.
_TRUNK, _THINK, _ITEMS, _BLOCK, _GOAL, _OUTLINE, _PATHS, _CONCLUSION, _CLOSING = range(9)
_SPACE_ONLY = frozenset((_BLOCK, _GOAL, _PATHS, _CLOSING))


class _Parser:
    def __init__(self, kinds: bytes) -> None:
        self.kinds = kinds
        self.state = _TRUNK
        self.paths = [_OpenPath(0, None)]  # the trunk, then the open paths from the outside in
        self.blocks: list[_OpenBlock] = []  # the open blocks from the outside in
        self.think_start: int | None = None
        self.previous = 0  # offset behind the last tag read

    def expected(self) -> str:
        """Describe what the grammar allows here, for messages."""
        block = self.blocks[-1] if self.blocks else None
        if self.state == _TRUNK:
            return "text, <Think>, <Parallel> or the end"
        if self.state == _THINK:
            return "text, <Parallel> or </Think>"
        if self.state == _ITEMS:
            return "text, <Parallel> or </Path>"
        if self.state == _GOAL and block is not None:
            return "<Outline> or </Goal>" if block.outlines else "<Outline>"
        if self.state == _PATHS and block is not None:
            done, wanted = len(block.paths), len(block.outlines)
            return f"<Path> {done + 1} of {wanted}" if done < wanted else f"<Conclusion> after {wanted} paths"
        if self.state == _OUTLINE:
            return "text or </Outline>"
        if self.state == _CONCLUSION:
            return "text or </Conclusion>"
        return "<Goal>" if self.state == _BLOCK else "</Parallel>"

    def fail(self, offset: int) -> GrammarError:
        found = tag_name(self.kinds[offset]) if offset < len(self.kinds) else "the end"
        return GrammarError(offset, self.expected(), found)

    def check_gap(self, end: int) -> None:
        """Refuse text between the parts of a block."""
        if self.state in _SPACE_ONLY:
            gap = self.kinds[self.previous : end]
            rest = gap.lstrip(_SPACE_BYTE)
            if rest:
                raise self.fail(self.previous + len(gap) - len(rest))

    def read(self, offset: int, kind: int) -> None:
        """Take the tag at `offset`."""
        self.check_gap(offset)
        state, after = self.state, offset + 1
        if kind == Kind.PARALLEL and state in (_TRUNK, _THINK, _ITEMS):
            self.blocks.append(_OpenBlock(offset))
            self.state = _BLOCK
        elif kind == Kind.THINK and state == _TRUNK:
            self.think_start, self.state = offset, _THINK
        elif kind == Kind.THINK_END and state == _THINK:
            self.think_start, self.state = None, _TRUNK
        elif kind == Kind.PATH_END and state == _ITEMS:
            self.blocks[-1].paths.append(self.paths.pop().close(after, len(self.kinds)))
            self.state = _PATHS
        elif not self.blocks or not self.read_part(offset, kind, self.blocks[-1]):
            raise self.fail(offset)
        self.previous = after

    def read_part(self, offset: int, kind: int, block: _OpenBlock) -> bool:
        """Read a tag between the parts of a block; False where it is not allowed."""
        state, after = self.state, offset + 1
        if state == _BLOCK and kind == Kind.GOAL:
            self.state = _GOAL
        elif state == _GOAL and kind == Kind.OUTLINE:
            block.outlines.append((offset, len(self.kinds)))
            self.state = _OUTLINE
        elif state == _OUTLINE and kind == Kind.OUTLINE_END:
            block.outlines[-1] = (block.outlines[-1][0], after)
            self.state = _GOAL
        elif state == _GOAL and kind == Kind.GOAL_END and block.outlines:
            block.goal_end = after
            self.state = _PATHS
        elif state == _PATHS and kind == Kind.PATH and len(block.paths) < len(block.outlines):
            self.paths.append(_OpenPath(self.previous, offset))
            self.state = _ITEMS
        elif state == _PATHS and kind == Kind.CONCLUSION and len(block.paths) == len(block.outlines):
            block.conclusion = self.previous
            self.state = _CONCLUSION
        elif state == _CONCLUSION and kind == Kind.CONCLUSION_END:
            self.state = _CLOSING
        elif state == _CLOSING and kind == Kind.PARALLEL_END:
            self.paths[-1].blocks.append(self.blocks.pop().close(after))
            self.state = self.items_state()
        else:
            return False
        return True

    def items_state(self) -> int:
        """The state of a sequence of items, after a block in it has closed."""
        if len(self.paths) > 1:
            return _ITEMS
        return _TRUNK if self.think_start is None else _THINK

    def cut(self) -> None:
        """Close what the end of the tokens left open."""
        length = len(self.kinds)
        if self.state == _PATHS and self.previous < length:
            # Whitespace at the cut belongs to what must come next.
            block = self.blocks[-1]
            if len(block.paths) < len(block.outlines):
                block.paths.append(_OpenPath(self.previous, None).close(None, length))
            else:
                block.conclusion = self.previous
        # The open blocks lie inside one another: path, block, path, ..., and the innermost may lie in its goal or
        # paths.
        while self.blocks:
            if len(self.paths) - 1 == len(self.blocks):
                self.blocks[-1].paths.append(self.paths.pop().close(None, length))
            self.paths[-1].blocks.append(self.blocks.pop().close(None))

    def finish(self, allow_open: bool) -> Trace:
        length = len(self.kinds)
        self.check_gap(length)
        if self.state != _TRUNK:
            if not allow_open:
                raise self.fail(length)
            self.cut()
        trunk = self.paths[0]
        return Trace(length, tuple(trunk.blocks), trunk.tree(length))


def parse(kinds: bytes, allow_open: bool = False) -> Trace:
    """Parse one kind per token into blocks and paths, in linear time.

    Args:
        kinds: [T] bytes, one `Kind` per token (see `TagTokens.kinds`).
        allow_open: Accept a trace that ends anywhere, with blocks still open.

    Returns:
        The blocks and the structure of the trace.

    Raises:
        GrammarError: The tags are malformed; gives the token offset, what is allowed there, and what was found.

    Source: arXiv 2506.09991, section 4.
    """
    parser = _Parser(kinds)
    for match in _TAG_BYTES.finditer(kinds):
        parser.read(match.start(), kinds[match.start()])
    return parser.finish(allow_open)


def split_words(text: str) -> tuple[list[str], list[int]]:
    """Cut a text into tags and words; returns them and the line (from 1) of each."""
    words: list[str] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        for piece in TAG_PATTERN.split(line):
            found = [piece] if piece in _TAG_KIND else piece.split()
            words += found
            lines += [number] * len(found)
    return words, lines


_TAG_KIND = {tag: FIRST_TAG + i for i, tag in enumerate(TAGS)}


def parse_text(text: str, allow_open: bool = False) -> tuple[Trace, list[str]]:
    """Parse a trace in the text format; its tokens are tags and words.

    Also checks that the k-th outline and the k-th path of a block begin with their index (`1:`, nested `2.1:`).

    Args:
        text: A trace.
        allow_open: Accept a trace that ends anywhere, with blocks still open.

    Returns:
        The trace, and the words that its offsets count.

    Raises:
        GrammarError: The tags or an index are malformed; the message also has the line.
    """
    words, lines = split_words(text)
    kinds = bytes(_TAG_KIND.get(word, Kind.TEXT) for word in words)
    try:
        trace = parse(kinds, allow_open)
        check_indices(trace, words)
    except GrammarError as error:
        line = lines[error.offset] if error.offset < len(lines) else (lines[-1] if lines else 1)
        raise GrammarError(error.offset, error.expected, error.found, line=line) from None
    return trace, words


def check_indices(trace: Trace, words: Sequence[str]) -> None:
    """Check that the k-th outline and the k-th path of a block begin with their index: `k:`, inside path 2 `2.k:`.

    words: the words that the offsets of `trace` count. Raises GrammarError.
    """
    pending: list[tuple[tuple[Block, ...], str]] = [(trace.blocks, "")]
    while pending:
        blocks, prefix = pending.pop()
        for block in blocks:
            for number, (start, end) in enumerate(block.outlines, start=1):
                _check_index(words, start + 1, end, f"{prefix}{number}", "</Outline>")
            for number, path in enumerate(block.paths, start=1):
                if path.open is None:
                    continue
                end = len(words) if path.end is None else path.end
                _check_index(words, path.open + 1, end, f"{prefix}{number}", "</Path>")
                pending.append((path.blocks, f"{prefix}{number}."))


def _check_index(words: Sequence[str], offset: int, end: int, index: str, closing: str) -> None:
    if offset >= end:
        return  # cut right behind the tag
    found = words[offset]
    match = INDEX_PATTERN.match(found)
    if found != closing and match is not None and match.group(1) == index:
        return
    raise GrammarError(offset, f"the index '{index}:'", repr(found))
