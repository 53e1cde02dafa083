"""The scheduler alone, with requests that are lists of tokens: admission, turns, room, and who gives it up."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mvkernels import PagedKVCache
from mvkernels.model.engine.kv.request_kv import RequestKV
from mvkernels.model.engine.scheduler import Scheduler


class Plain:
    """A request of `branches` paths behind a prompt; each gets one token in every step in which it has all."""

    def __init__(self, name: str, cache: PagedKVCache, prompt: int, branches: int = 1) -> None:
        self.name, self.kv, self.finish_reason = name, RequestKV(cache), None
        for token in range(prompt):
            self.kv.extend(0, token)
        self.branches = [0]
        if branches > 1:
            self.branches = list(range(1, branches + 1))
            self.kv.fork(0, self.branches)
            for branch in self.branches:
                self.kv.extend(branch, branch)

    def __repr__(self) -> str:
        return self.name

    def entries(self, max_tokens, max_branches, max_pages):
        return self.kv.entries(max_tokens, max_branches, max_pages)

    def finish(self, reason: str) -> None:
        self.finish_reason = reason


class World:
    def __init__(self, num_pages: int = 100, tokens: int = 100, width: int = 100, requests: int = 100) -> None:
        self.cache = PagedKVCache(num_pages, 4, 1, 1, 2)
        self.spare: list = []  # branches that nobody needs
        self.failed: list = []
        self.scheduler: Scheduler[Plain] = Scheduler(
            lambda: self.cache.num_free_pages, self.make_room, self.fail, tokens, width, requests
        )

    def make_room(self, pages: int, least: int) -> bool:
        if not self.spare:
            return False
        self.cache.evict(self.spare.pop(0))
        return True

    def fail(self, request: Plain, error: Exception) -> None:
        self.failed.append((request.name, error))
        request.kv.unsent()
        self.scheduler.remove(request)

    def add(self, name: str, prompt: int, branches: int = 1) -> Plain:
        request = Plain(name, self.cache, prompt, branches)
        self.scheduler.add(request)
        return request

    def step(self) -> dict[str, list[int]]:
        """Runs a step and decodes; name -> the numbers of tokens of its entries."""
        work = self.scheduler.schedule()
        entries = [entry for _, own in work for entry in own]
        assert sum(entry.count for entry in entries) <= self.scheduler.max_step_tokens
        if entries:
            self.cache.commit(self.cache.plan([(entry.handle, entry.count) for entry in entries]))
        for request, own in work:
            request.kv.sent()
            self.scheduler.sent([request])
            for entry in own:
                if request.kv.has_all(entry.branch):
                    request.kv.extend(entry.branch, 0)
        return {request.name: [entry.count for entry in own] for request, own in work}

    def end(self, request: Plain) -> None:
        self.scheduler.remove(request)
        request.kv.evict()


def test_who_decodes_comes_before_prompts_which_fill_the_step_up() -> None:
    world = World(tokens=10)
    world.add("a", 6)
    assert world.step() == {"a": [6]}
    world.add("b", 23)
    world.add("c", 2)
    assert world.step() == {"a": [1], "b": [9]}
    assert world.step() == {"a": [1], "b": [9]}
    assert world.step() == {"a": [1], "b": [5], "c": [2]}
    assert world.step() == {"a": [1], "b": [1], "c": [1]}


def test_a_wide_request_leaves_room_for_others() -> None:
    world = World(tokens=8, width=4)
    world.add("wide", 1, branches=12)
    world.step()
    world.add("narrow", 2)
    for _ in range(4):
        world.step()
    for _ in range(9):
        counts = world.step()
        assert len(counts["wide"]) == 4 and counts["narrow"] == [1]


def test_requests_that_do_not_all_fit_take_turns() -> None:
    world = World(tokens=2)
    requests = [world.add(str(i), 1) for i in range(5)]
    for _ in range(5):
        world.step()
    served = [name for _ in range(10) for name in world.step()]
    assert len(served) == 20 and {served.count(request.name) for request in requests} == {4}


def test_admission_waits_for_pages_and_keeps_the_order() -> None:
    world = World(num_pages=10)
    world.add("a", 20)
    world.add("b", 24)
    world.add("c", 4)
    world.step()
    assert [r.name for r in world.scheduler.running] == ["a"], "c does not overtake b"
    world.end(world.scheduler.running[0])
    world.step()
    assert [r.name for r in world.scheduler.running] == ["b", "c"] and len(world.scheduler) == 2


def test_no_more_requests_than_allowed() -> None:
    world = World(requests=2)
    for name in "abc":
        world.add(name, 1)
    world.step()
    assert [r.name for r in world.scheduler.running] == ["a", "b"]


def test_the_youngest_makes_room_and_is_computed_again() -> None:
    world = World(num_pages=8)
    a, b, c = (world.add(name, 4) for name in "abc")
    for _ in range(60):
        world.step()
        assert a in world.scheduler.running, "the oldest is never preempted"
        if a.kv.num_pages == 6:
            break
    assert world.scheduler.preemptions and c not in world.scheduler.running
    assert world.cache.num_free_pages == 8 - a.kv.num_pages - b.kv.num_pages
    before = len(c.kv.tokens(0))
    world.end(a)
    world.end(b)
    assert world.step() == {"c": [before]}
    world.end(c)
    assert world.cache.num_free_pages == 8 and not len(world.scheduler)


def test_who_gives_his_pages_up_takes_his_part_of_the_step_back() -> None:
    world = World(num_pages=4)
    a, b = world.add("a", 4), world.add("b", 4)
    world.step()
    assert world.step() == {"a": [1], "b": [1]}
    for _ in range(3):
        world.step()
    # Both need a page now and there is none: b has had its turn before a in this step, or after it.
    for _ in range(8):
        counts = world.step()
        assert "a" in counts and not a.finish_reason
    assert b not in world.scheduler.running and world.cache.num_free_pages == 4 - a.kv.num_pages
    world.cache.check()


def test_unused_pages_go_before_requests() -> None:
    world = World(num_pages=8)
    spare = world.cache.new()
    world.cache.commit(world.cache.plan([(spare, 12)]))
    world.spare.append(spare)
    world.add("a", 12)
    world.add("b", 8)
    world.step()
    assert not world.spare and len(world.scheduler.running) == 2 and not world.scheduler.preemptions


@pytest.mark.timeout(60)
@example([(1, 1), (1, 2)], 5, 1, 1, 2)
@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=2, max_size=4),
    st.integers(3, 12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_some_request_gets_on_in_every_step(
    requests: list[tuple[int, int]], pages: int, tokens: int, width: int, most: int
) -> None:
    """A step was empty where its tokens were kept for a request that was preempted, and so ended all of them."""
    world = World(num_pages=pages, tokens=tokens, width=width, requests=most)
    left = [world.add(str(i), prompt, branches) for i, (prompt, branches) in enumerate(requests)]
    while left:
        counts = world.step()
        assert counts or any(request.finish_reason for request in left)
        for request in list(left):
            if request.finish_reason or len(request.kv.tokens(request.branches[0])) > 25:
                assert request.finish_reason in (None, "out_of_pages")
                world.end(request)
                left.remove(request)
    assert world.cache.num_free_pages == pages


def test_alone_without_a_page() -> None:
    world = World(num_pages=3)
    a = world.add("a", 4, branches=2)
    for _ in range(4):
        assert world.step() and not a.finish_reason
    assert world.step() == {}, "all pages are full"
    assert a.finish_reason == "out_of_pages" and a.kv.num_pages == 3
    world.end(a)
    assert world.cache.num_free_pages == 3


def test_alone_some_branches_go_on_without_the_others() -> None:
    world = World(num_pages=4)
    a = world.add("a", 4, branches=2)
    for _ in range(4):
        world.step()
    counts = [world.step().get("a", []) for _ in range(5)]
    assert counts == [[1]] * 4 + [[]] and a.finish_reason == "out_of_pages"


def test_an_error_of_the_cache_is_one_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    a, b = world.add("a", 3), world.add("b", 3)
    evict = world.cache.evict
    with monkeypatch.context() as patch:
        patch.setattr(world.cache, "new", lambda: 1 / 0)
        assert world.step() == {} and [name for name, _ in world.failed] == ["a", "b"]
    world.scheduler.add(a)
    world.scheduler.add(b)
    assert world.step() == {"a": [3], "b": [3]}
    with monkeypatch.context() as patch:
        patch.setattr(world.cache, "evict", lambda branch: 1 / 0)
        world.scheduler.preempt(b)
    assert [name for name, _ in world.failed[2:]] == ["b"] and world.step() == {"a": [1]}
    evict(b.kv.entries(1)[0].handle)


def test_removing_twice_changes_nothing() -> None:
    world = World()
    a = world.add("a", 1)
    world.scheduler.remove(a)
    world.scheduler.remove(a)
    assert not len(world.scheduler) and world.step() == {} and [*world.scheduler] == []
