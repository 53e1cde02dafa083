"""fork_at: where a branch can be cut off, what it sees then, and that nobody else notices."""

from __future__ import annotations

import pytest

from mvkernels.errors import BranchError, CacheError, StaleStep
from tests.cache.device_world import Uploads
from tests.cache.world import Unchanged, World, poisoned_cache

TABLES = [None, (16, 64)]


def make(page_size: int = 4, table_size=None) -> World:
    return World(poisoned_cache(60, page_size, layers=2, table_size=table_size), sequential=True)


def keys(world: World, branch) -> list[int]:
    """The numbers of the tokens that a branch sees, in its order."""
    cache, size = world.cache, world.cache.page_size
    nodes = cache._state(branch).nodes
    slots = [node.pages[i // size] * size + i % size for node in nodes for i in range(node.length)]
    return [int(number) for number in cache.k[0].flatten(0, 1)[slots, 0, 0]]


@pytest.mark.parametrize("table_size", TABLES)
def test_a_branch_behind_some_pages_of_another_that_goes_on(table_size) -> None:
    world = make(table_size=table_size)
    trunk = world.new()
    world.step((trunk, 14))
    free = world.cache.num_free_pages
    cut = world.fork_at(trunk, 8)
    assert world.cache.num_free_pages == free and world.cache.bytes_moved == 0
    assert keys(world, cut) == [*range(8)] and cut.next_position == 8
    world.step((trunk, 3), (cut, 5))
    world.check()
    assert keys(world, trunk) == [*range(17)] and keys(world, cut) == [*range(8), *range(17, 22)]
    world.free(trunk)
    assert keys(world, cut)[:8] == [*range(8)], "whoever sees a page keeps it"
    again = world.fork_at(cut, 8)
    world.step((again, 1), (cut, 1))
    world.check()
    for branch in (cut, again):
        world.free(branch)
    assert world.cache.num_free_pages == world.cache.num_pages


@pytest.mark.parametrize("table_size", TABLES)
def test_behind_all_that_a_branch_has_and_it_goes_on_alone(table_size) -> None:
    world = make(table_size=table_size)
    trunk = world.new()
    world.step((trunk, 6))
    cut = world.fork_at(trunk, 6)
    world.step((trunk, 1))
    assert keys(world, cut) == [*range(6)]
    nodes = len(world.cache._nodes)
    for _ in range(5):
        world.free(world.fork_at(cut, 6))
    assert len(world.cache._nodes) == nodes, "the same cut again makes no other nodes"
    children = world.fork(trunk, 2)
    world.step((children[0], 2), (children[1], 5), (cut, 2))
    world.merge(trunk)
    world.step((trunk, 2))
    world.check()


@pytest.mark.parametrize("table_size", TABLES)
def test_behind_a_join_a_branch_starts_where_the_join_did(table_size) -> None:
    world = make(table_size=table_size)
    trunk = world.new()
    world.step((trunk, 5))
    children = world.fork(trunk, 3)
    world.step((children[0], 2), (children[1], 6), (children[2], 3))
    world.merge(trunk)
    world.step((trunk, 7))
    behind = world.fork_at(trunk, 5 + 11)
    assert behind.next_position == 5 + 6 and behind.num_tokens == 16
    inside = world.fork_at(trunk, 5 + 11 + 4)
    assert inside.next_position == 5 + 6 + 4
    # Also from a branch that was cut off there, and after all others have gone.
    again = world.fork_at(behind, 16)
    world.free(trunk)
    world.free(behind)
    last = world.fork_at(again, 16)
    world.step((last, 5), (inside, 5), (again, 5))
    assert [b.next_position for b in (last, inside, again)] == [16, 20, 16]
    world.check()


def test_who_sees_a_node_goes_on_after_it_was_cut() -> None:
    """What was remembered of lists, for the host and for the device, holds for both halves."""
    world = make(table_size=(16, 64))
    trunk = world.new()
    world.step((trunk, 22))
    children = world.fork(trunk, 2)
    world.step(*((child, 3) for child in children))
    cuts = [world.fork_at(trunk, count) for count in (16, 4, 12)]
    world.step(*((branch, 2) for branch in (*children, *cuts)))
    world.check()
    late = world.fork_at(children[0], 22 + 4)
    world.merge(trunk)
    world.step(*((branch, 1) for branch in (trunk, late, *cuts)))
    world.check()


def test_an_open_block_is_cut_off_its_trunk() -> None:
    """The children stay those of their parent, and are merged into it."""
    world = make()
    trunk = world.new()
    world.step((trunk, 8))
    children = world.fork(trunk, 2)
    world.step((children[0], 3), (children[1], 1))
    cut = world.fork_at(trunk, 4)
    from_child = world.fork_at(children[0], 8)
    world.merge(trunk)
    world.step((trunk, 1), (cut, 1), (from_child, 1))
    world.check()
    assert world.cache._state(cut).parent is None
    assert [b.next_position for b in (trunk, cut, from_child)] == [12, 5, 9]


def test_what_was_cut_off_freezes_what_it_sees() -> None:
    world = make()
    trunk = world.new()
    world.step((trunk, 5))
    [child] = world.fork(trunk, 1)
    world.step((child, 4))
    cut = world.fork_at(child, 9)
    world.free(child)
    with Unchanged(world.cache, BranchError, "expected a branch with nothing after it"):
        world.cache.plan([(trunk, 1)])
    world.free(cut)
    world.step((trunk, 1))
    world.check()


def test_where_nothing_can_be_cut() -> None:
    world = make()
    trunk = world.new()
    world.step((trunk, 5))
    children = world.fork(trunk, 2)
    world.step((children[0], 6), (children[1], 6))
    world.merge(trunk)
    cache = world.cache
    for number in (3, 5 + 3, 5 + 7, 5 + 10):
        with Unchanged(cache, BranchError, "fork_at: expected a cut"):
            cache.fork_at(trunk, number)
    with Unchanged(cache, BranchError, "behind the join and its first token"):
        cache.fork_at(trunk, 17)
    with Unchanged(cache, BranchError, "fork_at: expected a branch that was not merged"):
        cache.fork_at(children[0], 5)
    for number in (-1, 18):
        with Unchanged(cache, ValueError, f"fork_at: expected 0 to 17 tokens, .* got {number}"):
            cache.fork_at(trunk, number)
    step = cache.plan([(trunk, 1)])
    empty = cache.fork_at(trunk, 0)
    assert empty.num_tokens == 0 and empty.next_position == 0
    with pytest.raises(StaleStep, match="discarded by a fork"):
        cache.commit(step)
    cache.free(empty)
    with pytest.raises(BranchError, match="expected a live branch"):
        cache.fork_at(empty, 0)


def test_device_tables_are_not_laid_anew_for_a_cut() -> None:
    world = make(table_size=(16, 64))
    trunk = world.new()
    world.step((trunk, 30))
    cut = world.fork_at(trunk, 16)
    with Uploads(world) as seen:
        world.step((trunk, 1), (cut, 1))
    assert seen.counted() == (2, 0), "the last page of the trunk, and one of the new branch"


def grow_all(world: World) -> None:
    """One token more for every handle that may take one."""
    for branch in [*world.live, *world.merged]:
        if branch in (*world.live, *world.merged) and world.may_grow(branch):
            world.step((branch, 1))
            world.check()


def test_behind_empty_blocks_what_was_cut_off_does_not_grow() -> None:
    """Nodes without tokens fix nothing: the branch before the block goes on, and its tokens came into the cut."""
    world = make()
    trunk = world.new()
    world.step((trunk, 3))
    [path] = world.fork(trunk, 1)
    world.fork(path, 2)
    world.merge(path)
    cut = world.fork_at(path, 3)
    world.check()
    world.step((trunk, 2))
    world.check()
    assert cut.num_tokens == cut.next_position == 3 and path.num_tokens == 5
    grow_all(world)


@pytest.mark.parametrize("write", ["nothing", "child", "join", "truncated"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_cut_behind_blocks_of_any_depth_sees_its_own_copy(depth: int, write: str) -> None:
    """Blocks in one another, all merged into a child of the trunk; with tokens in the innermost child, or once behind
    the join, or taken back there.
    """
    world = make(page_size=3)
    trunk = world.new()
    world.step((trunk, 3))
    [path] = world.fork(trunk, 1)
    opened = [path]
    for _ in range(depth):
        opened.append(world.fork(opened[-1], 2)[0])
    if write == "child":
        world.step((opened[-1], 2))
    for parent in opened[-2::-1]:
        world.merge(parent)
    if write in ("join", "truncated"):
        world.step((path, 1))
    if write == "truncated":
        world.truncate(path, 1)
    for count in (0, 3, 3):
        world.fork_at(path, count)
        world.check()
    grow_all(world)


def test_the_check_finds_a_cut_behind_what_may_grow(monkeypatch) -> None:
    monkeypatch.setattr("mvkernels.cache.split.is_fixed", lambda link: True)
    world = make()
    trunk = world.new()
    world.step((trunk, 3))
    [path] = world.fork(trunk, 1)
    world.fork(path, 2)
    world.merge(path)
    world.cache.fork_at(path, 3)
    with pytest.raises(CacheError, match="expected nodes that no branch can change, got Node"):
        world.cache.check()
