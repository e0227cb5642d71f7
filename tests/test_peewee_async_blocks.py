"""What Peewee documents of streams, transactions and connections in `async def`."""

import asyncio
import contextvars
from collections.abc import Callable
from contextlib import aclosing

import peewee
import pytest
from playhouse.test_utils import assert_query_count

from fastapi_peewee import Database, PoolTimeout, connect
from tests import modes
from tests.modes import (
    Oops,
    Seen,
    User,
    connections_become,
    oops_gets_out,
)

connected, db, mode, observer, seen = modes.fixtures


# iterate()


@pytest.fixture
async def hundred(db: Database) -> list[str]:
    names = [f"{number:03}" for number in range(100)]
    await db.aexecute(User.insert_many([(name,) for name in names], fields=[User.name]))
    return names


async def test_iterate(hundred: list[str], db: Database) -> None:
    """`iterate` yields the rows of a select, in any row type, and then lets its connection go."""
    query = User.select().order_by(User.name)
    assert [user.name async for user in db.iterate(query)] == hundred
    assert [row async for row in db.iterate(query.select(User.name).tuples())] == [
        (name,) for name in hundred
    ]
    assert [user async for user in db.iterate(query.where(User.name == "x"))] == []
    assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("buffer_size", [1, 7, 100, 1000])
async def test_iterate_buffer_size(hundred: list[str], db: Database, buffer_size: int) -> None:
    """`buffer_size` is how many rows `iterate` reads at a time; the rows are the same."""
    rows = db.iterate(User.select().order_by(User.name), buffer_size=buffer_size)
    assert [user.name async for user in rows] == hundred


async def test_iterate_reads_as_it_goes(hundred: list[str], db: Database) -> None:
    """`iterate` makes one statement, and doesn't keep what it has yielded."""
    query = User.select().order_by(User.name)
    with assert_query_count(1):
        async with aclosing(db.iterate(query, buffer_size=10)) as rows:
            assert (await anext(rows)).name == "000"
    assert query._cursor_wrapper is None or not query._cursor_wrapper.row_cache


async def test_iterate_left_early(hundred: list[str], db: Database) -> None:
    """After a partial iteration, `aclose` of the generator gives the connection back at once."""
    rows = db.iterate(User.select())
    async for _ in rows:
        break
    assert db.pool_stats.in_use == 1
    await rows.aclose()
    assert db.pool_stats.in_use == 0
    assert await db.count(User.select()) == 100


async def test_an_exception_leaves_iterate(hundred: list[str], db: Database) -> None:
    """An exception in the loop goes on its way; the connection is given back."""
    with oops_gets_out():
        async with aclosing(db.iterate(User.select())) as rows:
            async for _ in rows:
                raise Oops
    assert db.pool_stats.in_use == 0
    assert await db.count(User.select()) == 100


async def test_others_may_write_during_iterate(hundred: list[str], db: Database) -> None:
    """While a task iterates, others write; the rows that it gets are those of its beginning."""
    outside = contextvars.copy_context()

    async def rename() -> None:
        await User.update(name=User.name.concat("!")).aexecute()

    rows = db.iterate(User.select().order_by(User.name), buffer_size=10)
    names = [(await anext(rows)).name]
    async with asyncio.timeout(3):
        await asyncio.create_task(rename(), context=outside)
    names += [user.name async for user in rows]

    assert names == hundred
    assert await db.count(User.select().where(User.name.endswith("!"))) == 100


async def test_the_body_of_iterate_may_write(hundred: list[str], db: Database) -> None:
    """While it iterates, a task may write through the pool's other connections."""
    async for user in db.iterate(User.select().order_by(User.name), buffer_size=10):
        user.name += "!"
        await user.asave()
    assert await db.count(User.select().where(User.name.endswith("!"))) == 100


async def test_iterate_inside_a_block(hundred: list[str], db: Database, seen: Seen) -> None:
    """Inside a block, `iterate` sees the block's changes, and its body may make more of them."""
    with oops_gets_out():
        async with db.atomic():
            await User.acreate(name="new")
            names = []
            async for user in db.iterate(User.select().order_by(User.name), buffer_size=10):
                names.append(user.name)
                user.name += "!"
                await user.asave()
            assert names == [*hundred, "new"]
            raise Oops
    assert seen() == hundred


async def test_two_iterations_at_a_time(hundred: list[str], db: Database) -> None:
    """A task that iterates over a second query inside the first gets its rows, or an error."""

    async def both() -> list[tuple[str, str]]:
        query = User.select().order_by(User.name)
        return [
            (outer.name, inner.name)
            async for outer in db.iterate(query.limit(3), buffer_size=1)
            async for inner in db.iterate(query.limit(2), buffer_size=1)
        ]

    async with asyncio.timeout(30):
        pairs = await both()
    assert pairs == [(outer, inner) for outer in hundred[:3] for inner in hundred[:2]]
    assert db.pool_stats.in_use == 0


# Transactions


async def test_async_transactions(db: Database, seen: Seen) -> None:
    """`async with db.atomic()` nests; `arollback` of the inner block undoes what it did."""
    async with db.atomic():
        await db.run(User.create, name="alice")
        await User.acreate(name="bob")
        async with db.atomic() as nested:
            await db.aexecute(User.delete().where(User.name == "bob"))
            await nested.arollback()
    assert seen() == ["alice", "bob"]


@pytest.mark.parametrize("block", ["atomic", "transaction"])
async def test_acommit_and_arollback(db: Database, seen: Seen, block: str) -> None:
    """`acommit` and `arollback` end a transaction, and a new one begins."""
    async with getattr(db, block)() as txn:
        await User.acreate(name="ann")
        await txn.acommit()
        assert seen() == ["ann"]
        await User.acreate(name="bob")
        await txn.arollback()
        assert db.in_transaction()
        await User.acreate(name="cid")
        assert seen() == ["ann"]
    assert seen() == ["ann", "cid"]


async def test_acommit_and_arollback_of_a_savepoint(db: Database, seen: Seen) -> None:
    """`acommit` keeps what a savepoint did, `arollback` undoes it, and a new one begins."""
    async with db.transaction(), db.savepoint() as savepoint:
        await User.acreate(name="ann")
        await savepoint.acommit()
        await User.acreate(name="bob")
        await savepoint.arollback()
        await User.acreate(name="cid")
    assert seen() == ["ann", "cid"]


async def test_a_transaction_of_run_inside_a_block(db: Database, seen: Seen) -> None:
    """`with db.atomic()` in a function given to `run` is a savepoint of the block around it."""

    def nested() -> None:
        with oops_gets_out(), db.atomic():
            User.create(name="bob")
            raise Oops

    async with db.atomic():
        await User.acreate(name="ann")
        await db.run(nested)
        assert seen() == []
    assert seen() == ["ann"]


# Connections


async def test_async_with_db(db: Database, seen: Seen) -> None:
    """`async with db` holds one connection for its block, without a transaction."""
    async with db as entered:
        assert entered is db
        connection = await db.run(db.connection)
        assert not db.is_closed()
        assert not db.in_transaction()
        await User.acreate(name="ann")
        assert seen() == ["ann"]
        assert await db.run(db.connection) is connection
        assert db.pool_stats.in_use == 1
    assert db.is_closed()
    assert db.pool_stats.in_use == 0


async def test_async_with_db_lets_exceptions_through(db: Database, seen: Seen) -> None:
    """An exception that leaves `async with db` goes on its way; the connection is given back."""
    with oops_gets_out():
        async with db:
            await User.acreate(name="ann")
            raise Oops
    assert db.pool_stats.in_use == 0
    assert seen() == ["ann"]


async def test_async_with_db_nests(db: Database) -> None:
    """A nested `async with db` uses the connection of the outer one, and leaves it open."""
    async with db:
        connection = await db.run(db.connection)
        async with db, db.atomic():
            assert await db.run(db.connection) is connection
        assert await db.run(db.connection) is connection


async def test_aconnect_and_aclose(db: Database, seen: Seen) -> None:
    """`aconnect` holds a connection for the task until `aclose`, which gives it back."""
    await db.aconnect()
    assert not db.is_closed()
    assert db.pool_stats.in_use == 1
    connection = await db.run(db.connection)
    await User.acreate(name="ann")
    assert await db.run(db.connection) is connection
    await db.aclose()
    assert db.is_closed()
    assert db.pool_stats.in_use == 0
    assert seen() == ["ann"]


async def test_aconnect_and_aclose_may_be_called_twice(db: Database) -> None:
    """The second time there is nothing to do."""
    for _ in range(2):
        await db.aconnect()
        assert db.pool_stats.in_use == 1
    for _ in range(2):
        await db.aclose()
        assert db.pool_stats.in_use == 0


async def test_aclose_is_refused_inside_a_transaction(db: Database, seen: Seen) -> None:
    """`aclose` raises `OperationalError` inside a transaction, which goes on unharmed."""
    await db.aconnect()
    async with db.atomic():
        await User.acreate(name="ann")
        with pytest.raises(peewee.OperationalError, match="transaction is open"):
            await db.aclose()
    await db.aclose()
    assert seen() == ["ann"]


async def test_aclose_leaves_a_block_its_connection(db: Database) -> None:
    """`aclose` gives back what `aconnect` took, not what a block around it holds."""
    for block in (db, db.connection_context()):
        async with block:
            before = await db.run(db.connection)
            await db.aclose()
            assert db.pool_stats.in_use == 1
            assert await db.run(db.connection) is before
        assert db.pool_stats.in_use == 0


async def test_close_pool(db: Database, database_url: str) -> None:
    """`close_pool` closes all connections, those too whose task is gone."""
    await db.count(User.select())
    await asyncio.create_task(db.aconnect())  # and nobody will call `aclose`
    await db.close_pool()
    assert await asyncio.to_thread(connections_become, database_url, 0)
    assert await db.count(User.select()) == 0


async def test_a_pool_of_one(connected: Callable[..., Database]) -> None:
    """`pool_size` is how many connections there are; waiting for one has an end."""
    db = connected(pool_size=1, timeout=0.01)
    outside = contextvars.copy_context()
    async with db:
        with pytest.raises(PoolTimeout):
            await asyncio.create_task(db.count(User.select()), context=outside)
    assert await db.count(User.select()) == 0


async def test_memory_is_one_database() -> None:
    """All connections to ":memory:" see one database."""
    db = connect("sqlite:///:memory:")

    class Person(db.Model):
        name = peewee.CharField()

    await db.acreate_tables([Person])
    inside = asyncio.Barrier(3)

    async def count() -> int:
        async with db:
            await inside.wait()
            return await db.count(Person.select())

    await Person.acreate(name="ann")
    assert await asyncio.gather(*(count() for _ in range(3))) == [1, 1, 1]
    await db.close_pool()
