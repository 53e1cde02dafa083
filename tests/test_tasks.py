"""The arithmetic task: what the generator promises, and that trace, grader and answer agree."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from mvkernels.grammar import parse_text
from mvkernels.model.tasks.arithmetic import (
    PARALLEL_ENDING,
    SEQUENTIAL_ENDING,
    Bracket,
    Number,
    Problem,
    Product,
    generate,
    grade,
)

EXAMPLE = Problem((Product(47, 38), Product(125, 6), Number(904)))
PROBLEMS = list(islice(generate(1), 200))


def test_the_example_is_worked_out_as_documented() -> None:
    assert EXAMPLE.prompt() == f"Compute 47*38 + 125*6 + 904.{PARALLEL_ENDING}\n"
    assert EXAMPLE.prompt(parallel=False) == f"Compute 47*38 + 125*6 + 904.{SEQUENTIAL_ENDING}\n"
    assert EXAMPLE.sequential_trace.splitlines() == [
        "<Think>",
        "47*38 = 47*8 + 47*30",
        *("47*8", "7*8=56 -> 6", "4*8+5=37 -> 376"),
        *("47*30", "-> 0", "7*3=21 -> 10", "4*3+2=14 -> 1410"),
        *("00376+01410", "6+0=6 -> 6", "7+1+0=8 -> 86", "3+4+0=7 -> 786", "0+1+0=1 -> 1786", "0+0+0=0 -> 01786"),
        *("125*6", "5*6=30 -> 0", "2*6+3=15 -> 50", "1*6+1=7 -> 750"),
        *("01786+00750+00904", "6+0+4=10 -> 0", "8+5+0+1=14 -> 40", "7+7+9+1=24 -> 440", "1+0+0+2=3 -> 3440"),
        "0+0+0+0=0 -> 03440",
        "</Think>",
        "3440",
    ]


def test_the_answer_is_that_of_python() -> None:
    for problem in PROBLEMS:
        assert problem.answer == eval(problem.expression)


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_every_equation_of_a_trace_is_true_and_its_end_is_graded_right(parallel: bool) -> None:
    for problem in PROBLEMS:
        trace = problem.parallel_trace if parallel else problem.sequential_trace
        equations = re.findall(r"^([\d*+]+)=(\d+) -> (\d+)$", trace, re.MULTILINE)
        assert len(equations) > 5
        for left, right, done in equations:
            # Leading zeros of a column are digits, not octal numbers.
            assert eval(left) == int(right)
            assert done.startswith((right, right[-1]))
        assert grade(trace, problem)
        assert grade(problem.prompt(parallel) + trace, problem)


def test_a_parallel_trace_follows_the_grammar_and_has_a_path_for_each_term() -> None:
    for problem in PROBLEMS:
        trace, _ = parse_text(problem.prompt() + problem.parallel_trace)
        (block,) = trace.blocks
        worked = [term for term in problem.terms if not isinstance(term, Number)]
        assert len(block.outlines) == len(block.paths) == len(worked)
        for path, term in zip(block.paths, worked, strict=True):
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
        pytest.param("<Think>\n</Think>\n3441", id="wrong number"),
        pytest.param("<Think>\n</Think>\n34401", id="longer number"),
        pytest.param("<Think>\n3440", id="never stopped thinking"),
        pytest.param("3440", id="no thinking at all"),
        pytest.param("<Think>\n</Think>\n3440 or 3441", id="two answers"),
        pytest.param("<Think>\n</Think>\n", id="no answer"),
    ],
)
def test_the_grader_refuses(text: str) -> None:
    assert not grade(text, EXAMPLE)


def test_the_grader_takes_the_answer_with_any_whitespace_around() -> None:
    assert grade("<Think>\nanything\n</Think>\n 3440\n", EXAMPLE)


def test_bad_problems_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"expected 2 to 5 terms, got 1"):
        Problem((Product(2, 3),))
    with pytest.raises(ValueError, match=r"expected at least 2 products or brackets, got 1"):
        Problem((Product(2, 3), Number(4)))
    with pytest.raises(ValueError, match=r"expected terms from 1 to 99999, got 400\*250"):
        Problem((Product(400, 250), Product(2, 3)))
    with pytest.raises(ValueError, match=r"split: expected one of .*, got 'dev'"):
        next(generate(0, "dev"))
