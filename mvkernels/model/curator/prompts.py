"""The prompts: text files beside this module. Their version is a hash of their text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "prompts"
STAGES = ("summary", "groups", "structure", "refill", "mapreduce")
_PLAIN, _JSON = "=== plain ===\n", "=== json ===\n"


@dataclass(frozen=True)
class Form:
    """The form of an answer. plain, structured: how it is described, without and with a JSON schema at the endpoint."""

    name: str
    schema: dict[str, Any]
    plain: str
    structured: str

    def response_format(self) -> dict[str, Any]:
        """As the chat completions protocol has it."""
        return {"type": "json_schema", "json_schema": {"name": self.name, "strict": True, "schema": self.schema}}


@cache
def read_prompt(name: str) -> str:
    """The text of a prompt, as it is in the file."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def render(name: str, **values: object) -> str:
    """A prompt without the description of the answer's form; `{{name}}` stands for a value."""
    parts = read_prompt(name).partition(_PLAIN)[0].rstrip("\n").split("{{")
    text = [parts[0]]
    for part in parts[1:]:
        key, _, rest = part.partition("}}")
        text += [str(values[key]), rest]
    return "".join(text)


@cache
def form_of(stage: str) -> Form:
    """The form of the answers of a stage."""
    plain, _, structured = read_prompt(stage).partition(_PLAIN)[2].partition(_JSON)
    return Form(stage, SCHEMAS[stage], plain.strip(), structured.strip())


def prompts_version() -> str:
    """Twelve hex digits that change with any word of any prompt."""
    digest = hashlib.sha256()
    for name in sorted(path.stem for path in FOLDER.glob("*.txt")):
        digest.update(f"{name}\0{read_prompt(name)}\0".encode())
    return digest.hexdigest()[:12]


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "summary": _object(steps=_list(_object(id=_TEXT, text=_TEXT))),
    "groups": _object(
        needs=_list(_object(step=_TEXT, uses=_list(_TEXT))),
        groups=_list(_object(paths=_list(_list(_TEXT)), reason=_TEXT)),
    ),
    "structure": _object(lines=_list(_TEXT)),
    "refill": _object(ranges=_list(_object(step=_TEXT, first=_NUMBER, last=_NUMBER))),
    "mapreduce": _object(outlines=_list(_TEXT), edits=_list(_object(sentence=_NUMBER, text=_TEXT)), conclusion=_TEXT),
}
