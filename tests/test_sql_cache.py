"""SQL made once for each shape: what runs is, each time, what Peewee would have made."""

import datetime
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import peewee
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_peewee import connect, sql_cache
from fastapi_peewee.sql_cache import SqlCache

from .test_shapes import DATABASES, SQLITE, Base, Item, Label, User, exactly

#: Each makes a query of a number and a text.
Make = Callable[[int, str], Any]

CACHED: dict[str, Make] = {
    "select": lambda i, s: User.select().where(User.age > i, User.name == s).limit(i),
    "insert": lambda i, s: User.insert(name=s, age=i, active=True),
    "insert, columns by name": lambda i, s: Item.insert({"headline": s, "owner": i}),
    "insert, returning": lambda i, s: Item.insert(title=s, owner=i).returning(Item),
    "insert of a list": lambda i, s: Label.insert(id=s, text=[i], data=None),
    "insert of None": lambda i, s: User.insert(name=s, age=i, active=None, joined=None),
    "insert of a date": lambda i, s: User.insert(
        name=s, active=bool(i), joined=datetime.datetime.fromisoformat(f"2020-01-0{i + 1}")
    ),
    "insert of a decimal": lambda i, s: Item.insert(title=s, owner=i, price=Decimal(i)),
    "update": lambda i, s: User.update(name=s).where(User.id == i),
    "update, returning": lambda i, s: User.update(name=s, age=i).returning(User.id),
    "update by an expression": lambda i, s: User.update(age=User.age + i).where(User.name == s),
    "update by a subquery": lambda i, s: User.update(
        age=Item.select(peewee.fn.COUNT(Item.id)).where(Item.owner == User.id, Item.title == s)
    ).where(User.age < i),
    "update with a limit": lambda i, s: User.update(name=s).order_by(User.id).limit(i),
    "delete": lambda i, s: User.delete().where((User.id == i) | (User.name == s)),
    "delete, returning": lambda i, s: User.delete().where(User.id == i).returning(User.name),
    "delete by a subquery": lambda i, s: Item.delete().where(
        Item.owner << User.select(User.id).where(User.name == s, User.age == i)
    ),
}
#: What is made anew each time.
NOT_CACHED: dict[str, Make] = {
    "a default": lambda i, s: User.insert(name=s, age=i),
    "no values": lambda _i, _s: Item.insert(),
    "many rows": lambda i, s: User.insert_many([{"name": s, "active": bool(i)}]),
    "from a query": lambda i, s: User.insert_from(
        User.select(User.name).where(User.id == i, User.name == s), [User.name]
    ),
    "on conflict": lambda i, s: User.insert(name=s, age=i, active=True).on_conflict_ignore(),
    "an instance": lambda i, s: Item.insert(title=s, owner=User(id=i)),
    "an expression": lambda i, s: User.insert(name=peewee.fn.LOWER(s), age=i, active=True),
    "assigned instance": lambda i, s: Item.update(title=s, owner=User(id=i)),
    "assigned by name": lambda i, s: peewee.ModelUpdate(User, {"name": s, User.age: i}),
    "update from": lambda i, s: User.update(name=s).from_(Item).where(Item.owner == i),
    "with cte": lambda i, s: User.update(name=s).with_cte(
        User.select().where(User.id == i).cte("other")
    ),
    "no model": lambda i, s: peewee.Table("user").bind(SQLITE).update({"age": i}),
    "raw": lambda i, s: User.raw("SELECT 1 WHERE ? AND ?", i, s),
}


def made_anew(database: Any, query: Any) -> tuple[str, list[Any]]:
    sql, parameters = database.get_sql_context().sql(query).query()
    return sql, exactly(parameters)


def from_cache(cache: SqlCache, query: Any) -> tuple[str, list[Any]] | None:
    found = cache.statement(query)
    return None if found is None else (found[0], exactly(found[1]))


@pytest.mark.parametrize("database", DATABASES, ids=lambda database: type(database).__name__)
@pytest.mark.parametrize("name", CACHED)
def test_the_second_query_of_a_shape_and_all_that_follow_come_from_the_cache(
    name: str, database: Any
) -> None:
    """What comes from it is what Peewee makes of the same query: text and parameters."""
    cache = SqlCache(database)
    assert cache.statement(CACHED[name](1, "one")) is None
    for i, text in ((2, "two"), (0, ""), (1, "one")):
        query = CACHED[name](i, text)
        assert from_cache(cache, query) == made_anew(database, query)


@pytest.mark.parametrize("name", NOT_CACHED)
def test_what_is_not_cached(name: str) -> None:
    """Queries whose SQL depends on more than their shape are left to Peewee."""
    cache = SqlCache(SQLITE)
    for _ in range(3):
        assert cache.statement(NOT_CACHED[name](1, "a")) is None


def test_no_two_of_these_share_a_template() -> None:
    """All the queries above in one cache, twice in turn: each gets its own SQL."""
    cache = SqlCache(SQLITE)
    for _ in range(3):
        for make in CACHED.values():
            query = make(1, "a")
            found = from_cache(cache, query)
            assert found in (None, made_anew(SQLITE, query))
    assert len({made_anew(SQLITE, make(1, "a"))[0] for make in CACHED.values()}) == len(CACHED)


def test_a_value_that_its_field_makes_into_sql_is_left_to_peewee() -> None:
    """A converter may make a node of one value and not of the next."""

    class Shouting(peewee.CharField):
        def db_value(self, value: Any) -> Any:
            return peewee.fn.UPPER(value) if value == "loud" else value

    class Speech(Base):
        text = Shouting()

    cache = SqlCache(SQLITE)
    quiet, loud = Speech.insert(text="quiet"), Speech.insert(text="loud")
    for _ in range(2):
        assert cache.statement(loud) is None  # it can't be compiled
    cache = SqlCache(SQLITE)
    assert cache.statement(quiet) is None
    assert cache.statement(quiet) is not None
    assert cache.statement(loud) is None
    assert cache.statement(quiet) is not None


VALUES: dict[Any, st.SearchStrategy[Any]] = {
    User.name: st.text(),
    User.age: st.integers() | st.none(),
    User.active: st.booleans() | st.integers(0, 1),
    User.joined: st.datetimes() | st.text() | st.none(),
    User.manager: st.integers() | st.none(),
}


@st.composite
def writes(draw: st.DrawFn) -> Any:
    """A write of random columns, with random values, that returns some columns or none."""
    fields = draw(st.lists(st.sampled_from(list(VALUES)), unique_by=lambda field: field.name))
    row = {field: draw(VALUES[field]) for field in fields}
    kind = draw(st.sampled_from(["insert", "update", "delete"]))
    if kind == "insert":
        query: Any = User.insert({User.active: True, **row})
    else:
        query = User.update(row or {User.age: User.age + 1}) if kind == "update" else User.delete()
        if draw(st.booleans()):
            field = draw(st.sampled_from(list(VALUES)))
            query = query.where(field == draw(VALUES[field]))
    returning = draw(st.lists(st.sampled_from(list(VALUES)), max_size=2))
    return query.returning(*returning) if returning else query


def test_random_writes_are_what_peewee_makes_of_them() -> None:
    """Whatever is written comes out of one cache as Peewee makes it, or not at all."""
    cache = SqlCache(SQLITE)
    hits = 0

    @given(st.lists(writes(), min_size=5, max_size=20))
    def check(queries: list[Any]) -> None:
        nonlocal hits
        for query in queries:
            found = from_cache(cache, query)
            hits += found is not None
            assert found in (None, made_anew(SQLITE, query))

    check()
    assert hits > settings().max_examples


def test_shapes_without_end_take_no_memory_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is full begins anew."""
    monkeypatch.setattr(sql_cache, "_KEPT", 10)
    cache = SqlCache(SQLITE)
    for length in range(1, 100):
        cache.statement(User.select().where(User.id << list(range(length))))
        assert len(cache._templates) <= 10


def test_databases_from_connect_run_what_they_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second time on, Peewee makes no SQL for a query; what is written arrives."""
    db: Any = connect("sqlite:///:memory:")

    class Note(db.Model):
        text = peewee.CharField()
        read = peewee.BooleanField(default=False)

    db.create_tables([Note])
    for text in ("a", "b"):
        assert Note.get_by_id(Note.create(text=text).id).text == text

    def refuse(**_: Any) -> Any:
        raise AssertionError("the SQL was made anew")

    monkeypatch.setattr(db, "get_sql_context", refuse)
    note = Note.create(text="c")
    assert Note.get_by_id(note.id).text == "c"
    db.close()
