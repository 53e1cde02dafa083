"""The repetition penalty: which tokens each branch sees, kept while they come, and what that does to logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

# Tokens that a branch keeps in a list before they go into its row: rows are on the device, and one write into each of
# them a step would cost more than one write for all of them together.
_MOST_PENDING = 64


class SeenTokens:
    """The set of tokens that one branch sees: it grows with each token, and is copied and joined as branches are."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._row: torch.Tensor | None = None  # [V] bool, made where the logits are when they first come
        self._pending = list(tokens)  # not in the row yet

    def add(self, *tokens: int) -> None:
        """The branch sees more tokens."""
        self._pending += tokens

    def fork(self) -> SeenTokens:
        """A set of its own for a path that begins here."""
        child = SeenTokens(self._pending)
        child._row = None if self._row is None else self._row.clone()
        return child

    def join(self, paths: Iterable[SeenTokens]) -> None:
        """The paths have merged into this branch, which sees all that they saw."""
        for path in paths:
            self._pending += path._pending
            if self._row is None:
                self._row = path._row
            elif path._row is not None:
                self._row = self._row | path._row

    @staticmethod
    def rows(sets: Sequence[SeenTokens], logits: torch.Tensor) -> torch.Tensor:
        """[n, V] bool on the device of `logits` [n, V]."""
        for seen in sets:
            if seen._row is None:
                seen._row = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            if len(seen._pending) > _MOST_PENDING:
                # A new tensor each time: one made in inference mode could not be written outside of it.
                seen._row = seen._row.index_fill(0, torch.tensor(seen._pending, device=logits.device), True)
                seen._pending.clear()
        stacked = torch.stack([seen._row for seen in sets if seen._row is not None])
        pairs = [(row, token) for row, seen in enumerate(sets) for token in seen._pending]
        if pairs:
            rows, tokens = torch.tensor(pairs, device=logits.device).T
            stacked[rows, tokens] = True
        return stacked


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: Sequence[float]) -> torch.Tensor:
    """Logits [n, V] with those of `seen` [n, V] divided by their row's penalty, or multiplied where negative.

    Source: CTRL, arXiv 1909.05858, section 4.1, with the sign rule of transformers.
    """
    factor = torch.tensor(penalty, dtype=logits.dtype, device=logits.device)[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * factor, logits / factor), logits)
