"""What Peewee documents of statements, errors, logging, hooks and `get_or_create`."""

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peewee
import pytest

from fastapi_peewee import AsyncModel, Database
from fastapi_peewee.shapes import MANY
from tests import modes
from tests.modes import (
    Mode,
    Note,
    Seen,
    User,
    in_each_mode,
    on,
)

connected, db, mode, observer, seen = modes.fixtures


@in_each_mode
def test_execute_sql(mode: Mode) -> None:
    """`execute_sql` takes SQL and parameters, and returns a cursor."""
    db = mode.db
    for name in ("ann", "bob", "cid"):
        User.create(name=name)

    statement = f"SELECT name FROM {db.quote[0]}user{db.quote[1]} WHERE name <> {db.param}"
    cursor = db.execute_sql(f"{statement} ORDER BY name", ("bob",))
    assert [column[0] for column in cursor.description] == ["name"]
    assert cursor.fetchone() == ("ann",)
    assert list(cursor.fetchall()) == [("cid",)]
    assert list(db.execute_sql(f"{statement} ORDER BY name", ["ann"])) == [("bob",), ("cid",)]


@in_each_mode
def test_execute_compiles_a_query(mode: Mode) -> None:
    """`execute` compiles a query and runs it; `rows_affected` says how many rows it changed."""
    db = mode.db
    assert db.rows_affected(db.execute(User.insert(name="ann"))) == 1
    cursor = db.execute(User.select(User.name))
    assert list(cursor.fetchall()) == [("ann",)]


@in_each_mode
async def test_long_lists_of_many_lengths(mode: Mode) -> None:
    """Each is answered rightly, in reads and writes, and of none is anything remembered."""
    ids = range(1, MANY + 21)

    def both(length: int) -> tuple[list[int], int]:
        few = [*ids[:length]]
        found = User.select(User.id).where(User.id << few).order_by(User.id)
        changed = User.update(name=User.name.concat("!")).where(User.id << few)
        return [user.id for user in found], changed.execute()

    await mode.do(User.insert_many([{"name": f"user{i}"} for i in ids]).execute)
    assert await mode.do(both, 3) == ([1, 2, 3], 3)
    before = len(mode.db._sql_cache._templates)
    for length in ids[MANY:]:
        for _ in range(3):
            assert await mode.do(both, length) == ([*ids[:length]], length)
    assert len(mode.db._sql_cache._templates) == before


@in_each_mode
async def test_json_that_is_changed_again_and_again(mode: Mode) -> None:
    """What is read is what was written last, in whichever way, and of each row its own."""

    class Document(AsyncModel):
        data = peewee.JSONField(null=True)

        class Meta:
            database = mode.db

    def save(key: int, value: Any) -> None:
        document = Document.get_by_id(key)
        document.data = value
        document.save()

    def update(key: int, value: Any) -> None:
        Document.update(data=value).where(Document.id == key).execute()

    def set_by_id(key: int, value: Any) -> None:
        Document.set_by_id(key, {"data": value})

    await mode.do(mode.db.create_tables, [Document])
    for key in (1, 2):
        await mode.do(Document.create, data={})
        for write in (save, update, set_by_id):
            for value in ({"n": 1}, ["a", None], None, {"n": 2}):
                await mode.do(write, key, value)
                assert (await mode.do(Document.get_by_id, key)).data == value


@on("postgres")  # the others know numbers only, and MySQL those that it gave itself
@pytest.mark.parametrize(
    ("key", "value"),
    [
        (lambda _: peewee.AutoField(), None),
        (lambda _: peewee.BigAutoField(), 7),
        (lambda _: peewee.UUIDField(primary_key=True), uuid.UUID(int=7)),
        (lambda _: peewee.CharField(primary_key=True), "a"),
        (lambda owner: peewee.ForeignKeyField(owner, primary_key=True), 1),
    ],
    ids=["auto", "bigauto", "uuid", "text", "foreign key"],
)
def test_the_key_of_an_inserted_row(
    db: Database, key: Callable[[Any], peewee.Field], value: Any
) -> None:
    """`INSERT` says which key a row has, as Peewee has it in Python; None if none is new."""

    class Owner(db.Model):
        name = peewee.TextField()

    class Owned(db.Model):
        id = key(Owner)
        text = peewee.TextField(null=True)

    with db:
        db.create_tables([Owner, Owned])
        Owner.create(name="ann")
        for number in range(1, 4):  # the SQL is made, seen again, known
            Owned.delete().execute()
            found = Owned.insert({"id": value} if value else {"text": "a"}).execute()
            assert found == Owned.get()._pk
            assert type(found) is type(value or number)
            assert Owned.insert(id=found).on_conflict_ignore().execute() is None


@on("postgres")  # on the others an INSERT returns what one asks for
@in_each_mode
async def test_an_insert_can_be_read(mode: Mode) -> None:
    """After `execute()` has said the key, or instead of it, a query has the row that came back;
    none where none was inserted.
    """

    def insert(key: int, read: Callable[[Any], Any]) -> Any:
        query = User.insert(id=key, name=f"user{key}")
        assert query.execute() == key
        assert [*query] == [*query] == [(key,)]
        assert (len(query), query[0]) == (1, (key,))
        nothing = User.insert(id=key, name="ann").on_conflict_ignore()
        assert nothing.execute() is None
        assert [*nothing] == []
        return read(User.insert(name=f"other{key}", id=-key))

    readings: list[tuple[Callable[[Any], Any], Callable[[int], Any]]] = [
        (list, lambda key: [(key,)]),
        (len, lambda _: 1),
        (lambda query: query[0], lambda key: (key,)),
        (lambda query: [*query.dicts()], lambda key: [{"id": key}]),
        (lambda query: query.dicts().execute(), lambda key: key),
    ]
    for key in range(1, 16):  # the SQL is made, seen again, known
        read, expected = readings[key % 5]
        assert await mode.do(insert, key, read) == expected(-key)


@in_each_mode
async def test_driver_errors_become_peewees(mode: Mode) -> None:
    """Whatever the driver raises reaches the caller as an exception of Peewee's."""

    async def error_of(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> peewee.DatabaseError:
        with pytest.raises(peewee.PeeweeException) as raised:
            await mode.do(fn, *args, **kwargs)
        assert isinstance(raised.value, peewee.DatabaseError)
        return raised.value

    await mode.do(User.create, name="ann")
    assert isinstance(await error_of(User.create, name="ann"), peewee.IntegrityError)
    missing = await error_of(mode.db.execute_sql, "SELECT 1 FROM nowhere")
    assert isinstance(missing, (peewee.ProgrammingError, peewee.OperationalError))


@in_each_mode
async def test_queries_are_logged(mode: Mode, caplog: pytest.LogCaptureFixture) -> None:
    """Each query is logged to "peewee" at level DEBUG, with its parameters."""
    with caplog.at_level(logging.DEBUG, "peewee"):
        await mode.do(User.create, name="ann")

    (record,) = (record for record in caplog.records if record.name == "peewee")
    pair: Any = record.msg
    assert pair[0].startswith("INSERT INTO")
    assert pair[1] == ["ann"]


@in_each_mode
async def test_query_hooks(mode: Mode) -> None:
    """Each function in `query_hooks` is told of each query, with its duration and its error."""
    events: list[Any] = []
    mode.db.query_hooks.append(events.append)

    await mode.do(User.create, name="ann")
    with pytest.raises(peewee.IntegrityError) as raised:
        await mode.do(User.create, name="ann")
    mode.db.query_hooks.remove(events.append)
    await mode.do(User.create, name="bob")

    first, second = events
    assert first.sql.startswith("INSERT INTO")
    assert first.params == ["ann"]
    assert 0 <= first.duration < 60
    assert first.exception is None
    assert second.exception is raised.value


@in_each_mode
async def test_get_or_create(mode: Mode) -> None:
    """`get_or_create` returns the row, and whether it had to make it, with these defaults."""
    ann, created = await mode.do(User.get_or_create, name="ann")
    assert created
    assert await mode.do(User.get_or_create, name="ann") == (ann, False)

    first, created = await mode.do(Note.get_or_create, user=ann, defaults={"text": "first"})
    assert (created, first.text) == (True, "first")
    again, created = await mode.do(Note.get_or_create, user=ann, defaults={"text": "second"})
    assert (created, again.text) == (False, "first")


class LateInserts:
    """Lets nobody insert before two have selected in vain."""

    def __init__(self) -> None:
        self.together = threading.Barrier(2, timeout=30)
        self.waited = threading.local()

    def __call__(self, event: Any) -> None:
        if event.sql.startswith("SELECT") and not getattr(self.waited, "once", False):
            self.waited.once = True
            self.together.wait()


def test_get_or_create_race_of_threads(db: Database, seen: Seen) -> None:
    """Of two threads that find a row missing one creates it; the other gets it then."""
    db.query_hooks.append(LateInserts())

    def job(_: int) -> Any:
        with db.connection_context():
            return User.get_or_create(name="ann")

    with ThreadPoolExecutor(2) as pool:
        (first, created), (second, also_created) = pool.map(job, range(2))

    assert first == second
    assert {created, also_created} == {True, False}
    assert seen() == ["ann"]


async def test_get_or_create_race_of_tasks(db: Database, seen: Seen) -> None:
    """Of two tasks that find a row missing one creates it; the other gets it then."""
    db.query_hooks.append(LateInserts())

    (first, created), (second, also_created) = await asyncio.gather(
        User.aget_or_create(name="ann"), User.aget_or_create(name="ann")
    )

    assert first == second
    assert {created, also_created} == {True, False}
    assert seen() == ["ann"]
