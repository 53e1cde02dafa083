"""Shipped kernel configurations are compiled ahead of time, without a GPU: they fit and spill nothing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mvkernels.ops.attention_config import KernelConfig, attention_config, shared_memory_limit

pytestmark = pytest.mark.aot

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
TENSORS = {"q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_out_ptr", "dq_ptr", "dk_ptr", "dv_ptr"}
TYPES = {2: "bf16", 4: "fp32"}


def kernels():
    from mvkernels.ops.attention_triton import forward_kernel
    from mvkernels.ops.attention_triton_backward import dkdv_kernel, dq_kernel

    return {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}


def argument_type(name: str, itemsize: int) -> str:
    if name.isupper():
        return "constexpr"
    if name in TENSORS:
        return "*" + TYPES[itemsize]
    if name in ("lse_ptr", "delta_ptr", "grad_lse_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return "*i32"
    return "fp32" if name.startswith("scale") else "i32"


def compile_ahead(kernel, head_dim: int, itemsize: int, config: KernelConfig, capability: tuple[int, int], **constants):
    """As the launcher would for contiguous tensors: pointers and strides divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constexprs = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        **constants,
    }
    source = ASTSource(
        fn=kernel,
        signature={name: argument_type(name, itemsize) for name in names},
        constexprs={name: value for name, value in constexprs.items() if name in names},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name.endswith("_ptr") or name.startswith("stride")
        },
    )
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton.compile(
        source, target=target, options={"num_warps": config.num_warps, "num_stages": config.num_stages}
    )


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of stack a thread uses: what did not fit the registers. None of the kernels has a stack otherwise."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:\d+ STACK:(\d+)", report)
    assert found, report
    return int(found[1])


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_fits_and_spills_nothing(name, head_dim, capability, tmp_path):
    config = getattr(attention_config(head_dim, 2, capability), name)
    compiled = compile_ahead(kernels()[name], head_dim, 2, config, capability)
    assert compiled.metadata.shared <= shared_memory_limit(capability)
    assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize(("head_dim", "itemsize"), [(80, 2), (256, 2), (128, 4)])
def test_other_head_dims_and_fp32_fit(name, head_dim, itemsize):
    capability = (9, 0)
    config = getattr(attention_config(head_dim, itemsize, capability), name)
    compiled = compile_ahead(kernels()[name], head_dim, itemsize, config, capability)
    assert compiled.metadata.shared <= shared_memory_limit(capability)


def test_a_configuration_that_is_too_large_is_found_out(tmp_path):
    """The two checks above can fail."""
    capability = (8, 0)
    greedy = compile_ahead(kernels()["forward"], 128, 2, KernelConfig(64, 64, 8, 8), capability)
    assert greedy.metadata.shared > shared_memory_limit(capability) or stack_bytes(greedy.asm["cubin"], tmp_path) > 0


def test_delta_kernel_compiles(tmp_path):
    from mvkernels.ops.attention_triton_backward import DELTA_ROWS, delta_kernel

    for has_grad_lse in (True, False):
        config = KernelConfig(DELTA_ROWS, 0, 4, 1)
        compiled = compile_ahead(delta_kernel, 128, 2, config, (9, 0), HAS_GRAD_LSE=has_grad_lse)
        assert stack_bytes(compiled.asm["cubin"], tmp_path) == 0
