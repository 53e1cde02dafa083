"""Attention of a branch layout on the CPU: PyTorch's own flash kernels on just the visible keys.

    s_ij = scale q_i . k_j over the visible j;  lse_i = log sum_j exp(s_ij);  out_i = sum_j exp(s_ij - lse_i) v_j

Each call of the plan (see `cpu_plan`) is dense attention of some rows on some keys, with its own log-sum-exp; calls on
the same rows are merged by it. The backward gives the flash kernel the final out and lse of the rows, so that it sees
the final probabilities, and sums what the calls return, in fp32.

Memory is O(T H D): no mask is larger than GROUP_ROWS rows by MASKED_KEYS keys, or a block by the keys it sees in part.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mvkernels.mask import IntervalMask
from mvkernels.mask_tensor import MaskTable
from mvkernels.ops.attention.cpu_plan import (
    BACKWARD_KEYS,
    CAUSAL,
    DENSE,
    MASKED,
    SQUARES,
    Call,
    Spans,
    chunks,
    cpu_plan,
    subtract,
)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: MaskTable, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute q [T, Hq, D], k and v [T, Hkv, D] -> out [T, Hq, D], lse [Hq, T] (fp32; fp64 for fp64 inputs)."""
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    sign, scale = positive_scale(scale)
    q = q if sign == 1 else q * sign
    wide = accumulator_dtype(q.dtype)
    out = torch.empty(q.shape, dtype=wide)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=wide)
    masks = CallMasks(table.mask, q.dtype)
    for call in _plan(table):
        first, last, spans = call.first, call.last, call.spans
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q[first:last]),
            _heads_first(gather(k, spans)),
            _heads_first(gather(v, spans)),
            0.0,
            call.kind in SQUARES,
            attn_mask=masks.of(call),
            scale=scale,
        )
        merge(out[first:last], lse[:, first:last], part[0].transpose(0, 1), part_lse[0], call.fresh)
    return out.to(q.dtype), lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: MaskTable,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of q, k, v; grad_lse [Hq, T] may be None."""
    depth = q.shape[2]
    q, k, v, grad_out = dense_last(q), dense_last(k), dense_last(v), dense_last(grad_out)
    sign, scale = positive_scale(scale)
    q = q if sign == 1 else q * sign
    if grad_lse is not None:
        q, k, v, out, grad_out = _with_lse_column(q, k, v, out, grad_out, grad_lse)
    wide = accumulator_dtype(q.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=wide) for x in (q, k, v))
    for start, stop in _rows_without_square(table):
        for grad in (dq, dk, dv):
            grad[start:stop] = 0
    masks = CallMasks(table.mask, q.dtype)
    for call, spans in _backward_calls(table):
        first, last = call.first, call.last
        part_q, part_k, part_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad_out[first:last]),
            _heads_first(q[first:last]),
            _heads_first(gather(k, spans)),
            _heads_first(gather(v, spans)),
            _heads_first(out[first:last]),
            lse[None, :, first:last],
            0.0,
            call.kind in SQUARES,
            attn_mask=masks.of(call),
            scale=scale,
        )
        parts = (part_q[0].transpose(0, 1), part_k[0].transpose(0, 1), part_v[0].transpose(0, 1))
        if call.kind in SQUARES:
            for grad, part in zip((dq, dk, dv), parts, strict=True):
                grad[first:last] = part
            continue
        dq[first:last] += parts[0]
        _scatter_add(dk, spans, parts[1])
        _scatter_add(dv, spans, parts[2])
    dq = dq if sign == 1 else dq * sign
    grads = [x[:, :, :depth].to(q.dtype).contiguous() for x in (dq, dk, dv)]
    return grads[0], grads[1], grads[2]


def positive_scale(scale: float) -> tuple[float, float]:
    """Return (sign, positive scale): the flash kernels set hidden scores to -inf, and scale them afterwards."""
    if scale > 0:
        return 1.0, scale
    return (-1.0, -scale) if scale < 0 else (0.0, 1.0)


def dense_last(x: torch.Tensor) -> torch.Tensor:
    """Make the last dimension contiguous: the flash kernels silently misread any other stride of it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, fresh: bool) -> None:
    """Merge attention on further keys into out [R, H, D] and lse [H, R], in place. fresh: there are no keys so far."""
    if fresh:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    weight = torch.sigmoid(part_lse - lse).t().unsqueeze(-1)
    out.lerp_(part.to(out.dtype), weight)
    torch.logaddexp(lse, part_lse, out=lse)


class CallMasks:
    """Additive masks [rows, keys], 0 for visible and -inf for hidden keys, for one call after another.

    One buffer, of which only the hidden parts are set back to 0: to make and zero a buffer for each call takes longer.
    """

    def __init__(self, mask: IntervalMask, dtype: torch.dtype) -> None:
        self.mask = mask
        self._buffer = torch.empty((0, 0), dtype=dtype)
        self._hidden: list[torch.Tensor] = []

    def of(self, call: Call) -> torch.Tensor | None:
        """Return the mask of a call, valid until the next call; None where it needs none.

        For CAUSAL_MASKED calls it has only the keys hidden below the diagonal; the flash kernels apply the causal mask.
        """
        for part in self._hidden:
            part.zero_()
        self._hidden.clear()
        if call.kind in (DENSE, CAUSAL):
            return None
        rows = np.arange(call.first, call.last)[:, None]
        keys = np.concatenate([np.arange(start, stop) for start, stop in call.spans])
        bias = self._zeros(len(rows), len(keys))
        if call.kind == MASKED:
            bias.masked_fill_(torch.from_numpy(keys > rows), float("-inf"))
            self._hidden.append(bias)
        segment = int(np.searchsorted(self.mask.segment_starts, call.first, side="right")) - 1
        start = call.first
        while start < call.last:
            stop = min(int(self.mask.segment_starts[segment + 1]), call.last)
            gaps = self.mask.gaps[self.mask.gap_ptr[segment] : self.mask.gap_ptr[segment + 1]]
            # Keys ascend, so an interval of keys is a range of columns.
            for first, last in np.searchsorted(keys, [[0, self.mask.first_key[segment]], *gaps]).tolist():
                if first < last:
                    self._hidden.append(bias[start - call.first : stop - call.first, first:last].fill_(float("-inf")))
            segment, start = segment + 1, stop
        return bias

    def _zeros(self, rows: int, keys: int) -> torch.Tensor:
        height, width = self._buffer.shape
        if rows > height or keys > width:
            self._buffer = self._buffer.new_zeros((max(rows, height), max(keys, width)))
        return self._buffer[:rows, :keys]


def gather(x: torch.Tensor, spans: Spans) -> torch.Tensor:
    """Rows of x [T, H, D] in the spans; a view where there is one span."""
    if len(spans) == 1:
        return x[spans[0][0] : spans[0][1]]
    return torch.cat([x[start:stop] for start, stop in spans])


def _scatter_add(x: torch.Tensor, spans: Spans, part: torch.Tensor) -> None:
    offset = 0
    for start, stop in spans:
        x[start:stop] += part[offset : offset + stop - start]
        offset += stop - start


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> [1, H, T, D], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _backward_calls(table: MaskTable) -> Iterator[tuple[Call, Spans]]:
    """Yield calls and the keys to process at a time. Squares come first: the others add to their gradients."""
    calls = _plan(table)
    for call in calls:
        if call.kind in SQUARES:
            yield call, call.spans
    for call in calls:
        if call.kind == MASKED:
            yield call, call.spans
        elif call.kind == DENSE:
            for spans in chunks(call.spans, BACKWARD_KEYS):
                yield call, spans


def _rows_without_square(table: MaskTable) -> Spans:
    """Return the rows in no square; their gradients are set to 0 first."""
    squares = [(call.first, call.last) for call in _plan(table) if call.kind in SQUARES]
    return subtract([(0, table.mask.total_tokens)], squares)


def _plan(table: MaskTable) -> list[Call]:
    return table.cached("attention cpu", lambda: cpu_plan(table.mask))


def _with_lse_column(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Append a column to every head through which the gradient of lse flows.

    d s_ij = p_ij (grad_out_i . v_j - grad_out_i . out_i + grad_lse_i), and the flash kernel computes the two dot
    products itself: with out = -1 and grad_out = grad_lse in a column where q = k = v = 0, it computes all three terms.
    """
    zero = [torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v)]
    minus_one = torch.nn.functional.pad(out, (0, 1), value=-1.0)
    return (*zero, minus_one, torch.cat([grad_out, grad_lse.t().unsqueeze(-1).to(grad_out.dtype)], dim=-1))
