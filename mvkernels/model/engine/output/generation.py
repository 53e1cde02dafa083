"""The outcome of a request, and its JSON form: complete, one line, read back as it was."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mvkernels.grammar import Tree
from mvkernels.layout import BranchLayout
from mvkernels.model.json_input import parse_json, shown

FORMAT, VERSION = "mvkernels.generation", 1


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """The outcome of one request. Two are equal if their JSON is.

    Attributes:
        text: The generated text in sequence order (path 1 whole, path 2 whole, ..., conclusion), without the prompt. It
            begins with the character within which the prompt ends, if any. End-of-text tokens have no text.
        token_ids: Prompt and generated tokens in sequence order.
        layout: The layout of these tokens. `sampled` is False for the prompt and for tokens that the engine wrote.
        prompt_length: Number of leading tokens that are the prompt.
        finish_reason: "stop", the name of a budget, "max_positions", "out_of_pages", "cancelled" or "error".
        total_tokens: Number of generated tokens.
        critical_path: Positions by which they lengthen the critical path of the prompt.
        steps: Number of forwards.
        warnings: Deviations from the grammar, in order.
        tree: The structure of the layout, for `BranchLayout.from_tree`.
        texts: The text of each generated token, in sequence order; joined they are `text`.
        steps_of: The forward after which each generated token came; at least 1 for sampled tokens.
        logprobs: Log-prob of each generated token, None for those that the engine wrote; None if not asked for.
        top_logprobs: (token id, log-prob) of the likeliest tokens there; None if not asked for.
        error: The error that ended the request, if finish_reason is "error".
        request_id: Name of the request.
        weights_version: `Engine.weights_version` when the request began; tokens after an update are of newer weights.
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
    tree: Tree
    texts: list[str]
    steps_of: list[int]
    logprobs: list[float | None] | None = None
    top_logprobs: list[tuple[tuple[int, float], ...] | None] | None = None
    error: str | None = None
    request_id: str = ""
    weights_version: int = 0

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 40 else self.text[:37] + "..."
        figures = f"{self.total_tokens} tokens, critical path {self.critical_path}, parallelism {self.parallelism:.2f}"
        return f"Generation({text!r}, {figures}, {self.finish_reason!r}, {len(self.warnings)} warnings)"

    @property
    def parallelism(self) -> float:
        """Generated tokens / critical path."""
        return self.total_tokens / max(self.critical_path, 1)

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Generation) else NotImplemented

    def to_dict(self) -> dict[str, Any]:
        """Convert to lists, dictionaries, strings and numbers.

        The layout is its tree and the half-open ranges of sampled tokens. If its positions are not those of the tree
        (released semantics), they are added as pairs (token, position), consecutive from each token on. An infinite
        log-prob is the string "-inf", because JSON has no such number.

        Returns:
            The content of `to_json`. `parallelism` is added for readers.
        """
        top = self.top_logprobs
        return {
            "format": FORMAT,
            "version": VERSION,
            "request_id": self.request_id,
            "weights_version": self.weights_version,
            "finish_reason": self.finish_reason,
            "error": self.error,
            "warnings": list(self.warnings),
            "prompt_length": self.prompt_length,
            "total_tokens": self.total_tokens,
            "critical_path": self.critical_path,
            "parallelism": self.parallelism,
            "steps": self.steps,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "layout": _layout_dict(self.layout, self.tree),
            "texts": list(self.texts),
            "steps_of": list(self.steps_of),
            "logprobs": None if self.logprobs is None else [_number(value) for value in self.logprobs],
            "top_logprobs": None
            if top is None
            else [None if one is None else [[token, _number(value)] for token, value in one] for one in top],
        }

    def to_json(self) -> str:
        """Convert to JSON.

        Returns:
            One line of ASCII, from which `from_json` makes an equal generation.
        """
        return json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Generation:
        """Read what `to_json` wrote.

        Args:
            text: The JSON. Unknown names are ignored.

        Returns:
            A generation equal to the one that was written.

        Raises:
            ValueError: It is no such JSON, of another version, or contradicts itself.
        """
        try:
            found = parse_json(text, deepest=None)  # a tree has any depth
        except ValueError as error:
            raise ValueError(f"generation: expected JSON, got {text[:40]!r}: {error}") from None
        return cls.from_dict(found)

    @classmethod
    def from_dict(cls, found: Any) -> Generation:
        """Read what `to_dict` returned.

        Args:
            found: The content. Unknown names are ignored.

        Returns:
            A generation equal to the one that was converted.

        Raises:
            ValueError: It is of another format or version, or contradicts itself.
        """
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            named = found.get("format") if isinstance(found, dict) else found
            raise ValueError(f"generation: expected an object of format {FORMAT!r}, got {shown(named)}")
        if found.get("version") != VERSION or not _is(found.get("version"), int):
            raise ValueError(f"generation: expected version {VERSION}, got {shown(found.get('version'))}")
        read = _Reader(found)
        ids, prompt_length = read.list("token_ids", int), read.one("prompt_length", int)
        count = len(ids) - prompt_length
        if count != read.one("total_tokens", int):
            stated = f"{found['total_tokens']} behind a prompt of {prompt_length}"
            raise ValueError(f"generation: expected prompt_length + total_tokens = {len(ids)} token ids, got {stated}")
        layout, tree = _read_layout(read.one("layout", dict), len(ids))
        texts = read.list("texts", str, count)
        if "".join(texts) != read.one("text", str):
            raise ValueError("generation: expected the texts of the tokens to be the text, got another text")
        error = found.get("error")
        return cls(
            text=found["text"],
            token_ids=ids,
            layout=layout,
            prompt_length=prompt_length,
            finish_reason=read.one("finish_reason", str),
            total_tokens=count,
            critical_path=read.one("critical_path", int),
            steps=read.one("steps", int),
            warnings=read.list("warnings", str),
            tree=tree,
            texts=texts,
            steps_of=read.list("steps_of", int, count),
            logprobs=None if found.get("logprobs") is None else [_value(v) for v in read.list("logprobs", None, count)],
            top_logprobs=None
            if found.get("top_logprobs") is None
            else [_pairs(one) for one in read.list("top_logprobs", None, count)],
            error=None if error is None else read.one("error", str),
            request_id=read.one("request_id", str),
            weights_version=read.one("weights_version", int) if "weights_version" in found else 0,
        )


class _Reader:
    """Fields of a dictionary that came as JSON, each with the type that it must have."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def one(self, name: str, kind: type) -> Any:
        value: Any = self._found.get(name)
        if not _is(value, kind):
            raise ValueError(f"generation: expected {name} of type {kind.__name__}, got {shown(value)}")
        if kind is int:
            _check_range(name, value)
        return value

    def list(self, name: str, kind: type | None, length: int | None = None) -> Any:
        values = self.one(name, list)
        wrong = [value for value in values if kind is not None and not _is(value, kind)]
        if wrong and kind is not None:
            raise ValueError(f"generation: expected {name} as a list of {kind.__name__}, got {shown(wrong[0])} in it")
        if kind is int and values:
            _check_range(name, min(values))
            _check_range(name, max(values))
        if length is not None and len(values) != length:
            raise ValueError(f"generation: expected {length} values in {name}, got {len(values)}")
        return values

    def pairs(self, name: str) -> Any:
        values = self.list(name, list)
        wrong = [value for value in values if len(value) != 2 or not all(_is(number, int) for number in value)]
        if wrong:
            raise ValueError(f"generation: expected {name} as pairs of integers, got {shown(wrong[0])} in it")
        for value in (number for pair in values for number in pair):
            _check_range(name, value)
        return values


def _check_range(name: str, value: int) -> None:
    if not 0 <= value < 2**31:
        raise ValueError(f"generation: expected {name} from 0 to 2**31 - 1, got {shown(value)}")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _layout_dict(layout: BranchLayout, tree: Tree) -> dict[str, Any]:
    found: dict[str, Any] = {"tree": _as_lists(tree), "sampled": _ranges(layout.sampled)}
    positions = layout.position_ids.cpu()
    if not torch.equal(positions, BranchLayout.from_tree(tree).position_ids):
        starts = [0, *(positions.diff() != 1).nonzero()[:, 0].add(1).tolist()]
        found["positions"] = [[start, int(positions[start])] for start in starts]
    return found


def _read_layout(found: dict[str, Any], total: int) -> tuple[BranchLayout, Tree]:
    read = _Reader(found)
    tree = read.one("tree", list)
    flags = np.zeros(total, dtype=np.bool_)
    for first, last in read.pairs("sampled"):
        if not 0 <= first < last <= total:
            raise ValueError(f"generation: expected ranges within 0 .. {total} in sampled, got {[first, last]}")
        flags[first:last] = True
    layout = BranchLayout.from_tree(tree, flags)
    if "positions" not in found:
        return layout, tree
    starts, values = [*zip(*read.pairs("positions"), strict=True)] or ((), ())
    edges = np.array([*starts, total], dtype=np.int64)
    if edges[0] != 0 or (np.diff(edges) <= 0).any():
        raise ValueError(f"generation: expected ascending tokens from 0 below {total} in positions, got {[*starts]}")
    shift = np.array(values, dtype=np.int64) - edges[:-1]
    positions = np.arange(total) + np.repeat(shift, np.diff(edges))
    highest = int(positions.max(initial=-1))
    _check_range("positions", max(highest, 0))
    tensor = torch.from_numpy(positions.astype(np.int32))
    return replace(layout, position_ids=tensor, critical_path=highest + 1), tree


def _as_lists(tree: Tree) -> list[Any]:
    """A copy of a tree, of lists alone. A loop, because depth has no limit."""
    root: list[Any] = []
    work = [(tree, root)]
    while work:
        source, target = work.pop()
        for item in source:
            if isinstance(item, (list, tuple)):
                target.append([])
                work.append((item, target[-1]))
            else:
                target.append(int(item))
    return root


def _ranges(flags: Any) -> list[list[int]]:
    """[first, last) of each run of True."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    ranges: list[list[int]] = edges.reshape(-1, 2).tolist()
    return ranges


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _value(found: Any) -> float | None:
    if found is None or (isinstance(found, (int, float)) and not isinstance(found, bool) and found - found == 0):
        return found
    if found == "-inf":
        return -math.inf
    raise ValueError(f"generation: expected a log-probability, got {shown(found)}")


def _pairs(found: Any) -> tuple[tuple[int, float], ...] | None:
    if found is None:
        return None
    out = []
    for pair in found if isinstance(found, list) else [found]:
        value = _value(pair[1]) if isinstance(pair, list) and len(pair) == 2 and _is(pair[0], int) else None
        if value is None:
            raise ValueError(f"generation: expected pairs of a token id and a log-probability, got {shown(pair)}")
        _check_range("top_logprobs", pair[0])
        out.append((pair[0], value))
    return tuple(out)
