"""What a fresh layout costs before the first kernel runs: building it, and the tables that the backends derive from it.

layout         BranchLayout, from token ids (real) or from the tree
cpu tables     what multiverse_attention derives on the CPU backend
sm_90 tables   the tile plans for a GPU of compute capability 9.0, on the host: no GPU needed; head dim 128, 2 bytes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.cases import builders
from benchmarks.timing import Spread, measure
from mvkernels import BranchLayout
from mvkernels.ops.attention.config import attention_config
from mvkernels.ops.attention.cpu_plan import cpu_plan
from mvkernels.ops.attention.tables import build_tables


@dataclass(frozen=True)
class PreparationRow:
    """One line of preparation.csv. tokens: of the layout; segments: stretches of one visibility."""

    case: str
    what: str
    tokens: int
    segments: int
    median_ms: float
    p20_ms: float
    p80_ms: float


def prepare(layout: BranchLayout, device: str, head_dim: int, itemsize: int) -> object:
    """What the backend of a device derives from a layout, made anew."""
    if device == "cpu":
        return cpu_plan(layout.mask)
    config = attention_config(head_dim, itemsize, torch.cuda.get_device_capability())
    return build_tables(layout.mask, config, torch.device("cuda"))


def run(tokens: int, repeats: int, emit: Callable[[PreparationRow], None], only: list[str] | None = None) -> None:
    """Time each case at `tokens` tokens, on the host."""
    config = attention_config(128, 2, (9, 0))
    for case, build in builders(tokens).items():
        if only and case not in only:
            continue
        layout = build()
        steps: dict[str, Callable[[], object]] = {
            "layout": build,
            "cpu tables": lambda layout=layout: cpu_plan(layout.mask),
            "sm_90 tables": lambda layout=layout: build_tables(layout.mask, config, torch.device("cpu")),
            "layout + cpu tables": lambda build=build: cpu_plan(build().mask),
            "layout + sm_90 tables": lambda build=build: build_tables(build().mask, config, torch.device("cpu")),
        }
        for what, step in steps.items():
            spread = Spread.of(measure(step, "cpu", repeats))
            sizes = (layout.total_tokens, layout.mask.num_segments)
            emit(PreparationRow(case, what, *sizes, spread.median, spread.p20, spread.p80))
