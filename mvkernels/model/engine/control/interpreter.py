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

Tags that open something count as ! (`<Parallel>`, `<Think>`) or # (`<Outline>`) below the deepest level, beyond the
widest block, and where the budgets have no room for them with all that closes them.

*The grammar.* `allowed` says what may be sampled so that no !, #, + or x comes: the other cells, `fork` behind an
outline only, whitespace between the parts of a block twice at most, end of text on the trunk outside of blocks. The
caller then also writes what is certain, which a Force asks for: a newline and the one tag behind `<Parallel>`, `<Goal>`
and `</Conclusion>`, the newline behind `</Outline>`, and each outline's index. That takes no forward of its own, and
nothing of what may still be sampled: it is part of what closes the branch. What comes all the same is read as the table
says.

*Budgets.* What closing every open branch takes, from the inside out (`state`), stays reserved: in tokens for the
request, in positions for each branch. `hit` names the budget that leaves no room for another token, and `close` ends a
branch there, as it does at an end of text and at a stop string; `close_all` ends the request. Each kind costs bounded
work, and a fork into n paths takes 2n + 3 tags.

Grammar: DESIGN.md, section 1.1; Multiverse, arXiv 2506.09991, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from mvkernels.grammar import FIRST_TAG, Kind, tag_name
from mvkernels.model.engine.control.actions import Action, Finish, FinishPath, Force, Fork, Merge, Warn
from mvkernels.model.engine.control.branches import SILENT, Branches, Budget
from mvkernels.model.engine.control.state import FREE, TAKES_TEXT, UNMERGED, BranchState, Choices, State, ahead_kinds

__all__ = ["END", "Budget", "Interpreter", "State"]

#: The bit of end of text in what `Interpreter.allowed` returns. The bit of a kind is 1 << kind; that of text stands for
#: everything that is no tag and no end of text, that of whitespace for whitespace alone.
END = 1 << (max(Kind) + 1)
# Whitespace tokens between two parts of a block.
_MAX_SPACES = 2

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
# What may come wherever the grammar holds; `<Parallel>`, `<Think>` and `<Outline>` where there is room for them.
_ALLOWED: dict[State, int] = {
    State.TRUNK: 1 << Kind.TEXT | END,
    State.THINK: 1 << Kind.TEXT | 1 << Kind.THINK_END,
    State.PATH: 1 << Kind.TEXT | 1 << Kind.PATH_END,
    State.PARALLEL: 1 << Kind.GOAL,
    State.GOAL: 0,
    State.OUTLINE: 1 << Kind.TEXT | 1 << Kind.OUTLINE_END,
    State.JOINING: 1 << Kind.CONCLUSION,
    State.CONCLUSION: 1 << Kind.TEXT | 1 << Kind.CONCLUSION_END,
    State.CLOSING: 1 << Kind.PARALLEL_END,
    State.OPENING: 1 << Kind.PATH,
}


class Interpreter(Branches):
    """The control state of one request. Branch 0 is the trunk; children get the next free numbers.

    max_depth: how many blocks may lie inside one another, 0 for none. max_width: paths per block. grammar: whether the
    caller writes what is certain within a block. prices: what the caller's own writing costs, in the semantics of the
    request. Without `begin` there are no budgets. Raises ValueError when max_depth or max_width is out of range.
    """

    # ---- what may come

    def allowed(self, branches: Sequence[int]) -> list[int]:
        """What may be sampled next on each of these running branches, as a set of bits (see END).

        One after the other: what one of them may open takes room from those behind it.
        """
        spare = self.spare() - len(branches)  # one token each
        out = []
        for number in branches:
            b = self._branches[number]
            choices = b.choices
            if choices is None:
                choices = b.choices = self._choices(b)
            room = b.end - b.position - b.rest
            if choices.most_tokens <= spare and choices.most_positions <= room:  # nearly always
                out.append(choices.all)
                spare -= choices.most_tokens
                continue
            kinds, most = choices.always, 0
            for bit, tokens, positions in choices.openings:
                # A goal's first outline is set aside for: it may come however little is left for all branches together.
                if (tokens - 1 <= spare or tokens <= 0) and positions <= room:
                    kinds |= bit
                    most = max(most, tokens - 1)
            spare -= most
            out.append(kinds)
        return out

    def ahead(self, branch: int) -> tuple[Kind, ...]:
        """What the caller writes where the branch has just come to its state, as nothing else may come there.

        Nothing without the grammar, and where the branch is being closed, which it has been told to do as a whole.
        """
        b = self._branches[branch]
        return ahead_kinds(b) if self.grammar and b.reason is None else ()

    def _choices(self, b: BranchState) -> Choices:
        """What may come in the branch's state: the same while text comes, which is nearly always."""
        kinds = _ALLOWED[b.state]
        if b.state not in TAKES_TEXT and b.spaces < _MAX_SPACES:
            kinds |= 1 << Kind.SPACE
        if b.state is State.GOAL and b.outlines:
            kinds |= 1 << Kind.GOAL_END
        openers = [kind for kind in self._openers(b) if self._fits_paths(b, kind)]
        return Choices.of(kinds, [(1 << kind, *self._opening_price(b, kind)) for kind in openers])

    def _openers(self, b: BranchState) -> tuple[Kind, ...]:
        """The tags that would open something here, within the limits of depth and width."""
        if b.state is State.GOAL:
            return (Kind.OUTLINE,) if b.outlines < self.max_width else ()
        if b.state not in FREE:
            return ()
        block = (Kind.PARALLEL,) if len(b.path) < self.max_depth else ()
        return (*block, Kind.THINK) if b.state is State.TRUNK else block

    def _opening_price(self, b: BranchState, kind: Kind) -> tuple[int, int]:
        """Tokens and positions that a tag takes from what is left: itself, its heading, and more to close."""
        heading = 0
        if kind is Kind.OUTLINE:
            heading = self.prices.heading((*b.path, b.outlines + 1)) if self.grammar else 0
            after = self.prices.closing_in(b, State.OUTLINE, b.base, b.outlines, 0, b.opened)
        else:
            after = self.prices.closing_in(b, State.THINK if kind is Kind.THINK else State.PARALLEL, b.state)
        return 1 + heading + after[0] - b.reserve, 1 + heading + after[1] - b.rest

    def _has_room(self, branch: int, b: BranchState, kind: Kind) -> bool:
        tokens, positions = self._opening_price(b, kind)
        # The token itself has been counted already.
        return tokens - 1 <= self.spare() and positions - 1 <= self.room(branch) and self._fits_paths(b, kind)

    def _fits_paths(self, b: BranchState, kind: Kind) -> bool:
        """Whether the path that a tag calls for can be closed within its own budget."""
        if kind is Kind.THINK:
            return True
        index = b.outlines + 1 if kind is Kind.OUTLINE else 1
        return self.prices.empty_path((*b.path, index))[1] <= self.budget.path_tokens

    # ---- what comes

    def text(self, branch: int) -> bool:
        """What `feed` does with a sampled token of text where text may come and no budget ends behind it: then nothing
        follows from it. Elsewhere False, and nothing has changed.
        """
        b = self._branches[branch]
        position, last = b.position + 1, b.items[-1]
        spare = self.budget.tokens - self.total_tokens - self.reserved
        if b.state not in TAKES_TEXT or b.end - b.rest <= position or spare < 2 or not isinstance(last, int):
            return False
        b.items[-1], b.position = last + 1, position
        self.total_tokens += 1
        if position > self.critical_path:
            self.critical_path = position
        return True

    def feed(self, branch: int, kind: Kind, given: bool = False, count: int = 1) -> list[Action]:
        """One token of `kind` has come on `branch`, sampled or forced. Raises ValueError where none may come.

        given: a token of the prompt, whose blocks may be wider and deeper than the limits. count: so many at once, only
        for text where text may come. Behind a `</Goal>` and a `</Path>` of released semantics whitespace may come on a
        branch that waits or has ended.
        """
        b = self._branches[branch]
        if b.state in SILENT and not (kind is Kind.SPACE and self._trails(b)):
            raise ValueError(f"branch {branch}: expected a running branch, got one that is {b.state.value}")
        last = b.items[-1]
        if isinstance(last, int):
            b.items[-1] = last + count
        elif b.state is State.WAITING:  # what trails a `</Goal>` stands before the fork
            first = b.items[-2]
            assert isinstance(first, int)
            b.items[-2] = first + count
        else:
            b.items.append(count)
        b.position += count
        self.critical_path = max(self.critical_path, b.position)
        if not given:
            self.total_tokens += count
        if b.state in SILENT or (kind < FIRST_TAG and b.state in TAKES_TEXT):
            return []
        if kind is Kind.SPACE:
            b.spaces += 1
            actions: list[Action] = []
        else:
            actions = self._read(branch, b, kind, given)
            b.spaces = 0
        self._reprice(b)
        if b.reason is not None and b.state is State.TRUNK:
            actions += self._finish(b, b.reason)
        return actions

    def close(self, branch: int, reason: str) -> list[Action]:
        """The branch ends here, with all that is open in it. `reason`: the request's, if that is the trunk.

        A path is named in a warning, and so is a block that is closed. Raises ValueError where the branch does not run.
        """
        b = self._branches[branch]
        if b.state in SILENT:
            raise ValueError(f"branch {branch}: expected a running branch, got one that is {b.state.value}")
        b.reason = reason
        warnings = self._warn_of_closing(branch, b)
        kinds = self.prices.closing_kinds(b)
        if not kinds:
            return [*warnings, *self._finish(b, reason)]
        index = b.path if b.state is State.OPENING else (*b.path, 1)
        return [*warnings, Force(branch, kinds, index)]

    def close_all(self, reason: str) -> list[Action]:
        """The request ends here, with all that is open in it."""
        actions: list[Action] = []
        for number, b in enumerate(self._branches):
            if b.state is State.WAITING:
                b.reason = reason
                actions += self._warn_of_closing(number, b)
            elif b.state is not State.CLOSED:
                actions += self.close(number, reason)
        return actions

    def _finish(self, b: BranchState, reason: str) -> list[Action]:
        b.state = State.CLOSED
        return [Finish(reason)]

    def _warn_of_closing(self, branch: int, b: BranchState) -> list[Action]:
        messages = []
        if b.state not in FREE and b.state is not State.OPENING:
            messages.append(f"{_where(b)}: block closed by the engine ({b.reason})")
        outer = b.state if b.state in FREE else b.base
        if b.path:
            messages.append(f"{_where(b)}: closed by a forced </Path> ({b.reason})")
        elif outer is State.THINK:
            messages.append(f"{_where(b)}: closed by a forced </Think> ({b.reason})")
        return [Warn(branch, message) for message in messages]

    def _trails(self, b: BranchState) -> bool:
        if not self.prices.released:
            return False
        if b.state is State.WAITING:
            children = b.items[-1]
            assert isinstance(children, tuple)
            return all(self._branches[child].items == [0] for child in children)
        return b.parent is not None and self._branches[b.parent].state in (State.WAITING, State.JOINING)

    def _read(self, branch: int, b: BranchState, kind: Kind, given: bool) -> list[Action]:
        if b.state in FREE:
            return self._read_free(branch, b, kind, given, silent=False)
        if b.state is State.GOAL and kind is Kind.GOAL_END and b.outlines:
            return self._fork(branch, b)
        if b.state is State.CLOSING and kind is Kind.PARALLEL_END:
            b.state = b.base
            return []
        following = _MOVES.get((b.state, kind))
        # A goal's first outline has been set aside for, if anything has.
        limited = following is State.OUTLINE and b.outlines > 0 and not given and b.reason is None
        cramped = limited and b.outlines < self.max_width and not self._has_room(branch, b, kind)
        if cramped or (limited and b.outlines >= self.max_width):
            following = None
        if following is None:
            warnings = self._leave(branch, b, tag_name(kind), cramped)
            return warnings + self._read_free(branch, b, kind, given, silent=True)
        b.state = following
        if kind is Kind.OUTLINE_END:
            b.outlines += 1
            b.opened = self.prices.with_path(b.opened, (*b.path, b.outlines))
        return self._ahead(branch, b)

    def _ahead(self, branch: int, b: BranchState) -> list[Action]:
        kinds = self.ahead(branch)
        return [Force(branch, kinds, (*b.path, b.outlines + 1))] if kinds else []

    def _read_free(self, branch: int, b: BranchState, kind: Kind, given: bool, silent: bool) -> list[Action]:
        """A kind in free text. silent: a warning has been given already."""
        if kind < FIRST_TAG:
            return []
        if kind is Kind.PATH_END and b.state is State.PATH:
            return self._close(branch, b)
        opens = kind in (Kind.PARALLEL, Kind.THINK) and (kind in self._openers(b) or (given and kind is Kind.PARALLEL))
        if opens and not given and not self._has_room(branch, b, kind):
            return [] if silent else [Warn(branch, f"{_where(b)}: no room for {tag_name(kind)}, kept as text")]
        if opens and kind is Kind.PARALLEL:
            b.base, b.state = b.state, State.PARALLEL
            b.outlines, b.opened = 0, (0, 0)
            return self._ahead(branch, b)
        following = _MOVES.get((b.state, kind))
        if following is not None:
            b.state = following
            return []
        return [] if silent else [Warn(branch, f"{_where(b)}: {tag_name(kind)} is not allowed here, kept as text")]

    def _leave(self, branch: int, b: BranchState, found: str, cramped: bool) -> list[Action]:
        """End the open block, or skip what opens a path, because `found` stands where it may not.

        cramped: it might, if there were room for it.
        """
        state, b.state = b.state, State.PATH if b.state is State.OPENING else b.base
        self._reprice(b)
        if state is State.OPENING:
            return [Warn(branch, f"{_where(b)}: expected <Path>, found {found}")]
        fate = "kept as text" if state in UNMERGED else "its paths stay merged"
        why = f"no room for {found}" if cramped else f"{_expected(b, state, self.max_width)} expected"
        return [Warn(branch, f"{_where(b)}: block ended by {found} ({why}); {fate}")]

    def _fork(self, branch: int, b: BranchState) -> list[Action]:
        first = len(self._branches)
        children = tuple(range(first, first + b.outlines))
        b.items.append(children)
        b.state, b.left = State.WAITING, len(children)
        b.blocks += 1
        self._reprice(b)
        trailing = self.prices.trailing_kinds
        actions: list[Action] = [Force(branch, trailing)] if trailing else []
        actions.append(Fork(branch, children))
        for number, child in enumerate(children, start=1):
            path = BranchState((*b.path, number), branch, State.OPENING, State.PATH, b.position, reason=b.reason)
            self._branches.append(path)
            self._reprice(path)
            self._limit(path, path.position)
            kinds = self.prices.opening_kinds if b.reason is None else self.prices.closing_kinds(path)
            actions.append(Force(child, kinds, path.path))
        return actions

    def _close(self, branch: int, b: BranchState) -> list[Action]:
        assert b.parent is not None
        b.state, b.ended = State.CLOSED, b.position
        parent = self._branches[b.parent]
        parent.left -= 1
        trailing = self.prices.trailing_kinds
        actions: list[Action] = [Force(branch, trailing)] if trailing else []
        actions.append(FinishPath(branch, b.reason))
        if parent.left == 0:
            children = parent.items[-1]
            assert isinstance(children, tuple)
            parent.position = max(self._branches[child].ended for child in children)
            parent.state, parent.spaces = State.JOINING, 0
            kinds = self.prices.joining_kinds if parent.reason is None else self.prices.closing_kinds(parent)
            actions += [Merge(b.parent, children), Force(b.parent, kinds)]
        return actions


def _where(b: BranchState) -> str:
    return "path " + ".".join(map(str, b.path)) if b.path else "trunk"


def _expected(b: BranchState, state: State, max_width: int) -> str:
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
