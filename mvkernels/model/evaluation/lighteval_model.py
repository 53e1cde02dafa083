"""A LightEval custom model, so that LightEval's own tasks run on the engine.

    lighteval custom CHECKPOINT mvkernels/model/evaluation/lighteval_model.py TASKS

The prompt of a task is one user turn (with its few-shot examples and instruction, as LightEval's own prompt manager
puts them) that ends with what asks for blocks; `MVKERNELS_MODE` in the environment names another mode of `MODES`.
LightEval sets length, temperature and the like, the samples of a document share its prompt, and LightEval grades.
Log-likelihoods of given answers are refused: there is nothing to decode in parallel in them.

Nothing of the package imports this module: it needs LightEval, which is no dependency.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from lighteval.models.abstract_model import LightevalModel
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.prompt_manager import PromptManager

from mvkernels.model.engine.engine import Engine
from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.evaluation.samples import MODES

#: Where neither the command line nor the task says how long an answer may be.
DEFAULT_MAX_TOKENS = 32768


class MultiverseModel(LightevalModel):  # type: ignore[misc]
    """config: LightEval's CustomModelConfig, whose model_name is a local checkpoint. Raises ValueError for its mode."""

    def __init__(self, config: Any) -> None:
        mode = os.environ.get("MVKERNELS_MODE", "parallel")
        if mode not in MODES:
            raise ValueError(f"MVKERNELS_MODE: expected one of {tuple(MODES)}, got {mode!r}")
        self.config, self.mode = config, MODES[mode]
        self.engine = Engine.from_pretrained(config.model_name)
        chat = getattr(self.engine.tokenizer, "chat_template", None) is not None
        self._prompts = PromptManager(chat, self.engine.tokenizer, config.system_prompt)
        self._chat = chat

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        return False

    @property
    def max_length(self) -> int:
        return int(self.engine.model.config.max_position_embeddings)

    def greedy_until(self, docs: list[Any]) -> list[Any]:
        """One ModelResponse a document, with as many texts as it asks for samples."""
        groups: dict[int, list[int]] = {}
        for place, doc in enumerate(docs):
            groups.setdefault(doc.num_samples, []).append(place)
        found: dict[int, Any] = {}
        for n, places in groups.items():
            prompts = [self._prompt(docs[place]) for place in places]
            generations = self.engine.generate(prompts, [self._config(docs[place]) for place in places], n=n)
            for i, place in enumerate(places):
                found[place] = self._response(prompts[i], generations[i * n : (i + 1) * n])
        return [found[place] for place in range(len(docs))]

    def loglikelihood(self, docs: list[Any]) -> list[Any]:
        raise NotImplementedError("expected tasks whose answers are generated, got one that compares log-likelihoods")

    def loglikelihood_rolling(self, docs: list[Any]) -> list[Any]:
        raise NotImplementedError("expected tasks whose answers are generated, got one that measures perplexity")

    def _prompt(self, doc: Any) -> Any:
        ended = replace(doc, query=doc.query + self.mode.ending)
        return self._prompts.prepare_prompt_api(ended) if self._chat else self._prompts.prepare_prompt(ended) + "\n"

    def _config(self, doc: Any) -> GenerationConfig:
        given = self.config.generation_parameters
        known: dict[str, Any] = {
            "max_new_tokens": given.max_new_tokens or doc.generation_size or DEFAULT_MAX_TOKENS,
            "temperature": given.temperature,
            "top_k": given.top_k,
            "top_p": given.top_p,
            "min_p": given.min_p,
            "repetition_penalty": given.repetition_penalty,
            "seed": given.seed,
            "stop": None if self._chat else tuple(doc.stop_sequences or ()) or None,
            "max_depth": None if self.mode.blocks else 0,
        }
        return GenerationConfig(**{name: value for name, value in known.items() if value is not None})

    def _response(self, prompt: Any, generations: list[Any]) -> Any:
        first = generations[0]
        return ModelResponse(
            input=prompt,
            input_tokens=first.token_ids[: first.prompt_length],
            text=[one.text for one in generations],
            output_tokens=[one.token_ids[one.prompt_length :] for one in generations],
        )
