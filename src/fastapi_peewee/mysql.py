"""MySQL and MariaDB through PyMySQL: sessions, unbuffered cursors, what was lost."""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import peewee

from .database import Database
from .drivers import cause_of, isolation, readable, shut_down
from .reads import NotBuilt, encoded
from .state import Lease, translate_driver_errors

#: Lock wait time-out, deadlock, and MariaDB's "record has changed since last read".
_TRANSIENT = (1205, 1213, 1020)

#: Errors with which the server, or PyMySQL in its place, ends a connection.
_FAREWELLS = (0, 1053, 1927, 2013, 2055)

#: Errors of a statement that the server has not read to its end, and so not begun: larger than
#: `max_allowed_packet`, and, PyMySQL's own, one that couldn't be sent. They end the connection.
_UNREAD = (1153, 2006)

#: Bytes of a statement that the system takes at once: what a server says of it is read afterwards.
_SURELY_SENT = 2**15

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


@functools.cache
def _connection_class() -> type[Any]:
    """PyMySQL's connection, except that `connect_timeout` is for all that has to be said and read
    until it is `lifted`: PyMySQL has it for the socket, and each answer may take its time.
    """
    from pymysql.connections import Connection
    from pymysql.err import OperationalError
    from pymysql.protocol import MysqlPacket

    base: Any = Connection

    class TimedConnection(base):
        _sock: Any
        _read_timeout: float | None
        _write_timeout: float | None
        _deadline: float | None = math.inf

        def connect(self, sock: Any = None) -> None:
            if self._deadline is not None:  # or else somebody connects it anew
                self._deadline = time.monotonic() + self.connect_timeout
            super().connect(sock)

        def _request_authentication(self) -> None:
            self._hurry()
            super()._request_authentication()

        def _execute_command(self, command: int, sql: str | bytes) -> None:
            self._hurry()
            if len(sql) < _SURELY_SENT or not self._sock:
                super()._execute_command(command, sql)
                return
            sock = self._sock
            with sock.makefile("rb", 0) as answers:  # or `super()` would close all that can read
                try:
                    super()._execute_command(command, sql)
                except OperationalError:
                    # Why the server hung up it has said before, whatever number its packet has.
                    with suppress(OSError, TypeError, IndexError):  # or it has said nothing
                        sock.settimeout(0)
                        length = int.from_bytes(answers.read(4)[:3], "little")
                        MysqlPacket(answers.read(length), self.encoding).check_error()
                    raise

        def _hurry(self) -> None:
            if self._deadline is not None:
                left = max(self._deadline - time.monotonic(), 0.001)
                self._read_timeout = self._write_timeout = left

        def _read_query_result(self, unbuffered: bool = False) -> Any:
            try:
                return super()._read_query_result(unbuffered)
            except OperationalError as error:
                if error.args[0] in _UNREAD:
                    self._force_close()  # the server does
                raise

        def lift(self, read_timeout: float | None, write_timeout: float | None) -> None:
            """From now on these hold, for each reading and writing."""
            self._deadline = None
            self._read_timeout, self._write_timeout = read_timeout, write_timeout

    return TimedConnection


class MySQLDatabase(Database, peewee.MySQLDatabase):
    """MySQL and MariaDB through PyMySQL."""

    def init(self, database: str, **kwargs: Any) -> None:
        kwargs.setdefault("connect_timeout", 5)
        super().init(database, **kwargs)

    def _connect(self, limit: float = math.inf) -> Any:
        """A connection for which this limit holds, whatever is done with it, until it is lifted."""
        seconds = min(limit, self.connect_timeout)
        # The server's greeting is read before we are asked for anything.
        params = {**self.connect_params, "connect_timeout": seconds, "read_timeout": seconds}
        return _connection_class()(database=self.database, autocommit=True, **params)

    def open_connection(self, limit: float = math.inf) -> Any:
        conn = super().open_connection(limit)
        given = self.connect_params
        conn.lift(given.get("read_timeout"), given.get("write_timeout"))
        return conn

    @contextmanager
    def _reading_for(self, conn: Any, limit: float) -> Iterator[None]:
        usual, conn._read_timeout = conn._read_timeout, limit
        try:
            yield
        finally:
            conn._read_timeout = usual

    def prepare_session(
        self, conn: Any, statement_timeout: float | None, limit: float = math.inf
    ) -> None:
        if statement_timeout is None:
            return
        if self.mariadb:
            setting = f"max_statement_time = {statement_timeout:f}"
        else:  # for SELECT only
            setting = f"max_execution_time = {math.ceil(statement_timeout * 1000)}"
        with self._reading_for(conn, min(limit, self.connect_timeout)):
            conn.query(f"SET SESSION {setting}")

    def interrupt(self, conn: Any) -> bool:
        try:
            with closing(self._connect(self.cancel_timeout)) as other:
                other.query(f"KILL QUERY {conn.thread_id()}")
        except Exception:
            self.cut(conn)  # the server is away, or frozen
        return False  # what comes too late would end the next statement

    def cut(self, conn: Any) -> bool:
        shut_down(conn._sock.fileno())
        return False

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
            super().begin(isolation(isolation_level))
            return
        with self.waiting(), translate_driver_errors:
            cursor = self.cursor()
            if isolation_level:
                cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation(isolation_level)}")
            cursor.execute("START TRANSACTION READ ONLY")
        self._has_begun()

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
        return not readable(conn._sock)

    def lost(self, conn: Any, error: Exception) -> bool:
        code = _mysql_code(error)
        return code not in _UNREAD and (code in _FAREWELLS or not self.is_open(conn))

    def ended(self, conn: Any, error: Exception) -> bool:
        if _mysql_code(error) in _UNREAD:
            return True
        if not self.transient(error):
            return False
        try:
            conn.query("DO 0")  # an error's packet doesn't say whether it is still open
        except Exception:
            return True
        return self.is_idle(conn)

    def is_idle(self, conn: Any) -> bool:
        from pymysql.constants.SERVER_STATUS import SERVER_STATUS_IN_TRANS

        return not conn.server_status & SERVER_STATUS_IN_TRANS

    def transient(self, error: BaseException | None) -> bool:
        return _mysql_code(error) in _TRANSIENT

    def is_alive(self, conn: Any, limit: float) -> bool:
        try:
            with self._reading_for(conn, limit):
                conn.ping(reconnect=False)
        except Exception:
            return False
        return True

    def clean(self, conn: Any, lease: Lease) -> bool:
        if not conn.open or lease.tainted:
            return False
        if not self.is_idle(conn):
            conn.rollback()
        return True


def _mysql_code(error: BaseException | None) -> Any:
    cause = cause_of(error)
    known = type(cause).__module__.startswith("pymysql") and cause.args
    return cause.args[0] if known else None
