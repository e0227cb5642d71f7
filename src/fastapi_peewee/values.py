"""What a Peewee field's values are in Python, and which of them every database can store.

What is said here of a column holds on SQLite, PostgreSQL and MySQL/MariaDB alike, since one model
runs on any of them. Peewee's field classes are known by class, since the type of a column doesn't
tell (a timestamp and an IP address are BIGINT). Of a subclass with a column type of its own we know
the Python type and not the limits; of one with a `python_value` of its own, what that is annotated
to return.
"""

import base64
import enum
import ipaddress
import math
import sys
import typing
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal, localcontext
from typing import Annotated, Any, Literal, Optional
from uuid import UUID

import peewee
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    Field,
    JsonValue,
    NaiveDatetime,
    StringConstraints,
    WithJsonSchema,
)

from .exceptions import SchemaError


def python_type(field: Any) -> Any:
    """The type of a field's values: plain, with no limits."""
    return _types(field)[0]


def input_type(field: Any) -> Any:
    """The type of a field's values that every database stores and gives back equal."""
    python, stored = _types(field)
    values = [value for value, _ in field.choices or () if value is not None]
    if not values or isinstance(python, enum.EnumMeta):
        return stored
    if all(type(value) in (str, int, bool) for value in values):
        return Literal[tuple(values)]

    def chosen(value: Any) -> Any:  # dates, decimals: JSON has no literals of them
        if value not in values:
            raise ValueError(f"not one of {', '.join(map(str, values))}")
        return value

    return Annotated[stored, AfterValidator(chosen)]


def max_length(field: Any) -> int | None:
    """The number of characters that a text field takes, if it has a limit."""
    if isinstance(field, peewee.ForeignKeyField):
        return max_length(field.rel_field)
    limit: int | None = getattr(field, "max_length", None)
    return limit


def nullable(type_: Any, null: bool) -> Any:
    return Optional[type_] if null else type_  # noqa: UP045  # takes the name of a class to come


def _integer(bits: int) -> Any:
    return Annotated[int, Field(ge=-(2 ** (bits - 1)), le=2 ** (bits - 1) - 1)]


def _float(largest: float) -> Any:
    return Annotated[float, Field(ge=-largest, le=largest, allow_inf_nan=False)]


def _not_subnormal(value: float) -> float:
    return value if abs(value) > 1.18e-38 else 0.0  # PostgreSQL refuses what would become 0


def _text(max_length: int | None = None) -> Any:
    # PostgreSQL has no NUL. A lone surrogate is no text to a pattern, nor to any driver.
    return Annotated[str, StringConstraints(max_length=max_length, pattern=r"^[^\x00]*$")]


def _decoded(value: object) -> object:
    """Base64 in either alphabet; Pydantic itself decodes only in JSON that it parses."""
    if not isinstance(value, str):
        return value
    text = value.translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _bytes_of(value: object) -> object:
    return bytes(value) if isinstance(value, peewee.BigBitFieldData) else value


def _without_zone(value: time) -> time:
    if value.tzinfo is not None:
        raise ValueError("the column has no time zone")
    return value


def _address(value: str) -> str:
    return str(ipaddress.IPv4Address(value))


def _json(value: Any, depth: int = 0) -> Any:
    if depth > 90:  # MySQL takes 100
        raise ValueError("nested too deeply")
    if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("neither NUL nor a lone surrogate can be stored")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("JSON has no such number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer of more than 64 bits")
    if isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _json(part, depth + 1)
    return value


def _not_null(value: object) -> object:
    if value is None:
        raise ValueError("null isn't allowed")
    return value


#: 32 bits, except on SQLite.
_SINGLE: Any = Annotated[_float(3.4028234e38), AfterValidator(_not_subnormal)]
_BLOB = Annotated[bytes, BeforeValidator(_decoded)]
#: Formats of OpenAPI's registry: `date-time` and `time` demand a zone (RFC 3339).
_MOMENT = Annotated[NaiveDatetime, WithJsonSchema({"type": "string", "format": "date-time-local"})]
_TIME = Annotated[
    time,
    AfterValidator(_without_zone),
    WithJsonSchema({"type": "string", "format": "time-local"}),
]
_IPV4 = Annotated[
    str, AfterValidator(_address), WithJsonSchema({"type": "string", "format": "ipv4"})
]
_JSON = Annotated[JsonValue, AfterValidator(_json)]
#: They exist in every time zone.
_EARLIEST, _LATEST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
_INSTANT = Annotated[AwareDatetime, Field(ge=_EARLIEST, lt=_LATEST)]

#: Field classes of Peewee: the type of their values, and what of it can be stored.
_CLASSES: dict[type[Any], tuple[Any, Any]] = {
    peewee.SmallIntegerField: (int, _integer(16)),
    peewee.IntegerField: (int, _integer(32)),
    peewee.AutoField: (int, _integer(32)),
    peewee.IdentityField: (int, _integer(32)),
    peewee.BigIntegerField: (int, _integer(64)),
    peewee.BigAutoField: (int, _integer(64)),
    peewee.FloatField: (float, _SINGLE),
    peewee.DoubleField: (float, _float(sys.float_info.max)),
    peewee.DecimalField: (Decimal, Decimal),
    peewee.CharField: (str, _text()),
    peewee.FixedCharField: (str, _text()),
    peewee.TextField: (str, _text()),
    peewee.BooleanField: (bool, bool),
    peewee.BlobField: (bytes, _BLOB),
    peewee.BigBitField: (Annotated[bytes, BeforeValidator(_bytes_of)], _BLOB),
    peewee.UUIDField: (UUID, UUID),
    peewee.BinaryUUIDField: (UUID, UUID),
    peewee.DateTimeField: (datetime, _MOMENT),
    peewee.DateField: (date, date),
    peewee.TimeField: (time, _TIME),
    peewee.TimestampField: (datetime, datetime),
    peewee.IPField: (str, _IPV4),
    peewee.JSONField: (Any, _JSON),
}
#: Column types of playhouse's field classes.
_COLUMNS: dict[str, tuple[Any, Any]] = {
    "JSON": (Any, _JSON),
    "JSONB": (Any, _JSON),
    "HSTORE": (dict[str, str | None], dict[_text(), _text() | None]),  # type: ignore[misc]
    "TIMESTAMPTZ": (datetime, _INSTANT),
    "INTERVAL": (timedelta, timedelta),
}
#: What any column at all can store.
_ANY_COLUMN = {str: _text(), bytes: _BLOB}


def _types(field: Any) -> tuple[Any, Any]:
    if isinstance(field, peewee.ForeignKeyField):
        return _types(field.rel_field)
    if isinstance(field, peewee.DeferredForeignKey):
        raise SchemaError(
            f"The foreign key {field.model.__name__}.{field.name} refers to a model named "
            f"{field.rel_model_name!r} that isn't there yet. Make the schema after that model."
        )
    if getattr(field, "enum_class", None) is not None:
        return field.enum_class, field.enum_class
    classes = type(field).__mro__
    for cls in classes[: classes.index(peewee.Field)]:
        if cls in _CLASSES:
            python, stored = _CLASSES[cls]
            if type(field).field_type != cls.field_type:
                return python, _ANY_COLUMN.get(python, python)
            return python, _limited(field, stored)
        if cls.__module__.startswith("playhouse."):
            if hasattr(field, "dimensions"):
                return _array(field)
            if field.field_type in _COLUMNS:
                python, stored = _COLUMNS[field.field_type]
                return python, _limited(field, stored)
        if "python_value" in vars(cls):
            python = typing.get_type_hints(vars(cls)["python_value"]).get("return", Any)
            return python, _ANY_COLUMN.get(python, python)
    from playhouse.pydantic_utils import get_field_type  # by the column; this loads drivers

    python = get_field_type(field)
    return python, _ANY_COLUMN.get(python, python)


def _array(field: Any) -> tuple[Any, Any]:
    element = vars(field)["_ArrayField__field"]
    python, stored = (nullable(each, element.null) for each in _types(element))
    for _ in range(field.dimensions):
        python, stored = list[python], list[stored]  # type: ignore[valid-type]
    return python, stored


def _limited(field: Any, stored: Any) -> Any:
    """`stored` within the limits that are this field's own."""
    if isinstance(field, peewee.CharField):
        text = _text(field.max_length)
        # FixedCharField strips what it stores and what it reads.
        fixed = isinstance(field, peewee.FixedCharField)
        return Annotated[text, AfterValidator(str.strip)] if fixed else text
    if isinstance(field, peewee.DecimalField):
        digits, places = field.max_digits, field.decimal_places
        if not field.auto_round:
            return Annotated[Decimal, Field(max_digits=digits, decimal_places=places)]
        with localcontext(prec=digits + 2):  # beyond which bounds would be rounded, up
            largest = Decimal(10) ** (digits - places) - Decimal(10) ** -places
            bounds = Field(ge=-largest, le=largest)
        return Annotated[Decimal, bounds, AfterValidator(_rounded(field))]
    if isinstance(field, peewee.TimestampField):
        return Annotated[datetime, AfterValidator(_as_read(field))]
    if stored is _JSON and not field.null:
        return Annotated[stored, AfterValidator(_not_null)]
    return stored


def _rounded(field: Any) -> Callable[[Decimal], Decimal]:
    def rounded(value: Decimal) -> Decimal:
        try:
            stored: Decimal = field.db_value(value)
        except ArithmeticError:
            raise ValueError("has more digits than can be rounded") from None
        return stored

    return rounded


def _as_read(field: Any) -> Callable[[datetime], datetime]:
    """A moment in the time zone and resolution of a `TimestampField`."""

    def as_read(value: datetime) -> datetime:
        try:
            if _EARLIEST <= value.replace(tzinfo=UTC) < _LATEST:
                read: datetime = field.python_value(field.db_value(value))
                return read
        except (OverflowError, OSError):  # what the operating system knows no time of
            pass
        raise ValueError("out of range")

    return as_read
