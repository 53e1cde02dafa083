"""Paged KV cache of branches that fork and merge without copying keys or values: `PagedKVCache`.

Storage: k[layer], v[layer]: [num_pages, page_size, num_kv_heads, head_dim]. Which branch sees which pages is the host's
matter (`tree.py`, `nodes.py`); the device holds the same page tables (`device.py`), updated when a step is planned. A
step has new tokens of any branches, one row each; nothing changes before `commit`.

One step is open at a time. Another plan, and any change of the tree by fork, merge or free, discards it: its pages are
free again, and its use raises StaleStep. So a step that is abandoned after an error leaks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mvkernels.cache.device import DeviceTables, default_size
from mvkernels.cache.nodes import Link, Node, resolve_start, tokens_appear
from mvkernels.cache.step import Branch, PlannedNode, Step, make_step, next_step, require_pairs
from mvkernels.cache.tree import BranchTree
from mvkernels.errors import BranchError, OutOfPages, StaleStep, require_integer, require_type
from mvkernels.ops.decode.append import append_rows
from mvkernels.ops.device import checked_device
from mvkernels.rope import Rope, rotate


class PagedKVCache(BranchTree):
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
        super().__init__(num_pages, page_size)
        self.num_layers = num_layers
        self.num_kv_heads, self.head_dim, self.dtype = num_kv_heads, head_dim, dtype
        self.k = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers))
        self.v = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers))
        self.device = self.k[0].device
        if self.device.type == "cuda" if device_tables is None else device_tables:
            self.device_tables = DeviceTables(*(table_size or default_size(num_pages)), page_size, self.device)

    def __repr__(self) -> str:
        pages = f"{self.num_pages} pages of {self.page_size} tokens, {self.num_free_pages} free"
        return f"PagedKVCache({pages}, {len(self._branches)} branches, {self.num_layers} layers, {self.device})"

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
            self._open = make_step(tuple(entries), planned, self.page_size, device, reserve, self.device_tables)
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

    @property
    def bytes_moved(self) -> int:
        """Bytes of keys and values copied by fork and merge: always 0, because they cannot access the storage."""
        return 0

    def _require_open(self, step: Step) -> None:
        require_type(Step, "Step of PagedKVCache.plan", step=step)
        step.require_open()
        if self._open is None or step.state is not self._open.state:
            raise StaleStep("expected a step of this cache, got one of another")

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
