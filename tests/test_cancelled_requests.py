"""Requests that are cancelled, at every await and at random: nothing of them is left."""

import asyncio
from typing import Any

import pytest

from fastapi_peewee import Database
from tests.apps import back_to_rest, connected
from tests.cancelling import (
    BY,
    MOMENTS,
    Around,
    Driver,
    Scenario,
    all_in_use,
    alone,
    cut_everywhere,
    make_row,
    unconnected,
)
from tests.cancelling import db as db
from tests.cancelling import driver as driver
from tests.cancelling import row as row
from tests.cancelling_app import PATHS, WRITE_AFTERWARDS, ask_into, make_app


@pytest.mark.parametrize("around", [alone, unconnected, all_in_use])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "by", [by if "again" in by else pytest.param(by, marks=pytest.mark.slow) for by in BY]
)
@pytest.mark.parametrize("path", PATHS)
async def test_at_every_await_and_step(
    db: Database, row: Any, driver: Driver, path: str, by: str, moment: str, around: Around
) -> None:
    """Whichever of its awaits a request is cancelled at, with a connection at hand, without one and
    while it waits for one: all or nothing is written, all if it was answered; its connection, tasks
    and transaction are gone."""
    app = make_app(db, row)
    answers: list[int] = []

    async def request(db: Database, row: Any) -> None:
        answers.clear()
        await ask_into(answers, app, path)

    def answered_means_committed(row: Any, stored: str) -> None:
        assert answers in ([], [200], [200, 0])
        if answers and path not in WRITE_AFTERWARDS:
            assert stored == PATHS[path][-1]

    scenario = Scenario(request, PATHS[path], check=answered_means_committed)
    await cut_everywhere(db, row, scenario, by=by, moment=moment, driver=driver, around=around)


async def test_a_thread_whose_request_ended_as_it_waited_to_write_lets_others_write(
    sqlite_url: str,
) -> None:
    """SQLite's writers queue. One whose request is cancelled meanwhile, and whose thread lives on,
    gives its turn to the next."""
    async with connected(sqlite_url, pool_size=2, timeout=30) as db:
        row = await make_row(db)
        app = make_app(db, row)
        async with db.atomic():
            asked = asyncio.create_task(ask_into([], app, "/plain"))
            while db.pool_stats.in_use < 2:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # its thread waits for the writers' turn by now, or soon
            asked.cancel()
            await asyncio.wait({asked})
        await back_to_rest(db, within=10)
        async with asyncio.timeout(10):
            await row.acreate(name="next")
