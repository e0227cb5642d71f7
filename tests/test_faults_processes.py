"""Clients that are slow or gone, servers of several processes, and SIGTERM in the middle of it."""

import asyncio
import json
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import psutil
import pytest

from tests import live
from tests.live import Answer, LiveServer, Request, plain_database, serve
from tests.modes import connections_become

# Clients


async def back_to_rest(server: LiveServer, database_url: str) -> None:
    async def at_rest() -> bool:
        stats = await live.stats(server)
        return (stats.in_use, stats.waiting) == (0, 0)

    await live.until(at_rest, "all connections are back")
    # MariaDB refreshes what it says of transactions ten times a second.
    await live.until(
        lambda: asyncio.to_thread(lambda: live.idle_transactions(database_url) == 0),
        "no transaction is open",
    )


async def test_a_request_whose_body_is_not_there_yet_holds_nothing(sqlite_url: str) -> None:
    """While the bodies of 30 requests come byte by byte, no connection is held for them, and others
    are answered; when they are complete, they are answered, too."""
    body = json.dumps({"title": "slow"}).encode()
    head = (
        "POST /users/1/items/ HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    with serve("sql_app", DATABASE_URL=sqlite_url) as server:
        user = {"email": "ann", "password": "long enough"}
        assert (await live.ask(server, "/users/", user)).status == 200
        clients = [await asyncio.open_connection(server.host, server.port) for _ in range(30)]
        for _, writer in clients:
            writer.write(head)
        for n in range(len(body)):
            for _, writer in clients:
                writer.write(body[n : n + 1])
                await writer.drain()
            if n + 1 < len(body):
                stats = await live.stats(server)
                assert (stats.in_use, stats.waiting) == (0, 0)
        assert (await live.ask(server, "/users/1")).status == 200
        for reader, writer in clients:
            assert b" 200 OK" in await reader.readline()
            writer.close()
            await writer.wait_closed()
        await back_to_rest(server, sqlite_url)


async def test_a_client_that_goes_away_from_a_live_stream(database_url: str) -> None:
    """Its connection is back soon, and what its transaction had written isn't there."""
    with serve("streaming", DATABASE_URL=database_url) as server:
        count = int((await live.ask(server, "/count")).body)
        for path in 3 * ("/rows", "/written"):
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
            await reader.readexactly(2**16)
            writer.transport.abort()
            await back_to_rest(server, database_url)
        assert int((await live.ask(server, "/count")).body) == count
        assert (await live.stats(server)).refused == 0


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "database_url"),
    [
        ("gunicorn", "sqlite"),
        ("gunicorn", "postgres"),
        ("gunicorn", "mysql"),
        ("uvicorn", "postgres"),
    ],
    indirect=["database_url"],
)
async def test_processes_of_one_server_never_share_a_connection(
    runner: str, database_url: str
) -> None:
    """Three processes, with gunicorn forks of one in which connections were open already, answer
    600 requests: each gets its own number back, from each of the processes. After SIGTERM all
    processes and connections are gone."""
    processes: Counter[int] = Counter()

    def check(request: Request, answer: Answer) -> None:
        assert answer.status == 200, answer
        process, number = answer.json()
        assert number == int(request.path.rpartition("/")[2])
        processes[process] += 1

    # Python 3.12 warns of any fork where there are threads.
    warnings = "error,ignore:This process:DeprecationWarning"
    with serve(
        "echoing",
        runner=runner,
        options=["--workers", "3", *(["--preload"] if runner == "gunicorn" else [])],
        DATABASE_URL=database_url,
        PYTHONWARNINGS=warnings,
    ) as server:
        numbers = iter(range(1000, 100_000))

        async def all_answer() -> bool:
            requests = [Request(f"/{('echo', 'aecho')[n % 2]}/{n}") for n in islice(numbers, 600)]
            await live.ask_by_clients(server, 24, requests, check)
            return len(processes) == 3

        await live.until(all_answer, "each process has answered", timeout=60)
        assert set(processes) <= {p.pid for p in psutil.Process(server.pid).children()}
        assert "Traceback" not in server.log
    assert not any(map(psutil.pid_exists, processes))
    assert connections_become(database_url, 0)


# SIGTERM


async def in_flight(server: LiveServer, paths: list[str]) -> "asyncio.Future[list[Answer]]":
    """Requests that have written and not yet committed."""
    answers = asyncio.ensure_future(live.ask_at_once(server, map(Request, paths)))

    async def all_hold() -> bool:
        return (await live.stats(server)).in_use == len(paths)

    await live.until(all_hold, "all hold a connection")
    return answers


async def stop(server: LiveServer) -> psutil.Process:
    process = psutil.Process(server.pid)
    process.terminate()

    async def shutting_down() -> bool:
        return "Shutting down" in server.log

    await live.until(shutting_down, "the server shuts down")
    return process


def rows(database_url: str) -> int:
    with closing(plain_database(database_url)) as db:
        count: int = db.execute_sql("SELECT count(*) FROM note").fetchone()[0]
        return count


async def test_sigterm_lets_what_is_in_flight_finish(database_url: str, tmp_path: Path) -> None:
    """After SIGTERM requests that hold a connection go on, are answered with 200 and are committed;
    then the process ends, and no connection is left."""
    go_on = tmp_path / "go-on"
    # On SQLite one writes at a time.
    paths = ["/sync"] if database_url.startswith("sqlite") else ["/sync", "/async"] * 4
    with serve("finishing", DATABASE_URL=database_url, GO_ON=str(go_on)) as server:
        answers = await in_flight(server, paths)
        process = await stop(server)
        assert process.is_running()
        go_on.touch()
        assert Counter(answer.status for answer in await answers) == {200: len(paths)}
        await asyncio.to_thread(process.wait, 20)
        assert server.errors == []
    assert rows(database_url) == len(paths)
    assert connections_become(database_url, 0)


async def test_sigterm_rolls_back_what_takes_longer_than_the_grace(
    database_url: str, tmp_path: Path
) -> None:
    """What isn't over when uvicorn's grace is, is cancelled: nothing of it is committed, and no
    connection is left."""
    paths = ["/async"] if database_url.startswith("sqlite") else ["/async"] * 8
    options = ["--timeout-graceful-shutdown", "1"]
    with serve(
        "finishing", options=options, DATABASE_URL=database_url, GO_ON=str(tmp_path / "never")
    ) as server:
        answers = await in_flight(server, paths)
        process = await stop(server)
        with pytest.raises((OSError, asyncio.IncompleteReadError, ExceptionGroup)):
            statuses = {answer.status for answer in await answers}
            assert statuses == {500}
            raise ConnectionResetError
        await asyncio.to_thread(process.wait, 20)
    assert rows(database_url) == 0
    assert connections_become(database_url, 0)
