"""Chat templates come with models: one that fails is one line, and one without an end is ended, in any thread."""

from __future__ import annotations

import copy
import sys
import threading

import pytest

from mvkernels.model.engine import prompts
from mvkernels.model.engine.prompts import chat_text
from tests.support.tiny_model import tiny_tokenizer

CHAT = [{"role": "user", "content": "hi"}]
LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


def render(template: str) -> str:
    tokenizer = copy.deepcopy(tiny_tokenizer())  # which all tests share
    tokenizer.chat_template = template
    return chat_text(CHAT, tokenizer)


def test_a_template_is_rendered_and_a_debugger_stays() -> None:
    def trace(frame: object, event: str, argument: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert render("{% for m in messages %}<{{ m.content }}>{% endfor %}") == "<hi>"
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no\n system') }}", "TemplateError: no system"),
        ("{% for %}", "TemplateSyntaxError: Expected an expression"),
        ("{{ a.b.c }}", "UndefinedError: 'a' is undefined"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: "),
        ("{{ range(10 ** 9) }}", "OverflowError: Range too big"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError: "),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^chat: expected a chat template that takes these messages, got ") as caught:
        render(template)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [LOOP, CALLS, "{{ lipsum(n=100000000) }}"], ids=["loops", "calls", "text"])
def test_a_template_without_an_end_is_ended_in_any_thread(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.05)
    said: list[str] = []

    def ask() -> None:
        try:
            render(template)
        except ValueError as error:
            said.append(str(error))

    ask()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(60)
    assert len(said) == 2 and all("TimeoutError: expected an end within 0.05 s, got none" in one for one in said), said
