"""The Triton kernels between the products of a decoder layer, compiled ahead of time: nothing spills."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ops.test_decode_aot import assert_fits, compile_kernel

pytestmark = pytest.mark.aot
CAPABILITIES = (80, 90, 100)
ELEMENTS = ("bf16", "fp16", "fp32")
# The variant with the most registers for every GPU and dtype; the others once each.
MOST = [(capability, element) for capability in CAPABILITIES for element in ELEMENTS]


@pytest.mark.parametrize(
    ("capability", "element", "add", "dim"),
    [
        *((*one, True, 8192) for one in MOST),
        (90, "bf16", True, 576),
        (90, "bf16", False, 576),
        (80, "fp32", False, 8192),
    ],
)
def test_norm_kernel(capability: int, element: str, add: bool, dim: int, tmp_path: Any) -> None:
    from mvkernels.ops.dense.layer_triton import norm_kernel, norm_warps

    block = 1 << (dim - 1).bit_length()
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "sum_ptr", "out_ptr"), f"*{element}")
    constants: dict[str, object] = {"DIM": dim, "BLOCK": block, "ADD": add}
    if add:
        pointers["residual_ptr"] = f"*{element}"
    else:
        constants["residual_ptr"] = None
    types = {**pointers, "eps": "fp32"}
    assert_fits(
        compile_kernel(norm_kernel, types, constants, capability, num_warps=norm_warps(block)), capability, tmp_path
    )


@pytest.mark.parametrize(
    ("capability", "element", "norm", "dim"),
    [
        *((*one, True, 256) for one in MOST), (80, "fp32", False, 256), (90, "bf16", True, 64), (90, "bf16", False, 64),
        (90, "bf16", True, 96), (100, "bf16", False, 96),
    ],
)  # fmt: skip
def test_rotate_append_kernel(capability: int, element: str, norm: bool, dim: int, tmp_path: Any) -> None:
    from mvkernels.ops.dense.layer_triton import rotate_append_kernel, rotate_warps

    names = ("q", "k", "v", "cos", "sin", "out", "k_cache", "v_cache")
    types = dict.fromkeys((f"{name}_ptr" for name in names), f"*{element}") | {"slots_ptr": "*i64", "eps": "fp32"}
    weights = ("q_weight_ptr", "k_weight_ptr")
    constants: dict[str, object] = {
        "HQ": 14, "HKV": 2, "D": dim, "BLOCK_D": 1 << (dim - 1).bit_length(), "NORM": norm,
    }  # fmt: skip
    if norm:
        types |= dict.fromkeys(weights, f"*{element}")
    else:
        constants |= dict.fromkeys(weights)
    compiled = compile_kernel(rotate_append_kernel, types, constants, capability, num_warps=rotate_warps(dim))
    assert_fits(compiled, capability, tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_gate_kernel(capability: int, element: str, tmp_path: Any) -> None:
    from mvkernels.ops.dense.layer_triton import GATE_BLOCK, gate_kernel

    types = {**dict.fromkeys(("g_ptr", "u_ptr", "out_ptr"), f"*{element}"), "numbers": "i32"}
    assert_fits(compile_kernel(gate_kernel, types, {"BLOCK": GATE_BLOCK}, capability), capability, tmp_path)
