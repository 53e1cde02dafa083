"""Free pages, and the page lists of long lists of nodes: growing arrays that lists with a common beginning share."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mvkernels.errors import CacheError

if TYPE_CHECKING:
    from mvkernels.cache.nodes import Node

Int32Array = npt.NDArray[np.int32]


class PageLog:
    """Pages and the tokens written in each, in two arrays that grow at the end only. first: the first node in them."""

    def __init__(self, first: Node) -> None:
        self.first = first
        self.size = 0
        self._rows = np.empty((2, 16), np.int32)

    def extend(self, pages: Int32Array, counts: Int32Array) -> None:
        end = self.size + len(pages)
        if end > self._rows.shape[1]:  # twice as long: whoever holds a slice of the old arrays keeps them
            rows = np.empty((2, 2 * end), np.int32)
            rows[:, : self.size] = self._rows[:, : self.size]
            self._rows = rows
        self._rows[:, self.size : end] = pages, counts
        self.size = end

    def slice(self, first: int, last: int) -> tuple[Int32Array, Int32Array]:
        """(pages, counts) of the entries first .. last - 1; views that nothing writes to again."""
        return self._rows[0, first:last], self._rows[1, first:last]


@dataclass(frozen=True, eq=False)
class Contents:
    """What a list of nodes holds: the first `end` entries of a log, after all that `before` holds.

    tokens: of all of it.
    """

    log: PageLog
    end: int
    tokens: int
    before: Contents | None

    @classmethod
    def after(cls, before: Contents | None, node: Node, counts: Int32Array, apart: bool) -> Contents:
        """A node with tokens after `before`: in its log where nothing else stands behind it there, unless `apart`."""
        if before is None or apart or before.log.size != before.end:
            log, outer = PageLog(node), before
        else:
            log, outer = before.log, before.before
        log.extend(node.page_array(), counts)
        return cls(log, log.size, node.length + (0 if before is None else before.tokens), outer)

    def back(self) -> Iterator[Contents]:
        """This and what stands before it, the last first: one for each log."""
        contents: Contents | None = self
        while contents is not None:
            yield contents
            contents = contents.before


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
