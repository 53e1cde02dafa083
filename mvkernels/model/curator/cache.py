"""Every answer of a model on disk, by a hash of what was asked, so that nothing is paid for twice. SQLite."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from mvkernels.model.curator.asking import Answer

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL, text TEXT NOT NULL, complete INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class AnswerCache:
    """The answers in a file. Every one is committed before it is used: a killed process loses only calls in flight."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where the file is no SQLite database."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"cache: expected an SQLite database in {path}, got something else: {error}") from None

    def get(self, key: str) -> Answer | None:
        row = self._db.execute(
            "SELECT text, complete, prompt_tokens, completion_tokens FROM answers WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else Answer(row[0], bool(row[1]), row[2], row[3])

    def put(self, key: str, stage: str, model: str, answer: Answer) -> None:
        self._db.execute(
            "INSERT OR IGNORE INTO answers (key, stage, model, text, complete, prompt_tokens, completion_tokens) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, stage, model, answer.text, answer.complete, answer.prompt_tokens, answer.completion_tokens),
        )

    def spent(self) -> tuple[int, int, int]:
        """Answers, prompt tokens and completion tokens of all runs."""
        row = self._db.execute(
            "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0) FROM answers"
        ).fetchone()
        return int(row[0]), int(row[1]), int(row[2])

    def fact(self, name: str) -> str | None:
        """What was noted under the name."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def note(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def close(self) -> None:
        self._db.close()


def request_key(request: dict[str, Any]) -> str:
    """A hash of all that a request says."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
