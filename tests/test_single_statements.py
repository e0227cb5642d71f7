"""Methods of Peewee's that execute one query: on the event loop where the database can do that."""

import asyncio
import errno
import io
import os
import threading
import uuid
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import peewee
import pytest
from playhouse.signals import Model as SignalModel
from playhouse.signals import pre_save

from fastapi_peewee import Database, OutcomeUnknown
from fastapi_peewee.shapes import MANY
from fastapi_peewee.sockets import Steps, Watch
from fastapi_peewee.state import RequestScope
from fastapi_peewee.verbs import AsyncModelMixin
from tests.apps import back_to_rest, connected

pytestmark = pytest.mark.usefixtures("_used_just_now")


@pytest.fixture
async def db(postgres_url: str) -> AsyncIterator[Database]:
    async with connected(postgres_url, pool_size=2) as db:
        yield db


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Steps]:
    """The statements that were run on the event loop."""
    seen: list[Steps] = []
    ask = Watch.ask

    def noting(self: Watch, steps: Steps) -> Any:
        seen.append(steps)
        return ask(self, steps)

    monkeypatch.setattr(Watch, "ask", noting)
    return seen


def make(db: Database) -> Any:
    class Note(db.Model):
        text = peewee.TextField(unique=True)
        number = peewee.IntegerField(default=7)
        key = peewee.UUIDField(default=uuid.uuid4)

    return Note


@pytest.fixture
async def note(db: Database) -> Any:
    """A model whose statements have been seen before, so that their SQL is known."""
    note = make(db)
    await db.acreate_tables([note])
    for text in ("a", "b"):
        made = await note.acreate(text=text)
        made.number = 8
        await made.asave()
        await note.aget(note.text == text)
        await note.aget_or_none(note.text == text)
        await note.aget_by_id(made.id)
        await note.aset_by_id(made.id, {"number": 9})
        await made.adelete_instance()
        await note.adelete_by_id(made.id)
    return note


async def test_on_the_event_loop(db: Database, note: Any, asked: list[Steps]) -> None:
    """Each of these methods is one statement on the event loop, and does what it does otherwise."""
    made = await note.acreate(text="c", number=1)
    assert (made.id, made.text, made.number, made.dirty_fields) == (3, "c", 1, [])
    made.number = 2
    assert await made.asave() == 1
    found = await note.aget(note.text == "c")
    assert (found, found.number, found.key) == (made, 2, made.key)
    assert await note.aget_or_none(note.text == "nobody") is None
    with pytest.raises(note.DoesNotExist):
        await note.aget_by_id(99)
    assert await note.aset_by_id(made.id, {"number": 3}) == 1
    assert (await note.aget_by_id(made.id)).number == 3
    assert await made.adelete_instance() == 1
    assert await note.adelete_by_id(made.id) == 0
    assert len(asked) == 9
    assert db.pool_stats.in_use == 0


async def test_a_key_that_the_database_does_not_count(db: Database, asked: list[Steps]) -> None:
    """Such a row is created on the event loop as well, and its key is the one it was given."""

    class Page(db.Model):
        id = peewee.UUIDField(primary_key=True, default=uuid.uuid4)
        text = peewee.TextField()

    await db.acreate_tables([Page])
    made = [await Page.acreate(text=text) for text in "abcd"]
    assert len(asked) >= 2  # those whose SQL was known
    assert {(page.id, page.text) for page in await db.list(Page.select())} == {
        (page.id, page.text) for page in made
    }
    assert [page.dirty_fields for page in made] == [[]] * 4


async def test_a_trigger_that_keeps_the_row_away(
    db: Database, note: Any, asked: list[Steps]
) -> None:
    """The instance has no key then, as with `create`."""
    for sql in (
        "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER nothing BEFORE INSERT ON note FOR EACH ROW EXECUTE FUNCTION nothing()",
    ):
        await db.run(db.execute_sql, sql)
    theirs = await db.run(lambda: note.create(text="new"))
    asked.clear()
    ours = await note.acreate(text="new")
    assert asked
    assert ours.id is theirs.id is None
    assert ours.dirty_fields == theirs.dirty_fields == []


async def test_default_values_are_made_once(db: Database, note: Any, asked: list[Steps]) -> None:
    """The instance has the values that are in the database, also where a function makes them."""
    made = await note.acreate(text="c")
    assert asked
    assert (await note.aget_by_id(made.id)).key == made.key


async def test_fields_that_can_be_read_once(db: Database, note: Any, asked: list[Steps]) -> None:
    """`only` may be a generator."""
    made = await note.acreate(text="c", number=1)
    asked.clear()
    for number in (2, 3, 4):
        made.number, made.key = number, uuid.uuid4()
        assert await made.asave(only=(name for name in ("number",))) == 1
        assert (await note.aget_by_id(made.id)).number == number
        assert [field.name for field in made.dirty_fields] == ["key"]
    assert asked


async def test_filters_that_can_be_read_once(db: Database, note: Any, asked: list[Steps]) -> None:
    """Keyword arguments may hold generators: also where Peewee makes the SQL, in a thread."""
    made = await note.acreate(text="c")
    for count in (2, 2, 2, MANY + 1):
        keys = (made.id + number for number in range(count))
        assert await note.aget_or_none(id__in=keys) == made
    assert asked


async def test_values_that_can_be_read_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field may read the file that it is given: also where the event loop can't do it just now,
    and a thread has to."""

    class Uploaded(peewee.BlobField):
        def db_value(self, value: Any) -> Any:
            return super().db_value(value.read())

    async with connected(database_url) as db:

        class Upload(db.Model):
            data = Uploaded()

        async def not_now(*_: Any) -> None:
            return None

        await db.acreate_tables([Upload])
        for _ in range(3):
            await Upload.acreate(data=io.BytesIO(b"content"))
        monkeypatch.setattr(db, "aexecute_compiled", not_now)
        made = [await Upload.acreate(data=io.BytesIO(b"content")) for _ in range(2)]
        await Upload.aset_by_id(made[0].id, {"data": io.BytesIO(b"other")})
        found = await db.list(Upload.select().order_by(Upload.id))
        assert [bytes(upload.data) for upload in found] == [b"content"] * 3 + [b"other", b"content"]
        assert found[3:] == made


async def test_what_is_assigned_meanwhile(db: Database, note: Any, asked: list[Steps]) -> None:
    """Of a model that saves its dirty fields, what is assigned during `asave` stays dirty."""

    class Careful(note):
        class Meta:
            table_name = note._meta.table_name
            only_save_dirty = True

    made = await Careful.acreate(text="c")
    for text in "de":
        made.text = text
        await made.asave()
    made.text = "f"
    asked.clear()
    task = asyncio.create_task(made.asave())
    while not asked:
        await anyio.lowlevel.checkpoint()
    assert not task.done()
    made.number = 99
    assert await task == 1
    assert [field.name for field in made.dirty_fields] == ["number"]
    assert await made.asave() == 1
    assert (await Careful.aget_by_id(made.id)).number == 99
    assert await made.asave() is False


async def test_inside_a_block(db: Database, note: Any, asked: list[Steps]) -> None:
    """Inside a transaction they are part of it, in the thread that has its turn."""
    with pytest.raises(LookupError):
        async with db.atomic():
            await note.acreate(text="c")
            assert (await note.aget(note.text == "c")).text == "c"
            raise LookupError
    assert asked == []
    assert await note.aget_or_none(note.text == "c") is None


async def test_methods_of_ones_own(db: Database, note: Any, asked: list[Steps]) -> None:
    """A model that overrides `save`, which may do anything, is left to a thread."""
    threads = []

    class Noisy(note):
        class Meta:
            table_name = note._meta.table_name

        def save(self, *args: Any, **kwargs: Any) -> Any:
            threads.append(threading.current_thread())
            return super().save(*args, **kwargs)

    for text in "cde":
        await Noisy.acreate(text=text)
    assert threading.current_thread() not in threads
    assert len(threads) == 3
    assert asked == []


async def test_what_they_call_may_be_ones_own(db: Database, note: Any, asked: list[Steps]) -> None:
    """A model that overrides what such a method calls is left to a thread as well: `get`, say."""

    class Audited(note):
        class Meta:
            table_name = note._meta.table_name

        @classmethod
        def get(cls, *query: Any, **filters: Any) -> Any:
            assert cls.select().count() >= 0
            return super().get(*query, **filters)

    await note.acreate(text="c")
    asked.clear()
    for _ in range(3):
        assert (await Audited.aget_by_id(3)).text == "c"
        assert (await Audited.aget(Audited.text == "c")).id == 3
    assert asked == []


async def test_signals(db: Database, note: Any, asked: list[Steps]) -> None:
    """The signals of playhouse are sent once for each save."""

    class Signalling(AsyncModelMixin, SignalModel):
        text = peewee.TextField()

        class Meta:
            database = db
            table_name = note._meta.table_name

    sent = []

    @pre_save(sender=Signalling)  # type: ignore[untyped-decorator]
    def note_it(model: Any, instance: Any, created: bool) -> None:
        sent.append(instance.text)

    await db.aexecute_sql(f"ALTER TABLE {note._meta.table_name} ALTER number SET DEFAULT 1")
    await db.aexecute_sql(
        f"ALTER TABLE {note._meta.table_name} ALTER key SET DEFAULT gen_random_uuid()"
    )
    for text in "cde":
        await Signalling.acreate(text=text)
    assert sent == ["c", "d", "e"]


async def test_a_default_value_that_asks_the_database(db: Database, asked: list[Steps]) -> None:
    """A default that runs a query of its own is made in a thread, as ever."""

    class Counted(db.Model):
        number = peewee.IntegerField(default=lambda: Counted.select().count())

    await db.acreate_tables([Counted])
    made = [(await db.run(Counted.create)).number for _ in range(2)]
    made += [(await in_a_request(Counted.acreate)).number for _ in range(3)]
    made += [(await Counted.acreate()).number for _ in range(3)]
    assert made == [0, 1, 2, 3, 4, 5, 6, 7]
    assert db.is_closed()  # the event loop's thread has no connection


async def test_a_default_value_that_starts_a_task(db: Database, note: Any) -> None:
    """The task may ask the database, though what made it may not."""
    tasks: list[asyncio.Task[Any]] = []

    def start() -> int:
        tasks.append(asyncio.create_task(db.run(note.select().count)))
        return 1

    class Started(db.Model):
        number = peewee.IntegerField(default=start)

    await db.acreate_tables([Started])
    for _ in range(4):
        assert (await Started.acreate()).number == 1
    found = await db.run(note.select().count)
    assert await asyncio.gather(*tasks) == [found] * 4


async def test_a_converter_that_asks_the_database(db: Database, asked: list[Steps]) -> None:
    """A value that is made by SQL of its own is made in a thread, as ever."""

    class Doubled(peewee.IntegerField):
        def db_value(self, value: Any) -> Any:
            return db.execute_sql("SELECT 2 * %s::integer", [value]).fetchone()[0]

    class Note(db.Model):
        number = Doubled()

    await db.acreate_tables([Note])
    for number in range(4):
        made = await Note.acreate(number=number)
        stored = await db.aexecute_sql("SELECT number FROM note WHERE id = %s", [made.id])
        assert stored.fetchall() == [(2 * number,)]
    assert not asked
    await back_to_rest(db)


async def test_what_asks_the_database_as_rows_are_read(
    db: Database, note: Any, asked: list[Steps]
) -> None:
    """A converter or an `__init__` that runs a query of its own gets that query's result."""

    class Link(peewee.IntegerField):
        def db_value(self, value: Any) -> Any:
            return db.execute_sql("SELECT %s::int", [value]).fetchone()[0]

        def python_value(self, value: Any) -> Any:
            return note.get_by_id(value).text

    class Linked(db.Model):
        link = Link()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.count = note.select().count()

    await db.acreate_tables([Linked])
    first = await note.acreate(text="first")
    for _ in range(4):
        made = await Linked.acreate(link=first.id)
        for found in (await Linked.aget_by_id(made.id), await in_a_request(Linked.aget)):
            assert (found.link, found.count) == ("first", 1)
    assert asked
    assert db.is_closed()


async def in_a_request(fn: Any) -> Any:
    token = RequestScope.current.set(RequestScope())
    try:
        return await fn()
    finally:
        RequestScope.current.reset(token)


async def test_errors(db: Database, note: Any, asked: list[Steps]) -> None:
    """An error is Peewee's, with the statement that it came of; the connection is kept."""
    await note.acreate(text="c")
    opened = db.pool_stats.opened
    for text, kind in (("c", peewee.IntegrityError), ("\0", peewee.DataError)):
        with pytest.raises(kind) as failure:
            await note.acreate(text=text)
        assert failure.value.statement[1].startswith("INSERT")
    with pytest.raises(peewee.DataError):
        await note.acreate(text="\ud800")
    with pytest.raises(peewee.DataError):
        await note.acreate(text="d", number=2**40)
    assert len(asked) >= 3
    await note.acreate(text="d")
    assert db.pool_stats.opened == opened
    assert db.pool_stats.in_use == 0


async def slow(db: Database, note: Any) -> None:
    """Inserts of "slow" take a minute."""
    table = note._meta.table_name
    await db.aexecute_sql(
        "CREATE FUNCTION take_time() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.text = 'slow' THEN PERFORM pg_sleep(60); END IF; RETURN NEW; END $$"
    )
    await db.aexecute_sql(
        f"CREATE TRIGGER slow BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION take_time()"
    )


BUSY = (
    "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
)


async def running(db: Database, asked: list[Steps]) -> int:
    """Wait until the server is busy with what was asked; return its process number."""
    with anyio.fail_after(10):
        while not asked:
            await anyio.lowlevel.checkpoint()
        while not (rows := await db.aexecute_sql(BUSY)):
            await anyio.sleep(0.01)
    return int(rows[0][0])


async def test_cancelled(db: Database, note: Any, asked: list[Steps]) -> None:
    """A write that is cancelled is over when its task is, and not done."""
    await slow(db, note)
    task = asyncio.create_task(note.acreate(text="slow"))
    await running(db, asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await db.aexecute_sql(BUSY) == []
    await back_to_rest(db)
    assert await note.aget_or_none(note.text == "slow") is None


async def test_all_tasks_are_cancelled(
    db: Database, note: Any, asked: list[Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That holds also if meanwhile all tasks are cancelled, as `asyncio.run` does it at its end."""
    await slow(db, note)
    begun, goes_on = threading.Event(), threading.Event()
    interrupt = type(db).interrupt

    def late(self: Database, conn: Any) -> bool:
        begun.set()
        assert goes_on.wait(10)
        return interrupt(self, conn)

    monkeypatch.setattr(type(db), "interrupt", late)
    others = asyncio.all_tasks()
    task = asyncio.create_task(note.acreate(text="slow"))
    await running(db, asked)
    task.cancel()
    assert await asyncio.to_thread(begun.wait, 10)
    for each in asyncio.all_tasks() - others:
        each.cancel()
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    assert not task.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await db.aexecute_sql(BUSY) == []


async def test_an_unknown_outcome(db: Database, note: Any, asked: list[Steps]) -> None:
    """A write whose connection is lost before the answer has an outcome that is unknown."""
    await slow(db, note)
    task = asyncio.create_task(note.acreate(text="slow"))
    pid = await running(db, asked)
    await db.aexecute_sql("SELECT pg_terminate_backend(%s)", (pid,))
    with pytest.raises(OutcomeUnknown):
        await task
    await back_to_rest(db)
    assert await note.aget_or_none(note.text == "slow") is None


async def test_a_result_that_cannot_be_read(postgres_url: str, asked: list[Steps]) -> None:
    """A statement whose result psycopg can't read has been done, and isn't done once more."""
    async with connected(postgres_url, options="-c datestyle=German") as db:

        class Moment(peewee.DateTimeField):
            field_type = "TIMESTAMPTZ"

        class Happened(db.Model):
            at = Moment(primary_key=True, constraints=[peewee.SQL("DEFAULT clock_timestamp()")])
            text = peewee.TextField()

        await db.acreate_tables([Happened])
        for _ in range(4):
            with pytest.raises(NotImplementedError, match="DateStyle"):
                await Happened.acreate(text="a")
        assert asked
        assert await db.count(Happened.select()) == 4


async def test_a_place_in_the_queue_is_kept(postgres_url: str, asked: list[Steps]) -> None:
    """Who asked first is served first, also if there is no connection to be had at once when its
    time has come, and one is opened."""
    async with connected(postgres_url, pool_size=1) as db:
        note = make(db)
        await db.acreate_tables([note])
        made = await note.acreate(text="a")
        for _ in range(2):
            await note.aget_by_id(made.id)  # so that its SQL is known
        asked.clear()
        order: list[str] = []
        release = threading.Event()

        def hold() -> None:
            db.manual_close()  # its connection isn't kept
            assert release.wait(10)

        async def ask() -> None:
            assert await note.aget_by_id(made.id) == made
            order.append("first")

        async def waiting(count: int) -> None:
            while (db.pool_stats.in_use, db.pool_stats.waiting) != (1, count):
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as group:
            try:
                group.create_task(db.run(hold))
                await waiting(0)
                group.create_task(ask())
                await waiting(1)
                group.create_task(db.run(order.append, "second"))
                await waiting(2)
            finally:
                release.set()
        assert order == ["first", "second"]
        assert len(asked) == 1
        await back_to_rest(db)


async def test_an_event_loop_that_watches_no_sockets(
    db: Database, note: Any, asked: list[Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sockets can't be watched, as on Windows, everything is run in threads."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError

    def no_descriptor(fd: int) -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    asked.clear()
    places = [(asyncio.get_running_loop(), "add_reader", refuse), (os, "dup", no_descriptor)]
    for place, name, refused in places:
        db.close_all()  # so that the next connection isn't watched yet
        await db.count(note.select())
        with monkeypatch.context() as patch:
            patch.setattr(place, name, refused)
            made = await note.acreate(text=name)
            assert await note.aget_by_id(made.id) == made
    assert asked == []
    assert db.pool_stats.discarded == 0


async def test_whoever_watches_statements_sees_these(db: Database, note: Any) -> None:
    """Hooks see each of them."""
    seen: list[str] = []
    db.query_hooks.append(lambda event: seen.append(event.sql))
    await note.acreate(text="c")
    await note.aget(note.text == "c")
    assert [sql.split()[0] for sql in seen] == ["INSERT", "SELECT"]
