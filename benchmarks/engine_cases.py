"""What the engine is asked in its suite: plain prompts of unequal lengths, and blocks of equal paths by a script.

A block's prompt ends with its </Goal>, so that all that is generated are its paths and four tokens behind them. The
script says by a branch's state what comes: a text in a path, what closes the block behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.engine_models import Loaded
from mvkernels.grammar import Kind
from mvkernels.model import GenerationConfig
from mvkernels.model.engine.sampling.sampler import BranchView

QUESTIONS = (
    "A farmer has three fields of wheat. The first gives twice as much as the second.",
    "Write a short letter to a friend who has moved to another city, and ask how the new flat is.",
    "How does a bridge carry the weight of the cars that cross it?",
    "List the steps that it takes to bake a loaf of bread, with the time that each of them needs, and say which of "
    "them can be done while the dough rests.",
    "What is the difference between weather and climate?",
    "Explain to a child of ten years why the moon has phases, without a single word that the child would not know.",
    "Compare two ways of sorting a list of a thousand names. Which of them is faster when the list is sorted already?",
    "Name five rivers of Europe.",
)


def plain_prompts(loaded: Loaded, count: int) -> list[list[int]]:
    """Token ids; the lengths differ by several times."""
    texts = [QUESTIONS[i % len(QUESTIONS)] + " " + QUESTIONS[(3 * i) % len(QUESTIONS)] * (i % 3) for i in range(count)]
    return [loaded.tags.encode(text) for text in texts]


def plain_config(tokens: int) -> GenerationConfig:
    """Greedy; ends after `tokens` tokens and not before."""
    return GenerationConfig(max_new_tokens=tokens, eos_token_ids=(), stop=())


@dataclass(frozen=True)
class Blocks:
    """`requests` times one block of `paths` paths, each of `tokens` sampled tokens, its </Path> included."""

    loaded: Loaded = field(repr=False)
    requests: int
    paths: int
    tokens: int

    def prompts(self) -> list[list[int]]:
        outlines = "".join(f"<Outline>\n{i + 1}: part {i + 1}\n</Outline>\n" for i in range(self.paths))
        goal = f"\n<Parallel>\n<Goal>\n{outlines}</Goal>"
        return [self.loaded.tags.encode(QUESTIONS[i % len(QUESTIONS)] + goal) for i in range(self.requests)]

    def config(self, sequential: bool = False) -> GenerationConfig:
        forced = 8 * self.paths + 16  # at least what the engine writes, and what closes the block
        return GenerationConfig(
            max_new_tokens=self.paths * self.tokens + forced,
            max_width=max(16, self.paths),
            eos_token_ids=(self.loaded.end,),
            stop=(),
            sequential=sequential,
        )

    def script(self) -> Script:
        return Script(self.loaded, self.tokens)


class Script:
    """A sampler that writes the paths and closes the block; it never looks at the logits."""

    def __init__(self, loaded: Loaded, tokens: int) -> None:
        words = [token for token in loaded.tags.encode(" ".join(QUESTIONS)) if loaded.tags.kind(token) is Kind.TEXT]
        self.text = (words * (tokens // len(words) + 2))[: tokens + len(words)]
        self.shifts = len(words)
        self.last = tokens - 1
        self.path_end = loaded.tags.id(Kind.PATH_END)
        self.others = {
            "conclusion": loaded.tags.id(Kind.CONCLUSION_END),
            "closing": loaded.tags.id(Kind.PARALLEL_END),
            "trunk": loaded.end,
        }

    def __call__(self, views: Sequence[BranchView], logits: torch.Tensor) -> list[int]:
        return [self.next(view) for view in views]

    def next(self, view: BranchView) -> int:
        if view.state != "path":
            return self.others[view.state]
        # Each path its own part of the text.
        return self.path_end if view.drawn >= self.last else self.text[view.drawn + 7 * view.path[-1] % self.shifts]
