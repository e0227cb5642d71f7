"""`connect(url)`: from a URL to the class of its database."""

import re
from importlib import import_module
from typing import Any
from urllib.parse import unquote, urlsplit

import peewee

from .database import Database
from .mysql import MySQLDatabase
from .postgresql import PostgresqlDatabase
from .sqlite import SqliteDatabase

_SCHEMES: dict[str, type[Database]] = {
    "sqlite": SqliteDatabase,
    "postgresql": PostgresqlDatabase,
    "postgres": PostgresqlDatabase,
    "mysql": MySQLDatabase,
    "mariadb": MySQLDatabase,
}

#: What is imported, what it is called, and the extra that brings it.
_DRIVERS: dict[type[Database], tuple[str, str, str]] = {
    PostgresqlDatabase: ("psycopg", "psycopg 3", "postgres"),
    MySQLDatabase: ("pymysql", "PyMySQL", "mysql"),
}


def _parse(url: str) -> tuple[str, dict[str, Any] | None]:
    """The scheme, and what the rest says; None if it can't be read.

    What `urllib` says then quotes a part of the URL that may be one of the password. It isn't even
    kept as the context of our error.
    """
    from playhouse.db_url import parse  # it imports every driver that is there

    # Without "://", what stands before the first colon may be anything.
    scheme = url.partition("://")[0].strip().lower() if "://" in url else ""
    scheme = scheme if re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) else ""
    try:
        parameters = parse(url, unquote_password=True, unquote_user=True)
        parts = urlsplit(url)
    except ValueError:
        return scheme, None
    if "%" in (parts.hostname or "") and parameters["host"] == parts.hostname:
        # A folder of sockets, or an address with a zone. `hostname` is in lower case.
        host = re.match(r"\[(.*)\]|([^:]*)", parts.netloc.rpartition("@")[2])
        assert host is not None
        parameters["host"] = unquote(host[1] or host[2])
    return scheme, parameters


_POOL_NAMES = {"max_connections": "pool_size", "stale_timeout": "max_lifetime"}


def connect(
    url: str,
    *,
    pool_size: int = 10,
    timeout: float = 10.0,
    max_waiting: int = 1000,
    max_lifetime: float = 3600.0,
    statement_timeout: float | None = None,
    transaction_timeout: float | None = None,
    leak_detection_threshold: float | None = None,
    **options: Any,
) -> "Database":
    """Make a database from a URL. Nothing is opened before the first use.

    ::

        db = connect("sqlite:///app.db")            # a file; four slashes for an absolute path
        db = connect("sqlite:///:memory:")          # one database for all threads
        db = connect("postgresql://user:password@host:5432/name")
        db = connect("mysql://user:password@host:3306/name")    # MySQL and MariaDB

    Args:
        url: as above. User, password and host are percent-decoded; a host that begins with a slash
            is a Unix socket (MySQL) or the folder of one (PostgreSQL). What follows a `?` is passed
            on as options: `postgresql:///name?host=/run/postgresql&pool_size=20`.
        pool_size: the greatest number of connections that requests and tasks use at a time.
            Synchronous code outside of requests has one more for each thread.
        timeout: seconds to wait for a connection, then `PoolTimeout`.
        max_waiting: how many may wait at a time; more get `TooManyWaiting` at once.
        max_lifetime: seconds after which a connection is replaced.
        statement_timeout: seconds that a statement of a request or task may take at most; then it
            has failed with `peewee.OperationalError`. None for any time. The database ends it, if
            it can, for which it is told a fifth less, at most 0.2 seconds; otherwise its connection
            is cut.
        transaction_timeout: seconds that a transaction of a request or task may be open, then its
            connection is cut; None for any time.
        leak_detection_threshold: seconds after which a connection that is still held is logged as
            a warning, with the stack that took it; None for never.
        options: for Peewee's database class and, through it, the driver: `pragmas`,
            `busy_timeout` and `inline_reads` (SQLite; seconds), `connect_timeout` (PostgreSQL,
            MySQL; seconds), …

    Raises:
        ValueError: the URL can't be understood, or a setting is out of range.
        peewee.ImproperlyConfigured: the driver isn't installed.
    """
    scheme, parameters = _parse(url)
    database_class = _SCHEMES.get(scheme)
    if database_class is None:
        raise ValueError(
            f"Can't tell the kind of database from the URL's scheme {scheme!r}. It must be one of "
            f"{', '.join(sorted(_SCHEMES))}; for example sqlite:///app.db."
        )
    if parameters is None:
        raise ValueError(
            "The URL can't be taken apart. Most likely user or password have a character that "
            "means something else in a URL, such as / ? # [ or @. Percent-encode them: "
            "urllib.parse.quote(password, safe=''). Several hosts of PostgreSQL are options: "
            "postgresql://user:password@/name?host=a,b&port=5432,5433."
        )
    if not parameters.get("database") or (
        database_class is SqliteDatabase and "host" in parameters
    ):
        raise ValueError(
            f"The URL names no database. Local databases take three slashes ({scheme}:///name), "
            f"remote ones are written {scheme}://user:password@host/name."
        )
    if database_class in _DRIVERS:
        module, driver, extra = _DRIVERS[database_class]
        try:
            import_module(module)
        except ImportError as error:
            raise peewee.ImproperlyConfigured(
                f"{scheme}:// takes the driver {driver}, which can't be imported. Most likely it "
                f"isn't installed here: pip install 'fastapi-peewee[{extra}]'."
            ) from error
    if "passwd" in parameters:
        parameters["password"] = parameters.pop("passwd")
    if database_class is MySQLDatabase and str(parameters.get("host")).startswith("/"):
        parameters.setdefault("unix_socket", parameters.pop("host"))
    if scheme == "mariadb":
        parameters.setdefault("mariadb", True)
    for theirs, ours in _POOL_NAMES.items():
        if theirs in parameters or theirs in options:
            raise ValueError(f"{theirs} is a setting of playhouse.pool; here it is {ours}.")
    settings: dict[str, Any] = {
        "pool_size": pool_size,
        "timeout": timeout,
        "max_waiting": max_waiting,
        "max_lifetime": max_lifetime,
        "statement_timeout": statement_timeout,
        "transaction_timeout": transaction_timeout,
        "leak_detection_threshold": leak_detection_threshold,
    }
    return database_class(**{**settings, **parameters, **options})
