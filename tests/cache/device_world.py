"""A cache with its page lists on a device, and what happens to them, for the tests of `cache.device`."""

from __future__ import annotations

from tests.cache.world import World, poisoned_cache

SIZE = (32, 64)


def world(table_size=SIZE, page_size: int = 3, num_pages: int = 256, device: str = "cpu") -> World:
    return World(poisoned_cache(num_pages, page_size, 1, table_size=table_size, device=device), sequential=True)


class Uploads:
    """How many page numbers are uploaded, blocks merged on the device and rows laid anew while it is entered."""

    def __init__(self, w: World) -> None:
        self.tables = w.cache.device_tables

    def figures(self) -> tuple[int, int, int]:
        return self.tables.rows.uploaded_entries, self.tables.device_merges, self.tables.rows.laid_anew

    def __enter__(self) -> Uploads:
        self.before = self.figures()
        return self

    def __exit__(self, *error: object) -> None:
        self.entries, self.merges, self.laid_anew = (
            now - was for now, was in zip(self.figures(), self.before, strict=True)
        )

    def counted(self) -> tuple[int, int, int]:
        return self.entries, self.merges, self.laid_anew


def slot_of(w: World, branch) -> int:
    return w.cache._state(branch).tail.spot.row.slot
