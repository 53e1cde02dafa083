"""The pages that no node owns."""

from __future__ import annotations

import heapq

from mvkernels.errors import CacheError


class FreePages:
    """The pages that no node owns. Prefers the page after a node's last one, so that long nodes are contiguous.

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
        """Take `count` pages, the first of them `after` + 1 if that is free; the caller has checked that they exist."""
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
