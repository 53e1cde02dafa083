"""Budgets and the grammar in the interpreter alone: whatever is chosen among what is allowed, in whatever order, within
whatever budgets, the outcome is well-formed, and what a budget ends fills it exactly."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvkernels import BranchLayout
from mvkernels.grammar import FIRST_TAG, Kind, parse
from mvkernels.model.engine.control.actions import Action, Finish, FinishPath, Force, Fork, Merge, Warn
from mvkernels.model.engine.control.interpreter import END, Budget, Interpreter
from mvkernels.model.engine.control.prices import Prices
from mvkernels.model.engine.control.state import TAKES_TEXT, UNLIMITED, State
from tests.support.trees import TEST_TAGS

K = Kind
IDS = {K.TEXT: 17, K.SPACE: 12, K.INDEX: 14, K.INDEX_END: 16} | {
    kind: TEST_TAGS.ids[kind - FIRST_TAG] for kind in Kind if kind >= FIRST_TAG
}
WORDS = (K.TEXT, K.SPACE, K.INDEX, K.INDEX_END)


def prices(newline: int, digits: int, released: bool = False) -> Prices:
    """A newline takes `newline` tokens, each number of an index `digits`, the dots and the colon one token each."""
    return Prices(newline, lambda index: newline + (digits + 1) * len(index), released)


class World:
    """Drives an interpreter as a request does; `order` has the kinds in sequence order."""

    def __init__(self, interp: Interpreter, budget: Budget) -> None:
        self.interp, self.budget = interp, budget
        self.kinds: list[list[Kind]] = [[]]
        self.positions: list[list[int]] = [[]]
        self.starts = [0]  # the position of each branch's first token
        self.log: list[Action] = []
        self.touched = [0]
        interp.begin(budget)

    def feed(self, branch: int, kind: Kind) -> list[Action]:
        self.positions[branch].append(self.interp.position(branch))
        self.kinds[branch].append(kind)
        return self.interp.feed(branch, kind)

    def write(self, force: Force) -> list[Action]:
        """Its tokens, as many as they cost."""
        heading, newline = self.interp.prices.heading(force.index), self.interp.prices.newline
        actions: list[Action] = []
        for kind, behind in zip(force.kinds, (*force.kinds[1:], None), strict=True):
            count = 1
            if kind is K.SPACE:
                count = newline
            elif kind is K.INDEX:
                count = heading - newline - 1
            assert behind is None or not actions, "only the last token of a Force asks for more"
            for _ in range(count):
                actions = self.feed(force.branch, kind)
        self.touched.append(force.branch)
        return actions

    def run(self, actions: Sequence[Action]) -> None:
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            self.log.append(action)
            if isinstance(action, Force):
                queue.extendleft(reversed(self.write(action)))
            elif isinstance(action, Fork):
                for child in action.children:
                    self.kinds.append([])
                    self.positions.append([])
                    self.starts.append(self.interp.position(child))

    def take(self, branch: int, kind: Kind | None) -> None:
        """kind: None for an end of text."""
        self.touched.append(branch)
        self.run(self.feed(branch, K.TEXT if kind is None else kind))
        if kind is None and self.interp.is_running(branch):
            self.run(self.interp.close(branch, "stop"))
        self.settle()

    def settle(self) -> None:
        while self.touched and not self.finished():
            branch = self.touched.pop()
            reason = self.interp.hit(branch) if self.interp.is_running(branch) else None
            if reason is not None:
                everything = reason == "max_new_tokens"
                self.run(self.interp.close_all(reason) if everything else self.interp.close(branch, reason))

    def running(self) -> list[int]:
        return [branch for branch in range(self.interp.num_branches()) if self.interp.is_running(branch)]

    def finished(self) -> bool:
        return self.interp.state(0) is State.CLOSED

    def flat(self, values: list[list], branch: int = 0) -> list:
        own, out = iter(values[branch]), []
        for item in self.interp.items(branch):
            if isinstance(item, int):
                out += [next(own) for _ in range(item)]
            else:
                out += [value for child in item for value in self.flat(values, child)]
        return out

    @property
    def order(self) -> list[Kind]:
        return self.flat(self.kinds)

    @property
    def warnings(self) -> list[str]:
        return [action.message for action in self.log if isinstance(action, Warn)]

    @property
    def reason(self) -> str:
        assert isinstance(self.log[-1], Finish)
        return self.log[-1].reason


def pick(rng: random.Random, bits: int) -> Kind | None:
    """One of the kinds that are allowed, tags more often than text; None for an end of text, which is rare."""
    choices: list[Kind | None] = [kind for kind in Kind if kind >= FIRST_TAG and bits >> kind & 1]
    if bits >> K.SPACE & 1:
        choices.append(K.SPACE)
    if bits >> K.TEXT & 1:
        choices += [rng.choice(WORDS), rng.choice(WORDS)]
    if bits & END and rng.random() < 0.2:
        choices.append(None)
    return rng.choice(choices)


def play(seed: int, world: World, masked: bool = True) -> World:
    """Lets random branches draw, a few at a time, until the end. masked: whether among what is allowed."""
    rng = random.Random(seed)
    world.settle()
    everything = sum(1 << kind for kind in Kind) | END
    while not world.finished():
        running = world.running()
        some = rng.sample(running, rng.randint(1, len(running)))
        for branch, bits in zip(some, world.interp.allowed(some), strict=True):
            if world.interp.is_running(branch):
                world.take(branch, pick(rng, bits if masked else everything))
    return world


BUDGETS = st.builds(
    Budget,
    tokens=st.integers(1, 250),
    end=st.one_of(st.integers(1, 120), st.just(10**6)),
    path_tokens=st.one_of(st.integers(1, 60), st.just(10**6)),
)
PRICES = st.builds(prices, st.integers(1, 2), st.integers(1, 3), st.booleans())


def check_budgets(world: World) -> None:
    interp, budget = world.interp, world.budget
    assert interp.total_tokens == sum(map(len, world.kinds)) <= budget.tokens
    assert interp.critical_path == 1 + max(world.flat(world.positions), default=-1) <= budget.end
    ended = {action.branch for action in world.log if isinstance(action, FinishPath)}
    assert ended == set(range(1, interp.num_branches()))
    for branch in ended:
        last = max(i for i, kind in enumerate(world.kinds[branch]) if kind is K.PATH_END)
        assert world.positions[branch][last] + 1 - world.starts[branch] <= budget.path_tokens
    # What a budget ends fills it: nothing was set aside that was not needed.
    if world.reason == "max_new_tokens":
        assert interp.total_tokens == budget.tokens
    elif world.reason == "max_critical_path":
        assert interp.critical_path == budget.end
    else:
        assert world.reason == "stop"
    assert interp.reserved == 0


@settings(max_examples=600)
@given(st.integers(0, 10**9), BUDGETS, PRICES, st.integers(0, 3), st.integers(1, 4))
def test_whatever_is_allowed_is_well_formed_within_the_budgets(
    seed: int, budget: Budget, cost: Prices, max_depth: int, max_width: int
) -> None:
    world = play(seed, World(Interpreter(max_depth, max_width, prices=cost), budget))
    check_budgets(world)
    parse(bytes(world.order))
    assert all("forced" in message or "closed by the engine" in message for message in world.warnings)
    layout = BranchLayout.from_token_ids(
        [IDS[kind] for kind in world.order], TEST_TAGS, semantics="released" if cost.released else "canonical"
    )
    assert layout.position_ids.tolist() == world.flat(world.positions)


@settings(max_examples=400)
@given(st.integers(0, 10**9), BUDGETS, PRICES, st.integers(0, 3), st.integers(1, 4), st.booleans())
def test_whatever_comes_keeps_the_budgets(
    seed: int, budget: Budget, cost: Prices, max_depth: int, max_width: int, grammar: bool
) -> None:
    """A sampler without masks: the table says what becomes of it."""
    world = play(seed, World(Interpreter(max_depth, max_width, grammar, cost), budget), masked=False)
    check_budgets(world)


class Doubled(World):
    """Looks beside every token at what the short ways of the interpreter would have done."""

    def take(self, branch: int, kind: Kind | None) -> None:
        if kind is None or kind >= FIRST_TAG:
            return super().take(branch, kind)
        short, before = deepcopy(self.interp), deepcopy(self.interp)
        state, goes_on = self.interp.state(branch), isinstance(self.interp.items(branch)[-1], int)
        took = short.text(branch)
        actions = before.feed(branch, kind)
        if took:
            assert state in TAKES_TEXT and not actions and self.everything(short) == self.everything(before)
            assert before.hit(branch) is None
        else:
            assert state not in TAKES_TEXT or not goes_on or before.hit(branch) is not None
            assert self.everything(short) == self.everything(self.interp)
        super().take(branch, kind)

    @staticmethod
    def everything(interp: Interpreter) -> list[object]:
        return [interp._branches, interp.total_tokens, interp.critical_path, interp.reserved]

    def running(self) -> list[int]:
        """What may come is the same where nothing is remembered, and where each opening is looked at by itself."""
        found = super().running()
        allowed, fresh = self.interp.allowed(found), deepcopy(self.interp)
        for b in fresh._branches:
            b.choices = None
        assert fresh.allowed(found) == allowed
        for b in fresh._branches:
            b.choices = b.choices and replace(b.choices, most_tokens=UNLIMITED)
        assert fresh.allowed(found) == allowed
        return found


@settings(max_examples=100)
@given(st.integers(0, 10**9), BUDGETS, PRICES, st.integers(0, 3), st.integers(1, 4), st.booleans())
def test_short_ways_lead_to_the_same(
    seed: int, budget: Budget, cost: Prices, max_depth: int, max_width: int, masked: bool
) -> None:
    play(seed, Doubled(Interpreter(max_depth, max_width, masked, cost), budget), masked)


def test_random_runs_get_somewhere() -> None:
    """What the tests above draw has blocks in blocks, and ends for every reason."""
    reasons, forks, merges, deepest = set(), 0, 0, 0
    for seed in range(200):
        budget = Budget(tokens=200, end=100) if seed % 2 else Budget(tokens=120, path_tokens=30)
        world = play(seed, World(Interpreter(3, 4), budget))
        reasons |= {world.reason} | {a.reason for a in world.log if isinstance(a, FinishPath) and a.reason}
        forks += sum(isinstance(a, Fork) for a in world.log)
        merges += sum(isinstance(a, Merge) for a in world.log)
        deepest = max(deepest, *(len(world.interp.path(b)) for b in range(world.interp.num_branches())))
    assert reasons == {"stop", "max_new_tokens", "max_critical_path", "max_path_tokens"}
    assert forks == merges > 200 and deepest == 3


# ---- one thing at a time

# The rest of it is certain, and written by the engine.
GOAL_OF_TWO = [K.PARALLEL, K.OUTLINE_END, K.OUTLINE, K.OUTLINE_END, K.GOAL_END]
# What it takes with that (headings of 3 tokens), and two openings of 5.
GOAL, OPENING = 1 + 2 + 2 * (2 + 3 + 1) + 2, 5
CONCLUSION = 6  # from the newline before <Conclusion> to </Parallel>
BLOCK = 1 + 2 + (2 + 3 + 1) + 2 + (OPENING + 1) + CONCLUSION  # with one empty path


def in_paths(budget: Budget) -> World:
    """Two fresh paths under the trunk."""
    world = World(Interpreter(4, 4), budget)
    for kind in GOAL_OF_TWO:
        world.run(world.feed(0, kind))
    world.settle()
    return world


def test_blocks_in_one_step_take_room_from_one_another() -> None:
    for spare in range(2 * BLOCK + 4):
        world = in_paths(Budget(tokens=GOAL + 2 * (OPENING + 1) + CONCLUSION + spare))
        if spare == 0:
            assert world.finished() and world.reason == "max_new_tokens"
            continue
        assert world.interp.spare() == spare
        first, second = (bits >> K.PARALLEL & 1 for bits in world.interp.allowed([1, 2]))
        assert first == (spare >= BLOCK + 1), "one token is left for the other path"
        assert second == (spare >= 2 * BLOCK)
        assert world.interp.allowed([2])[0] >> K.PARALLEL & 1 == (spare >= BLOCK)


def test_a_first_outline_may_come_however_little_is_left() -> None:
    """Three branches and one token for all of them: behind two newlines in a goal no token at all was allowed."""
    world = World(Interpreter(4, 4), Budget(tokens=200))
    for kind in [*GOAL_OF_TWO[:-1], K.OUTLINE, *GOAL_OF_TWO[-2:]]:
        world.run(world.feed(0, kind))
    world.settle()
    world.interp.grammar = False  # such whitespace comes of a prompt
    for kind in (K.PARALLEL, K.GOAL, K.SPACE, K.SPACE):
        world.take(1, kind)
    world.interp.grammar = True
    while world.interp.spare() > 1:
        world.take(2, K.TEXT)
    assert world.interp.allowed([1, 2, 3])[0] == 1 << K.OUTLINE
    world.take(1, K.OUTLINE)
    assert world.interp.spare() == 1, "it was set aside for"


def test_positions_are_a_budget_of_each_branch() -> None:
    for room in range(1, BLOCK + 2):
        world = in_paths(Budget(end=GOAL + OPENING + 1 + CONCLUSION + room))
        assert [world.interp.room(branch) for branch in (1, 2)] == [room, room]
        assert [bits >> K.PARALLEL & 1 for bits in world.interp.allowed([1, 2])] == [room >= BLOCK] * 2
        world.take(1, K.TEXT)
        assert world.interp.is_running(1) == (room > 1) and world.interp.is_running(2)
        ends = [a for a in world.log if isinstance(a, FinishPath)]
        assert ends == ([] if room > 1 else [FinishPath(1, "max_critical_path")])


def test_a_path_ends_at_its_own_budget_and_the_others_go_on() -> None:
    world = in_paths(Budget(path_tokens=10))
    for _ in range(4):
        world.take(1, K.TEXT)
        world.take(2, K.SPACE)
    assert world.running() == [0] and world.interp.state(0) is State.CONCLUSION, "5 + 4 + 1 tokens each"
    assert world.warnings == [f"path {i}: closed by a forced </Path> (max_path_tokens)" for i in (1, 2)]
    for kind in (K.CONCLUSION_END, None):
        world.take(0, kind)
    assert world.reason == "stop"


def test_a_nested_block_ends_with_the_budget_of_the_path_around_it() -> None:
    world = in_paths(Budget(path_tokens=40))
    for kind in GOAL_OF_TWO:
        world.run(world.feed(1, kind))
    inner = world.running()[-1]
    while world.interp.is_running(inner):
        world.take(inner, K.TEXT)
    others = [branch for branch in world.running() if branch != 2]
    assert [world.interp.path(branch) for branch in others] == [(1, 1)]
    while world.interp.state(1) is not State.CLOSED:
        world.take(others[0], K.TEXT)
    ends = {world.interp.path(a.branch): a.reason for a in world.log if isinstance(a, FinishPath)}
    assert ends == dict.fromkeys([(1, 1), (1, 2), (1,)], "max_path_tokens")
    assert world.positions[1][-1] + 1 - world.starts[1] == 40
    assert world.kinds[1][-6:] == [K.CONCLUSION, K.SPACE, K.CONCLUSION_END, K.SPACE, K.PARALLEL_END, K.PATH_END]


@pytest.mark.parametrize("kind", [K.PARALLEL, K.THINK, K.OUTLINE], ids=lambda kind: kind.name)
def test_what_has_no_room_is_text(kind: Kind) -> None:
    """Of a sampler that ignores what is allowed."""
    world = World(Interpreter(4, 4, grammar=False), Budget())
    before = [K.PARALLEL, K.GOAL, K.OUTLINE, K.OUTLINE_END] if kind is K.OUTLINE else []
    for one in before:
        world.run(world.feed(0, one))
    tokens = world.interp.total_tokens + world.interp.reserved + 1
    world.interp.begin(Budget(tokens=tokens - len(before)))
    assert world.interp.allowed([0])[0] >> kind & 1 == 0
    world.run(world.feed(0, kind))
    assert world.interp.state(0) is State.TRUNK and len(world.warnings) == 1
    assert "no room for" in world.warnings[0] and "kept as text" in world.warnings[0]


@pytest.mark.parametrize("semantics", ["canonical", "released"])
def test_close_all_closes_from_the_inside_out(semantics: str) -> None:
    world = World(Interpreter(4, 4, prices=prices(1, 1, semantics == "released")), Budget())
    world.run(world.feed(0, K.THINK))
    for branch in (0, 1, 3):
        for kind in GOAL_OF_TWO[:-1] if branch == 3 else GOAL_OF_TWO:
            world.run(world.feed(branch, kind))
    expected = world.interp.total_tokens + world.interp.reserved
    world.run(world.interp.close_all("max_seconds"))
    assert world.reason == "max_seconds" and world.interp.total_tokens == expected
    parse(bytes(world.order))
    assert world.order[-2:] == [K.PARALLEL_END, K.THINK_END]
    assert [message.split(":")[0] for message in world.warnings] == [
        *["trunk"] * 2, *["path 1"] * 2, "path 2", *["path 1.1"] * 2, "path 1.2"
    ]  # fmt: skip
