"""``python -m benchmarks.rows URL…``: what a row of a response costs, in responses of all sizes.

Without HTTP, from the query to the bytes of the body: the processor time of this process and, on
Linux, of the server's thread or process that serves it. Each line of the table is a plan, each
column a number of rows; if the cost is linear, the numbers in a line are alike.

The tables are made in the database that a URL names, and dropped; without a URL, SQLite in memory.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peewee
from pydantic import BaseModel, field_validator
from rich.console import Console
from rich.table import Table

from fastapi_peewee import connect
from fastapi_peewee.loading import Plans
from fastapi_peewee.plans import InstancePlan, Texts

SIZES = (1, 10, 100, 1_000, 10_000)
ITEMS = 5
_SECONDS = 1.0


class ItemOut(BaseModel):
    id: int
    title: str


class Flat(BaseModel):
    id: int
    name: str


class Nested(Flat):
    items: list[ItemOut]


class Checked(Nested):
    """Not for the database to build."""

    @field_validator("name")
    @classmethod
    def same(cls, name: str) -> str:
        return name


def body(plans: Plans, value: Any) -> bytes:
    if isinstance(value, Texts):
        return value.body()
    adapter = plans.response.adapter
    return adapter.dump_json(adapter.validate_python(value, from_attributes=True))


def ways(db: Any, user: Any) -> dict[str, Callable[[int], Any]]:
    """Functions that answer with so many rows."""

    def first(rows: int) -> Any:
        return user.select().order_by(user.id).limit(rows)

    def whole(type_: Any) -> Callable[[int], Any]:
        plans = Plans(type_)
        return lambda rows: body(plans, plans.load(first(rows)))

    def streamed(type_: Any) -> Callable[[int], Any]:
        plans = Plans(type_)
        return lambda rows: [*plans.plan(first(rows)).stream(db, 500)]

    def as_instances(rows: int) -> bytes:
        return body(plans, InstancePlan(plans.response, first(rows), "").load(db))

    plans = Plans(list[Nested])
    return {
        "json, flat": whole(list[Flat]),
        f"json, with {ITEMS} items": whole(list[Nested]),
        "the same, streamed": streamed(list[Nested]),
        "rows, with items": whole(list[Checked]),
        "the same, streamed ": streamed(list[Checked]),
        "instances, with items": as_instances,
    }


@contextmanager
def filled(url: str) -> Iterator[tuple[Any, Any]]:
    db = connect(url)

    class User(db.Model):  # type: ignore[name-defined]
        name = peewee.CharField()

    class Item(db.Model):  # type: ignore[name-defined]
        title = peewee.CharField()
        owner = peewee.ForeignKeyField(User, backref="items")

    User._meta.table_name, Item._meta.table_name = "benchmark_user", "benchmark_item"
    users = [{"id": n, "name": f"user {n}"} for n in range(1, max(SIZES) + 1)]
    items = [{"title": f"item {n}", "owner": user["id"]} for user in users for n in range(ITEMS)]
    with db.connection_context():
        db.drop_tables([Item, User])
        db.create_tables([User, Item])
        try:
            with db.atomic():
                for model, rows in ((User, users), (Item, items)):
                    for start in range(0, len(rows), 1000):
                        model.insert_many(rows[start : start + 1000]).execute()
            yield db, User
        finally:
            db.drop_tables([Item, User])
    asyncio.run(db.close_pool(grace=0))


def microseconds_per_row(
    answer: Callable[[int], Any], rows: int, seconds: Callable[[], float]
) -> float:
    answer(rows)  # plans and caches
    start, runs = seconds(), 0
    while runs < 2 or seconds() - start < _SECONDS:
        answer(rows)
        runs += 1
    return (seconds() - start) / runs / rows * 1e6


def processor(db: Any) -> Callable[[], float]:
    """Counts the seconds of processor time that this process and its server have taken."""
    ask = {
        "PostgresqlDatabase": "SELECT pg_backend_pid()",
        "MySQLDatabase": "SELECT tid FROM information_schema.processlist WHERE id=CONNECTION_ID()",
    }.get(type(db).__name__)
    if ask is None:
        return time.process_time
    ((thread,),) = db.execute_sql(ask).fetchall()
    stat = Path(f"/proc/{thread}/task/{thread}/stat")
    if not stat.exists():
        return time.process_time

    def seconds() -> float:
        fields = stat.read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("urls", nargs="*", default=["sqlite:///:memory:"], metavar="URL")
    console = Console()
    for url in parser.parse_args().urls:
        table = Table("µs for a row", *(f"{rows:,} rows" for rows in SIZES))
        with filled(url) as (db, user):
            table.title = type(db).__name__.removesuffix("Database")
            seconds = processor(db)
            for name, answer in ways(db, user).items():
                found = [microseconds_per_row(answer, rows, seconds) for rows in SIZES]
                table.add_row(name, *(f"{each:,.1f}" for each in found))
        console.print(table)


if __name__ == "__main__":
    main()
