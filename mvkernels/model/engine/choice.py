"""From the logits of a step to a token for each branch that wants one, by the engine's sampler or the caller's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import index
from reprlib import repr as shorten

from mvkernels.model.engine.request import Request
from mvkernels.model.engine.sampling.logits import StepLogits
from mvkernels.model.engine.sampling.logprobs import TokenLogprob, token_logprobs
from mvkernels.model.engine.sampling.sampler import BranchView, Sampler, sample_step


@dataclass(slots=True)
class Asked:
    """Branches of a request that want a token. row: where their logits begin. views: what a sampler sees of them."""

    request: Request
    numbers: list[int]
    row: int
    views: list[BranchView] = field(default_factory=list)


def choose(
    sampler: Sampler | None, group: list[Asked], logits: StepLogits
) -> list[tuple[Request, int, int, TokenLogprob | None]]:
    """A token for each branch of a group. sampler: None for `sample`.

    Raises ValueError where a sampler gives a wrong number of tokens, or ids out of range.
    """
    views = [view for part in group for view in part.views]
    if len(views) < len(logits):
        logits = logits.rows([row for part in group for row in range(part.row, part.row + len(part.views))])
    if sampler is None:
        tokens = sample_step(views, logits)
    else:
        found = sampler(views, logits.values.float())
        try:
            tokens = [index(token) for token in found]
        except TypeError:
            raise ValueError(f"sampler: expected token ids, one for each branch, got {shorten(found)}") from None
        _require_tokens(tokens, len(views), logits.values.shape[-1])
    branches = [(part.request, number) for part in group for number in part.numbers]
    logprobs = token_logprobs(views, logits.values, tokens)
    return [(*branch, token, logprob) for branch, token, logprob in zip(branches, tokens, logprobs, strict=True)]


def _require_tokens(tokens: list[int], number: int, vocabulary: int) -> None:
    """Raises ValueError unless they are so many token ids."""
    if len(tokens) != number:
        raise ValueError(f"sampler: expected {number} tokens, one for each branch, got {len(tokens)}")
    wrong = [token for token in tokens if not 0 <= token < vocabulary]
    if wrong:
        raise ValueError(f"sampler: expected token ids from 0 to {vocabulary - 1}, got {wrong[0]}")
