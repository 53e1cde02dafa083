"""One block as BranchTables beside the cache, for `merge_branches` to merge again and again."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.gate import WrongResultError
from mvkernels import BranchTables, PagedKVCache, merge_branches
from mvkernels.ops.decode.tasks import KeyRun


class Tables:
    """Slot 0 is the parent, slots 1 .. n are the children; every one has written `tokens` tokens."""

    def __init__(self, device: str, branches: int, tokens: int, page_size: int) -> None:
        pages = -(-tokens // page_size)
        self.tables = BranchTables.empty(1 + branches, (1 + branches) * pages, device)
        cache = PagedKVCache((1 + branches) * pages + 1, page_size, 1, 1, 8)  # the storage is not used
        root = cache.new()
        step = cache.plan([(root, tokens)])
        runs = [step.views.entries[0].own]
        cache.commit(step)
        children = cache.fork(root, branches)
        step = cache.plan([(child, tokens) for child in children])
        runs += [entry.own for entry in step.views.entries]
        cache.commit(step)
        positions = [root.next_position, *(child.next_position for child in children)]
        for slot, (run, position) in enumerate(zip(runs, positions, strict=True)):
            self._write(slot, run, position)
        cache.merge(root, children)
        self.position = root.next_position
        self.merged = cache.plan([(root, 1)]).views.entries[0].whole
        self.before = (self.tables.used.clone(), self.tables.position.clone())
        self.indices = (
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.arange(1, 1 + branches, dtype=torch.int32, device=device),
            torch.tensor([0, branches], dtype=torch.int32, device=device),
        )

    def _write(self, slot: int, run: KeyRun, position: int) -> None:
        size = len(run.pages)
        self.tables.pages[slot, :size] = torch.from_numpy(run.pages)
        self.tables.counts[slot, :size] = torch.from_numpy(run.counts)
        self.tables.used[slot] = size
        self.tables.position[slot] = position

    def restore(self) -> None:
        """Before the merge. What it wrote behind the parent's own pages means nothing then."""
        self.tables.used.copy_(self.before[0])
        self.tables.position.copy_(self.before[1])

    def merge(self) -> None:
        """The call to time."""
        merge_branches(self.tables, *self.indices)

    def check(self) -> None:
        """Merges, and raises WrongResultError where the parent's row is not what the cache shows after its merge."""
        self.merge()
        self.tables.check()
        used = int(self.tables.used[0])
        for name, row in (("pages", self.tables.pages), ("counts", self.tables.counts)):
            want = np.concatenate([getattr(run, name) for run in self.merged])
            if not np.array_equal(row[0, :used].cpu().numpy(), want):
                raise WrongResultError(f"merge_branches: the parent's {name} are not those of the cache")
        if int(self.tables.position[0]) != self.position:
            got = int(self.tables.position[0])
            raise WrongResultError(f"merge_branches: expected next position {self.position}, got {got}")
        self.restore()
