"""Rotary position embedding for callers that have not rotated: `Rope`, and `rotate` for their queries.

Keys are rotated on their way into the pages: `PagedKVCache.append(..., rope=rope)`, one launch for all rows of a layer.
Models in transformers rotate before their attention interface, and need neither. `mvkernels.decoder` uses `Rope`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mvkernels.errors import described, require_type
from mvkernels.ops.backends import choose_backend, triton_reason
from mvkernels.ops.device import checked_device
from mvkernels.ops.rope import Rotation, check_rotation, cos_sin, inverse_frequencies, rotate_rows, rotation_reason


@dataclass(frozen=True, eq=False)
class Rope:
    """Frequencies of a rotary embedding in the half-rotation convention of Llama and Qwen (`ops.rope` has the formula).

    inv_freq [H] float32: of the pairs (i, i + H) of a head, in radians a position; dimensions from 2 H on stay as they
    are. scaling: what cos and sin are multiplied with. Raises ValueError for frequencies of another shape or dtype.
    """

    inv_freq: torch.Tensor
    scaling: float = 1.0

    def __repr__(self) -> str:
        return f"Rope({len(self.inv_freq)} frequencies, scaling {self.scaling:g}, {self.inv_freq.device})"

    def __post_init__(self) -> None:
        if not isinstance(self.inv_freq, torch.Tensor):
            raise ValueError(f"inv_freq: expected a tensor [H] torch.float32, got {described(self.inv_freq)}")
        if self.inv_freq.dim() != 1 or not len(self.inv_freq) or self.inv_freq.dtype != torch.float32:
            got = f"{list(self.inv_freq.shape)} {self.inv_freq.dtype}"
            raise ValueError(f"inv_freq: expected [H] torch.float32, got {got}")

    @classmethod
    def from_config(cls, config: Any, device: torch.device | str = "cpu") -> Rope:
        """That of a transformers model config: rope_type "default", "linear", "llama3" or "yarn".

        Raises ValueError for other types, and for parameters that differ from layer to layer or are missing.
        """
        if not hasattr(config, "get_text_config"):
            raise ValueError(f"config: expected a transformers model config, got {described(config)}")
        text = config.get_text_config()
        parameters = getattr(text, "rope_parameters", None)
        if not parameters or any(isinstance(value, Mapping) for value in parameters.values()):
            raise ValueError(f"rope_parameters: expected one set for all layers, got {parameters}")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls.from_parameters(parameters, head_dim, text.max_position_embeddings, device)

    @classmethod
    def from_parameters(
        cls,
        parameters: Mapping[str, Any],
        head_dim: int,
        max_positions: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Rope:
        """That of a config's `rope_parameters`, under the names of transformers; see `from_config`.

        max_positions: stands in for a missing original_max_position_embeddings.
        """
        inv_freq, scaling = inverse_frequencies(parameters, head_dim, max_positions)
        return cls(inv_freq.to(checked_device(device)), scaling)

    def to(self, device: torch.device | str) -> Rope:
        """The same on another device."""
        return Rope(self.inv_freq.to(checked_device(device)), self.scaling)

    def at(self, positions: torch.Tensor) -> Rotation:
        """What kernels take, for positions [N] int32 or int64 on the device of `inv_freq`."""
        return Rotation(positions, self.inv_freq, self.scaling)

    def tables(self, positions: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Tabulate the rotations of positions, for kernels that share them between layers.

        Args:
            positions: [N] int32 or int64, on the device of `inv_freq`.
            dtype: of the tables; they are computed in float32 and rounded once.

        Returns:
            Scaled cosines and sines, [N, 2 H] each, contiguous: those of pair i stand at i and at i + H.
        """
        cos, sin = cos_sin(self.at(positions), torch.float32)
        return torch.cat((cos, cos), 1).to(dtype), torch.cat((sin, sin), 1).to(dtype)


def rotate(x: torch.Tensor, positions: torch.Tensor, rope: Rope, backend: str = "auto") -> torch.Tensor:
    """Rotates queries, or keys, by their positions; contiguous, in x's dtype. Not differentiable.

    x [N, heads, D], any strides; positions [N] int32 or int64, `step.positions` for a step's rows; rope: on x's device,
    2 H <= D. backend: "auto", "cpu", "triton" or "reference". Raises ValueError for arguments that do not fit, and
    BackendError with the reason when the backend cannot do it.
    """
    require_type(torch.Tensor, x=x, positions=positions)
    require_type(Rope, rope=rope)
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point [N, heads, D], got {x.dtype} {list(x.shape)}")
    rotation = rope.at(positions)
    check_rotation(rotation, x)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x: expected a tensor outside autograd, got one that requires grad: use torch.no_grad()")
    device = x.device.type
    reasons = {
        "cpu": None if device == "cpu" else f"expected tensors on cpu, got {device}",
        "triton": triton_reason(x.device) or rotation_reason(x.dtype),
        "reference": None,
    }
    chosen = choose_backend(backend, reasons, auto=("cpu", "triton"))
    with torch.no_grad():
        if chosen == "triton":
            from mvkernels.ops.decode.append_triton import launch_rotate

            return launch_rotate(x, rotation)
        if chosen == "reference":
            from mvkernels.reference.rope import rotate as rotate_reference

            return rotate_reference(x, *rotation)
        return rotate_rows(x, rotation)
