"""Endpoints that return queries, instances, or nothing: the response model decides what is read."""

import asyncio
import functools
import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import peewee
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Response
from fastapi.exceptions import ResponseValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, RootModel, Tag, field_validator

from fastapi_peewee import (
    Database,
    InTransaction,
    LazyLoad,
    Peewee,
    PeeweeRoute,
    explain,
    param,
    prepared,
    respond,
)
from fastapi_peewee.loading import Plans
from tests.apps import client, connected, make_app
from tests.apps import db as db
from tests.shop import BareUserOut, ItemOut, Models, UserOut


class ItemLess(BaseModel):
    id: int


class Aliased(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    id: int
    name: str = Field(alias="fullName")
    note: str | None


class Checked(BaseModel):
    """Not for the database to build: it has a validator."""

    id: int
    name: str
    items: list[ItemOut]

    @field_validator("name")
    @classmethod
    def loud(cls, name: str) -> str:
        return name.upper()


ADA = {"id": 1, "name": "Ada", "items": [{"id": 1, "title": "a"}, {"id": 2, "title": "b"}]}
BOB = {"id": 2, "name": "Bob", "items": []}


@pytest.fixture
async def models(db: Database) -> Models:
    """Users with items: Ada has two, Bob has none."""
    models = Models(db)
    await db.acreate_tables([models.User, models.Item])
    ada = await models.User.acreate(name="Ada")
    await models.User.acreate(name="Bob")
    for title in "ab":
        await models.Item.acreate(title=title, owner=ada)
    return models


@pytest.fixture
async def statements(db: Database) -> list[str]:
    """The SQL that the database is sent."""
    seen: list[str] = []
    db.query_hooks.append(lambda event: seen.append(event.sql))
    return seen


KINDS = pytest.mark.parametrize("kind", ["def", "async"])


def add(app: FastAPI, kind: str, path: str, returns: Any, **options: Any) -> None:
    """An endpoint that returns what `returns()` does."""

    def plain() -> Any:
        return returns()

    async def coroutine() -> Any:
        return returns()

    app.get(path, **options)(plain if kind == "def" else coroutine)


async def answer(app: FastAPI, path: str = "/") -> tuple[int, Any]:
    async with client(app) as http:
        response = await http.get(path)
        return response.status_code, response.json()


@KINDS
async def test_a_list(db: Database, models: Models, statements: list[str], kind: str) -> None:
    """A returned query becomes the list that the response model describes, in one statement."""
    app = make_app(db)
    add(app, kind, "/", lambda: models.User.select().order_by(models.User.id),
        response_model=list[UserOut])  # fmt: skip
    statements.clear()
    for _ in range(3):
        assert await answer(app) == (200, [ADA, BOB])
    assert len(statements) == 3
    assert len(set(statements)) == 1


@KINDS
async def test_one_row(db: Database, models: Models, statements: list[str], kind: str) -> None:
    """A response model that is no list takes the first row; without one, the answer is 404."""
    app = make_app(db)
    ids = iter([2, 1, 3])
    add(app, kind, "/", lambda: models.User.select().where(models.User.id == next(ids)),
        response_model=UserOut)  # fmt: skip
    statements.clear()
    assert await answer(app) == (200, BOB)
    assert await answer(app) == (200, ADA)
    assert await answer(app) == (404, {"detail": "User not found"})
    assert len(statements) == 3


@KINDS
async def test_one_row_or_none(db: Database, models: Models, kind: str) -> None:
    """Where the response model is optional, no row is null."""
    app = make_app(db)
    add(app, kind, "/", lambda: models.User.select().where(models.User.id == 3),
        response_model=UserOut | None)  # fmt: skip
    add(app, kind, "/none", lambda: None, response_model=UserOut | None)
    assert await answer(app) == (200, None)
    assert await answer(app, "/none") == (200, None)


class AdaOut(BaseModel):
    id: int
    name: Literal["Ada"]
    items: list[ItemOut]


class BobOut(BaseModel):
    id: int
    name: Literal["Bob"]
    items: list[ItemOut]


class Endless(RootModel["UserOut | Endless"]): ...


#: Types that one row becomes, and what they are where no row is an answer.
ONES: dict[str, tuple[Any, Any]] = {
    "union": (AdaOut | BobOut, AdaOut | BobOut | None),
    "discriminated": (
        Annotated[AdaOut | BobOut, Field(discriminator="name")],
        Annotated[AdaOut | BobOut | None, Field(discriminator="name")],
    ),
    "tagged": (
        Annotated[AdaOut, Tag("a")] | Annotated[BobOut, Tag("b")],
        Annotated[AdaOut, Tag("a")] | Annotated[BobOut, Tag("b")] | None,
    ),
    "root": (RootModel[UserOut], RootModel[UserOut] | None),
    "root of a union": (RootModel[AdaOut | BobOut], RootModel[AdaOut | BobOut | None]),
    "union of roots": (
        RootModel[AdaOut] | RootModel[BobOut],
        RootModel[AdaOut] | RootModel[BobOut] | None,
    ),
}


@KINDS
@pytest.mark.parametrize("name", ONES)
async def test_one_row_of_a_union_or_a_root_model(
    db: Database, models: Models, statements: list[str], kind: str, name: str
) -> None:
    """A union of models and a root model of one take the first row, as a model does."""
    app = make_app(db)
    User = models.User
    type_, optional = ONES[name]
    ids = iter([2, 1, 3])
    add(app, kind, "/", lambda: User.select().where(User.id >= next(ids)).order_by(User.id),
        response_model=type_)  # fmt: skip
    add(app, kind, "/optional", lambda: User.select().where(User.id == 3), response_model=optional)
    add(app, kind, "/none", lambda: None, response_model=type_)
    assert await answer(app) == (200, BOB)
    statements.clear()
    assert await answer(app) == (200, ADA)
    assert "LIMIT" in statements[0]
    assert await answer(app) == (404, {"detail": "User not found"})
    assert await answer(app, "/optional") == (200, None)
    assert await answer(app, "/none") == (404, {"detail": "Not found"})


@KINDS
async def test_a_union_with_something_else_than_models(
    db: Database, models: Models, kind: str
) -> None:
    """It gets all rows; a root model that contains itself is such a type, too."""
    app = make_app(db)
    User = models.User
    add(app, kind, "/", lambda: User.select().order_by(User.id),
        response_model=UserOut | list[UserOut])  # fmt: skip
    add(app, kind, "/root", lambda: User.select().order_by(User.id),
        response_model=RootModel[list[UserOut]])  # fmt: skip
    assert await answer(app) == (200, [ADA, BOB])
    assert await answer(app, "/root") == (200, [ADA, BOB])
    assert not Plans(Endless).response.one


class Lazily(BaseModel):
    id: int
    name: str
    items: Iterable[ItemOut]


class CheckedLazily(Checked):
    @field_validator("items", mode="before")
    @classmethod
    def reversed_twice(cls, items: Any) -> Any:
        return list(items)[::-1][::-1]


@KINDS
@pytest.mark.parametrize("item", [UserOut, Lazily, CheckedLazily])
@pytest.mark.parametrize("returned", ["query", "list"])
@pytest.mark.parametrize("way", ["route", "options", "respond"])
async def test_an_iterable(
    db: Database, models: Models, kind: str, way: str, returned: str, item: Any
) -> None:
    """Pydantic validates an `Iterable` as it is sent: it's read before, as a list is."""
    app = make_app(db)
    users = [await models.User.aget_by_id(id_) for id_ in (1, 2)]

    def value() -> Any:
        return models.User.select().order_by(models.User.id) if returned == "query" else users

    if way == "respond":
        add(app, kind, "/", lambda: respond(value(), Iterable[item]), response_model=None)
    else:
        options = {"response_model_exclude_none": True} if way == "options" else {}
        add(app, kind, "/", value, response_model=Iterable[item], **options)
    add(app, kind, "/none", lambda: None, response_model=Iterable[item] | None)
    expected = [ADA, BOB]
    if item is CheckedLazily:
        expected = [{**each, "name": str(each["name"]).upper()} for each in expected]
    assert await answer(app) == (200, expected)
    assert await answer(app, "/none") == (200, None)


async def test_an_iterable_that_does_not_fit(db: Database, models: Models) -> None:
    """It's an error of the program, as a list that doesn't fit is."""
    app = make_app(db)
    app.get("/", response_model=Iterable[AdaOut])(lambda: list(models.User.select()))
    async with client(app, raises=True) as http:
        with pytest.raises(ResponseValidationError, match="Input should be 'Ada'"):
            await http.get("/")
    assert db.pool_stats.in_use == 0


@KINDS
async def test_none(db: Database, models: Models, kind: str) -> None:
    """`None` is 404 where the response model is a model that isn't optional."""
    app = make_app(db)
    add(app, kind, "/", lambda: None, response_model=UserOut)
    add(app, kind, "/plain", lambda: None)
    assert await answer(app) == (404, {"detail": "Not found"})
    assert await answer(app, "/plain") == (200, None)


@KINDS
async def test_an_instance(db: Database, models: Models, kind: str) -> None:
    """A returned instance gets the relations that the response model has, and isn't changed."""
    ada = await models.User.aget_by_id(1)
    app = make_app(db)
    add(app, kind, "/", lambda: ada, response_model=UserOut)
    add(app, kind, "/list", lambda: [ada], response_model=list[UserOut])
    assert await answer(app) == (200, ADA)
    assert await answer(app, "/list") == (200, [ADA])
    assert not isinstance(ada.__dict__.get("items"), list)


@KINDS
async def test_what_the_endpoint_has_loaded(
    db: Database, models: Models, statements: list[str], kind: str
) -> None:
    """Relations that are loaded already are not read again."""
    query = models.User.select().where(models.User.id == 1).with_related(models.User.items)
    users = await db.list(query)
    app = make_app(db)
    add(app, kind, "/", lambda: users, response_model=list[UserOut])
    statements.clear()
    assert (await answer(app))[0] == 200
    assert [sql for sql in statements if "SELECT" in sql and "FROM" in sql] == []


@KINDS
async def test_validators_run(db: Database, models: Models, kind: str) -> None:
    """A schema with validators is validated: the database doesn't build its JSON."""
    app = make_app(db)
    add(app, kind, "/", lambda: models.User.select().where(models.User.id == 1),
        response_model=Checked)  # fmt: skip
    assert await answer(app) == (200, {**ADA, "name": "ADA"})


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"id": 1, "fullName": "Ada", "note": None}),
    ({"response_model_by_alias": False}, {"id": 1, "name": "Ada", "note": None}),
    ({"response_model_exclude_none": True}, {"id": 1, "fullName": "Ada"}),
    ({"response_model_exclude": {"id"}}, {"fullName": "Ada", "note": None}),
    ({"response_model_include": {"id"}}, {"id": 1}),
    ({"response_model_exclude_unset": True}, {"id": 1, "fullName": "Ada", "note": None}),
]


@KINDS
@pytest.mark.parametrize(("options", "expected"), OPTIONS)
async def test_the_options_of_a_route(
    db: Database, models: Models, kind: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    """`response_model_include`, `…_exclude_none`, `…_by_alias` and so on work as in FastAPI."""
    app = make_app(db)
    add(app, kind, "/", lambda: models.User.select().where(models.User.id == 1),
        response_model=Aliased, **options)  # fmt: skip
    assert await answer(app) == (200, expected)
    # FastAPI itself, with an instance:
    plain = FastAPI()
    ada = await models.User.aget_by_id(1)
    add(plain, "def", "/", lambda: ada, response_model=Aliased, **options)
    assert await answer(plain) == (200, expected)


@KINDS
async def test_status_headers_dependencies_and_background_tasks(
    db: Database, models: Models, kind: str
) -> None:
    """A status code, headers set on `Response`, dependencies and background tasks are kept."""
    app = make_app(db)
    done: list[str] = []

    def dependency(response: Response) -> str:
        response.headers["x-seen"] = "yes"
        return "Ada"

    Name = Annotated[str, Depends(dependency)]

    def plain(name: Name, response: Response, tasks: BackgroundTasks) -> Any:
        response.set_cookie("a", "b")
        tasks.add_task(done.append, name)
        return models.User.select().where(models.User.name == name)

    async def coroutine(name: Name, response: Response, tasks: BackgroundTasks) -> Any:
        return plain(name, response, tasks)

    endpoint: Any = plain if kind == "def" else coroutine
    app.get("/", response_model=UserOut, status_code=203)(endpoint)
    async with client(app) as http:
        response = await http.get("/")
    assert (response.status_code, response.json()) == (203, ADA)
    assert response.headers["x-seen"] == "yes"
    assert response.headers["set-cookie"].startswith("a=b")
    assert response.headers["content-type"] == "application/json"
    assert done == ["Ada"]


@KINDS
async def test_a_transaction(db: Database, models: Models, kind: str) -> None:
    """A query that is returned from a transaction sees what the transaction wrote."""
    app = make_app(db)

    def create() -> Any:
        models.User.create(name="Cleo")
        return models.User.select().where(models.User.name == "Cleo")

    @app.post("/", response_model=UserOut)
    async def endpoint(db: InTransaction) -> Any:
        return await db.run(create)

    async with client(app) as http:
        response = await http.post("/")
    assert (response.status_code, response.json()) == (200, {"id": 3, "name": "Cleo", "items": []})


@KINDS
async def test_several_databases(db: Database, models: Models, tmp_path: Path, kind: str) -> None:
    """What is returned is read from its own database, whichever the application has first."""
    async with connected(f"sqlite:///{tmp_path / 'other.db'}") as other:
        others = Models(other)
        await other.acreate_tables([others.User, others.Item])
        bob = await others.User.acreate(name="Bob", id=2)
        app = make_app(db)
        Peewee(other).init_app(app)
        one = prepared(others.User.select().where(others.User.id == param("id")), UserOut)
        add(app, kind, "/first", lambda: models.User.select().where(models.User.id == 2),
            response_model=UserOut)  # fmt: skip
        for path, returns in [
            ("/query", lambda: others.User.select()),
            ("/prepared", lambda: one(id=2)),
            ("/instance", lambda: bob),
            ("/respond", lambda: respond(others.User.select(), UserOut)),
        ]:
            add(app, kind, path, returns, response_model=None if path == "/respond" else UserOut)
            assert await answer(app, path) == (200, BOB)
        assert await answer(app, "/first") == (200, BOB)


async def test_the_document_says_what_the_response_model_says(db: Database, models: Models) -> None:
    """OpenAPI is as ever: the response model, whatever the endpoint returns."""
    app, plain = make_app(db), make_app(db, APIRoute)
    for each in (app, plain):
        add(each, "def", "/", lambda: None, response_model=list[UserOut])
    assert app.openapi() == plain.openapi()


@KINDS
async def test_no_response_model(db: Database, models: Models, kind: str) -> None:
    """A query returned without a response model is refused: nothing says what to read."""
    app = make_app(db)
    add(app, kind, "/", lambda: models.User.select())
    with pytest.raises(TypeError, match="no response model"):
        async with client(app, raises=True) as http:
            await http.get("/")


@KINDS
async def test_no_response_model_for_rows(db: Database, models: Models, kind: str) -> None:
    """So is what a response model would have to take apart: a row, with all its columns, and a
    query inside of something else."""
    app = make_app(db)
    returned = {
        "/row": lambda: models.User(name="Ada"),
        "/rows": lambda: {"rows": [models.User(name="Ada")]},
        "/query": lambda: {"total": 1, "users": models.User.select()},
        "/fine": lambda: {"row": models.User(name="Ada").__data__},
    }
    for path, value in returned.items():
        add(app, kind, path, value, response_model=None)
    async with client(app, raises=True) as http:
        for path in ("/row", "/rows", "/query"):
            with pytest.raises(TypeError, match="no response model"):
                await http.get(path)
        assert (await http.get("/fine")).json()["row"]["name"] == "Ada"


@KINDS
async def test_a_query_that_writes(db: Database, models: Models, kind: str) -> None:
    """An INSERT, UPDATE or DELETE that wasn't executed is refused, and not executed."""
    app = make_app(db)
    add(app, kind, "/", lambda: models.User.delete(), response_model=list[UserOut])
    with pytest.raises(TypeError, match="has not been executed"):
        async with client(app, raises=True) as http:
            await http.get("/")
    assert await db.count(models.User.select()) == 2


async def test_respond_with_unions_in_two_orders(database_url: str) -> None:
    """They are equal to Python, but Pydantic takes the first that fits: each endpoint its own."""

    class Public(BaseModel):
        id: int
        name: str

    class Private(BaseModel):
        id: int
        secret: str

    async with connected(database_url) as db:

        class Note(db.Model):
            name = peewee.CharField()
            secret = peewee.CharField()

        await db.acreate_tables([Note])
        await Note.acreate(name="a", secret="b")
        app = make_app(db)
        app.get("/private", response_model=None)(lambda: respond(Note.select(), Private | Public))
        app.get("/public", response_model=None)(lambda: respond(Note.select(), Public | Private))
        async with client(app) as http:
            for _ in range(2):
                assert (await http.get("/private")).json() == {"id": 1, "secret": "b"}
                assert (await http.get("/public")).json() == {"id": 1, "name": "a"}


@KINDS
@pytest.mark.parametrize("route_class", [PeeweeRoute, APIRoute])
async def test_respond(
    db: Database, models: Models, kind: str, route_class: type[APIRoute]
) -> None:
    """`respond(query, type)` does the same on any route, for a type that the endpoint chooses."""
    app = make_app(db, route_class)
    User = models.User
    ada = await User.aget_by_id(1)
    for path, returned, type_ in [
        ("/list", lambda: User.select().order_by(User.id), list[UserOut]),
        ("/one", lambda: User.select().where(User.id == 1), UserOut),
        ("/missing", lambda: User.select().where(User.id == 9), UserOut),
        ("/optional", lambda: User.select().where(User.id == 9), UserOut | None),
        ("/checked", lambda: User.select().where(User.id == 1), Checked),
        ("/instance", lambda: ada, UserOut),
        ("/instances", lambda: [ada], list[UserOut]),
        ("/dictionary", lambda: {**ADA, "more": 1}, UserOut),
    ]:
        add(app, kind, path,
            lambda returned=returned, type_=type_: respond(
                returned(), type_, status_code=201, headers={"x-a": "b"}
            ),
            response_model=None)  # fmt: skip
    assert await answer(app, "/list") == (201, [ADA, BOB])
    assert await answer(app, "/one") == (201, ADA)
    assert await answer(app, "/missing") == (404, {"detail": "User not found"})
    assert await answer(app, "/optional") == (201, None)
    assert await answer(app, "/checked") == (201, {**ADA, "name": "ADA"})
    assert await answer(app, "/instance") == (201, ADA)
    assert await answer(app, "/instances") == (201, [ADA])
    assert await answer(app, "/dictionary") == (201, ADA)
    async with client(app) as http:
        response = await http.get("/one")
    assert response.headers["x-a"] == "b"
    assert response.headers["content-length"] == str(len(response.content))
    assert db.pool_stats.in_use == 0


@KINDS
async def test_prepared(db: Database, models: Models, statements: list[str], kind: str) -> None:
    """A prepared query is compiled once and called with values."""
    User = models.User
    query = User.select().where(User.id == param("id")).limit(param("limit"))
    one, several = prepared(query, UserOut), prepared(query, list[UserOut])
    app = make_app(db)
    ids = iter([1, 2, 9])
    add(app, kind, "/", lambda: one(id=next(ids), limit=1), response_model=UserOut)
    add(app, kind, "/list", lambda: several(id="2", limit=5), response_model=list[UserOut])
    add(app, kind, "/short", lambda: several(id=1, limit=5), response_model=list[UserOut],
        response_model_exclude={0: {"items"}})  # fmt: skip
    statements.clear()
    assert await answer(app) == (200, ADA)
    assert await answer(app) == (200, BOB)
    assert await answer(app) == (404, {"detail": "User not found"})
    assert await answer(app, "/list") == (200, [BOB])
    assert len(statements) == 4
    assert await answer(app, "/short") == (200, [{"id": 1, "name": "Ada"}])


async def test_prepared_where_the_database_can_not_build_the_json(
    db: Database, models: Models
) -> None:
    """A prepared query whose schema has validators gives what any other query gives."""
    User = models.User
    one = prepared(User.select().where(User.id == param("id")), Checked)
    app = make_app(db)
    add(app, "def", "/", lambda: one(id=1), response_model=Checked)
    for _ in range(2):
        assert await answer(app) == (200, {**ADA, "name": "ADA"})


@KINDS
async def test_the_response_model_has_the_last_word(
    db: Database, models: Models, kind: str
) -> None:
    """What was prepared for another type is answered as the route's response model says."""
    User = models.User
    one = prepared(User.select().where(User.id == param("id")), UserOut)
    app = make_app(db)
    add(app, kind, "/", lambda: one(id=1), response_model=ItemLess)
    add(app, kind, "/list", lambda: one(id=1), response_model=list[ItemLess])
    add(app, kind, "/none", lambda: one(id=1), response_model=None)
    add(app, kind, "/respond", lambda: respond(one(id=1), ItemLess), response_model=None)
    assert await answer(app) == (200, {"id": 1})
    assert await answer(app, "/list") == (200, [{"id": 1}])
    assert await answer(app, "/respond") == (200, {"id": 1})
    with pytest.raises(TypeError, match="no response model"):
        async with client(app, raises=True) as http:
            await http.get("/none")


async def test_what_is_compiled_keeps_no_values(db: Database, models: Models) -> None:
    """The values of the query that a statement was compiled for are gone with the query."""
    app = make_app(db)
    owners = [await models.User.aget_by_id(1)]
    kept = weakref.ref(owners[0])
    add(app, "def", "/", lambda: models.Item.select().where(models.Item.owner == owners[0]),
        response_model=list[ItemOut])  # fmt: skip
    assert await answer(app) == (200, ADA["items"])
    owners[0] = await models.User.aget_by_id(2)
    with anyio.fail_after(5):  # the thread that has answered may not be back at rest yet
        while kept() is not None:
            gc.collect()
            await anyio.sleep(0.001)
    assert await answer(app) == (200, [])


async def test_prepared_with_wrong_values(db: Database, models: Models) -> None:
    """Missing and unknown names of values are an error at the call, which names them."""
    one = prepared(models.User.select().where(models.User.id == param("id")), UserOut)
    with pytest.raises(TypeError, match=r"takes id; got: user_id\."):
        one(user_id=1)
    with pytest.raises(TypeError, match="got: none"):
        one()
    with pytest.raises(TypeError, match="can't be prepared"):
        prepared(models.User.delete(), UserOut)


async def test_explain(db: Database, models: Models) -> None:
    """`explain` says which plan, why, and the SQL."""
    query = models.User.select().where(models.User.name == "Ada")
    found = await db.run(explain, query, list[UserOut])
    assert (found.plan, found.reason, found.warnings) == ("json", "", [])
    assert "Ada" in found.params
    assert str(found).startswith("plan: json\nSELECT ")
    found = await db.run(explain, query, list[Checked])
    assert (found.plan, found.reason) == ("rows", "name has a validator, or a type that is one")
    assert str(found).startswith("plan: rows, since name has a validator")
    found = await db.run(explain, query.dicts(), list[UserOut])
    assert found.plan == "instances"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ""),
        ({"response_model_by_alias": False}, ""),
        ({"response_model_exclude_none": False}, ""),
        ({"response_model_exclude_none": True}, "response_model_exclude_none"),
        (
            {"response_model_include": {"id"}, "response_model_exclude_unset": True},
            "response_model_include, response_model_exclude_unset",
        ),
        ({"response_model_exclude_defaults": True, "response_class": JSONResponse},
         "response_class=JSONResponse"),
    ],
)  # fmt: skip
async def test_explain_with_the_options_of_a_route(
    db: Database, models: Models, statements: list[str], options: Any, reason: str
) -> None:
    """With a route's options, `explain` says what that route does, and which of them is why."""
    query = models.User.select().order_by(models.User.id)
    app = make_app(db)
    add(app, "def", "/", lambda: query, response_model=list[BareUserOut], **options)
    statements.clear()
    assert (await answer(app))[0] == 200
    found = await db.run(functools.partial(explain, query, list[BareUserOut], **options))
    assert statements[:1] == [found.sql]
    assert found.plan == ("rows" if reason else "json")
    assert found.reason == (f"the route has {reason}" if reason else "")
    with pytest.raises(TypeError, match="got: status_code"):
        await db.run(functools.partial(explain, query, BareUserOut, status_code=201))


async def test_explain_warns_of_a_missing_index(database_url: str) -> None:
    """A back-reference whose foreign key has no index is read with a scan for each parent."""
    async with connected(database_url) as db:

        class User(db.Model):
            name = peewee.CharField()

        class Item(db.Model):
            title = peewee.CharField()
            owner = peewee.ForeignKeyField(User, backref="items", index=False, constraints=[])

        await db.acreate_tables([User, Item])
        if isinstance(db, peewee.MySQLDatabase):
            pytest.skip("MySQL and MariaDB give every foreign key an index")
        found = await db.run(explain, User.select(), list[UserOut])
    assert found.warnings == [
        "items: there is no index on item.owner_id, so the whole table is read for each row of "
        "user."
    ]


class Noted(BaseModel):
    id: int
    note: str


async def test_explain_warns_of_nulls_that_the_type_does_not_allow(
    db: Database, models: Models
) -> None:
    """The database builds JSON without validating it: a NULL is null, optional or not."""
    app = make_app(db)
    query = models.User.select().where(models.User.id == 1)
    add(app, "def", "/", lambda: query, response_model=Noted)
    assert await answer(app) == (200, {"id": 1, "note": None})
    found = await db.run(explain, query, Noted)
    assert found.warnings == [
        "note: user.note may be NULL, which is sent as null, though Noted.note isn't optional."
    ]
    assert (await db.run(explain, query, Aliased)).warnings == []


class Page(BaseModel):
    total: int
    users: list[UserOut]


async def test_instances_inside_of_something_else(db: Database, models: Models) -> None:
    """Of instances in a dictionary the relations aren't loaded: an `async def` endpoint says so."""
    app = make_app(db)

    @app.get("/", response_model=Page)
    async def lazy() -> Any:
        return {"total": 2, "users": await db.list(models.User.select())}

    @app.get("/loaded", response_model=Page)
    async def loaded() -> Any:
        query = models.User.select().order_by(models.User.id).with_related(models.User.items)
        return {"total": 2, "users": await db.list(query)}

    @app.get("/query", response_model=Page)
    async def query() -> Any:
        return {"total": 2, "users": models.User.select()}

    async with client(app, raises=True) as http:
        with pytest.raises(LazyLoad, match=r"^User\.items was read .* of \S+lazy \(/\)"):
            await http.get("/")
        with pytest.raises(
            LazyLoad, match=r"^A query of User was read .* `await db.list\(query\)`"
        ):
            await http.get("/query")
    assert await answer(app, "/loaded") == (200, {"total": 2, "users": [ADA, BOB]})


class Loud(BaseModel):
    """Reads a property that no plan can know of."""

    id: int
    first_title: str


class Owned(BaseModel):
    owner_name: str


@pytest.mark.parametrize("forbid", [True, False, None])
async def test_lazy_loads_can_be_forbidden(
    db: Database, models: Models, forbid: bool | None
) -> None:
    """A relation that is read while a response is validated raises, if that is forbidden."""
    models.User.first_title = property(lambda user: next(item.title for item in user.items))
    models.Item.owner_name = property(lambda item: item.owner.name)
    app = FastAPI(debug=forbid is None)
    Peewee(db, forbid_lazy_loads=forbid).init_app(app)

    @app.get("/users", response_model=list[Loud])
    def users() -> Any:
        return models.User.select().where(models.User.id == 1)

    @app.get("/items", response_model=list[Owned])
    def items() -> Any:
        return models.Item.select()

    if forbid is False:
        assert await answer(app, "/users") == (200, [{"id": 1, "first_title": "a"}])
        assert await answer(app, "/items") == (200, [{"owner_name": "Ada"}] * 2)
        return
    for path, relation in [("/users", r"User\.items"), ("/items", r"Item\.owner")]:
        with pytest.raises(LazyLoad, match=rf"^{relation} was read .* of \S+{path[1:]} \({path}\)"):
            async with client(app, raises=True) as http:
                await http.get(path)


async def test_a_validator_that_starts_a_task(db: Database, models: Models) -> None:
    """The task may ask the database, though the validator may not."""
    tasks: list[asyncio.Task[int]] = []

    class Starting(BaseModel):
        id: int

        @field_validator("id")
        @classmethod
        def start(cls, id: int) -> int:
            tasks.append(asyncio.create_task(db.run(models.User.select().count)))
            return id

    app = FastAPI()
    Peewee(db, forbid_lazy_loads=True).init_app(app)

    @app.get("/", response_model=Starting)
    async def endpoint() -> Any:
        return {"id": 1}

    assert await answer(app) == (200, {"id": 1})
    assert await asyncio.gather(*tasks) == [2]
