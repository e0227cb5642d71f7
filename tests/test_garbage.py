"""What requests leave to Python's garbage collector: nothing.

It stops a server that has much to look at for tens of milliseconds; the less is left to it, the
less often it comes.
"""

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import peewee
import pytest
from fastapi import FastAPI

from fastapi_peewee import Database, InTransaction, Peewee, respond
from tests.apps import back_to_rest, client, connected, with_all_uses
from tests.apps import db as db
from tests.apps import no_collector as no_collector
from tests.modes import Oops
from tests.shop import BareUserOut, Models, UserOut

REQUESTS = 3
#: The paths of `with_all_uses()`.
USES = ["/route", "/async", "/block", "/transaction", "/get_db", "/context"]
#: Whose objects and calls are looked for. FastAPI's are its own.
PACKAGES = {"fastapi_peewee", "peewee", "psycopg", "psycopg_binary", "pymysql", "sqlite3", "tests"}


@pytest.fixture
async def shop(db: Database) -> Models:
    shop = Models(db)
    await db.acreate_tables([shop.User, shop.Item])
    user = await shop.User.acreate(name="ann")
    await shop.Item.acreate(title="a", owner=user)
    return shop


@pytest.fixture
def app(db: Database, shop: Models) -> FastAPI:
    app, User = FastAPI(), shop.User
    Peewee(db, forbid_lazy_loads=True).init_app(app)

    @app.get("/query", response_model=list[UserOut])
    async def query() -> Any:
        return User.select()

    @app.get("/query-in-a-thread", response_model=list[UserOut])
    def query_in_a_thread() -> Any:
        return User.select()

    @app.get("/stream")
    async def stream() -> Any:
        return respond(User.select(), list[BareUserOut], stream=True)

    @app.get("/instance", response_model=UserOut)
    async def instance() -> Any:
        return await User.aget_by_id(1)

    @app.get("/create", response_model=BareUserOut)
    async def create() -> Any:
        return await User.acreate(name="bob")

    @app.get("/create-in-a-thread", response_model=BareUserOut)
    def create_in_a_thread() -> Any:
        return User.create(name="bob")

    @app.get("/nested-blocks")
    async def nested_blocks() -> Any:
        async with db.atomic(), db.atomic():
            return await db.run(User.select().count)

    @app.get("/block-in-a-transaction")
    def block_in_a_transaction(_: InTransaction) -> Any:
        with db.atomic():
            return User.select().count()

    @app.get("/missing", response_model=UserOut)
    async def missing() -> Any:
        return await User.aget_by_id(100)

    @app.get("/missing-in-a-thread", response_model=UserOut)
    def missing_in_a_thread() -> Any:
        return User.get_by_id(100)

    @app.get("/refused")
    async def refused() -> Any:
        return await User.acreate(id=1, name="bob")

    @app.get("/refused-in-a-thread")
    def refused_in_a_thread() -> Any:
        return User.create(id=1, name="bob")

    @app.get("/refused-in-a-block")
    async def refused_in_a_block() -> Any:
        async with db.atomic():
            return await User.acreate(id=1, name="bob")

    @app.get("/broken")
    async def broken() -> Any:
        return await db.run(db.execute_sql, "SELECT nothing")

    @app.get("/broken-in-a-thread")
    def broken_in_a_thread() -> Any:
        return db.execute_sql("SELECT nothing")

    @app.get("/lazy", response_model=UserOut)
    def lazy() -> Any:
        return {"id": 1, "name": "ann", "items": User.get_by_id(1).items}

    assert with_all_uses(app, db) == USES
    return app


async def left(request: Callable[[], Any]) -> list[str]:
    """Objects and calls of ours, Peewee's and the drivers' that only the collector can free."""
    await request()  # what is done once
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(REQUESTS):
            await request()
        gc.collect()
        return [name for each in gc.garbage if (name := _name_of_ours(each))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def _name_of_ours(each: Any) -> str:
    if isinstance(each, FrameType):
        code = each.f_code
        of_ours = PACKAGES & {*Path(code.co_filename).parts, Path(code.co_filename).stem}
        return f"{code.co_qualname}:{each.f_lineno}" if of_ours else ""
    cls = type(each)
    return cls.__qualname__ if cls.__module__.partition(".")[0] in PACKAGES else ""


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/query", 200),
        ("/query-in-a-thread", 200),
        ("/stream", 200),
        ("/instance", 200),
        ("/create", 200),
        ("/create-in-a-thread", 200),
        ("/nested-blocks", 200),
        ("/block-in-a-transaction", 200),
        *((path, 200) for path in USES),
        ("/missing", 404),
        ("/missing-in-a-thread", 404),
        ("/refused", 409),
        ("/refused-in-a-thread", 409),
        ("/refused-in-a-block", 409),
        ("/broken", 500),
        ("/broken-in-a-thread", 500),
        ("/lazy", 500),
    ],
)
async def test_a_request_leaves_nothing_to_the_collector(
    app: FastAPI, path: str, status: int, no_collector: None
) -> None:
    """What a request has used, its lease above all, is free when it is over, also if it failed."""
    async with client(app) as http:

        async def request() -> None:
            assert (await http.get(path)).status_code == status

        assert await left(request) == []


async def test_a_lost_connection_leaves_nothing_to_the_collector(
    postgres_url: str, no_collector: None
) -> None:
    """A statement on the event loop whose connection is lost is free when it has failed."""
    ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
    ended += "WHERE datname = current_database() AND starts_with(query, 'SELECT pg_sleep')"
    async with connected(postgres_url, pool_size=2) as db:

        def end() -> None:
            while db.execute_sql(ended).fetchone() == (0,):
                pass

        async def lost() -> None:
            await db.run(int)  # there is a connection
            ending = asyncio.create_task(db.run(end))
            with pytest.raises(peewee.OperationalError):
                await db.aread_texts("SELECT pg_sleep(30)::text", [])
            await ending

        assert await left(lost) == []


async def test_a_block_leaves_nothing_to_the_collector(
    db: Database, shop: Models, no_collector: None
) -> None:
    """Blocks of each kind are free when they have ended, the ones that failed, too."""

    async def blocks() -> None:
        async with db.atomic(), db.transaction(), db.savepoint():
            await shop.User.acreate(name="bob")
        with pytest.raises(peewee.IntegrityError):
            async with db.transaction():
                await shop.User.acreate(id=1, name="bob")

    assert await left(blocks) == []


async def test_a_refused_query_leaves_nothing_to_the_collector(
    db: Database, shop: Models, no_collector: None
) -> None:
    """Nor does an error outside of requests, when whoever caught it is done with it."""

    async def refused() -> None:
        for create in (shop.User.acreate, partial(db.run, shop.User.create)):
            with pytest.raises(peewee.IntegrityError):
                await create(id=1, name="bob")

    assert await left(refused) == []


async def test_retries_leave_nothing_to_the_collector(
    db: Database, shop: Models, no_collector: None
) -> None:
    """Nor does a function that is tried again, which is made for one call."""

    async def retried() -> None:
        await db.run(shop.User.create, name="bob", retries=3)
        with pytest.raises(peewee.IntegrityError):
            await db.run(shop.User.create, id=1, name="bob", retries=3)

    assert await left(retried) == []


async def test_what_is_cancelled_leaves_nothing_to_the_collector(
    db: Database, shop: Models, no_collector: None
) -> None:
    """Whenever a task is cancelled, what it has begun is free when the task has ended."""

    async def work() -> None:
        await shop.User.acreate(name="bob")
        await db.run(shop.User.create, name="bob")
        async with db.atomic():
            await db.run(shop.User.create, name="bob")

    async def cancelled() -> None:
        for steps in range(1, 60):
            task = asyncio.create_task(work())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

    assert await left(cancelled) == []
    # What was cancelled before SQLite's writing thread had taken it is over; the thread may not be.
    await back_to_rest(db, within=10)


class Held:
    """A function that a thread is in until it may go on."""

    def __init__(self, then: Callable[..., Any]) -> None:
        self.then = then
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.begun.set()
        assert self.may_go_on.wait(10)
        return self.then(*args, **kwargs)

    async def cancels(self, work: Coroutine[Any, Any, Any]) -> None:
        """Cancel this work while a thread is in the function."""
        task = asyncio.create_task(work)
        await asyncio.to_thread(self.begun.wait, 10)
        for _ in range(5):  # until the task waits for what it is to be cancelled in
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        self.may_go_on.set()
        await asyncio.wait([task])
        assert task.cancelled()


def fail() -> None:
    raise Oops


async def test_a_call_that_fails_when_it_is_cancelled_leaves_nothing_to_the_collector(
    db: Database, no_collector: None
) -> None:
    """Nobody hears of its error, since the task is cancelled; nor does the call keep it."""

    async def cancelled() -> None:
        held = Held(fail)
        await held.cancels(db.run(held))

    assert await left(cancelled) == []


async def test_a_block_that_is_cancelled_as_it_begins_leaves_nothing_to_the_collector(
    db: Database, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction has begun in its thread by then, and is rolled back."""
    begin = db.begin

    async def cancelled() -> None:
        held = Held(begin)
        monkeypatch.setattr(db, "begin", held)
        await held.cancels(db.atomic().__aenter__())

    assert await left(cancelled) == []


async def test_a_block_that_is_cancelled_as_it_ends_leaves_nothing_to_the_collector(
    db: Database, no_collector: None
) -> None:
    """It waits for a call of another task that runs in it, and is cancelled meanwhile."""

    async def cancelled() -> None:
        held, calls = Held(lambda: None), []

        async def work() -> None:
            async with db.atomic():
                calls.append(asyncio.create_task(db.run(held)))
                while not held.begun.is_set():
                    await asyncio.sleep(0)

        await held.cancels(work())
        await asyncio.wait(calls)

    assert await left(cancelled) == []
