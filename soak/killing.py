"""Processes that are killed while they write, again and again: nothing acknowledged may be lost.

It is the death of a process that is tried, not that of a machine: what the system has been given to
write, it writes.
"""

import asyncio
import itertools
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from fastapi_peewee import Database, connect

from .history import Outcome
from .looking import plain_database
from .proxy import Proxy
from .servers import Server
from .workload import Way, Workload

_CLIENTS = 4
#: Seconds in which a process has to begin, and a server to be of use again.
_PATIENCE = 60.0


@dataclass
class Kills:
    """What came of it.

    Attributes:
        cycles: how often a process was killed.
        acknowledged: transfers and notes that were known to be committed.
        unknown: those that were there and had not been acknowledged.
        recovered: seconds from a server's start to the first transfer on it, for each cycle.
        violations: in words.
    """

    cycles: int = 0
    acknowledged: int = 0
    unknown: int = 0
    recovered: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def kill_writers(
    url: str, cycles: int, seed: int, on_cycle: Callable[[Kills], None] = lambda _: None
) -> Kills:
    """Kill a process that writes to a database, so many times, each at a random moment."""
    kills, dice = Kills(), random.Random(seed)

    async def begin() -> None:
        db = connect(url)
        await Workload(db).begin(seed, 0, None)
        await db.close_pool()

    asyncio.run(begin())
    # One process imports what is needed, and each writer is a fork of that one: a few milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soak.killing"])
    first = 0
    for _ in range(cycles):
        ours, theirs = context.Pipe(duplex=False)
        writer = context.Process(target=write, args=(url, first, theirs), daemon=True)
        writer.start()
        theirs.close()
        with ours:
            acknowledged = _kill_while_it_writes(writer, ours, dice)
        _check_entries(url, first, acknowledged, kills)
        kills.cycles += 1
        first = 1 + max([first, *map(abs, acknowledged)]) + 20 * _CLIENTS
        on_cycle(kills)
    return kills


def _kill_while_it_writes(
    writer: "multiprocessing.context.ForkServerProcess", pipe: Connection, dice: random.Random
) -> set[int]:
    """Returns what the writer has acknowledged, up to its end."""
    if not pipe.poll(_PATIENCE):
        writer.kill()
        raise TimeoutError("The writing process hasn't begun.")
    time.sleep(dice.uniform(0, 0.02))
    writer.kill()
    writer.join()
    writer.close()
    acknowledged = set()
    while True:
        try:
            acknowledged.add(int(pipe.recv_bytes()))
        except (EOFError, OSError):  # half a message is none
            return acknowledged


def write(url: str, first: int, pipe: Connection) -> None:
    """The process that is killed: it transfers and takes notes without end, and says what is
    committed: the numbers of transfers, and those of notes with a minus.
    """

    async def main() -> None:
        workload, numbers = Workload(connect(url, pool_size=_CLIENTS)), itertools.count(first)

        async def client(sync: bool) -> None:
            for number in numbers:  # one iterator for all clients
                outcome = await workload.transfer(random.Random(number), number, Way(sync))
                if outcome is Outcome.DONE:
                    pipe.send_bytes(b"%d" % number)

        async def notes() -> None:
            for number in numbers:
                if await workload.note(number) is Outcome.DONE:
                    pipe.send_bytes(b"%d" % -number)

        clients = [client(bool(n % 2)) for n in range(_CLIENTS)]
        await asyncio.gather(*clients, *(notes() for _ in range(_CLIENTS)))

    asyncio.run(main())


def _check_entries(url: str, first: int, acknowledged: Iterable[int], kills: Kills) -> None:
    with closing(plain_database(url)) as db:
        rows = db.execute_sql(
            "SELECT transfer, count(*), sum(amount) FROM entry"
            f" WHERE transfer >= {first} GROUP BY transfer"
        ).fetchall()
        notes = db.execute_sql(
            f"SELECT number, count(*), max(version) FROM note WHERE number >= {first}"
            " GROUP BY number"
        ).fetchall()
        total, least = db.execute_sql("SELECT sum(balance), min(balance) FROM account").fetchone()
    there = {number for number, _, _ in rows}
    kills.violations += [
        f"torn: transfer {number} has {count} entries, {amount} in all"
        for number, count, amount in rows
        if (count, amount) != (2, 0)
    ]
    kills.violations += [f"note {number} is there {n} times" for number, n, _ in notes if n > 1]
    complete = {-number for number, _, version in notes if version == 2}
    acknowledged, there = set(acknowledged), there | complete
    kills.violations += [f"lost: {number} (below 0: a note)" for number in acknowledged - there]
    if total != Workload.TOTAL or least < 0:
        kills.violations.append(f"the balances come to {total}, the least is {least}")
    kills.acknowledged += len(acknowledged)
    kills.unknown += len(there - acknowledged)


async def kill_server(
    server: Server, cycles: int, seed: int, on_cycle: Callable[[Kills], None] = lambda _: None
) -> Kills:
    """Kill a server that transfers are made on, so many times, and start it again."""
    # Through a proxy, since PyMySQL leaks a Unix socket that it can't connect.
    with Proxy(server.url) as proxy:
        return await _kill_server(
            server, connect(proxy.url, pool_size=_CLIENTS), cycles, seed, on_cycle
        )


async def _kill_server(
    server: Server, db: Database, cycles: int, seed: int, on_cycle: Callable[[Kills], None]
) -> Kills:
    kills, dice = Kills(), random.Random(seed)
    workload = Workload(db)
    await workload.begin(seed, 0, None)
    numbers, done, over = itertools.count(), Counter[bool](), False

    async def client(sync: bool) -> None:
        while not over:
            number = next(numbers)
            outcome = await workload.transfer(random.Random(f"{seed}/{number}"), number, Way(sync))
            done[outcome is Outcome.DONE] += 1

    async def notes() -> None:
        while not over:
            await workload.note(next(numbers))

    async def more(count: int) -> None:
        until = done[True] + count
        async with asyncio.timeout(_PATIENCE):
            while done[True] < until:
                await asyncio.sleep(0.001)

    clients = [asyncio.create_task(client(bool(n % 2))) for n in range(_CLIENTS)]
    clients += [asyncio.create_task(notes()) for _ in range(_CLIENTS)]
    try:
        for _ in range(cycles):
            await more(3)
            await asyncio.sleep(dice.uniform(0, 0.02))
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(dice.uniform(0, 0.02))
            await asyncio.to_thread(server.start)
            start = time.monotonic()
            await more(1)
            kills.recovered.append(time.monotonic() - start)
            kills.cycles += 1
            kills.acknowledged, kills.unknown = done[True], workload.outcomes["unknown"]
            on_cycle(kills)
    finally:
        over = True
        await asyncio.gather(*clients)
    kills.violations += await workload.end()
    await db.close_pool()
    return kills
