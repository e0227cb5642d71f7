"""What comes after a response has started: streams and background tasks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.from_thread
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_peewee import Database, NoLease, Peewee, PeeweeRoute, get_db
from tests.apps import BLOCKS, back_to_rest, chain, client, http_scope, make_app, refusal, walk_away
from tests.apps import db as db
from tests.apps import no_collector as no_collector
from tests.apps import note as note

ROUTES = pytest.mark.parametrize("route_class", [PeeweeRoute, APIRoute])
HOLDING = [Depends(get_db)]


# Background tasks.


@ROUTES
@pytest.mark.parametrize("kind", ["def", "async"])
async def test_background_tasks_that_are_async(
    db: Database, note: Any, route_class: type[APIRoute], kind: str
) -> None:
    """An `async` background task takes leases of its own, and holds none while it waits."""
    app = make_app(db, route_class)
    seen: list[int] = []

    async def task() -> None:
        seen.append(db.pool_stats.in_use)
        async with db.atomic():
            await note.acreate(text="a")
            seen.append(db.pool_stats.in_use)
        seen.append(db.pool_stats.in_use)

    def plain(tasks: BackgroundTasks) -> None:
        tasks.add_task(task)

    async def coroutine(tasks: BackgroundTasks) -> None:
        tasks.add_task(task)

    endpoint: Any = plain if kind == "def" else coroutine
    app.get("/", dependencies=HOLDING)(endpoint)
    async with client(app) as http:
        assert (await http.get("/")).status_code == 200
    assert seen == [0, 1, 0]
    assert await db.count(note.select()) == 1


@pytest.mark.parametrize("kind", ["def", "async"])
async def test_background_tasks_that_are_sync(db: Database, note: Any, kind: str) -> None:
    """On PeeweeRoute a `def` background task runs its queries under a lease of its own."""
    app = make_app(db)

    def task(text: str) -> None:
        note.create(text=text)
        assert db.pool_stats.in_use == 1

    def plain(tasks: BackgroundTasks) -> None:
        tasks.add_task(task, "a")
        tasks.add_task(task, text="b")

    async def coroutine(tasks: BackgroundTasks) -> None:
        plain(tasks)

    endpoint: Any = plain if kind == "def" else coroutine
    app.get("/", dependencies=HOLDING)(endpoint)
    async with client(app, raises=True) as http:
        assert (await http.get("/")).status_code == 200
    assert await db.count(note.select()) == 2


@pytest.mark.parametrize("how", ["set", "added", "mixed in"])
async def test_background_tasks_that_a_subclass_sets_on_the_response(
    db: Database, note: Any, how: str
) -> None:
    """They get a lease as the endpoint's own do, though our handler hadn't seen them."""

    def write(text: str) -> None:
        note.create(text=text)

    class Logging(PeeweeRoute if how == "set" else APIRoute):  # type: ignore[misc]
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def logged(request: Request) -> Response:
                response: Response = await handler(request)
                if how == "added":
                    tasks = response.background
                    assert isinstance(tasks, BackgroundTasks)
                    tasks.add_task(write, "subclass")
                else:
                    response.background = BackgroundTask(write, "subclass")
                return response

            return logged

    class Both(Logging, PeeweeRoute): ...

    route_class = Logging if how == "set" else Both
    router = APIRouter(route_class=route_class)

    @router.get("/")
    def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(write, "endpoint")

    app = make_app(db, route_class)
    app.get("/direct")(endpoint)
    app.include_router(router, prefix="/included")
    async with client(app, raises=True) as http:
        for path in ("/direct", "/included/"):
            assert (await http.get(path)).status_code == 200
    texts = ["endpoint", "subclass"] if how == "added" else ["subclass"]
    assert [row.text for row in await note.select().order_by(note.id).aexecute()] == texts * 2
    assert db.pool_stats.in_use == 0


async def test_a_subclass_may_return_any_application(db: Database) -> None:
    """As on a plain route, its handler's answer needs to be nothing more than one."""

    class Route(PeeweeRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            async def handle(request: Request) -> Any:
                return JSONResponse({}).__call__

            return handle

    app = make_app(db, Route)
    app.get("/")(lambda: None)
    async with client(app, raises=True) as http:
        assert (await http.get("/")).json() == {}


async def test_a_sync_background_task_that_adds_another_one(db: Database, note: Any) -> None:
    """Starlette runs what is added while the tasks run: it gets a lease of its own, too."""
    app = make_app(db)

    @app.get("/")
    def endpoint(tasks: BackgroundTasks) -> None:
        def first() -> None:
            note.create(text="first")
            tasks.add_task(note.create, text="second")

        tasks.add_task(first)

    async with client(app, raises=True) as http:
        assert (await http.get("/")).status_code == 200
    assert [row.text for row in await note.select().order_by(note.id).aexecute()] == [
        "first",
        "second",
    ]
    assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("retried", [False, True])
async def test_a_background_task_has_its_arguments_as_they_are(db: Database, retried: bool) -> None:
    """What `db.run` takes for itself is the task's own, as it is on a plain route."""
    app = make_app(db)
    seen: list[dict[str, int]] = []

    def named(retries: int) -> None:
        seen.append({"retries": retries})

    def others(**options: int) -> None:
        seen.append(options)

    @app.get("/")
    def endpoint(tasks: BackgroundTasks) -> None:
        for task in (named, others):
            tasks.add_task(db.retry(task) if retried else task, retries=7)

    async with client(app, raises=True) as http:
        assert (await http.get("/")).status_code == 200
    assert seen == [{"retries": 7}] * 2


async def test_sync_background_tasks_of_plain_routes_are_refused_unless_they_say_how(
    db: Database, note: Any
) -> None:
    """On a plain route, a `def` background task gets `NoLease`, or enters `connection_context`."""
    app = make_app(db, APIRoute)

    def careless() -> None:
        note.create(text="a")

    def careful() -> None:
        with db.connection_context():
            note.create(text="b")

    @app.get("/{name}")
    def endpoint(name: str, tasks: BackgroundTasks) -> None:
        tasks.add_task({"careless": careless, "careful": careful}[name])

    async with client(app, raises=True) as http:
        with refusal(NoLease, r"db\.run"):
            await http.get("/careless")
        await http.get("/careful")
    assert [row.text for row in await note.select().aexecute()] == ["b"]


# Streams.


@pytest.fixture
async def numbered(db: Database, note: Any) -> Any:
    await note.abulk_create([note(text=f"{n:03}") for n in range(100)])
    return note


@pytest.mark.parametrize("reading", ["iterate", "atomic"])
@pytest.mark.parametrize("kind", ["returned", "response_class", "json lines", "events"])
async def test_a_stream_takes_a_connection_of_its_own(
    db: Database, numbered: Any, kind: str, reading: str
) -> None:
    """An async generator streams a query; `get_db`'s connection has gone back before.

    Event streams begin before that: see below.
    """
    app = make_app(db)

    async def rows() -> AsyncIterator[Any]:
        if reading == "atomic":
            async with db.atomic():
                for row in await db.list(numbered.select()):
                    last[:] = [db.pool_stats.in_use]
                    yield row.text
            return
        async for row in db.iterate(numbered.select().order_by(numbered.text), buffer_size=7):
            last[:] = [db.pool_stats.in_use]
            yield row.text

    last: list[int] = []

    if kind == "returned":

        @app.get("/", dependencies=HOLDING)
        def endpoint() -> StreamingResponse:
            return StreamingResponse(rows())

    else:
        response_class: Any = {
            "response_class": StreamingResponse,
            "events": EventSourceResponse,
        }.get(kind)
        options = {"response_class": response_class} if response_class else {}
        app.get("/", dependencies=[] if kind == "events" else HOLDING, **options)(rows)
    async with client(app) as http:
        response = await http.get("/")
    assert [text in response.text for text in ("000", "050", "099")] == [True] * 3
    assert last == [1]
    await back_to_rest(db)


class Late:
    """Middleware that holds the start of a response back until `after` is set."""

    def __init__(self, app: ASGIApp, after: asyncio.Event) -> None:
        self.app = app
        self.after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_late(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self.after.wait()
            await send(message)

        await self.app(scope, receive, send_late)


@pytest.mark.parametrize("reading", ["iterate", "atomic"])
async def test_an_event_stream_that_begins_before_its_response(
    db: Database, numbered: Any, reading: str
) -> None:
    """FastAPI asks for an event before it sends the headers: `get_db`'s lease is still there."""
    begun = asyncio.Event()
    app = FastAPI()
    app.add_middleware(Late, after=begun)
    Peewee(db).init_app(app)

    @app.get("/", response_class=EventSourceResponse, dependencies=HOLDING)
    async def events() -> AsyncIterator[str]:
        if reading == "iterate":
            async for row in db.iterate(numbered.select(), buffer_size=7):
                begun.set()
                yield row.text
        else:
            async with db.atomic():
                for row in await db.list(numbered.select()):
                    begun.set()
                    yield row.text

    async with client(app) as http:
        response = await asyncio.wait_for(http.get("/"), 10)
    assert response.status_code == 200
    assert response.text.count("data:") == 100
    await back_to_rest(db)


@pytest.mark.parametrize("block", ["with db", "atomic in connection_context"])
async def test_a_sync_event_stream_that_begins_before_its_response(
    db: Database, numbered: Any, block: str
) -> None:
    """Its transaction isn't taken for a dependency's, which would be committed too late."""
    begun = asyncio.Event()
    app = FastAPI()
    app.add_middleware(Late, after=begun)
    Peewee(db).init_app(app)

    @app.get("/", response_class=EventSourceResponse)
    def events() -> Iterator[str]:
        with BLOCKS[block](db):
            for number in range(20):
                numbered.create(text="event")
                if number == 2:
                    anyio.from_thread.run_sync(begun.set)
                yield str(number)

    async with client(app, raises=True) as http:
        response = await asyncio.wait_for(http.get("/"), 10)
    assert response.text.count("data:") == 20
    assert await db.count(numbered.select()) == 120
    await back_to_rest(db)


async def wait_a_little(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    response = await call_next(request)
    await asyncio.sleep(0.02)
    return response


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("reading", ["iterate", "atomic", "sync"])
@pytest.mark.parametrize("middleware", ["gzip", "base http"])
async def test_a_stream_under_middleware_that_holds_its_beginning_back(
    db: Database, numbered: Any, middleware: str, reading: str, held: bool, spec_version: str
) -> None:
    """What it has open when its response starts at last is its own, and no dependency's."""
    app = FastAPI()
    if middleware == "gzip":
        app.add_middleware(GZipMiddleware)
    else:
        app.add_middleware(BaseHTTPMiddleware, dispatch=wait_a_little)
    Peewee(db).init_app(app)

    async def rows() -> AsyncIterator[str]:
        if reading == "iterate":
            async for row in db.iterate(numbered.select(), buffer_size=7):
                yield row.text
        else:
            async with db.atomic():
                for number in range(100):
                    await numbered.acreate(text="written")
                    yield str(number)

    def sync_rows() -> Iterator[str]:
        with db.connection_context(), db.atomic():
            for number in range(100):
                numbered.create(text="written")
                yield str(number)

    @app.get("/", dependencies=HOLDING if held else [])
    def stream() -> StreamingResponse:
        return StreamingResponse(sync_rows() if reading == "sync" else rows())

    messages: list[Message] = []

    async def receive() -> Message:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def send(message: Message) -> None:
        messages.append(message)

    scope = http_scope("GET", "/", spec_version)
    scope["headers"] = [(b"accept-encoding", b"gzip")]
    await asyncio.wait_for(asyncio.create_task(app(scope, receive, send)), 10)
    assert messages[0]["status"] == 200
    assert await db.count(numbered.select()) == (100 if reading == "iterate" else 200)
    await back_to_rest(db)


class FirstRow(StreamingResponse):
    """Takes the first row before it sends its start, so that it could be a 404 still."""

    async def stream_response(self, send: Send) -> None:
        rows = aiter(self.body_iterator)
        first: Any = await anext(rows)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first.encode(), "more_body": True})
        async for row in rows:
            body: Any = row
            await send({"type": "http.response.body", "body": body.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class OwnCall(FirstRow):
    """Iterates without Starlette's help."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


class OwnTask(OwnCall):
    """Iterates in a task of its own, as `sse-starlette` does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self.stream_response, send)


@pytest.mark.parametrize("reading", ["atomic", "helper", "iterate"])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("response_class", [FirstRow, OwnCall, OwnTask])
@pytest.mark.parametrize("middleware", ["none", "gzip", "base http"])
async def test_a_stream_that_begins_before_its_response_in_a_class_of_ones_own(
    db: Database, numbered: Any, middleware: str, response_class: Any, held: bool, reading: str
) -> None:
    """A block of its generator is no dependency's, whoever reads it, in whatever task."""
    app = FastAPI()
    if middleware == "gzip":
        app.add_middleware(GZipMiddleware)
    elif middleware == "base http":
        app.add_middleware(BaseHTTPMiddleware, dispatch=wait_a_little)
        app.add_middleware(BaseHTTPMiddleware, dispatch=wait_a_little)
    Peewee(db).init_app(app)

    @asynccontextmanager
    async def session() -> AsyncIterator[None]:
        async with db.atomic():
            yield

    async def rows() -> AsyncIterator[str]:
        if reading == "iterate":
            async for row in db.iterate(numbered.select(), buffer_size=7):
                yield row.text
        else:
            async with session() if reading == "helper" else db.atomic():
                for number in range(100):
                    await numbered.acreate(text="written")
                    yield f"{number:03}"

    @app.get("/", dependencies=HOLDING if held else [])
    async def stream() -> Any:
        return response_class(rows())

    async with client(app, raises=True) as http:
        response = await asyncio.wait_for(http.get("/"), 10)
    assert (response.status_code, len(response.text)) == (200, 300)
    assert await db.count(numbered.select()) == (100 if reading == "iterate" else 200)
    await back_to_rest(db)


@ROUTES
@pytest.mark.parametrize("held", [False, True])
async def test_a_stream_whose_first_row_the_endpoint_takes(
    db: Database, note: Any, route_class: type[APIRoute], held: bool
) -> None:
    """The block that is open then is the generator's, and committed as it ends."""
    app = make_app(db, route_class)

    async def rows() -> AsyncIterator[str]:
        async with db.atomic():
            for number in range(3):
                await note.acreate(text="written")
                yield str(number)

    async def both(first: str, others: AsyncIterator[str]) -> AsyncIterator[str]:
        yield first
        async for row in others:
            yield row

    @app.get("/", dependencies=HOLDING if held else [])
    async def endpoint() -> StreamingResponse:
        written = rows()
        return StreamingResponse(both(await anext(written), written))

    async with client(app, raises=True) as http:
        response = await asyncio.create_task(http.get("/"))
    assert response.text == "012"
    assert await db.count(note.select()) == 3
    await back_to_rest(db)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("kind", ["iterate", "atomic", "json lines", "events"])
async def test_a_client_that_walks_away_from_a_stream(
    db: Database, numbered: Any, kind: str, spec_version: str
) -> None:
    """A stream that is cut is rolled back, and its connection is given back, soon."""
    app = make_app(db)

    async def rows() -> AsyncIterator[Any]:
        if kind == "iterate":
            async for row in db.iterate(numbered.select(), buffer_size=7):
                yield row.text
            return
        async with db.atomic():
            await numbered.acreate(text="written")
            for number in range(10_000):
                yield str(number)
                await db.run(numbered.get, text="000")

    options: dict[str, Any] = {"response_class": StreamingResponse}
    if kind == "json lines":
        options = {}
    elif kind == "events":
        options = {"response_class": EventSourceResponse}
    app.get("/", **options)(rows)
    for _ in range(2 * db.pool.size):
        assert await walk_away(app, "/", after=3, spec_version=spec_version)
        await back_to_rest(db)
    assert await db.count(numbered.select()) == 100


@pytest.mark.usefixtures("no_collector")
@ROUTES
@pytest.mark.parametrize("returned", [True, False])
async def test_a_sync_generator_with_a_connection_context_inside(
    db: Database, numbered: Any, route_class: type[APIRoute], returned: bool
) -> None:
    """A sync generator streams a query's rows inside `with db.connection_context()`."""
    app = make_app(db, route_class)

    def rows() -> Iterator[str]:
        with db.connection_context():
            for row in numbered.select().order_by(numbered.text).iterator():
                yield row.text + "\n"

    if returned:
        app.get("/", response_model=None)(lambda: StreamingResponse(rows()))
    else:
        app.get("/", response_class=StreamingResponse)(rows)
    async with client(app) as http:
        response = await http.get("/")
    assert response.text.split() == [f"{n:03}" for n in range(100)]
    assert db.pool_stats.in_use == 0
    for _ in range(2 * db.pool.size):
        await walk_away(app, "/", after=3)
        await back_to_rest(db)


async def test_a_sync_generator_without_a_connection_is_refused(
    db: Database, numbered: Any
) -> None:
    """A sync generator that just queries gets `NoLease`: nothing would give its lease back."""
    app = make_app(db)

    @app.get("/", response_class=StreamingResponse, dependencies=HOLDING)
    def rows() -> Iterator[str]:
        for row in numbered.select():
            yield row.text

    async with client(app, raises=True) as http:
        with refusal(NoLease, r"db\.connection_context"):
            await http.get("/")


@pytest.mark.parametrize("block", ["with db", "connection_context"])
async def test_several_queries_in_a_sync_generator(db: Database, numbered: Any, block: str) -> None:
    """Each step of a sync generator has a context of its own: no query runs on a wrong connection.

    It finds its block's lease, or is refused; in either case the lease is given back.
    """
    app = make_app(db)

    @app.get("/", response_class=StreamingResponse)
    def rows() -> Iterator[str]:
        with BLOCKS[block](db):
            for number in range(3):
                yield numbered.get(text=f"{number:03}").text

    async with client(app, raises=True) as http:
        try:
            assert (await http.get("/")).text == "000001002"
        except Exception as error:
            assert any(isinstance(cause, NoLease) for cause in chain(error))  # noqa: PT017
    await back_to_rest(db)
