"""The LightEval model against LightEval's own classes; skipped where LightEval is not installed."""

from __future__ import annotations

import importlib.util
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("lighteval.models.abstract_model", reason="needs LightEval, which no extra installs")

from lighteval.models.abstract_model import LightevalModel, ModelConfig
from lighteval.models.model_input import GenerationParameters
from lighteval.tasks.requests import Doc

from mvkernels.model import Engine, GenerationConfig
from mvkernels.model.checkpoint.loading import EMBEDDED
from mvkernels.model.tasks import arithmetic

FILE = Path(__file__).resolve().parents[2] / "mvkernels" / "model" / "evaluation" / "lighteval_model.py"
PROBLEMS = [problem for problem in islice(arithmetic.generate(1, "test"), 12) if len(problem.terms) == 2][:2]


@pytest.fixture(scope="module")
def kind() -> type:
    """As LightEval finds it: the one class in the file that inherits from LightevalModel."""
    spec = importlib.util.spec_from_file_location("custom_model_module", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, LightevalModel)]
    (own,) = [value for value in found if value is not LightevalModel]
    return own


def config(**parameters: object) -> ModelConfig:
    return ModelConfig(model_name=str(EMBEDDED), generation_parameters=GenerationParameters(**parameters))


def test_documents_are_answered_by_the_engine_in_order(kind: type) -> None:
    model = kind(config(max_new_tokens=2000))
    # The template of the embedded model adds the ending itself; as plain text the prompt is the task's own.
    model._chat = model._prompts.use_chat_template = False
    docs = [Doc(query=problem.question, choices=[str(problem.answer)], gold_index=0) for problem in PROBLEMS]
    found = model.greedy_until(docs)
    expected = Engine.from_pretrained(EMBEDDED).generate(
        [p.prompt() for p in PROBLEMS], GenerationConfig(max_new_tokens=2000)
    )
    assert [response.text for response in found] == [[one.text] for one in expected]
    assert all(arithmetic.grade(response.text[0], problem) for response, problem in zip(found, PROBLEMS, strict=True))
    assert found[0].input_tokens + found[0].output_tokens[0] == expected[0].token_ids


def test_samples_and_limits_are_those_that_the_task_asks_for(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVKERNELS_MODE", "sequential")
    model = kind(config(temperature=1.5, seed=3))
    docs = [
        Doc(query="Compute 2*3 + 4*5.", choices=["26"], gold_index=0, num_samples=n, generation_size=size)
        for n, size in ((1, 9), (3, 20), (1, 5))
    ]
    found = model.greedy_until(docs)
    assert [[len(tokens) for tokens in response.output_tokens] for response in found] == [[9], [20, 20, 20], [5]]
    assert len(set(found[1].text)) == 3
    assert not any("<Parallel>" in text for response in found for text in response.text)
    assert found[0].input[-1]["content"].endswith(" Think step by step before answering.")


def test_what_it_cannot_do_is_said(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind(config())
    for method in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(NotImplementedError, match="expected tasks whose answers are generated"):
            method([])
    monkeypatch.setenv("MVKERNELS_MODE", "fast")
    with pytest.raises(ValueError, match=r"MVKERNELS_MODE: expected one of .*, got 'fast'"):
        kind(config())
