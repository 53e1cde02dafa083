"""Asking a model until its answer can be used: what was wrong is told, every attempt is kept, and tries are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from mvkernels.model.curator.answers import Wrong
from mvkernels.model.curator.prompts import Form, form_of, render

T = TypeVar("T")
#: A message of the chat completions protocol: role and content.
Message = dict[str, str]
# Characters of a bad answer, and of what is wrong with it, that the model is sent: the next request must stay small.
_MOST_SENT_BACK, _MOST_COMPLAINT = 20_000, 2_000


@dataclass(frozen=True)
class Answer:
    """What a model said to one request. complete: False where it was cut at the limit of its length."""

    text: str
    complete: bool
    prompt_tokens: int
    completion_tokens: int


class Answerer(Protocol):
    """A source of answers: an endpoint behind its cache."""

    async def answer(self, messages: list[Message], form: Form) -> Answer:
        """The answer to the messages, in that form."""
        ...


class Rejected(Exception):
    """A chain is given up. stage, reason: where and why."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason


@dataclass
class Record:
    """What happened to one chain. bad: the answers that could not be used, in order; tokens: of all answers."""

    bad: list[dict[str, str]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    tokens: int = 0

    def tries(self) -> dict[str, int]:
        """Of each stage: one, and one for every answer in it that could not be used."""
        wrong = Counter(attempt["stage"] for attempt in self.bad)
        return {stage: 1 + wrong[stage] for stage in self.asked}


class Dialogue:
    """One request of a stage, and what follows while its answers cannot be used.

    messages: all up to the request; they are not changed. The bad answers are part of this dialogue only.
    """

    def __init__(
        self, answerer: Answerer, record: Record, stage: str, messages: list[Message], max_tries: int, about: str = ""
    ) -> None:
        self._answerer = answerer
        self._record = record
        self._stage = stage
        self._base = messages
        self._last: list[Message] = []  # the last answer, and what was wrong with it
        self._left = max_tries
        self._about = about
        self.text = ""

    async def get(self, read: Callable[[str], T]) -> T:
        """The first answer that can be read. Raises Rejected when all tries are used up."""
        while True:
            answer = await self._answerer.answer([*self._base, *self._last], form_of(self._stage))
            self._left -= 1
            self._record.asked[self._stage] += 1
            self._record.tokens += answer.prompt_tokens + answer.completion_tokens
            self.text = answer.text
            try:
                if not answer.complete:
                    raise Wrong("The answer was cut because it is too long; answer more briefly.")
                return read(answer.text)
            except Wrong as wrong:
                self.refuse(str(wrong))

    def refuse(self, wrong: str) -> None:
        """Notes what is wrong with the last answer, so that `get` asks again. Raises Rejected when no try is left."""
        wrong = wrong if len(wrong) <= _MOST_COMPLAINT else f"{wrong[:_MOST_COMPLAINT]} ..."
        self._record.bad.append({"stage": self._stage, "answer": self.text, "wrong": f"{self._about}{wrong}"})
        if self._left < 1:
            raise Rejected(self._stage, f"{self._about}{wrong}")
        complaint = render("again", wrong=wrong)
        self._last = [
            {"role": "assistant", "content": self.text[:_MOST_SENT_BACK]},
            {"role": "user", "content": complaint},
        ]


def user(name: str, **values: Any) -> Message:
    """A prompt as the user's message."""
    return {"role": "user", "content": render(name, **values)}


def system() -> Message:
    return {"role": "system", "content": render("system")}
