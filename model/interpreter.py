"""What the control tags do while they are generated: a pure state machine per request, one kind in, actions out.

It holds no tensor, no token and no text. Each branch of a request (the trunk, and every path) is in one state:

    trunk, think, path      free text: outside <Think>, inside it, inside a <Path>
    parallel, goal, outline the parts of a block before its paths: behind <Parallel>, inside <Goal>, inside <Outline>
    waiting                 the block's paths are running; nothing may come
    joining                 behind the paths, before <Conclusion>
    conclusion, closing     inside <Conclusion>, behind </Conclusion>
    opening                 a fresh path before its <Path>
    closed                  the path has ended, or the request has; nothing may come

              text space  Think /Think Parallel /Parallel Goal /Goal Outline /Outline Path /Path Conclusion /Conclusion
    trunk     .    .      think !      parallel !         !    !     !       !        !    !     !          !
    think     .    .      !     trunk  parallel !         !    !     !       !        !    !     !          !
    path      .    .      !     !      parallel !         !    !     !       !        !    close !          !
    parallel  #    .      #     #      #        #         goal #     #       #        #    #     #          #
    goal      #    .      #     #      #        #         #    fork  outline #        #    #     #          #
    outline   .    .      #     #      #        #         #    #     #       goal     #    #     #          #
    waiting   x    x      x     x      x        x         x    x     x       x        x    x     x          x
    joining   #    .      #     #      #        #         #    #     #       #        #    #     conclusion #
    conclusion .   .      #     #      #        #         #    #     #       #        #    #     #          closing
    closing   #    .      #     #      #        back      #    #     #       #        #    #     #          #
    opening   +    .      +     +      +        +         +    +     +       +        path +     +          +
    closed    x    x      x     x      x        x         x    x     x       x        x    x     x          x

    .       stays in its state                    name   goes to that state
    !       kept as plain text, with a warning    back   goes to trunk, think or path: what the block stands in
    fork    the paths begin, the branch waits; with no outline before it: #
    close   the path ends; with its last sibling the parent joins
    #       the block ends here with a warning: one whose paths have run stays merged, another is plain text from its
            start. What the block stands in then reads the kind again; a tag that is not allowed there is silent text
    +       a warning, and the kind is read again inside the path
    x       ValueError: the caller's mistake

A `<Parallel>` below the deepest level is kept as text (!), an `<Outline>` beyond the widest block is #. The end of a
branch (`stop`: end of text, a stop string, a budget) ends an open block as # does; then the trunk finishes, and a path
is closed by a forced `</Path>`. Every kind costs bounded work, and a fork into n paths takes 2n + 3 tags.
Grammar: DESIGN.md, section 1.1; Multiverse, arXiv 2506.09991, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mvkernels.grammar import FIRST_TAG, Kind, tag_name
from mvkernels.model.actions import (
    JOINING_KINDS,
    OPENING_KINDS,
    Action,
    Finish,
    FinishPath,
    Force,
    Fork,
    Merge,
    Warn,
)


class State(Enum):
    """Where a branch stands; see the table above."""

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


_FREE = frozenset((State.TRUNK, State.THINK, State.PATH))
_SILENT = frozenset((State.WAITING, State.CLOSED))
_UNMERGED = frozenset((State.PARALLEL, State.GOAL, State.OUTLINE))
_TAKES_TEXT = _FREE | {State.OUTLINE, State.CONCLUSION}

# (state, tag) -> next state, for tags that only change the state. `</Parallel>` goes back to what the block stands in.
_MOVES: dict[tuple[State, Kind], State] = {
    (State.TRUNK, Kind.THINK): State.THINK,
    (State.THINK, Kind.THINK_END): State.TRUNK,
    (State.PARALLEL, Kind.GOAL): State.GOAL,
    (State.GOAL, Kind.OUTLINE): State.OUTLINE,
    (State.OUTLINE, Kind.OUTLINE_END): State.GOAL,
    (State.JOINING, Kind.CONCLUSION): State.CONCLUSION,
    (State.CONCLUSION, Kind.CONCLUSION_END): State.CLOSING,
    (State.OPENING, Kind.PATH): State.PATH,
}


@dataclass(slots=True)
class _Branch:
    """One branch. items: the numbers of its own tokens between its forks, and its forks as tuples of children."""

    path: tuple[int, ...]
    parent: int | None
    state: State
    base: State
    position: int
    items: list[int | tuple[int, ...]] = field(default_factory=lambda: [0])
    outlines: int = 0
    blocks: int = 0


class Interpreter:
    """The control state of one request. Branch 0 is the trunk; children get the next free numbers.

    max_depth: how many blocks may lie inside one another, 0 for none. max_width: paths per block.
    Raises ValueError when either is out of range.
    """

    def __init__(self, max_depth: int, max_width: int) -> None:
        if max_depth < 0 or max_width < 1:
            raise ValueError(f"expected max_depth >= 0 and max_width >= 1, got {max_depth} and {max_width}")
        self.max_depth = max_depth
        self.max_width = max_width
        self.critical_path = 0  # highest position + 1
        self._branches = [_Branch((), None, State.TRUNK, State.TRUNK, 0)]

    # ---- what is

    def state(self, branch: int) -> State:
        """Where the branch stands."""
        return self._branches[branch].state

    def path(self, branch: int) -> tuple[int, ...]:
        """(2, 1) for path 2.1; () for the trunk."""
        return self._branches[branch].path

    def parent(self, branch: int) -> int | None:
        return self._branches[branch].parent

    def ordinal(self, branch: int) -> int:
        """How many blocks of this branch have forked so far."""
        return self._branches[branch].blocks

    def position(self, branch: int) -> int:
        """The position that the branch's next token takes."""
        return self._branches[branch].position

    def num_branches(self) -> int:
        return len(self._branches)

    def is_running(self, branch: int) -> bool:
        """Whether tokens may come on this branch."""
        return self._branches[branch].state not in _SILENT

    def items(self, branch: int) -> tuple[int | tuple[int, ...], ...]:
        """The branch in order: numbers of its own tokens, and at each fork the numbers of the children."""
        return tuple(self._branches[branch].items)

    def tree(self, branch: int = 0) -> list[Any]:
        """The structure so far, as `BranchLayout.from_tree` takes it."""
        # Children have higher numbers than their parent, so one backward pass builds all without recursion.
        trees: dict[int, list[Any]] = {}
        for number in range(len(self._branches) - 1, -1, -1):
            trees[number] = [
                item if isinstance(item, int) else [trees[child] for child in item]
                for item in self._branches[number].items
            ]
        return trees[branch]

    def fork_width(self, branch: int, kind: Kind) -> int:
        """How many paths would begin if `kind` came now; 0 when none would."""
        b = self._branches[branch]
        return b.outlines if b.state is State.GOAL and kind is Kind.GOAL_END else 0

    def banned(self, branch: int) -> tuple[Kind, ...]:
        """The tags that the request's limits forbid here; a sampler gives them no probability."""
        b = self._branches[branch]
        kinds: tuple[Kind, ...] = ()
        if len(b.path) >= self.max_depth:
            kinds += (Kind.PARALLEL,)
        if b.state is State.GOAL and b.outlines >= self.max_width:
            kinds += (Kind.OUTLINE,)
        return kinds

    # ---- what comes

    def feed(self, branch: int, kind: Kind, within_limits: bool = True) -> list[Action]:
        """One token of `kind` has come on `branch`, sampled or forced. Raises ValueError where none may come.

        within_limits: False for a prompt's tokens, whose blocks may be wider and deeper than the limits.
        """
        b = self._branches[branch]
        if b.state in _SILENT:
            raise ValueError(f"branch {branch}: expected a running branch, got one that is {b.state.value}")
        last = b.items[-1]
        if isinstance(last, int):
            b.items[-1] = last + 1
        else:
            b.items.append(1)
        b.position += 1
        self.critical_path = max(self.critical_path, b.position)
        return self._read(branch, b, kind, within_limits)

    def stop(self, branch: int, reason: str) -> list[Action]:
        """The branch must end here. `reason`: the request's on the trunk, and named in a warning in a path."""
        b = self._branches[branch]
        if b.state in _SILENT:
            raise ValueError(f"branch {branch}: expected a running branch, got one that is {b.state.value}")
        actions: list[Action] = []
        if b.state not in _FREE:
            actions += self._leave(branch, b, reason)
        if b.parent is None:
            if b.state is State.THINK:
                actions.append(Warn(branch, f"{_where(b)}: {reason} inside <Think>"))
            b.state = State.CLOSED
            return [*actions, Finish(reason)]
        actions.append(Warn(branch, f"{_where(b)}: closed by a forced </Path> ({reason})"))
        return [*actions, Force(branch, (Kind.PATH_END,))]

    def _read(self, branch: int, b: _Branch, kind: Kind, limited: bool) -> list[Action]:
        if kind < FIRST_TAG and (kind is Kind.SPACE or b.state in _TAKES_TEXT):
            return []
        if b.state in _FREE:
            return self._read_free(branch, b, kind, limited, silent=False)
        if b.state is State.GOAL and kind is Kind.GOAL_END and b.outlines:
            return self._fork(branch, b)
        if b.state is State.CLOSING and kind is Kind.PARALLEL_END:
            b.state = b.base
            return []
        following = _MOVES.get((b.state, kind))
        if following is None or (limited and kind is Kind.OUTLINE and b.outlines >= self.max_width):
            return self._leave(branch, b, tag_name(kind)) + self._read_free(branch, b, kind, limited, silent=True)
        if kind is Kind.GOAL:
            b.outlines = 0
        elif kind is Kind.OUTLINE_END:
            b.outlines += 1
        b.state = following
        return []

    def _read_free(self, branch: int, b: _Branch, kind: Kind, limited: bool, silent: bool) -> list[Action]:
        """A kind in free text. silent: a warning has been given already."""
        if kind < FIRST_TAG:
            return []
        if kind is Kind.PARALLEL and (not limited or len(b.path) < self.max_depth):
            b.base, b.state = b.state, State.PARALLEL
            return []
        if kind is Kind.PATH_END and b.state is State.PATH:
            return self._close(branch, b)
        following = _MOVES.get((b.state, kind))
        if following is not None:
            b.state = following
            return []
        return [] if silent else [Warn(branch, f"{_where(b)}: {tag_name(kind)} is not allowed here, kept as text")]

    def _leave(self, branch: int, b: _Branch, found: str) -> list[Action]:
        """End the open block, or skip what opens a path, because `found` stands where it may not."""
        state, b.state = b.state, State.PATH if b.state is State.OPENING else b.base
        if state is State.OPENING:
            return [Warn(branch, f"{_where(b)}: expected <Path>, found {found}")]
        fate = "kept as text" if state in _UNMERGED else "its paths stay merged"
        wanted = _expected(b, state, self.max_width)
        return [Warn(branch, f"{_where(b)}: block ended by {found} ({wanted} expected); {fate}")]

    def _fork(self, branch: int, b: _Branch) -> list[Action]:
        first = len(self._branches)
        children = tuple(range(first, first + b.outlines))
        for number in range(1, b.outlines + 1):
            self._branches.append(_Branch((*b.path, number), branch, State.OPENING, State.PATH, b.position))
        b.items.append(children)
        b.state = State.WAITING
        b.blocks += 1
        return [Fork(branch, children), *(Force(child, OPENING_KINDS) for child in children)]

    def _close(self, branch: int, b: _Branch) -> list[Action]:
        assert b.parent is not None
        b.state = State.CLOSED
        parent = self._branches[b.parent]
        children = parent.items[-1]
        assert isinstance(children, tuple)
        actions: list[Action] = [FinishPath(branch)]
        if all(self._branches[child].state is State.CLOSED for child in children):
            parent.position = max(self._branches[child].position for child in children)
            parent.state = State.JOINING
            actions += [Merge(b.parent, children), Force(b.parent, JOINING_KINDS)]
        return actions


def _where(b: _Branch) -> str:
    return "path " + ".".join(map(str, b.path)) if b.path else "trunk"


def _expected(b: _Branch, state: State, max_width: int) -> str:
    if state is State.GOAL:
        outline = "<Outline>" if b.outlines < max_width else f"no more than {max_width} outlines"
        return f"{outline} or </Goal>" if b.outlines else outline
    return {
        State.PARALLEL: "<Goal>",
        State.OUTLINE: "</Outline>",
        State.JOINING: "<Conclusion>",
        State.CONCLUSION: "</Conclusion>",
        State.CLOSING: "</Parallel>",
    }[state]
