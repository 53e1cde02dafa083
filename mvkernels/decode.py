"""Attention of new tokens over the paged KV cache, for all branches of a step: `tree_decode`.

    out[r] = sum_j softmax_j(scale q[r] . k[j]) v[j]   over the keys j that row r sees

A row sees every key of the nodes before its own, tokens of this step included, and the keys of its own node up to
itself (arXiv 2506.09991, section 4.2). A prefix that several branches share is read once for all of them where that is
faster (cascade attention); `decode_path` returns the choice.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal, overload

import torch

from mvkernels.cache.step import Step
from mvkernels.errors import require_type
from mvkernels.ops.backends import choose_backend, dtype_names, triton_interpreted, triton_reason
from mvkernels.ops.decode.native import compile_reason, decode_native, plan_items
from mvkernels.ops.decode.sdpa import decode_sdpa, plan_calls
from mvkernels.ops.decode.tasks import DecodePath

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_DTYPES = (*TRITON_DTYPES, torch.float64)
MAX_HEAD_DIM = 256


@overload
def tree_decode(
    q: torch.Tensor,
    k_layer: torch.Tensor,
    v_layer: torch.Tensor,
    step: Step,
    scale: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
    batch_invariant: bool = ...,
) -> torch.Tensor: ...
@overload
def tree_decode(
    q: torch.Tensor,
    k_layer: torch.Tensor,
    v_layer: torch.Tensor,
    step: Step,
    scale: float | None = ...,
    backend: str = ...,
    *,
    return_lse: Literal[True],
    batch_invariant: bool = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def tree_decode(
    q: torch.Tensor,
    k_layer: torch.Tensor,
    v_layer: torch.Tensor,
    step: Step,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of a step's new tokens over the paged KV cache; not differentiable.

    Call it after `PagedKVCache.append` has written the new keys and values of this layer. Prefill, decode and mixed
    steps are the same call: an entry of several tokens attends causally within itself. The same step has the same bits
    each time.

    Args:
        q: [step.total_rows, Hq, D] queries, rotated by `step.positions`. Hq is a multiple of Hkv.
        k_layer: [num_pages, page_size, Hkv, D], `cache.k[layer]`, in the dtype and on the device of q.
        v_layer: [num_pages, page_size, Hkv, D], `cache.v[layer]`.
        step: An open step of the cache, from `PagedKVCache.plan` or `PagedKVCache.advance`.
        scale: Factor of the scores; None is 1 / sqrt(D).
        backend: "auto", "native" (a CPU kernel that g++ compiles at its first call), "cpu" (PyTorch's own kernels),
            "triton" or "reference" ("auto" never chooses it). A backend given by name never falls back.
        return_lse: Also return the log-sum-exp of the scaled scores.
        batch_invariant: Give the rows of a branch the same bits in any batch, for an equal number of threads, page size
            and page table before them; backends "native" and "reference" only, and slower.

    Returns:
        out [N, Hq, D] in the dtype of q, N = step.total_rows; with `return_lse` (out, lse), lse [Hq, N] in natural
            logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, `scale` is not finite, q requires a gradient, or
            `backend` is unknown.
        StaleStep: The step was committed, rolled back or discarded.
        BackendError: The backend given by name cannot compute this, or no backend of "auto" can; gives the reasons.

    Source: arXiv 2506.09991, section 4.2.
    """
    check_arguments(q, k_layer, v_layer, step)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    chosen = _choose(backend, q, batch_invariant)
    lse: torch.Tensor | None
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        if chosen == "triton":
            from mvkernels.ops.decode.triton import decode_triton

            out, lse = decode_triton(q, k_layer, v_layer, step.views, scale)
        elif chosen == "native":
            out, lse = decode_native(q, k_layer, v_layer, step.views, scale, batch_invariant, return_lse)
        elif chosen == "cpu":
            out, lse = decode_sdpa(q, k_layer, v_layer, step.views, scale)
        else:
            out, lse = _decode_reference(q, k_layer, v_layer, step, scale)
    return out if lse is None or not return_lse else (out, lse)


def decode_path(
    q: torch.Tensor,
    k_layer: torch.Tensor,
    v_layer: torch.Tensor,
    step: Step,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> DecodePath:
    """Return how `tree_decode` reads the keys for these arguments; no element is read.

    The backends choose by cost: sharing must save more than the additional call or launch and the merge of partial
    results.

    Args:
        q: [step.total_rows, Hq, D] queries.
        k_layer: [num_pages, page_size, Hkv, D], `cache.k[layer]`.
        v_layer: [num_pages, page_size, Hkv, D], `cache.v[layer]`.
        step: An open step of the cache.
        backend: As in `tree_decode`.
        batch_invariant: As in `tree_decode`.

    Returns:
        "shared": keys that several branches see are read once for all of them, and partial results are merged
            (cascade).
        "split": each branch reads its own page table in pieces that are merged (split-KV).
        "direct": each branch reads its own page table in one piece; nothing is merged.

    Raises:
        ValueError: As in `tree_decode`.
        StaleStep: The step was committed, rolled back or discarded.
        BackendError: As in `tree_decode`.
    """
    check_arguments(q, k_layer, v_layer, step)
    chosen = _choose(backend, q, batch_invariant)
    heads, kv_heads = q.shape[1], k_layer.shape[2]
    if chosen == "triton":
        from mvkernels.ops.decode.triton import plan_tables

        tables = plan_tables(step.views, heads, kv_heads, q.shape[2], q.element_size(), q.device)
        return tables.path
    if chosen == "native":
        return plan_items(step.views, heads // kv_heads, kv_heads, batch_invariant).path
    if chosen == "cpu":
        return plan_calls(step.views)[1]
    return "direct"


def check_arguments(q: torch.Tensor, k_layer: torch.Tensor, v_layer: torch.Tensor, step: Step) -> None:
    """Raise ValueError or StaleStep unless the arguments of `tree_decode` fit together."""
    require_type(Step, "Step of PagedKVCache.plan", step=step)
    step.require_open()
    require_type(torch.Tensor, q=q, k_layer=k_layer, v_layer=v_layer)
    if q.dim() != 3 or q.shape[0] != step.total_rows:
        raise ValueError(f"q: expected shape [{step.total_rows}, Hq, D], got {list(q.shape)}")
    if k_layer.dim() != 4 or k_layer.shape[1] != step.views.page_size or k_layer.shape[3] != q.shape[2]:
        expected = f"[num_pages, {step.views.page_size}, Hkv, {q.shape[2]}]"
        raise ValueError(f"k_layer: expected shape {expected}, got {list(k_layer.shape)}")
    pages = step.entries[0][0].cache.num_pages
    if k_layer.shape[0] != pages:  # with fewer, a kernel would read past the tensor
        raise ValueError(f"k_layer: expected the {pages} pages of the step's cache, got {k_layer.shape[0]}")
    if v_layer.shape != k_layer.shape:
        raise ValueError(f"v_layer: expected k_layer's shape {list(k_layer.shape)}, got {list(v_layer.shape)}")
    if q.shape[1] == 0 or q.shape[1] % k_layer.shape[2]:
        expected = f"a positive multiple of {k_layer.shape[2]} key-value heads"
        raise ValueError(f"q: expected {expected}, got {q.shape[1]} heads")
    for name, tensor in (("k_layer", k_layer), ("v_layer", v_layer)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous storage as in PagedKVCache, got strides {tensor.stride()}")
    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("q: expected a tensor outside autograd, got one that requires grad: use torch.no_grad()")


def _choose(backend: str, q: torch.Tensor, batch_invariant: bool) -> str:
    """Choose the backend; for CPU tensors Triton is checked only where no other backend of "auto" fits."""
    if q.is_cpu and backend in ("auto", "native") and native_reason(q) is None:
        return "native"
    if q.is_cpu and backend in ("auto", "cpu") and q.dtype in CPU_DTYPES and not batch_invariant:
        return "cpu"
    reasons = backend_reasons(q)
    if batch_invariant:
        for name in ("cpu", "triton"):
            reasons[name] = reasons[name] or "it is not batch-invariant"
    return choose_backend(backend, reasons, auto=("native", "cpu", "triton"))


def native_reason(q: torch.Tensor) -> str | None:
    """Return why the compiled CPU kernel cannot decode queries [N, Hq, D] of this device and dtype, or None."""
    if not q.is_cpu:
        return f"expected tensors on cpu, got {q.device.type}"
    if q.dtype not in TRITON_DTYPES:
        return f"expected dtype {dtype_names(TRITON_DTYPES)}, got {q.dtype}"
    if q.shape[2] > MAX_HEAD_DIM:
        return f"expected a head dimension of at most {MAX_HEAD_DIM}, got {q.shape[2]}"
    return compile_reason()


def backend_reasons(q: torch.Tensor) -> dict[str, str | None]:
    """Return, for each backend, why it cannot decode queries [N, Hq, D] of this device and dtype, or None."""
    device = q.device.type
    cpu = None if device == "cpu" else f"expected tensors on cpu, got {device}"
    if cpu is None and q.dtype not in CPU_DTYPES:
        cpu = f"expected dtype {dtype_names(CPU_DTYPES)}, got {q.dtype}"
    triton = triton_reason(q.device)
    if triton is None and q.dtype not in TRITON_DTYPES:
        triton = f"expected dtype {dtype_names(TRITON_DTYPES)}, got {q.dtype}"
    if triton is None and q.dtype == torch.bfloat16 and triton_interpreted():
        triton = "Triton's interpreter has no bfloat16 dot product"
    if triton is None and q.shape[2] > MAX_HEAD_DIM:
        triton = f"expected a head dimension of at most {MAX_HEAD_DIM}, got {q.shape[2]}"
    return {"native": native_reason(q), "cpu": cpu, "triton": triton, "reference": None}


def _decode_reference(
    q: torch.Tensor, k_layer: torch.Tensor, v_layer: torch.Tensor, step: Step, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather what each entry sees, then compute eager attention, entry by entry."""
    from mvkernels.reference.decode import attend

    outs, lses = [], []
    for entry, view in enumerate(step.views.entries):
        slots = torch.from_numpy(step.views.visible_slots(entry)).to(q.device)
        keys, values = (cache.view(-1, *cache.shape[2:])[slots] for cache in (k_layer, v_layer))
        out, lse = attend(q[view.first_row : view.first_row + view.num_rows], keys, values, scale)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)
