"""``mvkernels generate``: paths as they grow, the merged answer, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mvkernels.commands.live import View
from mvkernels.model import Engine, Generation, GenerationConfig
from mvkernels.model.events import Event, FinishEvent

EMBEDDED = Path(__file__).resolve().parent.parent / "model" / "embedded"
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Run:
    """One generation and the seconds that the engine took for it; showing it is not counted."""

    name: str
    generation: Generation
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.generation.total_tokens / self.seconds if self.seconds else 0.0


def timed(events: Iterable[Event], view: View) -> tuple[Generation, float]:
    """Shows every event; returns the generation and the seconds spent waiting for events."""
    iterator, seconds = iter(events), 0.0
    while True:
        start = time.perf_counter()
        event = next(iterator)
        seconds += time.perf_counter() - start
        view.show(event)
        if isinstance(event, FinishEvent):
            return event.generation, seconds


def run_once(engine: Engine, prompt: Any, config: GenerationConfig, name: str, view: View) -> Run:
    with view:
        generation, seconds = timed(engine.stream(prompt, config), view)
    return Run(name, generation, seconds)


def as_prompt(engine: Engine, text: str, raw: bool) -> Any:
    """The user's turn of a chat, where the tokenizer has a chat template; without one, and with ``raw``, the text."""
    if raw or getattr(engine.tokenizer, "chat_template", None) is None:
        return text
    return [{"role": "user", "content": text}]


def figures(run: Run) -> dict[str, object]:
    g = run.generation
    return {
        "run": run.name,
        "tokens": g.total_tokens,
        "critical_path": g.critical_path,
        "parallelism": g.parallelism,
        "steps": g.steps,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "finish_reason": g.finish_reason,
        "warnings": g.warnings,
        "text": g.text,
    }


def figures_table(runs: Iterable[Run]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("tokens", "critical path", "parallelism", "steps", "seconds", "tokens/s"):
        table.add_column(column, justify="right")
    for run in runs:
        g = run.generation
        numbers = (str(g.total_tokens), str(g.critical_path), f"{g.parallelism:.2f}", str(g.steps))
        table.add_row(run.name, *numbers, f"{run.seconds:.2f}", f"{run.tokens_per_second:.0f}")
    return table
