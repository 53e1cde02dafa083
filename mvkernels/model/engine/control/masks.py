"""From what the interpreter allows to what a sampler may choose: rows of booleans over the vocabulary, made once."""

from __future__ import annotations

import torch

from mvkernels.grammar import FIRST_TAG, Kind
from mvkernels.model.engine.control.interpreter import END
from mvkernels.tags import TagTokens

# Rows that are kept. An engine has about twenty for each set of end-of-text tokens; new sets evict old rows.
_MOST_ROWS = 256
_END_BIT = END.bit_length() - 1


class TokenMasks:
    """The masks of one vocabulary. vocabulary: V, the width of the model's logits. device: where they are."""

    def __init__(self, tags: TagTokens, vocabulary: int, device: torch.device | str) -> None:
        self.place = vocabulary, device
        bits = torch.full((vocabulary,), int(Kind.TEXT), device="cpu")  # of each token; index tokens are text
        for kind in Kind:
            ids = tags.space_ids if kind is Kind.SPACE else (tags.id(kind),) if kind >= FIRST_TAG else ()
            bits[[token for token in ids if token < vocabulary]] = int(kind)
        self._bits = bits
        self._rows: dict[tuple[int, frozenset[int]], tuple[torch.Tensor, bytes]] = {}

    def row(self, allowed: int, ends: frozenset[int]) -> tuple[torch.Tensor, bytes]:
        """[V] bool: the tokens of what `Interpreter.allowed` gave; and the same as bytes. ends: the request's
        end-of-text tokens.

        Where text may come, so may whitespace. The same tensor comes again for the same arguments: not to be changed.
        """
        key = allowed, ends
        row = self._rows.get(key)
        if row is None:
            bits = self._bits.clone()
            bits[[token for token in ends if 0 <= token < len(bits)]] = _END_BIT
            if allowed >> Kind.TEXT & 1:
                allowed |= 1 << Kind.SPACE
            table = torch.tensor([allowed >> bit & 1 for bit in range(_END_BIT + 1)], dtype=torch.bool)
            if len(self._rows) >= _MOST_ROWS:
                self._rows.clear()
            mask = table[bits]
            row = self._rows[key] = mask.to(self.place[1]), mask.numpy().tobytes()
        return row
