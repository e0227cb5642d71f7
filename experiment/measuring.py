"""One batch: so many calls at once to one side, and what became of them."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from .serving import (
    APPLICATIONS,
    ExperimentError,
    Server,
    ServerDatabase,
    SqliteFile,
    serve,
    temporary_database,
)

_SETTLE_TIMEOUT = 3.0


@dataclass(frozen=True)
class Call:
    """One request. Times are seconds since the batch began; status None means no answer came."""

    start: float
    end: float
    status: int | None

    @property
    def succeeded(self) -> bool:
        return self.status == 200


@dataclass(frozen=True)
class Batch:
    """What became of one side's calls.

    ``errors`` are the last lines of the tracebacks in the server's log. ``left_open`` counts the
    connections that were open once all was quiet, without those that waited in a pool, which are
    ``idle``.
    """

    side: str
    calls: tuple[Call, ...]
    errors: Counter[str]
    left_open: int
    idle: int

    @property
    def statuses(self) -> Counter[int | None]:
        return Counter(call.status for call in self.calls)

    @property
    def failed(self) -> int:
        return sum(not call.succeeded for call in self.calls)

    @property
    def longest(self) -> float:
        return max(call.end - call.start for call in self.calls)

    @property
    def median(self) -> float:
        return statistics.median(call.end - call.start for call in self.calls)


def run_batch(
    side: str,
    count: int,
    *,
    step: float,
    server_url: str | None = None,
    port: int = 0,
    on_start: Callable[[], None] = lambda: None,
    on_answer: Callable[[Call], None] = lambda call: None,
) -> Batch:
    """Serve one side, create a user, make ``count`` calls of ``/slowusers/`` at once, and measure.

    Args:
        side: "unprotected" or "protected".
        count: how many calls.
        step: seconds by which each call's sleep is shorter than the one before.
        server_url: see `temporary_database`.
        port: the server's; 0 for a free one.
        on_start: called when the server is ready.
        on_answer: called with each call when it is answered.

    Raises:
        ExperimentError: the server did not start, or could not create the user.
    """
    with temporary_database(server_url) as database:
        settings = {"DATABASE_URL": database.url, "SLOWUSERS_STEP": str(step)}
        with serve(APPLICATIONS[side], settings, port=port) as server:
            create_user(server)
            on_start()
            calls = asyncio.run(
                fire(server.url, count, timeout=60 + 20 * step, on_answer=on_answer)
            )
            left_open, idle = _count_left_open(server, database)
        return Batch(side, tuple(calls), server.errors, left_open, idle)


def create_user(server: Server) -> None:
    """Create the one user that the calls are to be answered with."""
    user = {"email": "reader@example.com", "password": "not a real password"}
    answer = httpx.post(f"{server.url}/users/", json=user, trust_env=False, timeout=30)
    if not answer.is_success:
        raise ExperimentError(f"The user could not be created: {answer.status_code} {answer.text}")


async def fire(
    url: str,
    count: int,
    *,
    timeout: float = 60.0,
    on_answer: Callable[[Call], None] = lambda _: None,
) -> list[Call]:
    """Make ``count`` calls of ``/slowusers/`` at once, each on a connection of its own.

    Args:
        url: the server's.
        count: how many.
        timeout: seconds after which a call counts as unanswered.
        on_answer: called with each call when it is answered.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=timeout, trust_env=False
    ) as client:
        begin = time.perf_counter()

        async def call() -> Call:
            start = time.perf_counter() - begin
            status: int | None
            try:
                status = (await client.get("/slowusers/")).status_code
            except httpx.TransportError:
                status = None
            done = Call(start, time.perf_counter() - begin, status)
            on_answer(done)
            return done

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call()) for _ in range(count)]
    return [task.result() for task in tasks]


def _count_left_open(server: Server, database: SqliteFile | ServerDatabase) -> tuple[int, int]:
    """Connections left open, and idle in the pool.

    Dependencies end after the answer is sent, so wait until the numbers stand still.
    """
    deadline = time.monotonic() + _SETTLE_TIMEOUT
    before = None
    while True:
        # Only sql_app has a pool; the other side answers 404.
        answer = httpx.get(f"{server.url}/experiment/idle", trust_env=False)
        idle = answer.json() if answer.is_success else 0
        now = (database.count_connections(server.pid) - idle, idle)
        if now == before or time.monotonic() > deadline:
            return now
        before = now
        time.sleep(0.2)
