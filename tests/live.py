"""Serving an application to tests: a real uvicorn in a process of its own, and a fast client.

The client speaks just enough HTTP/1.1 to load a server from one core beside it: one request at a
time on a connection, answers with a Content-Length.
"""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from soak.looking import idle_transactions as idle_transactions
from soak.looking import plain_database as plain_database

_ROOT = Path(__file__).parents[1]
_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 20.0
_ANSWER_TIMEOUT = 90.0
_LOG_SHOWN = 5000
#: What an application reads its settings from. Those of whoever runs the tests don't reach it.
_SETTINGS = ("DATABASE_URL", "SLOWUSERS_STEP")


_COMMANDS = {
    "uvicorn": [
        *("--app-dir", str(_ROOT), "--lifespan", "on", "--no-access-log", "--no-use-colors"),
        *("--host", "127.0.0.1", "--port", "0"),
    ],
    "gunicorn": [
        *("--chdir", str(_ROOT), "--worker-class", "asgi", "--no-control-socket"),
        *("--bind", "127.0.0.1:0"),
    ],
}
_READY = re.compile(r"(?:Uvicorn running on|Listening at:) http://([\d.]+):(\d+)")


class ServingError(Exception):
    """The server did not start, or did not stop when told to; the message ends with its log."""


@dataclass(frozen=True)
class LiveServer:
    """A running server."""

    host: str
    port: int
    pid: int
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def errors(self) -> list[str]:
        """The last line of each traceback in the log."""
        lines = self.log.splitlines()
        starts = [n for n, line in enumerate(lines) if line.startswith("Traceback (")]
        return [
            next((line for line in lines[n + 1 :] if line[:1] not in ("", " ")), "?")
            for n in starts
        ]


@contextmanager
def serve(
    application: str,
    *,
    cwd: Path | None = None,
    runner: str = "uvicorn",
    options: Sequence[str] = (),
    **settings: str,
) -> Iterator[LiveServer]:
    """Run an application in a process of its own until the block ends.

    Python's warnings are errors there, too.

    Args:
        application: as uvicorn is told it, "package.module:app"; or the name of a factory in
            `tests.live_apps`.
        cwd: the working directory; this repository's root by default.
        runner: "uvicorn" or "gunicorn".
        options: more of its options.
        settings: environment variables.

    Raises:
        ServingError: it isn't ready within 60 seconds, or not gone 20 seconds after SIGTERM.
    """
    command = [sys.executable, "-m", runner, *_COMMANDS[runner], *options]
    if ":" in application:
        command.append(application)
    elif runner == "uvicorn":
        command += ["--factory", f"tests.live_apps:{application}"]
    else:
        command.append(f"tests.live_apps:{application}()")
    environment = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    environment |= {"PYTHONWARNINGS": "error", **settings}
    with tempfile.TemporaryDirectory(prefix="live-", ignore_cleanup_errors=True) as folder:
        log_file = Path(folder, "log")
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=cwd or _ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            host, port = _address(process, log_file)
            server = LiveServer(host, port, process.pid, log_file)
            try:
                yield server
            except BaseException as error:
                error.add_note(f"The server's log:\n{server.log[-_LOG_SHOWN:]}")
                raise
        finally:
            _stop(process, log_file)


def _address(process: "subprocess.Popen[bytes]", log_file: Path) -> tuple[str, int]:
    """Where the server says that it listens: uvicorn does so after the application's start; with
    several processes the first requests wait for that."""
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        text = log_file.read_text(encoding="utf-8", errors="replace")
        ready = _READY.search(text)
        if ready and ("Listening" in ready[0] or "Application startup complete" in text):
            return ready[1], int(ready[2])
        if process.poll() is not None:
            raise ServingError(f"It ended with exit code {process.returncode}:\n{text}")
        if time.monotonic() > deadline:
            raise ServingError(f"It is not ready after {_START_TIMEOUT:g} s:\n{text}")
        time.sleep(0.02)


def _stop(process: "subprocess.Popen[bytes]", log_file: Path) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        text = log_file.read_text(encoding="utf-8", errors="replace")
        raise ServingError(f"It still ran {_STOP_TIMEOUT:g} s after SIGTERM:\n{text}") from None


class Request(NamedTuple):
    """What to ask: `Request("/users/")`, or `Request("/users/", {"email": …})` to POST JSON."""

    path: str
    json: Any = None


class Answer(NamedTuple):
    """What came back. `headers` have lower-case names; `seconds` count from the first byte sent."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One keep-alive connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def to(cls, server: LiveServer) -> Self:
        return cls(*await asyncio.open_connection(server.host, server.port))

    async def ask(self, request: Request) -> Answer:
        if request.json is None:
            head, body = f"GET {request.path} HTTP/1.1\r\nhost: test\r\n\r\n", b""
        else:
            body = json.dumps(request.json).encode()
            head = (
                f"POST {request.path} HTTP/1.1\r\nhost: test\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
        start = time.perf_counter()
        async with asyncio.timeout(_ANSWER_TIMEOUT):
            self._writer.write(head.encode() + body)
            status, *lines = (
                (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
            )
            headers = dict(_header(line) for line in lines if line)
            answer = await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(status.split()[1]), headers, answer, time.perf_counter() - start)

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError):  # the server was the first
            await self._writer.wait_closed()


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.lower(), value.strip()


@asynccontextmanager
async def connections(server: LiveServer, count: int) -> AsyncIterator[list[Connection]]:
    """So many open connections."""
    opened: list[Connection] = []
    try:
        for _ in range(count):
            opened.append(await Connection.to(server))  # noqa: PERF401 (close those we have)
        yield opened
    finally:
        for connection in opened:
            await connection.close()


async def ask(server: LiveServer, path: str, json: Any = None) -> Answer:
    """One request on a connection of its own."""
    async with connections(server, 1) as [connection]:
        return await connection.ask(Request(path, json))


def ask_raw(server: LiveServer, request: str) -> bytes:
    """The first piece of what the server says to these bytes."""
    with socket.create_connection((server.host, server.port), timeout=_ANSWER_TIMEOUT) as sock:
        with suppress(OSError):  # it may have heard enough
            sock.sendall(request.encode())
        return sock.recv(65536)


async def ask_at_once(server: LiveServer, requests: Iterable[Request]) -> list[Answer]:
    """All requests in parallel, each on a connection that was open before the first was sent."""
    todo = list(requests)
    async with connections(server, len(todo)) as clients, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(client.ask(request))
            for client, request in zip(clients, todo, strict=True)
        ]
        await asyncio.wait(tasks)
    return [task.result() for task in tasks]


async def ask_by_clients(
    server: LiveServer,
    clients: int,
    requests: Iterable[Request],
    check: Callable[[Request, Answer], object],
) -> None:
    """Clients in parallel, each asking for the next request as soon as it is answered the last.

    `check` is called with each request and its answer. What it raises ends the load.
    """
    queue = iter(requests)

    async def work(connection: Connection) -> None:
        for request in queue:  # one iterator for all clients
            check(request, await connection.ask(request))

    async with connections(server, clients) as opened, asyncio.TaskGroup() as group:
        tasks = [group.create_task(work(connection)) for connection in opened]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)


class Stats(NamedTuple):
    """What a server of `tests.live_apps` says of itself: the pool's counters and the process's."""

    in_use: int
    idle: int
    waiting: int
    opened: int
    discarded: int
    timed_out: int
    refused: int
    threads: int
    descriptors: int


class DriverConnections(NamedTuple):
    """Connections that exist in a server's process, whoever holds them, as their driver sees it."""

    open: int
    in_transaction: int


async def stats(server: LiveServer) -> Stats:
    """Counters of a server, as of now; asking takes nothing from the pool."""
    return Stats(**(await ask(server, "/_stats")).json())


async def driver_connections(server: LiveServer) -> DriverConnections:
    return DriverConnections(**(await ask(server, "/_connections")).json())


async def until(
    condition: Callable[[], Awaitable[bool]], what: str, *, timeout: float = 20.0
) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it doesn't, `timeout` seconds on.
    """
    deadline = time.monotonic() + timeout
    while not await condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        await asyncio.sleep(0.01)
