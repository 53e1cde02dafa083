"""Paged KV cache of branches that fork and merge without copying keys or values: `PagedKVCache`.

Storage: k[layer], v[layer]: [num_pages, page_size, num_kv_heads, head_dim]. A branch is a list of nodes (`nodes.py`); a
node owns its pages:

    fork(b, n)          n children that see all of b, each with an empty node of its own
    merge(b, children)  b sees the children's nodes too, and continues in a new empty node; its next position is the
                        highest next position of the children (arXiv 2506.09991, section 4.2)
    fork_at(b, n)       an independent branch that sees the first n tokens of what b sees
    truncate, free, evict   drop the last tokens, a branch, a branch with its descendants
    plan .. commit      a step: new tokens of any branches, one row each; nothing changes before commit

Growth. A node can grow while every node that sees it whole is empty. So a parent can grow after a fork (the children
start after its tokens), and merged children can grow after the merge (their parent starts after their tokens). That
also holds within one step, where entries count in the order in which they are planned. The first token of the parent
after a merge invalidates the handles of the merged children.

The device holds the same page tables (`cache.device`); they are updated when a step is planned.

One step is open at a time. Another plan, and any change of the tree by fork, merge or free, discards it: its pages are
free again, and its use raises StaleStep. So a step that is abandoned after an error leaks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mvkernels.cache.check import check_cache
from mvkernels.cache.device import DeviceTables, default_size
from mvkernels.cache.free_pages import FreePages
from mvkernels.cache.nodes import (
    BranchState,
    Link,
    Node,
    contents_of,
    hold,
    make_link,
    release,
    resolve_start,
    suffix,
    tokens_appear,
    tokens_vanish,
)
from mvkernels.cache.split import find_cut, split
from mvkernels.cache.step import Branch, PlannedNode, Step, make_step, next_step, require_pairs
from mvkernels.errors import BranchError, OutOfPages, StaleStep, require_integer, require_type
from mvkernels.ops.decode.append import append_rows
from mvkernels.ops.device import checked_device
from mvkernels.rope import Rope, rotate


class PagedKVCache:
    """Paged KV cache of branches that fork and merge without copying keys or values.

    Nothing has changed after a method raised an error. Every method that takes a branch raises BranchError for a branch
    of another cache, and ValueError for an object that is no `Branch`. The memory of keys and values is not
    initialised.

    Args:
        num_pages: Number of pages. A page is owned by one node; capacity in tokens is num_pages * page_size, below
            2**31.
        page_size: Tokens of a page.
        num_layers: Layers of the model.
        num_kv_heads: Key-value heads, Hkv.
        head_dim: Dimensions of a head, D.
        dtype: Floating-point dtype of keys and values.
        device: Device of keys and values.
        device_tables: Whether to keep the page tables on the device for its kernels; None: on a GPU only.
        table_size: (rows, entries per row) of these tables: branches that own tokens, and pages of one branch with all
            that was merged into it; 8 bytes per entry. None: `cache.device.default_size`, at most 16 MiB. A larger tree
            still works, but uploads its page tables at every step.

    Attributes:
        k: For each layer, keys [num_pages, page_size, Hkv, D].
        v: For each layer, values [num_pages, page_size, Hkv, D].
        device_tables: The page tables on the device, or None.

    Raises:
        ValueError: A size is out of range, `dtype` is no floating-point dtype, or PyTorch does not have the device
            here.

    Source: arXiv 2506.09991, section 4.2.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        device_tables: bool | None = None,
        table_size: tuple[int, int] | None = None,
    ) -> None:
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        expected = "expected num_pages, page_size, num_layers, num_kv_heads and head_dim as integers"
        require_integer(expected, num_layers, *shape)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating torch.dtype, got {dtype!r}")
        device = checked_device(device)
        if min(num_layers, *shape) < 1:
            raise ValueError(
                "expected num_pages, page_size, num_layers, num_kv_heads and head_dim of at least 1, "
                f"got {num_pages}, {page_size}, {num_layers}, {num_kv_heads} and {head_dim}"
            )
        if num_pages * page_size >= 2**31:
            raise ValueError(f"expected fewer than 2**31 tokens of capacity, got {num_pages} pages of {page_size}")
        self.num_pages, self.page_size, self.num_layers = num_pages, page_size, num_layers
        self.num_kv_heads, self.head_dim, self.dtype = num_kv_heads, head_dim, dtype
        self.k = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers))
        self.v = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers))
        self.device = self.k[0].device
        self.device_tables: DeviceTables | None = None
        if self.device.type == "cuda" if device_tables is None else device_tables:
            self.device_tables = DeviceTables(*(table_size or default_size(num_pages)), page_size, self.device)
        self._free = FreePages(num_pages)
        self._nodes: dict[int, Node] = {}
        self._branches: dict[int, BranchState] = {}
        self._open: Step | None = None
        self._made = 0  # one counter numbers handles and nodes; a number is never reused

    def __repr__(self) -> str:
        pages = f"{self.num_pages} pages of {self.page_size} tokens, {self.num_free_pages} free"
        return f"PagedKVCache({pages}, {len(self._branches)} branches, {self.num_layers} layers, {self.device})"

    # -- the tree ------------------------------------------------------------------------------------------------

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

    # -- steps ---------------------------------------------------------------------------------------------------

    def plan(self, entries: Sequence[tuple[Branch, int]], reserve: int = 0, tensors: bool = True) -> Step:
        """Reserve slots for new tokens of some branches, and open a step.

        Any mix of prefill (several tokens) and decode (one token) is one step. An open step is discarded.

        Args:
            entries: (branch, number of tokens) pairs, each number at least 1, each branch once.
            reserve: Further tokens of each branch to set pages aside for, one per step: see `advance`.
            tensors: Put positions and slots on the cache's device. False where a CUDA graph has its own: then they stay
                on the host and do not advance.

        Returns:
            The open step.

        Raises:
            OutOfPages: The tokens do not all fit into the free pages.
            BranchError: A branch was freed, or cannot grow: tokens of another branch come after it, committed or in an
                earlier entry of this step.
            ValueError: A number is out of range, an entry is no pair, or a branch occurs twice.
        """
        if not entries:
            raise ValueError("plan: expected at least one entry, got none")
        require_pairs(entries, reserve)
        if reserve < 0:
            raise ValueError(f"plan: expected a reserve of at least 0 tokens, got {reserve}")
        starts: dict[Node, int] = {}
        lengths: dict[Node, int] = {}
        blocked: dict[Link, Branch] = {}
        for branch, count in entries:
            node = self._state(branch).tail
            if count < 1:
                raise ValueError(f"plan: expected at least 1 token for branch {branch.id}, got {count}")
            if node in lengths:
                raise ValueError(f"plan: expected each branch once, got branch {branch.id} twice")
            frozen = False
            earlier: Branch | None = None
            for link in node.links:  # as `node.frozen`; its generator would take longer than this loop
                frozen = frozen or link.after > 0
                earlier = earlier or blocked.get(link)
            if frozen or earlier is not None:
                by = "tokens after it" if earlier is None else f"branch {earlier.id} earlier in this step"
                raise BranchError(f"plan: expected a branch with nothing after it, got {branch.id}, followed by {by}")
            starts[node] = resolve_start(node, starts, lengths)
            lengths[node] = node.length + count
            above = node.chain
            while above is not None and not above.after and above not in blocked:
                blocked[above] = branch
                above = above.before
        wanted = [-(-(length + reserve) // self.page_size) - len(node.pages) for node, length in lengths.items()]
        free = len(self._free) + self._reserved()
        if sum(wanted) > free:
            raise OutOfPages(f"plan: expected at most {free} free pages to be needed, got {sum(wanted)}")
        self._discard("discarded by another plan")
        planned = tuple(
            PlannedNode(
                node, starts[node], node.length, lengths[node] - node.length,
                self._free.take(pages, node.pages[-1] if node.pages else None) if pages else [],
            )
            for node, pages in zip(lengths, wanted, strict=True)
        )  # fmt: skip
        try:
            device = self.device if tensors else torch.device("cpu")
            self._open = make_step(
                tuple(entries), planned, self.page_size, device, reserve, self.device_tables, advances=tensors
            )
        except BaseException:  # the memory of the device may be full
            self._take_back(planned)
            raise
        return self._open

    def append(
        self,
        layer: int,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        step: Step,
        backend: str = "auto",
        rope: Rope | None = None,
    ) -> None:
        """Write the keys and values of a step's rows into its slots, for one layer.

        Args:
            layer: The layer, 0 .. num_layers - 1.
            k_new: [step.total_rows, num_kv_heads, head_dim] keys.
            v_new: [step.total_rows, num_kv_heads, head_dim] values.
            step: The open step.
            backend: "auto", "cpu", "triton" or "reference".
            rope: Rotate the keys by `step.positions` in the same launch, for callers that have not rotated them.

        Raises:
            StaleStep: The step is not open, or is of another cache.
            ValueError: The layer, a shape, dtype or device does not fit, or `backend` is unknown.
            BackendError: The backend given by name cannot do this, or no backend of "auto" can.
        """
        self._require_open(step)
        require_type(torch.Tensor, k_new=k_new, v_new=v_new)
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"append: expected a layer of 0 .. {self.num_layers - 1}, got {layer}")
        rotation = None if rope is None else rope.at(step.positions)
        if rope is not None and backend == "reference":
            k_new, rotation = rotate(k_new, step.positions, rope, backend), None
        append_rows(self.k[layer], self.v[layer], k_new, v_new, step.slots, backend, rotation, step.spare)

    def commit(self, step: Step) -> None:
        """Add the tokens of a step to their branches, and close the step.

        Args:
            step: The open step.

        Raises:
            StaleStep: The step is not open, or is of another cache.
        """
        self._require_open(step)
        for planned in step.planned:
            spare = self._grow(planned)
            if spare:
                self._free.give_back(spare)
            if self.device_tables is not None and (spare or step.index):
                self.device_tables.changed(planned.node)
        self._open, step.state.closed = None, "committed"

    def advance(self, step: Step, tensors: bool = True) -> Step:
        """Commit a step and open the next one: one more token of each of its branches, in reserved pages.

        The next step has the same tensors, with the values of the next tokens. Data that GPU kernels derived from them
        stay on the device: nothing is planned or copied again.

        Args:
            step: The open step, planned with `reserve` and one token per entry, of branches that do not see each
                other's tokens.
            tensors: Advance the tensors of the step. False where a CUDA graph has advanced them already.

        Returns:
            The next step, open.

        Raises:
            StaleStep: The step is not open, or is of another cache.
            ValueError: The step was planned without a reserve, or with other entries.
            OutOfPages: The reserve is used up.
        """
        self._require_open(step)
        if step.ahead is None:
            expected = "one token for each of its branches, none of which sees another's, and a reserve"
            raise ValueError(f"advance: expected a step with {expected}, got entries {step.entries} planned otherwise")
        if step.index == len(step.ahead) - 1:
            raise OutOfPages(f"advance: expected tokens in reserve, got a step that used all {step.index}")
        if tensors:
            step.advance_tensors()
        size = self.page_size
        for planned in step.planned:  # they become those of the next step
            node = planned.node
            if 0 < node.length < len(node.pages) * size:  # nearly always: no new page
                node.length += 1
            else:
                planned.pages = self._grow(planned)
            planned.base += 1
        step.state.closed = "advanced"
        self._open = next_step(step)
        return self._open

    def rollback(self, step: Step) -> None:
        """Close a step without its tokens, and free the pages reserved for it.

        Args:
            step: The open step.

        Raises:
            StaleStep: The step is not open, or is of another cache.
        """
        self._require_open(step)
        self._discard("rolled back")

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

    @property
    def bytes_moved(self) -> int:
        """Bytes of keys and values copied by fork and merge: always 0, because they cannot access the storage."""
        return 0

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

    def _state(self, branch: Branch) -> BranchState:
        require_type(Branch, branch=branch)
        if branch.cache is not self:
            raise BranchError(f"expected a branch of this cache, got {branch!r} of another")
        if branch.id not in self._branches:
            raise BranchError(f"expected a live branch, got {branch.id}, which was freed, or merged and passed by")
        return self._branches[branch.id]

    def _require_open(self, step: Step) -> None:
        require_type(Step, "Step of PagedKVCache.plan", step=step)
        step.require_open()
        if self._open is None or step.state is not self._open.state:
            raise StaleStep("expected a step of this cache, got one of another")

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

    def _grow(self, planned: PlannedNode) -> list[int]:
        """Add the tokens of a plan to its node; returns the reserved pages that are left."""
        node = planned.node
        if node.length == 0:
            node.start = planned.start
            for seen in tokens_appear(node):
                self._forget_merged(seen)
        node.length += planned.num_tokens
        used = -(-node.length // self.page_size) - len(node.pages)
        if not used:
            return planned.pages
        node.pages.extend(planned.pages[:used])
        return planned.pages[used:]

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
        self._branches[number] = BranchState(number, tail, parent)
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
