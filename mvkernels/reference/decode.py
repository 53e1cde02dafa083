"""Decoding of one branch at a time without pages, by definition.

The tokens of a request form a tree as in the grammar: a sequence is a list of tokens and blocks, a block is a list of
sequences, its paths. A branch is a sequence that can still grow. The tree defines what it sees:

    a token sees the tokens before it, except those of other paths of a block that it is in
    place(sequence, p): tokens take p, p + 1, ...; the paths of a block all start at the same p, and after the block
    the next position is the highest of theirs
"""

from __future__ import annotations

import math

import torch


class Token:
    """One key and value, [Hkv, D] each."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = key, value


class ReferenceBranch:
    """A sequence of tokens and blocks; without `parent` a request of its own.

    Args:
        parent: The branch that this one is a path of, or None.
    """

    def __init__(self, parent: ReferenceBranch | None = None) -> None:
        self.items: list[Token | list[ReferenceBranch]] = []
        self.parent = parent
        self.forked = False  # the last item is a block that has not been merged
        self.freed = False  # given up: what follows its block does not see it; its own paths live on

    def fork(self, count: int) -> list[ReferenceBranch]:
        """Add paths to the open block, or to a new one.

        Args:
            count: Number of paths.

        Returns:
            The new paths.
        """
        children = [ReferenceBranch(self) for _ in range(count)]
        last = self.items[-1] if self.forked else None
        if isinstance(last, list):
            last.extend(children)
        else:
            self.items.append(list(children))
            self.forked = True
        return children

    def merge(self) -> None:
        """Close the open block: later tokens see all of it."""
        self.forked = False

    def free(self) -> None:
        """Free the branch; it leaves the tree when no path inside it is left that sees it."""
        self.freed = True
        branch: ReferenceBranch | None = self
        while branch is not None:
            if branch.freed and branch.parent is not None and not branch._is_seen():
                branch.parent._remove(branch)
            branch = branch.parent

    def _is_seen(self) -> bool:
        """Whether a path inside this branch still sees it."""
        blocks = [item for item in self.items if isinstance(item, list)]
        return self.forked or any(path.freed or path._is_seen() for block in blocks for path in block)

    def _remove(self, path: ReferenceBranch) -> None:
        block = self.items[len(self._items_before(path))]
        assert isinstance(block, list)
        block.remove(path)
        if not block:
            self.items.remove(block)
            self.forked = False

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append tokens; a forked branch gets them before its open block.

        Args:
            keys: [n, Hkv, D].
            values: [n, Hkv, D].
        """
        tokens = [Token(key, value) for key, value in zip(keys, values, strict=True)]
        end = len(self.items) - self.forked
        self.items[end:end] = tokens

    def next_position(self) -> int:
        """Compute the position of the token that `append` would add next.

        Returns:
            The position, from 0.
        """
        end = len(self.items) - self.forked
        return place(self.items[:end], self._start())

    def visible(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the keys and values that the next token sees.

        Returns:
            Keys and values, [L, Hkv, D] each, oldest first.
        """
        tokens = flatten(self._before())
        return torch.stack([token.key for token in tokens]), torch.stack([token.value for token in tokens])

    def _start(self) -> int:
        return 0 if self.parent is None else place(self.parent._items_before(self), self.parent._start())

    def _before(self) -> list[Token | list[ReferenceBranch]]:
        """Return all items before the next token, from the root down."""
        branch, items = self, self.items[: len(self.items) - self.forked]
        while branch.parent is not None:
            items = branch.parent._items_before(branch) + items
            branch = branch.parent
        return items

    def _items_before(self, child: ReferenceBranch) -> list[Token | list[ReferenceBranch]]:
        for index, item in enumerate(self.items):
            if isinstance(item, list) and any(path is child for path in item):
                return self.items[:index]
        raise ValueError("expected a path of this branch, got another branch")


def place(items: list[Token | list[ReferenceBranch]], position: int) -> int:
    """Return the next position after `items`, whose first token has `position`. A block of freed paths adds none."""
    for item in items:
        if isinstance(item, Token):
            position += 1
        else:
            position = max((place(path.items, position) for path in _kept(item)), default=position)
    return position


def flatten(items: list[Token | list[ReferenceBranch]]) -> list[Token]:
    """Return all tokens in the order in which they were written."""
    tokens: list[Token] = []
    for item in items:
        if isinstance(item, Token):
            tokens.append(item)
        else:
            tokens += [token for path in _kept(item) for token in flatten(path.items)]
    return tokens


def _kept(block: list[ReferenceBranch]) -> list[ReferenceBranch]:
    return [path for path in block if not path.freed]


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute eager attention of the last n tokens of a branch: row i sees all keys but the last n - 1 - i.

    Products and softmax are in the dtype of q, as in eager code.

    Args:
        q: [n, Hq, D] queries, Hq a multiple of Hkv.
        keys: [L, Hkv, D], L >= n.
        values: [L, Hkv, D].
        scale: Factor of the scores; None is 1 / sqrt(D).

    Returns:
        out [n, Hq, D] in the dtype of q, and lse [Hq, n] in natural logarithm.
    """
    rows, heads, dim = q.shape
    length, kv_heads = keys.shape[:2]
    keys = keys.repeat_interleave(heads // kv_heads, dim=1)
    values = values.repeat_interleave(heads // kv_heads, dim=1)
    scores = torch.einsum("nhd,lhd->hnl", q, keys) * (1 / math.sqrt(dim) if scale is None else scale)
    hidden = torch.ones(rows, length, dtype=torch.bool, device=q.device).triu(length - rows + 1)
    scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores.double() if q.dtype == torch.float64 else scores.float(), dim=-1)
    return torch.einsum("hnl,lhd->nhd", torch.softmax(scores, dim=-1), values), lse
