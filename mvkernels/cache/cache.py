"""PagedKVCache: keys and values of branches that fork and merge, in pages, without ever moving a byte of them.

Storage: k[layer], v[layer]: [num_pages, page_size, num_kv_heads, head_dim]. A branch is a list of nodes (nodes.py):

    fork(b, n)          n children that see all of b, each with an empty node of its own
    merge(b, children)  b sees the children's nodes too, and goes on in a new empty node; its next position is the
                        highest next position among the children (arXiv 2506.09991, section 4.2)
    fork_at(b, n)       a branch of its own that sees the first n tokens of what b sees
    truncate, free, evict   take back last tokens, a branch, a branch with its descendants
    plan .. commit      a step: new tokens of any branches, one row each; nothing changes before commit

Growing. A node may grow as long as every node that sees it whole is empty. So a parent may still add tokens after a
fork (the children start after them), and merged children may after the merge (their parent starts after them), also
within one step, where entries count in the order in which they are planned. With the first token of the parent after
a merge, the handles of the merged children are dead.

The device has the same page lists in tables (`cache.device`), which are brought up to the tree when a step is planned.

One step is open at a time. Planning another, and changing the tree by fork, merge or free, discards it: its pages
return to the free ones, and its use raises StaleStep. So a step that is abandoned on an error leaks nothing.
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
    """See the module's docstring. Methods raise the types of `mvkernels.errors`, and then nothing has changed.

    num_pages, page_size   capacity in tokens is their product; a page is owned by one node only
    num_layers, num_kv_heads, head_dim, dtype, device   of the stored keys and values; memory is not initialised
    device_tables   whether to keep the page lists on the device, for its kernels; None: where that is a GPU. The
                    attribute of this name is the `DeviceTables`, or None
    table_size      (rows, entries of each) of those tables: branches that own tokens, and pages of one branch with all
                    that was merged into it; 8 bytes an entry. None: `kv_device.default_size`, at most 16 MiB. What does
                    not fit works as well, but page lists are uploaded at every step
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
        self._made = 0  # handles and nodes are numbered from one counter, and a number never comes back

    def __repr__(self) -> str:
        pages = f"{self.num_pages} pages of {self.page_size} tokens, {self.num_free_pages} free"
        return f"PagedKVCache({pages}, {len(self._branches)} branches, {self.num_layers} layers, {self.device})"

    # -- the tree ------------------------------------------------------------------------------------------------

    def new(self) -> Branch:
        """An empty branch that sees nothing, with next position 0. Does not disturb an open step."""
        return self._make_branch(None, (), None)

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """`count` >= 1 children that see all of `branch`, each with an empty node of its own.

        A branch that has children already may be forked again; all of its children are then merged together.
        Raises BranchError when the branch is gone or merged, ValueError when count < 1.
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
        """A branch that sees the first `num_tokens` tokens of what `branch` sees, whatever comes later. No key or value
        moves. It is no child of `branch`, which grows, merges and ends as before; only those that `branch` was forked
        from may not grow as long as the tokens live that came behind their fork.

        The cut is at the end of a page of a node, or at the end of a node: where its branch forked or merged, was cut
        before, or ends now. It goes through no merged block, but may lie behind one whose join has a token. What
        `branch` wrote since its last fork or merge, as `truncate` has it, begins behind the cut from now on. Raises
        BranchError for a cut elsewhere, and when the branch is gone or merged; ValueError for a number out of range.
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
            self.device_tables.rows.split(cut.link.node, front)
        return self._cut_off(cut.link.before, (front,))

    def merge(self, parent: Branch, children: Sequence[Branch]) -> None:
        """Joins all children of `parent` into it: page lists are concatenated, and no key or value moves.

        `children` in any order; their order is that of the parent's new list. Until the parent's next token the
        handles of the children accept tokens, which end their paths; they need no free. Raises BranchError unless
        `children` are all live children of `parent`, once each, and have no live children themselves.
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
            self.device_tables.rows.merged(before.node, tails, state.tail)
        state.children.clear()
        for child, tail in zip(joined, tails, strict=True):
            child.merged, child.parent = True, None
            if tail.frozen:  # by tokens of branches that outlived their parent: the handle can take no more
                self._forget_merged(tail)
        for head in (before, *(child.head for child in joined)):
            self._release(head)

    def free(self, branch: Branch) -> None:
        """Gives a branch up; pages that no other branch sees return at once. Its children live on, on their own.

        Raises BranchError when the branch is gone already, or was merged: its pages are its parent's.
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
        """Reserves slots for new tokens: (branch, number of tokens >= 1) each, no branch twice.

        reserve: sets pages aside for that many further tokens of each branch, one a step: see `advance`. tensors: False
        where a CUDA graph has positions and slots of its own: the step's stay on the host, and do not advance. Raises
        OutOfPages when they do not all fit, and BranchError when a branch is gone or may not grow, be it by a token
        that was committed after it or by an earlier entry of this step; ValueError for a bad number of tokens.
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
            for link in node.links:  # as `node.frozen`, but generators would take longer than the loop
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
        except BaseException:  # of the device: its memory may be full
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
        """Writes the keys and values of a step's rows, [total_rows, num_kv_heads, head_dim], into their slots.

        backend: "auto", "cpu", "triton" or "reference". rope: rotates the keys by the step's positions on the way, for
        callers that have not. Raises StaleStep, ValueError for a wrong layer, shape, dtype or device, and BackendError.
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
        """The tokens of a step become part of their branches. Raises StaleStep."""
        self._require_open(step)
        for planned in step.planned:
            spare = self._grow(planned)
            if spare:
                self._free.give_back(spare)
            if self.device_tables is not None and (spare or step.index):
                self.device_tables.rows.changed(planned.node)
        self._open, step.state.closed = None, "committed"

    def advance(self, step: Step, tensors: bool = True) -> Step:
        """Commits a step and opens the next one, with one more token of each of its branches, in reserved pages.

        The next step has the same tensors with the values of the next tokens, and what was derived for the kernels of a
        GPU stays on it: nothing is planned or copied there anew. The entries must have one token each, of branches that
        do not see one another's. tensors: False where a CUDA graph has advanced them already. Raises StaleStep,
        ValueError when the step cannot be advanced, and OutOfPages when what `plan` reserved is used up.
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
        for planned in step.planned:  # those of the next step from here on
            node = planned.node
            if 0 < node.length < len(node.pages) * size:  # nearly always: no page is begun
                node.length += 1
            else:
                planned.pages = self._grow(planned)
            planned.base += 1
        step.state.closed = "advanced"
        self._open = next_step(step)
        return self._open

    def rollback(self, step: Step) -> None:
        """Gives up a step and the slots reserved for it. Raises StaleStep."""
        self._require_open(step)
        self._discard("rolled back")

    def truncate(self, branch: Branch, num_tokens: int) -> None:
        """Takes back the last `num_tokens` tokens of a branch, which must be its own: written since its last fork or
        merge, and seen by no other token. Raises BranchError, or ValueError for a bad number.
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
            self.device_tables.rows.changed(node)
        if node.length == 0:
            node.start = None
            tokens_vanish(node)

    def evict(self, branch: Branch) -> int:
        """Frees a branch with all that was forked from it and not freed since; returns how many pages that gave back.

        What a scheduler does with a request that has to wait. Raises BranchError when the branch is gone or merged.
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

    # -- figures -------------------------------------------------------------------------------------------------

    @property
    def num_free_pages(self) -> int:
        """Pages that neither a branch owns nor the open step has reserved."""
        return len(self._free)

    @property
    def num_available_pages(self) -> int:
        """Pages that another step may take: the free ones, and what the open step has reserved."""
        return len(self._free) + self._reserved()

    @property
    def bytes_moved(self) -> int:
        """Bytes of keys and values that fork and merge ever copied: 0, for they have no access to the storage."""
        return 0

    def next_position(self, branch: Branch) -> int:
        """Position of the next token of a branch, before an open step. Raises BranchError."""
        tail = self._state(branch).tail
        return resolve_start(tail, {}, {}) + tail.length

    def num_tokens(self, branch: Branch) -> int:
        """Committed tokens that the next token of a branch will see. Raises BranchError."""
        count = 0
        link: Link | None = self._state(branch).head
        while link is not None and not link.after:
            count += link.node.length
            link = link.before
        fixed = contents_of(link, self.page_size)
        return count if fixed is None else count + fixed.tokens

    def check(self) -> None:
        """Recomputes every invariant from the branches and raises CacheError at the first that does not hold."""
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
                self.device_tables.rows.changed(p.node)

    def _grow(self, planned: PlannedNode) -> list[int]:
        """Adds the tokens of a plan to its node; returns the pages that are left of those set aside for it."""
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
        """The held link of a new empty node."""
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
        """A branch of its own behind a list that never changes any more."""
        if chain is not None:
            chain.fixed = True
        return self._make_branch(chain, predecessors, None)

    def _forget_merged(self, node: Node) -> None:
        """The node takes no more tokens: the merged handle that may write it, if any, is dead."""
        if node.writer is not None and self._branches[node.writer].merged:
            del self._branches[node.writer]
            node.writer = None

    def _release(self, head: Link) -> None:
        for node in release(head):
            self._free.give_back(node.pages)
            del self._nodes[node.id]
            if self.device_tables is not None:
                self.device_tables.rows.died(node)
            self._forget_merged(node)
            if node.length:
                tokens_vanish(node)
