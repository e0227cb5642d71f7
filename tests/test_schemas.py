"""Schemas from models: what they accept, say in OpenAPI, and read."""

import base64
import datetime as dt
import decimal
import enum
import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import peewee
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playhouse import postgres_ext
from pydantic import ValidationError

from fastapi_peewee import connect, create_schema, schema


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
def db(database_url: str) -> Iterator[Any]:
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
def everything(db: Any) -> Any:
    """A model with fields of all classes, all of which may be null."""
    is_postgres = isinstance(db, peewee.PostgresqlDatabase)
    classes = PORTABLE | (POSTGRES if is_postgres else {})
    fields = {name: make(null=True, default=None) for name, make in classes.items()}
    model = type("Everything", (db.Model,), fields)
    db.create_tables([model])
    return model


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=5 * settings().max_examples,
)
@given(data=st.data())
def test_what_an_input_schema_accepts_is_stored_and_comes_back_equal(
    db: Any, everything: Any, data: st.DataObject
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
    with db.atomic():
        for name, (incoming, outgoing) in everything.made.items():
            try:
                sent = incoming.model_validate({name: value}).model_dump()
            except ValidationError:
                continue
            key = everything.create(**{name: None, **sent}).id
            read = outgoing.model_validate(everything.get_by_id(key))
            mysql = isinstance(db, peewee.MySQLDatabase)
            assert equal(getattr(read, name), sent[name], name == "single", mysql), (name, value)
