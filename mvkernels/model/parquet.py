"""Rows of Parquet files, a batch at a time, with one line for what cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvkernels._lazy import import_for

_BATCH = 64


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Raises ValueError for what is none or cut, ImportError without pyarrow."""
    arrow: Any = import_for("a Parquet file", "pyarrow")
    parquet: Any = import_for("a Parquet file", "pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as table:
            yield table
    except arrow.ArrowException as error:
        raise ValueError(f"expected a Parquet file, got something else: {path}: {error}") from None


def parquet_rows(table: Any, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of an open file, all columns or these."""
    for batch in table.iter_batches(batch_size=_BATCH, columns=None if columns is None else [*columns]):
        yield from batch.to_pylist()
