"""JSON from outside: what a text may hold, and that every reader names file and line of one that it cannot take."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mvkernels.model.curator.chains import ChainReader
from mvkernels.model.curator.outputs import read_lines, read_manifest
from mvkernels.model.curator.trace_files import read_traces
from mvkernels.model.evaluation.questions import read_questions
from mvkernels.model.evaluation.samples import FORMAT, VERSION, read_samples
from mvkernels.model.json_input import DEEPEST, parse_json, shown
from mvkernels.model.training.recipe_file import read_recipe
from mvkernels.model.training.traces import read_examples


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "expected JSON nested at most 64 deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "expected JSON nested at most 64 deep"),
        ('{"a":' * 900 + "1" + "}" * 900, "expected JSON nested at most 64 deep"),
        ("1" * 5000, "expected an integer of at most 1000 digits, got one of 5000"),
        ("-" + "1" * 1001, "expected an integer of at most 1000 digits"),
        ("", "Expecting value: line 1 column 1"),
        ("{} {}", "Extra data"),
        ("\ufeff{}", "BOM"),
        (b"\xff", "can't decode byte 0xff"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_no_reader_takes(text: str | bytes, message: str, strict: bool) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text, strict)


@pytest.mark.parametrize(
    ("text", "message", "lenient"),
    [
        ('[{"a": 1, "a": 2}]', "every key once in an object, got 'a' twice", [{"a": 2}]),
        ("NaN", "finite number, got NaN", math.nan),
        ("[-Infinity]", "finite number, got -Infinity", [-math.inf]),
        ("1e999", "finite number, got 1e999", math.inf),
        ('{"\\udc00": "\\ud800"}', "half a surrogate pair", {"?": "?"}),
        ('"\ud800"', "half a surrogate pair", "?"),
    ],
)
def test_what_is_refused_or_read_as_data_sets_have_it(text: str, message: str, lenient: Any) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    found = parse_json(text, strict=False)
    assert found == lenient or (found != found and lenient != lenient)


def test_what_every_reader_takes() -> None:
    value = {"a": [1, -2.5, True, None, "\U0001f600", "tab\t"], "b": {}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), json.dumps(value).encode()):
        assert parse_json(text) == parse_json(text, strict=False) == value
    assert parse_json('"a\tb\x01"') == "a\tb\x01", "control characters as they stand"
    deep = parse_json("[" * DEEPEST + "]" * DEEPEST)
    assert shown(deep) == "[[[[...]]]]" and len(shown("x" * 1000)) < 90
    assert parse_json("[" * 400 + "]" * 400, deepest=None)[0][0] == parse_json("[" * 398 + "]" * 398, deepest=None)


def written(name: str, head: str = "") -> Callable[[Path, str], Path]:
    def write(folder: Path, line: str) -> Path:
        (folder / name).write_text(f"{head}{line}\n", encoding="utf-8")
        return folder / name

    return write


def errors_of(found: Iterator[Any]) -> Iterator[str]:
    for one in found:
        if isinstance(one, ValueError):
            yield str(one)
        elif getattr(one, "error", None):
            yield f"{one.name}: {one.error}"
        elif getattr(one, "problem", None):
            yield one.problem
        else:
            pytest.fail(f"read: {one!r:.100}")


SAMPLES = json.dumps({"format": FORMAT, "version": VERSION}) + "\n"
#: Reader -> the file for a line, how it is read, and how the place of the line is named.
READERS: dict[str, tuple[Callable[[Path, str], Path], Callable[[Path], Any], str]] = {
    "questions": (written("q.jsonl"), read_questions, "q.jsonl, line 1: "),
    "samples": (written("s.jsonl", SAMPLES), read_samples, "s.jsonl, line 2: "),
    "check and stats": (written("t.jsonl"), lambda path: errors_of(read_traces([path])), "t.jsonl:1: "),
    "train": (written("e.jsonl"), lambda path: errors_of(read_examples([path])), "e.jsonl:1: "),
    "recipe": (written("recipe.json"), read_recipe, "recipe.json"),
    "manifest": (written("manifest.json"), lambda path: read_manifest(path.parent), "manifest.json: "),
    "traces of a run": (written("traces.jsonl"), lambda path: list(read_lines(path)), "traces.jsonl:1: "),
    "chains": (written("c.jsonl"), lambda path: errors_of(iter(ChainReader(path))), "expected a JSON object, got "),
}
HOSTILE = {
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "nested": '{"trace": ' + "[" * 500 + "]" * 500 + "}",
    "digits": '{"trace": ' + "1" * 5000 + "}",
    "torn": '{"trace": "a',
    "list": "[1]",
    "null": "null",
    "text": '"x"',
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_the_place_of_what_it_cannot_take(tmp_path: Path, reader: str) -> None:
    write, read, place = READERS[reader]
    for name, line in HOSTILE.items():
        path = write(tmp_path, line)
        try:
            message = next(iter(read(path)))
        except ValueError as error:
            message = str(error)
        assert isinstance(message, str) and place in message and len(message) < 400, f"{name}: {message!r:.300}"


def test_a_list_of_chains_is_refused_or_read_up_to_what_is_odd(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(f'[{{"chain": "a"}}, {{"chain": {"1" * 5000}}}, {"[" * 70}{"]" * 70}, 7, {{"chain": "b"}}]')
    found = list(ChainReader(path))
    assert [one.text for one in found if not one.problem] == ["a", "b"]
    assert [one.problem.partition(", got")[0] for one in found if one.problem] == ["expected a JSON object"] * 3
    path.write_text(f'[{{"chain": "a"}}, {"[" * 100_000}]')
    with pytest.raises(ValueError, match=r"input: expected JSON, got item 2 of .*c.json nested too deep"):
        list(ChainReader(path))


def test_a_text_may_have_any_line_end_in_it(tmp_path: Path) -> None:
    """JSON itself ends lines with the newline alone."""
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a\u2028b\u0085c\x0cd", "answer": "1"}\n', encoding="utf-8")
    [question] = read_questions(path)
    assert question.text.startswith("a\u2028b\u0085c\x0cd\n")
