"""The memory suite: what forward and backward of ours take beyond inputs, outputs and gradients, at the peak.

Each case runs in a process of its own, warmed up on a short layout. CPU: the high-water mark of the resident set, as
Linux counts it, over what was resident once the inputs were there; tables that are derived from the layout count, and
so does whatever the allocator has not given back. CUDA: what PyTorch's allocator handed out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.cases import builders
from benchmarks.gate import results
from benchmarks.peers import Shape, ours
from benchmarks.timing import peak_mb

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_TOKENS = 256


@dataclass(frozen=True)
class MemoryRow:
    """One line of memory.csv, in MB (2**20 bytes). results_mb: out and the gradients of q, k and v. extra_mb: peak_mb
    without them.
    """

    case: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    inputs_mb: float
    results_mb: float
    peak_mb: float
    extra_mb: float


def run(
    shape: Shape, emit: Callable[[MemoryRow], None], note: Callable[[str], None], only: list[str] | None = None
) -> None:
    """Measure each case. note: takes the reason where one fails."""
    for case in builders(shape.tokens):
        if only and case not in only:
            continue
        command = [sys.executable, "-m", "benchmarks.memory", case, json.dumps(asdict(shape))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            note(f"{case}: left out: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        else:
            emit(MemoryRow(**json.loads(done.stdout.splitlines()[-1])))


def measure_case(case: str, shape: Shape) -> MemoryRow:
    """In this process, which must be fresh. Raises RuntimeError where the system does not tell the peak."""
    short = builders(WARM_UP_TOKENS)["nested"]()
    inputs = shape.inputs(short.total_tokens)
    results(ours("ours", short, shape).make(), inputs, torch.randn_like(inputs[0]))

    layout = builders(shape.tokens)[case]()
    inputs = shape.inputs(layout.total_tokens)
    grad = torch.randn_like(inputs[0])
    found: list[torch.Tensor] = []
    peak = peak_mb(lambda: found.extend(results(ours("ours", layout, shape).make(), inputs, grad)), shape.device)
    if peak is None:
        raise RuntimeError("expected a Linux that tells the peak of the resident set (/proc/self/clear_refs)")
    sizes = [sum(x.nbytes for x in tensors) / 2**20 for tensors in ((*inputs, grad), found)]
    heads = (shape.heads, shape.kv_heads, shape.head_dim, shape.dtype)
    return MemoryRow(case, layout.total_tokens, *heads, *sizes, peak, peak - sizes[1])


if __name__ == "__main__":
    print(json.dumps(asdict(measure_case(sys.argv[1], Shape(**json.loads(sys.argv[2]))))))
