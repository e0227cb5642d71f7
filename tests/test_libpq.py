"""Compiled statements on PostgreSQL, given to libpq: in a thread, and on the event loop."""

import asyncio
import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from decimal import Decimal
from types import SimpleNamespace
from typing import Annotated, Any

import anyio
import peewee
import psycopg
import pytest
from fastapi import Depends, FastAPI
from pydantic import BaseModel, field_validator

from fastapi_peewee import (
    BlockingQuery,
    Database,
    InTransaction,
    connect,
    get_db,
    param,
    prepared,
    respond,
)
from fastapi_peewee.libpq import Statements, column
from fastapi_peewee.shapes import MANY
from fastapi_peewee.sockets import Watch
from soak.proxy import Proxy
from tests.apps import back_to_rest, client, connected, make_app

pytestmark = pytest.mark.usefixtures("_used_just_now")

VALUES: list[Any] = [0, -1, 2**15, -(2**31), 2**63 - 1, True, False, None, 0.1, -2.5e300]
VALUES += ["", "é", 'a"b\\c%s%%', "1", 2**63, b"a", Decimal("1.50"), uuid.UUID(int=7), [1, 2]]
VALUES += [datetime.date(2024, 1, 2), datetime.datetime(2024, 1, 2, 3, tzinfo=datetime.UTC)]
REFUSED: list[Any] = ["a\0b", "\ud800", 1 + 0j]


class Out(BaseModel):
    id: int
    text: str


async def connection_of(db: Database) -> Any:
    """The pool's only connection, which isn't handed out: then it would be closed."""
    return await db.run(lambda: db.execute_sql("SELECT 1") and db._state.conn)


@pytest.fixture
async def db(postgres_url: str) -> AsyncIterator[Database]:
    async with connected(postgres_url, pool_size=2) as db:
        yield db


@pytest.fixture
async def note(db: Database) -> Any:
    class Note(db.Model):
        text = peewee.TextField()

    await db.acreate_tables([Note])
    await Note.acreate(text="a")
    return Note


async def _arun(statements: Statements, sql: str, params: list[Any]) -> Any:
    return await statements.arun(sql, params)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which compiled statements are run."""
    seen: list[str] = []
    for kind, name in ((Statements, "run"), (Watch, "ask")):
        original = getattr(kind, name)

        def noting(*args: Any, original: Any = original) -> Any:
            seen.append(threading.current_thread().name)
            return original(*args)

        monkeypatch.setattr(kind, name, noting)
    return seen


def make(db: Database, note: Any) -> FastAPI:
    app = make_app(db)
    Id = Annotated[int, "a row"]

    @app.get("/loop/{id}", response_model=Out)
    async def on_the_loop(id: Id) -> Any:
        return note.select().where(note.id == id)

    @app.get("/thread/{id}", response_model=Out)
    def in_a_thread(id: Id) -> Any:
        return note.select().where(note.id == id)

    return app


@pytest.mark.parametrize("mode", ["thread", "loop"])
@pytest.mark.parametrize("value", VALUES, ids=repr)
async def test_values(db: Database, mode: str, value: Any) -> None:
    """A value is sent as psycopg sends it, whether the statement is new, known or prepared."""
    sql = "SELECT (%s::text || ' %%')::text" if type(value) is str else "SELECT (%s)::text"

    def check() -> None:
        expected = db.execute_sql(sql, [value]).fetchone()[0]
        statements = Statements(db.connection())
        for _ in range(3):
            if mode == "thread":
                found = statements.run(sql, [value])
            else:
                found = asyncio.run(_arun(statements, sql, [value]))
            assert statements.rows(found) == [(expected,)]
            assert column(found) == [expected and expected.encode()] or not expected

    await db.run(check)


async def test_percent_signs_are_psycopgs(db: Database, note: Any) -> None:
    """A percent sign that psycopg refuses is refused each time; formats of values are no matter."""

    def ask(query: Any) -> Any:
        try:
            return query.scalar()
        except peewee.ProgrammingError as error:
            return str(error)

    def check() -> None:
        for sql in ("5 % 3", "'a' LIKE '%a%'", "'a' --%"):
            for _ in range(4):
                assert "placeholder" in ask(note.select(peewee.SQL(sql)))
                db.rollback()
        for n in range(4):
            assert ask(note.select(peewee.SQL("%t || '%%' || %s", [f"{n}", "c"]))) == f"{n}%c"

    await db.run(check)


async def test_what_is_registered_later(db: Database) -> None:
    """What somebody adds to a connection's adapters holds from the next statement on."""

    class Loud(str):
        pass

    class Shouting(psycopg.types.string.StrDumper):
        def dump(self, obj: str) -> bytes:
            return obj.upper().encode()

    class Counting(psycopg.types.numeric.IntLoader):
        def load(self, data: Any) -> int:
            return super().load(data) + 1

    def check() -> None:
        statements = Statements(db.connection())

        def found() -> list[Any]:
            return statements.rows(statements.run("SELECT %s::text, 1", [Loud("a")]))

        assert [found() for _ in range(3)] == [[("a", 1)]] * 3
        db.connection().adapters.register_dumper(Loud, Shouting)
        db.connection().adapters.register_loader("int4", Counting)
        assert [found() for _ in range(3)] == [[("A", 2)]] * 3

    await db.run(check)


async def test_settings_that_change(db: Database) -> None:
    """A value is read as the session's settings have it by now, also if a function set them."""

    def check() -> None:
        statements = Statements(db.connection())
        for zone, hours in (("UTC", 0), ("Asia/Tokyo", 9), ("UTC", 0)):
            statements.run("SELECT set_config('TimeZone', %s, false)", [zone])
            [(now,)] = statements.rows(statements.run("SELECT now()", []))
            assert now.utcoffset() == datetime.timedelta(hours=hours)

    await db.run(check)


@pytest.mark.parametrize("mode", ["thread", "loop"])
@pytest.mark.parametrize("value", REFUSED, ids=repr)
async def test_values_that_are_refused(db: Database, mode: str, value: Any) -> None:
    """A value that can't be sent has psycopg's error, and the connection goes on."""

    def check() -> None:
        with pytest.raises((psycopg.Error, UnicodeError)) as expected:
            db.connection().execute("SELECT %s", [value])
        statements = Statements(db.connection())
        for _ in range(3):
            with pytest.raises(expected.type):
                if mode == "thread":
                    statements.run("SELECT %s", [value])
                else:
                    asyncio.run(_arun(statements, "SELECT %s", [value]))
        assert column(statements.run("SELECT 'a'", [])) == [b"a"]

    await db.run(check)


async def test_where_it_runs(db: Database, note: Any, threads: list[str]) -> None:
    """A query that an `async def` endpoint returns is read on the event loop, once compiled."""
    app = make(db, note)
    async with client(app) as http:
        for path in ["/loop/1", "/loop/1", "/loop/1", "/thread/1"]:
            assert (await http.get(path)).json() == {"id": 1, "text": "a"}
        assert (await http.get("/loop/2")).status_code == 404
    main = threading.current_thread().name
    assert threads[0] != main  # planned and compiled where a connection is
    assert set(threads[1:-2]) == {main}
    assert threads[-2] != main
    assert threads[-1] == main
    assert db.pool_stats.in_use == 0


async def test_prepared_and_respond(db: Database, note: Any, threads: list[str]) -> None:
    """Prepared queries and `respond()` are read on the event loop, too."""
    app = make_app(db)
    one = prepared(note.select().where(note.id == param("id")), Out)

    @app.get("/prepared", response_model=Out)
    async def prepared_one() -> Any:
        return one(id=1)

    @app.get("/respond")
    async def responded() -> Any:
        return respond(note.select(), list[Out])

    async with client(app) as http:
        for path, expected in [
            ("/prepared", {"id": 1, "text": "a"}),
            ("/respond", [{"id": 1, "text": "a"}]),
        ]:
            for _ in range(3):
                assert (await http.get(path)).json() == expected
            assert threads[-2:] == [threading.current_thread().name] * 2


async def test_in_a_transaction(db: Database, note: Any, threads: list[str]) -> None:
    """What a request holds is used: a query returned from its transaction sees what that wrote."""
    app = make_app(db)

    @app.post("/", response_model=list[Out])
    async def write(db: InTransaction) -> Any:
        await note.acreate(text="b")
        return note.select().order_by(note.id)

    @app.get("/", response_model=list[Out], dependencies=[Depends(get_db)])
    async def read() -> Any:
        assert db.pool_stats.in_use == 1
        return note.select().order_by(note.id)

    async with client(app) as http:
        for count in (2, 3):
            assert len((await http.post("/")).json()) == count
            assert len((await http.get("/")).json()) == count
    assert threading.current_thread().name not in threads


async def test_hooks_see_every_statement(db: Database, note: Any) -> None:
    """With a query hook, statements go the way on which it sees them."""
    app = make(db, note)
    seen: list[str] = []
    async with client(app) as http:
        await http.get("/loop/1")
        db.query_hooks.append(lambda event: seen.append(event.sql))
        await http.get("/loop/1")
        await http.get("/thread/1")
    assert len(seen) == 2


async def slow(db: Database, note: Any) -> FastAPI:
    """An endpoint whose query takes long for `/?seconds=…`, compiled."""
    app = make_app(db)

    @app.get("/", response_model=list[Out])
    async def sleep(seconds: float = 0) -> Any:
        return note.select().where(peewee.fn.pg_sleep(seconds).cast("text") == "")

    both = threading.Barrier(2)
    await asyncio.gather(db.run(both.wait), db.run(both.wait))  # opens two connections
    async with client(app) as http:
        assert len((await http.get("/")).json()) == 1
    return app


async def is_running(db: Database) -> bool:
    """Whether the server is busy with the slow query."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%pg_sleep%%' AND state = "
    sql += "'active' AND pid <> pg_backend_pid() AND datname = current_database()"
    return bool((await db.aexecute_sql(sql))[0][0])


async def running(db: Database) -> None:
    """Wait until it is."""
    with anyio.fail_after(5):
        while not await is_running(db):
            await anyio.sleep(0.01)


async def test_cancelled(db: Database, note: Any, threads: list[str]) -> None:
    """A cancelled read is over at the server, too: it gives its slot back, and its connection to
    nobody."""
    app = await slow(db, note)
    async with client(app) as http:
        task = asyncio.create_task(http.get("/?seconds=30"))
        await running(db)
        before = db.pool_stats
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await is_running(db)
        await back_to_rest(db)
        assert threads[-1] == threading.current_thread().name
        assert db.pool_stats.discarded == before.discarded + 1
        assert len((await http.get("/")).json()) == 1


async def test_the_server_ends_the_connection(
    db: Database, note: Any, postgres_url: str, threads: list[str]
) -> None:
    """A connection that the server ends meanwhile is 503 for its request, and replaced."""
    app = await slow(db, note)
    async with client(app) as http:
        task = asyncio.create_task(http.get("/?seconds=30"))
        await running(db)
        await db.aexecute_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE query LIKE '%%pg_sleep%%' AND pid <> pg_backend_pid() "
            "AND datname = current_database()"
        )
        response = await task
        assert response.status_code == 503
        assert threads[-1] == threading.current_thread().name
        await back_to_rest(db)
        for _ in range(3):
            assert len((await http.get("/")).json()) == 1


@pytest.mark.parametrize("mode", ["thread", "loop"])
async def test_statements_that_were_deallocated(db: Database, note: Any, mode: str) -> None:
    """Statements that somebody has deallocated are made again."""
    app = make(db, note)
    async with client(app) as http:
        for _ in range(3):
            assert (await http.get(f"/{mode}/1")).status_code == 200
        await db.aexecute_sql("DEALLOCATE ALL")
        for _ in range(3):
            assert (await http.get(f"/{mode}/1")).json() == {"id": 1, "text": "a"}


async def test_prepared_statements_do_not_pile_up(db: Database, note: Any) -> None:
    """A session that is reset has no more of the statements that we have forgotten."""
    count = "SELECT count(*) FROM pg_prepared_statements"
    for _ in range(10):
        for _ in range(3):
            await note.aget_by_id(1)
        await db.aexecute_sql("SET application_name = 'a'")
    assert db.pool_stats.opened == 1
    assert await db.aexecute_sql(count) == [(0,)]


async def test_an_event_loop_in_a_thread(db: Database, note: Any) -> None:
    """An event loop that is run in the thread of a call is blocked by nothing, either."""

    async def read() -> Any:
        return note.get_by_id(1)

    for _ in range(3):
        await note.aget_by_id(1)  # so that its SQL is known
    with pytest.raises(BlockingQuery):
        await db.run(lambda: asyncio.run(read()))


async def test_errors_are_peewees(db: Database, note: Any) -> None:
    """An error of the server's is Peewee's, over psycopg's; the connection is kept."""
    sql = "SELECT (1 / %s::int)::text"
    await db.count(note.select())  # so that there is a connection that was in use just now
    opened = db.pool_stats.opened
    for divisor in (1, 0, 1, 0):
        if divisor:
            assert await db.aread_texts(sql, [divisor]) == [b"1"]
        else:
            with pytest.raises(peewee.DataError) as failure:
                await db.aread_texts(sql, [divisor])
            assert isinstance(failure.value.__context__, psycopg.errors.DivisionByZero)
    assert db.pool_stats.opened == opened
    assert db.pool_stats.in_use == 0


async def test_many_at_once(db: Database, note: Any) -> None:
    """More requests than connections wait for one, and all are answered."""
    app = make(db, note)
    async with client(app) as http:
        await http.get("/loop/1")
        paths = ["/loop/1", "/thread/1"] * 30
        answers = await asyncio.gather(*(http.get(path) for path in paths))
    assert {answer.text for answer in answers} == {'{"id":1,"text":"a"}'}
    assert db.pool_stats.opened <= 2


async def test_a_pooler_between(postgres_url: str, threads: list[str]) -> None:
    """`prepare_threshold=None`, for poolers that keep no statements, leaves all to psycopg."""
    async with connected(postgres_url, prepare_threshold=None) as db:
        statements = await db.run(lambda: Statements(db.connection()))
        assert not statements.usable

        class Note(db.Model):
            text = peewee.TextField()

        await db.acreate_tables([Note])
        app = make(db, Note)
        async with client(app) as http:
            for path in ("loop", "thread") * 3:
                note = await Note.acreate(text="a")
                answer = (await http.get(f"/{path}/{note.id}")).json()
                assert answer == {"id": note.id, "text": "a"}
                assert (await db.run(Note.get_by_id, note.id)).text == "a"
    assert threads == []


async def test_an_event_loop_that_forgets_a_socket(
    db: Database, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop forgets a socket that has an error, without a word: it is looked at all the same."""
    await db.count(note.select())  # so that there is a connection that was in use just now
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "add_reader", lambda *_: None)
    monkeypatch.setattr(loop, "remove_reader", lambda _: False)
    with anyio.fail_after(5):
        assert await db.aread_texts("SELECT 'a'", []) == [b"a"]


async def test_statements_that_were_prepared_by_us(db: Database, note: Any) -> None:
    """Neither a ROLLBACK nor a DROP is the end of a prepared statement, as it is of psycopg's."""

    def work() -> None:
        for _ in range(7):  # often enough for psycopg to prepare what it is given
            with suppress(LookupError), db.atomic():
                assert note.get_by_id(1).text == "a"
                db.execute_sql("SELECT 1")
                raise LookupError
        db.execute_sql("CREATE TABLE gone (id integer)")
        db.execute_sql("DROP TABLE gone")
        with db.atomic():
            assert note.get_by_id(1).text == "a"

    for _ in range(3):
        await db.run(work)
    assert db.pool_stats.discarded == 0


async def test_descriptors(db: Database, note: Any) -> None:
    """A connection that is closed leaves no descriptor behind, also where an event loop had
    watched it; what a thread has asked for in between ends the watch, and it begins anew."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await db.aexecute_sql("SELECT 1")
        for _ in range(3):
            assert await db.aread_texts("SELECT 'a'", []) == [b"a"]
            await db.aexecute_sql("SELECT pg_sleep(0.01)")
            await asyncio.sleep(0)
        db.close_all()
        await asyncio.sleep(0.01)
    with anyio.fail_after(5):
        while len(os.listdir("/proc/self/fd")) >= before:
            await asyncio.sleep(0.01)


async def test_what_a_socket_does_not_take_at_once(db: Database, note: Any) -> None:
    """A statement that is larger than the socket's buffer is sent as fast as the server reads."""
    conn = await connection_of(db)
    with socket.socket(fileno=os.dup(conn.pgconn.socket)) as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    begun = time.monotonic()
    found = await Statements(conn).arun("SELECT length(%s)::text", ["x" * 20_000_000])
    assert column(found) == [b"20000000"]
    assert time.monotonic() - begun < 3  # in portions, one for each look at the socket, it's 15
    conn.watch.end()


class Broken:
    """libpq's connection, of which nothing can be sent but the first parts."""

    def __init__(self, pgconn: Any, parts: int) -> None:
        self.pgconn = pgconn
        self.flushes = iter([1] * parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pgconn, name)

    def flush(self) -> int:
        for left in self.flushes:
            return left
        raise psycopg.OperationalError("broken")


async def test_cancelled_while_a_statement_is_sent(db: Database, note: Any) -> None:
    """A task that is cancelled before all of its statement is sent waits for no answer: none would
    come."""
    await db.run(note.select().count)
    before = db.pool_stats
    large = db.aexecute_compiled("SELECT length(%s)::text", ["x" * 20_000_000])
    task = asyncio.create_task(large)
    await asyncio.sleep(0)  # the socket takes less than that
    begun = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - begun < db.cancel_timeout / 2
    await back_to_rest(db)
    assert db.pool_stats.discarded == before.discarded + 1

    conn = await connection_of(db)
    broken: Any = SimpleNamespace(closed=False, pgconn=Broken(conn.pgconn, 0))
    assert not db._was_sent(broken)
    conn.close()


async def test_a_connection_that_breaks_while_a_statement_is_sent(
    db: Database, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong while the rest of a statement is sent is the statement's error."""
    conn = await connection_of(db)
    monkeypatch.setattr(Watch.of(conn), "_pgconn", Broken(conn.pgconn, 1))
    with pytest.raises(psycopg.OperationalError, match="broken"):
        await Statements(conn).arun("SELECT pg_sleep(1)", [])
    conn.close()


async def test_a_server_that_can_not_be_told_to_end_a_statement(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is cut: whoever waits for the answer learns that there will be none."""
    with Proxy(postgres_url) as wire:
        async with connected(wire.url, pool_size=1) as db:
            conn = await connection_of(db)
            wire.swallowing = True
            monkeypatch.setattr("fastapi_peewee.database.CANCEL_TIMEOUT", 0.1)
            assert db.interrupt(conn)
            assert not db.is_open(conn)


async def test_a_libpq_that_can_not_be_told_how_long_to_wait(
    db: Database, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpq before 17 isn't asked to cancel, which may take for ever: the connection is cut."""

    def lacks(check: bool = False) -> bool:
        if check:
            raise psycopg.NotSupportedError("libpq is too old")
        return False  # then psycopg cancels without a limit

    monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", lacks)
    statement = "SELECT pg_sleep(60)"

    async def is_running(expected: int) -> None:
        counted = (
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = %s"
            " AND datname = current_database()"
        )
        with anyio.fail_after(10):
            while (await db.aexecute_sql(counted, [statement])).fetchone() != (expected,):
                await asyncio.sleep(0.01)

    task = asyncio.create_task(db.run(db.execute_sql, statement))
    await is_running(1)
    before, begun = db.pool_stats.discarded, time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - begun < 1
    assert db.pool_stats.discarded == before + 1
    await is_running(0)


async def test_a_server_with_much_to_say(
    db: Database, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection on which more and more arrives, as notices, isn't taken for lost."""
    conn = await connection_of(db)
    monkeypatch.setattr("fastapi_peewee.postgresql.readable", lambda _: True)
    assert db.is_open(conn)


async def test_cursors_of_ones_own(db: Database, note: Any) -> None:
    """What `db.execute(query)` returns is read as any cursor, also when its SQL is known."""

    def read() -> list[Any]:
        notes = note.select(note.id, note.text).order_by(note.id)
        with db.atomic():
            note.insert_many([{"text": "b"}, {"text": "c"}, {"text": "d"}]).execute()
            rows = db.execute(notes).fetchall()
            assert [*db.execute(notes)] == rows
            some = db.execute(notes)
            assert some.fetchmany() + some.fetchmany(2) == rows[:3]
            assert [some.fetchone(), some.fetchone()] == [rows[3], None]
            note.delete().where(note.text != "a").execute()
        return [text for _, text in rows]

    for _ in range(3):
        assert await db.run(read) == ["a", "b", "c", "d"]


async def test_statements_that_change_the_session(
    db: Database, note: Any, threads: list[str]
) -> None:
    """They are run in a thread, whose lease is cleaned afterwards."""
    setting = peewee.fn.set_config("app.user", "ada", False)
    for _ in range(3):
        assert (await note.aget(setting == "ada")).text == "a"
    assert threading.current_thread().name not in threads
    found = await db.run(lambda: db.execute_sql("SELECT current_setting('app.user', true)"))
    assert list(found) == [("",)]


async def test_closing_ends_the_watch(db: Database, note: Any) -> None:
    """The descriptor of a connection that is closed is given up at once, though a server that
    is frozen says nothing that would wake the event loop."""
    conn = await connection_of(db)
    await asyncio.sleep(1e-3)
    watch = Watch.of(conn)
    assert watch.end.alive
    conn.close()
    assert not watch.end.alive


async def test_an_event_loop_that_can_not_watch_sockets(
    db: Database, note: Any, monkeypatch: pytest.MonkeyPatch, threads: list[str]
) -> None:
    """On such an event loop, as Windows has one, it is read in a thread, and no connection is
    lost."""

    def refuse(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", refuse)
    before = len(os.listdir("/proc/self/fd"))
    app = make(db, note)
    async with client(app) as http:
        for _ in range(4):
            assert (await http.get("/loop/1")).json() == {"id": 1, "text": "a"}
    assert threading.current_thread().name not in threads
    assert db.pool_stats.discarded == 0
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("mode", ["thread", "loop"])
async def test_what_a_server_no_longer_knows(db: Database, mode: str) -> None:
    """A statement whose table is gone fails, and succeeds when it is back, also with a column of
    another type: in an open transaction at the next try."""

    def work() -> None:
        conn = db.connection()
        statements = Statements(conn)

        def read() -> Any:
            sql = "SELECT a FROM t WHERE a::text = %s"
            found = statements.run(sql, ["1"]) if mode == "thread" else loop_run(statements, sql)
            return statements.rows(found)

        conn.execute("CREATE TABLE t AS SELECT 1 AS a")
        assert read() == [(1,)]
        conn.execute("DROP TABLE t")
        for _ in range(2):  # the first one of these would prepare it
            with pytest.raises(psycopg.errors.UndefinedTable):
                read()
        conn.execute("CREATE TABLE t AS SELECT 1 AS a")
        for _ in range(3):
            assert read() == [(1,)]
        conn.execute("ALTER TABLE t ALTER a TYPE text")
        assert read() == [("1",)]
        conn.execute("BEGIN")
        for _ in range(2):
            assert read() == [("1",)]
        conn.execute("ALTER TABLE t ALTER a TYPE integer USING a::integer")
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            read()
        conn.execute("ROLLBACK")
        assert read() == [("1",)]

    def loop_run(statements: Statements, sql: str) -> Any:
        return asyncio.run(_arun(statements, sql, ["1"]))

    await db.run(work)


async def test_as_many_statements_as_a_connection_knows(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond that number, statements are run without being prepared."""
    monkeypatch.setattr("fastapi_peewee.libpq._MOST", 2)

    def work() -> int:
        conn = db.connection()
        statements = Statements(conn)
        for _ in range(3):
            for number in range(4):
                assert column(statements.run(f"SELECT '{number}'", [])) == [b"%d" % number]
        (count,) = conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()
        return int(count)

    assert await db.run(work) == 2


@pytest.mark.parametrize("mode", ["thread", "loop"])
async def test_statements_with_many_values_are_not_prepared(db: Database, mode: str) -> None:
    """However often they come; that which has one value less is."""

    def work() -> list[int]:
        conn = db.connection()
        statements = Statements(conn)
        for length in (MANY, MANY + 1, MANY + 2, 1000):
            sql = f"SELECT 7 IN ({', '.join(['%s'] * length)})"
            for params in ([*range(length)], [*range(9, length + 9)], [*range(length)]):
                found = (
                    statements.run(sql, params)
                    if mode == "thread"
                    else asyncio.run(_arun(statements, sql, params))
                )
                assert statements.rows(found) == [(7 in params,)]
        assert len(statements._names) == 1
        prepared = conn.execute("SELECT parameter_types FROM pg_prepared_statements")
        return [len(types) for (types,) in prepared]

    assert await db.run(work) == [MANY]


async def test_long_lists_leave_the_server_nothing(postgres_url: str) -> None:
    """Lists of many lengths, in queries and in those that endpoints return with relations."""

    class ItemOut(BaseModel):
        text: str

    class NoteOut(BaseModel):
        id: int
        items: list[ItemOut]

    class StrictItemOut(ItemOut):
        @field_validator("text")
        @classmethod
        def check(cls, text: str) -> str:
            return text

    class StrictOut(BaseModel):
        id: int
        items: list[StrictItemOut]  # Python has to check it: one statement for each relation

    async with connected(postgres_url, pool_size=1) as db:

        class Note(db.Model):
            pass

        class Item(db.Model):
            note = peewee.ForeignKeyField(Note, backref="items")
            text = peewee.TextField()

        await db.acreate_tables([Note, Item])
        ids = range(1, MANY + 31)
        await db.run(Note.insert_many([{"id": i} for i in ids]).execute)
        await Item.acreate(note=MANY, text="a")
        app = make_app(db)

        @app.get("/json", response_model=list[NoteOut])
        async def built(length: int) -> Any:
            return Note.select().where(Note.id << [*ids[:length]]).order_by(Note.id)

        @app.get("/rows", response_model=list[StrictOut])
        def rows(length: int) -> Any:
            return Note.select().order_by(Note.id).limit(length)

        expected = [{"id": i, "items": [{"text": "a"}] if i == MANY else []} for i in ids]
        async with client(app) as http:
            for length in range(MANY + 10, MANY + 30, 3):
                for _ in range(3):
                    for path in ("json", "rows"):
                        answer = await http.get(f"/{path}?length={length}")
                        assert answer.json() == expected[:length]
        counted = "SELECT max(cardinality(parameter_types)) FROM pg_prepared_statements"
        ((most,),) = await db.run(lambda: list(db.execute_sql(counted)))
        assert most < 9


async def test_a_connection_that_was_reset(postgres_url: str) -> None:
    """A reset connection isn't open, though nobody has asked it for anything since."""
    with Proxy(postgres_url) as proxy:
        async with connected(proxy.url) as db:
            conn = await connection_of(db)
            assert db.is_open(conn)
            proxy.resets = True
            proxy.cut()
            with anyio.fail_after(5):
                while db.is_open(conn):
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize(("version", "settings"), [(130000, 1), (140000, 2)])
def test_the_settings_of_a_session(
    monkeypatch: pytest.MonkeyPatch, version: int, settings: int
) -> None:
    """A server before PostgreSQL 14, which doesn't look after its clients, isn't asked to; one
    that doesn't answer is given up."""
    db: Any = connect("postgresql://nobody@nowhere.example/nothing")
    conn = SimpleNamespace(info=SimpleNamespace(server_version=version), pgconn=None)
    asked: list[bytes] = []

    def note_it(_: Any, sql: bytes, __: float) -> bytes:
        asked.append(sql)
        return sql

    monkeypatch.setattr("fastapi_peewee.postgresql.ask", note_it)
    db.prepare_session(conn, 1.5)
    assert asked[0] == b"SET statement_timeout = 1500"
    assert len(asked) == settings
    monkeypatch.setattr("fastapi_peewee.postgresql.ask", lambda *_: None)
    with pytest.raises(peewee.OperationalError, match="connect_timeout"):
        db.prepare_session(conn, 1.5)
