"""The engine: prompts in, generations out. Each step is one forward over all branches of all requests.

plan   the tokens that are not in the cache yet, of every branch            (PagedKVCache.plan)
run    the model over them, keys and values into the pages                  (paged_kv=)
sample one token for every branch that runs, from its last row's logits     (sampling.py)
read   each token through the request's interpreter: forks, merges, ends    (interpreter.py, request.py)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from mvkernels.errors import OutOfPages
from mvkernels.hf import patch_model
from mvkernels.kv_cache import PagedKVCache
from mvkernels.kv_step import Step
from mvkernels.model.config import GenerationConfig
from mvkernels.model.events import Event, FinishEvent, ForkEvent, Generation, MergeEvent, TokenEvent
from mvkernels.model.loading import load_checkpoint
from mvkernels.model.prompts import as_prompts
from mvkernels.model.request import Request
from mvkernels.model.sampling import BranchView, Sampler, sample
from mvkernels.model.task import Task, make_task, most_pages
from mvkernels.model.tokens import read_entry
from mvkernels.tags import TagTokens

__all__ = [
    "BranchView",
    "Engine",
    "Event",
    "FinishEvent",
    "ForkEvent",
    "Generation",
    "GenerationConfig",
    "MergeEvent",
    "Sampler",
    "TokenEvent",
]

_Entry: TypeAlias = tuple[Request, int, list[int]]  # request, branch, its new tokens


class Engine:
    """Generates with a transformers model, in parallel wherever the model writes a block.

    model: a causal language model that `patch_model` takes; it is patched in place. tokenizer: its tokenizer; without
    the control tags it generates sequentially, and says so once. backend: of the attention. page_size: in tokens.
    num_pages: pages for all requests of a call; None: as many as they can need. seed: part of all randomness.
    Raises ValueError for a model on several devices and for weights trained with other tags or semantics than
    canonical, and for a page_size or num_pages below 1; otherwise what `patch_model` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        backend: str = "auto",
        page_size: int = 16,
        num_pages: int | None = None,
        seed: int = 0,
    ) -> None:
        if page_size < 1 or (num_pages is not None and num_pages < 1):
            expected = "page_size of at least 1 and num_pages of at least 1, or None"
            raise ValueError(f"expected {expected}, got {page_size} and {num_pages}")
        devices = sorted({str(p.device) for p in model.parameters()})
        if len(devices) != 1 or devices == ["meta"]:
            raise ValueError(f"expected a model on one device, got {', '.join(devices) or 'no parameters'}")
        semantics = read_entry(model.config)
        if semantics not in (None, "canonical"):
            raise ValueError(f"expected weights trained with canonical semantics, got {semantics} ones")
        self.model = patch_model(model, backend=backend)
        self.tokenizer = tokenizer
        self.page_size, self.num_pages, self.seed = page_size, num_pages, seed
        self.cache: PagedKVCache | None = None  # of the latest call
        try:
            self.tags: TagTokens | None = TagTokens.from_tokenizer(tokenizer)
        except ValueError as error:
            self.tags = None
            warnings.warn(f"the engine generates sequentially: {error}", stacklevel=2)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        device_map: Any = None,
        backend: str = "auto",
        **options: Any,
    ) -> Engine:
        """An engine for a local checkpoint: a folder with safetensors, or a GGUF file.

        options: those of `Engine`. Raises ValueError where the checkpoint cannot be read, in one line.
        """
        model, tokenizer = load_checkpoint(path, dtype, device, device_map)
        return cls(model, tokenizer, backend=backend, **options)

    def generate(
        self,
        prompts: Any,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        sampler: Sampler = sample,
    ) -> list[Generation]:
        """Generate for one prompt or several at once; one `Generation` each, in order.

        prompts: a text, a chat (list of messages), token ids, or a list of these. config: one for all, or one each.
        sampler: takes the branches and their logits, gives their next tokens. Raises ValueError for a bad prompt,
        before anything runs, and OutOfPages when a prompt alone does not fit into `num_pages`, or these not into
        memory.
        """
        return [event.generation for event in self._sorted_ends(self._events(prompts, config, sampler))]

    def stream(
        self,
        prompts: Any,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        sampler: Sampler = sample,
    ) -> Iterator[Event]:
        """The same, told while it happens. Closing the iterator ends everything and gives every page back."""
        return self._events(prompts, config, sampler)

    def chat(
        self, messages: Sequence[dict[str, str]], config: GenerationConfig | None = None, sampler: Sampler = sample
    ) -> Generation:
        """Answer one conversation, put into the tokenizer's chat template."""
        return self.generate([list(messages)], config, sampler)[0]

    # ---- before the run

    def _tasks(self, prompts: Any, config: GenerationConfig | Sequence[GenerationConfig] | None) -> list[Task]:
        listed = as_prompts(prompts)
        if config is None or isinstance(config, GenerationConfig):
            configs = [config or GenerationConfig()] * len(listed)
        else:
            configs = list(config)
            if len(configs) != len(listed):
                raise ValueError(f"expected one config for each of {len(listed)} prompts, got {len(configs)}")
        pairs = enumerate(zip(listed, configs, strict=True))
        return [make_task(i, *pair, self.model, self.tokenizer, self.tags, self.seed) for i, pair in pairs]

    def _make_cache(self, tasks: Sequence[Task]) -> PagedKVCache:
        num_pages = self.num_pages or sum(most_pages(task, self.tags, self.page_size) for task in tasks)
        for task in tasks:
            needed = -(-len(task.ids) // self.page_size)
            if needed > num_pages:
                raise OutOfPages(f"prompt {task.index}: expected at most {num_pages} pages to be needed, got {needed}")
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        try:
            return PagedKVCache(
                num_pages=num_pages,
                page_size=self.page_size,
                num_layers=config.num_hidden_layers,
                num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
                dtype=self.model.dtype,
                device=self.model.device,
            )
        except RuntimeError as error:  # on a GPU a subclass of it; PyTorch has no type of its own for the CPU
            if "memory" not in str(error):
                raise
            raise OutOfPages(
                f"expected a cache that fits into memory, got {num_pages} pages of {self.page_size} tokens: lower "
                "max_new_tokens, or set num_pages"
            ) from error

    # ---- the run

    def _events(self, prompts: Any, config: Any, sampler: Sampler) -> Iterator[Event]:
        """Checks at once, runs when it is iterated."""
        tasks = self._tasks(prompts, config)
        return self._run(tasks, sampler) if tasks else iter(())

    @staticmethod
    def _sorted_ends(events: Iterator[Event]) -> list[FinishEvent]:
        return sorted((e for e in events if isinstance(e, FinishEvent)), key=lambda event: event.request)

    def _run(self, tasks: Sequence[Task], sampler: Sampler) -> Iterator[Event]:
        cache = self.cache = self._make_cache(tasks)
        training = self.model.training
        self.model.train(False)
        requests: list[Request] = []
        try:
            requests += [Request(task, cache, self.tokenizer, self.tags) for task in tasks]
            active = requests
            while active:
                self._step(active, cache, sampler)
                for request in active:
                    events, request.events = request.events, []
                    yield from events
                active = [request for request in active if request.finish_reason is None]
        finally:
            for request in requests:
                request.release()
            self.model.train(training)

    def _step(self, active: Sequence[Request], cache: PagedKVCache, sampler: Sampler) -> None:
        for request in active:
            request.advance()
        entries, step = self._plan(active, cache)
        if step is None:
            return
        ends = [offset + count - 1 for offset, (_, count) in zip(step.row_offsets, step.entries, strict=True)]
        rows = [i for i, (request, number, _) in enumerate(entries) if request.wants_token(number)]
        ids = [token for _, _, tokens in entries for token in tokens]
        logits = self._forward(ids, [ends[i] for i in rows], cache, step)
        for request, group in groupby(entries, key=lambda entry: entry[0]):
            request.sent([number for _, number, _ in group])
        views = [entries[i][0].view(entries[i][1]) for i in rows]
        for i, token in zip(rows, _ask(sampler, views, logits), strict=True):
            request, number, _ = entries[i]
            if request.finish_reason is None:
                request.take(number, token)

    def _plan(self, active: Sequence[Request], cache: PagedKVCache) -> tuple[list[_Entry], Step | None]:
        """The next step over all requests; where pages run out, the youngest request ends until the rest fits in."""
        while True:
            running = [request for request in active if request.finish_reason is None]
            entries = [(request, number, tokens) for request in running for number, tokens in request.entries()]
            if not entries:
                return [], None
            try:
                return entries, cache.plan([(request.handle(number), len(new)) for request, number, new in entries])
            except OutOfPages:
                running[-1].finish("out_of_pages")

    def _forward(self, ids: list[int], keep: list[int], cache: PagedKVCache, step: Step) -> torch.Tensor:
        """Runs the model over a step and commits it. ids: N tokens. keep: n rows; returns their logits, [n, V]."""
        device = self.model.device
        try:
            with torch.inference_mode():
                logits: torch.Tensor = self.model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=step.positions[None],
                    paged_kv=(cache, step),
                    use_cache=False,
                    logits_to_keep=torch.tensor(keep or [0], device=device),
                ).logits[0, : len(keep)]
        except BaseException:
            cache.rollback(step)
            raise
        cache.commit(step)
        return logits


def _ask(sampler: Sampler, views: list[BranchView], logits: torch.Tensor) -> list[int]:
    """The sampler's tokens, checked. Raises ValueError for a wrong number of tokens and for ids out of range."""
    if not views:
        return []
    chosen = [int(token) for token in sampler(views, logits.float())]
    if len(chosen) != len(views):
        raise ValueError(f"sampler: expected {len(views)} tokens, one for each branch, got {len(chosen)}")
    wrong = [token for token in chosen if not 0 <= token < logits.shape[-1]]
    if wrong:
        raise ValueError(f"sampler: expected token ids from 0 to {logits.shape[-1] - 1}, got {wrong[0]}")
    return chosen
