"""What a step of the model gave: its logits, with the likeliest token of each row, which a greedy step is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mvkernels.ops.dense.argmax import likeliest


@dataclass(frozen=True, eq=False)
class StepLogits:
    """One row for each branch that wants a token.

    values [n, V], floating, on the model's device. tokens: of each row the first NaN, else the first of the largest;
    highest: its logit.
    """

    values: torch.Tensor
    tokens: list[int]
    highest: list[float]

    @classmethod
    def of(cls, values: torch.Tensor) -> StepLogits:
        """One pass over the logits, and one transfer where they are on a GPU."""
        chosen, highest = likeliest(values)
        if values.device.type == "cpu":
            return cls(values, chosen.tolist(), highest.tolist())
        tokens, numbers = torch.stack((chosen.double(), highest.double())).tolist()  # exact: ids are below 2**53
        return cls(values, [int(token) for token in tokens], numbers)

    @cached_property
    def bad_rows(self) -> list[int]:
        """The rows with NaN."""
        return [row for row, value in enumerate(self.highest) if value != value]

    def rows(self, chosen: Sequence[int]) -> StepLogits:
        """Some of the rows."""
        values = self.values[torch.tensor(chosen, dtype=torch.int64, device=self.values.device)]
        return StepLogits(values, [self.tokens[row] for row in chosen], [self.highest[row] for row in chosen])

    def __len__(self) -> int:
        return len(self.tokens)
