"""Times tile configurations of the Triton attention kernels, to choose those of `ops.attention.config` for a GPU.

python -m benchmarks.tiles [--head-dim 128] [--case causal] [--out DIR]

All configurations are compiled first, in several processes. Each kernel then runs by itself in its own configurations:
the forward timed as a call, dq and dkdv as the profiler sees them. TFLOP/s count 4, 6 and 8 D operations for every
query head and visible pair: what the backward's two kernels compute, the scores twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.cases import TREES, builders
from mvkernels import BranchLayout, multiverse_attention
from mvkernels.ops.attention.config import AttentionConfig, KernelConfig

HEADS, KV_HEADS, TOKENS = 64, 8, 32768
PRODUCTS = {"forward": 4, "dq": 6, "dkdv": 8}
# (block_m, block_n, warps, stages), by head dim: what is shipped for Hopper first.
CANDIDATES: dict[int, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    64: {
        "forward": ((128, 64, 4, 4), (128, 128, 8, 3), (128, 128, 4, 3), (128, 64, 4, 3), (64, 128, 4, 3)),
        "dq": ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3)),
        "dkdv": ((64, 64, 4, 3), (32, 128, 4, 3), (128, 64, 4, 2), (64, 128, 8, 3), (64, 64, 4, 2)),
    },
    128: {
        "forward": ((128, 128, 8, 3), (128, 64, 8, 4), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        "dq": ((128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2), (128, 32, 4, 3)),
        "dkdv": ((64, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 3)),
    },
}


@dataclass(frozen=True)
class TileRow:
    """One line of attention-tiles.csv."""

    case: str
    kernel: str
    head_dim: int
    dtype: str
    tokens: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    median_ms: float
    tflops: float

    def line(self) -> str:
        sizes = f"{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages"
        return f"{self.case:10} {self.kernel:8} {sizes:28} {self.median_ms:8.2f} ms  {self.tflops:7.1f} TFLOP/s"


def main(
    head_dim: Annotated[int, typer.Option(help=f"one of {', '.join(map(str, CANDIDATES))}")] = 128,
    case: Annotated[str, typer.Option(help=f"one of {', '.join(TREES)}")] = "causal",
    processes: Annotated[int, typer.Option(help="that compile at the same time")] = 4,
    out: Annotated[Path | None, typer.Option(help="folder for attention-tiles.csv")] = None,
) -> None:
    """Time the configurations of each kernel on a GPU, in bf16."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a CUDA device")
    if head_dim not in CANDIDATES or case not in TREES:
        raise typer.BadParameter(
            f"expected a head dim of {sorted(CANDIDATES)} and a case of {list(TREES)}, got {head_dim} and {case}"
        )
    chosen = configurations(head_dim)
    with get_context("spawn").Pool(processes) as pool:
        pool.starmap(_compile, [(config, head_dim) for config in chosen])
    file = None if out is None else report.CsvFile(out / "attention-tiles.csv", torch.cuda.get_device_name())
    layout = builders(TOKENS)[case]()
    seen: set[tuple[str, KernelConfig]] = set()
    for config in chosen:
        times = _times(config, layout, head_dim)
        for kernel, ms in times.items():
            tile: KernelConfig = getattr(config, kernel)
            if (kernel, tile) in seen:
                continue
            seen.add((kernel, tile))
            pairs = layout.mask.visible_pairs()
            row = TileRow(
                case, kernel, head_dim, "bfloat16", layout.total_tokens, tile.block_m, tile.block_n, tile.num_warps,
                tile.num_stages, ms, PRODUCTS[kernel] * pairs * HEADS * head_dim / ms / 1e9,
            )  # fmt: skip
            print(row.line(), flush=True)
            if file is not None:
                file.write(row)


def configurations(head_dim: int) -> list[AttentionConfig]:
    """As many as the longest list has; the first of a list that is shorter stands in."""
    lists = [[KernelConfig(*sizes) for sizes in CANDIDATES[head_dim][kernel]] for kernel in PRODUCTS]
    rows = zip_longest(*lists)
    return [AttentionConfig(*(tile or tiles[0] for tile, tiles in zip(row, lists, strict=True))) for row in rows]


def _use(config: AttentionConfig) -> None:
    from mvkernels.ops.attention import triton_backward as attention_triton_backward
    from mvkernels.ops.attention import triton_forward as attention_triton

    for module in (attention_triton, attention_triton_backward):
        module.launch_config = lambda q: config  # type: ignore[attr-defined, assignment]


def _inputs(tokens: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def _compile(config: AttentionConfig, head_dim: int) -> None:
    """Into the cache on disk."""
    _use(config)
    layout = BranchLayout.from_tree([300, [[200], [150]], 100])
    q, k, v = _inputs(layout.total_tokens, head_dim)
    multiverse_attention(q, k, v, layout.to("cuda"), backend="triton").sum().backward()


def _times(config: AttentionConfig, layout: BranchLayout, head_dim: int, rounds: int = 3) -> dict[str, float]:
    """ms of each kernel."""
    _use(config)
    q, k, v = _inputs(layout.total_tokens, head_dim)
    there = layout.to("cuda")
    found: list[float] = []
    out = multiverse_attention(q, k, v, there, backend="triton")
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        multiverse_attention(q, k, v, there, backend="triton")
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    grad = torch.randn_like(out)
    torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        for _ in range(rounds):
            torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        torch.cuda.synchronize()
    events: dict[str, Any] = {event.key: event for event in watched.key_averages()}
    backward = {kernel: events[f"{kernel}_kernel"] for kernel in ("dq", "dkdv")}
    return {
        "forward": median(found),
        **{kernel: event.device_time_total / event.count / 1e3 for kernel, event in backward.items()},
    }


if __name__ == "__main__":
    typer.run(main)
