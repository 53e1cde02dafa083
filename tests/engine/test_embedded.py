"""The embedded model: its size, what it says of itself, and that it solves problems it has never seen."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config

from mvkernels import TagTokens
from mvkernels.grammar import parse_text
from mvkernels.model import Engine
from mvkernels.model import GenerationConfig as Config
from mvkernels.model.checkpoint.add_tags import read_entry
from mvkernels.model.checkpoint.loading import EMBEDDED
from mvkernels.model.evaluation.figures import summarize
from mvkernels.model.evaluation.questions import generated_questions
from mvkernels.model.evaluation.samples import MODES, Plan, Sample, collect
from mvkernels.model.tasks.arithmetic import TASK, generate, grade
from mvkernels.model.training import Recipe
from tests.engine.cases import preempted_before_every_step
from tests.engine.lossless import Recorder, check_lossless

MAX_BYTES = 8 * 10**6
MAX_PARAMETERS = 2 * 10**6
# Logits of these weights have a magnitude of 20, and fp32 sums in another order were seen to differ by 5e-5.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def in_parallel(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    plan = Plan("embedded", MODES["parallel"], Config(max_new_tokens=TASK.max_new_tokens), batch=40)
    return collect(
        engine, generated_questions(TASK, 40, 2), plan, tmp_path_factory.mktemp("samples") / "parallel.jsonl"
    )


def test_it_is_small(engine: Engine) -> None:
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= MAX_BYTES
    assert engine.model.num_parameters() <= MAX_PARAMETERS


def test_it_names_its_tags_and_its_end_of_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    assert read_entry(Qwen2Config.from_pretrained(EMBEDDED)) == "canonical"
    assert GenerationConfig.from_pretrained(EMBEDDED).eos_token_id == tokenizer.eos_token_id
    TagTokens.from_tokenizer(tokenizer)


def test_it_was_made_by_the_default_recipe() -> None:
    assert json.loads((EMBEDDED / "recipe.json").read_text()) == asdict(Recipe())


def test_it_solves_unseen_problems_in_parallel_decoding(in_parallel: list[Sample]) -> None:
    wrong = [sample.text for sample in in_parallel if not sample.correct]
    assert len(wrong) <= 2, wrong
    assert summarize("", in_parallel).parallelism > 1.5


def test_it_solves_unseen_problems_as_one_chain(engine: Engine, tmp_path: Path) -> None:
    plan = Plan("embedded", MODES["sequential"], Config(max_new_tokens=TASK.max_new_tokens), batch=20)
    samples = collect(engine, generated_questions(TASK, 20, 3), plan, tmp_path / "sequential.jsonl")
    assert sum(sample.correct for sample in samples) >= 18
    assert summarize("", samples).parallelism == 1


@pytest.mark.parametrize("newline", ["", "\n"], ids=["no newline", "newline"])
def test_a_bare_question_is_answered_in_parallel(engine: Engine, newline: str) -> None:
    problem = next(problem for problem in generate(4, "test") if len(problem.terms) == 2)
    (result,) = engine.generate(problem.question + newline)
    assert grade(result.text, problem)
    assert not result.warnings
    trace, _ = parse_text(result.text)
    assert len(trace.blocks[0].paths) == 2


@pytest.mark.parametrize("first", [0, 10])
def test_lossless_on_problems(engine: Engine, first: int) -> None:
    """Every greedy token is the argmax of the packed forward, and of its path decoded alone with a plain cache."""
    problems = list(islice(generate(5, "test"), first, first + 10))
    recorder = Recorder()
    results = engine.generate(
        [problem.prompt() for problem in problems], Config(max_new_tokens=TASK.max_new_tokens), recorder
    )
    for request, result in enumerate(results):
        assert not result.warnings and result.finish_reason == "stop"
        compared = check_lossless(engine, recorder, result, TOLERANCE, request, chunk=64)
        assert compared == result.layout.sampled.sum() > 200


def test_lossless_with_preemption_at_every_step(engine: Engine) -> None:
    """Blocks in blocks; before every step all pages are given back, and all is computed again."""
    problem = next(problem for problem in generate(7, "test") if len(problem.terms) == 2)
    config = Config(max_new_tokens=TASK.max_new_tokens)
    (expected,) = engine.generate(problem.prompt(), config)
    recorder, before = Recorder(), engine.preemptions
    with preempted_before_every_step():
        (result,) = engine.generate(problem.prompt(), config, recorder)
    assert engine.preemptions - before > result.critical_path / 2
    assert result.token_ids == expected.token_ids and result.finish_reason == "stop"
    assert any(len(path) > 1 for path in result.texts)
    assert check_lossless(engine, recorder, result, TOLERANCE, chunk=64) == result.layout.sampled.sum() > 150
