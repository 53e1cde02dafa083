"""An OpenAI-compatible endpoint behind the cache: retries with backoff, budgets, structured answers if it can."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Callable
from typing import Any

from mvkernels._lazy import import_for
from mvkernels.model.curator.asking import Answer, Message, Rejected
from mvkernels.model.curator.budget import Budget
from mvkernels.model.curator.cache import AnswerCache, request_key
from mvkernels.model.curator.job import EndpointSettings, without_credentials
from mvkernels.model.curator.prompts import Form
from mvkernels.model.json_input import parse_json

# The names of the limit of an answer's length, the older one first.
_LIMITS = ("max_tokens", "max_completion_tokens")
# Of the hosts that serve models: wrong now, and not wrong in itself. 408 and 409 as in OpenAI's own client.
_PASSING = frozenset((408, 409, 425, 429))
_LONGEST_PAUSE = 600.0  # seconds; a longer Retry-After is cut to it and asked again
_LONGEST_BACKOFF = 60.0
# Bytes of a prompt to a token, at the least: what is set aside from a budget must not be too little.
_BYTES_PER_TOKEN = 2
_MOST_TOKENS = 2**31  # that an endpoint can have counted for one request
# So many requests in a row are refused, and none is answered: it is not the requests.
_REFUSALS = 10


class EndpointError(ValueError):
    """The endpoint cannot be used: no chain's fault, and the run stops."""


class EndpointBusy(Exception):
    """A request was not answered, by no fault of its own as far as can be seen: its chain is left for the next run."""


class Endpoint:
    """Answers requests. Not for several event loops."""

    def __init__(
        self,
        settings: EndpointSettings,
        cache: AnswerCache,
        budget: Budget,
        give_up_after: int,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """give_up_after: requests in a row that are not answered within their retries, until the run stops.

        say: is called with a line when a request fails in a way that none before has, and is sent again.
        """
        openai: Any = import_for("curate", "openai")
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=settings.key, base_url=settings.base_url, timeout=settings.timeout, max_retries=0
        )
        self.settings = settings
        self.cache = cache
        self.budget = budget
        self.give_up_after = give_up_after
        self._say = say
        self._said: set[str] = set()
        self._url = without_credentials(settings.base_url)
        self._fact = f"structured {self._url} {settings.model}"
        noted = cache.fact(self._fact)
        self._structured = settings.structured if settings.structured is not None else noted != "no"
        self._limit_name = cache.fact(self._fact + " limit") or _LIMITS[0]
        self._resume_at = 0.0
        self._random = random.Random(0)
        self._unanswered = self._refused = self.answered = 0
        self._answered_before = cache.spent()[0] > 0
        self.sent = 0
        self.retried = 0

    async def answer(self, messages: list[Message], form: Form) -> Answer:
        """From the cache or the endpoint. Raises Rejected where the endpoint refuses this very request, and
        EndpointBusy, EndpointError, BudgetUsedUp."""
        while True:
            structured = self._structured
            request = self._request(messages, form, structured)
            # A whole answer is the same under any limit of its length; one that was cut is not.
            unlimited = {name: value for name, value in request.items() if name not in _LIMITS}
            key, limited = request_key(unlimited), request_key(request)
            found = self.cache.get(key) or self.cache.get(limited)
            if found is not None:
                return found
            held = await self.budget.hold(*self._estimate(request))
            answer = None
            try:
                answer = await self._send(request)
                self.cache.put(key if answer.complete else limited, form.name, self.settings.model, answer)
                if not structured and self.settings.structured is None:
                    self.cache.note(self._fact, "no")
                return answer
            except self._openai.APIStatusError as error:
                if not self._adapt(error, structured):
                    raise self._refusal(error, form.name) from None
            finally:
                used = (answer.prompt_tokens, answer.completion_tokens) if answer else (0, 0)
                await self.budget.settle(held, *used)

    async def close(self) -> None:
        await self._client.close()

    def _request(self, messages: list[Message], form: Form, structured: bool) -> dict[str, Any]:
        described = form.structured if structured else form.plain
        last = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{described}"}
        request: dict[str, Any] = {"model": self.settings.model, "messages": [*messages[:-1], last]}
        if structured:
            request["response_format"] = form.response_format()
        if self.settings.temperature is not None:
            request["temperature"] = self.settings.temperature
        if self.settings.answer_tokens is not None:
            request[self._limit_name] = self.settings.answer_tokens
        return request

    def _estimate(self, request: dict[str, Any]) -> tuple[int, int]:
        """Prompt and completion tokens that a request takes at most."""
        size = sum(len(message["content"].encode("utf-8", "replace")) for message in request["messages"])
        return size // _BYTES_PER_TOKEN + 64, self.settings.answer_tokens or 8192

    async def _send(self, request: dict[str, Any]) -> Answer:
        """Sends until there is an answer. Raises APIStatusError for what no retry helps, and EndpointBusy."""
        openai = self._openai
        for attempt in range(self.settings.retries + 1):
            await self._pause()
            try:
                self.sent += 1
                # The request is made of plain values already: what `create` would do to each of them takes as long as
                # all the rest. The reply comes as its text, because it may hold anything.
                answer = _answer_of(await self._client.post("/chat/completions", cast_to=str, body=request), request)
                self._unanswered = self._refused = 0
                self.answered += 1
                return answer
            except openai.APIStatusError as error:
                if error.status_code not in _PASSING and error.status_code < 500:
                    raise
                kind = f"status {error.status_code}"
                reason = f"{kind}: {self._words(error)}"
                wait = self._back_off(attempt, retry_after(error.response.headers), error.status_code == 429)
            except (openai.APIConnectionError, _Cut) as error:
                kind, reason = type(error).__name__, self._words(error)
                wait = self._back_off(attempt, None, False)
            if attempt < self.settings.retries:
                self.retried += 1
                if kind not in self._said:
                    self._said.add(kind)
                    self._say(
                        f"{self._url}: {reason}; next try in {wait:.1f} s, {self.settings.retries - attempt} left for "
                        "this request"
                    )
                await asyncio.sleep(wait)
        self._unanswered += 1
        if self._unanswered >= self.give_up_after:
            raise EndpointError(
                f"{self._url}: {self._unanswered} requests in a row were not "
                f"answered within {self.settings.retries} retries each; the last one: {reason}. Run again to go on."
            )
        raise EndpointBusy(f"{self._url}: {reason}")

    async def _pause(self) -> None:
        """Until the time that the endpoint named last; it holds for all requests."""
        while (left := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def _back_off(self, attempt: int, named: float | None, everyone: bool) -> float:
        """Seconds to wait before the next attempt: as long as the endpoint says, or twice as long as before."""
        doubled = min(self.settings.backoff * 2**attempt, _LONGEST_BACKOFF) * self._random.uniform(0.5, 1.0)
        wait = min(named, _LONGEST_PAUSE) if named is not None else doubled
        if everyone and named is not None:
            self._resume_at = max(self._resume_at, time.monotonic() + wait)
        return wait

    def _adapt(self, error: Any, structured: bool) -> bool:
        """After a refusal: whether the request is worth sending in another form, which is then kept for all."""
        if error.status_code not in (400, 422):
            return False
        words = str(error)
        if _LIMITS[1] in words and self._limit_name == _LIMITS[0]:
            self._limit_name = _LIMITS[1]
            self.cache.note(self._fact + " limit", self._limit_name)
            return True
        # Once the endpoint has answered in this form, it is the request itself that it refuses.
        if structured and self.settings.structured is None and not (self._structured and self.answered):
            self._structured = False
            return True
        return False

    def _refusal(self, error: Any, stage: str) -> Exception:
        where, words = self._url, self._words(error)
        if error.status_code in (401, 403):
            return EndpointError(f"{where} refuses the key (status {error.status_code}): {words}")
        if error.status_code == 404:
            return EndpointError(f"{where} has no model {self.settings.model!r}, or is no such endpoint: {words}")
        self._refused += 1
        if not self.answered and self.settings.structured is None:
            self._structured = True  # it was not the form
        if self._refused >= _REFUSALS and not (self.answered or self._answered_before):
            return EndpointError(f"{where} refused {self._refused} requests in a row: {words}")
        reason = f"{where} refused the request (status {error.status_code}): {words}"
        # Before there is any answer it may be the endpoint that is wrong, and then no chain should pay for it.
        return Rejected(stage, reason) if self.answered or self._answered_before else EndpointBusy(reason)

    def _words(self, error: BaseException) -> str:
        """What an error says, in one line that is not too long, without the key."""
        said = str(error) or type(error).__name__
        if isinstance(error, self._openai.APIConnectionError):  # itself it says "Connection error."
            cause: BaseException = error
            while (before := cause.__cause__ or cause.__context__) is not None:
                cause = before
            said += f" {cause}" if cause is not error else ""
        hidden = said if self.settings.key == "none" else said.replace(self.settings.key, "***")
        return " ".join(hidden.split())[:300]


class _Cut(Exception):
    """A reply that is no whole reply."""


def _answer_of(body: str, request: dict[str, Any]) -> Answer:
    """The answer in the body of a reply. Raises _Cut for a body of another form."""
    try:
        reply = parse_json(body, strict=False)
    except ValueError as error:
        raise _Cut(f"the reply cannot be read: {error}") from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise _Cut("the reply has no answer in it")
    text = _text_of(message.get("content") or message.get("refusal") or "")
    usage = reply.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    size = sum(len(one["content"]) for one in request["messages"])
    return Answer(
        text,
        choice.get("finish_reason") != "length",
        _tokens(counts.get("prompt_tokens"), size),
        _tokens(counts.get("completion_tokens"), len(text)),
    )


def _text_of(content: Any) -> str:
    """The text of a message. Some reasoning models answer in parts, of which those of type "text" are the answer."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else json.dumps(content)


def _tokens(counted: Any, characters: int) -> int:
    """What an endpoint counted, or where that is no count, about four characters to a token."""
    if isinstance(counted, int) and not isinstance(counted, bool) and 0 <= counted < _MOST_TOKENS:
        return counted
    return characters // 4


def retry_after(headers: Any) -> float | None:
    """Seconds that a reply asks to wait: a number, a number of milliseconds, or a date."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
