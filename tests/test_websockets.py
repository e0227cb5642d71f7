"""Websockets: what they hold, and until when."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import peewee
import pytest
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_peewee import BlockingQuery, ConnectedDb, Database, NoLease, Peewee, connect


@pytest.fixture
def started(database_url: str) -> Iterator[tuple[Database, FastAPI, Any, TestClient]]:
    db = connect(database_url, pool_size=4)

    class Note(db.Model):
        text = peewee.CharField()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await db.acreate_tables([Note])
        yield
        assert db.pool_stats.in_use == 0

    app = FastAPI(lifespan=lifespan)
    Peewee(db).init_app(app)
    with TestClient(app) as http:
        yield db, app, Note, http


def test_a_websocket_uses_run_and_atomic(
    started: tuple[Database, FastAPI, Any, TestClient],
) -> None:
    """Between its queries a websocket holds nothing; a failing block leaves nothing behind."""
    db, app, note, http = started

    @app.websocket("/")
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            try:
                async with db.atomic():
                    await note.acreate(text=text)
                    if text == "fail":
                        raise LookupError
            except LookupError:
                pass
            await socket.send_json([await db.count(note.select()), db.pool_stats.in_use])

    with http.websocket_connect("/") as socket:
        for text, count in (("a", 1), ("fail", 1), ("b", 2)):
            socket.send_text(text)
            assert socket.receive_json() == [count, 0]


def test_a_websocket_holds_what_get_db_gave_it_until_it_ends(
    started: tuple[Database, FastAPI, Any, TestClient],
) -> None:
    """`Depends(get_db)` on a websocket: one lease for all of its messages."""
    db, app, note, http = started

    @app.websocket("/")
    async def endpoint(socket: WebSocket, held: ConnectedDb) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            await asyncio.gather(*(note.acreate(text=text) for _ in range(3)))
            await socket.send_json([await held.count(note.select()), db.pool_stats.in_use])

    for before in (0, 6):
        with http.websocket_connect("/") as socket:
            for count in (3, 6):
                socket.send_text("a")
                assert socket.receive_json() == [before + count, 1]
        _until(lambda: db.pool_stats.in_use == 0)


def _until(true: Callable[[], bool]) -> None:
    deadline = threading.Event()
    for _ in range(1000):
        if true():
            return
        deadline.wait(0.001)
    raise AssertionError("it didn't come true within a second")


@pytest.mark.parametrize("place", ["endpoint", "dependency"])
def test_a_sync_query_of_a_websocket_is_refused(
    started: tuple[Database, FastAPI, Any, TestClient], place: str
) -> None:
    """A websocket's endpoint is async: `BlockingQuery`. Its sync dependencies: `NoLease`."""
    _, app, note, http = started

    def query() -> None:
        note.create(text="a")

    @app.websocket("/", dependencies=[Depends(query)] if place == "dependency" else [])
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        query()

    error: type[Exception] = NoLease if place == "dependency" else BlockingQuery
    with pytest.raises(error), http.websocket_connect("/"):
        pass


def test_a_websocket_that_is_cut_in_a_transaction_rolls_back(
    started: tuple[Database, FastAPI, Any, TestClient],
) -> None:
    """A client that goes while its socket is in a transaction leaves nothing behind."""
    db, app, note, http = started

    @app.websocket("/")
    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        with suppress(WebSocketDisconnect):
            async with db.atomic():
                await note.acreate(text="lost")
                await socket.send_text("written")
                await socket.receive_text()

    for _ in range(2 * db.pool.size):
        with http.websocket_connect("/") as socket:
            assert socket.receive_text() == "written"
        _until(lambda: db.pool_stats.in_use == 0)
    with db:
        assert note.select().count() == 0


def test_an_open_websocket_ends_with_the_error_itself(
    started: tuple[Database, FastAPI, Any, TestClient],
) -> None:
    """Until a websocket is accepted, a database error is answered; then it is raised, since there
    is no response any more."""
    _, app, note, http = started

    @app.websocket("/{moment}")
    async def endpoint(socket: WebSocket, moment: str) -> None:
        if moment == "after":
            await socket.accept()
        await note.aget_by_id(99)

    with pytest.raises(WebSocketDenialResponse) as denied, http.websocket_connect("/before"):
        pass
    assert denied.value.status_code == 404
    with pytest.raises(note.DoesNotExist), http.websocket_connect("/after") as socket:
        socket.receive_json()
