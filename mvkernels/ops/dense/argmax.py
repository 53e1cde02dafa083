"""The likeliest token of each row of logits, and whether a row has NaN: one pass over what a step of a model gave."""

from __future__ import annotations

import torch

from mvkernels.ops.dense import layer as layer_native

# Logits whose largest one is looked for first, where PyTorch does it on a CPU: its argmax takes one number after the
# other, its amax vectors.
_PIECE = 256


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([n] int64 token, [n] its logit) of each row: the first NaN, else the first of the largest. logits: [n, V]."""
    if _is_native(logits):
        return layer_native.likeliest(logits)
    chosen = _argmax(logits)
    return chosen, logits.gather(1, chosen[:, None])[:, 0]


def _is_native(logits: torch.Tensor) -> bool:
    fits = logits.device.type == "cpu" and logits.dtype is torch.float32 and logits.stride(1) == 1
    # Of few a compilation would take longer than anything that it could save.
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
    # The last piece is filled up from the one before, where all are smaller if it has the first of the largest.
    first = (largest.argmax(dim=-1) * _PIECE).clamp(max=size - _PIECE)[:, None]
    places = first + torch.arange(_PIECE)
    chosen: torch.Tensor = first + logits.gather(1, places).argmax(dim=-1, keepdim=True)
    return chosen[:, 0]
