"""Running synchronous code in a worker thread, under a lease: the way from a task to a thread.

The one rule: *a turn or lease is released when the thread is done with it*, never by the task that
awaits the thread. A cancelled task therefore can't hand a connection that a thread still uses to
somebody else, nor lose its slot.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from threading import get_ident
from typing import Any

import anyio

# What makes `anyio.from_thread.run(…)` work in a thread that anyio hasn't made, as it does in those
# of FastAPI's own `def` endpoints. It has no public form.
from anyio._core._eventloop import claim_worker_thread
from anyio.lowlevel import current_token

from .pool import Pool
from .state import CursorWrapper, Lease, PeeweeConnectionState

logger = logging.getLogger("fastapi_peewee")


class Call(Future[Any]):
    """`fn()` in a worker thread that has the turn of `lease`; afterwards `release(lease)`.

    With `then`, the result is `then(fn())`, of which the second half runs in the same thread when
    the lease has been released. Made by the task that has the turn, which then awaits `result_of`.
    """

    def __init__(
        self,
        pool: Pool,
        state: PeeweeConnectionState,
        lease: Lease,
        fn: Callable[[], Any],
        release: Callable[[Lease], None],
        then: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self._lease = lease
        self._release = release
        context = copy_context()
        token = current_token()

        def body() -> Any:
            state.bind(lease)
            lease.owner = get_ident()
            pool.connect(lease.root)
            result = fn()
            if isinstance(result, CursorWrapper):
                result.fill_cache()  # its rows are unreachable once the lease is over
            return result

        def work() -> None:
            if not self.set_running_or_notify_cancel():
                return  # whoever cancelled it has released the lease
            try:
                with claim_worker_thread(token.backend_class, token.native_token):
                    try:
                        result = context.run(body)
                    finally:
                        self._let_go()
                    if then is not None:
                        result = context.run(then, result)
            except BaseException as error:
                self.set_exception(error)
            else:
                self.set_result(result)

        try:
            pool.workers.submit(work)
        except BaseException:  # no thread could be started
            self._let_go()
            raise

    def give_up(self) -> bool:
        """Cancel the call if its thread hasn't begun it. Returns whether that was so."""
        if self.cancel():
            self._let_go()
            return True
        return False

    def _let_go(self) -> None:
        self._lease.owner = None
        try:
            self._release(self._lease)
        except Exception:
            logger.exception("Releasing a database connection failed.")


async def result_of(call: Call, *, certain: bool = False) -> Any:
    """Wait for a call, until its thread is done with it, even if the task is cancelled meanwhile.

    A call that has not begun is dropped on cancellation, unless it is `certain`: a COMMIT or a
    ROLLBACK has to be carried out. In any case `CancelledError` is raised in the end.
    """
    try:
        await _end_of(call)
    except asyncio.CancelledError:
        if certain or not call.give_up():
            await uninterrupted(_end_of(call))
        raise
    return call.result()


def _end_of(call: Call) -> asyncio.Future[None]:
    loop = asyncio.get_running_loop()
    end = loop.create_future()

    def wake(_: Any) -> None:
        try:
            loop.call_soon_threadsafe(_set, end)
        except RuntimeError:
            logger.debug("An event loop was closed before its database call had ended.")

    call.add_done_callback(wake)
    return end


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
    return cancelled


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def run_follow_ups(lease: Lease) -> None:
    """Await the `async` callbacks of transactions that this lease has committed, all of them.

    They run in a task of their own, so that cancelling the caller doesn't cut them short.
    """
    pending = lease.root.follow_ups
    if not pending:
        return
    todo, pending[:] = list(pending), []

    async def run() -> None:
        for callback in todo:
            try:
                await callback()
            except Exception:
                logger.exception("An after_commit callback failed; its transaction is committed.")

    await asyncio.shield(detached(run()))


def detached(work: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
    """Start a task that lives on if the caller is cancelled."""
    task = asyncio.ensure_future(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task


_running: set[asyncio.Future[None]] = set()  # the loop itself keeps only weak references
