"""Options of the command line that are made from the fields of dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from mvkernels.__main__ import COMMANDS, load_command
from mvkernels.cli.options import Fields, Given, with_fields
from mvkernels.model.engine.sampling.config import GenerationConfig
from mvkernels.model.settings import described, option
from mvkernels.model.training.recipe import Recipe
from mvkernels.model.training.tuning_recipe import TuningRecipe


@pytest.mark.parametrize(
    ("command", "kind", "without"),
    [
        ("generate", GenerationConfig, set()),
        ("evaluate", GenerationConfig, {"logprobs", "sequential"}),
        ("train", Recipe, set()),
        ("tune", TuningRecipe, set()),
    ],
)
def test_every_field_is_an_option(command: str, kind: Any, without: set[str]) -> None:
    names = {parameter.name for parameter in load_command(command).params}
    assert {one.name for one in fields(kind)} - names == without


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_has_a_help(command: str) -> None:
    loaded = load_command(command)
    assert loaded.help == COMMANDS[command]
    assert [one.name for one in loaded.params if one.param_type_name == "option" and not one.help] == []


@dataclass(frozen=True)
class Settings:
    name: str = field(metadata=described("Without a default."))
    count: int | None = option(None, "A number.", "--how-many")
    rate: float = option(0.5, "Another.")
    on: bool = option(True, "A switch.")
    words: tuple[str, ...] | None = option(None, "One by one.")
    shares: tuple[float, ...] = option((1.0,), "In one text.", commas=True)
    other: int = option(3, "Of another command.")
    internal: int = 3


def command(*words: str) -> Any:
    """What the command is called with, or the result of a call that failed."""
    seen = []

    def run(
        first: Annotated[str, typer.Argument()],
        given: Annotated[Given, Fields(Settings, ("other",), {"rate": "the file's"})],
        last: Annotated[bool, typer.Option("--last")] = False,
    ) -> None:
        seen.append((first, given, last))

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(with_fields(run))
    result = CliRunner().invoke(app, words)
    return seen[0] if seen else result


def test_what_is_given_has_the_types_of_the_fields() -> None:
    words = ["--name", "n", "--how-many", "0", "--rate", "0", "--no-on", "--shares", "0.5,1", "--last"]
    given = {"name": "n", "count": 0, "rate": 0.0, "on": False, "words": ["a,b", "c"], "shares": (0.5, 1.0)}
    assert command("x", *words, "--words", "a,b", "--words", "c") == ("x", given, True)
    assert type(command("x", "--rate", "1")[1]["rate"]) is float
    Settings(**given)


def test_what_is_not_given_is_left_to_the_dataclass() -> None:
    assert command("x") == ("x", {}, False)
    assert command("x", "--on") == ("x", {"on": True}, False)


@pytest.mark.parametrize(
    "words", [["--other", "1"], ["--internal", "1"], ["--count", "1"], ["--rate", "x"], ["--shares", "1,x"]]
)
def test_what_is_no_option_or_no_value(words: list[str]) -> None:
    result = command("x", *words)
    assert result.exit_code == 2 and words[0] in result.stderr


def test_the_help_has_the_defaults() -> None:
    shown = " ".join(command("--help").output.split())
    assert "--how-many" in shown and "A number. --rate" in shown and "--on / --no-on A switch." in shown
    for default in ("the file's", "on", "1.0"):
        assert f"[default: ({default})]" in shown
