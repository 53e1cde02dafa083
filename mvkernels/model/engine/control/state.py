"""Where a branch stands, and what closes it from the inside out: the kinds that the engine writes, and their price.

    in                   the engine writes                               and goes on as in
    trunk                nothing
    think                </Think>
    path                 </Path>
    closing              newline </Parallel>                             what the block stands in
    conclusion           </Conclusion>                                   closing
    joining, waiting     newline <Conclusion> newline                    conclusion
    goal with outlines   newline </Goal>, every path opened and closed   joining
    outline              </Outline>                                      goal with outlines
    goal without         newline <Outline> newline index colon           outline
    parallel             newline <Goal>                                  goal without
    opening              newline <Path> newline index colon              path

A first newline is left out where whitespace stands already. Prices are in tokens, and in positions by which the branch
advances: paths side by side take the positions of the longest. Released semantics (DESIGN.md, section 1.3) have one
newline behind `</Goal>` and one behind each `</Path>`, and none at the beginning of paths and conclusions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
_OUTER_KINDS = {State.TRUNK: (), State.THINK: (Kind.THINK_END,), State.PATH: (Kind.PATH_END,)}


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


def outer_kinds(state: State) -> tuple[Kind, ...]:
    """What closes free text."""
    return _OUTER_KINDS[state]


class Prices:
    """What the engine's own writing costs in a vocabulary.

    newline: tokens of a newline. heading: tokens of newline, index and colon, for the index (2, 1). released: whether
    the semantics are those of the released training code.
    """

    def __init__(
        self,
        newline: int = 1,
        heading: Callable[[tuple[int, ...]], int] = lambda index: len(HEADING_KINDS),
        released: bool = False,
    ) -> None:
        self.newline, self.heading, self.released = newline, heading, released
        before = () if released else (Kind.SPACE,)
        self.opening_kinds = (*before, Kind.PATH, *HEADING_KINDS)
        self.joining_kinds = (*before, Kind.CONCLUSION, Kind.SPACE)
        #: Written behind `</Goal>` and `</Path>`.
        self.trailing_kinds = (Kind.SPACE,) if released else ()
        self._before = 0 if released else newline
        self._trailing = newline if released else 0

    def opening(self, path: tuple[int, ...]) -> int:
        """Tokens of what opens a path."""
        return self._before + 1 + self.heading(path)

    def empty_path(self, path: tuple[int, ...]) -> tuple[int, int]:
        """Tokens and positions of a path that is opened and closed at once."""
        opening = self.opening(path)
        return opening + 1 + self._trailing, opening + 1

    def with_path(self, opened: tuple[int, int], path: tuple[int, ...]) -> tuple[int, int]:
        """`opened` (see `BranchState`) with one more path."""
        tokens, positions = self.empty_path(path)
        return opened[0] + tokens, max(opened[1], positions)

    def closing(self, b: BranchState) -> tuple[int, int]:
        """Tokens and positions that closing a branch takes; of a waiting one, what follows its paths."""
        return self.closing_in(b, b.state, b.base, b.outlines, b.spaces, b.opened)

    def closing_in(
        self,
        b: BranchState,
        state: State,
        base: State,
        outlines: int = 0,
        spaces: int = 0,
        opened: tuple[int, int] = (0, 0),
    ) -> tuple[int, int]:
        """The same as if the branch stood elsewhere."""
        if state is State.CLOSED:
            return 0, 0
        if state is State.OPENING:
            return self.empty_path(b.path)
        outer = self._outer(state if state in FREE else base)
        if state in FREE:
            return outer
        newline = self.newline
        gap = 0 if spaces else newline
        if state is State.CLOSING:
            own = gap + 1
        elif state is State.CONCLUSION:
            own = 2 + newline
        else:
            own = self._before + 3 + 2 * newline  # from <Conclusion> to </Parallel>
            if state is State.JOINING and spaces:
                own -= self._before
        if state not in UNMERGED:
            return own + outer[0], own + outer[1]
        if state is State.OUTLINE or outlines == 0:
            opened = self.with_path(opened, (*b.path, outlines + 1))
        if state is State.GOAL and outlines:
            own += gap + 1
        elif state is State.OUTLINE:
            own += 2 + newline
        else:
            own += gap + 3 + newline + self.heading((*b.path, 1))
            if state is State.PARALLEL:
                own += newline + 1
        return own + opened[0] + self._trailing + outer[0], own + opened[1] + outer[1]

    def closing_kinds(self, b: BranchState) -> tuple[Kind, ...]:
        """What is written to close a branch, up to where it forks. The index is that of the path, or of its path 1."""
        gap = () if b.spaces else (Kind.SPACE,)
        rest = (Kind.OUTLINE_END, Kind.SPACE, Kind.GOAL_END)
        first = (Kind.OUTLINE, *HEADING_KINDS, *rest)
        match b.state:
            case State.PARALLEL:
                return (*gap, Kind.GOAL, Kind.SPACE, *first)
            case State.GOAL:
                return (*gap, Kind.GOAL_END) if b.outlines else (*gap, *first)
            case State.OUTLINE:
                return rest
            case State.OPENING:
                return (*self.opening_kinds, Kind.PATH_END)
            case State.CLOSING:
                return (*gap, Kind.PARALLEL_END, *outer_kinds(b.base))
            case State.CONCLUSION | State.JOINING:
                joining = self.joining_kinds if b.state is State.JOINING else ()
                if b.spaces:
                    joining = joining[-2:]
                return (*joining, Kind.CONCLUSION_END, Kind.SPACE, Kind.PARALLEL_END, *outer_kinds(b.base))
        return outer_kinds(b.state)

    def _outer(self, state: State) -> tuple[int, int]:
        if state is State.TRUNK:
            return 0, 0
        return (1 + self._trailing, 1) if state is State.PATH else (1, 1)
