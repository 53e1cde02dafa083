"""Sums of products, worked out digit by digit: one path for each term, nested where a product splits again.

A problem reads `Compute 47*38 + (125+60) + 904.` Its terms are products, sums in brackets and plain numbers. The
written work goes as a person does it on paper, least significant digit first, one line a digit:

    4*8=32+5=37 -> 376        a digit times a digit, and the carry -> the result so far
    8+5=13+0=13+1=14 -> 40    a column, one number after the other and the carry -> the result so far

In the parallel trace every term has a path of its own, and a product whose second factor has several digits other than
0 splits again into one partial product for each. A path ends with its result under its own index, `1.2=01410`; the
conclusion writes these lines again and adds them up. Numbers to be added have five digits, so that a column stands at
the same place in each. The sequential trace is the same work, one step after the other, without tags inside its
`<Think>`.

The end of the prompt says which of the two is asked for (`common`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from mvkernels.model.tasks.common import (
    PARALLEL_ENDING,
    SEQUENTIAL_ENDING,
    Task,
    grade,
    is_held_out,
    require_split,
    with_ending,
)

__all__ = [
    "PARALLEL_ENDING",
    "SEQUENTIAL_ENDING",
    "TASK",
    "TERMS",
    "WIDTH",
    "Bracket",
    "Number",
    "Problem",
    "Product",
    "generate",
    "grade",
]

TERMS = (2, 5)
#: Columns of every addition.
WIDTH = 5
#: Of 2, 3, 4 and 5 terms in training: to find the last of many terms is learned last.
TRAINING_CHANCES = (2, 2, 2, 3)


@dataclass(frozen=True)
class Product:
    """`left*right`, both at least 1."""

    left: int
    right: int

    @property
    def value(self) -> int:
        return self.left * self.right

    def __str__(self) -> str:
        return f"{self.left}*{self.right}"

    def partial_products(self) -> list[Product]:
        """`left` times each digit of `right` other than 0 at its place, units first: 47*38 -> 47*8, 47*30."""
        digits = reversed(str(self.right))
        return [Product(self.left, int(d) * 10**place) for place, d in enumerate(digits) if d != "0"]


@dataclass(frozen=True)
class Bracket:
    """`(a+b)`, or more numbers."""

    parts: tuple[int, ...]

    @property
    def value(self) -> int:
        return sum(self.parts)

    def __str__(self) -> str:
        return "(" + "+".join(map(str, self.parts)) + ")"


@dataclass(frozen=True)
class Number:
    """A plain number: nothing to work out."""

    value: int

    def __str__(self) -> str:
        return str(self.value)


Term: TypeAlias = Product | Bracket | Number
#: Terms under their indices.
Steps: TypeAlias = list[tuple[str, Term]]


@dataclass(frozen=True)
class Problem:
    """A sum of terms. terms: 2 to 5 of at most five digits, at least two of them with work to do; else ValueError."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        low, high = TERMS
        if not low <= len(self.terms) <= high:
            raise ValueError(f"problem: expected {low} to {high} terms, got {len(self.terms)}")
        worked = sum(not isinstance(term, Number) for term in self.terms)
        if worked < 2:
            raise ValueError(f"problem: expected at least 2 products or brackets, got {worked}")
        for term in self.terms:
            if not 0 < term.value < 10**WIDTH:
                raise ValueError(f"problem: expected terms from 1 to {10**WIDTH - 1}, got {term}")

    @property
    def expression(self) -> str:
        """The canonical text of the problem, `47*38 + 125*6 + 904`."""
        return " + ".join(map(str, self.terms))

    @property
    def question(self) -> str:
        return f"Compute {self.expression}."

    @property
    def answer(self) -> int:
        return sum(term.value for term in self.terms)

    @property
    def expected(self) -> str:
        """The answer as it is to be written."""
        return str(self.answer)

    @property
    def size(self) -> int:
        """Terms."""
        return len(self.terms)

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the test split, by a hash of its canonical text."""
        return is_held_out(self.expression)

    def prompt(self, parallel: bool = True) -> str:
        """The question with the ending that asks for the parallel or the sequential trace, and a newline."""
        return with_ending(self.question, parallel)

    @cached_property
    def parallel_trace(self) -> str:
        """What a model answers to `prompt(parallel=True)`."""
        return "\n".join(["<Think>", *_parallel(self), "</Think>", str(self.answer)])

    @cached_property
    def sequential_trace(self) -> str:
        """What a model answers to `prompt(parallel=False)`."""
        return "\n".join(["<Think>", *_sequential(self), "</Think>", str(self.answer)])


def generate(seed: int | str, split: str = "train", chances: Sequence[float] = (1, 1, 1, 1)) -> Iterator[Problem]:
    """Endless fresh problems of one split, the same for the same seed.

    chances: relative, of 2, 3, 4 and 5 terms.
    No problem of the "test" split can come up in the "train" split, whatever the seeds: the hash of its text decides.
    Raises ValueError for another split.
    """
    require_split(split)
    rng = random.Random(f"{split} {seed}")
    while True:
        problem = _draw(rng, chances)
        if problem.held_out == (split == "test"):
            yield problem


def _draw(rng: random.Random, chances: Sequence[float]) -> Problem:
    low, high = TERMS
    while True:
        (count,) = rng.choices(range(low, high + 1), chances)
        terms = tuple(_draw_term(rng) for _ in range(count))
        if sum(not isinstance(term, Number) for term in terms) >= 2:
            return Problem(terms)


def _draw_term(rng: random.Random) -> Term:
    kind = rng.random()
    if kind < 0.7:
        right = _number(rng, 2) if rng.random() < 0.75 else rng.randint(2, 9)
        return Product(_number(rng, rng.choice((2, 3))), right)
    if kind < 0.85:
        return Bracket(tuple(_number(rng, rng.choice((2, 3))) for _ in range(2)))
    return Number(_number(rng, rng.choice((1, 2, 3, 4))))


def _number(rng: random.Random, digits: int) -> int:
    """A number of exactly so many digits."""
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _parallel(problem: Problem) -> list[str]:
    return _block(_numbered("", problem.terms))


def _block(steps: Steps) -> list[str]:
    """A block with a path for each step, whose conclusion adds up their results."""
    lines = ["<Parallel>", "<Goal>"]
    for index, term in steps:
        lines += ["<Outline>", f"{index}: {term}", "</Outline>"]
    lines.append("</Goal>")
    for index, term in steps:
        parts = _parts(index, term)
        work = _block(parts) if parts else _digits(term)
        lines += ["<Path>", f"{index}: {term}", *work, _result(index, term), "</Path>"]
    return [*lines, "<Conclusion>", *_sum(steps), "</Conclusion>", "</Parallel>"]


def _sequential(problem: Problem) -> list[str]:
    return _chain(_numbered("", problem.terms))


def _chain(steps: Steps) -> list[str]:
    """The same as `_block`, without tags: what is to be done, each step, the sum."""
    lines = [f"{index}: {term}" for index, term in steps]
    for index, term in steps:
        parts = _parts(index, term)
        work = _chain(parts) if parts else _digits(term)
        lines += [f"{index}: {term}", *work, _result(index, term)]
    return [*lines, *_sum(steps)]


def _numbered(prefix: str, terms: Sequence[Term]) -> Steps:
    return [(f"{prefix}{i}", term) for i, term in enumerate(terms, 1)]


def _parts(index: str, term: Term) -> Steps:
    """The steps into which a term splits, none for one that is worked out at once."""
    partial = term.partial_products() if isinstance(term, Product) else []
    return _numbered(f"{index}.", partial) if len(partial) > 1 else []


def _digits(term: Term) -> list[str]:
    """A term that does not split, worked out digit by digit."""
    if isinstance(term, Product):
        return _multiplication(term)
    if isinstance(term, Bracket):
        return ["+".join(map(_filled, term.parts)), *_columns(term.parts)]
    return []


def _filled(number: int) -> str:
    return str(number).zfill(WIDTH)


def _result(index: str, term: Term) -> str:
    return f"{index}={_filled(term.value)}"


def _sum(steps: Steps) -> list[str]:
    """The results of the steps once more, and their sum."""
    return [*(_result(*step) for step in steps), *_columns([term.value for _, term in steps])]


def _multiplication(product: Product) -> list[str]:
    """A number times one digit followed by zeros: the zeros first, then one line a digit."""
    factor = str(product.right).rstrip("0")
    done = "0" * (len(str(product.right)) - 1)
    lines = [f"-> {done}"] if done else []
    carry = 0
    digits = str(product.left)[::-1]
    for place, digit in enumerate(digits):
        line, total = f"{digit}*{factor}={int(digit) * int(factor)}", int(digit) * int(factor) + carry
        if carry:
            line += f"+{carry}={total}"
        done = str(total if place == len(digits) - 1 else total % 10) + done
        lines.append(f"{line} -> {done}")
        carry = total // 10
    return lines


def _columns(addends: Sequence[int]) -> list[str]:
    """A sum, one line a column, units first; within a column one number after the other, and the carry last."""
    rows = [_filled(number) for number in addends]
    lines, done, carry = [], "", 0
    for place in range(WIDTH):
        first, *others = [int(row[-1 - place]) for row in rows] + ([carry] if carry else [])
        line, total = str(first), first
        for digit in others:
            total += digit
            line += f"+{digit}={total}"
        done = str(total if place == WIDTH - 1 else total % 10) + done
        lines.append(f"{line} -> {done}")
        carry = total // 10
    return lines


# The terms that `_draw_term` draws.
_TERM = r"(?P<work>[1-9]\d{1,2}\*(?:[2-9]|[1-9]\d)|\([1-9]\d{1,2}\+[1-9]\d{1,2}\))|[1-9]\d{0,3}"


def in_range(question: str) -> bool:
    """Whether a question is a sum that models are trained on: 2 to 5 terms as they are drawn, two with work to do."""
    head, tail = "Compute ", "."
    if not (question.startswith(head) and question.endswith(tail)):
        return False
    terms = [re.fullmatch(_TERM, term) for term in question[len(head) : -len(tail)].split(" + ")]
    worked = sum(term is not None and term["work"] is not None for term in terms)
    return TERMS[0] <= len(terms) <= TERMS[1] and all(terms) and worked >= 2


TASK = Task(
    name="arithmetic",
    generate=generate,
    training=lambda seed: generate(seed, chances=TRAINING_CHANCES),
    words=(" +", " ->"),
    added=(),
    size_name="terms",
    max_new_tokens=2048,
    range=f"sums of {TERMS[0]} to {TERMS[1]} terms, such as Compute 47*38 + (125+60) + 904.",
    in_range=in_range,
)
