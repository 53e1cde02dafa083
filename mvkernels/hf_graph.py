"""DecodeGraph: whole decode steps of a patched model, captured once as a CUDA graph and replayed while a tree stands.

    plan      slots for one token of each branch, and for `reserve` more                   (PagedKVCache.plan)
    eager     the first steps of a plan run as they are: tables are built, kernels compiled
    capture   [tensors of the step advance; embedding .. layers with append and tree decode .. logits]
    replay    token ids into a static buffer, one graph launch, bookkeeping on the host     (PagedKVCache.advance)

The tensors of a step advance at the beginning of what is captured. So the last of the reserved steps reads no further
than its tables go, and between two runs the tree on the host is what it is after any other step: all tokens committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mvkernels.errors import BackendError, OutOfPages
from mvkernels.hf import is_patched
from mvkernels.kv_cache import PagedKVCache
from mvkernels.kv_step import Branch, Step

#: Steps of a plan that run eagerly. The first builds the tables of all layers, the second advances them: what either
#: compiles, allocates for good or copies from the host may not happen while a graph is captured.
EAGER_STEPS = 2
BACKENDS = ("cuda_graph", "eager")

Entries = Sequence[Branch | tuple[Branch, int]]


@dataclass(eq=False)
class _Plan:
    """Steps that follow one another. step: the open one. ids [1, T] int64: its tokens, at one address for all steps.

    keep: the rows whose logits are asked for, None for all. runs: how many steps have run; context: the most tokens
    that a row of the first one sees.
    """

    entries: tuple[tuple[Branch, int], ...]
    step: Step
    ids: torch.Tensor
    keep: torch.Tensor | None
    context: int
    runs: int = 0
    captured: _Captured | None = None


@dataclass(eq=False)
class _Captured:
    """A graph and the logits that it writes."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class DecodeGraph:
    """Runs decode steps of a patched model over a paged cache; on a GPU by replaying a CUDA graph.

    model     patched by `patch_model`, on one device; its weights must stay where they are (`reset` after a move)
    cache     its `PagedKVCache`, on the same device
    reserve   tokens of each branch that a plan sets pages aside for beyond the first: one plan and one capture serve
              1 + reserve steps. Where so many pages are not free, half of it is tried, and so on
    backend   "cuda_graph"; "eager", the same without capture, on any device; "auto": whichever fits

    What is captured when. A capture holds the addresses of a plan's tables, so each plan has its own: a new one is made
    when other branches, or the same in another order, are asked for, when anything but this object changes the tree or
    plans a step (fork, merge, free, truncate, evict, plan), and when the reserve is used up. The first two steps of
    every plan run eagerly, the third is captured, all others are replays; a plan whose branches see one another's new
    tokens, or add several at once, is one eager step. All captures share one memory pool, and only the latest is kept.

    Raises ValueError for a model that is not patched or on another device than the cache, and for a bad reserve;
    BackendError when the backend asked for by name cannot be used.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedKVCache, reserve: int = 64, backend: str = "auto") -> None:
        if not isinstance(model, PreTrainedModel) or not is_patched(model):
            raise ValueError(f"model: expected a model patched by patch_model, got {type(model).__name__}")
        if model.device != cache.device:
            raise ValueError(f"cache: expected the model's device {model.device}, got {cache.device}")
        if reserve < 0:
            raise ValueError(f"reserve: expected at least 0 tokens, got {reserve}")
        self.model, self.cache, self.reserve = model, cache, reserve
        self.backend = _choose(backend, model, cache.device)
        self.captures = 0  # how many graphs were captured so far
        config = model.config.get_text_config()
        self._vocabulary: int = config.vocab_size
        self._window: int | None = getattr(config, "sliding_window", None) or None
        self._plan: _Plan | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._latest: _Captured | None = None  # keeps the pool alive, which is handed from one capture to the next

    @property
    def captured(self) -> bool:
        """Whether the next run of the same branches replays a graph that is there already."""
        return self._plan is not None and self._plan.captured is not None and self._plan.step.state.closed is None

    def run(self, entries: Entries, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """One step: the new tokens of the branches go through the model and are committed.

        entries: branches, one new token each, or (branch, number of tokens), for prompts. token_ids: all new tokens,
        entry by entry, T integers or [T] int64 or int32. Returns the logits [entries, V] of every entry's last token,
        in the model's dtype, in memory of their own. Raises ValueError for a wrong number of tokens or, where they come
        from the host, for ids outside the vocabulary; OutOfPages and BranchError as `PagedKVCache.plan` does;
        BackendError with the reason when the step cannot be captured. After an error none of this step is committed.
        """
        listed = tuple(entry if isinstance(entry, tuple) else (entry, 1) for entry in entries)
        ids = self._checked(token_ids, sum(count for _, count in listed))
        with torch.inference_mode():  # of the plan's tensors too: they are written to in every step
            plan = self._plan_for(listed)
            try:
                with torch.cuda.device(self.cache.device) if self.cache.device.type == "cuda" else nullcontext():
                    plan.ids.copy_(ids[None])
                    logits = self._step(plan)
            except BaseException:
                self.reset()
                raise
            self._close(plan)
        return logits.clone()  # outside of inference mode: the caller may write to it

    def reset(self) -> None:
        """Gives up the plan with the pages in its reserve, and the graph. Nothing that was committed is lost."""
        plan, self._plan = self._plan, None
        if plan is not None and plan.step.state.closed is None:
            self.cache.rollback(plan.step)
        self._latest = self._pool = None

    # -- inside --------------------------------------------------------------------------------------------------

    def _checked(self, token_ids: Sequence[int] | torch.Tensor, expected: int) -> torch.Tensor:
        """[T] integers, on the device they came on."""
        if isinstance(token_ids, torch.Tensor):
            if token_ids.dtype not in (torch.int64, torch.int32) or token_ids.dim() != 1:
                got = f"{token_ids.dtype} of shape {list(token_ids.shape)}"
                raise ValueError(f"token_ids: expected [T] int64 or int32, got {got}")
            ids = token_ids
        else:
            ids = torch.tensor(token_ids, dtype=torch.int64)
        if len(ids) != expected:
            raise ValueError(f"token_ids: expected {expected} tokens for these entries, got {len(ids)}")
        if ids.device.type == "cpu" and expected:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self._vocabulary:
                wrong = low if low < 0 else high
                raise ValueError(f"token_ids: expected ids from 0 to {self._vocabulary - 1}, got {wrong}")
        return ids

    def _plan_for(self, entries: tuple[tuple[Branch, int], ...]) -> _Plan:
        """The plan that goes on, or a new one."""
        plan = self._plan
        if plan is not None and plan.entries == entries and plan.step.state.closed is None:
            return plan
        step = self._plan_step(entries)
        # The cache has discarded what was planned before, if it was open still.
        device, rows = self.cache.device, step.total_rows
        keep = None
        if rows > len(entries):
            ends = [first + count - 1 for first, (_, count) in zip(step.row_offsets, entries, strict=True)]
            keep = torch.tensor(ends, device=device)
        ids = torch.zeros((1, rows), dtype=torch.int64, device=device)
        self._plan = _Plan(entries, step, ids, keep, step.longest_context if self._window else 0)
        return self._plan

    def _plan_step(self, entries: tuple[tuple[Branch, int], ...]) -> Step:
        """With as much of the reserve as there is room for."""
        reserve = self.reserve if all(count == 1 for _, count in entries) else 0
        while True:
            try:
                return self.cache.plan(entries, reserve)
            except OutOfPages:
                if not reserve:
                    raise
                reserve //= 2

    def _step(self, plan: _Plan) -> torch.Tensor:
        """Runs the open step; its logits [entries, V]."""
        # A window that some row may have grown out of: only an eager step looks.
        grown_out = self._window is not None and plan.context + plan.runs > self._window
        if self.backend == "eager" or plan.runs < EAGER_STEPS or grown_out:
            with self._beside():
                return self._forward(plan)
        if plan.captured is None:
            plan.captured = self._capture(plan)
        plan.captured.graph.replay()
        return plan.captured.logits

    def _forward(self, plan: _Plan) -> torch.Tensor:
        """What is captured. The tensors of the step are still those of the one before it, if there was one."""
        if plan.runs:
            plan.step.advance_tensors()
        kept = {} if plan.keep is None else {"logits_to_keep": plan.keep}
        logits: torch.Tensor = self.model(
            input_ids=plan.ids,
            position_ids=plan.step.positions[None],
            paged_kv=(self.cache, plan.step),
            use_cache=False,
            **kept,
        ).logits[0]
        return logits

    def _capture(self, plan: _Plan) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # Other threads may use the GPU meanwhile: what they do is not ours to forbid.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                logits = self._forward(plan)
        except BackendError:
            raise
        except Exception as error:
            # What went wrong first: ending a capture that has failed is an error of its own.
            reason = error.__context__ or error
            raise BackendError(f"DecodeGraph: the step cannot be captured as a CUDA graph: {reason}") from error
        self.captures += 1
        self._latest = _Captured(graph, logits)
        return self._latest

    def _close(self, plan: _Plan) -> None:
        """Commits the step that ran; opens the next one where pages are set aside for it."""
        plan.runs += 1
        step = plan.step
        if step.ahead is not None and step.index + 1 < len(step.ahead):
            plan.step = self.cache.advance(step, tensors=False)
        else:
            self.cache.commit(step)
            self._plan = None

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream that captures run on, so that what libraries keep for a stream is there before."""
        if self.cache.device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            here.wait_stream(self._stream)


def _choose(requested: str, model: PreTrainedModel, device: torch.device) -> str:
    if requested not in ("auto", *BACKENDS):
        expected = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: expected one of {expected}, got {requested!r}")
    reason = _reason(model, device)
    if requested == "auto":
        return "eager" if reason else "cuda_graph"
    if requested == "cuda_graph" and reason:
        raise BackendError(f"backend 'cuda_graph' cannot do this: {reason}")
    return requested


def _reason(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why steps of this model cannot be captured, or None."""
    if device.type != "cuda":
        return f"expected a model on cuda, got {device.type}"
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        return "rope_type 'dynamic' decides on the host, in every forward pass, by the longest sequence"
    return None
