"""What is compared, and by which requests."""

from dataclasses import dataclass
from typing import Any, NamedTuple

#: What the others are compared with.
OURS = "ours"
#: What answers nothing, so that its answers aren't compared.
CONTROL = "control"


class Stack(NamedTuple):
    """An application. `{database}` in its name becomes "sqlite" or "postgresql"."""

    title: str
    application: str
    #: What is added to the URL of a SQLite file.
    sqlite_options: str = ""


STACKS = {
    # As sql_app has it by default.
    OURS: Stack("sql_app, on this library", "sql_app.main:app", "?inline_reads=0.002"),
    "recipe": Stack("FastAPI’s former how-to on Peewee", "benchmarks.apps.recipe:app"),
    "pwasyncio": Stack("Peewee’s own asyncio extension", "benchmarks.apps.pwasyncio:app"),
    "sqlmodel": Stack("SQLModel, `def` endpoints", "benchmarks.apps.sqlmodel:app"),
    "sqlalchemy": Stack("SQLAlchemy’s async ORM", "benchmarks.apps.sqlalchemy:app"),
    "tortoise": Stack("Tortoise ORM", "benchmarks.apps.tortoise:app"),
    "piccolo": Stack("Piccolo", "benchmarks.apps.piccolo:app"),
    "driver": Stack(
        "SQL by hand on the driver, with a response model", "benchmarks.apps.driver_{database}:app"
    ),
    "driver-json": Stack(
        "SQL by hand that makes JSON, sent as it is", "benchmarks.apps.driver_json_{database}:app"
    ),
    CONTROL: Stack("FastAPI answering a constant, no database", "benchmarks.apps.control:app"),
}

DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}


class Request(NamedTuple):
    path: str
    #: What is posted; None is for GET.
    json: dict[str, Any] | None = None


@dataclass(frozen=True)
class Workload:
    """A request that is measured, and requests of its kind whose answers are compared.

    `{id}` in the measured path becomes the ids of all users, in an order that looks random.
    """

    title: str
    measured: Request
    compared: tuple[Request, ...]


def _pages(path: str, rows: int) -> tuple[Request, ...]:
    queries = ("", "?limit=100", "?skip=3&limit=2", f"?skip={rows - 5}", f"?skip={rows}")
    return tuple(Request(path + query) for query in (*queries, "?limit=1000"))


# In this order, since the last one leaves rows behind.
WORKLOADS = {
    "users": Workload(
        "100 users with their 5 items each",
        Request("/users/?limit=100"),
        _pages("/users/", 1000),
    ),
    "user": Workload(
        "one user with 5 items",
        Request("/users/{id}"),
        tuple(Request(f"/users/{number}") for number in (1, 7, 1000, 1001)),
    ),
    "items": Workload(
        "100 items",
        Request("/items/?limit=100"),
        _pages("/items/", 5000),
    ),
    "create": Workload(
        "a new item, committed",
        Request("/users/{id}/items/", {"title": "An item", "description": "Made to be measured"}),
        (
            Request("/users/1/items/", {"title": "A “title”", "description": "A\ndescription"}),
            Request("/users/1/items/", {"title": "No description"}),
            Request("/users/1"),
            Request("/users/1001/items/", {"title": "Nobody’s"}),
            Request("/users/1/items/", {"title": "Too large", "description": "a" * 2**16}),
        ),
    ),
}
