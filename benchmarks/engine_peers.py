"""Peers of the engine suite on plain prompts, and the bare forward that bounds what parallel paths can gain.

    ours                 Engine.generate, all prompts at once
    generate             transformers' model.generate, one prompt; several: one after the other
    generate-padded      the same on all prompts at once, padded on the left
    continuous-batching  transformers' generate_batch, with a manager that lives on between calls

All run on the same parameters: the peers on a copy of the model that is not patched (`Loaded.twin`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from transformers import ContinuousBatchingConfig, DynamicCache, PreTrainedModel
from transformers import GenerationConfig as TransformersConfig

from benchmarks.engine_cases import plain_config
from mvkernels.cache.step import Branch, Step
from mvkernels.decoder.choose import make_decoder
from mvkernels.model.engine.engine import Engine
from mvkernels.model.engine.memory import make_cache

Prompts = Sequence[list[int]]


@dataclass(frozen=True)
class EnginePeer:
    """run: tokens of each prompt -> what comes after each prompt. close: gives back what outlives a call."""

    name: str
    run: Callable[[int], list[list[int]]]
    close: Callable[[], None] = lambda: None


def ours(engine: Engine, prompts: Prompts) -> EnginePeer:
    def run(tokens: int) -> list[list[int]]:
        outcomes = engine.generate(list(prompts), plain_config(tokens))
        return [one.token_ids[one.prompt_length :] for one in outcomes]

    return EnginePeer("ours", run)


def generate(twin: PreTrainedModel, prompts: Prompts) -> EnginePeer:
    def run(tokens: int) -> list[list[int]]:
        return [line for prompt in prompts for line in _generate(twin, [prompt], tokens)]

    return EnginePeer("generate", run)


def generate_padded(twin: PreTrainedModel, prompts: Prompts) -> EnginePeer:
    return EnginePeer("generate-padded", lambda tokens: _generate(twin, prompts, tokens))


def _generate(twin: PreTrainedModel, prompts: Prompts, tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=twin.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=twin.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = twin.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    lines: list[list[int]] = out[:, longest:].tolist()
    return lines


def continuous_batching(twin: PreTrainedModel, prompts: Prompts, tokens: int) -> EnginePeer:
    """tokens: the most that will be asked for. The cache is as large as they need; all other settings are its own."""
    page = 16
    pages = sum(-(-(len(prompt) + tokens) // page) + 1 for prompt in prompts)
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=2 * pages, max_batch_tokens=max(512, len(prompts)), allow_block_sharing=False
    )
    config = TransformersConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0)

    def run(count: int) -> list[list[int]]:
        found = twin.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=config,
            continuous_batching_config=batching,
            persistent_manager=True,
            max_new_tokens=count,
        )
        failed = next((one.error for one in found.values() if one.error is not None), None)
        if failed is not None or len(found) != len(prompts):
            raise RuntimeError(f"generate_batch ended {len(found)} of {len(prompts)} requests: {failed}")
        return [list(one.generated_tokens) for one in found.values()]

    return EnginePeer("continuous-batching", run, twin.destroy_cached_continuous_batching_manager)


def bare_forward(twin: PreTrainedModel, context: Sequence[int], rows: int) -> Callable[[], object]:
    """The model's forward on `rows` tokens behind a cached context, logits of all of them: t(rows).

    One sequence, so that the context is read once, as by paths that share it. The cache is put back before each call.
    """
    cache = DynamicCache(config=twin.config)
    device = twin.device
    with torch.inference_mode():
        twin(torch.tensor([list(context)], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    stored = [(layer.keys, layer.values) for layer in cache.layers]
    ids = torch.tensor([list(context[:1]) * rows], device=device)
    positions = torch.full((1, rows), len(context), device=device)
    positions += torch.arange(rows, device=device)

    def call() -> object:
        for layer, (keys, values) in zip(cache.layers, stored, strict=True):
            layer.keys, layer.values = keys, values
        with torch.inference_mode():
            return twin(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits

    return call


def own_forward(twin: PreTrainedModel, context: Sequence[int], rows: int) -> Callable[[], object]:
    """The same by the engine's decoder: `rows` branches behind the context, whose pages they share."""
    decoder = make_decoder(twin, "own")
    cache = make_cache(twin, 16, -(-len(context) // 16) + rows)
    trunk = cache.new()

    def forward(entries: Sequence[tuple[Branch, int]], ids: Sequence[int], last: int) -> tuple[Step, torch.Tensor]:
        step = cache.plan(entries)
        with torch.inference_mode():
            return step, decoder.forward(torch.tensor(ids), step.positions, cache, step, torch.arange(last))

    step, _ = forward([(trunk, len(context))], context, 1)
    cache.commit(step)
    entries = [(branch, 1) for branch in cache.fork(trunk, rows)]
    step, _ = forward(entries, context[:1] * rows, rows)
    ids = torch.tensor(list(context[:1]) * rows)

    def call() -> object:
        with torch.inference_mode():  # an open step may run any number of times
            return decoder.forward(ids, step.positions, cache, step)

    return call


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Without the warnings and progress bars of transformers, which would stand among the results."""
    before = transformers.logging.get_verbosity()
    batching = logging.getLogger("ContinuousBatchingLogger")  # a logger apart from the others
    level = batching.level
    transformers.logging.set_verbosity_error()
    batching.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        batching.setLevel(level)
