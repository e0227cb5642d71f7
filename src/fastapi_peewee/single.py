"""Functions of Peewee's that execute one query, with somebody else who executes it.

`Model.save` and the like make a query, execute it and do something with the result. To have that
query executed elsewhere, in between, without writing these functions anew, they are called twice:
the first call ends where the query is executed, and the second one gets the result. So they must be
the same functions up to there each time. What they call, default values and converters, may make
queries of its own: on the event loop these are refused.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

import peewee

from .exceptions import BlockingQuery
from .sql_cache import SqlCache

T = TypeVar("T")
P = ParamSpec("P")


class _Executing(threading.local):
    """What this thread calls with a query, instead of the database; it returns the cursor.

    Not of a context, which tasks that are started inside would have as well.
    """

    instead: Callable[[Any], Any] | None = None


executing = _Executing()


class _Found(BaseException):
    def __init__(self, query: Any) -> None:
        self.query = query


def _find(query: Any) -> Any:
    raise _Found(query)


def query_of(fn: Callable[[], Any]) -> Any:
    """The query that `fn()` executes, which isn't executed; None if there is none."""
    before, executing.instead = executing.instead, _find
    try:
        fn()
    except _Found as found:
        return found.query
    finally:
        executing.instead = before
    return None


def refuse(_: Any) -> Any:
    raise BlockingQuery


def without_queries(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`fn(…)`, which raises `BlockingQuery` if it executes a query."""
    before, executing.instead = executing.instead, refuse
    try:
        return fn(*args, **kwargs)
    finally:
        executing.instead = before


def with_result(fn: Callable[[], T], cursor: Any, others: Callable[[Any], Any] | None = None) -> T:
    """`fn()`, whose query has been executed, with this cursor as the result.

    Any other query, as of a converter of its columns, is given to `others`, or executed.
    """

    def once(_: Any) -> Any:
        executing.instead = others
        return cursor

    before, executing.instead = executing.instead, once
    try:
        return fn()
    finally:
        executing.instead = before


class Single(Generic[T]):
    """A function of Peewee's that executes one query, and does nothing else that waits."""

    def __init__(self, fn: Callable[[], T]) -> None:
        self._fn = fn
        self._query: Any = None

    def statement(self, cache: SqlCache) -> tuple[str, list[Any]] | None:
        """What somebody else executes, SQL and parameters; None if Peewee has to make that.

        Raises:
            BlockingQuery: for that, the database has to be asked.
        """
        self._query = query_of(self._fn)
        return None if self._query is None else without_queries(cache.statement, self._query)

    def execute(self, db: Any, statement: tuple[str, list[Any]] | None) -> T:
        """What the function returns, of which the query is executed here, on a connection.

        What was made of it before is not made anew: a filter may be a generator, and to convert a
        value may be to read a file.

        Args:
            statement: what `statement()` has returned; None as well if that wasn't called.
        """
        if statement is not None:
            return self.finish(db.execute_sql(*statement))
        return self._fn() if self._query is None else self.finish(db.execute(self._query))

    def finish(self, cursor: Any, others: Callable[[Any], Any] | None = None) -> T:
        """What the function returns, now that its query has been executed."""
        return with_result(self._fn, cursor, others)


#: Keys that the database counts.
_COUNTED = (peewee.AutoField, peewee.BigAutoField, peewee.IdentityField)


class Creation(Single[Any]):
    """`instance.save(force_insert=True)` of a new instance whose model's methods are Peewee's.

    Where the database counts the keys, its two halves are written here, as they are in Peewee: it
    is the one function that many requests call, and most of its time goes into an INSERT that is
    as all the others.
    """

    def __init__(self, instance: Any, db: Any) -> None:
        super().__init__(partial(instance.save, force_insert=True))
        self._instance = instance
        self._db = db
        self._key = instance._meta.primary_key

    def statement(self, cache: SqlCache) -> tuple[str, list[Any]] | None:
        if type(self._key) not in _COUNTED:
            return super().statement(cache)
        instance = self._instance
        row = instance.__data__.copy()
        instance._populate_unsaved_relations(row)
        if row.get(self._key.name) is None:
            row.pop(self._key.name, None)
        return without_queries(cache.insertion, type(instance), row)

    def finish(self, cursor: Any, others: Callable[[Any], Any] | None = None) -> Any:
        if type(self._key) not in _COUNTED:
            return super().finish(cursor, others)
        instance = self._instance
        if self._db.returning_clause:
            (key,) = cursor.fetchone() or (None,)  # a trigger may have kept the row away
        else:
            key = self._db.last_insert_id(cursor, peewee.Insert.SIMPLE)
        if key is not None:
            instance._pk = key
        instance._dirty.clear()
        return 1
