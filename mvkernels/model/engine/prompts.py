"""From what a caller passes as a prompt to token ids."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from reprlib import repr as shorten
from typing import Any, TypeAlias

from mvkernels.errors import described
from mvkernels.model.engine.sampling.config import as_ids
from mvkernels.tags import TagTokens

#: Seconds that a chat template may take; usual ones take a millisecond.
TEMPLATE_SECONDS = 10.0
#: A text, a chat (messages with "role" and "content"), or token ids.
Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int]


def as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several -> a list. A list of integers, and a list of messages, is one prompt.

    Raises ValueError for what is no prompt.
    """
    if isinstance(prompts, str) or _is_ids(prompts) or _is_chat(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts: expected a text, a list of prompts, or token ids, got {described(prompts)}")
    for prompt in prompts:
        if not (isinstance(prompt, str) or _is_ids(prompt) or _is_chat(prompt)):
            got = described(prompt) if hasattr(prompt, "dtype") else shorten(prompt)
            raise ValueError(f"prompts: expected texts, chats or lists of token ids, got {got}")
    return list(prompts)


def _is_ids(prompt: Any) -> bool:
    if hasattr(prompt, "tolist"):
        return bool(prompt.ndim == 1)
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes)) or not prompt:
        return False
    return all(isinstance(i, (int, Integral)) and not isinstance(i, bool) for i in prompt)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(m, Mapping) for m in prompt)


def prompt_ids(prompt: Prompt, tokenizer: Any, tags: TagTokens | None, vocabulary: int) -> list[int]:
    """The token ids of one prompt. A chat goes through the tokenizer's chat template; a text is taken as it is.

    vocabulary: number of rows of the model's embedding. Raises ValueError for an empty prompt, for ids outside the
    vocabulary, and for a chat when the tokenizer has no chat template or its template fails.
    """
    if isinstance(prompt, str):
        ids = _encode(prompt, tokenizer, tags)
    elif hasattr(prompt, "tolist"):
        ids = list(as_ids("prompt", prompt))
    elif _is_chat(prompt):
        ids = _encode(chat_text(prompt, tokenizer), tokenizer, tags, special=False)
    else:
        ids = [int(i) for i in prompt]  # type: ignore[arg-type]
    if not ids:
        raise ValueError("prompt: expected at least one token, got an empty prompt")
    wrong = [i for i in ids if not 0 <= i < vocabulary]
    if wrong:
        raise ValueError(f"prompt: expected token ids from 0 to {vocabulary - 1}, got {wrong[0]}")
    return ids


def chat_text(messages: Any, tokenizer: Any) -> str:
    """The messages in the tokenizer's chat template, up to where the assistant's turn begins.

    A template is a program that comes with a model. Raises ValueError where there is none, where it raises anything,
    and where it takes longer than TEMPLATE_SECONDS.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat: expected a tokenizer with a chat template, got one without")
    chat = list(messages)
    try:
        text: str = _bounded(lambda: tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        kind = type(error).__name__
        raise ValueError(f"chat: expected a chat template that takes these messages, got {kind}: {said}") from error
    return text


def _bounded(render: Callable[[], Any]) -> Any:
    """The result of a call that is ended with TimeoutError at its next line of Python after TEMPLATE_SECONDS.

    A template runs as Python code, loops and macros too. A trace function sees every line of it, in any thread; it
    takes 0.3 ms of a usual chat. A single operation on huge numbers (`9 ** 9 ** 9`) is not ended.
    """
    end = time.monotonic() + TEMPLATE_SECONDS

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"expected an end within {TEMPLATE_SECONDS:g} s, got none")
        return trace if frame.f_code.co_filename == "<template>" else None  # of other frames, their calls are enough

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return render()
    finally:
        sys.settrace(before)


def _encode(text: str, tokenizer: Any, tags: TagTokens | None, special: bool = True) -> list[int]:
    """As the tokenizer encodes it, but with the tags' own pieces where there are tags."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"prompt: expected Unicode text, got half a surrogate pair, {half!a}") from None
    if tags is None:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
        return ids
    # What the tokenizer puts before every text: a begin-of-text token, or nothing.
    prefix = tokenizer.encode("", add_special_tokens=True) if special else []
    return [*prefix, *tags.encode(text)]
