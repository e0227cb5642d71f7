"""Compiled statements on PostgreSQL, given to libpq directly: for rows of one text each.

psycopg's cursors take several steps for a statement, each of which lets other threads have the
interpreter. Here a thread waits once, inside libpq; or the event loop waits for the socket, and no
thread is needed. The texts go on as they came. Everything else goes through psycopg's cursors.

And what waits for the server for a stated time: connecting, and asking whether it is there.
"""

import asyncio
import functools
import math
import os
import re
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

from .drivers import wait_for

#: How many statements a connection knows at most; each takes memory of the server's.
_MOST = 300

#: Seconds after which a socket is looked at though the event loop said nothing: uvloop forgets one
#: with an error (POLLERR), as that of a server that was killed, without calling anybody.
_LOOK_EVERY = 0.1


class _Unusual(Exception):
    """A parameter that psycopg has to adapt."""


def _int(value: int) -> tuple[int, bytes]:
    # The smallest type, as psycopg does: functions that take `integer` refuse a `bigint`.
    if -(2**15) <= value < 2**15:
        return 21, b"%d" % value
    if -(2**31) <= value < 2**31:
        return 23, b"%d" % value
    if -(2**63) <= value < 2**63:
        return 20, b"%d" % value
    raise _Unusual


def _str(value: str) -> tuple[int, bytes]:
    if "\0" in value:
        raise _Unusual  # libpq would cut it there, without a word
    return 0, value.encode()


_ADAPTERS: dict[type, Callable[[Any], tuple[int, bytes | None]]] = {
    bool: lambda value: (16, b"t" if value else b"f"),
    float: lambda value: (701, repr(value).encode()),
    int: _int,
    str: _str,
    type(None): lambda _: (0, None),
}


@functools.lru_cache(maxsize=1024)
def _command(sql: str) -> bytes:
    """The statement with `$1`, `$2`, … in the place of `%s`, and `%` for `%%`."""
    numbers = iter(range(1, sql.count("%") + 1))
    return re.sub(
        "%[s%]", lambda found: "%" if found[0] == "%%" else f"${next(numbers)}", sql
    ).encode()


class Statements:
    """The statements that one connection has seen. Used by whoever has the turn of its lease.

    A statement is prepared when it comes for the second time.
    """

    def __init__(self, conn: Any) -> None:
        from psycopg import pq  # a driver is imported where it is used

        self._pq = pq
        self._conn = conn
        self._pgconn = conn.pgconn
        # `prepare_threshold=None` is psycopg's way to say that a pooler can't keep statements.
        self._usable = conn.prepare_threshold is not None and conn.info.encoding == "utf-8"
        self._names: dict[tuple[Any, ...], bytes | None] = {}
        self._count = 0

    def texts(self, sql: str, params: Sequence[Any]) -> list[bytes] | None:
        """The first column of all rows. None if psycopg has to do it; then nothing was sent.

        Raises:
            psycopg.Error: as a cursor would.
        """
        adapted = _adapted(params) if self._usable else None
        if adapted is None:
            return None
        steps, result = self._steps(sql, *adapted), None
        try:
            while True:
                method, arguments = steps.send(result)
                result = getattr(self._pgconn, method)(*arguments)
        except StopIteration as done:
            return self._column(done.value)

    async def atexts(self, sql: str, params: Sequence[Any]) -> list[bytes] | None:
        """The same on the event loop, without a thread.

        If it is cancelled, or fails otherwise than with an error of the statement's, an answer may
        be on its way: the caller closes the connection.

        Raises:
            NotImplementedError: this event loop can't watch sockets; nothing was sent.
        """
        adapted = _adapted(params) if self._usable else None
        if adapted is None:
            return None
        steps, result = self._steps(sql, *adapted), None
        try:
            while True:
                method, arguments = steps.send(result)
                result = await self._watch().ask(_SENDERS[method], arguments)
        except StopIteration as done:
            return self._column(done.value)

    def _watch(self) -> "Watch":
        watch: Watch | None = self._conn.watch
        loop = asyncio.get_running_loop()
        if watch is None or watch.loop is not loop or not watch.end.alive:
            if watch is not None:
                watch.end()
            watch = self._conn.watch = Watch(self._pgconn, loop)
        return watch

    def _column(self, result: Any) -> list[bytes]:
        if result.status != self._pq.ExecStatus.TUPLES_OK:
            import psycopg

            if self._pgconn.status != self._pq.ConnStatus.OK:
                raise psycopg.OperationalError(self._pgconn.get_error_message())
            raise psycopg.errors.error_from_result(result)
        return [result.get_value(i, 0) for i in range(result.ntuples)]

    def _steps(
        self, sql: str, oids: list[int], values: list[bytes | None]
    ) -> Generator[tuple[str, Any], Any, Any]:
        """Yields what to ask the server for, is sent the results, and returns the last one."""
        key = (sql, *oids)
        name = self._names.get(key)
        if name is None:
            if key not in self._names:
                if len(self._names) < _MOST:
                    self._names[key] = None
                return (yield "exec_params", (_command(sql), values, oids))
            self._count += 1
            name = b"fastapi_peewee_%d" % self._count
            result = yield "prepare", (name, _command(sql), oids)
            if result.status != self._pq.ExecStatus.COMMAND_OK:
                return result
            self._names[key] = name
        result = yield "exec_prepared", (name, values)
        if result.error_field(self._pq.DiagnosticField.SQLSTATE) == b"26000":
            # DEALLOCATE ALL or DISCARD ALL. In a transaction, that is lost by now.
            self._names.clear()
            if self._pgconn.transaction_status == self._pq.TransactionStatus.IDLE:
                return (yield "exec_params", (_command(sql), values, oids))
        return result


#: libpq's functions that only send, for those that wait for the answer, too.
_SENDERS = {
    "exec_params": "send_query_params",
    "exec_prepared": "send_query_prepared",
    "prepare": "send_prepare",
}


class Watch:
    """A connection's socket, as one event loop watches it, from one statement to the next.

    It has a descriptor of its own, since libpq closes the other one when a connection is lost, in
    any thread. Its number may be another socket's then, which the event loop would take for watched
    already.

    Raises:
        NotImplementedError: this event loop can't watch sockets.
    """

    def __init__(self, pgconn: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pgconn = pgconn
        self._answered: asyncio.Future[None] | None = None
        self._results: list[Any] = []
        self._looks = _looks.setdefault(loop, _Looks())
        fd = os.dup(pgconn.socket)
        #: Stop watching. To be called once or more, in any thread.
        self.end = weakref.finalize(self, _unwatch_soon, loop, fd)
        self.end.atexit = False
        try:
            loop.add_reader(fd, _read, weakref.ref(self))
        except NotImplementedError:
            self.end.detach()
            os.close(fd)
            raise

    async def ask(self, method: str, arguments: Any) -> Any:
        """The last result of what one of libpq's functions sends."""
        answered = self._answered = self.loop.create_future()
        self._looks.add(self)
        try:
            getattr(self._pgconn, method)(*arguments)
            self._pgconn.flush()
            await answered
            return self._results[-1]
        finally:
            self._answered, self._results = None, []
            self._looks.discard(self)

    def read(self) -> None:
        """Take what has come."""
        answered = self._answered
        if answered is None:  # what a thread has asked for, or the server has hung up
            self.end()
            return
        try:
            self._pgconn.consume_input()
            while not self._pgconn.is_busy():
                result = self._pgconn.get_result()
                if result is None:
                    _settle(answered)
                    return
                self._results.append(result)
        except Exception as error:
            _settle(answered, error)
            self.end()


def _read(watch: "weakref.ref[Watch]") -> None:
    if (found := watch()) is not None:
        found.read()


def _unwatch_soon(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    try:
        loop.call_soon_threadsafe(_unwatch, loop, fd)
    except RuntimeError:  # it is closed
        os.close(fd)


def _unwatch(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    loop.remove_reader(fd)
    os.close(fd)


class _Looks:
    """Has all sockets that tasks of one event loop wait for looked at, now and then."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._is_due = False

    def add(self, watch: Watch) -> None:
        self._watches.add(watch)
        self._go_on(watch.loop)

    def discard(self, watch: Watch) -> None:
        self._watches.discard(watch)

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_due:
            self._is_due = True
            loop.call_later(_LOOK_EVERY, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_due = False
        for watch in list(self._watches):
            watch.read()
        if self._watches:
            self._go_on(loop)


_looks: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Looks]"
_looks = weakref.WeakKeyDictionary()


def _adapted(params: Sequence[Any]) -> tuple[list[int], list[bytes | None]] | None:
    oids, values = [], []
    try:
        for value in params:
            oid, text = _ADAPTERS[type(value)](value)
            oids.append(oid)
            values.append(text)
    except (_Unusual, KeyError, UnicodeEncodeError):
        return None
    return oids, values


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
    deadline = time.monotonic() + seconds
    pgconn.send_query(sql)
    pgconn.flush()
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


def _settle(future: "asyncio.Future[None]", error: Exception | None = None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
