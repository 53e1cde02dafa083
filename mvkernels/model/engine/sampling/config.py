"""What a caller asks of a generation, checked once."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Real
from reprlib import repr as shorten
from typing import Any

from mvkernels.model.settings import option

_NAMES = {"int": "an integer", "float": "a number", "bool": "True or False"}


def as_ids(name: str, given: Any) -> tuple[int, ...]:
    """Token ids from one integer or several: a list, a set, a tensor, an array.

    Raises ValueError for everything else, with `name` in front.
    """
    values = given.tolist() if hasattr(given, "tolist") else given
    found = []
    for value in values if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else (values,):
        number = _whole(value)
        if number is None:
            raise ValueError(f"{name}: expected token ids, got {shorten(value)}")
        found.append(number)
    return tuple(found)


def _whole(value: Any) -> int | None:
    """The integer that a value of any library is, or None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def as_strings(name: str, given: Any) -> tuple[str, ...]:
    """Stop strings. Raises ValueError for what is none, or empty, with `name` in front."""
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    wrong = [value for value in found if not (isinstance(value, str) and value)]
    if wrong:
        raise ValueError(f"{name}: expected strings that are not empty, got {shorten(wrong[0])}")
    return found


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Budgets, limits and sampling of one request.

    Lengths are in tokens and never count the prompt. A budget ends a request gracefully: open elements are closed from
    the inside out (`</Path>`, an empty conclusion, `</Parallel>`). The tokens for that are reserved at all times, so no
    budget is exceeded.

    Attributes:
        max_new_tokens: All tokens together, forced ones included.
        max_critical_path: The longest chain of tokens.
        max_path_tokens: The longest chain within one path, nested blocks included.
        max_seconds: Wall-clock time, from when the request is made.
        max_width: Paths of a block.
        max_depth: Blocks inside one another; 0 makes the output sequential.
        grammar: Whether samplers get masks, so that no block is malformed, and the engine writes forced tokens
            (`<Goal>`, indices of outlines, `</Parallel>`, newlines between the parts) without a forward for each.
            Without it, malformed parts stay text, with a warning.
        temperature: 0 is greedy.
        top_k: Number of likeliest tokens kept; 0 for all.
        top_p: The smallest set of tokens with this probability is kept.
        min_p: Tokens with at least this share of the likeliest token's probability are kept.
        repetition_penalty: Logits of the tokens that a branch sees (prompt included) are divided by it, negative ones
            multiplied; 1 for none. Filters are applied in the order of transformers.
        logprobs: None: no log-probs. 0: that of each sampled token. k: also those of the k likeliest tokens.
        seed: Seed of the request. Its text does not depend on the other requests of the batch.
        stop: Strings that end a branch; None: those of the model's generation config.
        eos_token_ids: Sampled tokens that end a branch; None: those of the model's generation config. Control tags are
            ignored here: the engine ends a path at its `</Path>`.
        sequential: Whether paths advance one at a time: the same text, in as many steps as tokens.

    Raises:
        ValueError: A value is out of range.
    """

    max_new_tokens: int = option(1024, "Tokens in all.", "--max-tokens")
    max_critical_path: int | None = option(None, "Tokens on the longest chain.")
    max_path_tokens: int | None = option(None, "Tokens on the longest chain within one path.")
    max_seconds: float | None = option(None, "Wall-clock time.")
    max_width: int = option(16, "Paths per block.")
    max_depth: int = option(8, "Blocks inside one another; 0: no block.")
    grammar: bool = option(True, "Whether every block must be well formed.")
    temperature: float = option(0.0, "0 is greedy.")
    top_k: int = option(0, "Sample from the most likely tokens only; 0: from all.")
    top_p: float = option(1.0, "Sample from the smallest set of this probability.")
    min_p: float = option(0.0, "Least share of the likeliest token's probability.")
    repetition_penalty: float = option(1.0, "Above 1: tokens less likely again.")
    logprobs: int | None = option(None, "Log-probabilities, with so many likeliest tokens.")
    seed: int = option(0, "Of sampling, and of the problems of a task.")
    stop: tuple[str, ...] | None = option(None, "String that ends a branch; again for more. Default: the model's.")
    eos_token_ids: tuple[int, ...] | None = option(
        None, "Id that ends a branch; again for more. Default: the model's.", "--eos-token-id"
    )
    sequential: bool = option(False, "Advance one path at a time.")

    def __repr__(self) -> str:
        """What differs from the defaults."""
        changed = [f"{f.name}={value!r}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return f"GenerationConfig({', '.join(changed)})"

    def __post_init__(self) -> None:
        for f in fields(self):
            kind, *optional = str(f.type).split(" | ")
            value = getattr(self, f.name)
            if kind not in _NAMES or (value is None and optional):
                continue
            if kind == "int" and (number := _whole(value)) is not None:
                object.__setattr__(self, f.name, number)
                continue
            right = kind == "bool" if isinstance(value, bool) else kind == "float" and isinstance(value, Real)
            self._require(f.name, f"{_NAMES[kind]}{', or None' if optional else ''}", right)
        self._require("max_new_tokens", "at least 1", self.max_new_tokens >= 1)
        for name in ("max_critical_path", "max_path_tokens"):
            value = getattr(self, name)
            self._require(name, "at least 1, or None", value is None or value >= 1)
        self._require("max_seconds", "a number > 0, or None", self.max_seconds is None or self.max_seconds > 0)
        self._require("max_width", "at least 1", self.max_width >= 1)
        self._require("max_depth", "at least 0", self.max_depth >= 0)
        self._require("temperature", "a finite number >= 0", math.isfinite(self.temperature) and self.temperature >= 0)
        self._require("top_k", "at least 0", self.top_k >= 0)
        self._require("top_p", "a number in (0, 1]", 0 < self.top_p <= 1)
        self._require("min_p", "a number in [0, 1]", 0 <= self.min_p <= 1)
        penalty = self.repetition_penalty
        self._require("repetition_penalty", "a finite number > 0", math.isfinite(penalty) and penalty > 0)
        self._require("logprobs", "at least 0, or None", self.logprobs is None or self.logprobs >= 0)
        if isinstance(self.stop, str):
            raise ValueError(f"stop: expected a tuple of strings, got the string {self.stop!r}")
        if self.stop is not None:
            object.__setattr__(self, "stop", as_strings("stop", self.stop))
        if self.eos_token_ids is not None:
            object.__setattr__(self, "eos_token_ids", as_ids("eos_token_ids", self.eos_token_ids))

    def _require(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
