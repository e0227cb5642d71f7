"""Database errors as HTTP responses: a status and a stable body, and nothing of the database's.

What kind of error it is tell the codes of driver and server, never the words of a message.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

import peewee
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from .exceptions import OutcomeUnknown, PoolError, TransactionAborted, driver_error
from .state import RequestScope

#: Seconds after which a client is asked to try again.
RETRY_AFTER = 1

Kind = Literal[
    "unique", "reference", "check", "missing", "data", "busy", "unavailable", "unknown", "full"
]

_MESSAGES: dict[str, str] = {
    "unique": "A record with this value exists already",
    "reference": "The record that this refers to doesn't exist, or others refer to this one",
    "check": "The value isn't allowed",
    "missing": "A value is required",
    "data": "The value is too long or out of range",
}


class ErrorDetail(BaseModel):
    """The body of 404, 503 and 507."""

    detail: str


class FieldError(BaseModel):
    """One of the errors of 409 and 422, in the form of FastAPI's own."""

    type: str
    loc: list[str | int]
    msg: str


class FieldErrors(BaseModel):
    """The body of 409."""

    detail: list[FieldError]


Responses = dict[int | str, dict[str, Any]]

UNAVAILABLE: Responses = {
    503: {
        "description": "Database unavailable or busy; see Retry-After. "
        "Or the outcome is unknown: look before you repeat the request",
        "model": ErrorDetail,
        "content": {
            "application/json": {
                "examples": {
                    name: {"value": {"detail": name}}
                    for name in ("database unavailable", "database busy", "outcome unknown")
                }
            }
        },
    }
}
NOT_FOUND: Responses = {404: {"description": "Not found", "model": ErrorDetail}}
CONFLICT: Responses = {409: {"description": "Conflict", "model": FieldErrors}}


def add_handlers(app: FastAPI) -> None:
    """Have `app` answer Peewee's errors, except those it handles already."""
    app.exception_handlers.setdefault(peewee.DoesNotExist, does_not_exist)
    app.exception_handlers.setdefault(peewee.DatabaseError, database_error)
    app.exception_handlers.setdefault(peewee.InterfaceError, database_error)


async def does_not_exist(request: Request, error: Exception) -> JSONResponse:
    """404, naming the model: `User.get_by_id(…)` found no row."""
    name = type(error).__name__.removesuffix("DoesNotExist")
    return JSONResponse({"detail": f"{name} not found" if name else "Not found"}, 404)


async def database_error(request: Request, error: Exception) -> JSONResponse:
    """409 or 422, naming the field: the database refused a value. 503 with Retry-After: it is away
    or busy; without: nobody knows whether it was done. 507: it is full. Anything else is a mistake
    of the program, and raised again.
    """
    kind = kind_of(error)
    if kind is None:
        raise error
    if kind == "full":
        return JSONResponse({"detail": "database full"}, 507)
    if kind == "unknown":  # no Retry-After, by which a client may repeat what was done
        return JSONResponse({"detail": "outcome unknown"}, 503)
    if kind in ("busy", "unavailable"):
        retry = {"Retry-After": str(RETRY_AFTER)}
        return JSONResponse({"detail": f"database {kind}"}, 503, headers=retry)
    places = [[_source(request, name), name] for name in _fields(error, kind)] or [["body"]]
    details = [{"type": kind, "loc": place, "msg": _MESSAGES[kind]} for place in places]
    return JSONResponse({"detail": details}, 409 if kind == "unique" else 422)


def _source(request: Request, name: str) -> str:
    if name in request.path_params:
        return "path"
    return "query" if name in request.query_params else "body"


# What drivers and servers report. PostgreSQL: appendix A of its manual, by class or by code.
# SQLite: sqlite.org/rescode.html. MySQL and MariaDB: their server and client error references.
_SQLSTATE: dict[str, Kind] = {
    "23505": "unique",
    "23P01": "unique",
    "23503": "reference",
    "23514": "check",
    "23502": "missing",
    "22": "data",
    "40": "busy",
    "40003": "unknown",
    "55P03": "busy",
    "08": "unavailable",
    "08007": "unknown",
    "57014": "busy",
    "57P": "unavailable",
    "53300": "unavailable",
    "53100": "full",
}
_SQLITE: dict[int, Kind] = {
    2067: "unique",
    1555: "unique",
    2579: "unique",
    787: "reference",
    275: "check",
    1299: "missing",
    5: "busy",
    6: "busy",
    9: "busy",
    13: "full",
    10: "unavailable",
    14: "unavailable",
}
_MYSQL: dict[int, Kind] = {
    **dict.fromkeys((1062, 1586), "unique"),
    **dict.fromkeys((1216, 1217, 1451, 1452), "reference"),
    **dict.fromkeys((3819, 4025), "check"),
    **dict.fromkeys((1048, 1364), "missing"),
    **dict.fromkeys((1264, 1265, 1292, 1366, 1406), "data"),
    **dict.fromkeys((1020, 1205, 1213, 1317, 1969, 3024, 3572), "busy"),
    **dict.fromkeys((0, 1040, 1053, 1927, 2002, 2003, 2006, 2013, 2055), "unavailable"),
    **dict.fromkeys((3, 1021, 1114), "full"),
}


def kind_of(error: Exception) -> Kind | None:
    """What happened, in a word; None if it is a mistake of the program."""
    if isinstance(error, PoolError):
        return "unavailable"
    if isinstance(error, OutcomeUnknown):
        return "unknown"
    if isinstance(error, TransactionAborted):
        ended_by = kind_of(error.__cause__) if isinstance(error.__cause__, Exception) else None
        return ended_by if ended_by in ("busy", "unavailable", "full") else None
    cause = driver_error(error)
    if type(cause).__module__.startswith("pymysql"):
        return _MYSQL.get(cause.args[0]) if cause.args else None
    if hasattr(cause, "sqlite_errorcode"):
        code: int = cause.sqlite_errorcode
        return _SQLITE.get(code) or _SQLITE.get(code & 0xFF)
    state: str | None = getattr(cause, "sqlstate", None)
    if state is not None:
        return next((_SQLSTATE[part] for n in (5, 3, 2) if (part := state[:n]) in _SQLSTATE), None)
    if isinstance(error, peewee.DataError):  # the driver's own refusal: NUL, an integer too large
        return "data"
    if hasattr(cause, "pgconn") and isinstance(error, peewee.OperationalError):
        return "unavailable"  # libpq reports a lost connection without a state
    return None


def _fields(error: Exception, kind: str) -> Iterator[str]:
    """The names, as the API has them, of the fields that a refused value was for."""
    cause = driver_error(error)
    table: str | None = getattr(error, "table", None)
    columns: list[str] = []
    if hasattr(cause, "diag"):
        table, constraint = cause.diag.table_name, cause.diag.constraint_name
        if cause.diag.column_name:
            columns = [cause.diag.column_name]
        elif table and constraint:
            columns = _constrained(table, constraint)
    elif hasattr(cause, "sqlite_errorcode"):
        # "… failed: user.email, user.name": SQLite has no other form, and no translations.
        places = str(cause).rpartition(": ")[2].split(", ")
        pairs = [place.split(".") for place in places if place.count(".") == 1]
        if pairs:
            table, columns = pairs[0][0], [column for _, column in pairs]
    elif len(cause.args) > 1:
        message = str(cause.args[1])
        if kind == "unique":  # the key's name comes last, with or without its table's
            key = re.findall(r"'([^']*)'", message)[-1:]
            for name in key:
                named, _, index = name.rpartition(".")
                table = named or table
                columns = _constrained(table, index)
        elif kind == "reference":
            columns = re.findall(r"FOREIGN KEY \(`([^`]*)`\)", message)
        else:
            columns = re.findall(r"'([^']*)'", message)[:1]
    for column in columns:
        yield _api_name(table, column)


def _models(table: str | None) -> Iterator[Any]:
    """The models of a table; of all tables if the driver doesn't say which.

    Those of the request's databases only, where it has one of the name.
    """
    request = RequestScope.current.get()
    databases = [id(db) for db in request.databases] if request else []
    found, todo = [], list(peewee.Model.__subclasses__())
    while todo:
        model = todo.pop()
        todo += model.__subclasses__()
        if not table or model._meta.table_name == table:
            found.append(model)
    theirs = [
        m for m in found if id(getattr(m._meta.database, "obj", m._meta.database)) in databases
    ]
    yield from theirs or found


def _constrained(table: str | None, constraint: str) -> list[str]:
    for model in _models(table):
        meta = model._meta
        if constraint in (f"{meta.table_name}_pkey", "PRIMARY") and table:
            return [field.column_name for field in model._meta.get_primary_keys()]
        for index in meta.fields_to_index():
            if getattr(index, "_name", None) == constraint:
                return [f.column_name for f in index._expressions if isinstance(f, peewee.Field)]
        for field in meta.refs:
            if constraint in (field.constraint_name, f"{table}_{field.column_name}_fkey"):
                return [field.column_name]
    return []


def _api_name(table: str | None, column: str) -> str:
    for model in _models(table):
        field = model._meta.columns.get(column)
        if isinstance(field, peewee.ForeignKeyField):
            return str(field.object_id_name)
        if field is not None:
            return str(field.name)
    return column
