"""The branches of a cache as a tree of nodes that own pages: fork, merge, cut, truncate, free. No tensors.

    fork(b, n)          n children that see all of b, each with an empty node of its own
    merge(b, children)  b sees the children's nodes too, and continues in a new empty node; its next position is the
                        highest next position of the children (arXiv 2506.09991, section 4.2)
    fork_at(b, n)       an independent branch that sees the first n tokens of what b sees
    truncate, free, evict   drop the last tokens, a branch, a branch with its descendants

Growth. A node can grow while every node that sees it whole is empty. So a parent can grow after a fork (the children
start after its tokens), and merged children can grow after the merge (their parent starts after their tokens). That
also holds within one step, where entries count in the order in which they are planned. The first token of the parent
after a merge invalidates the handles of the merged children.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mvkernels.cache.check import check_cache
from mvkernels.cache.device import DeviceTables
from mvkernels.cache.free_pages import FreePages
from mvkernels.cache.nodes import (
    BranchEntry,
    Link,
    Node,
    contents_of,
    hold,
    make_link,
    release,
    resolve_start,
    suffix,
    tokens_vanish,
)
from mvkernels.cache.split import find_cut, split
from mvkernels.cache.step import Branch, PlannedNode, Step
from mvkernels.errors import BranchError, require_integer, require_type


class BranchTree:
    """The host side of `PagedKVCache`: branches, their nodes, the pages of these, and the open step."""

    # Of the storage: what a handle's cache has (`BranchStore`).
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.device_tables: DeviceTables | None = None
        self._free = FreePages(num_pages)
        self._nodes: dict[int, Node] = {}
        self._branches: dict[int, BranchEntry] = {}
        self._open: Step | None = None
        self._made = 0  # one counter numbers handles and nodes; a number is never reused

    def new(self) -> Branch:
        """Make an empty branch that sees nothing, with next position 0; an open step stays open.

        Returns:
            The handle of the branch.
        """
        return self._make_branch(None, (), None)

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """Fork a branch into children that see all of it, each with an empty node of its own.

        A branch that has children already can be forked again; all its children are then merged together.

        Args:
            branch: The parent.
            count: Number of children, at least 1.

        Returns:
            The handles of the children.

        Raises:
            BranchError: The branch was freed or merged.
            ValueError: `count` is no integer of at least 1.
        """
        state = self._state(branch)
        if state.merged:
            raise BranchError(f"fork: expected a branch that was not merged, got merged branch {branch.id}")
        require_integer("fork: expected an integer count", count)
        if count < 1:
            raise ValueError(f"fork: expected a count of at least 1, got {count}")
        self._discard("discarded by a fork")
        children = [self._make_branch(state.head, (state.tail,), state.id) for _ in range(count)]
        state.children.extend(child.id for child in children)
        return children

    def fork_at(self, branch: Branch, num_tokens: int) -> Branch:
        """Make an independent branch that sees the first tokens of what another branch sees (prefix caching).

        No key or value moves. The new branch is no child of `branch`, which grows, merges and is freed as before.
        Ancestors of `branch` cannot grow while tokens behind their fork are alive.

        The cut must be at the end of a page of a node, or at the end of a node: where its branch forked, merged, was
        cut before, or ends now. It cannot be inside a merged block, but can be behind one whose join has a token.
        `branch` can afterwards `truncate` only its tokens behind the cut.

        Args:
            branch: The branch to read the prefix of.
            num_tokens: Length of the prefix, 0 .. `branch.num_tokens`.

        Returns:
            The handle of the new branch.

        Raises:
            BranchError: The cut is elsewhere, or the branch was freed or merged.
            ValueError: `num_tokens` is out of range.
        """
        state = self._state(branch)
        if state.merged:
            raise BranchError(f"fork_at: expected a branch that was not merged, got merged branch {branch.id}")
        require_integer("fork_at: expected an integer number of tokens", num_tokens)
        seen = self.num_tokens(branch)
        if not 0 <= num_tokens <= seen:
            raise ValueError(f"fork_at: expected 0 to {seen} tokens, which branch {branch.id} sees, got {num_tokens}")
        cut = find_cut(state.head, seen - num_tokens, self.page_size)
        self._discard("discarded by a fork")
        if cut.after is not None:
            return self._cut_off(cut.after.before, cut.after.node.predecessors)
        if cut.link is None:
            return self.new()
        self._made += 1
        front = split(cut.link.node, cut.tokens, self._made, self.page_size)
        self._nodes[front.id] = front
        if self.device_tables is not None:
            self.device_tables.split(cut.link.node, front)
        return self._cut_off(cut.link.before, (front,))

    def merge(self, parent: Branch, children: Sequence[Branch]) -> None:
        """Merge all children of a branch into it by concatenating page tables; no key or value moves.

        The handles of the children accept tokens, which end their paths, until the next token of the parent. They need
        no `free`.

        Args:
            parent: The branch that was forked.
            children: All its live children, once each, in the order in which the parent lists their pages.

        Raises:
            BranchError: `children` are not the live children of `parent`, or one of them has live children itself.

        Source: arXiv 2506.09991, section 4.2.
        """
        state = self._state(parent)
        joined = [self._state(child) for child in children]
        got = [child.id for child in joined]
        if not state.children or sorted(got) != sorted(state.children):
            raise BranchError(f"merge: expected all children of branch {state.id}: {state.children}, got {got}")
        for child in joined:
            if child.children:
                raise BranchError(
                    f"merge: expected children without live children, got {child.id} with {child.children}"
                )
        self._discard("discarded by a merge")
        before = last = state.head
        for child in joined:
            for node in suffix(child.head, before):
                last = make_link(node, last)
        tails = tuple(child.tail for child in joined)
        before.node.writer = None
        state.head = self._make_tail(last, tails, state.id, forked=False)
        if self.device_tables is not None:
            self.device_tables.merged(before.node, tails, state.tail)
        state.children.clear()
        for child, tail in zip(joined, tails, strict=True):
            child.merged, child.parent = True, None
            if tail.frozen:  # by tokens of branches that outlived their parent: the handle cannot grow any more
                self._forget_merged(tail)
        for head in (before, *(child.head for child in joined)):
            self._release(head)

    def truncate(self, branch: Branch, num_tokens: int) -> None:
        """Drop the last tokens of a branch.

        Args:
            branch: A branch whose last `num_tokens` tokens were written since its last fork or merge and are seen by no
                other token.
            num_tokens: Number of tokens, at least 0.

        Raises:
            BranchError: The branch was freed, or these tokens are not its own.
            ValueError: `num_tokens` is negative or no integer.
        """
        node = self._state(branch).tail
        require_integer("truncate: expected an integer number of tokens", num_tokens)
        if num_tokens < 0:
            raise ValueError(f"truncate: expected a number of tokens of at least 0, got {num_tokens}")
        if node.frozen or num_tokens > node.length:
            got = "tokens after them" if node.frozen else f"{node.length} since its last fork or merge"
            raise BranchError(f"truncate: expected {num_tokens} last tokens of branch {branch.id}'s own, got {got}")
        self._discard("discarded by a truncation")
        if num_tokens == 0:
            return
        node.length -= num_tokens
        node.forget()
        kept = -(-node.length // self.page_size)
        self._free.give_back(node.pages[kept:])
        del node.pages[kept:]
        if self.device_tables is not None:
            self.device_tables.changed(node)
        if node.length == 0:
            node.start = None
            tokens_vanish(node)

    def free(self, branch: Branch) -> None:
        """Free a branch; pages that no other branch sees are free at once.

        Its children stay alive as independent branches.

        Args:
            branch: The branch to free.

        Raises:
            BranchError: The branch was freed already, or merged: then its pages are its parent's.
        """
        state = self._state(branch)
        if state.merged:
            raise BranchError(f"free: expected a branch that owns its pages, got merged branch {branch.id}")
        self._discard("discarded by a free")
        if state.parent is not None:
            self._branches[state.parent].children.remove(state.id)
        for child in state.children:
            self._branches[child].parent = None
        del self._branches[state.id]
        state.tail.writer = None
        self._release(state.head)

    def evict(self, branch: Branch) -> int:
        """Free a branch with all its live descendants (preemption of a request).

        Args:
            branch: The root of the subtree.

        Returns:
            Number of pages that became free.

        Raises:
            BranchError: The branch was freed or merged.
        """
        state = self._state(branch)
        if state.merged:
            raise BranchError(f"evict: expected a branch that owns its pages, got merged branch {branch.id}")
        before = self.num_free_pages + self._reserved()
        going = [state]
        for descendant in going:
            going.extend(self._branches[child] for child in descendant.children)
        for descendant in reversed(going):
            self.free(Branch(self, descendant.id))
        return self.num_free_pages - before

    # -- queries -------------------------------------------------------------------------------------------------

    @property
    def num_free_pages(self) -> int:
        """Pages that no branch owns and the open step has not reserved."""
        return len(self._free)

    @property
    def num_available_pages(self) -> int:
        """Pages that another step can use: the free pages, and those that the open step has reserved."""
        return len(self._free) + self._reserved()

    def next_position(self, branch: Branch) -> int:
        """Return the position of the next token of a branch, tokens of an open step not counted.

        Args:
            branch: A live branch.

        Returns:
            The position, from 0.

        Raises:
            BranchError: The branch was freed.
        """
        tail = self._state(branch).tail
        return resolve_start(tail, {}, {}) + tail.length

    def num_tokens(self, branch: Branch) -> int:
        """Count the committed tokens that the next token of a branch will see.

        Args:
            branch: A live branch.

        Returns:
            The number of tokens.

        Raises:
            BranchError: The branch was freed.
        """
        count = 0
        link: Link | None = self._state(branch).head
        while link is not None and not link.after:
            count += link.node.length
            link = link.before
        fixed = contents_of(link, self.page_size)
        return count if fixed is None else count + fixed.tokens

    def check(self) -> None:
        """Recompute every invariant of the tree from its branches, for tests and debugging.

        Raises:
            CacheError: The first invariant that does not hold.
        """
        reserved = [page for planned in self._open.planned for page in planned.pages] if self._open else []
        check_cache(self._branches, self._nodes, self._free.pages(), reserved, self.num_pages, self.page_size)

    # -- inside --------------------------------------------------------------------------------------------------

    def _state(self, branch: Branch) -> BranchEntry:
        require_type(Branch, branch=branch)
        if branch.cache is not self:
            raise BranchError(f"expected a branch of this cache, got {branch!r} of another")
        if branch.id not in self._branches:
            raise BranchError(f"expected a live branch, got {branch.id}, which was freed, or merged and passed by")
        return self._branches[branch.id]

    def _reserved(self) -> int:
        return self._open.reserved_pages if self._open else 0

    def _discard(self, why: str) -> None:
        if self._open is not None:
            self._take_back(self._open.planned)
            self._open.state.closed = why
            self._open = None

    def _take_back(self, planned: Sequence[PlannedNode]) -> None:
        for p in planned:
            if p.pages:
                self._free.give_back(p.pages)
            if self.device_tables is not None:
                self.device_tables.changed(p.node)

    def _make_tail(self, chain: Link | None, predecessors: tuple[Node, ...], writer: int, forked: bool) -> Link:
        """Make the held link of a new empty node."""
        self._made += 1
        node = Node(self._made, chain, predecessors, writer=writer)
        self._nodes[node.id] = node
        head = make_link(node, chain, forked)
        hold(head)
        return head

    def _make_branch(self, chain: Link | None, predecessors: tuple[Node, ...], parent: int | None) -> Branch:
        number = self._made + 1
        tail = self._make_tail(chain, predecessors, number, forked=True)
        self._branches[number] = BranchEntry(number, tail, parent)
        return Branch(self, number)

    def _cut_off(self, chain: Link | None, predecessors: tuple[Node, ...]) -> Branch:
        """Make an independent branch behind a list that does not change any more."""
        if chain is not None:
            chain.fixed = True
        return self._make_branch(chain, predecessors, None)

    def _forget_merged(self, node: Node) -> None:
        """Delete the merged handle that writes to a node, if any, because the node takes no more tokens."""
        if node.writer is not None and self._branches[node.writer].merged:
            del self._branches[node.writer]
            node.writer = None

    def _release(self, head: Link) -> None:
        for node in release(head):
            self._free.give_back(node.pages)
            del self._nodes[node.id]
            self._forget_merged(node)
            if node.length:
                tokens_vanish(node)
