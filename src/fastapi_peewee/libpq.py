"""Compiled statements on PostgreSQL, given to libpq directly.

psycopg's cursors take several steps for a statement, each of which lets other threads have the
interpreter. Here a thread waits once, inside libpq; or the event loop waits for the socket, and no
thread is needed. Texts go on as they came. Values are converted by psycopg, as its cursors do it.
Everything else goes through those.

And what waits for the server for a stated time: connecting, and asking whether it is there.
"""

import functools
import itertools
import math
import re
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from .drivers import wait_for
from .shapes import MANY
from .sockets import Steps, Watch
from .sql_cache import Known

#: How many statements a connection knows at most; each takes memory of the server's.
_MOST = 300


def _numbered(sql: str) -> bytes:
    """The statement with `$1`, `$2`, … in the place of `%s`, and `%` for `%%`.

    Raises:
        psycopg.ProgrammingError: a `%` is neither, as psycopg would.
    """
    numbers = itertools.count(1)

    def replaced(found: re.Match[str]) -> str:
        if found[0] == "%%":
            return "%"
        if found[0] not in ("%s", "%b", "%t"):  # formats, of which the values have their own
            import psycopg

            raise psycopg.ProgrammingError(
                f"only '%s', '%b', '%t' are allowed as placeholders, got '{found[0]}': a percent "
                "sign is written '%%'"
            )
        return f"${next(numbers)}"

    return re.sub("%.", replaced, sql).encode()


_command = Known(_numbered).__getitem__


class Statements:
    """The statements that one connection has seen. Used by whoever has the turn of its lease.

    A statement is prepared when it comes for the second time, unless it has many values.
    """

    def __init__(self, conn: Any) -> None:
        from psycopg import adapt, pq  # a driver is imported where it is used

        self._pq = pq
        self._auto = adapt.PyFormat.AUTO
        self._new_transformer = adapt.Transformer
        self._transformer: Any = None
        self._made_for: Any = None
        self._conn = conn
        self._pgconn = conn.pgconn
        #: Whether the connection can be used in this way; else psycopg's cursors have to do it.
        self.usable: bool = conn.keeps_statements and conn.info.encoding == "utf-8"
        self._names: dict[tuple[Any, ...], bytes | None] = {}
        self._count = 0

    def run(self, sql: str, params: Sequence[Any]) -> Any:
        """Run a statement. Returns libpq's result, in text form.

        Raises:
            psycopg.Error: as a cursor would.
        """
        steps, result = self._steps(sql, params), None
        try:
            while True:
                method, arguments = steps.send(result)
                result = getattr(self._pgconn, method)(*arguments)
        except StopIteration as done:
            return done.value

    def arun(self, sql: str, params: Sequence[Any]) -> Coroutine[Any, Any, Any]:
        """The same on the event loop, without a thread.

        If it is cancelled, or fails otherwise than with an error of the statement's, an answer may
        be on its way: the caller closes the connection.

        Raises:
            Unwatchable: this event loop can't watch its socket; nothing was sent.
        """
        return Watch.of(self._conn).ask(self._steps(sql, params))

    def rows(self, result: Any) -> list[Any]:
        """The rows of a result, as a cursor would return them."""
        transformer = self._converting()
        transformer.set_pgresult(result)
        try:
            rows: list[Any] = transformer.load_rows(0, result.ntuples, tuple)
        finally:
            transformer.set_pgresult(None)
        return rows

    def forget(self) -> None:
        """Take none of them for known any more: the server may have dropped them."""
        self._names.clear()

    def _converting(self) -> Any:
        """psycopg's converter of values. It is kept, since it finds out about each type once, and
        made anew when somebody may have registered another one, or a setting has changed that
        psycopg looks at when it finds out.
        """
        status = self._pgconn.parameter_status
        settings = (
            status(b"TimeZone"),
            status(b"DateStyle"),
            status(b"IntervalStyle"),
            status(b"client_encoding"),
        )
        if self._made_for != (self._conn.adapters_asked, settings):
            self._transformer = self._new_transformer(self._conn)  # which asks, too
            self._made_for = self._conn.adapters_asked, settings
        return self._transformer

    def _checked(self, result: Any) -> Any:
        status = self._pq.ExecStatus
        if result.status not in (status.TUPLES_OK, status.COMMAND_OK):
            import psycopg

            message = self._pgconn.get_error_message()
            if self._pgconn.status != self._pq.ConnStatus.OK:
                raise psycopg.OperationalError(message)
            if result.status == status.FATAL_ERROR and not self._state(result):
                # libpq's own. It could not send the statement, as to a server that has said a last
                # word and hung up, and takes the connection for open, since it hasn't read as far.
                self._conn.close()
                raise psycopg.OperationalError(message)
            raise psycopg.errors.error_from_result(result)
        return result

    def _state(self, result: Any) -> bytes | None:
        """The server's code of an error."""
        state: bytes | None = result.error_field(self._pq.DiagnosticField.SQLSTATE)
        return state

    def _steps(self, sql: str, params: Sequence[Any]) -> Steps:
        """Yields what to ask the server for, is sent the results, and returns the last one."""
        transformer = self._converting()
        values = transformer.dump_sequence(params, [self._auto] * len(params))
        types, formats = transformer.types, transformer.formats
        key = (sql, types)
        name = self._names.get(key)
        if name is None:
            if key not in self._names:
                if len(params) <= MANY and len(self._names) < _MOST:
                    self._names[key] = None
                result = yield "exec_params", (_command(sql), values, types, formats)
                return self._checked(result)
            self._count += 1
            name = b"fastapi_peewee_%d" % self._count
            result = yield "prepare", (name, _command(sql), types)
            self._checked(result)
            self._names[key] = name
        result = yield "exec_prepared", (name, values, formats)
        if self._state(result) in _STALE:
            # In a transaction, that is lost by now.
            self._names.clear()
            if self._pgconn.transaction_status == self._pq.TransactionStatus.IDLE:
                result = yield "exec_params", (_command(sql), values, types, formats)
        return self._checked(result)


#: What the server says of a prepared statement that it has no more (after DEALLOCATE ALL or DISCARD
#: ALL), and of one whose columns have other types by now (after ALTER TABLE).
_STALE = b"26000", b"0A000"


class Cursor:
    """A cursor, as Peewee and callers of `db.execute(query)` read it, of statements that are run in
    this way.
    """

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        self._rows: Iterator[Any] = iter(())
        self._all: list[Any] = []
        self.description: list[tuple[Any, ...]] | None = None
        self.rowcount = -1

    def execute(self, sql: str, params: Sequence[Any]) -> None:
        self._load(self._statements.run(sql, params))

    @classmethod
    def of(cls, statements: Statements, result: Any) -> "Cursor":
        """A cursor that has executed a statement with this result."""
        cursor = cls(statements)
        cursor._all = cursor._load(result)
        return cursor

    def again(self) -> "Cursor":
        """The same cursor, unread; for those of `of()`."""
        self._rows = iter(self._all)
        return self

    def _load(self, result: Any) -> list[Any]:
        columns = range(result.nfields)
        self.description = [
            (result.fname(i).decode(), result.ftype(i), None, None, None, None, None)
            for i in columns
        ] or None
        rows = self._statements.rows(result) if columns else []
        self._rows = iter(rows)
        changed = result.command_tuples
        self.rowcount = -1 if changed is None else changed
        return rows

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def unread(self, row: Any) -> None:
        """Put the row back that was fetched last."""
        self._rows = itertools.chain((row,), self._rows)

    def fetchmany(self, size: int = 1) -> list[Any]:
        return list(itertools.islice(self._rows, size))

    def fetchall(self) -> list[Any]:
        return list(self._rows)

    def __iter__(self) -> Iterator[Any]:
        return self._rows

    def close(self) -> None:
        """There is nothing to close: all rows are here."""


def column(result: Any) -> list[bytes]:
    """The first column of a result's rows, in UTF-8."""
    return [result.get_value(i, 0) for i in range(result.ntuples)]


@functools.cache
def connection_class() -> type[Any]:
    """psycopg's connection, which an event loop may watch, and whose `connect_timeout` may be any
    number of seconds.

    psycopg and libpq take whole ones, at least two; 0.5 would be 0, which is for ever.
    """
    from psycopg import Connection
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
    from psycopg.errors import ConnectionTimeout

    class TimedConnection(Connection[Any]):
        watch: Watch | None = None
        #: Whether statements may be prepared. `prepare_threshold=None` is psycopg's way to say that
        #: they may not: a pooler would give them to others.
        keeps_statements = True
        #: How often somebody has asked for `adapters`, and may have added to them.
        adapters_asked = 0

        @property
        def adapters(self) -> Any:
            self.adapters_asked += 1
            return super().adapters

        def close(self) -> None:
            super().close()
            if self.watch is not None:
                self.watch.end()

        @classmethod
        def _connect_gen(cls, conninfo: str = "", **options: Any) -> Any:
            seconds = float(conninfo_to_dict(conninfo).get("connect_timeout") or 0)
            deadline = time.monotonic() + seconds if seconds > 0 else math.inf
            conninfo = make_conninfo(conninfo, connect_timeout=math.ceil(seconds))
            yield from ()  # a generator that never has anybody wait for it
            # This one yields what to wait for; whoever iterates over it would wait for longer.
            steps = super()._connect_gen(conninfo, **options)
            try:
                sock, wait = next(steps)
                while True:
                    ready = wait_for(sock, int(wait), deadline - time.monotonic())
                    if not ready:
                        raise ConnectionTimeout("connection timeout expired")
                    sock, wait = steps.send(ready)
            except StopIteration as done:
                return done.value
            finally:
                steps.close()

    return TimedConnection


def ask(pgconn: Any, sql: bytes, seconds: float) -> Any:
    """The result of a statement, or None if the server doesn't answer within so many seconds.

    Then the answer may be on its way: the caller closes the connection.

    Raises:
        psycopg.OperationalError: the connection is lost.
    """
    pgconn.send_query(sql)
    pgconn.flush()
    return answer(pgconn, seconds)


def answer(pgconn: Any, seconds: float) -> Any:
    """The same of what has been sent already."""
    deadline = time.monotonic() + seconds
    found = None
    while True:
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                return found
            found = result
        if not wait_for(pgconn.socket, 1, deadline - time.monotonic()):
            return None
        pgconn.consume_input()
