"""Requests that are cancelled, at every await and at random: nothing of them is left."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import peewee
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from playhouse.pool import PooledSqliteDatabase

from fastapi_peewee import (
    Database,
    LeaseEnded,
    NoLease,
    Peewee,
    PeeweeRoute,
    PoolError,
    blocks,
    get_db,
)
from fastapi_peewee.blocks import _UnlessCancelled
from tests.apps import back_to_rest, connected
from tests.apps import make_app as plain_app
from tests.cancelling import (
    BY,
    MOMENTS,
    Around,
    Driver,
    Scenario,
    all_in_use,
    alone,
    cut_everywhere,
    make_row,
    stored_names,
    unconnected,
)
from tests.cancelling import db as db
from tests.cancelling import driver as driver
from tests.cancelling import row as row
from tests.cancelling_app import PATHS, WRITE_AFTERWARDS, ask_into, make_app


@pytest.mark.parametrize("around", [alone, unconnected, all_in_use])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "by", [by if "again" in by else pytest.param(by, marks=pytest.mark.slow) for by in BY]
)
@pytest.mark.parametrize("path", PATHS)
async def test_at_every_await_and_step(
    db: Database, row: Any, driver: Driver, path: str, by: str, moment: str, around: Around
) -> None:
    """Whichever of its awaits a request is cancelled at, with a connection at hand, without one and
    while it waits for one: all or nothing is written, all if it was answered; its connection, tasks
    and transaction are gone."""
    app = make_app(db, row)
    answers: list[int] = []

    async def request(db: Database, row: Any) -> None:
        answers.clear()
        await ask_into(answers, app, path)

    def answered_means_committed(row: Any, stored: str) -> None:
        assert answers in ([], [200], [200, 0])
        if answers and path not in WRITE_AFTERWARDS:
            assert stored == PATHS[path][-1]

    scenario = Scenario(request, PATHS[path], check=answered_means_committed)
    await cut_everywhere(db, row, scenario, by=by, moment=moment, driver=driver, around=around)


async def cancelled_after(event: threading.Event, app: Any, path: str = "/") -> Any:
    """A request that is cancelled when its thread has set the event; it has ended."""
    asked = asyncio.create_task(ask_into([], app, path))
    assert await asyncio.to_thread(event.wait, 30)
    asked.cancel()
    await asyncio.wait({asked})
    return asked


async def test_a_thread_whose_request_ended_as_it_waited_to_write_lets_others_write(
    sqlite_url: str,
) -> None:
    """SQLite's writers queue. One whose request is cancelled meanwhile, and whose thread lives on,
    gives its turn to the next."""
    async with connected(sqlite_url, pool_size=2, timeout=30) as db:
        row = await make_row(db)
        app = make_app(db, row)
        async with db.atomic():
            asked = asyncio.create_task(ask_into([], app, "/plain"))
            while db.pool_stats.in_use < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # its thread waits for the writers' turn by now, or soon
            asked.cancel()
            await asyncio.wait({asked})
        await back_to_rest(db, within=10)
        async with asyncio.timeout(10):
            await row.acreate(name="next")


def waiting_in_threads(db: Database) -> tuple[FastAPI, list[str], list[type[BaseException] | None]]:
    """An application whose threads take a connection of their own, the paths to do so, and how
    each of these threads has ended."""
    app, ends = plain_app(db, APIRoute), list[type[BaseException] | None]()

    def query() -> str:
        try:
            with db.connection_context():
                db.execute_sql("SELECT 1")
            ends.append(None)
        except BaseException as error:
            ends.append(type(error))
            raise
        return ""

    def held() -> Iterator[None]:
        query()
        yield

    async def streamed() -> StreamingResponse:
        return StreamingResponse(iter(query, ""))

    async def two_threads() -> None:
        await asyncio.gather(run_in_threadpool(query), run_in_threadpool(query))

    def in_background(tasks: BackgroundTasks) -> None:
        tasks.add_task(query)

    async def left_running() -> None:
        left = asyncio.create_task(run_in_threadpool(query))
        app.state.left.append(left)
        while db.pool_stats.waiting < len(app.state.left):
            await asyncio.sleep(0.001)

    async def shielded() -> None:
        app.state.left.append(asyncio.create_task(asyncio.to_thread(query)))
        await asyncio.shield(app.state.left[-1])

    app.post("/endpoint")(query)
    app.post("/dependency", dependencies=[Depends(held)])(lambda: None)
    app.post("/stream")(streamed)
    app.post("/threads")(two_threads)
    app.post("/background")(in_background)
    paths = ["/endpoint", "/dependency", "/stream", "/threads", "/background"]
    app.post("/left")(left_running)
    app.post("/shielded")(shielded)
    app.state.left = []
    return app, paths, ends


@contextmanager
def looks_at_cancellation() -> Iterator[list[object]]:
    """Who waits, each time that its thread looks whether it is cancelled."""
    looked, look = list[object](), _UnlessCancelled._check

    def looks(self: _UnlessCancelled) -> None:
        look(self)
        looked.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_UnlessCancelled, "_check", looks)
        yield looked


async def test_threads_of_cancelled_requests_leave_the_queue(sqlite_url: str) -> None:
    """Nobody waits for a thread whose request was cancelled: it gives its place in the pool's queue
    to those for whom somebody does, and counts as none that has waited in vain."""
    async with connected(sqlite_url, pool_size=1, timeout=60, max_waiting=7) as db:
        app, paths, ends = waiting_in_threads(db)
        async with db.connection_context(), asyncio.timeout(30):
            for _ in range(20):
                asked = [asyncio.create_task(ask_into([], app, path)) for path in paths]
                while db.pool_stats.waiting < len(paths) + 1:  # one of them has two threads
                    await asyncio.sleep(0.001)
                ends.clear()
                for each in asked:
                    each.cancel()
                await asyncio.wait(asked)
                while len(ends) < len(paths) + 1:
                    await asyncio.sleep(0.001)
                # anyio waits for the stream's thread, asyncio for none of the others.
                assert Counter(ends) == {PoolError: len(paths), asyncio.CancelledError: 1}
                assert db.pool_stats.waiting == 0
        answers: list[int] = []
        await ask_into(answers, app, "/endpoint")
        assert (answers, ends[-1]) == ([200, 0], None)
        assert (db.pool_stats.timed_out, db.pool_stats.refused) == (0, 0)


@pytest.mark.parametrize("by", ["task", "timeout"])
async def test_a_call_that_waits_for_another_database(
    sqlite_url: str, tmp_path: Path, by: str
) -> None:
    """A thread of ours, which has a connection of one database and waits for another's, is waited
    for: it leaves the queue as well, and gives back what it has."""
    other_url = f"sqlite:///{tmp_path}/other.db"
    async with (
        connected(sqlite_url, timeout=60) as db,
        connected(other_url, pool_size=1, timeout=60) as other,
    ):
        app = plain_app(db, PeeweeRoute)
        Peewee(other).init_app(app)

        def query() -> None:
            with other.connection_context():
                other.execute_sql("SELECT 1")

        limit = asyncio.timeout(None)  # until the thread waits

        async def limited() -> None:
            with pytest.raises(TimeoutError):
                async with limit:
                    await db.run(query)

        app.post("/task")(query)
        app.post("/timeout")(limited)
        async with other.connection_context(), asyncio.timeout(30):
            answers: list[int] = []
            asked = asyncio.create_task(ask_into(answers, app, f"/{by}"))
            while not other.pool_stats.waiting:
                await asyncio.sleep(0.001)
            if by == "task":
                asked.cancel()
            else:
                limit.reschedule(0)
            await asyncio.wait({asked})
            assert asked.cancelled() is (by == "task")
            assert (other.pool_stats.waiting, db.pool_stats.in_use) == (0, 0)
        assert answers == ([] if by == "task" else [200, 0])
        assert other.pool_stats.timed_out == 0


async def test_a_thread_that_cleans_up_after_its_request_was_cancelled(sqlite_url: str) -> None:
    """A wait that begins later goes on to its end, as an `await` in `finally` does."""
    async with connected(sqlite_url, pool_size=1, timeout=60) as db:
        app = plain_app(db, APIRoute)
        inside, go_on, cleaned = threading.Event(), threading.Event(), threading.Event()

        @app.post("/")
        def endpoint() -> None:
            try:
                inside.set()
                assert go_on.wait(30)
            finally:
                with db.connection_context():
                    db.execute_sql("SELECT 1")
                    cleaned.set()

        await cancelled_after(inside, app)
        async with db.connection_context(), asyncio.timeout(30):
            with looks_at_cancellation() as looked:
                go_on.set()
                while len(looked) < 3:
                    await asyncio.sleep(0.001)
        assert await asyncio.to_thread(cleaned.wait, 30)
        await back_to_rest(db, within=10)


@pytest.mark.parametrize("kind", ["call", "thread", "task"])
async def test_a_callback_of_a_commit_keeps_its_place(
    sqlite_url: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed is committed: what is to follow waits for its connection, whatever is cancelled."""
    monkeypatch.setattr(blocks, "ASK_AFTER", 0.005)
    other_url = f"sqlite:///{tmp_path}/other.db"
    async with (
        connected(sqlite_url, timeout=60) as db,
        connected(other_url, pool_size=1, timeout=60) as other,
    ):
        app, called = plain_app(db), threading.Event()
        Peewee(other).init_app(app)
        app.router.route_class = PeeweeRoute if kind == "call" else APIRoute

        def callback() -> None:
            with other.connection_context():
                other.execute_sql("SELECT 1")
                called.set()

        def write() -> None:
            with db.connection_context(), db.atomic():
                db.after_commit(callback)

        async def awrite() -> None:
            async with db.atomic():
                db.after_commit(lambda: run_in_threadpool(callback))
                await db.run(db.execute_sql, "SELECT 1")

        app.post("/")(awrite if kind == "task" else write)
        async with other.connection_context(), asyncio.timeout(30):
            asked = asyncio.create_task(ask_into([], app, "/"))
            while not other.pool_stats.waiting:
                await asyncio.sleep(0.001)
            asked.cancel()
            await asyncio.wait({asked}, timeout=0.05 if kind == "call" else None)
            await asyncio.sleep(0.05)  # ten times as long as any other thread would stay
            assert (other.pool_stats.waiting, called.is_set()) == (1, False)
        assert await asyncio.to_thread(called.wait, 30)
        await asyncio.wait({asked})
        await back_to_rest(db, within=10)
        await back_to_rest(other, within=10)


@pytest.mark.parametrize("path", ["/left", "/shielded"])
async def test_a_thread_that_may_outlive_its_request_keeps_its_place(
    sqlite_url: str, path: str
) -> None:
    """A request that is answered was not cancelled: a task that it left running waits on. So does a
    thread that isn't FastAPI's, of a cancelled one as well: it may be meant to."""
    async with connected(sqlite_url, pool_size=1, timeout=60) as db:
        app, _, ends = waiting_in_threads(db)
        async with db.connection_context(), asyncio.timeout(30):
            for count in (1, 2):
                asked = asyncio.create_task(ask_into([], app, path))
                while db.pool_stats.waiting < count:
                    await asyncio.sleep(0.001)
                if path == "/shielded":
                    asked.cancel()
                await asyncio.wait({asked})
                assert asked.cancelled() is (path == "/shielded")
            with looks_at_cancellation() as looked:
                while len(looked) < 5:
                    await asyncio.sleep(0.001)
            assert db.pool_stats.waiting == 2
        await asyncio.gather(*app.state.left)
        assert ends == [None, None]


@pytest.mark.parametrize("holding", ["get_db", "connection_context", "nothing"])
async def test_the_callbacks_of_a_commit_in_flight_are_called(
    db: Database, row: Any, driver: Driver, holding: str
) -> None:
    """A request is cancelled, and over, while its thread commits: what is to follow a commit
    follows."""
    app, called = plain_app(db, PeeweeRoute if holding == "nothing" else APIRoute), []
    loop = asyncio.get_running_loop()

    def write() -> None:
        with db.atomic():
            row.create(name="a")
            db.after_commit(lambda: called.append(threading.get_ident()))

    def write_in_context() -> None:
        with db.connection_context():
            write()

    app.post("/", dependencies=[Depends(get_db)] if holding == "get_db" else [])(
        write_in_context if holding == "connection_context" else write
    )
    asked = asyncio.create_task(ask_into([], app, "/"))

    def at_step(number: int) -> None:
        if driver.statements[-1] == "COMMIT":
            over = threading.Event()
            loop.call_soon_threadsafe(asked.cancel)
            if holding != "nothing":  # that waits for the thread
                loop.call_soon_threadsafe(asked.add_done_callback, lambda _: over.set())
                assert over.wait(30)

    driver.before_step = at_step
    await asyncio.wait({asked})
    await back_to_rest(db, within=10)
    driver.before_step = None
    assert await db.count(row.select().where(row.name == "a")) == len(called) == 1


@pytest.mark.parametrize("end", ["collected", "read to its end"])
async def test_a_generator_that_nobody_left_leaves_its_own_block_only(
    db: Database, row: Any, end: str
) -> None:
    """A `with db:` in a generator may be left anywhere, for instance when it is collected: in
    another request, whose block is none of its business."""

    def unfinished() -> Generator[None]:
        with db:
            yield

    def work() -> list[bool]:
        with db:
            row.create(name="a")
            if end == "collected":
                forgotten.close()
            else:
                with pytest.raises(LeaseEnded):
                    next(forgotten)
            return [db.in_transaction()]

    def begin() -> None:
        next(forgotten)

    forgotten = unfinished()
    await db.run(begin)  # which has ended the block as well
    assert await db.run(work) == [True]
    assert await db.count(row.select().where(row.name == "a")) == 1


async def test_a_database_of_peewees_own_whose_request_ends_as_it_connects(
    tmp_path: Path,
) -> None:
    """Its connection is closed, or given back to `playhouse.pool`."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(PooledSqliteDatabase):
        def _connect(self) -> Any:
            begun.set()
            assert go_on.wait(30)
            return super()._connect()

    db = Slow(str(tmp_path / "a.db"), max_connections=1, check_same_thread=False)
    app = plain_app(db, APIRoute)

    @app.post("/", dependencies=[Depends(get_db)])
    def endpoint() -> None:
        db.execute_sql("SELECT 1")

    await cancelled_after(begun, app)
    go_on.set()
    async with asyncio.timeout(10):
        while db._in_use or not db._connections:
            await asyncio.sleep(0.001)
    answers: list[int] = []
    await ask_into(answers, app, "/")
    assert answers == [200, 0]
    db.close_all()


async def test_a_thread_that_goes_on_after_the_rollback_writes_nothing(
    db: Database, row: Any, driver: Driver
) -> None:
    """The transaction of a dependency ends when its request is cancelled. The endpoint's thread,
    for which nobody waits, goes on: what it writes isn't committed on its own."""
    app = plain_app(db, APIRoute)
    halfway, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    lease: Any = None

    def in_transaction() -> Iterator[None]:
        with db.atomic():
            yield

    def endpoint() -> None:
        nonlocal lease
        lease = db._state.lease()
        try:
            row.create(name="a")
            halfway.set()
            assert go_on.wait(30)
            row.create(name="b")
        finally:
            ended.set()

    async def held_until_it_ended() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(ended.wait, 30)

    scoped = [Depends(each, scope="function") for each in (held_until_it_ended, in_transaction)]
    dependencies = [Depends(get_db), *scoped]
    app.post("/", dependencies=dependencies)(endpoint)

    def at_step(number: int) -> None:
        if driver.statements[-1] == "ROLLBACK":
            go_on.set()
            while not lease.turn.waiting:  # the endpoint's thread is the next to have its turn
                time.sleep(0.001)

    driver.before_step = at_step
    await cancelled_after(halfway, app)
    assert await asyncio.to_thread(ended.wait, 30)
    await back_to_rest(db, within=10)
    driver.before_step = None
    assert [each.name for each in await db.list(row.select().where(row.name != "old"))] == []


@pytest.mark.parametrize("swallowed", [False, True])
async def test_blocks_around_one_that_was_undone(db: Database, row: Any, swallowed: bool) -> None:
    """When the innermost block of a dependency is undone, those around it have nothing to do; one
    that is to commit says so."""
    app, errors = plain_app(db, APIRoute), []
    inside, go_on = threading.Event(), threading.Event()

    def nested() -> Iterator[None]:
        try:
            swallow = suppress(asyncio.CancelledError) if swallowed else nullcontext()
            with db.atomic(), swallow, db.atomic():
                row.create(name="a")
                yield
        except BaseException as error:
            errors.append(type(error))
            raise

    @app.post("/", dependencies=[Depends(get_db), Depends(nested, scope="function")])
    def endpoint() -> None:
        inside.set()
        assert go_on.wait(30)

    asked = await cancelled_after(inside, app)
    go_on.set()
    assert isinstance(asked.exception(), LeaseEnded) if swallowed else asked.cancelled()
    await back_to_rest(db, within=10)
    assert errors == [LeaseEnded if swallowed else asyncio.CancelledError]
    assert await db.run(stored_names, row) == ""


def late(db: Database, row: Any, way: str, called: list[str]) -> None:
    """What a thread does whose request was cancelled meanwhile."""
    if way == "with db":
        with db:
            row.create(name="b")
    elif way == "connection_context":
        with db.connection_context():
            row.create(name="b")
    elif way == "cursor":
        cursor = db.cursor()
        row.create(name="b")
        raise AssertionError(cursor)
    else:
        db.after_commit(lambda: called.append("b"))


@pytest.mark.parametrize("holding", ["get_db", "connection_context"])
@pytest.mark.parametrize("way", ["with db", "connection_context", "cursor", "after_commit"])
async def test_what_a_cancelled_request_has_undone_is_not_done_in_part(
    db: Database, row: Any, way: str, holding: str
) -> None:
    """A thread that goes on when its request's transaction was rolled back can do no more for it:
    not in a block of its own, and no callback is called."""
    app = plain_app(db, APIRoute)
    called: list[str] = []
    halfway, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def in_transaction() -> Iterator[None]:
        with nullcontext() if holding == "get_db" else db.connection_context(), db.atomic():
            yield

    def endpoint() -> None:
        row.create(name="a")
        halfway.set()
        assert go_on.wait(30)
        try:
            late(db, row, way, called)
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    held = [Depends(get_db)] if holding == "get_db" else []
    app.post("/", dependencies=[*held, Depends(in_transaction, scope="function")])(endpoint)
    await cancelled_after(halfway, app)
    await back_to_rest(db, within=10)
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 30)
    await back_to_rest(db, within=10)
    assert await db.run(stored_names, row) == ""
    assert [type(error) for error in errors] == [NoLease if way == "cursor" else LeaseEnded]
    assert called == []


async def test_a_cursor_of_a_cancelled_request_reaches_nobody_else(database_url: str) -> None:
    """Who has the driver's own cursor, and goes on when the request is over, has one of a
    connection that is closed: it isn't another's."""
    async with connected(database_url, pool_size=1) as db:
        row = await make_row(db)
        app = plain_app(db, APIRoute)
        halfway, go_on, ended = threading.Event(), threading.Event(), threading.Event()
        outcomes: list[Any] = []

        def endpoint() -> None:
            row.create(name="a")
            cursor = db.cursor()
            halfway.set()
            assert go_on.wait(30)
            try:
                outcomes.append(cursor.execute("SELECT 1"))
            except Exception as error:
                outcomes.append(error)
            finally:
                ended.set()

        app.post("/", dependencies=[Depends(get_db)])(endpoint)
        await cancelled_after(halfway, app)
        await back_to_rest(db, within=10)
        async with db.atomic():
            await row.acreate(name="b")
            go_on.set()
            assert await asyncio.to_thread(ended.wait, 30)
        assert isinstance(outcomes[0], Exception)
        assert await db.run(stored_names, row) == "ab"


@pytest.mark.parametrize("error", [None, LookupError])
async def test_manual_commit_of_a_request_that_is_over(
    db: Database, row: Any, error: type[Exception] | None
) -> None:
    """Its connection is kept until the thread leaves the block, which says that nothing of it was
    stored, if there is no error already."""
    app = plain_app(db, APIRoute)
    inside, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    @app.post("/", dependencies=[Depends(get_db)])
    def endpoint() -> None:
        try:
            with db.manual_commit():
                db.begin()
                row.create(name="a")
                inside.set()
                assert go_on.wait(30)
                if error is not None:
                    raise error
        except BaseException as raised:
            errors.append(raised)

    await cancelled_after(inside, app)
    assert db.pool_stats.in_use == 1
    go_on.set()
    await back_to_rest(db, within=10)
    async with asyncio.timeout(10):
        while not errors:
            await asyncio.sleep(0.001)
    assert type(errors[0]) is (error or LeaseEnded)
    assert await db.run(stored_names, row) == ""


async def test_a_connection_of_peewees_own_pool_that_is_in_use_is_closed(tmp_path: Path) -> None:
    """A transaction that can't be rolled back, since a thread of the cancelled request is in the
    driver, is rolled back by closing its connection, which no one else gets."""

    class Busy(PooledSqliteDatabase):
        def rollback(self) -> None:
            raise peewee.InternalError("Packet sequence number wrong")

    db = Busy(str(tmp_path / "a.db"), max_connections=1, check_same_thread=False)
    app = plain_app(db, APIRoute)
    inside, go_on = threading.Event(), threading.Event()

    @app.post("/", dependencies=[Depends(get_db)])
    def endpoint() -> None:
        with suppress(IndexError), db.atomic():  # Peewee's own block finds its stack empty
            inside.set()
            assert go_on.wait(30)

    asked = await cancelled_after(inside, app)
    assert asked.cancelled()
    go_on.set()
    assert (db._in_use, db._connections) == ({}, [])
    answers: list[int] = []
    inside.clear()
    await ask_into(answers, app, "/")
    assert answers == [200, 0]
    db.close_all()
