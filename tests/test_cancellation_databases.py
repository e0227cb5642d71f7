"""Cancelled at every await, on each of the databases: where their drivers and servers differ.

What happens inside of each step is tried with one driver, in `test_cancellation`.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fastapi_peewee import Database
from tests.apps import connected
from tests.cancelling import (
    BY,
    Around,
    Cut,
    Scenario,
    all_in_use,
    cut_everywhere,
    in_a_block,
    look,
)
from tests.cancelling import row as row
from tests.cancelling_app import PATHS, ask_into, make_app
from tests.cancelling_cases import SCENARIOS

MOMENTS = ("waiting", "woken")


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with connected(database_url, pool_size=1) as db:
        yield db


#: The others are as quick, but many.
QUICK = ("a block", "nested blocks", "a transaction in one call", "iterate", "callbacks")


@pytest.mark.parametrize(
    ("name", "by"),
    [
        pytest.param(name, by, marks=() if name in QUICK and "again" in by else pytest.mark.slow)
        for name in SCENARIOS
        for by in ("task", "task again and again", "scope")
    ],
)
async def test_at_every_await(db: Database, row: Any, name: str, by: str) -> None:
    """Whichever await it is cancelled at: all or nothing, all given back, a clean session."""
    for moment in MOMENTS:
        assert await cut_everywhere(db, row, SCENARIOS[name], by=by, moment=moment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("iterate", all_in_use),
        *itertools.product(
            ("a transaction in one call", "nested blocks", "iterate in a block"),
            (all_in_use, in_a_block),
        ),
    ],
)
async def test_while_others_use_the_connection(
    db: Database, row: Any, name: str, around: Around
) -> None:
    """So it is for one that waits for a connection, and for a part of a transaction that is a
    block of its own."""
    for moment in MOMENTS:
        await cut_everywhere(db, row, SCENARIOS[name], by="task", moment=moment, around=around)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
async def test_requests_at_every_await(db: Database, row: Any, path: str) -> None:
    """So it is for a request."""
    app = make_app(db, row)
    scenario = Scenario(lambda db, row: ask_into([], app, path), PATHS[path])
    for moment in MOMENTS:
        await cut_everywhere(db, row, scenario, by="task again and again", moment=moment)


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_read_on_the_event_loop(db: Database, row: Any, times: int) -> None:
    """A statement that is read without a thread, cancelled at every await: one that the connection
    has never seen, one that it prepares, and one that it has prepared."""

    async def read(db: Database, row: Any) -> None:
        texts = await db.aread_texts("SELECT name FROM row WHERE name = %s", ["old"])
        assert texts == [b"old"] * 5

    @asynccontextmanager
    async def seen(db: Database, row: Any, cut: Cut) -> AsyncIterator[None]:
        await asyncio.to_thread(db.close_idle)
        await db.run(look, db)
        for _ in range(times):
            await read(db, row)
        yield

    scenario = Scenario(read, ("",))
    for by, moment in itertools.product(BY, MOMENTS):
        awaits = await cut_everywhere(db, row, scenario, by=by, moment=moment, around=seen)
        assert awaits == (2 if times == 1 else 1)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_read_on_the_event_loop_that_waits_for_a_connection(db: Database, row: Any) -> None:
    """So it is for one that has to wait first."""

    async def read(db: Database, row: Any) -> None:
        await db.aread_texts("SELECT name FROM row WHERE name = %s", ["old"])

    for moment in MOMENTS:
        scenario = Scenario(read, ("",))
        await cut_everywhere(db, row, scenario, by="task", moment=moment, around=all_in_use)
