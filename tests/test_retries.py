"""Transactions that failed since others ran beside them are run anew, if that was asked for."""

import asyncio
import functools
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Annotated, Any

import peewee
import pytest
from fastapi import Body, Depends

from fastapi_peewee import Database, InTransaction, get_db, schema
from fastapi_peewee.retries import Backoff
from tests.apps import client, connected, make_app
from tests.apps import db as db

KINDS = pytest.mark.parametrize("kind", ["thread", "run", "async"])
SERVERS = pytest.mark.parametrize("database_url", ["postgres", "mysql"], indirect=True)


@pytest.fixture
async def account(db: Database) -> Any:
    """A model with two rows, of balance 0."""

    class Account(db.Model):
        balance = peewee.IntegerField(default=0)

    await db.acreate_tables([Account])
    await db.run(lambda: [Account.create() for _ in range(2)])
    return Account


def detect_deadlocks_soon(db: Database) -> None:
    """PostgreSQL looks for them after a second, unless a superuser says otherwise."""
    if isinstance(db, peewee.PostgresqlDatabase):
        db.execute_sql(
            "DO $$ BEGIN SET LOCAL deadlock_timeout = '20ms';"
            " EXCEPTION WHEN insufficient_privilege THEN NULL; END $$"
        )


class Crossed:
    """Two transactions, each of which does a first thing, waits for the other, does a second.

    What is tried again doesn't wait. `tries` counts.
    """

    def __init__(
        self, db: Database, first: Callable[[int], Any], second: Callable[[int], Any]
    ) -> None:
        self.db = db
        self.first, self.second = first, second
        self.tries = 0
        self._met: set[int] = set()

    async def run(self, kind: str, **options: Any) -> list[Any]:
        """Run both, in threads, with `db.run` or as `async def`; return results or exceptions."""
        run: Callable[[int], Awaitable[Any]]
        if kind == "async":
            run = self.db.retry(partial_async(self._async, asyncio.Barrier(2)), **options)
        else:
            one = self.db.retry(partial_def(self._sync, threading.Barrier(2)), **options)
            run = partial(self.db.run if kind == "run" else self._in_thread, one)
        return list(await asyncio.gather(run(0), run(1), return_exceptions=True))

    async def _in_thread(self, one: Callable[[int], Any], which: int) -> Any:
        def whole() -> Any:
            try:
                return one(which)
            finally:
                self.db.close()

        return await asyncio.to_thread(whole)

    def _sync(self, barrier: threading.Barrier, which: int) -> None:
        self.tries += 1
        detect_deadlocks_soon(self.db)
        self.first(which)
        if which not in self._met:
            self._met.add(which)
            barrier.wait(30)
        self.second(which)

    async def _async(self, barrier: asyncio.Barrier, which: int) -> None:
        self.tries += 1
        await self.db.run(detect_deadlocks_soon, self.db)
        await self.db.run(self.first, which)
        if which not in self._met:
            self._met.add(which)
            await asyncio.wait_for(barrier.wait(), 30)
        await self.db.run(self.second, which)


def partial_def(fn: Any, first: Any) -> Any:
    def function(which: int) -> Any:
        return fn(first, which)

    return function


def partial_async(fn: Any, first: Any) -> Any:
    async def function(which: int) -> Any:
        return await fn(first, which)

    return function


def crossed_updates(db: Database, account: Any) -> Crossed:
    def add(number: int) -> None:
        query = account.update(balance=account.balance + 1)
        query.where(account.id == number + 1).execute()

    return Crossed(db, add, lambda which: add(1 - which))


async def balances(db: Database, account: Any) -> list[int]:
    return [row.balance for row in await db.list(account.select().order_by(account.id))]


@SERVERS
@KINDS
async def test_of_two_that_wait_for_each_other_both_are_done(
    db: Database, account: Any, kind: str
) -> None:
    """A real deadlock: the database fails one of the two, which is run anew and adds its part."""
    both = crossed_updates(db, account)
    assert await both.run(kind) == [None, None]
    assert both.tries == 3
    assert await balances(db, account) == [2, 2]


@SERVERS
@KINDS
async def test_what_would_not_be_serialisable_is_run_anew(
    db: Database, account: Any, kind: str
) -> None:
    """Write skew: each reads both rows and, if they are 0, changes one. One of them finds a 1."""
    read: dict[int, int] = {}

    def look(which: int) -> None:
        read[which] = sum(row.balance for row in account.select())

    def write(which: int) -> None:
        if read[which] == 0:
            account.update(balance=1).where(account.id == which + 1).execute()

    both = Crossed(db, look, write)
    # What is run anew may meet the other once more.
    assert await both.run(kind, retries=10, isolation_level="SERIALIZABLE") == [None, None]
    assert both.tries >= 3
    assert sorted(await balances(db, account)) == [0, 1]


@SERVERS
async def test_without_retries_one_of_two_that_wait_for_each_other_is_answered_with_503(
    db: Database, account: Any
) -> None:
    """`database busy`, with Retry-After, to the request whose transaction was the victim."""
    both = crossed_updates(db, account)
    barrier = threading.Barrier(2)
    app = make_app(db)

    @app.post("/{which}")
    def endpoint(which: int) -> None:
        with db.atomic():
            both._sync(barrier, which)

    async with client(app) as http:
        answers = await asyncio.gather(http.post("/0"), http.post("/1"))
    good, bad = sorted(answers, key=lambda answer: answer.status_code)
    assert (good.status_code, bad.status_code) == (200, 503)
    assert bad.json() == {"detail": "database busy"}
    assert bad.headers["Retry-After"]
    assert await balances(db, account) == [1, 1]


# SQLite, whose "busy" is had with one connection more: what is retried, and how often.


class Busy:
    """An SQLite database that another connection writes to, and how it was waited for."""

    def __init__(self, db: Database, path: str) -> None:
        self.db = db
        self.waited: list[float] = []
        self.places: set[str] = set()
        self.tries = 0
        self.other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

        class Note(db.Model):
            text = peewee.CharField()

        self.note: Any = Note

    @contextmanager
    def until(self, failures: int) -> Iterator[None]:
        """The other lets go after so many waits. Nothing of ours is held meanwhile."""
        self.other.execute("BEGIN IMMEDIATE")

        def wait(delay: float, place: str) -> None:
            self.places.add(place)
            self.waited.append(delay)
            if len(self.waited) == failures:
                self.other.execute("ROLLBACK")

        async def asleep(delay: float) -> None:
            assert threading.current_thread() is threading.main_thread()
            assert self.db.pool_stats.in_use == 0
            wait(delay, "loop")

        sleep = partial(wait, place="thread")
        self.db.backoff = Backoff(random=lambda: 1.0, sleep=sleep, asleep=asleep)
        try:
            yield
        finally:
            if self.other.in_transaction:
                self.other.execute("ROLLBACK")

    def write(self, text: str = "a") -> int:
        self.tries += 1
        self.note.create(text=text)
        return self.tries

    async def awrite(self, text: str = "a") -> int:
        self.tries += 1
        await self.note.acreate(text=text)
        return self.tries

    async def stored(self) -> list[str]:
        return [note.text for note in await self.db.list(self.note.select())]


@pytest.fixture
async def busy(sqlite_url: str) -> Any:
    async with connected(sqlite_url, busy_timeout=0) as db:
        busy = Busy(db, db.database)
        await db.acreate_tables([busy.note])
        with closing(busy.other):
            yield busy


def in_kind(busy: Busy, kind: str, **options: Any) -> Callable[[], Awaitable[Any]]:
    """The retried function, as it is called from a thread, with `db.run`, or from `async def`."""
    if kind == "async":
        return busy.db.retry(wrapped(busy.awrite), **options)
    write = busy.db.retry(wrapped(busy.write), **options)
    if kind == "run":
        return partial(busy.db.run, write)

    def whole() -> Any:
        try:
            return write()
        finally:
            busy.db.close()

    return partial(asyncio.to_thread, whole)


def wrapped(method: Any) -> Any:
    if asyncio.iscoroutinefunction(method):

        async def asynchronous() -> Any:
            return await method()

        return asynchronous
    return lambda: method()


@KINDS
async def test_what_is_busy_is_waited_for(busy: Busy, kind: str) -> None:
    """The transaction is begun anew until it can be; the waits double, on the loop if possible."""
    with busy.until(2):
        assert await in_kind(busy, kind)() == 1  # it is BEGIN that failed
    assert busy.waited == [0.05, 0.1]
    assert busy.places == {"thread" if kind == "thread" else "loop"}
    assert await busy.stored() == ["a"]


@KINDS
@pytest.mark.parametrize("retries", [0, 2])
async def test_the_last_error_is_raised(busy: Busy, kind: str, retries: int) -> None:
    """There are as many tries as were granted, and no wait after the last."""
    with busy.until(-1), pytest.raises(peewee.OperationalError, match="locked") as failure:
        await in_kind(busy, kind, retries=retries)()
    assert len(busy.waited) == retries
    assert "TryAgain" not in repr([failure.value.__cause__, failure.value.__context__])


async def test_the_waits_grow_to_a_bound_and_are_random() -> None:
    """Full jitter: any part of a bound that doubles, up to a second."""
    assert list(Backoff(random=lambda: 1.0).delays(7)) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    numbers = iter([0.0, 0.5])
    assert list(Backoff(random=lambda: next(numbers)).delays(2)) == [0.0, 0.05]
    waits = list(Backoff().delays(100))
    assert len(set(waits)) > 90
    assert 0 <= min(waits) <= max(waits) <= 1


async def test_run_makes_one_transaction_of_a_function_that_is_retried(busy: Busy) -> None:
    """`db.run(fn, retries=3)`: no part of it is stored without the rest, or twice."""

    def two() -> None:
        with busy.db.atomic():  # a savepoint, so the second failure undoes it as well
            busy.write("first")
        busy.db.after_commit(lambda: called.append(busy.tries))
        if busy.tries < 3:
            raise peewee.OperationalError(locked())

    called: list[int] = []
    with busy.until(-1):
        busy.other.execute("ROLLBACK")
        await busy.db.run(two, retries=3)
    assert await busy.stored() == ["first"]
    assert called == [3]
    assert busy.waited == [0.05, 0.1]


def locked() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
    return error


@pytest.mark.parametrize(
    "error", [ValueError(), peewee.IntegrityError("a"), peewee.DatabaseError()]
)
@KINDS
async def test_what_would_fail_again_is_not_retried(
    busy: Busy, kind: str, error: Exception
) -> None:
    """Only what the database's code says to be of the moment."""
    busy.note.create = fail = Failing(error)
    with pytest.raises(type(error)):
        await in_kind(busy, kind)()
    assert fail.calls == 1


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, **_: Any) -> None:
        self.calls += 1
        raise self.error


@KINDS
async def test_a_part_of_a_transaction_is_not_retried(busy: Busy, kind: str) -> None:
    """Inside an open transaction there is one try: its whole is the caller's."""
    busy.note.create = fail = Failing(peewee.OperationalError(locked()))
    write = in_kind(busy, kind)

    async def inside() -> None:
        async with busy.db.atomic():
            await write()

    if kind == "thread":
        whole = busy.db.connection_context()(busy.db.atomic()(busy.db.retry(wrapped(busy.write))))
        inside = partial(asyncio.to_thread, whole)
    with pytest.raises(peewee.OperationalError):
        await inside()
    assert (fail.calls, busy.waited) == (1, [])


async def test_the_outermost_of_two_retries_the_whole(busy: Busy) -> None:
    """A retried function that calls another is run anew with it, once for each failure."""
    inner = busy.db.retry(wrapped(busy.write), retries=3)

    @busy.db.retry(retries=2)
    def outer() -> None:
        inner()
        if busy.tries < 3:
            raise peewee.OperationalError(locked())

    with busy.until(-1):
        busy.other.execute("ROLLBACK")
        await busy.db.run(outer)
    assert (busy.tries, await busy.stored()) == (3, ["a"])


async def test_what_was_committed_half_way_is_not_run_anew(busy: Busy) -> None:
    """`txn.commit()` ends a transaction in the middle of the block."""

    @busy.db.retry
    def half() -> None:
        busy.write()
        busy.db.top_transaction().commit()
        raise peewee.OperationalError(locked())

    with pytest.raises(peewee.OperationalError):
        await busy.db.run(half)
    assert (busy.tries, await busy.stored()) == (1, ["a"])


async def test_methods_are_retried(busy: Busy) -> None:
    """`self` is there at each try."""

    class Service:
        def __init__(self, busy: Busy) -> None:
            self.busy = busy

        @busy.db.retry
        def write(self, text: str) -> str:
            self.busy.write(text)
            return text

    with busy.until(1):
        assert await busy.db.run(Service(busy).write, text="b") == "b"
    assert await busy.stored() == ["b"]


async def test_decorators_above_are_called(busy: Busy) -> None:
    """One that copies what `@db.retry` has left on a function isn't passed over."""

    @functools.wraps(retried := busy.db.retry(wrapped(busy.write)))
    def louder() -> str:
        return f"{retried()}!"

    with busy.until(1):
        assert await busy.db.run(louder) == "1!"


async def test_run_swallows_no_argument_of_a_function(busy: Busy) -> None:
    """A function with a parameter `retries` is refused, with what to write instead."""

    def fetch(retries: int) -> int:
        return retries

    with pytest.raises(TypeError, match="partial"):
        await busy.db.run(fetch, retries=5)
    assert await busy.db.run(partial(fetch, 5)) == 5
    assert await busy.db.run(str, 7, retries=1) == "7"  # a function without a signature


async def test_what_cannot_be_retried_is_refused(busy: Busy) -> None:
    """Generators, and no number of tries."""

    async def stream() -> Any:
        yield 1

    with pytest.raises(TypeError, match="generator"):
        busy.db.retry(stream)
    with pytest.raises(ValueError, match="retries"):
        busy.db.retry(retries=-1)(busy.write)


# Routes.


@pytest.mark.parametrize("kind", ["def", "async"])
async def test_an_endpoint_is_retried(busy: Busy, kind: str) -> None:
    """`@db.retry` under the route's decorator: its arguments stay, and a try has its own lease."""
    app = make_app(busy.db)

    def sync(text: Annotated[str, Body(embed=True)]) -> int:
        return busy.write(text)

    async def asynchronous(text: Annotated[str, Body(embed=True)]) -> int:
        return await busy.awrite(text)

    endpoint: Any = sync if kind == "def" else asynchronous
    app.post("/", status_code=201)(busy.db.retry(endpoint))
    async with client(app, raises=True) as http:
        with busy.until(3):
            answer = await http.post("/", json={"text": "b"})
        assert (answer.status_code, answer.json(), busy.waited) == (201, 1, [0.05, 0.1, 0.2])
        assert busy.places == {"loop"}
        assert (await http.post("/", json={})).status_code == 422
    assert await busy.stored() == ["b"]


@pytest.mark.parametrize("kind", ["def", "async"])
async def test_a_query_that_a_retried_endpoint_returns_is_read_once(busy: Busy, kind: str) -> None:
    """After the commit: it finds what the endpoint has written."""
    app = make_app(busy.db)

    def sync() -> Any:
        busy.write("b")
        return busy.note.select()

    async def asynchronous() -> Any:
        await busy.awrite("b")
        return busy.note.select()

    endpoint: Any = sync if kind == "def" else asynchronous
    app.post("/", response_model=list[schema(busy.note)])(busy.db.retry(endpoint))  # type: ignore[misc]
    async with client(app, raises=True) as http:
        with busy.until(1):
            assert (await http.post("/")).json() == [{"id": 1, "text": "b"}]


async def test_an_endpoint_that_stays_busy_is_answered_with_503(busy: Busy) -> None:
    """After the last try, as without retries."""
    app = make_app(busy.db)
    app.post("/")(busy.db.retry(wrapped(busy.write), retries=1))
    async with client(app) as http:
        with busy.until(-1):
            answer = await http.post("/")
    assert (answer.status_code, answer.json()) == (503, {"detail": "database busy"})
    assert answer.headers["Retry-After"]
    assert len(busy.waited) == 1


async def test_a_background_task_is_retried(busy: Busy) -> None:
    """It takes a connection for each try."""
    from fastapi import BackgroundTasks

    app = make_app(busy.db)

    @app.post("/")
    def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(busy.db.retry(wrapped(busy.write)))

    async with client(app, raises=True) as http:
        with busy.until(1):
            await http.post("/")
    assert await busy.stored() == ["a"]


async def test_a_transaction_dependency_would_keep_it_from_retrying(busy: Busy) -> None:
    """Both on one endpoint: an error says which of them to remove."""
    app = make_app(busy.db)

    @app.post("/")
    @busy.db.retry
    def endpoint(db: InTransaction) -> None: ...

    async with client(app, raises=True) as http:
        with pytest.raises(RuntimeError, match=r"Remove the dependency"):
            await http.post("/")


async def test_with_a_connection_for_the_request_a_plain_route_is_retried(busy: Busy) -> None:
    """`Depends(get_db)` holds the connection through the waits, as it was asked to."""
    from fastapi.routing import APIRoute

    app = make_app(busy.db, APIRoute)
    app.post("/", dependencies=[Depends(get_db)])(busy.db.retry(wrapped(busy.write)))
    async with client(app, raises=True) as http:
        with busy.until(1):
            assert (await http.post("/")).json() == 1
    assert await busy.stored() == ["a"]


async def test_a_function_inside_of_another_is_not_run_anew_for_who_is_cancelled(
    busy: Busy,
) -> None:
    """Nor is there a further try in the thread of a call whose task was cancelled."""
    loop, waiting, cancelled = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    slept: list[float] = []

    def sleep(delay: float) -> None:
        slept.append(delay)
        loop.call_soon_threadsafe(waiting.set)
        assert cancelled.wait(10)

    with busy.until(-1):
        busy.db.backoff = Backoff(sleep=sleep)
        retried = busy.db.retry(wrapped(busy.write))
        call = asyncio.create_task(busy.db.run(lambda: retried()))
        await asyncio.wait_for(waiting.wait(), 30)
        call.cancel()
        await asyncio.sleep(0)  # the task learns of it
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert len(slept) == 1
    assert busy.db.pool_stats.in_use == 0
    assert await busy.stored() == []


async def test_who_is_cancelled_while_waiting_holds_nothing(busy: Busy) -> None:
    """`CancelledError` ends the wait, and there is no further try."""
    waiting = asyncio.Event()

    async def asleep(delay: float) -> None:
        waiting.set()
        await asyncio.Event().wait()

    with busy.until(-1):
        busy.db.backoff = Backoff(asleep=asleep)
        task = asyncio.create_task(busy.db.run(busy.write, retries=3))
        await asyncio.wait_for(waiting.wait(), 30)
        assert busy.db.pool_stats.in_use == 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await busy.stored() == []
