"""Peers of the attention suite.

    ours               multiverse_attention, backend "auto"
    ours-triton        backend "triton", on layouts without branches where "auto" may choose flash-attn
    sdpa-dense         scaled_dot_product_attention with the dense mask: what a user writes without this library
    flex               FlexAttention, compiled (CUDA; on a CPU it has no backward, and only its mask is timed)
    apart              `shared-prompt` only: ours on the responses packed with a prompt each
    sdpa-causal        scaled_dot_product_attention, causal, one document after the other
    sdpa-flash, sdpa-cudnn                 the same with that backend forced (CUDA)
    flash-attn-causal, flash-attn3-causal  the varlen functions of flash_attn and flash_attn_interface, if installed

The causal ones see more than a layout with branches allows: they are bounds, and compared by time per unmasked pair.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cases, flex
from benchmarks.preparation import prepare
from mvkernels import BranchLayout, multiverse_attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
DENSE_LIMIT = {"cpu": 16384, "cuda": 32768}  # most tokens for which a dense mask is built
FLASH_MODULES = {"flash-attn-causal": "flash_attn", "flash-attn3-causal": "flash_attn_interface"}


@dataclass(frozen=True)
class Shape:
    """Heads, head dim and dtype of a run, and its number of tokens."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str

    def inputs(self, tokens: int, seed: int = 0) -> Tensors:
        """q [T, Hq, D], k and v [T, Hkv, D], normal, asking for gradients."""
        generator = torch.Generator(self.device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)
        q, k, v = (
            torch.randn(tokens, heads, self.head_dim, generator=generator, device=self.device, dtype=dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

    def few_heads(self) -> Shape:
        """The same with two key heads: for comparisons with the reference."""
        return replace(self, heads=2 * self.heads // self.kv_heads, kv_heads=2)


@dataclass(frozen=True)
class Peer:
    """make: from scratch to a function that attends. mask: builds again what it needs of the mask; None: nothing.

    layout: what it works on. causal: it ignores branches, so that it works on more pairs than the layout shows.
    """

    name: str
    layout: BranchLayout
    make: Callable[[], Attention]
    mask: Callable[[], object] | None = None
    causal: bool = False

    @property
    def exact(self) -> bool:
        """Whether it claims to compute what the layout says."""
        return not (self.causal and self.layout.has_branches)

    @property
    def pairs(self) -> int:
        """Visible (row, key) pairs of its own mask: its unmasked area."""
        return causal_pairs(self.layout) if self.causal else self.layout.mask.visible_pairs()


def causal_pairs(layout: BranchLayout) -> int:
    lengths = layout.cu_seqlens.diff().long()
    return int((lengths * (lengths + 1) // 2).sum())


def peers(case: str, layout: BranchLayout, shape: Shape) -> list[Peer]:
    """All that can be tried on a case, ours first."""
    installed = [name for name, module in FLASH_MODULES.items() if importlib.util.find_spec(module)]
    found = [ours("ours", layout, shape)]
    if shape.device == "cuda" and installed and not layout.has_branches:
        found.append(ours("ours-triton", layout, shape, "triton"))
    if layout.total_tokens <= DENSE_LIMIT[shape.device]:
        found.append(sdpa_dense(layout, shape.device))
    if shape.device == "cuda":
        found.append(flex_attention(layout, "cuda"))
    if case == "shared-prompt":
        found.append(ours("apart", cases.apart(layout.total_tokens), shape))
    found.append(sdpa_causal("sdpa-causal", layout, None))
    if shape.device == "cuda":
        found.append(sdpa_causal("sdpa-flash", layout, SDPBackend.FLASH_ATTENTION))
        found.append(sdpa_causal("sdpa-cudnn", layout, SDPBackend.CUDNN_ATTENTION))
        found += [flash_attn(name, layout) for name in installed]
    return found


def not_installed(device: str) -> list[str]:
    """Peers that this machine could run and has not."""
    names = [name for name, module in FLASH_MODULES.items() if importlib.util.find_spec(module) is None]
    return names if device == "cuda" else []


def ours(name: str, layout: BranchLayout, shape: Shape, backend: str = "auto") -> Peer:
    def make() -> Attention:
        there = layout.to(shape.device)
        return lambda q, k, v: multiverse_attention(q, k, v, there, backend=backend)

    dtype = getattr(torch, shape.dtype)
    return Peer(name, layout, make, lambda: prepare(layout, shape.device, shape.head_dim, dtype.itemsize))


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, enable_gqa=q.shape[1] != k.shape[1], **options)
    return out[0].transpose(0, 1)


def sdpa_dense(layout: BranchLayout, device: str) -> Peer:
    def mask() -> torch.Tensor:
        return layout.dense_mask().to(device)[None, None]

    def make() -> Attention:
        dense = mask()

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if device == "cuda":  # as transformers does: with a mask, only the slowest backend takes grouped heads
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            return sdpa(q, k, v, attn_mask=dense)

        return attend

    return Peer("sdpa-dense", layout, make, mask)


def flex_attention(layout: BranchLayout, device: str) -> Peer:
    mask = flex.FlexMask(layout, device)
    return Peer("flex", layout, lambda: flex.attention(mask), mask.build)


def sdpa_causal(name: str, layout: BranchLayout, backend: SDPBackend | None) -> Peer:
    """Document by document: causal SDPA has no notion of a pack. backend: None leaves the choice to PyTorch."""
    bounds = list(pairwise(layout.cu_seqlens.tolist()))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            parts = [sdpa(q[a:b], k[a:b], v[a:b], is_causal=True) for a, b in bounds]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return Peer(name, layout, lambda: attend, causal=True)


def flash_attn(name: str, layout: BranchLayout) -> Peer:
    """The packed documents in one call."""

    def make() -> Attention:
        function = importlib.import_module(FLASH_MODULES[name]).flash_attn_varlen_func
        bounds, longest = layout.cu_seqlens.to("cuda"), layout.longest_document

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = function(q, k, v, bounds, bounds, longest, longest, causal=True)
            return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too

        return attend

    return Peer(name, layout, make, causal=True)
