"""The paged cache as a state machine: random operations on it and on the reference, both compared after each.

Sizes are small and pages few, so that branches run out of pages, pages are used again, and stale steps meet them.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mvkernels.errors import BranchError, OutOfPages, StaleStep
from tests.cache.world import Unchanged, World, first_items, may_grow, poisoned_cache


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.open = None
        self.stale = []

    @initialize(
        num_pages=st.sampled_from([2, 7, 20, 60, 200]),
        page_size=st.sampled_from([1, 2, 3, 16]),
        table_size=st.sampled_from([None, (64, 200), (64, 200), (5, 200), (3, 200), (64, 5), (4, 8)]),
    )
    def start(self, num_pages, page_size, table_size):
        """table_size: of the device tables; some that hold everything, and some with few rows, or short ones."""
        self.world = World(poisoned_cache(num_pages, page_size, layers=2, table_size=table_size), sequential=True)
        self.cache = self.world.cache
        self.world.new()

    def close(self, commit: bool = False) -> None:
        """The open step was used up by what the rule did: its rows are in the reference only if it was committed."""
        if self.open is not None:
            self.stale.append(self.open)
            if not commit:
                self.world.forget(self.open)
            self.open = None

    def handles(self):
        return [*self.world.live, *self.world.merged]

    @rule()
    def new(self):
        if len(self.world.live) < 8:
            self.world.new()

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), count=st.integers(1, 3))
    def fork(self, data, count):
        if len(self.world.live) < 12:
            self.close()
            self.world.fork(data.draw(st.sampled_from(list(self.world.live))), count)

    @precondition(lambda self: 0 < len(self.world.live) < 12)
    @rule(data=st.data(), ends=st.booleans())
    def fork_at(self, data, ends):
        """ends: where a node ends, or one of its pages, so that most calls succeed."""
        branch = data.draw(st.sampled_from(list(self.world.live)))
        places = self.ends(branch)
        if not ends:
            places = range(places[-1] + 1)
        count = data.draw(st.sampled_from(places))
        held = self.open
        self.close()
        if self.cuts(branch, count):
            self.world.fork_at(branch, count)
            return
        if held is not None:
            self.cache.rollback(held)
        with Unchanged(self.cache, BranchError, "fork_at: expected a cut"):
            self.cache.fork_at(branch, count)

    @precondition(lambda self: 0 < len(self.world.live) < 8)
    @rule(data=st.data(), widths=st.lists(st.integers(1, 2), min_size=1, max_size=3), merged=st.integers(0, 3))
    def cut_then_grow(self, data, widths, merged):
        """Blocks in one another, some merged while they are empty; cuts at every end; then all that may grow does.

        No cut branch may see a token more or less: each has its own copy in the reference.
        """
        self.close()
        trunk = branch = data.draw(st.sampled_from(list(self.world.live)))
        opened = []
        for width in widths:
            opened.append(branch)
            branch = self.world.fork(branch, width)[0]
        for parent in opened[: -merged - 1 : -1]:
            if any(self.world.children[child] for child in self.world.children[parent]):
                break  # it had children already, which have some
            self.world.merge(parent)
            branch = parent
        cut = [self.world.fork_at(branch, count) for count in {*self.ends(branch)} if self.cuts(branch, count)]
        for handle in [trunk, *data.draw(st.permutations([h for h in self.handles() if h not in cut]))[:4]]:
            if handle in self.handles() and self.world.may_grow(handle) and self.pages_needed([(handle, 1)]) == 0:
                self.world.step((handle, 1))
                self.world.check()
        for branch in cut:
            self.world.free(branch)

    def ends(self, branch) -> list[int]:
        """How many tokens a branch sees up to the end of each of its nodes, and of their pages."""
        size, places = self.cache.page_size, [0]
        for node in self.cache._state(branch).nodes:
            places += [places[-1] + min(size, node.length - done) for done in range(0, node.length, size)]
        return places

    def cuts(self, branch, count) -> bool:
        """Whether a branch can see just so many tokens: by the reference, and by where nodes and pages end."""
        before, link = self.cache.num_tokens(branch), self.cache._state(branch).head
        behind = []
        while link is not None and before - link.node.length >= count:
            before -= link.node.length
            behind.append(link)
            link = link.before
        if link is None:
            return True
        if first_items(self.world.live[branch]._before(), count) is None:
            return False
        own = link.node.chain is link.before
        if count < before:
            return own and (link.node.length - before + count) % self.cache.page_size == 0
        for after in behind[::-1]:  # where a join has a token, or nobody is left to go on with its paths
            if after.node.chain is after.before and self.stays(after.before):
                return True
            if after.node.length:
                break
        return own

    def stays(self, link) -> bool:
        """Whether no handle can change what a list holds: its nodes have none, or tokens in the list see them."""
        nodes = [before.node for before in link.back()]
        written = {state.tail for state in self.cache._branches.values()}
        seen = {before.node for n in nodes if n.length and n.chain is not None for before in n.chain.back()}
        return not (written & {*nodes}) - seen

    @rule(data=st.data())
    def merge(self, data):
        children = self.world.children
        ready = [b for b in self.world.live if children[b] and not any(children[c] for c in children[b])]
        if ready:
            self.close()
            self.world.merge(data.draw(st.sampled_from(ready)))

    @rule(data=st.data())
    def merge_too_early_or_without_some(self, data):
        parent = data.draw(st.sampled_from([None, *self.world.live]))
        children = self.world.children.get(parent, [])
        if parent is None or (len(children) < 2 and not any(self.world.children[c] for c in children)):
            return
        chosen = children if any(self.world.children[c] for c in children) else children[1:]
        with pytest.raises(BranchError, match="merge: expected"):
            self.cache.merge(parent, chosen)

    @precondition(lambda self: len(self.world.live) > 5)
    @rule(data=st.data())
    def free(self, data):
        branch = data.draw(st.sampled_from(list(self.world.live)))
        self.close()
        self.world.free(branch)

    @precondition(lambda self: len(self.world.live) > 4)
    @rule(data=st.data())
    def evict(self, data):
        branch = data.draw(st.sampled_from(list(self.world.live)))
        self.close()
        self.world.evict(branch)

    @precondition(lambda self: self.handles())
    @rule(data=st.data(), count=st.integers(0, 4))
    def truncate(self, data, count):
        branch = data.draw(st.sampled_from(self.handles()))
        node = self.cache._state(branch).tail
        held = self.open
        self.close()  # its rows stand in nobody's way
        if not self.world.may_grow(branch) or count > node.length:
            if held is not None:
                self.cache.rollback(held)
            with pytest.raises(BranchError, match="truncate: expected"):
                self.cache.truncate(branch, count)
            return
        self.world.truncate(branch, count)

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), reserve=st.integers(1, 5), count=st.integers(1, 7))
    def plan_ahead(self, data, reserve, count):
        """Steps that follow one another in reserved pages, and the error when those are used up."""
        leaves = [b for b in self.world.live if self.world.may_grow(b)]
        chosen = data.draw(st.lists(st.sampled_from(leaves), max_size=4, unique=True)) if leaves else []
        entries = [(branch, 1) for branch in chosen]
        if self.open is not None:
            self.cache.rollback(self.open)
            self.close()
        if not chosen or not self.allowed(entries):
            return
        if self.pages_needed([(b, 1 + reserve) for b in chosen]) > self.cache.num_free_pages:
            with pytest.raises(OutOfPages):
                self.cache.plan(entries, reserve)
            return
        step = self.world.write(entries, reserve=reserve)
        if step.ahead is None:  # some branch sees what another one adds
            with pytest.raises(ValueError, match="advance: expected a step with one token"):
                self.cache.advance(step)
            count = 0
        for done in range(count):
            if done == reserve:
                with pytest.raises(OutOfPages, match="advance: expected tokens in reserve"):
                    self.cache.advance(step)
                break
            stale, step = step, self.world.advance(step)
            self.stale.append(stale)
            self.cache.check()
        if data.draw(st.booleans()):
            self.world.commit(step)
        else:
            self.world.rollback(step)
        self.stale.append(step)

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), commit=st.booleans())
    def plan(self, data, commit):
        """Any handles in any order: what may grow is decided by the reference, entry by entry."""
        chosen = data.draw(st.lists(st.sampled_from(self.handles()), min_size=1, max_size=5, unique=True))
        self.try_plan([(branch, data.draw(st.integers(1, 5))) for branch in chosen], commit)

    @rule(counts=st.lists(st.integers(1, 4), min_size=12, max_size=12))
    def grow_every_leaf(self, counts):
        entries = list(zip([b for b in self.world.live if not self.world.children[b]], counts, strict=False))
        if entries:
            self.try_plan(entries, commit=True)

    @precondition(lambda self: 0 < len(self.world.live) < 10)
    @rule(data=st.data(), counts=st.lists(st.integers(1, 4), min_size=4, max_size=4))
    def fork_with_pending_tokens(self, data, counts):
        """One step: the parent's last tokens, then its fresh children's first."""
        leaves = [b for b in self.world.live if not self.world.children[b]]
        parent = data.draw(st.sampled_from(leaves))
        self.close()
        children = self.world.fork(parent, data.draw(st.integers(1, 3)))
        self.try_plan(list(zip([parent, *children], counts, strict=False)), commit=True)

    @rule(data=st.data(), counts=st.lists(st.integers(1, 4), min_size=12, max_size=12))
    def end_children_with_merged_parent(self, data, counts):
        """One step: the last tokens of some merged children, then their parent's first."""
        children = self.world.children
        ready = [b for b in self.world.live if children[b] and not any(children[c] for c in children[b])]
        if not ready:
            return
        self.close()
        parent = data.draw(st.sampled_from(ready))
        ending = [child for child in children[parent] if data.draw(st.booleans())]
        self.world.merge(parent)
        ending = [child for child in ending if child in self.world.merged]
        self.try_plan(list(zip([*ending, parent], counts, strict=False)), commit=data.draw(st.booleans()))

    def try_plan(self, entries, commit):
        held, self.open = self.open, None
        if held is not None:
            self.world.forget(held)
        if not self.allowed(entries):
            with pytest.raises(BranchError, match="nothing after it"):
                self.cache.plan(entries)
        elif self.pages_needed(entries) > self.cache.num_free_pages + reserved(held):
            with pytest.raises(OutOfPages):
                self.cache.plan(entries)
        else:
            if held is not None:
                self.stale.append(held)
            self.open = self.world.write(entries)
            if commit:
                self.world.commit(self.open)
                self.close(commit=True)
            return
        if held is not None:  # nothing changed: it is still open
            self.open = held
            for (branch, count), row in zip(held.entries, held.row_offsets, strict=True):
                slots = held.slots[row : row + count]
                keys, values = (cache[0].flatten(0, 1)[slots] for cache in (self.cache.k, self.cache.v))
                self.world.mirror(branch).append(keys, values)

    def allowed(self, entries) -> bool:
        """Writes the entries into the reference one by one while it says that they may grow, then undoes it."""
        undo = []
        for branch, count in entries:
            mirror = self.world.mirror(branch)
            if not may_grow(mirror) or not self.world.may_grow(branch):
                break
            mirror.append(torch.zeros(count, 1, 2), torch.zeros(count, 1, 2))
            undo.append((mirror, count))
        for mirror, count in reversed(undo):
            end = len(mirror.items) - mirror.forked
            del mirror.items[end - count : end]
        return len(undo) == len(entries)

    def pages_needed(self, entries) -> int:
        size, tails = self.cache.page_size, [(self.cache._state(branch).tail, count) for branch, count in entries]
        return sum((tail.length + count + size - 1) // size - len(tail.pages) for tail, count in tails)

    @precondition(lambda self: self.open is not None)
    @rule(commit=st.booleans())
    def end_step(self, commit):
        if commit:
            self.world.commit(self.open)
        else:
            self.cache.rollback(self.open)
        self.close(commit=commit)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def use_a_stale_step(self, data):
        step = data.draw(st.sampled_from(self.stale))
        rows = torch.full((step.total_rows, 1, 2), -1.0)
        uses = (self.cache.commit, self.cache.rollback, lambda step: self.cache.append(0, rows, rows, step))
        with pytest.raises(StaleStep):
            data.draw(st.sampled_from(uses))(step)

    @precondition(lambda self: self.world.dead)
    @rule(data=st.data())
    def use_a_dead_handle(self, data):
        branch = data.draw(st.sampled_from(self.world.dead))
        uses = (lambda b: self.cache.plan([(b, 1)]), lambda b: self.cache.fork(b, 1), self.cache.free)
        with pytest.raises(BranchError, match="expected a live branch"):
            data.draw(st.sampled_from(uses))(branch)

    @invariant()
    def same_as_the_reference(self):
        if not hasattr(self, "world"):
            return
        open_step = self.open
        if open_step is not None:
            self.cache.check()  # the reference holds the open step's rows already; the cache does not
            return
        self.world.check()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        for branch in list(self.world.live):
            self.cache.free(branch)
            self.cache.check()
        assert self.cache.num_free_pages == self.cache.num_pages
        assert not self.cache._nodes and not self.cache._branches and self.cache._open is None


def reserved(step) -> int:
    return sum(len(planned.pages) for planned in step.planned) if step is not None else 0


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(settings.get_profile("ci"), max_examples=130, stateful_step_count=50)
