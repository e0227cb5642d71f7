"""PostgreSQL through psycopg 3: sessions, cursors of the server's, what was lost."""

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from threading import get_ident
from typing import Any, TypeVar

import peewee

from .blocks import Atomic
from .calls import Call, result_of, uninterrupted
from .database import REFUSED, Database
from .drivers import cause_of, isolation, readable, shut_down
from .exceptions import OutcomeUnknown
from .libpq import Cursor, Statements, answer, ask, column, connection_class
from .outcomes import only_reads
from .sockets import Unwatchable
from .sql_cache import Statement
from .state import Lease, forbid_lazy_load, translate_driver_errors

# The prepared statements as well: somebody may have dropped ours, so that they are forgotten, and
# would pile up on the server.
_RESET = b"DISCARD ALL"


T = TypeVar("T")

_cursors = itertools.count(1)


class _Fetching:
    """A cursor of the server's, as Peewee reads it, row by row: fetched many at a time."""

    def __init__(self, db: Database, cursor: Any) -> None:
        self._db = db
        self._cursor = cursor
        self._rows: Iterator[Any] = iter(())
        self.description = cursor.description

    def fetchone(self) -> Any:
        row = next(self._rows, None)
        if row is None and not self._cursor.closed:
            with self._db.waiting(), translate_driver_errors:
                self._rows = iter(self._cursor.fetchmany(100))
            row = next(self._rows, None)
            if row is None:
                self._cursor.close()
        return row

    def close(self) -> None:
        """Peewee closes when a half-read query is collected: see `Lease.server_cursors`."""


def _statements(lease: Lease) -> Statements | None:
    """Those of its connection, or None if psycopg's cursors have to be used."""
    held = lease.root.held
    if held.statements is None:
        held.statements = Statements(held.conn)
    statements: Statements = held.statements
    return statements if statements.usable else None


class PostgresqlDatabase(Database, peewee.PostgresqlDatabase):
    """PostgreSQL through psycopg 3, also where psycopg2 is installed."""

    reads_on_the_loop = writes_on_the_loop = True

    def init(self, database: str, **kwargs: Any) -> None:
        kwargs.setdefault("connect_timeout", 5)
        kwargs.setdefault("client_encoding", "UTF8")
        super().init(database, **{**kwargs, "prefer_psycopg3": True})

    def _connect(self, limit: float = math.inf) -> Any:
        self._adapter.check_driver()
        seconds = min(limit, self.connect_timeout)
        given = "conninfo" if self.database.startswith("postgresql://") else "dbname"
        params = {given: self.database, **self.connect_params}
        params["connect_timeout"] = 0 if math.isinf(seconds) else seconds
        conn = connection_class().connect(**params)
        if self._isolation_level:
            conn.set_isolation_level(self._isolation_level)
        conn.autocommit = True
        conn.keeps_statements = conn.prepare_threshold is not None
        return conn

    def begin(self, isolation_level: Any = None, *, read_only: bool = False) -> None:
        if not read_only:
            super().begin(isolation(isolation_level))
            return
        default = self._adapter.isolation_level_str(self._isolation_level)
        level = isolation(isolation_level or default)
        with self.waiting(), translate_driver_errors:
            self.cursor().execute(f"BEGIN {f'ISOLATION LEVEL {level} ' if level else ''}READ ONLY")
        self._has_begun()

    def taints(self, sql: str) -> bool:
        # What SET LOCAL sets ends with the transaction; on MySQL it is for the session.
        return not (sql.startswith("SET LOCAL ") and ";" not in sql) and super().taints(sql)

    def read_texts(self, sql: str, params: Sequence[Any]) -> Sequence[bytes]:
        lease = self._state.lease()
        usual = not (self.watched or self.taints(sql))
        if usual and lease is not None and lease.owner == get_ident():
            forbid_lazy_load()
            self._state.guard()
            statements = _statements(lease)
            if statements is not None:
                try:
                    with self.waiting(), translate_driver_errors:
                        return column(statements.run(sql, params))
                except REFUSED as error:
                    self.raise_refused(error, sql, params)
        return super().read_texts(sql, params)

    async def aread_texts(self, sql: str, params: Sequence[Any]) -> Sequence[bytes] | None:
        return await self._on_the_loop(sql, params, lambda _, result: column(result))

    def aexecute_compiled(self, sql: str, params: Sequence[Any]) -> Coroutine[Any, Any, Any]:
        return self._on_the_loop(sql, params, Cursor.of)

    async def _on_the_loop(
        self, sql: str, params: Sequence[Any], read: Callable[[Statements, Any], T]
    ) -> T | None:
        """Run a statement. None if that can't be; then nothing was sent. See
        `aexecute_compiled()` for what the caller has seen.
        """
        if self.taints(sql):
            return None
        lease = await self.pool.acquire()
        try:
            if not self.pool.connect_at_once(lease):
                await self._connect_in_thread(lease)
            statements = _statements(lease)
            if statements is None:
                return None
            conn = lease.held.conn
            unsure = not only_reads(sql) and self.is_open(conn)
            try:
                with self.pool.waiting(lease), translate_driver_errors:
                    return read(statements, await statements.arun(sql, params))
            except REFUSED as error:
                if unsure and self.lost(conn, error):
                    raise OutcomeUnknown("A statement that writes was sent") from error
                self.raise_refused(error, sql, params)
            except Unwatchable:
                return None
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError) and self._was_sent(conn):
                    # What is cancelled is over when the caller learns of it, as in a thread; the
                    # server would work on, and have more sessions than the pool has connections. No
                    # task awaits that: whoever cancels all tasks would cancel it, too.
                    loop = asyncio.get_running_loop()
                    await uninterrupted(loop.run_in_executor(None, self._end_statement, conn))
                conn.close()  # an answer may be on its way
                raise
        finally:
            self.pool.give_back(lease)

    async def _connect_in_thread(self, lease: Lease) -> None:
        """Connect a lease that its task goes on with: a call would wait in the queue once more."""
        await result_of(Call(self.pool, self._state, lease, lambda: None, lambda _: None))

    def _was_sent(self, conn: Any) -> bool:
        """Whether the server has the whole of a statement. Of a part it does nothing, and so would
        not answer, either.
        """
        try:
            return self.is_open(conn) and not conn.pgconn.flush()
        except Exception:  # the connection is lost
            return False

    def _end_statement(self, conn: Any) -> None:
        self.interrupt(conn)
        with suppress(Exception):  # the connection is lost
            answer(conn.pgconn, self.cancel_timeout)

    def texts(self, cursor: Any) -> list[bytes]:
        return column(cursor.pgresult)

    def reading(self) -> Atomic:
        return self.atomic(read_only=True)  # a server-side cursor lives in a transaction

    def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
        if type(sql) is Statement:
            options["compiled"] = True
        return super()._execute_cursor(sql, params, **options)

    def cursor(self, named_cursor: Any = None, compiled: bool = False) -> Any:
        lease = self._state.lease()
        if compiled and lease is not None and not lease.root.tainted:
            statements = _statements(lease)
            if statements is not None:
                self._state.guard()
                return Cursor(statements)
        cursor = super().cursor()
        if not named_cursor:
            return cursor
        cursor = self._state.conn.cursor(f"fastapi_peewee_{next(_cursors)}")
        if lease is not None:
            lease.root.server_cursors.append(cursor)
        return cursor

    def last_insert_id(self, cursor: Any, query_type: Any = None) -> Any:
        returned: Any = getattr(cursor, "select", ())
        if query_type != peewee.Insert.SIMPLE or len(returned) != 1:
            return super().last_insert_id(cursor, query_type)
        # Peewee would find out about all columns of a cursor, to read one number.
        rows = cursor.cursor
        row = rows.fetchone()
        if row is None:
            return None
        # The query may be iterated over afterwards, for this row.
        if type(rows) is Cursor:
            rows.unread(row)
        else:
            rows.scroll(-1)
        return returned[0].python_value(row[0])

    def open_rows(self, query: Any) -> Any:
        sql, params = self.get_sql_context().parse(query)
        self._taint(sql)
        cursor = self._execute_cursor(sql, params, named_cursor=True)
        return iter(query._get_cursor_wrapper(_Fetching(self, cursor)).iterator())

    def is_open(self, conn: Any) -> bool:
        if conn.closed:
            return False
        try:
            # What the server said before it hung up comes first; a notice may be all of it.
            for _ in range(2):
                if not readable(conn.pgconn.socket):
                    return True
                conn.pgconn.consume_input()
                conn.pgconn.is_busy()
        except Exception:
            return False
        return not conn.closed

    def lost(self, conn: Any, error: Exception) -> bool:
        diagnostic = getattr(cause_of(error), "diag", None)
        farewell = getattr(diagnostic, "severity_nonlocalized", None) in ("FATAL", "PANIC")
        return farewell or not self.is_open(conn)

    def transient(self, error: BaseException | None) -> bool:
        return getattr(cause_of(error), "sqlstate", None) in ("40001", "40P01")

    def failed(self, conn: Any) -> bool:
        from psycopg.pq import TransactionStatus

        return bool(conn.pgconn.transaction_status == TransactionStatus.INERROR)

    def is_in_transaction(self, conn: Any) -> bool:
        from psycopg.pq import TransactionStatus

        status = conn.pgconn.transaction_status
        return status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)

    def is_alive(self, conn: Any, limit: float) -> bool:
        try:
            return ask(conn.pgconn, b"SELECT 1", limit) is not None
        except Exception:
            return False

    def prepare_session(
        self, conn: Any, statement_timeout: float | None, limit: float = math.inf
    ) -> None:
        # psycopg prepares none itself: its DEALLOCATE ALL, after a DROP or a ROLLBACK, would be the
        # end of ours, too.
        conn.prepare_threshold = None
        settings = []
        if statement_timeout is not None:
            settings.append(f"statement_timeout = {math.ceil(statement_timeout * 1000)}")
        if conn.info.server_version >= 140000:
            # Else a statement runs on when its client has gone.
            settings.append("client_connection_check_interval = 1000")
        deadline = time.monotonic() + min(limit, self.connect_timeout)
        for setting in settings:  # a server on a system that can't check refuses the second
            left = deadline - time.monotonic()
            if ask(conn.pgconn, f"SET {setting}".encode(), left) is None:
                raise peewee.OperationalError("The server does not answer (connect_timeout).")

    def interrupt(self, conn: Any) -> bool:
        from psycopg import capabilities

        try:
            # libpq before 17 waits for as long as the network likes, and psycopg's C implementation
            # keeps all threads from running meanwhile.
            capabilities.has_cancel_safe(check=True)
            conn.cancel_safe(timeout=self.cancel_timeout)
        except Exception:
            self.cut(conn)  # or the server is away, or frozen
        return True

    def cut(self, conn: Any) -> bool:
        shut_down(conn.pgconn.socket)
        return False

    def clean(self, conn: Any, lease: Lease) -> bool:
        status = conn.pgconn.transaction_status
        if not (status or lease.tainted or lease.server_cursors):  # idle, which is 0, and unchanged
            return True
        from psycopg.pq import ExecStatus, TransactionStatus

        try:
            if status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                conn.rollback()
            elif status != TransactionStatus.IDLE:
                return False
        finally:
            for cursor in lease.server_cursors:
                cursor.close()  # outside of a transaction that asks nothing of the server
        if not lease.tainted:
            return True
        if lease.handed_out:
            return False
        if lease.held.statements is not None:
            lease.held.statements.forget()
        result = conn.pgconn.exec_(_RESET)
        self.prepare_session(conn, self.pool.statement_timeout)
        return bool(result.status == ExecStatus.COMMAND_OK)
