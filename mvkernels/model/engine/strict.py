"""Strict mode: a request has the same bits with any other requests in its steps. How that is done, and its limits.

A row's numbers depend on the other rows of a step in three ways, and each is taken away:

    shapes      matrix products take other ways for other numbers of rows. Every forward has the same number of them,
                and so has the LM head; a step with fewer tokens has spare rows, which the attention never sees
                (`Runner.constant_rows`). A longer prompt comes in pieces
    attention   its way of sharing, cutting and merging follows the batch; `tree_decode(batch_invariant=True)` cuts each
                branch's own list at fixed places
    positions   RoPE variants that look at the longest sequence of a forward are refused

Samplers and log-probabilities treat each row by itself as it is. So a request that is preempted, or whose prompt is cut
at other places, computes the same bits again too.

One thing is no matter of bits. `max_new_tokens` is of a request as a whole: where it ends one with several paths open,
how far each of them has come depends on which of them had turns, as many requests may leave no room in a step for all
paths of one, and a request that was preempted comes back piece by piece. What the other budgets end is the same.

It holds for the same weights, machine, number of threads, page size and number of rows. With 1 or 2 threads it is
tested. With more of them, unless the decoder is "native", PyTorch may cut an activation function's elements within a
vector, whose rest is rounded otherwise, unless rows x intermediate size is a multiple of threads x 16.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mvkernels.decode import native_reason
from mvkernels.errors import BackendError

#: Rows of every forward where the engine is not told of another number.
STRICT_ROWS = 64
# How transformers calls those whose frequencies follow the longest sequence of the forward.
_LOOKS_AT_THE_BATCH = ("dynamic", "longrope")


def check_strict(model: PreTrainedModel, backend: str, graph: bool | None) -> None:
    """Raises BackendError, with the reason, where a strict engine's promise cannot be kept for this model.

    backend: of the attention. graph: as `Engine` has it.
    """
    config = model.config.get_text_config()
    reason = None
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if graph:
        reason = "graph=True replays steps of other numbers of rows"
    elif rope in _LOOKS_AT_THE_BATCH:
        reason = f"rope_type {rope!r} looks at the longest sequence of a step"
    elif model.device.type != "cpu":
        reason = f"it was tested on a CPU alone, and the model is on {model.device.type}"
    elif backend not in ("auto", "native"):
        reason = f"expected the attention backend 'auto' or 'native', got {backend!r}"
    else:
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        # PyTorch's own kernels take other ways for rows that come together and one by one.
        native = native_reason(torch.empty(0, heads, dim, dtype=model.dtype))
        reason = None if native is None else f"it needs the attention backend 'native': {native}"
    if reason is not None:
        raise BackendError(f"strict=True cannot be kept: {reason}")
