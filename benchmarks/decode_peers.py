"""Peers of the decode suite.

    ours               tree_decode, backend "auto": the prefix is read once for all branches
    split-kv           tree_decode where nothing is shared: every branch holds a prefix of its own, so that each list is
                       read in pieces by itself, as paged kernels without shared prefixes do
    sdpa-per-branch    scaled_dot_product_attention branch by branch, each on contiguous keys and values of its own that
                       were gathered before: what transformers does, a request at a time
    sdpa-batched       the same in one call, the branches being equally long: a batch in transformers
    sdpa-gather        branch by branch, with the gathering of the pages timed: paged storage without a paged kernel
    flex-paged         FlexAttention, compiled, over all pages with a mask of what each branch sees (CUDA)
    flash-attn         flash_attn_with_kvcache on contiguous keys and values, split over keys (CUDA, if installed)
    flash-attn3-paged  that of flash_attn_interface on the pages (CUDA, if installed)
    flashinfer         BatchDecodeWithPagedKVCacheWrapper on the pages, branch by branch (CUDA, if installed)
    flashinfer-cascade MultiLevelCascadeAttentionWrapper: the prefix once for all branches (CUDA, if installed)

Planning (of pages, masks and wrappers) is not timed: it is done once a step, and serves all layers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.decode_cases import PAGE_SIZE, DecodeCase, Decoding
from mvkernels import tree_decode
from mvkernels.decode import decode_path

Call = Callable[[], torch.Tensor]
WORKSPACE_BYTES = 128 * 2**20
MODULES = {
    "flash-attn": "flash_attn",
    "flash-attn3-paged": "flash_attn_interface",
    "flashinfer": "flashinfer",
    "flashinfer-cascade": "flashinfer",
}
SWEEP = ("ours", "split-kv", "sdpa-per-branch", "sdpa-batched")


@dataclass(frozen=True)
class DecodePeer:
    """make: from a case set up to what computes [branches, Hq, D]. traffic: KV bytes that it reads and writes. path:
    which way it takes, where it has several.
    """

    name: str
    make: Callable[[Decoding], Call]
    traffic: int
    path: Callable[[Decoding], str] | None = None


def peers(case: DecodeCase) -> list[DecodePeer]:
    """All that can be tried on a case, ours first."""
    once, each = case.unique_bytes, case.branch_bytes
    found = [DecodePeer("ours", ours, once, path_of_ours)]
    if case.branches > 1:  # else it is the same as ours
        found.append(DecodePeer("split-kv", split_kv, each))
    found += [
        DecodePeer("sdpa-per-branch", sdpa_per_branch, each),
        DecodePeer("sdpa-batched", sdpa_batched, each),
        DecodePeer("sdpa-gather", sdpa_gather, 3 * each),
    ]
    if case.shape.device == "cuda":
        found.append(DecodePeer("flex-paged", flex_paged, once))
        makers = {
            "flash-attn": (flash_attn, each),
            "flash-attn3-paged": (flash_attn3_paged, each),
            "flashinfer": (flashinfer_decode, each),
            "flashinfer-cascade": (flashinfer_cascade, once),
        }
        missing = not_installed("cuda")
        found += [DecodePeer(name, *maker) for name, maker in makers.items() if name not in missing]
    return [peer for peer in found if case.name != "sweep" or peer.name in SWEEP]


def not_installed(device: str) -> list[str]:
    """Peers that this machine could run and has not."""
    missing = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]
    return missing if device == "cuda" else []


def ours(run: Decoding, backend: str = "auto") -> Call:
    return lambda: tree_decode(run.q, run.cache.k[0], run.cache.v[0], run.step, backend=backend)


def path_of_ours(run: Decoding) -> str:
    return decode_path(run.q, run.cache.k[0], run.cache.v[0], run.step)


def split_kv(run: Decoding) -> Call:
    cache, step = run.unshared()
    return lambda: tree_decode(run.q, cache.k[0], cache.v[0], step)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B, Hq, 1, D], k and v [B, Hkv, L, D] -> [B, Hq, D]."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])[:, :, 0]


def heads_first(run: Decoding, branch: int) -> tuple[torch.Tensor, ...]:
    """k and v [1, Hkv, L, D], contiguous, as transformers' caches hold them."""
    return tuple(x.transpose(0, 1)[None].contiguous() for x in run.contiguous(branch))


def sdpa_per_branch(run: Decoding) -> Call:
    inputs = [(run.q[b][None, :, None], *heads_first(run, b)) for b in range(run.case.branches)]
    return lambda: torch.cat([sdpa(*one) for one in inputs])


def sdpa_batched(run: Decoding) -> Call:
    pairs = [heads_first(run, b) for b in range(run.case.branches)]
    k, v = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    q = run.q[:, :, None]
    return lambda: sdpa(q, k, v)


def sdpa_gather(run: Decoding) -> Call:
    slots = [run.slots(b) for b in range(run.case.branches)]
    stores = [x[0].flatten(0, 1) for x in (run.cache.k, run.cache.v)]

    def call() -> torch.Tensor:
        outs = []
        for b, where in enumerate(slots):
            k, v = (store[where].transpose(0, 1)[None] for store in stores)
            outs.append(sdpa(run.q[b][None, :, None], k, v))
        return torch.cat(outs)

    return call


def flex_paged(run: Decoding) -> Call:
    """The rows are the branches, the keys all slots of the cache."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    k, v = (x[0].flatten(0, 1).transpose(0, 1)[None] for x in (run.cache.k, run.cache.v))
    rows, slots = run.case.branches, k.shape[2]
    sees = torch.zeros(rows, slots, dtype=torch.bool, device=run.device)
    for b in range(rows):
        sees[b, run.slots(b)] = True
    torch._dynamo.reset()
    mask = create_block_mask(lambda b, h, i, j: sees[i, j], None, None, rows, slots, device=run.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    q = run.q.transpose(0, 1)[None].contiguous()
    gqa = q.shape[1] != k.shape[1]
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)[0].transpose(0, 1)


def _lengths(run: Decoding) -> torch.Tensor:
    return torch.full((run.case.branches,), run.case.length, dtype=torch.int32, device=run.device)


def flash_attn(run: Decoding) -> Call:
    function = importlib.import_module("flash_attn").flash_attn_with_kvcache
    pairs = [run.contiguous(b) for b in range(run.case.branches)]
    k, v = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))  # [B, L, Hkv, D]
    q, lengths = run.q[:, None], _lengths(run)
    return lambda: function(q, k, v, cache_seqlens=lengths)[:, 0]


def flash_attn3_paged(run: Decoding) -> Call:
    function = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    lists = [np.concatenate([run.shared_pages, run.own_pages(b)]) for b in range(run.case.branches)]
    table = torch.from_numpy(np.stack(lists)).to(run.device)
    q, lengths = run.q[:, None], _lengths(run)

    def call() -> torch.Tensor:
        out = function(q, run.cache.k[0], run.cache.v[0], cache_seqlens=lengths, page_table=table)
        return (out[0] if isinstance(out, tuple) else out)[:, 0]  # some releases return the log-sum-exp too

    return call


def _heads(run: Decoding) -> tuple[int, int, int, int]:
    shape = run.case.shape
    return shape.heads, shape.kv_heads, shape.head_dim, PAGE_SIZE


def _page_lists(run: Decoding, lists: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """(pointers, pages) of lists of pages."""
    ends = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    pages = np.concatenate(lists).astype(np.int32)
    return torch.from_numpy(ends).to(run.device), torch.from_numpy(pages).to(run.device)


def flashinfer_decode(run: Decoding) -> Call:
    flashinfer = importlib.import_module("flashinfer")
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=run.device)
    grouped = run.case.shape.heads > run.case.shape.kv_heads
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=grouped)
    branches = run.case.branches
    lists = [np.concatenate([run.shared_pages, run.own_pages(b)]) for b in range(branches)]
    last = torch.full((branches,), run.last_count, dtype=torch.int32, device=run.device)
    types = {"q_data_type": run.dtype, "kv_data_type": run.dtype}
    wrapper.plan(*_page_lists(run, lists), last, *_heads(run), **types)
    return lambda: wrapper.run(run.q, (run.cache.k[0], run.cache.v[0]))


def flashinfer_cascade(run: Decoding) -> Call:
    """Two levels: the prefix for all rows together, then each branch's own pages."""
    branches = run.case.branches
    if branches == 1:
        raise ValueError("expected several branches, got one: nothing is shared")
    flashinfer = importlib.import_module("flashinfer")
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=run.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    int32 = {"dtype": torch.int32, "device": run.device}
    rows = [torch.tensor([0, branches], **int32), torch.arange(branches + 1, **int32)]
    levels = [_page_lists(run, [run.shared_pages]), _page_lists(run, [run.own_pages(b) for b in range(branches)])]
    last = [torch.tensor([PAGE_SIZE], **int32), torch.full((branches,), run.last_count, **int32)]
    pointers, pages = map(list, zip(*levels, strict=True))
    wrapper.plan(rows, pointers, pages, last, *_heads(run), causal=False, q_data_type=run.dtype)
    return lambda: wrapper.run(run.q, (run.cache.k[0], run.cache.v[0]))
