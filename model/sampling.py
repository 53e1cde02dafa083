"""From logits to tokens: greedy, temperature, top-k, top-p, with randomness that belongs to the branch.

The number behind a draw is a hash of (engine seed, request seed, branch, how many tokens the branch has drawn), so
what a branch draws depends neither on the other rows of the batch nor on their order. Sampling is by inversion: the
first token in vocabulary order at which the cumulative probability (fp64) exceeds that number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from mvkernels.model.config import GenerationConfig


@dataclass(frozen=True)
class BranchView:
    """One branch that is about to get a token, as samplers see it.

    request: index in the batch. path: (2, 1) for path 2.1, () for the trunk. drawn: tokens sampled on it so far.
    position: of the token to come. state: the interpreter's. banned: token ids that the request's limits forbid here.
    key: what the branch's randomness hangs on. read_context: makes the tokens that the branch sees, prompt included.
    """

    request: int
    path: tuple[int, ...]
    drawn: int
    position: int
    state: str
    config: GenerationConfig
    banned: tuple[int, ...] = ()
    key: str = ""
    read_context: Callable[[], list[int]] = field(default=list, repr=False)

    @property
    def context(self) -> list[int]:
        """The tokens that the branch sees, oldest first."""
        return self.read_context()


#: Takes n branches and their logits [n, V] (float32, on the model's device), gives n token ids.
Sampler: TypeAlias = Callable[[Sequence[BranchView], torch.Tensor], Sequence[int]]


def sample(views: Sequence[BranchView], logits: torch.Tensor) -> list[int]:
    """The default sampler. logits: [n, V] floating, one row a branch. Raises ValueError where a row has NaN.

    The lowest id wins among equal logits when greedy. Tokens with the logit of the k-th likeliest, and the one at which
    the cumulative probability reaches top-p, are kept.
    """
    logits = logits.float()
    bad = torch.isnan(logits).any(dim=-1)
    if bool(bad.any()):
        view = views[int(bad.nonzero()[0])]
        raise ValueError(f"request {view.request}, path {view.path}: expected logits without NaN, got NaN")
    banned = [(row, token) for row, view in enumerate(views) for token in view.banned]
    if banned:
        rows, tokens = torch.tensor(banned, device=logits.device).T
        logits = logits.index_put((rows, tokens), torch.tensor(-torch.inf, device=logits.device))
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    for row, view in enumerate(views):
        if view.config.temperature > 0:
            chosen[row] = _draw(logits[row], view.config, uniform(view.key, view.drawn))
    return chosen


def uniform(key: str, index: int) -> float:
    """A number in [0, 1), the `index`-th that belongs to `key`."""
    digest = hashlib.blake2b(f"{key}#{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def branch_key(parent: str, ordinal: int, number: int) -> str:
    """The key of path `number` in the `ordinal`-th block of the branch with the key `parent`."""
    return f"{parent}/{ordinal}.{number}"


def probabilities(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """[V] fp64 probabilities after temperature, top-k and top-p, in this order, as in transformers. logits: [V]."""
    scaled = logits.double() / config.temperature
    if 0 < config.top_k < scaled.numel():
        scaled = scaled.masked_fill(scaled < scaled.topk(config.top_k).values[-1], -torch.inf)
    probability = torch.softmax(scaled, dim=-1)
    if config.top_p < 1:
        ordered, order = probability.sort(descending=True, stable=True)
        # A token is dropped when those before it have top-p already; the likeliest always stays.
        dropped = order[ordered.cumsum(-1) - ordered >= config.top_p]
        probability = probability.index_fill(0, dropped, 0.0)
        probability = probability / probability.sum()
    return probability


def _draw(logits: torch.Tensor, config: GenerationConfig, number: float) -> int:
    probability = probabilities(logits, config)
    cumulative = probability.cumsum(-1)
    # Scaled by the sum, which rounding keeps a little off 1: the last token with any probability is the last hit.
    threshold = torch.tensor([number], dtype=torch.float64, device=logits.device) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, threshold, right=True))
    return min(index, int(probability.nonzero()[-1]))
