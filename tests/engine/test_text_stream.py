"""Text of a stream = decode of its tokens: for every kind of vocabulary, and wherever prompt and generation are cut."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from mvkernels.cli.live import LivePanels, PlainLines
from mvkernels.model import Engine, Generation
from mvkernels.model.engine.output.events import Event, FinishEvent, ForkEvent, TextEvent, TokenEvent
from mvkernels.model.engine.output.text_stream import TextStream
from tests.engine.cases import CASES, GREEDY, check_pages, config_for, follow
from tests.engine.vocabularies import HARDEST, ROWS, VOCABULARIES, byte_tokens, whole
from tests.support.tiny_model import scripted, tiny_model, tiny_tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
TEXT = "so a\né€\n\n  the 12🙂🙂 x:日本é e€ b"


class Foreign:
    """A tokenizer of which no more is known than that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, tokens: list[int], **options: Any) -> str:
        return self._tokenizer.decode(tokens, **options)


@pytest.fixture(params=VOCABULARIES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return VOCABULARIES[request.param]()


@pytest.fixture(scope="module")
def engines() -> dict[int, Engine]:
    return {}


@pytest.fixture
def engine(engines: dict[int, Engine], tokenizer: Any) -> Any:
    engine = engines.get(id(tokenizer))
    if engine is None:
        engine = engines[id(tokenizer)] = Engine(tiny_model(vocab_size=ROWS), tokenizer, page_size=4)
    yield engine
    check_pages(engine)


def pieces(events: list[Event]) -> dict[int, str]:
    """What the events tell of each branch."""
    found: dict[int, str] = {}
    for event in events:
        if isinstance(event, (TokenEvent, TextEvent)):
            found[event.branch] = found.get(event.branch, "") + event.text
    return found


def common(prompt: str, text: str) -> str:
    """What stands of the text of a prompt as `text` goes on: all but the character that it ends within."""
    return next((prompt[:i] for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), prompt)


# ---- one stream


def test_text_cut_anywhere_is_what_decoding_gives(tokenizer: Any) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    total = whole(tokenizer, ids)
    assert total.lstrip() == TEXT
    runs = byte_tokens(tokenizer)
    for cut in range(1, len(ids)):
        standing = common(whole(tokenizer, ids[:cut]), total)
        stream, text = TextStream(tokenizer, ids[:cut]), ""
        for end in range(cut + 1, len(ids) + 1):
            text += stream.push(ids[end - 1])
            assert total.startswith(standing + text), "what is told never changes"
            # A decoder of byte fallback takes back whole characters, where an unfinished one follows them directly.
            taken_back = all(token in runs for token in ids[cut - 1 : end])
            if not taken_back or total.startswith(whole(tokenizer, ids[:end])):
                assert standing + text + stream.rest() == whole(tokenizer, ids[:end]), f"{cut} to {end}"
        assert standing + text + stream.flush() == total and stream.rest() == stream.held() == ""


def test_text_of_random_tokens_is_what_decoding_gives(tokenizer: Any) -> None:
    draw = random.Random(0)
    usual = [*tokenizer.encode(TEXT + UNFINISHED, add_special_tokens=False), *range(ROWS - 3, ROWS)]
    start = tokenizer.convert_tokens_to_ids("<Path>")
    for _ in range(60):
        ids = [start, *(draw.choice(usual) if draw.random() < 0.9 else draw.randrange(ROWS) for _ in range(24))]
        stream, text = TextStream(tokenizer, ids[:1]), "<Path>"
        for end in range(2, len(ids) + 1):
            text += stream.push(ids[end - 1])
            assert text + stream.rest() == whole(tokenizer, ids[:end]), ids[:end]


def test_a_flush_tells_the_rest_once(tokenizer: Any) -> None:
    euro = tokenizer.encode("x€", add_special_tokens=False)[-3:]
    opening, closing = tokenizer.convert_tokens_to_ids(["<Path>", "</Path>"])
    stream = TextStream(tokenizer, [opening])
    assert [stream.push(token) for token in euro[:2]] == ["", ""]
    rest = whole(tokenizer, euro[:2])
    assert set(rest) == {UNFINISHED} and stream.rest() == rest and stream.held() == ""
    assert stream.push(0, silent=True) == rest and stream.flush() == stream.rest() == ""
    assert stream.push(closing) == "</Path>"


def test_a_prompt_that_ends_with_the_replacement_character_keeps_it(tokenizer: Any) -> None:
    ids = tokenizer.encode("x" + UNFINISHED, add_special_tokens=False)
    stream = TextStream(tokenizer, ids)
    assert stream.rest() == "" and stream.push(tokenizer.convert_tokens_to_ids("<Path>")) == "<Path>"


def test_text_of_a_tokenizer_that_only_decodes() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(TEXT)
    for cut in range(1, len(ids)):
        standing = common(whole(tokenizer, ids[:cut]), TEXT)
        stream, text = TextStream(Foreign(tokenizer), ids[:cut]), ""
        for end in range(cut + 1, len(ids) + 1):
            text += stream.push(ids[end - 1])
            assert standing + text + stream.rest() == whole(tokenizer, ids[:end])
    # Never waits for ever: leading bytes alone come out as what the tokenizer makes of them.
    stream = TextStream(Foreign(tokenizer))
    assert "".join(stream.push(tokenizer.encode("€")[0]) for _ in range(40)).count(UNFINISHED) >= 30


# ---- requests


def test_a_request_cut_anywhere_tells_all_of_its_text(engine: Engine) -> None:
    """Every end of the prompt and, for some, every budget: the last token's event has what was held back."""
    ids = engine.tags.encode(TEXT)
    asked = [(cut, len(ids)) for cut in range(1, len(ids))] + [(1, end) for end in range(2, len(ids))]
    scripts = [{(): ids[cut:end]} for cut, end in asked]
    configs = [replace(GREEDY, eos_token_ids=(), max_new_tokens=end - cut) for cut, end in asked]
    events = list(engine.stream([ids[:cut] for cut, _ in asked], configs, scripted(scripts)))
    assert not any(isinstance(event, TextEvent) for event in events)
    for event in events:
        if isinstance(event, FinishEvent):
            cut, end = asked[event.request]
            out = event.generation
            standing = common(whole(engine.tokenizer, ids[:cut]), whole(engine.tokenizer, ids))
            assert standing + out.text == whole(engine.tokenizer, out.token_ids), f"{cut} to {end}"
            told = "".join(e.text for e in events if isinstance(e, TokenEvent) and e.request == event.request)
            assert told == out.text == "".join(out.texts) and out.total_tokens == end - cut
            assert Generation.from_json(out.to_json()) == out


@pytest.mark.parametrize("semantics", ["canonical", "released"])
@pytest.mark.parametrize("tokenizer", HARDEST, indirect=True)
def test_blocks_cut_by_a_budget_anywhere_tell_all_of_their_text(tokenizer: Any, semantics: str) -> None:
    """Paths that end within a character, text in bytes around forks and joins, and an end of text that is silent."""
    engine = Engine(tiny_model(vocab_size=ROWS), tokenizer, page_size=4, semantics=semantics)
    case = CASES["small nested"]
    case = case | {"": "é\n€" + case[""].replace("~", "é\n\n"), "1": "a\n€</Path>", "2.1": "€€</Path>"}
    budgets = range(1, 110, 3)
    configs = [config_for(engine, max_new_tokens=budget) for budget in budgets]
    events = list(engine.stream(["the"] * len(configs), configs, follow(engine, case)))
    outs = {event.request: event.generation for event in events if isinstance(event, FinishEvent)}
    assert outs[len(budgets) - 1].finish_reason == "stop" and outs[len(budgets) - 1].text.count("€") == 4
    for number, budget in enumerate(budgets):
        out = outs[number]
        kept = [token for token in out.token_ids if token != tokenizer.eos_token_id]
        assert whole(tokenizer, kept) == whole(tokenizer, out.token_ids[: out.prompt_length]) + out.text, budget
        own = [event for event in events if event.request == number]
        ordered = sequence(own, 0)
        assert "".join(ordered) == out.text and "".join(out.texts) == out.text
    check_pages(engine)


def sequence(events: list[Event], branch: int) -> list[str]:
    """The pieces of a request in sequence order: at each fork, those of the children before what follows."""
    found: list[str] = []
    for event in events:
        if isinstance(event, (TokenEvent, ForkEvent)) and event.branch == branch:
            if isinstance(event, TokenEvent):
                found.append(event.text)
            else:
                found += [piece for child in event.children for piece in sequence(events, child)]
    return found


@pytest.mark.parametrize("tokenizer", HARDEST, indirect=True)
def test_what_is_cancelled_within_a_character_tells_the_rest_in_an_event_of_its_own(engine: Engine) -> None:
    prompt, ids = engine.tags.encode("x"), engine.tags.encode("x\né€")
    first = len(prompt)
    for steps in range(1, len(ids) - first + 1):
        stream = engine.stream([prompt], config_for(engine), scripted({(): ids[first:]}))
        events: list[Event] = []
        while sum(isinstance(event, TokenEvent) for event in events) < steps:
            events.append(next(stream))
        stream.cancel()
        events += stream
        out = events[-1].generation
        assert out.finish_reason == "cancelled" and out.token_ids == ids[: first + steps]
        start = whole(engine.tokenizer, prompt)
        assert start + out.text == start + pieces(events)[0] == whole(engine.tokenizer, out.token_ids)
        rest = out.text.removeprefix(tokens(events))
        assert events[steps:-1] == ([TextEvent(0, (), rest)] if rest else [])


def tokens(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TokenEvent))


@pytest.mark.parametrize("tokenizer", HARDEST, indirect=True)
def test_a_stop_string_is_found_with_its_last_byte(engine: Engine) -> None:
    """Though its text is held back, and though a token brings the beginning of a character with it."""
    for stop, text in (("\n", "x\né"), ("é", "xé€"), ("\n€", "x\n€ b"), ("e", "xe€"), ("so", "x\nso b")):
        ids, first = engine.tags.encode(text), len(engine.tags.encode("x"))
        config = config_for(engine, stop=(stop,))
        events = list(engine.stream([ids[:first]], config, scripted({(): ids[first:]})))
        out = events[-1].generation
        assert out.finish_reason == "stop" and stop in out.text and tokens(events) == out.text
        assert whole(engine.tokenizer, out.token_ids[:-1]).find(stop) < 0, "not one token later"


def test_the_rest_of_a_character_reaches_the_screen() -> None:
    for view_of in (PlainLines, LivePanels):
        out = Console(file=io.StringIO(), width=60)
        with view_of(out) as view:
            view.show(TokenEvent(0, (), 1, "so", 0, False))
            view.show(TextEvent(0, (), UNFINISHED))
            if isinstance(view, LivePanels):
                out.print(view.render())
        assert "so" + UNFINISHED in out.file.getvalue()
