"""One prompt and its config, resolved against a model and checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from mvkernels.grammar import Kind, parse
from mvkernels.layout import BranchLayout
from mvkernels.model.config import GenerationConfig
from mvkernels.model.prompts import Given, Prompt, prompt_ids, split_prompt
from mvkernels.tags import TagTokens


@dataclass(frozen=True)
class Task:
    """What is asked, resolved against the model: `stop` and `eos` are never None here, and the prompt is checked.

    prompt_critical_path: of the prompt alone. max_positions: how many positions the model has.
    """

    index: int
    ids: list[int]
    given: Given
    prompt_critical_path: int
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
) -> Task:
    """Resolve and check one prompt. seed: the engine's.

    Raises ValueError for a bad prompt, one with malformed blocks (GrammarError), and one whose critical path leaves the
    model no position for a new token.
    """
    embedding: Any = model.get_input_embeddings()
    ids = prompt_ids(prompt, tokenizer, tags, int(embedding.weight.shape[0]))
    given, critical_path = Given(), len(ids)
    if tags is None:
        given.tokens.extend(ids)
    else:
        given = split_prompt(ids, parse(tags.kinds(ids), allow_open=True))
        critical_path = BranchLayout.from_token_ids(ids, tags, allow_open=True).critical_path
    positions: int = model.config.get_text_config().max_position_embeddings
    if critical_path + 1 > positions:
        raise ValueError(
            f"prompt {index}: expected a critical path of at most {positions - 1} tokens, as the model has "
            f"{positions} positions, got {critical_path}"
        )
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
        given=given,
        prompt_critical_path=critical_path,
        config=config,
        stop=stop,
        eos=frozenset(eos),
        key=f"{seed}:{config.seed}:",
        max_positions=positions,
    )


def most_pages(task: Task, tags: TagTokens | None, page_size: int) -> int:
    """An upper bound on the pages of a request: full ones, and one ragged page for each node of the cache.

    A path and what follows its block are a node each. A block of n paths has n + 1 nodes and at least 3 + 2 n tags
    before them, and the engine writes at least 3 n + 2 tokens: no more nodes than a quarter of the tokens.
    """
    tokens = len(task.ids) + task.config.max_new_tokens
    branches = tags is not None and (task.config.max_depth > 0 or tags.id(Kind.PARALLEL) in task.ids)
    return -(-tokens // page_size) + 1 + (-(-tokens // 4) if branches else 0)
