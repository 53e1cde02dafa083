"""What the paged cache is made of: nodes, free pages, and the state behind a branch handle. Host side, no tensors.

The cache is a directed acyclic graph of nodes. A node is a run of tokens of one branch: it owns pages, of which only
the last may be ragged. A branch is a list of nodes that it sees whole, and a tail node of its own that it writes.

    visible        the nodes that every row of this node sees whole, oldest first; closed: what they see is among them
    predecessors   the nodes that end where this one starts: start = max(their ends), end = start + length
    refs           live branch handles whose list holds the node; at 0 its pages are free
    frozen         nodes with tokens that see this one whole: while there is any, this node may not grow

A node's start is open while it is empty, for its predecessors may still grow, and fixed by its first token.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mvkernels.errors import CacheError

Int32Array = npt.NDArray[np.int32]


@dataclass(eq=False)
class Node:
    """One run of tokens; the module's docstring has the legend."""

    id: int
    visible: tuple[Node, ...]
    predecessors: tuple[Node, ...]
    length: int = 0
    start: int | None = None
    pages: list[int] = field(default_factory=list)
    refs: int = 0
    frozen: int = 0
    # The handle of a merged branch whose tail this is: it may still write here until the node is frozen.
    merged_branch: int | None = None
    _page_array: Int32Array | None = None

    def page_array(self) -> Int32Array:
        """Own pages, [pages] int32; the same array until a page is added."""
        if self._page_array is None or len(self._page_array) != len(self.pages):
            self._page_array = np.array(self.pages, dtype=np.int32)
        return self._page_array


@dataclass(eq=False)
class BranchState:
    """What stands behind a handle. `parent` and `children` are handle numbers; a merged handle has neither."""

    id: int
    tail: Node
    parent: int | None = None
    children: list[int] = field(default_factory=list)
    merged: bool = False

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Everything the next token of the branch sees, oldest first, the tail last."""
        return (*self.tail.visible, self.tail)


class FreePages:
    """The pages that nobody owns. Prefers the page after a node's last one, so that long nodes lie in one piece.

    Ties are broken by page number: the same sequence of calls gives the same pages.
    """

    def __init__(self, num_pages: int) -> None:
        self._free = set(range(num_pages))
        self._heap = list(range(num_pages))  # a superset of _free, with repeats: taken pages are skipped when met

    def __len__(self) -> int:
        return len(self._free)

    def pages(self) -> frozenset[int]:
        return frozenset(self._free)

    def take(self, count: int, after: int | None) -> list[int]:
        """`count` pages, the first of them `after` + 1 where that is free; the caller has checked that they exist."""
        if count > len(self._free):
            raise CacheError(f"expected at least {count} free pages, got {len(self._free)}")
        taken: list[int] = []
        previous = -2 if after is None else after
        for _ in range(count):
            previous = previous + 1 if previous + 1 in self._free else self._lowest()
            self._free.remove(previous)
            taken.append(previous)
        return taken

    def give_back(self, pages: list[int]) -> None:
        twice = self._free.intersection(pages)
        if twice or len(set(pages)) != len(pages):
            raise CacheError(f"expected pages in use, got pages that are free already: {sorted(twice) or pages}")
        self._free.update(pages)
        if len(self._heap) > 4 * (len(self._free) + 16):  # drop the repeats that piled up
            self._heap = sorted(self._free)
            return
        for page in pages:
            heapq.heappush(self._heap, page)

    def _lowest(self) -> int:
        while (page := heapq.heappop(self._heap)) not in self._free:
            pass
        return page


def resolve_start(node: Node, starts: Mapping[Node, int], lengths: Mapping[Node, int]) -> int:
    """Position of the first token of `node`, as it is now or would be.

    `starts` and `lengths` hold what a step plans for nodes that it grows, in place of the nodes' own values.
    """
    found: dict[Node, int] = {}
    stack = [node]
    while stack:  # not recursive: a chain of empty nodes may be as long as the number of forks
        top = stack[-1]
        fixed = top.start if top.start is not None else starts.get(top)
        if fixed is not None:
            found[stack.pop()] = fixed
            continue
        waiting = [before for before in top.predecessors if before not in found]
        if waiting:
            stack.extend(waiting)
            continue
        found[stack.pop()] = max(
            (found[before] + lengths.get(before, before.length) for before in top.predecessors), default=0
        )
    return found[node]
