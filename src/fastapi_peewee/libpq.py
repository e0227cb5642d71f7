"""Compiled statements on PostgreSQL, run by libpq in one call: for rows of one text each.

psycopg's cursors take several steps for a statement, each of which lets other threads have the
interpreter: for the reads of a response that is a third of their time. Here the thread waits once,
inside libpq, and the texts go on as they came. Everything else goes through psycopg's cursors.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg import errors
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, TransactionStatus

#: How many statements a connection knows at most; each takes memory of the server's.
_MOST = 300


class _Unusual(Exception):
    """A parameter that psycopg has to adapt."""


def _int(value: int) -> tuple[int, bytes]:
    # The smallest type, as psycopg does: functions that take `integer` refuse a `bigint`.
    if -(2**15) <= value < 2**15:
        return 21, b"%d" % value
    if -(2**31) <= value < 2**31:
        return 23, b"%d" % value
    if -(2**63) <= value < 2**63:
        return 20, b"%d" % value
    raise _Unusual


def _str(value: str) -> tuple[int, bytes]:
    if "\0" in value:
        raise _Unusual  # libpq would cut it there, without a word
    return 0, value.encode()


_ADAPTERS: dict[type, Callable[[Any], tuple[int, bytes | None]]] = {
    bool: lambda value: (16, b"t" if value else b"f"),
    float: lambda value: (701, repr(value).encode()),
    int: _int,
    str: _str,
    type(None): lambda _: (0, None),
}


@functools.lru_cache(maxsize=1024)
def _command(sql: str) -> bytes:
    """The statement with `$1`, `$2`, … in the place of `%s`, and `%` for `%%`."""
    numbers = iter(range(1, sql.count("%") + 1))
    return re.sub(
        "%[s%]", lambda found: "%" if found[0] == "%%" else f"${next(numbers)}", sql
    ).encode()


class Statements:
    """The statements that one connection has seen. Used by whoever has the turn of its lease.

    A statement is prepared when it comes for the second time.
    """

    def __init__(self, conn: Any) -> None:
        self._pgconn = conn.pgconn
        # `prepare_threshold=None` is psycopg's way to say that a pooler can't keep statements.
        self.usable = conn.prepare_threshold is not None and conn.info.encoding == "utf-8"
        self._names: dict[tuple[Any, ...], bytes | None] = {}
        self._count = 0

    def texts(self, sql: str, params: Sequence[Any]) -> list[bytes] | None:
        """The first column of all rows. None if psycopg has to do it; then nothing was sent.

        Raises:
            psycopg.Error: as a cursor would.
        """
        oids, values = [], []
        try:
            for value in params:
                oid, text = _ADAPTERS[type(value)](value)
                oids.append(oid)
                values.append(text)
        except (_Unusual, KeyError, UnicodeEncodeError):
            return None
        result = self._run(sql, oids, values)
        if result.status != ExecStatus.TUPLES_OK:
            if self._pgconn.status != ConnStatus.OK:
                raise psycopg.OperationalError(self._pgconn.get_error_message())
            raise errors.error_from_result(result)
        return [result.get_value(i, 0) for i in range(result.ntuples)]

    def _run(self, sql: str, oids: list[int], values: list[bytes | None]) -> Any:
        pgconn, key = self._pgconn, (sql, *oids)
        name = self._names.get(key)
        if name is None:
            if key not in self._names:
                if len(self._names) < _MOST:
                    self._names[key] = None
                return pgconn.exec_params(_command(sql), values, oids)
            self._count += 1
            name = b"fastapi_peewee_%d" % self._count
            result = pgconn.prepare(name, _command(sql), oids)
            if result.status != ExecStatus.COMMAND_OK:
                return result
            self._names[key] = name
        result = pgconn.exec_prepared(name, values)
        if result.status == ExecStatus.FATAL_ERROR and _is_gone(result):
            # DEALLOCATE ALL or DISCARD ALL. In a transaction, that is lost by now.
            self._names.clear()
            if pgconn.transaction_status == TransactionStatus.IDLE:
                return pgconn.exec_params(_command(sql), values, oids)
        return result


def _is_gone(result: Any) -> bool:
    return bool(result.error_field(DiagnosticField.SQLSTATE) == b"26000")
