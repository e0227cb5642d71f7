"""What Peewee documents of transactions and savepoints holds for databases of `connect()`."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peewee
import pytest

from fastapi_peewee import Database
from tests import modes
from tests.modes import Mode, Note, Oops, Seen, Test, User, in_each_mode, oops_gets_out

connected, db, mode, observer, seen = modes.fixtures


@in_each_mode
async def test_outside_of_a_transaction_each_statement_is_its_own(mode: Mode, seen: Seen) -> None:
    """A statement outside of a transaction is committed at once."""
    await mode.do(User.create, name="ann")

    assert seen() == ["ann"]
    assert not mode.db.in_transaction()


# atomic()


@in_each_mode
async def test_atomic_commits_when_its_block_ends(mode: Mode, seen: Seen) -> None:
    """The statements of an `atomic` block are committed, all of them, when it ends normally."""
    async with mode.block(mode.db.atomic()):
        ann = await mode.do(User.create, name="ann")
        await mode.do(Note.create, user=ann)
        assert seen() == []

    assert seen() == ["ann"]
    assert await mode.do(lambda: Note.get().user_id) == ann.id


@in_each_mode
async def test_atomic_rolls_back_and_lets_the_exception_through(mode: Mode, seen: Seen) -> None:
    """An exception that leaves an `atomic` block rolls it back and goes on its way."""
    error = Oops()

    with oops_gets_out() as raised:
        async with mode.block(mode.db.atomic()):
            await mode.do(User.create, name="ann")
            raise error

    assert raised.value is error
    assert seen() == []
    await mode.do(User.create, name="bob")
    assert seen() == ["bob"]


@in_each_mode
async def test_atomic_reports_a_taken_name_as_integrity_error(mode: Mode, seen: Seen) -> None:
    """`with db.atomic(): User.create(…)` inside `try` tells whether the name was free."""
    async with mode.block(mode.db.atomic()):
        await mode.do(User.create, name="ann")
        with pytest.raises(peewee.IntegrityError):
            async with mode.block(mode.db.atomic()):
                await mode.do(User.create, name="ann")
        await mode.do(User.create, name="bob")

    assert seen() == ["ann", "bob"]


@in_each_mode
async def test_atomic_decorates(mode: Mode, seen: Seen) -> None:
    """A function decorated with `atomic` runs in a transaction, anew for each call."""

    def create_user_with_note(name: str) -> Any:
        """Create both."""
        user = User.create(name=name)
        assert seen() == before
        Note.create(user=user)
        return user

    create = mode.decorated(mode.db.atomic(), create_user_with_note)

    before: list[str] = []
    assert (await create("ann")).name == "ann"
    before = ["ann"]
    assert (await create(name="bob")).name == "bob"
    assert seen() == ["ann", "bob"]


@in_each_mode
async def test_an_exception_rolls_a_decorated_function_back(mode: Mode, seen: Seen) -> None:
    """An exception rolls back what a function decorated with `atomic` did, and goes on its way."""

    def create_twice(name: str) -> None:
        User.create(name=name)
        User.create(name=name)

    create = mode.decorated(mode.db.atomic(), create_twice)

    with pytest.raises(peewee.IntegrityError):
        await create("ann")
    assert seen() == []


@in_each_mode
async def test_a_decorated_function_is_a_savepoint_in_a_block(mode: Mode, seen: Seen) -> None:
    """A function decorated with `atomic` and called in such a block is a savepoint of it."""

    def create(name: str) -> int:
        User.create(name=name)
        if name == "bob":
            raise Oops
        return mode.db.transaction_depth()

    decorated = mode.decorated(mode.db.atomic(), create)

    assert await decorated("ann") == 1
    async with mode.block(mode.db.atomic()):
        assert await decorated("cid") == 1  # Peewee counts transactions, not savepoints
        with oops_gets_out():
            await decorated("bob")
        assert seen() == ["ann"]
    assert seen() == ["ann", "cid"]


def test_a_decorated_function_keeps_its_name_and_documentation(db: Database) -> None:
    """Decorated functions, `def` and `async def`, look like themselves."""

    def synchronous() -> None:
        """Words."""

    async def asynchronous() -> None:
        """More words."""

    for block in (db.atomic(), db.transaction(), db.savepoint(), db.connection_context()):
        for fn in (synchronous, asynchronous):
            decorated = block(fn)
            assert (decorated.__name__, decorated.__doc__) == (fn.__name__, fn.__doc__)


def concurrent(db: Database) -> Callable[[Test], Test]:
    """A transaction that doesn't exclude others."""
    return db.atomic("DEFERRED") if isinstance(db, peewee.SqliteDatabase) else db.atomic()


def test_a_decorated_function_is_safe_in_many_threads(db: Database, seen: Seen) -> None:
    """Threads that call one decorated function at a time get a transaction each."""
    together = threading.Barrier(4, timeout=30)

    @concurrent(db)
    def count(name: str) -> int:
        together.wait()  # all four are inside
        return User.select().where(User.name == name).count() + db.transaction_depth()

    def job(name: str) -> int:
        with db.connection_context():
            User.create(name=name)
            return int(count(name))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(job, "abcd")) == [2] * 4


async def test_a_decorated_coroutine_function_is_safe_in_many_tasks(db: Database) -> None:
    """Tasks that call one decorated `async def` at a time get a transaction each."""
    inside = asyncio.Barrier(4)

    @concurrent(db)
    async def depth() -> tuple[int, int]:
        await inside.wait()
        return db.transaction_depth(), await db.run(lambda: id(db.connection()))

    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(depth() for _ in range(4)))
    assert [depth for depth, _ in answers] == [1] * 4
    assert len({connection for _, connection in answers}) == 4


# Explicit commit and rollback


@in_each_mode
async def test_a_new_transaction_begins_after_an_explicit_rollback(mode: Mode, seen: Seen) -> None:
    """`txn.rollback()` undoes what the block did so far; what follows is a new transaction."""
    async with mode.block(mode.db.atomic()) as txn:
        await mode.do(User.create, name="ann")
        await mode.do(txn.rollback)
        assert mode.db.in_transaction()
        await mode.do(User.create, name="bob")
        assert seen() == []

    assert seen() == ["bob"]


@in_each_mode
async def test_a_new_transaction_begins_after_an_explicit_commit(mode: Mode, seen: Seen) -> None:
    """`txn.commit()` commits what the block did so far; what follows is a new transaction."""
    with oops_gets_out():
        async with mode.block(mode.db.atomic()) as txn:
            await mode.do(User.create, name="ann")
            await mode.do(txn.commit)
            assert seen() == ["ann"]
            assert mode.db.in_transaction()
            await mode.do(User.create, name="bob")
            raise Oops

    assert seen() == ["ann"]


@in_each_mode
async def test_commit_rollback_and_the_end_of_a_block(mode: Mode, seen: Seen) -> None:
    """Committed, rolled back, and left to the end of the block: the middle one is gone."""
    async with mode.block(mode.db.atomic()) as txn:
        await mode.do(User.create, name="mickey")
        await mode.do(txn.commit)
        await mode.do(User.create, name="huey")
        await mode.do(txn.rollback)
        await mode.do(User.create, name="zaizee")

    assert seen() == ["mickey", "zaizee"]


# Nesting


@in_each_mode
async def test_a_nested_atomic_is_a_savepoint(mode: Mode, seen: Seen) -> None:
    """Rolling a nested block back undoes that block alone, and a new savepoint begins."""
    async with mode.block(mode.db.atomic()):
        await mode.do(User.create, name="charlie")
        async with mode.block(mode.db.atomic()) as savepoint:
            await mode.do(User.create, name="huey")
            await mode.do(savepoint.rollback)
            await mode.do(User.create, name="alice")
        await mode.do(User.create, name="mickey")
        assert seen() == []

    assert seen() == ["charlie", "alice", "mickey"]


@in_each_mode
async def test_an_exception_in_a_nested_block_undoes_that_block(mode: Mode, seen: Seen) -> None:
    """An exception caught around a nested block leaves the rest of the transaction alone."""
    async with mode.block(mode.db.atomic()):
        await mode.do(User.create, name="ann")
        with oops_gets_out():
            async with mode.block(mode.db.atomic()):
                await mode.do(User.create, name="bob")
                raise Oops
        await mode.do(User.create, name="cid")

    assert seen() == ["ann", "cid"]


@in_each_mode
async def test_a_nested_block_is_undone_with_the_outer_one(mode: Mode, seen: Seen) -> None:
    """A nested block that has ended is committed only if the outermost block is."""
    with oops_gets_out():
        async with mode.block(mode.db.atomic()):
            async with mode.block(mode.db.atomic()):
                await mode.do(User.create, name="ann")
            raise Oops

    assert seen() == []


@in_each_mode
async def test_savepoints_nest_arbitrarily_deep(mode: Mode, seen: Seen) -> None:
    """Blocks nest to any depth, and only the work of the one rolled back is lost."""

    async def nest(depth: int) -> None:
        async with mode.block(mode.db.atomic()) as txn:
            await mode.do(User.create, name=f"in {depth}")
            if depth < 8:
                await nest(depth + 1)
            if depth in (4, 8):
                await mode.do(txn.rollback)
            await mode.do(User.create, name=f"out {depth}")

    await nest(1)

    assert seen() == [
        "in 1", "in 2", "in 3", "out 4", "out 3", "out 2", "out 1",
    ]  # fmt: skip


# transaction()


@in_each_mode
async def test_transaction_commits_and_rolls_back_as_told(mode: Mode, seen: Seen) -> None:
    """Inside `transaction`, a commit and a rollback each begin a new transaction."""
    async with mode.block(mode.db.transaction()) as txn:
        await mode.do(User.create, name="mickey")
        await mode.do(txn.commit)
        assert seen() == ["mickey"]
        await mode.do(User.create, name="huey")
        await mode.do(txn.rollback)
        await mode.do(User.create, name="zaizee")
        assert seen() == ["mickey"]

    assert seen() == ["mickey", "zaizee"]


@in_each_mode
async def test_transaction_rolls_back_on_an_exception(mode: Mode, seen: Seen) -> None:
    """An exception that leaves a `transaction` block rolls it back."""
    with oops_gets_out():
        async with mode.block(mode.db.transaction()):
            await mode.do(User.create, name="ann")
            raise Oops

    assert seen() == []


@in_each_mode
async def test_a_nested_transaction_is_ignored(mode: Mode, seen: Seen) -> None:
    """Of nested `transaction` blocks only the outermost is real: it alone commits or rolls back."""
    async with mode.block(mode.db.transaction()):
        async with mode.block(mode.db.transaction()):
            await mode.do(User.create, name="ann")
        assert seen() == []
        with oops_gets_out():
            async with mode.block(mode.db.transaction()):
                await mode.do(User.create, name="bob")
                raise Oops

    assert seen() == ["ann", "bob"]


@in_each_mode
async def test_transaction_decorates(mode: Mode, seen: Seen) -> None:
    """A function decorated with `transaction` runs in one."""

    def create(*names: str) -> None:
        for name in names:
            User.create(name=name)
        assert "ann" not in seen()

    decorated = mode.decorated(mode.db.transaction(), create)

    with pytest.raises(peewee.IntegrityError):
        await decorated("bob", "bob")
    await decorated("ann")
    assert seen() == ["ann"]


# savepoint()


@in_each_mode
async def test_explicit_savepoints(mode: Mode, seen: Seen) -> None:
    """What a `savepoint` rolls back is lost; the one before, and what it does then, is not."""
    async with mode.block(mode.db.transaction()):
        async with mode.block(mode.db.savepoint()):
            await mode.do(User.create, name="mickey")
        async with mode.block(mode.db.savepoint()) as savepoint:
            await mode.do(User.create, name="zaizee")
            await mode.do(savepoint.rollback)
            await mode.do(User.create, name="huey")

    assert seen() == ["mickey", "huey"]


@in_each_mode
async def test_a_new_savepoint_begins_after_an_explicit_commit(mode: Mode, seen: Seen) -> None:
    """Committing a `savepoint` keeps its work, and a new savepoint begins."""
    async with mode.block(mode.db.atomic()), mode.block(mode.db.savepoint()) as savepoint:
        await mode.do(User.create, name="ann")
        await mode.do(savepoint.commit)
        await mode.do(User.create, name="bob")
        await mode.do(savepoint.rollback)

    assert seen() == ["ann"]


@in_each_mode
async def test_savepoints_are_undone_by_an_exception(mode: Mode, seen: Seen) -> None:
    """An exception that leaves a `savepoint` undoes it; savepoints nest."""
    async with mode.block(mode.db.atomic()), mode.block(mode.db.savepoint()):
        await mode.do(User.create, name="ann")
        with oops_gets_out():
            async with mode.block(mode.db.savepoint()):
                await mode.do(User.create, name="bob")
                raise Oops

    assert seen() == ["ann"]


@in_each_mode
async def test_savepoint_decorates(mode: Mode, seen: Seen) -> None:
    """A function decorated with `savepoint` may be called many times, each a savepoint anew."""

    def create(name: str) -> None:
        User.create(name=name)
        if name == "bob":
            raise Oops

    decorated = mode.decorated(mode.db.savepoint(), create)

    async with mode.block(mode.db.atomic()):
        await decorated("ann")
        with oops_gets_out():
            await decorated("bob")
        await decorated("cid")
    assert seen() == ["ann", "cid"]


# How deep are we?


@in_each_mode
async def test_in_transaction_and_transaction_depth(mode: Mode) -> None:
    """`in_transaction` says whether a transaction is open; `transaction_depth`, how many are."""
    db = mode.db
    assert (db.in_transaction(), db.transaction_depth(), db.top_transaction()) == (False, 0, None)
    async with mode.block(db.transaction()) as outer:
        assert (db.in_transaction(), db.transaction_depth()) == (True, 1)
        assert db.top_transaction() is outer
        async with mode.block(db.transaction()) as inner:
            assert (db.in_transaction(), db.transaction_depth()) == (True, 2)
            assert db.top_transaction() is inner
        assert (db.in_transaction(), db.transaction_depth()) == (True, 1)
    assert (db.in_transaction(), db.transaction_depth(), db.top_transaction()) == (False, 0, None)


@in_each_mode
async def test_queries_know_that_they_are_in_the_transaction(mode: Mode) -> None:
    """`in_transaction` is true in the functions that a block calls, wherever they run."""
    async with mode.block(mode.db.atomic()):
        assert await mode.do(mode.db.in_transaction)
    assert not await mode.do(mode.db.in_transaction)
