"""Faults on purpose: a wire to each server's database, servers that may be killed, and a look at
what is left afterwards. A test module takes `from tests.faults import nothing_left as nothing_left`
and the fixtures it asks for.
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterator

import anyio
import httpx
import peewee
import pytest

from fastapi_peewee import Database
from soak.looking import descriptors, idle_transactions, threads
from soak.proxy import Proxy
from soak.servers import MariaDBServer, PostgresServer, Server, UnavailableError
from tests.apps import assert_unavailable
from tests.servers import MySQLDatabase, OwnDatabase, PostgresDatabase, give_up

#: What a statement raises whose connection is lost.
LOST = (peewee.OperationalError, peewee.InterfaceError)

_KINDS: dict[str, tuple[type[Server], type[OwnDatabase]]] = {
    "postgres": (PostgresServer, PostgresDatabase),
    "mysql": (MariaDBServer, MySQLDatabase),
}


@pytest.fixture(params=list(_KINDS))
def wire(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """A proxy to an empty database, of PostgreSQL and of MySQL."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    with Proxy(url) as proxy:
        yield proxy
        proxy.heal()
        assert idle_transactions(url) == 0, "a transaction was left open"


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """No thread and no descriptor more than before: set up before all other fixtures."""
    before = descriptors(), threads()
    yield
    # A server's end of a connection, and a thread that was told to end, need a moment.
    deadline = time.monotonic() + 10
    while (after := (descriptors(), threads())) > before:
        assert time.monotonic() < deadline, f"descriptors and threads: {after}, before {before}"
        time.sleep(0.01)  # noqa: ASYNC251 (nothing else is to run any more)


@pytest.fixture(scope="session", params=list(_KINDS))
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each kind that only the tests of this process use."""
    server_class, _ = _KINDS[request.param]
    try:
        server = server_class().__enter__()
    except UnavailableError as reason:
        give_up(request.param, reason)
    yield server
    server.__exit__()


@pytest.fixture
def own_database(own_server: Server) -> Iterator[str]:
    """An empty database on such a server, which runs when the test begins."""
    kind = "postgres" if isinstance(own_server, PostgresServer) else "mysql"
    database = _KINDS[kind][1](own_server.url, f"own_{secrets.token_hex(4)}")
    database.create()
    yield database.url
    if not own_server.running:
        own_server.start()
    database.drop()


def as_if_idle(db: Database, seconds: float = 2.0) -> None:
    """Let the pool believe that its idle connections have been so for a while."""
    for held in db.pool._idle:
        held.used_at -= seconds


async def until_well(http: httpx.AsyncClient, path: str) -> None:
    """Wait until a request is 200; 503 before. After a failure the database is asked again only
    after a pause."""
    with anyio.fail_after(10):
        while (response := await http.get(path)).status_code != 200:
            assert_unavailable(response)
            await anyio.sleep(0.01)
