"""Several databases, applications within applications, and middleware around them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import anyio
import peewee
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp

from fastapi_peewee import (
    BlockingQuery,
    ConnectedDb,
    Database,
    InTransaction,
    NoLease,
    Peewee,
    PeeweeRoute,
    get_db,
)
from tests.apps import Watched, back_to_rest, client, connected, make_app, walk_away
from tests.apps import db as db
from tests.apps import no_collector as no_collector
from tests.apps import note as note


async def test_one_application_with_two_databases(database_url: str, sqlite_url: str) -> None:
    """`peewee.get_db` says which; each has leases and transactions of its own.

    A PeeweeRoute holds a connection of the one that was named first.
    """
    async with connected(database_url) as one, connected(f"{sqlite_url}2") as two:
        app = FastAPI()
        first, second = Peewee(one), Peewee(two)
        first.init_app(app)
        second.init_app(app)

        class First(one.Model):
            text = peewee.CharField()

        class Second(two.Model):
            text = peewee.CharField()

        await one.acreate_tables([First])
        await two.acreate_tables([Second])

        @app.get("/both", dependencies=[Depends(first.get_db), Depends(second.get_db)])
        def endpoint() -> list[int]:
            First.create(text="a")
            Second.create(text="b")
            return [one.pool_stats.in_use, two.pool_stats.in_use]

        @app.get("/rolled-back")
        async def rolled_back() -> None:
            async with one.atomic(), two.atomic():
                await First.acreate(text="lost")
                await Second.acreate(text="lost")
                raise HTTPException(418)

        @app.get("/unnamed", dependencies=[Depends(get_db)])
        def unnamed() -> None: ...

        @app.get("/route")
        def stats() -> list[int]:
            return [one.pool_stats.in_use, two.pool_stats.in_use]

        watched = Watched(app, stats)
        async with client(watched) as http:
            assert (await http.get("/both")).json() == [1, 1]
            assert (await http.get("/route")).json() == [1, 0], "the one that was named first"
            assert (await http.get("/rolled-back")).status_code == 418
        assert watched.seen == 3 * [[0, 0]]
        assert (await one.count(First.select()), await two.count(Second.select())) == (1, 1)
        async with client(app, raises=True) as http:
            with pytest.raises(RuntimeError, match=r"several databases.*peewee\.get_db"):
                await http.get("/unnamed")


@pytest.mark.parametrize("cancel_at", range(12))
async def test_two_leases_of_a_request_come_back_though_it_is_cancelled(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, cancel_at: int
) -> None:
    """Cancelled at any step, also while one of them is given back: the other isn't forgotten."""
    async with connected(sqlite_url) as one, connected(f"{sqlite_url}2") as two:
        app = FastAPI()
        peewees = Peewee(one), Peewee(two)
        steps = 0
        for each in peewees:
            each.init_app(app)
        loop = asyncio.get_running_loop()

        def step(*_: Any) -> bool:
            nonlocal steps
            if steps == cancel_at:
                cancelled = threading.Event()
                loop.call_soon_threadsafe(task.cancel)
                loop.call_soon_threadsafe(cancelled.set)
                assert cancelled.wait(10)
            steps += 1
            return True

        def stepping(clean: Callable[..., bool]) -> Callable[..., bool]:
            return lambda *args: step() and clean(*args) and step()

        for db in (one, two):
            monkeypatch.setattr(db, "clean", stepping(db.clean))

        @app.get("/", dependencies=[Depends(each.get_db) for each in peewees])
        def endpoint() -> None:
            for db in (one, two):
                step()
                db.execute_sql("SELECT 1")

        async with client(app) as http:
            task = asyncio.create_task(http.get("/"))
            await asyncio.wait({task}, timeout=10)
            assert task.done(), "hangs"
            await back_to_rest(one)
            await back_to_rest(two)
            if cancel_at < 2:
                assert task.cancelled()


@pytest.mark.parametrize("theirs", ["none", "same", "other"])
@pytest.mark.parametrize("kind", ["get_db", "PeeweeRoute", "async", "transaction"])
async def test_a_sub_application_has_its_own_database_or_that_of_the_one_around_it(
    database_url: str, sqlite_url: str, theirs: str, kind: str
) -> None:
    """A mounted application uses what its own `Peewee` names, or else what is around it."""
    async with connected(database_url) as outer, connected(f"{sqlite_url}2") as other:
        app = make_app(outer)
        part = FastAPI()
        db = other if theirs == "other" else outer
        if theirs != "none":
            Peewee(db).init_app(part)
        part.router.route_class = APIRoute if kind == "get_db" else PeeweeRoute

        def use() -> list[int]:
            db.execute_sql("SELECT 1")
            return [outer.pool_stats.in_use, other.pool_stats.in_use]

        if kind == "async":

            @part.get("/")
            async def asynchronous() -> list[int]:
                return await db.run(use)

        elif kind == "transaction":

            @part.get("/")
            def in_transaction(held: InTransaction) -> list[int]:
                assert held is db
                return use() if db.in_transaction() else []

        else:
            dependencies = [Depends(get_db)] if kind == "get_db" else []
            part.get("/", dependencies=dependencies)(use)
        app.mount("/part", part)
        app.get("/outer", dependencies=[Depends(get_db)])(lambda: outer.pool_stats.in_use)
        async with client(app) as http:
            response = await http.get("/part/")
            assert response.status_code == 200
            assert response.json() == ([0, 1] if theirs == "other" else [1, 0])
            assert (await http.get("/outer")).json() == 1
        assert other.pool_stats.in_use == 0


# What stands around us.


class Middleware(BaseHTTPMiddleware):
    """Starlette's, which runs the application in a task of its own. It uses the database, too."""

    def __init__(self, app: ASGIApp, database: Database, seen: list[Any]) -> None:
        super().__init__(app)
        self.db = database
        self.seen = seen

    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        self.seen.append(await self.db.run(lambda: self.db.pool_stats.in_use))
        response = await call_next(request)
        self.seen.append(self.db.pool_stats.in_use)
        return response


PLACES = pytest.mark.parametrize("place", ["around", "under"])


def surrounded(db: Database, place: str, seen: list[Any]) -> FastAPI:
    app = FastAPI()
    if place == "under":
        app.add_middleware(Middleware, database=db, seen=seen)
    Peewee(db).init_app(app)
    if place == "around":
        app.add_middleware(Middleware, database=db, seen=seen)
    return app


@PLACES
async def test_base_http_middleware(db: Database, note: Any, place: str) -> None:
    """Starlette's middleware, around ours or under it, changes nothing of what a request holds."""
    seen: list[Any] = []
    app = surrounded(db, place, seen)

    def dependency(_: ConnectedDb) -> int:
        note.create(text="dependency")
        return db.pool_stats.in_use

    @app.post("/")
    def endpoint(held: InTransaction, in_use: Annotated[int, Depends(dependency)]) -> list[int]:
        note.create(text="endpoint")
        return [in_use, db.pool_stats.in_use]

    @app.get("/fails")
    def fails(held: InTransaction) -> None:
        note.create(text="lost")
        raise HTTPException(418)

    watched = Watched(app, lambda: db.pool_stats.in_use)
    async with client(watched) as http:
        assert (await http.post("/")).json() == [1, 1]
        assert (await http.get("/fails")).status_code == 418
    assert watched.seen == [0, 0]
    assert seen == [1, 0, 1, 0]
    assert await db.count(note.select()) == 2


@PLACES
@pytest.mark.parametrize("held", [False, True])
async def test_a_transaction_after_the_response_is_refused_under_base_http_middleware(
    db: Database, note: Any, place: str, held: bool
) -> None:
    """A dependency that yields in a transaction is refused, also where another task than its own
    sends the response."""
    app = surrounded(db, place, [])

    async def in_transaction() -> AsyncIterator[None]:
        async with db.atomic():
            yield

    @app.get("/", dependencies=[*([Depends(get_db)] if held else []), Depends(in_transaction)])
    async def endpoint() -> None:
        await note.acreate(text="lost")

    async with client(app, raises=True) as http:
        with pytest.raises(RuntimeError, match="committed after the response"):
            await http.get("/")
    assert await db.count(note.select()) == 0


@PLACES
@pytest.mark.usefixtures("no_collector")
async def test_a_stream_that_is_cut_under_base_http_middleware(
    db: Database, note: Any, place: str
) -> None:
    """With Starlette's middleware, too, a stream that is cut is rolled back and gives back."""
    app = surrounded(db, place, [])

    @app.get("/stream")
    def stream() -> StreamingResponse:
        async def texts() -> AsyncIterator[str]:
            async with db.atomic():
                await note.acreate(text="lost if cut")
                for _ in range(1000):
                    yield "x"
                    await db.run(note.select().count)

        return StreamingResponse(texts())

    for _ in range(2 * db.pool.size):
        await walk_away(app, "/stream", after=3)
        await back_to_rest(db)
    assert await db.count(note.select()) == 0


async def test_a_middleware_of_ones_own_may_take_the_database_as_db(sqlite_url: str) -> None:
    """`init_app` isn't misled by somebody else's middleware that was given the same database."""

    class Own:
        def __init__(self, app: ASGIApp, db: Database) -> None:
            self.app = app

        async def __call__(self, *args: Any) -> None:
            await self.app(*args)

    async with connected(sqlite_url) as db:
        app = FastAPI()
        app.add_middleware(Own, db=db)
        Peewee(db).init_app(app)
        app.get("/", dependencies=[Depends(get_db)])(lambda: db.pool_stats.in_use)
        async with client(app) as http:
            response = await http.get("/")
        assert (response.status_code, response.text) == (200, "1")


async def test_a_sync_query_in_middleware_is_refused(sqlite_url: str) -> None:
    """`@app.middleware("http")` runs on the event loop: `BlockingQuery`, if it is under ours."""
    async with connected(sqlite_url) as db:
        app = FastAPI()

        @app.middleware("http")
        async def middleware(
            request: Request, call_next: Callable[[Request], Awaitable[Response]]
        ) -> Response:
            db.execute_sql("SELECT 1")
            return await call_next(request)

        Peewee(db).init_app(app)
        app.get("/")(lambda: 1)
        async with client(app, raises=True) as http:
            with pytest.raises(BlockingQuery):
                await http.get("/")


@pytest.mark.parametrize("place", ["get_db", "atomic", "plain"])
@pytest.mark.parametrize("same", [True, False], ids=["same application", "another"])
async def test_a_request_made_inside_of_a_request_does_not_inherit_its_connection(
    db: Database, note: Any, place: str, same: bool
) -> None:
    """In one process and one task, the inner request has a lease of its own, and the outer keeps
    its."""
    app = make_app(db)
    inner = app if same else make_app(db)

    @inner.post("/inner")
    def write(held: InTransaction) -> int:
        note.create(text="inner")
        return db.pool_stats.in_use

    @inner.get("/nothing")
    async def nothing() -> str:
        def query() -> str:
            try:
                db.execute_sql("SELECT 1")
            except NoLease:
                return "NoLease"
            return "inherited"

        return await asyncio.to_thread(query)

    async def ask() -> list[Any]:
        async with client(inner) as http:
            return [(await http.get("/nothing")).json(), (await http.post("/inner")).json()]

    async def outer() -> list[Any]:
        answers = await ask()
        answers.append(await db.run(lambda: db.pool_stats.in_use))
        return answers

    if place == "atomic":

        @app.post("/")
        async def endpoint() -> list[Any]:
            # A read-only transaction: on SQLite, one that writes keeps out all others.
            async with db.atomic(read_only=True):
                await db.count(note.select())
                return await outer()

    else:
        app.post("/", dependencies=[Depends(get_db)] if place == "get_db" else [])(outer)
    async with client(app) as http:
        response = await http.post("/")
    held = 0 if place == "plain" else 1
    assert response.json() == ["NoLease", held + 1, 1]
    assert await db.count(note.select()) == 1


async def test_a_cancelled_request_gives_back_all_that_it_holds(
    database_url: str, sqlite_url: str
) -> None:
    """A request that holds connections of two databases, and is cancelled, loses neither slot."""
    async with connected(database_url) as one, connected(f"{sqlite_url}2") as two:
        app = FastAPI()
        first, second = Peewee(one), Peewee(two)
        first.init_app(app)
        second.init_app(app)
        running = anyio.Event()

        @app.get("/", dependencies=[Depends(first.get_db), Depends(second.get_db)])
        async def endpoint() -> None:
            await one.run(lambda: one.execute_sql("SELECT 1").fetchall())
            await two.run(lambda: two.execute_sql("SELECT 1").fetchall())
            running.set()
            await anyio.sleep_forever()

        async with client(app) as http, anyio.create_task_group() as tasks:
            tasks.start_soon(http.get, "/")
            await running.wait()
            tasks.cancel_scope.cancel()
        await back_to_rest(one)
        await back_to_rest(two)
