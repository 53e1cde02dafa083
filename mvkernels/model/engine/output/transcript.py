"""The transcript of a request: what each of its branches has, token by token, and the `Generation` that it comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mvkernels.layout import BranchLayout
from mvkernels.model.engine.control.interpreter import Interpreter
from mvkernels.model.engine.output.generation import Generation
from mvkernels.model.engine.output.text_stream import TextStream
from mvkernels.model.engine.sampling.logprobs import TokenLogprob
from mvkernels.model.engine.sampling.penalties import SeenTokens


@dataclass(slots=True)
class BranchRecord:
    """A branch of the request. tokens, positions, sampled, pieces, steps, logprobs: its own tokens, where each stands,
    whether it was sampled, its text, after how many forwards it came, its log-probability where one was asked for.

    key: of its randomness. seen: the tokens that it sees, where there is a repetition penalty. text: of what comes.
    heard: sampled text in which a stop string may begin. drawn: tokens sampled so far.
    """

    number: int
    key: str
    tokens: list[int]
    positions: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    seen: SeenTokens | None = None
    text: TextStream | None = None
    heard: str = ""
    drawn: int = 0

    def add(self, position: int, sampled: bool, step: int, piece: str, logprob: TokenLogprob | None) -> None:
        """What is known of the branch's next token."""
        self.positions.append(position)
        self.sampled.append(sampled)
        self.pieces.append(piece)
        self.steps.append(step)
        self.logprobs.append(logprob)

    def add_given(self, count: int, end: int) -> None:
        """The same of tokens of the prompt, which stand before the position `end`."""
        self.positions += range(end - count, end)
        self.sampled += [False] * count
        self.pieces += [""] * count
        self.steps += [0] * count
        self.logprobs += [None] * count


class Transcript:
    """The records of a request's branches, by their numbers. interpreter: knows how they hang together."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.branches: list[BranchRecord] = []

    def flat(self, number: int, read: Callable[[BranchRecord], list[Any]], until: int | None = None) -> list[Any]:
        """What `read` gives for every token of a branch and its paths, in sequence order, up to the fork of `until`."""
        out: list[Any] = []
        work = [(number, iter(self.interpreter.items(number)), 0)]
        while work:
            current, items, cursor = work.pop()
            values = read(self.branches[current])
            for item in items:
                if isinstance(item, int):
                    out += values[cursor : cursor + item]
                    cursor += item
                elif until in item:
                    return out
                elif item[0] >= len(self.branches):
                    break  # the interpreter has forked, and the newline before the paths is being written
                else:
                    work.append((current, items, cursor))
                    work += [(child, iter(self.interpreter.items(child)), 0) for child in reversed(item)]
                    break
        return out

    def context(self, number: int) -> list[int]:
        """The tokens that a branch sees, oldest first."""
        parts: list[list[int]] = []
        below: int | None = None
        current: int | None = number
        while current is not None:
            parts.append(self.flat(current, lambda b: b.tokens, until=below))
            below, current = current, self.interpreter.parent(current)
        return [token for part in reversed(parts) for token in part]

    def generation(self, prompt_length: int, logprobs: int | None, canonical: bool, **known: Any) -> Generation:
        """All of it, and what else is known of the request. logprobs: how many were asked for. canonical: whether
        positions follow from the structure.
        """
        interp = self.interpreter
        texts = self.flat(0, lambda b: b.pieces)[prompt_length:]
        found: Sequence[TokenLogprob | None] = self.flat(0, lambda b: b.logprobs)[prompt_length:]
        return Generation(
            text="".join(texts),
            token_ids=self.flat(0, lambda b: b.tokens),
            layout=self._layout(canonical),
            prompt_length=prompt_length,
            total_tokens=interp.total_tokens,
            tree=interp.tree(),
            texts=texts,
            steps_of=self.flat(0, lambda b: b.steps)[prompt_length:],
            logprobs=[one and one.logprob for one in found] if logprobs is not None else None,
            top_logprobs=[one and one.top for one in found] if logprobs else None,
            **known,
        )

    def _layout(self, canonical: bool) -> BranchLayout:
        """What each token saw, and where it stands."""
        layout = BranchLayout.from_tree(self.interpreter.tree(), self.flat(0, lambda b: b.sampled))
        if canonical:
            return layout
        positions = torch.tensor(self.flat(0, lambda b: b.positions), dtype=torch.int32)
        return replace(layout, position_ids=positions, critical_path=self.interpreter.critical_path)
