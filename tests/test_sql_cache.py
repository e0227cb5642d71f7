"""SQL made once for each shape: what runs is, each time, what Peewee would have made."""

import datetime
import functools
import io
import itertools
import json
import operator
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import peewee
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playhouse import sqlite_ext

from fastapi_peewee import connect, sql_cache
from fastapi_peewee.shapes import MANY
from fastapi_peewee.sql_cache import Known, SqlCache

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


class Shouting(peewee.CharField):
    def db_value(self, value: Any) -> Any:
        return peewee.fn.UPPER(value) if value == "loud" else value


def test_a_value_that_its_field_makes_into_sql() -> None:
    """A converter may make a node of one value and not of the next: then the text is another."""

    class Speech(Base):
        text = Shouting()

    cache = SqlCache(SQLITE)
    quiet, loud = Speech.insert(text="quiet"), Speech.insert(text="loud")
    assert cache.statement(loud) is None
    assert from_cache(cache, loud) == made_anew(SQLITE, loud)
    assert cache.statement(loud) is None  # it couldn't be compiled
    cache = SqlCache(SQLITE)
    assert cache.statement(quiet) is None
    for _ in range(2):
        for query in (quiet, loud):
            assert from_cache(cache, query) == made_anew(SQLITE, query)


class Shown(peewee.TextField):
    def to_value(self, value: Any) -> Any:
        return peewee.fn.UPPER(value) if value == "loud" else super().to_value(value)


CONVERTED_AT_ONCE: dict[str, Callable[[], peewee.Field]] = {
    "json": peewee.JSONField,
    "json of anything": lambda: peewee.JSONField(
        dumps=lambda value: json.dumps(value, default=str)
    ),
    "json of the extension": sqlite_ext.JSONField,
    "a field of the user's": Shown,
}


@pytest.mark.parametrize("name", CONVERTED_AT_ONCE)
def test_a_field_that_converts_as_the_sql_is_made_never_meets_a_tag(name: str) -> None:
    """Whatever its UPDATEs and INSERTs come from, it is what Peewee makes of them."""

    class Document(Base):
        data = CONVERTED_AT_ONCE[name]()
        note = peewee.TextField()

    cache = SqlCache(SQLITE)
    for value in ("quiet", "quieter", "loud", "quiet", "loud"):
        for query in (
            Document.update(data=value, note=value).where(Document.id == 1),
            Document.insert(data=value, note=value),
        ):
            found = from_cache(cache, query)
            assert found in (None, made_anew(SQLITE, query))


@pytest.mark.parametrize("convert", ["{}!".format, lambda tag: tag.upper()], ids=["text", "error"])
def test_a_statement_that_has_made_something_of_a_tag_is_not_remembered(
    convert: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it fail, whatever Peewee and its fields come to do as the SQL is made."""
    monkeypatch.setattr(peewee.Field, "to_value", lambda self, value: convert(value))
    cache = SqlCache(SQLITE)
    for name in "abc":
        query = User.update(name=name)
        assert from_cache(cache, query) in (None, made_anew(SQLITE, query))
    assert list(cache._templates.values()) == [False]


READ_ONCE: dict[str, Callable[[Any, Any], Any]] = {
    "insert": lambda upload, value: upload.insert(data=value),
    "update": lambda upload, value: upload.update(data=value).where(upload.id == 1),
    "select": lambda upload, value: upload.select().where(upload.data == value),
    "insertion": lambda upload, value: (upload, {"data": value}),
    "refused": lambda upload, value: upload.update(data=value).where(upload.text == "loud"),
    "sometimes refused": lambda upload, value: upload.insert(data=value, text="a"),
    "sometimes refused, insertion": lambda upload, value: (upload, {"data": value, "text": "a"}),
}


def test_a_value_that_comes_twice_is_converted_twice() -> None:
    """As Peewee does it: a converter may make another thing of it each time, a nonce, say."""
    numbers = itertools.count()

    class Numbered(peewee.CharField):
        def db_value(self, value: Any) -> Any:
            return f"{value}{next(numbers)}"

    class Ticket(Base):
        code = Numbered()
        text = Shouting(null=True)

    cache = SqlCache(SQLITE)
    for text in ("a", "a", "a", "loud", "loud"):
        others = Ticket.select(Ticket.id).where(Ticket.text == "c").limit(3)
        found_by = Ticket.code == "c", Ticket.id << others, Ticket.text == text
        query = Ticket.update(code="c").where(*found_by)
        found = cache.statement(query) or SQLITE.get_sql_context().parse(query)
        codes = [value for value in found[1] if str(value).startswith("c")]
        assert len(codes) == len(set(codes)) == 3
        assert found[1][-3:] == ["c", 3, text]
        assert ("UPPER" in found[0]) == (text == "loud")


@pytest.mark.parametrize("name", READ_ONCE)
def test_a_value_is_converted_once_for_each_execution(name: str) -> None:
    """What a converter reads, a file, say, isn't there a second time: also not as a statement comes
    to be remembered, or turns out not to be one that can be."""

    class Uploaded(peewee.BlobField):
        def db_value(self, value: Any) -> Any:
            return value.read()

    class Upload(Base):
        data = Uploaded()
        text = Shouting(null=True)

    cache = SqlCache(SQLITE)
    for text in ("a", "a", "a", "loud", "loud", "a"):
        made = READ_ONCE[name](Upload, io.BytesIO(b"content"))
        by_row = isinstance(made, tuple)
        if by_row and "text" in made[1]:
            made[1]["text"] = text
        elif name.startswith("sometimes"):
            made._insert[Upload.text] = text
        found = cache.insertion(*made) if by_row else cache.statement(made)
        if found is None:  # then Peewee makes it, which converts the values
            query = Upload.insert(**made[1]) if by_row else made
            found = SQLITE.get_sql_context().parse(query)
        assert b"content" in found[1]
        if name.startswith("sometimes"):
            assert ("UPPER" in found[0]) == (text == "loud")


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


def inserted(cache: SqlCache, model: Any, row: dict[str, Any]) -> tuple[str, list[Any]] | None:
    found = cache.insertion(model, row)
    return None if found is None else (found[0], exactly(found[1]))


@pytest.mark.parametrize("database", DATABASES, ids=lambda database: type(database).__name__)
def test_the_second_row_of_a_kind_and_all_that_follow_are_inserted_without_a_query(
    database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes from the cache is what Peewee makes of the query that isn't made any more."""
    cache = SqlCache(database)
    rows = [{"price": price, "owner": i, "title": "a"} for i, price in enumerate((None, 1, "2.5"))]
    expected = [made_anew(database, Item.insert(**row)) for row in rows]
    assert cache.insertion(Item, rows[0]) is None
    assert inserted(cache, Item, rows[1]) == expected[1]
    monkeypatch.setattr(Item, "insert", None)
    assert [inserted(cache, Item, row) for row in rows] == expected


def test_rows_that_peewee_makes_the_sql_of() -> None:
    """A row without a column that has a default, and one with an expression in it."""
    cache = SqlCache(SQLITE)
    for _ in range(3):
        assert cache.insertion(User, {"name": "ann"}) is None
    plain, expression = {"name": "ann", "active": True}, {"name": peewee.fn.LOWER("A"), "active": 1}
    assert cache.insertion(User, plain) is None
    for _ in range(2):
        assert cache.insertion(User, plain) is not None
        assert cache.insertion(User, expression) is None


def test_rows_of_a_model_that_is_changed() -> None:
    """Another name, schema or field of a model: what was remembered is forgotten."""

    class Thing(peewee.Model):
        text = peewee.TextField()

        class Meta:
            database = SQLITE

    def nothing() -> None:
        pass

    def rename() -> None:
        Thing._meta.set_table_name("other")

    def move() -> None:
        Thing._meta.schema = "elsewhere"

    def replace() -> None:
        Thing._meta.add_field("text", peewee.IntegerField(column_name="number"))

    def add() -> None:
        Thing._meta.add_field("more", peewee.TextField(default="much"))

    cache, row = SqlCache(SQLITE), {"text": "1"}
    for change in (nothing, rename, move, replace):
        change()
        for _ in range(3):
            assert inserted(cache, Thing, row) in (None, made_anew(SQLITE, Thing.insert(**row)))
        assert cache.insertion(Thing, row) is not None
    add()
    assert cache.insertion(Thing, row) is None


def test_rows_of_a_model_whose_column_has_the_name_of_another_field() -> None:
    """Two names in a row may mean one field, to Peewee: values must not change places."""

    class Swapped(Base):
        name = peewee.TextField(column_name="title", null=True)
        label = peewee.TextField(column_name="name", null=True)
        email = peewee.TextField()

    cache, row = SqlCache(SQLITE), {"name": "a", "label": "b", "email": "c"}
    for _ in range(3):
        assert inserted(cache, Swapped, row) in (None, made_anew(SQLITE, Swapped.insert(**row)))


def test_rows_of_a_model_that_is_changed_while_its_sql_is_made() -> None:
    """By another thread: what is remembered isn't taken for the new table's."""

    class Log(peewee.Model):
        text = peewee.TextField()

        class Meta:
            database = SQLITE

    class Renaming(SqlCache):
        def _statement(self, query: Any, shape: Any) -> Any:
            statement = super()._statement(query, shape)
            if statement is not None and Log._meta.table_name == "log":
                Log._meta.set_table_name("other")
            return statement

    cache, row = Renaming(SQLITE), {"text": "a"}
    assert inserted(cache, Log, row) is None
    assert inserted(cache, Log, row) is not None
    for _ in range(3):
        assert inserted(cache, Log, row) in (None, made_anew(SQLITE, Log.insert(**row)))
    assert cache.insertion(Log, row) is not None


def test_databases_that_return_keys_and_those_that_do_not() -> None:
    """Whether the INSERT returns the key belongs to the database, and may be set later."""
    database = peewee.SqliteDatabase(None)
    cache, row = SqlCache(database), {"text": "a", "read": True}

    class Note(peewee.Model):
        text = peewee.TextField()
        read = peewee.BooleanField()

    Note.bind(database)
    for returns in (False, True, False):
        database.init(None, returning_clause=returns)
        for _ in range(3):
            found = inserted(cache, Note, row)
        assert found == made_anew(database, Note.insert(**row))
        assert ("RETURNING" in found[0]) is returns


def test_random_rows_are_what_peewee_makes_of_them() -> None:
    """Whatever row is inserted comes out of one cache as Peewee makes it, or not at all."""
    cache = SqlCache(SQLITE)
    hits = 0
    others = st.sampled_from([field.name for field in VALUES if field is not User.active])
    rows = st.lists(others, unique=True, max_size=2).flatmap(
        lambda names: st.fixed_dictionaries(
            {name: VALUES[getattr(User, name)] for name in ["active", *names]}
        )
    )

    @given(st.lists(rows, min_size=5, max_size=20))
    def check(drawn: list[dict[str, Any]]) -> None:
        nonlocal hits
        for row in drawn:
            hits += (User, SQLITE.returning_clause, *row) in cache._insertions
            found = inserted(cache, User, row)
            assert found in (None, made_anew(SQLITE, User.insert(**row)))

    check()
    assert hits > settings().max_examples


def test_shapes_without_end_take_no_memory_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is full begins anew."""
    monkeypatch.setattr(sql_cache, "_KEPT", 10)
    cache = SqlCache(SQLITE)
    for length in range(1, 100):
        cache.statement(User.select().where(User.id << list(range(length))))
        assert len(cache._templates) <= 10
    fields = [f"field{number}" for number in range(12)]
    wide: Any = type("Wide", (Base,), {name: peewee.TextField(null=True) for name in fields})
    for name in fields * 2:
        cache.insertion(wide, {name: "a"})
        cache.insertion(wide, {name: "a"})
        assert len(cache._insertions) <= 10


def long(length: int) -> dict[str, Any]:
    """Queries with so many values."""
    some = list(range(length))
    cases = [(i, i) for i in some[1::2]]
    ors = [User.age == i for i in some]
    while len(ors) > 1:  # no deeper than Peewee can go
        ors = [functools.reduce(operator.or_, ors[i : i + 9]) for i in range(0, len(ors), 9)]
    by_ors = ors[0]
    return {
        "list": User.select().where(User.id << some),
        "decimals": User.select().where(User.age << list(map(Decimal, some))),
        "or": User.select().where(by_ors),
        "values": peewee.ValuesList([(i,) for i in some], columns=["a"]).select(),
        "update": User.update(name="a").where(User.id << some),
        "update by cases": User.update({User.age: peewee.Case(User.id, cases, some[0])}),
        "delete": User.delete().where(by_ors),
    }


@pytest.mark.parametrize("database", DATABASES, ids=lambda database: type(database).__name__)
@pytest.mark.parametrize("name", long(1))
def test_nothing_is_remembered_of_many_values(name: str, database: Any) -> None:
    """However many lengths come, and however often: their number is that of the short ones."""
    cache = SqlCache(database)
    for length in (MANY - 1, MANY + 3, MANY + 9, 2 * MANY):
        for _ in range(3):
            query = long(length)[name]
            found = from_cache(cache, query)
            assert found in (None, made_anew(database, query))
        assert (found is not None) is (length < MANY)
        assert len(cache._templates) == 1


def test_rows_of_many_columns_are_remembered() -> None:
    """A model has as many columns as it has, and no more with each request."""
    names = [f"field{number}" for number in range(MANY + 9)]
    wide: Any = type("Broad", (Base,), {name: peewee.TextField(null=True) for name in names})
    cache = SqlCache(SQLITE)
    for text in "abc":
        row = dict.fromkeys(names, text)
        update = wide.update(**row).where(wide.id == 1)
        found = from_cache(cache, update), inserted(cache, wide, row)
    assert found == (made_anew(SQLITE, update), made_anew(SQLITE, wide.insert(**row)))


def test_what_is_known_of_sql(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found out once for each text, but for those with many values, and long ones. What is
    full begins anew.
    """
    monkeypatch.setattr(sql_cache, "_KEPT", 3)
    monkeypatch.setattr(sql_cache, "_LONGEST", 5000)
    asked: list[str] = []

    def ask(sql: str) -> int:
        asked.append(sql)
        return len(sql)

    known = Known(ask)
    for _ in range(2):
        assert known["a"] == 1
    assert asked == ["a"]
    for param in ("?", "%s"):
        texts = [", ".join([param] * count) for count in (MANY, MANY + 1)]
        for _ in range(2):
            assert [known[text] for text in texts] == list(map(len, texts))
        assert [asked.count(text) for text in texts] == [1, 2]
    long_text = "1" * 5001
    assert [known[long_text], known[long_text]] == [5001, 5001]
    assert asked.count(long_text) == 2
    assert len(known) == 3
    assert known["b"] == 1
    assert list(known) == ["b"]


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
