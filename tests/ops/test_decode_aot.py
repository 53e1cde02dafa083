"""The Triton kernels of the paged cache, compiled ahead of time for GPUs that need not be there.

Every configuration must fit the shared memory of its GPU, and spill nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from mvkernels.ops.decode.cost_model import Shape, tile_shapes

pytestmark = pytest.mark.aot
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_kernel(kernel, types: dict[str, str], constants: dict[str, object], capability: int, **options):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == types.keys() | constants.keys()
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(compiled, folder: Path) -> int:
    """Local memory per thread: what spilled, as the cubin itself says."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__ or os.path.join(*nvidia.__path__, "")).parent / "bin" / "cuobjdump"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", text)
    return int(stack)


def assert_fits(compiled, capability: int, folder: Path) -> None:
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert stack_bytes(compiled, folder) == 0


# Every tile shape of these models.
MODELS = [
    (80, 64, "bf16", 3), (80, 128, "bf16", 4), (90, 128, "bf16", 7), (90, 128, "fp32", 4), (90, 256, "fp16", 8),
    (90, 256, "fp32", 4), (80, 64, "fp32", 4), (100, 256, "fp32", 4), (100, 128, "bf16", 4), (100, 256, "bf16", 20),
]  # fmt: skip
SHAPES = [
    (*model, sorted(config.block_m for config in tile_shapes(Shape(model[3], 2, model[1], ELEMENTS[model[2]], 132))))
    for model in MODELS
]
# The results are stored in one of two ways: both by the largest tiles, which have the most registers.
KERNELS = [
    (*model, block_m, direct)
    for *model, sizes in SHAPES
    for block_m, direct in [*((size, False) for size in sizes), (sizes[-1], True)]
]


@pytest.mark.parametrize(("capability", "head_dim", "element", "group", "block_m", "direct"), KERNELS)
def test_decode_kernel(capability, head_dim, element, group, block_m, direct, tmp_path):
    from mvkernels.ops.decode.triton import decode_kernel

    configs = tile_shapes(Shape(group, 2, head_dim, ELEMENTS[element], 132))
    (config,) = [config for config in configs if config.block_m == block_m]
    types = {name: f"*{element}" for name in ("q_ptr", "k_ptr", "v_ptr")}
    types |= {"part_ptr": f"*{element}" if direct else "*fp32", "part_lse_ptr": "*fp32"}
    types |= dict.fromkeys(("work_ptr", "pages_ptr", "counts_ptr", "rows_ptr"), "*i32")
    types |= {"scale_log2": "fp32", "num_rows": "i32"}
    constants = {
        "HQ": 2 * group, "HKV": 2, "GROUP": group, "D": head_dim, "PAGE_SIZE": 16, "DIRECT": direct,
        "BLOCK_D": 1 << (head_dim - 1).bit_length(), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    assert_fits(compile_kernel(decode_kernel, types, constants, capability, **options), capability, tmp_path)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_merge_kernel(capability, tmp_path):
    from mvkernels.ops.decode.triton import MERGE_BLOCK, merge_kernel

    types = {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "merge_ptr_ptr": "*i32", "merge_ids_ptr": "*i32"}
    types |= {"out_ptr": "*bf16", "lse_ptr": "*fp32", "num_rows": "i32"}
    constants = {"HQ": 28, "D": 80, "BLOCK_D": 128, "BLOCK_P": MERGE_BLOCK}
    compiled = compile_kernel(merge_kernel, types, constants, capability, num_warps=2)
    assert_fits(compiled, capability, tmp_path)


@pytest.mark.parametrize(("capability", "page_size"), [(80, 24), (90, 1), (90, 16), (100, 24)])
def test_advance_kernel(capability, page_size, tmp_path):
    from mvkernels.ops.decode.triton import ADVANCE_BLOCK, advance_kernel

    names = ("state_ptr", "cursor_ptr", "pages_ptr", "counts_ptr", "positions_ptr")
    types = dict.fromkeys(names, "*i32") | {"slots_ptr": "*i64", "num_rows": "i32"}
    constants = {"PAGE_SIZE": page_size, "BLOCK": ADVANCE_BLOCK}
    assert_fits(compile_kernel(advance_kernel, types, constants, capability), capability, tmp_path)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_append_kernel(capability, tmp_path):
    from mvkernels.ops.decode.append_triton import append_kernel

    types = dict.fromkeys(("k_new_ptr", "v_new_ptr", "k_ptr", "v_ptr"), "*bf16") | {"slots_ptr": "*i64"}
    types |= dict.fromkeys(("stride_kn", "stride_kh", "stride_vn", "stride_vh"), "i32")
    compiled = compile_kernel(append_kernel, types, {"HEADS": 4, "D": 128, "BLOCK_E": 512}, capability)
    assert_fits(compiled, capability, tmp_path)
