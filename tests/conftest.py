"""What every test can ask for."""

import pytest
from fastapi import routing
from hypothesis import settings

from tests.servers import database_url as database_url
from tests.servers import mysql_database as mysql_database
from tests.servers import mysql_url as mysql_url
from tests.servers import postgres_database as postgres_database
from tests.servers import postgres_url as postgres_url
from tests.servers import sqlite_url as sqlite_url

# An example that talks to a database takes as long as that takes.
settings.register_profile("databases", deadline=None)
settings.register_profile("quick", settings.get_profile("databases"), max_examples=20)
settings.load_profile("databases")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """`async def` tests run on asyncio: FastAPI's users do, and trio is only here for Selenium."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _endpoints_of_its_own() -> None:
    """FastAPI remembers by their `id()` where endpoints are defined: also when they are gone."""
    routing._endpoint_context_cache.clear()


@pytest.fixture
def _used_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, no connection is asked whether it is there before it is used."""
    monkeypatch.setattr("fastapi_peewee.pool.CHECK_AFTER", 3600)
