"""multiverse_attention: attention of one packed row of documents under the mask of its `BranchLayout`.

    out_i = sum_j p_ij v_j,   p_ij = softmax over the visible j of (scale q_i . k_j)

Token i sees token j iff j <= i, both are in the same document, and no block has j in one of its paths and i in another
(Multiverse attention, arXiv 2506.09991, section 4). This module checks the arguments and chooses a backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch

from mvkernels.layout import BranchLayout
from mvkernels.ops.attention_config import HEAD_DIMS, attention_config
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
) -> tuple[torch.Tensor, torch.Tensor]: ...
def multiverse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: BranchLayout,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention under the mask of a layout, with gradients.

    q: [T, Hq, D]; k, v: [T, Hkv, D], of one dtype, on one device; Hq a multiple of Hkv; any strides. T is
    layout.total_tokens. scale: default 1 / sqrt(D). backend: "auto", "triton", "cpu" or "reference".

    Returns out [T, Hq, D] in q's dtype; with return_lse also the log-sum-exp of the scaled scores, [Hq, T], natural
    logarithm, fp32 (fp64 for fp64 inputs), which has a gradient too. The backends differ in rounding only. A NaN or
    infinite input reaches every row that sees it, as in scaled_dot_product_attention; it may also reach rows of the
    same tile.

    Raises ValueError for inputs that do not fit together; BackendError where the named backend cannot do it, or, for
    "auto", no backend can ("reference" is never chosen: it builds T x T scores).
    """
    if not isinstance(layout, BranchLayout):
        raise ValueError(f"layout: expected a BranchLayout, got {type(layout).__name__}")
    _check(q, k, v, layout)
    # Both can run on CPU tensors only where Triton is interpreted, which is for tests and slow.
    name = choose_backend(backend, backend_reasons(q), auto=("cpu", "triton"))
    factor = float(q.shape[2] ** -0.5 if scale is None else scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale: expected a finite number, got {factor}")
    if name == "reference":
        out, lse = reference_attention(q, k, v, layout.dense_mask().to(q.device), factor)
    else:
        tables, config = _prepared(name, q, layout)
        # Imported late: the ops are registered with PyTorch when they are first used.
        from mvkernels.ops.attention_schema import OPS

        out, lse = OPS[name][0](q, k, v, tables, config, factor)
    return (out, lse) if return_lse else out


def _prepared(name: str, q: torch.Tensor, layout: BranchLayout) -> tuple[Sequence[torch.Tensor], list[int]]:
    """Tables and tile sizes of a layout for one backend, made once per layout."""
    if name == "cpu":
        from mvkernels.ops import attention_cpu

        return layout.cached(("attention", "cpu"), lambda: attention_cpu.tables(layout.mask)), []
    from mvkernels.ops.attention_tables import tables

    capability = None if triton_interpreted() else torch.cuda.get_device_capability(q.device)
    config = attention_config(q.shape[2], q.dtype.itemsize, capability)
    key = ("attention", "triton", config.blocks, str(q.device))
    return layout.cached(key, lambda: tables(layout.mask, config, q.device)), config.flat


def backend_reasons(q: torch.Tensor) -> dict[str, str | None]:
    """Backend, best first -> None where it can work on tensors of q's device, dtype and head dim, else why not."""
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
    return {"triton": triton, "cpu": cpu, "reference": None}


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BranchLayout) -> None:
    """Raise one ValueError that says what was expected and what came."""
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
