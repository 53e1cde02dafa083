"""What the engine writes to close a branch from the inside out, and its price.

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
newline after `</Goal>` and after each `</Path>`, and none at the beginning of paths and conclusions.
"""

from __future__ import annotations

from collections.abc import Callable

from mvkernels.grammar import Kind
from mvkernels.model.engine.control.state import FREE, HEADING_KINDS, UNMERGED, BranchState, State

_OUTER_KINDS = {State.TRUNK: (), State.THINK: (Kind.THINK_END,), State.PATH: (Kind.PATH_END,)}
_CONCLUSION_KINDS = (Kind.CONCLUSION_END, Kind.SPACE, Kind.PARALLEL_END)
_GOAL_KINDS = (Kind.OUTLINE_END, Kind.SPACE, Kind.GOAL_END)


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
        self._trailing = newline if released else 0

    def opening(self, path: tuple[int, ...]) -> int:
        """Tokens of what opens a path."""
        return self._cost(self.opening_kinds, path)

    def empty_path(self, path: tuple[int, ...]) -> tuple[int, int]:
        """Tokens and positions of a path that is opened and closed at once."""
        opening = self.opening(path)
        return opening + 1 + self._trailing, opening + 1

    def with_path(self, opened: tuple[int, int], path: tuple[int, ...]) -> tuple[int, int]:
        """`opened` (see `BranchState`) with one more path."""
        tokens, positions = self.empty_path(path)
        return opened[0] + tokens, max(opened[1], positions)

    def closing(self, b: BranchState) -> tuple[int, int]:
        """Tokens and positions that closing a branch takes; for a waiting one, what follows its paths."""
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
        """The same for another state of the branch: the price of what `closing_kinds` writes, up to the end."""
        if state is State.CLOSED:
            return 0, 0
        if state is State.OPENING:
            return self.empty_path(b.path)
        joining = self._kinds(State.JOINING, base, outlines, 0)
        kinds = joining if state is State.WAITING else self._kinds(state, base, outlines, spaces)
        tokens = positions = self._cost(kinds, (*b.path, 1))
        if state in UNMERGED:  # then the paths, which the kinds lead up to, and what follows them
            if state is State.OUTLINE or outlines == 0:
                opened = self.with_path(opened, (*b.path, outlines + 1))
            rest = self._cost(joining)
            tokens, positions = tokens + self._trailing + opened[0] + rest, positions + opened[1] + rest
        return tokens + self._trailing * ((state if state in FREE else base) is State.PATH), positions

    def closing_kinds(self, b: BranchState) -> tuple[Kind, ...]:
        """What is written to close a branch, up to its fork. The index is that of the path, or of its path 1."""
        if b.state is State.OPENING:
            return (*self.opening_kinds, Kind.PATH_END)
        return self._kinds(b.state, b.base, b.outlines, b.spaces)

    def _kinds(self, state: State, base: State, outlines: int, spaces: int) -> tuple[Kind, ...]:
        gap = () if spaces else (Kind.SPACE,)
        first = (Kind.OUTLINE, *HEADING_KINDS, *_GOAL_KINDS)
        match state:
            case State.PARALLEL:
                return (*gap, Kind.GOAL, Kind.SPACE, *first)
            case State.GOAL:
                return (*gap, Kind.GOAL_END) if outlines else (*gap, *first)
            case State.OUTLINE:
                return _GOAL_KINDS
            case State.CLOSING:
                return (*gap, Kind.PARALLEL_END, *_OUTER_KINDS[base])
            case State.CONCLUSION:
                return (*_CONCLUSION_KINDS, *_OUTER_KINDS[base])
            case State.JOINING:
                joining = self.joining_kinds[-2:] if spaces else self.joining_kinds
                return (*joining, *_CONCLUSION_KINDS, *_OUTER_KINDS[base])
        return _OUTER_KINDS[state]

    def _cost(self, kinds: tuple[Kind, ...], index: tuple[int, ...] = ()) -> int:
        """Tokens of kinds. A heading is priced as a whole: a vocabulary may merge its parts."""
        tokens = len(kinds) + (self.newline - 1) * kinds.count(Kind.SPACE)
        return tokens - self.newline - 2 + self.heading(index) if Kind.INDEX in kinds else tokens
