"""One writer at a time on SQLite, in the order in which they came.

SQLite lets one connection write at a time; the others ask again and again, with longer and longer
pauses, so that the lock lies idle while they sleep, and the unlucky ones run out of patience.
Within a process that can be done better. Other processes are still waited for in SQLite's way, for
what is left of the patience.
"""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from .gate import Gate
from .state import Lease, generation, translate_driver_errors

#: Seconds of a wait that count: for fewer SQLite isn't told.
_NOTICED = 0.02

_AT_EASE: AbstractContextManager[None] = nullcontext()


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
        #: What wakes those who wait, and for which connections they do.
        self._waiting: dict[threading.Event, Any] = {}
        self._generation = generation()

    def enter(self, patience: float | None = None, *, conn: Any = None) -> tuple[Gate, float]:
        """Wait for one's turn.

        Args:
            patience: seconds to wait; by default that of all.
            conn: the connection, by which `interrupt()` ends the wait.

        Returns a gate, of which the caller owes one `release()`, and for how many seconds it has
        waited.

        Raises:
            sqlite3.OperationalError: "database is locked" or "interrupted", as SQLite says it.
        """
        if self._generation != generation():  # after a fork, whoever had the turn isn't here
            self._begin_anew()
        gate = self._gate
        if gate.acquire_nowait():
            return gate, 0.0
        begun, woken = time.monotonic(), threading.Event()
        self._waiting[woken] = conn
        try:
            entered = gate.acquire_blocking(self.patience if patience is None else patience, woken)
        finally:
            interrupted = self._waiting.pop(woken, woken) is woken
        if interrupted:
            if entered:  # just then
                gate.release()
            raise _error("interrupted", "SQLITE_INTERRUPT")
        if not entered:
            raise _error("database is locked", "SQLITE_BUSY")
        return gate, time.monotonic() - begun

    def interrupt(self, conn: Any) -> None:
        """End the wait for this connection, if there is one."""
        for woken, waiting in list(self._waiting.items()):
            if waiting is conn:
                self._waiting.pop(woken, None)
                woken.set()


def _error(text: str, name: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = getattr(sqlite3, name)
    error.sqlite_errorname = name
    return error


def rest_of_patience(lease: Lease | None, waited: float) -> AbstractContextManager[None]:
    """`with rest_of_patience(lease, waited):` around what takes SQLite's lock after so many seconds
    of waiting for the turn: for another process's writer it waits so much less.
    """
    return _AT_EASE if lease is None or waited < _NOTICED else _hurried(lease, waited)


@contextmanager
def _hurried(lease: Lease, waited: float) -> Iterator[None]:
    conn = lease.root.held.conn
    with translate_driver_errors:
        usual = _busy_timeout(conn)
    try:
        with translate_driver_errors:  # interrupted, it may have been done
            _busy_timeout(conn, f"= {max(usual - round(1000 * waited), 0)}")
        yield
    finally:
        try:
            _busy_timeout(conn, f"= {usual}")
        except sqlite3.Error:  # interrupted, with a cursor half read: it is closed afterwards
            lease.root.tainted = True


def _busy_timeout(conn: Any, change: str = "") -> int:
    cursor = conn.cursor()
    cursor.row_factory = None  # the caller's
    milliseconds: int = cursor.execute(f"PRAGMA busy_timeout {change}").fetchone()[0]
    cursor.close()
    return milliseconds
