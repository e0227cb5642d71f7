"""SQLite's writers: one at a time, in the order in which they came, none without patience."""

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, closing
from contextvars import Context  # empty: a task in it isn't part of the block that starts it
from pathlib import Path
from typing import Any

import anyio
import peewee
import pytest

from fastapi_peewee import Database, writers
from fastapi_peewee.drivers import Returned
from fastapi_peewee.writers import Writers, rest_of_patience
from tests.apps import client, connected, make_app

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with connected(f"sqlite:///{tmp_path}/app.db", pool_size=5, busy_timeout=30) as db:
        yield db


@pytest.fixture
async def note(db: Database) -> Any:
    class Note(db.Model):
        text = peewee.CharField()

    await db.acreate_tables([Note])
    return Note


def gate(db: Any) -> Any:
    return db._writers._gate


async def queue(db: Database, length: int) -> None:
    """Wait until so many wait to write."""
    while gate(db).waiting < length:
        await asyncio.sleep(0.001)


async def test_writers_are_served_in_the_order_in_which_they_came(db: Database, note: Any) -> None:
    """Whoever came first writes first: single statements and transactions in one queue."""
    transaction = db.atomic()
    await transaction.__aenter__()

    async def in_block(text: str) -> None:
        async with db.atomic():
            await note.acreate(text=text)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            write = in_block if number % 2 else lambda text: note.acreate(text=text)
            group.create_task(write(str(number)), context=Context())
            await queue(db, number + 1)
        await note.acreate(text="first")
        await transaction.__aexit__(None, None, None)
    texts = [row.text for row in await db.list(note.select().order_by(note.id))]
    assert texts == ["first", "0", "1", "2", "3"]
    assert (gate(db).held, gate(db).waiting) == (0, 0)


async def test_readers_do_not_queue(db: Database, note: Any) -> None:
    """While somebody writes, SELECTs and read-only transactions go on."""
    async with db.atomic():
        await note.acreate(text="a")

        async def read() -> int:
            async with db.atomic(read_only=True):
                count: int = await db.count(note.select())
            return count + await db.count(note.select())

        assert await asyncio.create_task(read(), context=Context()) == 0


@pytest.mark.parametrize("end", ["error", "rollback", "refused", "cancelled"])
async def test_the_turn_goes_on_however_a_writer_ends(db: Database, note: Any, end: str) -> None:
    """After an error, a rollback, a refused statement or a cancellation the next one writes."""
    if end == "error":
        with pytest.raises(ZeroDivisionError):
            async with db.atomic():
                await note.acreate(text="a")
                raise ZeroDivisionError
    elif end == "rollback":
        async with db.atomic() as transaction:
            await note.acreate(text="a")
            await transaction.arollback()
    elif end == "refused":
        with pytest.raises(peewee.IntegrityError):
            await db.run(note.insert(text=None).execute)
    else:
        task = asyncio.create_task(_hold(db, note))
        await asyncio.sleep(0)
        while not gate(db).held:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (gate(db).held, gate(db).waiting) == (0, 0)
    await note.acreate(text="b")


async def _hold(db: Database, note: Any) -> None:
    async with db.atomic():
        await note.acreate(text="a")
        await asyncio.Event().wait()


async def test_a_transaction_that_is_left_open_gives_its_turn_back(db: Database, note: Any) -> None:
    """What `db.begin()` began and nobody ended is over with its lease."""
    await db.run(lambda: (db.begin(), note.create(text="a")))
    assert (gate(db).held, gate(db).waiting) == (0, 0)
    assert await db.count(note.select()) == 0


def _commit_in_vain(db: Any, note: Any) -> None:
    db.connection().rollback()
    with pytest.raises(peewee.OperationalError, match="no transaction is active"):
        db.commit()


def _conflict(db: Any, note: Any) -> None:
    with pytest.raises(peewee.IntegrityError):
        db.execute_sql("INSERT OR ROLLBACK INTO note (text) VALUES (NULL)")


def _close(db: Any, note: Any) -> None:
    db.connection().close()
    with pytest.raises(peewee.ProgrammingError):
        note.create(text="b")


@pytest.mark.parametrize(
    "end",
    [
        lambda db, _: db.execute_sql("COMMIT"),
        lambda db, _: db.execute_sql("ROLLBACK"),
        lambda db, _: db.commit(),
        lambda db, _: db.rollback(),
        _commit_in_vain,
        _conflict,
        _close,
    ],
    ids=["COMMIT", "ROLLBACK", "commit", "rollback", "in_vain", "conflict", "close"],
)
async def test_a_transaction_by_hand_gives_its_turn_back_once(
    db: Database, note: Any, end: Callable[[Any, Any], object]
) -> None:
    """However what `db.begin()` began has ended, others write at once, though the connection is
    still held; and when that is given back, nobody else's turn is."""

    def by_hand() -> None:
        with db.manual_commit():
            db.begin()
            note.create(text="a")
            end(db, note)

    async def other() -> None:
        await note.acreate(text="other's")

    async with db.connection_context():
        await db.run(by_hand)
        assert gate(db).held == 0
        await asyncio.create_task(other(), context=Context())
        transaction = db.atomic()
        await asyncio.create_task(transaction.aenter_unbound(), context=Context())
    assert gate(db).held == 1, "somebody else's turn was given back"
    await transaction.aexit_unbound()
    assert (gate(db).held, gate(db).waiting) == (0, 0)


async def test_a_commit_that_leaves_the_transaction_open_keeps_the_turn(db: Database) -> None:
    """Who may still roll back, or mend what a COMMIT has refused, is still the one who writes."""

    class Pair(db.Model):
        other = peewee.ForeignKeyField("self", deferrable="INITIALLY DEFERRED")

    def by_hand() -> None:
        with db.manual_commit():
            db.begin()
            Pair.create(other=7)
            for commit in (db.commit, lambda: db.execute_sql("COMMIT")):
                with pytest.raises(peewee.IntegrityError):
                    commit()
                assert gate(db).held == 1
            Pair.create(id=7, other=7)
            db.execute_sql("COMMIT")

    await db.acreate_tables([Pair])
    async with db.connection_context():
        await db.run(by_hand)
        assert gate(db).held == 0
    assert await db.count(Pair.select()) == 2


@pytest.mark.parametrize("first", ["IMMEDIATE", "DEFERRED"])
async def test_a_second_begin_is_refused_at_once(db: Database, note: Any, first: str) -> None:
    """A `db.begin()` inside of another waits for no turn, which may be its own: SQLite refuses it,
    and the first one goes on."""

    def by_hand() -> None:
        with db.manual_commit():
            db.begin(first)
            note.create(text="a")
            with pytest.raises(peewee.OperationalError, match="within a transaction"):
                db.begin()
            db.commit()

    with anyio.fail_after(10):  # of the patience of 30 seconds
        await db.run(by_hand)
    assert (gate(db).held, gate(db).waiting) == (0, 0)
    assert await db.count(note.select()) == 1


@pytest.mark.parametrize("way", ["statement", "block"])
async def test_a_cancelled_writer_waits_for_no_other(db: Database, note: Any, way: str) -> None:
    """It leaves the queue and gives its connection back at once, though another transaction goes
    on; who waits beside it, waits on."""

    async def write(text: str) -> None:
        if way == "statement":
            await db.run(note.insert(text=text).execute)
        else:
            async with db.atomic():
                await note.acreate(text=text)

    async with db.atomic():
        first, second = (asyncio.create_task(write(text), context=Context()) for text in "ab")
        await queue(db, 2)
        first.cancel()
        with anyio.fail_after(10), pytest.raises(asyncio.CancelledError):  # of 30 seconds
            await first
        assert gate(db).waiting == 1
        assert db.pool_stats.in_use == 2
    await second
    assert [row.text for row in await db.list(note.select())] == ["b"]
    assert (gate(db).held, gate(db).waiting) == (0, 0)


def test_who_is_interrupted_as_its_turn_comes_passes_it_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A turn that is granted in the moment of an interrupt isn't lost, and the error is SQLite's;
    an interrupt of another connection is none."""
    ours, conn, other = Writers(30), object(), object()
    turn, _ = ours.enter(conn=other)

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            ours.interrupt(other)
            assert not self.is_set()
            ours.interrupt(conn)
            turn.release()
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Event", Interrupted)
    with pytest.raises(sqlite3.OperationalError, match="interrupted") as failure:
        ours.enter(conn=conn)
    assert failure.value.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT
    assert failure.value.sqlite_errorname == "SQLITE_INTERRUPT"
    assert (turn.held, turn.waiting) == (0, 0)
    ours.interrupt(conn)  # nobody waits


async def test_patience_has_an_end(db: Database, note: Any) -> None:
    """Past `busy_timeout` a writer gets SQLite's own error, which is answered with 503."""
    db._writers.patience = 0.05
    async with db.atomic():
        with pytest.raises(peewee.OperationalError, match="database is locked") as failure:
            await asyncio.create_task(note.acreate(text="a"), context=Context())
    assert db.transient(failure.value)


@pytest.mark.parametrize("holder", ["ours", "another process's"])
@pytest.mark.parametrize("way", ["thread", "group", "block"])
async def test_a_writer_waits_no_longer_than_a_statement_may_take(
    tmp_path: Path, way: str, holder: str
) -> None:
    """Past `statement_timeout`, where that is less than `busy_timeout`, a writer is answered with
    503, the same for whoever it waits."""
    url = f"sqlite:///{tmp_path}/app.db"
    async with connected(url, pool_size=5, busy_timeout=30, statement_timeout=0.3) as db:

        class Note(db.Model):
            text = peewee.CharField()

        async def block() -> None:
            async with db.atomic():
                pass

        await db.acreate_tables([Note])
        app = make_app(db)

        @app.post("/")
        async def write() -> None:
            if way == "thread":
                await db.run(lambda: Note.insert(text="a").execute())
            elif way == "group":
                await Note.acreate(text="a")
            else:
                await block()

        async with AsyncExitStack() as stack:
            if holder == "ours":
                await stack.enter_async_context(db.atomic())
            else:
                other = stack.enter_context(closing(sqlite3.connect(tmp_path / "app.db")))
                other.execute("BEGIN IMMEDIATE")
            async with client(app) as http:
                with anyio.fail_after(10):
                    request = asyncio.create_task(http.post("/"), context=Context())
                    response = await request
                assert (response.status_code, response.json()["detail"]) == (503, "database busy")
        assert (gate(db).held, gate(db).waiting) == (0, 0)


@pytest.mark.parametrize("way", ["statement", "group", "block"])
async def test_patience_is_for_the_turn_and_the_lock_together(tmp_path: Path, way: str) -> None:
    """Who has waited for its turn waits for another process's writer only for what is left of
    `busy_timeout`; afterwards its connection has again what the application has set."""
    url = f"sqlite:///{tmp_path}/app.db"
    options = {"busy_timeout": 2, "pragmas": {"busy_timeout": 2001}}
    async with connected(url, pool_size=2, **options) as db:

        class Note(db.Model):
            text = peewee.CharField()

        def block() -> None:
            with db.atomic():
                Note.create(text="a")

        await db.acreate_tables([Note])
        ways: dict[str, Callable[[], Any]] = {
            "statement": lambda: db.run(Note.insert(text="a").execute),
            "group": lambda: Note.acreate(text="a"),
            "block": lambda: db.run(block),
        }
        with closing(sqlite3.connect(tmp_path / "app.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            turn, _ = db._writers.enter()
            begun = time.monotonic()
            writing = asyncio.ensure_future(ways[way]())
            await queue(db, 1)
            await asyncio.sleep(1.6)
            turn.release()
            with pytest.raises(peewee.OperationalError, match="database is locked"):
                await writing
            assert 1.9 < time.monotonic() - begun < 3.2  # and not 3.6
        await ways[way]()
        async with db.connection_context(), db.atomic(read_only=True):
            for context in (None, Context()):  # both of the pool's, if there are two
                reading = db.run(lambda: db.execute_sql("PRAGMA busy_timeout").fetchone())
                assert await asyncio.create_task(reading, context=context) == (2001,)


async def test_what_is_left_of_the_patience(db: Database) -> None:
    """SQLite is told what is left, not less than nothing, and in the end what it was told before;
    a wait of no account isn't told. The caller's kind of rows doesn't matter."""

    def look() -> None:
        conn, lease = db.connection(), db._state.lease()

        def told() -> int:
            milliseconds: int = next(iter(conn.execute("PRAGMA busy_timeout").fetchone().values()))
            return milliseconds

        conn.row_factory = lambda cursor, row: {cursor.description[0][0]: row[0]}
        for waited, left in ((0.0, 30000), (0.001, 30000), (10, 20000), (31, 0)):
            with rest_of_patience(lease, waited):
                assert told() == left
            assert told() == 30000

    await db.run(look)


async def test_an_interrupt_as_the_patience_is_told(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is Peewee's error, and the connection waits as long as ever afterwards."""
    told = writers._busy_timeout

    def interrupted(conn: Any, change: str = "") -> int:
        milliseconds = told(conn, change)
        if change == "= 20000":
            raise sqlite3.OperationalError("interrupted")
        return milliseconds

    def hurry() -> int:
        lease = db._state.lease()
        assert lease is not None
        refused = pytest.raises(peewee.OperationalError, match="interrupted")
        with refused, rest_of_patience(lease, 10):
            raise AssertionError
        return told(lease.held.conn)

    monkeypatch.setattr(writers, "_busy_timeout", interrupted)
    assert await db.run(hurry) == 30000


async def test_patience_that_can_not_be_restored(db: Database) -> None:
    """A connection that can't be told again how long it usually waits is used by nobody else."""

    def hurry() -> None:
        lease = db._state.lease()
        assert lease is not None
        conn = lease.held.conn
        with rest_of_patience(lease, 10):
            cursor = conn.execute(ENDLESS)
            next(cursor)
            conn.interrupt()  # which lasts while a cursor is half read
        cursor.close()

    await db.run(hurry)
    told = await db.run(lambda: db.execute_sql("PRAGMA busy_timeout").fetchone())
    assert told == (30000,)


async def test_rows_that_a_write_returns(db: Database, note: Any) -> None:
    """They can be read in every way in which a cursor's rows can."""

    def write() -> list[Any]:
        sql = "INSERT INTO note (text) VALUES ('a'), ('b'), ('c'), ('d') RETURNING text"
        cursor = db.execute_sql(sql)
        assert isinstance(cursor, Returned)
        found: list[Any] = [cursor.fetchone(), cursor.fetchmany(2), next(iter(cursor))]
        found += [cursor.fetchall(), cursor.fetchone(), cursor.description[0][0]]
        cursor.close()
        return found

    assert await db.run(write) == [("a",), [("b",), ("c",)], ("d",), [], None, "text"]
    rows = await db.run(lambda: [r.text for r in note.insert(text="e").returning(note).execute()])
    assert rows == ["e"]


@pytest.mark.parametrize(
    "fetch",
    [
        lambda cursor: cursor.fetchone(),
        lambda cursor: cursor.fetchmany(2),
        lambda cursor: cursor.fetchall(),
        next,
    ],
)
async def test_errors_while_rows_are_fetched_are_peewees(db: Database, fetch: Any) -> None:
    """SQLite reads as it is asked for rows, so that is when it may fail."""

    def read() -> None:
        cursor = db.execute_sql(ENDLESS)
        assert cursor.fetchone() == (1,)
        db.connection().interrupt()
        with pytest.raises(peewee.OperationalError, match="interrupted") as failure:
            fetch(cursor)
        assert isinstance(failure.value.orig, sqlite3.OperationalError)

    await db.run(read)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_after_a_fork_the_queue_is_empty() -> None:
    """Who had the turn in the parent isn't in the child."""
    ours = Writers(0.01)
    ours.enter()
    pid = os.fork()
    if not pid:
        ours.enter()[0].release()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


async def test_many_writers_at_once(db: Database, note: Any) -> None:
    """Of 200 writers none is refused, whatever their number and the pool's."""
    seen: set[int] = set()

    def write(number: int) -> None:
        seen.add(threading.get_ident())
        with db.atomic():
            note.create(text=str(number))

    await asyncio.gather(*(db.run(write, number) for number in range(200)))
    assert await db.count(note.select()) == 200
