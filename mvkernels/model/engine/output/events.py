"""The events of a generation while it runs. All are plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from mvkernels.model.engine.output.generation import Generation

__all__ = ["Event", "FinishEvent", "ForkEvent", "Generation", "MergeEvent", "PathEndEvent", "TextEvent", "TokenEvent"]


@dataclass(slots=True, unsafe_hash=True)  # not frozen: one is made for every token, and that takes three times the time
class TokenEvent:
    """One new token on one branch.

    Attributes:
        request: Index of the request in its batch.
        path: (2, 1) for path 2.1, () for the trunk.
        token_id: The token.
        text: Text that it adds to the branch. Empty while it depends on later tokens (first bytes of a character), and
            for end-of-text tokens. Joined, the texts of a branch are its part of `Generation.text`.
        position: Position of the token.
        forced: Whether the engine wrote it; otherwise the model sampled it.
        branch: Number of the branch within the request, never reused (a path of the next block has the same `path`); 0
            is the trunk.
        logprob: Log-prob of a sampled token, if the config asks for it.
        top_logprobs: (token id, log-prob) of the likeliest tokens, best first, if the config asks for them.
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
    """Text that a branch gets without a token, because the request ended within a character.

    It comes just before a FinishEvent between two steps ("cancelled", "out_of_pages", "error", "max_seconds"). At all
    other ends, and at forks, such a rest is in the `text` of the last token's event.

    Attributes:
        request: Index of the request in its batch.
        path: The path of the branch.
        text: The text.
        branch: Number of the branch.
    """

    request: int
    path: tuple[int, ...]
    text: str
    branch: int = 0


@dataclass(frozen=True, slots=True)
class ForkEvent:
    """A branch waits while the paths of its block run.

    Attributes:
        request: Index of the request in its batch.
        path: The path of the branch that waits.
        width: Number of paths.
        branch: Number of the branch that waits.
        children: Branch numbers of the paths, in order.
    """

    request: int
    path: tuple[int, ...]
    width: int
    branch: int = 0
    children: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PathEndEvent:
    """A path has ended with its `</Path>`.

    Attributes:
        request: Index of the request in its batch.
        path: The path.
        position: The next position after it.
        branch: Number of its branch.
        reason: None if the model wrote the tag, else why the engine did: "end of text", a stop string, a budget.
    """

    request: int
    path: tuple[int, ...]
    position: int
    branch: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class MergeEvent:
    """All paths of a block have ended, and their branch continues.

    Attributes:
        request: Index of the request in its batch.
        path: The path of the branch that continues.
        position: Its next position.
        branch: Its number.
    """

    request: int
    path: tuple[int, ...]
    position: int
    branch: int = 0


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The request has ended.

    Attributes:
        request: Index of the request in its batch.
        generation: Its outcome.
    """

    request: int
    generation: Generation


Event: TypeAlias = TokenEvent | TextEvent | ForkEvent | PathEndEvent | MergeEvent | FinishEvent
