"""Tables of a mask for the Triton attention kernels: tile plans and intervals, as int32 tensors on one device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from mvkernels.mask import Int32Array, IntervalMask
from mvkernels.mask_tensor import MaskTable
from mvkernels.ops.attention.config import AttentionConfig
from mvkernels.ops.attention.tile_plan import TileRuns, key_intervals, tile_plan

_ALIGN = 4  # int32 values: every table begins on 16 bytes, so that no layout changes how a kernel is compiled


class RunTables(NamedTuple):
    """`tile_plan.TileRuns` on a device.

    tiles [N, 5]: tile, first and end of its full runs, first and end of its partial runs; longest first.
    runs [R, 2]: half-open intervals of tiles.
    """

    tiles: torch.Tensor
    runs: torch.Tensor


class AttentionTables(NamedTuple):
    """forward and dq: key tiles of each query tile. dkdv: query tiles of each key tile.

    rows [T, 3]: first visible key, first and end of its gaps. gaps [G, 2]: half-open intervals of hidden keys.
    keys [T, 3]: last row (exclusive), first and end of its gaps. key_gaps [H, 2]: half-open intervals of hidden rows.
    """

    forward: RunTables
    dq: RunTables
    dkdv: RunTables
    rows: torch.Tensor
    gaps: torch.Tensor
    keys: torch.Tensor
    key_gaps: torch.Tensor


def attention_tables(table: MaskTable, config: AttentionConfig, device: torch.device) -> AttentionTables:
    """Return the tables of a mask on a device, made once per mask."""
    key = ("attention triton", config.blocks, str(device))
    return table.cached(key, lambda: build_tables(table.mask, config, device))


def build_tables(mask: IntervalMask, config: AttentionConfig, device: torch.device) -> AttentionTables:
    """Make all tables of a mask, with one copy to the device."""
    plans = {
        blocks: tile_plan(mask, *blocks)
        for blocks in {(kernel.block_m, kernel.block_n) for kernel in (config.forward, config.dq, config.dkdv)}
    }
    forward, dq = (plans[kernel.block_m, kernel.block_n].rows for kernel in (config.forward, config.dq))
    dkdv = plans[config.dkdv.block_m, config.dkdv.block_n].columns
    arrays = [array for runs in (forward, dq, dkdv) for array in _run_arrays(runs)]
    segments = np.stack([mask.first_key, mask.gap_ptr[:-1], mask.gap_ptr[1:]], axis=1)
    by_key = key_intervals(mask)
    key_columns = (by_key.last_row, by_key.gap_ptr[by_key.key_class], by_key.gap_ptr[by_key.key_class + 1])
    arrays += [segments[mask.segment_of_rows()], mask.gaps, np.stack(key_columns, axis=1), by_key.gaps]
    sizes = [-(-array.size // _ALIGN) * _ALIGN for array in arrays]
    starts = np.cumsum([0, *sizes])
    packed = np.zeros(starts[-1], np.int32)
    for start, array in zip(starts, arrays, strict=False):
        packed[start : start + array.size] = array.reshape(-1)
    on_device = torch.from_numpy(packed).to(device)
    flat = [
        on_device[int(start) : int(start) + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]
    return AttentionTables(RunTables(*flat[0:2]), RunTables(*flat[2:4]), RunTables(*flat[4:6]), *flat[6:])


def _run_arrays(runs: TileRuns) -> tuple[Int32Array, Int32Array]:
    partial_ptr = runs.partial_ptr + np.int32(len(runs.full))
    columns = (runs.full_ptr[:-1], runs.full_ptr[1:], partial_ptr[:-1], partial_ptr[1:])
    tiles = np.stack([np.arange(runs.num_tiles, dtype=np.int32), *columns], axis=1)[runs.order]
    return tiles, np.concatenate([runs.full, runs.partial])
