"""RequestKV against the cache: in whatever steps, every token sees what the structure says, and nothing leaks.

Tokens are numbered; the cache's keys hold these numbers, so what a row sees can be read from the pages.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvkernels import OutOfPages, PagedKVCache
from mvkernels.model.engine.kv.request_kv import RequestKV
from tests.cache.world import poisoned_cache
from tests.support.trees import trees


@dataclass
class Path:
    """A branch by definition: what its next token sees, and where that stands. work: what is still to come on it."""

    number: int
    work: list
    parent: Path | None = None
    seen: list[int] = field(default_factory=list)
    position: int = 0
    paths: list[Path] = field(default_factory=list)


class Twin:
    """A RequestKV and the structure that it is told of, which grows from `tree` in a random causal order."""

    def __init__(self, tree: list, cache: PagedKVCache, seed: int = 0) -> None:
        self.cache, self.kv = cache, RequestKV(cache)
        self.random = random.Random(seed)
        self.paths = [Path(0, [*tree])]
        self.expected: list[tuple[list[int], int]] = []  # of each token: what it sees before itself, and its position
        self.rows: dict[int, int] = {}  # token -> how often it was committed since the last eviction
        self.steps = 0

    # ---- the structure

    def growing(self) -> list[Path]:
        return [p for p in self.paths if p.work and not p.paths] + [
            p for p in self.paths if p.paths and not any(c.work or c.paths for c in p.paths)
        ]

    def grow(self) -> bool:
        """One token, fork or merge on a branch that is chosen at random; False at the end."""
        ready = self.growing()
        if not ready:
            return False
        path = self.random.choice(ready)
        if path.paths:
            self.kv.merge(path.number)
            before = len(path.seen)
            for child in path.paths:
                path.seen += child.seen[before:]
            path.position = max(child.position for child in path.paths)
            path.paths = []
            return True
        item = path.work.pop(0)
        if isinstance(item, int):
            if item:
                self.kv.extend(path.number, len(self.expected))
                self.expected.append(([*path.seen], path.position))
                path.seen.append(len(self.expected) - 1)
                path.position += 1
            if item > 1:
                path.work.insert(0, item - 1)
            return True
        for child in item:
            number = len(self.paths)
            path.paths.append(Path(number, [*child], path, [*path.seen], path.position))
            self.paths.append(path.paths[-1])
        self.kv.fork(path.number, [child.number for child in path.paths])
        return True

    # ---- steps

    def step(self, tokens: int = 10**9, commit: bool = True, **limits) -> int:
        """One step of the cache; returns the number of its tokens."""
        before = self.kv.unsent_tokens, self.kv.num_pages, self.cache.num_free_pages
        entries = self.kv.entries(tokens, **limits)
        assert len({entry.branch for entry in entries}) == len(entries)
        assert sum(entry.count for entry in entries) <= tokens
        assert len(entries) <= limits.get("max_branches", 10**9)
        pages = self.kv.num_pages - before[1]
        assert pages <= limits.get("max_pages", 10**9)
        if not entries:
            self.kv.sent() if commit else self.kv.unsent()
            return 0
        step = self.cache.plan([(entry.handle, entry.count) for entry in entries])
        assert self.cache.num_free_pages == before[2] - pages, "pages are counted as the cache takes them"
        ids = [i for e in entries for i in self.kv.tokens(e.branch)[e.first : e.first + e.count]]
        keys = torch.tensor(ids, dtype=torch.float32)[:, None, None].expand(-1, 1, 2).contiguous()
        self.cache.append(0, keys, keys, step)
        if not commit:
            self.cache.rollback(step)
            self.kv.unsent()
            assert before == (self.kv.unsent_tokens, self.kv.num_pages, self.cache.num_free_pages)
            return 0
        flat = self.cache.k[0].flatten(0, 1)[:, 0, 0]
        for index, entry in enumerate(entries):
            view = step.views.entries[index]
            visible = [int(i) for i in flat[torch.from_numpy(step.views.visible_slots(index))].tolist()]
            for row in range(view.num_rows):
                token = ids[view.first_row + row]
                seen, position = self.expected[token]
                end = len(visible) - view.num_rows + row
                assert visible[:end] == seen and visible[end] == token, f"token {token} on branch {entry.branch}"
                assert int(step.positions[view.first_row + row]) == position
                self.rows[token] = self.rows.get(token, 0) + 1
        self.cache.commit(step)
        self.kv.sent()
        self.steps += 1
        return step.total_rows

    def evict(self) -> None:
        self.kv.evict()
        self.rows.clear()
        assert self.cache.num_free_pages == self.cache.num_pages and not self.kv.num_pages
        self.cache.check()

    def send_all(self, **limits) -> int:
        """Steps until nothing is left; their number."""
        before = self.steps
        while self.step(**limits):
            pass
        assert not self.kv.unsent_tokens
        return self.steps - before

    def check_end(self) -> None:
        """Every token is in the cache once, and the pages are those that were counted."""
        assert self.rows == {token: 1 for token in range(len(self.expected))}
        assert self.kv.num_pages == self.kv.most_pages == self.cache.num_pages - self.cache.num_free_pages
        self.cache.check()
        self.evict()


def make_cache(page_size: int = 3, num_pages: int = 2000) -> PagedKVCache:
    return poisoned_cache(num_pages, page_size)


@settings(max_examples=50)
@given(tree=trees(max_paths=3), seed=st.integers(0, 10**9), page_size=st.sampled_from([1, 2, 3, 16]))
def test_any_order_of_growth_steps_and_evictions(tree: list, seed: int, page_size: int) -> None:
    chosen = random.Random(seed)
    twin = Twin(tree, make_cache(page_size), seed)
    bursts = chosen.choice([1, 3, 10, 1000])
    limits = chosen.choice([{}, {"max_branches": 1}, {"max_branches": 2}, {"max_pages": 1}, {"max_pages": 2}])
    growing, evictions = True, 0
    while growing or twin.kv.unsent_tokens:
        for _ in range(chosen.randint(1, bursts)):
            growing = growing and twin.grow()
        tokens = chosen.choice([1, 2, 5, 1000])
        kind = chosen.random()
        if kind < 0.3:
            twin.step(tokens, commit=False, **limits)
        elif kind < 0.4 and evictions < 3:
            twin.evict()
            evictions += 1
        else:
            twin.step(tokens, **limits)
        twin.cache.check()
    twin.check_end()


def test_recomputation_takes_as_few_steps_as_the_structure_allows() -> None:
    # Chained and nested blocks: behind a join a branch goes on in the step after the one with its tokens before it.
    tree = [9, [[4, [[3], [2, [[5], []], 1]], 2], [7]], 3, [[2], [2]], 8]
    twin = Twin(tree, make_cache())
    while twin.grow():
        twin.step()
    assert twin.steps > 15
    twin.evict()
    assert twin.send_all() == 3
    twin.check_end()


def test_a_prompt_and_its_paths_are_one_step() -> None:
    twin = Twin([5, [[3], [4, [[2], [1]]]]], make_cache())
    while twin.grow():
        pass
    assert twin.step() == 15 and not twin.kv.unsent_tokens


def test_the_last_tokens_of_paths_and_the_first_behind_their_join_are_one_step() -> None:
    kv = RequestKV(make_cache())
    kv.extend(0, 0)
    kv.fork(0, [1, 2])
    kv.extend(1, 1)
    kv.extend(2, 2)
    assert [entry.branch for entry in kv.entries(9)] == [0, 1, 2]
    kv.sent()
    kv.extend(2, 3)
    kv.merge(0)
    kv.extend(0, 4)
    kv.extend(0, 5)
    assert [(entry.branch, entry.first, entry.count) for entry in kv.entries(9)] == [(2, 1, 1), (0, 1, 2)]


def test_branches_take_turns() -> None:
    twin = Twin([1, [[9]] * 5], make_cache())
    while twin.grow():
        pass
    twin.step(1)
    served = []
    for _ in range(10):
        entries = twin.kv.entries(2, max_branches=2)  # which goes to one branch, or to two that have one token
        served += [entry.branch for entry in entries for _ in range(entry.count)]
        twin.cache.commit(twin.cache.plan([(entry.handle, entry.count) for entry in entries]))
        twin.kv.sent()
        assert max(map(served.count, served)) - min(served.count(number) for number in range(1, 6)) <= 2
    assert [served.count(number) for number in range(1, 6)] == [4] * 5


def test_only_branches_that_may() -> None:
    twin = Twin([1, [[4], [4], [4]]], make_cache())
    while twin.grow():
        pass
    twin.step(1)
    entries = twin.kv.entries(100, may=lambda number: number == 2)
    assert [entry.branch for entry in entries] == [2]
    twin.kv.unsent()
    assert [entry.branch for entry in twin.kv.entries(100)] == [1, 2, 3], "whoever was left out keeps its turn"


def test_a_branch_without_pages_does_not_hold_up_others() -> None:
    twin = Twin([3, [[2], [3], [1]]], make_cache(page_size=3))
    while twin.grow():
        pass
    twin.step(3)
    entries = twin.kv.entries(100, max_pages=2)
    assert [entry.branch for entry in entries] == [1, 2] and twin.kv.starved
    twin.kv.unsent()
    assert len(twin.kv.entries(100, max_pages=3)) == 3 and not twin.kv.starved


def test_whoever_runs_out_of_pages_takes_the_step_back() -> None:
    twin = Twin([2, [[9], [9], [9]]], make_cache(num_pages=4))
    while twin.grow():
        pass
    with pytest.raises(OutOfPages):
        twin.step()
    twin.kv.unsent()
    assert twin.step(4) == 4
    twin.evict()
    assert twin.kv.unsent_tokens == 29


def test_an_error_of_the_cache_hands_nothing_out(monkeypatch) -> None:
    twin = Twin([2, [[2], [2]], 3], make_cache())
    while twin.grow():
        pass
    for name in ("new", "fork", "merge"):
        with monkeypatch.context() as patch:
            patch.setattr(twin.cache, name, lambda *_: 1 / 0)
            for _ in range(9):
                try:
                    if not twin.step():
                        break
                except ZeroDivisionError:
                    twin.kv.unsent()
                    break
            else:
                raise AssertionError(f"{name} was not called")
    twin.send_all()
    twin.check_end()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda kv: kv.extend(0, 1), "expected a branch that may grow, got 0"),
        (lambda kv: kv.fork(0, [7]), "expected a branch that may grow, got 0"),
        (lambda kv: kv.fork(1, [2]), "expected fresh numbers of branches"),
        (lambda kv: kv.fork(1, [5, 5]), "expected fresh numbers of branches"),
        (lambda kv: kv.fork(1, []), "expected fresh numbers of branches"),
        (lambda kv: kv.merge(1), "expected a branch with an open block, got 1"),
        (lambda kv: (kv.fork(1, [5]), kv.merge(0)), "expected paths without open blocks, got 1"),
        (lambda kv: (kv.merge(0), kv.extend(1, 1)), "expected a branch that may grow, got 1"),
    ],
)
def test_what_no_structure_can_be(wrong, message: str) -> None:
    kv = RequestKV(make_cache())
    kv.extend(0, 1)
    kv.fork(0, [1, 2])
    with pytest.raises(ValueError, match=message):
        wrong(kv)


def test_nothing_changes_while_a_step_is_made() -> None:
    kv = RequestKV(make_cache())
    kv.extend(0, 1)
    kv.entries(1)
    for change in (lambda: kv.extend(0, 1), lambda: kv.fork(0, [1]), lambda: kv.entries(1), kv.evict):
        with pytest.raises(RuntimeError, match="expected the step before"):
            change()
    kv.unsent()
    kv.unsent()
    assert kv.unsent_tokens == 1
