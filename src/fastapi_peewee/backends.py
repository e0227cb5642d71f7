"""`connect(url)`, and where SQLite, PostgreSQL and MySQL differ: each is a class of Peewee's."""

import asyncio
import functools
import itertools
import math
import os
import re
import select
import socket
import sqlite3
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from threading import get_ident
from typing import Any

import peewee

from .blocks import Atomic
from .database import Database, NotBuilt, encoded
from .exceptions import TransactionAborted, driver_error
from .inline import InlineReader
from .libpq import Statements
from .outcomes import READS
from .state import Lease, forbid_lazy_load, translate_driver_errors
from .writers import Returned, Writers

_ISOLATION_LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


class SqliteDatabase(Database, peewee.SqliteDatabase):
    """SQLite: write-ahead log, foreign keys enforced, `BEGIN IMMEDIATE` for what writes."""

    def __init__(
        self,
        database: str,
        pragmas: Any = None,
        *,
        busy_timeout: float = 5.0,
        inline_reads: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not float(inline_reads) >= 0:
            raise ValueError(f"inline_reads must be seconds, 0 or more, got: {inline_reads!r}")
        # A transaction that reads first and then writes can't wait for another writer: SQLite
        # fails it at once (SQLITE_BUSY_SNAPSHOT). So the write lock is taken at the beginning.
        kwargs.setdefault("lock_type", "IMMEDIATE")
        self._busy_timeout = busy_timeout
        self._writers = Writers(float(busy_timeout))
        self._inline: InlineReader | None = None
        if float(inline_reads):
            self._inline = InlineReader(self.open_connection, float(inline_reads))
        super().__init__(database, pragmas, **kwargs)

    def init(self, database: str, pragmas: Any = None, **kwargs: Any) -> None:
        self._keeper: sqlite3.Connection | None = None
        given = dict(pragmas or self._pragmas or {})
        defaults: dict[str, Any] = {"foreign_keys": 1}
        if database == ":memory:":
            # One database for all connections, until the last one of them is closed.
            database = f"file:/fastapi-peewee-{uuid.uuid4().hex}?vfs=memdb"
            kwargs["uri"] = True
            self._keeper = sqlite3.connect(database, uri=True, check_same_thread=False)
            weakref.finalize(self, self._keeper.close)
        else:
            defaults["journal_mode"] = "wal"
        kwargs.setdefault("check_same_thread", False)
        kwargs.setdefault("timeout", self._busy_timeout)
        super().init(database, pragmas={**defaults, **given}, **kwargs)

    def _connect(self) -> Any:
        # Changing the journal mode doesn't obey the busy timeout: SQLite fails it at once if
        # another connection is writing to a file that isn't in that mode yet.
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                return super()._connect()
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def begin(
        self,
        lock_type: str | None = None,
        *,
        isolation_level: str | None = None,
        read_only: bool = False,
    ) -> None:
        if isinstance(lock_type, str) and lock_type.upper() in _ISOLATION_LEVELS:
            lock_type, isolation_level = None, lock_type
        _isolation(isolation_level)
        lock_type = lock_type or ("DEFERRED" if read_only else self._lock_type)
        if self._state.lease() is not None and lock_type in ("IMMEDIATE", "EXCLUSIVE"):
            with translate_driver_errors:
                self._state.writing = self._writers.enter()
        try:
            super().begin(lock_type)
        except BaseException:
            self._end_writing()
            raise
        if read_only:
            self._state.read_only = True
            self._set_query_only(1)

    def commit(self) -> None:
        super().commit()
        self._end_writing()
        self._end_read_only()

    def rollback(self) -> None:
        try:
            super().rollback()
        finally:
            self._end_writing()
        self._end_read_only()

    def _end_writing(self) -> None:
        gate, self._state.writing = self._state.writing, None
        if gate is not None:
            gate.release()

    def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
        lease = self._state.lease()
        # The transaction's turn, a read, or a connection whose end nobody would see.
        if lease is None or self._state.writing is not None or READS.match(sql) is not None:
            return super()._execute_cursor(sql, params, **options)
        conn = None if lease.root.held is None else lease.root.held.conn
        if conn is None or conn.in_transaction:
            return super()._execute_cursor(sql, params, **options)
        with translate_driver_errors:
            gate = self._writers.enter()
        try:
            cursor = super()._execute_cursor(sql, params, **options)
            with translate_driver_errors:
                return cursor if cursor.description is None else Returned(cursor)
        finally:
            gate.release()

    def _end_read_only(self) -> None:
        if getattr(self._state, "read_only", False):
            self._set_query_only(0)
            self._state.read_only = False

    def _set_query_only(self, value: int) -> None:
        # Around `execute_sql` of ours, which would take the session for changed.
        peewee.Database.execute_sql(self, f"PRAGMA query_only = {value}")

    def cursor(self, named_cursor: Any = None) -> Any:
        cursor = super().cursor(named_cursor)
        lease = self._state.lease()
        if lease is not None:
            root = lease.root
            if root.cursors is None:
                root.cursors = weakref.WeakSet()
            root.cursors.add(cursor)
        return cursor

    def _initialize_connection(self, conn: Any) -> None:
        super()._initialize_connection(conn)
        conn.create_function("fastapi_peewee_float", 1, _json_float, deterministic=True)

    async def aread_texts(self, sql: str, params: Sequence[Any]) -> Sequence[bytes] | None:
        inline = self._inline
        if inline is None or self._state.lease() is not None or self.watched:
            return None
        if not inline.ready:
            await asyncio.to_thread(inline.open)
        rows = inline.read(sql, params)
        return None if rows is None else encoded(rows)

    def close_all(self) -> None:
        super().close_all()
        if self._inline is not None:
            self._inline.close()

    def refuses_json(self, error: Exception) -> bool:
        return "JSON" in str(error)  # "JSON cannot hold BLOB values", "malformed JSON"

    def open_rows(self, query: Any) -> Any:
        rows = super().open_rows(query)
        # A half-read query of a database in memory would keep all writers out.
        return rows if self._keeper is None else iter(list(rows))

    def is_open(self, conn: Any) -> bool:
        return True

    def is_alive(self, conn: Any) -> bool:
        return True

    def lost(self, conn: Any, error: Exception) -> bool:
        return False

    def ended(self, conn: Any, error: Exception) -> bool:
        return not conn.in_transaction  # the disk is full, or can't be read

    def transient(self, error: BaseException | None) -> bool:
        code = getattr(_cause(error), "sqlite_errorcode", 0)
        return bool(code & 0xFF == sqlite3.SQLITE_BUSY)

    def prepare_session(self, conn: Any, statement_timeout: float | None) -> None:
        if statement_timeout is not None and statement_timeout < self._busy_timeout:
            # While SQLite waits for a lock, it can't be interrupted.
            conn.execute(f"PRAGMA busy_timeout = {math.ceil(statement_timeout * 1000)}")

    def interrupt(self, conn: Any) -> bool:
        conn.interrupt()
        return True

    def cut(self, conn: Any) -> None:
        conn.interrupt()

    def clean(self, conn: Any, lease: Lease) -> bool:
        try:
            return self._clean(conn, lease)
        finally:
            gate = lease.state.get("writing")
            if gate is not None:
                gate.release()

    def _clean(self, conn: Any, lease: Lease) -> bool:
        for cursor in lease.cursors or ():
            cursor.close()  # one that is half read keeps the connection on an old snapshot
        if conn.in_transaction:
            conn.rollback()
        return not lease.tainted and not lease.state.get("read_only")


def _json_float(value: Any) -> str | None:
    """A float as JSON has it: SQLite prints 15 digits, which is another number, and `Inf`."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return repr(float(value)) if isinstance(value, float | int) else "?"  # no JSON: see json_sql


# Functions, collations and attached files belong to connections: those that exist lack new ones.
def _renewing(name: str) -> Any:
    method = getattr(peewee.SqliteDatabase, name)

    @functools.wraps(method)
    def renewing(self: SqliteDatabase, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if hasattr(self, "pool"):
            self.close_all()
        return result

    return renewing


for _name in (
    "attach",
    "detach",
    "load_extension",
    "register_aggregate",
    "register_collation",
    "register_function",
    "register_window_function",
):
    setattr(SqliteDatabase, _name, _renewing(_name))


# What DISCARD ALL does, in the order of its manual page, but for the prepared statements: psycopg
# has made most of them, and goes on using them. Returns the number of those that it hasn't made.
_RESET = (
    b"CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *;"
    b"SELECT pg_advisory_unlock_all(); DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES;"
    b"SELECT count(*) FROM pg_prepared_statements WHERE from_sql"
)


_cursors = itertools.count(1)

#: Seconds to wait until the server has ended a statement that is interrupted.
_CANCEL_TIMEOUT = 2.0


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


def _statements(lease: Lease) -> Statements:
    held = lease.root.held
    if held.statements is None:
        held.statements = Statements(held.conn)
    statements: Statements = held.statements
    return statements


class PostgresqlDatabase(Database, peewee.PostgresqlDatabase):
    """PostgreSQL through psycopg 3, also where psycopg2 is installed."""

    def init(self, database: str, **kwargs: Any) -> None:
        kwargs.setdefault("connect_timeout", 5)
        kwargs.setdefault("client_encoding", "UTF8")
        super().init(database, **{**kwargs, "prefer_psycopg3": True})

    def begin(self, isolation_level: Any = None, *, read_only: bool = False) -> None:
        if not read_only:
            super().begin(_isolation(isolation_level))
            return
        default = self._adapter.isolation_level_str(self._isolation_level)
        level = _isolation(isolation_level or default)
        with self.waiting(), translate_driver_errors:
            self.cursor().execute(f"BEGIN {f'ISOLATION LEVEL {level} ' if level else ''}READ ONLY")

    def taints(self, sql: str) -> bool:
        # What SET LOCAL sets ends with the transaction; on MySQL it is for the session.
        return not (sql.startswith("SET LOCAL ") and ";" not in sql) and super().taints(sql)

    def read_texts(self, sql: str, params: Sequence[Any]) -> Sequence[bytes]:
        lease = self._state.lease()
        if lease is not None and lease.owner == get_ident() and self._unwatched(sql):
            forbid_lazy_load()
            self._state.guard()
            with self.waiting():
                texts = _statements(lease).texts(sql, params)
            if texts is not None:
                return texts
        return super().read_texts(sql, params)

    async def aread_texts(self, sql: str, params: Sequence[Any]) -> Sequence[bytes] | None:
        if self._state.lease() is not None or not self._unwatched(sql):
            return None
        lease = await self.pool.acquire()
        try:
            if not self.pool.connect_at_once(lease):
                return None
            try:
                with self.pool.waiting(lease), translate_driver_errors:
                    return await _statements(lease).atexts(sql, params)
            except peewee.DatabaseError:
                raise
            except BaseException as error:  # cancelled: an answer may be on its way
                lease.held.conn.close()
                if isinstance(error, NotImplementedError):
                    return None
                raise
        finally:
            self.pool.give_back(lease)

    def _unwatched(self, sql: str) -> bool:
        """Whether nobody wants to see it, and it leaves the session as it was."""
        return not self.watched and not self.taints(sql)

    def texts(self, cursor: Any) -> list[bytes]:
        result = cursor.pgresult  # as libpq has them: unread, in UTF-8
        return [result.get_value(i, 0) for i in range(result.ntuples)]

    def reading(self) -> Atomic:
        return self.atomic(read_only=True)  # a server-side cursor lives in a transaction

    def cursor(self, named_cursor: Any = None) -> Any:
        cursor = super().cursor()
        if not named_cursor:
            return cursor
        cursor = self._state.conn.cursor(f"fastapi_peewee_{next(_cursors)}")
        lease = self._state.lease()
        if lease is not None:
            lease.root.server_cursors.append(cursor)
        return cursor

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
                if not _readable(conn.pgconn.socket):
                    return True
                conn.pgconn.consume_input()
                conn.pgconn.is_busy()
        except Exception:
            return False
        return not conn.closed

    def lost(self, conn: Any, error: Exception) -> bool:
        diagnostic = getattr(_cause(error), "diag", None)
        farewell = getattr(diagnostic, "severity_nonlocalized", None) in ("FATAL", "PANIC")
        return farewell or not self.is_open(conn)

    def transient(self, error: BaseException | None) -> bool:
        return getattr(_cause(error), "sqlstate", None) in ("40001", "40P01")

    def failed(self, conn: Any) -> bool:
        from psycopg.pq import TransactionStatus

        return bool(conn.pgconn.transaction_status == TransactionStatus.INERROR)

    def is_alive(self, conn: Any) -> bool:
        try:
            conn.execute("SELECT 1")
        except Exception:
            return False
        return True

    def prepare_session(self, conn: Any, statement_timeout: float | None) -> None:
        settings = []
        if statement_timeout is not None:
            settings.append(f"statement_timeout = {math.ceil(statement_timeout * 1000)}")
        if conn.info.server_version >= 140000:
            # Else a statement runs on when its client has gone.
            settings.append("client_connection_check_interval = 1000")
        for setting in settings:  # a server on a system that can't check refuses the second
            conn.pgconn.exec_(f"SET {setting}".encode())

    def interrupt(self, conn: Any) -> bool:
        try:
            conn.cancel_safe(timeout=_CANCEL_TIMEOUT)
        except Exception:
            self.cut(conn)  # the server is away, or frozen
        return True

    def cut(self, conn: Any) -> None:
        _shut_down(conn.pgconn.socket)

    def clean(self, conn: Any, lease: Lease) -> bool:
        from psycopg.pq import ExecStatus, TransactionStatus

        status = conn.pgconn.transaction_status
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
        result = conn.pgconn.exec_(_RESET)
        self.prepare_session(conn, self.pool.statement_timeout)
        return result.status == ExecStatus.TUPLES_OK and result.get_value(0, 0) == b"0"


#: Lock wait time-out, deadlock, and MariaDB's "record has changed since last read".
_TRANSIENT = (1205, 1213, 1020)

#: Errors with which the server, or PyMySQL in its place, ends a connection.
_FAREWELLS = (0, 1053, 1927, 2006, 2013, 2055)

#: Warnings: "cut by JSON_ARRAYAGG()", "larger than max_allowed_packet".
_CUT = (1260, 1301)


@functools.cache
def _unbuffered_cursor() -> type[Any]:
    """PyMySQL's unbuffered cursor, except that it doesn't read on from a lost connection."""
    from pymysql.cursors import SSCursor

    class UnbufferedCursor(SSCursor):
        def close(self) -> None:
            result: Any = self._result  # type: ignore[attr-defined]
            if result is not None and result.connection is not None and not result.connection.open:
                result.unbuffered_active = False  # its `__del__` would read on, too
            super().close()

        __del__ = close

    return UnbufferedCursor


class MySQLDatabase(Database, peewee.MySQLDatabase):
    """MySQL and MariaDB through PyMySQL."""

    def init(self, database: str, **kwargs: Any) -> None:
        kwargs.setdefault("connect_timeout", 5)
        # PyMySQL's limit for connecting is for the socket only; a server may say nothing then.
        self._read_timeout = kwargs.get("read_timeout")
        kwargs.setdefault("read_timeout", kwargs["connect_timeout"])
        super().init(database, **kwargs)

    def _connect(self) -> Any:
        conn = super()._connect()
        conn._read_timeout = self._read_timeout
        return conn

    def prepare_session(self, conn: Any, statement_timeout: float | None) -> None:
        if statement_timeout is None:
            return
        if self.mariadb:
            conn.query(f"SET SESSION max_statement_time = {statement_timeout:f}")
        else:  # for SELECT only
            conn.query(f"SET SESSION max_execution_time = {math.ceil(statement_timeout * 1000)}")

    def interrupt(self, conn: Any) -> bool:
        try:
            with closing(self._connect()) as other:
                other.query(f"KILL QUERY {conn.thread_id()}")
        except Exception:
            self.cut(conn)  # the server is away, or frozen
        return False  # what comes too late would end the next statement

    def cut(self, conn: Any) -> None:
        _shut_down(conn._sock.fileno())

    def _set_server_version(self, conn: Any) -> None:
        super()._set_server_version(conn)
        version = conn.get_server_info()
        self.mariadb: bool = self.mariadb or "maria" in version.lower()

    def _initialize_connection(self, conn: Any) -> None:
        super()._initialize_connection(conn)
        # JSON_ARRAYAGG cuts what is longer, by default 1 MiB; now only max_allowed_packet does.
        conn.query(f"SET SESSION group_concat_max_len = {2**32 - 1}")

    def texts(self, cursor: Any) -> Sequence[bytes]:
        rows = cursor.fetchall()
        self.check_end(cursor, True)
        return encoded(rows)

    def check_end(self, cursor: Any, whole: bool) -> None:
        if not cursor.warning_count:
            return
        warnings = self.cursor()
        warnings.execute("SHOW WARNINGS")
        if any(code in _CUT for _, code, _ in warnings.fetchall()):
            if whole:
                raise NotBuilt
            raise peewee.DataError(
                "A row of this stream is larger than the server's max_allowed_packet, so that its "
                "JSON was cut. Raise max_allowed_packet, or send fewer rows within a row."
            )

    def drop_unread(self) -> None:
        # It can't be told to stop, and closing the cursor would read to the end.
        conn = self._state.conn
        if conn._result is not None and conn._result.unbuffered_active:
            conn._result.unbuffered_active = False
            conn._force_close()

    def begin(self, isolation_level: Any = None, *, read_only: bool = False) -> None:
        if not read_only:
            super().begin(_isolation(isolation_level))
            return
        with self.waiting(), translate_driver_errors:
            cursor = self.cursor()
            if isolation_level:
                cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {_isolation(isolation_level)}")
            cursor.execute("START TRANSACTION READ ONLY")

    def cursor(self, named_cursor: Any = None) -> Any:
        cursor = super().cursor()
        if not named_cursor:
            return cursor
        return self._state.conn.cursor(_unbuffered_cursor())

    def is_open(self, conn: Any) -> bool:
        if not conn.open:
            return False
        if conn._result is not None and conn._result.unbuffered_active:
            return True  # rows are on their way
        # Unasked, a server says nothing but farewell.
        return not _readable(conn._sock)

    def lost(self, conn: Any, error: Exception) -> bool:
        return _mysql_code(error) in _FAREWELLS or not self.is_open(conn)

    def ended(self, conn: Any, error: Exception) -> bool:
        from pymysql.constants.SERVER_STATUS import SERVER_STATUS_IN_TRANS

        if not self.transient(error):
            return False
        try:
            conn.query(
                "DO 0"
            )  # an error's packet doesn't say whether the transaction is still open
        except Exception:
            return True
        return not conn.server_status & SERVER_STATUS_IN_TRANS

    def transient(self, error: BaseException | None) -> bool:
        return _mysql_code(error) in _TRANSIENT

    def is_alive(self, conn: Any) -> bool:
        try:
            conn.ping(reconnect=False)
        except Exception:
            return False
        return True

    def clean(self, conn: Any, lease: Lease) -> bool:
        from pymysql.constants.SERVER_STATUS import SERVER_STATUS_IN_TRANS

        if not conn.open or lease.tainted:
            return False
        if conn.server_status & SERVER_STATUS_IN_TRANS:
            conn.rollback()
        return True


def _cause(error: BaseException | None) -> Any:
    """The driver's error in one of Peewee's, or in the one that ended a transaction."""
    if isinstance(error, TransactionAborted):
        error = error.__cause__
    return driver_error(error)


def _mysql_code(error: BaseException | None) -> Any:
    cause = _cause(error)
    known = type(cause).__module__.startswith("pymysql") and cause.args
    return cause.args[0] if known else None


def _shut_down(fd: int) -> None:
    # A duplicate, since the driver's own object closes its descriptor when it likes.
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


def _readable(sock: Any) -> bool:
    if not hasattr(select, "poll"):  # on Windows
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _isolation(level: Any) -> Any:
    if isinstance(level, str):
        if level.upper() not in _ISOLATION_LEVELS:
            raise ValueError(
                f"isolation_level must be one of {', '.join(_ISOLATION_LEVELS)}, got: {level!r}"
            )
        return level.upper()
    return level


_SCHEMES: dict[str, type[Database]] = {
    "sqlite": SqliteDatabase,
    "postgresql": PostgresqlDatabase,
    "postgres": PostgresqlDatabase,
    "mysql": MySQLDatabase,
    "mariadb": MySQLDatabase,
}


def _parse(url: str) -> tuple[str, dict[str, Any] | None]:
    """The scheme, and what the rest says; None if it can't be read.

    What `urllib` says then quotes a part of the URL that may be one of the password. It isn't even
    kept as the context of our error.
    """
    from playhouse.db_url import parse  # it imports every driver that is there

    # Without "://", what stands before the first colon may be anything.
    scheme = url.partition("://")[0].strip().lower() if "://" in url else ""
    scheme = scheme if re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) else ""
    try:
        return scheme, parse(url, unquote_password=True, unquote_user=True)
    except ValueError:
        return scheme, None


_POOL_NAMES = {"max_connections": "pool_size", "stale_timeout": "max_lifetime"}


def connect(
    url: str,
    *,
    pool_size: int = 10,
    timeout: float = 10.0,
    max_waiting: int = 1000,
    max_lifetime: float = 3600.0,
    statement_timeout: float | None = None,
    transaction_timeout: float | None = None,
    leak_detection_threshold: float | None = None,
    **options: Any,
) -> "Database":
    """Make a database from a URL. Nothing is opened before the first use.

    ::

        db = connect("sqlite:///app.db")            # a file; four slashes for an absolute path
        db = connect("sqlite:///:memory:")          # one database for all threads
        db = connect("postgresql://user:password@host:5432/name")
        db = connect("mysql://user:password@host:3306/name")    # MySQL and MariaDB

    Args:
        url: as above. User and password are percent-decoded. What follows a `?` is passed on as
            options: `postgresql:///name?host=/run/postgresql&pool_size=20`.
        pool_size: the greatest number of connections that requests and tasks use at a time.
            Synchronous code outside of requests has one more for each thread.
        timeout: seconds to wait for a connection, then `PoolTimeout`.
        max_waiting: how many may wait at a time; more get `TooManyWaiting` at once.
        max_lifetime: seconds after which a connection is replaced.
        statement_timeout: seconds that a statement of a request or task may take, then it fails
            with `peewee.OperationalError`; None for any time. The database ends it, if it can, and
            otherwise its connection is cut.
        transaction_timeout: seconds that a transaction of a request or task may be open, then its
            connection is cut; None for any time.
        leak_detection_threshold: seconds after which a connection that is still held is logged as
            a warning, with the stack that took it; None for never.
        options: for Peewee's database class and, through it, the driver: `pragmas`,
            `busy_timeout` and `inline_reads` (SQLite; seconds), `connect_timeout` (PostgreSQL,
            MySQL; seconds), …

    Raises:
        ValueError: the URL can't be understood, or a setting is out of range.
        peewee.ImproperlyConfigured: the driver isn't installed.
    """
    scheme, parameters = _parse(url)
    database_class = _SCHEMES.get(scheme)
    if database_class is None:
        raise ValueError(
            f"Can't tell the kind of database from the URL's scheme {scheme!r}. It must be one of "
            f"{', '.join(sorted(_SCHEMES))}; for example sqlite:///app.db."
        )
    if parameters is None:
        raise ValueError(
            "The URL can't be taken apart. Most likely user or password have a character that "
            "means something else in a URL, such as / ? # [ or @. Percent-encode them: "
            "urllib.parse.quote(password, safe='')."
        )
    if not parameters.get("database"):
        raise ValueError(
            f"The URL names no database. Local databases take three slashes ({scheme}:///name), "
            f"remote ones are written {scheme}://user:password@host/name."
        )
    if "passwd" in parameters:
        parameters["password"] = parameters.pop("passwd")
    if scheme == "mariadb":
        parameters.setdefault("mariadb", True)
    for theirs, ours in _POOL_NAMES.items():
        if theirs in parameters or theirs in options:
            raise ValueError(f"{theirs} is a setting of playhouse.pool; here it is {ours}.")
    settings: dict[str, Any] = {
        "pool_size": pool_size,
        "timeout": timeout,
        "max_waiting": max_waiting,
        "max_lifetime": max_lifetime,
        "statement_timeout": statement_timeout,
        "transaction_timeout": transaction_timeout,
        "leak_detection_threshold": leak_detection_threshold,
    }
    return database_class(**{**settings, **parameters, **options})
