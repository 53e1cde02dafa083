"""Devices that callers name."""

from __future__ import annotations

import torch


def checked_device(device: torch.device | str) -> torch.device:
    """The device that is meant. Raises ValueError where PyTorch knows no such device, or this machine has none."""
    try:
        found = torch.device(device)
        if found.type != "cpu":
            torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0]
        got = str(device) if isinstance(device, torch.device) else device
        raise ValueError(f"device: expected a device that PyTorch has here, got {got!r}: {reason}") from None
    return found
