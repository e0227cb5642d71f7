"""`connect(url)`: what it makes of a URL, and how it sets up each kind of database."""

import asyncio
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import peewee
import pytest

from fastapi_peewee import BlockingQueryWarning, DatabaseUnavailable, PoolStats, connect
from fastapi_peewee.database import changes_session
from fastapi_peewee.mysql import MySQLDatabase
from fastapi_peewee.postgresql import PostgresqlDatabase
from fastapi_peewee.sqlite import SqliteDatabase
from tests.apps import connected


@pytest.mark.parametrize(
    ("url", "kind", "name", "parameters"),
    [
        ("sqlite:///app.db", SqliteDatabase, "app.db", {}),
        ("sqlite:////var/app.db", SqliteDatabase, "/var/app.db", {}),
        (
            "postgresql://u%40x:p%2Fw@h:5433/name",
            PostgresqlDatabase,
            "name",
            {"user": "u@x", "password": "p/w", "host": "h", "port": 5433},
        ),
        ("postgres:///name?host=/run/pg", PostgresqlDatabase, "name", {"host": "/run/pg"}),
        (
            "postgresql://u:p%40%2F@%2FRun%2Fpg:5433/name",
            PostgresqlDatabase,
            "name",
            {"user": "u", "password": "p@/", "host": "/Run/pg", "port": 5433},
        ),
        (
            "postgresql://u@[fe80::1%25Eth0]:5433/name",
            PostgresqlDatabase,
            "name",
            {"user": "u", "host": "fe80::1%Eth0", "port": 5433},
        ),
        (
            "postgresql://%2FRun/name?host=a,b&port=1,2",
            PostgresqlDatabase,
            "name",
            {"host": "a,b", "port": "1,2"},
        ),
        ("mysql://u@%2FRun%2Fmy.sock/name", MySQLDatabase, "name", {"unix_socket": "/Run/my.sock"}),
        (
            "mariadb:///name?host=/run/my.sock",
            MySQLDatabase,
            "name",
            {"unix_socket": "/run/my.sock"},
        ),
        (
            "mysql://u:p%2Fw@h/name",
            MySQLDatabase,
            "name",
            {"user": "u", "password": "p/w", "host": "h", "charset": "utf8mb4"},
        ),
        ("mariadb://u@h:3307/name", MySQLDatabase, "name", {"user": "u", "port": 3307}),
    ],
)
def test_a_url_says_it_all(url: str, kind: type, name: str, parameters: dict[str, Any]) -> None:
    """Scheme, credentials, host, port, name and options come from the URL, percent-decoded."""
    db = connect(url)
    assert type(db) is kind
    assert isinstance(db, kind.__mro__[2])
    assert db.database == name
    assert parameters.items() <= db.connect_params.items()


def test_pool_settings_may_stand_in_the_url() -> None:
    """Settings after the `?` are those of `connect`, and don't reach the driver."""
    db = connect("postgresql:///name?pool_size=3&timeout=0.5&max_waiting=7&max_lifetime=60")
    pool = db.pool
    assert (pool.size, pool.timeout, pool.max_waiting, pool.max_lifetime) == (3, 0.5, 7, 60)
    assert db.connect_params == {"connect_timeout": 5, "client_encoding": "UTF8"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("oracle://h/name", "scheme 'oracle'.*sqlite:///app.db"),
        ("app.db", "scheme ''"),
        ("postgresql://name", "names no database.*postgresql:///name"),
        ("sqlite://app.db", "names no database.*sqlite:///name"),
        ("postgresql://u@a:1,b:2/name", r"Several hosts.*\?host=a,b&port=5432,5433"),
        ("sqlite:///a.db?pool_size=0", "pool_size must be at least 1, got: 0"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, message: str) -> None:
    """A `ValueError` says what is wrong with a URL, and how it is written."""
    with pytest.raises(ValueError, match=message):
        connect(url)


def test_an_error_doesnt_show_the_password() -> None:
    """The message about a bad URL holds nothing of its credentials."""
    with pytest.raises(ValueError, match="names no database") as failure:
        connect("postgresql://user:secret@host")
    assert "secret" not in str(failure.value)


def test_nothing_is_opened_before_the_first_use(tmp_path: Path) -> None:
    """`connect` creates no file and asks no server."""
    connect(f"sqlite:///{tmp_path}/app.db")
    connect("postgresql://nobody@127.0.0.1:1/nothing")
    assert list(tmp_path.iterdir()) == []


def test_sqlite_is_set_up_for_a_server(sqlite_url: str) -> None:
    """A SQLite file has a write-ahead log and foreign keys, and settings given are kept."""
    db = connect(sqlite_url, pragmas={"cache_size": -1000}, busy_timeout=2)
    assert (db.journal_mode, db.foreign_keys, db.cache_size) == ("wal", 1, -1000)
    assert db.pragma("busy_timeout") == 2000
    db.close()
    db = connect(sqlite_url, pragmas={"foreign_keys": 0})
    assert db.foreign_keys == 0
    db.close()


async def test_a_sqlite_file_that_can_not_be_opened(tmp_path: Path) -> None:
    """The error speaks of the file and its directory, not of a server, and of what opens one that
    is only read, which is so."""
    file = tmp_path / "app.db"
    with closing(sqlite3.connect(file)) as conn:
        conn.execute("CREATE TABLE note AS SELECT 'a' AS text")
        conn.commit()

    async def read(url: str = "sqlite:///app.db", **options: Any) -> Any:
        async with connected(url, **options) as db:
            return await db.run(lambda: db.execute_sql("SELECT text FROM note").fetchall())

    refused: list[dict[str, Any]] = [
        {"url": f"sqlite:///{tmp_path}/nowhere/app.db"},
        {"database": f"file:{file}?mode=ro", "uri": True},
    ]
    for options in refused:
        with pytest.raises(DatabaseUnavailable, match=r"directory .* must exist and be") as failure:
            await read(**options)
        assert "server" not in str(failure.value)
        for advice in ('pragmas={"journal_mode": "delete"}', '?immutable=1", uri=True'):
            assert advice in str(failure.value)
    opened: list[dict[str, Any]] = [
        {"database": f"file:{file}?mode=ro", "uri": True, "pragmas": {"journal_mode": "delete"}},
        {"database": f"file:{file}?immutable=1", "uri": True},
    ]
    for options in opened:
        assert await read(**options) == [("a",)]


@pytest.mark.parametrize(
    ("url", "module", "advice"),
    [
        ("postgresql:///app", "psycopg", r"psycopg 3, .* pip install 'fastapi-peewee\[postgres\]'"),
        ("mysql:///app", "pymysql", r"PyMySQL, .* pip install 'fastapi-peewee\[mysql\]'"),
    ],
)
def test_a_driver_that_is_missing_is_named_at_once(
    url: str, module: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`connect()` says which one, and how to get it, though it opens nothing yet."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(peewee.ImproperlyConfigured, match=advice):
        connect(url)


def test_sqlite_transactions_wait_for_each_other(sqlite_url: str) -> None:
    """Of a hundred read-modify-write transactions in twenty threads none fails or is lost."""
    db = connect(sqlite_url)

    class Counter(db.Model):
        value = peewee.IntegerField(default=0)

    db.create_tables([Counter])
    Counter.create()

    def increment(_: int) -> None:
        with db.connection_context(), db.atomic():
            counter = Counter.get()
            counter.value += 1
            counter.save()

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(increment, range(100)))
    assert Counter.get().value == 100
    db.close()


async def test_a_read_only_transaction_doesnt_wait_for_a_writer(sqlite_url: str) -> None:
    """`atomic(read_only=True)` reads beside a writing transaction, and refuses to write."""
    db = connect(sqlite_url)

    class Row(db.Model):
        name = peewee.CharField()

    await db.acreate_tables([Row])
    reading, read = asyncio.Event(), asyncio.Event()

    async def write() -> None:
        async with db.atomic():
            await Row.acreate(name="a")
            reading.set()
            await read.wait()

    writer = asyncio.create_task(write())
    await reading.wait()
    async with db.atomic(read_only=True):
        assert await db.count(Row.select()) == 0
        with pytest.raises(peewee.OperationalError, match="readonly"):
            await Row.acreate(name="b")
    read.set()
    await writer
    assert await db.run(lambda: [Row.create(name="c").name, db.pragma("query_only")]) == ["c", 0]
    await db.close_pool()


async def test_a_database_in_memory_is_one_for_all() -> None:
    """All threads and tasks see the same `:memory:` database, and another `connect` has its own."""
    db, other = connect("sqlite:///:memory:"), connect("sqlite://")

    class Row(db.Model):
        name = peewee.CharField(unique=True)

    await db.acreate_tables([Row])
    await asyncio.gather(*(Row.acreate(name=str(n)) for n in range(30)))
    assert await db.count(Row.select()) == 30
    counts: list[int] = []

    def count() -> None:
        counts.append(Row.select().count())
        db.close()

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    await db.close_pool()
    assert counts == [30]
    assert await db.count(Row.select()) == 30, "it outlives its pool"
    assert await other.run(other.get_tables) == []
    async for row in db.iterate(Row.select()):
        await Row.update(name=f"{row.name}!").where(Row.id == row.id).aexecute()
    assert (await Row.aget_by_id(1)).name.endswith("!")
    await db.close_pool()
    await other.close_pool()


async def test_functions_reach_connections_that_exist_already(sqlite_url: str) -> None:
    """A function registered late is there on every pooled connection, idle or in use."""
    db = connect(sqlite_url)

    async with db.connection_context():
        await db.run(db.register_function, lambda x: x + 1, "plus_one", 1)
    assert await db.run(lambda: db.execute_sql("SELECT plus_one(1)").fetchone()) == (2,)
    await db.close_pool()


async def test_permanent_pragmas_reach_connections_that_exist_already(sqlite_url: str) -> None:
    """A pragma made permanent late holds on every pooled connection, idle or in use."""
    db = connect(sqlite_url)

    def elsewhere() -> None:
        db.pragma("cache_size", 77, permanent=True)
        db.close()

    async with db.connection_context():
        assert await db.run(db.pragma, "cache_size") != 77
        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
    assert await db.run(db.pragma, "cache_size") == 77
    await db.close_pool()


def test_a_database_in_memory_is_let_go_when_another_is_opened() -> None:
    """`db.init` again, as test fixtures do it, frees the memory of the database before."""
    db = connect("sqlite://")
    names = []
    for _ in range(3):
        db.init(":memory:")
        db.execute_sql("CREATE TABLE row (id INTEGER)")
        names.append(db.database)
        db.close()
    for name in names[:-1]:
        conn = sqlite3.connect(name, uri=True)
        assert conn.execute("SELECT name FROM sqlite_master").fetchall() == []
        conn.close()
    db.execute_sql("SELECT * FROM row")
    db.close()


async def test_counters_tell_what_the_pool_does(database_url: str) -> None:
    """`pool_stats` counts what is in use, idle, opened and closed."""
    db = connect(database_url, pool_size=2)
    assert db.pool_stats == PoolStats(0, 0, 0, 0, 0, 0, 0)
    async with db.atomic():
        assert db.pool_stats == PoolStats(1, 0, 0, 1, 0, 0, 0)
    assert db.pool_stats == PoolStats(0, 1, 0, 1, 0, 0, 0)
    assert await db.close_pool()
    assert db.pool_stats == PoolStats(0, 0, 0, 1, 0, 0, 0)


@pytest.mark.parametrize("level", ["READ COMMITTED", "repeatable read", "SERIALIZABLE", None])
async def test_isolation_levels_are_those_of_the_standard(
    database_url: str, level: str | None
) -> None:
    """`atomic` takes the four standard levels, in any case, by position or by name."""
    db = connect(database_url)

    def current() -> str:
        if isinstance(db, PostgresqlDatabase):
            return str(db.execute_sql("SHOW transaction_isolation").fetchone()[0]).upper()
        return (level or "").upper()

    expected = "READ COMMITTED" if level is None and isinstance(db, PostgresqlDatabase) else level
    for read_only in (False, True):
        async with db.atomic(isolation_level=level, read_only=read_only):
            assert await db.run(current) == (expected or "").upper()
    async with db.atomic(level):
        assert await db.run(current) == (expected or "").upper()
    await db.close_pool()


async def test_an_isolation_level_is_never_sql(database_url: str) -> None:
    """Anything but a standard level is refused before it reaches the database."""
    db = connect(database_url)
    with pytest.raises(ValueError, match="isolation_level must be one of"):
        async with db.atomic(isolation_level="SERIALIZABLE; DROP TABLE x"):
            pass
    assert db.pool_stats.in_use == 0
    await db.close_pool()


@pytest.mark.parametrize(
    ("sql", "changes"),
    [
        ('SELECT "t1"."id" FROM "user" AS "t1"', False),
        ("(SELECT 1) UNION (SELECT 2)", False),
        ('INSERT INTO "user" ("name") VALUES (%s) RETURNING "id"', False),
        ('UPDATE "user" SET "name" = %s', False),
        ('WITH "x" AS (SELECT 1) SELECT * FROM "x"', False),
        ("SAVEPOINT s1", False),
        ('UPDATE "temperature" SET "v" = ("temperature"."v" + 1)', False),
        ('CREATE TABLE IF NOT EXISTS "x" ("id" INTEGER)', False),
        ("select 1", False),
        ('\n    SELECT "id"\n    FROM "user"\n', False),
        ("-- the users'\n/* all of them */ (select 1)", False),
        ("SHOW TABLES", False),
        ("PRAGMA user_version", False),
        ("SET LOCAL sql_mode = ''", True),
        ("--\nSET a = 1\nSELECT 1", True),
        ("-- a\rSET a = 1\nSELECT 1", True),
        ("/*! SET a = 1 */ SELECT 1", True),
        ("/*M! SET a = 1 */ SELECT 1", True),
        ("/* /* */ SELECT 1 */ SET a = 1", True),
        ("SELECT 8 INTO@x", True),
        ("EXPLAIN ANALYZE CREATE TEMP TABLE x AS SELECT 1", True),
        ("UPDATE pg_settings SET setting = 'x' WHERE name = 'application_name'", True),
        ("SET TRANSACTION READ ONLY", True),
        ("SELECT 1; SET a.b = 'c'", True),
        ("CREATE TABLE pg_temp.x (y INTEGER)", True),
        ('CREATE TABLE "temp"."x" (y INTEGER)', True),
        ("SET search_path TO x", True),
        ("set search_path to x", True),
        ("SELECT set_config('a.b', 'c', false)", True),
        ("SELECT pg_advisory_lock(1)", True),
        ("SELECT pg_try_advisory_lock_shared(1)", True),
        ("SELECT GET_LOCK('a', 1)", True),
        ("SELECT @x := 1", True),
        ("SELECT 1 AS a INTO TEMP t", True),
        ("CREATE TEMPORARY TABLE x (y INTEGER)", True),
        ("PRAGMA foreign_keys = 0", True),
        ("ATTACH DATABASE 'x' AS y", True),
        ("LISTEN channel", True),
        ("LOCK TABLES x WRITE", True),
        ("PREPARE p AS SELECT 1", True),
    ],
)
def test_what_leaves_something_in_the_session(sql: str, changes: bool) -> None:
    """Statements that may change the session are known as such; in doubt, they are."""
    assert changes_session(sql) is changes


async def test_importing_an_application_on_a_running_loop_only_warns(sqlite_url: str) -> None:
    """Creating tables at import works, also where a server imports on its event loop."""
    db = connect(sqlite_url)

    class Row(db.Model):
        name = peewee.CharField()

    with pytest.warns(BlockingQueryWarning):
        db.create_tables([Row])
    with db.allow_sync():
        db.close()
    assert await db.count(Row.select()) == 0
    await db.close_pool()


async def test_a_connection_may_be_closed_on_an_event_loop(sqlite_url: str) -> None:
    """`db.close()` is no query: on a running loop it closes, and warns of nothing."""
    db = connect(sqlite_url)
    with db.allow_sync():
        db.connect()
        connection = db.connection()
    assert db.close()
    assert db.is_closed()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


@pytest.mark.parametrize(
    ("theirs", "ours"), [("max_connections", "pool_size"), ("stale_timeout", "max_lifetime")]
)
def test_names_of_playhouse_pool(theirs: str, ours: str) -> None:
    """A setting by the name that it has in playhouse.pool is refused with the name it has here."""
    expected = f"^{theirs} is a setting of playhouse.pool; here it is {ours}.$"
    with pytest.raises(ValueError, match=expected):
        connect("sqlite:///:memory:", **{theirs: 5})
    with pytest.raises(ValueError, match=expected):
        connect(f"postgresql:///name?{theirs}=5")


def test_the_scheme_says_mariadb() -> None:
    """`mariadb://` says what the server is, before the first connection could tell."""
    assert connect("mariadb://root@127.0.0.1/name").mariadb
    assert not connect("mysql://root@127.0.0.1/name").mariadb
