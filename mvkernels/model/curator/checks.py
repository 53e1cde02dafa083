"""What a curated trace is checked for: grammar, independence of its paths, and how near it is to the original chain.

Paths run at the same time and see neither each other's text nor each other's results, so a path that refers to a
sibling ("similarly", "as in path 1") refers to what is not there. That is found by words: a finding may be a false
alarm where a path refers to its own text or to what stands before its block, which is why it is no error.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from mvkernels._lazy import import_for
from mvkernels.errors import GrammarError
from mvkernels.grammar import FIRST_TAG, INDEX_PATTERN, TAGS, Block, Kind, Path, parse, parse_text, split_words
from mvkernels.model.sequentialize import sequentialize

_KINDS = {tag: FIRST_TAG + i for i, tag in enumerate(TAGS)}


@dataclass(frozen=True)
class Finding:
    """What is wrong at one place. path: its written index, as `2.1`; empty outside of paths. line: from 1."""

    kind: Literal["grammar", "independence"]
    path: str
    message: str
    line: int


@dataclass(frozen=True)
class Place:
    """Where a path stands. index: its numbers from the outside in. widths: the number of paths in the block of each.

    known: the indices of all paths within the same outermost block, as they are written.
    """

    index: tuple[int, ...]
    widths: tuple[int, ...]
    known: frozenset[str]

    @property
    def name(self) -> str:
        return ".".join(map(str, self.index))

    def beside(self, written: str) -> bool:
        """Whether a written index is that of a path at the same time: not of this one, one around it or one in it."""
        if written not in self.known:
            return False
        other = tuple(map(int, written.split(".")))
        return other[: len(self.index)] != self.index[: len(other)]


@dataclass(frozen=True)
class Pattern:
    """Words that refer to a sibling. applies: whether a match in a path at that place does; None: every match does."""

    regex: re.Pattern[str]
    reason: str
    applies: Callable[[re.Match[str], Place], bool] | None = None


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_PATHS = r"(?:paths?|branch(?:es)?|outlines?)"
_WAYS = r"(?:way|manner|fashion|vein|method|approach|procedure|process|reasoning|argument|logic|steps?|calculation)"
_NOT_OF = r"(?! of )"  # the other branch of the hyperbola
# What a path of two or more tends to be. Not a step, a result or an equation, of which each path has its own.
_PARTS = rf"(?:{_PATHS}|(?:sub)?cases?|(?:sub-?)?problems?|scenarios?|options?|approach(?:es)?|methods?|parts?)"
_BEFORE = r"(?:above|before|earlier|previously)"
_SHOWN = r"(?:shown|seen|noted|done|found|computed|calculated|derived|discussed|described|mentioned|stated|explained)"
_SAID = r"(?:did|saw|noted|found|computed|calculated|derived|discussed|showed|have seen)"
_INDEX = r"(?P<index>\d+(?:\.\d+)*)(?!\.?\d)"
_DOTTED = r"(?P<index>\d+(?:\.\d+)+)(?!\.?\d)"


def _index_beside(match: re.Match[str], place: Place) -> bool:
    return place.beside(match["index"])


def _ordinal_beside(match: re.Match[str], place: Place) -> bool:
    """`the second path`: of a block around the path, and not the path itself nor one that it lies in."""
    number = _ORDINALS.index(match["ordinal"].lower()) + 1
    return number not in place.index and any(number <= width for width in place.widths)


def _pattern(regex: str, reason: str, applies: Callable[[re.Match[str], Place], bool] | None = None) -> Pattern:
    return Pattern(re.compile(rf"(?<![\w\\])(?:{regex})(?!\w)", re.IGNORECASE), reason, applies)


#: Every pattern with its reason; matched in a path's own text, its words parted by single spaces.
PATTERNS: tuple[Pattern, ...] = (
    _pattern(r"similarly|likewise|analogously", "compares with what stands before, which a sibling may say"),
    _pattern(rf"in (?:a|the) (?:similar|same|like) {_WAYS}", "repeats a way that a sibling may have gone"),
    _pattern(
        rf"the same {_WAYS} as (?:(?:in|for|with|of|that of) (?:the )?)?(?:{_BEFORE}|previous|preceding|prior|other)",
        "repeats a way that a sibling may have gone",
    ),
    _pattern(rf"by the same {_WAYS}|by the same token", "repeats a reason that a sibling may have given"),
    _pattern(
        rf"as (?:(?:was |were |is |already )?{_SHOWN} |we {_SAID} )?{_BEFORE}",
        "points back, and what stood before may be in a sibling",
    ),
    _pattern(rf"(?:previous|preceding|prior) {_PARTS}", "points to the part before, which is a sibling"),
    _pattern(rf"(?:other|sibling|parallel|remaining) {_PATHS}{_NOT_OF}", "points to other paths of the block"),
    _pattern(
        rf"(?:as|like|unlike|than) (?:(?:in|for|with) )?the other {_PARTS}", "compares with other parts of the block"
    ),
    _pattern(
        rf"(?P<ordinal>{'|'.join(_ORDINALS)}) {_PATHS}{_NOT_OF}",
        "points to another path by its number",
        _ordinal_beside,
    ),
    _pattern(rf"{_PATHS} (?:#|no\. ?)?{_INDEX}", "points to another path by its index", _index_beside),
    # "Case 1" alone is what a path about the first case calls itself, or a case that it makes.
    _pattern(
        rf"(?:as|like|unlike|than|from|see) (?:(?:in|for|with) )?(?:case|part|approach|method|scenario) {_INDEX}",
        "points to another part of the block by its number",
        _index_beside,
    ),
    # "1.2" alone is a number; after these words it may be an index.
    _pattern(
        rf"(?:see|cf\.|step|case|part|item|section|point|result|as in|as for) {_DOTTED}(?! ?[%^*/+=<>≈])",
        "points to another path by its index",
        _index_beside,
    ),
    _pattern(
        rf"(?:in|from|like|unlike) {_DOTTED}(?=[,;:)]|\.(?:\s|$)| we | above)",
        "points to another path by its index",
        _index_beside,
    ),
)


def check_trace(text: str) -> list[Finding]:
    """Everything that is wrong with a trace, in the order of its lines; empty where nothing is.

    text: a trace in the text format. A malformed trace has one finding, of its first error; only in a well-formed one
    are the paths checked for independence, each in its own text, without the blocks in it. Linear in the text.
    """
    try:
        trace, words = parse_text(text)
    except GrammarError as error:
        found = f"expected {error.expected}, found {error.found}"
        return [Finding("grammar", _open_path(text, error.offset), found, error.line or 1)]
    _, lines = split_words(text)
    findings = [
        Finding("independence", place.name, f"'{said}' {reason}", lines[offset])
        for path, place in _placed_paths(trace.blocks)
        for offset, said, reason in _references(path, place, words)
    ]
    return sorted(findings, key=lambda finding: finding.line)


def content_distance(trace: str, original: str) -> float:
    """How far the trace's text is from the chain it was made of: 0 where it says the same, 1 where nothing is kept.

    The Levenshtein distance in characters between the sequentialised trace and the original, over the length of the
    longer one, every run of whitespace counted as one blank; 0 for two empty texts. Raises GrammarError for a malformed
    trace, ImportError without rapidfuzz. Quadratic, at 64 characters a machine word.
    """
    levenshtein: Any = import_for("the distance between a trace and its original", "rapidfuzz.distance.Levenshtein")
    mine, theirs = (" ".join(each.split()) for each in (sequentialize(trace), original))
    return float(levenshtein.normalized_distance(mine, theirs))


def _placed_paths(blocks: tuple[Block, ...]) -> Iterator[tuple[Path, Place]]:
    for outermost in blocks:
        found: list[tuple[Path, tuple[int, ...], tuple[int, ...]]] = []
        pending: list[tuple[Block, tuple[int, ...], tuple[int, ...]]] = [(outermost, (), ())]
        while pending:
            block, index, widths = pending.pop()
            for number, path in enumerate(block.paths, start=1):
                found.append((path, (*index, number), (*widths, len(block.paths))))
                pending += [(inner, *found[-1][1:]) for inner in path.blocks]
        known = frozenset(".".join(map(str, index)) for _, index, _ in found)
        for path, index, widths in found:
            if max(widths) > 1:  # a path that is alone refers to no sibling
                yield path, Place(index, widths, known)


def _references(path: Path, place: Place, words: list[str]) -> Iterator[tuple[int, str, str]]:
    """(offset of the word, what is said, why that refers to a sibling); of matches that overlap, the first."""
    assert path.open is not None and path.end is not None  # a strict parse closes every path
    begins = [path.open + 1, *(block.end or 0 for block in path.blocks)]
    ends = [*(block.start for block in path.blocks), path.end - 1]
    for piece, (first, last) in enumerate(zip(begins, ends, strict=True)):
        if not first < last:
            continue
        text = " ".join(words[first:last])
        starts = [0, *accumulate(len(word) + 1 for word in words[first:last])]
        index = INDEX_PATTERN.match(text) if piece == 0 else None
        begin = 0 if index is None else index.end()
        matches = [
            (match.start(), match.end(), pattern.reason)
            for pattern in PATTERNS
            for match in pattern.regex.finditer(text, begin)
            if pattern.applies is None or pattern.applies(match, place)
        ]
        behind = 0
        for start, end, reason in sorted(matches):
            if start >= behind:
                behind = end
                yield first + bisect_right(starts, start) - 1, text[start:end], reason


def _open_path(text: str, offset: int) -> str:
    """The written index of the innermost path that is open before the word at `offset`, of a text malformed there."""
    words, _ = split_words(text)
    kinds = bytes(_KINDS.get(word, Kind.TEXT) for word in words[:offset])
    blocks = parse(kinds, allow_open=True).blocks
    index: list[int] = []
    while blocks and blocks[-1].end is None and blocks[-1].paths and blocks[-1].paths[-1].end is None:
        paths = blocks[-1].paths
        if paths[-1].open is None:
            break
        index.append(len(paths))
        blocks = paths[-1].blocks
    return ".".join(map(str, index))
