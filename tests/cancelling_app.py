"""An application with an endpoint of each kind, and requests to it that can be cancelled.

They are made as a server makes them: a task calls the application, and no socket is in between.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import ASGIApp, Message

from fastapi_peewee import ConnectedDb, Database, InTransaction, Peewee, get_db, respond
from tests.apps import http_scope

#: Path and what it may leave, as `Scenario.outcomes`. What is answered has written all.
PATHS = {
    "/route": ("", "ab"),
    "/calls": ("", "a", "ab"),
    "/block": ("", "ab"),
    "/nested": ("", "abc"),
    "/transaction/def": ("", "ab"),
    "/transaction/async": ("", "ab"),
    "/held/def": ("", "a", "ab"),
    "/held/async": ("", "ab"),
    "/plain": ("", "ab"),
    "/plain/with": ("", "ab"),
    "/plain/held/with": ("", "ab"),
    "/plain/context": ("", "a", "ab"),
    "/dependency": ("", "ab"),
    "/dependency/with": ("", "ab"),
    "/dependency/held": ("", "ab"),
    "/dependency/nested": ("", "ab"),
    "/dependency/helper": ("", "ab"),
    "/dependency/stack": ("", "ab"),
    "/background": ("", "a", "ab"),
    "/generator": ("", "ab"),
    "/query/def": ("",),
    "/query/async": ("",),
    "/stream": ("",),
}

#: These write when their answer has begun.
WRITE_AFTERWARDS = ("/background", "/generator")


def make_app(db: Database, row: Any) -> FastAPI:
    """`row` is a model with a `name`. What a request writes begins with its `n`."""
    app = FastAPI()
    Peewee(db).init_app(app)

    class Out(BaseModel):
        name: str

    def both(n: str) -> None:
        row.create(name=f"{n}a")
        row.create(name=f"{n}b")

    @app.post("/route")
    def route(n: str = "") -> None:
        with db.atomic():
            both(n)

    @app.post("/calls")
    async def calls(n: str = "") -> None:
        await row.acreate(name=f"{n}a")
        await row.acreate(name=f"{n}b")

    @app.post("/block")
    async def block(n: str = "") -> None:
        async with db.atomic():
            await calls(n)

    @app.post("/nested")
    async def nested(n: str = "") -> None:
        async with db.atomic():
            async with db.atomic():
                await calls(n)
            await row.acreate(name=f"{n}c")

    @app.post("/transaction/def")
    def in_transaction(db: InTransaction, n: str = "") -> None:
        both(n)

    @app.post("/transaction/async")
    async def in_async_transaction(db: InTransaction, n: str = "") -> None:
        await calls(n)

    @app.post("/held/def")
    def held(db: ConnectedDb, n: str = "") -> None:
        both(n)

    @app.post("/held/async")
    async def held_async(db: ConnectedDb, n: str = "") -> None:
        async with db.atomic():
            await calls(n)

    def transaction() -> Iterator[None]:
        with db.connection_context(), db.atomic():
            yield

    @app.post("/dependency", dependencies=[Depends(transaction, scope="function")])
    def dependency(n: str = "") -> None:
        both(n)

    def with_db() -> Iterator[None]:
        with db:
            yield

    def atomic() -> Iterator[None]:
        with db.atomic():
            yield

    def connected() -> Iterator[None]:
        with db.connection_context():
            yield

    def inner(_: Annotated[None, Depends(connected)]) -> Iterator[None]:
        yield from atomic()

    def helper() -> Iterator[None]:
        with contextmanager(transaction)():
            yield

    def stack() -> Iterator[None]:
        with ExitStack() as blocks:
            blocks.enter_context(db.connection_context())
            blocks.enter_context(db.atomic())
            yield

    @app.post("/background")
    async def background(tasks: BackgroundTasks, n: str = "") -> None:
        tasks.add_task(row.create, name=f"{n}a")
        tasks.add_task(row.acreate, name=f"{n}b")

    @app.post("/generator")
    async def generator(n: str = "") -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            async with db.atomic():
                yield "a"
                await calls(n)
                yield "b"

        return StreamingResponse(pieces())

    @app.post("/query/def", response_model=list[Out])
    def query() -> Any:
        return row.select().where(row.name == "old")

    @app.post("/query/async", response_model=list[Out])
    async def async_query() -> Any:
        return row.select().where(row.name == "old")

    @app.post("/stream")
    async def stream() -> Any:
        return respond(row.select().where(row.name == "old"), list[Out], stream=True)

    plain = APIRouter(route_class=APIRoute)

    @plain.post("/plain", dependencies=[Depends(get_db)])
    def plain_route(n: str = "") -> None:
        with db.atomic():
            both(n)

    @plain.post("/plain/with")
    @plain.post("/plain/held/with", dependencies=[Depends(get_db)])
    def plain_with(n: str = "") -> None:
        with db:
            both(n)

    @plain.post("/plain/context")
    def plain_context(n: str = "") -> None:
        with db.connection_context():
            both(n)

    uses: dict[str, Any] = {
        "with": with_db,
        "held": atomic,
        "nested": inner,
        "helper": helper,
        "stack": stack,
    }
    for name, use in uses.items():
        before = [Depends(get_db)] if name == "held" else []
        plain.post(f"/dependency/{name}", dependencies=[*before, Depends(use, scope="function")])(
            dependency
        )

    app.include_router(plain)
    return app


async def ask_into(answers: list[int], app: ASGIApp, path: str) -> None:
    """POST to `path`. Of an answer the status goes into the list when it begins, and 0 when it has
    ended. The client never goes away.
    """
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answers.append(message["status"])
        elif not message.get("more_body"):
            answers.append(0)

    await app(http_scope("POST", path), receive, send)
