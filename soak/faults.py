"""What is done to a database and its users while they work: faults, each of which ends by itself.

A schedule is a sequence of faults and pauses that depends on its seed only.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import peewee

from fastapi_peewee import Database

from .looking import plain_database
from .proxy import Proxy
from .servers import PostgresServer, Server, frozen

#: Seconds between the ends and beginnings of faults, in the middle.
PAUSE = 0.02


@dataclass
class Target:
    """What faults are done to. SQLite has neither a proxy nor a server.

    Attributes:
        db: the database that the operations use.
        url: of the same database, past the proxy.
        running: the operations, as tasks.
    """

    db: Database
    url: str
    proxy: Proxy | None = None
    server: Server | None = None
    running: list[asyncio.Task[None]] = field(default_factory=list)


Fault = Callable[[Target, random.Random], Awaitable[None]]


class Planned(NamedTuple):
    pause: float
    name: str
    seed: int


def schedule(kind: str, seed: object) -> Iterator[Planned]:
    """Without end.

    Args:
        kind: "sqlite", "postgresql" or "mysql".
        seed: anything that prints the same each time.
    """
    dice = random.Random(f"schedule/{seed}")
    weights = _WEIGHTS[kind]
    while True:
        [name] = dice.choices(list(weights), list(weights.values()))
        yield Planned(dice.expovariate(1 / PAUSE), name, dice.getrandbits(32))


async def do(planned: Planned, target: Target) -> None:
    """One fault, from its beginning to its end."""
    await FAULTS[planned.name](target, random.Random(planned.seed))


# Those of the application


async def cancel(target: Target, dice: random.Random) -> None:
    """One operation is cancelled, once or several times."""
    if target.running:
        task = dice.choice(target.running)
        for _ in range(dice.randint(1, 3)):
            task.cancel()
            await asyncio.sleep(0)


async def cancel_all(target: Target, dice: random.Random) -> None:
    """All are, as at shutdown."""
    for task in target.running:
        task.cancel()


async def hold_all(target: Target, dice: random.Random) -> None:
    """All connections are taken for a while."""

    async def hold() -> None:
        with suppress(peewee.DatabaseError):
            async with target.db.connection_context():
                await asyncio.sleep(seconds)

    seconds = dice.uniform(0, 0.1)
    await asyncio.gather(*(hold() for _ in range(target.db.pool.size)))


async def close_all(target: Target, dice: random.Random) -> None:
    """Every connection is replaced."""
    await asyncio.to_thread(target.db.close_all)


async def lock(target: Target, dice: random.Random) -> None:
    """Another program writes to the SQLite file, for less time than is waited for, or more."""
    seconds = dice.uniform(0, 2 * BUSY_TIMEOUT)
    with closing(plain_database(target.url)) as other, suppress(peewee.OperationalError):
        other.execute_sql("BEGIN IMMEDIATE")
        await asyncio.sleep(seconds)
        other.execute_sql("ROLLBACK")


#: Seconds that SQLite waits for another's lock, in a soak.
BUSY_TIMEOUT = 0.1


# Those of the wire


async def cut(target: Target, dice: random.Random, *, resets: bool = False) -> None:
    """All connections are cut."""
    assert target.proxy is not None
    target.proxy.resets = resets
    await asyncio.to_thread(target.proxy.cut)
    target.proxy.resets = False


async def cut_commit(target: Target, dice: random.Random, *, name: str) -> None:
    """The connection of the next COMMIT is cut, before or after it."""
    settings: dict[str, Any] = {name: b"COMMIT"}
    await _for_a_while(target, dice, **settings)


async def cut_answer(target: Target, dice: random.Random) -> None:
    """An answer is cut after some bytes."""
    await _for_a_while(target, dice, cut_answer_at=dice.randrange(400))


async def slow(target: Target, dice: random.Random) -> None:
    """The wire is slow, or gives the server's answers in small pieces."""
    await _for_a_while(target, dice, latency=dice.uniform(0, 0.01), slice_to=dice.randint(1, 9))


async def refuse(target: Target, dice: random.Random) -> None:
    """All connections are cut, and no new one is accepted for a while."""
    await cut(target, dice)
    await _for_a_while(target, dice, refusing=True)


async def swallow(target: Target, dice: random.Random) -> None:
    """Nothing comes through for a while; then the connections are cut."""
    await _for_a_while(target, dice, longest=1.0, swallowing=True)
    await cut(target, dice)


async def _for_a_while(
    target: Target, dice: random.Random, longest: float = 0.1, **settings: Any
) -> None:
    assert target.proxy is not None
    before = {name: getattr(target.proxy, name) for name in settings}
    for name, value in settings.items():
        setattr(target.proxy, name, value)
    await asyncio.sleep(dice.uniform(0, longest))
    for name, value in before.items():
        setattr(target.proxy, name, value)


# Those of the server


async def end_session(target: Target, dice: random.Random) -> None:
    """The server ends one of the sessions."""

    def end() -> None:
        with closing(plain_database(target.url)) as admin:
            if found := sessions(admin):
                postgres = isinstance(admin, peewee.PostgresqlDatabase)
                statement = "SELECT pg_terminate_backend(%s)" if postgres else "KILL %s"
                with suppress(peewee.OperationalError):  # it has just gone by itself
                    admin.execute_sql(statement, (dice.choice(found),))

    await asyncio.to_thread(end)


async def freeze(target: Target, dice: random.Random) -> None:
    """The process of one session stands still for a while; on MySQL, that of all."""
    assert target.server is not None

    def processes() -> list[int]:
        if not isinstance(target.server, PostgresServer):
            assert target.server is not None
            return [target.server.pid]
        with closing(plain_database(target.url)) as admin:
            return sessions(admin)

    if pids := await asyncio.to_thread(processes):
        try:
            with frozen(dice.choice(pids)):
                await asyncio.sleep(dice.uniform(0, 1))
        except ProcessLookupError:
            pass  # it has just gone by itself


async def restart(target: Target, dice: random.Random) -> None:
    """The server is killed, and started again after a moment."""
    assert target.server is not None
    await asyncio.to_thread(target.server.kill)
    await asyncio.sleep(dice.uniform(0, 0.1))
    await asyncio.to_thread(target.server.start)


def sessions(admin: Any) -> list[int]:
    """The others on the database that `admin` is connected to: on PostgreSQL, processes."""
    query = (
        "SELECT pid FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        if isinstance(admin, peewee.PostgresqlDatabase)
        else "SELECT id FROM information_schema.processlist"
        " WHERE db = database() AND id <> connection_id()"
    )
    return [number for (number,) in admin.execute_sql(query).fetchall()]


FAULTS: dict[str, Fault] = {
    "cancel": cancel,
    "cancel all": cancel_all,
    "hold all connections": hold_all,
    "close all connections": close_all,
    "lock the file": lock,
    "cut": cut,
    "reset": partial(cut, resets=True),
    "cut before COMMIT": partial(cut_commit, name="cut_before"),
    "cut after COMMIT": partial(cut_commit, name="cut_after"),
    "cut an answer": cut_answer,
    "slow wire": slow,
    "refuse connections": refuse,
    "swallow, then cut": swallow,
    "end a session": end_session,
    "freeze": freeze,
    "kill the server": restart,
}

_APPLICATION = {
    "cancel": 30,
    "cancel all": 2,
    "hold all connections": 3,
    "close all connections": 3,
}
_SERVER = {
    **_APPLICATION,
    "cut": 6,
    "reset": 6,
    "cut before COMMIT": 6,
    "cut after COMMIT": 6,
    "cut an answer": 6,
    "slow wire": 4,
    "refuse connections": 3,
    "swallow, then cut": 3,
    "end a session": 6,
    "freeze": 3,
    "kill the server": 1,
}
_WEIGHTS: dict[str, dict[str, int]] = {
    "sqlite": {**_APPLICATION, "lock the file": 10},
    "postgresql": _SERVER,
    "mysql": _SERVER,
}
