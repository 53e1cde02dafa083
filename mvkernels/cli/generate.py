"""``mvkernels generate``: paths as they grow, the merged answer, and what it took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mvkernels.cli.files import require_file
from mvkernels.cli.loading import Placement, check_model, load_engine, untrained
from mvkernels.cli.options import Fields, Given, Model, Raw
from mvkernels.model.checkpoint.names import EMBEDDED_NAME, checkpoint_path, trained_task
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
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to answer. Default: a fresh problem of the task that MODEL was trained on."),
    ] = None,
    model: Model = EMBEDDED_NAME,
    *,
    given: Annotated[Given, Fields(GenerationConfig, defaults={"max_new_tokens": "1024; embedded: 4096"})],
    compare: Annotated[bool, typer.Option("--compare", help="Then again sequentially, and compare.")] = False,
    raw: Raw = False,
    placed: Annotated[Given, Fields(Placement)],
    full: Annotated[
        bool, typer.Option("--full", help="Print the whole text too, with all that the paths say.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead, one line a generation.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file: tree, timeline, text.")] = None,
) -> None:
    """Generate once, and with `compare` once more sequentially; print the answer and the figures of each run.

    Raises:
        ValueError: Arguments are bad; before PyTorch is imported.
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
    placement = Placement(**placed)
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
