"""What requests leave to Python's garbage collector: nothing.

It stops a server that has much to look at for tens of milliseconds; the less is left to it, the
less often it comes.
"""

import gc
from collections.abc import Callable
from typing import Any

import peewee
import pytest
from fastapi import FastAPI

from fastapi_peewee import Database, InTransaction, respond
from tests.apps import client, make_app
from tests.apps import db as db
from tests.apps import no_collector as no_collector
from tests.shop import BareUserOut, Models, UserOut

REQUESTS = 3
PACKAGES = {"fastapi_peewee", "peewee"}


@pytest.fixture
async def shop(db: Database) -> Models:
    shop = Models(db)
    await db.acreate_tables([shop.User, shop.Item])
    user = await shop.User.acreate(name="ann")
    await shop.Item.acreate(title="a", owner=user)
    return shop


@pytest.fixture
def app(db: Database, shop: Models) -> FastAPI:
    app, User = make_app(db), shop.User

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

    @app.get("/block")
    async def block() -> Any:
        async with db.atomic(), db.atomic():
            return await db.run(User.select().count)

    @app.get("/transaction")
    def transaction(_: InTransaction) -> Any:
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

    return app


async def left(request: Callable[[], Any]) -> list[str]:
    """The names of our and of Peewee's classes whose objects only the collector can free."""
    await request()  # what is done once
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(REQUESTS):
            await request()
        gc.collect()
        classes = [type(each) for each in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    return [cls.__name__ for cls in classes if cls.__module__.partition(".")[0] in PACKAGES]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/query", 200),
        ("/query-in-a-thread", 200),
        ("/stream", 200),
        ("/instance", 200),
        ("/create", 200),
        ("/create-in-a-thread", 200),
        ("/block", 200),
        ("/transaction", 200),
        ("/missing", 404),
        ("/missing-in-a-thread", 404),
        ("/refused", 409),
        ("/refused-in-a-thread", 409),
        ("/refused-in-a-block", 409),
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


async def test_a_refused_query_leaves_nothing_to_the_collector(
    db: Database, shop: Models, no_collector: None
) -> None:
    """Nor does an error outside of requests, when whoever caught it is done with it."""

    async def refused() -> None:
        with pytest.raises(peewee.IntegrityError):
            await db.run(shop.User.create, id=1, name="bob")

    assert await left(refused) == []
