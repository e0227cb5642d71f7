"""The files that SQLite has open, and what a fork makes of them.

Which locks a process has on a file, SQLite keeps in its memory, once for all connections to it. A
fork copies that, and not the locks: a child that is forked while a connection is open believes that
it has locks that are the parent's. What it commits is lost when the parent closes its last
connection, and removes the log; or it waits for ever for a transaction that has long been over. So
what can be closed is closed before a fork, and a file that was open nevertheless is refused in the
child. See sqlite.org/howtocorrupt.html, 2.6.
"""

import os
import sqlite3
import threading
import weakref
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import peewee

from .exceptions import LeaseForked


def file_of(database: Any, *, uri: bool) -> str | None:
    """One name for a file, however it is written; None: the database is in memory."""
    name = os.fsdecode(database)
    if uri and name.startswith("file:"):
        parts = urlsplit(name)
        options = parse_qs(parts.query)
        if options.get("mode") == ["memory"] or options.get("vfs") == ["memdb"]:
            return None
        name = unquote(parts.path)
    return None if name in ("", ":memory:") else os.path.realpath(name)


class OpensFile:
    """A connection, ours or of the caller's `factory`, whose files are known while it is open."""

    def __init__(self, database: Any, *args: Any, **kwargs: Any) -> None:
        self.files: set[str] = set()
        #: It was given to the caller, who may have it still.
        self.handed_out = False
        # Known before it is open, and until it is closed: other threads may fork meanwhile.
        _open[id(self)] = self
        try:
            self.opens(database, uri=kwargs.get("uri", False))
            super().__init__(database, *args, **kwargs)  # type: ignore[call-arg]
        except BaseException:
            del _open[id(self)]
            raise

    def opens(self, database: Any, *, uri: bool) -> None:
        """It is about to open this.

        Raises:
            LeaseForked: the file was open when this process was forked.
        """
        file = file_of(database, uri=uri)
        if file in _open_at_fork:
            raise LeaseForked(LeaseForked.OPEN_FILE)
        if file is not None:
            self.files.add(file)

    def close(self) -> None:
        super().close()  # type: ignore[misc]
        _open.pop(id(self), None)

    def at_rest(self, schemas: set[str]) -> bool:
        """Whether another one can take its place: it is in no transaction, nothing of it is half
        read, and it has neither temporary tables nor files attached beyond these schemas.
        """
        conn: Any = self
        try:
            for _ in range(2):  # a function can't be replaced while a statement is half read
                conn.create_function("fastapi_peewee_rest", 0, int)
            cursor = conn.cursor()
            cursor.row_factory = None  # the caller's
            found = {row[1] for row in cursor.execute("PRAGMA database_list").fetchall()}
            return not self.handed_out and not conn.in_transaction and found == schemas
        except (sqlite3.Error, peewee.DatabaseError):
            return False


_open: "weakref.WeakValueDictionary[int, OpensFile]" = weakref.WeakValueDictionary()
_open_at_fork: set[str] = set()
_kept = threading.local()  # other threads may be forking, too


def _before_fork() -> None:
    # Before any code of ours runs there, a child lets go of what its other threads had, and what
    # is collected is closed: with the parent's transaction, in the memory that both share.
    _kept.open = [conn for found in _open.valuerefs() if (conn := found()) is not None]


def _forked() -> None:
    for conn in (*_kept.open, *_open.values()):
        _open_at_fork.update(conn.files)


def _forking_is_over() -> None:
    _kept.open = []


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(
        before=_before_fork, after_in_child=_forked, after_in_parent=_forking_is_over
    )
