"""One writer at a time on SQLite, in the order in which they came.

SQLite lets one connection write at a time; the others ask again and again, with longer and longer
pauses, so that the lock lies idle while they sleep, and the unlucky ones run out of patience.
Within a process that can be done better. Other processes are still waited for in SQLite's way.
"""

import sqlite3

from .gate import Gate
from .state import generation


class Writers:
    """The queue of one database's writers.

    Args:
        patience: seconds to wait for one's turn.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._gate = Gate(1)
        self._generation = generation()

    def enter(self, patience: float | None = None) -> Gate:
        """Wait for one's turn. The caller owes one `release()` of the gate that is returned.

        Args:
            patience: seconds to wait; by default that of all.

        Raises:
            sqlite3.OperationalError: "database is locked", as SQLite says it.
        """
        if self._generation != generation():  # after a fork, whoever had the turn isn't here
            self._begin_anew()
        gate = self._gate
        if not gate.acquire_blocking(self.patience if patience is None else patience):
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            error.sqlite_errorname = "SQLITE_BUSY"
            raise error
        return gate
