"""Random schemas, queries and rows, and the answer that Pydantic gives for fully loaded instances.

`Family` is a set of models with every class of field, made once for a database. A `Case` is a
response type, a query and rows; its rows are written in a transaction that is rolled back. The
reference loads one relation of one instance at a time and knows nothing of the library's plans.
"""

import asyncio
import datetime
import decimal
import enum
import ipaddress
import json
import math
import struct
import sys
import types
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import peewee
import pydantic
from hypothesis import strategies as st
from peewee import JOIN, fn
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticSerializationError

from fastapi_peewee import connect, depth
from fastapi_peewee.loading import Plans
from fastapi_peewee.plans import InstancePlan, RowPlan, Texts, plan

#: Where classes of Pydantic's that name each other find each other.
MADE = types.ModuleType("tests.fidelity_made")
sys.modules[MADE.__name__] = MADE

Draw = Callable[[st.SearchStrategy[Any]], Any]

UTC = datetime.UTC
TEXTS = [
    "",
    " ",
    "a",
    "ü",
    "日本",
    'say "hi"',
    "it's",
    "back\\slash",
    "\\u0041",
    "100%",
    "%s %(x)s ?",
    "tab\tline\nreturn\r",
    "\x01\x1f\x7f",
    "\u2028\u2029",
    "😀",
    "</script>",
    "null",
    "[1]",
    " padded ",
]


@dataclass(frozen=True)
class Way:
    """One type that a schema may give to a column; `values`: what then is in the column."""

    type: Any
    values: st.SearchStrategy[Any] | None = None


@dataclass(frozen=True)
class Kind:
    """One class of field.

    Attributes:
        make: makes the field, given `null`, `column_name`, …
        values: what is written.
        ways: the types in schemas; the first is the usual one.
        on: the databases that have it.
        sortable: whether every database orders its values, and finds equal ones.
    """

    name: str
    make: Callable[..., Any]
    values: st.SearchStrategy[Any]
    ways: tuple[Way, ...]
    on: tuple[str, ...] = ("sqlite", "postgres", "mysql")
    sortable: bool = True


@contextmanager
def connection(url: str) -> Iterator[Any]:
    """A database, and a connection to it for synchronous code."""
    db = connect(url)
    with db.connection_context():
        yield db
    asyncio.run(db.close_pool(grace=0))


class Colour(enum.StrEnum):
    RED = "red"
    NONE = ""


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 100


class UpperField(peewee.CharField):
    """Changes what it reads."""

    def python_value(self, value: Any) -> Any:
        return value if value is None else super().python_value(value).upper()


class PointField(peewee.TextField):
    """Reads and writes a pair."""

    def db_value(self, value: Any) -> Any:
        return value if value is None else "{};{}".format(*value)

    def python_value(self, value: Any) -> Any:
        return value if value is None else tuple(map(int, value.split(";")))


class PlainSubclass(peewee.IntegerField):
    """Changes nothing, but how should one know."""


def _naive(*parts: int) -> datetime.datetime:
    return datetime.datetime(*parts)  # type: ignore[arg-type]  # noqa: DTZ001


def _integers(low: int, high: int) -> st.SearchStrategy[int]:
    edges = [value for value in (0, 1, -1, 7, low, high) if low <= value <= high]
    return st.sampled_from(edges) | st.integers(low, high)


def _texts(longest: int, nul: bool = False) -> st.SearchStrategy[str]:
    characters = st.characters(codec="utf-8", exclude_characters="" if nul else "\0")
    return st.sampled_from([text for text in TEXTS if len(text) <= longest]) | st.text(
        characters, max_size=longest
    )


_DATETIMES = st.sampled_from(
    [
        _naive(2024, 2, 29, 12, 30),
        _naive(1, 1, 1),
        _naive(9999, 12, 31, 23, 59, 59),
        _naive(9998, 12, 31, 23, 59, 59, 999999),  # MySQL rounds up
        _naive(1999, 12, 31, 0, 0, 0, 120000),
        _naive(2000, 1, 1, 0, 0, 1, 7),
    ]
) | st.datetimes(max_value=_naive(9999, 12, 31, 23, 59, 59))
_SECONDS = st.sampled_from([0, -1, 1_700_000_000, 253_402_214_400, -62_135_510_400]) | st.integers(
    -62_135_510_400, 253_402_214_400
)
_ZONES = st.sampled_from(
    [UTC, datetime.timezone(datetime.timedelta(hours=5, minutes=30))]
    + [datetime.timezone(datetime.timedelta(hours=-h)) for h in (3, 12)]
)
_AWARE = st.builds(
    lambda value, zone: value.replace(tzinfo=zone),
    st.datetimes(_naive(2, 1, 1), _naive(9998, 12, 30)),
    _ZONES,
)
_FLOATS = st.sampled_from(
    [0.0, -0.0, 1.0, 0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 1e16, 123456789.123, 2.0**53]
) | st.floats(allow_nan=False, allow_infinity=False)
_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(-1e15, 1e15).filter(lambda value: value == 0 or abs(value) > 1e-5)
    | _texts(6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts(4), inner, max_size=3),
    max_leaves=5,
) | st.sampled_from([{}, [], {"a": {"b": [1, None, 'ü\\"']}}, "text", 0, False, None])
#: Those whose values include None, which is written as NULL.
_MAY_BE_NULL = ("document", "encoded", "ext_json")


def _numbers(digits: int, places: int) -> st.SearchStrategy[Any]:
    most = decimal.Decimal(10) ** (digits - places) - 1
    return st.sampled_from(
        [decimal.Decimal(text) for text in ("0", "1", "-1.5", "0.0001", "100", "-0")]
    ) | st.decimals(-most, most, places=places, allow_nan=False)


KINDS = [
    Kind(
        "int",
        peewee.IntegerField,
        _integers(-(2**31), 2**31 - 1),
        (
            Way(int),
            Way(float),
            Way(Any),
            Way(Annotated[int, Field(ge=-10, lt=1000)], _integers(-10, 999)),
            Way(Literal[1, 2], st.sampled_from([1, 2])),
            Way(Level, st.sampled_from([1, 100])),
            Way(bool, st.sampled_from([0, 1])),
            Way(decimal.Decimal),
            Way(datetime.timedelta, st.integers(0, 1000)),
            Way(int | str),
            Way(Annotated[int, Field(strict=True)]),
            Way(Annotated[int, pydantic.AfterValidator(lambda value: value // 2)]),
            Way(Annotated[int, pydantic.PlainSerializer(lambda value: f"<{value}>")]),
            Way(pydantic.PositiveInt, st.integers(1, 9)),
        ),
    ),
    Kind("big", peewee.BigIntegerField, _integers(-(2**63), 2**63 - 1), (Way(int), Way(Any))),
    Kind("small", peewee.SmallIntegerField, _integers(-(2**15), 2**15 - 1), (Way(int),)),
    Kind("bit", peewee.BitField, _integers(0, 2**63 - 1), (Way(int), Way(Any))),
    Kind("sub", PlainSubclass, _integers(-9, 9), (Way(int),)),
    Kind(
        "float",
        peewee.FloatField,
        _FLOATS.filter(lambda value: abs(value) < 3e38 and (value == 0 or abs(value) > 2e-38)),
        (Way(float), Way(Any), Way(int, st.sampled_from([0.0, 1.0, -3.0])), Way(str | float)),
        sortable=False,
    ),
    Kind(
        "double",
        peewee.DoubleField,
        _FLOATS,
        (Way(float), Way(Annotated[float, Field(ge=0)], _FLOATS.map(abs)), Way(Any)),
    ),
    Kind(
        "limitless",
        peewee.DoubleField,
        _FLOATS | st.sampled_from([math.inf, -math.inf]),
        (Way(float), Way(pydantic.FiniteFloat), Way(Any)),
        on=("sqlite", "postgres"),
    ),
    Kind(
        "money",
        lambda **options: peewee.DecimalField(12, 4, **options),
        _numbers(12, 4),
        (
            Way(decimal.Decimal),
            Way(float),
            Way(str | decimal.Decimal),
            Way(Annotated[decimal.Decimal, Field(max_digits=12, decimal_places=4)]),
        ),
    ),
    Kind(
        "fine",
        lambda **options: peewee.DecimalField(20, 9, **options),
        _numbers(20, 9),
        (Way(decimal.Decimal),),
    ),
    Kind(
        "char",
        lambda **options: peewee.CharField(40, **options),
        _texts(40),
        (
            Way(str),
            Way(Any),
            Way(Annotated[str, Field(max_length=40)]),
            Way(Annotated[str, Field(max_length=3)], _texts(3)),
            Way(Annotated[str, Field(min_length=1)], _texts(40).filter(bool)),
            Way(Annotated[str, Field(pattern=r"^\d+$")], st.sampled_from(["1", "22"])),
            Way(Annotated[str, pydantic.StringConstraints(strip_whitespace=True)]),
            Way(Literal["red", ""], st.sampled_from(["red", ""])),
            Way(Colour, st.sampled_from(["red", ""])),
            Way(int, st.sampled_from(["1", "-2"])),
            Way(bytes),
            Way(pydantic.SecretStr),
            Way(datetime.date, st.just("2024-02-29")),
            Way(pydantic.AnyUrl, st.just("http://example.com")),
            Way(pydantic.Json, st.just("[1, 2]")),
        ),
    ),
    Kind(
        "fixed",
        lambda **options: peewee.FixedCharField(8, **options),
        _texts(8),
        (Way(str), Way(Any)),
    ),
    Kind("nul", peewee.TextField, _texts(9, nul=True), (Way(str),), on=("sqlite", "mysql")),
    Kind("text", peewee.TextField, _texts(60), (Way(str), Way(Any), Way(str | int))),
    Kind(
        "bool",
        peewee.BooleanField,
        st.booleans(),
        (Way(bool), Way(int), Way(Any), Way(Literal[True], st.just(True))),
    ),
    Kind(
        "date",
        peewee.DateField,
        st.sampled_from([datetime.date(1, 1, 1), datetime.date(9999, 12, 31)]) | st.dates(),
        (Way(datetime.date), Way(Any), Way(datetime.datetime), Way(datetime.date | str)),
    ),
    Kind(
        "time",
        peewee.TimeField,
        st.sampled_from([datetime.time(0), datetime.time(23, 59, 59, 999999)]) | st.times(),
        (Way(datetime.time), Way(Any)),
    ),
    Kind(
        "datetime",
        peewee.DateTimeField,
        _DATETIMES,
        (
            Way(datetime.datetime),
            Way(Any),
            Way(datetime.date, st.just(_naive(2024, 1, 1))),
            Way(pydantic.NaiveDatetime),
            Way(pydantic.PastDatetime, st.just(_naive(2024, 1, 1))),
        ),
    ),
    Kind(
        "aware",
        peewee.DateTimeField,
        _AWARE,
        (Way(datetime.datetime), Way(pydantic.AwareDatetime), Way(Any)),
        on=("sqlite",),
        sortable=False,
    ),
    Kind(
        "late",
        peewee.TimeField,
        st.times(timezones=_ZONES),
        (Way(datetime.time),),
        on=("sqlite",),
        sortable=False,
    ),
    Kind(
        "stamp",
        lambda **options: peewee.TimestampField(utc=True, **options),
        _SECONDS,
        (Way(datetime.datetime), Way(Any)),
    ),
    Kind(
        "millis",
        lambda **options: peewee.TimestampField(utc=True, resolution=1000, **options),
        st.integers(0, 10**9),
        (Way(datetime.datetime),),
    ),
    Kind("local", peewee.TimestampField, st.integers(86_400, 2 * 10**9), (Way(datetime.datetime),)),
    Kind("uuid", peewee.UUIDField, st.uuids(), (Way(uuid.UUID), Way(pydantic.UUID4), Way(Any))),
    Kind("raw_uuid", peewee.BinaryUUIDField, st.uuids(), (Way(uuid.UUID), Way(Any))),
    Kind(
        "ip",
        peewee.IPField,
        st.sampled_from(["0.0.0.0", "255.255.255.255", "10.0.0.1"]) | st.ip_addresses(v=4).map(str),
        (Way(str), Way(ipaddress.IPv4Address), Way(Any)),
    ),
    Kind(
        "document",
        peewee.JSONField,
        _JSON,
        (
            Way(Any),
            Way(dict[str, Any], st.dictionaries(_texts(4), _JSON, max_size=2)),
            Way(list[Any], st.lists(_JSON, max_size=2)),
            Way(dict[str, int], st.dictionaries(_texts(4), st.integers(-9, 9), max_size=2)),
        ),
        sortable=False,
    ),
    Kind(
        "encoded",
        lambda **options: peewee.JSONField(dumps=lambda value: json.dumps([value]), **options),
        _JSON,
        (Way(Any),),
        sortable=False,
    ),
    Kind(
        "blob",
        peewee.BlobField,
        st.sampled_from([b"", b"text", b'"\\']) | _texts(5).map(str.encode),
        (Way(bytes), Way(Any)),
        sortable=False,
    ),
    Kind(
        "upper",
        lambda **options: UpperField(40, **options),
        st.text("abü", max_size=5),
        (Way(str), Way(Annotated[str, Field(max_length=50)])),
    ),
    Kind(
        "point",
        PointField,
        st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
        (Way(tuple[int, int]), Way(list[int])),
        sortable=False,
    ),
]


def _extensions(dialect: str) -> list[Kind]:
    """The kinds of one database's extension, which is imported only for it."""
    made: list[tuple[str, Callable[..., Any], st.SearchStrategy[Any], tuple[Way, ...]]] = []
    if dialect == "sqlite":
        from playhouse import sqlite_ext

        made = [
            ("ext_json", sqlite_ext.JSONField, _JSON, (Way(Any), Way(dict[str, Any] | Any))),
            ("text_decimal", sqlite_ext.TDecimalField, _numbers(12, 4), (Way(decimal.Decimal),)),
            ("iso", sqlite_ext.ISODateTimeField, _DATETIMES, (Way(datetime.datetime),)),
        ]
    elif dialect == "postgres":
        from playhouse import postgres_ext

        made = [
            ("plain_json", postgres_ext.JSONField, _JSON, (Way(Any), Way(dict[str, Any] | Any))),
            ("binary_json", postgres_ext.BinaryJSONField, _JSON, (Way(Any),)),
            ("zoned", postgres_ext.DateTimeTZField, _AWARE, (Way(datetime.datetime), Way(Any))),
            (
                "numbers",
                postgres_ext.ArrayField,
                st.lists(st.integers(-9, 9), max_size=3),
                (Way(list[int]), Way(Any)),
            ),
            (
                "span",
                postgres_ext.IntervalField,
                st.timedeltas(datetime.timedelta(-9), datetime.timedelta(9)),
                (Way(datetime.timedelta), Way(Any)),
            ),
        ]
    else:
        from playhouse import mysql_ext

        made = [("ext_json", mysql_ext.MySQLJSONField, _JSON, (Way(Any), Way(list[Any] | Any)))]
    return [Kind(name, make, values, ways, (dialect,), False) for name, make, values, ways in made]


def kinds_of(dialect: str) -> list[Kind]:
    return [kind for kind in KINDS if dialect in kind.on] + _extensions(dialect)


#: What SQLite's columns may hold beside what Peewee writes, and Peewee can read.
STRANGE_ROWS = 8  # per cent of the cases
STRANGE: dict[str, list[Any]] = {
    "int": [1.5, "12", "abc", -0.0, b"1"],
    "small": [1e300],
    "float": ["abc", 3, b"x"],
    "char": [b"bytes", b"\xc3\xbc", b"", b"\x17abc", 12, 1.5],
    "text": [b"bytes"],
    "fixed": ["  both  ", "\ttab\t", "much too long a text"],
    "bool": [2, "", "f", "0", 0.5, b""],
    "date": ["2024-01-01 10:00:00", "20240101", "2024-01-01T10:00:00.123456", ""],
    "time": ["10:00", "10:00:00.5", "2024-01-01 10:00:00", "10:00:00.123"],
    "datetime": [
        "2024-01-01 10:00",
        "2024-01-01T10:00:00Z",
        "2024-01-01 10:00:00.123",
        "2024-01-01",
        "2024-01-01 10:00:00.123456+05:30",
        1_700_000_000,
        1.5,
    ],
    "stamp": [1.5, "2024-01-01 10:00:00"],
    "uuid": ["6C3A50E8-CE5A-45B9-81E9-7F66DED77F2B", "{6c3a50e8ce5a45b981e97f66ded77f2b}"],
    "document": ["not json", "NaN", "[1,]", "[Infinity]", "[" * 20_000 + "]" * 20_000, 1.5, b"[1]"],
}

#: Columns whose names in the database aren't those of the attributes.
COLUMN_NAMES = {"text": 'te"xt', "int": "int `1`", "date": "select", "bool": "it's", "char": "Öl"}


@dataclass(frozen=True)
class Link:
    """A relation, as a schema may ask for it."""

    name: str
    other: str
    many: bool
    fk: str  # of this model (one row), of the other one or of the link table (many)
    through: str | None = None
    through_fk: str = ""


class Family:
    """Models with every class of field and of relation, on one database.

    Attributes:
        roots: the models that are queried, some more often.
        counted: those that have items to count.
        required: the columns that must have a value.
    """

    roots: tuple[str, ...] = ("wide", "item", "wide", "kind", "slot", "pair", "tag", "bare")
    counted: tuple[str, ...] = ("wide", "item", "kind", "slot")
    required: frozenset[tuple[str, str]] = frozenset()

    def __init__(self, db: Any, dialect: str) -> None:
        self.db = db
        self.dialect = dialect
        self.kinds = kinds = {kind.name: kind for kind in kinds_of(dialect)}

        class Base(db.Model):
            pass

        def columns(*names: str) -> dict[str, Any]:
            return {
                name: kinds[name].make(null=True, column_name=COLUMN_NAMES.get(name))
                for name in names
            }

        def model(name: str, fields: dict[str, Any], **meta: Any) -> Any:
            body: dict[str, Any] = dict(fields)
            if meta:
                body["Meta"] = type("Meta", (), meta)
            return type(name, (Base,), body)

        kind = model(
            "Kind",
            {"code": peewee.CharField(20, primary_key=True), **columns("text", "int", "double")},
        )
        slot = model(
            "Slot",
            {
                "label": peewee.CharField(20, unique=True),
                "serial": peewee.UUIDField(unique=True, null=True),
                **columns("char", "datetime"),
            },
            table_name="a slot's `",
        )
        wide = model(
            "Wide",
            {
                **columns(*kinds),
                "kind": peewee.ForeignKeyField(
                    kind, backref="wides", null=True, object_id_name="kind_key"
                ),
                "slot": peewee.ForeignKeyField(slot, field="label", null=True, backref="wides"),
                "parent": peewee.ForeignKeyField("self", null=True, backref="children"),
                "twin": peewee.ForeignKeyField(
                    "self", null=True, backref="twins", column_name="twin_ref"
                ),
            },
        )
        item = model(
            "Item",
            {
                "id": peewee.BigAutoField(),
                **columns("char", "int", "date", "float", "bool", "document"),
                "owner": peewee.ForeignKeyField(wide, backref="items"),
                "checker": peewee.ForeignKeyField(wide, backref="checked", null=True),
                "slot": peewee.ForeignKeyField(slot, field="serial", null=True, backref="items"),
                "lazy": peewee.ForeignKeyField(
                    kind, null=True, lazy_load=False, backref="lazy_items"
                ),
            },
        )
        pair = model(
            "Pair",
            {
                "wide": peewee.ForeignKeyField(wide, backref="pairs"),
                "number": peewee.IntegerField(),
                **columns("text", "money"),
            },
            primary_key=peewee.CompositeKey("wide", "number"),
        )
        bare = model(
            "Bare",
            {**columns("int", "text"), "wide": peewee.ForeignKeyField(wide, backref="bares")},
            primary_key=False,
        )
        tag = model(
            "Tag",
            {
                "key": peewee.UUIDField(primary_key=True),
                **columns("text", "int"),
                "wides": peewee.ManyToManyField(wide, backref="tags"),
            },
        )
        link = tag.wides.get_through_model()
        self.models = {
            "kind": kind,
            "slot": slot,
            "wide": wide,
            "item": item,
            "pair": pair,
            "bare": bare,
            "tag": tag,
            "link": link,
        }
        self.links: dict[str, list[Link]] = {
            "kind": [Link("wides", "wide", True, "kind"), Link("lazy_items", "item", True, "lazy")],
            "slot": [Link("wides", "wide", True, "slot"), Link("items", "item", True, "slot")],
            "wide": [
                Link("kind", "kind", False, "kind"),
                Link("slot", "slot", False, "slot"),
                Link("parent", "wide", False, "parent"),
                Link("twin", "wide", False, "twin"),
                Link("children", "wide", True, "parent"),
                Link("twins", "wide", True, "twin"),
                Link("items", "item", True, "owner"),
                Link("checked", "item", True, "checker"),
                Link("pairs", "pair", True, "wide"),
                Link("bares", "bare", True, "wide"),
                Link("tags", "tag", True, "wide", "link", "tag"),
            ],
            "item": [
                Link("owner", "wide", False, "owner"),
                Link("checker", "wide", False, "checker"),
                Link("slot", "slot", False, "slot"),
            ],
            "pair": [Link("wide", "wide", False, "wide")],
            "bare": [Link("wide", "wide", False, "wide")],
            "tag": [Link("wides", "wide", True, "tag", "link", "wide")],
        }

    def kind(self, model: str, name: str) -> Kind | None:
        found = self.models[model]._meta.fields.get(name)
        return None if found is None or found.primary_key else self.kinds.get(name)

    def rows(self, maker: "Maker") -> dict[str, list[dict[str, Any]]]:
        """Rows of all models, with values in those columns that the case uses."""
        draw = maker.draw
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self.models}

        def some(name: str, most: int, **given: Callable[[int], Any]) -> None:
            for i in range(1, draw(st.integers(0, most)) + 1):
                row = {key: make(i) for key, make in given.items()}
                rows[name].append(row | maker.values(name))

        def one_of(name: str, key: str, rest: int = 30) -> Any:
            found = [row[key] for row in rows[name] if row[key] is not None]
            return None if not found or maker.rarely(rest) else maker.pick(found)

        codes = ["", "a", "Zoë", "it's %"]
        some("kind", 3, code=lambda i: codes[i])
        some(
            "slot",
            3,
            id=lambda i: 10 * i,
            label=lambda i: codes[i],
            serial=lambda i: None if maker.rarely(20) else uuid.UUID(int=i << 100),
        )
        some(
            "wide",
            4,
            id=lambda i: i,
            kind=lambda i: one_of("kind", "code"),
            slot=lambda i: one_of("slot", "label"),
            parent=lambda i: draw(st.integers(1, i - 1)) if i > 1 and maker.rarely(70) else None,
            twin=lambda i: draw(st.integers(1, i)) if maker.rarely(70) else None,
        )
        if rows["wide"]:
            some(
                "item",
                5,
                id=lambda i: 2**40 - i,
                owner=lambda i: one_of("wide", "id", 0),
                checker=lambda i: one_of("wide", "id"),
                slot=lambda i: one_of("slot", "serial"),
                lazy=lambda i: one_of("kind", "code"),
            )
            some("pair", 3, wide=lambda i: one_of("wide", "id", 0), number=lambda i: -i)
            some("bare", 2, wide=lambda i: one_of("wide", "id", 0))
        some("tag", 3, key=lambda i: uuid.UUID(int=(9 - i) << 100))
        for tag in rows["tag"]:
            for wide in rows["wide"]:
                if maker.rarely(50):
                    rows["link"].append({"tag": tag["key"], "wide": wide["id"]})
        return rows

    @property
    def tables(self) -> list[Any]:
        return list(self.models.values())


class DrawnFamily(Family):
    """Up to four models, drawn: their keys, columns, foreign keys and names."""

    counted = ()

    def __init__(self, db: Any, draw: Draw) -> None:
        self.db = db
        self.dialect = "sqlite"
        self.kinds = {kind.name: kind for kind in kinds_of("sqlite")}
        self.models = {}
        self.links = {}
        self._keys: dict[str, list[tuple[Any, str]]] = {}
        required = set()
        for number in range(1, draw(st.integers(1, 4)) + 1):
            name = f"m{number}"
            names = st.lists(st.sampled_from(sorted(self.kinds)), min_size=1, max_size=4)
            fields: dict[str, Any] = {}
            for kind in dict.fromkeys(draw(names)):
                null = kind in _MAY_BE_NULL or draw(st.booleans())
                if not null:
                    required.add((name, kind))
                column = draw(st.sampled_from([None, f"{kind} col", f"{kind}%", f'"{kind}?', "ü"]))
                taken = {field.column_name for field in fields.values()}
                fields[kind] = self.kinds[kind].make(
                    null=null, column_name=None if column in taken else column
                )
            self._draw_model(name, fields, draw)
        self.roots = tuple(self.models)
        self.required = frozenset(required)

    def _draw_model(self, name: str, fields: dict[str, Any], draw: Draw) -> None:
        meta: dict[str, Any] = {"database": self.db, "table_name": f"table {name}"}
        key = draw(st.sampled_from(["auto", "named", "text", "uuid", "composite", "none"]))
        if key == "named":
            fields["pk"] = peewee.BigAutoField(column_name="the key")
        elif key == "text":
            fields["pk"] = peewee.CharField(20, primary_key=True)
        elif key == "uuid":
            fields["pk"] = peewee.UUIDField(primary_key=True)
        elif key == "composite":
            fields["one"], fields["two"] = peewee.IntegerField(), peewee.CharField(9)
            meta["primary_key"] = peewee.CompositeKey("one", "two")
        elif key == "none":
            meta["primary_key"] = False
        fields["other_key"] = peewee.CharField(20, unique=True)
        targets = [each for each in self.models if draw(st.booleans())]
        if key not in ("composite", "none") and draw(st.booleans()):
            targets.append("self")
        self.links[name] = []
        made: list[tuple[str, str, str]] = []
        for number, target in enumerate(targets):
            other = name if target == "self" else target
            fk = f"fk{number}"
            unique = target == "self" or draw(st.booleans()) or not self._single(other)
            backref = draw(st.sampled_from([f"{name}_{fk}s", f"{name}_{fk}s", "+"]))
            fields[fk] = peewee.ForeignKeyField(
                "self" if target == "self" else self.models[other],
                field="other_key" if unique and target != "self" else None,
                null=True,
                backref=backref,
                object_id_name=draw(st.sampled_from([None, f"{fk}_value"])),
                column_name=draw(st.sampled_from([None, f"{fk} %s"])),
            )
            made.append((fk, other, backref))
        self.models[name] = type(name, (peewee.Model,), {**fields, "Meta": type("Meta", (), meta)})
        for fk, other, backref in made:
            self.links[name].append(Link(fk, other, False, fk))
            if backref != "+":
                self.links[other].append(Link(backref, name, True, fk))

    def _single(self, name: str) -> bool:
        key = self.models[name]._meta.primary_key
        return bool(key) and not isinstance(key, peewee.CompositeKey)

    def rows(self, maker: "Maker") -> dict[str, list[dict[str, Any]]]:
        rows: dict[str, list[dict[str, Any]]] = {}
        for name, model in self.models.items():
            rows[name] = []
            for number in range(1, maker.draw(st.integers(0, 4)) + 1):
                row: dict[str, Any] = {"other_key": f"it's {number}"}
                for key in _keys(model):
                    if isinstance(key, peewee.UUIDField):
                        row[key.name] = uuid.UUID(int=9 - number)
                    elif isinstance(key, peewee.CharField):
                        row[key.name] = f"k{number}"
                    else:
                        row[key.name] = 9 - number
                for fk in model._meta.refs:
                    known = rows[next(n for n, m in self.models.items() if m is fk.rel_model)]
                    values = [each[fk.rel_field.name] for each in known]
                    row[fk.name] = maker.pick([None, *values])
                rows[name].append(row | maker.values(name))
        return rows


@dataclass
class Spec:
    """What the test knows of a schema that it made.

    Attributes:
        relations: each with the schema of its rows, the query that chooses them, and the depth that
            is stated: with one, the schema may be one of those around this one, or this one.
    """

    model: str
    type: Any
    relations: list[tuple[Link, "Spec", Any, Any]] = field(default_factory=list)


@dataclass
class Case:
    """A response type, a query, and rows.

    Attributes:
        query: as an endpoint would return it.
        full: the same rows, every column of the model.
        ordered: whether the query says the order of its rows.
        rows: by the model's name.
    """

    spec: Spec
    type: Any
    query: Any
    full: Any
    ordered: bool
    by_alias: bool
    rows: dict[str, list[dict[str, Any]]]


class Maker:
    """Draws one case."""

    def __init__(self, family: Family, draw: Draw) -> None:
        self.family = family
        self.draw = draw
        self.used: dict[tuple[str, str], st.SearchStrategy[Any]] = {}
        self.without_null = set(family.required)
        for place in family.required:
            self.used[place] = self._values(*place)
        self.strange = family.dialect == "sqlite" and self.rarely(STRANGE_ROWS)
        self._classes = 0
        self._around: list[tuple[str, Spec]] = []
        self._circles = 0
        for made in _made():
            delattr(MADE, made.__name__)

    def values(self, name: str) -> dict[str, Any]:
        """A row's values in the columns that are used."""
        row: dict[str, Any] = {}
        for (model, column), values in self.used.items():
            if model != name:
                continue
            if (model, column) not in self.without_null and self.rarely(25):
                row[column] = None
            elif self.strange and column in STRANGE and self.rarely(40):
                row[column] = peewee.Value(self.pick(STRANGE[column]), converter=False)
            else:
                row[column] = self.draw(values)
        return row

    def rarely(self, percent: int) -> bool:
        """Shrinks to False."""
        return bool(self.draw(st.integers(0, 99)) >= 100 - percent)

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def case(self) -> Case:
        name = self.pick(self.family.roots)
        count = name in self.family.counted and self.rarely(12)
        spec = self.schema(name, self.draw(st.integers(0, 3)), count)
        single = self.rarely(12)
        query, full, ordered = self.query(name, spec, count, single)
        type_: Any = spec.type
        if not (single and ordered):  # which row is the first one is for the query to say
            type_ = list[spec.type]
        elif self.rarely(60):
            type_ = spec.type | None
        rows = self.family.rows(self)
        return Case(spec, type_, query, full, ordered, not self.rarely(15), rows)

    # Schemas.

    def schema(self, model: str, levels: int, count: bool = False) -> Spec:
        peewee_model = self.family.models[model]
        self._classes += 1
        class_name = f"{peewee_model.__name__}Out{self._classes}"
        spec = Spec(model, None)
        self._around.append((class_name, spec))
        fields: dict[str, Any] = {}
        names = [name for name in peewee_model._meta.fields if self.family.kind(model, name)]
        chosen = self.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
        keys = [each.name for each in peewee_model._meta.get_primary_keys()]
        mode = self.pick(["plain"] * 5 + ["camel", "alias", "serialization", "validation"])
        config: dict[str, Any] = {"from_attributes": True}
        if mode == "camel":
            config |= {"alias_generator": to_camel, "populate_by_name": True}
        elif mode == "alias":
            config["populate_by_name"] = True
        for name in chosen:
            self._column(fields, model, name, mode)
        for key in keys:
            found = peewee_model._meta.fields[key]
            if not isinstance(found, peewee.ForeignKeyField) and not self.rarely(20):
                fields[key] = (_key_type(found), self._info(key, mode))
        for found in peewee_model._meta.sorted_fields:
            if isinstance(found, peewee.ForeignKeyField) and self.rarely(10):
                type_ = _key_type(found.rel_field)
                fields[found.object_id_name] = (
                    type_ | None if found.null else type_,
                    self._info(found.object_id_name, mode),
                )
        if "lazy" in peewee_model._meta.fields and self.rarely(8):
            fields["lazy"] = (str | None, Field())
        if count:
            fields["total"] = (self.pick([int, int, int, float, Any, int | None]), Field())
        if levels and self.family.links[model]:
            links = self.family.links[model]
            some = st.lists(st.sampled_from(links), max_size=2, unique_by=lambda link: link.name)
            for link in self.draw(some):
                self._relation(spec, fields, link, levels, mode)
        if self._circles < 2 and self.rarely(12):
            self._circle(spec, fields, mode)
        extra = self._extras(fields, config) if self.rarely(15) else {}
        items = list(fields.items())
        if self.rarely(20):
            items.reverse()
        spec.type = pydantic.create_model(
            class_name,
            __config__=ConfigDict(**config),  # type: ignore[typeddict-item]
            __validators__=extra,
            __module__=MADE.__name__,
            **dict(items),
        )
        setattr(MADE, class_name, spec.type)
        self._around.pop()
        if not self._around and self._circles:
            for made in _made():
                made.model_rebuild()
        return spec

    def _column(self, fields: dict[str, Any], model: str, name: str, mode: str) -> None:
        kind = self.family.kind(model, name)
        assert kind is not None
        way = kind.ways[0]
        place = (model, name)
        if len(kind.ways) > 1 and self.rarely(12):
            way = self.pick(kind.ways[1:])
        if (place in self.used or place in self.without_null) and way.values is not None:
            way = kind.ways[0]
        self.used.setdefault(place, way.values if way.values is not None else kind.values)
        type_ = way.type
        if place not in self.without_null:
            if self.rarely(25):
                self.without_null.add(place)
            else:
                type_ = type_ | None
        info = self._info(name, mode)
        if self.rarely(3):
            info = Field(exclude=True)
        elif self.rarely(3) and mode == "plain":
            info = Field(default=None)
        fields[name if mode != "validation" else f"{name}_"] = (type_, info)

    def _info(self, name: str, mode: str) -> Any:
        if mode == "alias":
            return Field(alias=f"{name} ü\"'%s")
        if mode == "serialization":
            return Field(serialization_alias=f"@{name}")
        if mode == "validation":
            if self.rarely(10):
                return Field(validation_alias=pydantic.AliasChoices("nothing", name))
            return Field(validation_alias=name)
        return Field()

    def _relation(
        self, spec: Spec, fields: dict[str, Any], link: Link, levels: int, mode: str
    ) -> None:
        below = self.schema(link.other, levels - 1)
        query = None
        type_: Any = below.type
        if link.many:
            type_ = list[below.type]
            if self.rarely(5):
                type_ = type_ | None
            if self.rarely(35):
                query = self._relation_query(link)
                type_ = Annotated[type_, query]
        elif self.family.models[spec.model]._meta.fields[link.fk].null:
            type_ = type_ | None
        fields[link.name if mode != "validation" else f"{link.name}_"] = (
            type_,
            self._info(link.name, mode),
        )
        spec.relations.append((link, below, query, None))

    def _circle(self, spec: Spec, fields: dict[str, Any], mode: str) -> None:
        """A relation to rows of this class, or of one around it, to a stated depth."""
        taken = {link.name for link, *_ in spec.relations}
        ways = [
            (link, name, above)
            for link in self.family.links[spec.model]
            for name, above in self._around
            if link.other == above.model and link.name not in taken
        ]
        if not ways:
            return
        link, name, above = self.pick(ways)
        stated = depth(1 if self._circles else self.pick([1, 1, 2, 2, 3]))  # they multiply
        self._circles += 1
        query = self._relation_query(link) if link.many and self.rarely(35) else None
        type_: Any = f"list[{name}]" if link.many else f"{name} | None"
        type_ = Annotated[type_, query, stated] if query is not None else Annotated[type_, stated]
        fields[link.name if mode != "validation" else f"{link.name}_"] = (
            type_,
            self._info(link.name, mode),
        )
        spec.relations.append((link, above, query, stated))

    def _relation_query(self, link: Link) -> Any:
        model = self.family.models[link.other]
        source = model.alias() if self.rarely(20) else model
        query = source.select()
        if self.rarely(10):
            query = source.select(*[getattr(source, key.name) for key in _keys(model)])
        if self.rarely(50):
            query = query.where(self.condition(link.other, source))
        if self.rarely(60):
            query = query.order_by(*self.ordering(link.other, source, total=True))
            if self.rarely(70) and _keys(model):
                query = query.limit(self.draw(st.integers(0, 3)))
                if self.rarely(30):
                    query = query.offset(self.draw(st.integers(0, 2)))
        return query

    def _extras(self, fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        first = next(iter(fields))
        what = self.pick(range(14))
        if what == 0:
            return {
                "computed": pydantic.computed_field(return_type=int)(
                    property(lambda self: len(type(self).model_fields))
                )
            }
        if what == 1:
            return {"check": pydantic.field_validator(first)(lambda cls, value: value)}
        if what == 2:
            return {
                "check": pydantic.field_validator(first, mode="before")(lambda cls, value: value)
            }
        if what == 3:
            return {"shown": pydantic.field_serializer(first)(lambda self, value: repr(value)[:3])}
        if what == 4:
            return {"whole": pydantic.model_validator(mode="before")(lambda cls, value: value)}
        if what == 5:
            return {"whole": pydantic.model_validator(mode="after")(lambda self: self)}
        if what == 6:
            return {
                "shown": pydantic.model_serializer(mode="wrap")(
                    lambda self, handler: {**handler(self), "added": 1}
                )
            }
        if what == 7:
            return {"_private": pydantic.PrivateAttr(3)}
        if what == 8:
            return {"model_post_init": lambda self, context: None}
        config |= [
            {"str_strip_whitespace": True},
            {"extra": "forbid"},
            {"extra": "ignore"},
            {"ser_json_inf_nan": "strings"},
            {"frozen": True, "validate_default": True, "title": "T"},
        ][what - 9]
        return {}

    # Queries.

    def condition(self, model: str, source: Any) -> Any:
        """Something of the rows, also of values that are in them."""
        names = [
            name
            for name in self.family.models[model]._meta.fields
            if (kind := self.family.kind(model, name)) and kind.sortable
        ]
        if not names:
            return peewee.Value(1) == 1
        name = self.pick(names)
        column = getattr(source, name)
        values = self.used.setdefault((model, name), self._values(model, name))
        match self.pick(["true", "null", "not null", "<=", "in", "like", "exists"]):
            case "null":
                return column.is_null()
            case "not null":
                return column.is_null(False)
            case "<=":
                return (column <= self.draw(values)) | column.is_null()
            case "in":
                return column << [self.draw(values), self.draw(values)]
            case "like" if name in ("char", "text"):
                return column.contains(self.pick(["%", "'", "a", '"', "\\", "?"]))
            case "exists":
                other = self.family.models[model].alias()
                return fn.EXISTS(other.select(peewee.SQL("1")))
            case _:
                return peewee.Value(1) == 1

    def _values(self, model: str, name: str) -> st.SearchStrategy[Any]:
        kind = self.family.kind(model, name)
        assert kind is not None
        return kind.values

    def ordering(self, model: str, source: Any, total: bool) -> list[Any]:
        fields = self.family.models[model]._meta.fields
        names = [name for name in fields if (k := self.family.kind(model, name)) and k.sortable]
        chosen: list[str] = []
        if names:
            chosen = self.draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
        order = []
        for name in chosen:
            self.used.setdefault((model, name), self._values(model, name))
            column = getattr(source, name)
            order.append(column.desc() if self.rarely(40) else column)
        if total:
            backwards = self.rarely(30)
            for key in _keys(self.family.models[model]):
                column = getattr(source, key.name)
                order.append(column.desc() if backwards else column)
        first = next(iter(fields))
        return order or [getattr(source, names[0] if names else first)]

    def query(self, name: str, spec: Spec, count: bool, single: bool) -> tuple[Any, Any, bool]:
        model = self.family.models[name]
        source = model.alias() if self.rarely(12) else model
        query = source.select()
        full = source.select()
        if count:
            query, full = self._counting(name, source)
        else:
            shape = self.pick(
                ["plain"] * 8
                + ["subset", "join", "join", "distinct", "on", "cte", "compound", "rows", "related"]
            )
            if shape == "compound":
                return self._compound(name, source, single)
            if shape == "rows":
                return self._other_rows(name, source, spec)
            query, full = self._shaped(shape, name, source, spec, query)
        if self.rarely(40):
            condition = self.condition(name, source)
            query, full = query.where(condition), full.where(condition)
        ordered = bool(_keys(model)) and (single or not self.rarely(30))
        if query._distinct:
            ordered = True
        elif ordered:
            order = self.ordering(name, source, total=True)
            if query._group_by:
                order = [getattr(source, key.name) for key in _keys(model)]
            query, full = query.order_by(*order), full.order_by(*order)
            if self.rarely(40):
                limit = self.draw(st.integers(0, 4))
                query, full = query.limit(limit), full.limit(limit)
                if self.rarely(40):
                    offset = self.draw(st.integers(0, 2))
                    query, full = query.offset(offset), full.offset(offset)
        return query, full, ordered

    def _counting(self, name: str, source: Any) -> tuple[Any, Any]:
        """Rows with a number of other rows."""
        fk = {"wide": "owner", "item": None, "kind": "lazy", "slot": "slot"}[name]
        item = self.family.models["item"]
        keys = [getattr(source, key.name) for key in _keys(self.family.models[name])]
        if fk is None:
            number = fn.COUNT(item.select(peewee.SQL("1")).exists())
            query = source.select(source, number.alias("total")).group_by(*_group(source))
            return query, query
        on = getattr(source, item._meta.fields[fk].rel_field.name) == getattr(item, fk)
        number = self.pick([fn.COUNT(item.id), fn.COUNT(item.id), fn.SUM(item.id), fn.MAX(item.id)])
        group = keys if self.family.dialect != "mysql" and self.rarely(50) else _group(source)
        query = (
            source.select(source, number.alias("total"))
            .join(item, JOIN.LEFT_OUTER, on=on)
            .group_by(*group)
        )
        if self.rarely(20):
            query = query.having(fn.COUNT(item.id) > 0)
        return query, query

    def _shaped(
        self, shape: str, name: str, source: Any, spec: Spec, query: Any
    ) -> tuple[Any, Any]:
        model = self.family.models[name]
        full = query
        if shape == "subset":
            names = self.draw(
                st.lists(st.sampled_from(list(model._meta.fields)), min_size=1, max_size=3)
            )
            query = source.select(*[getattr(source, each) for each in dict.fromkeys(names)])
        elif shape == "join":
            rows = [link for link in self.family.links[name] if not link.many]
            if rows:
                link = self.pick(rows)
                other = self.family.models[link.other]
                if other is model or self.rarely(30):
                    other = other.alias()
                kind = self.pick([JOIN.INNER, JOIN.LEFT_OUTER])
                fk = getattr(source, link.fk)
                on = fk == getattr(other, model._meta.fields[link.fk].rel_field.name)
                if self.rarely(25):
                    on = on & self.condition(link.other, other)
                elif self.rarely(10):
                    on = self.condition(link.other, other)
                selected = [source, other] if self.rarely(50) else [source]
                query = full = source.select(*selected).join(other, kind, on=on)
                if self.rarely(30):
                    condition = self.condition(link.other, other)
                    query, full = query.where(condition), full.where(condition)
        elif shape == "distinct":
            plain = all(
                (kind := self.family.kind(name, each)) is None or kind.sortable
                for each in model._meta.fields
            )
            if plain or self.family.dialect == "sqlite":
                query = full = query.distinct()
        elif shape == "on" and self.family.dialect == "postgres" and _keys(model):
            columns = self.ordering(name, source, total=False)[:1]
            column = columns[0].node if isinstance(columns[0], peewee.Ordering) else columns[0]
            order = [column, *(getattr(source, key.name) for key in _keys(model))]
            query = full = query.distinct(column).order_by(*order)
        elif shape == "cte" and source is model and len(_keys(model)) == 1:
            (key,) = _keys(model)
            other = model.alias()
            inner = getattr(other, key.name)
            cte = other.select(inner.alias("k")).where(self.condition(name, other)).cte("q")
            query = full = query.join(cte, on=(key == cte.c.k)).with_cte(cte)
        elif shape == "related":
            # A list that it loads is in its order, not in that of a schema.
            asked = {link.name for link, *_ in spec.relations if link.many}
            links = self.family.links[name]
            rows = [each for each in links if each.through is None and each.name not in asked]
            if rows:
                query = query.with_related(getattr(model, self.pick(rows).name))
        return query, full

    def _compound(self, name: str, source: Any, single: bool) -> tuple[Any, Any, bool]:
        model = self.family.models[name]
        hard = self.family.dialect == "postgres" and name in ("wide", "item")
        left = source.select().where(self.condition(name, source))
        right = source.select().where(self.condition(name, source))
        query = left + right if hard or self.rarely(40) else left | right
        if not hard and self.rarely(15):
            query = left & right
        keys = _keys(model)
        if len(keys) == 1 and (single or self.rarely(70)):
            query = query.order_by(peewee.SQL("1"))
            # Equal rows stay side by side.
            return query, query, source.select()._returning[0].name == keys[0].name
        return query, query, False

    def _other_rows(self, name: str, source: Any, spec: Spec) -> tuple[Any, Any, bool]:
        query = source.select().where(self.condition(name, source))
        ordered = bool(_keys(self.family.models[name]))
        if ordered:
            query = query.order_by(*self.ordering(name, source, total=True))
        kind = self.pick(["dicts", "namedtuples", "objects"])
        if kind == "dicts" and (spec.relations or spec.type.model_config.get("extra")):
            kind = "objects"
        if kind == "namedtuples" and spec.relations:
            kind = "objects"
        query = getattr(query, kind)()
        return query, query, ordered


def _made() -> list[Any]:
    return [each for name, each in vars(MADE).items() if not name.startswith("__")]


def _key_type(key: Any) -> Any:
    while isinstance(key, peewee.ForeignKeyField):
        key = key.rel_field
    return {peewee.CharField: str, peewee.UUIDField: uuid.UUID}.get(type(key), int)


def _keys(model: Any) -> list[Any]:
    return list(model._meta.get_primary_keys())


def _group(source: Any) -> list[Any]:
    """What can be grouped by on every database: all columns but JSON's."""
    return [getattr(source, key.name) for key in _keys(getattr(source, "model", source))]


def cases(family: Family) -> st.SearchStrategy[Case]:
    return st.composite(lambda draw: Maker(family, draw).case())()


def drawn(db: Any) -> st.SearchStrategy[tuple[Family, Case]]:
    def draw_both(draw: Draw) -> tuple[Family, Case]:
        family = DrawnFamily(db, draw)
        return family, Maker(family, draw).case()

    return st.composite(draw_both)()


# The reference.


class Loaded:
    """An instance with its relations, as Pydantic reads it."""

    def __init__(self, instance: Any, relations: dict[str, Any]) -> None:
        self._instance = instance
        self.__dict__.update(relations)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instance, name)


def loaded(family: Family, spec: Spec, instance: Any, above: tuple[Any, ...] = ()) -> Any:
    """The instance, and one query for each of its relations; `above` are the depths on the way."""
    found: dict[str, Any] = {}
    model = family.models[spec.model]
    for link, below, query, stated in spec.relations:
        other = family.models[link.other]
        if stated is not None and above.count(stated) == stated.levels:
            found[link.name] = [] if link.many else None
            continue
        way = (*above, stated)
        if not link.many:
            fk = model._meta.fields[link.fk]
            value = instance.__data__.get(link.fk)
            if link.fk in instance.__rel__:  # by a join
                row = instance.__rel__[link.fk]
            else:
                row = None if value is None else other.get_or_none(fk.rel_field == value)
            found[link.name] = row if row is None else loaded(family, below, row, way)
            continue
        rows = other.select() if query is None else query
        missing = query is not None and not query._is_default
        source = rows.model
        if link.through is not None:
            through = family.models[link.through]
            mine, theirs = through._meta.fields[link.fk], through._meta.fields[link.through_fk]
            value = instance.__data__[mine.rel_field.name]
            keys = [
                getattr(row, theirs.object_id_name) for row in through.select().where(mine == value)
            ]
            rows = rows.where(getattr(source, theirs.rel_field.name) << keys)
        else:
            fk = other._meta.fields[link.fk]
            value = instance.__data__.get(fk.rel_field.name)
            rows = rows.where(
                getattr(source, link.fk) == value if value is not None else peewee.SQL("1=0")
            )
        if not rows._order_by:
            rows = rows.order_by(*[getattr(source, key.name) for key in _keys(other)])
        if missing:
            rows = rows.select(*[getattr(source, name) for name in other._meta.fields])
        found[link.name] = [loaded(family, below, row, way) for row in rows]
    return Loaded(instance, found) if found else instance


class NoAnswer(Exception):
    """Pydantic refuses these rows, or can't write them."""


REFUSALS = (ValueError, TypeError, RecursionError, struct.error)


def expected(family: Family, case: Case) -> bytes:
    query = case.full.clone()
    query._cursor_wrapper = None
    try:
        return _expected(family, case, query)
    except (*REFUSALS, PydanticSerializationError) as error:
        raise NoAnswer(str(error)) from error


def _expected(family: Family, case: Case, query: Any) -> bytes:
    rows = list(query)
    many = case.type == list[case.spec.type]
    if rows and isinstance(rows[0], peewee.Model):
        rows = [loaded(family, case.spec, row) for row in (rows if many else rows[:1])]
    adapter: TypeAdapter[Any] = TypeAdapter(case.type)
    value = adapter.validate_python(
        rows if many else (rows[0] if rows else None), from_attributes=True
    )
    return adapter.dump_json(value, by_alias=case.by_alias)


# The plans.


def canonical(body: bytes, ordered: bool = True) -> str:
    """What a client reads out of it: 1 and 1.0 are equal, 1 and true are not."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        return value

    found = plain(json.loads(body))
    if not ordered and isinstance(found, list):
        found.sort(key=lambda each: json.dumps(each, sort_keys=True))
    return json.dumps(found, sort_keys=True)


def written(family: Family, case: Case) -> None:
    for name, rows in case.rows.items():
        for row in rows:
            family.models[name].insert(row).execute()


def answers(case: Case, db: Any) -> Iterator[tuple[str, bytes]]:
    """What every plan gives, the best one first; and the best one from the cache, and streamed."""
    plans = Plans(case.type, by_alias=case.by_alias)
    response = plans.response
    best = plans.plan(case.query)

    def body(value: Any) -> bytes:
        if isinstance(value, Texts):
            return value.body()
        value = response.adapter.validate_python(value, from_attributes=True)
        return response.adapter.dump_json(value, by_alias=case.by_alias)

    yield best.kind, body(plans.load(case.query))
    if best.kind == "json":
        yield "json, compiled", body(plans.load(case.query))
        rows = plan(case.query, response, db, by_alias=case.by_alias, in_python="asked for")
        assert isinstance(rows, RowPlan)
        yield "rows", body(rows.load(db))
    if best.kind != "instances":
        yield "instances", body(InstancePlan(response, case.query, "asked for").load(db))
    if response.many and response.schema is not None and case.by_alias:
        texts = [text for chunk in best.stream(db, 2) for text in chunk]
        yield f"{best.kind}, streamed", b"[" + b",".join(texts) + b"]"


def compare(family: Family, case: Case, counts: Counter[str]) -> str:
    """Assert that every plan gives what Pydantic gives. Returns the plan, or "refused"."""
    with family.db.atomic() as transaction:
        try:
            written(family, case)
            try:
                wanted = expected(family, case)
            except NoAnswer:
                counts["refused"] += 1
                return "refused"
            best = ""
            for kind, body in answers(case, family.db):
                best = best or kind
                assert canonical(body, case.ordered) == canonical(wanted, case.ordered), (
                    f"{kind} gives {body!r}, Pydantic gives {wanted!r}: {case.query.sql()}"
                )
            counts[best] += 1
            return best
        finally:
            transaction.rollback()
