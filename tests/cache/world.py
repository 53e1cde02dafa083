"""A paged cache beside the reference: every operation is done on both. Shared by the tests of cache and decode."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Branch, Step
from mvkernels.ops.decode.tasks import KeyRun
from mvkernels.reference.decode import ReferenceBranch, Token, flatten

NAN = float("nan")


def poisoned_cache(
    num_pages, page_size, layers=1, kv_heads=1, head_dim=2, dtype=torch.float32, device="cpu", table_size=None
):
    """A cache whose unwritten memory holds NaN, so that reading any of it shows. table_size: of its device tables."""
    cache = PagedKVCache(
        num_pages, page_size, layers, kv_heads, head_dim, dtype, device,
        device_tables=table_size is not None, table_size=table_size,
    )  # fmt: skip
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(NAN)
    return cache


def has_tokens(items) -> bool:
    return any(isinstance(item, Token) or any(has_tokens(path.items) for path in item) for item in items)


def may_grow(branch: ReferenceBranch) -> bool:
    """Whether everything that comes after the branch's next token is still empty."""
    if branch.forked and has_tokens(branch.items[-1:]):
        return False
    while branch.parent is not None and not branch.freed:
        parent = branch.parent
        before = len(parent._items_before(branch))
        if parent.forked and before == len(parent.items) - 1:
            return True  # a path of an open block: nothing comes after it yet
        if has_tokens(parent.items[before + 1 :]):
            return False
        branch = parent
    return True


class World:
    """`live` are handles that own their branch, `merged` those that may still end their path; both -> reference."""

    def __init__(self, cache: PagedKVCache, seed: int = 0, sequential: bool = False) -> None:
        self.cache = cache
        self.live: dict[Branch, ReferenceBranch] = {}
        self.merged: dict[Branch, ReferenceBranch] = {}
        self.dead: list[Branch] = []
        self.children: dict[Branch, list[Branch]] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.sequential = sequential  # token i is filled with i: exact, and shows which token it is
        self.written = 0
        self.cut = False  # whether `fork_at` was used

    def new(self) -> Branch:
        branch = self.cache.new()
        self.live[branch], self.children[branch] = ReferenceBranch(), []
        return branch

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        children = self.cache.fork(branch, count)
        for child, mirror in zip(children, self.live[branch].fork(count), strict=True):
            self.live[child], self.children[child] = mirror, []
        self.children[branch] += children
        return children

    def fork_at(self, branch: Branch, count: int) -> Branch:
        """A branch of its own whose reference is a copy of the first `count` tokens."""
        items = first_items(self.live[branch]._before(), count)
        assert items is not None, f"a branch that sees {count} tokens, with half a block"
        fresh, self.cut = self.cache.fork_at(branch, count), True
        self.live[fresh], self.children[fresh] = ReferenceBranch(), []
        self.live[fresh].items = items
        return fresh

    def may_grow(self, branch: Branch) -> bool:
        """By the reference; but tokens that only a branch of `fork_at` sees any more are in nobody's tree."""
        if not self.cut:
            return may_grow(self.mirror(branch))
        tail = self.cache._state(branch).tail
        chains = [node.chain for node in self.cache._nodes.values() if node.length and node.chain is not None]
        return may_grow(self.mirror(branch)) and not any(link.node is tail for chain in chains for link in chain.back())

    def merge(self, parent: Branch) -> None:
        children, self.children[parent] = self.children[parent], []
        self.cache.merge(parent, children)
        self.live[parent].merge()
        for child in children:
            self.merged[child] = self.live.pop(child)
        self.bury()

    def free(self, branch: Branch) -> None:
        self.cache.free(branch)
        self.forget_branch(branch)

    def forget_branch(self, branch: Branch) -> None:
        self.live.pop(branch).free()
        self.dead.append(branch)
        for children in self.children.values():
            if branch in children:
                children.remove(branch)
        self.bury()

    def bury(self) -> None:
        """Merged handles that something with tokens follows, or that nobody sees any more, are dead."""
        for handle, mirror in list(self.merged.items()):
            if not may_grow(mirror) or not any(sees(branch, mirror) for branch in self.live.values()):
                self.dead.append(handle)
                del self.merged[handle]

    def new_rows(self, rows: int, kv_heads: int, head_dim: int) -> torch.Tensor:
        if self.sequential:
            numbers = torch.arange(self.written, self.written + rows, dtype=torch.float32)
            return numbers[:, None, None].expand(rows, kv_heads, head_dim).clone()
        return torch.randn(rows, kv_heads, head_dim, generator=self.generator)

    def mirror(self, branch: Branch) -> ReferenceBranch:
        return self.live.get(branch) or self.merged[branch]

    def write(self, entries: Sequence[tuple[Branch, int]], append: str = "auto", reserve: int = 0) -> Step:
        """Plans a step that must succeed, checks its positions, and writes it to both; `commit` it afterwards."""
        step = self.cache.plan(entries, reserve) if reserve else self.cache.plan(entries)
        check_device_tables(step)
        self.fill(step, entries, append)
        return step

    def fill(self, step: Step, entries: Sequence[tuple[Branch, int]], append: str = "auto") -> None:
        """Checks the positions of a step and writes it to both.

        Layer n of the cache holds the values of the reference plus n, its values the negative.
        """
        cache = self.cache
        keys = self.new_rows(step.total_rows, cache.num_kv_heads, cache.head_dim).to(cache.dtype)
        values = keys.flip(0) if not self.sequential else -keys
        self.written += step.total_rows
        for layer in range(cache.num_layers):
            shifted = [(tensor + layer).to(cache.device) for tensor in (keys, values)]
            cache.append(layer, *shifted, step, backend=append)
        assert step.entries == tuple(entries)
        positions = []
        for (branch, count), row in zip(entries, step.row_offsets, strict=True):
            mirror = self.mirror(branch)
            positions += range(mirror.next_position(), mirror.next_position() + count)
            mirror.append(keys[row : row + count], values[row : row + count])
        assert step.positions.tolist() == positions
        assert step.positions.dtype == torch.int32 and step.slots.dtype == torch.int64

    def advance(self, step: Step) -> Step:
        """Commits a written step and writes the next one. The device counts its tokens itself, as `DecodeTables` do."""
        following = self.cache.advance(step)
        self.bury()
        held = following.views.device_pages
        if held is not None:
            for view in following.views.entries:
                held.counts[view.own.place + (view.own.tokens - 1) // self.cache.page_size] += 1
            check_runs(following)
        self.fill(following, step.entries)
        return following

    def truncate(self, branch: Branch, count: int) -> None:
        self.cache.truncate(branch, count)
        mirror = self.mirror(branch)
        end = len(mirror.items) - mirror.forked
        del mirror.items[end - count : end]
        self.bury()

    def evict(self, branch: Branch) -> None:
        going = [branch]
        for descendant in going:
            going += self.children[descendant]
        before = self.cache.num_free_pages + self.cache._reserved()  # evicting discards an open step
        assert self.cache.evict(branch) == self.cache.num_free_pages - before
        for descendant in reversed(going):
            self.forget_branch(descendant)

    def commit(self, step: Step) -> None:
        self.cache.commit(step)
        self.bury()

    def rollback(self, step: Step) -> None:
        self.cache.rollback(step)
        self.forget(step)

    def forget(self, step: Step) -> None:
        """The reference loses the rows of a step that was rolled back or discarded."""
        for branch, count in reversed(step.entries):
            mirror = self.mirror(branch)
            end = len(mirror.items) - mirror.forked
            del mirror.items[end - count : end]

    def step(self, *entries: tuple[Branch, int]) -> Step:
        step = self.write(entries)
        self.commit(step)
        return step

    def check(self) -> None:
        """Integrity, next positions, and (for a sequential world) every key and value that a branch sees."""
        self.cache.check()
        for branch, mirror in (*self.live.items(), *self.merged.items()):
            assert branch.next_position == mirror.next_position()
            assert branch.num_tokens == len(flatten(mirror._before()))
            if self.sequential and branch.num_tokens:
                self._check_content(branch, mirror)

    def _check_content(self, branch: Branch, mirror: ReferenceBranch) -> None:
        cache, size = self.cache, self.cache.page_size
        slots = [
            node.pages[i // size] * size + i % size for node in cache._state(branch).nodes for i in range(node.length)
        ]
        expected_keys, expected_values = mirror.visible()
        order = expected_keys[:, 0, 0].argsort()
        for layer in range(cache.num_layers):
            keys, values = (cache_[layer].cpu().flatten(0, 1)[slots] for cache_ in (cache.k, cache.v))
            by_token = keys[:, 0, 0].argsort()
            assert torch.equal(keys[by_token], expected_keys[order] + layer)
            assert torch.equal(values[by_token], expected_values[order] + layer)


def first_items(items, count: int):
    """A copy of what holds the first `count` tokens; None where it would see a path and some of its sibling.

    Some of the first path of a block is a sequence without that block.
    """
    out = []
    for item in items:
        if not count:
            break
        if isinstance(item, Token):
            out.append(item)
            count -= 1
            continue
        paths = [path for path in item if not path.freed]
        sizes = [len(flatten(path.items)) for path in paths]
        if count >= sum(sizes):
            block = []
            for path, size in zip(paths, sizes, strict=True):
                block.append(ReferenceBranch())
                block[-1].items = first_items(path.items, size)
            out.append(block)
            count -= sum(sizes)
            continue
        with_tokens = [path for path, size in zip(paths, sizes, strict=True) if size]
        first = first_items(with_tokens[0].items, count)
        return None if count > len(flatten(with_tokens[0].items)) or first is None else out + first
    return out


def check_runs(step: Step) -> None:
    """The device holds every run of the step at its place, or the step has no tables on the device."""
    held = step.views.device_pages
    for view in step.views.entries:
        for run in (*view.whole, view.own):
            if held is None:
                assert run.place is None
                continue
            at = slice(run.place, run.place + len(run.pages))
            assert held.pages[at].tolist() == run.pages.tolist()
            assert held.counts[at].tolist() == run.counts.tolist()


def check_device_tables(step: Step) -> None:
    """After a plan: all runs, and for each branch of the step its row in the tables and its position, by definition."""
    check_runs(step)
    cache = step.entries[0][0].cache
    if step.views.device_pages is None:
        return
    tables = cache.device_tables.tables
    own = {p.node: view.own for p, view in zip(step.planned, step.views.entries, strict=True)}
    for (branch, _), planned in zip(step.entries, step.planned, strict=True):
        state = cache._state(branch)
        if state.merged:
            continue
        pages, counts = [], []
        for link in state.head.back():
            run = own.get(link.node) or KeyRun.of_node(link.node.page_array(), link.node.length, cache.page_size)
            pages, counts = run.pages.tolist() + pages, run.counts.tolist() + counts
            if link.forked:
                break
        slot = own[planned.node].place // tables.capacity
        used = int(tables.used[slot])
        assert tables.pages[slot, :used].tolist() == pages
        assert tables.counts[slot, :used].tolist() == counts
        assert int(tables.position[slot]) == planned.start + planned.base + planned.num_tokens
    assert int(tables.error) == 0


def sees(viewer: ReferenceBranch, path: ReferenceBranch) -> bool:
    """Whether the viewer's next token sees what the path holds."""

    def holds(items) -> bool:
        blocks = [item for item in items if isinstance(item, list)]
        return any(p is path or holds(p.items) for block in blocks for p in block if not p.freed)

    return viewer is path or holds(viewer._before())


def snapshot(cache: PagedKVCache) -> tuple[object, ...]:
    """All host state that an operation could change."""
    fields = ("length", "start", "refs", "frozen", "writer")
    nodes = {
        n.id: (*n.pages, *(getattr(n, field) for field in fields), *((link.refs, link.after) for link in n.links))
        for n in cache._nodes.values()
    }
    branches = {b.id: (b.tail.id, b.parent, tuple(b.children), b.merged) for b in cache._branches.values()}
    return nodes, branches, cache._free.pages(), cache._open, cache._open and cache._open.state.closed


class Unchanged:
    """The error that is expected, with what it says; afterwards the cache is as it was."""

    def __init__(self, cache: PagedKVCache, error: type[Exception], message: str) -> None:
        self.cache, self.raises, self.before = cache, pytest.raises(error, match=message), snapshot(cache)

    def __enter__(self) -> None:
        self.raises.__enter__()

    def __exit__(self, *error: object) -> bool:
        caught = self.raises.__exit__(*error)
        assert snapshot(self.cache) == self.before
        self.cache.check()
        return bool(caught)
