"""3-SAT decided by recursive branching on variables: a block fixes one, with a path for either value.

A question lists one clause a line: `-a+b-c` is (not a, or b, or not c). Clauses are sorted by their variables, those
of the same variables as they come: under an assignment only one of them can fail, so which clause fails first follows
from what fails, not from where it stands. Variables are fixed in alphabetical order, false first. A node writes only
the literal that it fixes; a leaf the first clause of the question that fails, or SAT where all variables are fixed and
none has failed; the conclusion of a block SAT or UNSAT:

    <Path>
    1.2:+b          path 1 has fixed -a, this one +b
    +a-b+c</Path>   fails, so nothing below needs to be looked at

What closes an outline, a path or a conclusion stands behind its last line: a line of its own would be one more forward
each, on every path's way. So each node has the same number of tokens, whatever the instance: an index is one token in
the tokenizer of this task, down to INDEX_DEPTH. The tokens of a refutation grow exponentially with the variables, the
critical path linearly: the argument for branches in arXiv 2506.09991, section 3. The sequential trace visits the same
nodes depth first, one line a node (`1.2+b`), a line a leaf, and a line for what a node has come to (`1.2=UNSAT`).

Instances come in pairs: clauses are drawn until no assignment is left, which is an unsatisfiable instance; without the
last one it is satisfiable. One of the two is taken, so that neither the number of clauses nor their look tells.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import TypeAlias

from mvkernels.model.tasks.common import Task, is_held_out, require_split, with_ending

__all__ = ["SIZES", "TASK", "Formula", "generate", "read_dimacs"]

#: Variables of generated instances, least and most.
SIZES = (3, 7)
MAX_VARIABLES = len(ascii_lowercase)
#: Literals of a clause at most.
WIDTH = 3
INDEX_DEPTH = SIZES[1]
#: Of 3, 4, 5, 6 and 7 variables in training: the larger ones have more to learn from.
TRAINING_CHANCES = (1, 1, 2, 3, 4)
#: The share of satisfiable instances in training. A leaf that holds is one among many, the only one at which nothing is
#: to be found, and the last thing to be learned.
TRAINING_SATISFIABLE = 0.7

#: A variable from 1 on, negative where it is negated; as in DIMACS.
Literal: TypeAlias = int
Clause: TypeAlias = tuple[Literal, ...]
#: The values of the first variables: the literals that hold.
Assignment: TypeAlias = tuple[Literal, ...]

_HEAD = "Can all clauses hold?\n"
_HEADER = re.compile(r"p\s+cnf\s+(\d{1,9})\s+(\d{1,9})\s*")


@dataclass(frozen=True)
class Formula:
    """A conjunction of clauses, sorted by their variables. Raises ValueError for a clause that is none, or more than 26
    variables.
    """

    variables: int
    clauses: tuple[Clause, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.variables <= MAX_VARIABLES:
            raise ValueError(f"formula: expected 1 to {MAX_VARIABLES} variables, got {self.variables}")
        if not self.clauses:
            raise ValueError("formula: expected at least one clause, got none")
        for clause in self.clauses:
            names = [abs(literal) for literal in clause]
            if not 1 <= len(clause) <= WIDTH or len(set(names)) != len(clause):
                raise ValueError(f"formula: expected clauses of 1 to {WIDTH} different variables, got {clause}")
            if not all(1 <= name <= self.variables for name in names):
                raise ValueError(f"formula: expected variables from 1 to {self.variables}, got {clause}")
        ordered = sorted(self.clauses, key=lambda clause: [abs(literal) for literal in clause])
        object.__setattr__(self, "clauses", tuple(ordered))

    @property
    def question(self) -> str:
        return _HEAD + "\n".join(map(_text, self.clauses)) + "."

    @cached_property
    def satisfiable(self) -> bool:
        """By the same branching as in the trace."""
        return self._satisfiable(())

    @property
    def expected(self) -> str:
        """SAT or UNSAT."""
        return _verdict(self.satisfiable)

    @property
    def size(self) -> int:
        """Variables."""
        return self.variables

    @property
    def held_out(self) -> bool:
        """Whether the instance belongs to the test split, by a hash of its question, in the order of its clauses."""
        return is_held_out(self.question)

    def prompt(self, parallel: bool = True) -> str:
        """The question with the ending that asks for the parallel or the sequential trace, and a newline."""
        return with_ending(self.question, parallel)

    @cached_property
    def parallel_trace(self) -> str:
        """What a model answers to `prompt(parallel=True)`."""
        return "\n".join(["<Think>", *self._block((), "")[0], "</Think>", self.expected])

    @cached_property
    def sequential_trace(self) -> str:
        """What a model answers to `prompt(parallel=False)`."""
        return "\n".join(["<Think>", *self._chain((), "")[0], "</Think>", self.expected])

    def failing(self, assignment: Assignment) -> Clause | None:
        """The first clause whose literals are all false; None where there is none yet."""
        false = {-literal for literal in assignment}
        return next((clause for clause in self.clauses if false.issuperset(clause)), None)

    def _satisfiable(self, assignment: Assignment) -> bool:
        if self.failing(assignment) is not None:
            return False
        return len(assignment) == self.variables or any(self._satisfiable(child) for child in _children(assignment))

    def _block(self, assignment: Assignment, prefix: str) -> tuple[list[str], bool]:
        """What stands below a node in the parallel trace, and whether it can be satisfied. prefix: `1.2.` or empty."""
        failing = self.failing(assignment)
        if failing is not None:
            return [_text(failing)], False
        if len(assignment) == self.variables:
            return [_verdict(True)], True
        nodes = [(f"{prefix}{i}", child) for i, child in enumerate(_children(assignment), 1)]
        lines = ["<Parallel>", "<Goal>"]
        for index, child in nodes:
            lines += ["<Outline>", f"{index}:{_text(child[-1:])}</Outline>"]
        lines.append("</Goal>")
        found = False
        for index, child in nodes:
            work, satisfied = self._block(child, f"{index}.")
            work[-1] += "</Path>"
            lines += ["<Path>", f"{index}:{_text(child[-1:])}", *work]
            found |= satisfied
        return [*lines, "<Conclusion>", f"{_verdict(found)}</Conclusion>", "</Parallel>"], found

    def _chain(self, assignment: Assignment, prefix: str) -> tuple[list[str], bool]:
        """The same without tags: each node and what it comes to, under its index."""
        failing = self.failing(assignment)
        if failing is not None:
            return [_text(failing)], False
        if len(assignment) == self.variables:
            return [_verdict(True)], True
        lines: list[str] = []
        found = False
        for i, child in enumerate(_children(assignment), 1):
            work, satisfied = self._chain(child, f"{prefix}{i}.")
            lines += [f"{prefix}{i}{_text(child[-1:])}", *work]
            found |= satisfied
        return ([*lines, f"{prefix[:-1]}={_verdict(found)}"] if prefix else lines), found


def generate(
    seed: int | str,
    split: str = "train",
    chances: Sequence[float] = (1, 1, 1, 1, 1),
    satisfiable: float = 0.5,
) -> Iterator[Formula]:
    """Endless fresh instances of one split, the same for the same seed.

    chances: relative, of 3, 4, 5, 6 and 7 variables. satisfiable: the share of such instances. No question of the
    "test" split can come up in the "train" split, whatever the seeds: the hash of its text decides. Of 3 variables
    there are few sets of clauses, which both splits have, in other orders. Raises ValueError for another split.
    """
    require_split(split)
    rng = random.Random(f"sat {split} {seed}")
    low, high = SIZES
    while True:
        (variables,) = rng.choices(range(low, high + 1), chances)
        clauses = _draw(rng, variables)
        solvable = rng.random() < satisfiable
        if solvable:
            clauses.pop()
        rng.shuffle(clauses)
        formula = Formula(variables, tuple(clauses))
        if formula.held_out == (split == "test"):
            yield formula


def read_dimacs(path: Path) -> Formula:
    """The formula of a DIMACS CNF file (`p cnf VARIABLES CLAUSES`, clauses that end with 0).

    Raises ValueError, naming the file, for one that is none or that `Formula` does not take.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected a DIMACS CNF file, got one that is no text") from None
    header = None
    numbers: list[int] = []
    for place, line in enumerate(text.splitlines(), 1):
        if line.startswith("%"):  # the end, in SATLIB's files
            break
        if not line.strip() or line.startswith("c"):
            continue
        if header is None:
            header = _HEADER.fullmatch(line)
            if header is None:
                raise ValueError(f"{path}, line {place}: expected 'p cnf VARIABLES CLAUSES', got {line[:60]!r}")
            continue
        try:
            numbers += map(int, line.split())
        except ValueError:
            raise ValueError(f"{path}, line {place}: expected whole numbers, got {line[:60]!r}") from None
    if header is None:
        raise ValueError(f"{path}: expected 'p cnf VARIABLES CLAUSES', got no such line")
    clauses: list[Clause] = []
    begun: list[int] = []
    for number in numbers:
        if number:
            begun.append(number)
        else:
            clauses.append(tuple(begun))
            begun = []
    try:
        if begun or len(clauses) != int(header[2]):
            raise ValueError(f"expected {header[2]} clauses that end with 0, got {len(clauses)}")
        return Formula(int(header[1]), tuple(tuple(sorted(clause, key=abs)) for clause in clauses))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _children(assignment: Assignment) -> tuple[Assignment, Assignment]:
    variable = len(assignment) + 1
    return (*assignment, -variable), (*assignment, variable)


def _text(literals: Sequence[Literal]) -> str:
    return "".join(("-" if literal < 0 else "+") + ascii_lowercase[abs(literal) - 1] for literal in literals)


def _verdict(satisfiable: bool) -> str:
    return "SAT" if satisfiable else "UNSAT"


def _draw(rng: random.Random, variables: int) -> list[Clause]:
    """Different clauses, drawn until no assignment is left. The last one is needed for that."""
    left = [set(signed) for signed in product(*((-name, name) for name in range(1, variables + 1)))]
    clauses: list[Clause] = []
    while left:
        names = sorted(rng.sample(range(1, variables + 1), WIDTH))
        clause = tuple(name if rng.random() < 0.5 else -name for name in names)
        if clause not in clauses:
            clauses.append(clause)
            left = [assignment for assignment in left if not assignment.isdisjoint(clause)]
    return clauses


def _indices() -> tuple[str, ...]:
    """Every index of two or more numbers, down to INDEX_DEPTH."""
    depths = range(2, INDEX_DEPTH + 1)
    return tuple(".".join(numbers) for depth in depths for numbers in product("12", repeat=depth))


def in_range(question: str) -> bool:
    """Whether a question is an instance of a size that models are trained on."""
    clause = f"(?:[+-][a-{ascii_lowercase[SIZES[1] - 1]}]){{{WIDTH}}}"
    found = re.fullmatch(rf"{re.escape(_HEAD)}{clause}(?:\n{clause})*\.", question)
    return found is not None and len({letter for letter in question[len(_HEAD) :] if letter.isalpha()}) >= SIZES[0]


TASK = Task(
    name="sat",
    generate=generate,
    training=lambda seed: generate(seed, chances=TRAINING_CHANCES, satisfiable=TRAINING_SATISFIABLE),
    words=(
        *("SAT", "UNSAT", "=SAT", "=UNSAT"),
        *(sign + letter for letter in ascii_lowercase[: SIZES[1]] for sign in "+-"),
    ),
    added=_indices(),
    size_name="variables",
    max_new_tokens=4096,
    range=f"3-SAT of {SIZES[0]} to {SIZES[1]} variables",
    in_range=in_range,
)
