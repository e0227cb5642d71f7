"""One test body for each way of running Peewee code on a database that `connect()` has made.

The body is a coroutine. Where the code is synchronous it never waits, and is driven to its end in
one go; so the same lines say `with db.atomic():` in one mode and `async with db.atomic():` in
another::

    @in_each_mode
    async def test_a_block_commits_when_it_ends(mode: Mode, seen: Seen) -> None:
        async with mode.block(mode.db.atomic()):
            await mode.do(User.create, name="ann")
        assert seen() == ["ann"]

A test module takes these fixtures with `connected, db, mode, observer, seen = modes.fixtures`, and
rows to begin with by `ann, three = modes.rows`, another database by `other = modes.other`.
"""

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
)
from functools import partial, wraps
from inspect import iscoroutinefunction
from typing import Any, TypeVar

import peewee
import playhouse.db_url
import pytest

from fastapi_peewee import AsyncModel, Database, connect

Test = TypeVar("Test", bound=Callable[..., Any])
Seen = Callable[[], list[str]]


class Oops(Exception):
    """What goes wrong in a test."""


def oops_gets_out() -> pytest.RaisesExc[Oops]:
    """What expects an `Oops`, wherever it is raised inside."""
    return pytest.raises(Oops)


class User(AsyncModel):
    """Bound to the database of each test, as its notes are."""

    name = peewee.CharField(unique=True)


class Note(AsyncModel):
    user = peewee.ForeignKeyField(User, backref="notes", null=True)
    text = peewee.CharField(default="")


class Mode(ABC):
    """A way of running Peewee code."""

    def __init__(self, db: Database) -> None:
        self.db = db

    @abstractmethod
    async def run(self, body: Callable[[], Any]) -> None:
        """Run the body of a test."""

    async def do(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a synchronous function that queries."""
        return fn(*args, **kwargs)

    def block(self, block: Any) -> AbstractAsyncContextManager[Any]:
        """Enter one of Peewee's blocks."""
        return _entered(block)

    def decorated(self, block: Any, fn: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """A synchronous function that queries, decorated with one of Peewee's blocks."""
        return partial(self.do, block(fn))


class InThread(Mode):
    """Synchronous code outside of any request: a script, a shell, a worker."""

    async def run(self, body: Callable[[], Any]) -> None:
        def whole() -> None:
            try:
                _drive(body)
            finally:
                self.db.close()

        await asyncio.to_thread(whole)


class UnderRun(Mode):
    """Synchronous code that is called with `await db.run(…)`."""

    async def run(self, body: Callable[[], Any]) -> None:
        await self.db.run(_drive, body)


class OnLoop(Mode):
    """`async def` code."""

    async def run(self, body: Callable[[], Any]) -> None:
        await body()

    async def do(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await self.db.run(fn, *args, **kwargs)

    def block(self, block: Any) -> AbstractAsyncContextManager[Any]:
        return block

    def decorated(self, block: Any, fn: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        @wraps(fn)
        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            return await self.db.run(fn, *args, **kwargs)

        return block(asynchronous)


@asynccontextmanager
async def _entered(block: AbstractContextManager[Any]) -> AsyncIterator[Any]:
    with block as value:
        yield value


def _drive(body: Callable[[], Any]) -> None:
    coroutine = body()
    if coroutine is None:  # it was a plain function
        return
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise AssertionError("Synchronous code has waited for something.")


def in_each_mode(test: Test) -> Test:
    """Run a test in each of the modes; one that is a plain `def` in the synchronous two."""

    @wraps(test)
    async def inner(mode: Mode, **fixtures: Any) -> None:
        await mode.run(partial(test, mode=mode, **fixtures))

    modes = [InThread, UnderRun, OnLoop] if iscoroutinefunction(test) else [InThread, UnderRun]
    return pytest.mark.parametrize("mode", modes, indirect=True)(inner)


def on(*databases: str) -> pytest.MarkDecorator:
    """Run a test on these of the three databases only."""
    return pytest.mark.parametrize("database_url", databases, indirect=True)


@pytest.fixture
def mode(request: pytest.FixtureRequest, db: Database) -> Mode:
    mode_class: type[Mode] = request.param
    return mode_class(db)


@pytest.fixture
def db(connected: Callable[..., Database]) -> Database:
    """A database with the two tables, to which their models are bound."""
    return connected()


@pytest.fixture
def connected(database_url: str) -> Iterator[Callable[..., Database]]:
    """Makes such a database, with options of its own."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(with_tables(connect(database_url, **options)))


@contextmanager
def with_tables(database: Database) -> Iterator[Database]:
    database.bind([User, Note])
    with database.allow_sync(), database.connection_context():
        database.create_tables([User, Note])
    yield database
    database.close()
    in_use = database.pool_stats.in_use
    asyncio.run(database.close_pool())
    assert in_use == 0, "a connection was not given back"


@pytest.fixture
def other() -> Iterator[Database]:
    """A second database with the same tables and an "other" user. The models aren't bound to it."""
    database = connect("sqlite:///:memory:")
    with database.bind_ctx([User, Note]), database:
        database.create_tables([User, Note])
        User.create(name="other")
    yield database
    asyncio.run(database.close_pool())


@pytest.fixture
def observer(database_url: str) -> Iterator[Any]:
    """A database of plain Peewee's, with one connection, which sees only what was committed."""
    with closing(plain(database_url)) as database:
        yield database


@pytest.fixture
def seen(observer: Any) -> Seen:
    """The names of the users that have been committed."""
    query = User.select(User.name).order_by(User.id)
    return lambda: [name for (name,) in observer.execute(query)]


fixtures = connected, db, mode, observer, seen


@pytest.fixture
async def ann(db: Database) -> Any:
    return await User.acreate(name="ann")


@pytest.fixture
async def three(db: Database) -> list[Any]:
    return [await User.acreate(name=name) for name in ("ann", "bob", "cid")]


rows = ann, three


def plain(url: str, **options: Any) -> peewee.Database:
    """Plain Peewee on the same database, with one connection for all threads."""
    if url.startswith("sqlite"):
        options["check_same_thread"] = False
    return playhouse.db_url.connect(url, thread_safe=False, **options)


def open_connections(url: str) -> int:
    """How many connections to a database are open, as its server says.

    SQLite has none; there it is the files that this process has open.
    """
    if url.startswith("sqlite"):
        path = os.path.realpath(url.removeprefix("sqlite:///"))
        files = os.scandir("/proc/self/fd")
        return sum(os.path.realpath(file.path) == path for file in files)
    if url.startswith("postgres"):
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    else:
        query = (
            "SELECT count(*) FROM information_schema.processlist"
            " WHERE db = database() AND id <> connection_id()"
        )
    with closing(plain(url)) as observer:
        count: int = observer.execute_sql(query).fetchone()[0]
    return count


def connections_become(url: str, count: int) -> bool:
    """Whether so many connections are open soon: a server needs a moment to see one closed."""
    deadline = time.monotonic() + 10
    while open_connections(url) != count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
