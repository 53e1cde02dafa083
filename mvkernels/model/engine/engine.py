"""The engine: prompts in, generations out. Each step is one forward over all branches of all requests.

This is what callers see; what they ask for is checked here before anything runs. The loop is in core.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import torch
from transformers import PreTrainedModel

from mvkernels.cache.cache import PagedKVCache
from mvkernels.decoder.choose import make_decoder
from mvkernels.decoder.decoder import Decoder
from mvkernels.errors import OutOfPages, require_integer
from mvkernels.graph.graph import DecodeGraph
from mvkernels.hf import ATTENTION_NAME, patched_backend
from mvkernels.layout import SEMANTICS
from mvkernels.model.checkpoint.add_tags import read_entry
from mvkernels.model.checkpoint.loading import load_checkpoint
from mvkernels.model.engine.control.masks import TokenMasks
from mvkernels.model.engine.control.writer import TagWriter
from mvkernels.model.engine.core import Core
from mvkernels.model.engine.memory import make_cache, narrow_bytes
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
from mvkernels.model.engine.prompt_job import PromptJob, make_job
from mvkernels.model.engine.prompts import as_prompts
from mvkernels.model.engine.request import Request
from mvkernels.model.engine.runner import Runner
from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.engine.sampling.sampler import BranchView, Sampler, request_key, sample
from mvkernels.model.engine.streams import AsyncStream, Stream
from mvkernels.model.engine.strict import STRICT_ROWS, check_strict
from mvkernels.model.engine.weights import TakenWeights, matched
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
    """Generate with a transformers model, in parallel where the model writes a block.

    One engine serves any number of threads and tasks; their requests share its steps (continuous batching).

    An own decoder uses the tensors of the model and runs nothing else of it: hooks, adapters and replaced forwards that
    are added later have no effect. `update_weights` replaces weights at any time. Parameters that are replaced or
    written in place are noticed when a request comes to an idle engine. After writes through `.data` or within
    inference mode, and after other changes of the model, call `reload`. A hosted model is called as it is; a call
    raises ValueError if it was unpatched, or patched with another backend.

    Args:
        model: A causal language model of transformers, on one device.
        tokenizer: Its tokenizer. Without the control tags the engine generates sequentially, with one warning.
        backend: Backend of the attention.
        page_size: Tokens of a page of the KV cache.
        num_pages: Pages for all requests together; None: a share of the memory.
        seed: Seed of the engine; each request adds its own.
        semantics: "canonical" or "released" (DESIGN.md, section 1.3). None: those of the weights, else canonical.
        max_step_tokens: Tokens of one forward; longer prompts are prefilled in chunks. None: 512 on a CPU, else 4096.
        max_step_width: Branches of one request in one forward; further ones take turns.
        max_requests: Requests that run at once; further ones wait.
        graph: Whether steps go through a `DecodeGraph`, which replays CUDA graphs; None: on a GPU.
        prefix_cache: Whether prefixes stay in pages for later requests. They are evicted, least recently used first,
            before a request has to make room.
        decoder: "own" (Llama, Mistral, Qwen2, Qwen3), "hosted" (transformers' modules, patched in place), or "auto":
            own where possible, else hosted with a warning that gives the reason.
        strict: Whether a request has the same tokens and log-probs, bit for bit, with any other requests in its steps
            (`strict.py`). Every forward then has max_step_tokens rows, by default 64, and there is no graph.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: The model is on several devices, was trained with other tags or semantics, or a size is below 1.
        BackendError: `strict` cannot be kept, decoder "own" does not define the model (the part is named), or the
            attention backend cannot run.
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
        decoder: str = "auto",
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
        self.model, self.backend, self.tokenizer = model, backend, tokenizer
        self._rows = (max_step_tokens or STRICT_ROWS) if strict else 1
        self._requested_decoder = decoder
        self._take()
        #: How often weights were replaced; a `Generation` has the version with which its request began.
        self.weights_version = 0
        self.page_size, self.num_pages, self.seed = page_size, num_pages, seed
        self.graph, self.strict = False if strict else graph, strict
        self.prefix_cache = prefix_cache
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        self._core: Core | None = None
        self._core_of: tuple[Any, ...] = ()  # the model, its device and its dtype
        self._training = False
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
        decoder: str = "auto",
        **options: Any,
    ) -> Engine:
        """Load a local checkpoint and make an engine for it.

        Args:
            path: A folder with safetensors, a GGUF file, or "embedded", the model of the package.
            dtype: Of the weights; None: as published.
            device: Device of the model; None: a GPU if there is one.
            device_map: As transformers takes it.
            backend: See `Engine`.
            decoder: See `Engine`.
            options: Further arguments of `Engine`.

        Returns:
            The engine.

        Raises:
            ValueError: The checkpoint cannot be read; one line says why.
        """
        model, tokenizer = load_checkpoint(path, dtype, device, device_map)
        return cls(model, tokenizer, backend=backend, decoder=decoder, **options)

    def generate(
        self,
        prompts: Any,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        sampler: Sampler = sample,
        n: int = 1,
    ) -> list[Generation]:
        """Generate for one prompt or several at once.

        Args:
            prompts: A text, a chat (list of messages), token ids, or a list of these.
            config: One for all prompts, or one for each.
            sampler: Maps branches and their logits to the next tokens.
            n: Samples of each prompt, with randomness of their own.

        Returns:
            n generations for each prompt, in order.

        Raises:
            ValueError: A prompt or an option is bad; nothing runs then.
            OutOfPages: A prompt alone does not fit into `num_pages`, or the pages not into memory.
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
        """Generate, and yield an event for every token, fork and merge as it happens.

        Args:
            prompts: See `generate`.
            config: See `generate`.
            sampler: See `generate`.
            n: See `generate`.

        Returns:
            An iterator of events. Closing it ends the requests and returns their pages.
        """
        return Stream(*self._requests(prompts, config, n), sampler)

    def astream(
        self,
        prompts: Any,
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        sampler: Sampler = sample,
        n: int = 1,
    ) -> AsyncStream:
        """Stream for `async for`. Steps run in a thread of the engine, which also calls the sampler.

        Args:
            prompts: See `generate`.
            config: See `generate`.
            sampler: See `generate`.
            n: See `generate`.

        Returns:
            An asynchronous iterator of events.
        """
        return AsyncStream(*self._requests(prompts, config, n), sampler)

    def chat(
        self, messages: Sequence[dict[str, str]], config: GenerationConfig | None = None, sampler: Sampler = sample
    ) -> Generation:
        """Answer one conversation with the tokenizer's chat template.

        Args:
            messages: Messages with "role" and "content".
            config: Options of the request.
            sampler: See `generate`.

        Returns:
            The answer.
        """
        return self.generate([list(messages)], config, sampler)[0]

    @property
    def cache(self) -> PagedKVCache | None:
        """The KV cache of all requests; None before the first one."""
        return None if self._core is None else self._core.runner.cache

    @property
    def preemptions(self) -> int:
        """Number of preemptions (requests whose pages were taken, to be recomputed) since the engine was made."""
        return 0 if self._core is None else self._core.scheduler.preemptions

    @property
    def prefix_hits(self) -> int:
        """Number of tokens that were found in the prefix cache since the engine was made."""
        return 0 if self._core is None or self._core.prefixes is None else self._core.prefixes.hits

    @property
    def available_pages(self) -> int:
        """Pages that no request uses, cached prefixes included."""
        if self._core is None:
            return 0
        prefixes = self._core.prefixes
        return self._core.runner.cache.num_available_pages + (0 if prefixes is None else prefixes.idle_pages)

    def clear_prefixes(self) -> None:
        """Drop all cached prefixes that no running request uses."""
        core = self._core
        if core is not None and core.prefixes is not None:
            core.between_steps(core.prefixes.clear)

    # ---- weights

    @property
    def decoder(self) -> str:
        """What runs the model's layers: "native", "triton", "torch" or "hosted"."""
        return self._decoder.kind

    def update_weights(self, named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights, between two steps; `weights_version` counts up.

        They are copied into the tensors of `model`. Cached prefixes are dropped. Running requests continue with the new
        weights; their KV is recomputed.

        Args:
            named_tensors: Values by the names of the model's `state_dict`, in any floating-point dtype, on any device.
                One name of tied tensors is enough. Merge adapters (LoRA) first.

        Raises:
            ValueError: A tensor is missing, foreign or of the wrong shape; it is named, and nothing is changed.
            RuntimeError: The call comes from within a step, such as from a sampler.
        """
        pairs = matched(self.model, named_tensors)

        def write() -> None:
            with torch.no_grad():
                for tensor, values in pairs:
                    tensor.copy_(values)
            self._decoder.refresh()
            self._taken = TakenWeights(self.model)
            self.weights_version += 1

        self._change(write)

    def reload(self) -> None:
        """Take the weights of `model` again, after they or its modules were changed; `weights_version` counts up.

        Cached prefixes are dropped; running requests are recomputed. Raises what `Engine` raises for a model.
        """
        self._change(self._take_again)

    def _change(self, change: Callable[[], None]) -> None:
        if self._core is None:
            change()
        else:
            self._core.change_weights(change)

    def _take(self) -> None:
        """Make the decoder of the model's weights as they are now."""
        decoder = make_decoder(self.model, self._requested_decoder, self.backend, narrow_bytes(), self._rows)
        self._decoder: Decoder = decoder
        self._taken = TakenWeights(self.model)

    def _take_again(self) -> None:
        self._take()
        self.weights_version += 1
        if self._core is not None:
            self._core.runner.use(self._decoder)

    # ---- before the run

    def _requests(
        self, prompts: Any, config: GenerationConfig | Sequence[GenerationConfig] | None, n: int
    ) -> tuple[Core, list[Request]]:
        jobs = self._jobs(prompts, config, n)
        core = self._ready()
        cache = core.runner.cache
        for job in jobs:
            needed = -(-len(job.ids) // self.page_size)
            if needed > cache.num_pages:
                expected = f"at most {cache.num_pages} pages to be needed"
                raise OutOfPages(f"prompt {job.index}: expected {expected}, got {needed}")
        parts = self.tokenizer, self._writer, self._masks, core.prefixes
        return core, [Request(job, cache, *parts, self.weights_version) for job in jobs]

    def _jobs(
        self, prompts: Any, config: GenerationConfig | Sequence[GenerationConfig] | None, n: int
    ) -> list[PromptJob]:
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
        jobs = [make_job(i, *pair, self.model, self.tokenizer, self.tags, self.seed) for i, pair in pairs]
        return [
            replace(job, index=job.index * n + i, key=request_key(self.seed, job.config.seed, i))
            for job in jobs
            for i in range(n)
        ]

    def _ready(self) -> Core:
        """The loop and the masks, made at first use; again where the model has moved or is another. The loop is kept
        while something runs.
        """
        self._require_patched()
        core, model, device = self._core, self.model, self.model.device
        if (core is None or not core.busy) and not self._taken.are_those_of(model):
            self._change(self._take_again)
        head: Any = model.get_output_embeddings()
        place = len(head.weight), device
        if self.tags is not None and (self._masks is None or self._masks.place != place):
            self._masks = TokenMasks(self.tags, *place)
        made_of = model, device, model.dtype
        if core is not None and (core.busy or self._core_of == made_of):
            return core
        cache = make_cache(self.model, self.page_size, self.num_pages)
        captures = device.type == "cuda" if self.graph is None else self.graph
        most = STRICT_ROWS if self.strict else 512 if device.type == "cpu" else 4096
        limits = {"max_step_tokens": most, **self.limits}
        constant_rows = limits["max_step_tokens"] if self.strict else None
        decoder = self._decoder
        runner = Runner(decoder, cache, DecodeGraph(decoder, cache) if captures else None, constant_rows)
        released = self._writer is not None and self._writer.semantics == "released"
        self._core_of = made_of
        self._core = Core(
            runner, self._wake, self._rest, limits, own_positions=released, prefix_cache=self.prefix_cache
        )
        return self._core

    def _require_patched(self) -> None:
        """Raises ValueError where a hosted model is no longer patched as this engine has done it."""
        if self.decoder != "hosted":
            return
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
        if self.decoder == "hosted":
            self._training = self.model.training
            self.model.train(False)
        core = self._core
        if core is not None and not self._taken.are_those_of(self.model):
            if core.prefixes is not None:
                core.prefixes.clear()
            self._take_again()

    def _rest(self) -> None:
        if self.decoder == "hosted":
            self.model.train(self._training)
