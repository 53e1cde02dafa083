"""Argmax of each row of logits, which also finds NaN, in one pass."""

from __future__ import annotations

import torch

from mvkernels.ops.dense import layer as layer_native

# Logits of a piece, where PyTorch computes it on a CPU: amax over pieces first, because its amax is vectorised and its
# argmax is not.
_PIECE = 256


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ([n] int64 token, [n] logit) of each row of logits [n, V]: the first NaN, else the first largest."""
    if _is_native(logits):
        return layer_native.likeliest(logits)
    chosen = _argmax(logits)
    return chosen, logits.gather(1, chosen[:, None])[:, 0]


def _is_native(logits: torch.Tensor) -> bool:
    fits = logits.device.type == "cpu" and logits.dtype is torch.float32 and logits.stride(1) == 1
    # For few logits a compilation would take longer than it saves.
    many = layer_native.is_compiled() or logits.numel() >= layer_native.NUMBERS
    return fits and many and layer_native.layer_reason() is None


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    size = logits.shape[-1]
    if logits.device.type != "cpu" or size <= _PIECE or not len(logits):
        return logits.argmax(dim=-1)
    rest = size % _PIECE
    largest = logits[:, : size - rest].reshape(len(logits), -1, _PIECE).amax(dim=-1)
    if rest:
        largest = torch.cat((largest, logits[:, -rest:].amax(dim=-1, keepdim=True)), dim=1)
    # The last piece is filled up from the one before, whose logits are all smaller if the first largest is in the last.
    first = (largest.argmax(dim=-1) * _PIECE).clamp(max=size - _PIECE)[:, None]
    places = first + torch.arange(_PIECE)
    chosen: torch.Tensor = first + logits.gather(1, places).argmax(dim=-1, keepdim=True)
    return chosen[:, 0]
