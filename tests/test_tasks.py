"""The arithmetic task: what the generator promises, and that trace, grader and answer agree."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from mvkernels.grammar import parse_text
from mvkernels.model.tasks.arithmetic import (
    PARALLEL_ENDING,
    SEQUENTIAL_ENDING,
    TASK,
    Bracket,
    Number,
    Problem,
    Product,
    generate,
    grade,
)

EXAMPLE = Problem((Product(47, 38), Bracket((125, 60)), Number(904)))
PROBLEMS = list(islice(generate(1), 200))


def test_the_example_is_worked_out_as_documented() -> None:
    assert EXAMPLE.prompt() == f"Compute 47*38 + (125+60) + 904.{PARALLEL_ENDING}\n"
    assert EXAMPLE.prompt(parallel=False) == f"Compute 47*38 + (125+60) + 904.{SEQUENTIAL_ENDING}\n"
    eight = ["7*8=56 -> 6", "4*8=32+5=37 -> 376", "1.1=00376"]
    thirty = ["-> 0", "7*3=21 -> 10", "4*3=12+2=14 -> 1410", "1.2=01410"]
    partial_sum = ["6+0=6 -> 6", "7+1=8 -> 86", "3+4=7 -> 786", "0+1=1 -> 1786", "0+0=0 -> 01786"]
    bracket = ["00125+00060", "5+0=5 -> 5", "2+6=8 -> 85", "1+0=1 -> 185", "0+0=0 -> 0185", "0+0=0 -> 00185"]
    results = ["1=01786", "2=00185", "3=00904"]
    total = [
        "6+5=11+4=15 -> 5",
        "8+8=16+0=16+1=17 -> 75",
        "7+1=8+9=17+1=18 -> 875",
        "1+0=1+0=1+1=2 -> 2875",
        "0+0=0+0=0 -> 02875",
    ]
    assert EXAMPLE.sequential_trace.splitlines() == [
        *("<Think>", "1: 47*38", "2: (125+60)", "3: 904"),
        *("1: 47*38", "1.1: 47*8", "1.2: 47*30"),
        *("1.1: 47*8", *eight, "1.2: 47*30", *thirty, "1.1=00376", "1.2=01410", *partial_sum, "1=01786"),
        *("2: (125+60)", *bracket, "2=00185"),
        *("3: 904", "3=00904"),
        *(*results, *total, "</Think>", "2875"),
    ]
    goal = ["<Parallel>", "<Goal>"]
    assert EXAMPLE.parallel_trace.splitlines() == [
        *("<Think>", *goal),
        *("<Outline>", "1: 47*38", "</Outline>", "<Outline>", "2: (125+60)", "</Outline>"),
        *("<Outline>", "3: 904", "</Outline>", "</Goal>"),
        *("<Path>", "1: 47*38", *goal),
        *("<Outline>", "1.1: 47*8", "</Outline>", "<Outline>", "1.2: 47*30", "</Outline>", "</Goal>"),
        *("<Path>", "1.1: 47*8", *eight, "</Path>", "<Path>", "1.2: 47*30", *thirty, "</Path>"),
        *("<Conclusion>", "1.1=00376", "1.2=01410", *partial_sum, "</Conclusion>", "</Parallel>", "1=01786", "</Path>"),
        *("<Path>", "2: (125+60)", *bracket, "2=00185", "</Path>"),
        *("<Path>", "3: 904", "3=00904", "</Path>"),
        *("<Conclusion>", *results, *total, "</Conclusion>", "</Parallel>", "</Think>", "2875"),
    ]


def test_the_answer_is_that_of_python() -> None:
    for problem in PROBLEMS:
        assert problem.answer == eval(problem.expression)


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_every_equation_of_a_trace_is_true_and_its_end_is_graded_right(parallel: bool) -> None:
    for problem in PROBLEMS:
        trace = problem.parallel_trace if parallel else problem.sequential_trace
        lines = re.findall(r"^(.*\d) -> (\d+)$", trace, re.MULTILINE)
        assert len(lines) > 5
        for line, done in lines:
            # 8+5=13+0=13 is 8+5=13 and 13+0=13.
            first, *rest = line.split("=")
            for total in rest:
                assert eval(first) == int(re.match(r"\d+", total)[0])
                first = total
            assert done.startswith((first, first[-1]))
        assert grade(trace, problem)
        assert grade(problem.prompt(parallel) + trace, problem)


def test_a_parallel_trace_follows_the_grammar_and_has_a_path_for_each_term() -> None:
    for problem in PROBLEMS:
        trace, _ = parse_text(problem.prompt() + problem.parallel_trace)
        (block,) = trace.blocks
        assert len(block.outlines) == len(block.paths) == len(problem.terms)
        for path, term in zip(block.paths, problem.terms, strict=True):
            partial = term.partial_products() if isinstance(term, Product) else []
            assert [len(inner.paths) for inner in path.blocks] == ([len(partial)] if len(partial) > 1 else [])


def test_a_sequential_trace_has_no_blocks() -> None:
    for problem in PROBLEMS:
        trace, _ = parse_text(problem.sequential_trace)
        assert not trace.blocks


def test_the_generator_repeats_by_seed_and_never_within_one() -> None:
    again = list(islice(generate(1), 200))
    assert again == PROBLEMS
    assert len(set(PROBLEMS)) == 200
    assert list(islice(generate(2), 200)) != PROBLEMS


def test_the_generator_covers_what_the_task_names() -> None:
    kinds = {type(term) for problem in PROBLEMS for term in problem.terms}
    assert kinds == {Product, Bracket, Number}
    assert {len(problem.terms) for problem in PROBLEMS} == {2, 3, 4, 5}
    nested = [t for p in PROBLEMS for t in p.terms if isinstance(t, Product) and len(t.partial_products()) > 1]
    assert {len(str(term.left)) for term in nested} == {2, 3}


def test_the_chances_are_those_of_the_numbers_of_terms() -> None:
    counts = [len(problem.terms) for problem in islice(generate(1, chances=(3, 0, 1, 0)), 200)]
    assert set(counts) == {2, 4}
    assert counts.count(2) > 120


def test_no_problem_of_the_test_split_comes_up_in_training() -> None:
    train, test = (list(islice(generate(7, split), 500)) for split in ("train", "test"))
    assert not any(problem.held_out for problem in train)
    assert all(problem.held_out for problem in test)
    # The split goes by the problem itself, so about one drawn problem in ten is held out.
    everything = [Problem((Product(a, b), Product(b, a))) for a in range(10, 60) for b in range(10, 60)]
    assert 0.07 < sum(problem.held_out for problem in everything) / len(everything) < 0.13


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("<Think>\n</Think>\n2876", id="wrong number"),
        pytest.param("<Think>\n</Think>\n28751", id="longer number"),
        pytest.param("<Think>\n2875", id="never stopped thinking"),
        pytest.param("2875", id="no thinking at all"),
        pytest.param("<Think>\n</Think>\n2875 or 2876", id="two answers"),
        pytest.param("<Think>\n</Think>\n", id="no answer"),
    ],
)
def test_the_grader_refuses(text: str) -> None:
    assert not grade(text, EXAMPLE)


def test_the_grader_takes_the_answer_with_any_whitespace_around() -> None:
    assert grade("<Think>\nanything\n</Think>\n 2875\n", EXAMPLE)


def test_bad_problems_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"expected 2 to 5 terms, got 1"):
        Problem((Product(2, 3),))
    with pytest.raises(ValueError, match=r"expected at least 2 products or brackets, got 1"):
        Problem((Product(2, 3), Number(4)))
    with pytest.raises(ValueError, match=r"expected terms from 1 to 99999, got 400\*250"):
        Problem((Product(400, 250), Product(2, 3)))
    with pytest.raises(ValueError, match=r"split: expected one of .*, got 'dev'"):
        next(generate(0, "dev"))


def test_the_range_holds_every_problem_and_nothing_beyond() -> None:
    assert all(TASK.covers(problem.prompt(parallel)) for problem in PROBLEMS for parallel in (True, False))
    assert TASK.covers("Compute 47*38 + 125*6 + 904.")
    beyond = (
        *("47*38", "47*38 + 904", " + ".join(["12*34"] * 6), "1234*56 + 12*34", "12*345 + 12*34", "12*1 + 12*34"),
        *("(12+34+56) + 12*34", "12*34 + 12*34 + 12345", "12*34 - 12*34", "12*34+12*34", "012*34 + 12*34", ""),
    )
    for expression in beyond:
        assert not TASK.covers(f"Compute {expression}."), expression
    for text in ("12*34 + 12*34", "Compute 12*34 + 12*34", "What is 12*34 + 12*34?", "Compute 12*34 + 12*34. Why?"):
        assert not TASK.covers(text), text
