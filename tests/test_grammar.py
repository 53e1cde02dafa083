"""The parser: what it accepts, where each part begins, and how it refuses."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given

from mvkernels.errors import GrammarError
from mvkernels.grammar import Kind, parse, parse_text
from tests.support.trees import TEST_TAGS, traces

TRACE = """Before
<Parallel>
<Goal>
<Outline>
1: first
</Outline>
<Outline>
2: second
</Outline>
</Goal>
<Path>
1: one two
</Path>
<Path>
2: a
<Parallel>
<Goal>
<Outline>
2.1: inner
</Outline>
</Goal>
<Path>
2.1: deep
</Path>
<Conclusion>
c
</Conclusion>
</Parallel>
</Path>
<Conclusion>
joined
</Conclusion>
</Parallel>
After
"""


def test_text_trace_has_the_expected_tree() -> None:
    trace, words = parse_text(TRACE)
    assert trace.length == len(words)
    (block,) = trace.blocks
    assert words[block.start] == "<Parallel>" and words[block.end - 1] == "</Parallel>"
    assert [words[a] for a, _ in block.outlines] == ["<Outline>", "<Outline>"]
    assert [words[path.open] for path in block.paths] == ["<Path>", "<Path>"]
    assert words[block.conclusion] == "<Conclusion>"
    (inner,) = block.paths[1].blocks
    assert words[inner.paths[0].open + 1] == "2.1:"
    # Before <Parallel> <Goal> 2 x (<Outline> i: word </Outline>) </Goal> = 12; the rest is counted in the same way.
    assert trace.tree == [12, [[5], [10, [[4]], 5]], 5]


def kinds_of(spec: str) -> bytes:
    """`P G O /O /G` to kinds: the first letters of tags, `.` for text, `_` for whitespace."""
    names = {"T": "THINK", "P": "PARALLEL", "G": "GOAL", "O": "OUTLINE", "A": "PATH", "C": "CONCLUSION"}
    out = []
    for word in spec.split():
        if word in "._":
            out.append(Kind.TEXT if word == "." else Kind.SPACE)
        else:
            out.append(Kind[names[word[-1]] + ("_END" if word[0] == "/" else "")])
    return bytes(out)


BLOCK = "P G O . /O /G A . /A C . /C /P"
MALFORMED = {
    "path outside a block": ("A", 0, "<Parallel>", "<Path>"),
    "closing tag at the start": ("/P", 0, "<Parallel>", "</Parallel>"),
    "unclosed think": ("T .", 2, "</Think>", "the end"),
    "think in think": ("T T", 1, "</Think>", "<Think>"),
    "unclosed block": ("P G O /O /G A . /A", 8, "<Conclusion>", "the end"),
    "no goal": ("P A", 1, "<Goal>", "<Path>"),
    "text before the goal": ("P _ . G", 2, "<Goal>", "text"),
    "empty goal": ("P G _ /G", 3, "<Outline>", "</Goal>"),
    "text between outlines": ("P G O /O _ .", 5, "<Outline> or </Goal>", "text"),
    "nested outline": ("P G O O", 3, "</Outline>", "<Outline>"),
    "too few paths": ("P G O /O O /O /G A /A C", 9, "<Path> 2 of 2", "<Conclusion>"),
    "too many paths": ("P G O /O /G A /A A", 7, "<Conclusion> after 1", "<Path>"),
    "text between paths": ("P G O /O /G A /A .", 7, "<Conclusion>", "text"),
    "misnested close": ("P G O /O /G A P /A", 7, "<Goal>", "</Path>"),
    "think inside a path": ("P G O /O /G A T", 6, "</Path>", "<Think>"),
    "block inside a conclusion": ("P G O /O /G A /A C P", 8, "</Conclusion>", "<Parallel>"),
    "text after the conclusion": ("P G O /O /G A /A C /C . /P", 9, "</Parallel>", "text"),
    "think closed inside a block": ("T P G O /O /G A /T", 7, "</Path>", "</Think>"),
}


@pytest.mark.parametrize(("spec", "offset", "expected", "found"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_input_names_offset_expected_and_found(spec: str, offset: int, expected: str, found: str) -> None:
    with pytest.raises(GrammarError) as caught:
        parse(kinds_of(spec))
    assert caught.value.offset == offset
    assert expected in caught.value.expected
    assert caught.value.found == found
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_allow_open_does_not_excuse_misnesting() -> None:
    with pytest.raises(GrammarError):
        parse(kinds_of("P G O /O /G A P /A"), allow_open=True)


def test_whitespace_at_a_cut_belongs_to_what_must_come_next() -> None:
    head = "P G O /O O /O /G A . /A"
    after_first = parse(kinds_of(f"{head} _"), allow_open=True).blocks[0]
    assert [(path.start, path.open, path.end) for path in after_first.paths] == [(7, 7, 10), (10, None, None)]
    after_last = parse(kinds_of(f"{head} A /A _"), allow_open=True).blocks[0]
    assert len(after_last.paths) == 2 and after_last.conclusion == 12
    no_space = parse(kinds_of(f"{head} A /A"), allow_open=True).blocks[0]
    assert no_space.conclusion is None and no_space.end is None


@given(traces())
def test_every_prefix_of_a_trace_is_an_open_trace(ids: list[int]) -> None:
    kinds = TEST_TAGS.kinds(ids)
    parse(kinds)
    for cut in range(len(kinds) + 1):
        trace = parse(kinds[:cut], allow_open=True)
        assert trace.length == cut
        assert tree_length(trace.tree) == cut


def tree_length(sequence: list) -> int:
    return sum(item if isinstance(item, int) else sum(map(tree_length, item)) for item in sequence)


def test_depth_has_no_limit() -> None:
    depth = 5000
    spec = ["P G O /O /G A"] * depth + ["/A C /C /P"] * depth
    trace = parse(kinds_of(" ".join(spec)))
    assert trace.length == 10 * depth


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("2: second", "3: second", r"line 8, token 8: expected the index '2:', found '3:'"),
        ("1: one two", "one two", r"line 12, .*expected the index '1:', found 'one'"),
        ("2.1: deep", "1: deep", r"line 23, .*expected the index '2.1:', found '1:'"),
        ("2.1: inner", "", r"line 20, .*expected the index '2.1:', found '</Outline>'"),
    ],
    ids=["outline", "path without", "nested path", "empty outline"],
)
def test_wrong_indices_are_refused(wrong: str, right: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        parse_text(TRACE.replace(wrong, right))


def test_an_index_may_touch_its_text() -> None:
    parse_text(TRACE.replace("1: one two", "1:**one** two"))
