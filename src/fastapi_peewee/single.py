"""Functions of Peewee's that execute one query, with somebody else who executes it.

`Model.save` and the like make a query, execute it and do something with the result. To have that
query executed elsewhere, in between, without writing these functions anew, they are called twice:
the first call ends where the query is executed, and the second one gets the result. So they must be
the same functions up to there each time. What they call, default values and converters, may make
queries of its own: on the event loop these are refused.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from .exceptions import BlockingQuery

T = TypeVar("T")

#: What is called in this context with a query, instead of the database, and returns the cursor.
executing: ContextVar[Callable[[Any], Any] | None]
executing = ContextVar("fastapi_peewee_executing", default=None)


class _Found(BaseException):
    def __init__(self, query: Any) -> None:
        self.query = query


def _find(query: Any) -> Any:
    raise _Found(query)


def query_of(fn: Callable[[], Any]) -> Any:
    """The query that `fn()` executes, which isn't executed; None if there is none."""
    token = executing.set(_find)
    try:
        fn()
    except _Found as found:
        return found.query
    finally:
        executing.reset(token)
    return None


def refuse(_: Any) -> Any:
    raise BlockingQuery


def without_queries(fn: Callable[[], T]) -> T:
    """`fn()`, which raises `BlockingQuery` if it executes a query."""
    token = executing.set(refuse)
    try:
        return fn()
    finally:
        executing.reset(token)


def with_result(fn: Callable[[], T], cursor: Any, others: Callable[[Any], Any] | None = None) -> T:
    """`fn()`, whose query has been executed, with this cursor as the result.

    Any other query, as of a converter of its columns, is given to `others`, or executed.
    """

    def once(_: Any) -> Any:
        executing.set(others)
        return cursor

    token = executing.set(once)
    try:
        return fn()
    finally:
        executing.reset(token)
