"""50 who wait for a connection while the database is gone: everybody gets an error, and in time.

How closely the limits are kept is measured by `python -m benchmarks.limits`.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
import peewee
import pytest
from fastapi import FastAPI

from fastapi_peewee import Database, DatabaseUnavailable, PoolTimeout
from soak.proxy import Proxy
from tests.apps import back_to_rest, client, connected, make_app, with_all_uses
from tests.faults import as_if_idle
from tests.faults import nothing_left as nothing_left
from tests.faults import wire as wire

WAITERS = 50
LIMIT = 0.25  # seconds
SIZE = 4
#: Far more than the limits, and far less than what would take its time without them.
SOON = 20.0


@pytest.fixture
async def db(wire: Proxy) -> AsyncIterator[Database]:
    limits = {"timeout": LIMIT, "connect_timeout": LIMIT, "statement_timeout": LIMIT}
    async with connected(wire.url, pool_size=SIZE, **limits) as db:
        yield db


@asynccontextmanager
async def all_held(db: Database) -> AsyncIterator[None]:
    """Calls that hold all of the pool's connections."""
    go_on, holding = threading.Event(), 0

    def hold() -> None:
        nonlocal holding
        db.execute_sql("SELECT 1")
        holding += 1
        go_on.wait(SOON)

    async def held() -> None:
        while not go_on.is_set():  # on a busy machine connecting may take longer than the limit
            with suppress(peewee.OperationalError):
                await db.run(hold)

    async with asyncio.TaskGroup() as group:
        for _ in range(SIZE):
            group.create_task(held())
        with anyio.fail_after(SOON):
            while holding < SIZE:
                await asyncio.sleep(0.001)
        try:
            yield
        finally:
            go_on.set()


@pytest.mark.parametrize("gone", ["refused", "silent", "silent from the start", "held"])
async def test_everybody_gets_an_error_in_time(db: Database, wire: Proxy, gone: str) -> None:
    """Tasks, endpoints and threads: none waits for ever, none gives up before its time unless the
    database is known to be away, and the pool is at rest afterwards and works again."""
    app = make_app(db)
    paths = with_all_uses(app, db)
    async with AsyncExitStack() as holding:
        if gone != "silent from the start":
            await holding.enter_async_context(all_held(db))
        if gone != "held":
            await holding.aclose()
            as_if_idle(db)
            wire.refusing, wire.swallowing = gone == "refused", gone != "refused"
            if gone == "refused":
                wire.cut()
        await everybody_gets_an_error(db, app, paths, gone)
    await back_to_rest(db)
    assert db.pool_stats.waiting == 0

    wire.heal()
    wire.cut()
    with anyio.fail_after(SOON):
        while True:
            try:
                assert (await db.aexecute_sql("SELECT 1"))[0][0] == 1
                break
            except peewee.OperationalError:
                await asyncio.sleep(0.01)


async def everybody_gets_an_error(db: Database, app: FastAPI, paths: list[str], gone: str) -> None:
    before = db.pool_stats
    loop = asyncio.get_running_loop()
    took: list[tuple[float, Any]] = []

    async def task() -> None:
        begun = loop.time()
        try:
            await db.aexecute_sql("SELECT 1")
        except peewee.OperationalError as error:
            took.append((loop.time() - begun, error))

    async with client(app) as http:

        async def request(path: str) -> None:
            begun = loop.time()
            answer = await http.get(path)
            assert (answer.status_code, answer.json()) == (503, {"detail": "database unavailable"})
            took.append((loop.time() - begun, None))

        with anyio.fail_after(SOON):
            async with asyncio.TaskGroup() as group:
                for number in range(WAITERS // 2):
                    group.create_task(task())
                    group.create_task(request(paths[number % len(paths)]))
    assert len(took) == WAITERS
    for seconds, error in took:
        assert isinstance(error, PoolTimeout | DatabaseUnavailable | None)
        if gone == "held" or isinstance(error, PoolTimeout):
            assert seconds > LIMIT - 0.02  # the event loop's clock has its own idea of it
    if gone == "held":
        assert db.pool_stats.timed_out - before.timed_out == WAITERS
