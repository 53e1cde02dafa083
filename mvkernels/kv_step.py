"""A step of the paged cache: the new tokens of some branches, with the slots reserved for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from mvkernels.errors import StaleStep
from mvkernels.ops.decode_tasks import EntryView, NodeView, StepViews

if TYPE_CHECKING:
    from mvkernels.kv_cache import PagedKVCache
    from mvkernels.kv_nodes import Node


@dataclass(frozen=True, eq=False)
class Branch:
    """Handle of a branch, made by `PagedKVCache.new` and `fork`. Two handles are equal when they are the same one."""

    cache: PagedKVCache = field(repr=False)
    id: int

    @property
    def next_position(self) -> int:
        """Position of the next token. Raises BranchError when the branch is gone."""
        return self.cache.next_position(self)

    @property
    def num_tokens(self) -> int:
        """Number of committed tokens that the next token will see. Raises BranchError when the branch is gone."""
        return self.cache.num_tokens(self)


@dataclass(frozen=True, eq=False)
class PlannedNode:
    """What committing an entry does to its node. `pages` are reserved for it and appended to the node's."""

    node: Node
    start: int
    base: int
    num_tokens: int
    pages: list[int]


@dataclass(eq=False)
class StepState:
    """Why a step may no longer be used, or None while it may."""

    closed: str | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """New tokens of some branches, one row each; the rows of an entry are consecutive.

    total_rows        N
    entries           (branch, number of tokens), in the order of `plan`
    row_offsets       first row of each entry
    positions [N]     int32, position of each row
    slots [N]         int64, page * page_size + offset, where `append` writes the row
    views             what each entry sees (`ops.decode_tasks`), shared by all layers
    """

    total_rows: int
    entries: tuple[tuple[Branch, int], ...]
    row_offsets: tuple[int, ...]
    positions: torch.Tensor
    slots: torch.Tensor
    views: StepViews = field(repr=False)
    planned: tuple[PlannedNode, ...] = field(repr=False)
    state: StepState = field(repr=False)

    @cached_property
    def longest_context(self) -> int:
        """The most tokens that any row sees, itself included."""
        return max(sum(node.length for node in (*view.whole, view.own)) for view in self.views.entries)

    def require_open(self) -> None:
        """Raise StaleStep unless the step was neither committed nor rolled back, and its tree is unchanged."""
        if self.state.closed is not None:
            raise StaleStep(f"expected an open step, got one that was {self.state.closed}")


def make_step(
    entries: tuple[tuple[Branch, int], ...],
    planned: Sequence[PlannedNode],
    page_size: int,
    device: torch.device,
) -> Step:
    """The open step that commits `planned`, entry by entry. Reads the nodes as they are now, and changes none."""
    grown = {p.node: NodeView(_pages_after(p), p.base + p.num_tokens) for p in planned}
    nodes = dict(grown)
    lists: dict[int, tuple[NodeView, ...]] = {}
    views, positions, slots, row_offsets, row = [], [], [], [], 0
    for p in planned:
        visible = p.node.visible
        if id(visible) not in lists:  # siblings share one tuple
            for node in visible:
                if node not in nodes:
                    nodes[node] = NodeView(node.page_array(), node.length)
            lists[id(visible)] = tuple(nodes[node] for node in visible)
        views.append(EntryView(row, p.num_tokens, grown[p.node], lists[id(visible)]))
        tokens = np.arange(p.base, p.base + p.num_tokens, dtype=np.int64)
        positions.append(p.start + tokens)
        pages = grown[p.node].pages[tokens // page_size].astype(np.int64)
        slots.append(pages * page_size + tokens % page_size)
        row_offsets.append(row)
        row += p.num_tokens
    return Step(
        total_rows=row,
        entries=entries,
        row_offsets=tuple(row_offsets),
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int32)).to(device),
        slots=torch.from_numpy(np.concatenate(slots)).to(device),
        views=StepViews(tuple(views), page_size, row),
        planned=tuple(planned),
        state=StepState(),
    )


def _pages_after(planned: PlannedNode) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    own = planned.node.page_array()
    return np.concatenate([own, np.array(planned.pages, dtype=np.int32)]) if planned.pages else own
