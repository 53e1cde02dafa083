"""The cache's page lists on its device: what is uploaded and what is not, and each case in which rows are laid anew.

`World.write` compares the tables with the host's lists after every plan (`check_device_tables`).
"""

from __future__ import annotations

import pytest
import torch

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.device import default_size
from mvkernels.ops.merge.cuda import cuda_reason
from tests.cache.device_world import Uploads, slot_of, world
from tests.cache.world import World, check_device_tables

# -- the usual case --------------------------------------------------------------------------------------------------


def test_new_pages_are_uploaded_and_those_that_were_not_full() -> None:
    w = world()
    root = w.new()
    for tokens, pages in ((7, 3), (1, 1), (1, 1), (1, 1), (4, 2)):
        with Uploads(w) as seen:
            w.step((root, tokens))
        assert seen.counted() == (pages, 0)
    with Uploads(w) as seen:
        a, b = w.fork(root, 2)
    assert seen.counted() == (0, 0)
    with Uploads(w) as seen:
        w.step((root, 2), (a, 1), (b, 4))
    assert seen.counted() == (2 + 1 + 2, 0)


@pytest.mark.parametrize("branches", [1, 8, 31])
def test_a_merge_uploads_nothing_of_the_children(branches: int) -> None:
    w = world((32, 200))
    root = w.new()
    w.step((root, 5))
    children = w.fork(root, branches)
    w.step(*((child, 2 + i % 9) for i, child in enumerate(children)))
    w.merge(root)
    with Uploads(w) as seen:
        w.step((root, 1))
    assert seen.counted() == (1, 1)
    assert len(w.cache.device_tables._present) == 1


def test_ending_children_and_their_merged_parent_in_one_step() -> None:
    """The children's last tokens are written before their rows are merged, the parent's first after that."""
    w = world()
    root = w.new()
    w.step((root, 5))
    a, _, c = w.fork(root, 3)
    w.step((a, 3), (c, 2))
    w.merge(root)
    with Uploads(w) as seen:
        w.step((a, 4), (c, 1), (root, 2))
    assert seen.counted() == (2 + 1 + 1, 1)
    w.step((root, 7))


def test_nested_blocks_and_several_blocks_of_one_parent_are_merged_in_order() -> None:
    """Inner ones first; blocks that have nothing to do with one another in one call."""
    w = world()
    root, other = w.new(), w.new()
    w.step((root, 4), (other, 2))
    a, b = w.fork(root, 2)
    c, d = w.fork(other, 2)
    w.step((a, 2), (b, 5), (c, 4), (d, 1))
    inner = [*w.fork(a, 2), *w.fork(b, 3)]
    w.step(*((child, 3 + i) for i, child in enumerate(inner)))
    calls = []
    run = w.cache.device_tables._run
    w.cache.device_tables._run = lambda update: (calls.append([len(call) for call in update.calls]), run(update))
    for parent in (a, b, root, other):
        w.merge(parent)
    with Uploads(w) as seen:
        w.step((root, 1), (other, 1))
    assert seen.counted() == (2, 4)
    assert calls == [[2, 2]]  # a and b; then root, whose children they are, and other
    w.fork(root, 2)
    w.merge(root)  # of children that have nothing
    with Uploads(w) as seen:
        w.step((root, 1))
    assert seen.counted() == (1, 0)


def test_a_block_of_a_branch_without_tokens_of_its_own_is_uploaded() -> None:
    """It has no row to merge into. Later merges of it run on the device."""
    w = world()
    root = w.new()
    w.step((root, 5))
    a, b = w.fork(root, 2)
    inner = w.fork(a, 2)
    w.step(*((child, 4) for child in inner))
    w.merge(a)
    with Uploads(w) as seen:
        w.step((a, 2), (b, 1))
    assert seen.counted() == (2 + 2 + 1 + 1, 0)
    w.fork(a, 1)
    w.step(*((child, 1) for child in (*w.children[a], b)))
    w.merge(a)
    w.merge(root)
    w.step((root, 1))


def test_a_parent_that_was_merged_but_is_not_in_the_step_has_its_next_position() -> None:
    w = world()
    root, other = w.new(), w.new()
    w.step((root, 4), (other, 2))
    children = w.fork(root, 3)
    w.step(*((child, tokens) for child, tokens in zip(children, (2, 9, 4), strict=True)))
    w.merge(root)
    with Uploads(w) as seen:
        w.step((other, 1))
    assert seen.merges == 1
    tables, slot = w.cache.device_tables.tables, slot_of(w, root)
    assert int(tables.position[slot]) == root.next_position == 13
    assert int(tables.used[slot]) == 2 + 1 + 3 + 2


def test_the_tables_stay_where_they_are() -> None:
    w = world()
    tables = w.cache.device_tables
    flat = (tables.pages.pages, tables.pages.counts)
    addresses = [words.data_ptr() for words in flat]
    assert (addresses[1] - addresses[0]) % 256 == 0
    root = w.new()
    for _ in range(4):
        step = w.write([(root, 3)])
        assert step.views.device_pages is tables.pages
        w.commit(step)
        w.fork(root, 2)
        w.step(*((child, 5) for child in w.children[root]))
        w.merge(root)
    assert [words.data_ptr() for words in flat] == addresses
    assert [tables.tables.pages.data_ptr(), tables.tables.counts.data_ptr()] == addresses


def test_a_cache_made_in_inference_mode_works_outside_of_it() -> None:
    with torch.inference_mode():
        w = world()
    root = w.new()
    w.cache.commit(w.cache.plan([(root, 3)]))
    with torch.inference_mode():
        step = w.cache.plan([(root, 3)])
    check_device_tables(step)


# -- steps that do not stay ------------------------------------------------------------------------------------------


def test_reserved_pages_stand_behind_with_count_zero_and_are_taken_back() -> None:
    w = world()
    a, b = w.new(), w.new()
    w.step((a, 2), (b, 3))
    with Uploads(w) as seen:
        step = w.write([(a, 1), (b, 1)], reserve=7)
    assert seen.entries == 4 + 3
    own = step.views.entries[0].own
    assert own.counts.tolist() == [3, 0, 0, 0]
    with Uploads(w) as seen:
        for _ in range(5):
            step = w.advance(step)  # the device counts on
        w.commit(step)
    assert seen.counted() == (0, 0)
    with Uploads(w) as seen:
        w.step((b, 1))  # a is put right too
    assert seen.entries == 2 + 3  # from the first page that was not full at the last plan
    slot = slot_of(w, a)
    tables = w.cache.device_tables.tables
    assert (int(tables.used[slot]), int(tables.position[slot])) == (3, 8)
    assert tables.counts[slot, :3].tolist() == [3, 3, 2]


def test_branches_that_advanced_to_the_end_of_their_reserve_are_merged_with_what_they_have() -> None:
    w = world()
    root, other = w.new(), w.new()
    w.step((root, 4))
    a, b = w.fork(root, 2)
    step = w.write([(a, 1), (b, 1)], reserve=5)
    for _ in range(5):
        step = w.advance(step)
    w.commit(step)
    w.merge(root)
    w.step((other, 1))
    assert int(w.cache.device_tables.tables.position[slot_of(w, root)]) == root.next_position == 10
    w.step((root, 1))


@pytest.mark.parametrize("ending", ["rollback", "fork", "advanced too far"])
def test_counts_are_put_right_after_steps_that_were_given_up(ending: str) -> None:
    """And before the rows are merged."""
    w = world()
    root = w.new()
    w.step((root, 4))
    a, b = w.fork(root, 2)
    w.step((a, 2), (b, 2))
    step = w.write([(a, 1), (b, 1)], reserve=6)
    if ending == "advanced too far":
        step = w.advance(w.advance(step))
        w.cache.device_tables.pages.counts[step.views.entries[0].own.place + 1] += 1  # a run that was not committed
    if ending == "fork":
        w.forget(step)
        w.fork(a, 1)
        w.merge(a)
    else:
        w.rollback(step)
    w.merge(root)
    with Uploads(w) as seen:
        w.step((root, 1))
    assert seen.counted() == (1 + 1 + 1, 1)


def test_merged_children_go_on_after_a_rollback_in_the_middle_of_the_parents_row() -> None:
    w = world(page_size=2)
    root = w.new()
    w.step((root, 4))
    a, b = w.fork(root, 2)
    w.step((a, 3), (b, 5))
    w.merge(root)
    w.rollback(w.write([(a, 2), (root, 3)]))  # merged on the device, and a's new page stands before b's
    with Uploads(w) as seen:
        w.step((a, 1))  # a's entries change in the middle of the row: it is written whole
    assert seen.counted() == (2 + 2 + 3, 0)
    with Uploads(w) as seen:
        w.step((a, 1))
    assert seen.counted() == (2 + 3 + 3, 0)
    with Uploads(w) as seen:
        w.step((a, 1), (b, 1))  # both within their pages
    assert seen.counted() == (1 + 1, 0)
    w.step((root, 5))


def test_truncated_tokens_are_gone_from_the_tables() -> None:
    w = world()
    root = w.new()
    w.step((root, 8))
    w.truncate(root, 5)
    a, b = w.fork(root, 2)
    w.step((a, 5), (b, 2))
    w.truncate(a, 5)
    with Uploads(w) as seen:
        w.merge(root)
        w.step((root, 1))
    assert seen.counted() == (1, 1)
    assert root.next_position == 6


# -- rows whose branches go ------------------------------------------------------------------------------------------


def test_children_of_a_freed_branch_read_its_row() -> None:
    w = world()
    prompt = w.new()
    w.step((prompt, 7))
    a, b = w.fork(prompt, 2)
    w.free(prompt)
    with Uploads(w) as seen:
        w.step((a, 1), (b, 4))
    assert seen.counted() == (1 + 2, 0)


def test_a_grandchild_without_parent_reads_what_was_merged_above_it() -> None:
    w = world()
    trunk = w.new()
    child, sibling = w.fork(trunk, 2)
    w.step((trunk, 2), (sibling, 4), (child, 3))
    (middle,) = w.fork(child, 1)
    (orphan,) = w.fork(middle, 1)
    w.step((middle, 2), (orphan, 1))
    w.free(middle)
    w.merge(trunk)
    with Uploads(w) as seen:
        w.step((trunk, 1), (orphan, 1))
    assert seen.counted() == (1 + 1, 1)
    w.free(trunk)
    w.step((orphan, 4))


def test_merges_of_branches_that_come_and_go_do_not_pile_up() -> None:
    w = world()
    tables = w.cache.device_tables
    for _ in range(3000):
        branch = w.cache.new()
        w.cache.merge(branch, w.cache.fork(branch, 1))
        w.cache.free(branch)
    assert len(tables._merges) <= 1024
    w.step((w.new(), 1))
    assert not tables._merges


# -- options ---------------------------------------------------------------------------------------------------------


def test_where_there_are_tables() -> None:
    assert PagedKVCache(4, 3, 1, 1, 1).device_tables is None
    cache = PagedKVCache(40, 3, 1, 1, 1, device_tables=True)
    assert (cache.device_tables.tables.num_branches, cache.device_tables.tables.capacity) == (1024, 40)
    assert default_size(10**6) == (512, 4096)
    for size in ((0, 4), (4, 0), (2**16, 2**16)):
        with pytest.raises(ValueError, match=f"table_size: expected at least 1 row .* got {size[0]} rows of {size[1]}"):
            PagedKVCache(4, 3, 1, 1, 1, device_tables=True, table_size=size)


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_keeps_tables_by_default_and_no_plan_waits_for_it() -> None:
    """Plans, merges and rollbacks behind a long wait on the device: `sync` returns before it is over."""
    device = torch.device("cuda", torch.cuda.current_device())
    cache = PagedKVCache(64, 3, 1, 1, 2, device=device)
    assert cache.device_tables is not None
    w = World(cache, sequential=True)
    root = w.new()
    for _ in range(3):
        w.step((root, 4))
        children = w.fork(root, 3)
        w.step(*((child, 4) for child in children))
        w.merge(root)
        w.rollback(w.write([(children[1], 3), (root, 2)]))
        w.step((children[1], 2))
    assert (cache.device_tables.merge_reason is None) == (cuda_reason(device) is None)
    children = w.fork(root, 2)
    w.step(*((child, 4) for child in children))
    w.merge(root)
    tables = cache.device_tables
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        assert tables.sync({}, [cache._state(root).nodes[0]]) is tables.pages
        assert not stream.query()
    stream.synchronize()
    w.step((root, 1))
