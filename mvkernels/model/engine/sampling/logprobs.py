"""Log-probabilities of sampled tokens, for any sampler.

They are those of the model alone: log-softmax of its logits in fp32, before temperature, filters, penalties and the
grammar's mask. So they do not depend on how a token was chosen, and a forced choice has one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from mvkernels.model.engine.sampling.sampler import BranchView


class TokenLogprob(NamedTuple):
    """logprob: natural log of the token's probability. top: (token id, logprob) of the likeliest, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(
    views: Sequence[BranchView], logits: torch.Tensor, chosen: Sequence[int]
) -> list[TokenLogprob | None]:
    """What the configs ask for: `logprobs=None` gives None. logits: [n, V] of the model. chosen: n token ids."""
    out: list[TokenLogprob | None] = [None] * len(views)
    asked = [row for row, view in enumerate(views) if view.config.logprobs is not None]
    if not asked:
        return out
    if len(asked) < len(views):
        logits = logits[torch.tensor(asked, device=logits.device)]
    # A copy of the logits, as large as they are: by rows of one kernel each, so a row has the same bits in any batch.
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor([[chosen[row]] for row in asked], device=logits.device))[:, 0].tolist()
    counts = [min(views[row].config.logprobs or 0, logits.shape[-1]) for row in asked]
    if not any(counts):
        for row, value in zip(asked, own, strict=True):
            out[row] = TokenLogprob(value)
        return out
    values, tokens = (part.tolist() for part in logprobs.topk(max(counts), dim=-1))
    for i, (row, count) in enumerate(zip(asked, counts, strict=True)):
        best = sorted(zip(tokens[i], values[i], strict=True), key=lambda pair: (-pair[1], pair[0]))
        out[row] = TokenLogprob(own[i], tuple(best[:count]))
    return out
