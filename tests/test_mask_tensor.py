"""The mask as one tensor: found again by its address while it lives, read back otherwise, never mistaken."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvkernels import mask_tensor as mask_table
from mvkernels.attention import multiverse_attention
from mvkernels.layout import BranchLayout
from mvkernels.mask_tensor import find_mask_table, pack, unpack
from mvkernels.ops.attention.schema import OPS
from tests.support.trees import trees

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


def test_a_device_by_another_name_is_no_move() -> None:
    layout = BranchLayout.from_tree(TREE)
    assert layout.to("cpu:0").mask_table is layout.mask_table


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


@pytest.mark.parametrize("write", ["numpy", "data", "inference"])
def test_a_buffer_that_is_written_behind_the_version_is_read_again(write: str) -> None:
    """Not every writer counts up a tensor's version."""
    first, second = BranchLayout.from_tree(TREE), BranchLayout.causal(20)
    q, k, v = torch.randn(3, 20, 2, 8)
    wanted = [multiverse_attention(q, k, v, layout, scale=0.3) for layout in (first, second)]
    with torch.inference_mode(write == "inference"):
        buffer = first.mask_table.clone()
        for layout, expected in zip((first, second), wanted, strict=True):
            if write == "numpy":
                buffer.numpy()[:] = layout.mask_table.numpy()
            else:
                (buffer.data if write == "data" else buffer).copy_(layout.mask_table)
            assert torch.equal(OPS["cpu"][0](q, k, v, buffer, 0.3)[0], expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")
def test_buffers_that_inductor_reuses_are_told_apart() -> None:
    """Two masks computed in one graph stand in the same memory, one after the other."""
    op = OPS["cpu"][0]

    def run(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        y, _ = op(x, x, x, first * 1, 0.3)
        return op(y, y, y, second * 1, 0.3)[0]

    tables = BranchLayout.from_tree(TREE).mask_table, BranchLayout.causal(20).mask_table
    x = torch.randn(20, 2, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x, *tables), run(x, *tables))


def test_a_view_of_a_part_does_not_take_the_place_of_the_table() -> None:
    layout = BranchLayout.from_tree(TREE)
    assert find_mask_table(layout.mask_table[:200]) is not layout._table
    assert find_mask_table(layout.mask_table) is layout._table


def test_a_layout_made_in_inference_mode_trains() -> None:
    """As one that comes with a generation."""
    with torch.inference_mode():
        document = BranchLayout.from_tree(TREE)
        layout = BranchLayout.pack([document, document])
    assert not any(x.is_inference() for x in (layout.position_ids, layout.cu_seqlens, layout.mask_table))
    for made in (document, layout):
        leaves = torch.randn(3, made.total_tokens, 2, 8).requires_grad_()
        multiverse_attention(*leaves, made).sum().backward()
        assert leaves.grad.isfinite().all()


def test_a_recorded_cuda_graph_leaves_the_ops_out() -> None:
    """A replay would take the mask, and so the sizes, of the layout that was recorded."""
    for ops in OPS.values():
        for op in ops:
            assert torch.Tag.cudagraph_unsafe in op._opoverload.tags


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
