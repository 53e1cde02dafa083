"""The loss of a causal language model without the logits of a whole row: labelled tokens only, some at a time.

A row of 32,768 tokens has logits of 20 GB in fp32 with a vocabulary of 152,064, and their gradient as much again. Here
the output layer runs within the loss, on so many tokens at a time that their logits take CHUNK numbers, and again in
the backward pass. Tokens without a label, as those of prompts, do not reach it. The result is that of transformers'
`ForCausalLMLoss`, up to the order of its sum.
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
    forward, replaced = head.forward, head.__dict__.get("forward")
    head.forward = _same
    inner.loss_function = partial(_loss, forward, chunk=chunk)
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
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    parts = max(1, -(-len(rows) * vocab_size // chunk))
    for part, right in zip(rows.chunk(parts), wanted.chunk(parts), strict=True):
        if parts > 1 and torch.is_grad_enabled():
            total = total + checkpoint(_sum, head, part, right, use_reentrant=False)
        else:
            total = total + _sum(head, part, right)
    if num_items_in_batch is None:
        return total / len(wanted)
    count: Any = num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


def _sum(head: Head, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    return found
