"""One prompt and its config, resolved against a model and checked before anything runs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from mvkernels.grammar import TAGS, parse
from mvkernels.model.engine.prompts import Prompt, prompt_ids
from mvkernels.model.engine.sampling.config import GenerationConfig, as_ids, as_strings
from mvkernels.model.engine.sampling.sampler import request_key
from mvkernels.tags import TagTokens


@dataclass(frozen=True)
class PromptJob:
    """What is asked, resolved against the model: `stop` and `eos` are never None here, and the prompt is checked.

    eos: tokens that end a branch where they are sampled; no control tag is among them. max_positions: how many
    positions the model has.
    """

    index: int
    ids: list[int]
    config: GenerationConfig
    stop: tuple[str, ...]
    eos: frozenset[int]
    key: str
    max_positions: int


def make_job(
    index: int,
    prompt: Prompt,
    config: GenerationConfig,
    model: PreTrainedModel,
    tokenizer: Any,
    tags: TagTokens | None,
    seed: int,
) -> PromptJob:
    """Resolve and check one prompt. seed: the engine's. key: of its first sample.

    Raises ValueError for a bad prompt, one with malformed blocks (GrammarError), and ends of text that are none.
    """
    embedding: Any = model.get_input_embeddings()
    ids = prompt_ids(prompt, tokenizer, tags, int(embedding.weight.shape[0]))
    if tags is not None:
        parse(tags.kinds(ids), allow_open=True)
    stop = config.stop
    if stop is None:
        strings = getattr(model.generation_config, "stop_strings", None) or ()
        stop = as_strings("generation_config.stop_strings", [strings] if isinstance(strings, str) else strings)
    return PromptJob(
        index=index,
        ids=ids,
        config=config,
        stop=stop,
        eos=_ends_of_text(config, model, tags),
        key=request_key(seed, config.seed, 0),
        max_positions=model.config.get_text_config().max_position_embeddings,
    )


def _ends_of_text(config: GenerationConfig, model: PreTrainedModel, tags: TagTokens | None) -> frozenset[int]:
    """The tokens that end a branch: the caller's, else those of the model's generation config.

    A control tag has a meaning of its own, so it is refused where the caller names it. In weights that list one, as
    for servers that decode each path as a request, it is left out with a warning.
    """
    given = config.eos_token_ids
    if given is None:
        found = getattr(model.generation_config, "eos_token_id", None)
        given = () if found is None else as_ids("generation_config.eos_token_id", found)
    known = {} if tags is None else dict(zip(tags.ids, TAGS, strict=True))
    named = [known[token] for token in dict.fromkeys(given) if token in known]
    if named:
        expected = "expected ends of text without control tags, which the engine acts on by itself"
        message = f"{expected}, got {' '.join(named)}"
        if config.eos_token_ids is not None:
            raise ValueError(f"eos_token_ids: {message}")
        warnings.warn(f"generation_config.eos_token_id: {message}; left out", stacklevel=2)
    return frozenset(given).difference(known)
