"""What the compiled attention kernels use, for GPUs that need not be there: registers, memory, occupancy, instructions.

python -m benchmarks.resources [--out DIR] writes kernels.csv and kernels.md. Compiled ahead of time by the Triton that
is installed, and read with the tools that it carries; not under TRITON_INTERPRET.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from mvkernels.ops.attention.config import DELTA_ROWS, HEAD_DIMS, KernelConfig, attention_config, shared_memory_limit

ARCHITECTURES = ((8, 0), (9, 0), (10, 0))
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
KERNELS = ("forward", "dq", "dkdv", "delta")
# What a tensor core multiplies with, as nvdisasm writes it: mma.sync, wgmma.mma_async, tcgen05.mma.
TENSOR_OPCODES = {(8, 0): "HMMA", (9, 0): "HGMMA", (10, 0): "UTCHMMA"}
# cp.async, and the two forms of the bulk copy engine.
COPY_OPCODES = ("LDGSTS", "UBLKCP", "UTMALDG")
LOCAL_OPCODES = ("LDL", "STL")


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor; bytes of shared memory, and how many the system takes from each block."""

    registers: int
    threads: int
    blocks: int
    shared: int
    shared_reserved: int = 1024
    register_unit: int = 256  # registers are given to warps in multiples of this


# CUDA C++ Programming Guide, section "Technical Specifications per Compute Capability".
CHIPS = {
    (8, 0): Chip(65536, 2048, 32, 164 * 1024),
    (9, 0): Chip(65536, 2048, 32, 228 * 1024),
    (10, 0): Chip(65536, 2048, 32, 228 * 1024),
}


@dataclass(frozen=True)
class Target:
    """One kernel of one configuration for one compute capability."""

    kernel: str
    head_dim: int
    dtype: str
    capability: tuple[int, int]
    config: KernelConfig

    def __str__(self) -> str:
        return f"{self.kernel}-d{self.head_dim}-{self.dtype}-{architecture(self.capability)}"


@dataclass(frozen=True)
class Resources:
    """One row of kernels.csv. loop_: of the innermost loop with most tensor-core instructions (fp32: FFMA)."""

    kernel: str
    arch: str
    head_dim: int
    dtype: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None
    registers: int
    stack_bytes: int
    local_instructions: int
    shared_bytes: int
    shared_limit: int
    blocks_per_sm: int
    warps_per_sm: int
    tensor_opcode: str
    tensor_instructions: int
    loop_instructions: int
    loop_tensor_instructions: int
    loop_async_copies: int
    triton: str


def architecture(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def shipped() -> Iterator[Target]:
    """Every kernel that `ops.attention.config` leads to."""
    for capability in ARCHITECTURES:
        for dtype, itemsize in DTYPES.items():
            for head_dim in HEAD_DIMS:
                config = attention_config(head_dim, itemsize, capability)
                for kernel in KERNELS:
                    # delta has no tiles of keys; warps and stages are Triton's defaults.
                    chosen = KernelConfig(DELTA_ROWS, 0, 4, 3) if kernel == "delta" else getattr(config, kernel)
                    yield Target(kernel, head_dim, dtype, capability, chosen)


@cache
def measure(target: Target) -> Resources:
    """Compile a kernel and read what came out."""
    import triton

    compiled = compile_ahead(target)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin))
        code = _tool("nvdisasm", "-c", cubin)
    if usage is None:
        raise RuntimeError("cuobjdump -res-usage names no registers")
    registers, stack = int(usage[1]), int(usage[2])
    opcodes, loops = instructions(code)
    tensor = TENSOR_OPCODES[target.capability]
    product = "FFMA" if DTYPES[target.dtype] == 4 else tensor
    loop = max(loops, key=lambda body: body.count(product), default=[])
    shared = compiled.metadata.shared
    blocks = blocks_per_sm(target.capability, registers, shared, target.config.num_warps)
    return Resources(
        target.kernel, architecture(target.capability), target.head_dim, target.dtype, *astuple(target.config),
        registers, stack, sum(map(opcodes.count, LOCAL_OPCODES)), shared, shared_memory_limit(target.capability),
        blocks, blocks * target.config.num_warps, tensor, opcodes.count(tensor),
        len(loop), loop.count(tensor), sum(map(loop.count, COPY_OPCODES)), triton.__version__,
    )  # fmt: skip


def compile_ahead(target: Target) -> Any:
    """As the launcher does for contiguous tensors: pointers and strides are divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mvkernels.ops.attention.triton_backward import delta_kernel, dkdv_kernel, dq_kernel
    from mvkernels.ops.attention.triton_forward import constants, forward_kernel

    kernels = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel, "delta": delta_kernel}
    kernel = kernels[target.kernel]
    names = kernel.arg_names
    given = constants(target.head_dim, target.config) | {"HAS_GRAD_LSE": True}
    source = ASTSource(
        fn=kernel,
        signature={name: _argument_type(name, target.dtype) for name in names},
        constexprs={name: value for name, value in given.items() if name in names},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name.endswith("_ptr") or name.startswith("stride")
        },
    )
    major, minor = target.capability
    options = {name: value for name, value in given.items() if name.islower()}
    return triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)


def _argument_type(name: str, dtype: str) -> str:
    if name.isupper():
        return "constexpr"
    if name.endswith("_ptr"):
        if name in ("lse_ptr", "grad_lse_ptr", "sums_ptr"):
            return "*fp32"
        return "*i32" if name in ("tiles_ptr", "runs_ptr", "rows_ptr", "keys_ptr", "gaps_ptr") else f"*{dtype}"
    return "fp32" if name.startswith("scale") else "i32"


def _tool(name: str, *arguments: object) -> str:
    from triton.backends import nvidia

    (folder,) = nvidia.__path__
    command = [str(Path(folder) / "bin" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> tuple[list[str], list[list[str]]]:
    """Opcodes, without their modifiers, of what nvdisasm -c writes: of all instructions, and of each innermost loop.

    A loop is what stands between a label and a branch back to it.
    """
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*)", line):
            opcodes.append(found[1])
            back = re.search(r"`\(\.(L_x_\d+)\)", found[2])
            if found[1] == "BRA" and back and back[1] in labels:
                spans.append((labels[back[1]], len(opcodes)))
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return opcodes, [opcodes[a:b] for a, b in inner]


def blocks_per_sm(capability: tuple[int, int], registers: int, shared: int, num_warps: int) -> int:
    """How many blocks of a kernel a multiprocessor holds at once."""
    chip = CHIPS[capability]
    per_warp = -(-registers * 32 // chip.register_unit) * chip.register_unit
    return min(
        chip.registers // per_warp // num_warps,
        chip.shared // (shared + chip.shared_reserved),
        chip.threads // (32 * num_warps),
        chip.blocks,
    )


def markdown(rows: list[Resources]) -> str:
    """bf16 and fp32 as a table; fp16 is in the CSV."""
    shown = {
        "kernel": "kernel", "arch": "arch", "head_dim": "head dim", "dtype": "dtype", "num_warps": "warps",
        "num_stages": "stages", "registers": "registers", "stack_bytes": "stack, bytes",
        "shared_bytes": "shared, bytes", "warps_per_sm": "warps per SM",
        "tensor_instructions": "tensor-core instructions",
    }  # fmt: skip
    lines = [
        f"Compiled by Triton {rows[0].triton}: `python -m benchmarks.resources`. Registers are per thread. "
        "kernels.csv has more columns, and fp16.",
        "",
        "| " + " | ".join([*shown.values(), "tile"]) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for row in rows:
        if row.dtype != "fp16":
            cells = [str(getattr(row, name)) for name in shown]
            lines.append("| " + " | ".join([*cells, f"{row.block_m} x {row.block_n}"]) + " |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path | None, typer.Option(help="folder for kernels.csv and kernels.md; default: only print")] = None,
    jobs: Annotated[int, typer.Option(help="processes; default: one per core")] = 0,
) -> None:
    """Compile every shipped attention kernel and say what it uses."""
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        rows = list(pool.map(measure, shipped()))
    print(markdown(rows))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "kernels.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))
        (out / "kernels.md").write_text(markdown(rows))


if __name__ == "__main__":
    typer.run(main)
