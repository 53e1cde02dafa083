"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, with randomness that belongs to the branch.

The number behind a draw is a hash of (engine seed, request seed, number of the sample, branch, how many tokens the
branch has drawn), so what a branch draws depends neither on the other rows of the batch nor on their order. Sampling is
by inversion: the first token in vocabulary order at which the cumulative probability exceeds that number.

All rows of a step are sampled together, in operations that treat every row by itself. Probabilities are fp64 and are
added up as integers, multiples of 2**-62, whose sum does not depend on the order that a device adds them in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.engine.sampling.logits import StepLogits
from mvkernels.model.engine.sampling.penalties import SeenTokens, penalise

_ONE = 2.0**62
# Rows are sampled in groups of so many logits at most: their fp64 copies stay in a CPU's cache (five times as fast as
# 64 rows of 49152 at once), and never fill a GPU.
_LARGEST_GROUP = {"cpu": 2**19, "cuda": 2**24}
# Top-p looks at so many of the likeliest tokens first, then at more; where they do not suffice, at the whole row.
_NUCLEUS = (256, 4096)


@dataclass(eq=False, slots=True)  # not frozen: one is made for every row of a step, and that takes three times the time
class BranchView:
    """One branch that is about to get a token, as samplers see it.

    request: index in the batch. path: (2, 1) for path 2.1, () for the trunk. drawn: tokens sampled on it so far.
    position: of the token to come. state: the interpreter's. banned: token ids that the request's limits forbid here.
    allowed: [V] bool on the logits' device, the tokens that may come, or None for all; allowed_bytes: the same on the
    host, a byte a token, where the engine has it. key: what the branch's randomness hangs on. read_context: makes the
    tokens that the branch sees, prompt included. seen: the same as a set, where the config has a repetition penalty;
    None: made from the context.
    """

    request: int
    path: tuple[int, ...]
    drawn: int
    position: int
    state: str
    config: GenerationConfig
    banned: tuple[int, ...] = ()
    allowed: torch.Tensor | None = None
    key: str = ""
    read_context: Callable[[], list[int]] = field(default=list, repr=False)
    seen: SeenTokens | None = field(default=None, repr=False)
    allowed_bytes: bytes | None = field(default=None, repr=False)

    @property
    def context(self) -> list[int]:
        """The tokens that the branch sees, oldest first."""
        return self.read_context()


#: Takes n branches and their logits [n, V] (float32, on the model's device), gives n token ids.
Sampler: TypeAlias = Callable[[Sequence[BranchView], torch.Tensor], Sequence[int]]


def sample(views: Sequence[BranchView], logits: torch.Tensor) -> list[int]:
    """The default sampler. logits: [n, V] floating, one row a branch; they stay as they are.

    In the order of transformers: repetition penalty, the mask of what may come, then for rows with a temperature the
    filters of `probabilities`. The lowest id wins among equal logits when greedy. Raises ValueError where a row has
    NaN or an infinite logit, and where no token may come.
    """
    return sample_step(views, StepLogits.of(logits))


def sample_step(views: Sequence[BranchView], step: StepLogits) -> list[int]:
    """The same where the likeliest tokens are known: rows that may and want to take theirs are not looked at again."""
    logits = step.values
    tokens, highest = [*step.tokens], [*step.highest]
    again = [row for row, (view, token) in enumerate(zip(views, tokens, strict=True)) if not _takes(view, token)]
    size = max(_LARGEST_GROUP.get(logits.device.type, 2**24) // logits.shape[-1], 1)
    for start in range(0, len(again), size):
        group = again[start : start + size]
        part = logits[group[0] : group[-1] + 1] if group[-1] - group[0] + 1 == len(group) else logits[group]
        chosen = _choose([views[row] for row in group], part.float())
        for row, token, value in zip(group, *chosen, strict=True):
            tokens[row], highest[row] = token, value
    for view, value in zip(views, highest, strict=True):
        if not math.isfinite(value):
            wanted = "at least one token that may come" if value == -math.inf else "logits without NaN or infinity"
            raise ValueError(f"request {view.request}, path {view.path}: expected {wanted}, got {_found(value)}")
    return tokens


def probabilities(logits: torch.Tensor, configs: Sequence[GenerationConfig]) -> torch.Tensor:
    """[n, V] fp64: after temperature, top-k, top-p and min-p, in this order, as in transformers. logits: [n, V].

    Kept are tokens with the logit of the k-th likeliest; in order of their probability (among equals, of their ids)
    those up to the one at which the cumulative probability reaches top-p; and those with min-p times the highest one.
    """
    kept = _filter(logits.float(), configs)
    return kept / kept.sum(dim=-1, keepdim=True)


def uniform(key: str, index: int) -> float:
    """A number in [0, 1), the `index`-th that belongs to `key`."""
    digest = hashlib.blake2b(f"{key}#{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def request_key(engine_seed: int, seed: int, sample: int = 0) -> str:
    """The key of a request's trunk. sample: which of the n samples of one prompt, from 0."""
    return f"{engine_seed}:{seed}:" + (f"#{sample}" if sample else "")


def branch_key(parent: str, ordinal: int, number: int) -> str:
    """The key of path `number` in the `ordinal`-th block of the branch with the key `parent`."""
    return f"{parent}/{ordinal}.{number}"


# ---- the masks of what may come


def _takes(view: BranchView, token: int) -> bool:
    """Whether a branch's choice is the likeliest token: it is greedy, and that may come."""
    config = view.config
    if config.temperature > 0 or config.repetition_penalty != 1 or token in view.banned:
        return False
    if view.allowed is None:
        return True
    return bool((view.allowed if view.allowed_bytes is None else view.allowed_bytes)[token])


def _masks(views: Sequence[BranchView], logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The masks [m, V] and which of them each row has; few serve many rows. None where no row has one."""
    masks = {id(view.allowed): view.allowed for view in views if view.allowed is not None}
    order = {key: number for number, key in enumerate(masks)}
    index = torch.tensor([order.get(id(view.allowed), len(masks)) for view in views], device=logits.device)
    if not masks:
        return None, index
    # The last one stands for rows without a mask.
    return torch.stack([*masks.values(), torch.ones_like(logits[0], dtype=torch.bool)]), index


def _restrict(views: Sequence[BranchView], logits: torch.Tensor) -> torch.Tensor:
    """Tokens that may not come get no probability."""
    table, index = _masks(views, logits)
    if table is not None:
        logits = torch.where(table[index], logits, -torch.inf)
    banned = [(row, token) for row, view in enumerate(views) for token in view.banned]
    if banned:
        rows, tokens = torch.tensor(banned, device=logits.device).T
        logits = logits.index_put((rows, tokens), torch.tensor(-torch.inf, device=logits.device))
    return logits


def _found(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity" if value > 0 else "a mask that leaves none"


# ---- the choice


def _choose(views: Sequence[BranchView], logits: torch.Tensor) -> tuple[list[int], list[float]]:
    """Tokens and the highest logit of each row, after penalty and masks."""
    if any(view.config.repetition_penalty != 1 for view in views):
        seen = SeenTokens.rows([_seen(view) for view in views], logits)
        logits = penalise(logits, seen, [view.config.repetition_penalty for view in views])
    logits = _restrict(views, logits)
    chosen = logits.argmax(dim=-1)
    best = logits.gather(1, chosen[:, None])[:, 0]
    rows = [row for row, view in enumerate(views) if view.config.temperature > 0]
    if rows:
        numbers = [uniform(views[row].key, views[row].drawn) for row in rows]
        part, _ = _take(logits, rows)
        kept = _filter(part, [views[row].config for row in rows])
        chosen[rows] = _draw(kept, torch.tensor(numbers, dtype=torch.float64, device=logits.device))
    tokens, highest = torch.stack((chosen.double(), best.double())).tolist()
    return [int(token) for token in tokens], highest


def _seen(view: BranchView) -> SeenTokens:
    if view.config.repetition_penalty == 1:
        return SeenTokens()
    return SeenTokens(view.context) if view.seen is None else view.seen


def _filter(logits: torch.Tensor, configs: Sequence[GenerationConfig]) -> torch.Tensor:
    """[n, V] fp64 probabilities, those of dropped tokens 0; behind top-p and min-p they add up to less than 1."""
    size = logits.shape[-1]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.double()
    # Relative to the largest, so that no temperature makes them overflow.
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / column([c.temperature for c in configs])
    rows = [row for row, c in enumerate(configs) if 0 < c.top_k < size]
    if rows:
        wanted = torch.tensor([configs[row].top_k for row in rows], device=logits.device)[:, None]
        part, _ = _take(logits, rows)
        largest = part.topk(max(configs[row].top_k for row in rows), dim=-1).values
        dropped = part < largest.gather(1, wanted - 1)
        part, put = _take(scaled, rows)
        scaled = put(part.masked_fill(dropped, -torch.inf))
    probability = torch.softmax(scaled, dim=-1)
    rows = [row for row, c in enumerate(configs) if c.top_p < 1]
    if rows:
        part, put = _take(probability, rows)
        probability = put(_nucleus(part, column([configs[row].top_p for row in rows])))
    rows = [row for row, c in enumerate(configs) if c.min_p > 0]
    if rows:
        part, put = _take(probability, rows)
        lowest = part.amax(dim=-1, keepdim=True) * column([configs[row].min_p for row in rows])
        probability = put(part.masked_fill(part < lowest, 0.0))
    return probability


def _take(whole: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """The rows of a tensor, and how to put them back changed."""
    if len(rows) == len(whole):
        return whole, lambda part: part
    index = torch.tensor(rows, device=whole.device)
    return whole[index], lambda part: whole.index_copy(0, index, part)


def _nucleus(probability: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Drops what comes after the cumulative probability has reached top_p. probability: [n, V], top_p: [n, 1]."""
    size = probability.shape[-1]
    enough = top_p * _ONE
    kept = torch.full_like(top_p, size, dtype=torch.int64)
    lowest = torch.zeros_like(top_p)
    short = torch.arange(len(probability), device=probability.device)
    for count in (*(count for count in _NUCLEUS if count < size), size):
        part = probability if len(short) == len(probability) else probability[short]
        ordered = (part.sort(dim=-1, descending=True) if count == size else part.topk(count, dim=-1)).values
        reached = _reach(ordered, enough[short])
        kept[short], lowest[short] = reached, ordered.gather(1, reached - 1)
        short = short[reached.flatten() == count]
        if not len(short):
            break
    dropped = probability < lowest
    # Among equals at the border the lowest ids stay.
    surplus = size - dropped.count_nonzero(dim=-1)[:, None] - kept
    crowded = surplus.flatten().nonzero()[:, 0]
    if len(crowded):
        equal = probability[crowded] == lowest[crowded]
        ordinal = equal.cumsum(dim=-1)
        dropped[crowded] |= equal & (ordinal > ordinal[:, -1:] - surplus[crowded])
    return probability.masked_fill(dropped, 0.0)


def _reach(ordered: torch.Tensor, enough: torch.Tensor) -> torch.Tensor:
    """[n, 1]: how many of the descending probabilities are kept, up to the one that reaches `enough`; at least one."""
    counts = _as_integers(ordered)
    return ((counts.cumsum(dim=-1) - counts) < enough).sum(dim=-1, keepdim=True)


def _draw(probability: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """[n] tokens. probability: [n, V] fp64, of any sum. numbers: [n] fp64 in [0, 1)."""
    cumulative = _as_integers(probability).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Always below the total: a number is at most 1 - 2**-53, and times fp64(total) that rounds to a smaller one.
    threshold = (numbers[:, None] * total).long()
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def _as_integers(probability: torch.Tensor) -> torch.Tensor:
    return (probability * _ONE).long()
