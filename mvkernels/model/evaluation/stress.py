"""Stress of the engine: any output at all, too few pages, callers that cancel; nothing may go wrong.

    python -m mvkernels.model.evaluation.stress [--requests 10000] [--same 1000] [--seed 0]

any tokens   every id is as likely as any other, and tags, newlines and digits more so, with the grammar and without;
             budgets and limits at random. Each request ends within its budgets, with a layout that its tokens parse to
             (where the grammar was on) and a JSON form that gives it back
same text    prompts of random lengths, some with a block that begins at once, through a strict engine: tokens, text and
             log-probabilities are those of the same request alone, bit for bit
In both, pages are few, so requests are preempted; some are cancelled, some streams are closed; and at the end all pages
are free again. It stops at the first violation, prints how to see it again, and exits with status 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from mvkernels.grammar import Kind
from mvkernels.layout import BranchLayout
from mvkernels.model.checkpoint.loading import EMBEDDED, load_checkpoint
from mvkernels.model.engine.engine import Engine
from mvkernels.model.engine.output.events import FinishEvent, Generation
from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.engine.sampling.sampler import BranchView, sample
from mvkernels.model.engine.streams import Stream
from mvkernels.tags import TagTokens

#: Requests that share an engine, and a seed of their own.
ROUND = 250
PAGE_SIZE = 4
_FEW_PAGES = 160
_STRICT_ROWS = 32  # a step of few rows takes as long as one of so many
_ENDS = {"stop", "max_new_tokens", "max_critical_path", "cancelled"}


class Violation(AssertionError):
    """The engine did what it must not do."""


@dataclass
class Served:
    """Outcomes of streams of one request each. ends: by their number. cancelled, closed: those that ended early."""

    ends: dict[int, Generation] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)


@dataclass
class Summary:
    """Figures of one part, added up over its rounds."""

    name: str
    requests: int = 0
    tokens: int = 0
    forked: int = 0
    closed: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, served: Served, engine: Engine) -> None:
        """One round, and the engine that it had to itself."""
        outs = served.ends.values()
        self.requests += len(outs) + len(served.closed)
        self.tokens += sum(out.total_tokens for out in outs)
        self.forked += sum(out.layout.has_branches for out in outs)
        self.closed += len(served.closed)
        self.preemptions += engine.preemptions
        self.reasons.update(out.finish_reason for out in outs)

    def __str__(self) -> str:
        ends = ", ".join(f"{number} {name}" for name, number in sorted(self.reasons.items()))
        return (
            f"{self.name:<24} {self.requests} requests, {self.tokens} tokens, {self.forked} with blocks, "
            f"{self.preemptions} preemptions; {ends}, {self.closed} closed; {self.seconds:.0f} s"
        )


def serve(streams: Sequence[Stream], chosen: random.Random) -> Served:
    """Reads the streams in turns, some events of each; they begin little by little, and a quarter may be left early."""
    served = Served()
    fates = {number: chosen.choice([None] * 3 + ["cancel", "close"]) for number in range(len(streams))}
    waiting, running = list(fates), list[int]()
    while waiting or running:
        running += [waiting.pop(0) for _ in range(min(len(waiting), chosen.choice([0, 5, 30])))]
        for number in list(running):
            stream, event = streams[number], None
            for _ in range(chosen.randint(1, 8)):
                event = next(stream, None)
                if isinstance(event, FinishEvent):
                    served.ends[number] = event.generation
            if event is None:
                running.remove(number)
            elif number not in served.ends and chosen.random() < 0.15:
                fate, fates[number] = fates[number], None
                if fate == "cancel":
                    stream.cancel()
                    served.cancelled.add(number)
                elif fate == "close":
                    stream.close()
                    served.closed.add(number)
    return served


def any_tokens(model: PreTrainedModel, tokenizer: Any, requests: int, seed: int, into: Summary, grammar: bool) -> None:
    """One round of the first part. Raises Violation, and whatever the engine raises."""
    engine = Engine(model, tokenizer, page_size=PAGE_SIZE, num_pages=_FEW_PAGES)
    chosen = random.Random(f"any {seed} {grammar}")
    likely = _bias(engine, 3.0)

    def sampler(views: Sequence[BranchView], logits: torch.Tensor) -> list[int]:
        return sample(views, likely.expand(len(views), -1))

    jobs = [_job(engine, chosen, seed + number, grammar) for number in range(requests)]
    served = serve([engine.stream([prompt], config, sampler) for prompt, config in jobs], chosen)
    for number, (_, config) in enumerate(jobs):
        _check_outcome(engine, served, number, config)
    _check_pages(engine)
    into.add(served, engine)


def same_text(model: PreTrainedModel, tokenizer: Any, requests: int, seed: int, into: Summary) -> None:
    """One round of the second part. Raises Violation, BackendError where an engine cannot be strict here, and whatever
    the engine raises.
    """
    few, many = (
        Engine(model, tokenizer, page_size=PAGE_SIZE, num_pages=pages, max_step_tokens=_STRICT_ROWS, strict=True)
        for pages in (_FEW_PAGES, 10 * _FEW_PAGES)
    )
    chosen = random.Random(f"same {seed}")
    likely = _bias(few, 2.0)

    def sampler(views: Sequence[BranchView], logits: torch.Tensor) -> list[int]:
        return sample(views, logits + likely)

    # Not ended by max_new_tokens: which path has the last of them depends on which had turns (strict.py).
    limits = [{"max_new_tokens": 1000, "max_critical_path": chosen.choice([5, 30, 60, 90])} for _ in range(requests)]
    jobs = [
        _job(few, chosen, seed + number, chosen.random() < 0.7, max_width=3, max_depth=1, **limits[number])
        for number in range(requests)
    ]
    served = serve([few.stream([prompt], config, sampler) for prompt, config in jobs], chosen)
    for number, (prompt, config) in enumerate(jobs):
        _check_outcome(few, served, number, config)
        out = served.ends.get(number)
        if out is not None and out.finish_reason != "cancelled":
            [alone] = many.generate([prompt], config, sampler)
            for name in ("token_ids", "text", "logprobs", "finish_reason"):
                same = getattr(out, name) == getattr(alone, name)
                _require(same, f"request {number}: expected the {name} of it alone, got others")
            # Those of different paths come in the order of the steps.
            same = sorted(out.warnings) == sorted(alone.warnings)
            _require(same, f"request {number}: expected the warnings {alone.warnings}, got {out.warnings}")
    _check_pages(few)
    into.add(served, few)


def _bias(engine: Engine, tags: float) -> torch.Tensor:
    """[V] what is added to logits: `tags` for control tags, and for the tokens of newlines and indices; else 0."""
    found = _tags(engine)
    head: Any = engine.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0], device=engine.model.device)
    bias[[*found.ids, *found.encode("\n1:")]] = tags
    return bias


def _tags(engine: Engine) -> TagTokens:
    if engine.tags is None:
        raise ValueError("expected a tokenizer with the control tags, got one without")
    return engine.tags


def _job(
    engine: Engine, chosen: random.Random, seed: int, grammar: bool, **limits: int
) -> tuple[list[int], GenerationConfig]:
    """A prompt, and what is asked for; limits: of the config, those that are not left to chance. Some prompts end with
    a goal, so that paths begin at once.
    """
    tags, size = _tags(engine), len(engine.tokenizer)
    prompt = [chosen.randrange(size) for _ in range(chosen.choice([1, 3, 10, 30, 60]))]
    prompt = [token for token in prompt if tags.kind(token) is Kind.TEXT] or tags.encode("1")
    budgets: dict[str, Any] = {
        "max_new_tokens": chosen.choice([1, 5, 30, 80, 200, 200]),
        "max_critical_path": chosen.choice([None, 40, 60]),
        "max_width": chosen.choice([1, 3, 5]),
        "max_depth": chosen.choice([0, 1, 2, 4]),
        **limits,
    }
    longest, width = budgets["max_critical_path"], budgets["max_width"]
    roomy = budgets["max_new_tokens"] >= 80 and (longest is None or longest >= 30)
    if roomy and budgets["max_depth"] and chosen.random() < 0.8:
        outlines = "".join(f"<Outline>\n{i + 1}: 1\n</Outline>\n" for i in range(chosen.randint(1, width)))
        prompt += tags.encode(f"\n<Parallel>\n<Goal>\n{outlines}</Goal>")
    config = GenerationConfig(
        temperature=1.0,
        seed=seed,
        grammar=grammar,
        max_path_tokens=chosen.choice([None, 30]),
        repetition_penalty=chosen.choice([1.0, 1.0, 1.2]),
        top_p=chosen.choice([1.0, 0.95]),
        sequential=chosen.random() < 0.1,
        logprobs=chosen.choice([None, 0, 2]),
        stop=(),
        eos_token_ids=(engine.tokenizer.eos_token_id,),
        **budgets,
    )
    return prompt, config


# ---- what must hold


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def _check_outcome(engine: Engine, served: Served, number: int, config: GenerationConfig) -> None:
    """One request has ended as it may, within its budgets, and its outcome is consistent."""
    out = served.ends.get(number)
    if out is None:
        return _require(number in served.closed, f"request {number}: expected an end, got none")
    got = f"request {number}: got {out.finish_reason}, {out.total_tokens} tokens, critical path {out.critical_path}"
    _require(out.finish_reason in _ENDS, f"{got}, error {out.error}; expected one of {sorted(_ENDS)}")
    _require(out.finish_reason != "cancelled" or number in served.cancelled, f"{got}, but it was not cancelled")
    _require(out.total_tokens <= config.max_new_tokens, f"{got}; expected at most {config.max_new_tokens} tokens")
    longest = config.max_critical_path
    _require(longest is None or out.critical_path <= longest, f"{got}; expected a critical path of at most {longest}")
    _require(
        out.layout.total_tokens == len(out.token_ids) == out.prompt_length + out.total_tokens,
        f"{got}; expected {len(out.token_ids)} tokens in its layout, got {out.layout.total_tokens}",
    )
    _require(Generation.from_json(out.to_json()) == out, f"{got}; expected its JSON to give it back")
    if config.grammar and out.finish_reason != "cancelled":
        layout = BranchLayout.from_token_ids(out.token_ids, _tags(engine), prompt_length=out.prompt_length)
        _require(
            torch.equal(layout.position_ids, out.layout.position_ids), f"{got}; expected the positions of its tokens"
        )
    return None


def _check_pages(engine: Engine) -> None:
    cache = engine.cache
    if cache is not None:
        cache.check()
        available = engine.available_pages
        _require(available == cache.num_pages, f"expected {cache.num_pages} available pages, got {available}")
        engine.clear_prefixes()
        cache.check()
        _require(
            cache.num_free_pages == cache.num_pages and cache.bytes_moved == 0,
            f"expected {cache.num_pages} free pages and no bytes moved, got {cache.num_free_pages} and "
            f"{cache.bytes_moved}",
        )


# ---- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each part. Returns the exit status."""
    description = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(
        prog="python -m mvkernels.model.evaluation.stress",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=10000, help="of any tokens, half of them with the grammar")
    parser.add_argument("--same", type=int, default=1000, help="requests of the second part")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next ones count on")
    options = parser.parse_args(arguments)
    model, tokenizer = load_checkpoint(EMBEDDED)
    parts: list[tuple[str, str, int, Callable[..., None]]] = [
        ("any tokens, grammar", "--same 0 --requests", (options.requests + 1) // 2, partial(any_tokens, grammar=True)),
        ("any tokens, no grammar", "--same 0 --requests", options.requests // 2, partial(any_tokens, grammar=False)),
        ("same text", "--requests 0 --same", options.same, same_text),
    ]
    for name, again, requests, part in parts:
        summary, started = Summary(name), time.perf_counter()
        for first in range(0, requests, ROUND):
            number, seed = min(ROUND, requests - first), options.seed + first
            try:
                part(model, tokenizer, number, seed, summary)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}")
                both = 2 * number if part is not same_text else number
                print(f"to see it again: {parser.prog} --seed {seed} {again} {both}")
                return 1
        summary.seconds = time.perf_counter() - started
        if requests:
            print(summary, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
