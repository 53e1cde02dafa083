"""CUDA graphs of whole decode steps, which serve any tree of branches: `DecodeGraph`.

    plan      slots for one token of each branch, and for `reserve` more (PagedKVCache.plan); the tables of the step are
              copied to fixed addresses, in the memory of its bucket (fixed_step.py, buckets.py)
    capture   once per bucket: [advance the tensors of the step; embedding .. layers with append and tree decode ..
              logits], for the rows of the bucket
    replay    token ids into a static buffer, one graph launch, bookkeeping on the host (PagedKVCache.advance)

Between two runs all tokens are committed, as after any other step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import index

import torch
from transformers import PreTrainedModel

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Branch, Step
from mvkernels.decoder.decoder import Decoder
from mvkernels.decoder.hosted import HostedDecoder
from mvkernels.errors import BackendError, OutOfPages, require_integer, require_type
from mvkernels.graph.buckets import Bucket, Buckets
from mvkernels.graph.fixed_step import fixed_reason, plan_fixed

BACKENDS = ("cuda_graph", "eager")
#: Most tokens of a step in a bucket that adds several tokens to a branch: the tokens that an engine forces between
#: samples. Longer steps are prefill, each of another length, and keep a GPU busy without a graph.
MOST_TOKENS = 64

Entries = Sequence[Branch | tuple[Branch, int]]


@dataclass(eq=False)
class _Plan:
    """Consecutive steps of one plan.

    Attributes:
        entries: (branch, number of tokens), as planned.
        step: The open step.
        bucket: The bucket that the steps run in; None: they run on their own tensors.
        ends: Rows to return logits of; None: all.
        context: Most tokens that a row of the first step sees, if the model has a sliding window.
        runs: Number of steps that have run.
    """

    entries: tuple[tuple[Branch, int], ...]
    step: Step
    bucket: Bucket | None
    ends: torch.Tensor | None
    context: int
    runs: int = 0


class DecodeGraph:
    """Run decode steps of a model over a paged KV cache; on a GPU by replaying CUDA graphs.

    A step of one new token per branch, or of few tokens in all, runs in a *bucket*: memory for steps of about as many
    rows, with tables of about the same size. The first step of a bucket runs without a graph, which compiles kernels.
    The second captures a graph, and all others replay it, whatever the tree. Longer steps (prefill) run without a
    graph.

    A new plan is made, and its tables copied to the memory of the bucket, when the branches or their order change, when
    other code changes the tree or plans a step (fork, merge, free, truncate, evict, plan), and when the reserve is used
    up. The graphs share one memory pool. Beyond `graph.buckets.MOST` buckets, the least recently used one is freed.

    Args:
        model: A `Decoder`, or a model patched by `patch_model`, on one device. Its weights must not move; call `reset`
            after a move.
        cache: The KV cache of the model, on the same device.
        reserve: Tokens per branch to set pages aside for beyond the first: one plan serves 1 + reserve steps. It is
            halved until the pages are free.
        backend: "cuda_graph"; "eager", the same steps without graphs, on any device; "auto": "cuda_graph" if possible.
            A backend given by name never falls back.

    Raises:
        ValueError: The model is not patched or on another device than the cache, `reserve` is invalid, or `backend` is
            unknown.
        BackendError: Steps of this model cannot be captured, and `backend` is "cuda_graph".
    """

    def __init__(
        self, model: Decoder | PreTrainedModel, cache: PagedKVCache, reserve: int = 64, backend: str = "auto"
    ) -> None:
        self.decoder = decoder = model if isinstance(model, Decoder) else HostedDecoder(model)
        require_type(PagedKVCache, cache=cache)
        require_integer("reserve: expected an integer number of tokens", reserve)
        if model.device != cache.device:
            raise ValueError(f"cache: expected the model's device {model.device}, got {cache.device}")
        if reserve < 0:
            raise ValueError(f"reserve: expected at least 0 tokens, got {reserve}")
        self.cache, self.reserve = cache, reserve
        self.backend = _choose(backend, decoder, cache)
        self._name = type(model).__name__
        self._plan: _Plan | None = None
        self._buckets = Buckets(cache.device)

    def __repr__(self) -> str:
        state = f"{self.backend}, {self.captures} graphs, reserve {self.reserve}, {self.cache.device}"
        return f"DecodeGraph({self._name}, {state})"

    @property
    def captures(self) -> int:
        """Number of graphs captured so far."""
        return self._buckets.captures

    @property
    def captured(self) -> bool:
        """Whether the next run of the same branches replays an existing graph."""
        plan = self._plan
        return plan is not None and self._goes_on(plan) and plan.bucket is not None and plan.bucket.replay is not None

    def run(self, entries: Entries, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Run one step: forward the new tokens of the branches and commit them.

        After an error no token of the step is committed.

        Args:
            entries: Branches with one new token each, or (branch, number of tokens) pairs, as for prefill.
            token_ids: [T] integers, or a tensor [T] int64 or int32 on any device: all new tokens, entry by entry.

        Returns:
            Logits [entries, V] of the last token of each entry, in the dtype of the model, in memory of their own.

        Raises:
            ValueError: The number of tokens is wrong, or an id on the host is outside the vocabulary.
            OutOfPages: The tokens do not fit into the free pages.
            BranchError: A branch was freed, or cannot grow (`PagedKVCache.plan`).
            BackendError: The step cannot be captured; gives the reason.
        """
        listed = tuple(entry if isinstance(entry, tuple) else (entry, 1) for entry in entries)
        ids = self._checked(token_ids, sum(count for _, count in listed))
        device = torch.cuda.device(self.cache.device) if self.cache.device.type == "cuda" else nullcontext()
        with device, torch.inference_mode():  # tensors of the plan too, which every step writes to
            plan = self._plan_for(listed)
            try:
                logits = self._eager(plan, ids) if plan.bucket is None else self._fixed(plan, plan.bucket, ids)
            except BaseException:
                self._give_up()
                raise
            self._close(plan)
        # Cloned outside of inference mode: the caller may write to the logits.
        return logits.clone() if plan.bucket is None or plan.ends is None else logits.index_select(0, plan.ends)

    def reset(self) -> None:
        """Free the graphs, and the plan with its reserved pages; committed tokens stay."""
        self._give_up()
        self._buckets.clear()

    # -- plans ---------------------------------------------------------------------------------------------------

    def _checked(self, token_ids: Sequence[int] | torch.Tensor, expected: int) -> torch.Tensor:
        """Check token ids; returns [T] integers on the device that they came on."""
        if isinstance(token_ids, torch.Tensor):
            if token_ids.dtype not in (torch.int64, torch.int32) or token_ids.dim() != 1:
                got = f"{token_ids.dtype} of shape {list(token_ids.shape)}"
                raise ValueError(f"token_ids: expected [T] int64 or int32, got {got}")
            ids = token_ids
        else:
            try:
                ids = torch.tensor([*map(index, token_ids)], dtype=torch.int64)
            except TypeError:
                raise ValueError(f"token_ids: expected integers, got {token_ids!r}") from None
        if len(ids) != expected:
            raise ValueError(f"token_ids: expected {expected} tokens for these entries, got {len(ids)}")
        if ids.device.type == "cpu" and expected:
            known = ids.tolist() if isinstance(token_ids, torch.Tensor) else token_ids
            low, high = min(known), max(known)  # in Python, which is faster for the few ids of a decode step
            if low < 0 or high >= self.decoder.vocabulary:
                wrong = low if low < 0 else high
                raise ValueError(f"token_ids: expected ids from 0 to {self.decoder.vocabulary - 1}, got {wrong}")
        return ids

    def _goes_on(self, plan: _Plan) -> bool:
        """Whether the next step of a plan can run. In a bucket no layer checks the sliding window; this does."""
        outgrown = self.decoder.window is not None and plan.context + plan.runs > self.decoder.window
        return plan.step.state.closed is None and not (outgrown and plan.bucket is not None)

    def _plan_for(self, entries: tuple[tuple[Branch, int], ...]) -> _Plan:
        """Return the current plan if it serves these entries, or a new one."""
        plan = self._plan
        if plan is not None and plan.entries == entries and self._goes_on(plan):
            return plan
        tokens = [count for _, count in entries]
        single = all(count == 1 for count in tokens)
        in_bucket = self.backend == "cuda_graph" and (single or sum(tokens) <= MOST_TOKENS)
        reserve = self.reserve if single else 0
        step = self._plan_step(entries, reserve, tensors=not in_bucket)
        context = step.longest_context if self.decoder.window is not None else 0
        if (
            in_bucket and self.decoder.window is not None and context > self.decoder.window
        ):  # only the layers check the window
            in_bucket, step = False, self._plan_step(entries, reserve, tensors=True)
        # The cache has discarded the previous plan if it was still open.
        self._plan = plan = _Plan(entries, step, None, None, context)
        ends = None if single else [first + n - 1 for first, n in zip(step.row_offsets, tokens, strict=True)]
        try:
            if in_bucket:
                plan.bucket = self._buckets.lay(
                    plan_fixed(step, self.decoder.heads, self._buckets.pages), step, ends or ()
                )
                plan.ends = None if ends is None else plan.bucket.memory.keep[: len(ends)]
            elif ends is not None:
                plan.ends = torch.tensor(ends, device=self.cache.device)
        except BaseException:
            self._give_up()
            raise
        return plan

    def _plan_step(self, entries: tuple[tuple[Branch, int], ...], reserve: int, tensors: bool) -> Step:
        """Plan with as much of the reserve as the free pages allow."""
        while True:
            try:
                return self.cache.plan(entries, reserve, tensors)
            except OutOfPages:
                if not reserve:
                    raise
                reserve //= 2

    def _close(self, plan: _Plan) -> None:
        """Commit the step that ran; open the next one where pages are reserved for it."""
        plan.runs += 1
        step = plan.step
        if step.index < step.views.reserve:
            plan.step = self.cache.advance(step, tensors=plan.bucket is None)
        else:
            self.cache.commit(step)
            self._plan = None

    def _give_up(self) -> None:
        plan, self._plan = self._plan, None
        if plan is not None and plan.step.state.closed is None:
            self.cache.rollback(plan.step)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _eager(self, plan: _Plan, ids: torch.Tensor) -> torch.Tensor:
        """Run the open step over its own tensors; returns logits [entries, V]."""
        return self._forward(plan.step, ids.to(self.cache.device), plan.ends)

    def _fixed(self, plan: _Plan, bucket: Bucket, ids: torch.Tensor) -> torch.Tensor:
        """Run the open step over the memory of its bucket; returns logits [rows, V]."""
        bucket.take(ids)
        logits = self._buckets.run(bucket, lambda: self._captured(bucket))
        return logits if plan.ends is not None else logits[: plan.step.total_rows]

    def _captured(self, bucket: Bucket) -> torch.Tensor:
        """Run the open step over the memory of its bucket alone, as captured; returns logits of all rows."""
        if self._plan is None:
            raise BackendError("DecodeGraph: expected a planned step, got none")
        bucket.memory.advance()
        step = bucket.memory.step(self._plan.step)
        logits = self._forward(step, bucket.ids[0])
        bucket.memory.check(step)
        return logits

    def _forward(self, step: Step, ids: torch.Tensor, ends: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits of all rows, or of the rows `ends`."""
        return self.decoder.forward(ids, step.positions, self.cache, step, ends)


def _choose(requested: str, decoder: Decoder, cache: PagedKVCache) -> str:
    if requested not in ("auto", *BACKENDS):
        expected = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: expected one of {expected}, got {requested!r}")
    reason = _reason(decoder, cache)
    if requested == "auto":
        return "eager" if reason else "cuda_graph"
    if requested == "cuda_graph" and reason:
        raise BackendError(f"backend 'cuda_graph' cannot do this: {reason}")
    return requested


def _reason(decoder: Decoder, cache: PagedKVCache) -> str | None:
    """Return why steps of this model cannot be captured, or None."""
    if cache.device.type != "cuda":
        return f"expected a model on cuda, got {cache.device.type}"
    return decoder.capture_reason or fixed_reason(cache)
