"""Rotary position embedding by definition (arXiv 2104.09864, with the halves of a head as pairs, as in Llama).

z[i] = x[i] + i x[i + H]  ->  scaling z[i] exp(i position inv_freq[i]);   what is no part of a pair stays
"""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float) -> torch.Tensor:
    """x [N, heads, D], positions [N], inv_freq [H], 2 H <= D -> x's shape and dtype. The angle is rounded to fp32."""
    half = len(inv_freq)
    angle = (positions[:, None].float() * inv_freq.float()).double()
    turn = torch.polar(torch.full_like(angle, scaling), angle)[:, None]
    exact = x.double()
    turned = torch.complex(exact[..., :half], exact[..., half : 2 * half]) * turn
    return torch.cat([turned.real, turned.imag, exact[..., 2 * half :]], dim=-1).to(x.dtype)
