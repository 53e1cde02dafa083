"""Evaluation: figures against their definitions, graders, questions, and samples that go on where they stood."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mvkernels.model import Engine, GenerationConfig
from mvkernels.model.checkpoint.loading import EMBEDDED
from mvkernels.model.evaluation.figures import accuracies, budget_curve, markdown_table, summarize
from mvkernels.model.evaluation.grading import choice_in, same_math
from mvkernels.model.evaluation.questions import Question, generated_questions, read_questions
from mvkernels.model.evaluation.samples import MODES, Plan, Sample, batches, collect, read_samples
from mvkernels.model.evaluation.statistics import (
    exponential_fit,
    fit,
    inverse_fit,
    paired_test,
    pass_at_k,
    standard_error,
)
from mvkernels.model.tasks import TASKS
from tests.cli.test_cli import assert_one_line_error, invoke
from tests.support.tiny_model import tiny_model, tiny_tokenizer

SAMPLE = Sample("q", 0, True, "1", 30, 10, 12, "stop", 2.0, "text")
CONFIG = GenerationConfig(max_new_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer())


def questions(count: int) -> list[Question]:
    return [Question(f"q{i}", f"sum {i}", "x", lambda text: "e" in text, raw=True) for i in range(count)]


# ---- statistics


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample() -> None:
    for n, c in ((5, 0), (5, 2), (6, 6), (7, 1)):
        for k in range(1, n + 1):
            subsets = list(combinations([i < c for i in range(n)], k))
            assert pass_at_k(c, n, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match=r"expected 1 <= k <= samples .*, got k=3, samples=2, right=1"):
        pass_at_k(1, 2, 3)


def test_the_standard_error_is_that_of_a_mean() -> None:
    assert standard_error([1, 0, 0, 1]) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert math.isnan(standard_error([1]))


def test_the_paired_test_counts_where_two_models_differ() -> None:
    found = paired_test([1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 1])
    assert (found.better, found.worse) == (3, 1)
    assert found.difference == pytest.approx(2 / 6)
    assert found.p == pytest.approx(2 * (1 + 4) / 16)  # 0 or 1 heads of 4, on either side
    assert found.error == pytest.approx(standard_error([1, 1, 0, -1, 1, 0]))
    assert paired_test([1, 0], [1, 0]).p == 1
    with pytest.raises(ValueError, match="expected as many questions twice, at least one, got 1 and 2"):
        paired_test([1], [1, 0])


def test_fits_find_the_curves_that_made_the_values() -> None:
    x = [1.0, 1.5, 2.0, 4.0]
    line, inverse = fit(x, [3 + 2 * v for v in x]), inverse_fit(x, [0.5 + 4 / v for v in x])
    assert (line.a, line.b, line.r2) == pytest.approx((3, 2, 1))
    assert (inverse.a, inverse.b, inverse.r2) == pytest.approx((0.5, 4, 1))
    curve = exponential_fit([3, 4, 5], [8, 16, 32])
    assert (math.exp(curve.b), curve.r2) == pytest.approx((2, 1))
    assert fit([0, 1, 2, 3], [0, 1, 0, 1]).r2 == pytest.approx(0.2)
    with pytest.raises(ValueError, match="at least two different x"):
        fit([1, 1], [2, 3])


# ---- questions and graders


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", True),
        (r"\boxed{18}", "18", True),
        ("The answer is 1,234.", "1234", True),
        (r"\boxed{(3,\pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{17}", "18", False),
        (r"<Think>\boxed{18}</Think> nothing", "18", False),
        ("", "18", False),
    ],
)
def test_mathematics_is_graded_by_value(text: str, expected: str, right: bool) -> None:
    pytest.importorskip("math_verify", reason="needs the eval extra")
    assert same_math(text, expected) is right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"A or C? \boxed{C}", "C"),
        (r"\boxed{\text{(B)}}", "B"),
        ("I think the answer is (D).", "D"),
        ("b", None),
        ("A is wrong", None),
        (" B) ", "B"),
        (r"<Think>\boxed{A}</Think>Answer: B", "B"),
        (r"\boxed{E}", None),
    ],
)
def test_the_letter_of_a_choice_is_found(text: str, letter: str | None) -> None:
    assert choice_in(text, "ABCD") == letter


def test_every_form_of_a_question_is_read(tmp_path: Path) -> None:
    rows = [
        {"question": "How many?", "answer": "1+1=2\n#### 2"},
        {"problem": "Which number?", "answer": "7", "solution": "..."},
        {"question": "Which?", "choices": ["x", "y", "z"], "answer": "C"},
        {"question": "Which?", "choices": ["x", "y"], "answer": 0},
        {"Question": "Q", "Correct Answer": "r", **{f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)}},
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    found = read_questions(file)
    assert [question.expected for question in found[:4]] == ["2", "7", "C", "A"]
    assert found[2].text.startswith("Which?\nA) x\nB) y\nC) z\n") and found[2].grade(r"\boxed{C}")
    assert f"{found[4].expected}) r\n" in found[4].text
    assert found[4].grade(f"The answer is {found[4].expected}") and not found[4].grade("The answer is E")
    assert len({question.id for question in found}) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1: expected a JSON object, got '{'"),
        ("[1]", r"line 1: expected a JSON object, got \[1\]"),
        ('{"question": "x"}', r"line 1: expected an answer, got None"),
        ('{"answer": "x"}', r"line 1: expected a problem or a question, got None"),
        ('{"question": "x", "choices": ["a"], "answer": 0}', r"expected 2 to 26 choices"),
        ('{"question": "x", "choices": ["a", "b"], "answer": 2}', r"expected the place, letter or text of a choice"),
        ("", r"expected at least one question, got none"),
    ],
)
def test_a_bad_question_says_where_and_what(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl.*{message}"):
        read_questions(file)


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "count"), [("gsm8k_test", 1319), ("math500", 500), ("aime24", 30)])
def test_published_questions_are_read_and_their_answers_graded_right(name: str, count: int, data_dir: Path) -> None:
    pytest.importorskip("math_verify", reason="needs the eval extra")
    found = read_questions(data_dir / "eval" / f"{name}.jsonl")
    assert len(found) == count
    for question in found[:: count // 30]:
        assert question.grade(f"<Think>\n7\n</Think>\nIt is \\boxed{{{question.expected}}}."), question
        assert not question.grade("<Think>\n7\n</Think>\nIt is \\boxed{123456789}."), question


@pytest.mark.parametrize("task", TASKS)
def test_problems_of_a_task_are_graded_by_its_traces(task: str) -> None:
    for question in generated_questions(TASKS[task], 4):
        assert all(question.grade(trace) for trace in question.traces) and not question.grade("")
        assert question.size is not None


# ---- samples


def test_an_interrupted_run_goes_on_to_the_same_samples(engine: Engine, tmp_path: Path) -> None:
    plan, asked = Plan("tiny", MODES["parallel"], CONFIG, n=2, batch=2), questions(5)
    whole = collect(engine, asked, plan, tmp_path / "whole.jsonl")
    assert [(one.question, one.sample) for one in whole] == [(f"q{i}", j) for i in range(5) for j in range(2)]
    assert whole[0].text != whole[1].text  # n samples of one prompt differ
    path = tmp_path / "cut.jsonl"
    steps = batches(engine, asked, plan, path)
    assert [next(steps), next(steps)] == [0, 2]
    steps.close()
    with path.open("a") as file:  # what a crash leaves: one sample of two, and half a line
        file.write(json.dumps({**vars(whole[4]), "text": "other"}) + "\n" + '{"question": "q3", "sam')
    seen: list[int] = []
    again = collect(engine, asked, plan, path, seen.append)
    assert seen == [2, 4, 5]
    assert [replace(one, seconds=0) for one in again] == [replace(one, seconds=0) for one in whole]
    assert read_samples(path) == again
    assert collect(engine, asked, plan, path, seen.append) == again and seen[-1] == 5


#: Of each field another value than that of the plan below.
OTHER_PLANS = {"model": "m", "mode": MODES["zero"], "n": 2, "batch": 3}
OTHER_CONFIGS: dict[str, Any] = {
    **{"max_new_tokens": 13, "max_critical_path": 11, "max_path_tokens": 5, "max_seconds": 99.0, "max_width": 3},
    **{"max_depth": 2, "grammar": False, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    **{"repetition_penalty": 1.1, "logprobs": 0, "seed": 1, "stop": ("a",), "eos_token_ids": (5,), "sequential": True},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": "5"}, "expected tokens of type int, got '5'"),
        ({"tokens": True}, "expected tokens of type int, got True"),
        ({"steps": -1}, "expected steps of type int, got -1"),
        ({"correct": 1}, "expected correct of type bool, got 1"),
        ({"text": None}, "expected text of type str, got None"),
        ({"seconds": math.inf}, "expected a finite number, got Infinity"),
        ({"seconds": []}, r"expected seconds of type float, got \[\]"),
        ({"exact": "yes"}, r"expected exact of type bool \| None, got 'yes'"),
    ],
)
def test_a_bad_sample_says_where_and_what(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.jsonl"
    good = asdict(Sample("q", 0, True, "2", 3, 2, 2, "stop", 1.0, "2"))
    lines = [{"format": "mvkernels.samples", "version": 1}, good, {**good, "sample": 1, "seconds": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_samples(path)) == 2
    without = {name: value for name, value in good.items() if name != "steps"}
    for line, said in (({**good, **change}, message), (without, "got one without steps")):
        path.write_text("".join(json.dumps(one) + "\n" for one in (*lines, line)))
        with pytest.raises(ValueError, match=rf"x.jsonl, line 4: .*{said}"):
            read_samples(path)


def test_a_file_of_another_run_is_refused_and_kept(engine: Engine, tmp_path: Path) -> None:
    plan, path = Plan("tiny", MODES["parallel"], CONFIG), tmp_path / "x.jsonl"
    listed = replace(plan, config=replace(CONFIG, stop=("no such",), eos_token_ids=(3,)))
    assert collect(engine, questions(2), listed, tmp_path / "y.jsonl") == (
        collect(engine, questions(2), listed, tmp_path / "y.jsonl")
    ), "what JSON has as lists is the same run"
    collect(engine, questions(2), plan, path)
    before = path.read_text()
    refused = r"x.jsonl: expected a file of the same run to go on with"
    assert {*OTHER_PLANS, "config"} == {field.name for field in fields(Plan)}, "a field is untested"
    others = [replace(plan, **{name: value}) for name, value in OTHER_PLANS.items()]
    assert {*OTHER_CONFIGS} == {field.name for field in fields(GenerationConfig)}, "a field is untested"
    others += [replace(plan, config=replace(CONFIG, **{name: value})) for name, value in OTHER_CONFIGS.items()]
    for other in others:
        with pytest.raises(ValueError, match=refused):
            collect(engine, questions(2), other, path)
    for change in ({"id": "other"}, {"text": "other"}, {"expected": "other"}, {"raw": False}):
        first, second = questions(2)
        with pytest.raises(ValueError, match=refused):
            collect(engine, [first, replace(second, **change)], plan, path)
    with pytest.raises(ValueError, match=refused):
        collect(engine, questions(2)[::-1], plan, path)
    with pytest.raises(ValueError, match="questions=3"):
        collect(engine, questions(3), plan, path)
    assert path.read_text() == before
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="line 1: expected one JSON object a line, got 'hello'"):
        collect(engine, questions(2), plan, path)


def test_sequential_mode_opens_no_block_and_each_mode_has_its_ending(engine: Engine) -> None:
    question = questions(1)[0]
    prompts = {name: Plan("", mode, CONFIG).prompt(question, chat=True) for name, mode in MODES.items()}
    assert prompts["parallel"] == "sum 0 Think step by step and in parallel before answering.\n"
    assert prompts["zero"] == prompts["sequential"] == "sum 0 Think step by step before answering.\n"
    assert Plan("", MODES["sequential"], CONFIG).request(3).max_depth == 0
    assert Plan("", MODES["zero"], CONFIG).request(3) == replace(CONFIG, seed=CONFIG.seed + 3)
    chat = Plan("", MODES["parallel"], CONFIG).prompt(replace(question, raw=False), chat=True)
    assert chat == [{"role": "user", "content": prompts["parallel"][:-1]}]


def test_samples_that_would_all_be_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a temperature above 0 for 4 samples of a question, got 0"):
        Plan("", MODES["parallel"], replace(CONFIG, temperature=0), n=4)


# ---- figures


def test_a_summary_is_of_questions_and_the_table_has_every_figure() -> None:
    right = [(True, True, False, False), (False,) * 4, (True,) * 4]
    samples = [
        replace(SAMPLE, question=f"q{i}", sample=j, correct=correct)
        for i, row in enumerate(right)
        for j, correct in enumerate(row)
    ]
    found = summarize("run", samples)
    assert accuracies(samples) == [0.5, 0, 1]
    assert found.accuracy == pytest.approx(0.5) and found.error == pytest.approx(standard_error([0.5, 0, 1]))
    assert found.pass_at == pytest.approx({1: 0.5, 2: (5 / 6 + 0 + 1) / 3, 4: 2 / 3})
    assert (found.tokens, found.critical_path, found.parallelism, found.seconds) == (30, 10, 3, 2)
    table = markdown_table([found]).splitlines()
    assert table[0] == "| run | questions | pass@1 | pass@2 | pass@4 | tokens | critical path | # parallel | seconds |"
    assert table[2] == "| run | 3 x 4 | 50.00% ± 28.87 | 61.11% | 66.67% | 30.0 | 10.0 | 3.00 | 2.00 |"
    with pytest.raises(ValueError, match=r"run: expected the same number of samples of each question, got \[3, 4\]"):
        summarize("run", samples[1:])


def test_a_budget_curve_is_what_runs_with_these_budgets_give(tmp_path: Path) -> None:
    """With the embedded model: greedy answers under such a budget are right exactly where the curve says so."""
    engine = Engine.from_pretrained(EMBEDDED)
    asked = generated_questions(TASKS["arithmetic"], 3)
    plan = Plan("embedded", MODES["parallel"], GenerationConfig(max_new_tokens=2048), batch=4)
    free = collect(engine, asked, plan, tmp_path / "free.jsonl")
    assert all(one.correct and one.exact for one in free)
    budget = sorted(one.critical_path for one in free)[1]
    config = replace(plan.config, max_critical_path=budget)
    cut = collect(engine, asked, replace(plan, config=config), tmp_path / "cut.jsonl")
    assert budget_curve(free, "critical path", [budget - 1, budget, 10000]) == pytest.approx([1 / 3, 2 / 3, 1])
    assert [one.correct for one in cut] == [one.critical_path <= budget for one in free]
    with pytest.raises(ValueError, match=r"budget: expected one of .*, got 'steps'"):
        budget_curve(free, "steps", [1])


# ---- the command


def test_the_command_writes_samples_table_and_charts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--problems", 2, "--max-tokens", 30, "--batch", 1, "--out", out, "--mode", "zero", "--mode", "parallel")
    shown = invoke("evaluate", "arithmetic", *options)
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert shown.stdout == (out / "table.md").read_text()
    assert "| zero | 2 |" in shown.stdout and "zero less parallel: +0.00 ± 0.00 points" in shown.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        *("budgets.png", "latency.png", "samples-parallel.jsonl", "samples-zero.jsonl", "table.md")
    ]
    found = json.loads(invoke("evaluate", "arithmetic", *options, "--json").stdout)
    assert [one["name"] for one in found] == ["zero", "parallel"] and found[0]["tokens"] == 30


NO_CHARTS = "no charts: a chart needs matplotlib, which is not installed: pip install 'mvkernels[plot]'"


@pytest.mark.parametrize("as_json", [False, True])
def test_results_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    """They are printed and written; one line says that there are no charts."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    options = ("--problems", 1, "--max-tokens", 5, "--batch", 1, "--out", out, "--mode", "zero")
    shown = invoke("evaluate", "arithmetic", *options, *(["--json"] if as_json else []))
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert " ".join(shown.stderr.split()).count(NO_CHARTS) == 1
    assert sorted(path.name for path in out.iterdir()) == ["samples-zero.jsonl", "table.md"]
    if as_json:
        assert "NaN" not in shown.stdout  # which is no JSON: of one question there is no standard error
        [found] = json.loads(shown.stdout)
        assert found["name"] == "zero" and found["tokens"] == 5 and found["error"] is None
    else:
        assert shown.stdout == (out / "table.md").read_text() and "| zero | 1 |" in shown.stdout


def test_a_grader_that_is_missing_is_said_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    done = invoke("evaluate", file, "--out", tmp_path / "out")
    assert_one_line_error(done, "grading mathematics needs math_verify", "pip install 'mvkernels[eval]'")
    assert not (tmp_path / "out").exists()


def test_a_result_that_cannot_be_written_is_printed(tmp_path: Path) -> None:
    """A table in the way of a folder: the error names it, and the figures are on stdout all the same."""
    (tmp_path / "out" / "table.md").mkdir(parents=True)
    options = ("--problems", 1, "--max-tokens", 5, "--batch", 1, "--out", tmp_path / "out", "--mode", "zero", "--json")
    done = invoke("evaluate", "arithmetic", *options)
    assert done.exit_code == 2 and json.loads(done.stdout)[0]["tokens"] == 5
    assert f"Is a directory: '{tmp_path / 'out' / 'table.md'}'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chess",), "expected arithmetic, sat, or a file with .jsonl or .cnf, got 'chess'"),
        (("arithmetic", "--mode", "fast"), "--mode: expected one of parallel, zero, sequential, got 'fast'"),
        (("arithmetic", "--problems", 0), "--problems: expected at least 1, got 0"),
        (("arithmetic", "--n", 2), "expected a temperature above 0 for 2 samples of a question, got 0"),
        (("none.jsonl",), "none.jsonl"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    assert_one_line_error(invoke("evaluate", *arguments, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()
