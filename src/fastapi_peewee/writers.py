"""One writer at a time on SQLite, in the order in which they came.

SQLite lets one connection write at a time; the others ask again and again, with longer and longer
pauses, so that the lock lies idle while they sleep, and the unlucky ones run out of patience.
Within a process that can be done better. Other processes are still waited for in SQLite's way.
"""

import sqlite3
from collections.abc import Iterator
from typing import Any

from .gate import Gate
from .state import generation


class Writers:
    """The queue of one database's writers.

    Args:
        patience: seconds to wait for one's turn.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._gate = Gate(1)
        self._generation = generation()

    def enter(self) -> Gate:
        """Wait for one's turn. The caller owes one `release()` of the gate that is returned.

        Raises:
            sqlite3.OperationalError: "database is locked", as SQLite says it.
        """
        if self._generation != generation():  # after a fork, whoever had the turn isn't here
            self._begin_anew()
        gate = self._gate
        if not gate.acquire_blocking(self._patience):
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            error.sqlite_errorname = "SQLITE_BUSY"
            raise error
        return gate


class Returned:
    """The rows of a statement that has written, read to the end: only then it is committed."""

    def __init__(self, cursor: Any) -> None:
        self._rows = iter(cursor.fetchall())
        self.description = cursor.description
        self.lastrowid = cursor.lastrowid
        self.rowcount = cursor.rowcount
        self.connection = cursor.connection

    def __iter__(self) -> Iterator[Any]:
        return self._rows

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)

    def fetchmany(self, size: int = 1) -> list[Any]:
        return [row for _, row in zip(range(size), self._rows, strict=False)]

    def close(self) -> None:
        self._rows = iter(())
