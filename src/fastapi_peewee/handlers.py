"""Database errors as HTTP responses: a status and a stable body, and nothing of the database's."""

from typing import Any

import peewee
from fastapi import FastAPI
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from .refusals import kind_of, refused_fields
from .state import RequestScope

#: Seconds after which a client is asked to try again.
RETRY_AFTER = 1

_MESSAGES: dict[str, str] = {
    "unique": "A record with this value exists already",
    "reference": "The record that this refers to doesn't exist, or others refer to this one",
    "check": "The value isn't allowed",
    "missing": "A value is required",
    "data": "The value is too long or out of range",
}


class DatabaseErrorDetail(BaseModel):
    """The body of 404, 503 and 507."""

    detail: str


class DatabaseFieldError(BaseModel):
    """One of the errors of 409 and 422, in the form of FastAPI's own."""

    type: str
    loc: list[str | int]
    msg: str


class DatabaseFieldErrors(BaseModel):
    """The body of 409."""

    detail: list[DatabaseFieldError]


Responses = dict[int | str, dict[str, Any]]

UNAVAILABLE: Responses = {
    503: {
        "description": "Database unavailable or busy; see Retry-After. "
        "Or the outcome is unknown: look before you repeat the request",
        "model": DatabaseErrorDetail,
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
NOT_FOUND: Responses = {404: {"description": "Not found", "model": DatabaseErrorDetail}}
CONFLICT: Responses = {409: {"description": "Conflict", "model": DatabaseFieldErrors}}


def add_handlers(app: FastAPI) -> None:
    """Have `app` answer Peewee's errors, except those it handles already."""
    app.exception_handlers.setdefault(peewee.DoesNotExist, does_not_exist)
    app.exception_handlers.setdefault(peewee.DatabaseError, database_error)
    app.exception_handlers.setdefault(peewee.InterfaceError, database_error)


def _raise_if_accepted(request: HTTPConnection, error: Exception) -> None:
    """An open websocket takes no response: who serves it closes it, as for any other error."""
    scope = RequestScope.current.get()
    if request.scope["type"] == "websocket" and scope is not None and scope.response_started:
        try:
            raise error
        finally:
            del error  # its traceback has this call


async def does_not_exist(request: HTTPConnection, error: Exception) -> JSONResponse:
    """404, naming the model: `User.get_by_id(…)` found no row."""
    _raise_if_accepted(request, error)
    name = type(error).__name__.removesuffix("DoesNotExist")
    return JSONResponse({"detail": f"{name} not found" if name else "Not found"}, 404)


async def database_error(request: HTTPConnection, error: Exception) -> JSONResponse:
    """409 or 422, naming the field: the database refused a value. 503 with Retry-After: it is away
    or busy; without: nobody knows whether it was done. 507: it is full. Anything else is a mistake
    of the program, and raised again.
    """
    _raise_if_accepted(request, error)
    kind = kind_of(error)
    if kind is None:
        try:
            raise error
        finally:
            del error  # its traceback has this call
    if kind == "full":
        return JSONResponse({"detail": "database full"}, 507)
    if kind == "unknown":  # no Retry-After, by which a client may repeat what was done
        return JSONResponse({"detail": "outcome unknown"}, 503)
    if kind in ("busy", "unavailable"):
        retry = {"Retry-After": str(RETRY_AFTER)}
        return JSONResponse({"detail": f"database {kind}"}, 503, headers=retry)
    places = [_place(request, field) for field in refused_fields(error, kind)] or [[_part(request)]]
    details = [{"type": kind, "loc": place, "msg": _MESSAGES[kind]} for place in places]
    return JSONResponse({"detail": details}, 409 if kind == "unique" else 422)


def _part(request: HTTPConnection) -> str:
    """Where a value came from that nothing tells more of."""
    if request.scope.get("method") not in ("GET", "HEAD", "DELETE"):
        return "body"
    return "path" if request.path_params else "query"


def _place(request: HTTPConnection, field: Any) -> list[str]:
    """Where the request has a field's value. A foreign key `team` is `team_id`, or else `team`."""
    names = [getattr(field, "object_id_name", field.name), field.name]
    for source, values in (("path", request.path_params), ("query", request.query_params)):
        for name in names:
            if name in values:
                return [source, name]
    return ["body", names[0]]
