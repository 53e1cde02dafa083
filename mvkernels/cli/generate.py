"""``mvkernels generate``: paths as they grow, the merged answer, and what it took."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mvkernels._lazy import import_for
from mvkernels.cli.files import require_file
from mvkernels.model.checkpoint.files import require_checkpoint
from mvkernels.model.checkpoint.names import EMBEDDED, EMBEDDED_NAME, checkpoint_path, require_device, trained_task
from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.files import write_whole
from mvkernels.model.tasks import GeneratedProblem, grade

if TYPE_CHECKING:
    from mvkernels.cli.live import View
    from mvkernels.model import Engine, Generation
    from mvkernels.model.engine.output.events import Event

#: Enough for the longest problem; the embedded model is so small that the room for it costs nothing.
EMBEDDED_MAX_NEW_TOKENS = 4096
WARM_UP_TOKENS = 8
#: The likeliest tokens that a page shows beside each one, where --logprobs does not say how many.
PAGE_LOGPROBS = 5
PARALLEL, SEQUENTIAL, CHAIN = "parallel", "one path at a time", "one chain, no blocks"
DTYPES = ("float32", "bfloat16", "float16", "float64")
#: The devices that a model can be put on: those of the attention backends.
DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Run:
    """One generation and the seconds that the engine took for it; showing it is not counted."""

    name: str
    generation: Generation
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.generation.total_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Question:
    """What the engine is asked and how that is shown. Of a generated problem also the problem itself, and the prompt
    that asks for the same work as one chain, without blocks."""

    prompt: Any
    shown: str
    problem: GeneratedProblem | None = None
    chain: str | None = None

    @property
    def expected_answer(self) -> Any:
        """Of a sum, the number."""
        return None if self.problem is None else getattr(self.problem, "answer", self.problem.expected)

    def correct(self, run: Run) -> bool | None:
        return None if self.problem is None else grade(run.generation.text, self.problem)


# ---- loading and asking


def check_model(model: str, placement: Mapping[str, str | None]) -> None:
    """Raises ValueError for arguments that `load_engine` could not use, before PyTorch is imported."""
    dtype, device, device_map = placement["dtype"], placement["device"], placement["device_map"]
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if device is not None and not DEVICE.fullmatch(device):
        raise ValueError(f"--device: expected cpu, cuda or a numbered one such as cuda:0, got {device!r}")
    if device is not None and device_map is not None:
        raise ValueError(f"expected --device or --device-map, got both: {device!r} and {device_map!r}")
    if checkpoint_path(model) == EMBEDDED and not (EMBEDDED / "config.json").exists():
        raise ValueError(f"expected the embedded model in {EMBEDDED}, found none; name a model with --model")
    require_checkpoint(checkpoint_path(model))


def load_engine(model: str, placement: Mapping[str, str | None]) -> tuple[Engine, list[str]]:
    """Load the engine of a checkpoint; stderr shows what is being loaded, which takes seconds.

    Args:
        model: Checkpoint as on the command line.
        placement: dtype, device and device_map as on the command line, checked by `check_model`.

    Returns:
        The engine, and the warnings of loading that a user can act on.

    Raises:
        ValueError: The device is not in this machine; also what `Engine.from_pretrained` raises.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("loading") as status:
            return _load(model, placement, lambda what: status.update(f"loading {what}"))
    return _load(model, placement, lambda what: print(f"loading {what} ...", file=sys.stderr, flush=True))


def _load(model: str, placement: Mapping[str, str | None], show: Callable[[str], None]) -> tuple[Engine, list[str]]:
    show("PyTorch")
    import torch

    dtype, device = placement["dtype"], placement["device"]
    require_device(device)
    if model == EMBEDDED_NAME and "OMP_NUM_THREADS" not in os.environ:
        # Its layers are too small to share among threads, which on a busy machine wait for one another a hundredfold.
        torch.set_num_threads(1)
    show("transformers")
    transformers_logging: Any = import_for("mvkernels generate", "transformers.utils.logging")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    from mvkernels.model import Engine

    show(f"the model: {model}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        engine = Engine.from_pretrained(
            model,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            device_map=placement["device_map"],
        )
    said = (str(warning.message) for warning in caught)
    notes = [text for text in said if "generates sequentially" in text or text.startswith("mvkernels: ")]
    return engine, notes


def own_problem(model: str, seed: int) -> GeneratedProblem:
    """A held-out problem of the task that the model was trained on. Raises ValueError for a model of no one task."""
    task = trained_task(checkpoint_path(model))
    if task is None:
        raise ValueError(f"expected a PROMPT, got none: {model} was not trained on a task that has problems of its own")
    problem: GeneratedProblem = next(task.generate(seed, "test"))
    return problem


def ask(engine: Engine, text: str | None, problem: GeneratedProblem | None, raw: bool) -> Question:
    """What to ask: the problem, or the text as the user's turn in the tokenizer's chat template.

    With ``raw``, and where there is no template, a text stays as it is.
    """
    if problem is not None:
        return Question(problem.prompt(), problem.question, problem, chain=problem.prompt(parallel=False))
    assert text is not None
    if raw or getattr(engine.tokenizer, "chat_template", None) is None:
        return Question(text, text)
    return Question([{"role": "user", "content": text}], text)


def untrained(questions: Sequence[str], model: str) -> list[str]:
    """A note where questions are none of the only task that the model was trained on, or an empty list."""
    task = trained_task(checkpoint_path(model))
    others = [question for question in questions if task is not None and not task.covers(question)]
    if task is None or not others:
        return []
    which = "this prompt is" if len(questions) == 1 else f"{len(others)} of {len(questions)} questions are"
    return [f"{model} was trained on {task.name} alone ({task.range}), and {which} none of these: expect wrong answers"]


# ---- running


def timed(events: Iterable[Event], view: View) -> tuple[Generation, float]:
    """Shows every event; returns the generation and the seconds spent waiting for events."""
    from mvkernels.model.engine.output.events import FinishEvent

    iterator, seconds = iter(events), 0.0
    while True:
        start = time.perf_counter()
        event = next(iterator)
        seconds += time.perf_counter() - start
        view.show(event)
        if isinstance(event, FinishEvent):
            return event.generation, seconds


def warm_up(engine: Engine, question: Question, config: GenerationConfig) -> None:
    """The first tokens of a run. A smaller budget would not do: where the prompt ends in open blocks it is refused."""
    from mvkernels.model.engine.output.events import TokenEvent

    events: Any = engine.stream(question.prompt, config)
    sampled = (event for event in events if isinstance(event, TokenEvent) and not event.forced)
    for _ in islice(sampled, WARM_UP_TOKENS):
        pass
    events.close()


def run_once(name: str, events: Iterable[Event], view: View) -> Run:
    with view:
        generation, seconds = timed(events, view)
    return Run(name, generation, seconds)


def sequential_runs(engine: Engine, question: Question, config: GenerationConfig) -> list[Run]:
    """The same text with one path at a time; and of a generated problem, the same work asked for as one chain."""
    from mvkernels.cli.live import Silent

    one_path = replace(config, sequential=True)
    runs = [run_once(SEQUENTIAL, engine.stream(question.prompt, one_path), Silent())]
    if question.chain is not None:
        runs.append(run_once(CHAIN, engine.stream(question.chain, config), Silent()))
    return runs


def run(
    prompt: str | None,
    model: str,
    given: Mapping[str, Any],
    placement: Mapping[str, str | None],
    *,
    compare: bool,
    raw: bool,
    full: bool,
    as_json: bool,
    html: Path | None,
) -> None:
    """Generates once, and with ``compare`` once more sequentially; prints the answer and the figures of each run.

    given: the fields of GenerationConfig that were given on the command line. full: also the whole text. html: a file
    for the page, or None. Raises ValueError for bad ones, before PyTorch is imported.
    """
    if compare and given.get("sequential"):
        raise ValueError("expected --compare or --sequential, got both")
    if full and as_json:
        raise ValueError("expected --full or --json, which has the whole text, got both")
    defaults: dict[str, Any] = {"max_new_tokens": EMBEDDED_MAX_NEW_TOKENS} if model == EMBEDDED_NAME else {}
    if html is not None:
        require_file(html, "--html")
        defaults["logprobs"] = PAGE_LOGPROBS
    config = GenerationConfig(**{**defaults, **given})
    check_model(model, placement)
    problem = own_problem(model, config.seed) if prompt is None else None
    engine, notes = load_engine(model, placement)
    from mvkernels.cli.live import make_view, visible

    question = ask(engine, prompt, problem, raw)
    notes += untrained([question.shown], model)
    console, remarks = Console(), Console(stderr=True) if as_json else Console()
    events = engine.stream(question.prompt, config)  # checks the prompt, and runs when it is iterated
    for note in notes:
        remarks.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not as_json:
        console.print(visible(question.shown), style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print()
    if compare:  # neither run shall pay for what is set up once in a process
        warm_up(engine, question, config)
    name = CHAIN if engine.tags is None else SEQUENTIAL if config.sequential else PARALLEL
    runs = [run_once(name, events, make_view(console, quiet=as_json))]
    if compare:
        runs += sequential_runs(engine, question, config)
    try:
        if as_json:
            for one in runs:
                print(json.dumps(document(question, one, notes), separators=(",", ":"), allow_nan=False))
        else:
            print_report(console, question, runs, full)
    finally:  # neither a full disk nor a reader that has gone shall cost both
        if html is not None:
            write_page(html, engine, question, runs)
    if html is not None:
        remarks.print(f"\npage: {html}", markup=False, highlight=False, soft_wrap=True)


# ---- reporting


def document(question: Question, run: Run, notes: list[str]) -> dict[str, object]:
    """The generation's JSON, which `Generation.from_json` reads, and beside it what is known of the run."""
    known = {
        "name": run.name,
        "prompt": question.chain if run.name == CHAIN and question.chain is not None else question.prompt,
        "expected_answer": question.expected_answer,
        "correct": question.correct(run),
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "notes": notes,
    }
    return {"run": known, **run.generation.to_dict()}


def write_page(path: Path, engine: Engine, question: Question, runs: Sequence[Run]) -> None:
    from mvkernels.model.engine.output.trace_html import TracedRun, trace_page

    traced = [TracedRun(run.name, run.generation, run.seconds) for run in runs]
    page = trace_page(traced, question.shown, decode=lambda token: str(engine.tokenizer.decode([token])))
    write_whole(path, page)


def print_report(console: Console, question: Question, runs: Sequence[Run], full: bool) -> None:
    """Whether the answer is right, and the figures; before them, with ``full``, the merged text."""
    from mvkernels.cli.live import visible

    first = runs[0].generation
    console.print()
    if full:
        console.rule("merged", align="left", style="dim")
        console.print(visible(first.text.strip("\n")), markup=False, highlight=False, soft_wrap=True)
        console.rule(style="dim")
    for warning in first.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if first.finish_reason != "stop":
        console.print(f"ended by {first.finish_reason}", style="yellow", highlight=False)
    if question.problem is not None:
        right = question.correct(runs[0])
        verdict = "right" if right else f"wrong: expected {question.problem.expected}"
        console.print(f"the answer is {verdict}", style="green" if right else "red", highlight=False)
    console.print()
    console.print(figures_table(question, runs))
    if len(runs) > 1:
        same = "the same text" if runs[1].generation.text == first.text else "another text"
        console.print(f"\none path at a time gave {same}", highlight=False)


def figures_table(question: Question, runs: Iterable[Run]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("tokens", "critical path", "parallelism", "steps", "seconds", "tokens/s"):
        table.add_column(column, justify="right")
    if question.problem is not None:
        table.add_column("answer")
    for run in runs:
        g = run.generation
        verdict = [] if question.problem is None else ["right" if question.correct(run) else "wrong"]
        numbers = (str(g.total_tokens), str(g.critical_path), f"{g.parallelism:.2f}", str(g.steps))
        table.add_row(run.name, *numbers, f"{run.seconds:.2f}", f"{run.tokens_per_second:.0f}", *verdict)
    return table
