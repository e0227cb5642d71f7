"""Database servers for the tests, and an empty database for each test.

Every test process owns one PostgreSQL and one MySQL database with a random name, so that processes
side by side never meet. It is emptied before each test that asks for it, which costs much less than
a new one, and dropped at the end.

The server is, in this order: the one that TEST_POSTGRES_URL or TEST_MYSQL_URL names (whose user may
create databases); one that answers at the usual place of this machine and lets us in without a
password; one that we start, and stop at the end. Where there is none, the test is skipped and says
why, unless TEST_SERVERS_REQUIRED (a list such as "postgres,mysql") names it: then it fails.
"""

import getpass
import os
import secrets
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import psycopg
import pymysql
import pytest

from soak.servers import MariaDBServer, PostgresServer, Server, UnavailableError

_CONNECT_TIMEOUT = 5


class OwnDatabase(ABC):
    """One database on a server, known by the URL of somebody who may create databases there.

    Every statement opens a connection of its own: a test that counts the connections to its
    database must not find one of ours.
    """

    driver_error: ClassVar[type[Exception]]

    def __init__(self, admin_url: str, name: str) -> None:
        self.admin_url = admin_url
        self.name = name
        # All else stays: the socket may be named in the query.
        self.url = urlsplit(admin_url)._replace(path=f"/{name}").geturl()

    @abstractmethod
    def create(self) -> None: ...

    @abstractmethod
    def empty(self) -> None:
        """Leave it as `create` made it. Connections and transactions that the last test forgot
        are ended first, or we would wait for their locks."""

    @abstractmethod
    def drop(self) -> None: ...


class PostgresDatabase(OwnDatabase):
    driver_error = psycopg.Error

    def create(self) -> None:
        # UTF-8 is not every cluster's default, and no test should depend on how the machine's
        # language sorts.
        statement = f"CREATE DATABASE {self.name} TEMPLATE template0 ENCODING 'UTF8' LOCALE"
        try:
            self._run(self.admin_url, f"{statement} 'C.UTF-8'")
        except psycopg.errors.WrongObjectType:  # this system has no such locale
            self._run(self.admin_url, f"{statement} 'C'")

    def empty(self) -> None:
        self._end_connections()
        self._run(
            self.url,
            "SET client_min_messages = warning;"
            "DO $$ DECLARE name text; BEGIN FOR name IN"
            "  SELECT quote_ident(nspname) FROM pg_namespace"
            "  WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'"
            " LOOP EXECUTE 'DROP SCHEMA ' || name || ' CASCADE'; END LOOP; END $$;"
            "CREATE SCHEMA public",
        )

    def drop(self) -> None:
        self._end_connections()
        self._run(self.admin_url, f"DROP DATABASE IF EXISTS {self.name}")

    def _end_connections(self) -> None:
        self._run(
            self.admin_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{self.name}' AND pid <> pg_backend_pid()",
        )

    @staticmethod
    def _run(url: str, statement: str) -> list[tuple[Any, ...]]:
        connection = psycopg.connect(url, autocommit=True, connect_timeout=_CONNECT_TIMEOUT)
        with closing(connection), connection.cursor() as cursor:
            cursor.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


class MySQLDatabase(OwnDatabase):
    driver_error = pymysql.Error

    def create(self) -> None:
        self._run(f"CREATE DATABASE {self.name} CHARACTER SET utf8mb4")

    def empty(self) -> None:
        self.drop()
        self.create()

    def drop(self) -> None:
        connections = self._run(
            f"SELECT id FROM information_schema.processlist WHERE db = '{self.name}'"
        )
        for (number,) in connections:
            with suppress(pymysql.err.OperationalError):  # it may have ended by itself
                self._run(f"KILL CONNECTION {number}")
        self._run(f"DROP DATABASE IF EXISTS {self.name}")

    def _run(self, statement: str) -> list[tuple[Any, ...]]:
        parts = urlsplit(self.admin_url)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        connection = pymysql.connect(
            host=parts.hostname or "localhost",
            port=parts.port or 3306,
            user=unquote(parts.username or "root"),
            password=unquote(parts.password or ""),
            unix_socket=options.get("unix_socket"),
            # The driver reads the system's certificates anew for each connection: 50 ms.
            ssl_disabled=parts.hostname in ("127.0.0.1", "localhost"),
            autocommit=True,
            connect_timeout=_CONNECT_TIMEOUT,
        )
        with closing(connection), connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())


def _usual_postgres_urls() -> Iterator[str]:
    for user in dict.fromkeys(["postgres", "root", getpass.getuser()]):
        yield f"postgresql://{user}@127.0.0.1/postgres"
        for folder in (Path("/var/run/postgresql"), Path(tempfile.gettempdir())):
            if (folder / ".s.PGSQL.5432").exists():
                yield f"postgresql://{user}@/postgres?{urlencode({'host': folder})}"


def _usual_mysql_urls() -> Iterator[str]:
    yield "mysql://root@127.0.0.1/mysql"
    for socket in (Path("/run/mysqld/mysqld.sock"), Path(tempfile.gettempdir(), "mysql.sock")):
        if socket.exists():
            yield f"mysql://root@localhost/mysql?{urlencode({'unix_socket': socket})}"


def give_up(kind: str, reason: UnavailableError) -> NoReturn:
    """Skip the test for want of a server; fail it if one is required."""
    required = kind in os.environ.get("TEST_SERVERS_REQUIRED", "").split(",")
    (pytest.fail if required else pytest.skip)(
        f"no {kind} server answers on this machine without a password, and none was started: "
        f"{reason}"
    )


@contextmanager
def _own_database(
    kind: str,
    database_class: type[OwnDatabase],
    usual_urls: Callable[[], Iterator[str]],
    server_class: type[Server],
) -> Iterator[OwnDatabase]:
    name = f"fastapi_peewee_{secrets.token_hex(4)}"

    def created(url: str) -> OwnDatabase:
        database = database_class(url, name)
        database.create()
        return database

    with ExitStack() as stack:
        database = None
        if named := os.environ.get(f"TEST_{kind.upper()}_URL"):
            database = created(named)
        else:
            for url in usual_urls():
                with suppress(database_class.driver_error):
                    database = created(url)
                    break
        if database is None:
            try:
                database = created(stack.enter_context(server_class()).url)
            except UnavailableError as reason:
                give_up(kind, reason)
        stack.callback(database.drop)
        yield database


@pytest.fixture(scope="session")
def postgres_database() -> Iterator[OwnDatabase]:
    """This process's PostgreSQL database. Tests ask for `postgres_url`."""
    with _own_database(
        "postgres", PostgresDatabase, _usual_postgres_urls, PostgresServer
    ) as database:
        yield database


@pytest.fixture(scope="session")
def mysql_database() -> Iterator[OwnDatabase]:
    """This process's MySQL database. Tests ask for `mysql_url`."""
    with _own_database("mysql", MySQLDatabase, _usual_mysql_urls, MariaDBServer) as database:
        yield database


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def postgres_url(postgres_database: OwnDatabase) -> str:
    """The URL of an empty PostgreSQL database."""
    postgres_database.empty()
    return postgres_database.url


@pytest.fixture
def mysql_url(mysql_database: OwnDatabase) -> str:
    """The URL of an empty MySQL or MariaDB database.

    Without TLS, for which the driver reads the system's certificates anew for each connection:
    most of what a connection costs, and so of what a test does.
    """
    mysql_database.empty()
    url = mysql_database.url
    return f"{url}{'&' if '?' in url else '?'}ssl_disabled=true"


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database; the test runs once on each of the three."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
