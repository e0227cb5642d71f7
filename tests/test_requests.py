"""What a request holds, for how long, and how its tasks and threads share it."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, NamedTuple

import anyio
import peewee
import pytest
from fastapi import Depends, HTTPException, Query
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute

from fastapi_peewee import (
    ConnectedDb,
    Database,
    LeaseEnded,
    NoLease,
    PeeweeRoute,
    connect,
    get_db,
    transaction,
)
from tests.apps import Watched, back_to_rest, client, connected, make_app, nested
from tests.apps import db as db
from tests.apps import note as note

ROUTES = pytest.mark.parametrize("route_class", [PeeweeRoute, APIRoute])
HOLDING = [Depends(get_db)]


class Seen(NamedTuple):
    place: str
    connection: int
    in_use: int
    thread: int


@pytest.fixture
def look(db: Database) -> Callable[[str], Seen]:
    """Uses the connection, in a synchronous place, and says which it was."""

    def look(place: str) -> Seen:
        db.execute_sql("SELECT 1")
        return Seen(place, id(db.connection()), db.pool_stats.in_use, threading.get_ident())

    return look


# One lease for a request.


async def test_one_connection_in_three_threads(db: Database, look: Callable[[str], Seen]) -> None:
    """A dependency, the endpoint and the dependency's exit, in a thread each, share a lease."""
    app = make_app(db)
    seen: list[Seen] = []
    loop, free = asyncio.get_running_loop(), threading.Event()

    def dependency(_: Annotated[Database, Depends(get_db)]) -> Iterator[None]:
        seen.append(look("dependency"))
        yield
        seen.append(look("exit"))

    async def take_its_thread_away(
        _: Annotated[None, Depends(dependency, scope="function")],
    ) -> None:
        taken = asyncio.Event()

        def wait() -> None:
            loop.call_soon_threadsafe(taken.set)
            free.wait(10)

        waiting.append(asyncio.create_task(anyio.to_thread.run_sync(wait)))
        await taken.wait()

    waiting: list[asyncio.Task[None]] = []

    @app.get("/", dependencies=[Depends(take_its_thread_away)])
    def endpoint() -> None:
        seen.append(look("endpoint"))

    async with client(app) as http:
        response = await http.get("/")
    free.set()
    await asyncio.gather(*waiting)
    assert response.status_code == 200
    assert [each.place for each in seen] == ["dependency", "endpoint", "exit"]
    assert len({each.thread for each in seen}) == 3
    assert {(each.connection, each.in_use) for each in seen} == {(seen[0].connection, 1)}


@ROUTES
@pytest.mark.parametrize("kind", ["def", "async"])
async def test_dependencies_and_endpoint_share_one_connection(
    db: Database, look: Callable[[str], Seen], route_class: type[APIRoute], kind: str
) -> None:
    """With `get_db`, sync and async code of a request use one lease, on both kinds of routes."""
    app = make_app(db, route_class)
    seen: list[Seen] = []

    def sync(held: ConnectedDb) -> Iterator[None]:
        assert held is db
        seen.append(look("sync dependency"))
        yield

    async def asynchronous(held: ConnectedDb) -> AsyncIterator[None]:
        seen.append(await held.run(look, "async dependency"))
        yield

    def plain_endpoint() -> None:
        seen.append(look("endpoint"))

    async def async_endpoint() -> None:
        async with db.atomic():
            seen.append(await db.run(look, "endpoint"))

    endpoint: Any = plain_endpoint if kind == "def" else async_endpoint
    app.get("/", dependencies=[Depends(sync), Depends(asynchronous)])(endpoint)
    watched = Watched(app, lambda: db.pool_stats.in_use)
    async with client(watched) as http:
        assert (await http.get("/")).status_code == 200
    assert [each.place for each in seen] == ["sync dependency", "async dependency", "endpoint"]
    assert {(each.connection, each.in_use) for each in seen} == {(seen[0].connection, 1)}
    assert watched.seen == [0]


@ROUTES
@pytest.mark.parametrize("kind", ["def", "async"])
@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("value", 200),
        ("returned 201", 201),
        ("returned 404", 404),
        ("returned 503", 503),
        ("HTTPException", 418),
        ("not found", 404),
        ("ValueError", 500),
        ("request invalid", 422),
        ("response invalid", 500),
        ("stream", 200),
    ],
)
async def test_the_connection_is_back_before_the_response_starts(
    sqlite_url: str, route_class: type[APIRoute], kind: str, outcome: str, status: int
) -> None:
    """What `get_db` took is given back before the first byte, however the request ends."""

    def act() -> Any:
        if outcome.startswith("returned"):
            return JSONResponse({}, status)
        if outcome == "stream":
            return StreamingResponse(iter(["a", "b"]))
        if outcome == "HTTPException":
            raise HTTPException(status)
        if outcome == "not found":
            raise peewee.DoesNotExist
        if outcome == "ValueError":
            raise ValueError
        return "no number" if outcome == "response invalid" else 1

    def query(name: str) -> str:
        db.execute_sql("SELECT 1")
        held.append(db.pool_stats.in_use)
        return name

    def sync(number: Annotated[int, Query()] = 0) -> Any:
        query("endpoint")
        return act()

    async def asynchronous(number: Annotated[int, Query()] = 0) -> Any:
        await db.run(query, "endpoint")
        return act()

    def dependency(_: ConnectedDb) -> str:
        return query("dependency")

    held: list[int] = []
    async with connected(sqlite_url) as db:
        app = make_app(db, route_class)
        endpoint: Any = sync if kind == "def" else asynchronous
        app.get("/", response_model=int, dependencies=[Depends(dependency)])(endpoint)
        watched = Watched(app, lambda: db.pool_stats.in_use)
        async with client(watched) as http:
            response = await http.get("/", params={"number": "x" if "request" in outcome else 1})
        assert response.status_code == status
        assert held == ([1] if "request" in outcome else [1, 1])
        assert watched.seen == [0]


async def test_a_connection_that_nobody_uses_is_not_opened(db: Database) -> None:
    """`get_db` takes a slot; the connection itself is opened by the first query."""
    app = make_app(db, APIRoute)
    app.get("/", dependencies=HOLDING)(lambda: db.pool_stats.in_use)
    async with client(app) as http:
        assert (await http.get("/")).json() == 1
    assert db.pool_stats.opened == 0


async def test_what_get_db_holds_is_over_after_the_response_has_started(db: Database) -> None:
    """The exit of a default-scope dependency comes too late for `get_db`, and is told so."""
    app = make_app(db)
    errors: list[Exception] = []

    def dependency(_: ConnectedDb) -> Iterator[None]:
        yield
        try:
            db.execute_sql("SELECT 1")
        except NoLease as error:
            errors.append(error)
        with db.connection_context():
            assert db.execute_sql("SELECT 2").fetchone() == (2,)

    @app.get("/", dependencies=[Depends(dependency)])
    def endpoint() -> int:
        return 1

    async with client(app, raises=True) as http:
        assert (await http.get("/")).json() == 1
    assert len(errors) == 1


@pytest.mark.parametrize("first", ["get_db", "the context"])
async def test_a_context_that_ends_after_the_response(db: Database, first: str) -> None:
    """A default-scope dependency may hold a `connection_context()`, with `get_db` or without: when
    it ends there is nothing left to give back, and nothing lost."""
    app = make_app(db)

    def dependency() -> Iterator[None]:
        with db.connection_context():
            yield

    both = [Depends(get_db), Depends(dependency)]

    @app.get("/", dependencies=both if first == "get_db" else both[::-1])
    def endpoint() -> int:
        return 1

    async with client(app, raises=True) as http:
        assert (await http.get("/")).json() == 1
    await back_to_rest(db)


@pytest.mark.parametrize("order", ["get_db first", "transaction first"])
async def test_get_db_and_a_transaction_share_one_connection(sqlite_url: str, order: str) -> None:
    """A request that asks for both gets by with a pool of one connection."""
    both = [Depends(get_db), Depends(transaction, scope="function")]
    if order == "transaction first":
        both.reverse()
    async with connected(sqlite_url, pool_size=1, timeout=0.2) as db:
        app = make_app(db)

        @app.get("/", dependencies=both)
        def endpoint() -> int:
            return db.pool_stats.in_use

        async with client(app) as http:
            response = await http.get("/")
        assert (response.status_code, response.json()) == (200, 1)


async def test_requests_that_hold_a_connection_wait_for_each_other(database_url: str) -> None:
    """Forty parallel requests over two connections all come through, each with its own."""
    async with connected(database_url, pool_size=2, timeout=30) as db:
        await db.aexecute_sql("SELECT 1")
        app = make_app(db)
        using: dict[int, int] = {}

        def connection() -> int:
            db.execute_sql("SELECT 1")
            return id(db.connection())

        def dependency(_: ConnectedDb) -> int:
            return connection()

        @app.get("/{number}")
        def endpoint(number: int, theirs: Annotated[int, Depends(dependency)]) -> bool:
            alone = using.setdefault(theirs, number) == number
            same = connection() == theirs
            return alone and same and using.pop(theirs) == number

        async with client(app) as http:
            responses = await asyncio.gather(*(http.get(f"/{number}") for number in range(40)))
        assert [response.json() for response in responses] == [True] * 40


# Tasks and threads of one request.


async def _awaited(call: Any) -> None:
    await call


async def together(how: str, calls: list[Any]) -> None:
    if how == "gather":
        await asyncio.gather(*calls)
    elif how == "task group":
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(call)
    else:
        async with anyio.create_task_group() as group:
            for call in calls:
                group.start_soon(_awaited, call)


@pytest.mark.parametrize("how", ["gather", "task group", "anyio"])
@pytest.mark.parametrize("place", ["get_db", "atomic", "atomic under get_db"])
async def test_tasks_of_one_request_use_its_connection_one_at_a_time(
    db: Database, note: Any, how: str, place: str
) -> None:
    """`gather` and task groups on one lease: calls take turns, and none is lost."""
    app = make_app(db)
    running: list[int] = []
    seen: list[tuple[int, int]] = []

    def create(number: int) -> None:
        running.append(number)
        with db.atomic():
            note.create(text=str(number))
        seen.append((len(running), db.pool_stats.in_use))
        running.remove(number)

    async def acreate(number: int) -> None:
        await db.run(create, number)
        async with db.atomic():
            await note.acreate(text=f"a{number}")

    @app.get("/", dependencies=HOLDING if "get_db" in place else [])
    async def endpoint() -> None:
        async with contextlib.AsyncExitStack() as stack:
            if "atomic" in place:
                await stack.enter_async_context(db.atomic())
            await together(how, [acreate(number) for number in range(20)])

    async with client(app) as http:
        assert (await http.get("/")).status_code == 200
    assert seen == [(1, 1)] * 20
    assert await db.count(note.select()) == 40


async def test_one_failing_task_of_a_group_rolls_all_of_its_transaction_back(
    db: Database, note: Any
) -> None:
    """A task group inside a transaction: the first failure cancels the rest, nothing is kept."""
    app = make_app(db)

    async def create(number: int) -> None:
        await note.acreate(text=str(number))
        if number == 5:
            raise ValueError

    @app.post("/")
    async def endpoint() -> None:
        async with db.atomic(), asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(create(number))

    async with client(app) as http:
        assert (await http.post("/")).status_code == 500
    assert await db.count(note.select()) == 0
    assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("wrapped", [False, True], ids=["block", "block of a context manager"])
async def test_threads_of_one_request_use_its_connection_one_at_a_time(
    db: Database, note: Any, wrapped: bool
) -> None:
    """Sync code that a request runs in several threads at once takes turns on `get_db`'s lease."""
    app = make_app(db)
    inside: list[int] = []

    def create(number: int) -> int:
        with nested(db.atomic(), contextlib.nullcontext()) if wrapped else db.atomic():
            note.create(text=str(number))
            inside.append(number)
            together = len(inside)
            note.create(text=f"b{number}")
            inside.remove(number)
        return together

    @app.post("/", dependencies=HOLDING)
    async def endpoint() -> list[int]:
        calls = (asyncio.to_thread(create, number) for number in range(8))
        return [*await asyncio.gather(*calls), db.pool_stats.in_use]

    async with client(app) as http:
        response = await http.post("/")
    assert response.json() == [1] * 9
    assert await db.count(note.select()) == 16


async def test_nested_blocks_across_sync_and_async_code(db: Database, note: Any) -> None:
    """An inner block that fails, sync or async, takes nothing with it; the outer takes all."""
    app = make_app(db)

    def sync(name: str, fail: bool) -> None:
        with db.atomic():
            note.create(text=name)
            if fail:
                raise LookupError

    async def asynchronous(name: str, fail: bool) -> None:
        async with db.atomic():
            await note.acreate(text=name)
            await db.run(sync, name + " within", False)
            if fail:
                raise LookupError

    @app.post("/", dependencies=HOLDING)
    async def endpoint(fail: bool) -> None:
        async with db.atomic():
            for failing in (False, True):
                with contextlib.suppress(LookupError):
                    await db.run(sync, f"sync {failing}", failing)
                with contextlib.suppress(LookupError):
                    await asynchronous(f"async {failing}", failing)
            if fail:
                raise HTTPException(400)

    async with client(app) as http:
        assert (await http.post("/?fail=true")).status_code == 400
        assert await db.count(note.select()) == 0
        assert (await http.post("/?fail=false")).status_code == 200
    texts = [row.text for row in await note.select().order_by(note.text).aexecute()]
    assert texts == ["async False", "async False within", "sync False"]


async def test_a_task_that_outlives_its_transaction_is_refused(db: Database, note: Any) -> None:
    """A task left behind by a request can't write into a transaction that is over."""
    app = make_app(db)
    tasks: list[asyncio.Task[Any]] = []
    ended = asyncio.Event()

    async def late(in_thread: bool) -> None:
        await ended.wait()
        if in_thread:
            await asyncio.to_thread(note.create, text="late")
        else:
            await note.acreate(text="late")

    @app.post("/")
    async def endpoint() -> None:
        async with db.atomic():
            tasks.extend(asyncio.create_task(late(in_thread)) for in_thread in (True, False))

    async with client(app) as http:
        assert (await http.post("/")).status_code == 200
    ended.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [LeaseEnded, LeaseEnded]
    assert await db.count(note.select()) == 0


async def test_a_task_that_outlives_its_request_takes_a_lease_of_its_own(
    db: Database, note: Any
) -> None:
    """What `get_db` held is gone with the request; a task left behind gets another connection."""
    app = make_app(db)
    tasks: list[asyncio.Task[Any]] = []
    ended = asyncio.Event()

    async def late() -> int:
        await ended.wait()
        await note.acreate(text="late")
        return await db.run(lambda: db.pool_stats.in_use)

    @app.post("/", dependencies=HOLDING)
    async def endpoint() -> None:
        tasks.append(asyncio.create_task(late()))

    async with client(app) as http:
        await http.post("/")
    ended.set()
    assert await tasks[0] == 1
    assert await db.count(note.select()) == 1


def test_a_transaction_that_outlasts_its_response_cannot_hang_it(sqlite_url: str) -> None:
    """A dependency of one's own that commits after the response ends in time, under `get_db`, too.

    What is acknowledged is there; an error is as good.
    """
    outcome: list[Any] = []

    async def in_transaction() -> AsyncIterator[None]:
        async with db.atomic():
            yield

    async def scenario() -> None:
        await db.acreate_tables([Note])
        app = make_app(db)

        @app.post("/", dependencies=[Depends(get_db), Depends(in_transaction)])
        def endpoint() -> None:
            Note.create(text="a")

        async with client(app) as http:
            response = await http.post("/")
        outcome.append((response.is_success, await db.count(Note.select())))
        await back_to_rest(db)
        await db.close_pool()

    db = connect(sqlite_url)

    class Note(db.Model):
        text = peewee.CharField()

    # A thread that can be left alone: what hangs here can't even be cancelled.
    thread = threading.Thread(target=lambda: asyncio.run(scenario()), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "the request hangs"
    assert outcome in ([(True, 1)], [(False, 0)])


async def test_the_drivers_connection_is_there_before_the_first_query(db: Database) -> None:
    """`db.connection()` and `db.cursor()` work at once on what `get_db` holds."""
    app = make_app(db, APIRoute)

    @app.get("/", dependencies=HOLDING)
    def endpoint() -> list[int]:
        cursor = db.connection().cursor()
        cursor.execute("SELECT 1")
        other = db.cursor()
        other.execute("SELECT 2")
        return [*cursor.fetchone(), *other.fetchone()]

    async with client(app) as http:
        response = await http.get("/")
    assert (response.status_code, response.json()) == (200, [1, 2])


async def test_a_call_that_still_connects_as_the_response_starts_keeps_its_slot(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease isn't given back while a thread is about to give it its connection."""
    async with connected(sqlite_url, pool_size=1, timeout=5) as db:
        app = make_app(db)
        loop = asyncio.get_running_loop()
        connecting, go_on = asyncio.Event(), threading.Event()
        open_connection, close_connection = db.open_connection, db.close_connection
        opened: list[Any] = []

        def slowly(limit: float) -> Any:
            loop.call_soon_threadsafe(connecting.set)
            assert go_on.wait(10)
            opened.append(open_connection(limit))
            return opened[-1]

        def close(conn: Any) -> None:
            opened.remove(conn)
            close_connection(conn)

        monkeypatch.setattr(db, "open_connection", slowly)
        monkeypatch.setattr(db, "close_connection", close)
        tasks: list[asyncio.Task[int]] = []

        @app.get("/", dependencies=HOLDING)
        async def endpoint() -> None:
            tasks.append(asyncio.create_task(db.run(lambda: db.pool_stats.in_use)))
            await connecting.wait()
            loop.call_later(0.05, go_on.set)

        async with client(app) as http:
            assert (await http.get("/")).status_code == 200
        go_on.set()
        (result,) = await asyncio.gather(*tasks, return_exceptions=True)
        assert result == 1 or isinstance(result, LeaseEnded)
        await db.close_pool()
        assert opened == []
