"""Running synchronous code in a worker thread, under a lease: the way from a task to a thread.

The one rule: *a turn or lease is released when the thread is done with it*, never by the task that
awaits the thread. A cancelled task therefore can't hand a connection that a thread still uses to
somebody else, nor lose its slot.
"""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import Context, ContextVar, copy_context
from threading import get_ident
from typing import Any

import anyio

# What makes `anyio.from_thread.run(…)` work in a thread that anyio hasn't made, as it does in those
# of FastAPI's own `def` endpoints. It has no public form.
from anyio._core._eventloop import claim_worker_thread
from anyio.lowlevel import EventLoopToken, current_token

from .pool import Pool
from .state import CursorWrapper, Lease, PeeweeConnectionState

logger = logging.getLogger("fastapi_peewee")


class _Running(threading.local):
    call: "Call | None" = None


#: What this thread works on.
running = _Running()


def _forked() -> None:
    running.call = None  # the parent's, whose task may be cancelled


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forked)

#: Whether this is carried out whatever is cancelled, as the callbacks of a commit are.
carrying_out: ContextVar[bool] = ContextVar("fastapi_peewee_carrying_out", default=False)


class Call:
    """`fn()` in a worker thread that has the turn of `lease`; afterwards `release(lease)`.

    With `then`, the result is `then(fn())`, of which the second half runs in the same thread when
    the lease has been released. Made by the task that has the turn, which then awaits `result_of`.
    """

    __slots__ = (
        "_begun",
        "_certain",
        "_end",
        "_ended",
        "_error",
        "_fn",
        "_guard",
        "_lease",
        "_let_gone",
        "_loop",
        "_pool",
        "_release",
        "_result",
        "_state",
        "_then",
        "cancelled",
        "succeeded",
    )

    def __init__(
        self,
        pool: Pool,
        state: PeeweeConnectionState,
        lease: Lease,
        fn: Callable[[], Any],
        release: Callable[[Lease], None],
        then: Callable[[Any], Any] | None = None,
    ) -> None:
        self._pool = pool
        self._state = state
        self._lease = lease
        self._fn = fn
        self._release = release
        self._then = then
        self._result: Any = None
        self.succeeded = False
        self._error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        # Who takes the token carries the call out, or has dropped it: the thread or the task.
        self._begun = deque((None,))
        self._guard = threading.Lock()
        self._let_gone = self._certain = False
        #: The task that awaits it was cancelled.
        self.cancelled = False
        # These two belong to the event loop.
        self._ended = False
        self._end: asyncio.Future[None] | None = None
        context, token = copy_context(), current_token()
        try:
            pool.workers.put(lambda: self._work(context, token))
        except BaseException:  # no thread could be started
            if self._take():  # else one that was there has begun it
                self._let_go()
                raise

    def end(self) -> "asyncio.Future[None]":
        """A future that is done when the thread is done with the call."""
        self._end = self._loop.create_future()
        if self._ended:
            self._end.set_result(None)
        return self._end

    def result(self) -> Any:
        """What came of it, when it has ended. To be asked for once."""
        error = self.take_error()
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error  # see `take_error()`

    def take_error(self) -> BaseException | None:
        """What was raised, or that it was dropped, once; None if it has succeeded.

        Afterwards the call has it no more: its traceback has the call, and both would stay until
        the collector comes.
        """
        error, self._error = self._error, None
        return error

    def give_up(self) -> bool:
        """Drop the call if its thread hasn't begun it. Returns whether that was so."""
        if self._take():
            self._error = asyncio.CancelledError()
            self._let_go()
            return True
        return False

    def interrupt(self) -> None:
        """Have the statements that it still runs ended. It doesn't wait for that."""
        self.cancelled = True
        with suppress(RuntimeError):  # no thread can be started: they are waited for
            threading.Thread(
                target=self._interrupt, name="fastapi-peewee-interrupt", daemon=True
            ).start()

    def _interrupt(self) -> None:
        # Again and again: the thread may be just about to send a statement, or may send another.
        pause = 0.02
        while True:
            with self._guard:  # what comes to its end meanwhile waits, so that it hits nobody else
                if self._let_gone:
                    return
                try:
                    if not self._certain:
                        self._pool.interrupt(self._lease)
                except Exception:
                    logger.debug("A statement could not be interrupted.", exc_info=True)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    @contextmanager
    def carried_out(self) -> Iterator[None]:
        """See `carried_out()`."""
        with self._guard:
            before, self._certain = self._certain, True
        try:
            yield
        finally:
            self._certain = before

    def _take(self) -> bool:
        try:
            self._begun.pop()
        except IndexError:
            return False
        return True

    def _work(self, context: Context, token: EventLoopToken) -> None:
        if not self._take():
            return  # whoever gave it up has released the lease
        try:
            with claim_worker_thread(token.backend_class, token.native_token):
                running.call = self
                try:
                    result = context.run(self._body)
                finally:
                    self._let_go()
                if self._then is not None:
                    result = context.run(self._then, result)
            self._result, self.succeeded = result, True
        except BaseException as error:
            self._error = error
        running.call = None
        try:
            self._loop.call_soon_threadsafe(self._has_ended)
        except RuntimeError:
            logger.debug("An event loop was closed before its database call had ended.")

    def _body(self) -> Any:
        lease = self._lease
        self._state.bind(lease)
        lease.owner, lease.call = get_ident(), self
        self._pool.connect(lease.root)
        result = self._fn()
        if isinstance(result, CursorWrapper):
            result.fill_cache()  # its rows are unreachable once the lease is over
        return result

    def _has_ended(self) -> None:
        self._ended = True
        if self._end is not None and not self._end.done():
            self._end.set_result(None)

    def _let_go(self) -> None:
        with self._guard:
            self._let_gone = True
        self._lease.owner = self._lease.call = None
        try:
            self._release(self._lease)
        except Exception:
            logger.exception("Releasing a database connection failed.")


@contextmanager
def carried_out(call: Call | None) -> Iterator[None]:
    """Around what is done in a call, or in none, although its task or request was cancelled."""
    token = carrying_out.set(True)
    try:
        with nullcontext() if call is None else call.carried_out():
            yield
    finally:
        carrying_out.reset(token)


async def result_of(call: Call, *, certain: bool = False) -> Any:
    """Wait for a call, until its thread is done with it, even if the task is cancelled meanwhile.

    A call that has not begun is dropped on cancellation, and the statement of one that has begun is
    interrupted, unless it is `certain`: a COMMIT or a ROLLBACK has to be carried out. In any case
    `CancelledError` is raised in the end.
    """
    try:
        await call.end()
    except asyncio.CancelledError:
        if certain or not call.give_up():
            if not certain:
                call.interrupt()
            await uninterrupted(call.end())
            call.take_error()  # that it was interrupted
        raise
    return call.result()


async def uninterrupted(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for a future whatever happens; return the cancellation that came meanwhile, if any.

    There are two kinds of cancellation: anyio's comes again at each await, unless it is shielded;
    asyncio's comes once for each `cancel()`, and knows no shield.
    """
    cancelled = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError as error:
                cancelled = error
    try:
        return cancelled
    finally:
        del cancelled  # its traceback has this call


async def run_follow_ups(lease: Lease) -> None:
    """Await the `async` callbacks of transactions that this lease has committed, all of them.

    They run in a task of their own, so that cancelling the caller doesn't cut them short.
    """
    pending = lease.root.follow_ups
    if not pending:
        return
    todo, pending[:] = list(pending), []
    await asyncio.shield(detached(await_callbacks(todo)))


async def await_callbacks(callbacks: list[Callable[[], Awaitable[Any]]]) -> None:
    """Await `async` callbacks of a transaction, one after the other, in a task of their own."""
    carrying_out.set(True)
    for callback in callbacks:
        try:
            await callback()
        except (Exception, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            logger.exception("An after_commit callback failed; its transaction is committed.")


def detached(work: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
    """Start a task that lives on if the caller is cancelled."""
    task = asyncio.ensure_future(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task


_running: set[asyncio.Future[None]] = set()  # the loop itself keeps only weak references
