"""What the plans read: how many statements, which rows, in which order; one snapshot of them."""

import datetime
import json
import struct
from asyncio import _get_running_loop
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Annotated, Any

import peewee
import pytest
from peewee import fn
from playhouse.signals import Model as Signals
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    OnErrorOmit,
    PlainSerializer,
    TypeAdapter,
    create_model,
    field_serializer,
    model_validator,
)
from typing_extensions import TypeAliasType

from fastapi_peewee import depth
from fastapi_peewee.loading import Plans, prepared
from fastapi_peewee.plans import InstancePlan, Plan, RowPlan, Texts, plan
from fastapi_peewee.shapes import MANY
from tests.apps import client, connected, make_app
from tests.fidelity import connection
from tests.shop import BareUserOut, ItemOut, UserOut


class TagOut(BaseModel):
    text: str


class FullItemOut(BaseModel):
    title: str
    owner: UserOut
    tags: list[TagOut]


class Counted(BaseModel):
    name: str
    total: int


@pytest.fixture
def db(database_url: str) -> Iterator[Any]:
    with connection(database_url) as db:
        yield db


def staff(db: Any) -> tuple[Any, Any]:
    """Users who have a boss, and own items."""

    class User(db.Model):
        name = peewee.CharField()
        boss = peewee.ForeignKeyField("self", null=True, backref="team")

    class Item(db.Model):
        title = peewee.CharField()
        owner = peewee.ForeignKeyField(User, backref="items")

    return User, Item


@pytest.fixture
def models(db: Any) -> SimpleNamespace:
    """Ada owns b (1) and a (2), Bob c (3), Eve nothing; the tags of b are y and x."""
    User, Item = staff(db)

    class Tag(db.Model):
        text = peewee.CharField()
        items = peewee.ManyToManyField(Item, backref="tags")

    through = Tag.items.get_through_model()
    db.create_tables([User, Item, Tag, through])
    # Written from the last to the first, so that no order comes by itself.
    for number, name, boss in [(3, "Eve", None), (2, "Bob", None), (1, "Ada", None)]:
        User.insert(id=number, name=name, boss=boss).execute()
    User.update(boss=3).where(User.id < 3).execute()
    for number, title, owner in [(3, "c", 2), (2, "a", 1), (1, "b", 1)]:
        Item.insert(id=number, title=title, owner=owner).execute()
    for number, text in [(2, "x"), (1, "y")]:
        Tag.insert(id=number, text=text).execute()
        through.insert(item=1, tag=number).execute()
    return SimpleNamespace(User=User, Item=Item, Tag=Tag)


@pytest.fixture
def statements(db: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The SELECTs that the database is sent."""
    seen: list[str] = []
    execute = db.execute_sql

    def noting(sql: str, params: Any = None) -> Any:
        if sql.startswith(("SELECT", "WITH", "(")):
            seen.append(sql)
        return execute(sql, params)

    monkeypatch.setattr(db, "execute_sql", noting)
    return seen


def every_plan(query: Any, type_: Any, db: Any) -> dict[str, Any]:
    """What the plans answer with, the best one being json."""
    plans = Plans(type_)
    best = plans.plan(query)
    assert best.kind == "json", best.reason
    rows = plan(query, plans.response, db, in_python="asked for")
    assert isinstance(rows, RowPlan)
    instances = InstancePlan(plans.response, query, "asked for")
    return {each.kind: answer(each, plans, db) for each in (best, rows, instances)}


def answer(found: Plan, plans: Plans, db: Any) -> Any:
    return read(found.load(db), plans)


def read(loaded: Any, plans: Plans) -> Any:
    if isinstance(loaded, Texts):
        return json.loads(loaded.body())
    adapter = plans.response.adapter
    value = adapter.validate_python(loaded, from_attributes=True)
    return json.loads(adapter.dump_json(value, by_alias=True))


def only(answers: dict[str, Any]) -> Any:
    """The one answer of all plans."""
    first = answers["json"]
    assert all(each == first for each in answers.values()), answers
    return first


ADA = {"id": 1, "name": "Ada", "items": [{"id": 1, "title": "b"}, {"id": 2, "title": "a"}]}
BOB = {"id": 2, "name": "Bob", "items": [{"id": 3, "title": "c"}]}
EVE = {"id": 3, "name": "Eve", "items": []}

NESTED = {
    "sqlite": (
        """SELECT json_group_array(json_object('id', _fp."c0", 'name', _fp."c1", """
        """'items', (SELECT json_group_array(json_object('id', _fp1."c0", 'title', _fp1."c1")) """
        """FROM (SELECT "t1"."id" AS "c0", """
        """CASE WHEN "t1"."title" COLLATE BINARY NOT BETWEEN '' AND x'' """
        """THEN json('?'||"t1"."title") ELSE "t1"."title" END AS "c1" FROM "item" AS "t1" """
        """WHERE ("t1"."owner_id" = _fp."c0") ORDER BY "t1"."id") _fp1))) FROM ("""
        """SELECT "t1"."id" AS "c0", """
        """CASE WHEN "t1"."name" COLLATE BINARY NOT BETWEEN '' AND x'' """
        """THEN json('?'||"t1"."name") ELSE "t1"."name" END AS "c1" FROM "user" AS "t1" """
        """WHERE ("t1"."name" != ?) ORDER BY "t1"."name") _fp"""
    ),
    "postgresql": (
        """SELECT row_to_json(_fpr)::text FROM (SELECT _fp."c0" AS "id", _fp."c1" AS "name", """
        """array_to_json(array(SELECT row_to_json(_fp1r) FROM ("""
        """SELECT _fp1."c0" AS "id", _fp1."c1" AS "title" FROM ("""
        """SELECT "t1"."id" AS "c0", "t1"."title" AS "c1" FROM "item" AS "t1" """
        """WHERE ("t1"."owner_id" = _fp."c0") ORDER BY "t1"."id") _fp1) _fp1r)) AS "items" FROM ("""
        """SELECT "t1"."id" AS "c0", "t1"."name" AS "c1" FROM "user" AS "t1" """
        """WHERE ("t1"."name" != %s) ORDER BY "t1"."name") _fp) _fpr"""
    ),
    "mysql": (
        "SELECT JSON_OBJECT('id', _fp.`c0`, 'name', _fp.`c1`, 'items', (SELECT COALESCE("
        "JSON_ARRAYAGG(JSON_OBJECT('id', `t101`.`id`, 'title', `t101`.`title`) "
        "ORDER BY `t101`.`id`), JSON_ARRAY()) FROM `item` AS `t101` "
        "WHERE (`t101`.`owner_id` = _fp.`c0`))) FROM ("
        "SELECT `t1`.`id` AS `c0`, `t1`.`name` AS `c1` FROM `user` AS `t1` "
        "WHERE (`t1`.`name` != %s) ORDER BY `t1`.`name` LIMIT 18446744073709551615) _fp"
    ),
}


#: Some are JSON to SQLite from 3.45, and some a moment that a program other than Peewee wrote.
ANYTHING = ["x", "", "1", "1_0", None, 1, 12, 1.5, b"", b"bytes", b"\x17abc"]
MOMENTS = [
    day + "10:00:00" + fraction + zone
    for day in ("2024-01-01 ", "2024-1-1 ", "")
    for fraction in ("", ".000", ".120", ".5", ".12345", ".000000", ".123456")
    for zone in ("", "Z", "+00:00", "-00:00", "+05:30", " +05:30", "+05", "+0530")
]


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize(
    ("column", "values"),
    [(name, ANYTHING) for name in ("text", "flag", "number", "loose", "ip")]
    + [("at", MOMENTS), ("time", MOMENTS)],
)
def test_columns_of_sqlite_that_may_hold_anything(
    sqlite_url: str, column: str, values: list[Any], distinct: bool
) -> None:
    """What a column without a type holds is read as its field reads it, or refused as Pydantic
    refuses it.
    """

    class Out(BaseModel):
        text: str | None
        flag: bool | None
        number: int | None
        loose_id: int | None
        ip: str | None
        at: datetime.datetime | None
        time: datetime.time | None

    with connection(sqlite_url) as db:

        class Loose(db.Model):
            text = peewee.CharField(null=True)
            flag = peewee.BooleanField(null=True)
            number = peewee.IntegerField(null=True)
            loose = peewee.ForeignKeyField("self", null=True)
            ip = peewee.IPField(null=True)
            at = peewee.DateTimeField(null=True)
            time = peewee.TimeField(null=True)

        columns = ", ".join(f'"{name}"' for name in Loose._meta.columns if name != "id")
        db.execute_sql(f'CREATE TABLE "loose" ("id" INTEGER PRIMARY KEY, {columns})')
        query = Loose.select()
        plans = Plans(list[Out])
        best = plans.plan(query.distinct() if distinct else query)
        assert best.kind == "json", best.reason

        def outcome(found: Plan) -> Any:
            try:
                return answer(found, plans, db)
            except (ValueError, TypeError, struct.error) as error:
                return type(error)

        for value in values:
            Loose.delete().execute()
            name = getattr(Loose, column).column_name
            db.execute_sql(f'INSERT INTO "loose" ("{name}") VALUES (?)', (value,))
            expected = outcome(InstancePlan(plans.response, query, "asked for"))
            assert outcome(best) == expected, value


def test_the_statement(db: Any, models: SimpleNamespace, database_url: str) -> None:
    """The json plan of a list of rows with lists is this statement."""
    if database_url.startswith("mysql") and not db.mariadb:
        pytest.skip("the statement for MySQL is another one")
    query = models.User.select().where(models.User.name != "100%").order_by(models.User.name)
    sql, params = Plans(list[UserOut]).plan(query).statement(db)
    assert sql == NESTED[database_url.partition(":")[0]]
    assert params == ["100%"]


def test_how_many_statements(db: Any, models: SimpleNamespace, statements: list[str]) -> None:
    """One statement for json; the other plans send one more for each relation."""
    plans = Plans(list[FullItemOut])
    query = models.Item.select().order_by(models.Item.id)
    best = plans.plan(query)
    rows = plan(query, plans.response, db, in_python="asked for")
    instances = InstancePlan(plans.response, query, "asked for")
    for each, number in ((best, 1), (rows, 4), (instances, 4)):
        statements.clear()
        found = answer(each, plans, db)
        assert [item["title"] for item in found] == ["b", "a", "c"]
        assert len(statements) == number, statements


def test_lists_are_in_the_order_of_the_key(db: Any, models: SimpleNamespace) -> None:
    """A list whose query says no order is in the order of the primary key."""
    query = models.User.select().order_by(models.User.id)
    assert only(every_plan(query, list[UserOut], db)) == [ADA, BOB, EVE]


def test_rows_are_in_the_order_of_the_query(db: Any, models: SimpleNamespace) -> None:
    """The order of the caller's query stays, also on MariaDB, where subqueries have none."""
    for order in (models.User.name.desc(), -models.User.id):
        query = models.User.select().order_by(order)
        assert only(every_plan(query, list[UserOut], db)) == [EVE, BOB, ADA]
    # With enough rows for the server to have reasons to change the order.
    many = [
        {"id": number, "title": f"{number * 7919 % 1000:03}", "owner": 3}
        for number in range(100, 1100)
    ]
    models.Item.insert_many(many).execute()
    query = models.Item.select().where(models.Item.owner == 3).order_by(models.Item.title)
    titles = [item["title"] for item in only(every_plan(query, list[ItemOut], db))]
    assert titles == sorted(titles)


def test_a_limit_of_a_relation_is_for_each_parent(db: Any, models: SimpleNamespace) -> None:
    """The query of a relation selects, orders and limits each parent's rows."""
    newest = models.Item.select().where(models.Item.title != "z")
    newest = newest.order_by(models.Item.id.desc()).limit(1)

    class Newest(BaseModel):
        name: str
        items: Annotated[list[ItemOut], newest]

    query = models.User.select().order_by(models.User.id)
    assert only(every_plan(query, list[Newest], db)) == [
        {"name": "Ada", "items": [{"id": 2, "title": "a"}]},
        {"name": "Bob", "items": [{"id": 3, "title": "c"}]},
        {"name": "Eve", "items": []},
    ]


def test_many_to_many(db: Any, models: SimpleNamespace) -> None:
    """The rows at the other end of a link table are a list, from both ends."""

    class Tagged(BaseModel):
        title: str
        tags: list[TagOut]

    class WithItems(BaseModel):
        text: str
        items: list[ItemOut]

    query = models.Item.select().order_by(models.Item.id)
    assert only(every_plan(query, list[Tagged], db)) == [
        {"title": "b", "tags": [{"text": "y"}, {"text": "x"}]},
        {"title": "a", "tags": []},
        {"title": "c", "tags": []},
    ]
    query = models.Tag.select().order_by(models.Tag.id)
    assert only(every_plan(query, list[WithItems], db)) == [
        {"text": "y", "items": [{"id": 1, "title": "b"}]},
        {"text": "x", "items": [{"id": 1, "title": "b"}]},
    ]


def test_a_model_that_refers_to_itself(db: Any, models: SimpleNamespace) -> None:
    """Rows of one table within rows of the same table, up and down."""

    class Name(BaseModel):
        name: str

    class Boss(Name):
        team: list[Name]

    class Worker(Name):
        boss: Boss | None
        team: list[Name]

    query = models.User.select().order_by(models.User.id)
    ada, _, eve = only(every_plan(query, list[Worker], db))
    both = [{"name": "Ada"}, {"name": "Bob"}]
    assert ada == {"name": "Ada", "boss": {"name": "Eve", "team": both}, "team": []}
    assert eve == {"name": "Eve", "boss": None, "team": both}


def test_a_number_of_rows(db: Any, models: SimpleNamespace) -> None:
    """A COUNT that the query selects by the name of a field of the schema is built as JSON."""
    user, item = models.User, models.Item
    query = (
        user.select(user, fn.COUNT(item.id).alias("total"))
        .join(item, peewee.JOIN.LEFT_OUTER)
        .group_by(user.id, user.name, user.boss)
        .order_by(fn.COUNT(item.id).desc(), user.id)
    )
    assert only(every_plan(query, list[Counted], db)) == [
        {"name": "Ada", "total": 2},
        {"name": "Bob", "total": 1},
        {"name": "Eve", "total": 0},
    ]


def test_another_expression_is_read_as_a_row(db: Any, models: SimpleNamespace) -> None:
    """What isn't a COUNT has a type of the driver's, so that Pydantic must see it."""
    query = models.User.select(models.User, fn.LENGTH(models.User.name).alias("total"))
    plans = Plans(list[Counted])
    found = plans.plan(query.order_by(models.User.id).limit(1))
    assert found.kind == "rows"
    assert answer(found, plans, db) == [{"name": "Ada", "total": 3}]


def test_distinct(db: Any, models: SimpleNamespace) -> None:
    """DISTINCT is of the columns that the query selects, whatever the response shows of them."""

    class Title(BaseModel):
        title: str

    item = models.Item
    item.insert(id=9, title="b", owner=2).execute()
    query = item.select(item.title).distinct().order_by(item.title)
    titles = only(every_plan(query, list[Title], db))
    assert titles == [{"title": "a"}, {"title": "b"}, {"title": "c"}]
    for arguments in ((), (True,)):  # Peewee notes them in two ways
        query = item.select(item.title, item.owner).distinct(*arguments)
        query = query.order_by(item.title, item.owner)
        titles = only(every_plan(query, list[Title], db))
        assert titles == [{"title": "a"}, {"title": "b"}, {"title": "b"}, {"title": "c"}]


def test_what_pydantic_has_to_do(db: Any, models: SimpleNamespace) -> None:
    """Serialisers and validators run, wherever they stand: of a field, of a model, around it."""

    class Loud(BaseModel):
        name: str | None

        @field_serializer("name")
        def loud(self, name: str | None) -> str:
            return f"{name}!"

    class Whole(BaseModel):
        name: str

        @model_validator(mode="after")
        def loud(self) -> "Whole":
            self.name += "!"
            return self

    class Team(BaseModel):
        team: list[Whole]

    query = models.User.select().where(models.User.id == 1)
    around = Annotated[ItemOwner, AfterValidator(lambda owner: ItemOwner(name=f"{owner.name}!"))]
    for type_, kind in ((Loud, "rows"), (Whole, "instances"), (around, "instances")):
        for many in (True, False):
            plans = Plans(list[type_] if many else type_)  # type: ignore[valid-type]
            found = plans.plan(query)
            assert found.kind == kind
            ada = {"name": "Ada!"}
            assert answer(found, plans, db) == ([ada] if many else ada)
    plans = Plans(Team)
    found = plans.plan(models.User.select().where(models.User.id == 3))
    assert found.kind == "instances"
    assert answer(found, plans, db) == {"team": [{"name": "Ada!"}, {"name": "Bob!"}]}


class Named(BaseModel):
    name: str


class Leader(BaseModel):
    name: str
    team: "Annotated[list[Leader], depth(1)]"


Code = TypeAliasType("Code", str)
masked = PlainSerializer(lambda value: f"***{value.name[-1:]}")


class Twice(BaseModel):
    boss: Named | None
    team: list[Named]

    @field_serializer("boss")
    def hide(self, boss: Any) -> Any:
        return None if boss is None else {"name": "***"}


class Aliased(BaseModel):  # type: ignore[no-redef]
    name: Code
    again: Code = Field(validation_alias="name")

    @field_serializer("again")
    def hide(self, again: str) -> str:
        return f"***{again[-1:]}"


class Optionally(BaseModel):
    boss: Annotated[Named, masked] | None
    team: list[Named]


class Listed(BaseModel):
    boss: Named | None
    team: list[Annotated[Named, masked]]


class Led(BaseModel):
    boss: Named


#: Pydantic keeps what is used twice, or contains itself, apart, and refers to it; what is done at
#: one place stands there.
REFERRED: dict[str, Any] = {
    "a field": Twice,
    "an alias": Aliased,
    "beside None": Optionally,
    "the items of a list": Listed,
    "at the top": Annotated[Leader, PlainSerializer(lambda leader: {"name": leader.name})],
    "around None": create_model(
        "Around",
        team=(list[Named], ...),
        boss=(Annotated[Named | None, PlainSerializer(lambda boss: str(boss))], ...),
    ),
    "left out on errors": OnErrorOmit[Led],
}


@pytest.mark.parametrize("name", REFERRED)
def test_serialisers_of_one_place(db: Any, models: SimpleNamespace, name: str) -> None:
    """They run there, also where the class that they are around is used at another place."""
    type_: Any = list.__class_getitem__(REFERRED[name])
    models.User.update(boss=None).where(models.User.name == "Bob").execute()
    query = models.User.select().order_by(models.User.id)
    adapter: TypeAdapter[Any] = TypeAdapter(type_)
    expected = adapter.dump_json(adapter.validate_python(list(query.clone()), from_attributes=True))
    plans = Plans(type_)
    for _ in range(2):
        assert read(plans.load(query), plans) == json.loads(expected)


class Masking(peewee.FieldAccessor):
    def __get__(self, instance: Any, instance_type: Any = None) -> Any:
        value = super().__get__(instance, instance_type)
        return value if instance is None else f"***{value[-1:]}"


class MaskedField(peewee.CharField):
    accessor_class = Masking


def test_models_with_ways_of_their_own_to_be_read(db: Any) -> None:
    """An accessor of a field, and an `__init__`, do with the values what they do to instances."""

    class Account(db.Model):
        number = MaskedField()

    class Loud(db.Model):
        number = peewee.CharField()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.number = f"{self.number}!"

    class Signalling(Signals):
        number = peewee.CharField()

        class Meta:
            database = db

    db.create_tables([Account, Loud, Signalling])
    type_: Any = list[create_model("Out", number=(str, ...))]  # type: ignore[misc]
    for model, sent, kind in (
        (Account, "***2", "instances"),
        (Loud, "42!", "instances"),
        (Signalling, "42", "json"),
    ):
        model.insert(number="42").execute()
        plans = Plans(type_)
        assert plans.plan(model.select()).kind == kind
        assert read(plans.load(model.select()), plans) == [{"number": sent}]


def test_columns_that_a_query_leaves_out(db: Any, models: SimpleNamespace) -> None:
    """Columns of the response are selected also where the query selects fewer, by every plan."""
    query = models.User.select(models.User.name).where(models.User.id < 3).order_by(models.User.id)
    assert only(every_plan(query, list[UserOut], db)) == [ADA, BOB]


def test_a_union(db: Any, models: SimpleNamespace) -> None:
    """A compound query is wrapped as it is."""
    user = models.User
    query = user.select().where(user.id == 1) | user.select().where(user.id < 3)
    query = query.order_by(peewee.SQL("1"))
    assert only(every_plan(query, list[UserOut], db)) == [ADA, BOB]


def test_a_common_table_expression(db: Any, models: SimpleNamespace) -> None:
    """The caller's WITH goes with the query."""
    user, item = models.User, models.Item
    owners = item.select(item.owner.alias("owner")).where(item.title == "c").cte("q")
    query = user.select().join(owners, on=(owners.c.owner == user.id)).with_cte(owners)
    assert only(every_plan(query, list[UserOut], db)) == [BOB]


def test_joins_that_select(db: Any, models: SimpleNamespace) -> None:
    """A row that a join selects is the relation, unless the join says more than the key does."""

    class Owned(BaseModel):
        title: str
        owner: ItemOwner | None

    item, user = models.Item, models.User
    query = item.select(item, user).join(user).order_by(item.id)
    expected = [("b", "Ada"), ("a", "Ada"), ("c", "Bob")]
    found = only(every_plan(query, list[Owned], db))
    assert [(each["title"], each["owner"]["name"]) for each in found] == expected
    on = (item.owner == user.id) & (user.name == "Bob")
    query = item.select(item, user).join(user, peewee.JOIN.LEFT_OUTER, on=on).order_by(item.id)
    plans = Plans(list[Owned])
    assert plans.plan(query).kind == "instances"
    found = answer(plans.plan(query), plans, db)
    assert [each["owner"] for each in found] == [None, None, {"name": "Bob"}]


class ItemOwner(BaseModel):
    name: str


ODD = "100% \"%s\" 'it''s' %(x)s \\ `é` {v} ?"


def test_percent_signs_and_quotes(db: Any) -> None:
    """Percent signs, quotes and backslashes in values and names are theirs."""

    class Odd(db.Model):
        value = peewee.CharField(column_name="a \"b\" `c` 'd'")

        class Meta:
            table_name = "odd 'table' \"of\" `ours`"

    class OddOut(BaseModel):
        model_config = ConfigDict(populate_by_name=True)

        value: str = Field(serialization_alias=ODD.replace("\\", ""))

    db.create_tables([Odd])
    Odd.create(value=ODD)
    query = Odd.select().where((Odd.value == ODD) & Odd.value.contains("100%"))
    assert only(every_plan(query, list[OddOut], db)) == [{ODD.replace("\\", ""): ODD}]


def test_no_rows(db: Any, models: SimpleNamespace) -> None:
    """No rows are an empty list, or null."""
    query = models.User.select().where(models.User.id < 0)
    assert only(every_plan(query, list[UserOut], db)) == []
    assert only(every_plan(query, UserOut | None, db)) is None
    with pytest.raises(models.User.DoesNotExist):
        Plans(UserOut).load(query)


def test_one_row_of_many(db: Any, models: SimpleNamespace) -> None:
    """A response that is one object is the first row, and no other is asked for."""
    query = models.User.select().order_by(models.User.id.desc())
    assert only(every_plan(query, UserOut, db)) == EVE
    assert "LIMIT" in Plans(UserOut).plan(query).statement(db)[0]


def test_other_values_in_a_compiled_statement(
    db: Any, models: SimpleNamespace, statements: list[str]
) -> None:
    """A query of the same shape is answered with its own values, and its own limit."""
    plans = Plans(list[UserOut])
    for name, limit, expected in (("Ada", 1, [ADA]), ("Bob", 2, [BOB]), ("Bob", 0, [])):
        user = models.User
        query = user.select().where(user.name == name).order_by(user.id).limit(limit)
        assert read(plans.load(query), plans) == expected
    assert len(statements) == 3


def test_shapes_without_end(
    db: Any, models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many compiled shapes are kept and no more, and the answers are right all the same."""
    monkeypatch.setattr("fastapi_peewee.loading._SHAPES_KEPT", 3)
    plans = Plans(list[UserOut])
    for number in range(1, 9):
        query = models.User.select().where(models.User.id.in_([1] * number))
        texts = plans.load(query)
        assert isinstance(texts, Texts)
        assert [user["id"] for user in json.loads(texts.body())] == [1]
        assert len(plans._compiled) <= 3


def test_long_lists(db: Any, models: SimpleNamespace) -> None:
    """Of lists of many lengths no statement is kept, and the answers are right each time."""
    plans = Plans(list[UserOut])
    for length in (MANY + 1, MANY + 2, 1000):
        for _ in range(3):
            query = models.User.select().where(models.User.id.in_([1] * length))
            assert read(plans.load(query), plans) == [ADA]
    assert not plans._compiled


def test_instances_are_not_changed(db: Any, models: SimpleNamespace) -> None:
    """What an endpoint returns is completed in copies."""
    instances = list(models.Item.select().order_by(models.Item.id))
    before = [(dict(each.__dict__), dict(each.__rel__)) for each in instances]
    plans = Plans(list[FullItemOut])
    found = read(plans.load(instances), plans)
    assert found[0]["owner"] == ADA
    assert [(dict(each.__dict__), dict(each.__rel__)) for each in instances] == before


def test_loaded_relations_are_not_read_again(
    db: Any, models: SimpleNamespace, statements: list[str]
) -> None:
    """Rows that were prefetched, or set by hand, are those of the response."""
    plans = Plans(list[UserOut])
    query = models.User.select().order_by(models.User.id)
    users = list(peewee.prefetch(query, models.Item.select().where(models.Item.title != "b")))
    statements.clear()
    found = read(plans.load(users), plans)
    assert found[0]["items"] == [{"id": 2, "title": "a"}]
    assert not statements
    item = models.Item.get_by_id(3)
    item.owner = models.User(id=9, name="New")
    item.owner.items = []
    statements.clear()
    (found,) = read(Plans(list[FullItemOut]).load([item]), Plans(list[FullItemOut]))
    assert found["owner"] == {"id": 9, "name": "New", "items": []}
    assert len(statements) == 1  # the tags


@pytest.mark.parametrize("kind", ["rows", "instances"])
def test_all_statements_see_one_snapshot(
    db: Any, models: SimpleNamespace, database_url: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What another connection commits between the statements of a plan is in none of them."""
    plans = Plans(list[UserOut])
    query = models.User.select().order_by(models.User.id)
    found = plan(query, plans.response, db, in_python="asked for")
    if kind == "instances":
        found = InstancePlan(plans.response, query, "asked for")
    execute = db.execute_sql
    writes: list[str] = []

    def interrupted(sql: str, params: Any = None) -> Any:
        result = execute(sql, params)
        if sql.startswith("SELECT") and not writes:
            writes.append(sql)
            with connection(database_url) as other:
                other.execute_sql("UPDATE item SET title = 'changed'")
        return result

    monkeypatch.setattr(db, "execute_sql", interrupted)
    assert answer(found, plans, db) == [ADA, BOB, EVE]
    assert writes
    assert answer(found, plans, db)[1]["items"] == [{"id": 3, "title": "changed"}]


def test_sqlite_values_that_json_can_not_hold(sqlite_url: str) -> None:
    """Bytes in a text column, and text that isn't JSON in a JSON column, are read as rows."""
    with connection(sqlite_url) as db:

        class Odd(db.Model):
            text = peewee.TextField(null=True)
            data = peewee.JSONField(null=True)

        class OddOut(BaseModel):
            text: str | None
            data: Any

        db.create_tables([Odd])
        db.execute_sql("INSERT INTO odd (text, data) VALUES ('plain', '{\"a\": 1}')")
        plans = Plans(list[OddOut])
        assert isinstance(plans.load(Odd.select()), Texts)
        db.execute_sql("INSERT INTO odd (text, data) VALUES (CAST('bytes' AS BLOB), '[1')")
        expected = [{"text": "plain", "data": {"a": 1}}, {"text": "bytes", "data": "[1"}]
        for _ in range(2):  # the statement is compiled now
            assert read(plans.load(Odd.select().order_by(Odd.id)), plans) == expected
        chosen = plans.plan(Odd.select().order_by(Odd.id))
        assert chosen.kind == "json"
        assert answer(chosen, plans, db) == expected
        streamed = [json.loads(text) for texts in chosen.stream(db, 1) for text in texts]
        assert streamed == expected


def test_lists_longer_than_mariadb_aggregates(mysql_url: str) -> None:
    """Lists of more than 1 MiB are whole; where the server cuts one, it is read as rows."""
    with connection(mysql_url) as db:

        class Parent(db.Model):
            pass

        class Child(db.Model):
            text = peewee.TextField()
            parent = peewee.ForeignKeyField(Parent, backref="children")

        class ChildOut(BaseModel):
            text: str

        class ParentOut(BaseModel):
            children: list[ChildOut]

        db.create_tables([Parent, Child])
        Parent.create()
        length = 60_000
        for letter in "abcdefghijklmnopqrst":
            Child.create(parent=1, text=letter * length)
        plans = Plans(list[ParentOut])
        assert isinstance(plans.load(Parent.select()), Texts)
        for most in (2**32 - 1, 100_000):
            db.execute_sql(f"SET SESSION group_concat_max_len = {most}")
            for found in (plans.load(Parent.select()), plans.plan(Parent.select()).load(db)):
                (parent,) = read(found, plans)
                texts = [child["text"] for child in parent["children"]]
                assert len(texts) == 20
                assert {len(text) for text in texts} == {length}


def test_an_order_that_names_what_is_selected(db: Any, models: SimpleNamespace) -> None:
    """An order by place or by name is that of the caller's select list, whatever is left out."""
    User, Item = models.User, models.Item

    class Named(BaseModel):
        name: str

    for query in (
        User.select(User.name, User.id).order_by(peewee.SQL("1 DESC")),
        User.select(User.boss, User.id, User.name).order_by(peewee.SQL("3 DESC")),
        User.select().order_by(peewee.SQL("name").desc()),
    ):
        names = [user["name"] for user in only(every_plan(query, list[Named], db))]
        assert names == ["Eve", "Bob", "Ada"]
    if not isinstance(db, peewee.SqliteDatabase):  # it finds two of that name
        query = User.select().join(Item).order_by(peewee.SQL("id DESC"))
        found = only(every_plan(query, list[Named], db))
        assert [user["name"] for user in found] == ["Bob", "Ada", "Ada"]


def test_an_alias_like_those_of_the_statement(db: Any, models: SimpleNamespace) -> None:
    """What the caller calls `C0` is not taken for our `c0`."""

    class Odd(BaseModel):
        name: str
        C0: int

    query = (
        models.User.select(models.User.name, fn.COUNT(models.Item.id).alias("C0"))
        .join(models.Item)
        .group_by(models.User.id)
        .order_by(models.User.name)
    )
    answers = instances_too(query, list[Odd], db)
    assert answers == [{"name": "Ada", "C0": 2}, {"name": "Bob", "C0": 1}]


def test_a_count_that_is_converted(db: Any, models: SimpleNamespace) -> None:
    """A converter of the caller's sees what was counted."""
    User, Item = models.User, models.Item
    total = fn.COUNT(Item.id).alias("total")
    for node in (
        fn.COUNT(Item.id).converter(lambda number: 10 * number).alias("total"),
        total.converter(lambda number: 10 * number),
    ):
        query = User.select(User.name, node).join(Item).group_by(User.id).order_by(User.name)
        assert instances_too(query, list[Counted], db) == [
            {"name": "Ada", "total": 20},
            {"name": "Bob", "total": 10},
        ]


def test_a_strange_row_that_is_not_in_the_answer(sqlite_url: str) -> None:
    """What isn't sent may be in any form: the first statement answers, as for other rows."""

    class Named(BaseModel):
        name: str

    with connection(sqlite_url) as db:

        class User(db.Model):
            name = peewee.CharField()
            place = peewee.IntegerField()

        db.create_tables([User])
        for place, name in enumerate([b"x", b"y", "a", "b"]):
            User.insert(name=peewee.Value(name, converter=False), place=place).execute()
        for query in (
            User.select().order_by(User.place.desc()).limit(2),
            User.select().order_by(User.id.desc()).limit(2),
            User.select().order_by(-User.id).limit(2),
            User.select().order_by(User.id.desc(nulls="last")).limit(2),
            User.select().where(User.place > 0).order_by(User.name.desc()).offset(1),
            User.select().order_by(User.id, User.place).offset(2),
            User.select().order_by(User.id).offset(2),
            User.select().offset(2),
        ):
            plan_ = Plans(list[Named]).plan(query)
            loaded = plan_.load(db)
            assert isinstance(loaded, Texts)
            names = sorted(row["name"] for row in json.loads(loaded.body()))
            assert names == ["a", "b"], query


def test_a_page_by_the_key_is_looked_at_inside(sqlite_url: str) -> None:
    """Where no other rows are computed, a page's values are looked at before they are copied."""

    class Named(BaseModel):
        name: str

    with connection(sqlite_url) as db:

        class User(db.Model):
            name = peewee.CharField()

        class Word(db.Model):
            name = peewee.CharField(primary_key=True)

        db.create_tables([User, Word])
        for query, inside in (
            (User.select().order_by(User.id).limit(2), True),
            (User.select().order_by(User.id.desc()).limit(2).offset(1), True),
            (User.select().offset(2), True),
            (User.select().order_by(User.name).limit(2), False),
            (User.select().order_by(User.id, User.name).limit(2), False),
            (User.select().order_by(User.id.asc(nulls="last")).limit(2), False),
            (User.select().where(User.name > "a").order_by(User.id).limit(2), False),
            (User.select().join(Word, on=User.name == Word.name).limit(2), False),
            (User.select().group_by(User.id).order_by(User.id).limit(2), False),
            (Word.select().order_by(Word.name).limit(2), False),
        ):
            sql, _ = Plans(list[Named]).plan(query).statement(db)
            assert ("'name', _fp.\"c0\")" in sql) is inside, sql


def test_whole_numbers_with_a_fraction_of_nothing(sqlite_url: str) -> None:
    """What is 5.0 in a column without a type is 5, and '7' in one of texts is 7."""

    class Placed(BaseModel):
        id: int
        place: int | None

    with connection(sqlite_url) as db:

        class User(db.Model):
            place = peewee.IntegerField(null=True)

        class Written(db.Model):
            place = peewee.IntegerField()

        db.execute_sql("CREATE TABLE written (id INTEGER PRIMARY KEY, place TEXT)")
        Written.insert(place="7").execute()
        assert only(every_plan(Written.select(), list[Placed], db)) == [{"id": 1, "place": 7}]
        db.execute_sql('CREATE TABLE "user" (id INTEGER PRIMARY KEY, place)')
        for place in (5.0, -0.0, None, 2**63 - 1, -(2**63), 9007199254740993):
            User.insert(place=peewee.Value(place, converter=False)).execute()
        answers = every_plan(User.select().order_by(User.id), list[Placed], db)
        places = [5, 0, None, 2**63 - 1, -(2**63), 9007199254740993]
        assert [row["place"] for row in only(answers)] == places
        assert '"place":5}' in json.dumps(answers["json"]).replace(" ", "")
        for odd in ("7", b"7", 1e300):
            User.insert(place=peewee.Value(odd, converter=False)).execute()
            loaded = Plans(list[Placed]).plan(User.select()).load(db)
            assert not isinstance(loaded, Texts), "the rows are read"
            User.delete().where(User.id > len(places)).execute()


def test_a_query_of_other_rows_than_its_model_s(db: Any, models: SimpleNamespace) -> None:
    """A query that reads from an alias, though it is the model's, is left as it is."""

    class Named(BaseModel):
        name: str

    other = models.User.alias()
    query = models.User.select(other.id, other.name).from_(other).order_by(other.name.desc())
    found = instances_too(query, list[Named], db)
    assert [user["name"] for user in found] == ["Eve", "Bob", "Ada"]
    owners = models.Item.select(models.Item.owner).distinct().alias("owners")
    joined = query.join(owners, on=(owners.c.owner_id == other.id))
    assert Plans(list[Named]).plan(joined).kind == "instances"


def instances_too(query: Any, type_: Any, db: Any) -> Any:
    """The answer of the chosen plan, which is that of instances."""
    plans = Plans(type_)
    found = answer(plans.plan(query), plans, db)
    assert found == answer(InstancePlan(plans.response, query, "asked for"), plans, db)
    return found


def test_a_query_that_was_executed_is_its_rows(
    db: Any, models: SimpleNamespace, statements: list[str]
) -> None:
    """What the endpoint has seen, and perhaps masked, is what is sent; relations are read for it.
    By `iterator()` no rows are kept, so there they are read again."""
    for many in (True, False):
        query = models.User.select().where(models.User.name == "Ada")
        plans = Plans(list[UserOut] if many else UserOut)
        read(plans.load(query.clone()), plans)  # a statement is kept
        for user in query:
            user.name = "A***"
        statements.clear()
        masked = {**ADA, "name": "A***"}
        assert read(plans.load(query), plans) == ([masked] if many else masked)
        assert ["user" in sql.split("WHERE")[0] for sql in statements] == [False]
        assert plans.plan(query).reason.startswith("it has been executed")
        if many:
            assert [json.loads(*rows) for rows in plans.plan(query).stream(db, 10)] == [masked]
        gone = query.clone()
        for user in gone.iterator():
            user.name = "A***"
        assert read(plans.load(gone), plans) == ([ADA] if many else ADA)
    nobody = models.User.select().where(models.User.name == "Zoe")
    assert list(nobody) == []
    models.User.insert(id=4, name="Zoe").execute()
    plans = Plans(list[UserOut])
    assert read(plans.load(nobody), plans) == []


async def test_a_query_that_was_executed_elsewhere(database_url: str) -> None:
    """It is its rows as well where it was executed by `db.run`, and is returned by an `async def`
    endpoint. Of which a part was read, or fewer columns than are sent, it is read anew."""
    async with connected(database_url) as db:
        user, item = staff(db)
        await db.acreate_tables([user, item])
        await user.acreate(name="Ada")
        app = make_app(db)

        @app.get("/", response_model=list[UserOut])
        async def masked() -> Any:
            query = user.select()
            for found in await db.list(query):
                found.name = "A***"
            return query

        @app.get("/first", response_model=list[UserOut])
        async def first() -> Any:
            query = user.select()
            assert await db.first(query) is not None
            return query

        @app.get("/first_in_a_thread", response_model=UserOut)
        def first_in_a_thread() -> Any:
            query = user.select().where(user.name == "Ada")
            assert query.first() is not None
            return query

        @app.get("/keys", response_model=list[UserOut])
        def keys() -> Any:
            query = user.select(user.id)
            assert len(query) == 1
            return query

        ada = {"id": 1, "name": "Ada", "items": []}
        async with client(app, raises=True) as http:
            for _ in range(2):
                assert (await http.get("/")).json() == [{**ada, "name": "A***"}]
                assert (await http.get("/first")).json() == [ada]
                assert (await http.get("/first_in_a_thread")).json() == ada
                assert (await http.get("/keys")).json() == [ada]


async def test_a_prepared_query_that_was_executed_before(database_url: str) -> None:
    """Its rows are read for each request."""
    async with connected(database_url) as db:
        user, _ = staff(db)
        await db.acreate_tables([user])
        everybody = user.select()
        assert await db.list(everybody) == []
        read_users = prepared(everybody, list[BareUserOut])
        await user.acreate(name="Ada")
        plans = Plans(list[BareUserOut])
        for _ in range(2):
            loaded = await db.run(plans.load, read_users())
            assert isinstance(loaded, Texts)
            assert json.loads(loaded.body()) == [{"id": 1, "name": "Ada"}]


async def test_what_is_returned_by_async_endpoints_is_converted_once(database_url: str) -> None:
    """Where the event loop can't read, what it looks at first costs nothing: in particular no value
    is converted. Where it can, a converter that asks the database has a thread do it."""
    converted: list[bool] = []

    class Once(peewee.CharField):
        def db_value(self, value: Any) -> Any:
            if value == "ask":
                assert db.execute_sql("SELECT 1").fetchone()[0] == 1
                return "Ada"
            converted.append(_get_running_loop() is not None)
            return super().db_value(value)

    async with connected(database_url) as db:

        class User(db.Model):
            name = peewee.CharField()
            key = Once()

        await db.acreate_tables([User])
        await User.acreate(name="Ada", key="Ada")
        app = make_app(db)

        @app.get("/{key}", response_model=list[BareUserOut])
        async def users(key: str) -> Any:
            return User.select().where(User.key == key)

        async with client(app, raises=True) as http:
            for key in ("Ada", "Ada", "ask", "Ada", "ask", "ask"):
                converted.clear()
                assert (await http.get(f"/{key}")).json() == [{"id": 1, "name": "Ada"}]
                assert len(converted) == (key == "Ada")
            await http.get("/Ada")
            assert converted == [db.reads_on_the_loop]


ITERATED_ONCE: dict[str, Any] = {
    "case": lambda user: user.select().order_by(
        peewee.Case(user.id, zip([3, 1, 2], [0, 1, 2], strict=True))
    ),
    "pairs": lambda user: user.select().order_by(
        peewee.Case(user.id, [iter(pair) for pair in ([3, 0], [1, 1], [2, 2])])
    ),
    "sql": lambda user: user.select().order_by(
        peewee.SQL(f"id = {user._meta.database.param} DESC, id", map(int, ["3"]))
    ),
}


@pytest.mark.parametrize("name", ITERATED_ONCE)
def test_what_can_be_iterated_over_once(db: Any, models: SimpleNamespace, name: str) -> None:
    """Peewee makes SQL of whatever it can iterate over: also as a query of such a shape comes to
    be remembered, and where a query is returned."""
    plans = Plans(list[BareUserOut])
    for _ in range(3):
        assert [user.id for user in ITERATED_ONCE[name](models.User)] == [3, 1, 2]
        answered = read(plans.load(ITERATED_ONCE[name](models.User)), plans)
        assert [user["id"] for user in answered] == [3, 1, 2]


def test_a_list_of_values_that_can_be_iterated_over_once(postgres_url: str) -> None:
    """The same of `VALUES`, which PostgreSQL gives names to its columns."""
    with connection(postgres_url) as db:
        user, _ = staff(db)
        db.create_tables([user])
        for name in ("Ada", "Bob", "Eve"):
            user.create(name=name)
        plans = Plans(list[BareUserOut])

        def some() -> Any:
            rows = peewee.ValuesList(zip([3, 1], [1, 2], strict=True), ("number", "place"), "v")
            joined = user.select().join(rows, on=(rows.c.number == user.id))
            return joined.order_by(rows.c.place)

        for _ in range(3):
            assert [found.id for found in some()] == [3, 1]
            assert [found["id"] for found in read(plans.load(some()), plans)] == [3, 1]
