"""What plans and streams ask of a database: texts that are JSON, and rows as they come."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import peewee

from .blocks import Atomic, LeaseContext
from .outcomes import Outcomes
from .state import translate_driver_errors


class NotBuilt(Exception):
    """The database couldn't build the JSON of these rows, as it turned out."""


def encoded(rows: Sequence[Any]) -> list[bytes]:
    """The rows' first column, which is JSON. MariaDB says NULL where it would be too long."""
    try:
        return [row[0].encode() for row in rows]
    except AttributeError as error:
        raise NotBuilt from error


class Reads(Outcomes):
    """A database that hands over rows unread. What differs between databases is overridden."""

    if TYPE_CHECKING:

        def waiting(self) -> AbstractContextManager[None]: ...

        def _taint(self, sql: str) -> None: ...

        def connection_context(self) -> LeaseContext: ...

    def reading(self) -> LeaseContext | Atomic:
        """The block in which `iterate` reads."""
        return self.connection_context()

    def open_rows(self, query: Any) -> Any:
        """An iterator over a query's rows that doesn't keep those it has passed."""
        return iter(query.iterator(self))

    def stream(self, sql: str, params: Any, size: int) -> Iterator[Sequence[Any]]:
        """Run a statement and yield its rows, `size` at a time; the server keeps the others."""
        with self.reading():
            self._taint(sql)
            cursor = self._execute_cursor(sql, params, named_cursor=True)
            whole = True
            with translate_driver_errors:
                try:
                    while True:
                        with self.waiting():
                            rows = cursor.fetchmany(size)
                        if len(rows) < size:
                            self.check_end(cursor, whole)
                        if not rows:
                            break
                        yield rows
                        whole = False
                finally:
                    cursor.close()

    def check_end(self, cursor: Any, whole: bool) -> None:
        """Called when the last row of a stream has been read; `whole`: none was yielded before.

        Raises:
            NotBuilt: as `read_texts()`. Nothing was yielded yet.
            peewee.DataError: the same, too late.
        """

    def drop_unread(self) -> None:
        """Called when a stream is given up, outside of any transaction but its own."""

    def read_texts(self, sql: str, params: Sequence[Any]) -> Sequence[bytes]:
        """Run a statement whose rows are one text each; return these, in UTF-8.

        Raises:
            NotBuilt: the database couldn't put all of a row into it.
        """
        return self.texts(self.execute_sql(sql, params))

    async def aread_texts(self, sql: str, params: Sequence[Any]) -> Sequence[bytes] | None:
        """The same on the event loop, without a thread, of a statement that reads.

        The rest is as of `aexecute_compiled()`.
        """
        raise NotImplementedError

    #: Whether `aexecute_compiled()` may do something with statements that read, or that write.
    reads_on_the_loop = writes_on_the_loop = False

    async def aexecute_compiled(self, sql: str, params: Sequence[Any]) -> Any:
        """Run one of Peewee's statements on the event loop. Returns a cursor with all rows, which
        `again()` makes unread; None where that can't be, or not now: then nothing was sent.

        The caller has seen that no block is open, and that nobody watches statements.
        """
        raise NotImplementedError

    @property
    def watched(self) -> bool:
        """Whether somebody wants to see each statement, as Peewee's hooks or its log show it."""
        return bool(self.query_hooks) or peewee.logger.isEnabledFor(logging.DEBUG)

    def texts(self, cursor: Any) -> Sequence[bytes]:
        """The first column of all rows of a cursor."""
        return encoded(cursor.fetchall())

    def refuses_json(self, error: Exception) -> bool:
        """Whether a statement failed since JSON can't hold a value, or since a value isn't JSON."""
        return False
