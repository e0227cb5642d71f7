"""A database for each server: a copy of one that sql_app's models have filled."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import peewee

from experiment.serving import ServerDatabase, SqliteFile, temporary_database
from fastapi_peewee import connect
from sql_app.models import Item, User

USERS = 1000
ITEMS_OF_A_USER = 5
_AT_ONCE = 1000

_USUAL_URLS = [f"postgresql://{user}@127.0.0.1/postgres" for user in ("postgres", "root")]


def find_postgresql(url: str | None) -> str | None:
    """The server to measure on: the one that is named, else one of this machine's that lets us in
    without a password, else None.
    """
    return url or next(filter(_lets_us_in, _USUAL_URLS), None)


def _lets_us_in(url: str) -> bool:
    try:
        connect(url, connect_timeout=2).execute_sql("SELECT 1")
    except peewee.PeeweeException:
        return False
    return True


@dataclass(frozen=True)
class Filled:
    """A filled database that nobody uses, but to copy it."""

    _server_url: str | None
    _database: SqliteFile | ServerDatabase
    version: str
    #: What `PRAGMA synchronous` says on sql_app's connections; on PostgreSQL nothing.
    synchronous: str

    def copy(self) -> AbstractContextManager[SqliteFile | ServerDatabase]:
        return temporary_database(self._server_url, self._database)


@contextmanager
def filled_database(server_url: str | None) -> Iterator[Filled]:
    """Make and fill a database; see `temporary_database`.

    Raises:
        ExperimentError: the server can't be reached, or the user may not create a database.
    """
    with temporary_database(server_url) as database:
        db: Any = connect(database.url)
        with db.bind_ctx([User, Item]), db.connection_context():
            db.create_tables([User, Item])
            with db.atomic():
                for model, rows in ((User, list(_users())), (Item, list(_items()))):
                    for start in range(0, len(rows), _AT_ONCE):
                        model.insert_many(rows[start : start + _AT_ONCE]).execute()
            if server_url is None:
                version = db.execute_sql("SELECT sqlite_version()").fetchone()[0]
                synchronous = str(db.execute_sql("PRAGMA synchronous").fetchone()[0])
                db.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            else:
                version = db.execute_sql("SHOW server_version").fetchone()[0].split()[0]
                synchronous = ""
                db.execute_sql("VACUUM ANALYZE")
        yield Filled(server_url, database, version, synchronous)


def _users() -> Iterator[dict[str, Any]]:
    for number in range(1, USERS + 1):
        yield {
            "email": f"user{number:04}@example.com",
            "hashed_password": f"$argon2id$v=19$m=65536,t=3,p=4${number:022}${number:043}",
            "is_active": number % 7 != 0,
        }


def _items() -> Iterator[dict[str, Any]]:
    for number in range(1, USERS * ITEMS_OF_A_USER + 1):
        owner = (number - 1) // ITEMS_OF_A_USER + 1
        yield {
            "title": f"Item {number} “of” user {owner}",
            "description": f'What user {owner} says of "{number}"' if number % 5 else None,
            "owner": owner,
        }
