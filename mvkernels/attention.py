"""Attention over packed documents with parallel branches: `multiverse_attention`.

    out_i = sum_j p_ij v_j,   p_ij = softmax over the visible j of (scale q_i . k_j)

Token i sees token j iff j <= i, both are in the same document, and no block has j in one of its paths and i in another
(Multiverse attention, arXiv 2506.09991, section 4). This module checks the arguments and chooses a backend.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.distributed as dist

from mvkernels.context_parallel import gather_inputs
from mvkernels.errors import require_type
from mvkernels.layout import BranchLayout
from mvkernels.ops.attention import flash as attention_flash
from mvkernels.ops.attention.config import HEAD_DIMS
from mvkernels.ops.backends import choose_backend, dtype_names, triton_interpreted, triton_reason
from mvkernels.reference.attention import attention as reference_attention

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@overload
def multiverse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BranchLayout,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor: ...
@overload
def multiverse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BranchLayout,
    scale: float | None = None,
    backend: str = "auto",
    *,
    return_lse: Literal[True],
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def multiverse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BranchLayout,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute attention under the mask of a branch layout; differentiable.

    GQA and varlen packing are built in: query head h reads key-value head h // (Hq / Hkv), and the documents of a
    packed layout do not see each other. The backends differ in rounding only. A NaN or infinite input reaches every row
    that sees it, as in `scaled_dot_product_attention`; it may also reach other rows of the same tile.

    Args:
        q: [T, Hq, D] queries on any device, T = layout.total_tokens, any strides. Hq is a multiple of Hkv.
        k: [T, Hkv, D] keys in the dtype and on the device of q, any strides.
        v: [T, Hkv, D] values, as k.
        layout: Positions and mask of the packed row.
        scale: Factor of the scores; None is 1 / sqrt(D).
        backend: "auto", "triton", "cpu", "flash" (flash-attn, for layouts without branches and without `return_lse`) or
            "reference" (T x T scores; "auto" never chooses it). A backend given by name never falls back.
        return_lse: Also return the log-sum-exp of the scaled scores, which has a gradient too.
        group: Context parallelism over the processes of this group. Each process passes the q, k and v of its own T_r
            rows, `split_context(layout, ranks).rows[rank]`, and the whole layout; it gets out and lse of these rows.
            Every process must make the call, forward and backward. None: one process.

    Returns:
        out [T, Hq, D] in the dtype of q; with `return_lse` (out, lse), lse [Hq, T] in natural logarithm, float32
            (float64 for float64 inputs).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, `scale` is not finite, or `backend` is unknown.
        BackendError: The backend given by name cannot compute this, or no backend of "auto" can; gives the reasons.

    Source: Multiverse attention, arXiv 2506.09991, section 4.
    """
    if not isinstance(layout, BranchLayout):
        raise ValueError(f"layout: expected a BranchLayout, got {type(layout).__name__}")
    rows = None
    if group is not None:
        q, k, v, layout, rows = gather_inputs(q, k, v, layout, group)
    _check(q, k, v, layout)
    # Where Triton is interpreted both can run on CPU tensors, but the interpreter is slow and for tests.
    auto = ("cpu", "flash", "triton") if _prefer_flash(q) else ("cpu", "triton")
    reasons = backend_reasons(q, layout, return_lse)
    if group is not None:
        reasons["flash"] = "expected one process, got a group: its kernels take no part of the rows"
    name = choose_backend(backend, reasons, auto)
    factor = float(q.shape[2] ** -0.5 if scale is None else scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale: expected a finite number, got {factor}")
    if name == "reference":
        with torch.autocast(q.device.type, enabled=False):  # as the other backends: products in the inputs' dtype
            out, lse = reference_attention(q, k, v, layout.dense_mask().to(q.device), factor)
    elif name == "flash":
        return attention_flash.attend(q, k, v, layout.cu_seqlens.to(q.device), layout.longest_document, factor)
    else:
        # Imported late: the import registers the ops with PyTorch.
        from mvkernels.ops.attention.schema import OPS

        out, lse = OPS[name][0](q, k, v, layout.mask_table, factor)
    if rows is not None:
        out, lse = out[rows], lse[:, rows]
    return (out, lse) if return_lse else out


def backend_reasons(
    q: torch.Tensor, layout: BranchLayout | None = None, return_lse: bool = False
) -> dict[str, str | None]:
    """Check every backend for the device, dtype and head dim of q and for a layout.

    Args:
        q: [T, Hq, D] queries; their values are not read.
        layout: The layout to attend under; None leaves out what depends on it.
        return_lse: As in `multiverse_attention`.

    Returns:
        Backend -> None where it can compute this, else the reason why not.
    """
    triton = triton_reason(q.device)
    if triton is None and q.dtype not in TRITON_DTYPES:
        triton = f"expected dtype {dtype_names(TRITON_DTYPES)}, got {q.dtype}"
    if triton is None and q.dtype == torch.bfloat16 and triton_interpreted():
        triton = "Triton's interpreter has no bfloat16 dot product"
    if triton is None and q.shape[2] not in HEAD_DIMS:
        triton = f"expected a head dim among {', '.join(map(str, HEAD_DIMS))}, got {q.shape[2]}"
    cpu = None
    if q.device.type != "cpu":
        cpu = f"expected tensors on the CPU, got {q.device}"
    elif q.dtype not in CPU_DTYPES:
        cpu = f"expected dtype {dtype_names(CPU_DTYPES)}, got {q.dtype}"
    return {"triton": triton, "cpu": cpu, "flash": _flash_reason(q, layout, return_lse), "reference": None}


def _prefer_flash(q: torch.Tensor) -> bool:
    installed = len(attention_flash.INSTALLED) > 0 and q.device.type == "cuda"
    return installed and attention_flash.is_faster(torch.cuda.get_device_capability(q.device))


def _flash_reason(q: torch.Tensor, layout: BranchLayout | None, return_lse: bool) -> str | None:
    if not attention_flash.INSTALLED:
        return "flash-attn is not installed"
    if q.device.type != "cuda":
        return f"expected tensors on cuda, got {q.device.type}"
    if attention_flash.module_for(torch.cuda.get_device_capability(q.device)) is None:
        return "FlashAttention-3 runs on Hopper GPUs only"
    if q.dtype not in attention_flash.DTYPES:
        return f"expected dtype {dtype_names(attention_flash.DTYPES)}, got {q.dtype}"
    if q.shape[2] > attention_flash.MAX_HEAD_DIM or q.shape[2] % 8:
        return f"expected a head dim of a multiple of 8 up to {attention_flash.MAX_HEAD_DIM}, got {q.shape[2]}"
    if return_lse:
        return "flash-attn has no gradient of the log-sum-exp"
    if layout is not None and layout.has_branches:
        return "expected a layout without branches, got one with branches"
    return None


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BranchLayout) -> None:
    """Raise ValueError, with what was expected and what came, unless the arguments fit together."""
    require_type(torch.Tensor, q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions [tokens, heads, head_dim], got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
    tokens, heads, depth = q.shape
    if k.shape != v.shape:
        raise ValueError(f"expected k and v of one shape, got k {list(k.shape)} and v {list(v.shape)}")
    if (k.shape[0], k.shape[2]) != (tokens, depth):
        expected = f"[{tokens}, kv_heads, {depth}] to fit q {list(q.shape)}"
        raise ValueError(f"k and v: expected {expected}, got {list(k.shape)}")
    if depth == 0 or k.shape[1] == 0 or heads == 0 or heads % k.shape[1]:
        expected = "head_dim > 0 and q heads a positive multiple of kv heads"
        raise ValueError(f"expected {expected}, got q {list(q.shape)} and k {list(k.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"expected q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"expected q, k and v on one device, got {q.device}, {k.device} and {v.device}")
    if layout.total_tokens != tokens:
        raise ValueError(f"expected q of the layout's {layout.total_tokens} tokens, got {tokens}")
