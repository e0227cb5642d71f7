"""SQLite's files across a fork: what is closed before it, and what its child is refused."""

import asyncio
import gc
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peewee
import pytest
from fastapi import FastAPI

from fastapi_peewee import ConnectedDb, Database, LeaseForked, connect
from fastapi_peewee.files import file_of
from fastapi_peewee.refusals import kind_of
from tests.apps import client, connected, make_app

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/app.db"


@pytest.fixture
async def db(url: str) -> AsyncIterator[Database]:
    async with connected(url, inline_reads=60.0) as db:
        await db.acreate_tables([note_of(db)])
        yield db


def note_of(db: Database) -> Any:
    class Note(db.Model):
        text = peewee.TextField()

    return Note


def texts(db: Database) -> list[str]:
    note = note_of(db)
    with db.allow_sync():
        return [each.text for each in note.select().order_by(note.id)]


async def read_on_the_loop(db: Database) -> bool:
    return bool(await db.aread_texts("SELECT text FROM note", []))


def outcome(code: Callable[[], object]) -> str:
    """What came of code in a forked process: "done", or its error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "done"
        try:
            thread = threading.Thread(target=lambda: results.append(caught(code)))
            results: list[str] = []
            thread.start()  # where no lease and no event loop of the parent's is
            thread.join()
            said = results[0]
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


def caught(code: Callable[[], object]) -> str:
    try:
        code()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def child_of(db: Database) -> str:
    """What comes of a child that writes, in each way, and closes its connections."""

    def code() -> None:
        db.connect(reuse_if_open=True)
        note_of(db).create(text="child")
        asyncio.run(write())

    async def write() -> None:
        await note_of(db).acreate(text="child")
        assert await read_on_the_loop(db)
        await db.close_pool()

    return outcome(code)


REFUSED = f"LeaseForked: {LeaseForked.OPEN_FILE}"


# What is closed


async def test_what_nobody_uses_is_closed(db: Database) -> None:
    """Idle connections, the reader's on the event loop and the one of the thread that forks: a
    child works, and the parent goes on."""
    note = note_of(db)
    await note.acreate(text="parent")
    assert await read_on_the_loop(db)
    assert texts(db) == ["parent"]
    assert not db.is_closed()
    assert db.pool_stats.idle == 1
    assert child_of(db) == "done"
    assert db.is_closed()
    assert db.pool_stats.idle == 0
    await note.acreate(text="parent")
    assert texts(db) == ["parent", "child", "child", "parent"]
    assert await read_on_the_loop(db)
    db.close()


def used_by_a_def_endpoint(app: FastAPI, db: Database, fork: Callable[[], None]) -> None:
    @app.get("/")
    def endpoint() -> None:
        note_of(db).create(text="parent")
        fork()
        note_of(db).create(text="parent")


def used_by_an_async_endpoint(app: FastAPI, db: Database, fork: Callable[[], None]) -> None:
    @app.get("/")
    async def endpoint(_: ConnectedDb) -> None:
        await note_of(db).acreate(text="parent")
        fork()
        await note_of(db).acreate(text="parent")


def used_by_a_block(app: FastAPI, db: Database, fork: Callable[[], None]) -> None:
    @app.get("/")
    async def endpoint() -> None:
        async with db.connection_context():
            await note_of(db).acreate(text="parent")
            fork()
            async with db.atomic():
                await note_of(db).acreate(text="parent")


@pytest.mark.parametrize(
    "used", [used_by_a_def_endpoint, used_by_an_async_endpoint, used_by_a_block]
)
async def test_what_a_request_holds_is_closed_between_its_transactions(
    used: Any, db: Database
) -> None:
    """The request, or block, goes on with another connection."""
    app = make_app(db)
    outcomes: list[str] = []
    used(app, db, lambda: outcomes.append(child_of(db)))
    async with client(app, raises=True) as http:
        assert (await http.get("/")).status_code == 200
    assert outcomes == ["done"]
    assert db.pool_stats.in_use == 0
    assert texts(db) == ["parent", "child", "child", "parent"]
    db.close()


async def test_databases_in_memory_stay(tmp_path: Path) -> None:
    """They would be gone with their last connection. The child has a copy of its own."""
    shared: dict[str, Any] = {"database": f"file:{tmp_path.name}?mode=memory&cache=shared"}
    for options in ({}, {**shared, "uri": True, "pragmas": {"journal_mode": "memory"}}):
        async with connected("sqlite:///:memory:", **options) as db:
            await db.acreate_tables([note_of(db)])
            await note_of(db).acreate(text="parent")
            idle = db.pool_stats.idle
            with db.allow_sync(), db.atomic(read_only=True):
                assert outcome(lambda db=db: note_of(db).create(text="child")) == "done"  # type: ignore[misc]
            assert db.pool_stats.idle == idle > 0
            assert texts(db) == ["parent"]
            db.close()


# What is refused


@contextmanager
def in_a_block(db: Database) -> Iterator[None]:
    with db.allow_sync(), db.atomic(read_only=True):
        yield


@contextmanager
def in_manual_commit(db: Database) -> Iterator[None]:
    with leased(db), db.allow_sync(), db.manual_commit():
        yield


@contextmanager
def half_read(db: Database) -> Iterator[None]:
    with db.allow_sync():
        rows = iter(note_of(db).select().iterator())
        next(rows)
        yield
        assert next(rows, None) is not None


@contextmanager
def with_a_temporary_table(db: Database) -> Iterator[None]:
    with db.allow_sync():
        db.execute_sql("CREATE TEMPORARY TABLE mine (id)")
        yield
        db.execute_sql("SELECT * FROM mine")


@contextmanager
def handed_out(db: Database) -> Iterator[None]:
    with db.allow_sync():
        conn = db.connection()
        yield
        assert conn.execute("SELECT 1").fetchone() == (1,)


@contextmanager
def without_autoconnect(db: Database) -> Iterator[None]:
    db.autoconnect = False
    with db.allow_sync():
        db.connect()
        yield
        assert texts(db)
    db.autoconnect = True


@contextmanager
def in_a_changed_session(db: Database) -> Iterator[None]:
    with leased(db) as lease:
        lease.tainted = True
        yield


@contextmanager
def in_a_lease_that_reads(db: Database) -> Iterator[None]:
    with leased(db), db.allow_sync(), db.connection_context(), half_read(db):
        yield


@contextmanager
def with_its_turn_taken(db: Database) -> Iterator[None]:
    with leased(db) as lease:
        assert lease.turn.acquire_nowait()
        yield
        lease.turn.release()


@contextmanager
def with_its_turn_just_decided(db: Database) -> Iterator[None]:
    with leased(db) as lease, lease.turn._lock:
        yield


@contextmanager
def leased(db: Database) -> Iterator[Any]:
    lease = db.pool.acquire_blocking()
    db.pool.connect(lease)
    lease.give_turn()
    token = db._state.bind(lease)
    try:
        yield lease
    finally:
        db._state._state.reset(token)
        db.pool.give_back(lease)


@contextmanager
def with_the_pool_just_used(db: Database) -> Iterator[None]:
    assert db.pool_stats.idle
    with db.pool._lock:
        yield


@contextmanager
def with_the_reader_in_use(db: Any) -> Iterator[None]:
    assert db._inline.ready
    with db._inline._lock:
        yield


@contextmanager
def by_another_thread(db: Database) -> Iterator[None]:
    opened, go_on = threading.Event(), threading.Event()

    def run() -> None:
        db.connect()
        opened.set()
        assert go_on.wait(30)
        db.close()

    thread = threading.Thread(target=run)
    # With nothing else to look at, a child's first act is to collect what only that thread had.
    gc.freeze()
    gc.collect()
    thresholds = gc.get_threshold()
    thread.start()
    try:
        assert opened.wait(30)
        gc.set_threshold(1, 1, 1)
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        go_on.set()
        thread.join()


IN_USE = [
    in_a_block,
    in_manual_commit,
    half_read,
    with_a_temporary_table,
    handed_out,
    without_autoconnect,
    in_a_changed_session,
    in_a_lease_that_reads,
    with_its_turn_taken,
    with_its_turn_just_decided,
    with_the_pool_just_used,
    with_the_reader_in_use,
    by_another_thread,
]


@pytest.mark.parametrize("in_use", IN_USE)
async def test_what_is_in_use_stays_and_its_file_is_refused_in_the_child(
    in_use: Any, db: Database
) -> None:
    """Nothing of it is lost, and nothing that the child would write. A child that is forked later
    works."""
    note = note_of(db)
    await db.run(note.insert_many([{"text": "parent"}] * 3).execute)
    assert await read_on_the_loop(db)
    with in_use(db):
        assert child_of(db) == REFUSED
    db.close()
    assert child_of(db) == "done"
    assert texts(db) == ["parent"] * 3 + ["child"] * 2
    db.close()


async def test_the_refusal_is_a_mistake_of_the_program(db: Database) -> None:
    """It is no 503, isn't tried again, and isn't what a database says that is away."""
    tries: list[None] = []

    @db.retry
    def write() -> None:
        tries.append(None)
        note_of(db).create(text="child")

    def code() -> None:
        for _ in range(5):
            with pytest.raises(LeaseForked) as failure:
                write()
            assert kind_of(failure.value) is None
            with pytest.raises(LeaseForked):
                asyncio.run(db.run(write))
        assert db.pool._breaker.admits()
        assert len(tries) == 0

    with db.allow_sync(), db.atomic():
        assert outcome(code) == "done"
    db.close()


async def test_a_file_is_refused_by_any_name(db: Database, url: str, tmp_path: Path) -> None:
    """Another database object for it, by way of a link, as a URI, or attached."""
    file = tmp_path / "app.db"
    (tmp_path / "link.db").symlink_to(file)
    (tmp_path / "other.db").touch()
    attaching = connect(f"sqlite:///{tmp_path}/other.db")
    attaching.attach(str(file), "app")
    named = [
        connect(url),
        connect(f"sqlite:///{tmp_path}/link.db"),
        connect(url, database=f"file:{file}?mode=rw", uri=True),
        attaching,
    ]
    other = connect(f"sqlite:///{tmp_path}/other.db")
    with db.allow_sync(), db.atomic():
        for each in named:
            assert outcome(each.connect) == REFUSED
        assert outcome(other.connect) == "done"
    with attaching.allow_sync(), attaching.atomic():
        assert outcome(db.connect) == REFUSED
    attaching.close()
    assert outcome(db.connect) == "done"
    db.close()


async def test_a_grandchild_is_refused_what_its_parent_was(db: Database) -> None:
    """The locks are no more its than they were its parent's."""

    def child() -> None:
        assert child_of(db) == REFUSED

    with db.allow_sync(), db.atomic():
        assert outcome(child) == "done"
    assert outcome(lambda: child_of(db) == "done" or os._exit(1)) == "done"
    db.close()


@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
async def test_what_is_not_open_any_more_is_not_refused(db: Database, tmp_path: Path) -> None:
    """Nor what could not be opened, or was collected."""
    missing = connect(f"sqlite:///{tmp_path}/no/folder.db")
    failure = None
    try:
        with missing.allow_sync():
            missing.connect()
    except peewee.OperationalError as error:
        failure = error  # its traceback has the connection
    assert failure is not None
    (tmp_path / "no").mkdir()
    assert outcome(missing.connect) == "done"
    thread = threading.Thread(target=texts, args=(db,))
    thread.start()
    thread.join()
    gc.collect()
    assert outcome(db.connect) == "done"


async def test_a_fork_raises_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be closed counts as open."""

    def fail(**_: object) -> None:
        raise sqlite3.OperationalError

    texts(db)
    monkeypatch.setattr(db.pool, "close_idle", fail)
    assert outcome(db.connect) == REFUSED
    db.close()


@pytest.mark.parametrize(
    ("database", "uri", "found"),
    [
        (":memory:", False, None),
        ("", False, None),
        ("file::memory:?cache=shared", True, None),
        ("file:/a/b?mode=memory", True, None),
        ("file:/a/b?vfs=memdb", True, None),
        ("/a/b", True, "/a/b"),
        (Path("/a/c/../b"), False, "/a/b"),
        ("file:/a/b%20c?mode=ro", True, "/a/b c"),
        ("file:///a/b", True, "/a/b"),
    ],
)
def test_the_file_that_a_name_means(database: Any, uri: bool, found: str | None) -> None:
    """As SQLite understands names and URIs."""
    assert file_of(database, uri=uri) == found
