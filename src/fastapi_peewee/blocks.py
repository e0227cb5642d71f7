"""Peewee's blocks (`atomic`, `transaction`, `savepoint`, `connection_context`), each usable with
`with`, with `async with` and as a decorator of `def` and `async def`.

What a block sends to the database is Peewee's business; who may use the connection meanwhile is
decided here: an async block is a lease of its own, and holds the turn of the one around it.
"""

import asyncio
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio.from_thread
import anyio.to_thread

from .calls import Call, carrying_out, result_of, run_follow_ups, running, uninterrupted
from .exceptions import LeaseEnded, PoolError
from .state import (
    ConnectionContext,
    Lease,
    RequestScope,
    _atomic,
    _manual,
    _savepoint,
    _transaction,
    called_by_stream,
    called_by_suspended,
    generation,
)

if TYPE_CHECKING:
    from .database import Database

logger = logging.getLogger("fastapi_peewee")

#: Seconds after which a thread that waits for a connection looks whether it is cancelled.
ASK_AFTER = 0.1


class _Block:
    """What all blocks share. `super()` is Peewee's context manager."""

    db: "Database"
    _generation: int
    _turn: Lease | None = None  # entered with `with`: the lease whose turn this thread took
    _on: Lease | None  # entered with `with`: the lease in force there
    _keeps_work = True  # what was done in it may be lost
    _lent = False  # entered by a `yield` dependency, which left the turn to the endpoint
    streams = False  # entered by an async generator that is read, not by a dependency
    _lease: Lease  # entered with `async with`
    _left: bool
    _entered: Any
    _outer: Any

    def __enter__(self) -> Any:
        self._generation = generation()
        # The turn comes first: what Peewee looks at next (how deep are we?) belongs to its holder.
        lease = self.db.take_turn()
        self._on = self.db._state.lease()
        try:
            result = super().__enter__()  # type: ignore[misc]
        except BaseException:
            if lease is not None:
                lease.give_turn()
            raise
        if lease is not None and (server := called_by_suspended()):
            # A `yield` dependency: the endpoint, in another thread, is meant to use the block.
            lease.give_turn()
            lease, self._lent = None, True
            self._streams(server != "anyio")
        self._turn = lease
        return result

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._generation != generation():
            return  # a forked child leaves the parent's block: it is the parent's
        lease, self._turn = self._turn, None
        if self._on is not None and not self.db._state.has(self._on):
            # The request is over and its thread is not, or a generator is collected somewhere else.
            # Who gives the connection back rolls back what is open.
            if lease is not None:
                lease.give_turn()
            if exc_type is None and self._keeps_work:
                raise LeaseEnded
            return
        if lease is None:  # unless this thread has the turn anyway
            try:
                lease = self.db.take_turn()
            except LeaseEnded:  # who gives the connection back rolls back what is open
                if exc_type is None:
                    raise
                return
        try:
            super().__exit__(exc_type, exc, tb)  # type: ignore[misc]
        finally:
            request = RequestScope.current.get() if self._lent else None
            if (
                request is not None
                and self._on is not None
                and self._on is request.leases.get(self.db._state)
                and isinstance(exc, asyncio.CancelledError)
            ):
                # It doesn't wait for its threads. What one of them did now would be no part of the
                # block any more, and committed on its own.
                self._on.closing = True
                request.undone += (self.db._state,)
            if lease is not None:
                lease.give_turn()

    def _streams(self, streams: bool) -> None:
        transaction = getattr(self, "_helper", self)
        if isinstance(transaction, _SafeTransaction):
            transaction.streams = streams

    @property
    def owes_turn(self) -> bool:
        """Whether this thread has taken a turn for the block, which only leaving it gives back."""
        return self._turn is not None

    def covers(self, lease: Lease | None) -> bool:
        """Whether code under this lease is part of the block, entered with `with`."""
        return lease is None or self._on is None or lease.within(self._on)

    async def __aenter__(self) -> Any:
        lease = await self.aenter_unbound()
        self._outer = self.db._state._state.get()
        self.db._state.bind(lease)
        entered, self._entered = self._entered, None  # which may be the block itself
        return entered

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        state = self.db._state
        bound = state._state.get()
        # A generator that another task closes isn't in force there; what is may be another block.
        if isinstance(bound, Lease) and bound.within(self._lease):
            state.bind(self._outer)
        await self.aexit_unbound(exc)

    async def aenter_unbound(self) -> Lease:
        """Enter the block without binding its lease to the context of the caller."""
        db = self.db
        lease = await db.begin_lease()
        call = None
        try:
            call = Call(db.pool, db._state, lease, self.__enter__, Lease.give_turn)
            self._entered = await result_of(call)
        except BaseException as error:
            # If it was entered, the task was cancelled meanwhile: nobody else will leave the block.
            entered = call is not None and call.succeeded
            await leave(db, lease, partial(self._end, error) if entered else _nothing)
            raise
        self._lease, self._left = lease, False
        request = RequestScope.current.get()
        if request is not None:
            request.blocks[self] = asyncio.current_task()
            self.streams = not request.response_started and called_by_stream()
        return lease

    async def aexit_unbound(self, error: BaseException | None = None) -> None:
        if self._left:
            return
        self._left = True
        request = RequestScope.current.get()
        if request is not None:
            request.blocks.pop(self, None)
        try:
            await leave(self.db, self._lease, partial(self._end, error))
        finally:  # cancelled as it committed: these are of a transaction that is there
            await run_follow_ups(self._lease)

    async def abandon(self) -> None:
        """Roll back a block that nobody will leave, since its task or its request is over.

        An async generator that is not read to its end is closed when it is collected, which may
        take its time: a stream whose client has gone is such a one.
        """
        await self.aexit_unbound(asyncio.CancelledError())

    @property
    def root(self) -> Lease:
        """The lease that the block, entered with `async with`, is on."""
        return self._lease.root

    async def acommit(self) -> None:
        await self.db.run(self.commit)  # type: ignore[attr-defined, call-overload]

    async def arollback(self) -> None:
        await self.db.run(self.rollback)  # type: ignore[attr-defined, call-overload]

    def _end(self, error: BaseException | None, cancelled: BaseException | None = None) -> None:
        error = cancelled or error  # cancelled before the COMMIT was sent: so it isn't
        self.__exit__(type(error) if error else None, error, None)

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(
                f"{fn.__qualname__} is a generator: the block would end before its body begins. "
                "Enter the block inside it."
            )
        if not inspect.iscoroutinefunction(fn):
            return super().__call__(fn)  # type: ignore[misc]

        @wraps(fn)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            async with self._build_ctx():  # type: ignore[attr-defined]
                return await fn(*args, **kwargs)

        return inner


async def leave(db: "Database", lease: Lease, last: Callable[[BaseException | None], None]) -> None:
    """Call `last(cancellation or None)` in a thread, and end the lease there.

    This is done whatever is cancelled meanwhile; the cancellation is raised in the end.
    """
    lease.closing = True
    cancelled = None
    while not lease.turn.acquire_nowait():  # a child's call is still running
        waiting = asyncio.ensure_future(lease.turn.acquire(None))
        cancelled = await uninterrupted(waiting) or cancelled
        if not waiting.cancelled():  # as whoever cancels all tasks does with this one, too
            break
    if lease.root.held is None:  # no connection was to be had, or wanted: there is nothing to leave
        db.end_lease(lease)
    else:
        await result_of(
            Call(db.pool, db._state, lease, partial(last, cancelled), db.end_lease), certain=True
        )
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            del cancelled  # its traceback has this call


def _nothing(cancelled: BaseException | None) -> None:
    pass


class _SafeTransaction(_transaction):
    """Peewee's transaction, except that a failing end neither hides its cause nor stays open."""

    committed = False  # in the middle of the block, by `txn.commit()`
    streams = False  # entered by a sync generator that is sent, not by a dependency

    def __enter__(self) -> Any:
        try:
            return super().__enter__()
        except BaseException:
            self.db.close_if_dead()  # else the thread would keep a dead connection for ever
            raise

    def commit(self, begin: bool = True) -> None:
        with self._midway() if begin else nullcontext():
            # Asked for before: in between a request that was cancelled may end, and its state
            # with it.
            state = self.db._state.cell()
            callbacks = self.db._state.commit_callbacks
            self.db.commit()
            with _between(state):
                self.db._run_commit_callbacks(callbacks)
            if begin:
                self._begin()

    def rollback(self, begin: bool = True) -> None:
        with self._midway() if begin else nullcontext():
            super().rollback(begin)

    @contextmanager
    def _midway(self) -> Iterator[None]:
        """Around what ends a transaction in the middle of the block and begins another one.

        If that fails and none is open, the rest of the block would be statements of their own.
        """
        state = self.db._state.cell()
        aborted = state.get("aborted")
        try:
            yield
        except BaseException as error:
            if aborted is not None:
                state["aborted"] = aborted
            elif state["conn"] is None or not self.db.is_in_transaction(state["conn"]):
                state["aborted"] = error
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        depth = self.db.transaction_depth()
        self.db.pop_transaction()
        if depth > 1:
            return
        if exc_type is not None:
            self._abandon()
            return
        try:
            self.commit(False)
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        self.db._clear_commit_callbacks()
        try:
            self.db.rollback()
        except Exception:
            # The connection is lost, or the database has rolled back by itself (SQLite does, when
            # the disk is full). Nothing was committed; the error to report is the first one.
            logger.debug("ROLLBACK failed.", exc_info=True)
            self.db.close_if_dead()


@contextmanager
def _between(state: dict[str, Any]) -> Iterator[None]:
    """Have a block that is still to be entered begin a transaction, as there is none meanwhile."""
    blocks, between = state["transactions"], state["between"]
    state["transactions"], state["between"] = [], blocks or between
    try:
        yield
    finally:
        state["transactions"], state["between"] = blocks, between


class CommitCallback(NamedTuple):
    """What `after_commit` was given, and the lease in force there."""

    fn: Callable[[], Any]
    lease: Lease | None


class _MarkedSavepoint(_savepoint):
    """Peewee's savepoint, except that its `after_commit` callbacks are dropped with it, and that a
    ROLLBACK that fails doesn't hide why it was needed.
    """

    covers: Callable[[Lease | None], bool]  # the block's

    def _begin(self) -> None:
        self._callbacks = len(self.db._state.commit_callbacks)
        super()._begin()

    def rollback(self, begin: bool = True) -> None:
        callbacks = self.db._state.commit_callbacks
        callbacks[self._callbacks :] = [
            callback
            for callback in callbacks[self._callbacks :]
            if not self.covers(callback.lease)  # what other tasks have registered meanwhile
        ]
        super().rollback(begin)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if exc is None:
            try:
                self.commit(False)
            except BaseException as error:
                self._undo(error)
                raise
        else:
            self._undo(exc)

    def _undo(self, error: BaseException) -> None:
        try:
            self.rollback(False)
        except Exception:
            # There is no such savepoint any more: the whole transaction was rolled back (MySQL does
            # that to one of two that wait for each other), or the connection is lost.
            logger.debug("ROLLBACK TO SAVEPOINT failed.", exc_info=True)
            if self.db._state.aborted is None:
                self.db._state.aborted = error


class Atomic(_Block, _atomic):
    """`db.atomic()`: a transaction or, inside of one, a savepoint."""

    _helper: _transaction | _savepoint | None = None

    #: Entered by `with db:`: what took the connection, if that did; and the `id()` of the caller's
    #: frame, since the database object itself doesn't know which `with` is being left.
    taken: "LeaseContext | None" = None
    within = 0

    @property
    def whole(self) -> bool:
        """Whether all that was done in the block was one transaction, and nothing but that."""
        return isinstance(self._helper, _SafeTransaction) and not self._helper.committed


class Transaction(_Block, _SafeTransaction):
    """`db.transaction()`: as `atomic`, but a nested one is not there: it ends with the outer."""


class Savepoint(_Block, _MarkedSavepoint):
    """`db.savepoint()`."""


class Manual(_Block, _manual):
    """`db.manual_commit()`: nothing would keep it in a place that holds no connection."""

    def __enter__(self) -> None:
        self.db._state.guard()
        super().__enter__()


class LeaseContext(_Block, ConnectionContext):
    """`db.connection_context()`: holds a connection, without a transaction.

    In a thread of a request that holds none it takes one for the request, and blocks the thread for
    it: the generator of a dependency or stream goes on in another thread, with another context.
    """

    _keeps_work = False

    #: Entered by `db.aconnect()`, to be left by `db.aclose()`.
    until_aclose = False

    _taken: Lease | None = None
    _request: RequestScope

    def __enter__(self) -> Any:
        db, request = self.db, RequestScope.current.get()
        if request is None or db._state.bound_lease() is not None:
            return super().__enter__()
        if db._state in request.undone:
            raise LeaseEnded
        with request.sharing:  # until it is counted, the last of the others may give it back
            held = db._state.lease()
            # What `get_db` holds goes back as the response starts. A stream may begin before that,
            # and has it from then on.
            if held is not None and (held.contexts or called_by_suspended() not in (None, "anyio")):
                held.contexts += 1
                self._taken = held
        if self._taken is None:
            if held is not None:
                return super().__enter__()
            self._taken = self._take_for(request)
        self._request = request
        # A request that was cancelled doesn't wait for its threads. A generator that is entered now
        # was for its endpoint, and nobody leaves it.
        if request.over and called_by_suspended():
            self.__exit__(None, None, None)
            raise LeaseEnded
        return None

    def _take_for(self, request: RequestScope) -> Lease:
        db = self.db
        db._state.guard_loop()
        with _spare_thread(running.call is None and db.pool.stats.in_use >= db.pool.size):
            lease = db.pool.acquire_blocking(_UnlessCancelled(request))
        lease.follow_ups = None  # there is no event loop to await them on
        try:
            db.pool.connect(lease)
        except BaseException:
            db.pool.give_back(lease)
            raise
        lease.turn.release()
        with request.sharing:
            held: Lease = request.hold(db, lease)
            held.contexts += 1
        if held is not lease:  # another thread of this request was faster
            lease.turn.acquire_nowait()
            db.pool.give_back(lease)
        return held

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        lease, self._taken = self._taken, None
        if lease is None:
            super().__exit__(exc_type, exc, tb)
            return
        with self._request.sharing:
            lease.contexts -= 1
            if lease.contexts or not self._request.drop(self.db, lease):
                return
        lease.closing = True
        lease.turn.acquire_blocking(None)
        self.db.pool.give_back(lease)


class _UnlessCancelled(threading.Event):
    """What a thread of a request waits for. Once its work is cancelled, `wait()` raises.

    Nobody wants the thread's result then, and in the pool's queue it would be in the way of others.
    """

    def __init__(self, request: RequestScope) -> None:
        super().__init__()
        self._request = request
        self._was_cancelled = request.cancelled

    def wait(self, timeout: float | None = None) -> bool:
        if carrying_out.get():
            return super().wait(timeout)
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while True:
            self._check()
            left = deadline - time.monotonic()
            if super().wait(max(0, min(left, ASK_AFTER))):
                return True
            if left <= ASK_AFTER:
                return False

    def _check(self) -> None:
        call = running.call
        if call is not None:  # its task waits for this thread
            if call.cancelled:
                raise asyncio.CancelledError
            return
        try:
            anyio.from_thread.check_cancelled()  # its task waits as well
        except RuntimeError:
            return  # not one of FastAPI's: who has it, and what for, nobody knows
        # asyncio left the thread behind. As `await` does, a wait raises if it is cancelled, and the
        # next one doesn't: a `finally` may have something to put in order.
        if self._request.cancelled and not self._was_cancelled:
            raise PoolError("The request was cancelled while its thread waited for a connection.")


@contextmanager
def _spare_thread(needed: bool) -> Iterator[None]:
    """Let FastAPI have one thread more while this one waits for a connection.

    Else all of its threads might wait for those who hold a connection and wait for a thread.
    """

    def lend() -> Callable[[], object]:
        limiter, loop = anyio.to_thread.current_default_thread_limiter(), asyncio.get_running_loop()
        limiter.total_tokens += 1

        def take_back() -> None:
            limiter.total_tokens -= 1

        return partial(loop.call_soon_threadsafe, take_back)

    take_back = None
    with suppress(RuntimeError):  # a thread that isn't FastAPI's takes none from it
        take_back = anyio.from_thread.run_sync(lend) if needed else None
    try:
        yield
    finally:
        if take_back is not None:
            with suppress(RuntimeError):  # the loop is closed
                take_back()
