"""The decode suite: `tree_decode` against decoding branch by branch (see `decode_peers`), one layer of one step.

Every peer is checked at full length against the reference in fp64 before it is timed. Caches are overwritten before
each call, as the rest of a model does. On CUDA each call is the replay of a CUDA graph where it can be captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import gate
from benchmarks.attention import Effort
from benchmarks.decode_cases import DecodeCase, Decoding, cases
from benchmarks.decode_peers import DecodePeer, not_installed, peers
from benchmarks.peers import Shape
from benchmarks.timing import Contender, Spread, captured, measure_rounds, ratio_spread

COPY = "copy"
COPY_BYTES = {"cpu": 2**29, "cuda": 2**30}
GOALS = {("cpu", "shared", "sdpa-per-branch"): 6.0, ("cpu", "single", "sdpa-per-branch"): 1 / 1.1}


@dataclass(frozen=True)
class DecodeRow:
    """One line of decode.csv.

    unique_mb: keys and values that some branch sees, each once; gbps: these over the time, for every peer. copy_share:
    gbps over copy_gbps, which a large copy reads and writes in the same rounds. traffic_mb: what the peer itself reads
    and writes of keys and values. graph: whether a CUDA graph was timed. ratio: time over that of ours, by round.
    goal: the ratio that is aimed at; of_goal: ratio over goal, met from 1 on. path: `decode_path` of ours. MB: 2**20
    bytes, GB: 1e9.
    """

    case: str
    peer: str
    branches: int
    prefix: int
    own: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    unique_mb: float
    gbps: float
    copy_gbps: float | None
    copy_share: float | None
    traffic_mb: float
    graph: bool
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    goal: float | None = None
    of_goal: float | None = None
    path: str = ""

    def line(self) -> str:
        what = f"{self.case} {self.branches} x {self.prefix} + {self.own}"
        return f"{what:26} {self.peer:19} {self.median_ms:9.3f} ms  {self.gbps:9.2f} GB/s"


@dataclass
class Entry:
    """A peer that is set up."""

    peer: DecodePeer
    contender: Contender
    graph: bool
    path: str


def run(
    shape: Shape,
    effort: Effort,
    emit: Callable[[DecodeRow], None],
    note: Callable[[str], None],
    only: list[str] | None = None,
) -> None:
    """Check and time each case. emit: takes each row as soon as it is known, also when stopped. note: takes the reason
    when a peer is left out. Raises WrongResultError when ours is wrong.
    """
    for name in not_installed(shape.device):
        note(f"{name}: not installed")
    for case in cases(shape, effort.quick, only):
        _run_case(case, effort, emit, note)


def _run_case(case: DecodeCase, effort: Effort, emit: Callable[[DecodeRow], None], note: Callable[[str], None]) -> None:
    run = Decoding(case)
    entries: list[Entry] = []
    name, device = f"{case.name} ({case.branches} x {case.prefix})", case.shape.device
    for peer in peers(case):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                entries.append(_set_up(peer, run, name, note))
            except gate.WrongResultError as error:
                if peer.name == "ours":
                    raise gate.WrongResultError(f"{name}: {error}; it was not timed") from error
                note(f"{name}: {peer.name} left out: {gate.reason(error)}")
            except Exception as error:
                if peer.name == "ours":
                    raise
                note(f"{name}: {peer.name} left out: {gate.reason(error, [str(w.message) for w in warned])}")
    contenders = [entry.contender for entry in entries]
    copy = None if case.name == "sweep" else copy_contender(device)
    if copy is not None:
        contenders.append(copy)
    try:
        with torch.no_grad():
            measure_rounds(contenders, device, effort.rounds, effort.seconds, cold=True)
    finally:  # also for what was measured before Ctrl-C
        for entry in entries:
            if entry.contender.error is not None:
                note(f"{name}: {entry.peer.name} failed: {gate.reason(entry.contender.error)}")
            if entry.contender.times.get("decode"):
                emit(_row(case, entry, entries[0], copy_gbps(copy, device)))


def copy_contender(device: str) -> Contender:
    """A large copy, which tells the bandwidth of the memory."""
    source, target = (torch.ones(COPY_BYTES[device], dtype=torch.int8, device=device) for _ in range(2))
    return Contender(COPY, {COPY: lambda: target.copy_(source)})


def copy_gbps(copy: Contender | None, device: str) -> float | None:
    """Bytes read and written over the median time."""
    if copy is None or not copy.times.get(COPY):
        return None
    return 2 * COPY_BYTES[device] / Spread.of(copy.times[COPY]).median / 1e6


def _set_up(peer: DecodePeer, run: Decoding, case: str, note: Callable[[str], None]) -> Entry:
    """The peer, checked and, on CUDA, captured."""
    with torch.no_grad():
        call = peer.make(run)
        gate.agree(peer.name, [call()], [run.exact], run.case.shape.dtype)
        device = run.case.shape.device
        call, refused = captured(call, device)
    if refused is not None:
        note(f"{case}: {peer.name} is timed without a CUDA graph: {gate.reason(refused)}")
    path = "" if peer.path is None else peer.path(run)
    return Entry(peer, Contender(peer.name, {"decode": call}), device == "cuda" and refused is None, path)


def _row(case: DecodeCase, entry: Entry, first: Entry, copied: float | None) -> DecodeRow:
    times, mine = (one.contender.times["decode"] for one in (entry, first))
    spread = Spread.of(times)
    ratio = ratio_spread(times, mine)
    goal = GOALS.get((case.shape.device, case.name, entry.peer.name))
    gbps = case.unique_bytes / spread.median / 1e6
    return DecodeRow(
        case=case.name,
        peer=entry.peer.name,
        branches=case.branches,
        prefix=case.prefix,
        own=case.own,
        heads=case.shape.heads,
        kv_heads=case.shape.kv_heads,
        head_dim=case.shape.head_dim,
        dtype=case.shape.dtype,
        rounds=len(times),
        median_ms=spread.median,
        p20_ms=spread.p20,
        p80_ms=spread.p80,
        unique_mb=case.unique_bytes / 2**20,
        gbps=gbps,
        copy_gbps=copied,
        copy_share=copied and gbps / copied,
        traffic_mb=entry.peer.traffic / 2**20,
        graph=entry.graph,
        ratio=ratio and ratio.median,
        ratio_p20=ratio and ratio.p20,
        ratio_p80=ratio and ratio.p80,
        goal=goal,
        of_goal=ratio.median / goal if ratio and goal else None,
        path=entry.path,
    )
