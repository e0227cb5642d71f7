"""Where in a request a query may run, and what happens where it may not."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import peewee
import pytest
from fastapi import BackgroundTasks, Depends, HTTPException
from fastapi.routing import APIRoute

from fastapi_peewee import BlockingQuery, ConnectedDb, Database, NoLease, PeeweeRoute, get_db
from fastapi_peewee.lifecycle import PeeweeMiddleware
from tests.apps import BLOCKS, back_to_rest, client, connected, make_app, refusal
from tests.apps import db as db
from tests.apps import note as note

ROUTES = pytest.mark.parametrize("route_class", [PeeweeRoute, APIRoute])
HOLDING = [Depends(get_db)]


# Places that hold nothing, and code that blocks.


@ROUTES
async def test_a_query_in_a_sync_dependency_without_get_db_is_refused(
    db: Database, note: Any, route_class: type[APIRoute]
) -> None:
    """A place in a request without a lease raises `NoLease`, and names `Depends(get_db)`."""
    app = make_app(db, route_class)

    def dependency() -> None:
        note.create(text="leaked")

    @app.get("/", dependencies=[Depends(dependency)])
    async def endpoint() -> None: ...

    async with client(app, raises=True) as http:
        with pytest.raises(NoLease, match=r"Depends\(get_db\)"):
            await http.get("/")
    assert await db.count(note.select()) == 0


async def test_a_query_in_a_def_endpoint_of_a_plain_route_is_refused(
    db: Database, note: Any
) -> None:
    """A plain route without `get_db` raises `NoLease`, and names `PeeweeRoute`."""
    app = make_app(db, APIRoute)

    @app.get("/")
    def endpoint() -> None:
        note.create(text="leaked")

    async with client(app, raises=True) as http:
        with pytest.raises(NoLease, match="route_class=PeeweeRoute"):
            await http.get("/")
    assert await db.count(note.select()) == 0


async def test_manual_commit_in_a_place_that_holds_nothing_is_refused(
    db: Database, note: Any
) -> None:
    """`manual_commit()` says so as a query does."""
    app = make_app(db, APIRoute)

    @app.get("/")
    def endpoint() -> None:
        with db.manual_commit():
            raise AssertionError

    async with client(app, raises=True) as http:
        with pytest.raises(NoLease, match="route_class=PeeweeRoute"):
            await http.get("/")


@pytest.mark.parametrize("place", ["endpoint", "get_db", "atomic", "dependency", "background"])
async def test_a_sync_query_in_async_code_is_refused_before_it_runs(
    db: Database, note: Any, place: str
) -> None:
    """A query on the event loop raises `BlockingQuery` wherever it is in a request."""
    app = make_app(db)

    async def query() -> None:
        note.create(text="blocking")

    dependencies = {"get_db": HOLDING, "dependency": [Depends(query)]}

    @app.get("/", dependencies=dependencies.get(place, []))
    async def endpoint(tasks: BackgroundTasks) -> None:
        if place == "background":
            tasks.add_task(query)
        elif place == "atomic":
            async with db.atomic():
                await query()
        elif place != "dependency":
            await query()

    async with client(app, raises=True) as http:
        with refusal(BlockingQuery, r"await db\.run"):
            await http.get("/")
    assert await db.count(note.select()) == 0


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("place", ["route", "dependency", "plain route", "plain dependency"])
async def test_blocks_of_peewee_in_sync_code(
    db: Database, note: Any, block: str, place: str
) -> None:
    """`with db`, `connection_context` and `atomic` neither close a lease nor leave one behind.

    In a place that holds none, the first two take one, and `atomic` is refused.
    """
    app = make_app(db, APIRoute if "plain" in place else PeeweeRoute)

    def use() -> list[int]:
        with BLOCKS[block](db):
            note.create(text="first")
        if "plain" not in place:  # the lease is still there
            note.create(text="second")
        return [db.pool_stats.in_use]

    dependency = [Depends(use)] if "dependency" in place else []
    if place == "dependency":
        dependency = [Depends(get_db), *dependency]

    def endpoint() -> list[int]:
        return [] if "dependency" in place else use()

    app.get("/", dependencies=dependency)(endpoint)
    async with client(app) as http:
        response = await http.get("/")
    if block == "atomic" and "plain" in place:
        assert response.status_code == 500
        assert await db.count(note.select()) == 0
        return
    assert response.status_code == 200
    if "dependency" not in place:
        assert response.json() == ([0] if "plain" in place else [1])
    assert await db.count(note.select()) == (1 if "plain" in place else 2)


@pytest.mark.parametrize("block", ["with db", "connection_context"])
async def test_blocks_around_the_yield_of_a_sync_dependency(
    db: Database, note: Any, block: str
) -> None:
    """A sync dependency may yield inside its block: enter and exit run in two contexts."""
    app = make_app(db)
    used: list[int] = []

    def dependency() -> Iterator[None]:
        with BLOCKS[block](db):
            note.create(text="entered")
            yield
            used.append(db.pool_stats.in_use)

    @app.get("/", dependencies=[Depends(dependency, scope="function")])
    async def endpoint() -> int:
        return await db.count(note.select())

    async with client(app, raises=True) as http:
        assert (await http.get("/")).json() == 1
    assert used == [1]
    assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("block", ["with db", "connection_context"])
async def test_two_dependencies_in_blocks_of_their_own(db: Database, note: Any, block: str) -> None:
    """What one of them gives back, the other doesn't lose: they share a connection."""
    app = make_app(db)

    def first() -> Iterator[None]:
        with BLOCKS[block](db):
            note.create(text="first in")
            yield
            note.create(text="first out")

    def second() -> Iterator[None]:
        with BLOCKS[block](db):
            note.create(text="second in")
            yield
            note.create(text="second out")

    dependencies = [Depends(each, scope="function") for each in (first, second)]

    @app.get("/", dependencies=dependencies)
    async def endpoint() -> list[int]:
        return [await db.count(note.select()), db.pool_stats.in_use]

    async with client(app) as http:
        assert (await http.get("/")).json() == [2, 1]
    assert db.pool_stats.in_use == 0
    assert await db.count(note.select()) == 4


async def test_a_transaction_around_the_yield_of_a_sync_dependency(
    database_url: str,
) -> None:
    """Peewee's idiom for a transaction per request: the endpoint is part of it."""
    async with connected(database_url, timeout=1) as db:

        class Note(db.Model):
            text = peewee.CharField()

        await db.acreate_tables([Note])
        app = make_app(db)

        def in_transaction(_: ConnectedDb) -> Iterator[None]:
            with db.atomic():
                yield

        @app.post("/", dependencies=[Depends(in_transaction, scope="function")])
        def endpoint(fail: bool) -> bool:
            Note.create(text="a")
            if fail:
                raise HTTPException(400)
            return db.in_transaction()

        async with client(app) as http:
            failed = await http.post("/?fail=true")
            kept = await db.count(Note.select())
            done = await http.post("/?fail=false")
        assert (failed.status_code, kept) == (400, 0)
        assert (done.status_code, done.json()) == (200, True)


@pytest.mark.parametrize("route_class", [PeeweeRoute, APIRoute])
@pytest.mark.parametrize("way", ["helper", "stack", "with in a stack", "delegated"])
async def test_blocks_that_a_sync_dependency_enters_by_a_helper(
    database_url: str, way: str, route_class: Any
) -> None:
    """The endpoint, in another thread, uses the block that a dependency yields in, though it is the
    user's own context manager, or an `ExitStack`, that has entered it."""
    async with connected(database_url, timeout=1) as db:
        app, seen = make_app(db, route_class), []

        @contextmanager
        def session() -> Iterator[None]:
            with db.connection_context(), db.atomic():
                yield

        def helper() -> Iterator[None]:
            with session():
                yield

        def stack() -> Iterator[None]:
            with ExitStack() as blocks:
                blocks.enter_context(db.connection_context())
                blocks.enter_context(db.atomic())
                yield

        def with_in_a_stack() -> Iterator[None]:
            with ExitStack() as blocks:
                blocks.enter_context(db)
                yield

        def delegated() -> Iterator[None]:
            yield from helper()

        ways = {
            "helper": helper,
            "stack": stack,
            "with in a stack": with_in_a_stack,
            "delegated": delegated,
        }

        @app.get("/", dependencies=[Depends(ways[way], scope="function")])
        def endpoint() -> bool:
            seen.append(db.execute_sql("SELECT 1").fetchone())
            return db.in_transaction()

        async with client(app, raises=True) as http:
            assert (await http.get("/")).json() is True
        assert seen == [(1,)]
        await back_to_rest(db)


@pytest.mark.parametrize("place", ["route", "get_db", "plain route"])
async def test_connect_and_close_in_a_request(db: Database, note: Any, place: str) -> None:
    """Where a lease is, `connect` finds it open and `close` leaves it; elsewhere none is opened."""
    app = make_app(db, PeeweeRoute if place == "route" else APIRoute)

    @app.get("/", dependencies=HOLDING if place == "get_db" else [])
    def endpoint() -> list[bool]:
        opened = db.connect(reuse_if_open=True)
        with pytest.raises(peewee.OperationalError, match="already opened"):
            db.connect()
        closed = db.close()
        note.create(text="still open")
        return [opened, closed, db.is_closed()]

    @app.get("/close")
    def close() -> bool:
        return db.close()

    opened = db.pool_stats.opened
    async with client(app, raises=True) as http:
        if place == "plain route":
            with pytest.raises(NoLease):
                await http.get("/")
        else:
            assert (await http.get("/")).json() == [False, False, False]
        assert (await http.get("/close")).json() is False
    assert db.pool_stats.opened == opened


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan"])
async def test_another_event_loop_than_asyncios_is_refused(db: Database, kind: str) -> None:
    """As the application starts, and before a request takes anything: on trio."""

    def without_asyncio() -> None:
        middleware: Any = PeeweeMiddleware(make_app(db), db)
        middleware({"type": kind}, None, None).send(None)

    with pytest.raises(RuntimeError, match="not on trio"):
        await asyncio.to_thread(without_asyncio)
    assert db.pool_stats.in_use == 0
