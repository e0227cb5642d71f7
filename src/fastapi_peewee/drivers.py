"""What the classes of the databases share: isolation levels, sockets, the driver's error."""

import os
import select
import socket
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
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def isolation(level: Any) -> Any:
    """The level as SQL has it; numbers are psycopg's."""
    if isinstance(level, str):
        if level.upper() not in ISOLATION_LEVELS:
            raise ValueError(
                f"isolation_level must be one of {', '.join(ISOLATION_LEVELS)}, got: {level!r}"
            )
        return level.upper()
    return level
