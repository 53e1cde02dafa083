"""Tile plans and CPU plans against the dense mask, tile by tile and pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvkernels.layout import BranchLayout
from mvkernels.mask import IntervalMask
from mvkernels.ops.attention import cpu_plan as cpu
from mvkernels.ops.attention.config import attention_config
from mvkernels.ops.attention.tables import build_tables
from mvkernels.ops.attention.tile_plan import EMPTY, FULL, PARTIAL, TileRuns, tile_plan
from tests.support.trees import trees


def packed(documents: list) -> BranchLayout:
    return BranchLayout.pack([BranchLayout.from_tree(tree) for tree in documents])


layouts = st.lists(trees(max_length=12), min_size=1, max_size=3).map(packed)


def states(runs: TileRuns, width: int) -> np.ndarray:
    """[tiles, width] state of each pair; fails where runs overlap, are empty or out of order."""
    found = np.full((runs.num_tiles, width), EMPTY)
    for ptr, intervals, state in ((runs.full_ptr, runs.full, FULL), (runs.partial_ptr, runs.partial, PARTIAL)):
        for tile in range(runs.num_tiles):
            behind = 0
            for first, last in intervals[ptr[tile] : ptr[tile + 1]]:
                assert behind <= first < last <= width
                assert (found[tile, first:last] == EMPTY).all()
                found[tile, first:last] = state
                behind = last + 1  # runs that touch would be one run
    return found


def expected_states(dense: np.ndarray, block_m: int, block_n: int) -> np.ndarray:
    total = len(dense)
    found = np.full((-(-total // block_m), -(-total // block_n)), EMPTY)
    for m, n in np.ndindex(found.shape):
        tile = dense[m * block_m : (m + 1) * block_m, n * block_n : (n + 1) * block_n]
        whole = tile.shape[1] == block_n and tile.all()
        found[m, n] = FULL if whole else PARTIAL if tile.any() else EMPTY
    return found


@given(layouts, st.sampled_from([1, 3, 8, 16, 64]), st.sampled_from([1, 5, 8, 32]))
def test_tile_plan_agrees_with_the_dense_mask(layout, block_m, block_n):
    expected = expected_states(layout.dense_mask().numpy(), block_m, block_n)
    plan = tile_plan(layout.mask, block_m, block_n)
    np.testing.assert_array_equal(states(plan.rows, expected.shape[1]), expected)
    np.testing.assert_array_equal(states(plan.columns, expected.shape[0]), expected.T)
    for runs, pairs in ((plan.rows, expected), (plan.columns, expected.T)):
        assert runs.pairs() == ((expected == FULL).sum(), (expected == PARTIAL).sum())
        work = (pairs != EMPTY).sum(axis=1)[runs.order]
        assert sorted(runs.order) == list(range(runs.num_tiles))
        assert (np.diff(work) <= 0).all()
        assert all(a.dtype == np.int32 for a in (runs.full_ptr, runs.full, runs.partial_ptr, runs.partial, runs.order))


@given(layouts)
def test_the_mask_holds_its_invariants_and_counts_its_pairs(layout):
    layout.mask.check()
    assert layout.mask.visible_pairs() == int(layout.dense_mask().sum())


def test_a_plan_stays_small_where_the_tile_pairs_are_many():
    paths = [[500]] * 16
    layout = BranchLayout.pack([BranchLayout.from_tree([300, paths, 400, [[20]] * 100, 100])] * 50)
    plan = tile_plan(layout.mask, 128, 64)
    assert layout.total_tokens > 500_000
    for runs in (plan.rows, plan.columns):
        assert len(runs.full) + len(runs.partial) < 8 * runs.num_tiles


def test_tile_sizes_must_be_positive():
    with pytest.raises(ValueError, match="block_m=0, block_n=64"):
        tile_plan(BranchLayout.causal(3).mask, 0, 64)


@given(layouts)
def test_device_tables_say_what_the_plan_says(layout):
    config = attention_config(64, 4, None)
    named = build_tables(layout.mask, config, torch.device("cpu"))
    expected = {
        "forward": tile_plan(layout.mask, config.forward.block_m, config.forward.block_n).rows,
        "dq": tile_plan(layout.mask, config.dq.block_m, config.dq.block_n).rows,
        "dkdv": tile_plan(layout.mask, config.dkdv.block_m, config.dkdv.block_n).columns,
    }
    for name, runs in expected.items():
        table = getattr(named, name)
        assert table.tiles[:, 0].tolist() == runs.order.tolist()
        for tile, full, full_end, partial, partial_end in table.tiles.tolist():
            assert table.runs[full:full_end].tolist() == runs.full[slice(*runs.full_ptr[tile : tile + 2])].tolist()
            assert (
                table.runs[partial:partial_end].tolist()
                == runs.partial[slice(*runs.partial_ptr[tile : tile + 2])].tolist()
            )
    dense = layout.dense_mask()
    for row, (first, gap, gap_end) in enumerate(named.rows.tolist()):
        seen = torch.arange(layout.total_tokens)
        seen = (seen >= first) & (seen <= row)
        for a, b in named.gaps[gap:gap_end].tolist():
            seen[a:b] = False
        assert torch.equal(seen, dense[row])
    # Every table on 16 bytes, empty ones aside: else a layout could change how a kernel is specialised.
    assert all(t.data_ptr() % 16 == 0 for t in (*named.forward, *named.dq, *named.dkdv, named.rows, named.gaps))


@given(layouts, st.sampled_from([(1024, 256, 64, 4096), (32, 8, 4, 16), (16, 16, 100, 7), (8, 4, 1, 3)]))
def test_cpu_plan_covers_each_visible_pair_once(layout, sizes):
    names = ("GROUP_ROWS", "BLOCK_ROWS", "SHORT_SEGMENT", "CALL_KEYS")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(names, sizes, strict=True):
            patch.setattr(cpu, name, size)
        plan = cpu.cpu_plan(layout.mask)
    dense = layout.dense_mask().numpy()
    covered = np.zeros(dense.shape, int)
    begun = np.zeros(len(dense), bool)
    for first, last, kind, fresh, spans in plan:
        assert 0 < last - first <= sizes[0]
        assert (begun[first:last] == (not fresh)).all()
        begun[first:last] = True
        keys = np.concatenate([np.arange(a, b) for a, b in spans])
        rows = np.arange(first, last)
        block = dense[np.ix_(rows, keys)]
        if kind == cpu.CAUSAL:
            assert spans == [(first, last)]
            np.testing.assert_array_equal(block, np.tri(last - first, dtype=bool))
        elif kind == cpu.CAUSAL_MASKED:
            assert spans == [(first, last)]
        elif kind == cpu.DENSE:
            assert block.all()
            assert len(keys) <= sizes[3]
        assert block.any(axis=1).all(), "a row that sees nothing in a call"
        covered[np.ix_(rows, keys)] += block
    np.testing.assert_array_equal(covered, dense)
    assert begun.all()


def test_long_segments_need_no_mask():
    layout = BranchLayout.from_tree([500, [[700], [900], [64]], 300])
    assert all(call.kind in (cpu.DENSE, cpu.CAUSAL) for call in cpu.cpu_plan(layout.mask))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gaps", [[2, 1]], "ascending"),
        ("gaps", [[1, 5]], "ascending"),
        ("segment_starts", [0, 3, 6], "0 to 5"),
        ("gap_ptr", [0, 0, 2], "0 to 1"),
        ("first_key", [0], r"\[2\]"),
    ],
)
def test_check_refuses_a_mask_that_is_none(field, value, message):
    fields = {"segment_starts": [0, 3, 5], "first_key": [0, 0], "gap_ptr": [0, 0, 1], "gaps": [[1, 3]]}
    IntervalMask(**{k: np.array(v, np.int32) for k, v in fields.items()}, total_tokens=5).check()
    fields[field] = value
    with pytest.raises(ValueError, match=message):
        IntervalMask(**{k: np.array(v, np.int32) for k, v in fields.items()}, total_tokens=5).check()
