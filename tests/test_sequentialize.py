"""The sequentialiser: what is removed, what stays and in which order, malformed traces, the published traces."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mvkernels.errors import GrammarError
from mvkernels.grammar import TAG_PATTERN, parse_text
from mvkernels.model.sequentialize import sequentialize

NESTED = """<Think>
Before.  Two blanks stay.
<Parallel>
<Goal>
<Outline>
1: map one
</Outline>
<Outline>
2: map two
</Outline>
</Goal>
<Path>
1: First.

3: no index, this one.
</Path>
<Path>
2: Second, and a block:
<Parallel>
<Goal>
<Outline>
2.1: map inner
</Outline>
</Goal>
<Path>
2.1: Inner.
</Path>
<Conclusion>
reduce inner
</Conclusion>
</Parallel>
Behind it.
</Path>
<Conclusion>
reduce outer
</Conclusion>
</Parallel>
After.
</Think>
The answer is 4: done.
"""

PLAIN = """Before.  Two blanks stay.
First.

3: no index, this one.
Second, and a block:
Inner.
Behind it.
After.
The answer is 4: done."""


def test_tags_map_reduce_and_indices_go_and_the_rest_stays_in_order() -> None:
    assert sequentialize(NESTED) == PLAIN


def test_plain_text_stays_as_it_is() -> None:
    assert sequentialize(PLAIN) == PLAIN
    assert sequentialize("") == ""


def test_tags_on_one_line_part_the_text() -> None:
    text = "a <Parallel><Goal><Outline>1: m</Outline></Goal><Path>1:b</Path><Conclusion>r</Conclusion></Parallel> c"
    assert sequentialize(text) == "a\nb\nc"


def test_a_path_of_an_index_alone_leaves_nothing() -> None:
    text = "<Parallel><Goal><Outline>1:</Outline></Goal><Path>1:</Path><Conclusion></Conclusion></Parallel>"
    assert sequentialize(text) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NESTED.replace("</Conclusion>\n</Parallel>\nAfter.", ""), r"expected text or </Conclusion>"),
        (NESTED.replace("2.1: Inner", "2.2: Inner"), r"line 26, .*expected the index '2.1:', found '2.2:'"),
        ("<Think>\nopen", r"line 2, token 2: expected text, <Parallel> or </Think>, found the end"),
    ],
    ids=["conclusion", "index", "cut"],
)
def test_a_malformed_trace_is_refused(text: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        sequentialize(text)


def test_linear_in_the_text_also_in_deep_and_wide_blocks() -> None:
    def deep(levels: int) -> str:
        opening, closing = "", ""
        for level in range(levels):
            index = ".".join(["1"] * (level + 1))
            opening += f"<Parallel><Goal><Outline>{index}: m</Outline></Goal><Path>{index}: t "
            closing += "</Path><Conclusion>r</Conclusion></Parallel>"
        return opening + closing

    assert sequentialize(deep(300)) == "\n".join("t" * 300)
    wide = "<Parallel><Goal>{}</Goal>{}<Conclusion>r</Conclusion></Parallel>"
    count = 20_000
    text = wide.format(
        "".join(f"<Outline>{i}: m</Outline>" for i in range(1, count + 1)),
        "".join(f"<Path>{i}: t</Path>" for i in range(1, count + 1)),
    )
    started = time.perf_counter()
    assert sequentialize(text) == "\n".join("t" * count)
    assert time.perf_counter() - started < 5  # 0.2 s here; minutes if it were quadratic


@pytest.mark.real_data
@pytest.mark.parametrize("name", [*map(str, (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14, 15, 17, 19, 20))])
def test_published_traces(name: str, data_dir: Path) -> None:
    text = (data_dir / "multiverse_1k" / f"{name}.xml").read_text(encoding="utf-8")
    plain = sequentialize(text)
    assert not TAG_PATTERN.search(plain)
    trace, words = parse_text(text)
    # By definition, word by word: not the tags, not what stands in goals and conclusions, not the paths' indices.
    dropped: set[int] = set()
    pending = [trace.blocks]
    while pending:
        for block in pending.pop():
            assert block.goal_end is not None and block.conclusion is not None and block.end is not None
            dropped |= {*range(block.start, block.goal_end), *range(block.conclusion, block.end)}
            for path in block.paths:
                assert path.open is not None
                dropped.add(path.open + 1)
                pending.append(path.blocks)
    expected = [word for i, word in enumerate(words) if i not in dropped and not TAG_PATTERN.fullmatch(word)]
    assert plain.split() == expected
    assert sequentialize(plain) == plain
