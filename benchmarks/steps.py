"""``python -m benchmarks.steps [URL]``: where the time of a request goes, on SQLite or PostgreSQL.

Microseconds of this process's processor time for each step of reading one user with its items and
of creating an item, and for whole requests without a socket, ten at a time, beside those of an
application that asks no database. The best of some runs: what is between them is other work of the
machine's. The tables are made in the database that the URL names, and dropped; without a URL, in a
SQLite file of its own.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import peewee
from fastapi import FastAPI
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from starlette.types import Message

from fastapi_peewee import Peewee, connect, param, prepared, single
from fastapi_peewee.loading import Plans
from fastapi_peewee.shapes import shape_of

_RUNS, _CALLS, _AT_ONCE = 7, 700, 10


class ItemIn(BaseModel):
    title: str


class ItemOut(ItemIn):
    id: int


class UserOut(BaseModel):
    id: int
    name: str
    items: list[ItemOut]


@contextmanager
def tables(db: Any) -> Iterator[tuple[Any, Any]]:
    class User(db.Model):
        name = peewee.CharField()

    class Item(db.Model):
        title = peewee.CharField()
        owner = peewee.ForeignKeyField(User, backref="items")

    User._meta.table_name, Item._meta.table_name = "benchmark_user", "benchmark_item"
    with db.allow_sync(), db:
        db.drop_tables([Item, User])
        db.create_tables([User, Item])
        reader = User.create(name="user 1")
        for number in range(5):
            Item.create(title=f"item {number}", owner=reader)
        User.create(name="user 2")  # who gets the items that are created while it is measured
    try:
        yield User, Item
    finally:
        with db.allow_sync(), db:
            db.drop_tables([Item, User])


def microseconds(step: Callable[[], Any]) -> float:
    def once() -> float:
        start = time.process_time()
        for _ in range(_CALLS):
            step()
        return (time.process_time() - start) / _CALLS * 1e6

    return min(once() for _ in range(_RUNS))


async def amicroseconds(step: Callable[[], Awaitable[Any]], at_once: int = 1) -> float:
    async def some() -> None:
        for _ in range(_CALLS // at_once):
            await step()

    async def once() -> float:
        start = time.process_time()
        await asyncio.gather(*(some() for _ in range(at_once)))
        return (time.process_time() - start) / _CALLS * 1e6

    return min([await once() for _ in range(_RUNS)])


async def ask(app: FastAPI, method: str, path: str, body: Any = None) -> None:
    """One request, answered with 200."""
    content = b"" if body is None else json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "app": app}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
    status = []

    async def receive() -> Message:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        status.append(message.get("status", 200))

    await app(scope, receive, send)
    assert set(status) == {200}


def apps(db: Any, user: Any, item: Any) -> tuple[FastAPI, FastAPI]:
    """The same with a database and without."""
    ours, control = FastAPI(), FastAPI()
    Peewee(db).init_app(ours)
    read = prepared(user.select().where(user.id == param("user_id")), UserOut)

    @ours.get("/users/{user_id}", response_model=UserOut)
    async def read_user(user_id: int) -> Any:
        return user.select().where(user.id == user_id)

    @ours.get("/prepared/{user_id}", response_model=UserOut)
    async def read_prepared(user_id: int) -> Any:
        return read(user_id=user_id)

    @ours.post("/users/{user_id}/items", response_model=ItemOut)
    async def create_item(user_id: int, data: ItemIn) -> Any:
        return await item.acreate(title=data.title, owner=user_id)

    @ours.post("/def/{user_id}/items", response_model=ItemOut)
    def create_in_a_thread(user_id: int, data: ItemIn) -> Any:
        return item.create(title=data.title, owner=user_id)

    items = [ItemOut(id=number, title=f"item {number}") for number in range(5)]

    @control.get("/users/{user_id}", response_model=UserOut)
    async def constant(user_id: int) -> Any:
        return UserOut(id=user_id, name="user 1", items=items)

    @control.post("/users/{user_id}/items", response_model=ItemOut)
    async def created(user_id: int, data: ItemIn) -> Any:
        return ItemOut(id=user_id, title=data.title)

    return ours, control


async def steps(db: Any, user: Any, item: Any) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []

    def note(name: str, cost: float) -> None:
        found.append((name, cost))

    plans = Plans(UserOut)
    read = prepared(user.select().where(user.id == param("user_id")), UserOut)
    query = user.select().where(user.id == 1)
    for _ in range(3):
        await db.run(plans.load, query)
        await db.run(plans.load, read(user_id=1))
        await item.acreate(title="a", owner=2)
    found_one = read(user_id=1).find_on_loop(db)
    assert found_one is not None
    compiled, params = found_one
    select = compiled.sql, [*compiled.params, *params]

    note(
        "reading: the query, made by the endpoint",
        microseconds(lambda: user.select().where(user.id == 1)),
    )
    note("… its SQL, by its shape", microseconds(lambda: plans._find(db, shape_of(query))))
    note("… or both, of a prepared query", microseconds(lambda: read(user_id=1).find_on_loop(db)))
    note("the statement, with its answer", await amicroseconds(partial(db.aread_texts, *select)))
    note("writing: an instance", microseconds(lambda: item(title="a", owner=2)))
    creation = single.Creation(item(title="a", owner=2), db)
    note("… the SQL of its INSERT", microseconds(lambda: creation.statement(db._sql_cache)))
    statement = creation.statement(db._sql_cache)
    assert statement is not None  # since there were others

    async def execute() -> Any:
        cursor = await db.aexecute_compiled(*statement)
        assert cursor is not None  # which would be: not in this way now
        return cursor

    for name, at_once in ("the statement, committed", 1), ("… of ten at a time", _AT_ONCE):
        # What wasn't used for a second isn't used without asking, and none is opened here.
        await asyncio.gather(*(db.run(time.sleep, 0.02) for _ in range(_AT_ONCE)))
        note(name, await amicroseconds(execute, at_once))
    cursor = await execute()
    note(
        "… and what becomes of its result",
        microseconds(lambda: creation.finish(cursor.again())),
    )

    def lend() -> None:
        try:
            db.pool.acquire().send(None)
        except StopIteration as done:
            db.pool.connect_at_once(done.value)
            db.pool.give_back(done.value)

    note("either: a lease, its connection, and back", microseconds(lend))
    return found


async def requests(db: Any, user: Any, item: Any) -> list[tuple[str, float]]:
    ours, control = apps(db, user, item)
    ways: dict[str, tuple[Any, ...]] = {
        "a request that reads, without a database": (control, "GET", "/users/1", None),
        "the same, read": (ours, "GET", "/users/1", None),
        "the same, prepared": (ours, "GET", "/prepared/1", None),
        "a request that creates, without a database": (
            control, "POST", "/users/2/items", {"title": "a"}
        ),
        "the same, created with acreate": (ours, "POST", "/users/2/items", {"title": "a"}),
        "the same, created in a def endpoint": (ours, "POST", "/def/2/items", {"title": "a"}),
    }  # fmt: skip
    for app, *rest in ways.values():  # plans, caches and connections
        await amicroseconds(partial(ask, app, *rest), _AT_ONCE)
    return [
        (name, await amicroseconds(partial(ask, app, *rest), _AT_ONCE))
        for name, (app, *rest) in ways.items()
    ]


async def measure(url: str) -> Table:
    db = connect(url)
    table = Table("", "µs", title="processor time of this process")
    with tables(db) as (user, item):
        for part in (await steps(db, user, item), await requests(db, user, item)):
            for name, cost in part:
                table.add_row(name, f"{cost:,.0f}")
            table.add_section()
        await db.close_pool()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("url", metavar="URL", nargs="?", help="postgresql://me@db.example/mine")
    with TemporaryDirectory() as folder:
        url = parser.parse_args().url or f"sqlite:///{folder}/steps.db?inline_reads=0.1"
        Console().print(asyncio.run(measure(url)))


if __name__ == "__main__":
    main()
