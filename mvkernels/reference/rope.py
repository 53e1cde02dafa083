"""Rotary position embedding by definition (arXiv 2104.09864; pairs are the halves of a head, as in Llama).

z[i] = x[i] + i x[i + H]  ->  scaling z[i] exp(i position inv_freq[i]);   dimensions outside the pairs are unchanged
"""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float) -> torch.Tensor:
    """Rotate heads by their positions; the angle is rounded to fp32.

    Args:
        x: [N, heads, D].
        positions: [N].
        inv_freq: [H] with 2 H <= D.
        scaling: Factor of the rotated dimensions.

    Returns:
        [N, heads, D] in the dtype of x.

    Source: arXiv 2104.09864.
    """
    half = len(inv_freq)
    angle = (positions[:, None].float() * inv_freq.float()).double()
    turn = torch.polar(torch.full_like(angle, scaling), angle)[:, None]
    exact = x.double()
    turned = torch.complex(exact[..., :half], exact[..., half : 2 * half]) * turn
    return torch.cat([turned.real, turned.imag, exact[..., 2 * half :]], dim=-1).to(x.dtype)
