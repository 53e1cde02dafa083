"""Traces from files: one in a text file, or one a line of JSONL or a row of Parquet; read one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mvkernels.model.curator.outputs import TRACES
from mvkernels.model.json_input import parse_json
from mvkernels.model.parquet import open_parquet, parquet_rows

#: What a folder is searched for; a file that is named itself may have any name.
SUFFIXES = (".xml", ".txt", ".jsonl", ".parquet")
#: The columns that a trace may stand in, the first that is there, and the chain that it was made of.
TRACE_COLUMNS = ("trace", "text")
ORIGINAL_COLUMN = "original"


@dataclass(frozen=True)
class StoredTrace:
    """file: as it was named or found. record: number of its line or row, from 1; None where the file is one trace.

    text: the trace, and original the chain that it was made of, both None where `error` says why there is none.
    """

    file: Path
    record: int | None
    text: str | None
    original: str | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        return str(self.file) if self.record is None else f"{self.file}:{self.record}"


def trace_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder that may hold traces, sorted. Raises ValueError where there is none.

    Of a folder that `curate` wrote, `traces.jsonl` alone: its other files hold the same traces, or chains without one.
    """
    if path.is_dir():
        if (path / TRACES).is_file():
            return [path / TRACES]
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise ValueError(f"expected a folder with {', '.join(SUFFIXES)} files, found none in {path}")
        return found
    if not path.is_file():
        raise ValueError(f"expected a file with traces or a folder of such, found nothing at {path}")
    return [path]


def read_traces(paths: Iterable[Path]) -> Iterator[StoredTrace]:
    """The traces of files and folders, in order; where a line or row holds none, its error stands in its place.

    JSONL and Parquet hold a trace in the column `trace` or `text`, and may hold its original chain in `original`; any
    other file is one trace. Raises ValueError for a path without files, for a file without a trace or line, that is no
    UTF-8 or no Parquet, and for Parquet without such a column; ImportError for Parquet without pyarrow. One line or
    batch of rows in memory.
    """
    for path in paths:
        for file in trace_files(path):
            stored = None
            for stored in _stored(file):
                yield stored
            if stored is None:
                raise ValueError(f"expected at least one trace, got none in {file}")


def _stored(file: Path) -> Iterator[StoredTrace]:
    if file.suffix == ".jsonl":
        yield from _jsonl(file)
    elif file.suffix == ".parquet":
        yield from _parquet(file)
    elif (text := _decoded(file.read_bytes(), str(file))).strip():
        yield StoredTrace(file, None, text)


def _decoded(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got other bytes at offset {error.start} of {name}") from None
    if "\0" in text:
        raise ValueError(f"expected UTF-8 text, got a binary file: {name}")
    return text


def _jsonl(file: Path) -> Iterator[StoredTrace]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            text = _decoded(line, f"line {number} of {file}")
            try:
                record = parse_json(text, strict=False)
            except ValueError as error:
                yield StoredTrace(file, number, None, error=f"expected a JSON object, got something else: {error}")
                continue
            if not isinstance(record, dict):
                yield StoredTrace(file, number, None, error=f"expected a JSON object, got {type(record).__name__}")
                continue
            column = next((name for name in TRACE_COLUMNS if name in record), None)
            if column is None:
                yield StoredTrace(file, number, None, error='expected a trace in "trace" or "text", got neither')
                continue
            yield _record(file, number, record[column], record.get(ORIGINAL_COLUMN))


def _parquet(file: Path) -> Iterator[StoredTrace]:
    with open_parquet(file) as table:
        names = table.schema_arrow.names
        column = next((name for name in TRACE_COLUMNS if name in names), None)
        if column is None:
            raise ValueError(f'expected a column "trace" or "text", got {", ".join(names)} in {file}')
        wanted = [name for name in (column, ORIGINAL_COLUMN) if name in names]
        for number, row in enumerate(parquet_rows(table, wanted), start=1):
            yield _record(file, number, row[column], row.get(ORIGINAL_COLUMN))


def _record(file: Path, number: int, text: object, original: object) -> StoredTrace:
    if not isinstance(text, str) or not text.strip():
        found = "an empty one" if isinstance(text, str) else type(text).__name__
        return StoredTrace(file, number, None, error=f"expected a trace, got {found}")
    return StoredTrace(file, number, text, original if isinstance(original, str) else None)
