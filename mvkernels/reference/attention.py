"""Attention under a dense mask by definition: T x T scores, softmax, product. Gradients are PyTorch's own."""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax(scale q k^T over the visible keys) v, and the log-sum-exp of the scores.

    Products are computed in the dtype of the inputs, the softmax in at least fp32.

    Args:
        q: [R, Hq, D] queries. Query head h reads key-value head h // (Hq / Hkv).
        k: [K, Hkv, D] keys, Hq a multiple of Hkv.
        v: [K, Hkv, D] values.
        visible: [R, K] bool, True where the row sees the key.
        scale: Factor of the scores; None is 1 / sqrt(D).

    Returns:
        out [R, Hq, D] in the dtype of q, and lse [Hq, R] in natural logarithm, float32 (float64 for float64 inputs). A
            row without visible keys gives 0 and -inf.
    """
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    queries = q.transpose(0, 1)
    keys = k.repeat_interleave(group, dim=1).transpose(0, 1)
    values = v.repeat_interleave(group, dim=1).transpose(0, 1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (queries @ keys.transpose(1, 2)).to(wide) * factor
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    blind = ~visible.any(dim=-1)
    # Subtracting the infinite lse of a blind row would give NaN; 0 leaves exp(-inf) = 0.
    weights = torch.exp(scores - lse.masked_fill(blind, 0.0).unsqueeze(-1))
    return (weights.to(v.dtype) @ values).transpose(0, 1), lse
