"""Schemas from models: what they accept, say in OpenAPI, and read."""

import base64
import datetime as dt
import decimal
import enum
import json
import math
import pickle
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any, get_args, get_origin

import peewee
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playhouse import postgres_ext
from playhouse.fields import PickleField
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import MISSING

from fastapi_peewee import (
    Database,
    PeeweeRoute,
    SchemaError,
    connect,
    create_schema,
    patch_schema,
    schema,
)
from fastapi_peewee.plans import Texts, plan
from fastapi_peewee.response_types import Response
from tests.apps import client, make_app
from tests.apps import db as db


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class EnumField(peewee.CharField):
    def __init__(self, enum_class: type[enum.Enum], **options: Any) -> None:
        super().__init__(**options)
        self.enum_class = enum_class

    def db_value(self, value: Any) -> Any:
        return None if value is None else self.enum_class(value).value

    def python_value(self, value: Any) -> Any:
        return None if value is None else self.enum_class(value)


#: A field of every class that all databases have.
PORTABLE: dict[str, Any] = {
    "small": peewee.SmallIntegerField,
    "integer": peewee.IntegerField,
    "big": peewee.BigIntegerField,
    "bits": peewee.BitField,
    "single": peewee.FloatField,
    "double": peewee.DoubleField,
    "amount": lambda **options: peewee.DecimalField(9, 3, **options),
    "rounded": lambda **options: peewee.DecimalField(9, 3, auto_round=True, **options),
    "short": lambda **options: peewee.CharField(5, **options),
    "fixed": lambda **options: peewee.FixedCharField(5, **options),
    "text": peewee.TextField,
    "boolean": peewee.BooleanField,
    "blob": peewee.BlobField,
    "many_bits": peewee.BigBitField,
    "uuid": peewee.UUIDField,
    "binary_uuid": peewee.BinaryUUIDField,
    "moment": peewee.DateTimeField,
    "day": peewee.DateField,
    "clock": peewee.TimeField,
    "timestamp": peewee.TimestampField,
    "utc": lambda **options: peewee.TimestampField(utc=True, resolution=1000, **options),
    "ip": peewee.IPField,
    "document": peewee.JSONField,
    "colour": lambda **options: EnumField(Colour, **options),
    "choice": lambda **options: peewee.CharField(choices=[("a", "A"), ("b", "B")], **options),
    "level": lambda **options: peewee.IntegerField(choices=[(1, "low"), (2, "high")], **options),
    "ratio": lambda **options: peewee.DecimalField(
        3,
        1,
        choices=[(decimal.Decimal("0.5"), "half"), (decimal.Decimal("1.5"), "more")],
        **options,
    ),
}
POSTGRES: dict[str, Any] = {
    "instant": postgres_ext.DateTimeTZField,
    "interval": postgres_ext.IntervalField,
    "numbers": postgres_ext.ArrayField,
    "words": lambda **options: postgres_ext.ArrayField(
        peewee.CharField, {"max_length": 3, "null": True}, **options
    ),
    "pg_json": postgres_ext.JSONField,
    "pg_jsonb": postgres_ext.BinaryJSONField,
}

texts = st.text(max_size=8) | st.text("\0\ud800\N{GRINNING FACE} a", max_size=6)
moments = st.datetimes() | st.datetimes(timezones=st.timezones())
#: What a client may send, and what comes near to what the columns end with.
anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        *(
            st.integers(end - 2, end + 2)
            for bits in (1, 15, 31, 63)
            for end in (2**bits, -(2**bits))
        ),
        st.integers(),
        st.floats(),
        st.floats(-1e39, 1e39),
        texts,
        st.decimals(-1_000_001, 1_000_001, places=3).map(str) | st.decimals().map(str),
        (st.dates() | st.uuids() | st.ip_addresses()).map(str),
        (moments | st.times() | st.times(timezones=st.timezones())).map(lambda t: t.isoformat()),
        st.binary(max_size=6).map(lambda data: base64.b64encode(data).decode()),
        st.sampled_from(["r", "b", "a", 1, 2, 3, "0.5", "1.5", "P3DT4H", "-P1DT0.000001S"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def database(database_url: str) -> Iterator[Any]:
    db = connect(database_url)
    with closing(db):
        if isinstance(db, peewee.MySQLDatabase):
            # Peewee's JSON fields have to be told which of the two it is.
            db.mariadb = "MariaDB" in db.execute_sql("SELECT VERSION()").fetchone()[0]
        yield db


def equal(stored: Any, sent: Any, single: bool, mysql: bool) -> bool:
    """Whether they are the same, but for what Peewee's own columns don't keep."""
    if isinstance(sent, dict):
        return stored.keys() == sent.keys() and all(
            equal(stored[key], sent[key], single, mysql) for key in sent
        )
    if isinstance(sent, list) and isinstance(stored, list) and len(stored) == len(sent):
        return all(equal(*pair, single, mysql) for pair in zip(stored, sent, strict=True))
    if isinstance(sent, float) and single:
        return math.isclose(stored, sent, rel_tol=1e-5, abs_tol=1e-37)  # 32 bits
    if isinstance(sent, float):
        return float(stored) == sent  # JSON may give it back as an integer
    if isinstance(sent, dt.datetime | dt.time) and mysql:
        return bool(stored == sent.replace(microsecond=0) or stored == sent)
    return bool(stored == sent) or (sent is None and stored == b"")  # a BigBitField is never null


@pytest.fixture
def everything(database: Any) -> Any:
    """A model with fields of all classes, all of which may be null."""
    is_postgres = isinstance(database, peewee.PostgresqlDatabase)
    classes = PORTABLE | (POSTGRES if is_postgres else {})
    fields = {name: make(null=True, default=None) for name, make in classes.items()}
    model = type("Everything", (database.Model,), fields)
    database.create_tables([model])
    return model


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=5 * settings().max_examples,
)
@given(data=st.data())
def test_what_an_input_schema_accepts_is_stored_and_comes_back_equal(
    database: Any, everything: Any, data: st.DataObject
) -> None:
    """Every value of every field class: none that passes is refused, or changed, by a database."""
    if not hasattr(everything, "made"):
        everything.made = {
            field.name: (
                create_schema(everything, include=[field]),
                schema(everything, include=[field]),
            )
            for field in everything._meta.sorted_fields[1:]
        }
    value = data.draw(anything)
    with database.atomic():
        for name, (incoming, outgoing) in everything.made.items():
            try:
                sent = incoming.model_validate({name: value}).model_dump()
            except ValidationError:
                continue
            key = everything.create(**{name: None, **sent}).id
            read = outgoing.model_validate(everything.get_by_id(key))
            mysql = isinstance(database, peewee.MySQLDatabase)
            assert equal(getattr(read, name), sent[name], name == "single", mysql), (name, value)


#: A value of each field class, as a client sends it.
SENT = {
    "small": 3,
    "integer": -4,
    "big": 2**62,
    "bits": 5,
    "single": 0.5,
    "double": 0.1,
    "amount": "12.5",
    "rounded": "1.0005",
    "short": "é",
    "fixed": " a ",
    "text": 'a"\n',
    "boolean": True,
    "blob": "__4=",
    "many_bits": "AQ",
    "uuid": "12345678123456781234567812345678",
    "binary_uuid": "12345678-1234-5678-1234-567812345678",
    "moment": "2024-01-02T03:04:05",
    "day": "2024-01-02",
    "clock": "03:04:05",
    "timestamp": "2024-01-02T03:04:05",
    "utc": "2024-01-02T05:04:05.25+02:00",
    "ip": "10.0.0.1",
    "document": {"a": [1, None, "x", {"b": 1.5}]},
    "colour": "r",
    "choice": "a",
    "level": 1,
    "ratio": "0.5",
    "instant": "2024-01-02T03:04:05Z",
    "interval": "P3DT4H",
    "numbers": [1, 2],
    "words": ["a", None],
    "pg_json": {"a": 1},
    "pg_jsonb": [True],
}


def test_a_query_gives_the_same_json_however_its_plan_reads_it(
    database: Any, everything: Any
) -> None:
    """Responses made by the database are those that Pydantic makes of instances."""
    names = [field.name for field in everything._meta.sorted_fields[1:]]
    incoming = create_schema(everything).model_validate({name: SENT[name] for name in names})
    everything.create(**incoming.model_dump())
    everything.create(**dict.fromkeys(names))
    query = everything.select().order_by(everything.id)
    kinds = set()
    for name in names:
        rows: Any = list[schema(everything, include=[name])]  # type: ignore[misc]
        adapter: TypeAdapter[Any] = TypeAdapter(rows)
        expected = adapter.dump_json(adapter.validate_python(list(query.clone())))
        chosen = plan(query, Response(rows), database)
        loaded = chosen.load(database)
        if not isinstance(loaded, Texts):
            made = adapter.dump_json(adapter.validate_python(loaded, from_attributes=True))
        else:
            made = loaded.body()
        kinds.add(chosen.kind)
        if name != "many_bits":  # to instances a null has no bits
            assert json.loads(made) == json.loads(expected), name
    assert kinds == {"json", "rows"}


# --- types ---------------------------------------------------------------------------------------

offline = connect("sqlite:///:memory:")


class User(offline.Model):
    email = peewee.CharField(unique=True, max_length=80, verbose_name="E-mail", help_text="Unique")
    nickname = peewee.CharField(null=True)
    size = peewee.CharField(choices=[("s", "Small"), ("l", "Large")], default="s")
    is_active = peewee.BooleanField(default=True)
    tags = peewee.JSONField(default=list)
    created = peewee.DateTimeField(constraints=[peewee.SQL("DEFAULT CURRENT_TIMESTAMP")])
    number = peewee.IntegerField(default=peewee.SQL("1 + 1"))
    both = peewee.IntegerField(default=1, constraints=[peewee.SQL("DEFAULT 2")])
    doubled = peewee.IntegerField(constraints=[peewee.SQL("GENERATED ALWAYS AS (id * 2)")])


class Item(offline.Model):
    title = peewee.CharField()
    owner = peewee.ForeignKeyField(User, backref="items")
    editor = peewee.ForeignKeyField(User, null=True, backref="edited", object_id_name="edited_by")

    class Meta:
        indexes = ((("title", "owner"), True), (("title", "editor"), False))


class Group(offline.Model):
    name = peewee.CharField(primary_key=True, max_length=9)
    users = peewee.ManyToManyField(User, backref="groups")


class Member(offline.Model):
    user = peewee.ForeignKeyField(User)
    group = peewee.ForeignKeyField(Group)
    since = peewee.DateField(null=True)

    class Meta:
        primary_key = peewee.CompositeKey("user", "group")


class Category(offline.Model):
    parent = peewee.ForeignKeyField("self", null=True, backref="children")


ItemOut = schema(Item, name="ItemOut")
Children: Any = list["CategoryOut"]  # type: ignore[valid-type]
CategoryOut = schema(
    Category, relations={"children": Children}, exclude="parent", name="CategoryOut"
)


@pytest.fixture
def tables() -> Iterator[None]:
    models = [User, Item, Group, Group.users.get_through_model(), Member, Category]
    with closing(offline), offline.connection_context():
        offline.create_tables(models)
        yield
        offline.drop_tables(models)


def annotations(made: type[BaseModel]) -> dict[str, Any]:
    return {name: field.annotation for name, field in made.model_fields.items()}


def plain(annotation: Any) -> bool:
    return get_origin(annotation) is not Annotated and all(map(plain, get_args(annotation)))


def test_a_response_has_plain_types_and_no_limits() -> None:
    """Its annotations are types, and nothing is validated beyond them."""
    fields = {name: make() for name, make in (PORTABLE | POSTGRES).items() if name != "many_bits"}
    made = schema(type("Everything", (offline.Model,), fields))
    for name, field in made.model_fields.items():
        assert field.metadata == []
        assert field.is_required()
        assert plain(field.annotation), name
    assert annotations(made) == {
        "id": int,
        **dict.fromkeys(("small", "integer", "big", "bits", "level"), int),
        **dict.fromkeys(("single", "double"), float),
        **dict.fromkeys(("amount", "rounded", "ratio"), decimal.Decimal),
        **dict.fromkeys(("short", "fixed", "text", "ip", "choice"), str),
        **dict.fromkeys(("uuid", "binary_uuid"), uuid.UUID),
        **dict.fromkeys(("moment", "timestamp", "utc", "instant"), dt.datetime),
        **dict.fromkeys(("document", "pg_json", "pg_jsonb"), Any),
        "boolean": bool,
        "blob": bytes,
        "day": dt.date,
        "clock": dt.time,
        "colour": Colour,
        "interval": dt.timedelta,
        "numbers": list[int],
        "words": list[str | None],
    }


def test_fields_come_in_the_models_order_then_relations_in_ours() -> None:
    """A foreign key that `relations` names is the other row, or none if it may be null."""
    user: Any = schema(User)
    made = schema(
        Item,
        relations={Item.editor: user, "owner": Annotated[user, "kept"]},
        include=["title", "id"],
    )
    assert [*annotations(made).items()] == [
        ("id", int),
        ("title", str),
        ("editor", user | None),
        ("owner", user),
    ]
    assert made.model_fields["owner"].metadata == ["kept"]


def test_a_foreign_key_is_its_id_under_peewees_name_for_it() -> None:
    assert annotations(ItemOut) == {
        "id": int,
        "title": str,
        "owner_id": int,
        "edited_by": int | None,
    }
    assert annotations(schema(Member)) == {
        "user_id": int,
        "group_id": str,
        "since": dt.date | None,
    }


def test_the_metadata_of_a_relation_is_passed_through_untouched() -> None:
    """A query beside `list[…]` is still there, the same object, and has not been executed."""
    query = Item.select().where(Item.title != "").order_by(Item.id).limit(5)
    made = schema(User, relations={User.items: Annotated[list[ItemOut], query, "more"]})  # type: ignore[valid-type]
    found = made.model_fields["items"].metadata
    assert found[0] is query
    assert found[1:] == ["more"]
    assert query._cursor_wrapper is None


@pytest.mark.usefixtures("tables")
def test_a_model_instance_is_read_with_its_relations() -> None:
    """Foreign keys, back-references, many-to-many and a type that contains itself."""
    user = User.create(email="a@b")
    item = Item.create(title="one", owner=user)
    Group.create(name="staff").users.add(user)
    root = Category.create()
    Category.create(parent=root)
    out = schema(
        User,
        include=["email"],
        relations={User.items: list[ItemOut], User.groups: list[schema(Group)]},  # type: ignore[misc,valid-type]
    )
    assert out.model_validate(user).model_dump() == {
        "email": "a@b",
        "items": [{"id": 1, "title": "one", "owner_id": 1, "edited_by": None}],
        "groups": [{"name": "staff"}],
    }
    owned = schema(
        Item,
        exclude=[Item.id],
        relations={
            Item.owner: schema(User, include=User.id),
            Item.editor: schema(User, include="id"),
        },
    )
    assert owned.model_validate(item).model_dump() == {
        "title": "one",
        "owner": {"id": 1},
        "editor": None,
    }
    assert CategoryOut.model_validate(root).model_dump() == {
        "id": 1,
        "children": [{"id": 2, "children": []}],
    }


def optionality(made: type[BaseModel]) -> dict[str, Any]:
    """For each field whether it is required, or its default."""
    return {
        name: "required" if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in made.model_fields.items()
    }


def test_a_default_has_the_type_of_its_field() -> None:
    """Peewee takes 0 for a decimal; the schema has what a client would have sent."""

    class Row(offline.Model):
        price = peewee.DecimalField(default=0)
        good = peewee.BooleanField(default=1)
        day = peewee.DateField(default="2020-01-01")
        code = peewee.CharField(default=5)
        count = peewee.IntegerField(default=lambda: "7")
        blob = peewee.BlobField(default=b"QQ==")
        odd = peewee.IntegerField(default="odd")

    made: Any = create_schema(Row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = made().model_dump(exclude={"odd"})
        assert made.model_json_schema()["properties"]["good"]["default"] is True
    assert data == {
        "price": decimal.Decimal(0),
        "good": True,
        "day": dt.date(2020, 1, 1),
        "code": "5",
        "count": 7,
        "blob": b"QQ==",
    }
    assert [type(value) for value in data.values()] == [
        decimal.Decimal,
        bool,
        dt.date,
        str,
        int,
        bytes,
    ]
    assert made.model_fields["odd"].default == "odd"  # the database's to refuse


def test_moments_without_a_zone_have_a_format_without_one() -> None:
    """`date-time` would demand what is refused."""

    class Row(offline.Model):
        at = peewee.DateTimeField()
        time = peewee.TimeField()

    for made in (create_schema(Row), patch_schema(Row)):
        properties = made.model_json_schema()["properties"]
        formats = [properties[name]["format"] for name in ("at", "time")]
        assert formats == ["date-time-local", "time-local"]


def test_a_constraint_that_makes_no_value_leaves_a_field_required() -> None:
    """A check says what a value may be, not what it is."""

    class Checked(peewee.Model):
        number = peewee.IntegerField(constraints=[peewee.Check("number > 0")])
        other = peewee.IntegerField(
            constraints=[peewee.Check("other > 0"), peewee.SQL("DEFAULT 7")]
        )

    fields = create_schema(Checked).model_fields
    assert (fields["number"].is_required(), fields["other"].is_required()) == (True, False)


@pytest.mark.parametrize("error", [OSError, OverflowError])
def test_a_time_that_the_system_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Systems differ in how far their calendars go; what is beyond is out of range."""

    class Stamped(peewee.Model):
        at = peewee.TimestampField()

    def fail(field: Any, value: Any) -> Any:
        raise error

    schema = create_schema(Stamped)
    schema(at="2026-01-02T03:04:05")
    monkeypatch.setattr(peewee.TimestampField, "db_value", fail)
    with pytest.raises(ValidationError, match="out of range"):
        schema(at="2026-01-02T03:04:05")


def test_a_number_with_more_digits_than_python_rounds() -> None:
    """Python's decimals are rounded to 28 digits: more is refused, as what is out of range is."""

    class Balance(peewee.Model):
        amount = peewee.DecimalField(38, 2, auto_round=True)

    schema: Any = create_schema(Balance)
    assert schema.model_validate_json('{"amount": "12.346"}').amount == decimal.Decimal("12.35")
    for amount, why in (
        ("1e35", "more digits"),
        ("1e36", "less than or equal"),
        ("-1e36", "greater"),
    ):
        with pytest.raises(ValidationError, match=why):
            schema.model_validate_json(f'{{"amount": "{amount}"}}')


def test_what_may_be_left_out_of_a_post() -> None:
    """What the database or the model has a value for; what they always make isn't there."""
    assert optionality(create_schema(User)) == {
        "email": "required",
        "nickname": None,
        "size": "s",
        "is_active": True,
        "tags": [],
        "created": MISSING,
        "number": MISSING,
        "both": 1,
    }
    assert optionality(create_schema(Group)) == {"name": "required"}
    assert optionality(create_schema(Member)) == {
        "user_id": "required",
        "group_id": "required",
        "since": None,
    }
    assert optionality(create_schema(User, include=["id", "doubled"])) == {
        "id": MISSING,
        "doubled": MISSING,
    }
    assert create_schema(User)(email="a").model_dump() == {
        "email": "a",
        "nickname": None,
        "size": "s",
        "is_active": True,
        "tags": [],
        "both": 1,
    }


def test_all_may_be_left_out_of_a_patch() -> None:
    """Unset isn't null: null is refused where the column refuses it. There are no keys."""
    made = patch_schema(User)
    assert set(optionality(made).values()) == {MISSING}
    assert list(made.model_fields) == [*create_schema(User).model_fields]
    assert made().model_dump() == made().model_dump(exclude_unset=True) == {}
    assert made(nickname=None).model_dump() == {"nickname": None}
    for name in ("email", "is_active", "created", "tags"):
        with pytest.raises(ValidationError):
            made.model_validate({name: None})
    assert list(patch_schema(Member).model_fields) == ["since"]
    assert list(patch_schema(Group).model_fields) == []
    assert list(patch_schema(Group, include=Group.name).model_fields) == ["name"]


def test_a_field_is_named_as_in_the_model_the_table_or_a_response() -> None:
    """A foreign key is known by each of its names; the name of a field comes before a column's."""

    class Swapped(offline.Model):
        b = peewee.IntegerField()
        a = peewee.IntegerField(column_name="b_")
        c = peewee.IntegerField(column_name="a")

    assert list(schema(Swapped, include=["a", "b"]).model_fields) == ["b", "a"]
    assert list(schema(Swapped, include="b_").model_fields) == ["a"]
    for name in ("editor", "editor_id", "edited_by", Item.editor):
        assert list(schema(Item, include=name).model_fields) == ["edited_by"]
        assert list(schema(Item, exclude=name).model_fields) == ["id", "title", "owner_id"]


@pytest.mark.parametrize("make", [create_schema, patch_schema])
def test_an_input_refuses_what_it_does_not_know(make: Any) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        make(User).model_validate({"email": "a", "is_admin": True})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("small", 2**15),
        ("integer", -(2**31) - 1),
        ("big", 2**63),
        ("double", math.nan),
        ("single", 1e39),
        ("amount", "1234567"),
        ("amount", "0.0001"),
        ("rounded", "1e30"),
        ("short", "123456"),
        ("text", "\0"),
        ("text", "\ud800"),
        ("blob", "%"),
        ("moment", "2024-01-01T00:00:00Z"),
        ("clock", "00:00:00+01:00"),
        ("timestamp", "0001-01-01T00:00:00"),
        ("ip", "1.2.3"),
        ("document", {"a": "\0"}),
        ("document", ["\ud800"]),
        ("document", math.inf),
        ("document", 2**63),
        ("document", json.loads("[" * 95 + "]" * 95)),
        ("colour", "g"),
        ("choice", "c"),
        ("level", 3),
        ("ratio", "2.5"),
        ("instant", "2024-01-01T00:00:00"),
        ("instant", "9999-12-31T23:59:59Z"),
        ("words", ["abcd"]),
        ("numbers", [2**31]),
    ],
)
def test_an_input_refuses_what_some_database_does_not_store(name: str, value: Any) -> None:
    model = type("One", (offline.Model,), {name: (PORTABLE | POSTGRES)[name]()})
    with pytest.raises(ValidationError):
        create_schema(model).model_validate({name: value})
    create_schema(model).model_validate({name: SENT[name]})


def test_a_column_that_may_not_be_null_takes_no_null() -> None:
    """Also JSON, to which null is a value."""
    for name, make in (PORTABLE | POSTGRES).items():
        for null in (False, True):
            model = type("One", (offline.Model,), {name: make(null=null)})
            for made in (create_schema(model), patch_schema(model)):
                try:
                    made.model_validate({name: None})
                except ValidationError:
                    assert not null, name
                else:
                    assert null, name


def test_bytes_are_base64_in_json_and_bytes_in_python() -> None:
    """Either alphabet comes in, the one for URLs goes out, from FastAPI's parser and Pydantic's."""
    model = type("One", (offline.Model,), {"blob": peewee.BlobField()})
    made = create_schema(model)
    for text in ("__8=", "//8=", "__8", "//8"):
        assert made.model_validate({"blob": text}).model_dump() == {"blob": b"\xff\xff"}
        assert made.model_validate_json(json.dumps({"blob": text})).model_dump_json() == (
            '{"blob":"__8="}'
        )
    assert made(blob=b"\xff").model_dump() == {"blob": b"\xff"}


def test_a_subclass_has_the_type_of_its_base_or_what_it_says() -> None:
    """Limits are those of Peewee's column type; a `python_value` tells by its annotation."""

    class Lower(peewee.CharField):
        def db_value(self, value: Any) -> Any:
            return value.lower()

    class Unsigned(peewee.IntegerField):
        field_type = "INTEGER UNSIGNED"

    class Tags(peewee.TextField):
        def python_value(self, value: Any) -> list[str]:
            return value.split()

    class Untold(peewee.TextField):
        def python_value(self, value: Any) -> Any:
            return object()

    class Money(peewee.Field):
        field_type = "DECIMAL"

    class Point(peewee.Field):
        field_type = "POINT"

    class Row(offline.Model):
        lower = Lower(max_length=3)
        unsigned = Unsigned()
        tags = Tags()
        untold = Untold()
        money = Money()
        point = Point()
        pickled = PickleField()
        bare = peewee.BareField()

    assert annotations(schema(Row, exclude="id")) == {
        "lower": str,
        "unsigned": int,
        "tags": list[str],
        "untold": Any,
        "money": decimal.Decimal,
        "point": Any,
        "pickled": Any,
        "bare": Any,
    }
    made = create_schema(Row, include=[Row.lower, Row.unsigned])
    made(lower="abc", unsigned=2**32 - 1)
    with pytest.raises(ValidationError, match="at most 3"):
        made(lower="abcd", unsigned=1)


# --- names, bases, errors ------------------------------------------------------------------------


def test_a_base_keeps_what_it_declares_and_configures() -> None:
    """Fields, settings and validators of the class that is inherited from."""

    class Base(BaseModel):
        model_config = ConfigDict(extra="ignore", str_to_upper=True)

        nickname: int
        password: str

    made = create_schema(User, base=Base, include=["email", "nickname"], name="Registration")
    row = made.model_validate({"email": "a", "nickname": 1, "password": "p", "other": 1})
    assert isinstance(row, Base)
    assert row.model_dump() == {"nickname": 1, "password": "P", "email": "A"}


def test_a_schema_has_the_models_name_and_its_makers_module() -> None:
    """So an instance can be pickled, if the class is to be found by its name."""
    names = [make(User).__name__ for make in (schema, create_schema, patch_schema)]
    assert names == ["User", "UserCreate", "UserPatch"]
    assert ItemOut.__module__ == __name__
    item = ItemOut(id=1, title="a", owner_id=2, edited_by=None)
    assert pickle.loads(pickle.dumps(item)) == item


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": ["emial"]}, "has 'emial', which is no field of User. Did you mean 'email'?"),
        ({"exclude": [Item.title]}, "exclude= has <CharField: Item.title>, .* Its fields: id, em"),
        ({"include": [3]}, "include= has 3"),
        ({"include": "items"}, "It is a relation, and there only if relations= has it"),
        ({"exclude": [User.items]}, "It is a relation"),
        ({"relations": {Item.owner: ItemOut}}, "no relation of User. .* relations: edited, groups"),
        ({"relations": {User.email: ItemOut}}, "no relation of User"),
        ({"relations": {"itmes": list[ItemOut]}}, "has 'itmes', which is no relation"),  # type: ignore[valid-type]
        ({"relations": {User.items: ItemOut}}, r"to many rows, .* gives it ItemOut. Write list\[I"),
        ({"relations": {User.groups: ItemOut}}, r"User.groups is a relation to many rows"),
        ({"relations": {User.items: Annotated[ItemOut, 1]}}, r"to many rows"),
    ],
)
def test_a_mistake_is_named_with_what_to_write(options: Any, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        schema(User, **options)


def test_a_list_for_one_row_is_a_mistake() -> None:
    with pytest.raises(SchemaError, match=r"one row, .* gives it list\["):
        schema(Item, relations={Item.owner: list[ItemOut]})  # type: ignore[valid-type]


def test_a_foreign_key_to_a_model_that_is_not_there_yet_is_a_mistake() -> None:
    class Early(offline.Model):
        late = peewee.DeferredForeignKey("NeverMade")

    with pytest.raises(SchemaError, match="a model named 'nevermade' that isn't there yet"):
        schema(Early)


def test_making_a_schema_loads_no_driver() -> None:
    """`playhouse` and the drivers that it imports are for unknown field classes only."""
    code = (
        "import sys, peewee\n"
        "from fastapi_peewee import schema\n"
        "class A(peewee.Model): a = peewee.CharField()\n"
        "schema(A)\n"
        "assert 'playhouse' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- OpenAPI and requests ------------------------------------------------------------------------


def test_what_the_json_schema_says_beyond_types() -> None:
    """Titles, descriptions, labels, limits and indexes."""
    user = create_schema(User).model_json_schema()
    assert user["additionalProperties"] is False
    assert user["required"] == ["email"]
    properties = user["properties"]
    assert properties["email"] == {
        "title": "E-mail",
        "description": "Unique",
        "type": "string",
        "maxLength": 80,
        "pattern": "^[^\\x00]*$",
        "x-unique": True,
    }
    assert properties["size"] == {
        "title": "Size",
        "description": "Choices: 's' = Small, 'l' = Large",
        "type": "string",
        "enum": ["s", "l"],
        "default": "s",
    }
    assert "default" not in properties["created"]
    sent = schema(User).model_json_schema()["properties"]
    assert sent["email"]["maxLength"] == 80
    assert sent["size"]["enum"] == ["s", "l"]
    item = ItemOut.model_json_schema()
    assert item["x-unique-together"] == [["title", "owner_id"]]
    assert item["x-index-together"] == [["title", "edited_by"]]
    assert item["properties"]["owner_id"]["x-index"] is True
    member = schema(Member).model_json_schema()
    assert member["x-unique-together"] == [["user_id", "group_id"]]
    assert "x-unique" not in member["properties"]["user_id"]
    assert "x-unique-together" not in schema(Item, exclude=["title"]).model_json_schema()


@pytest.mark.parametrize("null", [False, True])
def test_choices_that_json_has_no_literals_of_are_named_there(null: bool) -> None:
    """Dates and decimals are in the JSON schema as they are sent; members of an enum, once."""
    day = dt.date(2020, 1, 1)

    class Row(offline.Model):
        day = peewee.DateField(choices=[(dt.date(2020, 1, 1), "first")], null=null)
        ip = peewee.IPField(unique=True)
        colour = EnumField(Colour, choices=[(Colour.RED, "Red")])

    for made in (schema(Row), create_schema(Row), patch_schema(Row)):
        properties = made.model_json_schema()["properties"]
        assert properties["day"]["enum"] == [day.isoformat(), *([None] if null else [])]
        assert properties["day"]["description"] == "Choices: 2020-01-01 = first"
        assert properties["colour"]["description"] == "Choices: 'r' = Red"
        assert "enum" not in properties["colour"]
    properties = create_schema(Row).model_json_schema()["properties"]
    assert (properties["ip"]["format"], properties["ip"]["x-unique"]) == ("ipv4", True)


def accounts(db: Database) -> tuple[FastAPI, Any]:
    class Account(db.Model):
        email = peewee.CharField(unique=True, max_length=20)
        nickname = peewee.CharField(null=True, max_length=5)
        points = peewee.SmallIntegerField(default=7)
        level = peewee.IntegerField(constraints=[peewee.SQL("DEFAULT 3")])
        avatar = peewee.BlobField(default=b"")

    app = make_app(db, PeeweeRoute)
    out = schema(Account)
    incoming: Any = create_schema(Account)
    changes: Any = patch_schema(Account)

    @app.post("/accounts/", response_model=out)
    def create(account: incoming) -> Any:
        return Account.get_by_id(Account.create(**account.model_dump()))

    @app.patch("/accounts/{key}", response_model=out)
    def change(key: int, account: changes) -> Any:
        found = Account.get_by_id(key)
        for name, value in account.model_dump().items():
            setattr(found, name, value)
        found.save()
        return found

    @app.get("/accounts/", response_model=list[out])  # type: ignore[valid-type]
    def read() -> Any:
        return Account.select().order_by(Account.id)

    return app, Account


async def test_create_patch_and_read_over_http(db: Database) -> None:
    """Defaults of both kinds, base64, unset and null, conflicts: on each database."""
    app, model = accounts(db)
    await db.acreate_tables([model])
    async with client(app) as http:
        answer = await http.post("/accounts/", json={"email": "a", "avatar": "__8="})
        account = {
            "id": 1,
            "email": "a",
            "nickname": None,
            "points": 7,
            "level": 3,
            "avatar": "__8=",
        }
        assert (answer.status_code, answer.json()) == (200, account)
        answer = await http.patch("/accounts/1", json={"nickname": "Ada"})
        assert answer.json() == {**account, "nickname": "Ada"}
        answer = await http.patch("/accounts/1", json={"nickname": None, "level": 4})
        assert answer.json() == {**account, "level": 4}
        assert (await http.patch("/accounts/1", json={})).json() == {**account, "level": 4}
        assert (await http.post("/accounts/", json={"email": "a"})).status_code == 409
        assert (await http.get("/accounts/")).json() == [{**account, "level": 4}]


@pytest.mark.parametrize(
    "body",
    [
        {"email": "a\0"},
        {"email": "\ud800"},
        {"email": "a" * 21},
        {"email": "a", "points": 2**15},
        {"email": "a", "points": None},
        {"email": "a", "level": None},
        {"email": "a", "level": 2**31},
        {"email": "a", "avatar": "?"},
        {"email": "a", "id": 5},
        {"email": None},
        {},
        [],
    ],
    ids=repr,
)
async def test_a_value_that_cannot_be_stored_is_answered_with_422(
    db: Database, body: dict[str, Any]
) -> None:
    app, model = accounts(db)
    await db.acreate_tables([model])
    async with client(app) as http:
        answer = await http.post("/accounts/", content=json.dumps(body))
        assert answer.status_code == 422


def test_openapi_has_the_schemas_under_their_names() -> None:
    """What comes in and what goes out of one model are three components."""
    app, _ = accounts(connect("sqlite:///:memory:"))
    components = app.openapi()["components"]["schemas"]
    assert {"Account", "AccountCreate", "AccountPatch"} <= components.keys()
    assert components["AccountCreate"]["required"] == ["email"]
    assert "required" not in components["AccountPatch"]
    assert components["AccountPatch"]["properties"]["nickname"]["anyOf"][0]["maxLength"] == 5
    assert components["AccountPatch"]["properties"]["points"]["minimum"] == -(2**15)
    assert components["Account"]["required"] == [*components["Account"]["properties"]]
