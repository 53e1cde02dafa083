"""Tile plans from an `IntervalMask`: the key tiles of each query tile, and the query tiles of each key tile.

A query tile is block_m consecutive rows, a key tile block_n consecutive keys. A (query tile, key tile) pair is

    empty     no row of the tile sees a key of the tile             never visited
    full      every row (< T) sees each of block_n keys (< T)       visited without mask code
    partial   anything else                                         visited with the mask test

Adjacent pairs of one state form a run [first, last) of tile numbers. All work is on the ends of intervals: O(n log n)
in the number of segments, gaps and runs, and never an array of tile pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mvkernels.mask import Int32Array, IntervalMask

Int64Array = npt.NDArray[np.int64]
Steps = tuple[Int64Array, Int64Array, Int64Array]  # tile, position, state from that position on; sorted, no repeats

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class TileRuns:
    """Runs of tiles for each of `num_tiles` tiles, in compressed sparse rows, all int32.

    Attributes:
        full_ptr: [num_tiles + 1]; the full runs of tile t are full[full_ptr[t]:full_ptr[t + 1]].
        full: [R, 2] half-open tile intervals, ascending within a tile.
        partial_ptr: [num_tiles + 1], as full_ptr.
        partial: [R, 2], as full.
        order: [num_tiles], tiles by decreasing work, so that a grid does not end on its longest program.
    """

    full_ptr: Int32Array
    full: Int32Array
    partial_ptr: Int32Array
    partial: Int32Array
    order: Int32Array

    @property
    def num_tiles(self) -> int:
        return len(self.order)

    def pairs(self) -> tuple[int, int]:
        """Count the (full, partial) tile pairs that a kernel visits."""
        full, partial = (int(np.diff(runs, axis=1).sum(dtype=np.int64)) for runs in (self.full, self.partial))
        return full, partial


@dataclass(frozen=True, eq=False)
class TilePlan:
    """rows: the runs of key tiles of each query tile. columns: the runs of query tiles of each key tile."""

    block_m: int
    block_n: int
    rows: TileRuns
    columns: TileRuns


def tile_plan(mask: IntervalMask, block_m: int, block_n: int) -> TilePlan:
    """Plan query tiles of `block_m` rows and key tiles of `block_n` keys for a mask.

    Raises ValueError when a tile size is not positive.
    """
    if block_m < 1 or block_n < 1:
        raise ValueError(f"expected positive tile sizes, got block_m={block_m}, block_n={block_n}")
    query_tiles = -(-mask.total_tokens // block_m)
    key_tiles = -(-mask.total_tokens // block_n)
    steps = _row_steps(mask, block_m, block_n, query_tiles, key_tiles)
    rows = _runs(steps, num_tiles=query_tiles, end=key_tiles)
    columns = _runs(_transpose(steps, key_tiles), num_tiles=key_tiles, end=query_tiles)
    return TilePlan(block_m, block_n, rows, columns)


@dataclass(frozen=True, eq=False)
class KeyIntervals:
    """The transposed mask: rows j <= i < last_row[j] outside its gaps see key j. All int32.

    gap_ptr [C + 1], gaps [H, 2]: half-open row intervals of each of C classes of keys; key_class [T].
    """

    last_row: Int32Array
    key_class: Int32Array
    gap_ptr: Int32Array
    gaps: Int32Array


def key_intervals(mask: IntervalMask) -> KeyIntervals:
    """Transpose a mask, interval by interval. Keys between the same ends of gaps are one class."""
    borders = np.unique(np.append(mask.gaps, 0)).astype(np.int64)
    # For each segment a step function over the classes: PARTIAL from where a gap begins, EMPTY from where it ends.
    # Where a gap ends at the beginning of the next, the later entry counts.
    segments = np.arange(mask.num_segments, dtype=np.int64)
    owner = np.concatenate([segments, np.repeat(np.repeat(segments, np.diff(mask.gap_ptr)), 2)])
    at = np.concatenate([np.zeros_like(segments), np.searchsorted(borders, mask.gaps.reshape(-1))])
    hidden = np.concatenate([np.zeros_like(segments), np.tile(np.array([PARTIAL, EMPTY]), len(mask.gaps))])
    key = owner * len(borders) + at
    by_key = np.argsort(key, kind="stable")
    chosen = by_key[_last_of_each(key[by_key])]
    steps = _without_repeats(owner[chosen], at[chosen], hidden[chosen])
    runs = _runs(_transpose(steps, len(borders)), num_tiles=len(borders), end=mask.num_segments)
    keys = np.arange(mask.total_tokens)
    last_row = mask.segment_starts[np.searchsorted(mask.first_key, keys, side="right")]
    key_class = np.searchsorted(borders, keys, side="right").astype(np.int32) - np.int32(1)
    return KeyIntervals(last_row, key_class, runs.partial_ptr, mask.segment_starts[runs.partial])


def expand(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """Concatenate arange(start, start + length), vectorised."""
    before = np.concatenate([[0], np.cumsum(lengths)])
    filled: Int64Array = np.arange(before[-1]) + np.repeat(starts - before[:-1], lengths)
    return filled


@dataclass(frozen=True, eq=False)
class Pieces:
    """The rows of query tiles, cut at segment borders. Rows of a piece differ only by the causal triangle."""

    tile: Int64Array  # [P]
    segment: Int64Array  # [P]
    start: Int64Array  # [P] first row
    stop: Int64Array  # [P] one past the last row


def cut_pieces(mask: IntervalMask, row_cuts: Int64Array) -> Pieces:
    """Cut row tiles with the borders `row_cuts` (ascending, from 0 to T) into pieces."""
    borders = np.union1d(row_cuts, mask.segment_starts).astype(np.int64)
    start, stop = borders[:-1], borders[1:]
    segment = np.searchsorted(mask.segment_starts, start, side="right") - 1
    return Pieces(np.searchsorted(row_cuts, start, side="right") - 1, segment, start, stop)


def visible_intervals(mask: IntervalMask, pieces: Pieces) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Find the key intervals that some row of each piece sees: (piece, start, stop), ascending, none empty.

    The last row of the piece sees them whole. Cut at the piece's first row + 1, they are what every row of it sees.
    """
    gap_first = mask.gap_ptr[pieces.segment].astype(np.int64)
    gap_count = mask.gap_ptr[pieces.segment + 1] - gap_first
    which = np.repeat(np.arange(len(pieces.start)), gap_count + 1)
    # Every interval begins where the gap before it ends, and ends where the gap after it begins.
    ends = np.cumsum(gap_count + 1)
    is_first, is_last = np.zeros(len(which), bool), np.zeros(len(which), bool)
    is_first[ends - gap_count - 1] = True
    is_last[ends - 1] = True
    gaps = mask.gaps[expand(gap_first, gap_count)]
    start, stop = np.empty(len(which), np.int64), np.empty(len(which), np.int64)
    start[is_first], start[~is_first] = mask.first_key[pieces.segment], gaps[:, 1]
    stop[is_last], stop[~is_last] = pieces.stop, gaps[:, 0]
    some = start < stop
    return which[some], start[some], stop[some]


def _row_steps(mask: IntervalMask, block_m: int, block_n: int, query_tiles: int, key_tiles: int) -> Steps:
    """Compute the state of each row tile as a step function of the key tile."""
    cuts = np.minimum(np.arange(query_tiles + 1, dtype=np.int64) * block_m, mask.total_tokens)
    pieces = cut_pieces(mask, cuts)
    which, start, stop = visible_intervals(mask, pieces)
    common = np.minimum(stop, pieces.start[which] + 1)
    # A tile is touched if some row sees some key of it, and covered by a piece if all rows of the piece see all keys.
    touched = _changes(pieces.tile[which], start // block_n, -(-stop // block_n))
    covered = _changes(pieces.tile[which], -(-start // block_n), common // block_n)

    origins = np.arange(query_tiles, dtype=np.int64)
    tile = np.concatenate([origins, touched[0], covered[0]])
    at = np.concatenate([np.zeros_like(origins), touched[1], covered[1]])
    touch = np.concatenate([np.zeros_like(origins), touched[2], np.zeros_like(covered[2])])
    cover = np.concatenate([np.zeros_like(origins), np.zeros_like(touched[2]), covered[2]])
    key = tile * (key_tiles + 1) + at
    by_key = np.argsort(key, kind="stable")
    last = _last_of_each(key[by_key])
    tile, at = tile[by_key][last], at[by_key][last]
    touching, covering = np.cumsum(touch[by_key])[last], np.cumsum(cover[by_key])[last]
    num_pieces = np.bincount(pieces.tile, minlength=query_tiles)[tile]
    state = np.where(covering == num_pieces, FULL, np.where(touching > 0, PARTIAL, EMPTY))
    return _without_repeats(tile, at, state)


def _changes(tile: Int64Array, first: Int64Array, last: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Return (tile, key tile, +1 or -1) where the intervals [first, last) begin and end."""
    some = first < last
    tile, first, last = tile[some], first[some], last[some]
    one = np.ones_like(tile)
    return np.concatenate([tile, tile]), np.concatenate([first, last]), np.concatenate([one, -one])


def _transpose(steps: Steps, key_tiles: int) -> Steps:
    """Transpose the states to a step function of the query tile for each key tile.

    A column changes state at query tile m only where row m differs from row m - 1. These stretches of key tiles are
    few, and only they are written out.
    """
    tile, at, state = steps
    rows = int(tile[-1]) + 1 if len(tile) else 0
    inner = tile < rows - 1
    # Each row beside the row before it (for row 0: an empty one), both as step functions on common borders.
    row = np.concatenate([tile, [0], tile[inner] + 1]) if rows else tile
    column = np.concatenate([at, [0], at[inner]]) if rows else at
    values = np.concatenate([state, [EMPTY], state[inner]]) if rows else state
    own = np.arange(len(row)) < len(tile)
    key = row * (key_tiles + 1) + column
    by_key = np.argsort(key, kind="stable")
    row, column, values, own = row[by_key], column[by_key], values[by_key], own[by_key]
    here = np.arange(len(row))
    now = values[np.maximum.accumulate(np.where(own, here, 0))]
    before = values[np.maximum.accumulate(np.where(own, 0, here))]
    last = _last_of_each(key[by_key])
    row, column, now, before = row[last], column[last], now[last], before[last]
    stop = _next_or(row, column, key_tiles)
    changed = now != before
    length = (stop - column)[changed]
    columns = expand(column[changed], length)
    rows_of, states = np.repeat(row[changed], length), np.repeat(now[changed], length)
    by_column = np.argsort(columns, kind="stable")  # rows stay ascending within a column
    return columns[by_column], rows_of[by_column], states[by_column]


def _runs(steps: Steps, num_tiles: int, end: int) -> TileRuns:
    """Compute the runs of the step functions; the last step of a tile reaches to `end`."""
    tile, first, state = steps
    last = _next_or(tile, first, end)
    found = {}
    for kind in (FULL, PARTIAL):
        chosen = (state == kind) & (first < last)
        ptr = np.zeros(num_tiles + 1, np.int32)
        np.cumsum(np.bincount(tile[chosen], minlength=num_tiles), out=ptr[1:])
        found[kind] = ptr, np.stack([first[chosen], last[chosen]], axis=1).astype(np.int32)
    work = np.bincount(tile, weights=np.where(state == EMPTY, 0, last - first), minlength=num_tiles)
    order = np.argsort(-work, kind="stable").astype(np.int32)
    return TileRuns(*found[FULL], *found[PARTIAL], order)


def _last_of_each(sorted_keys: Int64Array) -> npt.NDArray[np.bool_]:
    """Mark the last of equal keys."""
    last = np.ones(len(sorted_keys), bool)
    last[:-1] = sorted_keys[1:] != sorted_keys[:-1]
    return last


def _next_or(tile: Int64Array, at: Int64Array, end: int) -> Int64Array:
    """Find the next step of the same tile; `end` after the last one."""
    following = np.full(len(at), end, np.int64)
    same = tile[1:] == tile[:-1]
    following[:-1][same] = at[1:][same]
    return following


def _without_repeats(tile: Int64Array, at: Int64Array, state: Int64Array) -> Steps:
    kept = np.ones(len(tile), bool)
    kept[1:] = (tile[1:] != tile[:-1]) | (state[1:] != state[:-1])
    return tile[kept], at[kept], state[kept]
