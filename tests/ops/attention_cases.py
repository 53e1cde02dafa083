"""The attention cases of the tests; those of the benchmarks are among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import TREES
from mvkernels.layout import BranchLayout
from mvkernels.reference.attention import attention as reference_attention
from mvkernels.reference.layout import tree_mask

Tree = list[Any]


@dataclass(frozen=True)
class AttentionCase:
    """trees: one per packed document, as `BranchLayout.from_tree` takes them. dtype: a name in torch."""

    name: str
    trees: tuple[Tree, ...]
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float32"

    @property
    def id(self) -> str:
        return f"{self.name}-h{self.heads}kv{self.kv_heads}-d{self.head_dim}-{self.dtype}"

    def layout(self) -> BranchLayout:
        return BranchLayout.pack([BranchLayout.from_tree(tree) for tree in self.trees])

    def visible(self) -> torch.Tensor:
        """[T, T] bool by the reference's definition of the mask, pair by pair: for short cases."""
        return torch.block_diag(*(tree_mask(tree) for tree in self.trees)).bool()

    def inputs(self, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, Hq, D], k and v [T, Hkv, D], normal."""
        total = self.layout().total_tokens
        generator = torch.Generator().manual_seed(seed)
        sizes = [(total, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (torch.randn(size, generator=generator) for size in sizes)
        dtype = getattr(torch, self.dtype)
        return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


NESTED: Tree = [3, [[5, [[4], [1, [[2], [0], [3]], 2]], 1], [7], [0]], 4]
WIDE: Tree = [5, [[3], [1], [0], [6], [2], [9], [1], [4], [1]], 7]
CHAIN: Tree = [2, [[4], [3]], 1, [[1], [5], [2]], 3, [[8], [6]], 2]
OPEN: Tree = [9, [[11], [6], [1]]]  # never joins: one prompt, three responses

#: Short enough for the interpreter and for the definition of the mask, pair by pair.
SMALL = (
    AttentionCase("one-token", ([1],)),
    AttentionCase("causal-odd", ([37],), heads=4, kv_heads=1),
    AttentionCase("nested", (NESTED,), heads=4, kv_heads=2),
    AttentionCase("wide-with-empty-paths", (WIDE,), heads=3, kv_heads=3, dtype="float16"),
    AttentionCase("chained-blocks", (CHAIN,), head_dim=80, heads=2, kv_heads=1),
    AttentionCase("open-at-the-end", (OPEN,), head_dim=64, dtype="float16"),
    AttentionCase("packed", (CHAIN, [1], NESTED, [13], OPEN), heads=2, kv_heads=1),
    AttentionCase("long-paths", ([6, [[40], [33, [[9], [18]], 5]], 11],), heads=2, kv_heads=1),
    AttentionCase("exact-tiles", ([32, [[32], [32]], 32],), heads=1, kv_heads=1),
)

#: Across the block borders of every backend. bfloat16 too. With the layouts that the benchmarks time.
MEDIUM = (
    AttentionCase("causal", (TREES["causal"](1111),), heads=4, kv_heads=2, head_dim=64),
    AttentionCase("narrow", ([100, [[601], [577]], 90],), heads=2, kv_heads=1, head_dim=64, dtype="bfloat16"),
    AttentionCase("wide", (TREES["wide"](1289),), heads=4, kv_heads=1, head_dim=64),
    AttentionCase("short-paths", ([300, [[17]] * 40, 200, [[5]] * 30, 65],), heads=2, kv_heads=2, head_dim=32),
    AttentionCase(
        "deep",
        ([60, [[200, [[150, [[80], [90], [3]], 40], [170]], 30], [333], [1]], 77],),
        head_dim=80,
        dtype="bfloat16",
    ),
    AttentionCase(
        "packed", ([513], [40, [[260], [130], [0]], 20], [1], [64, [[64], [64]]]), head_dim=128, dtype="float16"
    ),
    AttentionCase("many-blocks", (TREES["narrow"](1130),), heads=2, kv_heads=1, head_dim=64),
    AttentionCase("nested", (TREES["nested"](1001),), heads=2, kv_heads=2, head_dim=64),
    AttentionCase("shared-prompt", (TREES["shared-prompt"](1100),), heads=2, kv_heads=1, head_dim=64),
)


def ids(case: AttentionCase) -> str:
    return case.id


def reference(
    case: AttentionCase,
    inputs: tuple[torch.Tensor, ...],
    visible: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    scale: float | None = None,
) -> list[torch.Tensor]:
    """out, lse, grad_q, grad_k, grad_v of the reference, computed in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out, lse = reference_attention(*leaves, visible, scale)
    found = torch.autograd.grad([out, lse], leaves, [grads[0].to(out.dtype), grads[1].to(lse.dtype)])
    return [out.detach(), lse.detach(), *found]


def output_grads(case: AttentionCase, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random gradients of out and lse, representable in the case's dtype."""
    q = inputs[0]
    generator = torch.Generator().manual_seed(17)
    grad_out = torch.randn(q.shape, generator=generator).to(q.device, q.dtype)
    grad_lse = torch.randn(q.shape[1], q.shape[0], generator=generator).to(q.device, q.dtype)
    return grad_out, grad_lse.float()
