"""Random structures for property tests: trees of text lengths and blocks, and the tagged token lists that have them."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from mvkernels.grammar import FIRST_TAG, TAGS, Kind
from mvkernels.tags import TagTokens

#: A vocabulary of its own: tag ids first, then whitespace, index tokens, and text.
TEST_TAGS = TagTokens(
    ids=tuple(range(len(TAGS))),
    space_ids=frozenset({12, 13}),
    index_ids=frozenset({14, 15}),
    index_end_ids=frozenset({16}),
    texts={12: "\n", 13: " ", 14: "1", 15: "2.", 16: ":"},
)
TEXT_IDS = range(17, 40)


def trees(max_depth: int = 3, max_paths: int = 4, max_length: int = 9) -> st.SearchStrategy:
    """Sequences as `BranchLayout.from_tree` takes them: odd lengths, empty and one-token paths, chained and nested
    blocks.
    """
    lengths = st.integers(0, max_length)

    def sequence(depth: int) -> st.SearchStrategy:
        if depth == 0:
            return st.lists(lengths, max_size=2)
        block = st.lists(sequence(depth - 1), min_size=1, max_size=max_paths)
        return st.lists(st.one_of(lengths, block), max_size=4)

    return sequence(max_depth)


def random_tree(seed: int, depth: int = 3) -> list[Any]:
    """A tree outside of hypothesis, with a few hundred tokens at most."""
    chosen = random.Random(seed)

    def sequence(depth: int) -> list[Any]:
        parts: list[Any] = [chosen.randint(0, 40)]
        for _ in range(chosen.randint(0, 2) if depth else 0):
            parts += [[sequence(depth - 1) for _ in range(chosen.randint(1, 4))], chosen.randint(1, 9)]
        return parts

    return [1, *sequence(depth)]


@st.composite
def traces(draw: st.DrawFn, max_depth: int = 2, max_paths: int = 3) -> list[int]:
    """Well-formed token ids over `TEST_TAGS`, with whitespace drawn everywhere it may stand."""
    out: list[int] = []

    def tag(kind: Kind) -> None:
        out.append(TEST_TAGS.ids[kind - FIRST_TAG])

    def space() -> None:
        out.extend(draw(st.lists(st.sampled_from([12, 13]), max_size=2)))

    def text(low: int = 0) -> None:
        out.extend(draw(st.lists(st.sampled_from([12, 14, 16, *TEXT_IDS]), min_size=low, max_size=5)))

    def items(depth: int) -> None:
        text()
        for _ in range(draw(st.integers(0, 2)) if depth else 0):
            block(depth - 1)
            text()

    def block(depth: int) -> None:
        tag(Kind.PARALLEL)
        space()
        tag(Kind.GOAL)
        paths = draw(st.integers(1, max_paths))
        for _ in range(paths):
            space()
            tag(Kind.OUTLINE)
            text()
            tag(Kind.OUTLINE_END)
        space()
        tag(Kind.GOAL_END)
        for _ in range(paths):
            space()
            tag(Kind.PATH)
            items(depth)
            tag(Kind.PATH_END)
        space()
        tag(Kind.CONCLUSION)
        text()
        tag(Kind.CONCLUSION_END)
        space()
        tag(Kind.PARALLEL_END)

    items(max_depth)
    if draw(st.booleans()):
        tag(Kind.THINK)
        items(max_depth)
        tag(Kind.THINK_END)
        items(0)
    return out
