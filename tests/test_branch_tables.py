"""merge_branches and BranchTables: the backends against the reference, the reference against the cache, the errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mvkernels as mk
from mvkernels.ops.decode.tasks import page_slots
from mvkernels.ops.merge import cuda as kv_merge_cuda
from mvkernels.reference.merge import INVALID, OVERFLOW
from tests.ops.merge_cases import STATE, assert_same, copy_of, expected, int32, random_case

SIZES = st.lists(st.none() | st.integers(0, 9), max_size=6)


@given(SIZES, st.integers(1, 24), st.integers(0, 8), st.integers(0, 2**31))
def test_cpu_equals_the_reference(sizes, capacity, longest, seed) -> None:
    case = random_case(sizes, capacity, longest, seed, crowded=0.4)
    for backend in ("cpu", "auto", "reference"):
        tables = copy_of(case.tables)
        mk.merge_branches(tables, *case.indices, backend=backend)
        assert_same(tables, expected(case))


def test_the_reference_on_a_case_by_hand() -> None:
    """Slots 3 <- (1, empty 4, 0), and 2 <- nothing; the second entry of the call is no block."""
    tables = mk.BranchTables(
        torch.arange(30, dtype=torch.int32).view(5, 6),
        torch.arange(100, 130, dtype=torch.int32).view(5, 6),
        int32([2, 3, 1, 1, 0]),
        int32([7, 4, 11, 5, 5]),
        int32([0]),
    )
    mk.merge_branches(tables, int32([3, -1, 2]), int32([1, 4, 0]), int32([0, 3, 3, 3]), backend="reference")
    assert tables.pages[3].tolist() == [18, 6, 7, 8, 0, 1]
    assert tables.counts[3].tolist() == [118, 106, 107, 108, 100, 101]
    assert tables.used.tolist() == [0, 0, 1, 6, 0]
    assert tables.position.tolist() == [7, 4, 11, 7, 5]
    tables.check()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_block_that_overflows_is_unchanged_and_the_others_are_merged(backend: str) -> None:
    tables = mk.BranchTables.empty(6, 4)
    tables.used.copy_(int32([2, 3, 0, 2, 2, 0]))
    before = copy_of(tables)
    mk.merge_branches(tables, int32([0, 3]), int32([1, 2, 4]), int32([0, 2, 3]), backend)
    assert tables.used.tolist() == [2, 3, 0, 4, 0, 0]
    assert tables.error.tolist() == [OVERFLOW]
    for name in ("pages", "counts", "position"):
        assert torch.equal(getattr(tables, name), getattr(before, name))
    with pytest.raises(mk.errors.CacheError, match="expected rows of at most 4 entries, got a block with more"):
        tables.check()
    tables.check()  # once only


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("slot", "length"), [(0, -1), (0, 5), (1, -1), (1, 5)])
def test_a_length_that_cannot_be_is_refused(backend: str, slot: int, length: int) -> None:
    tables = mk.BranchTables.empty(4, 4)
    tables.used.copy_(int32([1, 1, 1, 1]))
    tables.used[slot] = length
    mk.merge_branches(tables, int32([0, 2]), int32([1, 3]), int32([0, 1, 2]), backend)
    wanted = [1, 1, 2, 0]
    wanted[slot] = length
    assert tables.used.tolist() == wanted
    assert tables.error.tolist() == [INVALID]
    with pytest.raises(mk.errors.CacheError, match="expected slots and lengths in range"):
        tables.check()


class Twin:
    """A cache, and its tables kept beside it by the slots of the steps alone."""

    def __init__(self, page_size: int) -> None:
        self.cache = mk.PagedKVCache(512, page_size, 1, 1, 1)
        self.tables = mk.BranchTables.empty(64, 256)
        self.slots: dict[int, int] = {}  # branch -> its slot in the tables
        self.above: dict[int, mk.kv_cache.Branch | None] = {}
        self.root = self.cache.new()
        self.add(self.root, None)

    def add(self, branch, parent) -> None:
        slot = self.slots[branch.id] = len(self.slots)
        self.above[branch.id] = parent
        self.tables.position[slot] = branch.next_position

    def fork(self, branch, count: int) -> list:
        children = self.cache.fork(branch, count)
        for child in children:
            self.add(child, branch)
        return children

    def write(self, branch, count: int) -> None:
        """A step of `count` tokens: a new entry wherever the slots go on in another page."""
        step = self.cache.plan([(branch, count)])
        slot = self.slots[branch.id]
        pages, counts = self.tables.pages[slot], self.tables.counts[slot]
        for page in (step.slots // self.cache.page_size).tolist():
            end = int(self.tables.used[slot])
            if end and int(pages[end - 1]) == page:
                counts[end - 1] += 1
            else:
                pages[end], counts[end] = page, 1
                self.tables.used[slot] += 1
        self.tables.position[slot] += count
        self.cache.commit(step)

    def merge(self, backend: str, *blocks) -> None:
        """On both sides; (parent, children) each, none of them nested in another."""
        children, ends = [], [0]
        for parent, joined in blocks:
            self.cache.merge(parent, joined)
            children += [self.slots[child.id] for child in joined]
            ends.append(len(children))
        parents = [self.slots[parent.id] for parent, _ in blocks]
        mk.merge_branches(self.tables, int32(parents), int32(children), int32(ends), backend)
        self.tables.check()

    def check(self, branch) -> None:
        """Position, and every key that the next token sees, in order."""
        assert int(self.tables.position[self.slots[branch.id]]) == branch.next_position
        found, above = [], branch
        while above is not None:
            slot = self.slots[above.id]
            used = int(self.tables.used[slot])
            rows = (table[slot, :used].numpy() for table in (self.tables.pages, self.tables.counts))
            found.insert(0, torch.from_numpy(page_slots(*rows, self.cache.page_size)))
            above = self.above[above.id]
        step = self.cache.plan([(branch, 1)])
        seen = torch.from_numpy(step.views.visible_slots(0))[:-1]
        self.cache.rollback(step)
        assert torch.equal(torch.cat(found), seen)


TREE = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@given(st.sampled_from([1, 3, 16]), st.integers(0, 20), st.lists(TREE, min_size=1, max_size=3))
def test_tables_equal_the_cache(backend: str, page_size: int, prompt: int, tree) -> None:
    """Each child of the root forks too: the inner blocks merge in one call, the outer one in the next."""
    twin = Twin(page_size)
    twin.write(twin.root, prompt + 1)
    paths = twin.fork(twin.root, len(tree))
    inner = []
    for path, lengths in zip(paths, tree, strict=True):
        if lengths[0][0]:
            twin.write(path, lengths[0][0])
        inner.append((path, twin.fork(path, len(lengths))))
        for child, (_, tokens) in zip(inner[-1][1], lengths, strict=True):
            if tokens:
                twin.write(child, tokens)
            twin.check(child)
    twin.merge(backend, *inner)
    for path, lengths in zip(paths, tree, strict=True):
        twin.check(path)
        if lengths[-1][0]:
            twin.write(path, lengths[-1][0])
    twin.merge(backend, (twin.root, paths))
    twin.check(twin.root)
    twin.write(twin.root, page_size + 1)
    twin.check(twin.root)


# -- errors --------------------------------------------------------------------------------------------------------


def block(parents=(0,), children=(1, 2), child_ptr=(0, 2)) -> dict[str, torch.Tensor]:
    return {"parents": int32(parents), "children": int32(children), "child_ptr": int32(child_ptr)}


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (block() | {"parents": torch.tensor([0])}, "parents: expected dtype torch.int32, got torch.int64"),
        (block() | {"children": torch.ones(2, 1)}, r"children: expected a tensor of one dimension, got \[2, 1\]"),
        (block() | {"parents": [0]}, "parents: expected a tensor of one dimension, got list"),
        (block() | {"child_ptr": [0, 2]}, "child_ptr: expected a tensor, got list"),
        (block(child_ptr=(0, 1, 2)), r"child_ptr: expected shape \[2\], got \[3\]"),
        (
            block() | {"children": int32([1, 0, 2, 0])[::2]},
            r"children: expected contiguous storage, got strides \(2,\)",
        ),
        (
            block() | {"children": torch.ones(2, dtype=torch.int32, device="meta")},
            "children: expected a tensor on cpu, got one on meta",
        ),
        (block(parents=(4,)), "parents: expected slots of 0 .. 3 or -1, got 4"),
        (block(parents=(-2,)), "parents: expected slots of 0 .. 3 or -1, got -2"),
        (block(children=(1, -1)), "children: expected slots of 0 .. 3, got -1"),
        (block(child_ptr=(0, 3)), r"child_ptr: expected ascending ranges within the 2 children, got 0 .. 3"),
        (block(child_ptr=(2, 1)), r"child_ptr: expected ascending ranges within the 2 children, got 2 .. 1"),
        (block(children=(1, 0)), "children: expected children other than their parent, got 0 among its own"),
        (block(children=(1, 1)), "expected every slot at most once among parents and children, got 1 again"),
        (block((0, 2), (1, 2), (0, 2, 2)), "expected every slot at most once among parents and children, got 2 again"),
    ],
)
def test_bad_indices(indices, message: str, backend: str) -> None:
    tables = mk.BranchTables.empty(4, 3)
    tables.used.fill_(1)
    before = copy_of(tables)
    with pytest.raises(ValueError, match=message):
        mk.merge_branches(tables, **indices, backend=backend)
    assert_same(tables, before)


def test_bad_tables() -> None:
    good = {name: getattr(mk.BranchTables.empty(4, 3), name) for name in STATE}
    for change, message in (
        (
            {"pages": torch.zeros(4, dtype=torch.int32)},
            r"pages: expected shape \[B, C\] with C of 1 .. 4194304, got \[4\]",
        ),
        ({"counts": good["pages"][:, :2]}, r"counts: expected shape \[4, 3\], got \[4, 2\]"),
        ({"used": torch.zeros(4)}, "used: expected dtype torch.int32, got torch.float32"),
        ({"position": torch.zeros(5, dtype=torch.int32)}, r"position: expected shape \[4\], got \[5\]"),
        (
            {"error": torch.zeros(1, dtype=torch.int32, device="meta")},
            "error: expected a tensor on cpu, got one on meta",
        ),
        ({"pages": good["pages"].T.contiguous().T}, r"pages: expected contiguous storage, got strides \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mk.BranchTables(**good | change)
    with pytest.raises(ValueError, match="expected num_branches and capacity of at least 1, got 4 and 0"):
        mk.BranchTables.empty(4, 0)
    with pytest.raises(ValueError, match="tables: expected BranchTables, got dict"):
        mk.merge_branches(good, **block())
    with pytest.raises(dataclasses.FrozenInstanceError):
        mk.BranchTables(**good).used = good["used"]


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = mk.BranchTables.empty(4, 3)
    monkeypatch.setattr(kv_merge_cuda, "CUPY_INSTALLED", False)
    with pytest.raises(mk.BackendError, match=r"CuPy is not installed: pip install 'mvkernels\[cuda\]'"):
        mk.merge_branches(tables, **block(), backend="cuda")
    monkeypatch.setattr(kv_merge_cuda, "CUPY_INSTALLED", True)
    with pytest.raises(mk.BackendError, match="expected tensors on cuda, got cpu"):
        mk.merge_branches(tables, **block(), backend="cuda")
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'cpu', 'cuda', 'reference', got 'triton'"):
        mk.merge_branches(tables, **block(), backend="triton")


def test_auto_gives_every_reason() -> None:
    tables = mk.BranchTables.empty(4, 3, device="meta")
    reason = kv_merge_cuda.cuda_reason(tables.device)
    with pytest.raises(mk.BackendError) as caught:
        mk.merge_branches(tables, **block())
    assert str(caught.value) == f"no backend fits: cpu: expected tensors on cpu, got meta; cuda: {reason}"
