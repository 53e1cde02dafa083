"""What a generation tells while it runs, and what it is in the end. All are plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from mvkernels.layout import BranchLayout


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token has come on one branch.

    request: index of the request in its batch. path: (2, 1) for path 2.1, () for the trunk. position: of the token.
    text: what the branch's text grows by; empty while a character's bytes are incomplete, and for end-of-text tokens.
    forced: the engine wrote it, the model did not sample it.
    """

    request: int
    path: tuple[int, ...]
    token_id: int
    text: str
    position: int
    forced: bool


@dataclass(frozen=True, slots=True)
class ForkEvent:
    """The branch `path` waits from here on while its `width` paths run."""

    request: int
    path: tuple[int, ...]
    width: int


@dataclass(frozen=True, slots=True)
class MergeEvent:
    """All paths of the block in `path` have ended; the branch goes on at `position`."""

    request: int
    path: tuple[int, ...]
    position: int


@dataclass(frozen=True, slots=True)
class Generation:
    """The outcome of one request.

    text             what was generated, in sequence order (path 1 whole, path 2 whole, ..., conclusion), no prompt
    token_ids        prompt and generated tokens in sequence order
    layout           the layout of exactly these tokens; its `sampled` is False for the prompt and what the engine wrote
    prompt_length    leading tokens that are the prompt
    finish_reason    "stop", "max_new_tokens", "max_critical_path", "max_positions" or "out_of_pages"
    total_tokens     generated tokens. critical_path: by how much they lengthen the prompt's. steps: forwards taken
    warnings         what was not as the grammar has it, in order
    """

    text: str
    token_ids: list[int]
    layout: BranchLayout
    prompt_length: int
    finish_reason: str
    total_tokens: int
    critical_path: int
    steps: int
    warnings: list[str]

    @property
    def parallelism(self) -> float:
        """Generated tokens / critical path."""
        return self.total_tokens / max(self.critical_path, 1)


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The request has ended."""

    request: int
    generation: Generation


Event: TypeAlias = TokenEvent | ForkEvent | MergeEvent | FinishEvent
