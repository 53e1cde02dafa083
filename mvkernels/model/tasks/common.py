"""What generated tasks have in common: the interface, the endings of their prompts, the hold-out split, the answer.

A task is endless fresh problems with an exact grader, and for each problem two traces of the same work: one in the
grammar of the control tags, one as a plain chain. The end of the prompt says which of the two is asked for, as in
arXiv 2506.09991.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

PARALLEL_ENDING = " Think step by step and in parallel before answering."
SEQUENTIAL_ENDING = " Think step by step before answering."
SPLITS = ("train", "test")
#: One problem in so many is held out of training, by a hash of its canonical text.
HOLD_OUT = 10


class GeneratedProblem(Protocol):
    """One problem of a task."""

    @property
    def question(self) -> str:
        """What is asked, without an ending."""

    @property
    def expected(self) -> str:
        """The right answer as it is to be written."""

    @property
    def size(self) -> int:
        """How large the problem is, in the task's own measure."""

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the test split."""

    def prompt(self, parallel: bool = True) -> str:
        """The question with the ending that asks for the parallel or the sequential trace, and a newline."""

    @property
    def parallel_trace(self) -> str:
        """What a model answers to `prompt(parallel=True)`."""

    @property
    def sequential_trace(self) -> str:
        """What a model answers to `prompt(parallel=False)`."""


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    generate        (seed, split) -> endless fresh problems, the same for the same seed; ValueError for another split
    training        seed -> the problems of the train split, in the mixture that a model learns best from
    words           what becomes one token each in a tokenizer made for the task, beside the words of its prompts
    added           texts that become one token wherever they stand (indices of paths)
    size_name       what `size` of a problem counts
    max_new_tokens  no right answer is longer
    range           the problems that models are trained on, in words
    in_range        whether a question, without an ending, is one of them
    """

    name: str
    generate: Callable[[int | str, str], Iterator[Any]]
    training: Callable[[int | str], Iterator[Any]]
    words: tuple[str, ...]
    added: tuple[str, ...]
    size_name: str
    max_new_tokens: int
    range: str
    in_range: Callable[[str], bool]

    def covers(self, prompt: str) -> bool:
        """Whether a prompt, with an ending or without, asks for a problem that models of this task are trained on."""
        question = prompt.rstrip()
        for ending in (PARALLEL_ENDING, SEQUENTIAL_ENDING):
            question = question.removesuffix(ending)
        return self.in_range(question)


def with_ending(question: str, parallel: bool) -> str:
    """The prompt of a question, and a newline."""
    return question + (PARALLEL_ENDING if parallel else SEQUENTIAL_ENDING) + "\n"


def is_held_out(text: str) -> bool:
    """Whether a problem of this canonical text belongs to the test split, by a hash."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HOLD_OUT == 0


def require_split(split: str) -> None:
    """Raises ValueError for a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")


def answer_in(text: str) -> str | None:
    """What stands behind the last `</Think>` of a generated text, without whitespace around; None without that tag."""
    _, closed, rest = text.rpartition("</Think>")
    return rest.strip() if closed else None


def grade(text: str, problem: GeneratedProblem) -> bool:
    """Whether a generated text gives the right answer: after its last `</Think>` it stands, and nothing else.

    text: what the model generated, with or without the prompt, without an end-of-text token.
    """
    return answer_in(text) == problem.expected
