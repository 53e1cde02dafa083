"""A cache with its page lists on a device, and what happens to them, for the tests of `cache.device`."""

from __future__ import annotations

from mvkernels.cache.device import Update
from tests.cache.world import World, poisoned_cache

SIZE = (32, 64)


def world(table_size=SIZE, page_size: int = 3, num_pages: int = 256, device: str = "cpu") -> World:
    return World(poisoned_cache(num_pages, page_size, 1, table_size=table_size, device=device), sequential=True)


class Uploads:
    """Page entries that are uploaded and blocks merged on the device while it is entered: `counted`."""

    def __init__(self, w: World) -> None:
        self.tables = w.cache.device_tables
        self.entries = self.merges = 0

    def __enter__(self) -> Uploads:
        self.run = self.tables._run
        self.tables._run = self._count
        return self

    def __exit__(self, *error: object) -> None:
        self.tables._run = self.run

    def _count(self, update: Update) -> None:
        self.entries += sum(at < self.tables.counts_at for writes in (update.early, update.late) for at in writes)
        self.run(update)
        self.merges += sum(map(len, update.calls))

    def counted(self) -> tuple[int, int]:
        return self.entries, self.merges


def slot_of(w: World, branch) -> int:
    return w.cache._state(branch).tail.row.slot
