"""``mvkernels env``: versions, the GPU, and which backends and decoders can run here and why the others cannot."""

from __future__ import annotations

import json
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import mvkernels
from mvkernels._lazy import EXTRAS
from mvkernels.cli.options import Json

PACKAGES = ("torch", "triton", "transformers", "cupy", "numpy", "safetensors", "gguf")
# CuPy is published under one name per CUDA version.
DISTRIBUTIONS = {"cupy": ("cupy", "cupy-cuda13x", "cupy-cuda12x")}


def package_version(package: str) -> str | None:
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": props.name,
                "compute_capability": f"{props.major}.{props.minor}",
                "memory_bytes": props.total_memory,
                "multiprocessors": props.multi_processor_count,
            }
        )
    return found


def backends() -> dict[str, dict[str, dict[str, str | None]]]:
    """Operation -> device type -> backend -> why it cannot run here, or None. Asked of the operations themselves."""
    import torch

    from mvkernels import attention, decode

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    probes = {device: torch.empty(1, 1, 64, device=device) for device in devices}
    found = {
        "multiverse_attention": {device: dict(attention.backend_reasons(q)) for device, q in probes.items()},
        "tree_decode": {device: dict(decode.backend_reasons(q)) for device, q in probes.items()},
    }
    if package_version("transformers") is not None:
        from mvkernels.decoder.choose import executor_reasons

        found["decoder"] = {device: {**executor_reasons(q), "hosted": None} for device, q in probes.items()}
    return found


def cpu_kernels() -> dict[str, str | None]:
    """The folder of the compiled CPU kernels, None where there are none, and a warning if something is amiss."""
    from mvkernels.ops.dense.layer import kernels, layer_reason
    from mvkernels.ops.native import WITHOUT

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reason = layer_reason()
    if reason is not None:
        return {"folder": None, "warning": WITHOUT.format(reason)}
    return {"folder": str(Path(kernels()._name).parent), "warning": str(caught[0].message) if caught else None}


def environment() -> dict[str, Any]:
    import torch

    return {
        "mvkernels": mvkernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: package_version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": gpus(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_kernels": cpu_kernels(),
        "backends": backends(),
    }


def run(as_json: Json = False) -> None:
    """Print the environment."""
    found = environment()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = Console()
    rows = Table(box=None, pad_edge=False, show_header=False)
    rows.add_row("mvkernels", found["mvkernels"])
    rows.add_row("python", f"{found['python']}, {found['platform']}")
    for package, installed in found["packages"].items():
        rows.add_row(package, installed or missing(package))
    for gpu in found["gpus"]:
        memory = gpu["memory_bytes"] / 2**30
        rows.add_row("GPU", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {memory:.0f} GiB")
    if not found["gpus"]:
        rows.add_row("GPU", "none: " + ("this torch has no CUDA" if found["cuda"] is None else "torch sees no device"))
    rows.add_row("CPU threads", str(found["cpu_threads"]))
    kernels = found["cpu_kernels"]
    rows.add_row("CPU kernels", kernels["warning"] or f"compiled, in {kernels['folder']}")
    console.print(rows, highlight=False)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("operation", "tensors on", "backend", "can run here"):
        table.add_column(column)
    for operation, by_device in found["backends"].items():
        for device, reasons in by_device.items():
            for backend, reason in reasons.items():
                table.add_row(operation, device, backend, "yes" if reason is None else f"no: {reason}")
    console.print(table, highlight=False)


def missing(package: str) -> str:
    extra = EXTRAS.get(package)
    return "not installed" + (f" (extra {extra!r})" if extra else "")
