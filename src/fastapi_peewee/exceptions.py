"""The errors of fastapi-peewee. Each is also one of Peewee's, so that `except peewee.…` keeps
working. Nothing else of the package may be imported here.
"""

import copyreg
from typing import Any, NamedTuple

import peewee


def driver_error(error: BaseException | None) -> Any:
    """The driver's error that Peewee's own keeps, or one that came through two of its wrappers."""
    while (cause := getattr(error, "orig", None)) is not None:
        error = cause
    return error


class FailedStatement(NamedTuple):
    """What an error keeps of its statement, for who tells which field was refused.

    Pickled with the error, it is the SQL only: a database stays in its process, and values may be
    of any kind, or secret.
    """

    database: Any
    sql: str
    params: Any

    def __reduce__(self) -> Any:
        return FailedStatement, (None, str(self.sql), ())


class _Made(Exception):
    """An error whose class makes the text: what it is pickled and copied as has it already.

    Not the first base of any: by that, Peewee's translation tells whether an error is a driver's.
    """

    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class PoolError(peewee.OperationalError):
    """The pool could not give out a connection. Over HTTP: 503 with `Retry-After`."""


class PoolTimeout(PoolError):
    """No connection became free within the pool's `timeout`."""


class TooManyWaiting(PoolError):
    """`max_waiting` callers wait for a connection already; this one was refused at once."""


class PoolClosed(PoolError):
    """The pool is being closed; it gives out no more connections."""


class DatabaseUnavailable(PoolError):
    """The database could not be reached: a connection attempt failed."""


class OutcomeUnknown(peewee.OperationalError, _Made):
    """The connection was lost after a COMMIT, or a write outside of a transaction, had been sent.

    Nobody knows whether it was carried out. It is never retried. Over HTTP: 503, marked as
    unknown and without `Retry-After`. The driver's error is its `__cause__`.

    Args:
        what: was sent.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}, and the connection was lost before the database had answered: it may have "
            "been carried out, or not. Look before you repeat it, or make it safe to repeat, with "
            "a key that the client chooses and a unique constraint."
        )


class TransactionAborted(peewee.OperationalError, _Made):
    """A block went on after its transaction was over: the database had rolled it back.

    Over HTTP: what its `__cause__` would be if the connection was lost, or the database was busy or
    full; else 500.

    Args:
        cause: the error by which it ended, if that is known.
    """

    def __init__(self, cause: BaseException | None = None) -> None:
        super().__init__(
            "This transaction is over: it was rolled back when a statement of it failed, or when "
            "its connection was lost. Nothing of it is stored, and nothing more can be done in it. "
            "Most likely the error was caught inside the block: let it leave the block. To go on "
            "after an error, enter another `atomic()` around the statement that may fail."
        )
        self.__cause__ = cause


class LeaseError(peewee.InterfaceError, _Made):
    """A connection was used where none may be used. A programming error; over HTTP: 500."""


class NoLease(LeaseError):
    """A query ran in a request without a connection of its own."""

    def __init__(self) -> None:
        super().__init__(
            "A query ran in a request, in a place that holds no database connection. "
            "In a `def` endpoint, give its router `route_class=PeeweeRoute`; in a dependency, add "
            "`Depends(get_db)`; in `async def`, a stream or a background task, call "
            "`await db.run(fn, …)` or enter `async with db.atomic():`; in a thread of your own, "
            "enter `with db.connection_context():`."
        )


class LeaseEnded(LeaseError):
    """A task, thread or generator used a connection that had been given back."""

    def __init__(self) -> None:
        super().__init__(
            "The connection (or transaction) that this code inherited has been given back. "
            "Most likely a task, a thread or a generator was started inside `async with "
            "db.atomic():`, `db.run(…)` or a request and outlived it: wait for it inside the "
            "block, or start it outside."
        )


class LeaseForked(LeaseError):
    """A connection opened before `os.fork()` was used in the child process; or, on SQLite, a file
    that was in use then.

    Args:
        text: which of the two.
    """

    INHERITED = (
        "This connection belongs to the parent process: sharing one socket between processes "
        "corrupts both. A process that `os.fork()` made inside of a request or block can use "
        "the database in `contextvars.Context().run(fn)`. One that `multiprocessing` made "
        "can do so anywhere; or fork outside of the block."
    )
    OPEN_FILE = (
        "This process was forked while a connection to its SQLite file was in use: in a block, "
        "with a query half read, or by another thread. SQLite's locks don't survive a fork, so "
        "what would be written here may be lost. Start the process outside of the block, and "
        "before other threads use the database; or, wherever you like, with "
        '`multiprocessing.get_context("spawn")` or "forkserver", Python 3.14\'s default.'
    )

    def __init__(self, text: str = INHERITED) -> None:
        super().__init__(text)


class TurnTimeout(LeaseError):
    """A connection's other user did not finish within the pool's `timeout`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"Waited {seconds:g} s for another task or thread that uses the same connection. "
            "Within one transaction, calls run one at a time, and a nested block keeps its "
            "siblings out until it ends: a task made before a nested block and awaited inside it "
            "waits for ever. Await it outside the nested block, or make it inside. So does a "
            "thread that a `def` endpoint starts with its own context and then waits for: start "
            "it without that context."
        )


class BlockingQuery(LeaseError):
    """A synchronous query ran on the event loop, where it would stop every other request."""

    def __init__(self) -> None:
        super().__init__(
            "A synchronous query ran in `async def` code. It would block the event loop, and so "
            "every other request, until the database answers. Use `await db.run(fn, …)`, an async "
            "method (`await User.aget(…)`, `await query.aexecute()`, `await db.list(query)`), or a "
            "`def` endpoint, which is all that a database not made by `fastapi_peewee.connect()` "
            "has. A query that was returned unexecuted runs where it is iterated: make "
            "a list of it inside the function given to `db.run`. In a notebook: "
            "`with db.allow_sync():`."
        )


class BlockingQueryWarning(RuntimeWarning):
    """As `BlockingQuery`, outside of requests, where blocking is unwise but harms no one."""


class SchemaError(peewee.ImproperlyConfigured, ValueError):
    """A schema was asked for that the model has not the fields or relations for."""


class LazyLoad(peewee.InterfaceError, _Made):
    """A relation or query was read from the database while a response was validated.

    Args:
        what: the relation, or the query.
        endpoint: the endpoint's name.
        relation: whether it is one.
        why: it may not be, if it isn't for being a query for each row.
    """

    def __init__(self, what: str, endpoint: str, *, relation: bool = True, why: str = "") -> None:
        read = f"{what} was read from the database while the response of {endpoint} was validated"
        if why:
            super().__init__(f"{read}: {why}")
            return
        if not relation:
            super().__init__(
                f"{read}. A query inside of something else isn't seen: run it in the endpoint, "
                "`list(query)` or `await db.list(query)`, with `with_related()` for its relations; "
                "or return the query itself."
            )
            return
        super().__init__(
            f"{read}: one query for each row. Name the relation in the response model, so that it "
            "is loaded for all rows at once (a class that contains itself needs a `depth()`), or "
            "load it in the endpoint, with `with_related()` or a join."
        )
