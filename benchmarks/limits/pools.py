"""The pools, each set up with a limit as its own documentation teaches; and those who wait for one.

Run by `benchmarks.limits` in `.venv-bench`, as a process for each measurement::

    python -m benchmarks.limits.pools POOL MODE URL LIMIT WAITERS SIZE GIVE_UP

It prints `ready`, waits for a line on its standard input, lets everybody ask at once, and prints as
JSON a list of [seconds until its end or null, name of the error or null].
"""

import asyncio
import json
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

LONG = 3600


class Pool(ABC):
    """A pool of `size` connections, none of which is open at first."""

    #: For those who use it in threads: as many as there may be at a time.
    threads: ThreadPoolExecutor

    def __init__(self, url: str, limit: float, size: int) -> None:
        self.url, self.limit, self.size = url, limit, size

    async def open(self) -> None:  # noqa: B027 (nothing, for most)
        """Whatever an application does at its start."""

    @abstractmethod
    async def use(self, seconds: float = 0) -> None:
        """Ask for a connection, run a statement, keep it for a while, and give it back."""


class Control(Pool):
    """No pool: what this machine and event loop add to a limit."""

    async def use(self, seconds: float = 0) -> None:
        if not seconds:
            await asyncio.sleep(self.limit)
            raise TimeoutError


class Ours(Pool):
    """`await db.run(…)`."""

    def __init__(self, url: str, limit: float, size: int) -> None:
        super().__init__(url, limit, size)
        from fastapi_peewee import connect

        self.db = connect(
            url,
            pool_size=size,
            timeout=limit,
            connect_timeout=limit,
            statement_timeout=limit,
        )

    def statement(self, seconds: float) -> None:
        self.db.execute_sql("SELECT 1")
        time.sleep(seconds)

    async def use(self, seconds: float = 0) -> None:
        await self.db.run(self.statement, seconds)


class OurEndpoints(Ours):
    """A `def` endpoint of a `PeeweeRoute`, called without a server."""

    async def open(self) -> None:
        from fastapi import FastAPI

        from fastapi_peewee import Peewee

        self.app = FastAPI()
        Peewee(self.db).init_app(self.app)
        self.add_endpoint()

    def add_endpoint(self) -> None:
        @self.app.get("/")
        def endpoint(seconds: float) -> None:
            self.statement(seconds)

    async def use(self, seconds: float = 0) -> None:
        statuses = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "server": ("test", 80),
            "path": "/",
            "raw_path": b"/",
            "query_string": f"seconds={seconds}".encode(),
            "headers": [],
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        # Else it would share this task's context with the next one.
        await asyncio.create_task(self.app(scope, receive, send))
        if statuses != [200]:
            raise type(str(*statuses), (Exception,), {})


class OurThreads(OurEndpoints):
    """The same of FastAPI's own route class, which enters `with db.connection_context():`."""

    def add_endpoint(self) -> None:
        from fastapi.routing import APIRoute

        def endpoint(seconds: float) -> None:
            with self.db.connection_context():
                self.statement(seconds)

        self.app.router.route_class = APIRoute
        self.app.get("/")(endpoint)

    async def use(self, seconds: float = 0) -> None:
        import anyio.to_thread

        # As many threads as wait: what is measured is the pool, not FastAPI's limit of 40.
        anyio.to_thread.current_default_thread_limiter().total_tokens = 100
        await super().use(seconds)


class PsycopgPool(Pool):
    """https://www.psycopg.org/psycopg3/docs/advanced/pool.html, with the check it advises."""

    async def open(self) -> None:
        from psycopg_pool import AsyncConnectionPool

        self.pool = AsyncConnectionPool(
            self.url,
            min_size=self.size,
            max_size=self.size,
            timeout=self.limit,
            check=AsyncConnectionPool.check_connection,
            open=False,
            kwargs={
                "connect_timeout": max(1, round(self.limit)),
                "options": f"-c statement_timeout={round(1000 * self.limit)}",
            },
        )
        await self.pool.open()

    async def use(self, seconds: float = 0) -> None:
        async with self.pool.connection() as connection:
            await connection.execute("SELECT 1")
            await asyncio.sleep(seconds)


class Asyncpg(Pool):
    """https://magicstack.github.io/asyncpg/current/usage.html#connection-pools"""

    async def open(self) -> None:
        import asyncpg

        self.pool = await asyncpg.create_pool(
            self.url.partition("?")[0],
            ssl=False,
            min_size=0,
            max_size=self.size,
            timeout=self.limit,
            command_timeout=self.limit,
        )

    async def use(self, seconds: float = 0) -> None:
        async with self.pool.acquire(timeout=self.limit) as connection:
            await connection.execute("SELECT 1")
            await asyncio.sleep(seconds)


class SQLAlchemy(Pool):
    """https://docs.sqlalchemy.org/en/latest/core/pooling.html, with asyncpg and `pool_pre_ping`."""

    async def open(self) -> None:
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import create_async_engine

        self.statement = text("SELECT 1")
        self.engine = create_async_engine(
            self.url.partition("?")[0].replace("postgresql:", "postgresql+asyncpg:"),
            pool_size=self.size,
            max_overflow=0,
            pool_timeout=self.limit,
            pool_pre_ping=True,
            connect_args={
                "timeout": self.limit,
                "command_timeout": self.limit,
                "ssl": False,
            },
        )

    async def use(self, seconds: float = 0) -> None:
        async with self.engine.connect() as connection:
            await connection.execute(self.statement)
            await asyncio.sleep(seconds)


def _peewee_options(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    return {
        "database": parts.path[1:],
        "host": parts.hostname,
        "port": parts.port,
        "user": parts.username,
        "password": parts.password,
    }


class PeeweePool(Pool):
    """https://docs.peewee-orm.com/en/latest/peewee/playhouse.html#connection-pool, in threads."""

    async def open(self) -> None:
        from playhouse.pool import PooledPostgresqlDatabase

        self.db = PooledPostgresqlDatabase(
            **_peewee_options(self.url),
            max_connections=self.size,
            timeout=self.limit,
            connect_timeout=max(1, round(self.limit)),
            options=f"-c statement_timeout={round(1000 * self.limit)}",
            prefer_psycopg3=True,
        )

    def call(self, seconds: float) -> None:
        with self.db.connection_context():
            self.db.execute_sql("SELECT 1")
            time.sleep(seconds)

    async def use(self, seconds: float = 0) -> None:
        await asyncio.get_running_loop().run_in_executor(self.threads, self.call, seconds)


class Pwasyncio(Pool):
    """https://docs.peewee-orm.com/en/latest/peewee/asyncio.html"""

    async def open(self) -> None:
        from playhouse.pwasyncio import AsyncPostgresqlDatabase

        self.db = AsyncPostgresqlDatabase(
            **_peewee_options(self.url),
            ssl=False,
            pool_size=self.size,
            acquire_timeout=self.limit,
            command_timeout=self.limit,
        )

    async def use(self, seconds: float = 0) -> None:
        async with self.db:
            await self.db.aexecute_sql("SELECT 1")
            await asyncio.sleep(seconds)


POOLS: dict[str, type[Pool]] = {
    "asyncio.sleep": Control,
    "fastapi-peewee, async": Ours,
    "fastapi-peewee, def": OurEndpoints,
    "fastapi-peewee, thread": OurThreads,
    "psycopg_pool": PsycopgPool,
    "asyncpg": Asyncpg,
    "SQLAlchemy + asyncpg": SQLAlchemy,
    "playhouse.pool": PeeweePool,
    "playhouse.pwasyncio": Pwasyncio,
}


def _users(pool: Pool, seconds: float) -> list["asyncio.Task[None]"]:
    return [asyncio.create_task(pool.use(seconds)) for _ in range(pool.size)]


async def measure(pool: Pool, mode: str, waiters: int, give_up: float) -> None:
    loop = asyncio.get_running_loop()
    # Neither the loop nor a thread waits for its first use.
    pool.threads = ThreadPoolExecutor(waiters + pool.size)
    barrier = threading.Barrier(waiters + pool.size)
    for _ in range(waiters + pool.size):
        pool.threads.submit(barrier.wait)
    await pool.open()
    if mode != "first":
        while (await asyncio.gather(*_users(pool, 0.05), return_exceptions=True)).count(None) < (
            pool.size
        ):
            pass  # a busy machine may take longer than a short limit to open so many
    if mode == "idle":
        await asyncio.sleep(1.2)
    if mode == "held":
        holders = _users(pool, LONG)
        await asyncio.wait(holders, timeout=0.5)
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)

    async def asking() -> tuple[float, str | None]:
        started = time.monotonic()
        try:
            await pool.use()
        except Exception as error:
            return time.monotonic() - started, type(error).__name__
        return time.monotonic() - started, None

    async def waiter() -> tuple[float | None, str | None]:
        # It is not cancelled: some pools wait on for what a cancelled task was waiting for.
        task = asyncio.create_task(asking())
        await asyncio.wait({task}, timeout=give_up)
        return task.result() if task.done() else (None, None)

    found = await asyncio.gather(*(waiter() for _ in range(waiters)))
    print(json.dumps(found), flush=True)
    os._exit(0)  # what hangs would be waited for


def main() -> None:
    name, mode, url, limit, waiters, size, give_up = sys.argv[1:]
    pool = POOLS[name](url, float(limit), int(size))
    asyncio.run(measure(pool, mode, int(waiters), float(give_up)))


if __name__ == "__main__":
    main()
