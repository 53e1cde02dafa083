"""The branches of a request and their budgets: what `interpreter` knows between two tokens. No tensors, no text.

What closing every open branch takes stays reserved: in tokens for the request, in positions for each branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mvkernels.grammar import Kind
from mvkernels.model.engine.control.prices import Prices
from mvkernels.model.engine.control.state import UNLIMITED, UNMERGED, BranchState, State

SILENT = frozenset((State.WAITING, State.CLOSED))


@dataclass(frozen=True)
class Budget:
    """What a request may generate. tokens: in all. end: the first position that it may not take, because of
    `end_reason`. path_tokens: positions by which one path may advance.
    """

    tokens: int = UNLIMITED
    end: int = UNLIMITED
    end_reason: str = "max_critical_path"
    path_tokens: int = UNLIMITED


class Branches:
    """See `Interpreter`, which is made of it."""

    def __init__(self, max_depth: int, max_width: int, grammar: bool = True, prices: Prices | None = None) -> None:
        if max_depth < 0 or max_width < 1:
            raise ValueError(f"expected max_depth >= 0 and max_width >= 1, got {max_depth} and {max_width}")
        self.max_depth = max_depth
        self.max_width = max_width
        self.grammar = grammar
        self.prices = Prices() if prices is None else prices
        self.budget = Budget()
        self.critical_path = 0  # highest position + 1
        self.total_tokens = 0  # generated ones
        self.reserved = 0  # tokens that closing everything takes
        self._branches = [BranchState((), None, State.TRUNK, State.TRUNK, 0)]

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

    def outlines(self, branch: int) -> int:
        """How many outlines of the branch's open block are complete."""
        return self._branches[branch].outlines

    def position(self, branch: int) -> int:
        """The position that the branch's next token takes."""
        return self._branches[branch].position

    def num_branches(self) -> int:
        return len(self._branches)

    def is_running(self, branch: int) -> bool:
        """Whether tokens may come on this branch."""
        return self._branches[branch].state not in SILENT

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

    def banned(self, branch: int) -> tuple[Kind, ...]:
        """The tags that the limits of depth and width forbid here, for callers without the grammar."""
        b = self._branches[branch]
        kinds: tuple[Kind, ...] = ()
        if len(b.path) >= self.max_depth:
            kinds += (Kind.PARALLEL,)
        if b.state is State.GOAL and b.outlines >= self.max_width:
            kinds += (Kind.OUTLINE,)
        return kinds

    # ---- budgets

    def begin(self, budget: Budget) -> None:
        """What has come was the prompt; from here on `budget` holds. A path of the prompt may advance by
        `budget.path_tokens` beyond what the prompt has in it.
        """
        self.budget, self.total_tokens = budget, 0
        reached = [b.position for b in self._branches]
        for number in range(len(self._branches) - 1, 0, -1):
            b = self._branches[number]
            if b.parent is not None and self._branches[b.parent].state is State.WAITING:
                reached[b.parent] = max(reached[b.parent], reached[number])
        for b in self._branches:
            b.choices = None  # those that fit a path's budget
        trunk = self._branches[0]
        trunk.end, trunk.end_reason = budget.end, budget.end_reason
        for b, position in zip(self._branches[1:], reached[1:], strict=True):
            if b.state is not State.CLOSED:
                self._limit(b, position)

    def spare(self) -> int:
        """Tokens that may come besides those that close everything; negative where the budget does not hold."""
        return self.budget.tokens - self.total_tokens - self.reserved

    def room(self, branch: int) -> int:
        """Positions that the branch may take besides those that close it; negative where its budget does not hold.

        A branch that waits goes on behind the paths that have ended.
        """
        b = self._branches[branch]
        position = b.position
        if b.state is State.WAITING:
            children = b.items[-1]
            assert isinstance(children, tuple)
            position = max(position, *(self._branches[child].ended for child in children))
        return b.end - position - b.rest

    def paths_due(self, branch: int) -> int:
        """Positions that the longest of the paths takes that are due in an open goal, if all are closed at once."""
        b = self._branches[branch]
        if b.state not in UNMERGED:
            return 0
        complete = b.state is State.GOAL and b.outlines > 0
        return (b.opened if complete else self.prices.with_path(b.opened, (*b.path, b.outlines + 1)))[1]

    def end_reason(self, branch: int) -> str:
        """Which budget limits the positions of the branch."""
        return self._branches[branch].end_reason

    def hit(self, branch: int) -> str | None:
        """The budget that leaves no room for another token on the branch, or None."""
        if self.spare() < 1:
            return "max_new_tokens"
        return self.end_reason(branch) if self.room(branch) < 1 else None

    def _limit(self, b: BranchState, position: int) -> None:
        """Where a path must end that has reached `position`: so that what encloses it can be closed, or by itself."""
        assert b.parent is not None
        parent = self._branches[b.parent]
        b.end, b.end_reason = parent.end - parent.rest, parent.end_reason
        if position + self.budget.path_tokens < b.end:
            b.end, b.end_reason = position + self.budget.path_tokens, "max_path_tokens"

    def _reprice(self, b: BranchState) -> None:
        tokens, b.rest = self.prices.closing(b)
        self.reserved += tokens - b.reserve
        b.reserve = tokens
        b.choices = None
