"""Statements that write on SQLite, those of one moment under one COMMIT: a group commit.

What a COMMIT costs is the same for one statement as for fifty, and so is the way from the event
loop to a thread and back. So the single statements that tasks of an event loop execute meanwhile
share both. Each of them is still all or nothing and sees those before it, and none is answered
before its COMMIT. What can't be done in this way, or not now, is left to the ordinary way.
"""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import Context, copy_context
from typing import Any

from .calls import Call, uninterrupted
from .database import UNSENDABLE
from .drivers import Returned
from .exceptions import PoolClosed
from .pool import Pool
from .state import Lease, PeeweeConnectionState
from .writers import Writers, rest_of_patience

#: How many statements share a COMMIT.
_MOST = 100


class _Write:
    """A statement, and what came of it: a cursor, an error or, if it wasn't executed, neither."""

    __slots__ = ("begun", "context", "cursor", "ended", "error", "gone", "params", "sql")

    def __init__(self, sql: str, params: Sequence[Any], ended: "asyncio.Future[None]") -> None:
        self.sql = sql
        self.params = params
        self.context = copy_context()  # functions that SQL calls may look into it
        self.begun = time.monotonic()
        self.ended = ended
        self.cursor: Returned | None = None
        self.error: BaseException | None = None
        #: Its task was cancelled.
        self.gone = False

    def execute(self, conn: sqlite3.Connection) -> None:
        try:
            self.cursor = Returned(self.context.run(conn.execute, self.sql, self.params))
        except BaseException as error:
            hidden = error.__context__  # see `Database._refused()`; it is lost in the task
            self.error = hidden if isinstance(hidden, UNSENDABLE) else error

    def undo(self, error: BaseException | None = None) -> None:
        """It was rolled back. Without an error it is as if it hadn't been executed."""
        self.cursor, self.error = None, error


class GroupCommit:
    """The writers of one event loop.

    A task serves them while there are any: it has a thread wait for the turn to write, and then
    execute what has come until then. A statement is in the queue until its thread has taken it.
    """

    def __init__(self, pool: Pool, state: PeeweeConnectionState, writers: Writers) -> None:
        self._pool = pool
        self._state = state
        self._writers = writers
        self._lock = threading.Lock()  # guards these two
        self._queue: list[_Write] = []
        self._batch: list[_Write] = []
        # These two belong to the event loop.
        self._call: Call | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def execute(self, sql: str, params: Sequence[Any]) -> Returned | None:
        """Execute a statement that writes, outside of any block, and commit it.

        Returns None, and has done nothing, if that can't be done here now, as when `max_waiting`
        others wait. If it is cancelled, it is over when `CancelledError` is raised.

        Raises:
            sqlite3.Error: and what else a driver raises.
        """
        if len(self._queue) >= self._pool.max_waiting:
            return None
        write = _Write(sql, params, asyncio.get_running_loop().create_future())
        with self._lock:
            self._queue.append(write)
        if self._serving is None:
            self._serve()
        try:
            await write.ended
        except asyncio.CancelledError:
            await self._abandon(write)
            write.error = None  # its traceback has the write
            raise
        if write.error is None:
            return write.cursor
        try:
            raise write.error
        finally:
            write.error = None  # its traceback has the write

    async def _abandon(self, write: _Write) -> None:
        with self._lock:
            if write in self._queue:
                self._queue.remove(write)
                return
            if write not in self._batch:
                return  # it had ended just then
            write.gone = True
            nobody_waits = all(one.gone for one in self._batch)
        write.ended = asyncio.get_running_loop().create_future()  # the other one is cancelled
        if nobody_waits and self._call is not None:
            self._call.interrupt()
        await uninterrupted(write.ended)

    def _serve(self) -> None:
        # A task begins when the loop has done what is ready now: so who writes in the same moment
        # is in the first batch. It is no part of the request, or the block, of who came first.
        serving = asyncio.get_running_loop().create_task(self._commit_all(), context=Context())
        serving.add_done_callback(self._served)
        self._serving = serving

    def _served(self, _: "asyncio.Task[None]") -> None:
        self._serving = None
        if self._queue:  # whoever cancels all tasks has cancelled this one, too
            self._serve()

    async def _commit_all(self) -> None:
        while self._queue:
            try:
                done = await self._commit()
            finally:
                ended, self._batch = self._batch, []
                _answer(ended)
            if not done:
                with self._lock:
                    left, self._queue = self._queue, []
                _answer(left)

    async def _commit(self) -> bool:
        """Have a thread write. Returns False if it can't be done now."""
        try:
            lease = self._pool.acquire_nowait()
            if lease is None:
                return False
            call = Call(self._pool, self._state, lease, self._write, self._pool.give_back)
        except (PoolClosed, RuntimeError):  # no thread could be started
            return False
        self._call = call
        try:
            await call.end()
        except asyncio.CancelledError:  # by whoever cancels all tasks, the writers' as well
            await uninterrupted(call.end())
        finally:
            self._call = None
        if call.succeeded:
            return True
        error = call.take_error()
        for write in self._batch:
            write.undo(error)
        return False

    # In a thread, under a lease.

    def _write(self) -> None:
        with self._lock:
            if not self._queue:
                return
            first = self._queue[0]
        patience = first.begun + self._writers.patience - time.monotonic()
        try:
            turn, _ = self._writers.enter(patience)
        except sqlite3.OperationalError as error:
            self._refuse(first, error)
            return
        try:
            with self._lock:
                writes, self._queue = self._queue[:_MOST], self._queue[_MOST:]
                self._batch = writes
            lease = self._state.lease()
            assert lease is not None
            for write in writes:
                # A function that SQL calls, and that queries, does so on this connection.
                write.context.run(self._state.bind, lease)
            conn = lease.root.held.conn
            if len(writes) == 1:
                with _hurry(lease, writes), self._pool.waiting(lease):
                    writes[0].execute(conn)
            elif writes:
                self._write_together(conn, lease, writes)
        finally:
            turn.release()

    def _refuse(self, first: _Write, error: BaseException) -> None:
        """Those whose patience is over, as that of this one is, if it is still there. The others
        wait on.
        """
        late = max(time.monotonic() - self._writers.patience, first.begun)
        with self._lock:
            writes, self._batch, self._queue = [*self._batch, *self._queue], [], []
            for write in writes:
                if write.gone or write.begun <= late:
                    write.error = error
                    self._batch.append(write)
                else:
                    self._queue.append(write)

    def _write_together(self, conn: Any, lease: Lease, writes: list[_Write]) -> None:
        try:
            with _hurry(lease, writes), self._pool.waiting(lease):
                conn.execute("BEGIN IMMEDIATE")
            for write in writes:
                with self._pool.waiting(lease):
                    write.execute(conn)
                if not conn.in_transaction:
                    # It has rolled everything back (ON CONFLICT ROLLBACK, an interruption, a full
                    # disk), and the others are executed anew.
                    for other in writes:
                        if other is not write:
                            other.undo()
                    return
            with self._pool.waiting(lease):
                conn.execute("COMMIT")
        except BaseException as error:
            # A deferred foreign key is checked by COMMIT, which then commits nothing: alone, each
            # will have an answer of its own. After any other error nobody knows.
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_BUSY and not conn.in_transaction:
                self._refuse(writes[0], error)  # by BEGIN: another process writes
                return
            refused = code == sqlite3.SQLITE_CONSTRAINT
            for write in writes:
                write.undo(None if refused else error)


def _hurry(lease: Lease, writes: list[_Write]) -> AbstractContextManager[None]:
    return rest_of_patience(lease, time.monotonic() - writes[0].begun)


def _answer(writes: list[_Write]) -> None:
    for write in writes:
        if not write.ended.done():  # cancelled, and its task doesn't know it yet
            with suppress(RuntimeError):  # its loop is closed
                write.ended.set_result(None)
