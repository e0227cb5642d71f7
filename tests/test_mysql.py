"""MySQL and MariaDB: what is said to a server, and what is made of what it says."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import peewee
import pymysql
import pytest

from fastapi_peewee import DatabaseUnavailable, OutcomeUnknown, TransactionAborted, connect
from fastapi_peewee.mysql import MySQLDatabase
from soak.proxy import Proxy
from tests.apps import back_to_rest, client, connected, make_app

#: With what a server greets that has TLS to offer: `CLIENT_SSL` is among its capabilities.
GREETING = (
    b"\x0a8.0.0\0\1\0\0\0" + 8 * b"x" + b"\0\xff\xff\x21\2\0\x0f\0\x15"
    + bytes(10) + 12 * b"x" + b"\0mysql_native_password\0"
)  # fmt: skip


@pytest.fixture
async def db(mysql_url: str) -> AsyncIterator[MySQLDatabase]:
    async with connected(mysql_url) as db:
        assert isinstance(db, MySQLDatabase)
        yield db


async def test_a_time_that_can_not_be_rounded_up(db: MySQLDatabase) -> None:
    """MySQL rounds the last moment of the last year up to none: that is 422. MariaDB cuts it."""

    class Note(db.Model):
        at = peewee.DateTimeField()

    await db.acreate_tables([Note])
    app = make_app(db)

    @app.post("/")
    async def write() -> None:
        await Note.acreate(at="9999-12-31 23:59:59.9")

    async with client(app) as http:
        assert (await http.post("/")).status_code == (200 if db.mariadb else 422)


@pytest.mark.parametrize(
    ("mariadb", "setting"),
    [(True, "max_statement_time = 1.500000"), (False, "max_execution_time = 1500")],
)
def test_each_server_is_told_the_limit_in_its_words(mariadb: bool, setting: str) -> None:
    """`statement_timeout` is seconds to MariaDB and milliseconds to MySQL; None is not said."""
    said: list[str] = []

    class Connection:
        _read_timeout: float | None = None

        def query(self, sql: str) -> None:
            said.append(sql)

    db = connect("mysql:///name", mariadb=mariadb)
    db.prepare_session(Connection(), None)
    db.prepare_session(Connection(), 1.5)
    assert said == [f"SET SESSION {setting}"]


@pytest.mark.parametrize("seconds", [0, None])
def test_connecting_without_a_limit_is_refused(seconds: Any) -> None:
    """PyMySQL wants a limit, and says so."""
    db = connect("mysql:///name", connect_timeout=seconds)
    with pytest.raises(ValueError, match="connect_timeout should be"):
        db.connect()


@pytest.mark.parametrize("options", [{}, {"read_timeout": 30}])
async def test_a_server_that_is_silent_in_the_handshake_of_tls(options: dict[str, Any]) -> None:
    """`connect_timeout` holds for it, too, whatever reads have later."""
    writers: list[asyncio.StreamWriter] = []

    def greet(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack("<I", len(GREETING)) + GREETING)
        writers.append(writer)

    server = await asyncio.start_server(greet, "127.0.0.1", 0, family=socket.AF_INET)
    port = server.sockets[0].getsockname()[1]
    async with connected(
        f"mysql://root@127.0.0.1:{port}/name", connect_timeout=0.2, **options
    ) as db:
        asked = asyncio.ensure_future(db.run(lambda: db.execute_sql("SELECT 1")))
        await asyncio.wait({asked}, timeout=10)
        in_time = asked.done()
        for writer in writers:
            writer.transport.abort()
        server.close()
        with pytest.raises(DatabaseUnavailable):
            await asked
        assert in_time
        await back_to_rest(db)


async def test_a_warning_that_says_nothing_of_the_json_is_none_of_ours(db: MySQLDatabase) -> None:
    """Only what was cut is no answer; other warnings are for who reads them."""

    def check() -> Any:
        cursor = db.execute_sql("SELECT CAST('7x' AS SIGNED)")
        assert cursor.warning_count
        db.check_end(cursor, True)
        return cursor.fetchone()

    assert await db.run(check) == (7,)


async def test_a_connection_whose_rows_are_on_their_way_is_open(db: MySQLDatabase) -> None:
    """Something to read is a farewell only if nothing was asked for."""

    def read() -> list[Any]:
        cursor = db.cursor(named_cursor=True)
        cursor.execute("SELECT 7 UNION SELECT 8")
        assert db.is_open(db.connection())
        return list(cursor)

    assert await db.run(read) == [(7,), (8,)]


async def test_a_connection_that_connects_anew_has_no_limit_left(mysql_url: str) -> None:
    """Who connects PyMySQL's object anew doesn't bring back the limit for connecting."""
    async with connected(mysql_url, connect_timeout=0.5) as db:

        def work() -> Any:
            conn = db.connection()
            conn.close()
            conn.connect()
            return db.execute_sql("SELECT SLEEP(0.7)").fetchone()

        assert await db.run(work) == (0,)


async def test_a_transaction_ends_with_its_connection(db: MySQLDatabase) -> None:
    """Who can't be asked whether it is still open has it no more."""

    def deadlocked() -> list[bool]:
        conn = db.open_connection()
        conn.begin()
        error = pymysql.err.OperationalError(1205, "Lock wait timeout exceeded")
        found = [db.ended(conn, error)]
        conn.rollback()
        found.append(db.ended(conn, error))
        conn.close()
        return [*found, db.ended(conn, error), db.ended(conn, peewee.DataError())]

    assert await db.run(deadlocked) == [False, True, True, False]


@pytest.mark.parametrize("times", [1, 2])
async def test_what_is_larger_than_the_server_takes(db: MySQLDatabase, times: int) -> None:
    """A value that the server doesn't read to its end is refused, 422, and nothing is unknown."""

    class Note(db.Model):
        text = peewee.TextField()

    await db.acreate_tables([Note])
    ((limit,),) = await db.aexecute_sql("SELECT @@max_allowed_packet")
    text = "x" * (times * limit)
    app = make_app(db)

    @app.post("/def")
    def write() -> None:
        Note.create(text=text)

    @app.post("/async")
    async def awrite() -> None:
        await Note.acreate(text=text)

    @app.post("/block")
    async def write_in_a_block() -> None:
        async with db.atomic():
            await Note.acreate(text="x")
            await Note.acreate(text=text)

    @app.post("/on")
    async def go_on() -> None:
        async with db.atomic():
            with suppress(peewee.OperationalError):
                await Note.acreate(text=text)
            with pytest.raises(TransactionAborted):
                await Note.acreate(text="x")

    async with client(app) as http:
        for path in ("/def", "/async", "/block"):
            response = await http.post(path)
            assert (response.status_code, response.json()["detail"][0]["type"]) == (422, "data")
            assert await db.run(Note.select().count) == 0  # on another connection
        assert (await http.post("/on")).status_code == 500
    await back_to_rest(db)


async def test_a_statement_that_is_cut_while_it_is_sent(mysql_url: str) -> None:
    """What the server hasn't read to its end it hasn't done: nothing is unknown."""
    with Proxy(mysql_url) as wire:
        async with connected(wire.url) as db:

            class Note(db.Model):
                text = peewee.TextField()

            await db.acreate_tables([Note])
            wire.cut_before = b"INSERT"
            with pytest.raises(peewee.OperationalError) as failure:
                await Note.acreate(text="x" * 15_000_000)
            assert not isinstance(failure.value, OutcomeUnknown)
            wire.heal()
            assert await db.run(Note.select().count) == 0
