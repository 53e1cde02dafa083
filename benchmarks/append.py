"""The append suite: writing the new keys and values of a step into their slots, for one layer.

    ours        PagedKVCache.append, backend "auto"
    index-put   torch.Tensor.index_put_ of keys and of values, at the same slots
    copy        the same bytes copied to where they lie in one piece: no slots at all

decode: one token of each of 128 branches; prefill: 1024 (4096 on CUDA) tokens of each of 8. Checked first: the slots
hold the new values, and nothing else has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import gate
from benchmarks.attention import Effort
from benchmarks.decode_cases import PAGE_SIZE
from benchmarks.peers import Shape
from benchmarks.timing import Contender, Spread, captured, measure_rounds, ratio_spread
from mvkernels import PagedKVCache
from mvkernels.cache.step import Step

CASES = ("decode", "prefill")
SIZES = {"decode": (128, 1), "prefill": (8, 0)}  # branches, tokens of each; 0: shape.tokens


@dataclass(frozen=True)
class AppendRow:
    """One line of append.csv. tokens: of all branches together. gbps: keys and values read and written over the time.
    graph: whether a CUDA graph was timed. ratio: time over that of ours, by round. GB: 1e9 bytes.
    """

    case: str
    peer: str
    branches: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: str
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    tokens_per_s: float
    gbps: float
    graph: bool
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None

    def line(self) -> str:
        return f"{self.case:9} {self.peer:10} {self.median_ms * 1e3:10.1f} us  {self.gbps:9.2f} GB/s"


class Appending:
    """A cache of one layer with an open step, and new keys and values [tokens, Hkv, D] for it."""

    def __init__(self, shape: Shape, branches: int, each: int) -> None:
        dtype, heads = getattr(torch, shape.dtype), (shape.kv_heads, shape.head_dim)
        context = 3 * PAGE_SIZE // 2  # so that slots are no multiples of the page
        pages = branches * -(-(context + each) // PAGE_SIZE)
        self.cache = PagedKVCache(pages, PAGE_SIZE, 1, *heads, dtype, shape.device)
        for store in (*self.cache.k, *self.cache.v):
            store.zero_()
        handles = [self.cache.new() for _ in range(branches)]
        self.cache.commit(self.cache.plan([(branch, context) for branch in handles]))
        self.step: Step = self.cache.plan([(branch, each) for branch in handles])
        generator = torch.Generator(shape.device).manual_seed(0)
        self.new = tuple(
            torch.randn(branches * each, *heads, generator=generator, device=shape.device, dtype=dtype)
            for _ in range(2)
        )
        self.stores = (self.cache.k[0].flatten(0, 1), self.cache.v[0].flatten(0, 1))  # views: [slots, Hkv, D]
        self.targets = tuple(torch.empty_like(x) for x in self.new)

    def ours(self) -> None:
        self.cache.append(0, *self.new, self.step)

    def index_put(self) -> None:
        for store, new in zip(self.stores, self.new, strict=True):
            store.index_put_((self.step.slots,), new)

    def copy(self) -> None:
        for target, new in zip(self.targets, self.new, strict=True):
            target.copy_(new)

    def check(self, name: str, call: Callable[[], None]) -> None:
        """Raises WrongResultError unless the call writes the slots, and those only."""
        for store in self.stores:
            store.fill_(7)
        call()
        for store, new in zip(self.stores, self.new, strict=True):
            want = torch.full_like(store, 7)
            want[self.step.slots] = new
            if not torch.equal(store, want):
                raise gate.WrongResultError(f"{name}: the storage is not as it should be after an append")


def run(
    shape: Shape,
    effort: Effort,
    emit: Callable[[AppendRow], None],
    note: Callable[[str], None],
    only: list[str] | None = None,
) -> None:
    """shape.tokens: of each branch in `prefill`. Raises WrongResultError when ours is wrong."""
    for case, (branches, each) in SIZES.items():
        if only and case not in only:
            continue
        setting = Appending(shape, branches, each or shape.tokens)
        contenders: list[Contender] = []
        graphs: dict[str, bool] = {}
        for name, call in (("ours", setting.ours), ("index-put", setting.index_put), ("copy", setting.copy)):
            try:
                if name != "copy":
                    setting.check(name, call)
                timed, refused = captured(call, shape.device)
            except Exception as error:
                if name == "ours":
                    raise
                note(f"{case}: {name} left out: {gate.reason(error)}")
                continue
            if refused is not None:
                note(f"{case}: {name} is timed without a CUDA graph: {gate.reason(refused)}")
            graphs[name] = shape.device == "cuda" and refused is None
            contenders.append(Contender(name, {"append": timed}))
        try:
            measure_rounds(contenders, shape.device, effort.rounds, effort.seconds, cold=True)
        finally:  # also for what was measured before Ctrl-C
            for contender in contenders:
                if contender.error is not None:
                    note(f"{case}: {contender.name} failed: {gate.reason(contender.error)}")
                if contender.times.get("append"):
                    emit(_row(case, contender, contenders[0], setting, shape, graphs[contender.name], branches))


def _row(
    case: str, contender: Contender, first: Contender, setting: Appending, shape: Shape, graph: bool, branches: int
) -> AppendRow:
    times, mine = contender.times["append"], first.times["append"]
    spread = Spread.of(times)
    ratio = ratio_spread(times, mine)
    tokens = setting.step.total_rows
    return AppendRow(
        case=case,
        peer=contender.name,
        branches=branches,
        tokens=tokens,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        rounds=len(times),
        median_ms=spread.median,
        p20_ms=spread.p20,
        p80_ms=spread.p80,
        tokens_per_s=tokens / spread.median * 1e3,
        gbps=2 * sum(x.nbytes for x in setting.new) / spread.median / 1e6,
        graph=graph,
        ratio=ratio and ratio.median,
        ratio_p20=ratio and ratio.p20,
        ratio_p80=ratio and ratio.p80,
    )
