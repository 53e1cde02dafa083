"""The cells of ``mvkernels reproduce``: models trained from nothing, and what they answer. Each is done once.

    models/NAME            a model, as `mvkernels train` writes it
    samples/NAME.jsonl     answers to questions, as `mvkernels evaluate` writes them
    batches.json           seconds for batches of problems, parallel and autoregressive

A cell that was interrupted goes on where it stood: a training from its last checkpoint, samples from the last batch.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvkernels.cli.loading import Placement, load_engine
from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.evaluation.questions import Question, generated_questions
from mvkernels.model.evaluation.samples import MODES, Plan, batches
from mvkernels.model.files import write_whole
from mvkernels.model.json_input import parse_json
from mvkernels.model.tasks import TASKS, sat
from mvkernels.model.training.recipe import Recipe

if TYPE_CHECKING:
    from mvkernels.model import Engine

#: What a model is called.
KINDS = ("multiverse", "autoregressive")
#: The share of a Multiverse model's problems that are written as one chain; of an autoregressive one's it is all. A
#: chain of sat has three times as many leaves to learn from as blocks of as many tokens.
CHAINS = {"arithmetic": 0.3, "sat": 0.8}
#: How each kind is asked.
ASKED = {"multiverse": ("parallel", "zero"), "autoregressive": ("sequential",)}
#: A failing clause is found by what it says, anywhere in the question.
ROPE_THETA = {"arithmetic": 1e3, "sat": 1e5}
#: Steps of each task's trainings. Of sat a trace with blocks takes several times the tokens of a chain, so it takes
#: more steps to see about as many problems.
STEPS = {
    "arithmetic": {"multiverse": 2000, "autoregressive": 2000},
    "sat": {"multiverse": 2400, "autoregressive": 1800},
}
#: Seeds of problems that no other cell has.
LATENCY_SEED, BATCH_SEED, GROWTH_SEED = "latency", "batches", "growth"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Scale:
    """How much is run. seeds: of models, by task. problems: unseen ones for accuracy. alone: for wall-clock, one at a
    time. growth: unsatisfiable instances of each size. batch_sizes: problems at once for the speed-up. shrink: what
    the recipes' sizes and steps are cut to, None for none. max_tokens: of an answer, None for the task's own limit.
    """

    seeds: dict[str, int]
    problems: int
    alone: int
    growth: int
    batch_sizes: tuple[int, ...]
    shrink: dict[str, Any] | None = None
    max_tokens: int | None = None
    batch: int = 128


FULL = Scale({"arithmetic": 3, "sat": 1}, 2000, 100, 100, (1, 2, 4, 8, 16, 32, 64, 128))
#: The same on models that have hardly learned: it shows that everything runs, not what comes out.
QUICK = Scale(
    {"arithmetic": 1, "sat": 1},
    problems=12,
    alone=4,
    growth=4,
    batch_sizes=(1, 2, 4),
    shrink={"steps": 200, "hidden_size": 64, "layers": 3, "tokens_per_step": 1536},
    max_tokens=400,
)


@dataclass(frozen=True)
class Cells:
    """The cells of one run. work: folder of models and samples. progress: whether trainings show a bar."""

    work: Path
    scale: Scale
    say: Say
    progress: bool = True

    def models(self) -> Iterator[tuple[str, str, int]]:
        """(task, kind, seed) of each model: the first seed of all tasks first."""
        for seed in range(max(self.scale.seeds.values())):
            for task, seeds in self.scale.seeds.items():
                for kind in KINDS:
                    if seed < seeds:
                        yield task, kind, seed

    def run(self) -> Iterator[str]:
        """Does each cell that is not done, and names it."""
        for task, kind, seed in self.models():
            yield from self.of_model(task, kind, seed)
            forget_engines()
            if seed == 0 and kind == KINDS[-1]:
                self.alone(task)
                yield f"{task}: wall-clock"
                if task == "sat":
                    self.growth()
                    yield "sat: growth"
                else:
                    self.batch_sizes(task)
                    yield f"{task}: batch sizes"

    def of_model(self, task: str, kind: str, seed: int) -> Iterator[str]:
        """The cells that need one model: its training, and its accuracy in each mode."""
        self.train(task, kind, seed)
        yield model_name(task, kind, seed)
        for mode in ASKED[kind]:
            self.accuracy(task, kind, seed, mode)
            yield f"{model_name(task, kind, seed)}-{mode}"

    # ---- models

    def recipe(self, task: str, kind: str, seed: int) -> Recipe:
        chains = CHAINS[task] if kind == KINDS[0] else 1.0
        found = Recipe(
            task=task,
            seed=seed,
            sequential_share=chains,
            rope_theta=ROPE_THETA[task],
            steps=STEPS[task][kind],
            save_every=100,
        )
        return replace(found, **self.scale.shrink) if self.scale.shrink else found

    def train(self, task: str, kind: str, seed: int) -> None:
        """Trains the model, or goes on with it. Raises ValueError where another recipe stands in its folder."""
        folder = self.work / "models" / model_name(task, kind, seed)
        recipe = self.recipe(task, kind, seed)
        if (folder / Recipe.outcome).exists():
            recipe.require_equal(folder / "recipe.json")
            return
        self.say(f"training {folder.name}: {recipe.steps} steps")
        resume = any((folder / "checkpoints").glob("checkpoint-*"))
        if folder.exists() and not resume:
            shutil.rmtree(folder)  # nothing in it that could be gone on with
        from mvkernels.model.training import train

        train(recipe, folder, resume=resume, progress=self.progress)

    # ---- answers

    def accuracy(self, task: str, kind: str, seed: int, mode: str) -> None:
        """Unseen problems, the same for every model of the task."""
        questions = _unseen(task, self.scale.problems)
        self._collect(task, kind, seed, mode, f"{model_name(task, kind, seed)}-{mode}", questions, self.scale.batch)

    def alone(self, task: str) -> None:
        """Problems one at a time, by both models in turn, so that what the machine does meanwhile hits both alike."""
        questions = generated_questions(TASKS[task], self.scale.alone, LATENCY_SEED)
        runs = []
        for kind, modes in ASKED.items():
            name = model_name(task, kind, 0)
            plan = self._plan(task, name, modes[0], 1)
            runs.append(batches(self._engine(name), questions, plan, self.samples(f"alone-{name}")))
        self.say(f"{task}: {len(questions)} problems one at a time")
        for _ in zip_longest(*runs):
            pass

    def growth(self) -> None:
        """Unsatisfiable instances of each size."""
        low, high = sat.SIZES
        for size in range(low, high + 1):
            chances = [float(size == one) for one in range(low, high + 1)]
            problems = sat.generate(f"{GROWTH_SEED} {size}", "test", chances, satisfiable=0.0)
            questions = generated_questions(TASKS["sat"], self.scale.growth, f"{GROWTH_SEED}-{size}", problems)
            for kind, modes in ASKED.items():
                name = f"growth-{size}-{model_name('sat', kind, 0)}"
                self._collect("sat", kind, 0, modes[0], name, questions, self.scale.batch)

    def batch_sizes(self, task: str) -> None:
        """Seconds for so many problems at once, by both models in turn; a first batch warms up."""
        path = self.work / "batches.json"
        done: dict[str, dict[str, float]] = parse_json(path.read_bytes()) if path.exists() else {}
        config = self._config(task)
        for size in self.scale.batch_sizes:
            if str(size) in done:
                continue
            self.say(f"{task}: {size} problems at once")
            problems = generated_questions(TASKS[task], size, BATCH_SEED)
            row: dict[str, float] = {}
            for kind, modes in ASKED.items():
                prompts = [problem.text + MODES[modes[0]].ending + "\n" for problem in problems]
                engine = self._engine(model_name(task, kind, 0))
                engine.generate(prompts[0], replace(config, max_new_tokens=32))
                started = time.perf_counter()
                engine.generate(prompts, config)
                row[kind] = time.perf_counter() - started
            done[str(size)] = row
            write_whole(path, json.dumps(done))

    def samples(self, name: str) -> Path:
        return self.work / "samples" / f"{name}.jsonl"

    def _collect(
        self, task: str, kind: str, seed: int, mode: str, name: str, questions: list[Question], batch: int
    ) -> None:
        model = model_name(task, kind, seed)
        with one_thread():
            steps = batches(self._engine(model), questions, self._plan(task, model, mode, batch), self.samples(name))
            for done in steps:
                if done < len(questions):
                    self.say(f"{name}: {done} of {len(questions)} answered")

    def _plan(self, task: str, model: str, mode: str, batch: int) -> Plan:
        return Plan(model, MODES[mode], self._config(task), batch=batch)

    def _config(self, task: str) -> GenerationConfig:
        return GenerationConfig(max_new_tokens=self.scale.max_tokens or TASKS[task].max_new_tokens)

    def _engine(self, name: str) -> Engine:
        return _load(self.work / "models" / name)


def model_name(task: str, kind: str, seed: int) -> str:
    return f"{task}-{kind}-{seed}"


@cache
def _unseen(task: str, count: int) -> list[Question]:
    return generated_questions(TASKS[task], count, 0)


@cache
def _load(folder: Path) -> Engine:
    return load_engine(str(folder), Placement())[0]


def forget_engines() -> None:
    """Each holds pages for as much as a quarter of the memory, once it has been asked for long enough."""
    _load.cache_clear()
    gc.collect()


@contextmanager
def one_thread() -> Iterator[None]:
    """For what is asked of several models at the same time; what is timed has all of the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
