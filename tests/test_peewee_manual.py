"""Peewee's transactions without a block, and with an isolation level, as it documents them."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import peewee
import pytest

from fastapi_peewee import Database
from tests import modes
from tests.apps import until
from tests.modes import Mode, Oops, Seen, User, in_each_mode, on, oops_gets_out

connected, db, mode, observer, seen = modes.fixtures


@in_each_mode
def test_manual_commit_leaves_transactions_to_the_caller(mode: Mode, seen: Seen) -> None:
    """Inside `manual_commit`, `begin`, `commit` and `rollback` are the caller's to call."""
    db = mode.db
    with db.connection_context(), db.manual_commit():
        User.create(name="ann")
        assert seen() == ["ann"]
        db.begin()
        User.create(name="bob")
        assert seen() == ["ann"]
        db.rollback()
        db.begin()
        User.create(name="cid")
        db.commit()
        assert seen() == ["ann", "cid"]


@in_each_mode
def test_manual_commit_decorates(mode: Mode, seen: Seen) -> None:
    """`manual_commit` is a decorator, too."""

    def create_user(name: str) -> None:
        mode.db.begin()
        User.create(name=name)
        mode.db.commit()

    create = mode.db.manual_commit()(create_user)

    with mode.db.connection_context():
        create("ann")
        create("bob")
    assert seen() == ["ann", "bob"]


@in_each_mode
def test_manual_commit_and_atomic_exclude_each_other(mode: Mode, seen: Seen) -> None:
    """`atomic` is refused inside `manual_commit`, and `manual_commit` inside `atomic`."""
    db = mode.db
    with db.manual_commit(), pytest.raises(ValueError, match="manual"), db.atomic():
        pass
    with db.atomic():
        User.create(name="ann")
        with pytest.raises(ValueError, match="active"), db.manual_commit():
            pass
    assert seen() == ["ann"]


async def test_manual_commit_holds_the_turn(db: Database, seen: Seen) -> None:
    """While a thread is in `manual_commit`, others that share its connection wait."""
    calls: list[str] = []

    def transfer() -> None:
        with db.manual_commit():
            db.begin()
            User.create(name="ann")
            lease = db._state.lease()
            assert lease is not None
            entered.set()
            until(lambda: lease.turn.waiting == 2)
            calls.append("transfer")
            db.commit()

    def query() -> None:
        assert entered.wait(10)
        calls.append(User.get().name)

    def other() -> None:
        assert entered.wait(10)
        with db.manual_commit():
            db.begin()
            User.create(name="bob")
            db.commit()
        calls.append("other")

    entered = threading.Event()
    async with db.connection_context():
        await asyncio.gather(*(asyncio.to_thread(fn) for fn in (transfer, query, other)))
    assert calls[0] == "transfer"
    assert sorted(calls[1:]) == ["ann", "other"]
    assert seen() == ["ann", "bob"]


async def test_manual_commit_on_an_event_loop(db: Database, seen: Seen) -> None:
    """`async with` enters it, too; what is left open at its end is rolled back."""
    async with db.manual_commit():
        for name, end in (("ann", db.commit), ("bob", db.rollback), ("cid", lambda: None)):
            await db.run(db.begin)
            await User.acreate(name=name)
            await db.run(end)
    assert seen() == ["ann"]


# session_start() and its ends


@in_each_mode
async def test_a_session_commits(mode: Mode, seen: Seen) -> None:
    """`session_start` begins a transaction without a block, and `session_commit` commits it."""
    async with mode.block(mode.db.connection_context()):
        await mode.do(mode.db.session_start)
        await mode.do(User.create, name="ann")
        assert mode.db.in_transaction()
        assert seen() == []
        assert await mode.do(mode.db.session_commit) is True
        assert not mode.db.in_transaction()
        assert seen() == ["ann"]


@in_each_mode
async def test_a_session_rolls_back(mode: Mode, seen: Seen) -> None:
    """`session_rollback` rolls back what was done since `session_start`."""
    async with mode.block(mode.db.connection_context()):
        await mode.do(mode.db.session_start)
        await mode.do(User.create, name="ann")
        assert await mode.do(mode.db.session_rollback) is True
        assert not mode.db.in_transaction()
        await mode.do(User.create, name="bob")
        assert seen() == ["bob"]


@in_each_mode
async def test_there_may_be_no_session_to_end(mode: Mode) -> None:
    """Without a session, `session_commit` and `session_rollback` say so: False."""
    assert await mode.do(mode.db.session_commit) is False
    assert await mode.do(mode.db.session_rollback) is False


# batch_commit()


@in_each_mode
def test_batch_commit_commits_every_n_items(mode: Mode, seen: Seen) -> None:
    """`batch_commit(items, n)` yields the items, n in a transaction; the last may have fewer."""
    committed = []
    for name in mode.db.batch_commit("abcdefg", 3):
        assert mode.db.in_transaction()
        User.create(name=name)
        committed.append(len(seen()))

    assert committed == [0, 0, 0, 3, 3, 3, 6]
    assert seen() == list("abcdefg")
    assert not mode.db.in_transaction()


@in_each_mode
def test_a_batch_that_is_left_is_rolled_back(mode: Mode, seen: Seen) -> None:
    """Leaving a `batch_commit` early keeps the batches before, and loses the one begun."""
    with oops_gets_out(), closing(mode.db.batch_commit("abcdefg", 3)) as batches:
        for name in batches:
            User.create(name=name)
            if name == "e":
                raise Oops

    assert seen() == list("abc")
    assert not mode.db.in_transaction()


# Isolation


@on("sqlite")
@in_each_mode
async def test_sqlite_lock_types(mode: Mode, seen: Seen, observer: Any) -> None:
    """On SQLite, `atomic` and `transaction` take a lock type: who may write meanwhile?"""
    observer.timeout = 0

    def write(name: str) -> None:
        with observer.bind_ctx([User]):
            User.insert(name=name).execute()

    for begin in (mode.db.atomic, mode.db.transaction):
        for lock_type in ("IMMEDIATE", "EXCLUSIVE"):
            async with mode.block(begin(lock_type)):
                with pytest.raises(peewee.OperationalError, match="locked"):
                    write("bob")
        async with mode.block(begin(lock_type="DEFERRED")):
            write(begin.__name__)
    assert seen() == ["atomic", "transaction"]


@on("postgres", "mysql")
@in_each_mode
async def test_isolation_levels(mode: Mode, observer: Any) -> None:
    """On PostgreSQL and MySQL, `atomic` and `transaction` take an isolation level."""
    names = iter("abcdefgh")

    async def sees_commits_of_others(block: Any) -> bool:
        async with mode.block(block):
            before = await mode.do(lambda: User.select().count())
            observer.execute(User.insert(name=next(names)))
            after = await mode.do(lambda: User.select().count())
            return bool(after == before + 1)

    for begin in (mode.db.atomic, mode.db.transaction):
        assert await sees_commits_of_others(begin("READ COMMITTED"))
        assert await sees_commits_of_others(begin(isolation_level="READ COMMITTED"))
        assert not await sees_commits_of_others(begin("REPEATABLE READ"))
        assert not await sees_commits_of_others(begin(isolation_level="REPEATABLE READ"))


@on("postgres", "mysql")
@in_each_mode
async def test_the_isolation_level_is_for_one_transaction(mode: Mode, observer: Any) -> None:
    """The transaction after one with an isolation level has the database's own again."""
    repeatable = isinstance(mode.db, peewee.MySQLDatabase)  # is what it does by default

    async with mode.block(mode.db.connection_context()):
        async with mode.block(mode.db.atomic("SERIALIZABLE")):
            await mode.do(lambda: User.select().count())
        async with mode.block(mode.db.atomic()):
            assert await mode.do(lambda: User.select().count()) == 0
            observer.execute(User.insert(name="ann"))
            assert await mode.do(lambda: User.select().count()) == (0 if repeatable else 1)


@on("postgres")
async def test_the_isolation_level_of_a_database(connected: Callable[..., Database]) -> None:
    """On PostgreSQL, `isolation_level` may be set for all transactions of a database."""
    db = connected(isolation_level="SERIALIZABLE")

    def level() -> Any:
        with db.atomic():
            return db.execute_sql("SHOW transaction_isolation").fetchone()[0]

    with db.allow_sync():
        assert level() == "serializable"
    await db.aexecute_sql("SET statement_timeout = 1000")  # the session is reset after this
    assert await db.run(level) == "serializable"
    async with db.atomic("READ COMMITTED"):
        assert await db.run(level) == "read committed"


@in_each_mode
async def test_a_nested_block_takes_no_isolation_level(mode: Mode, seen: Seen) -> None:
    """The isolation level is the outermost block's; a nested `atomic` is a savepoint anyway."""
    level = "EXCLUSIVE" if isinstance(mode.db, peewee.SqliteDatabase) else "SERIALIZABLE"
    async with mode.block(mode.db.atomic(level)):
        async with mode.block(mode.db.atomic(level)) as savepoint:
            await mode.do(User.create, name="ann")
            await mode.do(savepoint.rollback)
        await mode.do(User.create, name="bob")

    assert seen() == ["bob"]
