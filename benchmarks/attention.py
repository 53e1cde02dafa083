"""The attention suite: `multiverse_attention` against what users have today (see `peers`), forward and backward.

TFLOP/s count 4 D operations forward and 10 D backward for every query head and (row, key) pair that the peer's own
mask leaves visible. Ratios are medians over the rounds; each round calls every peer once.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import gate
from benchmarks.cases import builders
from benchmarks.peers import Peer, Shape, causal_pairs, flex_attention, not_installed, ours, peers
from benchmarks.timing import Contender, Spread, measure, measure_rounds, ratio_spread, synchronize
from mvkernels import BranchLayout

PRODUCTS = {"forward": 4, "backward": 10, "forward+backward": 14}
MASK_BUILD = "mask build"
FLEX_CPU_TOKENS = 4096  # on a CPU FlexAttention's mask is T squared
MASK_REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One line of the CSV.

    direction: forward, backward, both together, or the building of what a peer needs of the mask. visible_share: of the
    layout's causal pairs. pairs: visible ones under the peer's own mask. rounds: timed calls. peak_mb: memory beyond
    what was there before. ratio: time over that of ours, by round. pair_ratio: ours per visible pair over the peer per
    pair of its own. setup_ms: from nothing to the end of the first forward and backward; mask_ms of that for the mask,
    compile_ms for what is left when the timed forward and backward are taken off.
    """

    case: str
    peer: str
    direction: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    visible_share: float
    pairs: int
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_mb: float | None = None
    tflops: float | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    pair_ratio: float | None = None
    setup_ms: float | None = None
    mask_ms: float | None = None
    compile_ms: float | None = None

    def line(self) -> str:
        speed = "" if self.tflops is None else f"{self.tflops:8.3f} TFLOP/s"
        return f"{self.case:14} {self.peer:19} {self.direction:17} {self.median_ms:10.2f} ms  {speed}"


@dataclass
class Entry:
    """A peer that is set up."""

    peer: Peer
    contender: Contender
    setup_ms: float
    mask: list[float] | None


@dataclass(frozen=True)
class Effort:
    """rounds: at most so many. seconds: of timed calls, for each peer of a case. quick: leave out what is slow."""

    rounds: int
    seconds: float
    quick: bool = False


def run(
    shape: Shape,
    effort: Effort,
    emit: Callable[[Row], None],
    note: Callable[[str], None],
    only: list[str] | None = None,
) -> None:
    """Check every case, then time it. emit: takes each row as soon as it is known, also when stopped. note: takes the
    reason when a peer is left out. only: names of cases; default all. Raises WrongResultError when ours is wrong.
    """
    chosen = [name for name in builders(shape.tokens) if not only or name in only]
    refused = {name: gate.check_case(name, builders(gate.SHORT)[name](), shape) for name in chosen}
    for name in not_installed(shape.device):
        note(f"{name}: not installed")
    for name in chosen:
        layout = builders(shape.tokens)[name]()
        _run_case(name, layout, shape, effort, refused[name], emit, note)
        if shape.device == "cpu" and not effort.quick:
            short = builders(min(shape.tokens, FLEX_CPU_TOKENS))[name]()
            _flex_mask_on_cpu(name, short, layout.total_tokens, shape, emit)


def _run_case(
    case: str,
    layout: BranchLayout,
    shape: Shape,
    effort: Effort,
    refused: dict[str, str],
    emit: Callable[[Row], None],
    note: Callable[[str], None],
) -> None:
    entries: list[Entry] = []
    inputs = shape.inputs(layout.total_tokens)
    grad = torch.randn_like(inputs[0])
    reference: list[torch.Tensor] | None = None
    for peer in peers(case, layout, shape):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                if peer.name in refused:
                    raise gate.WrongResultError(refused[peer.name])
                own = peer.layout is not layout
                entry, found = _set_up(peer, shape, *(_own_inputs(peer, shape) if own else (inputs, grad)))
                if peer.name == "ours":
                    reference = found
                elif reference is not None and peer.exact and not own:
                    gate.agree(peer.name, found, reference, shape.dtype, factor=2)
                entries.append(entry)
            except Exception as error:
                note(f"{case}: {peer.name} left out: {gate.reason(error, [str(w.message) for w in warned])}")
    del reference
    try:
        measure_rounds([entry.contender for entry in entries], shape.device, effort.rounds, effort.seconds)
    finally:  # also for what was measured before Ctrl-C
        for entry in entries:
            if entry.contender.error is not None:
                note(f"{case}: {entry.peer.name} failed: {gate.reason(entry.contender.error)}")
            for row in _rows(case, entry, entries[0], layout, shape):
                emit(row)


def _own_inputs(peer: Peer, shape: Shape) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    inputs = shape.inputs(peer.layout.total_tokens)
    return inputs, torch.randn_like(inputs[0])


def _set_up(
    peer: Peer, shape: Shape, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> tuple[Entry, list[torch.Tensor]]:
    """The peer, warm, with one graph kept for its backward; and out and gradients of its first call."""
    synchronize(shape.device)
    start = time.perf_counter()
    attend = peer.make()
    out = attend(*inputs)
    grads = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    synchronize(shape.device)
    setup = (time.perf_counter() - start) * 1e3
    mask = None if peer.mask is None else measure(peer.mask, shape.device, MASK_REPEATS)

    def forward() -> None:  # with gradients on, as in training: without, what is compiled would be compiled again
        attend(*inputs)

    def backward() -> None:
        torch.autograd.grad(out, inputs, grad, retain_graph=True)

    contender = Contender(peer.name, {"forward": forward, "backward": backward})
    return Entry(peer, contender, setup, mask), [out.detach(), *grads]


def _rows(case: str, entry: Entry, first: Entry, layout: BranchLayout, shape: Shape) -> list[Row]:
    """first: ours, unless it failed."""
    peer, contender = entry.peer, entry.contender
    times = {**contender.times, "forward+backward": contender.both()}
    mine = {**first.contender.times, "forward+backward": first.contender.both()}
    if not times["forward+backward"]:
        return []
    mask = None if entry.mask is None else Spread.of(entry.mask).median
    steady = Spread.of(times["forward+backward"]).median
    rows = []
    for direction, values in times.items():
        spread = Spread.of(values)
        ratio = ratio_spread(values, mine[direction]) if first.peer.name == "ours" else None
        peaks = [contender.peaks.get(d) for d in contender.times if d in direction]
        rows.append(
            _row(
                case,
                peer,
                direction,
                layout,
                shape,
                values,
                peak_mb=max((x for x in peaks if x is not None), default=None),
                tflops=PRODUCTS[direction] * peer.pairs * shape.heads * shape.head_dim / spread.median / 1e9,
                ratio=ratio and ratio.median,
                ratio_p20=ratio and ratio.p20,
                ratio_p80=ratio and ratio.p80,
                pair_ratio=ratio and peer.pairs / first.peer.pairs / ratio.median,
                setup_ms=entry.setup_ms,
                mask_ms=mask,
                compile_ms=max(0.0, entry.setup_ms - steady - (mask or 0.0)),
            )
        )
    if entry.mask is not None:
        rows.append(_row(case, peer, MASK_BUILD, layout, shape, entry.mask))
    return rows


def _row(
    case: str,
    peer: Peer,
    direction: str,
    layout: BranchLayout,
    shape: Shape,
    times: list[float],
    **more: float | None,
) -> Row:
    spread = Spread.of(times)
    return Row(
        case=case,
        peer=peer.name,
        direction=direction,
        tokens=peer.layout.total_tokens,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        visible_share=layout.mask.visible_pairs() / causal_pairs(layout),
        pairs=peer.pairs,
        rounds=len(times),
        median_ms=spread.median,
        p20_ms=spread.p20,
        p80_ms=spread.p80,
        **more,
    )


def _flex_mask_on_cpu(
    case: str, layout: BranchLayout, timed_tokens: int, shape: Shape, emit: Callable[[Row], None]
) -> None:
    """FlexAttention has no backward on a CPU; the building of its mask is compared with that of our tables."""
    gate.check_flex_mask(layout, "cpu")
    contenders = [flex_attention(layout, "cpu")]
    if layout.total_tokens != timed_tokens:
        contenders.append(ours("ours", layout, shape))
    for peer in contenders:
        emit(_row(case, peer, MASK_BUILD, layout, shape, measure(peer.mask, "cpu", MASK_REPEATS)))
