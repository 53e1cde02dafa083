"""merge_branches on a GPU: CuPy compiles merge.cu and launches it on PyTorch's tensors.

The launch allocates nothing, takes no memory from CuPy's pool and waits for nothing, so it can be captured into a CUDA
graph. Compilation cannot: the first launch on a device must come before the capture.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvkernels.errors import BackendError

CUPY_INSTALLED = importlib.util.find_spec("cupy") is not None
SOURCE = Path(__file__).with_name("merge.cu")
KERNEL = "merge_branches"
THREADS = 256
OPTIONS = ("--std=c++17", f"-DTHREADS={THREADS}")


def cuda_reason(device: torch.device) -> str | None:
    """Return why the kernel cannot run on tensors on this device, or None. Does not import CuPy."""
    if not CUPY_INSTALLED:
        return "CuPy is not installed: pip install 'mvkernels[cuda]'"
    if device.type != "cuda":
        return f"expected tensors on cuda, got {device.type}"
    if torch.version.hip is not None:
        return "the kernel is checked on NVIDIA GPUs only, this is a ROCm build of PyTorch"
    return None


@functools.cache
def _kernel(index: int) -> Any:
    """Compile the kernel for the current device, which has this index. Raises BackendError when that fails."""
    import cupy

    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "backend 'cuda' cannot do this: the kernel is not compiled yet, and a CUDA graph is being captured; "
            "call merge_branches once on this device before"
        )
    try:
        kernel = cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=OPTIONS).get_function(KERNEL)
        kernel.compile()
    except (RuntimeError, cupy.cuda.compiler.CompileException) as error:
        raise BackendError(f"backend 'cuda' cannot do this: CuPy could not compile {SOURCE.name}: {error}") from error
    return kernel


def launch_merge(
    pages: torch.Tensor,
    counts: torch.Tensor,
    used: torch.Tensor,
    position: torch.Tensor,
    error: torch.Tensor,
    parents: torch.Tensor,
    children: torch.Tensor,
    child_ptr: torch.Tensor,
) -> None:
    """Merge in place, on PyTorch's current stream. The caller has checked shapes, dtypes and devices."""
    import cupy

    if not len(parents):
        return
    tensors = (pages, counts, used, position, error, parents, children, child_ptr)
    sizes = (len(used), pages.shape[1], len(children))
    with torch.cuda.device(pages.device), cupy.cuda.Device(pages.device.index):
        kernel = _kernel(pages.device.index)
        # Without a copy: CuPy reads address and shape from __cuda_array_interface__.
        arguments = (*(cupy.asarray(tensor) for tensor in tensors), *(np.int32(size) for size in sizes))
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            kernel((len(parents),), (THREADS,), arguments)
