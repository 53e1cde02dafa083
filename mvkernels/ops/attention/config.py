"""Tile sizes, warps and pipeline stages of the attention kernels: a pure function of head dim, dtype and GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
DELTA_ROWS = 32  # rows per program of the kernel that prepares the backward's row sums


@dataclass(frozen=True)
class KernelConfig:
    """block_m: query rows of a tile. block_n: keys of a tile. num_warps, num_stages, maxnreg: options of Triton."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """A configuration for each kernel. dq loops over key tiles of a query tile, dkdv over query tiles of a key tile."""

    forward: KernelConfig
    dq: KernelConfig
    dkdv: KernelConfig

    @property
    def blocks(self) -> tuple[int, ...]:
        """Tile sizes, the key of the tile plans."""
        kernels = (self.forward, self.dq, self.dkdv)
        return tuple(size for kernel in kernels for size in (kernel.block_m, kernel.block_n))


def attention_config(head_dim: int, itemsize: int, capability: tuple[int, int] | None) -> AttentionConfig:
    """Return the configuration for a head dim, bytes per element, and compute capability (None: the interpreter).

    Each kernel fits the shared memory of the GPU, uses no local memory and, in two-byte dtypes, the tensor cores.
    Ahead-of-time tests check that for 8.0, 9.0 and 10.0, and `python -m benchmarks.resources` lists it.
    """
    if capability is None:
        # Small, and unlike each other, so that short inputs have several tiles and swapped sizes show.
        return AttentionConfig(KernelConfig(32, 16, 4, 1), KernelConfig(16, 32, 4, 1), KernelConfig(32, 16, 4, 1))
    if itemsize == 4:
        return _fp32(head_dim)
    chosen = _HOPPER if capability[0] == 9 else _BLACKWELL if capability[0] == 10 else _AMPERE
    if capability in _SMALL_SHARED_MEMORY:
        chosen = _ADA
    return chosen[next(size for size in chosen if head_dim <= size)]


def shared_memory_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one block may use (CUDA C++ Programming Guide, technical specifications)."""
    if capability in _SMALL_SHARED_MEMORY:
        return 99 * 1024
    return 163 * 1024 if capability[0] == 8 else 227 * 1024


_SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))

# Largest head dim -> forward, dq, dkdv for two-byte inputs: of the sizes tried, the largest that are clean under both
# Triton 3.6 and Triton 3.9, with two or more stages, chosen by reading the compiled code; Hopper's at head dims 64 and
# 128 by timing some twenty on an H200. (Clean: no stack, no local memory. The one exception is the row sums in bf16 at
# head dim 256 on sm_100, 16 bytes under 3.6.)
_AMPERE = {
    32: AttentionConfig(KernelConfig(128, 128, 8, 3), KernelConfig(128, 128, 8, 2), KernelConfig(64, 128, 8, 3)),
    64: AttentionConfig(KernelConfig(128, 128, 8, 3), KernelConfig(128, 128, 8, 3), KernelConfig(64, 128, 8, 3)),
    128: AttentionConfig(KernelConfig(128, 64, 8, 3), KernelConfig(128, 64, 8, 2), KernelConfig(64, 64, 8, 2)),
    256: AttentionConfig(KernelConfig(64, 64, 8, 2), KernelConfig(64, 64, 8, 2), KernelConfig(64, 32, 8, 2)),
}
# Ampere and later with less shared memory, compiled for 8.9.
_ADA = {
    64: AttentionConfig(KernelConfig(128, 128, 8, 3), KernelConfig(128, 128, 8, 3), KernelConfig(64, 128, 8, 3)),
    128: AttentionConfig(KernelConfig(128, 64, 8, 2), KernelConfig(128, 64, 8, 2), KernelConfig(64, 64, 8, 2)),
    256: AttentionConfig(KernelConfig(64, 32, 8, 2), KernelConfig(32, 32, 8, 2), KernelConfig(32, 32, 8, 2)),
}
_HOPPER = {
    64: AttentionConfig(KernelConfig(128, 64, 4, 4), KernelConfig(128, 64, 8, 3), KernelConfig(64, 64, 4, 3)),
    128: AttentionConfig(KernelConfig(128, 128, 8, 3), KernelConfig(128, 64, 8, 3), KernelConfig(64, 64, 4, 2)),
    256: AttentionConfig(KernelConfig(128, 64, 8, 2), KernelConfig(128, 32, 8, 2), KernelConfig(32, 64, 8, 2)),
}
_BLACKWELL = {
    64: AttentionConfig(KernelConfig(128, 128, 8, 3), KernelConfig(128, 128, 8, 3), KernelConfig(128, 128, 8, 2)),
    128: AttentionConfig(KernelConfig(128, 128, 8, 2), KernelConfig(128, 128, 8, 2), KernelConfig(64, 128, 8, 2)),
    256: AttentionConfig(KernelConfig(64, 64, 8, 2), KernelConfig(128, 32, 8, 2), KernelConfig(32, 64, 8, 2)),
}


def _fp32(head_dim: int) -> AttentionConfig:
    """Return small tiles: products in full fp32 run on the scalar units, which keep whole rows of a tile in registers.

    Chosen as above: a tile of 32 x 32 spills at head dim 128. Without maxnreg the assembler aims at more blocks than
    fit, and spills. With 128, two blocks share a multiprocessor, except for dkdv at head dim 32.
    """
    small = KernelConfig(32 if head_dim <= 128 else 16, 16, 8, 1, maxnreg=128)
    return AttentionConfig(small, small, replace(small, maxnreg=255) if head_dim <= 32 else small)
