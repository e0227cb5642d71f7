"""What the classes of the databases share: isolation levels, sockets, the driver's error, rows."""

import math
import os
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from .exceptions import TransactionAborted, driver_error

ISOLATION_LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


def cause_of(error: BaseException | None) -> Any:
    """The driver's error in one of Peewee's, or in the one that ended a transaction."""
    if isinstance(error, TransactionAborted):
        error = error.__cause__
    return driver_error(error)


def shut_down(fd: int) -> None:
    """Have whoever reads from a socket, in another thread, learn that nothing more will come."""
    # A duplicate, since the driver's own object closes its descriptor when it likes.
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


def readable(sock: Any) -> bool:
    """Whether there is something to read from a socket, its end included."""
    if not hasattr(select, "poll"):  # on Windows
        return bool(wait_for(sock, 1, 0))
    poll = select.poll()  # asked before each write, for which `wait_for()` does too much
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def wait_for(sock: Any, what: int, seconds: float) -> int:
    """Wait until a socket can be read from (1), written to (2), or either (3).

    Returns which; 0 when the time is over.
    """
    seconds = max(seconds, 0)
    if not hasattr(select, "poll"):  # on Windows
        reads, writes, _ = select.select(
            [sock] if what & 1 else [],
            [sock] if what & 2 else [],
            [],
            None if math.isinf(seconds) else seconds,
        )
        return bool(reads) + 2 * bool(writes)
    poll = select.poll()
    poll.register(sock, select.POLLIN * (what & 1) | select.POLLOUT * (what >> 1))
    events = poll.poll(None if math.isinf(seconds) else math.ceil(1000 * seconds))
    if not events:
        return 0
    found = events[0][1]
    failed = found & ~(select.POLLIN | select.POLLOUT)  # whoever goes on learns what it is
    return what if failed else bool(found & select.POLLIN) + 2 * bool(found & select.POLLOUT)


class Returned:
    """A cursor of SQLite's that has been read to the end: only then a statement that writes is
    committed, and one that reads keeps the connection on an old snapshot no longer.
    """

    def __init__(self, cursor: Any) -> None:
        self._all = cursor.fetchall()
        self._rows = iter(self._all)
        self.description = cursor.description
        self.lastrowid = cursor.lastrowid
        self.rowcount = cursor.rowcount
        self.connection = cursor.connection

    def again(self) -> "Returned":
        """The same cursor, unread."""
        self._rows = iter(self._all)
        return self

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


def isolation(level: Any) -> Any:
    """The level as SQL has it; numbers are psycopg's."""
    if isinstance(level, str):
        if level.upper() not in ISOLATION_LEVELS:
            raise ValueError(
                f"isolation_level must be one of {', '.join(ISOLATION_LEVELS)}, got: {level!r}"
            )
        return level.upper()
    return level
