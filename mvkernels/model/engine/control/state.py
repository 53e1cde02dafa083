"""Where a branch stands: the states, what may be sampled in one, and what the engine writes on its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from mvkernels.grammar import Kind


class State(Enum):
    """Where a branch stands; see the table of `interpreter`."""

    TRUNK = "trunk"
    THINK = "think"
    PATH = "path"
    PARALLEL = "parallel"
    GOAL = "goal"
    OUTLINE = "outline"
    WAITING = "waiting"
    JOINING = "joining"
    CONCLUSION = "conclusion"
    CLOSING = "closing"
    OPENING = "opening"
    CLOSED = "closed"

    __hash__ = object.__hash__  # Enum's own is Python, and states are looked up for every token


FREE = frozenset((State.TRUNK, State.THINK, State.PATH))
TAKES_TEXT = FREE | {State.OUTLINE, State.CONCLUSION}
UNMERGED = frozenset((State.PARALLEL, State.GOAL, State.OUTLINE))
#: No end: more than any number of tokens.
UNLIMITED = 2**62

HEADING_KINDS = (Kind.SPACE, Kind.INDEX, Kind.INDEX_END)
#: With the grammar, what the engine writes on its own where a branch has come to a state: no other tag may come there.
AHEAD_KINDS = {
    State.PARALLEL: (Kind.SPACE, Kind.GOAL),
    State.GOAL: (Kind.SPACE, Kind.OUTLINE),
    State.OUTLINE: HEADING_KINDS,
    State.CLOSING: (Kind.SPACE, Kind.PARALLEL_END),
}


@dataclass(slots=True, frozen=True)
class Choices:
    """What may be sampled on a branch, as sets of bits.

    always: whatever room there is. openings: (bit, tokens, positions) of each tag that opens something if there is so
    much room, itself included; all: with these. most_tokens: that one of them takes beyond itself; most_positions.
    """

    always: int
    openings: tuple[tuple[int, int, int], ...]
    all: int
    most_tokens: int
    most_positions: int

    @classmethod
    def of(cls, always: int, openings: Iterable[tuple[int, int, int]]) -> Choices:
        openings = tuple(openings)
        everything, most_tokens, most_positions = always, 0, 0
        for bit, tokens, positions in openings:
            everything |= bit
            most_tokens, most_positions = max(most_tokens, tokens - 1), max(most_positions, positions)
        return cls(always, openings, everything, most_tokens, most_positions)


@dataclass(slots=True)
class BranchState:
    """One branch.

    items: the numbers of its own tokens between its forks, and its forks as tuples of children. base: what its open
    block stands in. spaces: whitespace since the last part of a block. outlines: complete ones of the open block.
    opened: tokens and positions that opening and closing a path for each of these takes. left: paths that run.
    position: that of its next token. end: the first one that it may not take; end_reason: which budget says so.
    reserve, rest: tokens, and positions, that closing it takes. ended: position behind its </Path>.
    reason: why it is being closed, or None. choices: see `Interpreter.allowed`; None where they are not known.
    """

    path: tuple[int, ...]
    parent: int | None
    state: State
    base: State
    position: int
    items: list[int | tuple[int, ...]] = field(default_factory=lambda: [0])
    spaces: int = 0
    outlines: int = 0
    opened: tuple[int, int] = (0, 0)
    left: int = 0
    blocks: int = 0
    end: int = UNLIMITED
    end_reason: str = ""
    reserve: int = 0
    rest: int = 0
    ended: int = 0
    reason: str | None = None
    choices: Choices | None = None


def ahead_kinds(b: BranchState) -> tuple[Kind, ...]:
    """See AHEAD_KINDS. Behind an outline another one may come, or the end of the goal: only the newline is sure."""
    return (Kind.SPACE,) if b.state is State.GOAL and b.outlines else AHEAD_KINDS.get(b.state, ())
