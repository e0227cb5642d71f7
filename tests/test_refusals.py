"""Which field a database refused, told from its error: on each database, in its odd corners."""

import time
from collections.abc import Callable
from typing import Any

import peewee
import pymysql
import pytest
from fastapi import Body
from pydantic import BaseModel

from fastapi_peewee import Database, InTransaction, connect
from fastapi_peewee.refusals import kind_of, refused_fields
from tests.apps import client, connected, make_app
from tests.apps import db as db

Case = tuple[Callable[[], Any], str, list[str]]
LIKE_A_MESSAGE = "x' for key 'A named 'index'', `low`"


class Odd:
    """Tables and columns with names that need quoting, and constraints of all kinds."""

    def __init__(self, db: Database, schema_name: str | None = None) -> None:
        class Shelf(db.Model):
            code = peewee.CharField(primary_key=True, column_name="The Code", max_length=10)
            up = peewee.ForeignKeyField("self", null=True, column_name="up.id")

            class Meta:
                table_name = "Shelf, of 'the' Shop"
                schema = schema_name

        class Book(db.Model):
            isbn = peewee.CharField(column_name='I "S" BN', unique=True, max_length=40, null=True)
            title = peewee.CharField(max_length=10, column_name="TITLE")
            shelf = peewee.ForeignKeyField(Shelf, constraint_name="own_name", column_name="Shelf")
            other = peewee.ForeignKeyField(Shelf, column_name="other_shelf", null=True)
            row = peewee.SmallIntegerField(column_name="row.number", default=1)
            place = peewee.SmallIntegerField(default=1)
            price = peewee.DecimalField(
                max_digits=5,
                decimal_places=2,
                default=1,
                column_name="Price",
                constraints=[peewee.Check('"Price" > 0.5')],
            )
            low = peewee.IntegerField(default=1)
            high = peewee.IntegerField(default=2)
            slug = peewee.CharField(null=True, column_name="slug_text", max_length=20)
            rate = peewee.FloatField(default=1)

            class Meta:
                table_name = 'my."Book"s'
                schema = schema_name
                constraints = (
                    peewee.Check('"low" < "high"', name="in Order"),
                    peewee.SQL('CONSTRAINT "one.Place" UNIQUE ("place", "row.number", "low")'),
                )

        if isinstance(db, peewee.MySQLDatabase):
            Book.price.constraints = [peewee.Check("`Price` > 0.5")]
            Book._meta.constraints = (
                peewee.Check("`low` < `high`", name="in Order"),
                peewee.SQL("CONSTRAINT `one.Place` UNIQUE (`place`, `row.number`, `low`)"),
            )
        else:
            Book.add_index(
                Book.index(peewee.fn.LOWER(Book.slug), unique=True, name="slug, lowered")
            )
        Book.add_index(Book.index(Book.title, Book.rate, unique=True, name="A named 'index'"))
        self.Shelf: Any = Shelf
        self.Book: Any = Book

    def fill(self) -> None:
        self.Shelf.create(code="a")
        self.Book.create(isbn="x", title="t", shelf="a", place=7, slug="One", rate=7)
        self.Book.create(isbn=LIKE_A_MESSAGE, title="u", shelf="a")

    def book(self, **values: Any) -> Callable[[], Any]:
        """A book with one thing wrong with it."""
        count = self.Book.select().count
        return lambda: self.Book.create(
            **{"title": f"book {count()}", "shelf": "a", "place": count() + 100, **values}
        )

    def cases(self) -> dict[str, Case]:
        book, Book, Shelf, db = self.book, self.Book, self.Shelf, self.Book._meta.database

        def many() -> None:
            rows = [
                {"isbn": isbn, "title": isbn, "shelf": "a", "place": place}
                for place, isbn in enumerate(("m", "n", "x"), 20)
            ]
            Book.insert_many(rows).execute()

        def bulk() -> None:
            with db.atomic():
                Book.bulk_create(
                    [Book(title="b" * n, shelf="a", place=30 + n) for n in (1, 2, 11)], batch_size=2
                )

        return {
            "column": (book(isbn="x"), "unique", ["isbn"]),
            "named index": (book(title="t", rate=7), "unique", ["title", "rate"]),
            "of an expression": (book(slug="oNE"), "unique", ["slug"]),
            "table's unique": (book(place=7), "unique", ["place", "row", "low"]),
            "key": (lambda: Shelf.create(code="a"), "unique", ["code"]),
            "many at once": (many, "unique", ["isbn"]),
            "bulk_create": (bulk, "data", ["title"]),
            "quotes in the value": (book(isbn=LIKE_A_MESSAGE), "unique", ["isbn"]),
            "a value like a message": (book(title="x' `place` 'low"), "data", ["title"]),
            "named reference": (book(shelf="nowhere"), "reference", ["Shelf"]),
            "reference": (book(other="nowhere"), "reference", ["other_shelf"]),
            "to itself": (lambda: Shelf.create(code="b", up="c"), "reference", ["up.id"]),
            "deleted, referred to": (lambda: Shelf.get().delete_instance(), "reference", []),
            "check": (book(price="0.25"), "check", ["price"]),
            "table's check": (book(low=5, high=1), "check", ["low", "high"]),
            "null": (book(title=None), "missing", ["title"]),
            "null key": (book(shelf=None), "missing", ["Shelf"]),
            "too long": (book(title="x" * 11), "data", ["title"]),
            "a key too long": (lambda: Shelf.create(code="x" * 11), "data", ["code"]),
            "out of range": (book(row=2**15), "data", ["row"]),
            "a number too large": (book(price=1000), "data", ["price"]),
            "more than 64 bits": (book(row=2**70), "data", ["row"]),
            "a surrogate": (book(title="\ud800"), "data", ["title"]),
            "update": (lambda: Book.update(title="x" * 11, low=1).execute(), "data", ["title"]),
            "update by a sum": (
                lambda: Book.update(low=Book.low - 1, row=2**15).execute(),
                "data",
                ["row"],
            ),
        }


#: What SQLite stores, whatever the column's declaration.
STORED_BY_SQLITE = {
    "bulk_create",
    "a value like a message",
    "too long",
    "a key too long",
    "out of range",
    "a number too large",
    "update",
    "update by a sum",
}


@pytest.mark.parametrize("how", ["endpoint", "savepoint", "run", "atomic"])
async def test_the_field_is_named(db: Database, how: str) -> None:
    """In bulk or alone, in savepoints, in `db.run` and in `db.atomic()`: for each constraint the
    API's names of its fields, whatever the names of tables, columns and constraints look like."""
    odd = Odd(db)
    await db.acreate_tables([odd.Shelf, odd.Book])
    await db.run(odd.fill)
    await check(db, odd, how)


async def test_the_field_is_named_in_a_schema(postgres_url: str) -> None:
    """PostgreSQL: of two tables of one name it is the one in the schema."""
    async with connected(postgres_url) as db:
        misleading: Any = Odd(db)
        for model in (misleading.Book, misleading.Shelf):
            for field in model._meta.sorted_fields:
                field.name = f"not_{field.name}"
        odd = Odd(db, schema_name='Shop "1"')
        await db.run(db.execute_sql, 'CREATE SCHEMA "Shop ""1"""')
        await db.acreate_tables([odd.Shelf, odd.Book])
        await db.run(odd.fill)
        await check(db, odd, "endpoint")


LANGUAGES = ["de_DE", "zh_CN", "ja_JP", "it_IT", "hu_HU", "ru_RU"]


async def test_the_field_is_named_in_every_language(mysql_url: str) -> None:
    """MySQL and MariaDB, whatever language their messages are in."""
    async with connected(mysql_url, pool_size=1) as db:
        odd = Odd(db)
        await db.acreate_tables([odd.Shelf, odd.Book])
        await db.run(odd.fill)
    for language in LANGUAGES:
        async with connected(
            mysql_url, pool_size=1, init_command=f"SET lc_messages = '{language}'"
        ) as db:
            for model in (odd.Shelf, odd.Book):
                model._meta.set_database(db)
            await check(db, odd, "endpoint")


async def check(db: Database, odd: Odd, how: str) -> None:
    cases = odd.cases()
    app = make_app(db)

    @app.post("/endpoint/{name}")
    def endpoint(name: str) -> None:
        cases[name][0]()

    @app.post("/savepoint/{name}")
    def savepoint(name: str, held: InTransaction) -> None:
        with db.atomic(), db.savepoint():
            cases[name][0]()

    @app.post("/run/{name}")
    async def run(name: str) -> None:
        await db.run(cases[name][0])

    @app.post("/atomic/{name}")
    async def atomic(name: str) -> None:
        async with db.atomic(), db.atomic():
            await db.run(cases[name][0])

    expected: dict[str, Any] = {}
    found: dict[str, Any] = {}
    async with client(app) as http:
        for name, (_, kind, fields) in cases.items():
            if isinstance(db, peewee.SqliteDatabase) and name in STORED_BY_SQLITE:
                continue
            if isinstance(db, peewee.MySQLDatabase) and name == "of an expression":
                continue  # MariaDB has no such index
            known = fields
            if isinstance(db, peewee.MySQLDatabase) and not db.mariadb and name == "check":
                known = []  # MySQL numbers those without a name
            if (
                isinstance(db, peewee.SqliteDatabase)
                and kind == "reference"
                and name != "to itself"
            ):
                known = []  # SQLite doesn't say which of several
            response = await http.post(f"/{how}/{name}")
            loc = [["body", field] for field in known] or [["body"]]
            expected[name] = (409 if kind == "unique" else 422, [(kind, place) for place in loc])
            details = response.json()["detail"] if response.status_code != 500 else ()
            found[name] = (response.status_code, [(each["type"], each["loc"]) for each in details])
    wrong = {name: (found[name], expected[name]) for name in found if found[name] != expected[name]}
    assert wrong == {}


#: What MySQL 8 says where MariaDB says something else.
OF_MYSQL: dict[str, tuple[int, str, str, list[str]]] = {
    "unique": (
        1062,
        "Duplicate entry 'u-7' for key 'book.A named 'index''",
        "unique",
        ["TITLE", "rate"],
    ),
    "key": (1062, "Duplicate entry 'a' for key 'book.PRIMARY'", "unique", ["id"]),
    "check": (3819, "Check constraint 'in Order' is violated.", "check", ["low", "high"]),
    "unnamed check": (3819, "Check constraint 'book_chk_1' is violated.", "check", []),
    "data": (1366, "Incorrect integer value: 'low' for column 'high' at row 1", "data", ["high"]),
    "no column": (1292, "Truncated incorrect DOUBLE value: 'low'", "data", []),
}


@pytest.mark.parametrize("name", OF_MYSQL)
def test_the_field_is_named_by_mysql(name: str) -> None:
    """The forms of MySQL's own messages are known, too."""
    code, message, kind, columns = OF_MYSQL[name]
    db: Any = connect("mysql://localhost/nowhere")
    odd = Odd(db)
    error: Any = peewee.IntegrityError(pymysql.err.IntegrityError(code, message), code, message)
    error.statement = (db, *odd.Book.insert(low=1).sql())
    fields = refused_fields(error, kind)  # type: ignore[arg-type]
    assert [field.column_name for field in fields] == columns


async def test_a_reference_that_is_checked_at_the_end(db: Database) -> None:
    """A deferred foreign key fails at COMMIT: 422, before the response, and nothing is stored."""
    if isinstance(db, peewee.MySQLDatabase):
        pytest.skip("MySQL has no deferred constraints")

    class Parent(db.Model):
        pass

    class Child(db.Model):
        parent = peewee.ForeignKeyField(Parent, deferrable="INITIALLY DEFERRED")

    await db.acreate_tables([Parent, Child])
    app = make_app(db)

    @app.post("/dependency")
    def dependency(held: InTransaction) -> None:
        Child.create(parent=404)

    @app.post("/block")
    def block() -> None:
        with db.atomic():
            Child.create(parent=404)

    @app.post("/async")
    async def asynchronous() -> None:
        async with db.atomic():
            await Child.acreate(parent=404)

    place = ["body"] if isinstance(db, peewee.SqliteDatabase) else ["body", "parent_id"]
    async with client(app) as http:
        for path in ("/dependency", "/block", "/async"):
            response = await http.post(path)
            assert response.status_code == 422, path
            [detail] = response.json()["detail"]
            assert (detail["type"], detail["loc"]) == ("reference", place), path
    assert await db.count(Child.select()) == 0


async def test_a_restricted_reference(db: Database) -> None:
    """`ON DELETE RESTRICT` refuses with 422 as well."""

    class Parent(db.Model):
        pass

    class Child(db.Model):
        parent = peewee.ForeignKeyField(Parent, on_delete="RESTRICT")

    await db.acreate_tables([Parent, Child])
    await Child.acreate(parent=await Parent.acreate())
    app = make_app(db)

    @app.delete("/{number}")
    def endpoint(number: int) -> None:
        Parent.delete_by_id(number)

    async with client(app) as http:
        response = await http.delete("/1")
        assert response.status_code == 422
        assert response.json()["detail"][0]["type"] == "reference"


async def test_the_place_is_where_the_request_has_the_value(db: Database) -> None:
    """A foreign key may be called as its field or as its id is, in the path or in the query."""

    class Team(db.Model):
        pass

    class Member(db.Model):
        team = peewee.ForeignKeyField(Team)

    await db.acreate_tables([Team, Member])
    app = make_app(db)

    @app.post("/query")
    def query(team: int) -> None:
        Member.create(team=team)

    @app.post("/path/{team_id}")
    def path(team_id: int) -> None:
        Member.create(team=team_id)

    async with client(app) as http:
        for url, place in (("/query?team=9", ["query", "team"]), ("/path/9", ["path", "team_id"])):
            response = await http.post(url)
            assert [each["loc"] for each in response.json()["detail"]] == [place]


async def test_names_that_no_model_has_stay_inside(db: Database) -> None:
    """A constraint of a migration's, of a trigger's table or of a raw statement: its fields if the
    model has them, else nothing is named."""

    class Note(db.Model):
        text = peewee.CharField(column_name="note_text", max_length=20)

    await db.acreate_tables([Note])
    quote = "`" if isinstance(db, peewee.MySQLDatabase) else '"'

    def migrate() -> None:
        for sql in (
            "CREATE TABLE 'secret_table' ('secret_column' INT NOT NULL UNIQUE)",
            "CREATE UNIQUE INDEX 'secret_index' ON 'note' ('note_text')",
            "INSERT INTO 'secret_table' VALUES (1)",
        ):
            db.execute_sql(sql.replace("'", quote))
        Note.create(text="a")

    await db.run(migrate)
    app = make_app(db)

    @app.post("/")
    def endpoint(sql: str = Body()) -> None:
        db.execute_sql(sql.replace("'", quote))

    @app.get("/get")
    @app.get("/get/{n}")
    def get(sql: str) -> None:
        db.execute_sql(sql.replace("'", quote))

    @app.post("/note")
    def note() -> None:
        Note.create(text="a")

    @app.post("/by_name")
    def by_name() -> None:
        text = ":text" if isinstance(db, peewee.SqliteDatabase) else "%(text)s"
        db.execute_sql(f"INSERT INTO note (note_text) VALUES ({text})", {"text": "a"})

    async with client(app) as http:
        for sql, status in (("VALUES (1)", 409), ("VALUES (NULL)", 422)):
            response = await http.post("/", json=f"INSERT INTO 'secret_table' {sql}")
            assert response.status_code == status
            assert [each["loc"] for each in response.json()["detail"]] == [["body"]]
            for path, part in (("/get", "query"), ("/get/1", "path")):
                response = await http.get(path, params={"sql": f"INSERT INTO 'secret_table' {sql}"})
                assert [each["loc"] for each in response.json()["detail"]] == [[part]]
        place = ["body"] if isinstance(db, peewee.MySQLDatabase) else ["body", "text"]
        for path in ("/note", "/by_name"):
            response = await http.post(path)
            assert (response.status_code, response.json()["detail"][0]["loc"]) == (409, place)


@pytest.mark.parametrize("value", [2**70, -(2**70)])
async def test_a_number_that_sqlite_has_no_place_for(sqlite_url: str, value: int) -> None:
    """422 for a number of more than 64 bits, whatever went wrong on that connection before."""
    async with connected(sqlite_url, pool_size=1) as db:

        class Parent(db.Model):
            pass

        class Child(db.Model):
            parent = peewee.ForeignKeyField(Parent, null=True)

        await db.acreate_tables([Parent, Child])
        app = make_app(db)

        @app.post("/{number}")
        def create(number: int) -> None:
            Child.create(parent=number)

        @app.get("/{number}")
        def read(number: int) -> int:
            return int(Child.select().where(Child.parent == number).count())

        async with client(app) as http:
            for _ in range(3):
                assert (await http.get("/1")).text == "0"
                response = await http.post("/404")
                assert response.json()["detail"][0]["type"] == "reference"
                for refused in (await http.get(f"/{value}"), await http.post(f"/{value}")):
                    assert refused.status_code == 422
                    assert refused.json()["detail"][0]["type"] == "data"


@pytest.mark.parametrize("options", [{}, {"inline_reads": 0.01}], ids=["threads", "inline"])
async def test_a_search_for_what_no_column_holds(
    database_url: str, options: dict[str, Any]
) -> None:
    """It is refused with 422 or finds nothing, whichever way the query is read, the first time and
    when its SQL is known."""
    if options and not database_url.startswith("sqlite"):
        pytest.skip("inline_reads is SQLite's")
    async with connected(database_url, **options) as db:

        class Note(db.Model):
            text = peewee.CharField(default="")
            number = peewee.IntegerField(default=1)
            share = peewee.FloatField(default=0.5)

        class NoteOut(BaseModel):
            text: str

        await db.acreate_tables([Note])
        await Note.acreate(text="a")
        searched = {
            "text": Note.text == "a",
            "a surrogate": Note.text == "\ud800",
            "NUL": Note.text == "\0",
            "number": Note.number == 1,
            "65 bits": Note.number == 2**63,
            "71 bits": Note.number == -(2**70),
            "NaN": Note.share == float("nan"),
            "infinite": Note.share == float("-inf"),
            "limit": None,
        }
        app = make_app(db)

        def sync(name: str) -> Any:
            where = searched[name]
            return Note.select().limit(2**63 - 1) if where is None else Note.select().where(where)

        async def asynchronous(name: str) -> Any:
            return sync(name)

        app.get("/def/{name}", response_model=list[NoteOut])(sync)
        app.get("/async/{name}", response_model=list[NoteOut])(asynchronous)
        async with client(app) as http:
            for path in ("/def", "/async"):
                for name in (*searched, *searched):
                    response = await http.get(f"{path}/{name}")
                    if name in ("text", "number", "limit"):
                        assert (response.status_code, response.json()) == (200, [{"text": "a"}])
                    elif response.status_code != 422:
                        assert (response.status_code, response.json()) == (200, []), name


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
async def test_a_number_that_is_none(db: Database, value: str) -> None:
    """NaN and the infinite are stored or refused with 422; they are no error of the server's."""

    class Note(db.Model):
        number = peewee.FloatField(null=True)

    await db.acreate_tables([Note])
    app = make_app(db)

    @app.post("/")
    def endpoint(number: float = Body()) -> None:
        Note.create(number=number)

    async with client(app) as http:
        response = await http.post("/", content=value, headers={"content-type": "application/json"})
    if isinstance(db, peewee.MySQLDatabase):
        [detail] = response.json()["detail"]
        assert (response.status_code, detail["loc"]) == (422, ["body", "number"])
    else:
        assert response.status_code == 200


async def test_what_a_strict_table_refuses(sqlite_url: str) -> None:
    """Of SQLite's STRICT tables the field is named that was given a value of another type."""
    async with connected(sqlite_url) as db:

        class Note(db.Model):
            text = peewee.CharField()
            number = peewee.IntegerField()

        sql = "CREATE TABLE note (id INTEGER PRIMARY KEY, text TEXT, number INTEGER) STRICT"
        await db.aexecute_sql(sql)
        with pytest.raises(peewee.IntegrityError) as failure:
            await db.aexecute_sql("INSERT INTO note (text, number) VALUES (?, ?)", ("a", "b"))
        assert kind_of(failure.value) == "data"
        assert refused_fields(failure.value, "data") == [Note.number]


async def test_a_table_alone_names_no_field(postgres_url: str) -> None:
    """A trigger may refuse a row, and say no more than whose it was."""
    async with connected(postgres_url) as db:

        class Note(db.Model):
            text = peewee.CharField()

        with pytest.raises(peewee.IntegrityError) as failure:
            await db.aexecute_sql(
                "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '23514', TABLE = 'note'; END $$"
            )
        assert Note._meta.table_name == "note"
        assert refused_fields(failure.value, "check") == []


async def test_an_index_in_sql_hides_no_other(sqlite_url: str) -> None:
    """What a model has as a text names no fields; the others do."""
    async with connected(sqlite_url) as db:

        class Note(db.Model):
            text = peewee.CharField(null=True)

        Note.add_index(peewee.SQL("CREATE UNIQUE INDEX by_sql ON note (text || 'x')"))
        Note.add_index(Note.index(peewee.fn.LOWER(Note.text), unique=True, name="lowered"))
        await db.acreate_tables([Note])
        await Note.acreate(text="a")
        with pytest.raises(peewee.IntegrityError, match="lowered") as failure:
            await Note.acreate(text="A")
        assert refused_fields(failure.value, "unique") == [Note.text]


async def test_a_text_that_is_no_number(postgres_url: str) -> None:
    """The field is named that was to hold a decimal."""
    async with connected(postgres_url) as db:

        class Note(db.Model):
            text = peewee.CharField()
            price = peewee.DecimalField()

        await db.acreate_tables([Note])
        with pytest.raises(peewee.DataError) as failure:
            await db.aexecute_sql("INSERT INTO note (text, price) VALUES (%s, %s)", ("a", "dear"))
        assert refused_fields(failure.value, "data") == [Note.price]


async def test_a_reference_to_a_row_that_changes(db: Database) -> None:
    """A key that others refer to can't be changed; the field isn't that of the others."""

    class Parent(db.Model):
        name = peewee.CharField(primary_key=True)

    class Child(db.Model):
        parent = peewee.ForeignKeyField(Parent)

    await db.acreate_tables([Parent, Child])
    await Parent.acreate(name="a")
    await Child.acreate(parent="a")
    with pytest.raises(peewee.IntegrityError) as failure:
        await Parent.update(name="b").aexecute()
    assert kind_of(failure.value) == "reference"
    assert refused_fields(failure.value, "reference") == []


async def test_a_value_like_a_message(postgres_url: str) -> None:
    """What a client sends isn't taken for the columns of a constraint that no model declares."""
    async with connected(postgres_url) as db:

        class User(db.Model):
            name = peewee.CharField()
            secret = peewee.CharField(default="")

        await db.acreate_tables([User])
        await db.aexecute_sql('CREATE UNIQUE INDEX lowered ON "user" (lower(name))')
        for value in ("x (secret)=(y", "(secret)=(y", "x"):
            await User.acreate(name=value)
            with pytest.raises(peewee.IntegrityError, match="lowered") as failure:
                await User.acreate(name=value.upper())
            assert refused_fields(failure.value, "unique") == []


async def test_a_long_text_that_is_refused_is_answered_soon(postgres_url: str) -> None:
    """To look for the field doesn't stop the event loop, however much was sent."""
    async with connected(postgres_url) as db:

        class Note(db.Model):
            text = peewee.TextField()
            number = peewee.SmallIntegerField()

        await db.acreate_tables([Note])
        text = "x" * 20_000_000
        with pytest.raises(peewee.DataError) as failure:
            await Note.acreate(text=text, number=2**20)
        begun = time.thread_time()
        assert refused_fields(failure.value, "data") == [Note.number]
        assert time.thread_time() - begun < 0.5  # character by character, it's more than 1
