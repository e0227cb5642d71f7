"""Time limits on real databases: slow statements, open transactions, silence, cancellation."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing, nullcontext, suppress
from typing import Any

import anyio
import peewee
import pytest

from fastapi_peewee import Database, DatabaseUnavailable, TransactionAborted
from fastapi_peewee.mysql import MySQLDatabase
from fastapi_peewee.postgresql import PostgresqlDatabase
from fastapi_peewee.state import translate_driver_errors
from soak.faults import sessions
from soak.looking import plain_database
from soak.proxy import Proxy
from soak.servers import PostgresServer, Server, frozen
from tests.apps import (
    assert_unavailable,
    back_to_rest,
    client,
    connected,
    make_app,
    until,
    with_all_uses,
)
from tests.faults import nothing_left as nothing_left
from tests.faults import own_database as own_database
from tests.faults import own_server as own_server
from tests.faults import wire as wire

LIMIT = 0.3  # seconds
#: Far more than any limit here, and far less than what would take its time without one.
SOON = 10.0
#: Seconds that a slow statement would take.
LONG = 30


def slow(db: Database) -> str:
    """A statement that takes long, unless it is ended."""
    if isinstance(db, PostgresqlDatabase):
        return f"SELECT pg_sleep({LONG})"
    if isinstance(db, MySQLDatabase):
        return f"SELECT SLEEP({LONG}) FROM (SELECT 1 UNION SELECT 2) AS two"
    return (
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000000000) "
        "SELECT count(*) FROM n"
    )


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with connected(database_url, statement_timeout=LIMIT, pool_size=1) as db:
        yield db


@pytest.fixture
async def note(db: Database) -> Any:
    class Note(db.Model):
        text = peewee.CharField()

    await db.acreate_tables([Note])
    return Note


async def test_a_slow_statement_is_ended_and_answered_with_503(db: Database, note: Any) -> None:
    """A request whose statement takes longer than `statement_timeout` gets 503 with Retry-After,
    its transaction is rolled back, and the next request is answered."""
    app = make_app(db)

    @app.post("/")
    def write() -> int:
        with db.atomic():
            note.create(text="a")
            db.execute_sql(slow(db))
        return 1

    @app.get("/")
    def read() -> int:
        count: int = note.select().count()
        return count

    async with client(app) as http:
        for _ in range(2):
            with anyio.fail_after(SOON):
                response = await http.post("/")
            assert response.status_code == 503
            assert response.json()["detail"] in ("database busy", "database unavailable")
            assert int(response.headers["retry-after"]) >= 1
            await back_to_rest(db)
            assert (await http.get("/")).json() == 0


async def test_the_limit_is_for_each_statement(db: Database) -> None:
    """A call of many statements may take longer; the limit outlives a reset of the session."""

    def many() -> None:
        deadline = time.monotonic() + 3 * LIMIT
        while time.monotonic() < deadline:
            db.execute_sql("SELECT 1").fetchone()

    await db.run(many)
    await db.run(lambda: db.connection() and None)  # what was done with it, nobody knows: reset
    with anyio.fail_after(SOON), pytest.raises(peewee.DatabaseError):
        await db.aexecute_sql(slow(db))


def _fetch_all(db: Database) -> Any:
    return db.execute_sql(SLOW_ROWS).fetchall()


def _fetch_many(db: Database) -> Any:
    cursor = db.execute_sql(SLOW_ROWS)
    while rows := cursor.fetchmany(1):
        assert rows


def _fetch_one(db: Database) -> Any:
    cursor = db.execute_sql(SLOW_ROWS)
    while row := cursor.fetchone():
        assert row


def _iterate(db: Database) -> Any:
    return list(db.execute_sql(SLOW_ROWS))


def _query(db: Database) -> Any:
    return list(db.open_rows(peewee.RawQuery(SLOW_ROWS, _database=db)))


def _stream(db: Database) -> Any:
    return list(db.stream(SLOW_ROWS, (), 1))


def _cursor(db: Database) -> Any:
    with translate_driver_errors:
        cursor = db.cursor()
        cursor.execute("SELECT 1")
        return cursor.execute(slow(db))


#: It takes long after its first row, and then after each hundred thousandth.
SLOW_ROWS = (
    "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000000000) "
    "SELECT i FROM n WHERE i = 1 OR i % 100000 = 0"
)


@pytest.mark.parametrize(
    "read", [_fetch_all, _fetch_many, _fetch_one, _iterate, _query, _stream, _cursor]
)
async def test_the_limit_is_also_for_rows_that_are_fetched(sqlite_url: str, read: Any) -> None:
    """SQLite works as it is asked for rows: however they are read, one by one or at once, the
    statement is ended when its time is over."""
    async with connected(sqlite_url, statement_timeout=LIMIT, pool_size=1) as db:
        with anyio.fail_after(SOON), pytest.raises(peewee.OperationalError, match="interrupted"):
            await db.run(read, db)
        assert (await db.aexecute_sql("SELECT 1"))[0][0] == 1
        await back_to_rest(db)


async def test_the_limit_holds_for_connections_of_a_class_of_ones_own(sqlite_url: str) -> None:
    """`factory` is the class of SQLite's connections, as the driver knows it; time is limited, and
    an interrupted transaction rolled back, as on any other."""

    class Own(sqlite3.Connection):
        pass

    async with connected(sqlite_url, statement_timeout=LIMIT, pool_size=1, factory=Own) as db:

        def work() -> None:
            assert isinstance(db.connection(), Own)
            with pytest.raises(peewee.OperationalError, match="interrupted"), db.atomic():
                rows = db.execute_sql("SELECT 1 UNION ALL SELECT 2")
                rows.fetchone()
                db.execute_sql(slow(db)).fetchone()
            assert not db.connection().in_transaction

        with anyio.fail_after(SOON):
            await db.run(work)


async def test_the_limit_holds_for_who_goes_on(sqlite_url: str) -> None:
    """A call whose statement SQLite has ended, and that goes on, has the same limit for the next
    ones: on the same connection, which isn't kept afterwards."""
    async with connected(sqlite_url, statement_timeout=LIMIT, pool_size=1) as db:

        def many() -> None:
            for _ in range(3):
                with pytest.raises(peewee.OperationalError, match="interrupted"):
                    db.execute_sql(slow(db))
            assert db.execute_sql("SELECT 1").fetchone() == (1,)

        with anyio.fail_after(SOON):
            await db.run(many)
        assert (db.pool_stats.opened, db.pool_stats.discarded) == (1, 1)


async def test_a_transaction_that_stays_open_is_rolled_back(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Past `transaction_timeout` its next statement fails, nothing of it is committed, and the log
    says why."""
    async with connected(database_url, transaction_timeout=LIMIT, pool_size=1) as db:

        class Note(db.Model):
            text = peewee.CharField()

        await db.acreate_tables([Note])
        with anyio.fail_after(SOON), pytest.raises(peewee.DatabaseError):
            async with db.atomic():
                await Note.acreate(text="a")
                while "transaction_timeout" not in caplog.text:
                    await asyncio.sleep(0.01)
                with suppress(peewee.DatabaseError):
                    await Note.acreate(text="b")
        assert await db.count(Note.select()) == 0
        async with db.atomic():
            await Note.acreate(text="c")
        assert await db.count(Note.select()) == 1


async def test_so_is_one_that_is_begun_by_hand(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`transaction_timeout` holds for `db.begin()` as well: such a transaction isn't committed."""
    async with connected(database_url, transaction_timeout=LIMIT, pool_size=1) as db:

        class Note(db.Model):
            text = peewee.CharField()

        def late(read_only: bool) -> None:
            caplog.clear()
            with db.manual_commit(), pytest.raises(peewee.DatabaseError):
                db.begin(read_only=read_only)
                if not read_only:
                    Note.create(text="a")
                until(lambda: "transaction_timeout" in caplog.text)
                db.commit()

        await db.acreate_tables([Note])
        for read_only in (False, True):
            await db.run(late, read_only)
        assert await db.count(Note.select()) == 0


async def test_a_rollback_is_not_interrupted(sqlite_url: str) -> None:
    """SQLite rolls a transaction back that is over its limit, which no longer counts then: an
    interrupt would have it stay open."""
    async with connected(sqlite_url, transaction_timeout=LIMIT, pool_size=1) as db:
        limited: dict[str, bool] = {}

        def late() -> None:
            with pytest.raises(ZeroDivisionError), db.atomic():
                held = db._state.lease().root.held  # type: ignore[union-attr]
                held.conn.set_trace_callback(
                    lambda sql: limited.update({sql: held.transaction is not None})
                )
                db.execute_sql("SELECT 1")
                raise ZeroDivisionError
            held.conn.set_trace_callback(None)

        await db.run(late)
        assert limited == {"SELECT 1": True, "ROLLBACK": False}


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(Database.execute_sql, id="Peewee"),
        pytest.param(lambda db, sql: db.connection().execute(sql), id="driver"),
    ],
)
async def test_a_rollback_beside_rows_that_are_half_read(sqlite_url: str, way: Any) -> None:
    """SQLite rolls a transaction back that was interrupted, though a cursor in it is half read, of
    Peewee's or of the driver's, for which the interrupt lasts. What is written later is stored.
    """
    async with connected(sqlite_url, pool_size=1) as db:

        class Note(db.Model):
            text = peewee.CharField()

        def work() -> None:
            with pytest.raises(ZeroDivisionError), db.atomic():
                Note.create(text="undone")
                cursor = way(db, "SELECT 1 UNION ALL SELECT 2")
                cursor.fetchone()
                db.connection().interrupt()
                with pytest.raises(peewee.OperationalError, match="interrupted"):
                    Note.select().count()
                raise ZeroDivisionError
            cursor.close()
            Note.create(text="kept")

        await db.acreate_tables([Note])
        await db.run(work)
        assert [note.text for note in await db.list(Note.select())] == ["kept"]
        await back_to_rest(db)


@pytest.mark.parametrize("way", ["cancel", "timeout", "scope"])
@pytest.mark.parametrize("place", ["run", "block"])
async def test_the_statement_of_a_cancelled_task_is_ended(
    place: str, way: str, database_url: str
) -> None:
    """Whoever stops waiting for a slow statement doesn't wait for its end, and leaves a connection
    that others can use."""
    async with connected(database_url, pool_size=1) as db:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def statement() -> None:
            loop.call_soon_threadsafe(begun.set)
            db.execute_sql(slow(db))

        async def work() -> None:
            if place == "run":
                await db.run(statement)
            else:
                async with db.atomic():
                    await db.run(statement)

        started = time.monotonic()
        if way == "cancel":
            task = asyncio.create_task(work())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await work()
        else:
            with anyio.move_on_after(0.3) as scope:
                await work()
            assert scope.cancelled_caught
        assert time.monotonic() - started < SOON
        await back_to_rest(db)
        for _ in range(5):
            assert (await db.aexecute_sql("SELECT 1"))[0][0] == 1


async def test_a_call_is_over_though_nobody_answers_what_should_end_its_statement(
    mysql_url: str,
) -> None:
    """The network falls silent as MariaDB or MySQL is told to end the statement of a cancelled
    task: both connections have their limits."""
    options = {"pool_size": 1, "connect_timeout": LIMIT, "statement_timeout": 2 * LIMIT}
    with Proxy(mysql_url) as wire:
        async with connected(wire.url, **options) as db:
            await db.aexecute_sql("SELECT 1")
            wire.swallow_from = b"KILL"
            task = asyncio.create_task(db.aexecute_sql(slow(db)))
            while db.pool_stats.in_use == 0:
                await asyncio.sleep(0.001)
            await asyncio.sleep(LIMIT / 3)
            task.cancel()
            await asyncio.wait({task}, timeout=SOON)
            in_time = task.done()
            wire.cut()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert in_time
            await back_to_rest(db)


@pytest.mark.parametrize("nested", [True, False])
async def test_a_part_of_a_transaction_that_is_cancelled(nested: bool, database_url: str) -> None:
    """The rest of the transaction goes on if that part is a block of its own and has only read. If
    not, the rest goes on, too, or is refused and nothing of it is stored."""
    async with connected(database_url, pool_size=1) as db:

        class Note(db.Model):
            text = peewee.CharField()

        await db.acreate_tables([Note])

        async def whole() -> None:
            async with db.atomic():
                await Note.acreate(text="a")
                with suppress(TimeoutError):
                    async with asyncio.timeout(LIMIT), db.atomic() if nested else nullcontext():
                        await db.aexecute_sql(slow(db))
                await Note.acreate(text="b")

        if nested or not isinstance(db, PostgresqlDatabase):
            await whole()
            assert await db.count(Note.select()) == 2
        else:
            with pytest.raises(peewee.InternalError, match="transaction is aborted"):
                await whole()
            assert await db.count(Note.select()) == 0
        await back_to_rest(db)


async def test_a_part_that_writes_and_is_cancelled_costs_sqlite_the_whole(sqlite_url: str) -> None:
    """SQLite ends the transaction with a statement that writes, also in a block of its own: the
    rest is refused, and nothing of it is stored."""
    async with connected(sqlite_url, pool_size=1) as db:

        class Note(db.Model):
            text = peewee.CharField()

        await db.acreate_tables([Note])
        with pytest.raises(TransactionAborted):
            async with db.atomic():
                await Note.acreate(text="a")
                with suppress(TimeoutError):
                    async with asyncio.timeout(LIMIT), db.atomic():
                        await db.aexecute_sql(f"INSERT INTO note (text) {slow(db)}")
                await Note.acreate(text="b")
        assert await db.count(Note.select()) == 0
        await back_to_rest(db)


async def test_what_a_cut_client_left_behind_is_ended_by_the_server(postgres_url: str) -> None:
    """PostgreSQL looks each second whether the client of a running statement is still there."""
    async with connected(postgres_url, pool_size=1) as db:
        found = await db.aexecute_sql("SHOW client_connection_check_interval")
        assert found[0][0] == "1s"


@pytest.fixture
async def wired(wire: Proxy) -> AsyncIterator[Database]:
    async with connected(wire.url, timeout=1, connect_timeout=1, statement_timeout=LIMIT) as db:
        yield db
        wire.cut()


async def test_a_wire_that_swallows_everything(wired: Database, wire: Proxy) -> None:
    """A request whose connection falls silent is 503 when its time is over."""
    app = make_app(wired)
    paths = with_all_uses(app, wired)
    async with client(app) as http:
        for path in paths:
            with anyio.fail_after(SOON):
                while (await http.get(path)).status_code != 200:
                    await asyncio.sleep(0.05)
            wire.swallowing = True
            with anyio.fail_after(SOON):
                response = await http.get(path)
            assert_unavailable(response)
            await back_to_rest(wired)
            wire.heal()
            wire.cut()


async def test_a_task_that_is_cancelled_in_silence(
    wire: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is over no later than its statement would be: trying to end that takes no longer."""
    monkeypatch.setattr("fastapi_peewee.database.CANCEL_TIMEOUT", 2 * SOON)
    options = {"connect_timeout": 2 * SOON, "statement_timeout": LIMIT}
    async with connected(wire.url, pool_size=1, **options) as db:

        class Note(db.Model):
            text = peewee.CharField()

        await db.acreate_tables([Note])
        for work in (lambda: db.aexecute_sql("SELECT 1"), lambda: Note.acreate(text="a")):
            await db.aexecute_sql("SELECT 1")
            wire.swallowing = True
            task = asyncio.create_task(work())
            await asyncio.sleep(LIMIT / 3)
            task.cancel()
            begun = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - begun < SOON
            await back_to_rest(db)
            wire.heal()
            wire.cut()


@pytest.mark.parametrize(
    ("postgres", "mysql"),
    [(b"statement_timeout", b"group_concat"), (b"client_conn", b"SESSION max")],
)
async def test_a_server_that_falls_silent_as_a_session_is_set_up(
    wire: Proxy, postgres: bytes, mysql: bytes
) -> None:
    """Whoever has waited for the connection has the rest of that time for this, too."""
    options = {"timeout": 1, "connect_timeout": 2 * SOON, "statement_timeout": 2 * SOON}
    async with connected(wire.url, pool_size=1, **options) as db:
        wire.swallow_from = mysql if isinstance(db, MySQLDatabase) else postgres
        lease = await db.pool.acquire()
        begun = time.monotonic()
        asked = asyncio.create_task(db.aexecute_sql("SELECT 1"))
        await asyncio.sleep(LIMIT)
        db.pool.give_back(lease)
        with pytest.raises(DatabaseUnavailable):
            await asked
        assert time.monotonic() - begun < SOON
        await back_to_rest(db)


async def test_a_slow_wire_has_no_more_time_to_connect(wire: Proxy) -> None:
    """`connect_timeout` is for all steps together, each of which would have been in time."""
    wire.latency = 0.15  # in either direction
    async with connected(wire.url, connect_timeout=0.5, statement_timeout=LONG) as db:
        before = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await db.aexecute_sql("SELECT 1")
        assert time.monotonic() - before < 1


async def test_a_session_that_stands_still(own_server: Server, own_database: str) -> None:
    """A statement whose session is frozen at the server fails when its time is over."""
    with Proxy(own_database) as wire:
        async with connected(
            wire.url, pool_size=2, timeout=1, connect_timeout=1, statement_timeout=LIMIT
        ) as db:
            assert (await db.aexecute_sql("SELECT 1"))[0][0] == 1
            with closing(plain_database(own_database)) as admin:
                pids = sessions(admin)
            postgres = isinstance(own_server, PostgresServer)
            with frozen(*(pids if postgres else [own_server.pid])), anyio.fail_after(SOON):
                with pytest.raises(peewee.OperationalError):
                    await db.aexecute_sql("SELECT 1")
                await back_to_rest(db)


async def test_a_server_that_stays_away_is_not_asked_each_time(
    wired: Database, wire: Proxy
) -> None:
    """While the server is away, requests are refused at once, without an attempt for each; when it
    is back, they are answered soon."""
    app = make_app(wired)
    [path, *_] = with_all_uses(app, wired)
    wire.refusing = True
    async with client(app) as http:
        assert_unavailable(await http.get(path))
        before = wired.pool_stats.opened
        for _ in range(100):
            assert_unavailable(await http.get(path))
        wire.heal()
        with anyio.fail_after(SOON):
            while (await http.get(path)).status_code != 200:
                await asyncio.sleep(0.01)
        assert wired.pool_stats.opened == before + 1
