"""Validation of device arguments."""

from __future__ import annotations

import torch


def checked_device(device: torch.device | str) -> torch.device:
    """Convert a device argument to a torch.device. Raises ValueError if PyTorch does not have the device here."""
    try:
        found = torch.device(device)
        if found.type != "cpu":
            torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0]
        got = str(device) if isinstance(device, torch.device) else device
        raise ValueError(f"device: expected a device that PyTorch has here, got {got!r}: {reason}") from None
    return found
