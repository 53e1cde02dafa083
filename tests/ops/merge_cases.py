"""Branch tables and blocks for the tests of merge_branches: random ones, and what each backend makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mvkernels import BranchTables
from mvkernels.reference.merge import merge

STATE = ("pages", "counts", "used", "position", "error")


@dataclass(frozen=True)
class MergeCase:
    """Tables, and the blocks of one call, on the CPU."""

    tables: BranchTables
    parents: torch.Tensor
    children: torch.Tensor
    child_ptr: torch.Tensor

    @property
    def indices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.parents, self.children, self.child_ptr


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def random_case(
    sizes: Sequence[int | None], capacity: int, longest: int, seed: int, crowded: float = 0.0, idle: int = 2
) -> MergeCase:
    """Blocks of `sizes` children, None standing for no block, on slots in random order, some of which take no part.

    longest: most entries of a slot; crowded: share of parents whose row is full up to the last few entries.
    """
    random = np.random.default_rng(seed)
    blocks = [size for size in sizes if size is not None]
    slots = random.permutation(sum(blocks) + len(blocks) + idle).tolist()
    num_branches = len(slots)
    lengths = random.integers(0, min(longest, capacity) + 1, num_branches)
    lengths[random.random(num_branches) < 0.3] = 0
    parents, children, ends = [], [], [0]
    for size in sizes:
        parents.append(-1 if size is None else slots.pop())
        children += [slots.pop() for _ in range(size or 0)]
        ends.append(len(children))
        if size is not None and random.random() < crowded:
            lengths[parents[-1]] = capacity - random.integers(0, min(longest, capacity) + 1)
    tables = BranchTables(
        torch.from_numpy(random.integers(0, 10**6, (num_branches, capacity), dtype=np.int32)),
        torch.from_numpy(random.integers(1, 65, (num_branches, capacity), dtype=np.int32)),
        torch.from_numpy(lengths.astype(np.int32)),
        torch.from_numpy(random.integers(0, 10**6, num_branches, dtype=np.int32)),
        torch.zeros(1, dtype=torch.int32),
    )
    return MergeCase(tables, int32(parents), int32(children), int32(ends))


def copy_of(tables: BranchTables, device: torch.device | str = "cpu") -> BranchTables:
    return BranchTables(*(getattr(tables, name).to(device, copy=True) for name in STATE))


def expected(case: MergeCase) -> BranchTables:
    """What the reference makes of the case."""
    tables = copy_of(case.tables)
    merge(*(getattr(tables, name) for name in STATE), *case.indices)
    return tables


def assert_same(got: BranchTables, wanted: BranchTables) -> None:
    """Also entries that are not in use: nothing else may have been written."""
    for name in STATE:
        assert torch.equal(getattr(got, name).cpu(), getattr(wanted, name)), name
