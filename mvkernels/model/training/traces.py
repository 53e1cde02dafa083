"""Training examples from files: a prompt and a trace, as token ids of a Multiverse or a sequential document.

JSONL: an object a line, with a trace in "trace" or "text", its question in "prompt" or "question" (may be missing), and
in "sequential" or "original" the original chain of thought, where there is one. Parquet: the same as columns. An .xml
file is one trace without a question. A trace whose question is missing is asked for by the ending of the prompt alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mvkernels as mk
from mvkernels.grammar import TAG_PATTERN, parse_text
from mvkernels.model.engine.prompts import chat_text
from mvkernels.model.json_input import parse_json
from mvkernels.model.parquet import open_parquet, parquet_rows
from mvkernels.model.sequentialize import sequentialize
from mvkernels.model.training.tuning_recipe import TuningRecipe, data_files

if TYPE_CHECKING:  # a command checks its recipe with this module before it imports what takes long
    import numpy as np
    import numpy.typing as npt

_FIELDS = {"prompt": ("prompt", "question"), "trace": ("trace", "text"), "sequential": ("sequential", "original")}


@dataclass(frozen=True)
class Example:
    """name: file, with the line in a JSONL file. prompt: may be empty. sequential: empty where there is no other."""

    name: str
    prompt: str
    trace: str
    sequential: str


@dataclass(frozen=True)
class Document:
    """One example as it is trained on: 4 bytes a token, whatever its layout holds.

    Attributes:
        name: The example's.
        ids: Token ids, [T] int32.
        prompt_length: Leading tokens without a label.
        cut: Whether the end of the trace is missing.
        labelled: Number of tokens with a label.
    """

    name: str
    ids: npt.NDArray[np.int32]
    prompt_length: int
    cut: bool
    labelled: int
    _encoder: Encoder = field(repr=False)

    def layout(self) -> mk.BranchLayout:
        """Make the layout of the tokens. Rows are packed from layouts that live no longer than the row."""
        recipe, tags = self._encoder.recipe, self._encoder.tags
        return mk.BranchLayout.from_token_ids(self.ids, tags, recipe.semantics, self.prompt_length, self.cut)


@dataclass(frozen=True)
class EncodedExample:
    """The two ways to write an example."""

    parallel: Document
    sequential: Document


class Encoder:
    """Examples -> documents, as a recipe has it.

    tokenizer: of transformers, with the control tags. Raises ValueError without an end-of-text token.
    """

    def __init__(self, recipe: TuningRecipe, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with an end-of-text token (eos_token), got one without")
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.tags = mk.TagTokens.from_tokenizer(tokenizer)
        self.start = tokenizer.encode("", add_special_tokens=True)  # a begin-of-text token, or nothing

    def __call__(self, example: Example) -> EncodedExample:
        """Raises ValueError (GrammarError) with the example's name where the trace is malformed, empty or too long."""
        try:
            if example.sequential:
                parse_text(example.trace)
            chain = example.sequential or sequentialize(example.trace)  # parses the trace itself
            if TAG_PATTERN.search(chain):
                raise ValueError("sequential: expected a plain chain of thought, got control tags")
            return EncodedExample(
                self._document(example, self.recipe.parallel_ending, example.trace),
                self._document(example, self.recipe.sequential_ending, chain),
            )
        except ValueError as error:
            raise ValueError(f"{example.name}: {error}") from error

    def _document(self, example: Example, ending: str, answer: str) -> Document:
        question = example.prompt + ending if example.prompt else ending.strip()
        if self.recipe.chat and getattr(self.tokenizer, "chat_template", None):
            head = self.tags.encode(chat_text([{"role": "user", "content": question}], self.tokenizer))
        else:
            head = [*self.start, *self.tags.encode(question + "\n")]
        ids = [*head, *self.tags.encode(answer.strip()), self.tokenizer.eos_token_id]
        most = self.recipe.longest_document
        if len(ids) > most and not self.recipe.cut:
            raise ValueError(f"expected a document of at most {most} tokens, got {len(ids)}; cut = true cuts it")
        if len(head) >= min(len(ids) - 1, most):
            raise ValueError(f"expected an answer within {most} tokens, got a prompt of {len(head)} and no answer")
        import numpy as np

        kept = np.array(ids[:most], np.int32)
        document = Document(example.name, kept, len(head), len(ids) > most, 0, self)
        labels = document.layout().labels(ids[:most])  # raises where the tags are malformed
        return replace(document, labelled=int((labels >= 0).sum()))


def encode_all(
    examples: Iterable[Example | ValueError], encoder: Encoder, skip_bad: bool
) -> tuple[list[EncodedExample], list[str]]:
    """The documents of all examples, and why some were skipped. Without `skip_bad` the first bad one is raised.

    Raises ValueError, also where nothing is left.
    """
    good: list[EncodedExample] = []
    bad: list[str] = []
    for example in examples:
        try:
            if isinstance(example, ValueError):
                raise example
            good.append(encoder(example))
        except ValueError as error:
            if not skip_bad:
                raise
            bad.append(str(error))
    if not good:
        raise ValueError(f"data: expected at least one good trace, got none; skipped {len(bad)}")
    return good, bad


def read_examples(paths: Iterable[str | Path]) -> Iterator[Example | ValueError]:
    """The examples of files and folders, in order; a ValueError, not raised, in the place of each bad one.

    Raises ValueError for a path that is none of these (see `data_files`).
    """
    for path in paths:
        for file in data_files(path):
            if file.suffix == ".xml":
                yield _guarded(file, lambda file=file: Example(str(file), "", file.read_text(encoding="utf-8"), ""))
                continue
            if file.suffix == ".parquet":
                for number, record in enumerate(_rows(file), start=1):
                    name = f"{file}:{number}"
                    yield _guarded(name, lambda record=record, name=name: _from_record(name, record))
                continue
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        name = f"{file}:{number}"
                        yield _guarded(name, lambda line=line, name=name: _from_json(name, line))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with open_parquet(file) as table:
        for row in parquet_rows(table):
            yield {name: value for name, value in row.items() if value is not None}


def _guarded(name: Any, make: Any) -> Example | ValueError:
    try:
        example: Example = make()
        return example
    except ValueError as error:
        return ValueError(f"{name}: {error}")


def _from_json(name: str, line: bytes) -> Example:
    try:
        record = parse_json(line, strict=False)
    except ValueError as error:
        raise ValueError(f"expected a JSON object on the line, got something else: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object on the line, got {type(record).__name__}")
    return _from_record(name, record)


def _from_record(name: str, record: dict[str, Any]) -> Example:
    texts = {}
    for what, names in _FIELDS.items():
        value = next((record[key] for key in names if key in record), "")
        if not isinstance(value, str):
            raise ValueError(f"{what}: expected a text, got {type(value).__name__}")
        texts[what] = value
    if not texts["trace"].strip():
        raise ValueError('expected a trace in "trace" or "text", got none')
    return Example(name, texts["prompt"], texts["trace"], texts["sequential"])
