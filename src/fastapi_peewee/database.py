"""`Database`: what every database from `connect()` has beyond Peewee's.

A pool, `run` and the other `async` methods. What differs between databases is in `backends`;
nothing here knows of FastAPI.
"""

import asyncio
import inspect
import logging
import math
import re
import threading
from asyncio.events import _get_running_loop
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from threading import get_ident
from typing import Any, NoReturn, ParamSpec, TypeVar, overload

import peewee

from . import single
from .async_names import AsyncNames
from .blocks import Atomic, CommitCallback, LeaseContext, Manual, Savepoint, Transaction
from .calls import Call, await_callbacks, carried_out, detached, result_of, run_follow_ups
from .exceptions import BlockingQuery, FailedStatement, LeaseEnded
from .pool import Pool, PoolStats
from .reads import Reads
from .retries import Backoff, Retrying, retrying
from .sql_cache import Known, SqlCache
from .state import (
    Lease,
    PeeweeConnectionState,
    RequestScope,
    allow_sync,
    called_by_peewee,
    caller,
    forbid_lazy_load,
    translate_driver_errors,
)
from .verbs import AsyncModel

logger = logging.getLogger("fastapi_peewee")

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


#: What Python makes of a value that can't be sent.
UNSENDABLE = OverflowError, UnicodeEncodeError

#: The errors that `raise_refused()` is for.
REFUSED = peewee.DatabaseError, *UNSENDABLE


#: Seconds in which the server has to take the order to end a statement; else its connection is cut.
CANCEL_TIMEOUT = 2.0


class _Owing(threading.local):
    """A thread's `with db:` blocks for which it has taken a turn. Their lease knows them, too, but
    is not there any more when the request, which was cancelled, is over before the thread.
    """

    def __init__(self) -> None:
        self.blocks: list[Atomic] = []


class Database(AsyncNames, Reads):
    """What `connect()` returns: a Peewee database for threads and tasks alike.

    All of Peewee works on it. Beyond Peewee it has `run` and the other `async` methods,
    `async with` on its blocks, and a pool.
    """

    pool: Pool

    #: How long `retry` waits between two tries.
    backoff = Backoff()

    def __init__(
        self,
        database: str,
        *args: Any,
        pool_size: int = 10,
        timeout: float = 10.0,
        max_waiting: int = 1000,
        max_lifetime: float = 3600.0,
        statement_timeout: float | None = None,
        transaction_timeout: float | None = None,
        leak_detection_threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        # `thread_safe=False` keeps Peewee from making the one lock that it holds through every
        # handshake. Nothing here needs it: the state below is never shared between threads.
        super().__init__(database, *args, **{**kwargs, "thread_safe": False})
        self.thread_safe = True
        self._state = PeeweeConnectionState()
        self._sql_cache = SqlCache(self)
        self._owing = _Owing()
        self.pool = Pool(
            self,
            size=pool_size,
            timeout=timeout,
            max_waiting=max_waiting,
            max_lifetime=max_lifetime,
            statement_timeout=statement_timeout,
            transaction_timeout=transaction_timeout,
            leak_detection_threshold=leak_detection_threshold,
        )

    def init(self, database: str, **kwargs: Any) -> None:
        super().init(database, **kwargs)
        if hasattr(self, "pool"):
            self.close_all()

    # Peewee's blocks, with an async side.

    def atomic(self, *args: Any, **kwargs: Any) -> Atomic:
        """A transaction or, inside of one, a savepoint; for `with`, `async with` and `@`.

        Args:
            isolation_level: "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ" or
                "SERIALIZABLE"; None for the database's default. SQLite is always serializable.
            read_only: refuse to write. On SQLite it also doesn't take the write lock, which other
                transactions take when they begin.

        Both are for the outermost block; a savepoint ignores them, as Peewee does.
        """
        return Atomic(self, *args, **kwargs)

    def transaction(self, *args: Any, **kwargs: Any) -> Transaction:
        return Transaction(self, *args, **kwargs)

    def savepoint(self) -> Savepoint:
        return Savepoint(self)

    def manual_commit(self) -> Manual:
        return Manual(self)

    def connection_context(self) -> LeaseContext:
        return LeaseContext(self)

    @overload
    def retry(
        self, fn: F, /, *, retries: int = 3, isolation_level: Any = None, read_only: bool = False
    ) -> F: ...

    @overload
    def retry(
        self,
        fn: None = None,
        /,
        *,
        retries: int = 3,
        isolation_level: Any = None,
        read_only: bool = False,
    ) -> Callable[[F], F]: ...

    def retry(self, fn: Any = None, /, *, retries: int = 3, **options: Any) -> Any:
        """Decorate a function, `def` or `async def`, that is a whole transaction: it is run anew
        if it fails only since others ran beside it.

        ::

            @db.retry
            def transfer(source: int, target: int, amount: int) -> None: ...

            @db.retry(retries=5, isolation_level="SERIALIZABLE")
            async def book(seat: int) -> Booking: ...

        The decorated function runs inside `db.atomic()`, of which each try has a new one. What is
        retried: serialisation failures, deadlocks, MySQL's lock wait time-out and SQLite's "busy".
        Before each further try it waits, for a random time of at most 50 ms, then 100 ms, … 1 s: on
        the event loop, without a connection, if the function is `async def`, an endpoint, or given
        to `db.run`; otherwise in its thread. The last try's error is raised.

        What the function does besides its transaction happens at each try: send the mail in
        `db.after_commit`.

        Inside an open transaction it is a savepoint and has one try, since only the whole of a
        transaction can be retried. Nor is a function tried again that has committed half-way, with
        `txn.commit()`.

        Args:
            retries: how many tries there may be after the first.
            isolation_level, read_only: as for `atomic`.

        Raises:
            TypeError: the function is a generator.
            ValueError: `retries` is no number of tries.
        """
        if fn is None:
            return partial(self.retry, retries=retries, **options)
        return Retrying(self, fn, retries, options).function()

    def __enter__(self) -> "Database":
        taken = self.connection_context() if self._state.homeless else None
        if taken is not None:
            taken.__enter__()
        block = self.atomic()
        block.taken, block.within = taken, id(caller())
        try:
            if self.is_closed():
                self.connect()
            block.__enter__()
        except BaseException as error:
            if taken is not None:
                taken.__exit__(type(error), error, None)
            raise
        self._state.ctx.append(block)
        if block.owes_turn:
            self._owing.blocks.append(block)
        return self

    def __exit__(self, *exc: Any) -> None:
        block = self._entered_here()
        if block is None:
            if exc[0] is None:
                raise LeaseEnded
            return
        try:
            block.__exit__(*exc)
        finally:
            try:
                if not self._state.ctx:
                    self.close()
            finally:
                if block.taken is not None:
                    block.taken.__exit__(*exc)

    def _entered_here(self) -> Atomic | None:
        """The block of the `with db:` that is being left."""
        ctx, owing, frame = self._state.ctx, self._owing.blocks, caller()
        blocks = [each for each in (*owing, *ctx) if isinstance(each, Atomic)]
        within = [each for each in blocks if each.within == id(frame)]
        # A generator may be left in any context: in that of whoever sets the collector off. Others
        # may be entered and left by another function each: those of an `ExitStack`, say.
        found = within if within or frame.f_code.co_flags & inspect.CO_GENERATOR else blocks
        if not found:
            return None
        block = found[-1]
        for each in (ctx, owing):
            if block in each:
                each.remove(block)
        return block

    async def __aenter__(self) -> "Database":
        context = self.connection_context()
        await context.__aenter__()
        self._state.ctx.append(context)
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._state.ctx.pop().__aexit__(*exc)

    def after_commit(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Have `fn` called once the transaction is committed; at once if there is none.

        Args:
            fn: takes no arguments. A plain function runs in the thread that has committed; an
                `async` one, or what a plain one returns to be awaited (`lambda: notify(user.id)`),
                after those, on the event loop. All of them run, each kind in the order of
                registration; one that raises is logged and harms no other. Those registered in a
                savepoint that is rolled back are dropped. Outside of any block an `async` one runs
                in a task of its own, which nobody waits for.

        Raises:
            ValueError: `fn` is `async`, but no event loop awaits this code.
            LeaseEnded: the transaction was rolled back when its request was cancelled.
        """
        lease = self._state.lease()
        request = RequestScope.current.get()
        if lease is None and request is not None and self._state in request.undone:
            raise LeaseEnded
        if not self._is_in_transaction(lease):
            if _is_async(fn):
                _have_awaited(fn, lease)
            elif inspect.isawaitable(result := fn()):
                _have_awaited(lambda: result, lease)
            return fn
        if _is_async(fn) and (lease is None or lease.root.follow_ups is None):
            raise ValueError(_NOBODY_AWAITS)
        if isinstance(self.top_transaction(), Manual):
            raise ValueError("after_commit() cannot be used with `manual_commit()`.")
        self._state.commit_callbacks.append(CommitCallback(fn, lease))
        return fn

    def _is_in_transaction(self, lease: Lease | None) -> bool:
        """Whether code under this lease is part of a transaction.

        The one that is open may be another task's, which shares the connection of the request.
        """
        # Another task's callbacks may run in the middle of a block, which is this one's as well.
        blocks = self._state.transactions or self._state.between
        outermost = next(iter(blocks), None)
        if isinstance(outermost, Transaction):
            return outermost.covers(lease)
        return outermost is not None

    def _run_commit_callbacks(self, callbacks: list[Any] | None = None) -> None:
        if callbacks is None:  # Peewee's own blocks, those of a `DatabaseProxy`, name none
            callbacks = self._state.commit_callbacks
        if not callbacks:
            return
        todo, callbacks[:] = list(callbacks), []
        lease = self._state.lease()
        with carried_out(None if lease is None else lease.call):
            for callback in todo:
                self._run_commit_callback(callback)

    def _run_commit_callback(self, callback: CommitCallback) -> None:
        if _is_async(callback.fn):
            _have_awaited(callback.fn, callback.lease)
            return
        try:
            result = callback.fn()
            if inspect.isawaitable(result):  # `lambda: notify(user.id)`
                _have_awaited(lambda: result, callback.lease)
        except (Exception, asyncio.CancelledError):  # a thread is never cancelled itself
            logger.exception("An after_commit callback failed; its transaction is committed.")

    # Connections outside of leases: one a thread, as Peewee has it.

    def connect(self, reuse_if_open: bool = False) -> bool:
        if not self._state.closed:
            if reuse_if_open:
                return False
            raise peewee.OperationalError("Connection already opened.")
        self._state.guard()
        self._state.set_connection(self.open_connection())
        return True

    def close(self) -> bool:
        """Close this thread's connection. A lease is left to whoever took it: returns False."""
        if self._state.lease() is not None or self._state.homeless:
            return False
        with allow_sync():  # closing asks the server nothing, so it may be done on an event loop
            return bool(super().close())

    def connection(self) -> Any:
        lease = self._state.lease()
        if lease is not None:
            self._ensure_connected(lease)
            lease.root.tainted = lease.root.handed_out = True  # what is done with it, nobody sees
        return super().connection()

    def cursor(self, named_cursor: Any = None) -> Any:
        lease = self._state.lease()
        if lease is not None:
            self._ensure_connected(lease)
            if not called_by_peewee():
                lease.root.tainted = lease.root.handed_out = True  # as above
        return super().cursor(named_cursor)

    def _ensure_connected(self, lease: Lease) -> None:
        if lease.root.held is None:
            turn = self.take_turn()
            if turn is not None:
                turn.give_turn()
            else:  # the thread has its turn, and what it had connected was let go before a fork
                self.pool.connect(lease.root)

    def close_if_dead(self) -> None:
        """Close this thread's connection if it is of no more use, and no block around will do it.
        Leases are the pool's.
        """
        state = self._state
        if state.lease() is None and not state.closed and not state.ctx:
            conn = state.conn
            if not self.is_open(conn):
                state.reset()
                self.close_connection(conn)

    def close_if_unused(self) -> None:
        """Close this thread's own connection, if it was opened for a query and nothing holds it: no
        block, no open transaction, no caller of `connect()`, whom `autoconnect=False` asks for it.
        """
        state, own = self._state, self._state.own_cell()
        if state.bound or own["closed"] or own["ctx"] or own["transactions"]:
            return
        if self.autoconnect and self.is_idle(own["conn"]):
            self.close()

    # What waits for the database, under the limits of the pool.

    def waiting(self) -> AbstractContextManager[None]:
        """`with db.waiting():` around what a lease's connection does."""
        return self.pool.waiting(self._state.lease())

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        with self.waiting():
            super().begin(*args, **kwargs)
        self._has_begun()

    def _has_begun(self) -> None:
        self.pool.transaction(self._state.lease(), begun=True)

    def commit(self) -> None:
        try:
            with self.waiting():
                super().commit()
        finally:
            self.pool.transaction(self._state.lease(), begun=False)

    def rollback(self) -> None:
        try:
            with self.waiting():
                super().rollback()
        finally:
            self.pool.transaction(self._state.lease(), begun=False)

    # Using a lease.

    def execute(self, query: Any, **context_options: Any) -> Any:
        if (instead := single.executing.instead) is not None:
            return instead(query)
        statement = None if context_options else self._sql_cache.statement(query)
        if statement is None:
            return super().execute(query, **context_options)
        return self.execute_sql(*statement)

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        forbid_lazy_load()
        if single.executing.instead is not None:
            raise BlockingQuery
        lease = self._state.lease()
        if lease is None:
            return super().execute_sql(sql, params)
        self._taint(sql)
        if lease.owner == get_ident():
            return super().execute_sql(sql, params)
        turn = self.take_turn()
        try:
            return super().execute_sql(sql, params)
        finally:
            if turn is not None:
                turn.give_turn()

    def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
        try:
            with self.waiting():
                return super()._execute_cursor(sql, params, **options)
        except REFUSED as error:
            self.raise_refused(error, sql, params)

    def raise_refused(self, error: Any, sql: str, params: Any) -> NoReturn:
        """Raise the error of a statement, as Peewee's and with the statement in it."""
        try:
            raise self._refused(error, sql, params)
        finally:
            del error  # its traceback has this call

    def _refused(self, error: Any, sql: str, params: Any) -> Any:
        refused = error
        # What can't be sent, a lone surrogate or (SQLite) an integer of more than 64 bits, Peewee
        # lets through; SQLite's driver may hide it behind the connection's last error.
        found = getattr(error, "orig", error)
        hidden = found.__context__
        if hidden is not None and hidden.__traceback__ is not None:
            hidden = None  # what the caller was handling, and none that the driver has just made
        for unsendable in (found, hidden):
            if isinstance(unsendable, UNSENDABLE):
                refused = peewee.DataError(unsendable)
        refused.statement = FailedStatement(self, sql, params)
        if refused is not error:
            refused.__cause__ = error
        return refused

    def _taint(self, sql: str) -> None:
        lease = self._state.lease()
        if lease is not None and self.taints(sql):
            lease.root.tainted = True

    def taints(self, sql: str) -> bool:
        """Whether a statement may leave something in the session for its next user to find."""
        return changes_session(sql)

    def take_turn(self) -> Lease | None:
        """Wait until this thread may use the lease in force; None if it may already.

        The caller gives the turn of the returned lease back.
        """
        lease = self._state.lease()
        if lease is None or lease.owner == get_ident():
            return None
        self._state.guard()
        lease.take_turn_blocking(self.pool.timeout)
        try:
            self.pool.connect(lease.root)
        except BaseException:
            lease.give_turn()
            raise
        lease.owner = get_ident()
        return lease

    async def begin_lease(self) -> Lease:
        """A new lease or, under one, a nested lease that holds the turn of the one around it.

        The caller owes one `end_lease()`, in a thread.
        """
        parent = self._state.lease()
        if parent is None:
            return await self.pool.acquire()
        await parent.take_turn(self.pool.timeout)
        return Lease(parent=parent)

    def end_lease(self, lease: Lease) -> None:
        if lease.parent is None:
            self.pool.give_back(lease)
            return
        lease.ended = True
        lease.turn.release()
        lease.parent.give_turn()

    async def call(self, fn: Callable[[], Any], then: Callable[[Any], Any] | None = None) -> Any:
        """`then(fn())` in a worker thread, of which only `fn` holds a connection."""
        lease = self._state.lease()
        if lease is not None:
            return await self._call_under(lease, fn, then)
        lease = await self.pool.acquire()
        try:
            call = Call(self.pool, self._state, lease, fn, self.pool.give_back, then)
            return await result_of(call)
        finally:
            await run_follow_ups(lease)

    async def _call_under(
        self, lease: Lease, fn: Callable[[], Any], then: Callable[[Any], Any] | None = None
    ) -> Any:
        await lease.take_turn(self.pool.timeout)
        try:
            call = Call(self.pool, self._state, lease, fn, Lease.give_turn, then)
            return await result_of(call)
        finally:
            await run_follow_ups(lease)

    def on_the_loop(self, *, reads: bool) -> bool:
        """Whether the event loop may run a statement that reads, or that writes: where the database
        can do that, no block is open, and nobody watches statements.
        """
        possible = self.reads_on_the_loop if reads else self.writes_on_the_loop
        return possible and self._state.lease() is None and not self.watched

    async def run_single(self, work: single.Single[T], *, reads: bool) -> T:
        """`await run(work.execute, …)`, of which the query reads or writes; on the event loop, if
        that may be.
        """
        statement = None
        if self.on_the_loop(reads=reads):
            with suppress(BlockingQuery):  # a default value or a converter asks the database
                statement = work.statement(self._sql_cache)
            if statement is not None:
                cursor = await self.aexecute_compiled(*statement)
                if cursor is not None:
                    try:
                        return work.finish(cursor, single.refuse)
                    except BlockingQuery:  # what makes objects of the rows asks it
                        return await self.run(work.finish, cursor.again())
        return await self.call(partial(work.execute, self, statement))

    @overload
    async def run(self, fn: Callable[..., T], /, *args: Any, retries: int, **kwargs: Any) -> T: ...

    @overload
    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    async def run(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run synchronous Peewee code from `async def`: `await db.run(crud.get_user, 7)`.

        It runs in a worker thread, with a connection of its own that it holds until it returns;
        inside `async with db.atomic():` with that block's connection, as part of it. Calls of
        sibling tasks inside one block run one at a time.

        With `retries=3`, `fn` is one transaction, and tried so many times more: as `retry` does it.

        If the task is cancelled, `CancelledError` is raised once the thread has finished.

        Returns what `fn` returns. A query executed but not yet read is read to its end.

        Raises:
            PoolTimeout, TooManyWaiting, PoolClosed: no connection was to be had.
            DatabaseUnavailable: the database could not be reached.
            LeaseEnded: the block that this task was started in is over.
            TurnTimeout: another task has used the block's connection for too long.
            TypeError: `fn` is an `async def` function; or it has a parameter `retries` of its own,
                which `partial(fn, retries=…)` sets.
        """
        if _is_async(fn):
            raise TypeError(
                f"db.run() takes a synchronous function, but {fn!r} is `async def`. Await it "
                "directly; inside, use `await db.run(…)` for its queries."
            )
        if "retries" in kwargs:
            if _takes_retries(fn):
                raise TypeError(
                    f"`retries` is a parameter of db.run() and of {fn!r} as well. For the "
                    "function's, write `await db.run(partial(fn, retries=…))`."
                )
            fn = self.retry(fn, retries=kwargs.pop("retries"))
        return await self.run_with(fn, args, kwargs)

    async def run_with(self, fn: Any, args: Any, kwargs: Any) -> Any:
        """The same, of which all arguments are the function's own."""
        again = retrying(fn)
        if again is None:
            return await self.call(partial(fn, *args, **kwargs))
        return await again.on_loop(fn, lambda once: again.db.call(partial(once, *args, **kwargs)))

    async def close_pool(self, grace: float = 10.0) -> bool:
        """Wait at most `grace` seconds for connections in use, and close them all.

        Those who wait for one get `PoolClosed`. Returns whether all came back in time; the others
        are closed when they do. Using the database afterwards opens the pool again.
        """
        drained = await self.pool.drain(grace)
        await asyncio.to_thread(self.close_all)
        return drained

    # The names of playhouse.pool. No connection is closed under who uses it.

    def close_idle(self) -> None:
        """Close the pool's connections that nobody uses."""
        self.pool.close_idle()

    def close_all(self) -> None:
        """Close the pool's connections: now, or when they come back."""
        self.pool.renew()

    def manual_close(self) -> bool:
        """Don't keep the connection that is used here; outside of requests, close it now."""
        lease = self._state.lease()
        if lease is None:
            return self.close()
        closes = lease.root.held is not None
        self.pool.wear_out(lease)
        return closes

    @property
    def pool_stats(self) -> PoolStats:
        return self.pool.stats

    def allow_sync(self) -> AbstractContextManager[None]:
        """`with db.allow_sync():` permits synchronous queries on the event loop: for notebooks."""
        return allow_sync()

    @property
    def Model(self) -> type[AsyncModel]:  # noqa: N802 (Peewee's name)
        if not hasattr(self, "_Model"):
            meta = type("Meta", (), {"database": self})
            self._Model = type("BaseModel", (AsyncModel,), {"Meta": meta})
        return self._Model

    # What the pool asks for.

    if_unreachable = (
        "Is the server running, and are host, port, user, password and database in the URL right?"
    )

    @property
    def connect_timeout(self) -> float:
        """Seconds that connecting may take."""
        return float(self.connect_params.get("connect_timeout") or math.inf)

    @property
    def cancel_timeout(self) -> float:
        """Seconds that ending a statement may take: no longer than the statement itself."""
        return min(CANCEL_TIMEOUT, self.pool.statement_timeout or math.inf)

    def open_connection(self, limit: float = math.inf) -> Any:
        if self.deferred:
            raise peewee.InterfaceError("The database must be initialised before it is opened.")
        with translate_driver_errors:
            conn = self._connect(limit)
            try:
                if self.server_version is None:
                    self._set_server_version(conn)
                self._initialize_connection(conn)
            except BaseException:
                conn.close()
                raise
        return conn

    def close_connection(self, conn: Any) -> None:
        conn.close()

    def prepare_session(
        self, conn: Any, statement_timeout: float | None, limit: float = math.inf
    ) -> None:
        raise NotImplementedError

    def is_alive(self, conn: Any, limit: float) -> bool:
        raise NotImplementedError

    def interrupt(self, conn: Any) -> bool:
        raise NotImplementedError

    def cut(self, conn: Any) -> bool:
        raise NotImplementedError

    def clean(self, conn: Any, lease: Lease) -> bool:
        raise NotImplementedError


# Statements that leave the session as it was. Everything else taints it: SET, LISTEN, CREATE
# TEMPORARY TABLE, PRAGMA, ATTACH, LOCK, …; so do functions that set or lock something, variables,
# tables in a temporary schema, and a second statement behind the first. Comments in front are
# skipped, unless MySQL runs what they hold (`/*! … */`, `/*M! … */`), or they hold others.
_HARMLESS = re.compile(
    r"([\s(]|--[ \t][^\r\n]*[\r\n]|/\*(?!M?!)((?!/\*|\*/).)*\*/)*"
    r"(SELECT|INSERT|UPDATE|DELETE|REPLACE|WITH|VALUES|EXPLAIN|SHOW|DESC(RIBE)?|SAVEPOINT|RELEASE|"
    r"ROLLBACK|COMMIT|BEGIN|CREATE (UNIQUE |FULLTEXT )?(TABLE|INDEX)|ALTER TABLE|"
    r"DROP (TABLE|INDEX)|TRUNCATE|PRAGMA [\w.]+$)\b",
    re.IGNORECASE | re.DOTALL,
)
_SETTING = re.compile(
    r"\b(set_config|pg_settings|\w*advisory\w*lock\w*|get_lock)\b|"
    r"\binto\s*(\stemp(orary)?\b|@)|\bcreate\s+(global\s+|local\s+)?temp(orary)?\b|"
    r"\b(pg_temp\w*|temp)[`\"]?\s*\.|@[\w.$`'\"]+\s*:?=|;\s*\S",
    re.IGNORECASE,
)


#: Where there is none of these, `_SETTING` finds nothing, and takes long for it in a long text.
_MARKS = ("set_config", "pg_settings", "lock", "temp", "@", ";")


def _changes_session(sql: str) -> bool:
    if _HARMLESS.match(sql) is None:
        return True
    text = sql.lower()
    return any(mark in text for mark in _MARKS) and _SETTING.search(sql) is not None


#: Whether a statement may leave something in the session for its next user to find.
changes_session = Known(_changes_session).__getitem__


_NOBODY_AWAITS = (
    "An async after_commit callback needs an event loop to await it: use it in code that runs "
    "under `db.run(…)`, `async with db.atomic():` or a request."
)


def _have_awaited(callback: Callable[[], Any], lease: Lease | None) -> None:
    """Have a callback awaited: when whoever awaits the code under this lease is done with it."""
    if lease is None and _get_running_loop() is not None:
        detached(await_callbacks([callback]))
    elif lease is None or lease.root.follow_ups is None:
        raise ValueError(_NOBODY_AWAITS)
    else:
        lease.root.follow_ups.append(callback)


def _is_async(fn: Any) -> bool:
    while isinstance(fn, partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None)  # noqa: B004
    )


def _takes_retries(fn: Any) -> bool:
    try:
        return "retries" in inspect.signature(fn).parameters
    except ValueError:  # it is not written in Python
        return False
