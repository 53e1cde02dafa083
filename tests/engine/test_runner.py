"""Runner: steps of the same branches follow one another without planning, and give what planned steps give."""

from __future__ import annotations

import pytest
import torch

from mvkernels import PagedKVCache, patch_model
from mvkernels.decoder.hosted import HostedDecoder
from mvkernels.model.engine.kv.request_kv import Entry
from mvkernels.model.engine.memory import make_cache
from mvkernels.model.engine.runner import BadLogits, Runner
from tests.support.tiny_model import tiny_model

IDS = [13 * i % 250 for i in range(120)]


class World:
    """A runner, three branches, and how often steps were planned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pages: int = 300, **options: object) -> None:
        self.model = patch_model(tiny_model())
        self.cache = make_cache(self.model, 4, pages)
        self.runner = Runner(HostedDecoder(self.model), self.cache, **options)
        self.branches = [self.cache.new() for _ in range(3)]
        self.plans: list[int] = []
        plan = PagedKVCache.plan

        def counted(cache: PagedKVCache, entries: object, reserve: int = 0, tensors: bool = True) -> object:
            self.plans.append(reserve)
            return plan(cache, entries, reserve, tensors)

        monkeypatch.setattr(PagedKVCache, "plan", counted)

    def step(self, first: int, chosen: tuple[int, ...] = (0, 1, 2), count: int = 1) -> torch.Tensor:
        entries = [Entry(i, self.branches[i], first, count) for i in chosen]
        ids = [IDS[(first + 7 * i + j) % len(IDS)] for i in chosen for j in range(count)]
        return self.runner.run(entries, ids, None, range(len(chosen))).values


def test_steps_that_follow_are_those_that_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the end of the reserve, other branches, and a tree that changes."""
    found, planned = [], []
    for results, reserve in ((planned, 0), (found, 9)):
        monkeypatch.setattr("mvkernels.model.engine.runner._RESERVE", reserve)
        world = World(monkeypatch)
        results += [world.step(first) for first in range(25)]
        results.append(world.step(25, (1, 2, 0)))
        results += [world.step(first, (1, 2)) for first in range(26, 31)]
        world.branches += world.cache.fork(world.branches[1], 2)
        results += [world.step(first, (2, 3, 4)) for first in range(31, 36)]
        results.append(world.step(36, (2, 3, 4), count=3))
        if reserve:
            # 1 step, then thrice 10, of which the last ones are given up; then for each change of the branches.
            assert world.plans == [0, 9, 9, 9, 0, 0, 9, 0, 9, 0]
        world.cache.check()
        for branch in world.branches[:3]:
            world.cache.evict(branch)
        assert world.cache.num_free_pages == world.cache.num_pages
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, planned, strict=True))


def test_a_bad_step_takes_nothing_and_is_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    for first in range(4):
        world.step(first)
    tokens = [world.cache.num_tokens(branch) for branch in world.branches]
    broken = world.model.lm_head.register_forward_hook(lambda *_: torch.full((1, 3, 300), torch.nan))
    with pytest.raises(BadLogits) as caught:
        world.step(4)
    assert caught.value.logits.bad_rows == [0, 1, 2] and not caught.value.committed
    broken.remove()
    assert [world.cache.num_tokens(branch) for branch in world.branches] == tokens == [4] * 3
    before = len(world.plans)
    assert not world.step(4).isnan().any() and len(world.plans) == before + 1
    world.cache.check()


def test_pages_are_set_aside_only_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, pages=6)
    for first in range(8):
        world.step(first)
    assert world.plans == [0] * 8 and world.cache.num_free_pages == 0


def test_what_is_set_aside_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    for first in range(3):
        world.step(first)
    assert world.cache.num_free_pages < world.runner.free_pages() == world.cache.num_pages - 3
    world.runner.reset()
    assert world.cache.num_free_pages == world.cache.num_pages - 3
    world.step(3)
    world.cache.check()


def test_rows_of_a_constant_number_are_planned_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a list is cut would depend on the pages in reserve."""
    world = World(monkeypatch, constant_rows=8)
    for first in range(5):
        world.step(first)
    assert world.plans == [0] * 5
