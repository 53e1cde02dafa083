"""The loss of a causal language model without the logits of a whole row: labelled tokens only, some at a time.

A row of 32,768 tokens has logits of 20 GB in fp32 with a vocabulary of 152,064, and their gradient as much again. Here
the output layer runs within the loss, on so many tokens at a time that their logits take CHUNK numbers, and its
gradients are made at once. Tokens without a label, as those of prompts, do not reach it. The result is that of
transformers' `ForCausalLMLoss`, up to the order of its sum. An output layer that is no plain linear one (an adapter's)
runs again in the backward pass instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK = 2**26  # logits at a time: 256 MB in fp32
_IGNORED = -100

Head = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def chunked_loss(model: nn.Module, chunk: int = CHUNK) -> Iterator[None]:
    """Within, `model(..., labels=)` has its loss computed so, and no logits. model: of transformers, or peft's on one.

    Where the output layer or the loss was replaced by others, nothing changes.
    """
    inner = _causal_model(model)
    head: Any = None if inner is None else inner.get_output_embeddings()
    if inner is None or head is None or inner.loss_type != "ForCausalLM" or hasattr(inner, "_loss_function"):
        yield
        return
    replaced = head.__dict__.get("forward")
    linear = head if type(head) is nn.Linear and replaced is None else None
    inner.loss_function = partial(_loss, head.forward, linear, chunk=chunk)
    head.forward = _same
    try:
        yield
    finally:
        del inner._loss_function
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced


def _causal_model(model: Any) -> PreTrainedModel | None:
    """The transformers model within what wraps it: processes' wrappers, and adapters'."""
    while not isinstance(model, PreTrainedModel):
        inner = next(
            (model._modules[name] for name in ("module", "base_model", "model") if name in model._modules), None
        )
        if inner is None:
            return None
        model = inner
    return model


def _same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _loss(
    head: Head,
    linear: nn.Linear | None,
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = _IGNORED,
    shift_labels: torch.Tensor | None = None,
    *,
    chunk: int,
    **kwargs: Any,
) -> torch.Tensor:
    """Called like transformers' loss; logits are still hidden states [B, T, H], and labels [B, T].

    Returns the mean over labelled tokens, or their sum / num_items_in_batch.
    """
    hidden = logits
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    flat = shift_labels.reshape(-1).to(hidden.device)
    labelled = (flat != ignore_index).nonzero()[:, 0]
    rows, wanted = hidden.reshape(-1, hidden.shape[-1])[labelled], flat[labelled]
    parts = max(1, -(-len(rows) * vocab_size // chunk))
    if parts == 1:
        total = _sum(head, rows, wanted)
    elif linear is not None and torch.is_grad_enabled():
        total = _LinearSum.apply(rows, linear.weight, linear.bias, wanted, parts)  # type: ignore[no-untyped-call]
    else:
        pairs = zip(rows.chunk(parts), wanted.chunk(parts), strict=True)
        total = torch.stack([checkpoint(_sum, head, *pair, use_reentrant=False) for pair in pairs]).sum()
    if num_items_in_batch is None:
        return total / len(wanted)
    count: Any = num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


class _LinearSum(torch.autograd.Function):
    """The summed loss of rows [N, H] behind a linear layer, with the gradients beside it, a part of the rows at a time:
    their logits are multiplied once, not again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, parts: int
    ) -> torch.Tensor:
        given = (rows, weight, bias)
        wanted = [x is not None and x.requires_grad for x in given]
        sums = [
            torch.zeros_like(x, dtype=torch.float32) if x is not None and want else None
            for x, want in zip(given, wanted, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        start = 0
        for part, right in zip(rows.chunk(parts), labels.chunk(parts), strict=True):
            with torch.enable_grad():
                x, w = part.detach().requires_grad_(wanted[0]), weight.detach().requires_grad_(wanted[1])
                b = None if bias is None else bias.detach().requires_grad_(wanted[2])
                loss = F.cross_entropy(F.linear(x, w, b).float(), right, reduction="sum")
                asked = [one for one in (x, w, b) if one is not None and one.requires_grad]
                found = iter(torch.autograd.grad(loss, asked) if asked else ())
            total += loss.detach()
            for place, into in enumerate(sums):
                if into is not None:
                    (into[start : start + len(part)] if place == 0 else into).add_(next(found))
            start += len(part)
        ctx.dtypes = [None if x is None else x.dtype for x in given]
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = [
            None if x is None else (x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*found, None, None)


def _sum(head: Head, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    return found
