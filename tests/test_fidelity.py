"""A query returned from an endpoint gives the JSON that Pydantic gives for loaded instances.

`make soak-answers` takes many more cases than the suite does: FIDELITY_CASES for each database.
"""

import datetime
import decimal
import importlib
import os
import uuid
import warnings
from collections import Counter
from typing import Any

import peewee
import pytest
from hypothesis import HealthCheck, event, given, settings
from pydantic import create_model

from fastapi_peewee.json_sql import MARIADB, MYSQL, POSTGRESQL, SQLITE
from fastapi_peewee.loading import Plans
from tests.fidelity import (
    TEXTS,
    UTC,
    Case,
    Family,
    Spec,
    answers,
    canonical,
    cases,
    compare,
    connection,
    drawn,
)

CASES = int(os.environ.get("FIDELITY_CASES", "550"))
#: A soak goes on for as long as it takes, and says how far it is.
SOAK = CASES >= 2000
TIMEOUT = 36_000 if SOAK else 300

many_cases = settings(
    max_examples=CASES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def note(name: str, counts: Counter[str], outcome: str) -> None:
    event(outcome)
    if SOAK and counts.total() % 500 == 0:
        print(f"{name}: {counts.total():,} of {CASES:,} cases agree", flush=True)


def check_shares(counts: Counter[str]) -> None:
    """Cases that Pydantic refuses prove nothing, nor do those that are never built as JSON."""
    total = counts.total()
    if total >= 200:
        assert counts["refused"] < total / 5
        assert counts["json"] > total / 4
        assert counts["rows"] > total / 10
        assert counts["instances"] > total / 50


# Of what is drawn, Peewee's older releases get some wrong themselves: hence `slow`, which the run
# with the lowest dependencies leaves out.
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_every_plan_answers_as_pydantic_does(database_url: str) -> None:
    counts: Counter[str] = Counter()
    with connection(database_url) as db:
        dialect = database_url.partition(":")[0].replace("postgresql", "postgres")
        family = Family(db, dialect)
        db.create_tables(family.tables)

        @many_cases
        @given(case=cases(family))
        def check(case: Case) -> None:
            note(family.dialect, counts, compare(family, case, counts))

        check()
    print(f"{family.dialect}: {dict(counts)}")
    check_shares(counts)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_drawn_models_answer_as_pydantic_does() -> None:
    counts: Counter[str] = Counter()
    with connection("sqlite:///:memory:") as db:

        @many_cases
        @given(both=drawn(db))
        def check(both: tuple[Family, Case]) -> None:
            family, case = both
            with db.atomic() as transaction:
                db.create_tables(family.tables)
                note("drawn", counts, compare(family, case, counts))
                transaction.rollback()

        check()
    print(f"drawn: {dict(counts)}")
    check_shares(counts)


#: Pydantic's types by the names of their schemas.
TYPES: dict[str, Any] = {
    "any": Any,
    "bool": bool,
    "date": datetime.date,
    "datetime": datetime.datetime,
    "decimal": decimal.Decimal,
    "float": float,
    "int": int,
    "str": str,
    "time": datetime.time,
    "uuid": uuid.UUID,
}
_NOON = datetime.time(12, 30, 59, 120_000)
_LEAP_DAY = datetime.date(2024, 2, 29)
VALUES: dict[str, list[Any]] = {
    "any": [{"a": [1, None, {"ü": '"'}]}, [], "text", 1.5, False],
    "bool": [True, False],
    "date": [_LEAP_DAY, datetime.date(1, 1, 1), datetime.date.max],
    "datetime": [datetime.datetime.combine(_LEAP_DAY, _NOON, zone) for zone in (None, UTC)],
    "decimal": [decimal.Decimal("-1.50"), decimal.Decimal(0), decimal.Decimal("12345.67891")],
    "float": [0.1, -0.0, 1e-7, 1e16, 123456.5],
    "int": [0, -32768, 32767],
    "str": TEXTS,
    "time": [datetime.time(0), _NOON.replace(microsecond=0), _NOON, datetime.time.max],
    "uuid": [uuid.UUID(int=0), uuid.UUID("ABCDEF00-1234-5678-9abc-def012345678")],
}


def _field(path: str, name: str) -> tuple[Any, list[Any]]:
    """A field of a class in a table, and values for it."""
    module, _, class_name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), class_name)
    values = VALUES[name]
    options: dict[str, Any] = {"null": True}
    if class_name == "TimestampField":
        options["utc"] = True
    if class_name == "IPField":
        values = ["0.0.0.0", "255.255.255.255", "10.1.2.3"]
    if class_name == "DateTimeTZField":
        values = [value.replace(tzinfo=UTC) for value in values]
    elif name == "datetime":
        values = values[:1]
    if class_name == "FixedCharField":
        options["max_length"] = 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PrimaryKeyField
        return cls(**options), values


def _line(db: Any, table: str, field: Any) -> Any:
    meta = type("Meta", (), {"database": db, "table_name": table})
    return type("Line", (peewee.Model,), {"value": field, "Meta": meta})


def test_each_line_of_the_tables_is_built_by_the_database(database_url: str) -> None:
    """A class of field and a type that are in a table: the plan is json, its answer Pydantic's."""
    dialect = database_url.partition(":")[0]
    wrong = []
    with connection(database_url) as db:
        mysql = MARIADB if getattr(db, "mariadb", False) else MYSQL
        lines = {"sqlite": SQLITE, "postgresql": POSTGRESQL, "mysql": mysql}[dialect]
        for number, (path, name) in enumerate(lines):
            field, values = _field(path, name)
            table = f"line{number}"
            # Not every database can create every class of key, but all can read them.
            model = _line(db, table, peewee.AutoField() if field.primary_key else field)
            model.create_table()
            if field.primary_key:
                values = [1, 2**31 - 1]
            else:
                model.insert(value=None).execute()
            for value in values:
                model.insert(value=value).execute()
            if field.primary_key:
                model = _line(db, table, field)
            optional = TYPES[name] if field.primary_key else TYPES[name] | None
            schema = create_model("LineOut", value=(optional, ...))
            query = model.select().order_by(model.value if field.primary_key else model.id)
            rows = list(query.clone())
            plans = Plans(list[schema])
            expected = plans.response.adapter.dump_json(
                plans.response.adapter.validate_python(rows, from_attributes=True)
            )
            kinds = []
            for kind, body_ in answers(
                Case(Spec("", schema), list[schema], query, query, True, True, {}), db
            ):
                kinds.append(kind)
                if canonical(body_) != canonical(expected):
                    wrong.append(f"{path} as {name}: {kind} gives {body_!r}, not {expected!r}")
            if kinds[0] != "json":
                wrong.append(f"{path} as {name}: {plans.plan(query).reason}")
    assert not wrong, "\n".join(wrong)


def test_a_compared_case_can_fail(sqlite_url: str) -> None:
    """The comparison itself: 1 is not true, an order is an order where there is one."""
    assert canonical(b'[{"a":1.0},{"b":2}]') == canonical(b'[{"a":1},{"b":2.0}]')
    assert canonical(b"[1]") != canonical(b"[true]")
    assert canonical(b"[1,2]") != canonical(b"[2,1]")
    assert canonical(b"[1,2]", ordered=False) == canonical(b"[2,1]", ordered=False)
    assert canonical(b"0.1") != canonical(b"0.10000000000000002")
