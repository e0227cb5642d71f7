"""What Peewee says of `after_commit` holds, and what this library adds to it."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fastapi_peewee import Database
from fastapi_peewee.mysql import MySQLDatabase
from fastapi_peewee.postgresql import PostgresqlDatabase
from fastapi_peewee.sqlite import SqliteDatabase
from tests import modes
from tests.modes import Mode, Oops, Seen, User, in_each_mode, oops_gets_out

connected, db, mode, observer, seen = modes.fixtures


@pytest.fixture
def calls() -> list[str]:
    return []


def note(calls: list[str], word: str) -> Callable[[], None]:
    return lambda: calls.append(word)


@in_each_mode
async def test_after_commit_waits_for_the_commit(mode: Mode, seen: Seen) -> None:
    """A function given to `after_commit` is called once, when the transaction is committed."""
    calls = []

    async with mode.block(mode.db.atomic()):
        await mode.do(User.create, name="ann")
        mode.db.after_commit(lambda: calls.append(seen()))
        assert calls == []

    assert calls == [["ann"]]
    async with mode.block(mode.db.atomic()):
        pass
    assert calls == [["ann"]]


@in_each_mode
async def test_after_commit_is_called_at_once_outside(mode: Mode, calls: list[str]) -> None:
    """Without a transaction, `after_commit` calls the function at once."""
    mode.db.after_commit(note(calls, "now"))
    assert calls == ["now"]


@in_each_mode
async def test_after_commit_returns_the_function(mode: Mode, calls: list[str]) -> None:
    """`@db.after_commit` decorates: it returns the function it is given."""
    async with mode.block(mode.db.atomic()):

        @mode.db.after_commit
        def callback() -> str:
            calls.append("called")
            return "result"

        assert calls == []
    assert calls == ["called"]
    assert callback() == "result"


@in_each_mode
async def test_after_commit_never_follows_a_rollback(mode: Mode, calls: list[str]) -> None:
    """What was given to `after_commit` is forgotten when the transaction is rolled back."""
    with oops_gets_out():
        async with mode.block(mode.db.atomic()):
            mode.db.after_commit(note(calls, "raised"))
            raise Oops
    async with mode.block(mode.db.atomic()):
        mode.db.after_commit(note(calls, "committed"))
    assert calls == ["committed"]

    async with mode.block(mode.db.atomic()) as txn:
        mode.db.after_commit(note(calls, "rolled back"))
        await mode.do(txn.rollback)
        mode.db.after_commit(note(calls, "committed too"))
    assert calls == ["committed", "committed too"]


@in_each_mode
async def test_after_commit_follows_an_explicit_commit(mode: Mode, calls: list[str]) -> None:
    """`txn.commit()` calls what was registered before it, once; the end of the block the rest."""
    async with mode.block(mode.db.atomic()) as txn:
        mode.db.after_commit(note(calls, "first"))
        await mode.do(txn.commit)
        assert calls == ["first"]
        mode.db.after_commit(note(calls, "second"))

    assert calls == ["first", "second"]


@in_each_mode
async def test_after_commit_in_nested_blocks(mode: Mode, calls: list[str]) -> None:
    """What nested blocks register is called after the outermost commit, in that order."""
    async with mode.block(mode.db.atomic()):
        mode.db.after_commit(note(calls, "outer"))
        async with mode.block(mode.db.atomic()):
            mode.db.after_commit(note(calls, "inner"))
        assert calls == []
        mode.db.after_commit(note(calls, "last"))

    assert calls == ["outer", "inner", "last"]


@in_each_mode
async def test_after_commit_is_undone_with_its_savepoint(mode: Mode, calls: list[str]) -> None:
    """What was registered in a savepoint that was rolled back is forgotten; the rest is not."""
    async with mode.block(mode.db.atomic()):
        mode.db.after_commit(note(calls, "outer"))
        with oops_gets_out():
            async with mode.block(mode.db.atomic()):
                mode.db.after_commit(note(calls, "raised"))
                raise Oops
        async with mode.block(mode.db.atomic()) as savepoint:
            mode.db.after_commit(note(calls, "rolled back"))
            await mode.do(savepoint.rollback)
            mode.db.after_commit(note(calls, "inner"))

    assert calls == ["outer", "inner"]


async def test_a_task_keeps_its_callbacks_if_anothers_savepoint_is_undone(
    db: Database, calls: list[str]
) -> None:
    """What a task registers in the outer block is none of a nested block's that is open by then."""
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def nested() -> None:
        with oops_gets_out():
            async with db.atomic():
                inside.set()
                await go_on.wait()
                async with db.atomic():
                    db.after_commit(note(calls, "nested"))
                raise Oops

    async with db.atomic():
        task = asyncio.create_task(nested())
        await inside.wait()
        db.after_commit(note(calls, "outer"))
        go_on.set()
        await task

    assert calls == ["outer"]


async def test_after_commit_is_called_at_once_beside_anothers_transaction(
    db: Database, calls: list[str]
) -> None:
    """A task that shares a connection with one whose transaction is open is in none itself."""
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        calls.append("async")

    async def transaction() -> None:
        with oops_gets_out():
            async with db.atomic():
                inside.set()
                await go_on.wait()
                db.after_commit(note(calls, "rolled back"))
                raise Oops

    async with db.connection_context():
        task = asyncio.create_task(transaction())
        await inside.wait()
        db.after_commit(note(calls, "now"))
        db.after_commit(call)
        go_on.set()
        await task

    assert calls == ["now", "async"]


@in_each_mode
async def test_an_after_commit_callback_may_query(mode: Mode, seen: Seen) -> None:
    """A callback runs outside of the transaction: it may query, and begin one of its own."""

    def follow_up() -> None:
        assert not mode.db.in_transaction()
        with mode.db.atomic():
            User.create(name="bob")
            mode.db.after_commit(lambda: User.create(name="cid"))

    async with mode.block(mode.db.atomic()):
        await mode.do(User.create, name="ann")
        mode.db.after_commit(follow_up)

    assert seen() == ["ann", "bob", "cid"]


@pytest.mark.parametrize("retries", [0, 2])
async def test_callbacks_are_carried_out_for_who_is_cancelled_meanwhile(
    db: Database, seen: Seen, retries: int
) -> None:
    """Cancelling a call doesn't end the statements of its transaction's callbacks."""
    loop, called, cancelled = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    brief = {
        PostgresqlDatabase: "SELECT pg_sleep(0.3)",
        MySQLDatabase: "SELECT SLEEP(0.3) FROM (SELECT 1 UNION SELECT 2) AS two",
        SqliteDatabase: (
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000000) "
            "SELECT count(*) FROM n"
        ),
    }[type(db)]

    def callback() -> None:
        loop.call_soon_threadsafe(called.set)
        assert cancelled.wait(10)
        db.execute_sql(brief).fetchall()  # interrupts would come again and again
        User.create(name="bob")

    def code() -> None:
        with db.atomic():
            User.create(name="ann")
            db.after_commit(callback)

    options = {"retries": retries} if retries else {}
    call = asyncio.create_task(db.run(code, **options))
    await called.wait()
    call.cancel()
    await asyncio.sleep(0)  # the task learns of it
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert seen() == ["ann", "bob"]


@in_each_mode
async def test_a_callback_in_the_middle_of_a_block_is_outside_of_its_transactions(
    mode: Mode, seen: Seen, calls: list[str]
) -> None:
    """What it does after `txn.commit()` is stored, whatever becomes of the rest of the block."""

    def follow_up() -> None:
        assert not mode.db.in_transaction()
        with mode.db.atomic():
            User.create(name="bob")
            mode.db.after_commit(lambda: User.create(name="cid"))

    with oops_gets_out():
        async with mode.block(mode.db.atomic()) as txn:
            await mode.do(User.create, name="ann")
            mode.db.after_commit(follow_up)
            await mode.do(txn.commit)
            mode.db.after_commit(note(calls, "rolled back"))
            await mode.do(User.create, name="dan")
            raise Oops

    assert seen() == ["ann", "bob", "cid"]
    assert calls == []


async def test_a_task_of_the_block_keeps_its_callbacks_while_anothers_run(
    db: Database, calls: list[str]
) -> None:
    """A task of the block is in its transactions, also between two of them."""
    called, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        loop.call_soon_threadsafe(called.set)
        assert go_on.wait(10)

    async with db.atomic() as txn:
        db.after_commit(wait)
        committing = asyncio.create_task(txn.acommit())
        await called.wait()
        db.after_commit(note(calls, "second"))
        go_on.set()
        await committing
        assert calls == []
    assert calls == ["second"]


@in_each_mode
@pytest.mark.parametrize("error", [Oops, asyncio.CancelledError])
async def test_a_failing_callback_harms_nobody(
    mode: Mode,
    seen: Seen,
    calls: list[str],
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    """A callback that raises is logged; the transaction stays committed, the others are called."""

    def fail() -> None:
        raise error  # something that it has waited for may have been cancelled

    async with mode.block(mode.db.atomic()):
        await mode.do(User.create, name="ann")
        mode.db.after_commit(note(calls, "before"))
        mode.db.after_commit(fail)
        mode.db.after_commit(note(calls, "after"))

    assert calls == ["before", "after"]
    assert seen() == ["ann"]
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is error


@in_each_mode
def test_after_commit_follows_sessions(mode: Mode, calls: list[str]) -> None:
    """`session_commit` calls what the session has registered; `session_rollback` forgets it."""
    mode.db.session_start()
    mode.db.after_commit(note(calls, "rolled back"))
    mode.db.session_rollback()
    mode.db.session_start()
    mode.db.after_commit(note(calls, "committed"))
    mode.db.session_commit()

    assert calls == ["committed"]


@in_each_mode
def test_after_commit_is_refused_in_manual_commit(mode: Mode) -> None:
    """Inside `manual_commit` nobody knows when a commit comes: `after_commit` raises."""
    with mode.db.manual_commit(), pytest.raises(ValueError, match="manual"):
        mode.db.after_commit(print)


def test_after_commit_refuses_coroutine_functions_where_nothing_awaits_them(db: Database) -> None:
    """An `async` function that no event loop would await is refused."""

    async def callback() -> None: ...

    with db.atomic(), pytest.raises(ValueError, match="event loop"):
        db.after_commit(callback)
    with pytest.raises(ValueError, match="event loop"):
        db.after_commit(callback)


def test_what_a_function_returns_where_nothing_awaits_it_is_logged(
    db: Database, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    """The transaction is committed, so that it can't be refused any more."""

    async def notify() -> None: ...

    coroutine = notify()
    with db.atomic():
        User.create(name="ann")
        db.after_commit(lambda: coroutine)
    coroutine.close()
    assert seen() == ["ann"]
    assert "needs an event loop" in caplog.text


async def test_after_commit_awaits_coroutine_functions(db: Database, seen: Seen) -> None:
    """An `async` function is awaited on the event loop, once the connection is given back."""
    calls: list[Any] = []
    loop = asyncio.get_running_loop()

    async def callback() -> None:
        assert asyncio.get_running_loop() is loop
        calls.append((seen(), db.pool_stats.in_use))

    def code() -> None:
        with db.atomic():
            User.create(name="bob")
            db.after_commit(callback)

    async with db.atomic():
        await User.acreate(name="ann")
        db.after_commit(callback)
        assert calls == []
    assert calls == [(["ann"], 0)]
    await db.run(code)
    assert calls[1:] == [(["ann", "bob"], 0)]
    with oops_gets_out():
        async with db.atomic():
            db.after_commit(callback)
            raise Oops
    assert len(calls) == 2


async def test_after_commit_awaits_what_a_function_returns(db: Database, calls: list[str]) -> None:
    """A plain function may return something to await: `lambda: notify(user.id)`."""

    async def notify(word: str) -> None:
        calls.append(word)

    def code() -> None:
        with db.atomic():
            db.after_commit(lambda: notify("thread"))
        db.after_commit(lambda: notify("at once"))

    async with db.atomic():
        db.after_commit(lambda: notify("loop"))
        assert calls == []
    assert calls == ["loop"]
    await db.run(code)
    assert calls == ["loop", "thread", "at once"]


async def test_after_commit_awaits_functions_outside_of_any_block(
    db: Database, calls: list[str]
) -> None:
    """Without a transaction and a connection they run at once, in a task of their own."""

    async def notify(word: str = "function") -> None:
        calls.append(word)

    before = asyncio.all_tasks()
    db.after_commit(notify)
    db.after_commit(lambda: notify("returned"))
    await asyncio.wait(asyncio.all_tasks() - before)
    assert sorted(calls) == ["function", "returned"]


async def test_a_coroutine_function_may_register_another(db: Database, calls: list[str]) -> None:
    """It runs after it."""

    async def second() -> None:
        calls.append("second")
        done.set()

    async def first() -> None:
        calls.append("first")
        db.after_commit(second)

    done = asyncio.Event()
    async with db.atomic():
        db.after_commit(first)
    await asyncio.wait_for(done.wait(), 10)
    assert calls == ["first", "second"]


@pytest.mark.parametrize("error", [Oops, asyncio.CancelledError])
async def test_a_failing_coroutine_function_harms_nobody(
    db: Database,
    seen: Seen,
    calls: list[str],
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    """Its error is logged, be it of a task that it awaited and that was cancelled; the transaction
    is committed, and the others are awaited."""

    async def fail() -> None:
        raise error

    async def call() -> None:
        calls.append("called")

    async with db.atomic():
        await User.acreate(name="ann")
        db.after_commit(fail)
        db.after_commit(call)
    assert (seen(), calls) == (["ann"], ["called"])
    assert "An after_commit callback failed" in caplog.text


async def test_whoever_cancels_all_tasks_ends_the_callbacks(db: Database, calls: list[str]) -> None:
    """The callbacks that are awaited are cancelled then, too, and those that wait not begun."""
    before, begun = asyncio.all_tasks(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def call() -> None:
        calls.append("called")

    async def transaction() -> None:
        async with db.atomic():
            db.after_commit(wait)
            db.after_commit(call)

    task = asyncio.create_task(transaction())
    await begun.wait()
    cancelled = asyncio.all_tasks() - before
    for each in cancelled:
        each.cancel()
    await asyncio.wait(cancelled)
    assert task.cancelled()
    assert calls == []
