"""The attention suite: `multiverse_attention` against what users have today, forward and backward, in one run.

    ours           multiverse_attention, backend "auto"
    sdpa-dense     scaled_dot_product_attention with the dense mask: what a user writes without this library
    sdpa-causal    the same, causal, one document after the other: a bound that computes more than the mask asks for
    flex           FlexAttention, compiled; its mask is built outside of the timing, and timed apart (CUDA only)
    apart          `shared-prompt` only: ours on the responses packed with a prompt each

TFLOP/s count 4 D operations forward and 10 D backward for every visible (row, key) pair and query head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from benchmarks.cases import SYNTHETIC, apart, real
from benchmarks.timing import Timing, measure
from mvkernels import BranchLayout, multiverse_attention
from mvkernels.reference.attention import attention as reference_attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
        generator = torch.Generator().manual_seed(seed)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        made = (torch.randn(tokens, h, self.head_dim, generator=generator) for h in heads)
        q, k, v = (x.to(self.device, getattr(torch, self.dtype)).requires_grad_() for x in made)
        return q, k, v


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    case: str
    peer: str
    direction: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    visible_share: float
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_mb: float | None
    tflops: float
    setup_ms: float


def layouts(tokens: int) -> Iterator[tuple[str, BranchLayout]]:
    """The cases that can be made here."""
    published = real(tokens)
    if published is not None:
        yield "real", published
    for name, make in SYNTHETIC.items():
        yield name, make(tokens)


def check(shape: Shape, tokens: int = 700) -> None:
    """Refuse to time what is wrong: every case, short, against the reference in fp64. Raises AssertionError."""
    for name, make in SYNTHETIC.items():
        layout = make(tokens)
        inputs = replace(shape, tokens=tokens).inputs(layout.total_tokens, seed=1)
        wide = [x.detach().double().cpu().requires_grad_() for x in inputs]
        out = multiverse_attention(*inputs, layout)
        exact, _ = reference_attention(*wide, layout.dense_mask())
        grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        got = torch.autograd.grad(out, inputs, grad.to(out.device, out.dtype))
        want = torch.autograd.grad(exact, wide, grad)
        limit = 1e-4 if shape.dtype == "float32" else 4e-2
        for mine, theirs in zip((out, *got), (exact, *want), strict=True):
            error = float((mine.detach().double().cpu() - theirs.detach()).norm() / theirs.detach().norm())
            assert error < limit, f"{name}: relative error {error:.1e}, expected below {limit:.0e}; nothing was timed"


def ours(layout: BranchLayout) -> Attention:
    return lambda q, k, v: multiverse_attention(q, k, v, layout)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, enable_gqa=q.shape[1] != k.shape[1], **options)
    return out[0].transpose(0, 1)


def sdpa_dense(layout: BranchLayout, device: str) -> Attention:
    mask = layout.dense_mask().to(device)[None, None]
    return lambda q, k, v: sdpa(q, k, v, attn_mask=mask)


def sdpa_causal(layout: BranchLayout) -> Attention:
    """Document by document: causal SDPA has no notion of a pack."""
    bounds = layout.cu_seqlens.tolist()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = [sdpa(q[a:b], k[a:b], v[a:b], is_causal=True) for a, b in pairwise(bounds)]
        return torch.cat(parts)

    return attend


def flex(layout: BranchLayout, device: str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = layout.mask
    segment = torch.from_numpy(mask.segment_of_rows()).to(device)
    first, pointers = (torch.from_numpy(x).to(device) for x in (mask.first_key, mask.gap_ptr))
    gaps = torch.from_numpy(mask.gaps).to(device)
    gaps = torch.cat([gaps, gaps.new_zeros(1, 2)])  # one for tokens that have fewer than the most
    most = int((mask.gap_ptr[1:] - mask.gap_ptr[:-1]).max())

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        s = segment[i]
        seen = (j <= i) & (j >= first[s])
        for g in range(most):
            at = pointers[s] + g
            live = at < pointers[s + 1]
            gap = torch.where(live, at, len(gaps) - 1)
            seen = seen & ~(live & (j >= gaps[gap, 0]) & (j < gaps[gap, 1]))
        return seen

    total = layout.total_tokens
    blocks = torch.compile(create_block_mask)(visible, None, None, total, total, device=device)
    compiled = torch.compile(flex_attention)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*heads_first, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return attend


def peers(layout: BranchLayout, shape: Shape, dense_limit: int) -> Iterator[tuple[str, Callable[[], Attention]]]:
    """Name of each contender and a function that makes it; what that takes is the set-up time."""
    yield "ours", lambda: ours(layout)
    if layout.total_tokens <= dense_limit:
        yield "sdpa-dense", lambda: sdpa_dense(layout, shape.device)
    yield "sdpa-causal", lambda: sdpa_causal(layout)
    if shape.device == "cuda":
        yield "flex", lambda: flex(layout, shape.device)


def time_peer(
    make: Callable[[], Attention], inputs: Tensors, device: str, repeats: int
) -> tuple[Timing, Timing, float]:
    """(forward, backward, set-up in ms). The set-up includes the first call: tables, and compilation where there is
    any.
    """
    start = time.perf_counter()
    attend = make()
    out = attend(*inputs)
    grad = torch.randn_like(out)
    torch.autograd.grad(out, inputs, grad, retain_graph=True)
    if device == "cuda":
        torch.cuda.synchronize()
    setup = (time.perf_counter() - start) * 1e3

    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)

    def backward() -> None:
        torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return measure(forward, device, repeats), measure(backward, device, repeats), setup


def run(shape: Shape, repeats: int, dense_limit: int, cases: list[str] | None = None) -> Iterator[Row]:
    """Check, then time every case and peer. dense_limit: most tokens for which a dense mask is built."""
    check(shape)
    for name, layout in layouts(shape.tokens):
        if cases and name not in cases:
            continue
        for peer, make in peers(layout, shape, dense_limit):
            yield from _rows(name, peer, make, layout, shape, repeats)
        if name == "shared-prompt":
            other = apart(shape.tokens)
            yield from _rows(name, "apart", lambda other=other: ours(other), other, shape, repeats)


def _rows(
    case: str, peer: str, make: Callable[[], Attention], layout: BranchLayout, shape: Shape, repeats: int
) -> Iterator[Row]:
    pairs = layout.mask.visible_pairs()
    documents = layout.cu_seqlens.diff().double()
    causal_pairs = float((documents * (documents + 1) / 2).sum())
    forward, backward, setup = time_peer(make, shape.inputs(layout.total_tokens), shape.device, repeats)
    for direction, timing, products in (("forward", forward, 4), ("backward", backward, 10)):
        operations = products * pairs * shape.heads * shape.head_dim
        yield Row(
            case=case,
            peer=peer,
            direction=direction,
            tokens=layout.total_tokens,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            visible_share=pairs / causal_pairs,
            **asdict(timing),
            tflops=operations / timing.median_ms / 1e9,
            setup_ms=setup,
        )
