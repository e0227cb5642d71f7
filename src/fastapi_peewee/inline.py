"""Reads of SQLite on the event loop itself, for a moment at most.

A read that takes 20 µs takes three times as long by way of a thread. What SQLite can't answer at
once is stopped, and read in a thread like everything else. Only for statements that were compiled
from a query: they have no effects, and can be run again.
"""

import sqlite3
import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from .drivers import Returned
from .state import generation

#: After how many of SQLite's instructions the clock is looked at: every few microseconds.
_INSTRUCTIONS = 500
#: How many times a statement that takes too long each time it is tried goes to a thread in between,
#: in the end. In the beginning it is once: the machine may have been busy with something else.
_AVOIDED = 100
#: How many such statements are remembered.
_REMEMBERED = 1000


class _Avoided:
    """A statement that took too long.

    Attributes:
        left: how many times it goes to a thread before it is tried here again.
    """

    __slots__ = ("left", "times")

    def __init__(self) -> None:
        self.left = self.times = 0

    def again(self) -> None:
        self.left = self.times = min(2 * self.times or 1, _AVOIDED)


class InlineReader:
    """One connection that only reads, and waits for nothing.

    Args:
        connect: opens a connection; called in a thread.
        limit: seconds that a read may take here.
        clock: seconds.
    """

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        limit: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._connect = connect
        self._limit = limit
        self._clock = clock
        self._deadline = 0.0
        self._avoided: dict[str, _Avoided] = {}
        self._start()

    def _start(self) -> None:
        self._conn: sqlite3.Connection | None = None
        self._lock = Lock()  # several event loops may share a database
        self._generation = generation()

    @property
    def ready(self) -> bool:
        """Whether `open()` has been called, in this process."""
        if self._generation != generation():
            _inherited.append(self._conn)  # closing it would release the parent's locks
            self._start()
        return self._conn is not None

    def open(self) -> None:
        """Open the connection. It may block: call it in a thread."""
        conn = self._connect()
        conn.execute("PRAGMA busy_timeout = 0")
        conn.execute("PRAGMA query_only = 1")
        conn.set_progress_handler(self._is_late, _INSTRUCTIONS)
        with self._lock:
            if self._conn is None:
                self._conn = conn
                return
        conn.close()  # another one was faster

    def close(self, *, wait: bool = True) -> None:
        """Close the connection, if it is open; `open()` opens another one.

        Without `wait`, only if nobody uses it.
        """
        if self.ready and self._lock.acquire(blocking=wait):
            conn, self._conn = self._conn, None
            self._lock.release()
            if conn is not None:
                conn.close()

    def read(self, sql: str, params: Sequence[Any]) -> Returned | None:
        """All rows; None if there is an error or it takes too long: then read in a thread."""
        avoided = self._avoided.get(sql)
        if avoided is not None and avoided.left:
            avoided.left -= 1
            return None
        if not self._lock.acquire(blocking=False):
            return None
        try:
            conn = self._conn
            if conn is None:
                return None
            self._deadline = self._clock() + self._limit
            # Its errors are looked at here: they are to be the driver's.
            rows = Returned(conn.cursor(sqlite3.Cursor).execute(sql, params))
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                if len(self._avoided) >= _REMEMBERED:
                    self._avoided.clear()
                self._avoided.setdefault(sql, _Avoided()).again()
            return None
        else:
            if avoided is not None:
                self._avoided.pop(sql, None)
            return rows
        finally:
            self._lock.release()

    def _is_late(self) -> bool:
        return self._clock() > self._deadline


_inherited: list[Any] = []
