"""The attention mask of a branch layout as intervals: O(T) integers instead of a T x T array.

Row i sees key j iff first_key[s] <= j <= i and j is in no gap of s, where s is the segment of row i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Attention mask of T rows as intervals of hidden keys, in arrays on the host.

    Construction checks nothing, because layouts are built on the training path. Use `check` in tests and for masks of
    your own.

    Attributes:
        segment_starts: [S + 1] int32. Segment s has the rows segment_starts[s] .. segment_starts[s + 1] - 1;
            segment_starts[0] is 0 and segment_starts[S] is T.
        first_key: [S] int32, the first key that a row of the segment may see: the start of its document.
        gap_ptr: [S + 1] int32; segment s has the gaps gaps[gap_ptr[s]:gap_ptr[s + 1]].
        gaps: [G, 2] int32, half-open key intervals hidden from every row of the segment: ascending, disjoint, within
            [first_key[s], segment_starts[s]).
        total_tokens: T.
    """

    segment_starts: Int32Array
    first_key: Int32Array
    gap_ptr: Int32Array
    gaps: Int32Array
    total_tokens: int

    @property
    def num_segments(self) -> int:
        """S, the number of segments."""
        return len(self.first_key)

    def segment_of_rows(self) -> Int32Array:
        """Expand the segments to rows.

        Returns:
            [T] int32, the segment of every row.
        """
        lengths = np.diff(self.segment_starts)
        return np.repeat(np.arange(self.num_segments, dtype=np.int32), lengths)

    def visible_pairs(self) -> int:
        """Count the visible (row, key) pairs without building them: the work of an exact kernel.

        Returns:
            The number of pairs.
        """
        starts = self.segment_starts[:-1].astype(np.int64)
        ends = self.segment_starts[1:].astype(np.int64)
        rows = ends - starts
        hidden_before = np.concatenate([[0], np.cumsum(np.diff(self.gaps, axis=1).reshape(-1), dtype=np.int64)])
        hidden = hidden_before[self.gap_ptr[1:]] - hidden_before[self.gap_ptr[:-1]]
        before = starts - self.first_key - hidden
        return int((rows * before + rows * (rows + 1) // 2).sum())

    def check(self) -> None:
        """Verify the shapes, dtypes and order that the attributes are documented to have.

        Raises:
            ValueError: An invariant does not hold.
        """
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
