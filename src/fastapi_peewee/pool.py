"""The pool: which connections exist, who holds one, when one is reused, checked or closed.

It knows connections, not queries: how to open, check, clean and close one it asks its database.
"""

import asyncio
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import peewee

from .exceptions import DatabaseUnavailable, PoolTimeout, TooManyWaiting
from .gate import Gate
from .state import Lease
from .workers import Workers

logger = logging.getLogger("fastapi_peewee")

#: No epoch of a pool's.
_WORN_OUT = -1

#: Seconds since its last use after which a connection is checked before it is used again.
CHECK_AFTER = 1.0


class Opener(Protocol):
    """What the pool asks of its database. Each may block: it is called in a worker thread."""

    def open_connection(self) -> Any: ...

    def close_connection(self, conn: Any) -> None: ...

    def is_alive(self, conn: Any) -> bool:
        """Ask the server, in one round trip."""

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

    __slots__ = ("conn", "epoch", "opened_at", "statements", "used_at")

    def __init__(self, conn: Any, epoch: int, now: float) -> None:
        self.conn = conn
        self.epoch = epoch
        self.opened_at = self.used_at = now
        self.statements: Any = None  # of the database's making


class Pool:
    """At most `size` connections, lent as leases, in the order in which they were asked for.

    A slot of the gate comes first, then (in a worker thread) a connection: an idle one, the one
    used last, else a new one. Since a new one is opened only when none is idle, and only by who
    holds a slot, there are never more than `size`.

    Args:
        opener: the database.
        size: the greatest number of connections.
        timeout: seconds to wait for a lease.
        max_waiting: how many may wait at a time; more are refused at once.
        max_lifetime: seconds after which a connection is replaced when it comes back.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if size < 1:
            raise ValueError(f"pool_size must be at least 1, got: {size!r}")
        if not timeout >= 0:
            raise ValueError(f"timeout must be a number of seconds, 0 or more, got: {timeout!r}")
        if max_waiting < 0:
            raise ValueError(f"max_waiting must be 0 or more, got: {max_waiting!r}")
        self.size = size
        self.timeout = timeout
        self.max_waiting = max_waiting
        self.max_lifetime = max_lifetime
        self._opener = opener
        self._clock = clock
        self._opened = self._discarded = self._timed_out = self._refused = 0
        self._epoch = 0
        self._start()
        _pools.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._gate = Gate(self.size, max_waiting=self.max_waiting)
        self._idle: list[_Held] = []
        self._workers: Workers | None = None

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
            with self._lock:
                if self._workers is None:
                    self._workers = Workers(2 * self.size, "fastapi-peewee")
                workers = self._workers
        return workers

    async def acquire(self) -> Lease:
        """Wait for a slot and return a lease, its turn taken by the caller.

        The connection itself follows in `connect()`. The caller owes one `give_back()`.

        Raises:
            PoolTimeout: no slot became free within `timeout` seconds.
            TooManyWaiting: the queue is full.
            PoolClosed: the pool is being closed.
        """
        gate = self._gate
        try:
            acquired = await gate.acquire(self.timeout)
        except TooManyWaiting:
            self._count("_refused")
            raise
        return self._lease(gate, acquired)

    def acquire_blocking(self) -> Lease:
        """The same for a thread."""
        gate = self._gate
        try:
            acquired = gate.acquire_blocking(self.timeout)
        except TooManyWaiting:
            self._count("_refused")
            raise
        return self._lease(gate, acquired)

    def _lease(self, gate: Gate, acquired: bool) -> Lease:
        if not acquired:
            self._count("_timed_out")
            raise PoolTimeout(
                f"No connection became free within {self.timeout:g} s; all {self.size} are in use. "
                "Most likely connections are held too long (slow queries, `Depends(get_db)` in "
                "slow endpoints, waiting for something else inside `db.atomic()`), or "
                "`pool_size` is too small."
            )
        return Lease(slot=gate)

    def connect_at_once(self, lease: Lease) -> bool:
        """Give the lease a connection that was in use just now. Returns False if there is none.

        It asks nobody anything, so it may be called on an event loop.
        """
        with self._lock:
            if not self._idle or self._clock() - self._idle[-1].used_at >= CHECK_AFTER:
                return False
            held = self._idle.pop()
        self._lend(held, lease)
        return True

    def connect(self, lease: Lease) -> None:
        """Give the lease its connection. Call it in the thread that has the lease's turn."""
        if lease.held is not None:
            return
        while True:
            with self._lock:
                if not self._idle:
                    break
                held = self._idle.pop()
            idle_for = self._clock() - held.used_at
            if idle_for < CHECK_AFTER or self._opener.is_alive(held.conn):
                self._lend(held, lease)
                return
            self._discard(held)
        epoch = self._epoch
        try:
            conn = self._opener.open_connection()
        except (peewee.OperationalError, peewee.InternalError, OSError) as error:
            raise DatabaseUnavailable(
                "The database could not be reached: a new connection failed. Is the server "
                "running, and are host, port, user, password and database in the URL right?"
            ) from error
        self._count("_opened")
        self._lend(_Held(conn, epoch, self._clock()), lease)

    @staticmethod
    def _lend(held: _Held, lease: Lease) -> None:
        lease.held = held
        lease.state["conn"] = held.conn
        lease.state["closed"] = False

    def give_back(self, lease: Lease) -> None:
        """End the lease: its connection is cleaned and kept, or closed; its slot is free.

        Call it once, where no thread uses the connection any more. It may block.
        """
        lease.ended = True
        try:
            if lease.foreign:
                _inherited.append(lease.held)
            elif lease.held is not None:
                self._take_back(lease.held, lease)
        finally:
            lease.held, lease.state = None, {}
            lease.slot.release()
            lease.turn.release()  # those who wait for it learn that it has ended

    def _take_back(self, held: _Held, lease: Lease) -> None:
        reusable = False
        try:
            reusable = self._opener.clean(held.conn, lease)
        except Exception:
            logger.debug("A connection could not be cleaned and is closed.", exc_info=True)
        now = self._clock()
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
        self.close_idle()

    def close_idle(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for held in idle:
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

        Returns whether all leases were back in time.
        """
        gate = self._gate
        gate.close()
        deadline = self._clock() + grace
        while gate.held and self._clock() < deadline:  # noqa: ASYNC110 (threads give back, too)
            await asyncio.sleep(0.01)
        drained = not gate.held
        with self._lock:
            self._gate = Gate(self.size, max_waiting=self.max_waiting)
            workers, self._workers = self._workers, None

        def close() -> None:
            self.renew()
            if workers is not None:
                workers.end(wait=drained)

        await asyncio.to_thread(close)
        return drained

    def _forked(self) -> None:
        # The parent's threads don't exist here and its locks may be held for ever. Its connections
        # are kept, unused and unclosed: closing one would say goodbye on the parent's socket.
        _inherited.append((self._idle, self._workers, self._gate, self._lock))
        self._epoch += 1
        self._start()


_pools: "weakref.WeakSet[Pool]" = weakref.WeakSet()
_inherited: list[Any] = []


def _forked() -> None:
    for pool in list(_pools):
        pool._forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forked)
