"""Tile sizes, warps and pipeline stages of the attention kernels: a pure function of head dim, dtype and GPU."""

from __future__ import annotations

from dataclasses import astuple, dataclass

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class KernelConfig:
    """block_m: query rows per tile. block_n: keys per tile. num_warps, num_stages: as Triton takes them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """One configuration for each kernel. dq walks key tiles for a query tile, dkdv query tiles for a key tile."""

    forward: KernelConfig
    dq: KernelConfig
    dkdv: KernelConfig

    @property
    def flat(self) -> list[int]:
        """The twelve integers that the ops take."""
        return [*astuple(self.forward), *astuple(self.dq), *astuple(self.dkdv)]

    @property
    def blocks(self) -> tuple[int, ...]:
        """What the tile plans depend on."""
        kernels = (self.forward, self.dq, self.dkdv)
        return tuple(size for kernel in kernels for size in (kernel.block_m, kernel.block_n))

    @classmethod
    def from_flat(cls, values: list[int]) -> AttentionConfig:
        return cls(*(KernelConfig(*values[i : i + 4]) for i in (0, 4, 8)))


def attention_config(head_dim: int, itemsize: int, capability: tuple[int, int] | None) -> AttentionConfig:
    """The configuration shipped for a head dim, bytes per element, and compute capability (None: the interpreter).

    Chosen so that no kernel spills and each fits the GPU's shared memory, which the ahead-of-time tests check.
    """
    if capability is None:
        # Small, and unlike each other, so that short inputs have several tiles and swapped sizes show.
        return AttentionConfig(KernelConfig(32, 16, 4, 1), KernelConfig(16, 32, 4, 1), KernelConfig(32, 16, 4, 1))
    raise NotImplementedError
