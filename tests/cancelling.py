"""Cancelling a coroutine at each of its awaits in turn, and at each step that its driver takes.

A coroutine is driven by a task, through `_counted`, which sees each of its suspensions. A `Cut`
says which of them the task is cancelled at, and how. The same body is run again and again, cut one
suspension later each time, until it ends before it is cut: then every await has had its turn.
"""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from types import coroutine
from typing import Any

import anyio
import peewee
import pytest

from fastapi_peewee import Database, connect
from tests.apps import back_to_rest

Body = Callable[[], Awaitable[Any]]

#: Who cancels: a task, once; a task, at that await and at each that follows; a scope of anyio's,
#: which does so by itself; a time limit of asyncio's.
BY = ("task", "task again and again", "scope", "timeout")

#: When: as the coroutine begins to wait; when what it waits for has come, and it hasn't noticed
#: yet; while a thread is inside the driver.
MOMENTS = ("waiting", "woken", "inside the driver")


@dataclass
class Cut:
    """Cancel at the suspension, or at the driver's step, with this number."""

    number: int
    by: str = "task"
    moment: str = "waiting"
    driver: "Driver | None" = None
    #: Called at the first suspension.
    first: Callable[[], object] = lambda: None

    done: bool = field(default=False, init=False)
    #: How often it has waited since.
    awaits_after: int = field(default=0, init=False)
    _suspensions: int = field(default=0, init=False)

    async def through(self, body: Body) -> BaseException | None:
        """Run a body. Returns what it raised, the cancellation among it.

        The caller knows by `done` whether the body was cancelled.
        """
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        task = asyncio.create_task(self._run(body))
        if self.by.startswith("task"):
            self._cancel: Callable[[], object] = task.cancel
        if self.moment == "inside the driver":
            assert self.driver is not None
            self.driver.before_step = self._at_step
        try:
            await asyncio.wait({task})
        finally:
            if self.driver is not None:
                self.driver.before_step = None
        return asyncio.CancelledError() if task.cancelled() else task.exception()

    async def _run(self, body: Body) -> None:
        if self.by == "scope":
            with anyio.CancelScope() as scope:
                self._cancel = scope.cancel
                await _counted(body(), self._suspended)
            if scope.cancelled_caught:
                raise asyncio.CancelledError
        elif self.by == "timeout":
            async with asyncio.timeout(None) as limit:
                self._cancel = lambda: limit.reschedule(self._loop.time())
                try:
                    await _counted(body(), self._suspended)
                finally:
                    # A limit that runs out as its block ends has come too late to cancel anything.
                    self._cancel = lambda: None
        else:
            await _counted(body(), self._suspended)

    def _is_due(self, number: int) -> bool:
        if number == self.number:
            return True
        return number > self.number and self.by == "task again and again"

    def _suspended(self, future: Any) -> None:
        number, self._suspensions = self._suspensions, self._suspensions + 1
        self.awaits_after += self.done
        if number == 0:
            self.first()
        if self.moment == "inside the driver":
            if self.done and self.by == "task again and again":
                self._cancel()
        elif self._is_due(number):
            if self.moment == "woken" and future is not None:
                # Before the task's own callback, which is added when it has seen the future.
                future.add_done_callback(lambda _: self._now())
            else:
                self._now()

    def _now(self) -> None:
        self.done = True
        self._cancel()

    def _at_step(self, number: int) -> None:
        if not self._is_due(number):
            return
        self.done = True
        if threading.get_ident() == self._loop_thread:
            self._cancel()
            return
        noticed = threading.Event()

        def cancel() -> None:
            self._cancel()
            rounds(20)

        def rounds(more: int) -> None:
            """In the first the task is thrown into, in the others it does what it can do."""
            if more:
                self._loop.call_soon(rounds, more - 1)
            else:
                noticed.set()

        self._loop.call_soon_threadsafe(cancel)
        assert noticed.wait(30)


@coroutine
def _counted(awaitable: Any, suspended: Callable[[Any], object]) -> Generator[Any, Any, Any]:
    """Await something, and call `suspended` with what it waits for whenever it does."""
    inner, value, error = awaitable.__await__(), None, None
    while True:
        try:
            future = inner.send(value) if error is None else inner.throw(error)
        except StopIteration as stop:
            return stop.value
        suspended(future)
        try:
            value, error = (yield future), None
        except BaseException as thrown:
            value, error = None, thrown


class Driver:
    """What the connections of `stepped` do: each statement, rollback and close is a step.

    Attributes:
        before_step: called in the step, with its number, from the thread that takes it.
        statements: what was executed, by all connections.
        overlaps: steps that began while another thread was in one of the same connection.
    """

    def __init__(self) -> None:
        self.before_step: Callable[[int], None] | None = None
        self.statements: list[str] = []
        self.overlaps: list[str] = []
        self._number = 0

    def begin(self) -> None:
        """Count steps from here."""
        self._number = 0
        self.statements.clear()

    def connect_options(self) -> dict[str, Any]:
        return {"factory": type("Connection", (_SteppedConnection,), {"driver": self})}

    def step(self, connection: "_SteppedConnection", what: str) -> Any:
        mine = connection.in_step.acquire(blocking=False)
        if not mine:
            self.overlaps.append(what)
        try:
            number, self._number = self._number, self._number + 1
            self.statements.append(what)
            if self.before_step is not None:
                self.before_step(number)
        finally:
            if mine:
                connection.in_step.release()


class _SteppedCursor(sqlite3.Cursor):
    connection: "_SteppedConnection"

    def execute(self, sql: str, *args: Any) -> Any:
        self.connection.driver.step(self.connection, sql)
        return super().execute(sql, *args)


class _SteppedConnection(sqlite3.Connection):
    driver: Driver

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_step = threading.Lock()

    def cursor(self, factory: Any = _SteppedCursor) -> Any:
        return super().cursor(factory)

    def rollback(self) -> None:
        self.driver.step(self, "rollback()")
        super().rollback()

    def close(self) -> None:
        self.driver.step(self, "close()")
        super().close()


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
async def db(driver: Driver) -> AsyncIterator[Database]:
    """One connection, whose every step `driver` sees."""
    db = connect("sqlite:///:memory:", pool_size=1, timeout=30, **driver.connect_options())
    yield db
    assert await db.close_pool(), "a connection was not given back"


@pytest.fixture
async def row(db: Database) -> Any:
    return await make_row(db)


async def make_row(db: Database) -> Any:
    """A model with the names of some old rows in its table."""

    class Row(db.Model):
        name = peewee.CharField()

    await db.acreate_tables([Row])
    await Row.abulk_create([Row(name="old") for _ in range(5)])
    return Row


@dataclass(frozen=True)
class Scenario:
    """What is cancelled: `body(db, Row)` writes rows, or reads some of those that are there.

    Attributes:
        outcomes: the names that may be stored afterwards, one string for each possible set; the
            last is that of a body that wasn't cancelled.
        raises: what a body that isn't cancelled ends with.
        check: called after each run with `Row` and the names that are stored.
    """

    body: Callable[[Database, Any], Awaitable[Any]]
    outcomes: tuple[str, ...]
    raises: type[BaseException] | None = None
    check: Callable[[Any, str], object] = lambda row, stored: None


async def until_only(tasks: set[Any]) -> None:
    """Wait until all tasks but these have ended by themselves."""
    for _ in range(100):
        others = asyncio.all_tasks() - tasks
        if not others:
            return
        _, pending = await asyncio.wait(others, timeout=30)
        assert not pending, f"still running: {pending}"
    pytest.fail("tasks without end")


def look(db: Database) -> list[Any]:
    """The session, as its next user finds it."""
    if db.in_transaction() or db._state.commit_callbacks:
        pytest.fail("the next user finds an open transaction")
    conn = db._state.conn
    if isinstance(conn, sqlite3.Connection):
        assert not conn.in_transaction
        return list(db.execute_sql("PRAGMA query_only").fetchone())
    if hasattr(conn, "pgconn"):
        assert conn.info.transaction_status == 0
        return list(db.execute_sql("SHOW transaction_read_only").fetchone())
    assert not conn.server_status & 1
    setting = "tx_read_only" if db.mariadb else "transaction_read_only"
    return list(db.execute_sql(f"SELECT @@{setting}").fetchone())


Around = Callable[[Database, Any, Cut], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def alone(db: Database, row: Any, cut: Cut) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def unconnected(db: Database, row: Any, cut: Cut) -> AsyncIterator[None]:
    """The pool has no connection; the body opens one."""
    await asyncio.to_thread(db.close_idle)
    if cut.driver is not None:
        cut.driver.begin()
    yield


@asynccontextmanager
async def all_in_use(db: Database, row: Any, cut: Cut) -> AsyncIterator[None]:
    """All connections are in use; they come back as the body waits for one."""
    leases = [await db.pool.acquire() for _ in range(db.pool.size)]

    def give_back() -> None:
        while leases:
            db.pool.give_back(leases.pop())

    loop = asyncio.get_running_loop()
    cut.first = lambda: loop.call_soon(loop.call_soon, give_back)
    try:
        yield
    finally:
        give_back()


@asynccontextmanager
async def in_a_block(db: Database, row: Any, cut: Cut) -> AsyncIterator[None]:
    """The body is part of a transaction, which isn't cancelled and commits."""
    async with db.atomic():
        await row.acreate(name="(")
        yield
        await row.acreate(name=")")


@asynccontextmanager
async def beside_a_sibling(db: Database, row: Any, cut: Cut) -> AsyncIterator[None]:
    """The body is part of a transaction, whose connection is in use as it begins."""
    async with in_a_block(db, row, cut):
        began, go_on = threading.Event(), threading.Event()

        def sibling() -> None:
            began.set()
            assert go_on.wait(30)

        task = asyncio.create_task(db.run(sibling))
        await asyncio.to_thread(began.wait, 30)
        loop = asyncio.get_running_loop()
        cut.first = lambda: loop.call_soon(loop.call_soon, go_on.set)
        try:
            yield
        finally:
            go_on.set()
            await task


IN_A_BLOCK = (in_a_block, beside_a_sibling)


async def cut_everywhere(
    db: Database,
    row: Any,
    scenario: Scenario,
    *,
    by: str,
    moment: str = "waiting",
    driver: Driver | None = None,
    around: Around = alone,
) -> int:
    """Run a scenario over and over, cancelled at each of its awaits or steps in turn, and check
    what each leaves. Returns how many there were.
    """
    as_new, before = await db.run(look, db), asyncio.all_tasks()
    outcomes = scenario.outcomes
    if around in IN_A_BLOCK:
        outcomes = tuple("()" + names for names in outcomes)
    number = 0
    while True:
        await db.run(row.delete().where(row.name != "old").execute)
        if driver is not None:
            driver.begin()
        cut = Cut(number, by, moment, driver)
        async with around(db, row, cut):
            error = await cut.through(lambda: scenario.body(db, row))
        await until_only(before)
        note = f"cut at {number}; {error!r}; {driver.statements if driver else ''}"
        # FastAPI's own threads live on when their task is cancelled, and nobody awaits them.
        await back_to_rest(db, within=10)
        assert (db.pool_stats.waiting, db.pool_stats.timed_out) == (0, 0), note
        # A scope cancels at each await that isn't shielded: who waits for a thread would spin.
        assert by != "scope" or cut.awaits_after <= 12, note
        assert await db.run(look, db) == as_new, note
        stored = await db.run(stored_names, row)
        assert stored in outcomes, note
        scenario.check(row, stored)
        if driver is not None:
            assert driver.overlaps == [], note
        if not cut.done:
            assert type(error) is (scenario.raises or type(None)), note
            assert stored == outcomes[-1], note
            return number
        expected = TimeoutError if by == "timeout" else asyncio.CancelledError
        if error is None:
            # Only these may come too late, and then all is done.
            assert by in ("scope", "timeout"), note
            assert stored == outcomes[-1], note
        else:
            allowed = (expected,) if scenario.raises is None else (expected, scenario.raises)
            assert isinstance(error, allowed), note
        number += 1


def stored_names(row: Any) -> str:
    return "".join(sorted(each.name for each in row.select().where(row.name != "old")))
