"""Requests that share beginnings, against the cache: every row sees what its structure says, whoever computed it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvkernels.model.engine.kv.prefix_cache import PrefixCache
from mvkernels.model.engine.kv.request_kv import RequestKV
from tests.cache.world import poisoned_cache
from tests.engine.test_request_kv import Path

# Beginnings of one another, and such that have the same tokens one after the other in another structure.
TREES = [
    [40],
    [13, [[5], [3]], 9],
    [13, [[5], [3]], 9, [[4, [[2], [6]], 1], [2]], 12],
    [13, [[3], [5]], 9],
    [13, [[8]], 9],
    [13, [[5, [[1], [2]]]], 9],
    [13, [[5], [3]], 3],
    [12, [[5], [3]], 20],
    [9, [[4], [2, [[7], [1]], 3]], 30],
    # The same tokens at the same positions, and in the last of them some see others.
    [13, [[5, [[1], [1, [[2], [1]]]]]], 9],
    [13, [[5, [[1], [1]], [[2], [1]]]], 9],
]


class Request:
    """A RequestKV with a whole tree of tokens that are numbered in writing order, and what each of them sees."""

    def __init__(self, prefixes: PrefixCache, tree: list, first: int = 0, at: int = 0) -> None:
        """first: the number of the first token. at: the position where it is said to stand."""
        self.cache, self.prefixes = prefixes.cache, prefixes
        self.places: dict[int, list[int]] = {0: []}
        self.kv = RequestKV(prefixes.cache, prefixes, self.places.__getitem__)
        self.first, self.expected = first, []
        self.paths = [Path(0, tree, position=at)]
        self._grow(self.paths[0])
        self.computed = 0

    def _grow(self, path: Path) -> None:
        for item in path.work:
            if not isinstance(item, int):
                self._block(path, item)
                continue
            for _ in range(item):
                self.places[path.number].append(path.position)
                self.kv.extend(path.number, self.first + len(self.expected))
                self.expected.append(([*path.seen], path.position))
                path.seen.append(self.first + len(self.expected) - 1)
                path.position += 1

    def _block(self, path: Path, items: list) -> None:
        children = []
        for item in items:
            children.append(Path(len(self.paths), item, path, [*path.seen], path.position))
            self.paths.append(children[-1])
            self.places[children[-1].number] = []
        self.kv.fork(path.number, [child.number for child in children])
        before = len(path.seen)
        for child in children:
            self._grow(child)
            path.seen += child.seen[before:]
        path.position = max(child.position for child in children)
        self.kv.merge(path.number)

    def step(self, tokens: int = 10**9, good: bool = True) -> int:
        """One step, whose rows are checked. good: whether its logits are."""
        entries = self.kv.entries(tokens, None, self.cache.num_available_pages)
        while self.kv.short and self.prefixes.evict(self.kv.short):
            self.kv.unsent()
            entries = self.kv.entries(tokens, None, self.cache.num_available_pages)
        if not entries:
            self.kv.unsent()
            return 0
        step = self.cache.plan([(entry.handle, entry.count) for entry in entries])
        ids = [i for e in entries for i in self.kv.tokens(e.branch)[e.first : e.first + e.count]]
        keys = torch.tensor(ids, dtype=torch.float32)[:, None, None].expand(-1, 1, 2).contiguous()
        self.cache.append(0, keys, keys, step)
        flat = self.cache.k[0].flatten(0, 1)[:, 0, 0]
        for index, view in enumerate(step.views.entries):
            visible = [int(i) for i in flat[torch.from_numpy(step.views.visible_slots(index))].tolist()]
            for row in range(view.num_rows):
                token = ids[view.first_row + row]
                seen, position = self.expected[token - self.first]
                end = len(visible) - view.num_rows + row
                assert visible[:end] == seen and visible[end] == token
                assert int(step.positions[view.first_row + row]) == position
        self.cache.commit(step)
        self.kv.sent()
        if good:
            self.kv.confirm()
        self.computed += step.total_rows
        return step.total_rows

    def run(self, **options) -> int:
        """Steps to the end; the number of tokens computed."""
        before = self.computed
        while self.step(**options):
            pass
        assert not self.kv.unsent_tokens
        return self.computed - before

    def found(self) -> int:
        """Tokens that are not computed, of a request that comes and goes."""
        tokens = self.run()
        self.kv.evict()
        return len(self.expected) - tokens


def make(num_pages: int = 400, page_size: int = 4, table_size=None) -> PrefixCache:
    return PrefixCache(poisoned_cache(num_pages, page_size, table_size=table_size))


def check(prefixes: PrefixCache, requests: list[Request]) -> None:
    """Pieces and requests hold all pages there are, and what is idle is counted."""
    prefixes.cache.check()
    held: set[int] = set()
    for request in requests:
        if request.kv._trunk.handle is not None:
            going = [request.kv._trunk.handle.id]
            for number in going:
                state = prefixes.cache._branches[number]
                going += state.children
                held.update(page for node in state.nodes for page in node.pages)
    used = prefixes.cache.num_pages - prefixes.cache.num_free_pages
    assert prefixes.idle_pages == used - len(held)


@pytest.mark.parametrize("first", range(len(TREES)))
def test_only_the_same_tokens_in_the_same_structure_are_found(first: int) -> None:
    """No more than what two lists of (what a token sees, its position) have in common; and whole pages of the trunk."""
    for second, tree in enumerate(TREES):
        prefixes = make()
        one, other = Request(prefixes, TREES[first]), Request(prefixes, tree)
        assert one.found() == 0
        common = 0
        while common < min(len(one.expected), len(other.expected)) and one.expected[common] == other.expected[common]:
            common += 1
        found = other.found()
        assert min(common, TREES[first][0], tree[0] - 1) // 4 * 4 <= found <= common, f"{TREES[first]} and {tree}"
        assert second != first or found >= len(one.expected) - 4, "the same again: all but the last page"
        check(prefixes, [])
        prefixes.clear()
        assert prefixes.cache.num_free_pages == prefixes.cache.num_pages and not prefixes.size


def test_whole_blocks_are_found() -> None:
    """A page behind a join is found only behind all that the join has, and the join only as a whole."""
    prefixes = make()
    Request(prefixes, TREES[1]).found()
    assert Request(prefixes, TREES[2]).found() == 13 + 8 + 8
    assert Request(prefixes, TREES[6]).found() == 13 + 8
    assert Request(prefixes, [13, [[5], [4]], 9]).found() == 12
    assert Request(prefixes, TREES[2]).found() == 13 + 8 + 9 + 15 + 8, "12 tokens behind the join, of which one is left"


@pytest.mark.parametrize(
    ("tree", "pages", "found"), [([20], 5, 16), ([2, [[5], [3]], 8], 6, 14)], ids=["pages", "a block"]
)
def test_the_same_tokens_at_other_positions_are_not_found(tree: list, pages: int, found: int) -> None:
    prefixes = make()
    Request(prefixes, tree).found()
    shifted = Request(prefixes, tree, at=1)
    assert shifted.kv.hold_prefix() == pages, "all of its pages are to come"
    shifted.kv.release_prefix()
    assert Request(prefixes, tree).found() == found


def test_one_other_token_in_the_first_page() -> None:
    prefixes = make()
    Request(prefixes, [20]).found()
    assert Request(prefixes, [20], first=1).found() == 0


def test_who_holds_a_piece_keeps_it_and_all_before_it() -> None:
    prefixes = make(num_pages=12)
    Request(prefixes, [24]).found()
    running = Request(prefixes, [13])
    running.step()
    assert prefixes.idle_pages == 3
    assert prefixes.evict(10) and prefixes.idle_pages == 0 and not prefixes.evict(1)
    check(prefixes, [running])
    assert prefixes.size == 3
    running.kv.evict()
    assert prefixes.idle_pages == 3 and not prefixes.evict(4, least=4)
    assert prefixes.evict(2) and prefixes.idle_pages == 1
    assert Request(prefixes, [13]).found() == 4, "from the end on"


def test_the_order_in_which_pieces_go() -> None:
    prefixes = make(page_size=4)
    for first in (0, 100, 200):
        Request(prefixes, [9], first).found()
    assert Request(prefixes, [9], 0).found() == 8
    prefixes.evict(3)
    assert [Request(prefixes, [9], first).kv._prefix.hold() for first in (0, 100, 200)] == [2, 0, 1]


def test_a_chain_goes_at_once_and_in_pieces() -> None:
    prefixes = make(num_pages=100)
    Request(prefixes, [160]).found()
    nodes = len(prefixes.cache._nodes)
    assert prefixes.evict(30) and prefixes.idle_pages == 10
    assert len(prefixes.cache._nodes) == nodes
    for left in range(9, -1, -1):
        assert prefixes.evict(1) and prefixes.idle_pages == left
        check(prefixes, [])
    assert not prefixes.evict(1) and not prefixes.cache._nodes


def test_nothing_is_left_of_what_was_never_confirmed() -> None:
    """Keys and values that are not numbers, as far as anybody knows."""
    prefixes = make()
    request = Request(prefixes, [20])
    request.step(9)
    request.step(good=False)
    request.kv.evict()
    assert prefixes.size == 2 and prefixes.idle_pages == 2
    other = Request(prefixes, [20])
    other.run(good=False)
    other.kv.evict()
    assert prefixes.size == 2


def test_who_begins_in_the_same_way_waits() -> None:
    prefixes = make()
    one, two, other = Request(prefixes, [20]), Request(prefixes, [30]), Request(prefixes, [20], 7)
    assert not one.kv.awaits_prefix()
    one.kv.hold_prefix()
    assert two.kv.awaits_prefix() and not other.kv.awaits_prefix()
    one.step(6, good=False)
    assert two.kv.awaits_prefix()
    one.kv.evict()
    assert not two.kv.awaits_prefix(), "it has given up"
    one.run()
    assert not two.kv.awaits_prefix() and two.found() == 20


def test_an_error_of_the_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = make()
    Request(prefixes, [40]).found()
    running, late = Request(prefixes, [30]), Request(prefixes, [22])
    running.step()
    changes = {"fork_at": [lambda: late.kv.entries(9)], "free": [], "evict": [running.kv.evict]}
    for name in changes:
        for change in (*changes[name], *([] if name == "evict" else [lambda: prefixes.evict(2)])):
            with monkeypatch.context() as patch:
                patch.setattr(prefixes.cache, name, lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    change()
            prefixes.cache.check()
    assert prefixes.idle_pages == 10 - 7 and late.run() == 2
    running.kv.evict()
    late.kv.evict()
    check(prefixes, [])
    prefixes.clear()
    assert prefixes.cache.num_free_pages == prefixes.cache.num_pages


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**9),
    page_size=st.sampled_from([1, 2, 3, 4, 16]),
    table_size=st.sampled_from([None, (64, 200), (4, 60)]),
)
def test_any_requests_in_any_order(seed: int, page_size: int, table_size) -> None:
    chosen = random.Random(seed)
    prefixes = make(chosen.choice([40, 90, 300]) * 4 // page_size + 12, page_size, table_size)
    running: list[Request] = []
    for _ in range(chosen.randint(5, 60)):
        kind = chosen.random()
        if kind < 0.3 and len(running) < 4:
            running.append(Request(prefixes, chosen.choice(TREES), chosen.choice([0, 0, 0, 5])))
        elif kind < 0.45 and running:
            request = running.pop(chosen.randrange(len(running)))
            request.kv.evict()
            if kind < 0.35:
                running.append(request)
        elif kind < 0.5:
            prefixes.evict(chosen.choice([1, 3, 100]))
        elif running:
            chosen.choice(running).step(chosen.choice([1, 5, 1000]), good=chosen.random() < 0.8)
        check(prefixes, running)
    for request in running:
        request.kv.evict()
    check(prefixes, [])
    prefixes.clear()
    assert prefixes.cache.num_free_pages == prefixes.cache.num_pages and not prefixes.cache._nodes
