"""The sat task: its answers against trying all, its traces against their definition, its text and the tokenizer."""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path

import pytest

from mvkernels import BranchLayout, TagTokens
from mvkernels.grammar import parse_text
from mvkernels.model.tasks import TASKS, grade, task_named
from mvkernels.model.tasks.sat import SIZES, TASK, Formula, generate, read_dimacs
from mvkernels.model.training.scratch import make_tokenizer

EXAMPLE = Formula(3, ((1, 2), (-1, 3), (-2, -3), (-1, -3), (1, -2, 3)))
FORMULAS = list(islice(generate(1), 60))


@pytest.fixture(scope="module")
def tags() -> TagTokens:
    return TagTokens.from_tokenizer(make_tokenizer(TASK))


def models(formula: Formula) -> list[tuple[int, ...]]:
    """Every satisfying assignment, by trying all."""
    signed = product(*((-name, name) for name in range(1, formula.variables + 1)))
    return [values for values in signed if all(set(clause) & set(values) for clause in formula.clauses)]


def test_the_example_is_written_as_documented() -> None:
    assert EXAMPLE.question == "Can all clauses hold?\n+a+b\n+a-b+c\n-a+c\n-a-c\n-b-c."
    # 1 fixes -a, under which -b fails +a+b at once; 2 fixes +a.
    assert EXAMPLE.sequential_trace.splitlines() == [
        *("<Think>", "1-a", "1.1-b", "+a+b", "1.2+b", "1.2.1-c", "+a-b+c", "1.2.2+c", "-b-c", "1.2=UNSAT", "1=UNSAT"),
        *("2+a", "2.1-b", "2.1.1-c", "-a+c", "2.1.2+c", "-a-c", "2.1=UNSAT"),
        *("2.2+b", "2.2.1-c", "-a+c", "2.2.2+c", "-a-c", "2.2=UNSAT", "2=UNSAT", "</Think>", "UNSAT"),
    ]
    goal = ["<Parallel>", "<Goal>", "<Outline>", "1:-a</Outline>", "<Outline>", "2:+a</Outline>", "</Goal>"]
    inner = [line.replace("1:-a", "1.1:-b").replace("2:+a", "1.2:+b") for line in goal]
    lines = EXAMPLE.parallel_trace.splitlines()
    assert lines[:8] == ["<Think>", *goal]
    assert lines[8:20] == ["<Path>", "1:-a", *inner, "<Path>", "1.1:-b", "+a+b</Path>"]
    assert lines[-7:-4] == ["UNSAT</Conclusion>", "</Parallel></Path>", "<Conclusion>"]
    assert lines[-4:] == ["UNSAT</Conclusion>", "</Parallel>", "</Think>", "UNSAT"]


def test_the_answer_is_that_of_trying_all_assignments() -> None:
    for formula in FORMULAS:
        assert formula.satisfiable == bool(models(formula))
        assert formula.expected == ("SAT" if models(formula) else "UNSAT")
    assert 20 < sum(formula.satisfiable for formula in FORMULAS) < 40


def test_every_leaf_is_the_first_clause_that_fails_on_its_path() -> None:
    for formula in FORMULAS[:20]:
        fixed: dict[str, int] = {}
        leaves = 0
        lines = formula.sequential_trace.splitlines()[1:-2]
        for line in lines:
            if "=" in line:
                index, verdict = line.split("=")
                below = [model for model in models(formula) if all(fixed[key] in model for key in prefixes(index))]
                assert verdict == ("SAT" if below else "UNSAT")
            elif line[0].isdigit():
                index, name = line[:-2], line[-2:]
                fixed[index] = (1 if name[0] == "+" else -1) * (ord(name[1]) - ord("a") + 1)
            else:
                leaves += 1
                values = {fixed[key] for key in prefixes(index)}
                failing = [clause for clause in formula.clauses if all(-literal in values for literal in clause)]
                assert line == ("".join(map(written, failing[0])) if failing else "SAT")
                assert failing or len(values) == formula.variables
        assert leaves == sum(line in (*map(clause_text, formula.clauses), "SAT") for line in lines)


def prefixes(index: str) -> list[str]:
    numbers = index.split(".")
    return [".".join(numbers[: i + 1]) for i in range(len(numbers))]


def written(literal: int) -> str:
    return "-+"[literal > 0] + "abcdefg"[abs(literal) - 1]


def clause_text(clause: tuple[int, ...]) -> str:
    return "".join(map(written, clause))


def test_both_traces_visit_the_same_nodes_and_end_right() -> None:
    for formula in FORMULAS[:20]:
        parse_text(formula.prompt() + formula.parallel_trace)
        lines = formula.parallel_trace.replace("</Path>", "").splitlines()
        parallel = [line for line in lines if line and line[0] in "+-"]
        assert parallel == [line for line in formula.sequential_trace.splitlines() if line[0] in "+-"]
        for trace in (formula.parallel_trace, formula.sequential_trace):
            assert grade(trace, formula)
            assert not grade(
                trace.replace("</Think>\n", "</Think>\nUN" if formula.satisfiable else "</Think>\nS"), formula
            )


def test_a_node_has_the_same_tokens_at_any_depth_so_the_critical_path_is_linear(tags: TagTokens) -> None:
    paths, tokens = {}, {}
    for size in range(SIZES[0], SIZES[1] + 1):
        chances = [float(size == n) for n in range(SIZES[0], SIZES[1] + 1)]
        # Only instances whose tree is as deep as can be.
        formulas = [f for f in islice(generate(0, "test", chances, satisfiable=0.0), 30) if depth(f) == size]
        layouts = [BranchLayout.from_token_ids(tags.encode("\n" + f.parallel_trace), tags) for f in formulas]
        assert len({layout.critical_path for layout in layouts}) == 1
        paths[size] = layouts[0].critical_path
        tokens[size] = sum(layout.total_tokens for layout in layouts) / len(layouts)
    steps = [paths[size + 1] - paths[size] for size in range(*SIZES)]
    assert len(set(steps)) == 1
    assert all(tokens[size + 1] > 1.2 * tokens[size] for size in range(*SIZES))


def depth(formula: Formula) -> int:
    return max(line.count(".") for line in formula.parallel_trace.splitlines()) + 1


def test_the_tokenizer_has_one_token_for_each_index_literal_and_verdict(tags: TagTokens) -> None:
    for text in ("2.1.2.2.1.1.2", "1.2", "+g", "-a", "SAT", "UNSAT", "=UNSAT"):
        assert len(tags.encode(text)) == 1, text
    assert len(tags.encode("\n<Path>\n1.2.1:-c\n-a-b+c\n")) == 11


def test_instances_come_in_pairs_that_differ_by_a_needed_clause() -> None:
    for unsat, sat in islice(zip(generate(5, satisfiable=0.0), generate(5, satisfiable=1.0), strict=True), 10):
        assert not unsat.satisfiable and sat.satisfiable
    formula = next(generate(5, satisfiable=0.0))
    rests = [Formula(formula.variables, tuple(c for c in formula.clauses if c != out)) for out in formula.clauses]
    assert any(rest.satisfiable for rest in rests)


def test_the_generator_repeats_by_seed_and_keeps_the_splits_apart() -> None:
    assert list(islice(generate(1), 60)) == FORMULAS
    assert {formula.variables for formula in FORMULAS} == {3, 4, 5, 6, 7}
    assert not any(formula.held_out for formula in FORMULAS)
    assert all(formula.held_out for formula in islice(generate(1, "test"), 30))
    with pytest.raises(ValueError, match=r"split: expected one of .*, got 'dev'"):
        next(generate(0, "dev"))


def test_a_dimacs_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.cnf"
    file.write_text("c a comment\np cnf 3 3\n 3 -1\n0 1 2 0\n-2 0\n%\n0\n")
    assert read_dimacs(file) == Formula(3, ((-1, 3), (1, 2), (-2,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected 'p cnf VARIABLES CLAUSES', got no such line"),
        ("p dnf 3 1\n1 0\n", r"line 1: expected 'p cnf VARIABLES CLAUSES', got 'p dnf 3 1'"),
        ("p cnf 3 1\n1 x 0\n", r"line 2: expected whole numbers, got '1 x 0'"),
        ("p cnf 3 2\n1 2 0\n", r"expected 2 clauses that end with 0, got 1"),
        ("p cnf 3 1\n1 2\n", r"expected 1 clauses that end with 0, got 0"),
        ("p cnf 3 1\n1 4 0\n", r"expected variables from 1 to 3, got \(1, 4\)"),
        ("p cnf 4 1\n1 2 3 4 0\n", r"expected clauses of 1 to 3 different variables, got \(1, 2, 3, 4\)"),
        ("p cnf 2 1\n1 -1 0\n", r"expected clauses of 1 to 3 different variables, got \(1, -1\)"),
        ("p cnf 30 1\n1 0\n", r"expected 1 to 26 variables, got 30"),
    ],
    ids=["empty", "header", "word", "few", "open", "range", "wide", "twice", "many"],
)
def test_a_bad_dimacs_file_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.cnf"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"x.cnf.*{message}"):
        read_dimacs(file)


def test_tasks_are_found_by_name() -> None:
    assert task_named("sat") is TASKS["sat"]
    with pytest.raises(ValueError, match=r"task: expected one of \('arithmetic', 'sat'\), got 'chess'"):
        task_named("chess")


def test_the_range_holds_every_instance_and_no_other_size() -> None:
    for formula in islice(TASKS["sat"].generate(3, "test"), 40):
        assert TASKS["sat"].covers(formula.prompt()) and not TASKS["arithmetic"].covers(formula.prompt())
    for clauses in ("+a-b", "+a-b+c\n+a+b", "+a-b+h", "+a-b", "+a-b+c+d"):
        assert not TASKS["sat"].covers(f"Can all clauses hold?\n{clauses}."), clauses
