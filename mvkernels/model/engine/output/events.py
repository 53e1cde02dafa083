"""What a generation tells while it runs. All are plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from mvkernels.model.engine.output.generation import Generation

__all__ = ["Event", "FinishEvent", "ForkEvent", "Generation", "MergeEvent", "PathEndEvent", "TextEvent", "TokenEvent"]


@dataclass(slots=True, unsafe_hash=True)  # not frozen: one is made for every token, and that takes three times the time
class TokenEvent:
    """One token has come on one branch.

    request: index of the request in its batch. path: (2, 1) for path 2.1, () for the trunk. position: of the token.
    text: what the branch's text grows by; empty while it depends on what follows (the first bytes of a character), and
    for end-of-text tokens. Joined, the texts of a branch's events are its part of `Generation.text`.
    forced: the engine wrote it, the model did not sample it. branch: its number within the request, which no other
    branch ever has (a path of the next block has the same `path`); the trunk is 0. logprob: of a sampled token, and
    top_logprobs: (token id, log-probability) of the likeliest ones, best first, where the config asks for them.
    """

    request: int
    path: tuple[int, ...]
    token_id: int
    text: str
    position: int
    forced: bool
    branch: int = 0
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TextEvent:
    """The branch's text grows without a token: it was cut off within a character, after its last token was told.

    That is where a request ends between two steps ("cancelled", "out_of_pages", "error", "max_seconds"), just before
    its FinishEvent. At all other ends and at forks such a rest is in the `text` of the last token's event.
    """

    request: int
    path: tuple[int, ...]
    text: str
    branch: int = 0


@dataclass(frozen=True, slots=True)
class ForkEvent:
    """The branch `path` waits from here on while its `width` paths run. children: their branch numbers, in order."""

    request: int
    path: tuple[int, ...]
    width: int
    branch: int = 0
    children: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PathEndEvent:
    """The path has ended with its `</Path>`. position: the next one behind it.

    reason: None where the model wrote that tag, else why the engine did: "end of text", a stop string, a budget.
    """

    request: int
    path: tuple[int, ...]
    position: int
    branch: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class MergeEvent:
    """All paths of the block in `path` have ended; the branch goes on at `position`."""

    request: int
    path: tuple[int, ...]
    position: int
    branch: int = 0


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The request has ended."""

    request: int
    generation: Generation


Event: TypeAlias = TokenEvent | TextEvent | ForkEvent | PathEndEvent | MergeEvent | FinishEvent
