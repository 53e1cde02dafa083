"""Rotary position embedding (RoPE) for callers whose queries and keys are not rotated yet: `Rope` and `rotate`.

`PagedKVCache.append(..., rope=rope)` rotates keys as it writes them, in one launch for all rows of a layer. Models of
transformers rotate before their attention interface and need neither. `mvkernels.decoder` uses `Rope`.
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
    """Frequencies of a rotary position embedding, in the half-rotation convention of Llama and Qwen.

    The formula is in `mvkernels.ops.rope`. Dimensions of a head from 2 H on are not rotated.

    Attributes:
        inv_freq: [H] float32, the frequency of each pair (i, i + H) of a head, in radians per position.
        scaling: Factor of the cosines and sines (attention scaling of YaRN).

    Raises:
        ValueError: `inv_freq` is not a float32 tensor [H] with H of at least 1.

    Source: arXiv 2104.09864.
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
        """Read the frequencies from a transformers model config.

        Args:
            config: A transformers model config with rope_type "default", "linear", "llama3" or "yarn".
            device: Device of the frequencies.

        Returns:
            The Rope of the config's text model.

        Raises:
            ValueError: `config` is no model config, its rope_type is another one, a parameter is missing, the
                parameters differ between layers, or PyTorch does not have the device here.
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
        """Compute the frequencies from the `rope_parameters` of a config.

        Args:
            parameters: rope_type, rope_theta and the parameters of that type, under the names of transformers.
            head_dim: Dimensions of a head.
            max_positions: The config's max_position_embeddings, used where original_max_position_embeddings is missing.
            device: Device of the frequencies.

        Returns:
            The Rope of these parameters.

        Raises:
            ValueError: The rope_type is not among those of `from_config`, a parameter is missing, or PyTorch does not
                have the device here.
        """
        inv_freq, scaling = inverse_frequencies(parameters, head_dim, max_positions)
        return cls(inv_freq.to(checked_device(device)), scaling)

    def to(self, device: torch.device | str) -> Rope:
        """Copy the frequencies to a device.

        Args:
            device: Device of the copy.

        Returns:
            The same Rope on `device`.

        Raises:
            ValueError: PyTorch does not have the device here.
        """
        return Rope(self.inv_freq.to(checked_device(device)), self.scaling)

    def at(self, positions: torch.Tensor) -> Rotation:
        """Bind the frequencies to positions, as the kernels take them; no tensor is computed.

        Args:
            positions: [N] int32 or int64, on the device of `inv_freq`.

        Returns:
            Positions, frequencies and scaling.
        """
        return Rotation(positions, self.inv_freq, self.scaling)

    def tables(self, positions: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Tabulate the cosines and sines of positions, for kernels that share them between layers.

        Args:
            positions: [N] int32 or int64, on the device of `inv_freq`.
            dtype: Dtype of the tables; they are computed in float32 and rounded once.

        Returns:
            Scaled cosines and sines, [N, 2 H] each, contiguous. Pair i has the columns i and i + H.
        """
        cos, sin = cos_sin(self.at(positions), torch.float32)
        return torch.cat((cos, cos), 1).to(dtype), torch.cat((sin, sin), 1).to(dtype)


def rotate(x: torch.Tensor, positions: torch.Tensor, rope: Rope, backend: str = "auto") -> torch.Tensor:
    """Rotate queries or keys by their positions; not differentiable.

    Args:
        x: [N, heads, D] floating point, any strides.
        positions: [N] int32 or int64 on the device of x; `step.positions` for the rows of a step.
        rope: Frequencies on the device of x, with 2 H <= D.
        backend: "auto", "cpu", "triton" or "reference" ("auto" never chooses it). A backend given by name never falls
            back.

    Returns:
        The rotated [N, heads, D], contiguous, in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, x requires a gradient, or `backend` is unknown.
        BackendError: The backend given by name cannot compute this, or no backend of "auto" can; gives the reasons.

    Source: arXiv 2104.09864.
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
