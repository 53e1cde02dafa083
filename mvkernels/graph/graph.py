"""DecodeGraph: whole decode steps of a model, captured as CUDA graphs that serve any tree.

    plan      slots for one token of each branch, and for `reserve` more (PagedKVCache.plan); the tables of the step are
              copied into memory of fixed addresses and capacity, that of its bucket (fixed_step.py, buckets.py)
    capture   once for each bucket: [tensors of the step advance; embedding .. layers with append and tree decode ..
              logits], for as many rows as the bucket has
    replay    token ids into a static buffer, one graph launch, bookkeeping on the host (PagedKVCache.advance)

Between two runs the tree on the host is what it is after any other step: all tokens committed.
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
#: Steps that add several tokens to a branch run in buckets up to so many tokens in all: what an engine writes between
#: samples. Longer ones are prompts, each of another length, and keep a GPU busy without a graph.
MOST_TOKENS = 64

Entries = Sequence[Branch | tuple[Branch, int]]


@dataclass(eq=False)
class _Plan:
    """Steps that follow one another. step: the open one. bucket: whose memory they run through; None: their own.

    ends: the rows whose logits are asked for, None for all. runs: how many steps have run; context: the most tokens
    that a row of the first one sees, where a window is to be looked at.
    """

    entries: tuple[tuple[Branch, int], ...]
    step: Step
    bucket: Bucket | None
    ends: torch.Tensor | None
    context: int
    runs: int = 0


class DecodeGraph:
    """Runs decode steps of a model over a paged cache; on a GPU by replaying CUDA graphs.

    model     a `Decoder`, or a model patched by `patch_model`, which is then hosted; on one device. Its weights must
              stay where they are (`reset` after a move)
    cache     its `PagedKVCache`, on the same device
    reserve   tokens of each branch that a plan sets pages aside for beyond the first: one plan serves 1 + reserve
              steps. Where so many pages are not free, half of it is tried, and so on
    backend   "cuda_graph"; "eager", the same without graphs, on any device; "auto": whichever fits

    What is captured when. A step of one new token a branch, or of few tokens in all, runs through the memory of its
    *bucket*: steps of about as many rows, with tables of about the same size. The first step of a bucket runs as it is,
    which compiles kernels; at the second a graph is captured, which all others replay, whatever the tree. A plan is
    made, and its tables copied to the bucket's memory, when other branches, or the same in another order, are asked
    for, when anything but this object changes the tree or plans a step (fork, merge, free, truncate, evict, plan), and
    when the reserve is used up. Longer steps, prompts, run without a graph. The graphs share one memory pool; of more
    than `hf_buckets.MOST` buckets those not used for longest are given up.

    Raises ValueError for a model that is not patched or on another device than the cache, and for a bad reserve;
    BackendError when the backend asked for by name cannot be used.
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
        """How many graphs were captured so far."""
        return self._buckets.captures

    @property
    def captured(self) -> bool:
        """Whether the next run of the same branches replays a graph that is there already."""
        plan = self._plan
        return plan is not None and self._goes_on(plan) and plan.bucket is not None and plan.bucket.replay is not None

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
        device = torch.cuda.device(self.cache.device) if self.cache.device.type == "cuda" else nullcontext()
        with device, torch.inference_mode():  # of the plan's tensors too: they are written to in every step
            plan = self._plan_for(listed)
            try:
                logits = self._eager(plan, ids) if plan.bucket is None else self._fixed(plan, plan.bucket, ids)
            except BaseException:
                self._give_up()
                raise
            self._close(plan)
        # In memory of their own, outside of inference mode: the caller may write to it.
        return logits.clone() if plan.bucket is None or plan.ends is None else logits.index_select(0, plan.ends)

    def reset(self) -> None:
        """Gives up the plan with the pages in its reserve, and the graphs. Nothing that was committed is lost."""
        self._give_up()
        self._buckets.clear()

    # -- plans ---------------------------------------------------------------------------------------------------

    def _checked(self, token_ids: Sequence[int] | torch.Tensor, expected: int) -> torch.Tensor:
        """[T] integers, on the device they came on."""
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
            low, high = min(known), max(known)  # in Python, which is faster for what a step of decoding has
            if low < 0 or high >= self.decoder.vocabulary:
                wrong = low if low < 0 else high
                raise ValueError(f"token_ids: expected ids from 0 to {self.decoder.vocabulary - 1}, got {wrong}")
        return ids

    def _goes_on(self, plan: _Plan) -> bool:
        """Whether the plan's next step may run. In a bucket no layer looks whether a row has outgrown its window."""
        outgrown = self.decoder.window is not None and plan.context + plan.runs > self.decoder.window
        return plan.step.state.closed is None and not (outgrown and plan.bucket is not None)

    def _plan_for(self, entries: tuple[tuple[Branch, int], ...]) -> _Plan:
        """The plan that goes on, or a new one."""
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
        ):  # only layers know whether they look
            in_bucket, step = False, self._plan_step(entries, reserve, tensors=True)
        # The cache has discarded what was planned before, if it was open still.
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
        """With as much of the reserve as there is room for."""
        while True:
            try:
                return self.cache.plan(entries, reserve, tensors)
            except OutOfPages:
                if not reserve:
                    raise
                reserve //= 2

    def _close(self, plan: _Plan) -> None:
        """Commits the step that ran; opens the next one where pages are set aside for it."""
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
        """Runs the open step over its own tensors; its logits [entries, V]."""
        return self._forward(plan.step, ids.to(self.cache.device), plan.ends)

    def _fixed(self, plan: _Plan, bucket: Bucket, ids: torch.Tensor) -> torch.Tensor:
        """Runs the open step through its bucket's memory; logits [rows, V], of which some are asked for."""
        bucket.take(ids)
        logits = self._buckets.run(bucket, lambda: self._captured(bucket))
        return logits if plan.ends is not None else logits[: plan.step.total_rows]

    def _captured(self, bucket: Bucket) -> torch.Tensor:
        """What is captured: the open step, over the memory of its bucket alone. Logits of all its rows."""
        if self._plan is None:
            raise BackendError("DecodeGraph: expected a planned step, got none")
        bucket.memory.advance()
        step = bucket.memory.step(self._plan.step)
        logits = self._forward(step, bucket.ids[0])
        bucket.memory.check(step)
        return logits

    def _forward(self, step: Step, ids: torch.Tensor, ends: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of all rows, or of `ends`."""
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
    """Why steps of this model cannot be captured, or None."""
    if cache.device.type != "cuda":
        return f"expected a model on cuda, got {cache.device.type}"
    return decoder.capture_reason or fixed_reason(cache)
