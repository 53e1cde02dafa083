"""The engine: prompts in, generations out. Each step is one forward over all branches of all requests.

This is what callers see; what they ask for is checked here before anything runs. The loop is in core.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import torch
from transformers import PreTrainedModel

from mvkernels.cache.cache import PagedKVCache
from mvkernels.errors import OutOfPages, require_integer
from mvkernels.graph.graph import DecodeGraph
from mvkernels.hf import ATTENTION_NAME, patch_model, patched_backend
from mvkernels.hf_layers import fuse_layers
from mvkernels.hf_linear import narrow_bytes, narrow_rows, pack_linear, packs_without_memory
from mvkernels.hf_norm import fuse_norms
from mvkernels.hf_parts import Snapshot
from mvkernels.layout import SEMANTICS
from mvkernels.model.checkpoint.add_tags import read_entry
from mvkernels.model.checkpoint.loading import load_checkpoint
from mvkernels.model.engine.control.masks import TokenMasks
from mvkernels.model.engine.control.writer import TagWriter
from mvkernels.model.engine.core import Core
from mvkernels.model.engine.memory import fits_narrow, make_cache
from mvkernels.model.engine.output.events import (
    Event,
    FinishEvent,
    ForkEvent,
    Generation,
    MergeEvent,
    PathEndEvent,
    TextEvent,
    TokenEvent,
)
from mvkernels.model.engine.prompt_job import Task, make_task
from mvkernels.model.engine.prompts import as_prompts
from mvkernels.model.engine.request import Request
from mvkernels.model.engine.runner import Runner
from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.engine.sampling.sampler import BranchView, Sampler, request_key, sample
from mvkernels.model.engine.streams import AsyncStream, Stream
from mvkernels.model.engine.strict import STRICT_ROWS, check_strict
from mvkernels.tags import TagTokens

__all__ = [
    "AsyncStream",
    "BranchView",
    "Engine",
    "Event",
    "FinishEvent",
    "ForkEvent",
    "Generation",
    "GenerationConfig",
    "MergeEvent",
    "PathEndEvent",
    "Sampler",
    "Stream",
    "TextEvent",
    "TokenEvent",
]


class Engine:
    """Generates with a transformers model, in parallel wherever the model writes a block.

    model            a causal language model that `patch_model` takes; it is patched in place
    tokenizer        its tokenizer; without the control tags it generates sequentially, and says so once
    backend          of the attention
    page_size        in tokens. num_pages: pages for all requests together; None: a share of the memory
    seed             part of all randomness
    semantics        "canonical" or "released" (DESIGN.md, section 1.3); None: what the weights name, else canonical
    max_step_tokens  tokens of one forward; prompts come in pieces where they do not fit. None: 512 on a CPU, else 4096
    max_step_width   branches of one request in one forward; if it has more, they take turns
    max_requests     requests that run at once; more of them wait
    fast_linear      whether layers run in the kernels of this library: on a CPU linear layers that multiply few rows
                     (`mvkernels.hf_linear.pack_linear`); norms (`mvkernels.hf_norm.fuse_norms`) and decoder layers
                     (`mvkernels.hf_layers.fuse_layers`) there and on a GPU; without gradients only; `unpack_linear`,
                     `unfuse_norms`, `unfuse_layers` undo it. None: where that takes no memory; on a CPU for bf16, and
                     for fp32 without a C++ compiler, the linear layers take as much again as the weights. Either way
                     fp32 weights that lose nothing in bf16 are also kept in it and read from there, unless that takes
                     more than an eighth of the memory, or no step of the engine has few enough rows for it
    graph            whether steps go through a DecodeGraph, which replays CUDA graphs; None: on a GPU
    prefix_cache     whether what requests begin with stays in pages, for those that begin in the same way: a common
                     prompt, the samples of one, the next turn of a chat, a request that is computed again. Such pages
                     are given up, the least recently used first, before any request has to make room. Weights that are
                     written to in place, or move, are noticed; after other changes of the model call `clear_prefixes`
    strict           whether a request's tokens and log-probabilities shall be the same, bit for bit, whoever shares its
                     steps (strict.py): every forward has max_step_tokens rows, by default 64, and no graph
    One engine serves any number of threads and tasks at once; their requests share its steps. A call raises ValueError
    where the model is meanwhile unpatched, or patched with another backend. Raises ValueError for a
    model on several devices, for weights trained with other tags or semantics, and for sizes and limits below 1;
    BackendError where `strict` cannot be kept; otherwise what `patch_model` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        backend: str = "auto",
        page_size: int = 16,
        num_pages: int | None = None,
        seed: int = 0,
        semantics: str | None = None,
        max_step_tokens: int | None = None,
        max_step_width: int = 64,
        max_requests: int = 256,
        graph: bool | None = None,
        prefix_cache: bool = True,
        fast_linear: bool | None = None,
        strict: bool = False,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
        limits = {"max_step_tokens": max_step_tokens, "max_step_width": max_step_width, "max_requests": max_requests}
        for name, size in {"page_size": page_size, "num_pages": num_pages, **limits}.items():
            if size is not None or name == "page_size":
                require_integer(f"{name}: expected an integer", size)
        if page_size < 1 or (num_pages is not None and num_pages < 1):
            expected = "page_size of at least 1 and num_pages of at least 1, or None"
            raise ValueError(f"expected {expected}, got {page_size} and {num_pages}")
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name}: expected at least 1, got {limit}")
        devices = sorted({str(p.device) for p in model.parameters()})
        if len(devices) != 1 or devices == ["meta"]:
            raise ValueError(f"expected a model on one device, got {', '.join(devices) or 'no parameters'}")
        trained = read_entry(model.config)
        if semantics not in (None, *SEMANTICS) or (semantics and trained and semantics != trained):
            expected = f"one of {SEMANTICS}" if trained is None else f"{trained!r}, with which the weights were trained"
            raise ValueError(f"semantics: expected {expected}, got {semantics!r}")
        if strict:
            check_strict(model, backend, graph)
        self.model, self.backend = patch_model(model, backend=backend), backend
        free = self.model.device.type == "cuda" or packs_without_memory(self.model)
        if fast_linear or (fast_linear is None and free):
            rows = (max_step_tokens or STRICT_ROWS) if strict else 1
            size = narrow_bytes(model)
            narrow = size > 0 and fits_narrow(size) and rows <= narrow_rows()
            fuse_layers(fuse_norms(pack_linear(self.model, narrow=narrow)))
        self.tokenizer = tokenizer
        self.page_size, self.num_pages, self.seed = page_size, num_pages, seed
        self.graph, self.strict = False if strict else graph, strict
        self.prefix_cache = prefix_cache
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        self._core: Core | None = None
        self._training = False
        self._weights: Snapshot | None = None  # with which the prefixes were computed
        try:
            self.tags: TagTokens | None = TagTokens.from_tokenizer(tokenizer)
        except ValueError as error:
            self.tags = None
            warnings.warn(f"the engine generates sequentially: {error}", stacklevel=2)
        self._writer = None if self.tags is None else TagWriter(self.tags, semantics or trained or "canonical")
        self._masks: TokenMasks | None = None

    def __repr__(self) -> str:
        model, tags = type(self.model).__name__, "sequential" if self.tags is None else "parallel"
        size = f"{self.model.num_parameters()} parameters, {self.model.dtype}, {self.model.device}"
        return f"Engine({model} of {size}, {tags})"

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
        """An engine for a local checkpoint: a folder with safetensors, a GGUF file, or "embedded", the package's own.

        options: those of `Engine`. Raises ValueError where the checkpoint cannot be read, in one line.
        """
        model, tokenizer = load_checkpoint(path, dtype, device, device_map)
        return cls(model, tokenizer, backend=backend, **options)

    def generate(
        self,
        prompts: Any,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        sampler: Sampler = sample,
        n: int = 1,
    ) -> list[Generation]:
        """Generate for one prompt or several at once; n `Generation`s each, in order.

        prompts: a text, a chat (list of messages), token ids, or a list of these. config: one for all, or one each.
        sampler: takes the branches and their logits, gives their next tokens. n: samples of each prompt, with
        randomness of their own. Raises ValueError for a bad prompt, before anything runs, and OutOfPages when a prompt
        alone does not fit into `num_pages`, or these not into memory.
        """
        with Stream(*self._requests(prompts, config, n), sampler, only_ends=True) as ends:
            found = [event for event in ends if isinstance(event, FinishEvent)]
        return [event.generation for event in sorted(found, key=lambda event: event.request)]

    def stream(
        self,
        prompts: Any,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        sampler: Sampler = sample,
        n: int = 1,
    ) -> Stream:
        """The same, told while it happens. Closing the iterator ends everything and gives every page back."""
        return Stream(*self._requests(prompts, config, n), sampler)

    def astream(
        self,
        prompts: Any,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        sampler: Sampler = sample,
        n: int = 1,
    ) -> AsyncStream:
        """The same for `async for`. The steps are made in a thread of the engine's, where the sampler is called too."""
        return AsyncStream(*self._requests(prompts, config, n), sampler)

    def chat(
        self, messages: Sequence[dict[str, str]], config: GenerationConfig | None = None, sampler: Sampler = sample
    ) -> Generation:
        """Answer one conversation, put into the tokenizer's chat template."""
        return self.generate([list(messages)], config, sampler)[0]

    @property
    def cache(self) -> PagedKVCache | None:
        """The pages of all requests; None before the first one."""
        return None if self._core is None else self._core.runner.cache

    @property
    def preemptions(self) -> int:
        """How often a request had to give its pages back and was computed again, since the engine was made."""
        return 0 if self._core is None else self._core.scheduler.preemptions

    @property
    def prefix_hits(self) -> int:
        """How many tokens requests did not compute because others had, since the engine was made."""
        return 0 if self._core is None or self._core.prefixes is None else self._core.prefixes.hits

    @property
    def available_pages(self) -> int:
        """Pages that no request uses, those of prefixes included; between two calls all there are."""
        if self._core is None:
            return 0
        prefixes = self._core.prefixes
        return self._core.runner.cache.num_available_pages + (0 if prefixes is None else prefixes.idle_pages)

    def clear_prefixes(self) -> None:
        """Gives up all prefixes that no request uses at the moment."""
        core = self._core
        if core is not None and core.prefixes is not None:
            core.between_steps(core.prefixes.clear)

    # ---- before the run

    def _requests(
        self, prompts: Any, config: GenerationConfig | Sequence[GenerationConfig] | None, n: int
    ) -> tuple[Core, list[Request]]:
        tasks = self._tasks(prompts, config, n)
        core = self._ready()
        cache = core.runner.cache
        for task in tasks:
            needed = -(-len(task.ids) // self.page_size)
            if needed > cache.num_pages:
                expected = f"at most {cache.num_pages} pages to be needed"
                raise OutOfPages(f"prompt {task.index}: expected {expected}, got {needed}")
        parts = self.tokenizer, self._writer, self._masks, core.prefixes
        return core, [Request(task, cache, *parts) for task in tasks]

    def _tasks(self, prompts: Any, config: GenerationConfig | Sequence[GenerationConfig] | None, n: int) -> list[Task]:
        listed = as_prompts(prompts)
        require_integer("n: expected an integer", n)
        if n < 1:
            raise ValueError(f"n: expected at least 1, got {n}")
        if config is None or isinstance(config, GenerationConfig):
            configs = [config or GenerationConfig()] * len(listed)
        else:
            configs = list(config) if isinstance(config, Iterable) else [config]
            wrong = [one for one in configs if not isinstance(one, GenerationConfig)]
            if wrong:
                raise ValueError(f"config: expected a GenerationConfig, one or one a prompt, got {shorten(wrong[0])}")
            if len(configs) != len(listed):
                raise ValueError(f"expected one config for each of {len(listed)} prompts, got {len(configs)}")
        pairs = enumerate(zip(listed, configs, strict=True))
        tasks = [make_task(i, *pair, self.model, self.tokenizer, self.tags, self.seed) for i, pair in pairs]
        return [
            replace(task, index=task.index * n + i, key=request_key(self.seed, task.config.seed, i))
            for task in tasks
            for i in range(n)
        ]

    def _ready(self) -> Core:
        """The loop and the masks, made at first use; again where the model has moved or is another. The loop is kept
        while something runs.
        """
        self._require_patched()
        core, model, device = self._core, self.model, self.model.device
        head: Any = model.get_output_embeddings()
        place = len(head.weight), device
        if self.tags is not None and (self._masks is None or self._masks.place != place):
            self._masks = TokenMasks(self.tags, *place)
        if core is not None:
            runner = core.runner
            found = runner.model, runner.cache.device, runner.cache.dtype
            if core.busy or found == (model, device, model.dtype):
                return core
        cache = make_cache(self.model, self.page_size, self.num_pages)
        captures = device.type == "cuda" if self.graph is None else self.graph
        most = STRICT_ROWS if self.strict else 512 if device.type == "cpu" else 4096
        limits = {"max_step_tokens": most, **self.limits}
        constant_rows = limits["max_step_tokens"] if self.strict else None
        runner = Runner(self.model, cache, DecodeGraph(self.model, cache) if captures else None, constant_rows)
        released = self._writer is not None and self._writer.semantics == "released"
        self._core = Core(
            runner, self._wake, self._rest, limits, own_positions=released, prefix_cache=self.prefix_cache
        )
        return self._core

    def _require_patched(self) -> None:
        """Raises ValueError where the model is no longer patched as this engine has done it."""
        attention = self.model.config.get_text_config()._attn_implementation
        if attention != ATTENTION_NAME:
            got = f"one with attention implementation {attention!r}"
        elif (backend := patched_backend(self.model)) != self.backend:
            got = f"one patched with backend {backend!r}"
        else:
            return
        call = f"patch_model(engine.model, backend={self.backend!r})"
        raise ValueError(f"expected the model as the engine has patched it, got {got}; {call} patches it again")

    # ---- while there is work

    def _wake(self) -> None:
        self._require_patched()
        self._training = self.model.training
        self.model.train(False)
        weights = list(self.model.parameters())
        known, core = self._weights, self._core
        if known is None or not known.holds(weights):
            self._weights = Snapshot(weights)
            if core is not None and core.prefixes is not None:
                core.prefixes.clear()

    def _rest(self) -> None:
        self.model.train(self._training)
