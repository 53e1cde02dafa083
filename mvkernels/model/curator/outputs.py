"""What a run leaves in its folder, so that no chain is lost and none is there twice, however often it was killed.

`traces.jsonl` and `rejected.jsonl` grow line by line, each line by one write. A line that a kill cut off at the end is
taken away when the folder is opened again; its chain is then done again, from the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mvkernels._lazy import import_for
from mvkernels.model.curator.prompts import STAGES
from mvkernels.model.files import errors_name, whole_file, write_whole
from mvkernels.model.json_input import parse_json

TRACES, REJECTED, PARQUET, MANIFEST = "traces.jsonl", "rejected.jsonl", "traces.parquet", "manifest.json"
CACHE = "cache.sqlite"
_BATCH = 256


class OutputFolder:
    """The folder of a run, locked. Raises ValueError where another run has it, or a file in it is damaged.

    again: the chains rejected so far are to be done again; their lines are kept under another name.
    """

    def __init__(self, folder: Path, again: bool = False) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"OUT: expected a folder, got a file: {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(f"OUT: another run works in {folder}") from None
        self.done: set[str] = set()
        self.warned = 0
        self.counts = {TRACES: 0, REJECTED: 0}
        self._files: dict[str, IO[bytes]] = {}
        try:
            if again and (folder / REJECTED).exists():
                (folder / REJECTED).rename(folder / f"rejected-{time.strftime('%Y%m%dT%H%M%S')}.jsonl")
            for name in self.counts:
                repair(folder / name)
                for record in read_lines(folder / name):
                    if record["id"] in self.done:
                        raise ValueError(f"{folder / name}: the chain {record['id']} is there twice")
                    self.done.add(record["id"])
                    self.counts[name] += 1
                    self.warned += bool(record.get("warnings"))
                self._files[name] = (folder / name).open("ab", buffering=0)
        except BaseException:
            self.close()
            raise

    def write(self, good: bool, record: dict[str, Any]) -> None:
        """Appends a chain's line to the traces or to the rejected ones."""
        name = TRACES if good else REJECTED
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        file = self._files[name]
        with errors_name(self.folder / name):
            written = file.write(line)
        if written != len(line):  # the disk is full: the torn line is taken away when the folder is opened again
            raise OSError(f"{self.folder / name}: could not write a line of {len(line)} bytes")
        self.done.add(record["id"])
        self.counts[name] += 1
        self.warned += bool(record.get("warnings"))

    def close(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        self._files = {}
        self._lock.close()


def repair(path: Path) -> None:
    """Cuts a JSONL file behind its last line break."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            begin = max(0, keep - (1 << 16))
            file.seek(begin)
            found = file.read(keep - begin).rfind(b"\n")
            if found >= 0:
                keep = begin + found + 1
                break
            keep = begin
        if keep < end:
            file.truncate(keep)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file that we wrote; none where there is no file. Raises ValueError with the bad line."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = parse_json(line)
                known = isinstance(record, dict) and isinstance(record.get("id"), str)
            except ValueError:
                known = False
            if not known:
                raise ValueError(f"{path}:{number}: expected a JSON object with an id, got something else")
            yield record


def write_parquet(folder: Path) -> Path:
    """`traces.jsonl` as `traces.parquet`, a batch at a time; the columns are the fields of a line."""
    arrow: Any = import_for("a Parquet file", "pyarrow")
    parquet: Any = import_for("a Parquet file", "pyarrow.parquet")
    texts = [(name, arrow.string()) for name in ("id", "question", "answer", "original", "trace")]
    tries = arrow.struct([(stage, arrow.int32()) for stage in STAGES])
    others = [("distance", arrow.float64()), ("tries", tries), ("tokens", arrow.int64())]
    schema = arrow.schema([*texts, *others, ("warnings", arrow.list_(arrow.string()))])
    with whole_file(folder / PARQUET) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        batch: list[dict[str, Any]] = []
        for record in read_lines(folder / TRACES):
            batch.append(record)
            if len(batch) == _BATCH:
                writer.write_table(arrow.Table.from_pylist(batch, schema=schema))
                batch = []
        writer.write_table(arrow.Table.from_pylist(batch, schema=schema))
    return folder / PARQUET


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the runs before; empty where there is none. Raises ValueError for what is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected the manifest of a run, got something else: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: expected the manifest of a run, got something else")
    return manifest


def hash_of(path: Path) -> str:
    """SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
