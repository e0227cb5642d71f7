"""A run: rounds of operations under faults, after each of which everything is looked at."""

import asyncio
import gc
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastapi_peewee import connect

from .faults import BUSY_TIMEOUT, Target, do, schedule
from .looking import descriptors, idle_transactions, threads
from .proxy import Proxy
from .servers import MariaDBServer, PostgresServer, Server
from .workload import Workload, levels

CLIENTS = 8
POOL_SIZE = 4
#: Seconds that a statement may take: less than some faults last.
STATEMENT_TIMEOUT = 0.3
#: Seconds after which a round is stuck in which no operation has ended.
STUCK = 120.0

SERVERS: dict[str, type[Server]] = {"postgresql": PostgresServer, "mysql": MariaDBServer}
DATABASES = ("sqlite", *SERVERS)


@dataclass
class Report:
    """What happened on one database, over all rounds.

    Attributes:
        violations: what must never be: lost, torn or mixed up; with the round they were found in.
        leaks: what was left behind: slots, transactions, descriptors, threads.
    """

    database: str
    rounds: int = 0
    operations: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)

    @property
    def rate(self) -> int:
        """Operations a second, in the rounds that are over."""
        return round(sum(self.outcomes.values()) / self.seconds) if self.seconds else 0

    @property
    def clean(self) -> bool:
        return not self.violations and not self.leaks


@contextmanager
def sqlite_url() -> Iterator[str]:
    """Of a file in a folder of its own, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        yield f"sqlite:///{Path(folder).resolve() / 'soak.db'}"


@contextmanager
def target_on(database: str) -> Iterator[Target]:
    """A database to do faults to: a SQLite file, or one behind a proxy on a server of our own.

    Raises:
        UnavailableError: there is no such server here.
    """
    with ExitStack() as stack:
        if database == "sqlite":
            url = stack.enter_context(sqlite_url())
            db = connect(
                url,
                pool_size=POOL_SIZE,
                busy_timeout=BUSY_TIMEOUT,
                statement_timeout=STATEMENT_TIMEOUT,
            )
            yield Target(db, url)
            return
        server = stack.enter_context(SERVERS[database]())
        proxy = stack.enter_context(Proxy(server.url))
        db = connect(
            proxy.url, pool_size=POOL_SIZE, timeout=5.0, statement_timeout=STATEMENT_TIMEOUT
        )
        yield Target(db, server.url, proxy, server)


async def run_rounds(
    report: Report,
    target: Target,
    seed: object,
    operations: int,
    on_progress: Callable[[], None] = lambda: None,
    first: int = 0,
    pauses: float = 1.0,
) -> AsyncIterator[None]:
    """Run one round after the other, each of so many operations, until nobody asks for the next.

    Args:
        report: is kept up to date.
        target: what they run on.
        seed: decides on operations and faults, together with the number of the round.
        operations: of each round.
        on_progress: called often.
        first: the number of the first round.
        pauses: how many times as long the pauses between faults are, as the schedule has them.
    """
    workload = Workload(target.db)
    workload.outcomes, workload.errors = report.outcomes, report.errors
    allowed = levels(target.db)
    for number in itertools.count(first):
        level = allowed[number % len(allowed)]
        start, before = time.monotonic(), (descriptors(), threads())
        try:
            async with asyncio.timeout(STUCK) as limit:

                def goes_on(limit: asyncio.Timeout = limit) -> None:
                    limit.reschedule(asyncio.get_running_loop().time() + STUCK)
                    on_progress()

                found = await _round(
                    report,
                    target,
                    workload,
                    f"{seed}/{number}",
                    operations,
                    level,
                    goes_on,
                    pauses,
                )
        except TimeoutError:
            report.violations.append(f"round {number}: stuck after {STUCK:g} s")
            return
        report.violations += [f"round {number} ({level or 'default'}): {words}" for words in found]
        report.leaks += [f"round {number}: {words}" for words in await _leaks(target, before)]
        report.rounds += 1
        report.seconds += time.monotonic() - start
        yield


async def _round(
    report: Report,
    target: Target,
    workload: Workload,
    seed: str,
    operations: int,
    level: str | None,
    on_progress: Callable[[], None],
    pauses: float,
) -> list[str]:
    await workload.begin(seed, operations, level)
    numbers = iter(range(operations))

    async def client(place: int) -> None:
        for number in numbers:  # one iterator for all clients
            task = asyncio.create_task(workload.operate(number))
            target.running[place] = task
            with suppress(asyncio.CancelledError):  # it was, before it had begun
                await task
            report.operations += 1
            on_progress()

    async def disturb() -> None:
        kind = "sqlite" if target.proxy is None else target.url.partition(":")[0]
        for planned in schedule(kind, seed):
            await asyncio.sleep(planned.pause * pauses)
            if over.is_set():
                return
            await do(planned, target)
            report.faults[planned.name] += 1

    over = asyncio.Event()
    nothing = asyncio.create_task(asyncio.sleep(0))
    target.running = [nothing] * CLIENTS
    disturbing = asyncio.create_task(disturb())
    try:
        await asyncio.gather(*(client(place) for place in range(CLIENTS)))
    finally:
        over.set()
        await disturbing  # each fault undoes what it did
        if target.proxy is not None:
            target.proxy.heal()  # which may have been counting bytes just then, in its thread
    return await workload.end()


async def _leaks(target: Target, before: tuple[int, int]) -> list[str]:
    """What is left once the pool is closed."""
    db, found = target.db, []
    if (stats := db.pool_stats).in_use or stats.waiting:
        found.append(f"in use or waited for: {stats}")
    open_transactions = await asyncio.to_thread(_soon_zero, lambda: idle_transactions(target.url))
    if open_transactions:
        found.append(f"{open_transactions} transactions are open")
    await db.close_pool()
    gc.collect()

    def left() -> int:
        now = descriptors(), threads()
        return sum(max(0, more - less) for more, less in zip(now, before, strict=True))

    # The proxy's ends are closed by its own thread, some time.
    if await asyncio.to_thread(_soon_zero, left):
        found.append(f"descriptors and threads: {(descriptors(), threads())}, before {before}")
    return found


def _soon_zero(count: Callable[[], int]) -> int:
    deadline = time.monotonic() + 5
    while (found := count()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found
