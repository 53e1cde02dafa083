"""Options that are made from the fields of a dataclass, and those that several commands share.

A field is spelled once, in its dataclass: type, default, and by `mvkernels.model.settings.option` its help.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

Model = Annotated[
    str, typer.Option(help="Folder of a causal language model, a GGUF file, or embedded: the model of the package.")
]
Traces = Annotated[list[Path], typer.Argument(help="Traces: text files, .jsonl, .parquet, folders of such.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="A tokenizer.json, a folder with one, or embedded: count tokens, not words.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Raw = Annotated[bool, typer.Option("--raw", help="Do not apply the model's chat template.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
#: Field -> value, of the options that were given.
Given = dict[str, Any]


@dataclass(frozen=True)
class Fields:
    """Mark a parameter of a command: `Annotated[Given, Fields(Recipe)]` gets the fields that were given as options.

    Args:
        kind: A dataclass. Its fields with an `option` are options of the command.
        without: Fields that are not.
        defaults: Field -> what `--help` says of its default, where that is the command's own. None: says nothing of
            defaults.
    """

    kind: Any
    without: tuple[str, ...] = ()
    defaults: Mapping[str, str] | None = field(default_factory=dict)

    def parameters(self) -> list[inspect.Parameter]:
        """The options, as parameters that typer reads. An option that is not given is None."""
        hints = get_type_hints(self.kind)
        chosen = [one for one in fields(self.kind) if "help" in one.metadata and one.name not in self.without]
        return [self._parameter(one, hints[one.name]) for one in chosen]

    def _parameter(self, one: Field[Any], hint: Any) -> inspect.Parameter:
        optional = type(None) in get_args(hint)
        kind: Any = get_args(hint)[0] if optional else hint
        more: dict[str, Any] = {}
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            kind = str if one.metadata["commas"] else list[item]  # type: ignore[valid-type]
            if one.metadata["commas"]:
                more = {"parser": _comma_list(item), "metavar": f"{one.name.upper()},..."}
        shown = None if self.defaults is None else self.defaults.get(one.name, _shown_default(one))
        names = filter(None, [one.metadata["option"]])
        made = typer.Option(*names, help=one.metadata["help"], show_default=shown or False, **more)
        annotation = Annotated[kind | None, made]
        return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_fields(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the dataclasses that its parameters are marked with.

    Args:
        function: The command. A parameter marked with `Fields` stands for all options of that dataclass.

    Returns:
        A function of options alone, for typer.
    """
    groups: dict[str, list[str]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        marks = [one for one in getattr(parameter.annotation, "__metadata__", ()) if isinstance(one, Fields)]
        made = [option for mark in marks for option in mark.parameters()]
        if marks:
            groups[parameter.name] = [option.name for option in made]
        parameters += made if marks else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    def called(**values: Any) -> None:
        for name, options in groups.items():
            found = {option: values.pop(option) for option in options}
            values[name] = {option: value for option, value in found.items() if value is not None and value != []}
        function(**values)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _comma_list(item: type) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(item(part) for part in text.split(","))


def _shown_default(one: Field[Any]) -> str:
    value = one.default
    if value is MISSING or value is None:
        return ""
    if isinstance(value, bool):
        return one.name.replace("_", "-") if value else ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
