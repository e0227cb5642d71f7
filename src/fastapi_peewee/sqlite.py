"""SQLite: how it is opened, begins to write, and is cleaned; who writes next."""

import asyncio
import functools
import math
import os
import sqlite3
import time
import uuid
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import get_ident
from typing import Any

import peewee

from .database import REFUSED, Database
from .drivers import ISOLATION_LEVELS, Returned, cause_of, isolation
from .files import OpensFile, file_of
from .group_commit import GroupCommit
from .inline import InlineReader
from .outcomes import only_reads
from .pool import PoolStats
from .reads import encoded
from .state import Lease, called_by_peewee, translate_driver_errors
from .watchdog import Stepwise
from .writers import Writers, rest_of_patience

_NOTHING: AbstractContextManager[None] = nullcontext()


def _fetching(name: str) -> Any:
    fetch = getattr(sqlite3.Cursor, name)

    def fetching(self: "_Cursor") -> Any:
        steps = self.steps
        try:
            if steps is None:
                return fetch(self)
            timed = steps.begun is not None  # it may come to be meanwhile
            if timed:
                with steps:
                    return fetch(self)
            held = steps.held
            held.waiting = steps  # `with steps:`, but faster, since it is done for each row
            try:
                return fetch(self)
            finally:
                held.waiting = None
                if steps.begun is not None:
                    steps.end_step()
        except sqlite3.Error:
            with translate_driver_errors:
                raise

    return fetching


class _Cursor(sqlite3.Cursor):
    """One that knows that SQLite works, and may fail, also while rows are fetched. So its time is
    limited then, too, and its errors are Peewee's, who translates those of `execute()`.
    """

    #: For the watchdog; None: it doesn't look.
    steps: Stepwise | None = None

    def execute(self, *args: Any) -> Any:
        if self.steps is None:
            return super().execute(*args)
        self.steps = self.steps.anew()
        with self.steps:
            return super().execute(*args)

    fetchone = _fetching("fetchone")
    fetchall = _fetching("fetchall")
    __next__ = _fetching("__next__")

    def fetchmany(self, *args: Any, **kwargs: Any) -> Any:
        with translate_driver_errors, self.steps or _NOTHING:
            return super().fetchmany(*args, **kwargs)


class _Connection(sqlite3.Connection):
    """The driver's, with cursors of ours, unless the caller's `factory` has others."""

    def cursor(self, factory: Any = _Cursor) -> Any:
        return super().cursor(factory)


class _KnownCursors:
    """A connection, ours or of the caller's `factory`, that knows its cursors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        cursor = super().cursor(*args, **kwargs)  # type: ignore[misc]
        self.cursors.add(cursor)
        return cursor

    def execute(self, *args: Any) -> Any:
        return self.cursor().execute(*args)

    def close_cursors(self) -> None:
        """A half-read one keeps the connection on an old snapshot, and interrupted, if it was."""
        for cursor in self.cursors:
            cursor.close()
            if isinstance(cursor, _Cursor):
                cursor.steps = None
        self.cursors.clear()


class SqliteDatabase(Database, peewee.SqliteDatabase):
    """SQLite: write-ahead log, foreign keys enforced, `BEGIN IMMEDIATE` for what writes."""

    writes_on_the_loop = True

    #: Lets a database in memory go: with `db`, or when it is given another one.
    _keeper: "weakref.finalize[..., Any] | None" = None

    if_unreachable = (
        "The directory of SQLite's file must exist and be writable, and so must the file: the "
        "write-ahead log is kept beside it. A file that is only read and isn't in that mode is "
        'opened with connect(…, pragmas={"journal_mode": "delete"}); any file that nobody writes '
        'to with connect(…, database="file:/path/to/app.db?immutable=1", uri=True).'
    )

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
        # No weak dictionary: looking through one isn't safe while other threads' loops are added.
        self._groups: dict[asyncio.AbstractEventLoop, GroupCommit] = {}
        self._inline: InlineReader | None = None
        self.reads_on_the_loop = bool(float(inline_reads))
        if self.reads_on_the_loop:
            self._inline = InlineReader(self.open_connection, float(inline_reads))
        super().__init__(database, pragmas, **kwargs)
        patience = min(float(busy_timeout), self.pool.statement_timeout or math.inf)
        self._writers = Writers(patience)
        _databases[id(self)] = self

    def init(self, database: str, pragmas: Any = None, **kwargs: Any) -> None:
        former, self._keeper = self._keeper, None
        given = dict(pragmas or self._pragmas or {})
        defaults: dict[str, Any] = {"foreign_keys": 1}
        if database == ":memory:":
            # One database for all connections, until the last one of them is closed.
            database = f"file:/fastapi-peewee-{uuid.uuid4().hex}?vfs=memdb"
            kwargs["uri"] = True
            keeper = sqlite3.connect(database, uri=True, check_same_thread=False)
            self._keeper = weakref.finalize(self, keeper.close)
        else:
            defaults["journal_mode"] = "wal"
        kwargs.setdefault("check_same_thread", False)
        given_factory = [kwargs["factory"]] if "factory" in kwargs else []
        kwargs["factory"] = type(
            "Connection", (OpensFile, _KnownCursors, *given_factory, _Connection), {}
        )
        kwargs.setdefault("timeout", self._busy_timeout)
        super().init(database, pragmas={**defaults, **given}, **kwargs)
        if former is not None:
            former()

    def _connect(self, limit: float = math.inf) -> Any:
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

    def _attach_databases(self, conn: Any) -> None:
        for database in self._attached.values():
            conn.opens(database, uri=self.connect_params.get("uri", False))
        super()._attach_databases(conn)

    def connection(self) -> Any:
        conn = super().connection()
        if not called_by_peewee():
            conn.handed_out = True
        return conn

    def close_unused(self) -> None:
        """Close the connections to the file that nobody uses, and that of this thread or lease if
        it has nothing that another one hasn't. It waits for nobody: see `files`.
        """
        if (
            self.deferred
            or file_of(self.database, uri=self.connect_params.get("uri", False)) is None
        ):
            return  # what is in memory would be gone
        self.pool.close_idle(wait=False)
        if self._inline is not None:
            self._inline.close(wait=False)
        schemas = {"main", *self._attached}
        own = self._state.own_cell()
        # Without `autoconnect` it would not come back.
        if not own["closed"] and self.autoconnect and own["conn"].at_rest(schemas):
            conn, own["conn"], own["closed"] = own["conn"], None, True
            self.close_connection(conn)
        lease = self._state.own_lease()
        if lease is None or lease.root.held is None or lease.root.tainted:
            return
        if lease.state["transactions"]:  # of which the end would be missed
            return
        mine = lease.owner == get_ident()
        if mine or lease.turn.acquire_unless_locked():
            try:
                if lease.root.held.conn.at_rest(schemas):
                    self.pool.let_go(lease.root)
            finally:
                if not mine:
                    lease.turn.release()

    def begin(
        self,
        lock_type: str | None = None,
        *,
        isolation_level: str | None = None,
        read_only: bool = False,
    ) -> None:
        if isinstance(lock_type, str) and lock_type.upper() in ISOLATION_LEVELS:
            lock_type, isolation_level = None, lock_type
        isolation(isolation_level)
        lock_type = lock_type or ("DEFERRED" if read_only else self._lock_type)
        lease = self._state.lease()
        # Not `self._state`: when the request is over, that isn't the lease's any more.
        state = {} if lease is None else lease.state
        waited = 0.0
        if lease is not None and lock_type in ("IMMEDIATE", "EXCLUSIVE"):
            self._ensure_connected(lease)
            # In a transaction SQLite refuses it at once, and the turn may be this lease's own.
            conn = self._state.conn
            if not conn.in_transaction and state.get("writing") is None:
                with translate_driver_errors:
                    state["writing"], waited = self._writers.enter(conn=conn)
        try:
            with rest_of_patience(lease, waited):
                super().begin(lock_type)
        except BaseException:
            _end_turn_if_over(state)
            raise
        if read_only:
            self._state.read_only = True
            self._set_query_only(1)

    def commit(self) -> None:
        state = self._state.cell()
        try:
            super().commit()
        finally:  # a full disk may have ended it as well
            _end_turn_if_over(state)
        self._end_read_only()

    def rollback(self) -> None:
        # From here on an interrupt for its limit could only keep it from being rolled back.
        lease, state = self._state.lease(), self._state.cell()
        self.pool.transaction(lease, begun=False)
        try:
            try:
                super().rollback()
            except peewee.OperationalError:
                # An interrupt lasts as long as a cursor is half read, for ROLLBACK, too.
                if not self._state.conn.in_transaction:
                    raise
                self._state.conn.close_cursors()
                super().rollback()
        finally:
            _end_turn(state)
        self._end_read_only()

    def waiting(self) -> AbstractContextManager[None]:
        return _NOTHING  # its cursors are what is watched

    def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
        lease = self._state.lease()
        # A read, or a connection whose end nobody would see.
        if lease is None or only_reads(sql):
            return super()._execute_cursor(sql, params, **options)
        state = lease.state
        if state.get("writing") is not None:
            try:
                return super()._execute_cursor(sql, params, **options)
            finally:  # it may be a COMMIT, or have failed in such a way that all was rolled back
                _end_turn_if_over(state)
        if lease.root.held is None:  # no more, since a fork
            self._ensure_connected(lease)
        conn = lease.root.held.conn
        if conn.in_transaction:
            return super()._execute_cursor(sql, params, **options)
        with translate_driver_errors:
            gate, waited = self._writers.enter(conn=conn)
        try:
            with rest_of_patience(lease, waited):
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
        if lease is not None and isinstance(cursor, _Cursor):
            cursor.steps = self.pool.steps(lease)
        return cursor

    def _initialize_connection(self, conn: Any) -> None:
        super()._initialize_connection(conn)
        conn.create_function("fastapi_peewee_float", 1, _json_float, deterministic=True)

    async def aexecute_compiled(self, sql: str, params: Sequence[Any]) -> Any:
        if self.taints(sql):
            return None
        if only_reads(sql):
            return await self._read_inline(sql, params)
        if self._attached:  # a transaction would lock those files, too
            return None
        try:
            with translate_driver_errors:
                return await self._group().execute(sql, params)
        except REFUSED as error:
            self.raise_refused(error, sql, params)

    def _group(self) -> GroupCommit:
        loop = asyncio.get_running_loop()
        group = self._groups.get(loop)
        if group is None:
            for other in list(self._groups):
                if other.is_closed():
                    self._groups.pop(other, None)
            group = self._groups[loop] = GroupCommit(self.pool, self._state, self._writers)
        return group

    @property
    def pool_stats(self) -> PoolStats:
        stats = super().pool_stats
        writers = sum(group.waiting for group in list(self._groups.values()))
        return stats._replace(waiting=stats.waiting + writers)

    async def aread_texts(self, sql: str, params: Sequence[Any]) -> Sequence[bytes] | None:
        rows = await self._read_inline(sql, params)
        return None if rows is None else encoded(rows.fetchall())

    async def _read_inline(self, sql: str, params: Sequence[Any]) -> Returned | None:
        inline = self._inline
        assert inline is not None  # since `reads_on_the_loop`
        if not inline.ready:
            try:
                await asyncio.to_thread(inline.open)
            except (peewee.DatabaseError, peewee.InterfaceError):  # the pool's error says more
                return None
        return inline.read(sql, params)

    def pragma(
        self,
        key: str,
        value: Any = peewee.SENTINEL,
        permanent: bool = False,
        schema: str | None = None,
    ) -> Any:
        result = super().pragma(key, value, permanent, schema)
        if permanent:
            self.close_all()  # those that exist lack it
        return result

    def close_all(self) -> None:
        super().close_all()
        if self._inline is not None:
            self._inline.close()

    def refuses_json(self, error: Exception) -> bool:
        # "JSON cannot hold BLOB values", "malformed JSON"; "string or blob too big", of 1 GB.
        return "JSON" in str(error) or "too big" in str(error)

    def open_rows(self, query: Any) -> Any:
        rows = super().open_rows(query)
        # A half-read query of a database in memory would keep all writers out.
        return rows if self._keeper is None else iter(list(rows))

    def is_open(self, conn: Any) -> bool:
        return True

    def is_alive(self, conn: Any, limit: float) -> bool:
        return True

    def lost(self, conn: Any, error: Exception) -> bool:
        return False

    def ended(self, conn: Any, error: Exception) -> bool:
        return not conn.in_transaction  # the disk is full, or can't be read

    def is_in_transaction(self, conn: Any) -> bool:
        return bool(conn.in_transaction)  # COMMIT may be tried again

    def transient(self, error: BaseException | None) -> bool:
        code = getattr(cause_of(error), "sqlite_errorcode", 0)
        return bool(code & 0xFF == sqlite3.SQLITE_BUSY)

    def prepare_session(
        self, conn: Any, statement_timeout: float | None, limit: float = math.inf
    ) -> None:
        if statement_timeout is not None and statement_timeout < self._busy_timeout:
            # While SQLite waits for a lock, it can't be interrupted.
            conn.execute(f"PRAGMA busy_timeout = {math.ceil(statement_timeout * 1000)}")

    def interrupt(self, conn: Any) -> bool:
        self._writers.interrupt(conn)
        conn.interrupt()
        return True

    def cut(self, conn: Any) -> bool:
        return self.interrupt(conn)

    def clean(self, conn: Any, lease: Lease) -> bool:
        try:
            return self._clean(conn, lease)
        finally:
            _end_turn(lease.state)

    def _clean(self, conn: Any, lease: Lease) -> bool:
        conn.close_cursors()
        if conn.in_transaction:
            conn.rollback()
        return not lease.tainted and not lease.state.get("read_only")


_databases: "weakref.WeakValueDictionary[int, SqliteDatabase]" = weakref.WeakValueDictionary()


def _before_fork() -> None:
    # `valuerefs()` is a copy: other threads may make some meanwhile.
    for db in filter(None, [found() for found in _databases.valuerefs()]):
        with suppress(Exception):  # what can't be closed counts as open
            db.close_unused()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before_fork)


def _end_turn(state: dict[str, Any]) -> None:
    """Let the next one write, if the turn is that of the connection which has this state."""
    gate, state["writing"] = state.get("writing"), None
    if gate is not None:
        gate.release()


def _end_turn_if_over(state: dict[str, Any]) -> None:
    if state.get("writing") is not None:
        try:
            over = not state["conn"].in_transaction
        except sqlite3.ProgrammingError:  # the connection was closed
            over = True
        if over:
            _end_turn(state)


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
