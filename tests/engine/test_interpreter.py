"""The interpreter: every cell of the table in its docstring, what the grammar allows, limits, random streams."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvkernels import BranchLayout
from mvkernels.grammar import FIRST_TAG, Kind, parse, tag_name
from mvkernels.model.engine.control import interpreter as module
from mvkernels.model.engine.control.actions import Finish, FinishPath, Force, Fork, Merge, Warn
from mvkernels.model.engine.control.interpreter import END, Budget, Interpreter, State

K = Kind
GOAL_OF_ONE = [K.PARALLEL, K.GOAL, K.OUTLINE, K.TEXT, K.OUTLINE_END, K.GOAL_END]
GOAL_OF_TWO = [*GOAL_OF_ONE[:-1], *GOAL_OF_ONE[2:]]
COLUMNS = {
    "text": [K.TEXT, K.INDEX, K.INDEX_END],
    "space": [K.SPACE],
    **{tag_name(kind).strip("<>"): [kind] for kind in list(Kind)[FIRST_TAG:]},
}


def read_table() -> dict[tuple[State, str], str]:
    """The table as the docstring has it."""
    lines = [line.split() for line in (module.__doc__ or "").splitlines()]
    names = {state.value for state in State}
    rows = {line[0]: line[1:] for line in lines if line and line[0] in names and len(line) == len(COLUMNS) + 1}
    assert set(rows) == names
    return {
        (State(row), column): cell for row, cells in rows.items() for column, cell in zip(COLUMNS, cells, strict=True)
    }


TABLE = read_table()


def feed_all(interp: Interpreter, branch: int, kinds: list[Kind]) -> list:
    return [action for kind in kinds for action in interp.feed(branch, kind)]


def forced(interp: Interpreter, actions: list) -> list:
    """Write what the actions force, as the engine does; returns the actions that follow."""
    out = []
    for action in actions:
        if isinstance(action, Force):
            out += feed_all(interp, action.branch, list(action.kinds))
    return out


def make(state: State, base: State, grammar: bool = False) -> tuple[Interpreter, int]:
    """An interpreter with a branch in `state`, whose block stands in free text of the kind `base`."""
    interp, branch = Interpreter(max_depth=4, max_width=4, grammar=False), 0
    if base is State.THINK:
        interp.feed(0, K.THINK)
    elif base is State.PATH:
        forced(interp, feed_all(interp, 0, GOAL_OF_TWO))
        branch = 1
    prefix = {State.PARALLEL: 1, State.GOAL: 2, State.OUTLINE: 3, State.WAITING: 6}
    if state in prefix:
        feed_all(interp, branch, GOAL_OF_ONE[: prefix[state]])
    elif state in (State.JOINING, State.CONCLUSION, State.CLOSING, State.OPENING):
        fork = next(a for a in feed_all(interp, branch, GOAL_OF_ONE) if isinstance(a, Fork))
        if state is State.OPENING:
            return interp, fork.children[0]
        feed_all(interp, fork.children[0], [K.PATH, K.PATH_END])
        feed_all(
            interp,
            branch,
            [K.CONCLUSION, K.CONCLUSION_END][: [State.JOINING, State.CONCLUSION].index(state)]
            if state is not State.CLOSING
            else [K.CONCLUSION, K.CONCLUSION_END],
        )
    elif state is State.CLOSED:
        if base is State.PATH:
            feed_all(interp, branch, [K.PATH_END])
        else:
            forced(interp, interp.close(branch, "stop"))
    assert interp.state(branch) is state
    interp.grammar = grammar
    return interp, branch


def bases_of(state: State) -> list[State]:
    free = [State.TRUNK, State.THINK, State.PATH]
    return [state] if state in free else free


CELLS = [
    pytest.param(state, base, column, kind, id=f"{state.value}-in-{base.value}-{kind.name}")
    for state in State
    for base in bases_of(state)
    for column, kinds in COLUMNS.items()
    for kind in kinds
]


@pytest.mark.parametrize(("state", "base", "column", "kind"), CELLS)
def test_cell_of_the_table(state: State, base: State, column: str, kind: Kind) -> None:
    interp, branch = make(state, base)
    cell = TABLE[state, column]
    position = interp.position(branch)
    if cell == "x":
        with pytest.raises(ValueError, match=f"expected a running branch, got one that is {state.value}"):
            interp.feed(branch, kind)
        assert interp.position(branch) == position
        return
    actions = interp.feed(branch, kind)
    assert interp.position(branch) == position + 1
    warnings = [a for a in actions if isinstance(a, Warn)]
    if cell == "fork":
        cell = "#"  # no outline stands before it here; with outlines: the next test
    if cell in "#+":
        within = State.PATH if cell == "+" else base
        assert len(warnings) == 1 and warnings[0].branch == branch
        assert ("expected <Path>" if cell == "+" else "block ended by") in warnings[0].message
        if cell == "#":
            merged = state in (State.JOINING, State.CONCLUSION, State.CLOSING)
            assert ("stay merged" if merged else "kept as text") in warnings[0].message
        state, cell = within, TABLE[within, column]
        actions = [a for a in actions if not isinstance(a, Warn)]
        if cell == "!":
            cell = "."
        warnings = []
    if cell == ".":
        assert not actions and interp.state(branch) is state
    elif cell == "!":
        assert actions == warnings and len(warnings) == 1 and interp.state(branch) is state
        assert "kept as text" in warnings[0].message
    elif cell == "back":
        assert not actions and interp.state(branch) is base
    elif cell == "close":
        assert actions[0] == FinishPath(branch, None) and interp.state(branch) is State.CLOSED
    else:
        assert not actions and interp.state(branch) is State(cell)


@pytest.mark.parametrize("base", [State.TRUNK, State.THINK, State.PATH], ids=lambda s: s.value)
def test_goal_end_behind_outlines_forks(base: State) -> None:
    interp, branch = make(State.GOAL, base)
    assert TABLE[State.GOAL, "/Goal"] == "fork"
    feed_all(interp, branch, [K.OUTLINE, K.TEXT, K.OUTLINE_END] * 3)
    start, first = interp.position(branch) + 1, interp.num_branches()
    fork, *force = interp.feed(branch, K.GOAL_END)
    assert fork == Fork(branch, (first, first + 1, first + 2))
    opening = (K.SPACE, K.PATH, K.SPACE, K.INDEX, K.INDEX_END)
    assert force == [Force(child, opening, interp.path(child)) for child in fork.children]
    assert interp.state(branch) is State.WAITING
    for number, child in enumerate(fork.children, start=1):
        assert interp.path(child) == (*interp.path(branch), number)
        assert interp.position(child) == start and interp.state(child) is State.OPENING


def test_last_path_joins_at_the_longest() -> None:
    interp = Interpreter(4, 4, grammar=False)
    actions = feed_all(interp, 0, GOAL_OF_TWO)
    forced(interp, actions)
    one, two = actions[0].children
    assert feed_all(interp, two, [K.TEXT] * 7 + [K.PATH_END]) == [FinishPath(two)]
    merged = feed_all(interp, one, [K.PATH_END])
    assert merged == [FinishPath(one), Merge(0, (one, two)), Force(0, (K.SPACE, K.CONCLUSION, K.SPACE))]
    assert interp.position(0) == interp.position(two) > interp.position(one)
    assert forced(interp, merged) == []
    feed_all(interp, 0, [K.TEXT, K.CONCLUSION_END, K.PARALLEL_END, K.TEXT])
    assert interp.state(0) is State.TRUNK
    assert interp.tree() == [9, [[6], [13]], 7]
    assert interp.critical_path == BranchLayout.from_tree(interp.tree()).critical_path == 9 + 13 + 7


def test_nested_paths_have_nested_numbers() -> None:
    interp, branch = make(State.PATH, State.PATH)
    fork = feed_all(interp, branch, GOAL_OF_TWO)[0]
    assert [interp.path(child) for child in fork.children] == [(1, 1), (1, 2)]
    assert [interp.parent(child) for child in fork.children] == [branch, branch] and interp.parent(0) is None


def test_limits() -> None:
    interp = Interpreter(max_depth=1, max_width=2, grammar=False)
    assert interp.banned(0) == ()
    feed_all(interp, 0, [K.PARALLEL, K.GOAL] + [K.OUTLINE, K.TEXT, K.OUTLINE_END] * 2)
    assert interp.banned(0) == (K.OUTLINE,)
    fork = interp.feed(0, K.GOAL_END)[0]
    assert interp.banned(fork.children[0]) == (K.PARALLEL,)
    forced(interp, [Force(fork.children[0], (K.PATH,))])
    warnings = interp.feed(fork.children[0], K.PARALLEL)
    assert len(warnings) == 1 and "<Parallel> is not allowed here" in warnings[0].message
    assert interp.state(fork.children[0]) is State.PATH


def test_too_many_outlines_make_the_block_text() -> None:
    interp = Interpreter(max_depth=1, max_width=1, grammar=False)
    warning = feed_all(interp, 0, [*GOAL_OF_ONE[:-1], K.OUTLINE])
    assert len(warning) == 1 and "no more than 1 outlines or </Goal> expected" in warning[0].message
    assert interp.state(0) is State.TRUNK and interp.tree() == [6]


@pytest.mark.parametrize(("depth", "width"), [(-1, 1), (0, 0)])
def test_limits_out_of_range(depth: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"got {depth} and {width}"):
        Interpreter(depth, width)


STANDING = [
    pytest.param(state, base, id=f"{state.value}-in-{base.value}") for state in State for base in bases_of(state)
]


@pytest.mark.parametrize(("state", "base"), STANDING)
def test_the_grammar_allows_what_the_table_has_no_complaint_about(state: State, base: State) -> None:
    if state in (State.WAITING, State.CLOSED):
        return
    for outlines in (0, 1) if state is State.GOAL else (0,):
        interp, branch = make(state, base, grammar=True)
        feed_all(interp, branch, [K.OUTLINE, K.OUTLINE_END] * outlines)
        for spaces in (0, 1, 2):
            wanted = END if state is State.TRUNK else 0
            for column, kinds in COLUMNS.items():
                cell = TABLE[state, column]
                text = TABLE[state, "text"] == "."
                fine = cell not in ("!", "#", "+", "fork") or (cell == "fork" and outlines)
                if column == "space":
                    fine = not text and spaces < 2  # free text includes whitespace
                if fine and not (column == "Think" and state is not State.TRUNK):
                    wanted |= 1 << kinds[0]
            assert interp.allowed([branch]) == [wanted], (outlines, spaces)
            if state in (State.TRUNK, State.THINK, State.PATH, State.OUTLINE, State.CONCLUSION):
                break
            interp.feed(branch, K.SPACE)


def test_the_engine_writes_what_is_certain() -> None:
    """Each part of a block that alone may come, and each outline's index, as soon as that is so."""
    interp, branch = make(State.PATH, State.PATH, grammar=True)
    heading = (K.SPACE, K.INDEX, K.INDEX_END)
    assert interp.ahead(branch) == () == interp.ahead(0)
    assert feed_all(interp, branch, [K.PARALLEL]) == [Force(branch, (K.SPACE, K.GOAL), (1, 1))]
    assert feed_all(interp, branch, [K.SPACE, K.GOAL]) == [Force(branch, (K.SPACE, K.OUTLINE), (1, 1))]
    assert feed_all(interp, branch, [K.SPACE, K.OUTLINE]) == [Force(branch, heading, (1, 1))]
    assert feed_all(interp, branch, [*heading, K.TEXT, K.OUTLINE_END]) == [Force(branch, (K.SPACE,), (1, 2))]
    assert feed_all(interp, branch, [K.SPACE, K.OUTLINE]) == [Force(branch, heading, (1, 2))]
    feed_all(interp, branch, [*heading, K.OUTLINE_END, K.SPACE, K.GOAL_END])
    for child in interp.items(branch)[-1]:
        feed_all(interp, child, [K.SPACE, K.PATH, *heading, K.PATH_END])
    feed_all(interp, branch, [K.SPACE, K.CONCLUSION, K.SPACE])
    assert feed_all(interp, branch, [K.CONCLUSION_END]) == [Force(branch, (K.SPACE, K.PARALLEL_END), (1, 3))]
    assert feed_all(interp, branch, [K.SPACE, K.PARALLEL_END]) == [] and interp.state(branch) is State.PATH
    interp, branch = make(State.PATH, State.PATH, grammar=False)
    assert feed_all(interp, branch, [K.PARALLEL, K.GOAL, K.OUTLINE]) == [] == [*interp.ahead(branch)]


def test_what_is_certain_takes_nothing_from_what_may_come() -> None:
    """It is set aside for as a part of what closes the branch, so it leaves as much room as there was."""
    fitting = []
    for budget in range(1, 60):
        interp = Interpreter(max_depth=1, max_width=2)
        interp.begin(Budget(tokens=budget, end=budget, path_tokens=budget))
        if not interp.allowed([0])[0] >> K.PARALLEL & 1:
            continue
        fitting.append(budget)
        queue = interp.feed(0, K.PARALLEL)
        left = interp.spare(), interp.room(0)
        while queue:
            [force] = queue
            queue = feed_all(interp, 0, list(force.kinds))
        assert (interp.spare(), interp.room(0)) == left and left[0] >= 0
        assert interp.state(0) is State.OUTLINE
    assert fitting == [*range(fitting[0], 60)]


@pytest.mark.parametrize(("state", "base"), STANDING)
def test_close(state: State, base: State) -> None:
    interp, branch = make(state, base)
    if state in (State.WAITING, State.CLOSED):
        with pytest.raises(ValueError, match="expected a running branch"):
            interp.close(branch, "stop")
        return
    actions = interp.close(branch, "some reason")
    warnings = [a.message for a in actions if isinstance(a, Warn)]
    inside = state not in (State.TRUNK, State.THINK, State.PATH, State.OPENING)
    assert sum("block closed by the engine (some reason)" in message for message in warnings) == inside
    assert sum("forced </Path> (some reason)" in message for message in warnings) == bool(interp.path(branch))
    outer = state if state in (State.TRUNK, State.THINK) else base if state is not State.OPENING else State.PATH
    assert sum("forced </Think> (some reason)" in message for message in warnings) == (outer is State.THINK)
    while any(isinstance(action, Force) for action in actions):
        actions = [a for a in actions if not isinstance(a, Force)] + forced(interp, actions)
    assert interp.state(branch) is State.CLOSED
    if interp.parent(branch) is None:
        assert actions[-1] == Finish("some reason")
    else:
        assert FinishPath(branch, "some reason") in actions


def run_stream(kinds: list[Kind], max_depth: int, max_width: int) -> tuple[Interpreter, list[Kind], list]:
    """Feed a stream to the lowest running branch in turn; returns the kinds in sequence order and all actions."""
    interp = Interpreter(max_depth, max_width, grammar=False)
    written: dict[int, list[Kind]] = {0: []}
    log, queue = [], []
    todo = list(reversed(kinds))
    turn = 0
    while todo or queue:
        if queue:
            branch, kind = queue.pop(0)
        else:
            running = [b for b in range(interp.num_branches()) if interp.is_running(b)]
            turn += 1
            branch, kind = running[turn % len(running)], todo.pop()
        written.setdefault(branch, []).append(kind)
        for action in interp.feed(branch, kind):
            log.append(action)
            if isinstance(action, Force):
                queue += [(action.branch, k) for k in action.kinds]

    def flat(branch: int) -> list[Kind]:
        own, out = iter(written.get(branch, [])), []
        for item in interp.items(branch):
            if isinstance(item, int):
                out += [next(own) for _ in range(item)]
            else:
                out += [k for child in item for k in flat(child)]
        return out

    return interp, flat(0), log


KINDS = st.lists(st.sampled_from(list(Kind)), max_size=120)
# Streams that get somewhere: whole goals and path ends are likely.
CHUNKS = st.lists(
    st.one_of(
        st.sampled_from([GOAL_OF_ONE, GOAL_OF_TWO, [K.PATH_END], [K.CONCLUSION_END, K.PARALLEL_END]]),
        st.lists(st.sampled_from(list(Kind)), min_size=1, max_size=2),
    ),
    max_size=40,
).map(lambda chunks: [kind for chunk in chunks for kind in chunk])


@settings(max_examples=300)
@given(st.one_of(KINDS, CHUNKS), st.integers(0, 3), st.integers(1, 3))
def test_random_streams_never_crash_and_always_end(kinds: list[Kind], max_depth: int, max_width: int) -> None:
    interp, order, log = run_stream(kinds, max_depth, max_width)
    assert len(order) <= len(kinds) * 4 and interp.num_branches() <= 1 + len(kinds)
    assert all(
        len(interp.path(b)) <= max_depth and max(interp.path(b), default=1) <= max_width
        for b in range(interp.num_branches())
    )
    layout = BranchLayout.from_tree(interp.tree())
    assert layout.total_tokens == len(order) and layout.critical_path == interp.critical_path
    # Closing every running branch ends the request, whatever state each is in.
    while any(interp.is_running(b) for b in range(interp.num_branches())):
        branch = max(b for b in range(interp.num_branches()) if interp.is_running(b))
        actions = interp.close(branch, "stop")
        while actions:
            log += actions
            actions = forced(interp, actions)
    assert isinstance(log[-1], Finish) and interp.state(0) is State.CLOSED


LEGAL = {
    State.TRUNK: [K.TEXT, K.SPACE, K.THINK, K.PARALLEL, K.PARALLEL],
    State.THINK: [K.TEXT, K.INDEX, K.PARALLEL, K.THINK_END],
    State.PATH: [K.TEXT, K.INDEX_END, K.PARALLEL, K.PATH_END, K.PATH_END],
    State.PARALLEL: [K.SPACE, K.GOAL, K.GOAL],
    State.GOAL: [K.SPACE, K.OUTLINE, K.GOAL_END, K.GOAL_END],
    State.OUTLINE: [K.TEXT, K.OUTLINE_END, K.OUTLINE_END],
    State.CONCLUSION: [K.TEXT, K.CONCLUSION_END],
    State.CLOSING: [K.SPACE, K.PARALLEL_END],
}


@settings(max_examples=150)
@given(st.lists(st.integers(0, 59), min_size=10, max_size=80))
def test_legal_kinds_make_no_warning_and_the_structure_that_the_parser_reads(choices: list[int]) -> None:
    """Branches advance one after the other, so that what is cut has its one open path at the end."""
    interp, order, queue = Interpreter(3, 3, grammar=False), [], []
    forks: list[list[int]] = []
    for choice in choices:
        if not queue:
            branch = forks[-1][0] if forks else 0
            legal = [k for k in LEGAL[interp.state(branch)] if k not in interp.banned(branch)]
            if interp.state(branch) is State.GOAL and not interp.outlines(branch):
                legal = [K.OUTLINE]
            queue = [(branch, legal[choice % len(legal)])]
        while queue:
            branch, kind = queue.pop(0)
            order.append(kind)
            for action in interp.feed(branch, kind):
                assert not isinstance(action, Warn)
                if isinstance(action, Fork):
                    forks.append(list(action.children))
                    queue = [(action.children[0], k) for k in (K.SPACE, K.PATH, K.SPACE, K.INDEX, K.INDEX_END)]
                elif isinstance(action, FinishPath):
                    rest = forks[-1] = forks[-1][1:]
                    queue = [(rest[0], k) for k in (K.SPACE, K.PATH, K.SPACE, K.INDEX, K.INDEX_END)] if rest else []
                elif isinstance(action, Merge):
                    forks.pop()
                    queue = [(action.parent, k) for k in (K.SPACE, K.CONCLUSION, K.SPACE)]
    assert BranchLayout.from_tree(interp.tree()).critical_path == interp.critical_path

    def started(tree: list) -> list:
        """The tree without the paths that have not begun, and without empty texts, which the two write differently."""
        out = []
        for item in tree:
            if isinstance(item, int):
                out += [item] if item else []
            else:
                out.append([started(path) for path in item if started(path)])
        return out

    assert started(parse(bytes(order), allow_open=True).tree) == started(interp.tree())
