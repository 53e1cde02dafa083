"""Paged cache: the fork, merge and position rules, steps, and every error, after which nothing has changed."""

from __future__ import annotations

import pytest
import torch

from mvkernels.cache.cache import PagedKVCache
from mvkernels.errors import BranchError, OutOfPages, StaleStep
from tests.cache.world import Unchanged, World, poisoned_cache


def world(num_pages: int = 64, page_size: int = 3) -> World:
    return World(poisoned_cache(num_pages, page_size, layers=2), sequential=True)


# -- positions and visibility ------------------------------------------------------------------------------------


def test_first_token_has_position_zero_and_a_step_counts_up():
    w = world()
    branch = w.new()
    assert (branch.next_position, branch.num_tokens) == (0, 0)
    assert w.step((branch, 5)).positions.tolist() == [0, 1, 2, 3, 4]
    assert (branch.next_position, branch.num_tokens) == (5, 5)
    w.check()


def test_children_start_at_one_position_and_the_merge_goes_on_after_the_longest():
    w = world()
    parent = w.new()
    w.step((parent, 4))
    a, b, c = w.fork(parent, 3)
    assert [x.next_position for x in (a, b, c)] == [4, 4, 4]
    step = w.step((a, 2), (b, 5), (c, 1))
    assert step.positions.tolist() == [4, 5, 4, 5, 6, 7, 8, 4]
    assert step.row_offsets == (0, 2, 7)
    w.merge(parent)
    assert (parent.next_position, parent.num_tokens) == (9, 4 + 2 + 5 + 1)
    w.check()


def test_one_step_holds_a_parents_pending_tokens_and_its_fresh_children():
    w = world()
    parent = w.new()
    w.step((parent, 2))
    a, b = w.fork(parent, 2)
    step = w.step((parent, 3), (a, 2), (b, 1))
    assert step.positions.tolist() == [2, 3, 4, 5, 6, 5]
    assert a.num_tokens == 5 + 2
    w.check()


def test_one_step_holds_ending_children_and_their_merged_parent():
    w = world()
    parent = w.new()
    w.step((parent, 2))
    a, b = w.fork(parent, 2)
    w.step((a, 1), (b, 3))
    w.merge(parent)
    step = w.step((b, 2), (a, 1), (parent, 2))
    assert step.positions.tolist() == [5, 6, 3, 7, 8]
    assert parent.num_tokens == 2 + 2 + 5 + 2
    for dead in (a, b):
        with Unchanged(w.cache, BranchError, f"expected a live branch, got {dead.id}"):
            w.cache.plan([(dead, 1)])
    w.check()


def test_children_without_tokens_end_where_they_start():
    w = world()
    parent = w.new()
    w.step((parent, 3))
    a, b = w.fork(parent, 2)
    w.step((b, 1))
    w.merge(parent)
    assert parent.next_position == 4
    w.step((a, 4))  # the empty path ends late, and the merged parent is still empty
    assert parent.next_position == 7
    w.fork(parent, 1)
    w.merge(parent)
    assert parent.next_position == 7
    w.check()


def test_nested_merge_carries_inner_nodes_and_positions_outwards():
    w = world(page_size=2)
    root = w.new()
    w.step((root, 3))
    a, b = w.fork(root, 2)
    w.step((a, 1), (b, 1))
    c, d = w.fork(a, 2)
    w.step((c, 4), (d, 2))
    w.merge(a)
    w.merge(root)  # a's node after its own merge is still empty
    assert root.next_position == 8
    step = w.step((d, 3), (c, 1), (a, 1), (b, 1), (root, 1))
    assert step.positions.tolist() == [6, 7, 8, 8, 9, 4, 10]
    assert root.num_tokens == 3 + 1 + 1 + 5 + 5 + 1 + 1 + 1
    e, _ = w.fork(root, 2)
    w.step((e, 2))
    w.merge(root)
    assert root.next_position == 13
    w.check()
    w.free(root)
    assert w.cache.num_free_pages == w.cache.num_pages


def test_a_branch_forked_twice_merges_all_its_children():
    w = world()
    root = w.new()
    w.step((root, 2))
    (a,) = w.fork(root, 1)
    w.step((a, 3))
    (b,) = w.fork(root, 1)
    assert b.next_position == 2
    w.step((b, 1))
    with Unchanged(w.cache, BranchError, "expected all children"):
        w.cache.merge(root, [b])
    w.merge(root)
    assert (root.next_position, root.num_tokens) == (5, 6)
    w.check()


def test_children_outlive_a_freed_parent_and_pages_return_when_the_last_one_goes():
    w = world(num_pages=8)
    prompt = w.new()
    w.step((prompt, 7))
    a, b = w.fork(prompt, 2)
    w.free(prompt)
    w.check()
    assert w.cache.num_free_pages == 5
    w.step((a, 1), (b, 4))
    assert (a.next_position, b.num_tokens) == (8, 11)
    w.free(b)
    assert w.cache.num_free_pages == 4
    w.check()
    w.free(a)
    assert w.cache.num_free_pages == 8
    w.check()


def test_a_parent_may_grow_again_once_the_children_with_tokens_are_freed():
    w = world()
    root = w.new()
    w.step((root, 1))
    a, _ = w.fork(root, 2)
    w.step((a, 2))
    with Unchanged(w.cache, BranchError, "nothing after it"):
        w.cache.plan([(root, 1)])
    w.free(a)
    w.step((root, 2))
    w.check()


def test_a_merged_branch_that_a_grandchild_without_parent_follows_is_dead_at_once():
    w = world()
    trunk = w.new()
    [child] = w.fork(trunk, 1)
    w.step((trunk, 2), (child, 3))
    [middle] = w.fork(child, 1)
    [orphan] = w.fork(middle, 1)
    w.step((orphan, 1))  # its token comes after the child's: the child may not grow any more
    w.free(middle)
    w.merge(trunk)
    w.check()
    with Unchanged(w.cache, BranchError, "expected a live branch"):
        w.cache.plan([(child, 1)])
    w.step((trunk, 1), (orphan, 1))
    w.check()


def test_a_long_chain_of_empty_merges_needs_no_recursion():
    w = world()
    root = w.new()
    w.step((root, 2))
    cache = w.cache
    for _ in range(600):
        cache.merge(root, cache.fork(root, 2))
    assert root.next_position == 2
    step = cache.plan([(root, 1)])
    assert step.positions.tolist() == [2]
    cache.commit(step)
    cache.free(root)
    cache.check()
    assert cache.num_free_pages == cache.num_pages


def test_fork_and_merge_leave_the_storage_alone():
    w = world()
    root = w.new()
    w.step((root, 4))
    a, b = w.fork(root, 2)
    w.step((a, 2), (b, 1))
    before = [tensor.clone() for tensor in (*w.cache.k, *w.cache.v)]
    w.merge(root)
    w.fork(root, 3)
    for tensor, was in zip((*w.cache.k, *w.cache.v), before, strict=True):
        assert torch.equal(tensor.nan_to_num(nan=-7.5), was.nan_to_num(nan=-7.5))
    assert w.cache.bytes_moved == 0


# -- steps -------------------------------------------------------------------------------------------------------


def test_nothing_is_visible_before_commit_and_rollback_returns_the_pages():
    w = world(num_pages=8)
    branch = w.new()
    w.step((branch, 2))
    step = w.cache.plan([(branch, 8)])
    assert (branch.next_position, branch.num_tokens, w.cache.num_free_pages) == (2, 2, 4)
    w.cache.check()
    w.cache.rollback(step)
    assert w.cache.num_free_pages == 7
    w.check()
    assert w.step((branch, 1)).positions.tolist() == [2]
    w.check()


def test_slots_follow_the_pages_of_the_node():
    cache = poisoned_cache(8, 3)
    a, b = cache.new(), cache.new()
    first = cache.plan([(a, 2), (b, 1)])
    cache.commit(first)
    step = cache.plan([(b, 3), (a, 2)])
    (page_a,), (page_b,) = cache._state(a).tail.pages, cache._state(b).tail.pages
    (new_b,), (new_a,) = (planned.pages for planned in step.planned)
    expected = [3 * page_b + 1, 3 * page_b + 2, 3 * new_b, 3 * page_a + 2, 3 * new_a]
    assert step.slots.tolist() == expected
    assert step.row_offsets == (0, 3)


def test_out_of_pages_changes_nothing_not_even_an_open_step():
    w = world(num_pages=4)
    a, b = w.new(), w.new()
    w.step((a, 3), (b, 4))
    step = w.cache.plan([(a, 1)])
    with Unchanged(w.cache, OutOfPages, "at most 1 free pages to be needed, got 2"):
        w.cache.plan([(a, 1), (b, 3)])
    w.cache.commit(step)
    assert a.num_tokens == 4 and w.cache.num_free_pages == 0
    w.cache.commit(w.cache.plan([(a, 2), (b, 2)]))  # both fill their last page
    w.cache.check()


CHANGES = {
    "fork": lambda cache, root, other: cache.fork(root, 1),
    "merge": lambda cache, root, other: cache.merge(other, [cache.last]),
    "free": lambda cache, root, other: cache.free(root),
    "plan": lambda cache, root, other: cache.plan([(root, 1)]),
    "commit": lambda cache, root, other: cache.commit(cache.step),
    "rollback": lambda cache, root, other: cache.rollback(cache.step),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_is_stale_after(change):
    cache = poisoned_cache(8, 3)
    root, other = cache.new(), cache.new()
    (cache.last,) = cache.fork(other, 1)
    cache.step = step = cache.plan([(root, 4), (cache.last, 1)])
    CHANGES[change](cache, root, other)
    cache.check()
    rows = torch.zeros(5, 1, 2)
    for use in (lambda: cache.append(0, rows, rows, step), lambda: cache.commit(step), lambda: cache.rollback(step)):
        with Unchanged(cache, StaleStep, "expected an open step, got one that was"):
            use()
    assert torch.isnan(cache.k[0]).all()
    reserved_or_owned = {"plan": 1, "commit": 3}.get(change, 0)
    assert cache.num_free_pages == 8 - reserved_or_owned


def test_a_new_branch_leaves_the_open_step_alone():
    cache = poisoned_cache(4, 3)
    root = cache.new()
    step = cache.plan([(root, 2)])
    cache.new()
    cache.commit(step)
    assert root.num_tokens == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: (k[:2], k), r"k_new: expected shape \[rows, Hkv, D\] = \[3, 1, 2\], got \[2, 1, 2\]"),
        (lambda k: (k, k.double()), "v_new: expected the cache's dtype torch.float32, got torch.float64"),
        (lambda k: (k.clone().requires_grad_(), k), "k_new: expected a tensor outside autograd"),
        (lambda k: (k, k.to("meta")), "v_new: expected the cache's device cpu, got meta"),
    ],
    ids=["rows", "dtype", "grad", "device"],
)
def test_append_refuses_what_does_not_fit(change, message):
    cache = poisoned_cache(4, 3, layers=2)
    step = cache.plan([(cache.new(), 3)])
    k_new, v_new = change(torch.zeros(3, 1, 2))
    with Unchanged(cache, ValueError, message):
        cache.append(1, k_new, v_new, step)
    assert all(torch.isnan(tensor).all() for tensor in (*cache.k, *cache.v))
    with Unchanged(cache, ValueError, "expected a layer of 0 .. 1, got 2"):
        cache.append(2, torch.zeros(3, 1, 2), torch.zeros(3, 1, 2), step)


# -- errors ------------------------------------------------------------------------------------------------------


def test_freed_and_foreign_handles_are_refused_everywhere():
    w = world()
    root, gone = w.new(), w.new()
    w.step((root, 2), (gone, 4))
    w.free(gone)
    foreign = world().new()
    cache = w.cache
    for handle, message in ((gone, f"live branch, got {gone.id}, which was freed"), (foreign, "of this cache")):
        uses = {
            "fork": lambda handle=handle: cache.fork(handle, 2),
            "merge": lambda handle=handle: cache.merge(handle, []),
            "merge child": lambda handle=handle: cache.merge(root, [handle]),
            "free": lambda handle=handle: cache.free(handle),
            "plan": lambda handle=handle: cache.plan([(root, 1), (handle, 1)]),
            "next position": lambda handle=handle: cache.next_position(handle),
            "tokens": lambda handle=handle: cache.num_tokens(handle),
        }
        for use in uses.values():
            with Unchanged(cache, BranchError, message):
                use()


def test_a_step_of_another_cache_is_refused():
    one, other = poisoned_cache(4, 3), poisoned_cache(4, 3)
    one.plan([(one.new(), 1)])
    step = other.plan([(other.new(), 1)])
    with Unchanged(one, StaleStep, "of this cache"):
        one.commit(step)
    other.commit(step)


def test_merge_takes_all_children_of_the_parent_and_nothing_else():
    w = world()
    root, stranger = w.new(), w.new()
    a, b = w.fork(root, 2)
    (c,) = w.fork(a, 1)
    cases = {
        "one of two": (root, [a]),
        "one twice": (root, [a, a]),
        "a stranger": (root, [a, stranger]),
        "a grandchild": (root, [c, b]),
        "none": (root, []),
        "of a leaf": (c, []),
    }
    for parent, children in cases.values():
        with Unchanged(w.cache, BranchError, "merge: expected all children of branch"):
            w.cache.merge(parent, children)
    with Unchanged(w.cache, BranchError, rf"without live children, got {a.id} with \[{c.id}\]"):
        w.cache.merge(root, [a, b])


def test_merged_children_can_only_end_their_path():
    w = world()
    root = w.new()
    a, _ = w.fork(root, 2)
    w.merge(root)
    with Unchanged(w.cache, BranchError, "not merged"):
        w.cache.fork(a, 2)
    with Unchanged(w.cache, BranchError, "owns its pages, got merged branch"):
        w.cache.free(a)
    w.step((a, 1))
    w.free(root)  # takes the merged children with it
    with Unchanged(w.cache, BranchError, "live branch"):
        w.cache.plan([(a, 1)])


@pytest.mark.parametrize("order", ["child first", "parent first"])
def test_entries_of_a_step_count_in_their_order(order):
    w = world()
    root = w.new()
    (a,) = w.fork(root, 1)
    if order == "parent first":
        assert w.step((root, 1), (a, 1)).positions.tolist() == [0, 1]
        return
    with Unchanged(w.cache, BranchError, f"followed by branch {a.id} earlier in this step"):
        w.cache.plan([(a, 1), (root, 1)])


def test_bad_numbers_are_the_callers_error():
    cache = poisoned_cache(4, 3)
    root = cache.new()
    for use, message in (
        (lambda: cache.plan([(root, 0)]), "at least 1 token"),
        (lambda: cache.plan([(root, 1), (root, 1)]), "each branch once"),
        (lambda: cache.plan([]), "at least one entry"),
        (lambda: cache.fork(root, 0), "count of at least 1, got 0"),
    ):
        with Unchanged(cache, ValueError, message):
            use()
    with pytest.raises(ValueError, match="at least 1, got 4, 0, 1, 1 and 2"):
        poisoned_cache(4, 0)
    with pytest.raises(ValueError, match="fewer than 2"):
        PagedKVCache(2**20, 2**11, 1, 1, 1, device="meta")
