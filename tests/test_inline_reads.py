"""Compiled reads of SQLite on the event loop: at once or, failing that, in a thread."""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import peewee
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from fastapi_peewee import Database, DatabaseUnavailable, InTransaction, connect
from fastapi_peewee import inline as inline_module
from fastapi_peewee.inline import InlineReader
from tests.apps import client, connected, make_app

LONG = 60.0  # seconds: longer than any test


class Out(BaseModel):
    text: str


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with connected(f"sqlite:///{tmp_path}/app.db", inline_reads=LONG) as db:
        yield db


@pytest.fixture
async def note(db: Database) -> Any:
    class Note(db.Model):
        text = peewee.TextField()

    await db.acreate_tables([Note])
    await Note.acreate(text="a")
    return Note


def make(db: Database, note: Any) -> FastAPI:
    app = make_app(db)

    @app.get("/")
    async def read() -> list[Out]:
        return note.select().order_by(note.id)

    @app.get("/changed")
    async def read_changed(db: InTransaction) -> list[Out]:
        await note.acreate(text="uncommitted")
        return note.select().order_by(note.id)

    return app


async def texts(http: Any, path: str = "/") -> list[str]:
    return [row["text"] for row in (await http.get(path)).json()]


async def test_it_needs_no_connection_of_the_pool(db: Database, note: Any) -> None:
    """A query that was compiled before is answered while all connections are in use."""
    async with client(make(db, note)) as http:
        assert await texts(http) == ["a"]
        async with asyncio.TaskGroup() as group:
            held, go = asyncio.Barrier(db.pool.size + 1), asyncio.Event()

            async def hold() -> None:
                async with db.connection_context():
                    await held.wait()
                    await go.wait()

            for _ in range(db.pool.size):
                group.create_task(hold())
            await held.wait()
            assert await texts(http) == ["a"]
            go.set()


async def test_it_sees_what_is_committed_and_nothing_else(db: Database, note: Any) -> None:
    """Each read sees the last commit; inside of a transaction it is the transaction that reads."""
    async with client(make(db, note)) as http:
        for _ in range(2):
            assert await texts(http) == ["a"]
        async with db.atomic():
            await note.acreate(text="b")
            assert await texts(http) == ["a"]
        assert await texts(http) == ["a", "b"]
        for _ in range(2):
            assert (await texts(http, "/changed"))[-1] == "uncommitted"


class Clock:
    """Each look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def database_file(tmp_path: Path) -> str:
    path = str(tmp_path / "numbers.db")
    conn = sqlite3.connect(path)
    conn.execute("CREATE TABLE number (value)")
    conn.executemany("INSERT INTO number VALUES (?)", [(i,) for i in range(1000)])
    conn.commit()
    conn.close()
    return path


def reader(path: str, limit: float = LONG, **options: Any) -> InlineReader:
    made = InlineReader(lambda: sqlite3.connect(path, isolation_level=None), limit, **options)
    made.open()
    return made


QUICK = "SELECT value FROM number LIMIT 1"
SLOW = "SELECT sum(a.value) FROM number a, number b"


def rows(inline: InlineReader, sql: str, params: Any = ()) -> list[Any] | None:
    found = inline.read(sql, params)
    return None if found is None else found.fetchall()


def test_what_takes_too_long_is_stopped_and_avoided_for_a_while(database_file: str) -> None:
    """A statement beyond the limit goes to a thread the next time, then the next 2, 4, … 100 times;
    others don't, and one that was quick again begins anew.
    """
    clock = Clock()
    inline = reader(database_file, limit=3.0, clock=clock)
    assert rows(inline, QUICK) == [(0,)]
    for times in (1, 2, 4, 8, 16, 32, 64, 100, 100):
        before = clock.now
        assert inline.read(SLOW, []) is None
        assert before < clock.now < before + 10  # it was stopped, not merely refused
        for _ in range(times):
            before = clock.now
            assert inline.read(SLOW, []) is None
            assert clock.now == before
    assert rows(inline, QUICK) == [(0,)]
    inline._limit = 1e9
    assert rows(inline, SLOW) == [(499500000,)]
    inline._limit = 3.0
    assert inline.read(SLOW, []) is None
    assert inline._avoided[SLOW].left == 1
    inline.close()


def test_a_locked_database_is_not_waited_for(database_file: str) -> None:
    """Where somebody else has locked the file, the read goes to a thread, which may wait."""
    inline = reader(database_file)
    other = sqlite3.connect(database_file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert inline.read(QUICK, []) is None
    other.execute("ROLLBACK")
    assert rows(inline, QUICK) == [(0,)]
    other.close()
    inline.close()


@pytest.mark.parametrize(
    ("sql", "params"),
    [
        ("DELETE FROM number", []),
        ("SELECT no_such_function()", []),
        ("SELECT ?", [2**64]),
        ("SELECT ?", [object()]),
    ],
)
def test_errors_are_for_the_thread_to_raise(
    sql: str, params: list[Any], database_file: str
) -> None:
    """Nothing is raised here, nothing is written, and the next read works."""
    inline = reader(database_file)
    assert inline.read(sql, params) is None
    assert rows(inline, "SELECT count(*) FROM number") == [(1000,)]
    inline.close()


def test_two_loops_do_not_wait_for_each_other(database_file: str) -> None:
    """While the connection is in use, and when it is closed, a read goes to a thread."""
    inline = reader(database_file)
    with inline._lock:
        assert inline.read(QUICK, []) is None
    first = inline._conn
    inline.open()  # as two loops may do at the same time
    assert inline._conn is first
    inline.close()
    inline.close()
    assert not inline.ready
    assert inline.read(QUICK, []) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_opens_its_own(database_file: str) -> None:
    """SQLite's connections may not be used across a fork, nor closed in the child."""
    inline = reader(database_file)
    pid = os.fork()
    if not pid:
        ready = inline.ready
        inline.open()
        os._exit(0 if not ready and rows(inline, QUICK) == [(0,)] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert rows(inline, QUICK) == [(0,)]
    inline.close()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[InlineReader]]:
    """The readers that have opened a connection, once for each."""
    found: list[InlineReader] = []
    original = InlineReader.open

    def noting(self: InlineReader) -> None:
        found.append(self)
        original(self)

    monkeypatch.setattr(InlineReader, "open", noting)
    yield found
    assert all(each._conn is None for each in found), "a connection was left open"


async def test_its_connection_is_closed_and_renewed_with_the_pools(
    db: Database, note: Any, opened: list[InlineReader]
) -> None:
    """A new function is known to the next read; closing the pool closes this connection, too."""
    async with client(make(db, note)) as http:
        for expected in (1, 2):
            for _ in range(3):
                assert await texts(http) == ["a"]
            assert len(opened) == expected
            db.register_function(lambda: "new", "new_function", 0)
    assert (await db.aread_texts("SELECT new_function()", [])) == [b"new"]
    await db.close_pool()
    assert not opened[-1].ready


async def test_whoever_watches_statements_sees_all_of_them(db: Database, note: Any) -> None:
    """With a query hook, reads go the way on which it is called."""
    seen: list[str] = []
    async with client(make(db, note)) as http:
        assert await texts(http) == ["a"]
        db.query_hooks.append(lambda event: seen.append(event.sql))
        assert await texts(http) == ["a"]
    assert len(seen) == 1


def test_the_setting() -> None:
    """It is seconds, off by default, and can stand in the URL."""
    for url, on in (
        ("sqlite:///:memory:", False),
        ("sqlite:///:memory:?inline_reads=0", False),
        ("sqlite:///:memory:?inline_reads=0.002", True),
    ):
        db: Any = connect(url)
        assert (db._inline is not None) is on
    with pytest.raises(ValueError, match="inline_reads must be seconds"):
        connect("sqlite:///:memory:", inline_reads=-1)


def test_of_statements_without_end_the_last_ones_are_avoided(
    database_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered of slow statements takes no memory without end."""
    monkeypatch.setattr(inline_module, "_REMEMBERED", 2)
    inline = reader(database_file, limit=3.0, clock=Clock())
    for number in range(3):
        assert inline.read(f"{SLOW} -- {number}", []) is None
    assert list(inline._avoided) == [f"{SLOW} -- 2"]
    inline.close()


def test_two_may_close_it_at_once(database_file: str) -> None:
    """The second one has nothing to close; so has who comes later."""
    inline = reader(database_file)

    class Late:
        def acquire(self, *, blocking: bool) -> bool:
            if inline._conn is not None:
                inline._conn.close()
                inline._conn = None
            return blocking

        def release(self) -> None:
            pass

    inline._lock = Late()  # type: ignore[assignment]
    inline.close()
    inline.close()
    assert not inline.ready


async def test_a_file_that_cannot_be_opened_is_the_pools_error(tmp_path: Path) -> None:
    """The one that all get who ask for a connection: 503, and asked for again after a pause."""
    async with connected(f"sqlite:///{tmp_path}/no/such/folder.db", inline_reads=LONG) as db:

        class Number(db.Model):
            value = peewee.IntegerField()

        for _ in range(3):
            with pytest.raises(DatabaseUnavailable):
                await Number.aget_or_none(Number.value == 1)


async def test_single_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`aget` and its like are read on the event loop, and see what was written just before."""
    threads: list[Any] = []
    call = Database.call

    def noting(self: Database, *args: Any) -> Any:
        threads.append(args)
        return call(self, *args)

    monkeypatch.setattr(Database, "call", noting)
    async with connected(f"sqlite:///{tmp_path}/a.db", inline_reads=LONG) as db:

        class Number(db.Model):
            value = peewee.IntegerField()

        await db.acreate_tables([Number])
        for value in range(5):
            made = await Number.acreate(value=value)
            threads.clear()
            assert (await Number.aget(Number.value == value)).id == made.id
            assert (await Number.aget_by_id(made.id)).value == value
            assert await Number.aget_or_none(Number.value == -1) is None
            with pytest.raises(Number.DoesNotExist):
                await Number.aget_by_id(99)
        assert not threads
