"""Processes killed with SIGKILL while they write: nothing acknowledged is lost, nothing is torn."""

import asyncio
import os
import signal
from contextlib import suppress

import pytest

from soak.killing import Kills, kill_server, kill_writers
from soak.servers import Server
from tests import live
from tests.faults import own_server as own_server
from tests.live import Request, serve
from tests.modes import connections_become


def check(kills: Kills, cycles: int) -> None:
    assert kills.violations == []
    assert kills.cycles == cycles
    assert kills.acknowledged >= cycles


@pytest.mark.slow
def test_a_writer_that_is_killed(sqlite_url: str) -> None:
    """A process that writes to SQLite, synchronously and asynchronously, is killed 200 times."""
    check(kill_writers(sqlite_url, 200, seed=1), 200)


@pytest.mark.slow
def test_a_writer_to_a_server_that_is_killed(own_server: Server) -> None:
    """A process that writes to a server is killed 10 times, and the server lets go of it."""
    check(kill_writers(own_server.url, 10, seed=1), 10)
    assert connections_become(own_server.url, 0)


@pytest.mark.slow
async def test_a_server_that_is_killed(own_server: Server) -> None:
    """A server is killed and started again 10 times, under an application that stays."""
    check(await kill_server(own_server, 10, seed=1), 10)


@pytest.mark.slow
async def test_sql_app_that_is_killed_under_load(database_url: str) -> None:
    """`sql_app` is killed twice while clients create users and items: all that was answered with
    200 is there when it is back, and starting it needs no help."""
    acknowledged: set[str] = set()
    for cycle in range(2):
        with serve("sql_app_with_quick_hashes", DATABASE_URL=database_url) as server:
            await create_until_killed(server, cycle, acknowledged)
        assert connections_become(database_url, 0)
    assert len(acknowledged) > 20
    with serve("sql_app", DATABASE_URL=database_url) as server:
        users = (await live.ask(server, "/users/?limit=1000")).json()
        there = {user["email"] for user in users}
        there |= {item["title"] for user in users for item in user["items"]}
        assert acknowledged <= there


async def create_until_killed(server: live.LiveServer, cycle: int, acknowledged: set[str]) -> None:
    async def client(number: int, connection: live.Connection) -> None:
        for count in range(50):
            name = f"{cycle}-{number}-{count}"
            user = {"email": name, "password": "long enough"}
            answer = await connection.ask(Request("/users/", user))
            assert answer.status == 200
            acknowledged.add(name)
            path = f"/users/{answer.json()['id']}/items/"
            answer = await connection.ask(Request(path, {"title": f"of {name}"}))
            assert answer.status == 200
            acknowledged.add(f"of {name}")

    before = len(acknowledged)
    async with live.connections(server, 4) as connections:
        clients = [asyncio.create_task(client(*pair)) for pair in enumerate(connections)]
        while len(acknowledged) < before + 20:
            await asyncio.sleep(0.001)
        os.kill(server.pid, signal.SIGKILL)
        with suppress(OSError, asyncio.IncompleteReadError):
            await asyncio.gather(*clients)
        await asyncio.wait(clients)
        for task in clients:
            assert not isinstance(task.exception(), AssertionError)
