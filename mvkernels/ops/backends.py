"""Choice of a backend. One requested by name never falls back; "auto" lists every reason when none fits."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch

from mvkernels.errors import BackendError

MIN_CAPABILITY = (8, 0)
# At import: torch.compile can trace a name, but not the search for a package.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(requested: str, reasons: Mapping[str, str | None], auto: tuple[str, ...] | None = None) -> str:
    """Choose the backend to run.

    Args:
        requested: "auto", or a backend by name.
        reasons: For each backend, best first, None if it can do the work, else the reason why not.
        auto: The backends that "auto" chooses from, best first; None: all.

    Returns:
        The requested backend; for "auto" the first without a reason.

    Raises:
        ValueError: The name is unknown.
        BackendError: The requested backend, or every backend of "auto", has a reason; the message gives them.
    """
    if requested == "auto":
        names = tuple(reasons) if auto is None else auto
        for name in names:
            if reasons[name] is None:
                return name
        raise BackendError("no backend fits: " + "; ".join(f"{name}: {reasons[name]}" for name in names))
    if requested not in reasons:
        expected = ", ".join(repr(name) for name in ("auto", *reasons))
        raise ValueError(f"backend: expected one of {expected}, got {requested!r}")
    reason = reasons[requested]
    if reason is not None:
        raise BackendError(f"backend {requested!r} cannot do this: {reason}")
    return requested


def triton_interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def triton_reason(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on tensors of this device, or None. Does not import Triton."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type == "cuda":
        return _gpu_reason(device)
    if device.type != "cpu":
        return f"expected tensors on cuda, got {device.type}"
    return None if triton_interpreted() else "tensors are on the CPU, where Triton runs with TRITON_INTERPRET=1 only"


def _gpu_reason(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are checked on NVIDIA GPUs only, this is a ROCm build of PyTorch"
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    expected, got = (".".join(map(str, version)) for version in (MIN_CAPABILITY, capability))
    return f"expected compute capability {expected} or higher, got {got}"


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Format dtypes for messages: "float32, bfloat16"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
