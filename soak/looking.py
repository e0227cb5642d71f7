"""What a database and a process hold, looked at from beside the library."""

import os
import threading
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import peewee
import playhouse.db_url

_OPEN_TRANSACTIONS = {
    "postgresql": (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%%'"
    ),
    "mysql": (
        "SELECT count(*) FROM information_schema.innodb_trx AS trx"
        " JOIN information_schema.processlist AS process ON process.id = trx.trx_mysql_thread_id"
        " WHERE process.db = DATABASE() AND process.id <> CONNECTION_ID()"
    ),
}


def idle_transactions(database_url: str) -> int:
    """How many transactions the database holds open though nothing runs in them.

    A SQLite file tells only whether there is one: who writes has the write lock, and who has read
    keeps the log from being emptied.
    """
    db = plain_database(database_url)
    with closing(db):
        if isinstance(db, peewee.SqliteDatabase):
            try:
                db.execute_sql("BEGIN IMMEDIATE")
                db.execute_sql("ROLLBACK")
            except peewee.OperationalError:
                return 1
            busy: int = db.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return busy
        count: int = db.execute_sql(_OPEN_TRANSACTIONS[urlsplit(database_url).scheme]).fetchone()[0]
        return count


def plain_database(database_url: str) -> Any:
    """Peewee's own database, open, to look from beside the library."""
    db = playhouse.db_url.connect(database_url, unquote_password=True, unquote_user=True)
    if isinstance(db, peewee.SqliteDatabase):
        db.execute_sql("PRAGMA busy_timeout = 0")
    db.connect(reuse_if_open=True)
    return db


def descriptors() -> int:
    """How many files and sockets this process has open."""
    return len(os.listdir("/dev/fd"))


def threads() -> int:
    """How many threads of pools this process has; the event loop keeps its own."""
    return sum(thread.name.startswith("fastapi-peewee") for thread in threading.enumerate())
