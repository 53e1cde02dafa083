"""Public docstrings are in Google style and list what the signature has: editors and the API reference show them."""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import inspect
import re
from functools import cached_property

import pytest

import mvkernels.errors
from mvkernels.model.engine.output import events

PACKAGES = ("mvkernels", "mvkernels.model")
#: Types that public methods take or return, and functions that the documentation names with their module.
OTHERS = (
    "mvkernels.model.checkpoint.add_tags.add_tags",
    "mvkernels.model.checkpoint.loading.load_checkpoint",
    "mvkernels.model.checkpoint.loading.load_model",
    "mvkernels.model.checkpoint.loading.load_tokenizer",
    *(f"mvkernels.model.engine.output.events.{name}" for name in events.__all__ if name not in ("Event", "Generation")),
    "mvkernels.model.training.recipe.Recipe",
    "mvkernels.model.training.tuning.read_data",
    "mvkernels.model.training.tuning.tune",
    "mvkernels.model.training.tuning_recipe.TuningRecipe",
    "mvkernels.cache.step.Branch",
    "mvkernels.cache.step.Step",
    "mvkernels.context_parallel.ContextSplit",
    "mvkernels.context_parallel.split_context",
    "mvkernels.decode.decode_path",
    "mvkernels.decoder.choose.make_decoder",
    "mvkernels.decoder.decoder.Decoder",
    "mvkernels.grammar.Block",
    "mvkernels.grammar.Path",
    "mvkernels.grammar.Trace",
    "mvkernels.grammar.parse",
    "mvkernels.grammar.parse_text",
    "mvkernels.mask.IntervalMask",
    "mvkernels.reference.attention.attention",
    "mvkernels.reference.decode.ReferenceBranch",
    "mvkernels.reference.decode.attend",
    "mvkernels.reference.layout.tree_mask",
    "mvkernels.reference.layout.tree_positions",
    "mvkernels.reference.merge.merge",
    "mvkernels.reference.rope.rotate",
)
#: Sections of Google style -> whether their lines are entries, `name: text`.
SECTIONS = {"Args": True, "Attributes": True, "Raises": True, "Returns": False, "Yields": False, "Example": False}
HEADING = re.compile(r"([A-Z]\w*(?: [A-Z]\w*)*):")
ENTRY = re.compile(r" {4}\*{0,2}(\w+)(?: \([^)]*\))?: \S")


def public_names() -> list[str]:
    names = [f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__]
    return [*(name for name in names if name != "mvkernels.errors"), *OTHERS]


def members(owner: type) -> dict[str, object]:
    """A class's public methods and properties, with those that it inherits inside the package."""
    found = {}
    for kind in reversed(owner.__mro__):
        if kind.__module__.startswith("mvkernels."):
            found |= {name: getattr(member, "__func__", member) for name, member in vars(kind).items()}
    documented = (property, cached_property)
    public = {name: member for name, member in found.items() if not name.startswith("_")}
    return {name: m for name, m in public.items() if isinstance(m, documented) or inspect.isfunction(m)}


def sections(text: str) -> dict[str, list[str]]:
    """Section -> names of its entries, or its lines."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if heading := HEADING.fullmatch(line):
            assert heading[1] in SECTIONS, f"{heading[1]!r} is no section of Google style"
            lines = found[heading[1]] = []
        elif line and not line.startswith(" "):
            lines = []  # text behind a section
        elif line:
            lines.append(line)
    for name in found:
        assert found[name], f"section {name!r} is empty"
        if SECTIONS[name]:
            matches = [(line, ENTRY.match(line)) for line in found[name] if not line.startswith(" " * 5)]
            assert all(match for _, match in matches), f"{name}: expected `name: text`, got {matches}"
            found[name] = [match[1] for _, match in matches]
    return found


def parameters(value: object) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]


def check(value: object) -> None:
    text = inspect.cleandoc(value.__doc__ or "")
    summary, _, rest = text.partition("\n")
    assert summary.endswith(".") and not rest.partition("\n")[0], f"expected a summary of one line, got {summary!r}"
    found = sections(text)
    for name in found.get("Raises", ()):
        error = getattr(mvkernels.errors, name, None) or getattr(builtins, name, None)
        assert isinstance(error, type) and issubclass(error, Exception), f"Raises: {name} is no exception"
    if isinstance(value, (property, cached_property)):
        return
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        listed = [name for name in found.get("Attributes", ()) if name not in members(value)]
        assert listed == fields, f"Attributes: expected {fields}, got {listed}"
    elif not isinstance(value, type) or "__init__" in vars(value):
        expected, listed = parameters(value), found.get("Args", [])
        assert listed == expected, f"Args: expected {expected}, got {listed}"
    if inspect.isfunction(value):
        assert not re.match(r"\w+[^\Ws]s\b", summary), f"expected a summary in the imperative, got {summary!r}"
        returned = inspect.signature(value).return_annotation != "None"
        assert bool({"Returns", "Yields"} & found.keys()) == returned, "expected Returns or Yields" + " not" * (
            not returned
        )


@pytest.mark.parametrize("name", public_names())
def test_public_docstrings(name):
    """Fails for a parameter that was added, renamed or removed without its documentation."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    wrong = []
    for member, part in {"": value, **(members(value) if isinstance(value, type) else {})}.items():
        try:
            check(part)
        except AssertionError as error:
            wrong.append(f"{member}: {str(error).splitlines()[0]}" if member else str(error).splitlines()[0])
    assert not wrong, "\n".join(wrong)
