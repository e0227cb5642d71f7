"""``python -m benchmarks.tracing``: uvicorn, with each statement that SQLite runs in a log.

The log is the file that ``STATEMENT_LOG`` names, a line for each statement, whatever library sends
it: all of them use Python's sqlite3.
"""

import os
import sqlite3
from typing import Any

import uvicorn

_log = os.open(os.environ["STATEMENT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_connect = sqlite3.connect


def _trace(statement: str) -> None:
    if not statement.startswith("--"):  # what a trigger or a foreign key does by itself
        os.write(_log, " ".join(statement.split()).encode(errors="replace") + b"\n")


def _traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
    connection: sqlite3.Connection = _connect(*args, **kwargs)
    connection.set_trace_callback(_trace)
    return connection


if __name__ == "__main__":
    for module in (sqlite3, sqlite3.dbapi2):
        module.connect = _traced  # type: ignore[attr-defined]
    uvicorn.main()
