"""Leases: who may use a connection, for how long, and what cancellation leaves behind."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import anyio
import peewee
import pytest

from fastapi_peewee import (
    BlockingQuery,
    BlockingQueryWarning,
    Database,
    LeaseEnded,
    TurnTimeout,
    connect,
)
from fastapi_peewee.gate import Gate
from fastapi_peewee.state import Lease

POOL = 4


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    db = connect(database_url, pool_size=POOL, timeout=30)
    yield db
    in_use = db.pool_stats.in_use
    await db.close_pool()
    assert in_use == 0, "a connection was not given back"


@pytest.fixture
async def account(db: Database) -> Any:
    class Account(db.Model):
        name = peewee.CharField(unique=True)
        balance = peewee.IntegerField(default=0)

    await db.acreate_tables([Account])
    return Account


async def names(model: Any) -> list[str]:
    return sorted([row.name for row in await model.select().aexecute()])


async def test_run_takes_a_connection_for_one_call(db: Database) -> None:
    """A connection is held while `run` runs, and no longer."""
    assert (await db.run(lambda: db.pool_stats)).in_use == 1
    assert db.pool_stats.in_use == 0


async def test_run_runs_in_another_thread(db: Database) -> None:
    """The event loop goes on while `run` waits for the database."""
    assert await db.run(threading.get_ident) != threading.get_ident()


async def test_run_refuses_async_functions(db: Database) -> None:
    """`await db.run(async_function)` says what to do instead; it doesn't return a coroutine."""

    async def query() -> None: ...

    with pytest.raises(TypeError, match="synchronous function"):
        await db.run(query)  # type: ignore[unused-coroutine]


async def test_an_exception_passes_through(db: Database) -> None:
    """What the function raises, `run` raises, even `StopIteration`, as coroutines have it."""
    with pytest.raises(ZeroDivisionError):
        await db.run(lambda: 1 // 0)
    with pytest.raises(RuntimeError) as failure:
        await db.run(next, iter(()))
    assert isinstance(failure.value.__cause__, StopIteration)


async def test_the_rows_of_an_executed_query_can_be_read_afterwards(
    db: Database, account: Any
) -> None:
    """A query executed under a lease is read to its end before the lease is over."""
    await account.abulk_create([account(name=str(n)) for n in range(300)])
    rows = await db.run(account.select().execute)
    assert len(list(rows)) == 300


async def test_calls_in_a_block_share_its_connection_one_at_a_time(
    db: Database, account: Any
) -> None:
    """Children of a transaction take turns on its connection, and are all part of it."""
    running: list[int] = []
    peaks: list[int] = []

    def insert(number: int) -> None:
        running.append(number)
        account.create(name=str(number))
        peaks.append(len(running))
        running.remove(number)

    with suppress(ZeroDivisionError):
        async with db.atomic():
            await asyncio.gather(*(db.run(insert, number) for number in range(20)))
            assert db.pool_stats.in_use == 1
            raise ZeroDivisionError
    assert peaks == [1] * 20
    assert await names(account) == []


async def test_a_nested_block_keeps_its_siblings_out(db: Database, account: Any) -> None:
    """While a nested block is open, sibling tasks wait; its rollback takes nothing of theirs."""
    inside = asyncio.Event()
    sibling_done = asyncio.Event()

    async def nested() -> None:
        with suppress(ZeroDivisionError):
            async with db.atomic():
                await account.acreate(name="nested")
                inside.set()
                for _ in range(50):
                    await asyncio.sleep(0)
                assert not sibling_done.is_set()
                raise ZeroDivisionError

    async def sibling() -> None:
        await inside.wait()
        await account.acreate(name="sibling")
        sibling_done.set()

    async with db.atomic():
        await asyncio.gather(nested(), sibling())
    assert await names(account) == ["sibling"]


async def test_a_task_that_outlives_its_block_gets_an_error(db: Database, account: Any) -> None:
    """A task started in a transaction can't run its queries outside of it, unnoticed."""
    ended = asyncio.Event()

    async def late() -> None:
        await ended.wait()
        await account.acreate(name="late")

    async with db.atomic():
        task = asyncio.create_task(late())
        await account.acreate(name="in time")
    ended.set()
    with pytest.raises(LeaseEnded, match="outlived"):
        await task
    assert await names(account) == ["in time"]


async def test_a_block_waits_for_a_running_child(db: Database, account: Any) -> None:
    """A call that is running when its block ends is part of the transaction."""
    began, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        assert go_on.wait(30)
        account.create(name="child")

    async with db.atomic():
        task = asyncio.create_task(db.run(slow))
        await asyncio.to_thread(began.wait, 30)
        asyncio.get_running_loop().call_later(0.05, go_on.set)
    await task
    assert await names(account) == ["child"]


async def test_a_child_awaited_inside_a_nested_block_times_out(database_url: str) -> None:
    """The one deadlock that blocks allow ends at the time limit, with an error that explains it."""
    db = connect(database_url, timeout=0.05)

    async def child(go_on: asyncio.Event) -> None:
        await go_on.wait()
        await db.run(lambda: None)

    async with db.atomic():
        go_on = asyncio.Event()
        task = asyncio.create_task(child(go_on))
        async with db.atomic():
            go_on.set()
            with pytest.raises(TurnTimeout, match="before a nested block"):
                await task
    assert db.pool_stats.in_use == 0
    await db.close_pool()


async def test_threads_with_the_context_of_a_block_take_turns(db: Database, account: Any) -> None:
    """Threads started inside a block with its context use its connection one at a time."""

    def transfer(number: int) -> None:
        with db.atomic():
            account.create(name=f"{number}a")
            account.create(name=f"{number}b")
            if number % 2:
                raise ZeroDivisionError

    async with db.atomic():
        outcomes = await asyncio.gather(
            *(asyncio.to_thread(transfer, number) for number in range(8)), return_exceptions=True
        )
    assert [type(outcome) for outcome in outcomes] == [type(None), ZeroDivisionError] * 4
    assert await names(account) == sorted(f"{n}{half}" for n in (0, 2, 4, 6) for half in "ab")


async def test_a_synchronous_query_in_a_block_is_refused(db: Database, account: Any) -> None:
    """A query on the event loop, inside a transaction, raises and isn't executed."""
    async with db.atomic():
        with pytest.raises(BlockingQuery, match=r"db\.run"):
            account.create(name="blocking")
        with pytest.raises(BlockingQuery), db.atomic():
            pass
    assert await names(account) == []


async def test_a_synchronous_query_outside_of_requests_warns(db: Database, account: Any) -> None:
    """Elsewhere on an event loop a query warns, at the caller's line, and runs."""
    with pytest.warns(BlockingQueryWarning) as caught:
        account.create(name="notebook")
    assert {warning.filename for warning in caught} == {__file__}
    with db.allow_sync():
        assert account.get().name == "notebook"
        db.close()


async def test_the_decorator_runs_async_functions_inside_the_transaction(
    db: Database, account: Any
) -> None:
    """`@db.atomic()` on `async def` commits what it did, or rolls all of it back."""

    @db.atomic()
    async def create(*names: str, fail: bool) -> int:
        for name in names:
            await account.acreate(name=name)
        if fail:
            raise ZeroDivisionError
        return db.pool_stats.in_use

    assert await create("a", "b", fail=False) == 1
    with pytest.raises(ZeroDivisionError):
        await create("c", "d", fail=True)
    assert await names(account) == ["a", "b"]


@pytest.mark.parametrize("end", ["closing", "ended"])
async def test_who_waits_for_a_turn_as_the_block_ends_gets_an_error(end: str) -> None:
    """And leaves the turn to the next, who gets one as well."""
    lease = Lease(slot=Gate(1))
    lease.dropped = lambda _: None
    waiting = [asyncio.create_task(lease.take_turn(30)) for _ in range(2)]
    while lease.turn.waiting < 2:
        await asyncio.sleep(0)
    setattr(lease, end, True)
    lease.give_turn()
    for each in waiting:
        with pytest.raises(LeaseEnded):
            await each
    with pytest.raises(LeaseEnded):
        lease.take_turn_blocking(30)
    assert lease.turn.acquire_nowait()


def test_who_has_the_turn_does_not_wait_for_it(sqlite_url: str) -> None:
    """Also while it has no connection, which it gets then: nobody else could give it the turn."""
    db = connect(sqlite_url, timeout=0.05)
    lease = db.pool.acquire_blocking()
    token = db._state.bind(lease)
    lease.owner = threading.get_ident()
    db._ensure_connected(lease)
    assert db.pool_stats.opened == 1
    db.pool.let_go(lease)
    lease.give_turn()
    db._ensure_connected(lease)
    assert db.pool_stats.opened == 2
    db._state._state.reset(token)
    db.pool.give_back(lease)
    asyncio.run(db.close_pool())


def test_the_decorator_refuses_generators(sqlite_url: str) -> None:
    """`@db.atomic()` on a generator function is an error: its body would run outside."""
    db = connect(sqlite_url)
    with pytest.raises(TypeError, match="is a generator"):

        @db.atomic()
        def rows() -> Any:
            yield 1


async def test_the_session_is_clean_for_the_next_user(db: Database, account: Any) -> None:
    """An open transaction and a changed setting don't reach the next user of a connection."""
    postgres = isinstance(db, peewee.PostgresqlDatabase)
    mysql = isinstance(db, peewee.MySQLDatabase)

    def leave_a_mess() -> None:
        db.begin()
        account.create(name="uncommitted")
        if postgres:
            db.execute_sql("SET search_path TO nowhere")
        elif mysql:
            db.execute_sql("SET @tag = 1")
        else:
            db.execute_sql("CREATE TEMPORARY TABLE tag (x)")

    def look() -> Any:
        if postgres:
            return db.execute_sql("SHOW search_path").fetchone()[0]
        if mysql:
            return db.execute_sql("SELECT @tag").fetchone()[0]
        return db.execute_sql("SELECT count(*) FROM sqlite_temp_master").fetchone()[0]

    before = await db.run(look)
    await db.run(leave_a_mess)
    for _ in range(POOL):
        assert await db.run(look) == before
    assert await names(account) == []


async def test_a_half_read_query_doesnt_hold_back_the_next_user(db: Database, account: Any) -> None:
    """A cursor left open by one call shows the next one no old snapshot."""
    await account.abulk_create([account(name=str(n)) for n in range(500)])
    kept = []

    def half_read() -> None:
        rows = account.select().iterator()
        kept.append(rows)
        next(rows)

    await db.run(half_read)
    await account.acreate(name="new")
    for _ in range(POOL):
        assert await db.run(account.select().count) == 501


# Cancellation


async def test_a_cancelled_call_keeps_its_connection_until_its_thread_ends(db: Database) -> None:
    """Cancelling the task doesn't give the connection to somebody else while a thread uses it."""
    began, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        assert go_on.wait(30)

    task = asyncio.create_task(db.run(slow))
    await asyncio.to_thread(began.wait, 30)
    task.cancel()
    await asyncio.sleep(0.05)
    assert db.pool_stats.in_use == 1
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_both_kinds_of_cancellation_wait_without_spinning(db: Database, kind: str) -> None:
    """A call under a cancelled scope or task waits for its thread and uses no CPU meanwhile."""
    began = threading.Event()

    def slow() -> None:
        began.set()
        time.sleep(0.3)

    started = time.process_time()
    if kind == "anyio":
        with anyio.move_on_after(0.05) as scope:
            await db.run(slow)
        assert scope.cancelled_caught
    else:
        task = asyncio.create_task(db.run(slow))
        await asyncio.to_thread(began.wait, 30)
        for _ in range(5):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
    assert time.process_time() - started < 0.2
    assert db.pool_stats.in_use == 0


async def test_a_cancelled_transaction_is_rolled_back(db: Database, account: Any) -> None:
    """A transaction cancelled in its body leaves nothing, and its connection is clean."""
    began = asyncio.Event()

    async def transaction() -> None:
        async with db.atomic():
            await account.acreate(name="half")
            began.set()
            await asyncio.sleep(30)

    task = asyncio.create_task(transaction())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await names(account) == []


async def test_whoever_cancels_all_tasks_ends_no_block_under_its_children(db: Database) -> None:
    """A block waits for the threads of its children, whatever else is cancelled: its waiting, too,
    as the end of `asyncio.run()` does it."""
    began, go_on = threading.Event(), threading.Event()
    others = asyncio.all_tasks()
    leases: list[Lease] = []
    children: list[asyncio.Task[bool]] = []

    def child() -> bool:
        began.set()
        assert go_on.wait(30)
        return leases[0].ended

    async def transaction() -> None:
        async with db.atomic():
            lease = db._state.lease()
            assert lease is not None
            leases.append(lease)
            children.append(asyncio.create_task(db.run(child)))
            await asyncio.to_thread(began.wait, 30)

    block = asyncio.create_task(transaction())
    while not leases or not leases[0].turn.waiting:
        await asyncio.sleep(0)
    [waiting] = asyncio.all_tasks() - others - {block, *children}
    for task in (block, waiting):
        task.cancel()
    await asyncio.wait({waiting})
    while not (block.done() or leases[0].turn.waiting):
        await asyncio.sleep(0)
    go_on.set()
    assert not await children[0]
    with pytest.raises(asyncio.CancelledError):
        await block


@pytest.mark.parametrize("steps", range(12))
async def test_a_nested_block_cancelled_at_any_step_leaves_the_outer_one_whole(
    db: Database, account: Any, steps: int
) -> None:
    """Whichever step of a nested block is cancelled, the outer transaction is committed whole,
    and of the nested one all or nothing."""

    async def nested() -> None:
        async with db.transaction(), db.savepoint():
            await account.acreate(name="n1")
            await account.acreate(name="n2")

    async with db.atomic():
        await account.acreate(name="before")
        task = asyncio.create_task(nested())
        for _ in range(steps):
            await asyncio.sleep(0.001)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await account.acreate(name="after")
    stored = await names(account)
    assert stored in (["after", "before"], ["after", "before", "n1", "n2"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_random_cancellation_loses_nothing(db: Database, account: Any, seed: int) -> None:
    """A thousand calls and transactions, a third of them cancelled at random moments: no half
    transaction, no acknowledged row lost, every slot back."""
    rng = random.Random(seed)
    acknowledged: set[int] = set()

    async def work(number: int, style: int) -> None:
        a, b = {"name": f"{number}a"}, {"name": f"{number}b"}

        def both() -> None:
            with db.atomic():
                account.create(**a)
                account.create(**b)

        match style:
            case 0:
                await db.run(both)
            case 1:
                async with db.atomic():
                    await account.acreate(**a)
                    await account.acreate(**b)
            case 2:
                async with db.atomic():
                    await asyncio.gather(account.acreate(**a), account.acreate(**b))
            case _:
                async with db.atomic():
                    async with db.atomic():
                        await account.acreate(**a)
                    await db.run(account.create, **b)
        acknowledged.add(number)

    tasks: list[asyncio.Task[None]] = []
    for number in range(1000):
        tasks.append(asyncio.create_task(work(number, rng.randrange(4))))
        if rng.random() < 0.33:
            rng.choice(tasks[-40:]).cancel()
        await asyncio.sleep(rng.choice([0, 0, 0.001, 0.003]))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}
    stored = set(await names(account))
    assert len(stored) % 2 == 0
    for number in range(1000):
        assert (f"{number}a" in stored) == (f"{number}b" in stored), "half a transaction"
        if number in acknowledged:
            assert f"{number}a" in stored, "an acknowledged row is lost"
    assert len(acknowledged) > 300
    assert db.pool_stats.in_use == 0


# Reading row by row


async def test_a_loop_over_a_query_may_write(db: Database, account: Any) -> None:
    """What the body of a loop over `iterate` does is independent of the loop's connection."""
    await account.abulk_create([account(name=str(n)) for n in range(10)])
    async for row in db.iterate(account.select().order_by(account.id), buffer_size=3):
        assert db.pool_stats.in_use == 1
        row.balance = 1
        await row.asave()
    assert db.pool_stats.in_use == 0
    assert await db.scalar(account.select(peewee.fn.SUM(account.balance))) == 10


async def test_a_loop_inside_a_transaction_is_part_of_it(db: Database, account: Any) -> None:
    """Inside a block, `iterate` reads what the block has written, and the body may write on."""
    async with db.atomic():
        await account.abulk_create([account(name=str(n)) for n in range(10)])
        async for row in db.iterate(account.select().order_by(account.id), buffer_size=3):
            await account.update(balance=1).where(account.id == row.id).aexecute()
        assert db.pool_stats.in_use == 1
    assert await db.scalar(account.select(peewee.fn.SUM(account.balance))) == 10


async def test_a_loop_left_early_leaves_nothing_behind(db: Database, account: Any) -> None:
    """A loop left with `aclosing` gives its connection back; the context is as before."""
    await account.abulk_create([account(name=str(n)) for n in range(10)])
    async with aclosing(db.iterate(account.select(), buffer_size=3)) as rows:
        async for _ in rows:
            break
    assert db.pool_stats.in_use == 0
    assert await db.count(account.select()) == 10


async def test_a_generator_that_another_task_closes_ends_no_block_of_that(
    db: Database, account: Any
) -> None:
    """Its own block ends; the block of the task that closes it stays in force there."""

    async def rows() -> AsyncIterator[int]:
        async with db.connection_context():
            yield 1

    async def begin() -> None:
        await anext(generator)

    generator: Any = rows()
    await asyncio.create_task(begin())
    with suppress(ZeroDivisionError):
        async with db.atomic():
            await generator.aclose()
            await account.acreate(name="rolled back")
            raise ZeroDivisionError
    assert await names(account) == []


async def test_a_block_ends_with_a_generator_that_was_begun_in_it(
    db: Database, account: Any
) -> None:
    """A generator's block, whoever closes it, is in force no longer than the one around it."""

    async def rows() -> AsyncIterator[int]:
        async with db.connection_context():
            yield 1

    generator: Any = rows()
    async with db.atomic():
        await anext(generator)
        closing = asyncio.create_task(generator.aclose())
    await closing
    assert await names(account) == []
