"""Why a query isn't answered by the database alone; it is answered all the same."""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from types import SimpleNamespace
from typing import Annotated, Any

import peewee
import pytest
from fastapi.exceptions import ResponseValidationError
from peewee import fn
from playhouse.sqlite_ext import JSONField
from pydantic import AliasPath, BaseModel, ConfigDict, Field, create_model, field_validator
from pydantic_core import core_schema
from typing_extensions import TypeAliasType

from fastapi_peewee import Database, explain, respond
from fastapi_peewee.loading import Plans
from fastapi_peewee.plans import Compiled, InstancePlan
from fastapi_peewee.reads import NotBuilt, encoded
from fastapi_peewee.response_types import Response
from tests.apps import client, connected, make_app
from tests.fidelity import connection
from tests.shop import BareUserOut, ItemOut, UserOut
from tests.test_loading import Counted, answer, read, staff


class Upper(BaseModel):
    name: str


class Nothing(BaseModel):
    pass


class Whole(BaseModel):
    """What Pydantic takes as it is."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.model_schema(cls, core_schema.any_schema())


class Extra(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]

    name: str


class Path(BaseModel):
    first: str = Field(validation_alias=AliasPath("name", 0))


class NowAndThen(BaseModel):
    name: str = Field(exclude_if=lambda name: name == "Ada")


class Hidden(BaseModel):
    name: str = Field(exclude=True)


class LongName(BaseModel):
    name: str = Field(max_length=255)


class ShortName(BaseModel):
    name: str = Field(max_length=3)


class CountedAsFloat(BaseModel):
    name: str
    total: float


class OwnerOut(BaseModel):
    title: str
    owner: BareUserOut


class Unordered(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    items: tuple[ItemOut, ...]


class Lazily(BaseModel):
    items: Iterable[ItemOut]


class Few(BaseModel):
    items: Annotated[list[ItemOut], Field(max_length=3)]


class MaybeItems(BaseModel):
    items: list[ItemOut | None]


class Numbers(BaseModel):
    items: list[Any]


class Strict(BaseModel):
    name: str

    @field_validator("name")
    @classmethod
    def short(cls, name: str) -> str:
        if len(name) > 2:
            raise ValueError("too long")
        return name


@pytest.fixture
def db(sqlite_url: str) -> Iterator[Any]:
    with connection(sqlite_url) as db:
        yield db


@pytest.fixture
def models(db: Any) -> SimpleNamespace:
    models = made(db)
    db.create_tables([models.User, models.Item, models.Day])
    fill(models)
    return models


def made(db: Any) -> SimpleNamespace:
    User, Item = staff(db)

    class Day(db.Model):
        day = peewee.DateField(formats=["%d.%m.%Y"])

    return SimpleNamespace(User=User, Item=Item, Day=Day)


def fill(models: SimpleNamespace) -> None:
    ada = models.User.create(name="Ada")
    models.User.create(name="Bob", boss=ada)
    for title in "ab":
        models.Item.create(title=title, owner=ada)
    models.Day.insert(day="2026-01-02").execute()


class DayOut(BaseModel):
    day: date


def three_tables(models: SimpleNamespace) -> Any:
    Boss = models.User.alias("boss")
    query = models.Item.select(models.Item, models.User, Boss).join(models.User)
    return query.join(Boss, peewee.JOIN.LEFT_OUTER, on=(models.User.boss == Boss.id), attr="boss")


#: The query, the response type, the plan, and why.
CASES: dict[str, tuple[Callable[[Any], Any], Any, str, str]] = {
    "expression without a name": (
        lambda m: m.User.select(m.User, fn.UPPER(m.User.name)),
        list[BareUserOut],
        "instances",
        "an expression without a name of its own: None",
    ),
    "no fields": (lambda m: m.User.select(), list[Nothing], "instances", "has no fields"),
    "distinct expression": (
        lambda m: m.User.select(m.User.name, fn.UPPER(m.User.name)).distinct(),
        list[Upper],
        "instances",
        "columns without names",
    ),
    "distinct and named": (
        lambda m: m.User.select(m.User.name, fn.LENGTH(m.User.name).alias("total")).distinct(),
        list[Counted],
        "rows",
        "total is an expression",
    ),
    "distinct without a column": (
        lambda m: m.User.select(m.User.name, fn.LENGTH(m.User.name).alias("size")).distinct(),
        list[Counted],
        "instances",
        "'total' isn't selected, and more can't be added",
    ),
    "windows": (
        lambda m: m.User.select(m.User.id, m.User.name).window(
            peewee.Window(order_by=[m.User.id]).alias("w")
        ),
        list[BareUserOut],
        "instances",
        "LATERAL or named windows",
    ),
    "a join under a column's name": (
        lambda m: m.Item.select(m.Item, m.User).join(m.User, attr="title"),
        list[ItemOut],
        "instances",
        "a join stores another row as 'title'",
    ),
    "something else by the name": (
        lambda m: m.User.select(m.User.id, fn.UPPER(m.User.name).alias("name")),
        list[BareUserOut],
        "instances",
        "something else by the name 'name'",
    ),
    "a join under a name of its own": (
        lambda m: m.Item.select(m.Item, m.User).join(m.User, attr="maker"),
        list[ItemOut],
        "json",
        "",
    ),
    "a join of three": (three_tables, list[OwnerOut], "json", ""),
    "a join that was taken back": (
        lambda m: (
            m.Item.select(m.Item, m.User)
            .join(m.User)
            .from_(m.Item, m.User)
            .where(m.Item.owner == m.User.id)
        ),
        list[OwnerOut],
        "instances",
        "a join says which row is stored as 'owner'",
    ),
    "no model": (lambda m: m.User.select(), list[Any], "instances", "neither a Pydantic model"),
    "items that may be None": (
        lambda m: m.User.select(),
        list[BareUserOut | None],
        "instances",
        "neither a Pydantic model",
    ),
    "raw": (
        lambda m: m.User.raw("SELECT id, name FROM user ORDER BY id"),
        list[BareUserOut],
        "instances",
        "a ModelRaw isn't built of parts",
    ),
    "as a whole": (lambda m: m.User.select(), list[Whole], "instances", "validated as a whole"),
    "nothing that is sent": (lambda m: m.User.select(), list[Hidden], "rows", "has no fields"),
    "as long as the column": (lambda m: m.User.select(), list[LongName], "json", ""),
    "shorter than the column": (
        lambda m: m.User.select(),
        list[ShortName],
        "rows",
        "name is constrained: max_length",
    ),
    "a count that is no integer": (
        lambda m: m.User.select(m.User, fn.COUNT(m.User.id).alias("total")).group_by(m.User.id),
        list[CountedAsFloat],
        "rows",
        "total is an expression that isn't read as int",
    ),
    "extra fields": (lambda m: m.User.select(), list[Extra], "rows", "takes extra fields"),
    "a path": (lambda m: m.User.select(), list[Path], "instances", "read by a path"),
    "excluded now and then": (
        lambda m: m.User.select(),
        list[NowAndThen],
        "rows",
        "excluded now and then",
    ),
    "no list": (lambda m: m.User.select(), list[Unordered], "instances", "isn't a plain list"),
    "an iterable": (lambda m: m.User.select(), Iterable[UserOut], "json", ""),
    "an iterable inside": (lambda m: m.User.select(), list[Lazily], "json", ""),
    "a list of a length": (lambda m: m.User.select(), list[Few], "rows", "limited in length"),
    "a list of None": (
        lambda m: m.User.select(),
        list[MaybeItems],
        "instances",
        "a list whose items may be None",
    ),
    "a list of anything": (
        lambda m: m.User.select(),
        list[Numbers],
        "instances",
        "isn't a Pydantic model",
    ),
    "dates in another form": (
        lambda m: m.Day.select(),
        list[DayOut],
        "rows",
        "day has date formats of its own",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_is_said(db: Any, models: SimpleNamespace, name: str) -> None:
    """`explain()` has the plan and, in words, why it isn't a faster one."""
    query, type_, kind, words = CASES[name]
    explained = explain(query(models), type_)
    assert explained.plan == kind
    assert words in explained.reason


#: Peewee's instances aren't what these types have: that is their authors' business.
NOT_ANSWERED = {"a join under a column's name", "distinct without a column", "a path"}
NOT_ANSWERED |= {"no model", "as a whole", "no list", "a list of anything", "a list of None"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_ANSWERED])
def test_the_answer_is_the_same(db: Any, models: SimpleNamespace, name: str) -> None:
    """Whichever plan is chosen, it answers as Pydantic does with Peewee's instances."""
    query, type_, _, _ = CASES[name]
    plans = Plans(type_)
    instances = InstancePlan(plans.response, query(models), "asked for")
    assert answer(plans.plan(query(models)), plans, db) == answer(instances, plans, db)


def test_rows_of_no_model_are_what_peewee_has(db: Any, models: SimpleNamespace) -> None:
    """Where a type says nothing of a model, the instances themselves are the answer."""
    assert Plans(list[Any]).plan(models.User.select()).load(db) == list(models.User.select())


def test_a_database_that_makes_sql_of_its_own_compiles_nothing(
    db: Any, models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query is planned anew, with the same answer."""
    plans, query = Plans(list[UserOut]), models.User.select()
    before = read(plans.load(query), plans)
    assert plans._compiled
    plans._compiled.clear()
    monkeypatch.setattr(db, "context_class", type("Own", (peewee.Context,), {}))
    assert read(plans.load(query), plans) == before
    assert not plans._compiled


def test_a_type_by_another_name(db: Any, models: SimpleNamespace) -> None:
    """`type Users = list[UserOut]` is a list of users, also row by row."""
    Users = TypeAliasType("Users", list[BareUserOut])
    rows = Response(Users).dump(list(models.User.select()))
    assert [json.loads(row)["name"] for row in rows] == ["Ada", "Bob"]


def test_what_has_no_type_in_a_stream(db: Any) -> None:
    """Pydantic writes it as the configuration of the outermost type says, which isn't the model's
    for a list; so in a stream, too."""

    class Page(db.Model):
        document = JSONField()

    class PageOut(BaseModel):
        model_config = ConfigDict(ser_json_inf_nan="strings")

        document: Any

    db.create_tables([Page])
    db.execute_sql("""INSERT INTO page (document) VALUES ('{"a": NaN}')""")
    plans = Plans(list[PageOut])
    assert read(plans.load(Page.select()), plans) == [{"document": {"a": None}}]
    chunks = plans.plan(Page.select()).stream(db, 10)
    assert [text for chunk in chunks for text in chunk] == [b'{"document":{"a":null}}']


def test_a_type_without_fields_has_no_columns(db: Any, models: SimpleNamespace) -> None:
    """It can't be sent as comma-separated values."""
    with pytest.raises(TypeError, match="Whole has no fields, so there are no columns"):
        _ = Response(list[Whole]).names


async def test_json_that_turns_out_not_to_be_built_is_read_in_a_thread(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the event loop it is no answer, and no error."""
    async with connected(sqlite_url, inline_reads=30) as db:
        models = made(db)
        await db.acreate_tables([models.User, models.Item, models.Day])
        await db.run(fill, models)
        plans, query = Plans(list[UserOut]), models.User.select()
        await db.run(plans.load, query)
        [compiled] = plans._compiled.values()
        assert isinstance(compiled, Compiled)
        assert await plans.aload(query) is not None

        async def refuse(sql: str, params: Any) -> Any:
            raise NotBuilt

        monkeypatch.setattr(db, "aread_texts", refuse)
        assert await plans.aload(query) is None


def test_a_list_longer_than_sqlite_can_hold_is_read_row_by_row(
    db: Any, models: SimpleNamespace
) -> None:
    """A text of SQLite's ends at 1 GB: the rows of a longer list are read instead."""
    conn: sqlite3.Connection = db.connection()
    conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1000)
    for _ in range(100):
        models.User.create(name="Eve")
    plans = Plans(list[BareUserOut])
    query = models.User.select().order_by(models.User.id)
    assert plans.plan(query).kind == "json"
    assert len(read(plans.load(query), plans)) == 102


@pytest.mark.parametrize("links", ["llloool", "lllllll", "llllllllll"])
def test_a_list_too_deep_to_be_one_text_is_read_row_by_row(db: Any, links: str) -> None:
    """A parser has an end. Where one level more is too much for SQLite's (3.40 has room for the
    first of these row by row, and for no more), the list is made here.

    The links from one model to the next are lists or foreign keys to one.
    """
    models: list[Any] = [None] * (len(links) + 1)

    def made(depth: int) -> Any:
        if models[depth] is None:
            fields = {}
            if links[depth:].startswith("o"):
                fields["below"] = peewee.ForeignKeyField(made(depth + 1), null=True)
            if depth and links[depth - 1] == "l":
                fields["up"] = peewee.ForeignKeyField(made(depth - 1), backref="below")
            models[depth] = type(f"Level{depth}", (db.Model,), fields)
        return models[depth]

    db.create_tables([made(depth) for depth in range(len(models))])
    db.execute_sql("PRAGMA foreign_keys = 0")  # some refer to rows that are made later
    schema: Any = None
    expected: Any = None
    for depth in reversed(range(len(models))):
        values = {}
        fields: dict[str, Any] = {"id": (int, ...)}
        if schema is not None and links[depth] == "o":
            values["below"], fields["below"] = 1, (schema, ...)
        elif schema is not None:
            fields["below"], expected = (list[schema], ...), [expected]
        if depth and links[depth - 1] == "l":
            values["up"] = 1
        models[depth].create(**values)
        expected = {"id": 1} if expected is None else {"id": 1, "below": expected}
        schema = create_model(f"Level{depth}Out", **fields)
    plans = Plans(list[schema])
    assert read(plans.load(models[0].select()), plans) == [expected]
    [[streamed]] = plans.plan(models[0].select()).stream(db, 10)
    assert json.loads(streamed.removeprefix(b"[").removesuffix(b"]")) == expected


def test_a_null_in_place_of_json_is_no_answer() -> None:
    """MariaDB says so of what is too long for it."""
    assert encoded([('{"a": 1}',)]) == [b'{"a": 1}']
    with pytest.raises(NotBuilt):
        encoded([('{"a": 1}',), (None,)])


@pytest.mark.parametrize("responds", [False, True])
async def test_rows_that_do_not_fit_are_an_error_of_the_program(
    sqlite_url: str, responds: bool
) -> None:
    """FastAPI's own, with what the endpoint has returned or what was read."""
    async with connected(sqlite_url) as db:
        models = made(db)
        await db.acreate_tables([models.User, models.Item, models.Day])
        await db.run(fill, models)
        app = make_app(db)
        query = models.User.select()
        if responds:
            app.get("/")(lambda: respond(query, list[Strict]))
        else:
            app.get("/", response_model=list[Strict])(lambda: query)
        async with client(app, raises=True) as http:
            with pytest.raises(ResponseValidationError) as failure:
                await http.get("/")
        assert "too long" in str(failure.value.errors())
        assert isinstance(failure.value.body, list if responds else peewee.ModelSelect)
        assert isinstance(db, Database)
