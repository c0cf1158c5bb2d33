"""Answers already paid for, in one SQLite file: a rewriting run that was killed asks for nothing twice."""

import json
import sqlite3
from pathlib import Path
from typing import NamedTuple

from trinity.base.durable import refusing_disk, sha256_text
from trinity.base.errors import DataError


class Sampling(NamedTuple):
    temperature: float
    top_p: float
    max_tokens: int


class Answer(NamedTuple):
    text: str
    cut_off: bool  # the endpoint stopped at max_tokens
    prompt_tokens: int  # as the endpoint counts them; 0 where it does not say
    completion_tokens: int


def request_key(style: str, version: str, model: str, sampling: Sampling, text: str) -> str:
    """Everything an answer depends on, as one sha256. Where the model is reached, and with which key, is not part."""
    return sha256_text(json.dumps([style, version, model, *sampling, text], ensure_ascii=True))


class AnswerCache:
    """Used from one thread. An answer is durable when `put` returns (write-ahead log, synced at each commit)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with refusing_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._base = sqlite3.connect(path, timeout=30)
                self._base.execute("PRAGMA journal_mode=WAL")
                self._base.execute("PRAGMA synchronous=FULL")
                self._base.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, cut_off INTEGER NOT"
                    " NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL) WITHOUT ROWID"
                )
            except sqlite3.Error as error:
                raise DataError(
                    f"{path} cannot be used as an answer cache: {error}.", "Move it away, or choose another --out."
                ) from error

    def get(self, key: str) -> Answer | None:
        row = self._base.execute(
            "SELECT text, cut_off, prompt_tokens, completion_tokens FROM answers WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else Answer(row[0], bool(row[1]), row[2], row[3])

    def put(self, key: str, answer: Answer) -> None:
        try:
            with self._base:
                self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", (key, *answer))
        except sqlite3.Error as error:
            raise DataError(
                f"The answer cache {self.path} refused a write: {error}.",
                "Answers cached before are safe. Free some space and run the same command again.",
            ) from error

    def close(self) -> None:
        self._base.close()
