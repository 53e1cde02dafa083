"""Decode steps over tensors at fixed addresses, so that one CUDA graph serves many steps.

A `FixedStep` holds what a model reads of a step, for up to a number of rows: positions, slots and the tables of tree
decode. `lay` copies a planned step there. `advance` moves to it, and to those after it, on the device alone. `step` is
the step for the model; rows beyond the planned ones are not written. `ops.decode.buffers` has the details.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mvkernels.cache.cache import PagedKVCache
from mvkernels.cache.step import Step
from mvkernels.decode import MAX_HEAD_DIM, TRITON_DTYPES
from mvkernels.errors import BackendError
from mvkernels.ops.backends import dtype_names, triton_reason
from mvkernels.ops.decode.buffers import PAGES, Bucket, DecodeBuffers, bucket_of, upload
from mvkernels.ops.decode.cost_model import plan_decode
from mvkernels.ops.decode.tables import TableArrays, table_arrays

__all__ = ["PAGES", "Bucket", "FixedStep", "Laid", "fixed_reason", "plan_fixed", "upload"]


@dataclass(frozen=True, eq=False)
class Laid:
    """Tables of a step on the host, and the bucket of the buffers that they fit into."""

    bucket: Bucket
    arrays: TableArrays
    key: tuple[object, ...]


def fixed_reason(cache: PagedKVCache) -> str | None:
    """Return why steps of a cache cannot run over fixed memory, or None: only the Triton kernels can."""
    reason = triton_reason(cache.device)
    if reason is None and cache.dtype not in TRITON_DTYPES:
        reason = f"expected dtype {dtype_names(TRITON_DTYPES)}, got {cache.dtype}"
    if reason is None and cache.head_dim > MAX_HEAD_DIM:
        reason = f"expected a head dimension of at most {MAX_HEAD_DIM}, got {cache.head_dim}"
    return reason


def plan_fixed(step: Step, heads: int, pages: int = PAGES) -> Laid:
    """Plan the decoding of a step by `heads` query heads. pages: the least room for page tables."""
    from mvkernels.ops.decode.triton import decode_shape, tables_key

    cache = step.entries[0][0].cache
    model = (heads, cache.num_kv_heads, cache.head_dim, cache.dtype.itemsize, cache.device)
    shape = decode_shape(*model)
    plan = plan_decode(step.views, shape)
    arrays = table_arrays(plan, step.views)
    return Laid(bucket_of(plan, arrays, step.views, shape, pages), arrays, tables_key(*model))


class FixedStep:
    """Memory for the steps of a bucket, on the device of their cache; addresses never change.

    Attributes:
        rows: Most rows of a step.
        positions: [rows] int32, of the current step.
        slots: [rows] int64, of the current step.
        keep: [rows] int32, the rows given to `lay`.
    """

    def __init__(self, laid: Laid, step: Step) -> None:
        self.bucket, self._key = laid.bucket, laid.key
        lists = step.views.device_pages if laid.bucket.lists is not None else None
        self._buffers = DecodeBuffers.empty(laid.bucket, step.views.page_size, step.entries[0][0].cache.device, lists)
        self.rows = laid.bucket.capacity.rows
        self.positions, self.slots, self.keep = (self._buffers.positions, self._buffers.slots, self._buffers.keep)

    def lay(self, laid: Laid, step: Step, keep: Sequence[int] = ()) -> int:
        """Copy a step, for the next `advance`; returns the number of bytes. keep: some of its rows."""
        if laid.bucket != self.bucket:
            raise ValueError(f"expected a step of bucket {self.bucket}, got one of {laid.bucket}")
        positions = [p.start + p.base + token for p in step.planned for token in range(p.num_tokens)]
        return self._buffers.lay(
            laid.arrays, step.views, np.array(positions, dtype=np.int32), np.array(keep, dtype=np.int32)
        )

    def advance(self) -> None:
        """Move to the step that was copied, or to the one after the last; device work only."""
        self._buffers.advance()

    def step(self, step: Step) -> Step:
        """Bind an open step to this memory, for `PagedKVCache.append` and `tree_decode`."""
        views = self._buffers.padded(step.views, self._key)
        held = replace(step, total_rows=self.rows, positions=self.positions, slots=self.slots, views=views)
        return replace(held, ahead=None, cursor=None, spare=True)

    def check(self, step: Step) -> None:
        """Raise BackendError unless `step`, a result of `self.step`, was decoded with the tables in this memory."""
        if len(step.views._cache) != 1:
            heads = self._key[1]
            raise BackendError(f"expected layers of {heads} query heads, all decoding by Triton, got other ones")
