"""What the curator makes of answers, stage by stage: what is read, and what is told to the model when it is wrong."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvkernels.grammar import parse_text
from mvkernels.model.curator.answers import Wrong, answer_data
from mvkernels.model.curator.asking import Answer, Message
from mvkernels.model.curator.chains import Chain
from mvkernels.model.curator.groups import Group, read_groups
from mvkernels.model.curator.job import Rules
from mvkernels.model.curator.mapreduce import BlockText, Draft, block_at, read_mapreduce
from mvkernels.model.curator.pipeline import Pipeline
from mvkernels.model.curator.prompts import FOLDER, STAGES, Form, form_of, prompts_version, read_prompt, render
from mvkernels.model.curator.refill import read_ranges
from mvkernels.model.curator.sentences import Sentences
from mvkernels.model.curator.structure import ParallelBlock, read_structure
from mvkernels.model.curator.summary import read_summary
from tests.curator import script as curator_script
from tests.curator.cases import COUNTING, NESTED

SUMMARY = "S1: start\nS2: two ways\nS2.1: one\nS2.2: other\nS3: more\nS4: end"
STEPS = read_summary(SUMMARY, 9)
NEEDS = "Needs:\nS1 <- none\nS2 <- S1\nS3 <- S1\nS4 <- S2, S3\nS2.1 <- none\nS2.2 <- none\n"
GROUPS = NEEDS + "Groups:\nS1\nS2 || S3 : neither uses the other\nS4\nS2.1 || S2.2 : separate"
FOUND = read_groups(GROUPS, STEPS)
STRUCTURE = """S1
<Parallel>
<Path>
<Parallel>
<Path>
S2.1
</Path>
<Path>
S2.2
</Path>
</Parallel>
</Path>
<Path>
S3
</Path>
</Parallel>
S4"""


@given(st.text(alphabet="ab .!?\n\t1)\"'é", max_size=200))
def test_sentences_are_the_text_cut(text: str) -> None:
    sentences = Sentences.of(text)
    assert "".join(sentences.pieces) == text
    assert len(sentences) == 1 or all(piece.strip() for piece in sentences.pieces)
    assert sentences.text(1, len(sentences)) == text.strip()


def test_a_number_ends_a_sentence_and_an_item_does_not() -> None:
    text = "The sum is 7. Try two: 1. Go on. 2. Stop at x = 12."
    assert Sentences.of(text).pieces == ("The sum is 7. ", "Try two: 1. Go on. ", "2. Stop at x = 12.")


def test_sentences_of_other_scripts_and_line_ends() -> None:
    assert Sentences.of("好的。我们先试试？对！").pieces == ("好的。", "我们先试试？", "对！")
    assert Sentences.of("One.\r\n\r\nTwo\u2028three.\r\n").pieces == ("One.\r\n\r\n", "Two\u2028three.\r\n")


def test_sentences_end_where_a_reader_ends_them() -> None:
    text = 'It is 3.5, e.g. so. "Is it?" Yes!\n\n1. First item\n2. Second.'
    assert Sentences.of(text).pieces == (
        "It is 3.5, e.g. so. ",
        '"Is it?" ',
        "Yes!\n\n",
        "1. First item\n",
        "2. Second.",
    )
    assert Sentences.of(text).numbered(3, 5) == "[3] Yes!\n\n[4] 1. First item\n[5] 2. Second."
    assert Sentences.of(text).text(1, 3, {2: "Is it so?"}) == "It is 3.5, e.g. so. Is it so? Yes!"


@pytest.mark.parametrize("text", ["!" * 200_000, " " * 200_000 + "x", "\n \n" * 70_000, "a. " * 70_000, "x" * 200_000])
def test_sentences_take_linear_time(text: str) -> None:
    started = time.perf_counter()
    assert "".join(Sentences.of(text).pieces) == text
    assert time.perf_counter() - started < 5  # 0.3 s here; minutes if it were quadratic


@pytest.mark.parametrize(
    "answer",
    [
        SUMMARY,
        f"<think>S9: hm</think>\n```\n{SUMMARY}\n```",
        SUMMARY.replace("S1: start", "**S1:** start").replace("S2.1", "- S2.1"),
        json.dumps(
            {"steps": [dict(zip(("id", "text"), line.split(": "), strict=True)) for line in SUMMARY.split("\n")]}
        ),
    ],
)
def test_a_summary_is_read_in_every_form(answer: str) -> None:
    assert read_summary(answer, 9) == STEPS
    assert STEPS[1].leaves == ("S2.1", "S2.2")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "The answer is empty."),
        ("Sure!", 'Expected lines of the form "S1: text", got none|got "Sure!"'),
        ("S1: a\nS3: b", "Expected S2, got S3"),
        ("S1: a\nS1.2: b", "Expected S1.1, got S1.2"),
        ("S1: a\nS2.1: b", "S2.1 does not stand behind its step S2"),
        ("S1: a\nS1.1: b", "S1 has one substep"),
        ("S1: a\nS1.1.1: b", "S1.1.1 is a third level"),
        ("S1:", "S1 has no text"),
        ("S1: a\nS2: b\nS3: c", "There are 3 steps for 2 sentences"),
        ("\n".join(f"S{i}: a" for i in range(1, 122)), "The tree has 121 steps; it may have 120 at most"),
        ('{"steps": [{"id": "S1"}]}', "has not the form that was asked for"),
        ('{"steps": [', "no complete JSON object"),
    ],
)
def test_wrong_summaries(answer: str, message: str) -> None:
    with pytest.raises(Wrong, match=message):
        read_summary(answer, 2 if "S3: c" in answer else 200)


def test_groups_are_read() -> None:
    assert (
        Group((("S2",), ("S3",)), "neither uses the other"),
        Group((("S2.1",), ("S2.2",)), "separate"),
    ) == FOUND


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("S3 <- S1", "S3 <- S1, S2", r"S3 needs S2, as you say, so they cannot be on different paths .* S2 \|\| S3"),
        ("S2.2 <- none", "S2.2 <- S2.1", "S2.2 needs S2.1"),
        ("S4 <- S2, S3\n", "", 'The list "Needs" says nothing of S4'),
        ("\nS4\nS2.1 ||", "\nS2.1 ||", "Expected every one of S1, S2, S3, S4 in exactly one group"),
        ("S2.1 || S2.2 : separate", "S2.2 || S2.1", "Expected every one of S2.1, S2.2 .* got S2.2, S2.1"),
        ("S2 || S3", "S2.1 || S3", "different levels"),
        ("S1\nS2 ||", "S1 + S9\nS2 ||", "There is no step S9"),
    ],
)
def test_wrong_groups(old: str, new: str, message: str) -> None:
    assert old in GROUPS
    with pytest.raises(Wrong, match=message):
        read_groups(GROUPS.replace(old, new), STEPS)


def test_a_structure_is_read() -> None:
    inner = ParallelBlock(2, (("S2.1",), ("S2.2",)))
    assert read_structure(STRUCTURE, STEPS, FOUND) == ("S1", ParallelBlock(1, ((inner,), ("S3",))), "S4")
    without = "S1: as S2\nS2\nS2.1\nS2.2\nS3\nS4"
    assert read_structure(without, STEPS, FOUND) == ("S1", "S2", "S3", "S4"), "no group held"
    outer = "S1\n<Parallel>\n<Path>\nS2: two ways\nS2.1\nS2.2\n</Path>\n<Path>\nS3\n</Path>\n</Parallel>\nS4"
    assert read_structure(outer, STEPS, FOUND) == ("S1", ParallelBlock(1, (("S2",), ("S3",))), "S4")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</Parallel>\nS4", "S4", "S4 cannot stand within <Parallel>"),
        ("\n</Path>\n</Parallel>\nS4", "\nS4", "<Path> is not closed"),
        ("S1\n", "", "expected S1, got S2.1"),
        ("\nS4", "", "S4 is missing"),
        ("\nS4", "\nS4\nS4", "S4 is there once too often"),
        ("S3\n</Path>\n</Parallel>\nS4", "S3\nS4\n</Path>\n</Parallel>", "is no parallel group of your analysis"),
        ("S1\n", "<Parallel>\n<Path>\nS1\n</Path>\n</Parallel>\n", "The block S1 is no parallel group"),
        ("S1\n", "something\n", "Expected a step or one of"),
    ],
)
def test_wrong_structures(old: str, new: str, message: str) -> None:
    assert old in STRUCTURE
    with pytest.raises(Wrong, match=message):
        read_structure(STRUCTURE.replace(old, new), STEPS, FOUND)


def test_ranges_are_read() -> None:
    needed = {"S1": 1, "S2": 2, "S3": 1}
    wanted = {"S1": (4, 4), "S2": (5, 7), "S3": (8, 9)}
    assert read_ranges("S1: 4\nS2: [5] - [7]\nS3: 8–9", needed, 4, 9) == wanted
    ranges = [{"step": step, "first": first, "last": last} for step, (first, last) in wanted.items()]
    assert read_ranges(json.dumps({"ranges": ranges}), needed, 4, 9) == wanted


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("S1: 4-4\nS2: 6-7\nS3: 8-9", "Sentence 5 belongs to no step: S2 begins with 6"),
        ("S1: 4-4\nS2: 5-7\nS3: 8-8", "Sentence 9 belongs to no step"),
        ("S1: 4-5\nS2: 5-7\nS3: 8-9", "S2 begins with sentence 5; expected 6"),
        ("S1: 4-6\nS2: 7-7\nS3: 8-9", "S2 has the sentences 7-7; it needs at least 2"),
        ("S1: 4-4\nS2: 5-7\nS3: 8-10", "The last sentence is 9, got 10"),
        ("S1: 4-4\nS3: 5-9", "Expected a line for each of S1, S2, S3"),
        ("S1: 4-4\nS1: 5-9", "S1 is there twice"),
        ("S1: all", "Expected lines of the form"),
    ],
)
def test_wrong_ranges(answer: str, message: str) -> None:
    with pytest.raises(Wrong, match=message):
        read_ranges(answer, {"S1": 1, "S2": 2, "S3": 1}, 4, 9)


def test_block_texts_are_read() -> None:
    said = "**Outline 1:** 1: go\nOutline 2: stay **here**\nEdit 7: new words\nConclusion: both\ntwo lines"
    assert read_mapreduce(said, 2, range(5, 9)) == BlockText(
        ("go", "stay **here**"), {7: "new words"}, "both\ntwo lines"
    )
    # As models write JSON by hand: a backslash that is no escape, and one that would be a form feed.
    edits = r'[{"sentence": 5, "text": "\frac{1}{2} \\beta \neq"}]'
    by_hand = r'{"outlines": ["a \(x\)", "b"], "edits": ' + edits + ', "conclusion": "c"}'
    text = read_mapreduce(by_hand, 2, range(5, 9))
    assert text.outlines[0] == r"a \(x\)" and text.edits == {5: r"\frac{1}{2} \beta \neq"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("Outline 1: a\nConclusion: c", "Expected the outlines 1 to 2, got 1"),
        ("Outline 1: a\nOutline 2: b", 'Expected a line "Conclusion: ..."'),
        ("Outline 1: a\nOutline 2: b\nConclusion:", "conclusion has no text"),
        ("Outline 1: a\nOutline 2: b\nEdit 9: c\nConclusion: d", "Sentence 9 is not in this block, which has 5 to 8"),
        ("Outline 1: a\nOutline 2: <Path>\nConclusion: d", "outline 2 has the tag <Path>"),
        ("Outline 1: a\nOutline 1: b\nConclusion: d", "outline 1 is there twice"),
        ("Here you are", 'Expected "Outline 1: ..." first'),
    ],
)
def test_wrong_block_texts(answer: str, message: str) -> None:
    with pytest.raises(Wrong, match=message):
        read_mapreduce(answer, 2, range(5, 9))


def test_a_draft_is_a_trace_and_of_two_edits_the_later_holds() -> None:
    nodes = read_structure(STRUCTURE, STEPS, FOUND)
    sentences = Sentences.of("A. B. C. D.\n\nE.\nF.")
    ranges = {"S1": (1, 1), "S2.1": (2, 2), "S2.2": (3, 3), "S3": (4, 5), "S4": (6, 6)}
    draft = Draft(sentences, nodes, ranges, {})
    block = nodes[1]
    assert isinstance(block, ParallelBlock)
    inner = block.paths[0][0]
    assert isinstance(inner, ParallelBlock)
    draft.put(inner, BlockText(("i", "j"), {2: "Bee."}, "in"), alone=False)
    draft.put(block, BlockText(("k", "l"), {2: "Bad.", 4: "Dee."}, "out"), alone=False)
    parse_text(draft.trace())
    assert "2.1" not in draft.trace() and "1.1: Bad." in draft.trace() and "2: Dee.\n\nE.\n</Path>" in draft.trace()
    draft.put(inner, BlockText(("i", "j"), {3: "Cee."}, "in"), alone=True)
    assert draft.edits == {3: "Cee.", 4: "Dee."}
    text = draft.block_trace(block)
    lines = text.splitlines()
    assert block_at(text, 1, lines.index("1.1: B.") + 1) == 2 and block_at(text, 1, lines.index("2: Dee.") + 1) == 1
    odd = text.replace("1.1: B.", "1.1: B\u2028\x0c\x1d.")  # no line ends to the checks
    assert block_at(odd, 1, odd.split("\n").index("2: Dee.") + 1) == 1
    assert block_at(odd, 1, odd.split("\n").index("1.2: Cee.") + 1) == 2
    assert draft.block_trace(inner).startswith("<Parallel>\n<Goal>\n<Outline>\n1: i\n")


class Scripted:
    """The scripted curator in this process, but for what `spoiled` says of some stages."""

    def __init__(self, **spoiled: str) -> None:
        self.spoiled = spoiled
        self.asked: list[list[Message]] = []

    async def answer(self, messages: list[Message], form: Form) -> Answer:
        self.asked.append(messages)
        text = self.spoiled.get(form.name) or curator_script.answer(messages, False)
        return Answer(text, not text.endswith("..."), 10, 1)


def curate(chain: tuple[str, str, str], answerer: Scripted, **rules: float) -> tuple[bool, dict[str, object]]:
    return asyncio.run(Pipeline(answerer, Rules(**rules)).curate(Chain("id", *chain)))  # type: ignore[arg-type]


class OnceWrong(Scripted):
    """Leans on a sibling in its first answer to a block whose first path has these steps."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    async def answer(self, messages: list[Message], form: Form) -> Answer:
        found = await super().answer(messages, form)
        if form.name == "mapreduce" and f"## Path 1 ({self.path})" in messages[-1]["content"]:
            text = "Outline 1: a\nOutline 2: b\nEdit 2: Likewise, try factors.\nConclusion: c"
            return Answer(text, True, 10, 1)
        return found


@pytest.mark.parametrize("path", ["S2.1, S2.2", "S2.1"], ids=["outer", "inner"])
def test_an_edit_that_leans_is_put_right_by_whichever_block_it_stands_in(path: str) -> None:
    """An outer block's edit of a sentence in an inner path would else stay, however often the inner one is asked."""
    scripted = OnceWrong(path)
    good, record = curate(NESTED, scripted)
    wanted = curate(NESTED, Scripted())[1]
    assert good and isinstance(record["trace"], str) and isinstance(wanted["trace"], str)
    assert "Likewise" not in record["trace"]
    if path == "S2.1":  # what is around it was asked for when the inner block was right
        assert record["trace"] == wanted["trace"]
        outer = [messages[1]["content"] for messages in scripted.asked if "(S2.1, S2.2)" in messages[1]["content"]]
        assert len(outer) == 1 and "Likewise" not in outer[0].partition("# The block")[2]


@pytest.mark.parametrize(
    ("stage", "said", "reason"),
    [
        ("summary", "S2: no first step", "Expected S1, got S2: main steps are numbered one after the other."),
        ("summary", "S1: the answer was cut ...", "The answer was cut because it is too long; answer more briefly."),
        ("groups", NEEDS, "There is no step S2.1, S2.2 in your tree."),
        ("structure", "S1", "Every step stands in the structure once, in its order: S2 is missing."),
        ("refill", "S1: 1-2", "Expected a line for each of S1, S2, S3, S4, in this order; got S1."),
        (
            "mapreduce",
            "Outline 1: a\nOutline 2: b\nEdit 4: Likewise.\nConclusion: c",
            "block 1: Path 2: 'Likewise' compares with what stands before, which a sibling may say",
        ),
        (
            "mapreduce",
            f"Outline 1: a\nOutline 2: b\nEdit 4: {'other ' * 99}\nConclusion: c",
            "block 1: The edits take the text too far from the original",
        ),
    ],
)
def test_a_stage_that_fails_rejects_the_chain_with_every_attempt(stage: str, said: str, reason: str) -> None:
    scripted = Scripted(**{stage: said})
    good, record = curate(COUNTING, scripted, max_tries=3)
    assert not good and record["stage"] == stage and str(record["reason"]).startswith(reason)
    attempts = record["attempts"]
    assert isinstance(attempts, list) and [one["answer"] for one in attempts] == [said] * 3
    assert all(one["stage"] == stage and one["wrong"].startswith(reason) for one in attempts)
    last = scripted.asked[-1]
    assert last[-2]["content"] == said and "cannot be used:\n" in last[-1]["content"]


def test_the_first_three_stages_are_one_conversation_without_the_bad_answers() -> None:
    scripted = Scripted()
    good, _ = curate(NESTED, scripted)
    assert good
    first, second, third, *others = scripted.asked
    assert second[:2] == first and third[:4] == second and [m["role"] for m in third[1::2]] == ["user"] * 3
    assert all(len(messages) == 2 for messages in others)
    assert not any(NESTED[1].splitlines()[0] in messages[1]["content"] for messages in others[-1:]), "block by block"


def test_prompts_have_a_version_and_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {"system", "again", *STAGES}
    for stage in STAGES:
        assert form_of(stage).plain and form_of(stage).structured.startswith("Answer with a JSON object")
        assert "===" not in render(stage, **dict.fromkeys(
            ("question", "chain", "most", "steps", "sentences", "first", "last", "count", "paths"), "{{x}}"
        ))  # fmt: skip
    version = prompts_version()
    monkeypatch.setattr("mvkernels.model.curator.prompts.read_prompt", lambda name: read_prompt(name) + "!")
    assert prompts_version() != version


def test_answers_lose_what_stands_around_them() -> None:
    said = '{"lines": ["S1"], "more": 1}'
    for around in (
        "%s",
        "```\n%s\n```",
        "<think>\nhm\n</think>\n\n```json\n%s\n```",
        "hm</think>Sure:\n```json\n%s\n```\nDone.",
    ):
        assert answer_data(around % said, "structure", str) == {"lines": ["S1"]}
    with pytest.raises(Wrong, match="reasoning only"):
        answer_data("<think>\nS1\n", "structure", str)
    assert answer_data('{"lines": ["a </think> b"]}', "structure", str) == {"lines": ["a </think> b"]}
