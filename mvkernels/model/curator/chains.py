"""The chains to curate, read one at a time from JSONL, a JSON list or Parquet, so that memory stays flat.

The names of the columns are given, or found among those that published sets use (s1K-1.1 and its like).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvkernels.model.json_input import parse_json, shown
from mvkernels.model.parquet import open_parquet, parquet_rows
from mvkernels.model.settings import option

#: Names that are looked for, in this order, where none is given.
KNOWN_COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("question", "problem", "prompt", "input", "instruction"),
    "chain": (
        "chain", "deepseek_thinking_trajectory", "thinking_trajectories", "thinking_trajectory", "thinking_process",
        "chain_of_thought", "reasoning", "thinking", "original", "response", "generation",
    ),
    "answer": ("answer", "solution", "final_answer", "expected_answer"),
}  # fmt: skip
SUFFIXES = (".jsonl", ".json", ".parquet")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Chain:
    """One chain of thought. id: a hash of question and chain, with a running number for repeats.

    problem: why it cannot be curated at all, where the record is no chain.
    """

    id: str
    question: str
    text: str
    answer: str
    problem: str = ""


@dataclass(frozen=True)
class NoRecord:
    """What stands in a file where a record should: its text, and what is wrong with it."""

    text: str
    problem: str


@dataclass(frozen=True)
class Columns:
    """The names of the columns; None: whichever known name the first record has."""

    question: str | None = option(None, "Default: a known name, such as question.", "--question-column")
    chain: str | None = option(None, "Default: a known name, as in s1K-1.1.", "--chain-column")
    answer: str | None = option(None, "Default: a known name, such as solution.", "--answer-column")

    def found_in(self, record: Mapping[str, Any]) -> Columns:
        """The same with every name looked up. Raises ValueError where one that is needed is missing."""
        names: dict[str, str | None] = {}
        for role, known in KNOWN_COLUMNS.items():
            given = getattr(self, role)
            if given is not None and given not in record:
                raise ValueError(f"--{role}-column: expected one of {', '.join(record)}, got {given!r}")
            names[role] = given or next((name for name in known if name in record), None)
        if names["chain"] is None:
            raise ValueError(
                f"input: expected a column with chains ({', '.join(KNOWN_COLUMNS['chain'])}, or --chain-column NAME), "
                f"got {', '.join(record) or 'none'}"
            )
        return Columns(**names)


@dataclass
class ChainReader:
    """Iterates over the chains of a file; `columns` are the names in use, once the first record has been read."""

    path: Path
    columns: Columns = field(default_factory=Columns)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.path.suffix not in SUFFIXES or not self.path.is_file():
            missing = "" if self.path.exists() else ", which does not exist"
            kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
            raise ValueError(f"input: expected a {kinds} file, got {self.path}{missing}")

    def __iter__(self) -> Iterator[Chain]:
        """Raises ValueError for a file that is none of the formats; a bad record is a Chain with a problem."""
        seen: Counter[str] = Counter()
        columns: Columns | None = None
        for number, record in enumerate(_records(self.path)):
            if self.limit is not None and number >= self.limit:
                return
            if isinstance(record, Mapping):
                if columns is None:
                    columns = self.columns = self.columns.found_in(record)
                question, text, answer, problem = _texts(record, columns)
            else:
                question, text, answer, problem = "", record.text, "", record.problem
            identity = hashlib.sha256(f"{question}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()[:20]
            seen[identity] += 1
            repeat = f"-{seen[identity]}" if seen[identity] > 1 else ""
            yield Chain(identity + repeat, question, text, answer, problem)
        if columns is None and not seen:
            raise ValueError(f"input: expected at least one chain, got none in {self.path}")

    def count(self) -> int:
        """How many records there are; reads the file through once, but for Parquet."""
        if self.path.suffix == ".parquet":
            with open_parquet(self.path) as table:
                total = int(table.metadata.num_rows)
        elif self.path.suffix == ".jsonl":
            with self.path.open("rb") as lines:
                total = sum(1 for line in lines if line.strip())
        else:
            total = sum(1 for _ in _list_items(self.path))
        return total if self.limit is None else min(total, self.limit)


def _texts(record: Mapping[str, Any], columns: Columns) -> tuple[str, str, str, str]:
    """question, chain, answer, and what is wrong with them."""
    problems = []
    texts = {}
    for role in KNOWN_COLUMNS:
        name = getattr(columns, role)
        value = record.get(name) if name else None
        if isinstance(value, list) and value and role == "chain":
            value = value[0]  # several samples of the same question, as in s1K: the first
        if value is not None and not isinstance(value, str):
            problems.append(f"{name}: expected a text, got {type(value).__name__}")
            value = json.dumps(value, default=str)
        texts[role] = value or ""
    chain, behind = _inside_think(texts["chain"])
    return texts["question"], chain, texts["answer"] or behind, "; ".join(problems)


def _inside_think(text: str) -> tuple[str, str]:
    """What stands between `<think>` and `</think>`, and what behind; a text that does not begin so is left alone."""
    stripped = text.lstrip()
    if not stripped.startswith("<think>"):
        return text, ""
    chain, closing, behind = stripped.removeprefix("<think>").partition("</think>")
    return chain, behind.strip() if closing else ""


def _records(path: Path) -> Iterator[Mapping[str, Any] | NoRecord]:
    """The records of the file, and in its place what is none."""
    if path.suffix == ".parquet":
        with open_parquet(path) as table:
            yield from parquet_rows(table)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    yield _record(line.strip())
    else:
        yield from map(_record, _list_items(path))


def _record(text: str) -> Mapping[str, Any] | NoRecord:
    try:
        record = parse_json(text, strict=False)
    except ValueError as error:
        clean = text.encode("utf-8", "replace").decode("utf-8")
        return NoRecord(clean, f"expected a JSON object, got something else: {error}")
    return record if isinstance(record, dict) else NoRecord(text, f"expected a JSON object, got {shown(record)}")


def _list_items(path: Path) -> Iterator[str]:
    """The texts of the items of a JSON list, without the list in memory.

    Raises ValueError where the file is no list, or an item is too deep for Python's reader.
    """
    decoder = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)
    items = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        buffer = file.read(_CHUNK).lstrip()
        if not buffer.startswith("["):
            raise ValueError(f"input: expected a JSON list in {path}, got something else; for lines of JSON use .jsonl")
        at, size = 1, _CHUNK
        while True:
            at = _skip(buffer, at)
            if at < len(buffer) and buffer[at] == "]":
                return
            try:
                _, end = decoder.raw_decode(buffer, at)
                complete = _skip(buffer, end) < len(buffer)  # a number at the end of the buffer may go on
            except json.JSONDecodeError:
                complete = False
            except RecursionError:
                raise ValueError(f"input: expected JSON, got item {items + 1} of {path} nested too deep") from None
            if complete:
                yield buffer[at:end]
                items += 1
                at, size = end, _CHUNK
                continue
            more = file.read(size)
            if not more:
                raise ValueError(f"input: expected a JSON list in {path}, got one that is cut or malformed")
            size *= 2  # so that one large item is not decoded again and again for small pieces
            buffer, at = buffer[at:] + more, 0


def _skip(text: str, at: int) -> int:
    """Behind whitespace and a comma."""
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at
