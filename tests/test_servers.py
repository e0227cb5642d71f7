"""The databases that `tests.servers` hands out."""

from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
import pymysql
import pytest

from soak.servers import MariaDBServer, PostgresServer, Server, UnavailableError
from tests.servers import MySQLDatabase, OwnDatabase, PostgresDatabase


def test_the_url_of_a_database_keeps_the_socket_that_the_url_of_the_server_names() -> None:
    database = PostgresDatabase("postgresql://postgres:@/postgres?host=/run/pg", "own")

    assert database.url == "postgresql://postgres:@/own?host=/run/pg"


@pytest.mark.parametrize("kind", ["postgres", "mysql"])
def test_emptying_removes_a_table_that_a_forgotten_transaction_has_locked(
    kind: str, request: pytest.FixtureRequest
) -> None:
    database: OwnDatabase = request.getfixturevalue(f"{kind}_database")
    with closing(_connect(database)) as forgotten, forgotten.cursor() as cursor:
        cursor.execute("CREATE TABLE left_behind (id INTEGER)")
        forgotten.commit()
        cursor.execute("INSERT INTO left_behind VALUES (1)")

        database.empty()

        assert _tables(database) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("database_class", "server_class"),
    [
        pytest.param(PostgresDatabase, PostgresServer, id="postgres"),
        pytest.param(MySQLDatabase, MariaDBServer, id="mysql"),
    ],
)
def test_a_server_that_we_start_serves_databases_and_is_gone_afterwards(
    database_class: type[OwnDatabase], server_class: type[Server]
) -> None:
    try:
        with server_class() as server:
            url = server.url
            database = database_class(url, "own")
            database.create()
            database.empty()
            assert _tables(database) == []
    except UnavailableError as reason:
        pytest.skip(str(reason))

    # Asking the driver would not do: PyMySQL leaks a socket that it cannot connect.
    ((socket,),) = parse_qs(urlsplit(url).query).values()
    assert not Path(socket).exists()


def _tables(database: OwnDatabase) -> list[object]:
    with closing(_connect(database)) as connection, connection.cursor() as cursor:
        schema = "public" if isinstance(database, PostgresDatabase) else database.name
        cursor.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = %s", (schema,)
        )
        return list(cursor.fetchall())


def _connect(database: OwnDatabase) -> psycopg.Connection | pymysql.Connection:
    if isinstance(database, PostgresDatabase):
        return psycopg.connect(database.url)
    parts = urlsplit(database.url)
    return pymysql.connect(
        host=parts.hostname,
        user=parts.username,
        password=parts.password or "",
        port=parts.port or 3306,
        unix_socket=parse_qs(parts.query).get("unix_socket", [None])[0],
        database=database.name,
    )
