"""What Peewee documents of running queries in `async def` holds for databases of `connect()`."""

from typing import Any

import peewee
import pytest
from peewee import fn
from playhouse.test_utils import assert_query_count

from fastapi_peewee import Database
from tests import modes
from tests.modes import (
    Note,
    Seen,
    User,
    on,
)

connected, db, mode, observer, seen = modes.fixtures
other = modes.other
ann, three = modes.rows


@pytest.fixture
async def annotated(ann: Any) -> Any:
    """A note whose user is not loaded."""
    await Note.acreate(user=ann)
    return await Note.aget()


async def test_aexecute_of_a_select(three: list[Any], db: Database) -> None:
    """`aexecute` of a select returns its rows, all read: iterating makes no query."""
    query = User.select().order_by(User.name.desc())
    for rows in (await query.aexecute(), await db.aexecute(query.clone())):
        with assert_query_count(0):
            assert [user.name for user in rows] == ["cid", "bob", "ann"]


@pytest.mark.parametrize("whose", ["query", "database"])
async def test_aexecute_of_what_writes(db: Database, seen: Seen, whose: str) -> None:
    """`aexecute` returns a new primary key for an insert, a number of rows for the others."""

    async def aexecute(query: Any) -> Any:
        return await (query.aexecute() if whose == "query" else db.aexecute(query))

    key = await aexecute(User.insert(name="ann"))
    assert (await User.aget()).id == key
    assert await aexecute(User.update(name="anna").where(User.id == key)) == 1
    assert seen() == ["anna"]
    assert await aexecute(User.delete().where(User.name == "bob")) == 0
    assert await aexecute(User.delete()) == 1
    assert seen() == []


@on("sqlite", "postgres")
async def test_aexecute_with_returning(three: list[Any], seen: Seen) -> None:
    """With a RETURNING clause, `aexecute` of what writes returns rows, like a select."""
    query = User.delete().where(User.name != "bob").returning(User.name)
    assert sorted([user.name for user in await query.aexecute()]) == ["ann", "cid"]
    rows = await User.insert_many([("dan",), ("eve",)]).returning(User).aexecute()
    assert [user.name for user in rows] == ["dan", "eve"]
    assert seen() == ["bob", "dan", "eve"]


async def test_aexecute_of_every_kind_of_query(three: list[Any], db: Database) -> None:
    """`aexecute` works for raw, compound and joined queries, back-references and row types."""
    ann, bob, _ = three
    await Note.acreate(user=ann, text="first")

    quote = db.quote
    raw = User.raw(f"SELECT * FROM {quote[0]}user{quote[1]} WHERE name = {db.param}", "bob")
    assert list(await raw.aexecute()) == [bob]
    both = User.select().where(User.name == "ann") | User.select().where(User.name == "bob")
    assert {user.name for user in await both.aexecute()} == {"ann", "bob"}
    joined = await Note.select(Note, User).join(User).aexecute()
    assert [note.user.name for note in joined] == ["ann"]
    assert [note.text for note in await ann.notes.aexecute()] == ["first"]
    assert list(await User.select(User.name).where(User.id == ann).tuples().aexecute()) == [
        ("ann",)
    ]
    assert list(await User.select(User.name).where(User.id == ann).dicts().aexecute()) == [
        {"name": "ann"}
    ]


async def names(query: Any, *database: Database) -> list[str]:
    return [user.name for user in await query.aexecute(*database)]


async def test_aexecute_on_another_database(ann: Any, db: Database, other: Database) -> None:
    """`query.aexecute(database)` uses that database, this once: the binding stays."""
    query = User.select()
    assert await names(query.clone(), other) == ["other"]
    assert await names(query) == ["ann"]
    assert await User.update(name="bob").aexecute(other) == 1
    assert await names(User.select(), other) == ["bob"]
    assert await names(User.select()) == ["ann"]


async def test_database_aexecute_binds(ann: Any, other: Database) -> None:
    """`db.aexecute` runs a query on `db`, whatever it is bound to."""
    assert [user.name for user in await other.aexecute(User.select())] == ["other"]


async def test_helpers_use_the_database_of_the_query(
    ann: Any, db: Database, other: Database
) -> None:
    """`get`, `list`, `scalar`, `count` and `exists` run a query on the database it is bound to."""
    await db.aexecute(User.insert(name="bob"))
    assert [user.name for user in await other.list(User.select().order_by(User.id))] == [
        "ann",
        "bob",
    ]
    assert (await other.get(User.select().where(User.name == "ann"))).name == "ann"
    assert await other.scalar(User.select(fn.MAX(User.name))) == "bob"
    assert await other.count(User.select()) == 2
    assert not await other.exists(User.select().where(User.name == "other"))


async def test_aexecute_needs_a_database(db: Database) -> None:
    """`aexecute` raises `InterfaceError` for a query that is bound to no database."""
    with pytest.raises(peewee.InterfaceError):
        await peewee.Table("user").select().aexecute()


async def test_aexecute_needs_an_async_database(observer: Any) -> None:
    """`aexecute` raises `AttributeError` for a query bound to a database of Peewee's own."""
    with observer.bind_ctx([User]), pytest.raises(AttributeError):
        await User.select().aexecute()


async def test_helpers_of_another_database_need_an_async_one(db: Database, observer: Any) -> None:
    """They say what the query is bound to, and what to make its database with."""
    with observer.bind_ctx([User]):
        query = User.select()
    with pytest.raises(peewee.InterfaceError, match="which has no async methods"):
        await db.list(query)


async def test_helpers_take_a_query_of_no_database(ann: Any, db: Database) -> None:
    """It is run on the one whose helper it is."""
    table = peewee.Table("user")
    assert await db.list(table.select(table.c.name).tuples()) == [("ann",)]


async def test_helpers_take_a_query_of_a_proxy(db: Database) -> None:
    """The database that the proxy stands for is the query's."""
    proxy = peewee.DatabaseProxy()
    proxy.initialize(db)
    with db.bind_ctx([User]):
        await User.acreate(name="bob")
        User._meta.database = proxy
        assert [user.name for user in await db.list(User.select())] == ["bob"]


# The helpers of the database


async def test_run(db: Database, seen: Seen) -> None:
    """`run` calls any function with these arguments and returns what it returns."""

    def register(name: str, *, text: str) -> Any:
        with db.atomic():
            user = User.create(name=name)
            Note.create(user=user, text=text)
            return user

    user = await db.run(register, "ann", text="first")
    assert user.name == "ann"
    assert (await Note.aget(user=user)).text == "first"
    with pytest.raises(peewee.IntegrityError):
        await db.run(register, "ann", text="second")
    assert await db.count(Note.select()) == 1
    assert seen() == ["ann"]


async def test_run_with_prefetch_and_relations(ann: Any, annotated: Any, db: Database) -> None:
    """Whatever follows relations may do so in a function given to `run`."""
    assert await db.run(lambda: annotated.user.name) == "ann"
    assert [note.user_id for note in await db.run(list, ann.notes)] == [ann.id]
    (user,) = await db.run(peewee.prefetch, User.select(), Note.select())
    with assert_query_count(0):
        assert [note.user_id for note in user.notes] == [ann.id]


async def test_get(ann: Any, annotated: Any, db: Database) -> None:
    """`get` returns the row of a select, with what it joins, or raises `DoesNotExist`."""
    assert await db.get(User.select().where(User.name == "ann")) == ann
    note = await db.get(Note.select(Note, User).join(User).where(Note.id == annotated.id))
    with assert_query_count(0):
        assert note.user.name == "ann"
    with pytest.raises(User.DoesNotExist):
        await db.get(User.select().where(User.name == "dan"))


async def test_first(three: list[Any], db: Database) -> None:
    """`first` returns the first row, the first n rows as a list, or None if there is none."""
    query = User.select().order_by(User.name)
    assert (await db.first(query.clone())).name == "ann"
    assert [user.name for user in await db.first(query.clone(), n=2)] == ["ann", "bob"]
    assert await db.first(query.where(User.name == "dan")) is None


async def test_first_limits_the_query(three: list[Any], db: Database) -> None:
    """`first` reads no more rows than it returns."""
    statements: list[str] = []
    db.query_hooks.append(lambda event: statements.append(event.sql))
    await db.first(User.select())
    assert "LIMIT" in statements[0]


async def test_list(three: list[Any], db: Database) -> None:
    """`list` returns the rows of a select as a list."""
    users = await db.list(User.select().order_by(User.name))
    assert type(users) is list
    assert users == three
    assert await db.list(User.select().where(User.name == "dan")) == []
    assert await db.list(User.select(User.name).where(User.name == "bob").tuples()) == [("bob",)]


@on("sqlite", "postgres")
async def test_list_with_returning(three: list[Any], db: Database, seen: Seen) -> None:
    """`list` returns the rows that an insert, update or delete with RETURNING gives."""
    updated = await db.list(User.update(name="bo").where(User.name == "bob").returning(User))
    assert [user.name for user in updated] == ["bo"]
    assert len(await db.list(User.delete().returning(User))) == 3
    assert seen() == []


async def test_scalar(three: list[Any], db: Database) -> None:
    """`scalar` returns the first column of the first row, or None if there is none."""
    assert await db.scalar(User.select(fn.MAX(User.name), fn.MIN(User.name))) == "cid"
    assert await db.scalar(User.select(User.name).where(User.name == "dan")) is None


async def test_count_and_exists(three: list[Any], db: Database) -> None:
    """`count` counts the rows of a select, and `exists` says whether there is one."""
    assert await db.count(User.select()) == 3
    assert await db.count(User.select().where(User.name < "bz").limit(1)) == 1
    assert await db.exists(User.select().where(User.name == "bob")) is True
    assert await db.exists(User.select().where(User.name == "dan")) is False


async def test_aprefetch(three: list[Any], db: Database) -> None:
    """`aprefetch` returns rows with their relations: reading those makes no query."""
    ann, bob, _ = three
    for user, text in ((ann, "a1"), (bob, "b1"), (ann, "a2")):
        await Note.acreate(user=user, text=text)

    with assert_query_count(2):
        users = await db.aprefetch(User.select().order_by(User.name), Note.select())
    with assert_query_count(0):
        notes = [(user.name, sorted([note.text for note in user.notes])) for user in users]
    assert notes == [("ann", ["a1", "a2"]), ("bob", ["b1"]), ("cid", [])]
    with assert_query_count(0):
        assert [note.user is ann for ann in users[:1] for note in ann.notes] == [True, True]


async def test_acreate_tables_and_adrop_tables(db: Database) -> None:
    """`acreate_tables` and `adrop_tables` do so in the order that foreign keys ask for."""
    await db.adrop_tables([User, Note])
    assert await db.run(db.get_tables) == []
    await db.acreate_tables([Note, User])
    assert set(await db.run(db.get_tables)) == {"user", "note"}
    await db.acreate_tables([User], safe=True)
    with pytest.raises(peewee.DatabaseError):
        await db.acreate_tables([User], safe=False)
    await db.adrop_tables([User, Note], safe=True)
    await db.adrop_tables([User, Note], safe=True)


async def test_aexecute_sql(db: Database) -> None:
    """`aexecute_sql` takes SQL and parameters and returns a cursor, its rows read already."""
    cursor = await db.aexecute_sql(f"SELECT {db.param}, 2", (1,))
    with assert_query_count(0):
        assert list(cursor.fetchall()) == [(1, 2)]
    assert list(await db.aexecute_sql("SELECT 1")) == [(1,)]


async def test_aexecute_sql_of_what_writes(three: list[Any], db: Database) -> None:
    """What `aexecute_sql` returns for a statement that writes knows how many rows it changed."""
    table = "user".join(db.quote)
    cursor = await db.aexecute_sql(f"DELETE FROM {table} WHERE name > {db.param}", ("ann",))
    assert cursor.rowcount == 2
    assert list(cursor.fetchall()) == []
