"""What Peewee documents of connections and of pools holds for databases of `connect()`."""

import asyncio
import contextvars
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peewee
import psycopg
import pymysql
import pytest

from fastapi_peewee import Database, PoolTimeout, connect
from tests import modes
from tests.modes import (
    Mode,
    Oops,
    Seen,
    User,
    connections_become,
    in_each_mode,
    oops_gets_out,
)

connected, db, mode, observer, seen = modes.fixtures


# connect() and close()


def test_connect_opens_and_close_closes(db: Database, database_url: str) -> None:
    """`connect` opens a connection, `close` closes it, and each says that it did."""
    assert db.is_closed()
    assert db.connect() is True
    assert not db.is_closed()
    assert connections_become(database_url, 1)
    assert db.close() is True
    assert db.is_closed()
    assert connections_become(database_url, 0)


def test_connecting_twice_is_an_error(db: Database) -> None:
    """`connect` raises `OperationalError` if a connection is open, unless it may be reused."""
    db.connect()
    with pytest.raises(peewee.OperationalError, match="already"):
        db.connect()
    assert db.connect(reuse_if_open=True) is False
    assert not db.is_closed()
    db.close()
    assert db.connect(reuse_if_open=True) is True


def test_closing_twice_is_no_error(db: Database) -> None:
    """`close` without an open connection returns False."""
    db.connect()
    assert db.close() is True
    assert db.close() is False


def test_a_database_that_was_closed_opens_again(db: Database, seen: Seen) -> None:
    """After `close`, `connect` opens a new connection, which works like the first."""
    db.connect()
    first = db.connection()
    db.close()
    db.connect()
    assert db.connection() is not first
    User.create(name="ann")
    assert seen() == ["ann"]


def test_close_is_refused_inside_a_transaction(db: Database, seen: Seen) -> None:
    """`close` raises `OperationalError` inside a transaction, which goes on unharmed."""
    with db.atomic():
        User.create(name="ann")
        with pytest.raises(peewee.OperationalError, match="transaction is open"):
            db.close()
        User.create(name="bob")
    assert seen() == ["ann", "bob"]


async def test_under_run_the_connection_is_there(db: Database) -> None:
    """Code called with `db.run` finds a connection open, and `close` leaves it open."""

    def code() -> None:
        connection = db.connection()
        assert not db.is_closed()
        with pytest.raises(peewee.OperationalError, match="already"):
            db.connect()
        assert db.connect(reuse_if_open=True) is False
        assert db.close() is False
        assert not db.is_closed()
        assert db.connection() is connection

    await db.run(code)


@in_each_mode
async def test_autoconnect(mode: Mode) -> None:
    """A query opens a connection if none is open."""
    assert await mode.do(User.select().count) == 0


def test_without_autoconnect_a_query_needs_a_connection(
    connected: Callable[..., Database],
) -> None:
    """With `autoconnect=False`, a query without an open connection raises `InterfaceError`."""
    db = connected(autoconnect=False)

    with pytest.raises(peewee.InterfaceError):
        User.select().count()
    db.connect()
    assert User.select().count() == 0
    db.close()
    with db.connection_context():
        assert User.select().count() == 0
    with pytest.raises(peewee.InterfaceError):
        User.select().count()


async def test_run_connects_without_autoconnect(connected: Callable[..., Database]) -> None:
    """`db.run` and the async methods bring their connection, `autoconnect` or not."""
    db = connected(autoconnect=False)

    await User.acreate(name="ann")
    async with db.atomic():
        assert await db.run(User.select().count) == 1


@in_each_mode
async def test_connection_is_the_drivers(mode: Mode) -> None:
    """`connection` returns the driver's connection, opening it if need be."""
    driver: dict[type, type] = {
        peewee.SqliteDatabase: sqlite3.Connection,
        peewee.PostgresqlDatabase: psycopg.Connection,
        peewee.MySQLDatabase: pymysql.connections.Connection,
    }
    (expected,) = (driver[kind] for kind in driver if isinstance(mode.db, kind))
    assert isinstance(await mode.do(mode.db.connection), expected)


# with db, connection_context()


@in_each_mode
def test_with_db_is_a_connection_and_a_transaction(mode: Mode, seen: Seen) -> None:
    """`with db:` holds a connection and runs a transaction, which it commits in the end."""
    was_closed = mode.db.is_closed()
    with mode.db as entered:
        assert entered is mode.db
        assert not mode.db.is_closed()
        assert mode.db.in_transaction()
        User.create(name="ann")
        assert seen() == []
    assert seen() == ["ann"]
    assert not mode.db.in_transaction()
    assert mode.db.is_closed() is was_closed


@in_each_mode
def test_with_db_rolls_back_on_an_exception(mode: Mode, seen: Seen) -> None:
    """An exception that leaves `with db:` rolls back, closes, and goes on its way."""
    was_closed = mode.db.is_closed()
    with oops_gets_out(), mode.db:
        User.create(name="ann")
        raise Oops
    assert seen() == []
    assert not mode.db.in_transaction()
    assert mode.db.is_closed() is was_closed


def test_with_db_where_no_connection_is_to_be_had(tmp_path: Path) -> None:
    """The error of a `with db:` that can't connect is raised, and the next one tries anew."""
    folder = tmp_path / "later"
    db = connect(f"sqlite:///{folder}/test.db")
    with pytest.raises(peewee.OperationalError), db:
        raise AssertionError("it was entered")
    folder.mkdir()
    with db:
        assert db.in_transaction()
    assert db.is_closed()


@in_each_mode
def test_with_db_nests(mode: Mode, seen: Seen) -> None:
    """A nested `with db:` is a savepoint, and only the outermost closes the connection."""
    with mode.db:
        connection = mode.db.connection()
        with oops_gets_out(), mode.db:
            User.create(name="ann")
            raise Oops
        assert mode.db.connection() is connection
        User.create(name="bob")
        assert seen() == []
    assert seen() == ["bob"]


@in_each_mode
async def test_connection_context_holds_a_connection(mode: Mode, seen: Seen) -> None:
    """`connection_context` holds one connection for its whole block, without a transaction."""
    db = mode.db
    was_closed = db.is_closed()
    async with mode.block(db.connection_context()):
        connection = await mode.do(db.connection)
        assert not db.is_closed()
        assert not db.in_transaction()
        await mode.do(User.create, name="ann")
        assert seen() == ["ann"]
        async with mode.block(db.atomic()):
            assert await mode.do(db.connection) is connection
        assert await mode.do(db.connection) is connection
    assert db.is_closed() is was_closed


@in_each_mode
async def test_connection_context_closes_on_an_exception(mode: Mode, seen: Seen) -> None:
    """An exception that leaves `connection_context` closes the connection; work done stays."""
    was_closed = mode.db.is_closed()
    with oops_gets_out():
        async with mode.block(mode.db.connection_context()):
            await mode.do(User.create, name="ann")
            raise Oops
    assert mode.db.is_closed() is was_closed
    assert seen() == ["ann"]


@in_each_mode
async def test_connection_contexts_nest(mode: Mode) -> None:
    """Of nested `connection_context` blocks the outermost closes the connection."""
    db = mode.db
    async with mode.block(db.connection_context()):
        connection = await mode.do(db.connection)
        async with mode.block(db.connection_context()):
            assert await mode.do(db.connection) is connection
        assert not db.is_closed()
        assert await mode.do(db.connection) is connection


@in_each_mode
async def test_connection_context_decorates(mode: Mode) -> None:
    """A function decorated with `connection_context` has a connection, and no transaction."""

    def count() -> int:
        assert not mode.db.is_closed()
        assert not mode.db.in_transaction()
        return User.select().count()

    was_closed = mode.db.is_closed()
    decorated = mode.decorated(mode.db.connection_context(), count)
    assert [await decorated(), await decorated()] == [0, 0]
    assert mode.db.is_closed() is was_closed


# Threads and tasks


def test_each_thread_has_its_own_connection(db: Database, database_url: str) -> None:
    """Threads have a connection each; what one does to its own, the others don't notice."""
    together = threading.Barrier(3, timeout=30)

    def job(number: int) -> Any:
        db.connect()
        connection = db.connection()
        together.wait()
        if number == 0:
            db.close()
        together.wait()
        assert db.is_closed() is (number == 0)
        assert User.select().count() == 0
        assert number == 0 or db.connection() is connection
        db.close()
        return connection

    with ThreadPoolExecutor(3) as pool:
        assert len(set(map(id, pool.map(job, range(3))))) == 3
    assert db.is_closed()
    assert connections_become(database_url, 0)


async def test_each_task_has_its_own_connection(db: Database) -> None:
    """Tasks have a connection and transactions of their own."""
    inside = asyncio.Barrier(3)

    async def task() -> Any:
        async with db.connection_context():
            await inside.wait()
            assert not db.in_transaction()
            connection = await db.run(db.connection)
            assert await db.run(db.connection) is connection
            return connection

    async with asyncio.timeout(30):
        assert len(set(map(id, await asyncio.gather(*(task() for _ in range(3)))))) == 3


# Pools


async def test_the_pool_lends_a_connection_again(db: Database) -> None:
    """A connection that was given back is lent again: no new one is opened."""

    def connection() -> Any:
        return db.execute_sql("SELECT 1").connection

    first = await db.run(connection)
    async with db.atomic():
        pass
    await User.acreate(name="ann")

    assert await db.run(connection) is first
    assert db.pool_stats.opened == 1


async def test_the_pool_has_at_most_so_many_connections(
    connected: Callable[..., Database],
) -> None:
    """No more than `pool_size` connections are lent at a time; the other callers wait."""
    db = connected(pool_size=2)
    busy: list[int] = []
    most = 0

    def job(number: int) -> int:
        nonlocal most
        busy.append(number)
        most = max(most, len(busy))
        count = User.select().count()
        busy.remove(number)
        return count

    assert await asyncio.gather(*(db.run(job, n) for n in range(20))) == [0] * 20
    assert most <= 2
    assert db.pool_stats.opened <= 2


async def test_an_exhausted_pool_raises_in_time(connected: Callable[..., Database]) -> None:
    """Who gets no connection within `timeout` seconds gets `PoolTimeout`, an `OperationalError`."""
    db = connected(pool_size=1, timeout=0.01)
    outside = contextvars.copy_context()

    async with db.atomic():
        task = asyncio.create_task(db.count(User.select()), context=outside)
        with pytest.raises(PoolTimeout) as raised:
            await task
    assert isinstance(raised.value, peewee.OperationalError)
    assert await db.count(User.select()) == 0


async def test_old_connections_are_replaced(connected: Callable[..., Database]) -> None:
    """A connection older than `max_lifetime` is not lent again."""
    db = connected(max_lifetime=0)

    assert [await db.count(User.select()) for _ in range(3)] == [0, 0, 0]
    assert (db.pool_stats.opened, db.pool_stats.idle) == (3, 0)


async def test_the_pool_takes_no_open_transaction_back(db: Database, seen: Seen) -> None:
    """A transaction that was left open is rolled back before the connection is lent again."""

    def forget_to_commit() -> None:
        db.session_start()
        User.create(name="ann")

    await db.run(forget_to_commit)

    assert seen() == []
    assert await db.run(db.in_transaction) is False
    await User.acreate(name="bob")
    assert seen() == ["bob"]


async def test_close_pool_closes_every_connection(db: Database, database_url: str) -> None:
    """`close_pool` closes all connections; the next query opens the pool again."""
    inside = asyncio.Barrier(3)

    async def task() -> None:
        async with db.connection_context():
            await inside.wait()

    await asyncio.gather(*(task() for _ in range(3)))
    assert db.pool_stats.idle == 3
    assert await db.close_pool()
    assert db.pool_stats.idle == 0
    assert await asyncio.to_thread(connections_become, database_url, 0)
    assert await db.count(User.select()) == 0
