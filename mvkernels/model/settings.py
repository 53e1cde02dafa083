"""Fields of dataclasses that are options of the command line: each is described beside its type and its default."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, name: str = "", *, commas: bool = False) -> Any:
    """Make a field that is an option of the command line.

    Args:
        default: The field's default.
        help: The line in `--help`.
        name: The option, where it is not the field's name: "--max-tokens".
        commas: A tuple is given as one text, "0.5,1". Otherwise the option is given once for each item.

    Returns:
        The field, with the rest in its metadata; `mvkernels.cli.options` reads it.
    """
    return field(default=default, metadata=described(help, name, commas=commas))


def described(help: str, name: str = "", *, commas: bool = False) -> dict[str, Any]:
    """Return the metadata of a field without a default that is an option; as `option`."""
    return {"help": help, "option": name, "commas": commas}
