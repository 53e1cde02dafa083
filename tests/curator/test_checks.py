"""The checks of curated traces: grammar findings with their place, references to siblings, false alarms, distance."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from mvkernels.errors import GrammarError
from mvkernels.model.curator.checks import PATTERNS, Finding, check_trace, content_distance
from mvkernels.model.sequentialize import sequentialize
from tests.test_grammar import TRACE

rapidfuzz = pytest.importorskip("rapidfuzz", reason="needs the curate extra: rapidfuzz is not installed")

NESTED = """Before.
<Parallel>
<Goal>
<Outline>
1: First
</Outline>
<Outline>
2: Second
</Outline>
</Goal>
<Path>
1: {first}
</Path>
<Path>
2: {second}
<Parallel>
<Goal>
<Outline>
2.1: As in path 1, similarly
</Outline>
<Outline>
2.2: Likewise
</Outline>
</Goal>
<Path>
2.1: {inner}
</Path>
<Path>
2.2: {last}
</Path>
<Conclusion>
Similarly, as in path 2.1.
</Conclusion>
</Parallel>
{behind}
</Path>
<Conclusion>
As in path 1, likewise.
</Conclusion>
</Parallel>
Similarly, path 1 is above.
"""


def nested(**texts: str) -> str:
    names = ("first", "second", "inner", "last", "behind")
    return NESTED.format(**{name: texts.get(name, "Plain words.") for name in names})


def said(text: str) -> list[tuple[str, str, int]]:
    """(path, the words in quotes, line) of the independence findings; there is no other finding."""
    findings = check_trace(text)
    assert {finding.kind for finding in findings} <= {"independence"}
    return [(finding.path, finding.message.split("'")[1], finding.line) for finding in findings]


def test_goals_conclusions_and_the_text_around_may_refer_to_paths() -> None:
    assert check_trace(nested()) == []


REFERENCES = [
    ("Similarly, x = 2.", ("Similarly",)),
    ("and LIKEWISE for y", ("LIKEWISE",)),
    ("As in path 1, x = 2.", ("path 1",)),
    ("See Path 1.", ("Path 1",)),
    ("the result of paths 1 and 3", ("paths 1",)),
    ("as above, x", ("as above",)),
    ("as\n   was shown\tabove", ("as was shown above",)),
    ("as we found before", ("as we found before",)),
    ("Unlike the previous case, x", ("previous case",)),
    ("the preceding approaches fail", ("preceding approaches",)),
    ("in the same way as before", ("in the same way", "as before")),
    ("with the same method as in the previous one", ("the same method as in the previous",)),
    ("By the same argument it holds", ("By the same argument",)),
    ("In a similar manner", ("In a similar manner",)),
    ("the first path's result", ("first path",)),
    ("while the other paths fail", ("other paths",)),
    ("like the other cases", ("like the other cases",)),
    ("As in case 1, it holds", ("As in case 1",)),
]


@pytest.mark.parametrize(("text", "words"), REFERENCES, ids=[words[0] for _, words in REFERENCES])
def test_a_reference_to_a_sibling_is_found_with_its_line(text: str, words: tuple[str, ...]) -> None:
    assert said(nested(second="Some words.\nThen " + text)) == [("2", word, 16) for word in words]


@pytest.mark.parametrize(
    "text",
    [
        "dissimilarly and likewisely",  # no words of their own
        "\\similarly{x}",
        "as abovementioned",
        "path 2, path 2.1 and path 2.2 are its own",
        "path 3 is no path, and neither is path 1.5",
        "the second path is this one, the third path is none",
        "Case 1: x > 0. Case 2: x < 0. In case 1 it holds.",
        "the previous step and the previous result",
        "the first case, and the other case",
        "the other branch of the hyperbola, the first branch of the logarithm",
        "1.1 times 2.1, from 2.1 to 2.2",
        "the same value as x",
        "as aboveboard",
    ],
)
def test_what_is_no_reference_is_no_finding(text: str) -> None:
    assert said(nested(second=text)) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("From 2.1, x = 3.", "From 2.1"),
        ("see 2.1 for that", "see 2.1"),
        ("as in 2.1 we have", "as in 2.1"),
        ("It is in 2.1 above", "in 2.1"),
        ("by step 2.1 it is", "step 2.1"),
        ("in 2.1: x", "in 2.1"),
        ("path 2.1", "path 2.1"),
        ("path 1", "path 1"),
        ("the first path", "first path"),
        ("from 2.1 to 3.5", None),
        ("in 2.1 seconds", None),
        ("like 2.15, and 2.1.1, and see 2.12", None),
        ("see 2.1%, step 2.1^2", None),
        ("from 2.2, its own", None),
        ("path 2, around it", None),
        ("the second path", None),
    ],
)
def test_indices_of_siblings_are_told_from_numbers(text: str, words: str | None) -> None:
    assert said(nested(last=text)) == ([] if words is None else [("2.2", words, 29)])


def test_each_path_is_checked_in_its_own_text_alone() -> None:
    text = nested(first="Similarly, a.", inner="Likewise b.", behind="as before")
    assert said(text) == [("1", "Similarly", 12), ("2.1", "Likewise", 26), ("2", "as before", 35)]
    # The words of two texts do not join over the block between them.
    assert said(nested(second="It is the previous", behind="case.")) == []


def test_a_path_without_siblings_refers_to_none() -> None:
    alone = "<Parallel><Goal><Outline>1: a</Outline></Goal><Path>1: {}</Path><Conclusion>c</Conclusion></Parallel>"
    assert check_trace(alone.format("Similarly, as above, path 1.")) == []
    deeper = TRACE.replace("2.1: deep", "2.1: likewise")  # alone in its block, which has a sibling
    assert said(deeper) == [("2.1", "likewise", 23)]


def test_words_are_in_one_finding_and_every_pattern_has_a_reason() -> None:
    found = said(nested(second="In the same way as before, path 1."))
    assert [words for _, words, _ in found] == ["In the same way", "as before", "path 1"]
    assert all(pattern.reason for pattern in PATTERNS)


@pytest.mark.parametrize(
    ("wrong", "right", "path", "line", "message"),
    [
        ("2.1: deep", "1: deep", "2.1", 23, "expected the index '2.1:', found '1:'"),
        ("2: second", "3: second", "", 8, "expected the index '2:', found '3:'"),
        ("1: one two\n", "1: one <Goal> two\n", "1", 12, "expected text, <Parallel> or </Path>, found <Goal>"),
        ("After\n", "<Path>\n", "", 34, "expected text, <Think>, <Parallel> or the end, found <Path>"),
        ("c\n</Conclusion>", "c\n", "2", 28, "expected text or </Conclusion>, found </Parallel>"),
        ("</Path>\n<Path>\n2: a", "</Path>\nlost\n<Path>\n2: a", "", 14, "expected <Path> 2 of 2, found text"),
    ],
)
def test_a_malformed_trace_is_one_finding_with_its_place(
    wrong: str, right: str, path: str, line: int, message: str
) -> None:
    assert wrong in TRACE
    assert check_trace(TRACE.replace(wrong, right)) == [Finding("grammar", path, message, line)]


def test_the_distance_by_hand() -> None:
    plain = sequentialize(TRACE)
    assert plain == "Before\none two\na\ndeep\nAfter"
    assert content_distance(TRACE, "  Before one two\n\na deep   After\n") == 0
    assert content_distance(TRACE, "Before one two a deep Then") == pytest.approx(4 / 27)  # After -> Then
    assert content_distance(TRACE, "") == 1
    assert content_distance("", "") == content_distance(" \n", "\t") == 0
    with pytest.raises(GrammarError):
        content_distance("<Path>", "")


def test_without_rapidfuzz_the_distance_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rapidfuzz"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(ImportError, match=r"its original needs rapidfuzz, .*pip install 'mvkernels\[curate\]'"):
        content_distance("", "")
    assert check_trace(TRACE) == []


def test_linear_in_paths_and_in_matches() -> None:
    count = 5000
    goal = "".join(f"<Outline>{i}: m</Outline>" for i in range(1, count + 1))
    paths = "".join(f"<Path>{i}: Similarly path 1 first path as above</Path>" for i in range(1, count + 1))
    started = time.perf_counter()
    found = check_trace(f"<Parallel><Goal>{goal}</Goal>{paths}<Conclusion>c</Conclusion></Parallel>")
    assert len(found) == 4 * count - 2
    assert time.perf_counter() - started < 20  # 0.5 s here; minutes if it were quadratic


@pytest.mark.real_data
def test_published_traces_are_well_formed_and_16_paths_say_similarly(data_dir: Path) -> None:
    files = sorted((data_dir / "multiverse_1k").glob("*.xml"))
    assert len(files) == 16
    paths = findings = 0
    saying = set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        paths += text.count("</Path>")
        for finding in check_trace(text):
            assert finding.kind == "independence"
            word = finding.message.split("'")[1]
            assert word.lower() in " ".join(text.split("\n")[finding.line - 1 : finding.line + 1]).lower()
            findings += 1
            if word.lower() in ("similarly", "likewise"):
                saying.add((file.name, opening_line(text, finding.line)))
        assert content_distance(text, sequentialize(text)) == 0
        assert 0 < content_distance(text, sequentialize(text)[:-100]) < 0.05
    # 289 paths in all, 257 of them without a block of their own.
    assert (paths, len(saying)) == (289, 16)
    assert findings == 28


def opening_line(text: str, line: int) -> int:
    """The line of the <Path> in which a line stands, each tag on a line of its own."""
    open_lines = []
    for number, found in enumerate(text.split("\n")[:line], start=1):
        if found.strip() == "<Path>":
            open_lines.append(number)
        elif found.strip() == "</Path>":
            open_lines.pop()
    return open_lines[-1]
