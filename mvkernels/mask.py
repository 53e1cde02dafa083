"""The attention mask of a branch layout as intervals: O(T) integers, never a T x T array.

Row i sees key j  iff  first_key[s] <= j <= i  and j lies in no gap of s, where s is the segment of row i.

    segment_starts [S + 1] int32   rows of segment s are segment_starts[s] .. segment_starts[s + 1] - 1;
                                   segment_starts[0] == 0, segment_starts[S] == T
    first_key      [S]     int32   first key a row of the segment may see: the start of its document
    gap_ptr        [S + 1] int32   the gaps of segment s are gaps[gap_ptr[s]:gap_ptr[s + 1]]
    gaps           [G, 2]  int32   half-open key intervals hidden from every row of the segment: ascending, disjoint,
                                   within [first_key[s], segment_starts[s])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Host arrays of a mask; the module's docstring has the legend.

    Whoever builds one vouches for it: construction checks nothing, because layouts are built on the training path.
    `check` is there for tests and for callers that build a mask of their own.
    """

    segment_starts: Int32Array
    first_key: Int32Array
    gap_ptr: Int32Array
    gaps: Int32Array
    total_tokens: int

    @property
    def num_segments(self) -> int:
        return len(self.first_key)

    def segment_of_rows(self) -> Int32Array:
        """Segment index of every row, [T] int32."""
        lengths = np.diff(self.segment_starts)
        return np.repeat(np.arange(self.num_segments, dtype=np.int32), lengths)

    def visible_pairs(self) -> int:
        """Number of visible (row, key) pairs, without building them: the work an exact kernel has to do."""
        starts = self.segment_starts[:-1].astype(np.int64)
        ends = self.segment_starts[1:].astype(np.int64)
        rows = ends - starts
        hidden_before = np.concatenate([[0], np.cumsum(np.diff(self.gaps, axis=1).reshape(-1), dtype=np.int64)])
        hidden = hidden_before[self.gap_ptr[1:]] - hidden_before[self.gap_ptr[:-1]]
        before = starts - self.first_key - hidden
        return int((rows * before + rows * (rows + 1) // 2).sum())

    def check(self) -> None:
        """Raise ValueError when an invariant of the module's legend does not hold."""
        for name in ("segment_starts", "first_key", "gap_ptr", "gaps"):
            array = getattr(self, name)
            if array.dtype != np.int32:
                raise ValueError(f"{name}: expected int32, got {array.dtype}")
        segments = self.num_segments
        shapes = (self.segment_starts.shape, self.gap_ptr.shape, self.gaps.shape[1:])
        if shapes != ((segments + 1,), (segments + 1,), (2,)):
            raise ValueError(f"expected segment_starts and gap_ptr [{segments + 1}] and gaps [G, 2], got {shapes}")
        if self.segment_starts[0] != 0 or self.segment_starts[-1] != self.total_tokens:
            raise ValueError(f"segment_starts must run from 0 to {self.total_tokens}, got {self.segment_starts}")
        if (np.diff(self.segment_starts) < 0).any() or (np.diff(self.gap_ptr) < 0).any():
            raise ValueError("segment_starts and gap_ptr must not decrease")
        if self.gap_ptr[0] != 0 or self.gap_ptr[-1] != len(self.gaps):
            raise ValueError(f"gap_ptr must run from 0 to {len(self.gaps)}, got {self.gap_ptr}")
        for s in range(segments):
            bounds = self.gaps[self.gap_ptr[s] : self.gap_ptr[s + 1]].reshape(-1)
            inside = np.concatenate([self.first_key[s : s + 1], bounds, self.segment_starts[s : s + 1]])
            if (np.diff(inside) < 0).any():
                raise ValueError(f"gaps of segment {s} are not ascending, disjoint and before its rows: {inside}")
