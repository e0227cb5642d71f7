"""`respond(…, stream=…)`: many rows, flat memory, a connection only while the database reads."""

import asyncio
import csv
import functools
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import peewee
import psycopg
import pytest
from fastapi import Depends
from fastapi.routing import APIRoute
from playhouse import postgres_ext
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)
from starlette.background import BackgroundTask

from fastapi_peewee import (
    Database,
    InTransaction,
    PeeweeRoute,
    connect,
    get_db,
    param,
    prepared,
    respond,
)
from fastapi_peewee.loading import Plans
from fastapi_peewee.mysql import MySQLDatabase
from fastapi_peewee.responses import _Pipe
from tests.apps import back_to_rest, client, connected, make_app, refusal, walk_away
from tests.apps import db as db
from tests.apps import no_collector as no_collector

COUNT = 2500  # several times what is read at a time


class PageOut(BaseModel):
    number: int


class BookOut(BaseModel):
    id: int
    title: str
    good: bool | None = Field(alias="isGood")
    pages: list[PageOut]


class Checked(BookOut):
    @field_validator("title")
    @classmethod
    def loud(cls, title: str) -> str:
        return title.upper()


@pytest.fixture
async def books(db: Database) -> Any:
    class Book(db.Model):
        title = peewee.CharField()
        good = peewee.BooleanField(null=True)

        @property
        def isGood(self) -> Any:  # noqa: N802
            return self.good

    class Page(db.Model):
        number = peewee.IntegerField()
        book = peewee.ForeignKeyField(Book, backref="pages")

    await db.acreate_tables([Book, Page])
    rows = [{"title": f'é "{n}"', "good": [True, False, None][n % 3]} for n in range(COUNT)]
    await db.run(lambda: Book.insert_many(rows).execute())
    await db.run(lambda: Page.insert_many([{"number": 7, "book": 1}]).execute())
    return Book


class Plain(BaseModel):
    id: int
    title: str
    pages: list[PageOut]


@pytest.mark.parametrize("route_class", [PeeweeRoute, APIRoute])
@pytest.mark.parametrize("kind", ["def", "async"])
async def test_a_json_array(
    db: Database, books: Any, kind: str, route_class: type[APIRoute]
) -> None:
    """`stream=True` sends the bytes that the whole response would have, in pieces."""
    app = make_app(db, route_class)

    def endpoint(stream: bool) -> Any:
        return respond(books.select().order_by(books.id), list[Plain], stream=stream)

    async def coroutine(stream: bool) -> Any:
        return endpoint(stream)

    app.get("/", response_model=None)(endpoint if kind == "def" else coroutine)
    async with client(app) as http:
        whole = await http.get("/?stream=false")
        streamed = await http.get("/?stream=true")
    assert json.loads(whole.content) == json.loads(streamed.content)
    assert len(whole.json()) == COUNT
    assert whole.json()[0] == {"id": 1, "title": 'é "0"', "pages": [{"number": 7}]}
    assert "content-length" not in streamed.headers
    assert streamed.headers["content-type"] == "application/json"
    assert db.pool_stats.in_use == 0


async def test_the_hooks(db: Database, books: Any) -> None:
    """The statement of a stream is seen by Peewee's hooks, as any other."""
    app = make_app(db)
    seen: list[str] = []
    db.query_hooks.append(lambda event: seen.append(event.sql))

    @app.get("/", response_model=None)
    def endpoint() -> Any:
        return respond(books.select(), list[Plain], stream=True)

    async with client(app) as http:
        assert len((await http.get("/")).json()) == COUNT
    assert len([sql for sql in seen if "SELECT" in sql]) == 1


@pytest.mark.parametrize("type_", [Plain, Checked], ids=["json plan", "another plan"])
@pytest.mark.parametrize("many", [list, Iterable])
async def test_lines(db: Database, books: Any, type_: Any, many: Any) -> None:
    """`stream="jsonl"` sends one JSON text a line, whichever the plan is."""
    app = make_app(db)

    @app.get("/", response_model=None)
    def lines() -> Any:
        return respond(books.select().order_by(books.id), many[type_], stream="jsonl")

    async with client(app) as http:
        response = await http.get("/")
    assert response.headers["content-type"] == "application/jsonl"
    assert response.text.endswith("\n")
    rows = [json.loads(line) for line in response.text.splitlines()]
    assert [row["id"] for row in rows] == list(range(1, COUNT + 1))
    assert rows[1]["title"] == ('É "1"' if type_ is Checked else 'é "1"')
    assert [row["pages"] for row in rows[:2]] == [[{"number": 7}], []]


async def test_csv(db: Database, books: Any) -> None:
    """`stream="csv"` sends a line of names, then the values: nested ones as JSON, no null"""
    app = make_app(db)

    @app.get("/", response_model=None)
    def table(limit: int) -> Any:
        query = books.select().order_by(books.id).limit(limit)
        return respond(query, list[Checked], stream="csv", headers={"x-a": "b"})

    async with client(app) as http:
        response = await http.get("/?limit=3")
        none = await http.get("/?limit=0")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    assert response.headers["x-a"] == "b"
    assert list(csv.reader(io.StringIO(response.text, newline=""))) == [
        ["id", "title", "isGood", "pages"],
        ["1", 'É "0"', "true", '[{"number":7}]'],
        ["2", 'É "1"', "false", "[]"],
        ["3", 'É "2"', "", "[]"],
    ]
    assert none.text == "id,title,isGood,pages\r\n"


@pytest.mark.parametrize(("form", "body"), [("json", "[]"), ("jsonl", "")])
async def test_no_rows(db: Database, books: Any, form: Any, body: str) -> None:
    """A stream of no rows is an empty array, or nothing."""
    app = make_app(db)

    @app.get("/", response_model=None)
    def nothing() -> Any:
        return respond(books.select().where(books.id < 0), list[Plain], stream=form)

    async with client(app) as http:
        assert (await http.get("/")).text == body


async def test_a_failure_before_the_first_row_is_an_error_response(
    db: Database, books: Any
) -> None:
    """What goes wrong before the first byte is answered as any other error: 503, 500."""
    app = make_app(db)
    db.pool.timeout = 0.05

    @app.get("/", response_model=None)
    async def stream(bad: bool = False) -> Any:
        query = books.select()
        if bad:
            query = query.where(peewee.SQL("nonsense"))
        return respond(query, list[Plain], stream=True)

    async with client(app) as http:
        assert (await http.get("/?bad=true")).status_code == 500
        leases = [await db.pool.acquire() for _ in range(db.pool.size)]
        response = await http.get("/")
        for lease in leases:
            db.pool.give_back(lease)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert db.pool_stats.in_use == 0


async def test_head(db: Database, books: Any) -> None:
    """HEAD has the status and the headers of GET, and what GET would send isn't read."""
    app = make_app(db)
    answered = threading.Event()
    late: list[int] = []

    class Noted(Plain):
        @field_validator("id")
        @classmethod
        def note(cls, id_: int) -> int:
            if id_ == 501 and not answered.wait(5):  # 500 are read at a time
                late.append(id_)
            return id_

    @app.api_route("/", methods=["GET", "HEAD"], response_model=None)
    def stream() -> Any:
        return respond(books.select().order_by(books.id), list[Noted], stream="csv")

    @app.api_route("/none", methods=["GET", "HEAD"], response_model=None)
    def wrong() -> Any:
        return respond(books.select(peewee.SQL("wrong")), list[Plain], stream="csv")

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered.set()

        await app(scope, receive, sending)

    async with client(watched) as http:
        head = await http.head("/")
        assert late == []
        get = await http.get("/")
        assert (head.status_code, head.headers) == (get.status_code, get.headers)
        assert head.content == b""
        assert (await http.head("/none")).status_code == 500
    await back_to_rest(db)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_client_that_goes_away(
    db: Database, books: Any, no_collector: None, spec_version: str
) -> None:
    """When the client has gone, reading stops and the connection goes back."""
    app = make_app(db)
    sent = threading.Event()  # a first piece has been sent
    told = threading.Event()  # the application has heard that the client is gone
    read: list[int] = []

    class Noted(Plain):
        @field_validator("id")
        @classmethod
        def note(cls, id_: int) -> int:
            if id_ > 500:  # as many as are read at a time
                assert sent.wait(10)
            if id_ > 1000:
                assert told.wait(10)  # at the latest when the second piece was to be sent
            read.append(id_)
            return id_

    @app.get("/", response_model=None)
    def stream() -> Any:
        return respond(books.select().order_by(books.id), list[Noted], stream="jsonl")

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def hearing() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect":
                told.set()
            return message

        async def sending(message: Any) -> None:
            try:
                await send(message)
            except OSError:
                told.set()
                raise
            if message.get("body"):
                sent.set()

        await app(scope, hearing, sending)

    await walk_away(watched, "/", after=1, spec_version=spec_version)
    await back_to_rest(db)
    assert told.is_set()
    assert 500 <= len(read) < COUNT


@pytest.mark.parametrize("kind", ["def", "async"])
@pytest.mark.parametrize("way", ["query", "respond", "stream"])
async def test_what_a_transaction_wrote_with_one_connection(
    database_url: str, kind: str, way: str
) -> None:
    """What is returned under `InTransaction` has what the endpoint wrote; one connection does."""
    async with connected(database_url, pool_size=1, timeout=5) as db:

        class Row(db.Model):
            text = peewee.CharField()

        class RowOut(BaseModel):
            text: str

        def returned() -> Any:
            if way == "query":
                return Row.select()
            return respond(Row.select(), list[RowOut], stream=way == "stream")

        app = make_app(db)
        model = list[RowOut] if way == "query" else None
        if kind == "def":

            @app.get("/", response_model=model)
            def endpoint(transaction: InTransaction) -> Any:
                Row.create(text="a")
                return returned()

        else:

            @app.get("/", response_model=model)
            async def aendpoint(transaction: InTransaction) -> Any:
                await Row.acreate(text="a")
                return returned()

        await db.acreate_tables([Row])
        async with client(app, raises=True) as http:
            found = await asyncio.gather(*(http.get("/") for _ in range(3)))
        assert {row["text"] for response in found for row in response.json()} == {"a"}
        assert all(response.json() for response in found)
        assert await db.run(lambda: Row.select().count()) == 3


async def test_a_stream_that_mysql_can_not_be_told_to_end(mysql_url: str) -> None:
    """MySQL sends a result to its end: the connection is closed, but for a transaction's."""
    async with connected(mysql_url, pool_size=1) as db:

        class Row(db.Model):
            text = peewee.CharField()

        class RowOut(BaseModel):
            text: str

        def connection_id() -> int:
            return int(db.execute_sql("SELECT CONNECTION_ID()").fetchone()[0])

        def read_a_little() -> None:
            chunks = Plans(list[RowOut]).plan(Row.select()).stream(db, 10)
            assert len(next(chunks)) == 10
            chunks.close()

        await db.acreate_tables([Row])
        await db.run(lambda: Row.insert_many([{"text": "a"}] * 100).execute())
        before = await db.run(connection_id)
        await db.run(read_a_little)
        assert await db.run(connection_id) != before
        async with db.atomic():
            row = await Row.acreate(text="b")
            await db.run(read_a_little)
            assert await db.run(connection_id) != before
        assert await Row.aget_by_id(row.id) == row


async def test_rows_that_mysql_cuts(mysql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too long for MariaDB's aggregation is read as rows, or breaks the stream off.

    It says so after the last row, with a warning. MySQL's aggregation has no such limit.
    """
    initialise = MySQLDatabase._initialize_connection

    def with_low_limit(self: Any, conn: Any) -> None:
        initialise(self, conn)
        conn.query("SET SESSION group_concat_max_len = 1024")

    monkeypatch.setattr(MySQLDatabase, "_initialize_connection", with_low_limit)
    async with connected(mysql_url) as db:

        class Row(db.Model):
            text = peewee.CharField()

        class Part(db.Model):
            text = peewee.CharField()
            row = peewee.ForeignKeyField(Row, backref="parts")

        class PartOut(BaseModel):
            text: str

        class RowOut(BaseModel):
            parts: list[PartOut]

        await db.acreate_tables([Row, Part])
        await db.run(lambda: Row.insert_many([{"text": "a"}] * 600).execute())
        long = {"text": "a" * 200}
        await db.run(lambda: Part.insert_many([{**long, "row": 2}] * 9).execute())
        app = make_app(db)
        rows = Row.select().order_by(Row.id)
        app.get("/whole", response_model=list[RowOut])(lambda: rows)
        few, many = [
            functools.partial(respond, query, list[RowOut], stream=True)
            for query in (rows.limit(500 - 1), rows)
        ]
        app.get("/few", response_model=None)(lambda: few())
        app.get("/many", response_model=None)(lambda: many())
        async with client(app, raises=True) as http:
            for path, number in (("/whole", 600), ("/few", 499)):
                found = (await http.get(path)).json()
                assert found[1] == {"parts": [long] * 9}
                assert len(found) == number
            if db.mariadb:
                with refusal(peewee.DataError, "max_allowed_packet"):
                    await http.get("/many")
            else:
                assert (await http.get("/many")).json()[1] == {"parts": [long] * 9}


async def test_the_connection_goes_back_while_a_slow_client_is_sent_to(
    db: Database, books: Any
) -> None:
    """The connection is held while the database is read, not while the client takes its time."""
    app = make_app(db)

    @app.get("/", response_model=None)
    def stream() -> Any:
        return respond(books.select(), list[Plain], stream="jsonl")

    received: list[bytes] = []
    seen: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            await back_to_rest(db)  # fails after a second
            seen.append(db.pool_stats.in_use)
            received.append(message["body"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "server": ("test", 80),
        "root_path": "",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [],
    }
    await asyncio.create_task(app(scope, receive, send))
    assert set(seen) == {0}
    assert len(b"".join(received).splitlines()) == COUNT


async def test_under_get_db(db: Database, books: Any) -> None:
    """A stream of a request that holds a connection reads through that one, and gives it back."""
    app = make_app(db)

    @app.get("/", response_model=None)
    async def stream(held: Any = None) -> Any:
        return respond(books.select(), list[Plain], stream="jsonl")

    app.get("/held", response_model=None, dependencies=[Depends(get_db)])(stream)
    async with client(app) as http:
        response = await http.get("/held")
    assert len(response.text.splitlines()) == COUNT
    await back_to_rest(db)


async def test_the_rows_stay_with_the_server(postgres_url: str) -> None:
    """On PostgreSQL `db.iterate` reads through a cursor of the server's."""
    async with connected(postgres_url) as db:

        class Book(db.Model):
            title = peewee.CharField()

        await db.acreate_tables([Book])
        await db.run(lambda: Book.insert_many([{"title": str(n)} for n in range(500)]).execute())
        found = []
        async with db.atomic():
            async for book in db.iterate(Book.select().order_by(Book.id)):
                found.append(book.title)
                if len(found) in (1, 300):
                    assert (await db.aexecute_sql("SELECT count(*) FROM pg_cursors"))[0] == (1,)
        assert found == [str(n) for n in range(500)]


class Before(Plain):
    @model_validator(mode="before")
    @classmethod
    def same(cls, value: Any) -> Any:
        return value


FORMS: dict[str, Any] = {
    "json": list[Plain],
    "rows": list[Checked],
    "instances": list[Before],
    "annotated": Annotated[list[Checked], "more"],
    "optional": Annotated[list[Checked] | None, "more"],
}


@pytest.mark.parametrize("name", FORMS)
async def test_one_query_for_many_streams(db: Database, books: Any, name: str) -> None:
    """A query of a module's serves any number of streams, also at a time, and isn't changed."""
    query = books.select().order_by(books.id)
    app = make_app(db)

    @app.get("/", response_model=None)
    async def stream() -> Any:
        return respond(query, FORMS[name], stream="csv")

    async with client(app, raises=True) as http:
        first = (await http.get("/")).text
        others = await asyncio.gather(*[http.get("/") for _ in range(3)])
    assert len(first.splitlines()) == COUNT + 1
    assert [response.text for response in others] == [first] * 3
    assert query._cursor_wrapper is None


async def test_a_prepared_query(db: Database, books: Any) -> None:
    """What is prepared can be streamed as well."""
    some = prepared(books.select().where(books.id <= param("last")), list[Plain])
    app = make_app(db)

    @app.get("/", response_model=None)
    def stream() -> Any:
        return respond(some(last=3), list[Plain], stream="jsonl")

    async with client(app, raises=True) as http:
        assert len((await http.get("/")).text.splitlines()) == 3


@pytest.mark.parametrize("type_", [Plain, Checked], ids=["json", "rows"])
async def test_a_stream_leaves_nothing_in_the_session(postgres_url: str, type_: Any) -> None:
    """What a streamed query sets in its session, the next user of the connection doesn't see."""
    async with connected(postgres_url) as db:

        class Book(db.Model):
            title = peewee.CharField()
            good = peewee.BooleanField(null=True)

        class Page(db.Model):
            number = peewee.IntegerField()
            book = peewee.ForeignKeyField(Book, backref="pages")

        await db.acreate_tables([Book, Page])
        await Book.acreate(title="a")
        app = make_app(db)
        setting = peewee.fn.set_config("app.user", "ada", False)

        @app.get("/", response_model=None)
        def stream() -> Any:
            return respond(Book.select().where(setting == "ada"), list[type_], stream="jsonl")

        async with client(app) as http:
            await http.get("/")
        rows = await db.aexecute_sql("SELECT current_setting('app.user', true)")
        assert rows[0][0] in ("", None)


@pytest.mark.parametrize("type_", [Plain, Checked], ids=["json", "rows"])
async def test_a_connection_that_is_lost_in_the_middle(
    db: Database, books: Any, type_: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that fails after its first byte is an error to the server, never a whole answer."""
    if not isinstance(db, peewee.PostgresqlDatabase):
        pytest.skip("only PostgreSQL's rows are fetched while they are sent")
    monkeypatch.setattr("fastapi_peewee.responses._ROWS_AT_ONCE", 100)
    app = make_app(db)
    killed = False

    @app.get("/", response_model=None)
    async def stream() -> Any:
        return respond(books.select().order_by(books.id), list[type_], stream=True)

    write = _Pipe.write

    def kill_then_write(pipe: Any, data: bytes) -> None:
        nonlocal killed
        if not killed:
            killed = True
            with psycopg.connect(**db.connect_params, dbname=db.database) as other:
                other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
        write(pipe, data)

    monkeypatch.setattr(_Pipe, "write", kill_then_write)
    with refusal(peewee.OperationalError, "terminating|closed|lost"):
        async with client(app, raises=True) as http:
            await http.get("/")
    assert killed
    await back_to_rest(db)


async def test_a_stream_that_waits_for_a_connection_ends_with_its_request(
    db: Database, books: Any
) -> None:
    """A cancelled request doesn't wait until its stream gets a connection."""
    app = make_app(db)

    @app.get("/", response_model=None)
    async def stream() -> Any:
        return respond(books.select(), list[Plain], stream=True)

    leases = [await db.pool.acquire() for _ in range(db.pool.size)]
    async with client(app) as http:
        request = asyncio.ensure_future(http.get("/"))
        while not db.pool_stats.waiting:
            await asyncio.sleep(0.001)
        request.cancel()
        done, _ = await asyncio.wait({request}, timeout=1)
    for lease in leases:
        db.pool.give_back(lease)
    assert done
    assert request.cancelled()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_background_task_comes_when_the_reading_has_ended(
    db: Database, books: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What isn't sent isn't read: not while the task runs either, which may need the connection."""
    app = make_app(db)
    seen: list[int] = []
    write = _Pipe.write

    def write_slowly(pipe: _Pipe, data: bytes) -> None:
        write(pipe, data)
        deadline = time.monotonic() + 5
        while not pipe.stopped and time.monotonic() < deadline:
            time.sleep(0.001)

    monkeypatch.setattr(_Pipe, "write", write_slowly)

    async def look() -> None:
        seen.append(db.pool_stats.in_use)

    @app.api_route("/", methods=["GET", "HEAD"], response_model=None)
    async def stream() -> Any:
        return respond(books.select(), list[Plain], stream="jsonl", background=BackgroundTask(look))

    if method == "GET":
        await walk_away(app, "/", after=1)
    else:
        async with client(app, raises=True) as http:
            assert (await http.head("/")).status_code == 200
    assert seen == [0]


async def test_lines_of_json_that_was_stored_with_line_breaks(postgres_url: str) -> None:
    """PostgreSQL keeps the text of a `json` column; a row is one line all the same."""
    async with connected(postgres_url) as db:

        class Document(db.Model):
            data = postgres_ext.JSONField()

        class DocumentOut(BaseModel):
            data: Any

        await db.acreate_tables([Document])
        text = '{\r\n "a\\n": [1,\n 2]\n}'
        await db.run(db.execute_sql, "INSERT INTO document (data) VALUES (%s)", (text,))
        app = make_app(db)
        app.get("/", response_model=None)(
            lambda: respond(Document.select(), list[DocumentOut], stream="jsonl")
        )
        async with client(app) as http:
            [line] = (await http.get("/")).text.splitlines()
        assert json.loads(line) == {"data": {"a\n": [1, 2]}}


async def test_columns_that_only_a_serialiser_knows(db: Database, books: Any) -> None:
    """CSV has the fields of the class for columns: one that makes others of them is refused."""

    class Label(BaseModel):
        id: int

        @model_serializer
        def label(self) -> dict[str, str]:
            return {"label": f"book {self.id}"}

    app = make_app(db)
    app.get("/", response_model=None)(
        lambda stream: respond(books.select().limit(1), list[Label], stream=stream)
    )
    async with client(app, raises=True) as http:
        assert (await http.get("/?stream=jsonl")).json() == {"label": "book 1"}
        with pytest.raises(TypeError, match="Label has a serialiser of the whole model"):
            await http.get("/?stream=csv")


def test_what_is_no_stream(sqlite_url: str) -> None:
    """A stream takes a query and a list type; anything else is refused at once."""
    db = connect(sqlite_url)

    class Book(db.Model):
        title = peewee.CharField()

    with pytest.raises(TypeError, match=r"list\[UserOut\], with .*PageOut"):
        respond(Book.select(), PageOut, stream=True)
    with pytest.raises(TypeError, match="nothing around the list"):
        respond(Book.select(), Annotated[list[PageOut], AfterValidator(sorted)], stream=True)
    with pytest.raises(TypeError, match="wasn't executed"):
        respond([1, 2], list[PageOut], stream=True)
    with pytest.raises(ValueError, match="jsonl, csv; got: 'xml'"):
        respond(Book.select(), list[PageOut], stream="xml")  # type: ignore[arg-type]


MILLION = """
import asyncio, gc, sys
import peewee, psutil
from fastapi import FastAPI
from pydantic import BaseModel
from fastapi_peewee import Peewee, connect, respond

db = connect(sys.argv[1])

class Row(db.Model):
    text = peewee.CharField()

class RowOut(BaseModel):
    id: int
    text: str

app = FastAPI()
Peewee(db).init_app(app)

@app.get("/", response_model=None)
def rows():
    return respond(Row.select().limit(int(sys.argv[3])), list[RowOut], stream=sys.argv[2])

async def main():
    length = peak = 0
    async def send(message):
        nonlocal length, peak
        body = message.get("body", b"")
        length += len(body)
        peak = max(peak, process.memory_info().rss)
    async def receive():
        await asyncio.Event().wait()
    scope = dict(type="http", method="GET", path="/", raw_path=b"/", query_string=b"", headers=[],
                 asgi=dict(version="3.0", spec_version="2.4"), root_path="", http_version="1.1",
                 scheme="http", server=("test", 80))
    sys.argv[3] = "1000"
    await asyncio.create_task(app(scope.copy(), receive, send))
    sys.argv[3] = "1000000000"
    gc.collect()
    length, peak, before = 0, 0, process.memory_info().rss
    await asyncio.create_task(app(scope.copy(), receive, send))
    print(length, (peak - before) / 2**20)
    await db.close_pool()

process = psutil.Process()
asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_million_rows(database_url: str, tmp_path: Path) -> None:
    """A million rows are streamed with less than 30 MiB of growth."""
    async with connected(database_url) as db:

        class Row(db.Model):
            text = peewee.CharField()

        await db.acreate_tables([Row])

        def fill() -> int:
            Row.insert_many([{"text": f"row {n}"} for n in range(1000)]).execute()
            for _ in range(10):
                Row.insert_from(Row.select(Row.text), [Row.text]).execute()
            return int(Row.select().count())

        count = await db.run(fill)
        assert count == 1_024_000
    script = tmp_path / "million.py"
    script.write_text(MILLION)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(script), database_url, "json", "0"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    length, growth = done.stdout.split()
    assert int(length) > count * 10
    assert float(growth) < 30
