"""The async methods of a database, under the names of `playhouse.pwasyncio`: calls of `run`."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import peewee

from .blocks import Atomic, LeaseContext
from .calls import detached
from .outcomes import Outcomes
from .state import Lease


class AsyncNames(Outcomes):
    """What `Database` has of `playhouse.pwasyncio`, so that its users can switch."""

    if TYPE_CHECKING:

        async def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...

        async def _call_under(self, lease: Lease, fn: Callable[[], Any]) -> Any: ...

        def reading(self) -> LeaseContext | Atomic: ...

        def open_rows(self, query: Any) -> Any: ...

    async def aexecute_sql(self, sql: str, params: Any = None) -> "Rows":
        """Run a statement and read all its rows."""
        return await self.run(lambda: Rows(self.execute_sql(sql, params)))

    async def aexecute(self, query: Any) -> Any:
        query.bind(self)
        return await self.run(query.execute)

    async def get(self, query: Any) -> Any:
        return await self._database_of(query).run(query.get)

    async def first(self, query: Any, n: int = 1) -> Any:
        return await self._database_of(query).run(query.first, n=n)

    async def list(self, query: Any) -> list[Any]:
        return await self._database_of(query).run(list, query)

    async def scalar(self, query: Any) -> Any:
        return await self._database_of(query).run(query.scalar)

    async def count(self, query: Any) -> int:
        return await self._database_of(query).run(query.count)

    async def exists(self, query: Any) -> bool:
        return await self._database_of(query).run(query.exists)

    async def aprefetch(self, query: Any, *subqueries: Any) -> Any:
        return await self._database_of(query).run(peewee.prefetch, query, *subqueries)

    def _database_of(self, query: Any) -> "AsyncNames":
        """The database that a query is bound to; this one if it is to none."""
        db = query._database
        if isinstance(db, peewee.Proxy):
            db = db.obj
        if db is None:
            query.bind(self)
            return self
        if not isinstance(db, AsyncNames):
            raise peewee.InterfaceError(
                f"The query is bound to a {type(db).__name__}, which has no async methods. Make "
                "its database with `fastapi_peewee.connect(url)`."
            )
        return db

    async def aconnect(self) -> None:
        """Hold a connection for this task, until `aclose()` or the end of the task."""
        if self._state.bound_lease() is not None:
            return
        await self.__aenter__()
        context: LeaseContext = self._state.ctx[-1]
        context.until_aclose = True
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: detached(context.abandon()))

    async def aclose(self) -> None:
        """Give back what `aconnect()` holds. What a block around this code holds is the block's.

        Raises:
            peewee.OperationalError: a transaction is open.
        """
        if self._state.bound_lease() is None:
            return
        if self.in_transaction():
            raise peewee.OperationalError("Attempting to close database while transaction is open.")
        if getattr(self._state.ctx[-1], "until_aclose", False):
            await self.__aexit__(None, None, None)

    async def iterate(self, query: Any, buffer_size: int = 100) -> AsyncGenerator[Any, None]:
        """Yield a query's rows, read `buffer_size` at a time.

        Inside a block it reads through that block's connection. Otherwise it holds one of its own
        until it is exhausted or closed, which the loop's body does not use: leave the loop early
        only with `contextlib.aclosing`.
        """
        query.bind(self)
        lease = self._state.bound_lease()  # not the request's, which goes back before a stream
        block = self.reading() if lease is None else None
        if block is not None:
            # A generator shares its consumer's context: what is bound here would be seen there.
            lease = await block.aenter_unbound()
        assert lease is not None
        try:
            rows = await self._call_under(lease, partial(self.open_rows, query))
            next_rows = partial(_take, rows, buffer_size)
            while chunk := await self._call_under(lease, next_rows):
                for row in chunk:
                    yield row
        finally:
            if block is not None:
                await block.aexit_unbound()

    async def acreate_tables(self, *args: Any, **kwargs: Any) -> None:
        await self.run(self.create_tables, *args, **kwargs)

    async def adrop_tables(self, *args: Any, **kwargs: Any) -> None:
        await self.run(self.drop_tables, *args, **kwargs)


def _take(rows: Iterator[Any], count: int) -> Sequence[Any]:
    return tuple(islice(rows, count))


class Rows(list[Any]):
    """The rows of a cursor, read to its end, and what else it knew."""

    def __init__(self, cursor: Any) -> None:
        super().__init__(cursor.fetchall() if cursor.description else [])
        self.description = cursor.description
        self.rowcount: int = cursor.rowcount
        self.lastrowid = getattr(cursor, "lastrowid", None)

    def fetchall(self) -> list[Any]:
        return list(self)

    def fetchone(self) -> Any:
        """The next row, or None; as from a cursor, it is then no longer there."""
        return self.pop(0) if self else None
