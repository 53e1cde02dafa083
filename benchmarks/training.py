"""The training suite: one optimizer step on several documents, packed into one row, against ways to do without packing.

    packed       one row of all documents, one forward and backward (ours)
    one-by-one   a row for each document, gradients accumulated (ours)
    sdpa-dense   the same on transformers' own attention, with a dense T x T mask for each document, built anew

All in a process that keeps the memory it frees, as `mvkernels train` does (`model/training/allocator.py`).
The model has the sizes of SmolLM2-135M with LAYERS layers and random weights; the loss is that of
`mvkernels.model.training` for ours, transformers' for the other. Losses are compared before anything is timed.
attention_mb: what attention forward and backward take on the packed row beyond inputs, outputs and gradients, in a
process of its own (the memory suite); mask_mb: what a dense boolean mask of that row would be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import gate, memory
from benchmarks.attention import Effort
from benchmarks.cases import TREES, published
from benchmarks.peers import Shape
from benchmarks.timing import Contender, Spread, measure_rounds, ratio_spread
from mvkernels import BranchLayout, patch_model

CASES = ("real", "narrow", "nested")
LAYERS = 2
DOCUMENTS = 3  # of the cases that are no published traces
OURS = "packed"
GOALS = {("real", "one-by-one"): 1.0}

Document = tuple[torch.Tensor, BranchLayout]  # ids [T], their layout


@dataclass(frozen=True)
class TrainingRow:
    """One line of training.csv. tokens: of a step. ratio: time over that of ours, by round; goal: the ratio that is
    aimed at. memory_ratio: mask_mb over attention_mb. MB: 2**20 bytes.
    """

    case: str
    peer: str
    documents: int
    tokens: int
    layers: int
    dtype: str
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    tokens_per_s: float
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    goal: float | None = None
    of_goal: float | None = None
    attention_mb: float | None = None
    mask_mb: float | None = None
    memory_ratio: float | None = None

    def line(self) -> str:
        return f"{self.case:9} {self.peer:12} {self.median_ms / 1e3:9.2f} s  {self.tokens_per_s:9.1f} tokens/s"


def run(
    shape: Shape,
    effort: Effort,
    emit: Callable[[TrainingRow], None],
    note: Callable[[str], None],
    only: list[str] | None = None,
) -> None:
    """shape.tokens: of a step, at most; its heads are not used. Raises WrongResultError when ours is wrong."""
    from mvkernels.model.training.allocator import keep_freed_memory

    keep_freed_memory()
    for case in CASES:
        if only and case not in only:
            continue
        found = documents(case, shape.tokens)
        if found is None:
            note(f"{case}: the published traces are not there (MVKERNELS_DATA)")
        else:
            _run_case(case, found, shape, effort, emit, note)


def documents(case: str, tokens: int) -> list[Document] | None:
    """The documents of a step; None where they are not there."""
    if case != "real":
        layouts = [BranchLayout.from_tree(TREES[case](tokens // DOCUMENTS)) for _ in range(DOCUMENTS)]
        generator = torch.Generator().manual_seed(0)
        return [(torch.randint(0, 1000, (one.total_tokens,), generator=generator), one) for one in layouts]
    traces = published(tokens)
    if traces is None:
        return None
    tags, chosen = traces
    return [(torch.tensor(ids), BranchLayout.from_token_ids(ids, tags)) for ids in chosen]


def make_model(device: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from benchmarks.engine_models import SMOLLM2_CONFIG

    torch.manual_seed(0)
    config = LlamaConfig(**{**SMOLLM2_CONFIG, "num_hidden_layers": LAYERS, "max_position_embeddings": 32768})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


class Step:
    """A model, and one optimizer step on rows of documents. dense: on transformers' attention and masks."""

    def __init__(self, model: Any, rows: Sequence[Sequence[Document]], device: str, dense: bool) -> None:
        self.model, self.device, self.dense = model, device, dense
        vocabulary = model.config.vocab_size
        packed = [(torch.cat([ids for ids, _ in row]) % vocabulary, _pack(row)) for row in rows]
        self.rows = [(ids.to(device), layout.to(device), layout.labels(ids).to(device)) for ids, layout in packed]
        self.labelled = sum(int((labels >= 0).sum()) for _, _, labels in self.rows)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def losses(self) -> float:
        """Forward and backward of every row; the mean loss. Gradients stay."""
        from mvkernels.model.training.loss import chunked_loss

        total = 0.0
        for ids, layout, labels in self.rows:
            more: dict[str, Any] = {"branch_layout": layout}
            if self.dense:
                mask = torch.zeros(layout.total_tokens, layout.total_tokens, device=self.device)
                more = {
                    "attention_mask": mask.masked_fill_(~layout.dense_mask().to(self.device), -torch.inf)[None, None]
                }
            with nullcontext() if self.dense else chunked_loss(self.model):
                loss = self.model(
                    ids[None], position_ids=layout.position_ids[None], labels=labels[None], use_cache=False,
                    num_items_in_batch=self.labelled, **more,
                ).loss  # fmt: skip
            loss.backward()
            total += float(loss.detach())
        return total

    def __call__(self) -> float:
        loss = self.losses()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def _pack(row: Sequence[Document]) -> BranchLayout:
    return row[0][1] if len(row) == 1 else BranchLayout.pack([layout for _, layout in row])


def _run_case(
    case: str,
    found: list[Document],
    shape: Shape,
    effort: Effort,
    emit: Callable[[TrainingRow], None],
    note: Callable[[str], None],
) -> None:
    tokens = sum(len(ids) for ids, _ in found)
    apart = [[document] for document in found]
    plain, patched = make_model(shape.device), patch_model(make_model(shape.device))
    steps = {
        OURS: Step(patched, [found], shape.device, dense=False),
        "one-by-one": Step(patched, apart, shape.device, dense=False),
        "sdpa-dense": Step(plain, apart, shape.device, dense=True),
    }
    losses = {name: step() for name, step in steps.items()}
    if not max(losses.values()) - min(losses.values()) <= 1e-3 * losses["sdpa-dense"]:
        raise gate.WrongResultError(f"{case}: expected the same loss from all peers, got {losses}; nothing was timed")
    contenders = [Contender(name, {"call": step}) for name, step in steps.items()]
    attention = _attention_mb(case, tokens, shape, note)
    try:
        measure_rounds(contenders, shape.device, effort.rounds, effort.seconds, warm=False)
    finally:  # also for what was measured before Ctrl-C
        make = partial(_row, case, len(found), tokens, mine=contenders[0].times.get("call", []))
        for one in contenders:
            if one.error is not None:
                note(f"{case}: {one.name} failed: {gate.reason(one.error)}")
            if one.times.get("call"):
                row = make(one.name, one.times["call"])
                emit(_with_memory(row, attention) if one.name == OURS else row)


def _attention_mb(case: str, tokens: int, shape: Shape, note: Callable[[str], None]) -> float | None:
    from benchmarks.engine_models import SMOLLM2_CONFIG

    heads, kv_heads = SMOLLM2_CONFIG["num_attention_heads"], SMOLLM2_CONFIG["num_key_value_heads"]
    found: list[memory.MemoryRow] = []
    memory.run(Shape(tokens, heads, kv_heads, 64, "float32", shape.device), found.append, note, [case])
    return found[0].extra_mb if found else None


def _with_memory(row: TrainingRow, attention: float | None) -> TrainingRow:
    mask = row.tokens**2 / 2**20
    return replace(row, attention_mb=attention, mask_mb=mask, memory_ratio=mask / attention if attention else None)


def _row(case: str, count: int, tokens: int, name: str, times: list[float], mine: list[float]) -> TrainingRow:
    spread = Spread.of(times)
    ratio = ratio_spread(times, mine)
    goal = GOALS.get((case, name))
    return TrainingRow(
        case=case,
        peer=name,
        documents=count,
        tokens=tokens,
        layers=LAYERS,
        dtype="float32",
        rounds=len(times),
        median_ms=spread.median,
        p20_ms=spread.p20,
        p80_ms=spread.p80,
        tokens_per_s=tokens / spread.median * 1e3,
        ratio=ratio and ratio.median,
        ratio_p20=ratio and ratio.p20,
        ratio_p80=ratio and ratio.p80,
        goal=goal,
        of_goal=ratio.median / goal if ratio and goal else None,
    )
