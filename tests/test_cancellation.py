"""Cancelled at every await, and inside every step of the driver: all or nothing, all given back.

The driver is SQLite's, of which each statement is a step that a test can stop in. `cut_everywhere`
checks after each run: `CancelledError` comes out, the slot is back, nothing is half written, the
next user of the connection finds it as new, and no two threads were in it at a time.
"""

from typing import Any

import pytest

from fastapi_peewee import Database
from tests.cancelling import (
    BY,
    IN_A_BLOCK,
    MOMENTS,
    Around,
    Driver,
    all_in_use,
    cut_everywhere,
    unconnected,
)
from tests.cancelling import db as db
from tests.cancelling import driver as driver
from tests.cancelling import row as row
from tests.cancelling_cases import SCENARIOS


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", SCENARIOS)
async def test_at_every_await_and_step(
    db: Database, row: Any, driver: Driver, name: str, by: str, moment: str
) -> None:
    """Whichever await or step of the driver it is cancelled at: all or nothing, all given back."""
    assert await cut_everywhere(db, row, SCENARIOS[name], by=by, moment=moment, driver=driver)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("around", [unconnected, all_in_use])
@pytest.mark.parametrize("name", ["a transaction in one call", "a block", "iterate"])
async def test_while_a_connection_is_waited_for_or_opened(
    db: Database, row: Any, driver: Driver, name: str, around: Around, by: str, moment: str
) -> None:
    """Cancelled as it waits for a connection, as it gets one, or as one is opened for it."""
    await cut_everywhere(
        db, row, SCENARIOS[name], by=by, moment=moment, driver=driver, around=around
    )


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("around", IN_A_BLOCK)
@pytest.mark.parametrize(
    "name",
    [
        "a transaction in one call",
        "nested blocks",
        "a nested block that fails",
        "transaction and savepoint",
        "iterate",
    ],
)
async def test_inside_a_block_that_goes_on(
    db: Database, row: Any, driver: Driver, name: str, around: Around, by: str, moment: str
) -> None:
    """Part of a transaction is cancelled, and caught: the rest of it goes on and commits, with all
    or nothing of that part. So it is, too, if that part has to wait for another."""
    await cut_everywhere(
        db, row, SCENARIOS[name], by=by, moment=moment, driver=driver, around=around
    )
