"""The mask as one tensor: found again by its address while it lives, read back otherwise, never mistaken."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvkernels.attention import multiverse_attention
from mvkernels.layout import BranchLayout
from mvkernels.ops import mask_table
from mvkernels.ops.attention_schema import OPS
from mvkernels.ops.mask_table import find_mask_table, pack, unpack
from tests.trees import trees

TREE = [5, [[3], [2, [[4], [1]], 1]], 4]


@given(st.lists(trees(max_length=9), min_size=1, max_size=4))
def test_a_packed_mask_unpacks(documents) -> None:
    mask = BranchLayout.pack([BranchLayout.from_tree(tree) for tree in documents]).mask
    found = unpack(torch.from_numpy(pack(mask)))
    found.check()
    assert found.total_tokens == mask.total_tokens
    for name in ("segment_starts", "first_key", "gap_ptr", "gaps"):
        np.testing.assert_array_equal(getattr(found, name), getattr(mask, name))


def test_tables_come_in_few_sizes() -> None:
    sizes = {BranchLayout.from_tree([1, [[1]] * n, 1]).mask_table.numel() for n in range(2, 500, 7)}
    assert sizes == {4096}
    assert BranchLayout.from_tree([1, [[1]] * 5000, 1]).mask_table.numel() == 32768


def test_a_table_is_found_while_its_layout_lives_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BranchLayout.from_tree(TREE)
    assert find_mask_table(layout.mask_table) is layout._table
    assert find_mask_table(layout.mask_table[:]).mask is layout.mask  # a view of it is the same mask
    before = len(mask_table._registered)
    del layout
    gc.collect()
    assert len(mask_table._registered) == before - 1


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copied_layouts_attend_alike(duplicate) -> None:
    layout = BranchLayout.from_tree(TREE)
    q, k, v = torch.randn(3, layout.total_tokens, 2, 8)
    wanted = multiverse_attention(q, k, v, layout)
    twin = duplicate(layout)
    del layout
    assert find_mask_table(twin.mask_table) is twin._table
    assert torch.equal(multiverse_attention(q, k, v, twin), wanted)


def test_a_copy_of_the_tensor_is_read_back() -> None:
    layout = BranchLayout.from_tree(TREE)
    q, k, v = torch.randn(3, layout.total_tokens, 2, 8)
    copied = layout.mask_table.clone()
    found = find_mask_table(copied)
    assert found is not layout._table and find_mask_table(copied) is found  # for the backward
    for got, wanted in zip(
        OPS["cpu"][0](q, k, v, copied, 0.3), OPS["cpu"][0](q, k, v, layout.mask_table, 0.3), strict=True
    ):
        assert torch.equal(got, wanted)


def test_a_buffer_that_is_written_again_is_read_again() -> None:
    """As a caller does who copies one layout after another to the same place."""
    first, second = BranchLayout.from_tree(TREE), BranchLayout.causal(20)
    q, k, v = torch.randn(3, 20, 2, 8)
    buffer = first.mask_table.clone()
    for layout in (first, second, first):
        buffer.copy_(layout.mask_table)
        got = OPS["cpu"][0](q, k, v, buffer, 0.3)[0]
        assert torch.equal(got, multiverse_attention(q, k, v, layout, scale=0.3))


def test_the_layout_may_be_gone_at_the_backward() -> None:
    grads = []
    for drop in (False, True):
        layout = BranchLayout.from_tree(TREE)
        leaves = [x.requires_grad_() for x in torch.randn(3, 20, 2, 8, generator=torch.Generator().manual_seed(0))]
        out = multiverse_attention(*leaves, layout)
        if drop:
            del layout
            gc.collect()
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8),
        torch.zeros(2, 8, dtype=torch.int32),
        torch.zeros(3, dtype=torch.int32),
        torch.tensor([5, 100, 3, 0, 0, 1], dtype=torch.int32),
        torch.tensor([-1, 0, 0, 0, 0, 0, 0], dtype=torch.int32),
    ],
)
def test_what_is_no_table_is_refused(tensor) -> None:
    with pytest.raises(ValueError, match="expected a mask table"):
        find_mask_table(tensor)
