"""Thousands of requests that are cancelled at random moments: nothing of them is left.

`CANCELLED_REQUESTS=100000` says how many on each database; by default they are 10,000. The server
that is left by its clients gets a fiftieth of them.
"""

import asyncio
import gc
import os
import random
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import anyio
import peewee
import pytest

from fastapi_peewee import Database
from tests import live
from tests.apps import back_to_rest, connected
from tests.cancelling import make_row, until_only
from tests.cancelling_app import PATHS, WRITE_AFTERWARDS, ask_into, make_app

COUNT = int(os.environ.get("CANCELLED_REQUESTS", "10000"))
POOL = 4
#: At a time: enough that some wait for a connection, few enough that others get one.
TASKS = 16

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    options = {"busy_timeout": 60} if database_url.startswith("sqlite") else {}
    async with connected(database_url, pool_size=POOL, timeout=60, **options) as db:
        yield db


def pool_threads() -> int:
    return sum(thread.name.startswith("fastapi-peewee") for thread in threading.enumerate())


def outcomes(db: Any) -> dict[int, str]:
    """What each request has written."""
    found: dict[int, str] = defaultdict(str)
    rows = peewee.Table("row", ("name",)).bind(db)
    for (name,) in rows.select(rows.name).where(rows.name != "old").order_by(rows.name).tuples():
        found[int(name[:-1])] += name[-1]
    return found


async def test_cancelled_requests_leave_nothing(db: Database, database_url: str) -> None:
    """Requests to endpoints of every kind, cancelled at random moments, once or twice, also while
    their connection is opened: of each all or nothing is written, all if it was answered. No slot,
    transaction, task, thread or descriptor is left, and all connections can be taken at once."""
    app = make_app(db, await make_row(db))
    dice, numbers, paths = random.Random(COUNT), iter(range(10**9)), list(PATHS)
    asked: dict[int, tuple[str, list[int]]] = {}
    ends: Counter[str] = Counter()
    before, threads = asyncio.all_tasks(), pool_threads()  # other tests may have left some

    async def one() -> None:
        number, path, answers = next(numbers), dice.choice(paths), []  # type: ignore[var-annotated]
        asked[number] = path, answers
        task = asyncio.create_task(ask_into(answers, app, f"{path}?n={number}"))
        if dice.random() < 0.5:
            for _ in range(dice.randrange(60)):
                await asyncio.sleep(0)
        else:
            await asyncio.wait({task}, timeout=dice.expovariate(60))
        for _ in range(dice.choice([1, 1, 2])):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()
        ends["cancelled" if task.cancelled() else "done"] += 1
        ends["answered"] += answers == [200, 0]

    async def many(count: int) -> None:
        while ends["cancelled"] < count:
            await one()

    async def batch(count: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(TASKS):
                group.create_task(many(count))

    async def rest() -> None:
        await until_only(before)
        await back_to_rest(db, within=30)

    await batch(200)  # what is made once is there
    await rest()
    await db.close_pool()
    gc.collect()
    descriptors = len(os.listdir("/dev/fd"))
    lifetime, db.pool.max_lifetime = db.pool.max_lifetime, 0.02  # seconds
    opened = db.pool_stats.opened
    await batch(200 + COUNT)
    await rest()
    db.pool.max_lifetime = lifetime

    assert ends["cancelled"] >= COUNT
    assert ends["answered"] > COUNT / 100
    assert db.pool_stats.opened - opened > COUNT / 100
    assert live.idle_transactions(database_url) == 0
    both = threading.Barrier(POOL)
    await asyncio.gather(*(db.run(both.wait, 30) for _ in range(POOL)))
    assert db.pool_stats[:3] == (0, POOL, 0)
    assert db.pool_stats.timed_out == 0
    stored = await db.run(outcomes, db)
    for number, (path, answers) in asked.items():
        assert stored[number] in PATHS[path], (path, number)
        if answers and path not in WRITE_AFTERWARDS:
            assert answers in ([200], [200, 0])
            assert stored[number] == PATHS[path][-1], (path, number)
    assert await db.close_pool()
    with anyio.fail_after(5):  # one that interrupts sleeps for a second at most
        while pool_threads() > threads:
            await anyio.sleep(0.01)
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= descriptors
    ends.update(connections=db.pool_stats.opened - opened, wrote=sum(map(bool, stored.values())))
    print(f"\n{db}: {dict(ends)}")


async def test_clients_that_go_away_leave_nothing(database_url: str) -> None:
    """The same over sockets, which their clients reset at random moments."""
    count, dice = COUNT // 50, random.Random(COUNT)
    with live.serve("cancelling", DATABASE_URL=database_url) as server:

        async def one(path: str, number: int) -> None:
            _, writer = await asyncio.open_connection(server.host, server.port)
            head = f"POST {path}?n={number} HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n"
            writer.write(head.encode())
            await writer.drain()
            await asyncio.sleep(dice.expovariate(60))
            writer.transport.abort()

        async def many(numbers: range) -> None:
            for number in numbers:
                await one(dice.choice(list(PATHS)), number)

        async def at_rest() -> bool:
            stats = await live.stats(server)
            return (stats.in_use, stats.waiting) == (0, 0)

        async def load() -> live.Stats:
            async with asyncio.TaskGroup() as group:
                for start in range(8):
                    group.create_task(many(range(start, count, 8)))
            # What clients have left is answered nevertheless, and on a busy machine not so soon.
            await live.until(at_rest, "all connections are back", timeout=max(20, count / 20))
            return await live.stats(server)

        first = await load()

        async def as_before() -> bool:
            return (await live.stats(server)).descriptors <= first.descriptors + POOL

        await load()
        await live.until(as_before, f"as many descriptors as in {first}")
        connections = await live.driver_connections(server)
        assert connections.in_transaction == 0
        assert connections.open == (await live.stats(server)).idle
        assert live.idle_transactions(database_url) == 0
        assert (await live.ask(server, "/query/async", {})).status == 200
        assert server.errors == []
    with closing(live.plain_database(database_url)) as db:
        whole = {names for found in PATHS.values() for names in found}
        assert {"".join(sorted(set(names))) for names in outcomes(db).values()} <= whole
