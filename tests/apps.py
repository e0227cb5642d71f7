"""Applications in process: a client for them, and one that walks away or looks over a shoulder."""

import asyncio
import gc
import inspect
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import peewee
import pytest
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_peewee import Database, InTransaction, Peewee, PeeweeRoute, connect, get_db


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Database]:
    """A database on whose pool nothing may be left in use in the end."""
    db = connect(url, **{"pool_size": 4, **options})
    try:
        yield db
        assert db.pool_stats.in_use == 0, "a connection was not given back"
    finally:
        await db.close_pool(grace=0)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """On each of the three databases; a test module asks for it with `import db as db`."""
    async with connected(database_url) as db:
        yield db


@pytest.fixture
async def note(db: Database) -> Any:
    """A model with one field, `text`, and its empty table."""

    class Note(db.Model):
        text = peewee.CharField()

    await db.acreate_tables([Note])
    return Note


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Nothing is given back only because the garbage collector comes round."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make_app(db: Any, route_class: type[APIRoute] = PeeweeRoute) -> FastAPI:
    app = FastAPI()
    Peewee(db).init_app(app)
    app.router.route_class = route_class
    return app


def client(app: ASGIApp, *, raises: bool = False) -> httpx.AsyncClient:
    """Answers a failure with 500, as a server does, unless it `raises`."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=raises)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def with_all_uses(app: FastAPI, db: Database) -> list[str]:
    """Adds an endpoint for each way in which a request comes by a connection; returns the paths."""

    def query() -> Any:
        return db.execute_sql("SELECT 1").fetchone()[0]

    async def asynchronous() -> Any:
        return await db.run(query)

    async def block() -> Any:
        async with db.atomic():
            return await db.run(query)

    def context() -> Any:
        with db.connection_context():
            return query()

    def in_transaction(held: InTransaction) -> Any:
        return query()

    app.get("/route")(query)
    app.get("/async")(asynchronous)
    app.get("/block")(block)
    app.get("/transaction")(in_transaction)
    app.router.route_class = APIRoute
    app.get("/get_db", dependencies=[Depends(get_db)])(query)
    app.get("/context")(context)
    app.router.route_class = PeeweeRoute
    return ["/route", "/async", "/block", "/transaction", "/get_db", "/context"]


def assert_unavailable(response: Any) -> None:
    assert response.status_code == 503
    assert response.json() == {"detail": "database unavailable"}, response.text
    assert int(response.headers["retry-after"]) >= 1


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def refusal(expected: type[Exception], words: str) -> Iterator[None]:
    """An error, perhaps as the cause of the one that Starlette makes of it after a response."""
    with pytest.raises((expected, RuntimeError)) as failure:
        yield
    causes = [error for error in chain(failure.value) if isinstance(error, expected)]
    assert causes, failure.value
    assert re.search(words, str(causes[0]))


class Watched:
    """An application, with `look` called as a response leaves it: outside of all middleware."""

    def __init__(self, app: ASGIApp, look: Callable[[], Any]) -> None:
        self.app = app
        self.look = look
        self.seen: list[Any] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def looking(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = self.look()
                self.seen.append(await found if inspect.isawaitable(found) else found)
            await send(message)

        await self.app(scope, receive, looking)


def http_scope(method: str, path: str, spec_version: str = "2.3") -> Scope:
    """What a server tells an application of a request without a body."""
    path, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [],
    }


async def walk_away(app: ASGIApp, path: str, *, after: int, spec_version: str = "2.3") -> bytes:
    """GET `path` and disconnect when `after` pieces of the body have come. Returns those.

    A server of the specification's version 2.3 tells the application by a message that can be
    received, one of 2.4 by a `send` that fails.
    """
    gone = anyio.Event()
    pieces: list[bytes] = []
    scope = http_scope("GET", path, spec_version)
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if gone.is_set():
            if spec_version >= "2.4":
                raise OSError
            await anyio.lowlevel.checkpoint()
            return
        if message["type"] == "http.response.body" and message["body"]:
            pieces.append(message["body"])
            if len(pieces) == after:
                gone.set()

    async def serve() -> None:
        try:
            await app(scope, receive, send)
        except* ClientDisconnect:
            pass

    await asyncio.create_task(serve())  # as a server does: with a context of its own
    return b"".join(pieces)


async def back_to_rest(db: Database, *, within: float = 1) -> None:
    """Wait for a pool from which nothing is lent any more; fail if that takes a second, or longer
    than so many."""
    with anyio.fail_after(within):
        while db.pool_stats.in_use:
            await anyio.sleep(0.001)


@contextmanager
def nested(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


BLOCKS: dict[str, Callable[[Database], Any]] = {
    "with db": lambda db: db,
    "connection_context": lambda db: db.connection_context(),
    "atomic": lambda db: db.atomic(),
    "atomic in connection_context": lambda db: nested(db.connection_context(), db.atomic()),
    "atomic in with db": lambda db: nested(db, db.atomic()),
}


def until(condition: Callable[[], Any]) -> None:
    """Wait, and keep an event loop from going on meanwhile."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
