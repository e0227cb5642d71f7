"""The pool: which connections exist, who holds one, when one is reused, checked or closed.

It knows connections, not queries: how to open, check, clean and close one it asks its database.
"""

import asyncio
import logging
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple, Protocol

import peewee

from .breaker import Breaker
from .exceptions import DatabaseUnavailable, PoolTimeout, TooManyWaiting
from .gate import Gate
from .leaks import Watch
from .state import Lease, translate_driver_errors
from .watchdog import Stepwise, Waiting, Watchdog, limit_for_database
from .workers import Workers

logger = logging.getLogger("fastapi_peewee")

#: No epoch of a pool's.
_WORN_OUT = -1

#: Seconds since its last use after which a connection is checked before it is used again.
CHECK_AFTER = 1.0

#: Seconds that whoever has waited for a slot has in any case, to connect.
_LEAST = 0.05


class Opener(Protocol):
    """What the pool asks of its database. Each may block: it is called in a worker thread."""

    #: For the error when no connection can be had: what is to be looked at.
    @property
    def if_unreachable(self) -> str: ...

    #: Seconds that asking and connecting may take together.
    @property
    def connect_timeout(self) -> float: ...

    def open_connection(self, limit: float) -> Any:
        """Connect, within so many seconds."""

    def close_connection(self, conn: Any) -> None: ...

    def prepare_session(self, conn: Any, statement_timeout: float | None, limit: float) -> None:
        """Set what the sessions of the pool have, beyond others, within `limit` seconds."""

    def is_open(self, conn: Any) -> bool:
        """Whether the connection is alive, for all that is known; asks nobody."""

    def is_alive(self, conn: Any, limit: float) -> bool:
        """Ask the server, in one round trip. No answer within `limit` seconds is none."""

    def interrupt(self, conn: Any) -> bool:
        """Have the server end the statement that runs, from another thread than the one that waits
        for it. Returns whether the connection may be used by others afterwards.
        """

    def cut(self, conn: Any) -> bool:
        """Have a thread that waits for the server fail at once. Returns whether the thread can go
        on with the connection, so that it may have to be cut again.
        """

    def clean(self, conn: Any, lease: Lease) -> bool:
        """Roll back what is open, close cursors and, if the lease is tainted, reset the session.

        Returns whether the connection is as good as new.
        """


class PoolStats(NamedTuple):
    """Counters of a pool.

    `in_use` are the slots that are taken, `idle` the open connections that nobody uses, `waiting`
    the callers in the queue. The others count events since the process began: connections
    `opened`, connections `discarded` (too old, dead, or not fit for reuse), callers that
    `timed_out` waiting or were `refused` since the queue was full.
    """

    in_use: int
    idle: int
    waiting: int
    opened: int
    discarded: int
    timed_out: int
    refused: int


class _Held:
    """A connection and what the pool remembers of it."""

    __slots__ = (
        *("conn", "epoch", "opened_at", "state", "statements", "used_at"),
        *("cut", "lock", "transaction", "waiting"),
    )

    def __init__(self, conn: Any, epoch: int, now: float) -> None:
        self.conn = conn
        self.epoch = epoch
        self.opened_at = self.used_at = now
        self.state: dict[str, Any] = {}  # of the lease that has it
        self.statements: Any = None  # of the database's making
        # See `watchdog.Watched`.
        self.waiting: float | Stepwise | None = None
        self.transaction: float | None = None
        self.lock = threading.Lock()
        self.cut = False


class Pool:
    """At most `size` connections, lent as leases, in the order in which they were asked for.

    A slot of the gate comes first, then (in a worker thread) a connection: an idle one, the one
    used last, else a new one. Since a new one is opened only when none is idle, and only by who
    holds a slot, there are never more than `size`.

    Args:
        opener: the database.
        size: the greatest number of connections.
        timeout: seconds to wait for a lease; of what is left then, its connection is opened.
        max_waiting: how many may wait at a time; more are refused at once.
        max_lifetime: seconds after which a connection is replaced when it comes back.
        statement_timeout: seconds that a statement may take; None for any time.
        transaction_timeout: seconds that a transaction may be open; None for any time.
        leak_detection_threshold: seconds after which a lease that is still out is logged.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        opener: Opener,
        *,
        size: int,
        timeout: float,
        max_waiting: int,
        max_lifetime: float,
        statement_timeout: float | None = None,
        transaction_timeout: float | None = None,
        leak_detection_threshold: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if size < 1:
            raise ValueError(f"pool_size must be at least 1, got: {size!r}")
        if not timeout >= 0:
            raise ValueError(f"timeout must be a number of seconds, 0 or more, got: {timeout!r}")
        if max_waiting < 0:
            raise ValueError(f"max_waiting must be 0 or more, got: {max_waiting!r}")
        for name, limit in (
            ("statement_timeout", statement_timeout),
            ("transaction_timeout", transaction_timeout),
        ):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be more than 0 seconds or None, got: {limit!r}")
        self.size = size
        self.timeout = timeout
        self.max_waiting = max_waiting
        self.max_lifetime = max_lifetime
        #: What the database is told of it, in seconds.
        self.statement_timeout = limit_for_database(statement_timeout)
        self.leak_detection_threshold = leak_detection_threshold
        self._opener = opener
        self._clock = clock
        self._watchdog: Watchdog | None = None
        if statement_timeout is not None or transaction_timeout is not None:
            self._watchdog = Watchdog(statement_timeout, transaction_timeout, self._cut, clock)
        self._opened = self._discarded = self._timed_out = self._refused = 0
        self._epoch = 0
        #: Kept from the collector: with a lease that is dropped it would take its connection, too,
        #: and PyMySQL's is closed then, while it is given back.
        self._lent: set[Any] = set()
        self._start()
        _pools.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._gate = Gate(self.size, max_waiting=self.max_waiting)
        self._breaker = Breaker(self._clock)
        #: Why the last attempt to connect failed: words only, an exception would keep its frames.
        self._failure = ""
        #: When a connection was last found dead: those that lay idle then are asked before use.
        self._doubted_at = -math.inf
        self._idle: list[_Held] = []
        self._workers: Workers | None = None
        limit = self.leak_detection_threshold
        self._watch = None if limit is None else Watch(limit)

    @property
    def stats(self) -> PoolStats:
        return PoolStats(
            in_use=self._gate.held,
            idle=len(self._idle),
            waiting=self._gate.waiting,
            opened=self._opened,
            discarded=self._discarded,
            timed_out=self._timed_out,
            refused=self._refused,
        )

    @property
    def workers(self) -> Workers:
        """Threads for those who hold a lease.

        More than connections, since one may still serialise a response whose lease is over.
        """
        workers = self._workers
        if workers is None:
            with self._lock:  # another thread may have been faster
                workers = self._workers or Workers(2 * self.size, "fastapi-peewee")
                self._workers = workers
        return workers

    def acquire_nowait(self) -> Lease | None:
        """The same as `acquire()`, if a slot is free and nobody waits for it; else None.

        Raises:
            PoolClosed: the pool is being closed.
        """
        gate = self._gate
        return self._lease(gate) if gate.acquire_nowait() else None

    async def acquire(self) -> Lease:
        """Wait for a slot and return a lease, its turn taken by the caller.

        The connection itself follows in `connect()`. The caller owes one `give_back()`.

        Raises:
            PoolTimeout: no slot became free within `timeout` seconds.
            TooManyWaiting: the queue is full.
            PoolClosed: the pool is being closed.
        """
        lease = self.acquire_nowait()
        if lease is not None:
            return lease
        begun, gate = self._clock(), self._gate
        try:
            acquired = await gate.acquire(self.timeout)
        except TooManyWaiting:
            self._count("_refused")
            raise
        return self._lease_after(begun, gate, acquired)

    def acquire_blocking(self, woken: threading.Event | None = None) -> Lease:
        """The same for a thread. `woken` is as in `Gate.acquire_blocking()`."""
        lease = self.acquire_nowait()
        if lease is not None:
            return lease
        begun, gate = self._clock(), self._gate
        try:
            acquired = gate.acquire_blocking(self.timeout, woken)
        except TooManyWaiting:
            self._count("_refused")
            raise
        return self._lease_after(begun, gate, acquired)

    def _lease_after(self, begun: float, gate: Gate, acquired: bool) -> Lease:
        if not acquired:
            self._count("_timed_out")
            raise PoolTimeout(
                f"No connection became free within {self.timeout:g} s; all {self.size} are in use. "
                "Most likely connections are held too long (slow queries, `Depends(get_db)` in "
                "slow endpoints, waiting for something else inside `db.atomic()`), or "
                "`pool_size` is too small."
            )
        lease = self._lease(gate)
        lease.patience = max(self.timeout - (self._clock() - begun), _LEAST)
        return lease

    def _lease(self, gate: Gate) -> Lease:
        lease = Lease(slot=gate)
        lease.dropped = self._drop
        if self._watch is not None:
            self._watch.begin(lease)
        return lease

    def connect_at_once(self, lease: Lease) -> bool:
        """Give the lease a connection that was in use just now. Returns False if there is none.

        It asks nobody anything, so it may be called on an event loop.
        """
        with self._lock:
            if not self._idle or self._is_doubtful(self._idle[-1]):
                return False
            held = self._idle.pop()
        self._lend(held, lease)
        return True

    def connect(self, lease: Lease) -> None:
        """Give the lease its connection. Call it in the thread that has the lease's turn.

        Raises:
            DatabaseUnavailable: a new connection was needed, and could not be had.
        """
        if lease.held is not None:
            return
        left = min(self._opener.connect_timeout, lease.patience)
        while True:
            with self._lock:
                if not self._idle:
                    break
                held = self._idle.pop()
            if not self._is_doubtful(held):
                self._lend(held, lease)
                return
            # If this one is silent, half of the time is left for a new one: only the connections
            # may have been forgotten on their way, as by a firewall, and so the others, too.
            begun = self._clock()
            if self._is_alive(held, left / 2):
                self._lend(held, lease)
                return
            asked = min(self._clock() - begun, left / 2)
            silent = asked == left / 2
            left -= asked
            self._discard(held)
            if silent:
                break
        self._lend(self._open(left), lease)

    def _is_doubtful(self, held: _Held) -> bool:
        used_at = held.used_at
        return used_at < self._doubted_at or self._clock() - used_at >= CHECK_AFTER

    def _is_alive(self, held: _Held, limit: float) -> bool:
        with self._waiting_for(held):
            alive = self._opener.is_alive(held.conn, limit)
        if not alive:
            self._doubted_at = self._clock()
        return alive

    def _open(self, limit: float) -> _Held:
        # Who has hardly any time, unless nobody has more.
        hurried = limit <= _LEAST and limit < self._opener.connect_timeout
        if not self._breaker.admits(hurried=hurried):
            raise DatabaseUnavailable(
                "The database could not be reached a moment ago; one at a time tries again. "
                f"{self._opener.if_unreachable}"
            ) from peewee.OperationalError(self._failure)
        epoch, conn, begun = self._epoch, None, self._clock()
        try:
            conn = self._opener.open_connection(limit)
            left = max(begun + limit - self._clock(), _LEAST)
            with translate_driver_errors:
                self._opener.prepare_session(conn, self.statement_timeout, left)
            held = _Held(conn, epoch, self._clock())
            if self._watchdog is not None:
                self._watchdog.watch(held)
        except BaseException as error:
            if conn is not None:
                with suppress(Exception):  # the first error is the one that says something
                    self._opener.close_connection(conn)
            if not isinstance(error, peewee.OperationalError | peewee.InternalError | OSError):
                self._breaker.undecided()  # a database without a name, say
                raise
            self._failure = f"{type(error).__name__}: {error}"
            logger.debug("A connection to the database could not be opened.", exc_info=True)
            hurried = limit < self._opener.connect_timeout / 2
            if hurried and self._clock() - begun >= limit:
                self._breaker.undecided()
            elif self._breaker.failed():
                logger.warning(
                    "The database can't be reached. What needs a new connection fails at once "
                    "until it can (over HTTP: 503). Why, this logger says at DEBUG: fastapi_peewee."
                )
            raise DatabaseUnavailable(
                "The database could not be reached: a new connection failed. "
                f"{self._opener.if_unreachable}"
            ) from error
        if self._breaker.succeeded():
            logger.warning("The database can be reached again.")
        self._count("_opened")
        return held

    def waiting(self, lease: Lease | None) -> AbstractContextManager[None]:
        """`with pool.waiting(lease):` around what waits for the database on its connection."""
        if self._watchdog is None or lease is None or lease.root.held is None:
            return _UNWATCHED
        return Waiting(lease.root.held, self._clock)

    def steps(self, lease: Lease) -> Stepwise | None:
        """For a statement that is worked for in steps; None if nothing is limited."""
        return None if self._watchdog is None else Stepwise(lease.root.held, self._clock)

    def _waiting_for(self, held: _Held) -> AbstractContextManager[None]:
        return _UNWATCHED if self._watchdog is None else Waiting(held, self._clock)

    def transaction(self, lease: Lease | None, *, begun: bool) -> None:
        """A transaction has begun on the lease's connection, or is over."""
        if self._watchdog is not None and lease is not None and lease.root.held is not None:
            held = lease.root.held
            with held.lock:
                held.transaction = self._clock() if begun else None
                if not begun:
                    held.state["aborted"] = None  # it may have been cut as it ended

    def _cut(self, held: _Held, reason: str) -> bool:
        if held.transaction is not None and held.state.get("aborted") is None:
            held.state["aborted"] = peewee.OperationalError(reason)
        held.epoch = _WORN_OUT
        return self._opener.cut(held.conn)

    def interrupt(self, lease: Lease) -> None:
        """End the statement that runs under a lease, which may not end meanwhile. It may block."""
        held = lease.root.held
        if held is not None and not self._opener.interrupt(held.conn):
            held.epoch = _WORN_OUT

    def _lend(self, held: _Held, lease: Lease) -> None:
        self._lent.add(held.conn)
        lease.held = held
        held.state = lease.state
        lease.state["conn"] = held.conn
        lease.state["closed"] = False

    def give_back(self, lease: Lease) -> None:
        """End the lease: its connection is cleaned and kept, or closed; its slot is free.

        Call it once, where no thread uses the connection any more. It may block.
        """
        lease.ended = True
        if self._watch is not None:
            self._watch.end(lease)
        try:
            if lease.foreign:
                _inherited.append(lease.held)
            elif lease.held is not None:
                self._take_back(lease.held, lease)
        finally:
            if lease.held is not None:
                self._lent.discard(lease.held.conn)
            lease.held, lease.state = None, {}
            lease.slot.release()
            lease.turn.release()  # those who wait for it learn that it has ended

    def _drop(self, lease: Lease) -> None:
        """Give back a lease that was collected before anybody did."""
        if self._watch is None:
            where = "To hear where it was taken: `connect(…, leak_detection_threshold=seconds)`."
        else:
            where = f"It was taken here:\n{self._watch.taken(lease)}"
        self.give_back(lease)
        warnings.warn(
            "A database connection was dropped without being given back: a block was entered, or "
            f"a lease acquired, and nobody left it. {where}",
            ResourceWarning,
            stacklevel=1,
        )

    def _take_back(self, held: _Held, lease: Lease) -> None:
        reusable = False
        try:
            with self._waiting_for(held):
                reusable = self._opener.clean(held.conn, lease)
        except Exception:
            logger.debug("A connection could not be cleaned and is closed.", exc_info=True)
        with held.lock:
            held.transaction, held.state = None, {}
            reusable = reusable and not held.cut
        now = self._clock()
        if not reusable and not held.cut and not self._opener.is_open(held.conn):
            self._doubted_at = now  # the others may have been lost with it
        if reusable and now - held.opened_at < self.max_lifetime:
            held.used_at = now
            with self._lock:
                if held.epoch == self._epoch:
                    self._idle.append(held)
                    return
        self._discard(held)

    def _discard(self, held: _Held) -> None:
        self._count("_discarded")
        self._close(held)

    def _close(self, held: _Held) -> None:
        if self._watchdog is not None:
            self._watchdog.forget(held)
        try:
            self._opener.close_connection(held.conn)
        except Exception:
            logger.debug("A connection was lost before it was closed.", exc_info=True)

    def _count(self, name: str) -> None:
        with self._lock:
            setattr(self, name, getattr(self, name) + 1)

    def renew(self) -> None:
        """Replace every connection: the idle ones now, those in use when they come back."""
        with self._lock:
            self._epoch += 1
        self._breaker = Breaker(self._clock)  # new ones may be opened in another way
        self.close_idle()

    def close_idle(self, *, wait: bool = True) -> None:
        """Close the connections that nobody uses; without `wait`, if that can be done at once."""
        if self._lock.acquire(blocking=wait):
            idle, self._idle = self._idle, []
            self._lock.release()
            for held in idle:
                self._close(held)

    def let_go(self, lease: Lease) -> None:
        """Close the connection of a lease that goes on: `connect()` gives it another one.

        Call it with the lease's turn.
        """
        held, lease.held, lease.state["conn"] = lease.held, None, None
        self._lent.discard(held.conn)
        self._close(held)

    @staticmethod
    def wear_out(lease: Lease) -> None:
        """Close the lease's connection, instead of keeping it, when it comes back."""
        if lease.root.held is not None:
            lease.root.held.epoch = _WORN_OUT

    async def drain(self, grace: float) -> bool:
        """Wait until all leases are given back, at most `grace` seconds, and close everything.

        Who waits for a lease gets `PoolClosed`. A connection still in use when the time is over
        is closed when it comes back. Afterwards the pool is as new: its next use opens it again.
        Cancelled, it waits no longer, as if the time were over.

        Returns whether all leases were back in time.
        """
        gate = self._gate
        gate.close()
        deadline = self._clock() + grace
        try:
            while gate.held and self._clock() < deadline:  # noqa: ASYNC110 (threads give back, too)
                await asyncio.sleep(0.01)
        finally:
            drained, workers = not gate.held, None
            with self._lock:
                if self._gate is gate:  # unless another call of this was faster
                    self._gate = Gate(self.size, max_waiting=self.max_waiting)
                    workers, self._workers = self._workers, None

            def close() -> None:
                self.renew()
                if workers is not None:
                    workers.end(wait=drained)

            closing = asyncio.get_running_loop().run_in_executor(None, close)
        await asyncio.shield(closing)
        return drained

    def _forked(self) -> None:
        # The parent's threads don't exist here and its locks may be held for ever. Its connections
        # are kept, unused and unclosed: closing one would say goodbye on the parent's socket.
        _inherited.append((self._idle, self._workers, self._gate, self._lock))
        self._epoch += 1
        if self._watchdog is not None:
            self._watchdog.start_anew()
        self._start()


_UNWATCHED: AbstractContextManager[None] = nullcontext()
_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()
_inherited: list[Any] = []


def _forked() -> None:
    for pool in list(_pools):
        pool._forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forked)
