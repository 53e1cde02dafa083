"""``mvkernels evaluate``: questions, answers, and the figures of arXiv 2506.09991 about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mvkernels.cli import charts
from mvkernels.cli.files import require_writable
from mvkernels.cli.loading import Placement, check_model, load_engine, untrained
from mvkernels.cli.options import Fields, Given, Json, Model, Raw
from mvkernels.model.checkpoint.names import EMBEDDED_NAME
from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.evaluation.figures import Summary, accuracies, markdown_table, summarize
from mvkernels.model.evaluation.grading import require_graders
from mvkernels.model.evaluation.questions import Question, generated_questions, read_questions
from mvkernels.model.evaluation.samples import MODES, Plan, Sample, collect, read_begun
from mvkernels.model.evaluation.statistics import paired_test
from mvkernels.model.files import write_whole
from mvkernels.model.tasks import TASKS

DEFAULT_MAX_TOKENS = 32768
#: Problems of a task, which are made before the first is asked: in about a minute.
MOST_PROBLEMS = 100_000
#: `sequential` is the engine's, not the mode of that name: it would only make the same answers slower.
SAMPLING = Fields(
    GenerationConfig, ("sequential", "logprobs"), {"max_new_tokens": f"the task's; of a file {DEFAULT_MAX_TOKENS}"}
)


def questions_of(what: str, problems: int | None, seed: int, raw: bool) -> tuple[list[Question], int]:
    """The questions that ``what`` names, a task or a file, and how many tokens an answer may have.

    Raises ValueError for neither.
    """
    if problems is not None and problems < 1:
        raise ValueError(f"--problems: expected at least 1, got {problems}")
    if what in TASKS:
        if problems is not None and problems > MOST_PROBLEMS:
            raise ValueError(f"--problems: expected at most {MOST_PROBLEMS} of {what}, got {problems}")
        return generated_questions(TASKS[what], problems or 200, seed), TASKS[what].max_new_tokens
    path = Path(what)
    if path.suffix not in (".jsonl", ".cnf"):
        raise ValueError(f"expected {', '.join(TASKS)}, or a file with .jsonl or .cnf, got {what!r}")
    found = read_questions(path)[:problems]
    return [replace(question, raw=question.raw or raw) for question in found], DEFAULT_MAX_TOKENS


def run(
    what: Annotated[str, typer.Argument(help="arithmetic, sat, or a file of questions: .jsonl, .cnf")] = "arithmetic",
    model: Model = EMBEDDED_NAME,
    out: Annotated[Path, typer.Option(help="Folder for samples, table and charts; one that has some goes on.")] = Path(
        "evaluation"
    ),
    mode: Annotated[
        list[str] | None, typer.Option(help="parallel, zero (asked without), sequential; again for more. Default: all.")
    ] = None,
    problems: Annotated[int | None, typer.Option(help="How many questions. Default: 200, or all of the file.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Samples of each question; they share its prompt.")] = 1,
    batch: Annotated[int, typer.Option(help="Questions at once; 1 for the wall-clock of each alone.")] = 16,
    *,
    given: Annotated[Given, SAMPLING],
    raw: Raw = False,
    placed: Annotated[Given, Fields(Placement)],
    as_json: Json = False,
) -> None:
    """Answer what is missing in `out`; print the table, and write samples, table and charts there.

    Raises:
        ValueError: Arguments are bad; before PyTorch is imported.
    """
    modes, placement = mode or [], Placement(**placed)
    unknown = [name for name in modes if name not in MODES]
    if unknown:
        raise ValueError(f"--mode: expected one of {', '.join(MODES)}, got {unknown[0]!r}")
    require_writable(out, "--out")
    questions, most = questions_of(what, problems, int(given.get("seed", 0)), raw)
    require_graders(question.grade for question in questions)
    config = GenerationConfig(**{"max_new_tokens": most, **given})
    chosen = [MODES[name] for name in dict.fromkeys(modes or MODES)]
    # Weights read in another dtype give other answers, so the samples name it.
    name = " in ".join(filter(None, (model, placement.dtype)))
    plans = [Plan(name, mode, config, n, batch) for mode in chosen]
    check_model(model, placement)
    for plan in plans:
        read_begun(samples_file(out, plan), plan.header(questions))
    engine, notes = load_engine(model, placement)
    notes += untrained([question.text for question in questions], model)
    console = Console(stderr=True, markup=False)
    for note in [*notes, *filter(None, [charts.left_out()])]:
        console.print(f"note: {note}", style="yellow", highlight=False, soft_wrap=True)
    runs: dict[str, list[Sample]] = {}
    for plan in plans:
        with bar(console, plan.mode.name, len(questions)) as progress:
            runs[plan.mode.name] = collect(engine, questions, plan, samples_file(out, plan), progress)
    summaries = [summarize(name, samples) for name, samples in runs.items()]
    text = report(what, plans[0], summaries, runs, notes)
    try:
        print(
            json.dumps([known(one) for one in summaries], allow_nan=False) if as_json else text,
            end="\n" if as_json else "",
        )
    finally:
        write_whole(out / "table.md", text)
    draw(what, runs, batch, out)


def samples_file(out: Path, plan: Plan) -> Path:
    return out / f"samples-{plan.mode.name}.jsonl"


def report(
    what: str, plan: Plan, summaries: Sequence[Summary], runs: Mapping[str, Sequence[Sample]], notes: Sequence[str] = ()
) -> str:
    """The table, and below it what the first mode's accuracy is against the others', and the notes."""
    where = f"`{plan.model}` on `{what}`, temperature {plan.config.temperature:g}, {plan.batch} questions at once."
    lines = [where, "", markdown_table(summaries)]
    (first, *others) = runs
    for other in others:
        found = paired_test(accuracies(runs[first]), accuracies(runs[other]))
        lines.append(
            f"{first} less {other}: {100 * found.difference:+.2f} ± {100 * found.error:.2f} points, "
            f"{found.better} questions better and {found.worse} worse (p = {found.p:.3g}).\n"
        )
    lines.append(
        "± is the standard error over questions; seconds are from the start of a question's batch to its end.\n"
    )
    lines += [f"Note: {note}.\n" for note in notes]
    return "\n".join(lines)


def known(summary: Summary) -> dict[str, Any]:
    """The figures for JSON, which has no NaN: the standard error over a single question is null."""
    return {name: None if value != value else value for name, value in asdict(summary).items()}


def draw(what: str, runs: Mapping[str, Sequence[Sample]], batch: int, out: Path) -> None:
    """Accuracy over budgets; where each question ran alone, also latency over # parallel."""
    charts.budgets(runs, out / "budgets.png", f"{what}: accuracy within a budget")
    if batch == 1:
        charts.latency(runs, out / "latency.png", f"{what}: latency over # parallel")


@contextmanager
def bar(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the console; what it gives is told how many are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.update(task, completed=done)
