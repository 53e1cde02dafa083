"""One prompt and its config, resolved against a model and checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from mvkernels.grammar import parse
from mvkernels.model.config import GenerationConfig
from mvkernels.model.prompts import Prompt, prompt_ids
from mvkernels.model.sampling import request_key
from mvkernels.tags import TagTokens


@dataclass(frozen=True)
class Task:
    """What is asked, resolved against the model: `stop` and `eos` are never None here, and the prompt is checked.

    max_positions: how many positions the model has.
    """

    index: int
    ids: list[int]
    config: GenerationConfig
    stop: tuple[str, ...]
    eos: frozenset[int]
    key: str
    max_positions: int


def make_task(
    index: int,
    prompt: Prompt,
    config: GenerationConfig,
    model: PreTrainedModel,
    tokenizer: Any,
    tags: TagTokens | None,
    seed: int,
    sample: int = 0,
) -> Task:
    """Resolve and check one prompt. seed: the engine's. sample: which of the n samples of the prompt, from 0.

    Raises ValueError for a bad prompt, and one with malformed blocks (GrammarError).
    """
    embedding: Any = model.get_input_embeddings()
    ids = prompt_ids(prompt, tokenizer, tags, int(embedding.weight.shape[0]))
    if tags is not None:
        parse(tags.kinds(ids), allow_open=True)
    eos, stop = config.eos_token_ids, config.stop
    if eos is None:
        found = getattr(model.generation_config, "eos_token_id", None)
        eos = () if found is None else (found,) if isinstance(found, int) else tuple(found)
    if stop is None:
        strings = getattr(model.generation_config, "stop_strings", None) or ()
        stop = (strings,) if isinstance(strings, str) else tuple(strings)
    return Task(
        index=index,
        ids=ids,
        config=config,
        stop=stop,
        eos=frozenset(eos),
        key=request_key(seed, config.seed, sample),
        max_positions=model.config.get_text_config().max_position_embeddings,
    )
