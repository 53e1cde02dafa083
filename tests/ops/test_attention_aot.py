"""The shipped configurations of the attention kernels, compiled ahead of time and read as machine code; no GPU."""

from __future__ import annotations

import os

import pytest

from benchmarks.resources import DTYPES, Resources, Target, blocks_per_sm, instructions, measure, shipped
from mvkernels.ops.attention.config import HEAD_DIMS, KernelConfig

pytestmark = pytest.mark.aot


def assert_clean(used: Resources) -> None:
    """No local memory, no more shared memory than there is; in two-byte dtypes tensor cores, and loads ahead."""
    assert used.stack_bytes == 0, "spills, or a local array"
    assert used.local_instructions == 0
    assert used.shared_bytes <= used.shared_limit, "too much shared memory"
    assert used.blocks_per_sm >= 1
    if used.dtype != "fp32" and used.kernel != "delta":
        assert used.loop_tensor_instructions > 0, f"no {used.tensor_opcode} in a loop"
        assert used.loop_async_copies > 0, "the loads of the full runs are not pipelined"


def code_of(target: Target) -> tuple[object, ...]:
    """What registers and shared memory depend on.

    On every GPU, fp16 and bf16 took the same of both, and so did head dimensions 80 and 96 (padded to 128). 128 itself
    has no masks, and up to 25 registers more or less.
    """
    padded = 1 << (target.head_dim - 1).bit_length()
    tile = (padded, target.head_dim < padded) if target.kernel != "delta" else ()  # delta needs 48 registers at most
    return target.kernel, tile, DTYPES[target.dtype], target.capability, target.config


def checked() -> list[Target]:
    """One target for each code, in bf16 or fp32; all with `MVKERNELS_FULL`."""
    targets = list(shipped())
    if os.environ.get("MVKERNELS_FULL"):
        return targets
    return list({code_of(target): target for target in targets if target.dtype != "fp16"}.values())


@pytest.mark.parametrize("target", checked(), ids=str)
def test_is_clean(target):
    assert_clean(measure(target))


def test_everything_shipped_is_checked():
    targets = list(shipped())
    assert len(set(targets)) == len(targets) == 4 * len(HEAD_DIMS) * 3 * 3
    assert {code_of(target) for target in checked()} == {code_of(target) for target in targets}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (KernelConfig(128, 128, 4, 2), "spills"),
        (KernelConfig(64, 64, 8, 8), "too much shared memory"),
        (KernelConfig(64, 64, 8, 1), "not pipelined"),
    ],
    ids=["spills", "too-much-shared-memory", "not-pipelined"],
)
def test_a_configuration_that_is_not_clean_is_found_out(config, complaint):
    with pytest.raises(AssertionError, match=complaint):
        assert_clean(measure(Target("forward", 128, "bf16", (8, 0), config)))


def test_instructions_are_read():
    """As nvdisasm writes them: predicates, modifiers, a loop within a loop, a jump that is none."""
    code = """
    .L_x_0:
            /*0000*/                   LDC R1, c[0x0][0x28] ;
    .L_x_1:
            /*0010*/              @!P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;
            /*0020*/               @P0 BRA `(.L_x_1) ;
            /*0030*/                   STL.64 [R1+0x8], R2 ;
            /*0040*/               @P1 BRA `(.L_x_2) ;
            /*0050*/              @UP0 BRA `(.L_x_0) ;
    .L_x_2:
            /*0060*/                   EXIT ;
    """
    opcodes, loops = instructions(code)
    assert opcodes == ["LDC", "HGMMA", "BRA", "STL", "BRA", "BRA", "EXIT"]
    assert loops == [["HGMMA", "BRA"]]


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "blocks"),
    [(255, 1000, 8, 1), (128, 1000, 8, 2), (32, 200 * 1024, 4, 1), (32, 0, 1, 32), (32, 0, 16, 4)],
)
def test_occupancy_by_registers_shared_memory_blocks_and_threads(registers, shared, num_warps, blocks):
    """On an H100: 65536 registers, 228 KiB, 32 blocks, 2048 threads."""
    assert blocks_per_sm((9, 0), registers, shared, num_warps) == blocks
