"""An application with an endpoint of each kind, and requests to it that can be cancelled.

They are made as a server makes them: a task calls the application, and no socket is in between.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import BackgroundTasks, Depends, FastAPI
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
    "/dependency": ("", "ab"),
    "/background": ("", "a", "ab"),
    "/generator": ("", "ab"),
    "/query/def": ("",),
    "/query/async": ("",),
    "/stream": ("",),
}


def make_app(db: Database, row: Any) -> FastAPI:
    """`row` is a model with a `name`."""
    app = FastAPI()
    Peewee(db).init_app(app)

    class Out(BaseModel):
        name: str

    def both() -> None:
        row.create(name="a")
        row.create(name="b")

    @app.post("/route")
    def route() -> None:
        with db.atomic():
            both()

    @app.post("/calls")
    async def calls() -> None:
        await row.acreate(name="a")
        await row.acreate(name="b")

    @app.post("/block")
    async def block() -> None:
        async with db.atomic():
            await calls()

    @app.post("/nested")
    async def nested() -> None:
        async with db.atomic():
            async with db.atomic():
                await calls()
            await row.acreate(name="c")

    @app.post("/transaction/def")
    def in_transaction(db: InTransaction) -> None:
        both()

    @app.post("/transaction/async")
    async def in_async_transaction(db: InTransaction) -> None:
        await calls()

    @app.post("/held/def")
    def held(db: ConnectedDb) -> None:
        both()

    @app.post("/held/async")
    async def held_async(db: ConnectedDb) -> None:
        async with db.atomic():
            await calls()

    def plain() -> None:
        with db.atomic():
            both()

    app.router.add_api_route(
        "/plain", plain, methods=["POST"], dependencies=[Depends(get_db)], response_model=None
    )
    app.router.routes[-1].__class__ = APIRoute

    def transaction() -> Iterator[None]:
        with db.connection_context(), db.atomic():
            yield

    @app.post("/dependency", dependencies=[Depends(transaction, scope="function")])
    def dependency() -> None:
        both()

    @app.post("/background")
    async def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(row.create, name="a")
        tasks.add_task(row.acreate, name="b")

    @app.post("/generator")
    async def generator() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            async with db.atomic():
                yield "a"
                await calls()
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

    return app


async def ask(app: ASGIApp, path: str) -> list[int]:
    """POST to `path`. Returns the status, if an answer has begun, and 0 if it has ended.

    The client never goes away.
    """
    answers: list[int] = []
    await ask_into(answers, app, path)
    return answers


async def ask_into(answers: list[int], app: ASGIApp, path: str) -> None:
    """The same, into a list that the caller has even if this is cancelled."""
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
