"""Database errors as responses: a status and a stable body, and nothing of the database's."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import peewee
import pytest
from fastapi import Body, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from fastapi_peewee import Database, InTransaction, Peewee
from tests.apps import assert_unavailable, client, connected, make_app, with_all_uses
from tests.apps import db as db


class Models(NamedTuple):
    team: Any
    member: Any
    locker: Any
    country: Any
    visit: Any


@pytest.fixture
async def models(db: Database) -> Models:
    class Team(db.Model):
        name = peewee.CharField(unique=True, max_length=20)

    class Member(db.Model):
        email = peewee.CharField(column_name="email_address", unique=True, max_length=30)
        team = peewee.ForeignKeyField(Team, backref="members")
        seat = peewee.IntegerField()
        age = peewee.SmallIntegerField(default=1, constraints=[peewee.Check("age >= 0")])

        class Meta:
            indexes = ((("team", "seat"), True),)

    class Locker(db.Model):
        team = peewee.ForeignKeyField(
            Team, unique=True, column_name="owning_team", object_id_name="team_id"
        )
        colour = peewee.CharField(null=False, column_name="paint")

    class Country(db.Model):
        code = peewee.CharField(primary_key=True, max_length=2)

    class Visit(db.Model):
        team = peewee.ForeignKeyField(Team)
        country = peewee.ForeignKeyField(Country)

        class Meta:
            primary_key = peewee.CompositeKey("team", "country")

    models = Models(Team, Member, Locker, Country, Visit)
    await db.acreate_tables(models)

    def fill() -> None:
        Team.create(name="Red")
        Team.create(name="Blue")
        Member.create(email="a@b.c", team=1, seat=1)
        Locker.create(team=1, colour="green")
        Country.create(code="nl")
        Visit.create(team=1, country="nl")

    await db.run(fill)
    return models


ROWS = 6

MESSAGES = {
    "unique": "A record with this value exists already",
    "reference": "The record that this refers to doesn't exist, or others refer to this one",
    "check": "The value isn't allowed",
    "missing": "A value is required",
    "data": "The value is too long or out of range",
}

#: model, values, status, type, names of the fields as the API has them.
REFUSED: dict[str, tuple[str, dict[str, Any], int, str, list[str]]] = {
    "unique": ("team", {"name": "Red"}, 409, "unique", ["name"]),
    "unique with a column name of its own": (
        "member",
        {"email": "a@b.c", "team": 1, "seat": 2},
        409,
        "unique",
        ["email"],
    ),
    "unique together": (
        "member",
        {"email": "d@e.f", "team": 1, "seat": 1},
        409,
        "unique",
        ["team_id", "seat"],
    ),
    "unique foreign key": ("locker", {"team": 1, "colour": "x"}, 409, "unique", ["team_id"]),
    "primary key": ("country", {"code": "nl"}, 409, "unique", ["code"]),
    "composite primary key": (
        "visit",
        {"team": 1, "country": "nl"},
        409,
        "unique",
        ["team_id", "country_id"],
    ),
    "broken reference": (
        "member",
        {"email": "d@e.f", "team": 404, "seat": 2},
        422,
        "reference",
        ["team_id"],
    ),
    "check": ("member", {"email": "d", "team": 2, "seat": 2, "age": -1}, 422, "check", ["age"]),
    "null": ("locker", {"team": 2, "colour": None}, 422, "missing", ["colour"]),
    "too long": ("team", {"name": "x" * 21}, 422, "data", ["name"]),
    "out of range": ("member", {"email": "d", "team": 2, "seat": 2**40}, 422, "data", ["seat"]),
    "far out of range": (
        "member",
        {"email": "d", "team": 2, "seat": 10**20},
        422,
        "data",
        ["seat"],
    ),
}


@pytest.mark.parametrize("kind", ["def", "async"])
@pytest.mark.parametrize("name", REFUSED)
async def test_a_value_that_the_database_refuses(
    db: Database, models: Models, name: str, kind: str
) -> None:
    """409 or 422, with the field's name in the API where the database tells, and no more."""
    model_name, values, status, error, fields = REFUSED[name]
    sqlite = isinstance(db, peewee.SqliteDatabase)
    if sqlite and name in ("too long", "out of range"):
        pytest.skip("SQLite stores it")
    if isinstance(db, peewee.MySQLDatabase) and not db.mariadb and error == "check":
        fields = []  # MySQL numbers those without a name
    model = getattr(models, model_name)
    app = make_app(db)

    def sync(values: dict[str, Any] = Body()) -> None:
        model.create(**values)

    async def asynchronous(values: dict[str, Any] = Body()) -> None:
        await model.acreate(**values)

    endpoint: Any = sync if kind == "def" else asynchronous
    app.post("/")(endpoint)
    async with client(app) as http:
        response = await http.post("/", json=values)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    details = response.json()["detail"]
    expected = [["body", field] for field in fields] or [["body"]]
    assert [detail["type"] for detail in details] == [error] * len(expected)
    assert [detail["msg"] for detail in details] == [MESSAGES[error]] * len(expected)
    assert [set(detail) for detail in details] == [{"type", "loc", "msg"}] * len(expected)
    assert sorted(detail["loc"] for detail in details) == sorted(expected)
    assert await db.run(lambda: sum(each.select().count() for each in models)) == ROWS


async def test_the_names_of_constraints_and_statements_stay_inside(
    db: Database, models: Models
) -> None:
    """No response about a refused value holds SQL, or the name of a constraint, table or file."""
    app = make_app(db)

    @app.post("/{name}")
    def endpoint(name: str) -> None:
        model_name, values, *_ = REFUSED[name]
        getattr(models, model_name).create(**values)

    async with client(app) as http:
        texts = [(await http.post(f"/{name}")).text.lower() for name in REFUSED]
    inside = (
        "insert select constraint unique_ _key fkey pkey sqlite psycopg mysql "
        "email_address owning_team paint"
    )
    database = str(db.database).lower()
    for text in texts:
        assert [word for word in [*inside.split(), database] if word in text] == []


async def test_models_of_two_databases_with_one_table_name(sqlite_url: str) -> None:
    """The field is named as in the model of the database that refused the value."""
    async with connected(sqlite_url) as one, connected(f"{sqlite_url}2") as two:

        class First(one.Model):
            mail = peewee.CharField(column_name="email", unique=True)

            class Meta:
                table_name = "person"

        class Second(two.Model):
            address = peewee.CharField(column_name="email", unique=True)

            class Meta:
                table_name = "person"

        def twice(model: Any, field: str) -> Any:
            def endpoint() -> None:
                model.create(**{field: "a"})
                model.create(**{field: "a"})

            return endpoint

        found = []
        for db, model, field in ((one, First, "mail"), (two, Second, "address")):
            await db.acreate_tables([model])
            app = make_app(db)
            app.post("/")(twice(model, field))
            async with client(app) as http:
                response = await http.post("/")
            assert response.status_code == 409
            found += [detail["loc"] for detail in response.json()["detail"]]
        assert found == [["body", "mail"], ["body", "address"]]


async def test_a_row_that_others_refer_to(db: Database, models: Models) -> None:
    """Deleting it is refused with 422."""
    app = make_app(db)

    @app.delete("/{number}")
    def endpoint(number: int) -> None:
        models.team.get_by_id(number).delete_instance()

    async with client(app) as http:
        response = await http.delete("/1")
        assert response.status_code == 422
        assert {detail["type"] for detail in response.json()["detail"]} == {"reference"}
        assert (await http.delete("/2")).status_code == 200


async def test_a_missing_row(db: Database, models: Models) -> None:
    """404, which names the model and nothing else."""
    app = make_app(db)

    @app.get("/sync/{number}")
    def sync(number: int) -> str:
        return str(models.team.get_by_id(number).name)

    @app.get("/async/{number}")
    async def asynchronous(number: int) -> str:
        return str((await models.team.aget_by_id(number)).name)

    @app.get("/unnamed")
    def unnamed() -> None:
        raise peewee.DoesNotExist

    async with client(app) as http:
        for path in ("/sync", "/async"):
            response = await http.get(f"{path}/404")
            assert (response.status_code, response.json()) == (404, {"detail": "Team not found"})
            assert (await http.get(f"{path}/1")).json() == "Red"
        response = await http.get("/unnamed")
        assert (response.status_code, response.json()) == (404, {"detail": "Not found"})


async def test_a_nul_in_a_text(db: Database, models: Models) -> None:
    """PostgreSQL stores no NUL: that is a refused value as well, not an error of the server."""
    app = make_app(db)

    @app.post("/")
    def endpoint() -> str:
        return str(models.team.create(name="a\0b").name)

    async with client(app) as http:
        response = await http.post("/")
    assert response.status_code == (422 if isinstance(db, peewee.PostgresqlDatabase) else 200)


MISTAKES: dict[str, Callable[[Database, Models], Any]] = {
    "no such table": lambda db, models: db.execute_sql("SELECT * FROM nowhere"),
    "no such column": lambda db, models: db.execute_sql("SELECT nothing FROM team"),
    "syntax": lambda db, models: db.execute_sql("SELEKT"),
    "raised by hand": lambda db, models: _raise(peewee.IntegrityError("by hand")),
    "operational, by hand": lambda db, models: _raise(peewee.OperationalError("by hand")),
    "opened twice": lambda db, models: db.connect(),
    "too few parameters": lambda db, models: db.execute_sql(
        "SELECT " + models.team.select().sql()[0].replace("SELECT", "", 1) + " WHERE ? = 1 %s"
    ),
}


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", MISTAKES)
async def test_a_mistake_of_the_program_stays_an_error(
    db: Database, models: Models, name: str
) -> None:
    """What no client can mend is a 500, and the server's log gets the real exception."""
    app = make_app(db)

    @app.get("/")
    def endpoint() -> None:
        MISTAKES[name](db, models)

    async with client(app) as http:
        response = await http.get("/")
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    async with client(app, raises=True) as http:
        # PyMySQL 1.1 lets Python's own error about the parameters through.
        with pytest.raises((peewee.PeeweeException, TypeError)):
            await http.get("/")
    assert db.pool_stats.in_use == 0


async def test_more_parameters_than_a_statement_may_have(postgres_url: str) -> None:
    """PostgreSQL's driver refuses them: a mistake of the program, which no repetition mends."""
    async with connected(postgres_url) as db:

        class Team(db.Model):
            name = peewee.CharField()

        await db.acreate_tables([Team])
        app = make_app(db)

        @app.get("/")
        def endpoint() -> None:
            Team.insert_many([{"name": "Red"}] * 65536).execute()

        async with client(app) as http:
            assert (await http.get("/")).status_code == 500
        assert db.pool_stats.discarded == 0


async def test_one_error_of_a_group_is_answered(db: Database, models: Models) -> None:
    """What is let out of a `TaskGroup`'s errors is answered as if it had come alone."""
    app = make_app(db)

    @app.post("/{caught}")
    async def endpoint(caught: bool) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(2):
                    group.create_task(models.team.acreate(name="of two"))
        except* peewee.DatabaseError as failed:
            if not caught:
                raise
            raise failed.exceptions[0]  # noqa: B904  # it has a cause, which is the driver's error

    async with client(app) as http:
        assert (await http.post("/true")).status_code == 409
        assert (await http.post("/false")).status_code == 500
    assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_handler_of_everything_may_use_the_database(
    db: Database, models: Models, asynchronous: bool
) -> None:
    """It stands outside of the request: a sync one says for how long it wants a connection."""
    app = make_app(db)

    def sync_handler(request: Request, error: Exception) -> Response:
        with db.connection_context():
            return PlainTextResponse(str(models.team.select().count()), 500)

    async def handler(request: Request, error: Exception) -> Response:
        return PlainTextResponse(str(await db.count(models.team.select())), 500)

    app.add_exception_handler(Exception, handler if asynchronous else sync_handler)

    @app.get("/")
    def broken() -> None:
        raise ValueError

    teams = await db.count(models.team.select())
    async with client(app) as http:
        for _ in range(3):
            assert (await http.get("/")).text == str(teams)
    stats = db.pool_stats
    assert (stats.in_use, stats.idle) == (0, 1)


# The database is away, or busy.


AWAY = [
    "postgresql://somebody:secret@127.0.0.1:1/nowhere",
    "mysql://somebody:secret@127.0.0.1:1/nowhere",
    "sqlite:////nowhere/at/all.db",
]


@pytest.mark.parametrize("url", AWAY, ids=["postgres", "mysql", "sqlite"])
async def test_a_database_that_is_away(url: str) -> None:
    """503 with `Retry-After`, however the request asks for it, and every slot comes back."""
    async with connected(url, pool_size=1, timeout=1) as db:
        app = make_app(db)
        paths = with_all_uses(app, db)
        async with client(app) as http:
            for path in 2 * paths:
                assert_unavailable(await http.get(path))
                assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("max_waiting", [10, 0], ids=["time is over", "queue is full"])
async def test_a_pool_that_is_exhausted(sqlite_url: str, max_waiting: int) -> None:
    """503 with `Retry-After` when no connection comes free in time, or too many wait."""
    async with connected(sqlite_url, pool_size=1, timeout=0.05, max_waiting=max_waiting) as db:
        app = make_app(db)
        paths = with_all_uses(app, db)
        async with client(app) as http:
            lease = await db.pool.acquire()
            for path in paths:
                assert_unavailable(await http.get(path))
            await asyncio.to_thread(db.pool.give_back, lease)
            for path in paths:
                assert (await http.get(path)).text == "1"
        stats = db.pool_stats
        assert (stats.timed_out, stats.refused) == (
            (len(paths), 0) if max_waiting else (0, len(paths))
        )


async def test_a_sqlite_database_that_is_locked(sqlite_url: str) -> None:
    """503 with `Retry-After` when another process keeps the write lock past the busy timeout."""
    async with connected(sqlite_url, busy_timeout=0.05) as db:

        class Note(db.Model):
            text = peewee.CharField()

        await db.acreate_tables([Note])
        app = make_app(db)

        @app.post("/")
        def write(held: InTransaction) -> None:
            Note.create(text="a")

        @app.get("/")
        def read() -> int:
            return int(Note.select().count())

        path = sqlite_url.removeprefix("sqlite:///")
        async with client(app) as http:
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                response = await http.post("/")
                assert (response.status_code, response.json()) == (
                    503,
                    {"detail": "database busy"},
                )
                assert "retry-after" in response.headers
                assert (await http.get("/")).json() == 0
                other.execute("ROLLBACK")
            assert (await http.post("/")).status_code == 200


async def test_a_sqlite_file_that_is_written_to_while_it_is_opened(sqlite_url: str) -> None:
    """The first connection to a file waits for another's write, as it would for a lock later."""
    path = sqlite_url.removeprefix("sqlite:///")
    async with connected(sqlite_url) as db:
        app = make_app(db)
        app.get("/")(lambda: db.execute_sql("SELECT 1").fetchone()[0])
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("CREATE TABLE note (text)")
            other.execute("BEGIN IMMEDIATE")
            asyncio.get_running_loop().call_later(0.1, other.execute, "COMMIT")
            async with client(app) as http:
                assert (await http.get("/")).text == "1"


@pytest.mark.parametrize("server", ["postgres_url", "mysql_url"])
async def test_a_row_that_is_locked(request: pytest.FixtureRequest, server: str) -> None:
    """503 with `Retry-After` for a lock that the database won't wait for."""
    async with connected(request.getfixturevalue(server)) as db:

        class Note(db.Model):
            text = peewee.CharField()

        await db.acreate_tables([Note])
        await Note.acreate(text="a")
        app = make_app(db)
        rows = Note.select().for_update(nowait=True)

        @app.get("/")
        def endpoint(held: InTransaction) -> int:
            return len(rows.clone())

        async with client(app) as http:
            async with db.atomic():
                await db.list(rows.clone())
                response = await http.get("/")
            assert (response.status_code, response.json()) == (503, {"detail": "database busy"})
            assert "retry-after" in response.headers
            assert (await http.get("/")).json() == 1


async def test_a_full_disk(sqlite_url: str) -> None:
    """507 when a SQLite file can't grow; reads go on, and so do writes once there is space."""
    limit: dict[str, Any] = {"max_page_count": 10}
    async with connected(sqlite_url, pragmas=limit, pool_size=1) as db:

        class Note(db.Model):
            text = peewee.TextField()

        await db.acreate_tables([Note])
        app = make_app(db)

        @app.post("/{size}")
        def write(size: int, held: InTransaction) -> None:
            Note.create(text="x" * size)

        @app.get("/")
        def read() -> int:
            return int(Note.select().count())

        async with client(app) as http:
            response = await http.post("/100000")
            assert (response.status_code, response.json()) == (507, {"detail": "database full"})
            assert (await http.get("/")).json() == 0
            assert (await http.post("/10")).status_code == 200
            assert (await http.get("/")).json() == 1


# Handlers of one's own.


@pytest.mark.parametrize("when", ["before", "after"])
async def test_handlers_of_the_applications_own_come_first(sqlite_url: str, when: str) -> None:
    """A handler that the application has, set before or after `init_app`, answers."""
    async with connected(sqlite_url) as db:

        class Note(db.Model):
            text = peewee.CharField()

        await db.acreate_tables([Note])
        app = FastAPI()
        if when == "after":
            Peewee(db).init_app(app)

        @app.exception_handler(peewee.DoesNotExist)
        async def own(request: Request, error: Exception) -> Response:
            return PlainTextResponse("mine", 410)

        @app.exception_handler(Note.DoesNotExist)
        async def more(request: Request, error: Exception) -> Response:
            return PlainTextResponse("more mine", 410)

        if when == "before":
            Peewee(db).init_app(app)

        @app.get("/any")
        def fails() -> None:
            raise peewee.DoesNotExist

        @app.get("/note")
        def note() -> None:
            Note.get_by_id(1)

        async with client(app) as http:
            assert (await http.get("/any")).text == "mine"
            assert (await http.get("/note")).text == "more mine"
