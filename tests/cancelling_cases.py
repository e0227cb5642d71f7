"""What is cancelled: the ways of using a database from a task, each of which writes some rows."""

import asyncio
from contextlib import aclosing, suppress
from typing import Any

from fastapi_peewee import Database
from tests.cancelling import Scenario
from tests.modes import Oops


async def one_call(db: Database, row: Any) -> None:
    def both() -> None:
        with db.atomic():
            row.create(name="a")
            row.create(name="b")

    await db.run(both)


async def statements(db: Database, row: Any) -> None:
    await row.acreate(name="a")
    await row.acreate(name="b")


async def block(db: Database, row: Any) -> None:
    async with db.atomic():
        await row.acreate(name="a")
        await row.acreate(name="b")


async def block_that_fails(db: Database, row: Any) -> None:
    async with db.atomic():
        await row.acreate(name="a")
        raise Oops


async def explicit_commit(db: Database, row: Any) -> None:
    async with db.atomic() as transaction:
        await row.acreate(name="a")
        await transaction.acommit()
        await row.acreate(name="b")


async def explicit_rollback(db: Database, row: Any) -> None:
    async with db.atomic() as transaction:
        await row.acreate(name="a")
        await transaction.arollback()
        await row.acreate(name="b")


async def nested(db: Database, row: Any) -> None:
    async with db.atomic():
        await row.acreate(name="a")
        async with db.atomic():
            await row.acreate(name="b")
        await row.acreate(name="c")


async def nested_that_fails(db: Database, row: Any) -> None:
    async with db.atomic():
        await row.acreate(name="a")
        with suppress(Oops):
            async with db.savepoint():
                await row.acreate(name="b")
                raise Oops
        await row.acreate(name="c")


async def transaction_and_savepoint(db: Database, row: Any) -> None:
    async with db.transaction(), db.savepoint():
        await row.acreate(name="a")
        await row.acreate(name="b")


async def siblings(db: Database, row: Any) -> None:
    async with db.atomic():
        await asyncio.gather(row.acreate(name="a"), row.acreate(name="b"))


async def decorated(db: Database, row: Any) -> None:
    @db.atomic()
    async def create() -> None:
        await row.acreate(name="a")
        await row.acreate(name="b")

    await create()


async def read_only(db: Database, row: Any) -> None:
    async with db.atomic(read_only=True):
        await db.count(row.select())


async def context(db: Database, row: Any) -> None:
    async with db.connection_context():
        await row.acreate(name="a")
        async with db.atomic():
            await row.acreate(name="b")
            await row.acreate(name="c")


async def connected(db: Database, row: Any) -> None:
    await db.aconnect()
    await row.acreate(name="a")
    await db.aclose()


async def never_closed(db: Database, row: Any) -> None:
    await db.aconnect()
    await row.acreate(name="a")


async def read_row_by_row(db: Database, row: Any) -> None:
    async with aclosing(db.iterate(row.select().where(row.name == "old"), buffer_size=2)) as rows:
        async for _ in rows:
            pass
    await row.acreate(name="a")


async def read_in_a_block(db: Database, row: Any) -> None:
    async with db.atomic():
        await read_row_by_row(db, row)


async def left_early(db: Database, row: Any) -> None:
    async with aclosing(db.iterate(row.select().where(row.name == "old"), buffer_size=2)) as rows:
        async for _ in rows:
            break


async def callbacks(db: Database, row: Any) -> None:
    row.called = []

    async def later() -> None:
        await asyncio.sleep(0)
        row.called.append("later")

    async with db.atomic():
        await row.acreate(name="a")

        def register() -> None:
            db.after_commit(lambda: row.called.append("at once"))
            db.after_commit(later)

        await db.run(register)


def called_if_committed(row: Any, stored: str) -> None:
    assert row.called == (["at once", "later"] if "a" in stored else [])


SCENARIOS = {
    "a transaction in one call": Scenario(one_call, ("", "ab")),
    "statements": Scenario(statements, ("", "a", "ab")),
    "a block": Scenario(block, ("", "ab")),
    "a block that fails": Scenario(block_that_fails, ("",), Oops),
    "a commit in a block": Scenario(explicit_commit, ("", "a", "ab")),
    "a rollback in a block": Scenario(explicit_rollback, ("", "b")),
    "nested blocks": Scenario(nested, ("", "abc")),
    "a nested block that fails": Scenario(nested_that_fails, ("", "ac")),
    "transaction and savepoint": Scenario(transaction_and_savepoint, ("", "ab")),
    "siblings in a block": Scenario(siblings, ("", "ab")),
    "a decorated function": Scenario(decorated, ("", "ab")),
    "a read-only block": Scenario(read_only, ("",)),
    "a connection context": Scenario(context, ("", "a", "abc")),
    "aconnect and aclose": Scenario(connected, ("", "a")),
    "aconnect alone": Scenario(never_closed, ("", "a")),
    "iterate": Scenario(read_row_by_row, ("", "a")),
    "iterate in a block": Scenario(read_in_a_block, ("", "a")),
    "iterate, left early": Scenario(left_early, ("",)),
    "callbacks": Scenario(callbacks, ("", "a"), check=called_if_committed),
}
