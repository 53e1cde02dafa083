"""Rotary position embedding, in the half-rotation convention of Llama and Qwen (Su et al. 2021, arXiv 2104.09864).

    a = position * inv_freq[i];   c = scaling * cos a,  s = scaling * sin a
    y[i] = x[i] c - x[i + H] s,   y[i + H] = x[i + H] c + x[i] s   for i < H = len(inv_freq);   y[j] = x[j] for j >= 2 H

The angle is rounded to fp32, as transformers has it, so that far positions get the same one; cos, sin and the products
are fp32 (fp64 for fp64 inputs), and the result is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mvkernels.ops.backends import dtype_names

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Rotation(NamedTuple):
    """Arguments of the kernels: positions [N] int32 or int64 and inv_freq [H] float32 on one device; scaling."""

    positions: torch.Tensor
    inv_freq: torch.Tensor
    scaling: float


def check_rotation(rotation: Rotation, x: torch.Tensor) -> None:
    """Raise ValueError unless the rotation fits the rows of x [N, heads, D]."""
    positions, inv_freq, _ = rotation
    if positions.shape != x.shape[:1] or positions.dtype not in (torch.int32, torch.int64):
        got = f"{positions.dtype} {list(positions.shape)}"
        raise ValueError(f"positions: expected [{x.shape[0]}] int32 or int64, one for each row, got {got}")
    if 2 * len(inv_freq) > x.shape[2]:
        raise ValueError(f"rope: expected at most {x.shape[2] // 2} frequencies, half a head, got {len(inv_freq)}")
    for name, tensor in (("positions", positions), ("rope", inv_freq)):
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device {x.device} of the rows, got {tensor.device}")


def rotation_reason(dtype: torch.dtype) -> str | None:
    """Return why the Triton kernels cannot rotate rows of this dtype, or None."""
    return None if dtype in TRITON_DTYPES else f"expected dtype {dtype_names(TRITON_DTYPES)} to rotate, got {dtype}"


def cos_sin(rotation: Rotation, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute scaled cosines and sines [N, H] of the angles, in `dtype`."""
    angle = (rotation.positions[:, None].float() * rotation.inv_freq).to(dtype)
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if rotation.scaling == 1.0 else (cos * rotation.scaling, sin * rotation.scaling)


def rotate_rows(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate x [N, heads, D] in plain torch; returns the same shape and dtype."""
    half = rotation.inv_freq.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos_sin(rotation, wide)
    cos, sin = cos[:, None], sin[:, None]  # [N, 1, H]
    first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def inverse_frequencies(
    parameters: Mapping[str, Any], head_dim: int, max_positions: int | None = None
) -> tuple[torch.Tensor, float]:
    """inv_freq [H] float32 on the CPU and the attention scaling, from a model config's `rope_parameters`.

    rope_type "default", "linear", "llama3" or "yarn"; rope_theta, partial_rotary_factor and the type's own parameters
    under the names of transformers. max_positions: the config's max_position_embeddings, which stands in for a missing
    original_max_position_embeddings. Raises ValueError for other types and for missing parameters, by name.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in _TYPES:
        raise ValueError(f"rope_type: expected one of {', '.join(map(repr, _TYPES))}, got {kind!r}")
    missing = [name for name in ("rope_theta", *_TYPES[kind]) if parameters.get(name) is None]
    if max_positions is not None and "original_max_position_embeddings" in missing:
        missing.remove("original_max_position_embeddings")
        parameters = {**parameters, "original_max_position_embeddings": max_positions}
    if missing:
        raise ValueError(f"rope_parameters of type {kind!r}: expected {', '.join(missing)}, got {sorted(parameters)}")
    dim = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ValueError(f"expected an even number of rotated dimensions from 2 to {head_dim}, got {dim}")
    inv_freq = 1.0 / float(parameters["rope_theta"]) ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if kind == "linear":
        return inv_freq / parameters["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, parameters), 1.0
    if kind == "yarn":
        return _yarn(inv_freq, parameters), _yarn_scaling(parameters)
    return inv_freq, 1.0


_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def _llama3(inv_freq: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Slow rotations are slowed down by `factor`, fast ones stay, those between are blended (Llama 3.1)."""
    low, high, factor = (float(parameters[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    old = int(parameters["original_max_position_embeddings"])
    turns = inv_freq * old / (2 * math.pi)  # within the old context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


def _yarn(inv_freq: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Interpolated where a rotation turns less than beta_slow times in the old context, kept where more than beta_fast
    times, with a linear ramp over the dimensions between (YaRN, arXiv 2309.00071).
    """
    half = len(inv_freq)
    theta, old = float(parameters["rope_theta"]), int(parameters["original_max_position_embeddings"])

    def dimension(turns: float) -> float:
        """The index, of `half`, at which a rotation turns so often."""
        return half * math.log(old / (turns * 2 * math.pi)) / math.log(theta)

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    return inv_freq / float(parameters["factor"]) * ramp + inv_freq * (1 - ramp)


def _yarn_scaling(parameters: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied with: given, or 0.1 ln(factor) + 1, or a ratio of two such."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor, over, under = parameters["factor"], parameters.get("mscale"), parameters.get("mscale_all_dim")

    def scaling(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    return scaling(over) / scaling(under) if over and under else scaling(1.0)
