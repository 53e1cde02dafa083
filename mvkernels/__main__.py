"""The command line: ``mvkernels`` and ``python -m mvkernels``. A subcommand's module is imported when it is called."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import mvkernels
from mvkernels.cli import fail, one_line_errors

app = typer.Typer(
    name="mvkernels",
    help="Language models that write in parallel branches: generate, inspect, train, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than all else that an error in the arguments needs
)


class Semantics(StrEnum):
    canonical = "canonical"
    released = "released"


#: The name that stands for the model of the package; model.checkpoint resolves it.
EMBEDDED_NAME = "embedded"
Model = Annotated[
    str, typer.Option(help="Folder of a causal language model, a GGUF file, or embedded: the model of the package.")
]
#: How an interrupted command goes on that keeps what it has done.
SAME_COMMAND = "the same command goes on with what is done"
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mvkernels {mvkernels.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Language models that write in parallel branches: generate, inspect, train, evaluate."""


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Traces: a text file, .jsonl, .parquet, or a folder of such.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json, a folder with one, or embedded: count tokens, not words.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw mask and positions to this file.")] = None,
    semantics: Annotated[Semantics, typer.Option(help="The layout to use.")] = Semantics.canonical,
    trace: Annotated[int, typer.Option(help="Which trace of a file or folder with several, from 1.")] = 1,
    as_json: Json = False,
) -> None:
    """Show a trace: its tree, tokens, critical path, parallelism, mask density and blocks."""
    with one_line_errors():
        from mvkernels.cli import inspect as command

        command.run(file, tokenizer, plot, semantics.value, as_json, trace)


@app.command()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to answer. Default: a fresh problem of the task that MODEL was trained on."),
    ] = None,
    model: Model = EMBEDDED_NAME,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens in all.")] = None,
    max_critical_path: Annotated[int | None, typer.Option(help="Tokens on the longest chain.")] = None,
    max_width: Annotated[int | None, typer.Option(help="Paths per block.")] = None,
    max_depth: Annotated[int | None, typer.Option(help="Blocks inside one another; 0: no block.")] = None,
    max_path_tokens: Annotated[int | None, typer.Option(help="Tokens on the longest chain within one path.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Wall-clock time.")] = None,
    no_grammar: Annotated[bool, typer.Option("--no-grammar", help="Let the model write malformed blocks.")] = False,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the smallest set of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the most likely tokens only.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least share of the likeliest token's probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: tokens less likely again.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="Log-probabilities, with so many likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, and of the problem where no PROMPT is given.")] = 0,
    sequential: Annotated[bool, typer.Option("--sequential", help="Advance one path at a time.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Then again sequentially, and compare.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the model's chat template.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, balanced, ...")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print the whole text too, with all that the paths say.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead, one line a generation.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file: tree, timeline, text.")] = None,
) -> None:
    """Generate: show every path as it grows, the merged answer, and what it took."""
    settings = {
        "max_new_tokens": max_tokens,
        "max_critical_path": max_critical_path,
        "max_width": max_width,
        "max_depth": max_depth,
        "max_path_tokens": max_path_tokens,
        "max_seconds": max_seconds,
        "grammar": False if no_grammar else None,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "logprobs": logprobs,
        "seed": seed,
        "sequential": sequential,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    placement = {"dtype": dtype, "device": device, "device_map": device_map}
    with one_line_errors():
        from mvkernels.cli import generate as command

        switches = {"compare": compare, "raw": raw, "full": full, "as_json": as_json}
        command.run(prompt, model, given, placement, html=html, **switches)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Traces: text files, .jsonl, .parquet, folders of such.")],
    as_json: Json = False,
) -> None:
    """Check traces: grammar (errors, exit status 1) and paths that refer to each other (warnings)."""
    with one_line_errors():
        from mvkernels.cli import check_traces as command

        command.run(files, as_json)


@app.command()
def stats(
    files: Annotated[list[Path], typer.Argument(help="Traces: text files, .jsonl, .parquet, folders of such.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json, a folder with one, or embedded: count tokens, not words.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures as JSON, and a chart of them.")] = None,
    as_json: Json = False,
) -> None:
    """Show the figures of sets of traces: tokens, critical path, # parallel, blocks, paths, depth, width, lengths."""
    with one_line_errors():
        from mvkernels.cli import stats as command

        command.run(files, tokenizer, out, as_json)


@app.command("add-tags")
def add_tags(
    model: Annotated[str, typer.Argument(help="Folder of a causal language model, a GGUF file, or embedded.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the extended model to.")],
    seed: Annotated[int, typer.Option(help="Of the noise in the new embedding rows.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16, float16. Default: as they were published.")
    ] = None,
) -> None:
    """Extend a model and its tokenizer by the twelve control tags."""
    with one_line_errors():
        from mvkernels.cli import add_tags as command

        command.run(model, out, seed, dtype)


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="New folder for the model; with --resume, the interrupted one.")],
    task: Annotated[str | None, typer.Option(help="Whose problems it learns: arithmetic, sat.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Tokens of one packed row.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak, of the layers' matrices.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps up to the peak.")] = None,
    sequential_share: Annotated[float | None, typer.Option(help="Share of problems written without blocks.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="A multiple of 32.")] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Of the feed-forward part.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Base of the rotary positions.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between two logged losses.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between two checkpoints to resume from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the initial weights and the problems.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train the embedded model from nothing, on generated problems; the defaults are its recipe."""
    fields = {
        "task": task,
        "steps": steps,
        "tokens_per_step": tokens_per_step,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "sequential_share": sequential_share,
        "hidden_size": hidden_size,
        "layers": layers,
        "intermediate_size": intermediate_size,
        "rope_theta": rope_theta,
        "log_every": log_every,
        "save_every": save_every,
        "seed": seed,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    with one_line_errors():
        if out.suffix == ".toml":
            fail(f"train: expected a folder OUT, got {out}; to tune a model on traces: mvkernels tune RECIPE OUT")
        from mvkernels.cli import train as command

        command.run(out, given, resume, quiet)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def tune(
    context: typer.Context,
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A TOML file, or multiverse-32b.toml or smollm2-lora.toml, which come with the package; and the new "
            "folder for the model.",
            metavar="RECIPE OUT",
        ),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the mixture of each pass, train nothing; needs no OUT.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad traces out, and count them.")] = False,
) -> None:
    """Tune a base model on traces; every field of the recipe is an option: --model, --data, --learning-rate, ..."""
    with one_line_errors():
        from mvkernels.cli import tune as command

        switches = {"resume": resume, "quiet": quiet, "dry_run": dry_run, "skip_bad": skip_bad}
        command.run(recipe, context.args, **switches)


@app.command()
def curate(
    source: Annotated[
        Path, typer.Argument(help="Chains of thought: .jsonl, .json (a list) or .parquet", metavar="INPUT")
    ],
    out: Annotated[
        Path | None, typer.Argument(help="Folder for the traces; one that has some goes on.", metavar="OUT")
    ] = None,
    base_url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")] = "",
    model: Annotated[str, typer.Option(help="The model's name at the endpoint.")] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Only check the traces in INPUT, as `mvkernels check` does; asks no model.")
    ] = False,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key. Default: OPENAI_API_KEY, or no key.")
    ] = None,
    question_column: Annotated[str | None, typer.Option(help="Default: a known name, such as question.")] = None,
    chain_column: Annotated[str | None, typer.Option(help="Default: a known name, as in s1K-1.1.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Default: a known name, such as solution.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many chains, from the first on.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at the same time.")] = 16,
    max_tries: Annotated[int, typer.Option(help="Answers to one request, until the chain is rejected.")] = 3,
    max_distance: Annotated[float, typer.Option(help="Edit distance of a trace over its original's length.")] = 0.2,
    max_characters: Annotated[int, typer.Option(help="Of a chain; a longer one is rejected.")] = 200_000,
    drop_sequential: Annotated[
        bool, typer.Option("--drop-sequential", help="Reject chains without a parallel step instead of keeping them.")
    ] = False,
    retry_rejected: Annotated[
        bool, typer.Option("--retry-rejected", help="Do the chains again that were rejected, say with more tries.")
    ] = False,
    max_tokens_total: Annotated[int | None, typer.Option(help="Of all runs into OUT; then the run stops.")] = None,
    max_tokens_request: Annotated[int, typer.Option(help="Of one answer; 0: the endpoint's own limit.")] = 8192,
    max_cost: Annotated[float | None, typer.Option(help="Of all runs into OUT, by the prices; then it stops.")] = None,
    price_prompt: Annotated[float, typer.Option(help="Of a million prompt tokens.")] = 0.0,
    price_completion: Annotated[float, typer.Option(help="Of a million tokens of answers.")] = 0.0,
    temperature: Annotated[float | None, typer.Option(help="Default: the endpoint's own.")] = None,
    structured: Annotated[
        bool | None, typer.Option(help="Whether to ask for JSON by a schema. Default: where the endpoint can.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds of one request.")] = 600.0,
    retries: Annotated[int, typer.Option(help="Of one request that failed in passing.")] = 12,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: Json = False,
) -> None:
    """Curate: chains of thought become traces, in five stages of questions to a model; a rerun goes on.

    Exit status: 0 all chains are done, 3 a budget is used up, 4 some requests were not answered, 130 interrupted.
    """
    with one_line_errors():
        if check:
            if out is not None:
                raise ValueError(f"curate --check INPUT: expected no OUT, got {out}")
            from mvkernels.cli import check_traces

            check_traces.run([source], as_json)
            return
        if out is None or not base_url or not model:
            raise ValueError("expected curate INPUT OUT --base-url URL --model NAME, or curate --check INPUT")
        from mvkernels.cli import curate as command

        command.ChainReader(source)  # says what is wrong with the path before the client is imported

        def job(key: str) -> command.Job:
            return command.Job(
                source,
                out,
                command.EndpointSettings(
                    base_url,
                    model,
                    key,
                    retries,
                    timeout,
                    answer_tokens=max_tokens_request or None,
                    temperature=temperature,
                    structured=structured,
                ),
                command.Columns(question_column, chain_column, answer_column),
                limit,
                concurrency,
                command.Rules(max_tries, max_distance, drop_sequential, max_characters),
                command.Limits(max_tokens_total, max_cost, price_prompt, price_completion),
                retry_rejected,
            )

        command.run(job, api_key_env, quiet, as_json)


@app.command()
def evaluate(
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
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer in all.")] = None,
    max_critical_path: Annotated[int | None, typer.Option(help="Tokens on its longest chain.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the smallest set of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the most likely tokens only.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, and of the problems of a task.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the model's chat template.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, balanced, ...")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate: accuracy, tokens, critical path and wall-clock, asked in parallel and without."""
    settings = {
        "max_new_tokens": max_tokens,
        "max_critical_path": max_critical_path,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    placement = {"dtype": dtype, "device": device, "device_map": device_map}
    with one_line_errors(SAME_COMMAND):
        from mvkernels.cli import evaluate as command

        command.run(what, model, out, mode or [], given, placement, problems, n, batch, raw, as_json)


@app.command()
def reproduce(
    quick: Annotated[bool, typer.Option("--quick", help="Everything once, on models that hardly learn.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for tables and figures. Default: benchmarks/results/reproduce.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for models and samples, to go on from. Default: runs/reproduce.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Models trained and asked at the same time; the cores are shared.")] = 1,
    task: Annotated[str | None, typer.Option(help="Only this task: arithmetic or sat.")] = None,
) -> None:
    """Train from nothing, evaluate, and write the tables and figures; goes on where it was interrupted."""
    with one_line_errors(SAME_COMMAND):
        from mvkernels.cli import reproduce as command

        command.run(out, work, quick, jobs, task)


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions, the GPU, and which backends can run here and why the others cannot."""
    with one_line_errors():
        from mvkernels.cli import env as command

        command.run(as_json)


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="mvkernels")
    except KeyboardInterrupt:  # before a command has begun, such as in typer's own imports
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
