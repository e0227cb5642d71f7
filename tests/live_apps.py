"""Applications that tests serve with `tests.live.serve`; each function makes one.

Whatever path begins with an underscore is answered beside the application, without its middleware
and the database's pool, so that looking at them changes nothing.
"""

import asyncio
import gc
import logging
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import peewee
import psycopg
import pymysql
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from psycopg.pq import TransactionStatus
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from pydantic import BaseModel
from pymysql.constants.SERVER_STATUS import SERVER_STATUS_IN_TRANS
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_peewee import (
    Database,
    InTransaction,
    Peewee,
    PoolError,
    connect,
    get_db,
    respond,
    schema,
)
from fastapi_peewee.pool import Pool
from tests import cancelling_app

Beside = dict[str, Callable[[], Any]]


def beside(app: ASGIApp, answers: Beside) -> ASGIApp:
    """`app`, and beside it some paths that answer with what a function returns, as JSON."""

    async def both(scope: Scope, receive: Receive, send: Send) -> None:
        answer = answers.get(scope["path"]) if scope["type"] == "http" else None
        await (JSONResponse(answer()) if answer else app)(scope, receive, send)

    return both


def observations(db: Database) -> Beside:
    """What `tests.live.stats` and `tests.live.driver_connections` ask for."""

    def stats() -> dict[str, int]:
        return {
            **db.pool_stats._asdict(),
            "threads": threading.active_count(),
            "descriptors": len(os.listdir("/dev/fd")),
        }

    def connections() -> dict[str, int]:
        found = list(filter(None, map(_transaction_state, gc.get_objects())))
        return {"open": len(found), "in_transaction": found.count("in transaction")}

    return {"/_stats": stats, "/_connections": connections}


def _transaction_state(thing: object) -> str | None:
    """Of an object that is an open connection, "in transaction" or "idle"; else None."""
    match thing:
        case sqlite3.Connection():
            try:
                active = thing.in_transaction
            except sqlite3.ProgrammingError:  # closed
                return None
        case psycopg.Connection():
            if thing.closed:
                return None
            active = thing.info.transaction_status != TransactionStatus.IDLE
        case pymysql.Connection():
            if not thing.open:
                return None
            status: int = thing.server_status  # type: ignore[attr-defined]
            active = bool(status & SERVER_STATUS_IN_TRANS)
        case _:
            return None
    return "in transaction" if active else "idle"


def sql_app() -> ASGIApp:
    """`sql_app` as it is."""
    from sql_app.database import db
    from sql_app.main import app

    return beside(app, observations(db))


def sql_app_with_quick_hashes() -> ASGIApp:
    """`sql_app` with hashes that cost next to nothing, so that parallel registrations, instead of
    queueing for a processor first, all arrive at the database together."""
    quick = PasswordHash((Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1),))
    PasswordHash.recommended = lambda: quick  # type: ignore[method-assign]
    return sql_app()


def sql_app_starting_together() -> ASGIApp:
    """`sql_app` in several processes: each starts when `TOGETHER` of them have left their mark in
    the folder `MEETING`, and so are ready for it."""
    app = sql_app()
    meeting = Path(os.environ["MEETING"])

    async def together(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            (meeting / str(os.getpid())).touch()
            async with asyncio.timeout(60):
                while len(os.listdir(meeting)) < int(os.environ["TOGETHER"]):
                    await asyncio.sleep(0.001)
        await app(scope, receive, send)

    return together


def cancelling() -> ASGIApp:
    """The application whose requests are cancelled, on a table `row` that is made at start."""
    # Clients go away without waiting, so any number of requests may be waiting for a connection.
    db = connect(os.environ["DATABASE_URL"], pool_size=4, timeout=60, max_waiting=10**6)

    class Row(db.Model):
        name = peewee.CharField()

    with db.allow_sync(), db:
        db.create_tables([Row])
        Row.insert_many([{"name": "old"}] * 500).execute()
    return beside(cancelling_app.make_app(db, Row), observations(db))


class Mixed(HTTPException):
    """A connection carried something else than this request left on it."""

    def __init__(self, expected: dict[str, str], found: dict[str, str]) -> None:
        super().__init__(409, {"expected": expected, "found": found})


class Tags:
    """Tags that stick to the connection in force here, and how to see them.

    Nothing is ever committed to the table `mark`, so who sees a row there, whose own it isn't, is
    in another's transaction. Reading tags leaves nothing behind.

    Kinds of tags: a "setting" of the session, a temporary "table", an uncommitted "row", and the
    same in a "failed" transaction, which can no longer be read from. "nothing" only looks.
    """

    KINDS = ("nothing", "setting", "table", "row", "failed")

    def __init__(self, db: Database) -> None:
        self.db = db
        if isinstance(db, peewee.SqliteDatabase):
            self._set = "PRAGMA cache_size = -{}"
            self._look = (
                "SELECT (SELECT -cache_size FROM pragma_cache_size WHERE cache_size < -1000000),"
                " (SELECT name FROM sqlite_temp_master), (SELECT group_concat(tag) FROM mark)"
            )
        elif isinstance(db, peewee.PostgresqlDatabase):
            self._set = "SET live.tag = '{}'"
            self._look = (
                "SELECT current_setting('live.tag', true), to_regclass('pg_temp.tag')::text,"
                " (SELECT string_agg(tag::text, ',') FROM mark)"
            )
        else:
            self._set = "SET @tag = {}"
            # It lists no temporary tables, so try.
            self._look = "SELECT @tag, 'tag', (SELECT group_concat(tag) FROM mark)"

    def create(self) -> None:
        self.db.execute_sql("CREATE TABLE IF NOT EXISTS mark (tag INTEGER)")

    def found(self) -> dict[str, str]:
        setting, table, rows = self.db.execute_sql(self._look).fetchone()
        found = {"setting": setting, "row": rows}
        if table:
            # Absent after all: only MySQL.
            with suppress(peewee.ProgrammingError):
                found["table"] = self.db.execute_sql("SELECT tag FROM tag").fetchone()[0]
        return {kind: str(tag) for kind, tag in found.items() if tag not in (None, "")}

    def expect(self, expected: dict[str, str]) -> None:
        if (found := self.found()) != expected:
            raise Mixed(expected, found)

    def leave(self, kind: str, tag: int, *, begin: bool = True) -> dict[str, str]:
        """Tag the connection. Returns what is to be found on it from now on."""
        if kind == "setting":
            self.db.execute_sql(self._set.format(tag))
        if kind == "table":
            self.db.execute_sql("CREATE TEMPORARY TABLE tag (tag INTEGER)")
            self.db.execute_sql(f"INSERT INTO tag VALUES ({tag})")
        if kind in ("row", "failed"):
            if begin:
                self.db.begin()
            self.db.execute_sql(f"INSERT INTO mark VALUES ({tag})")
        if kind == "failed":
            with suppress(peewee.ProgrammingError, peewee.OperationalError):
                self.db.execute_sql("SELECT no_such_column FROM mark")
        return {} if kind == "nothing" else {kind: str(tag)}

    def expect_again(self, left: dict[str, str]) -> None:
        if "failed" not in left:
            self.expect(left)

    def all_of_it(self, kind: str, tag: int) -> None:
        """Look, tag and look again, and leave it so."""
        self.expect({})
        self.expect_again(self.leave(kind, tag))


class _Undo(Exception):
    """Raised to leave a block with a rollback."""


def tagging() -> ASGIApp:
    """An application of endpoints of every kind, each of which tags its connection.

    `GET /{endpoint}/{kind}/{tag}` answers 200 and the tag. It answers 409 if a connection carried
    anything that this request hadn't left on it, or not what it had. `/hold` holds a connection
    until `/_release` is asked for.
    """
    pool_settings = {
        name: float(os.environ[setting])
        for name, setting in {"timeout": "POOL_TIMEOUT", "max_waiting": "POOL_MAX_WAITING"}.items()
        if setting in os.environ
    }
    options: dict[str, Any] = {}
    if os.environ["DATABASE_URL"].startswith("mysql"):
        # For MySQL's own server, which else locks the gap where a row was that a savepoint has
        # taken back: some requests would be victims of deadlocks. MariaDB reads a comment there.
        level = "/*!80000 , SESSION transaction_isolation = 'READ-COMMITTED' */"
        options["init_command"] = f"SET @mysql = 1 {level}"
    db = connect(
        os.environ["DATABASE_URL"],
        pool_size=int(os.environ["POOL_SIZE"]),
        **pool_settings,  # type: ignore[arg-type]
        **options,
    )
    tags = Tags(db)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await db.run(tags.create)
        yield

    app = FastAPI(lifespan=lifespan)
    Peewee(db).init_app(app)
    plain = APIRouter()
    released = asyncio.Event()
    mixed: list[str] = []

    @app.get("/route/{kind}/{tag}")
    def on_our_route(kind: str, tag: int) -> int:
        tags.all_of_it(kind, tag)
        return tag

    @plain.get("/plain/{kind}/{tag}", dependencies=[Depends(get_db)])
    def on_a_plain_route(kind: str, tag: int) -> int:
        tags.all_of_it(kind, tag)
        return tag

    def tagged(kind: str, tag: int, db: Annotated[Any, Depends(get_db)]) -> dict[str, str]:
        tags.expect({})
        return tags.leave(kind, tag)

    def tagged_until_the_end(
        left: Annotated[dict[str, str], Depends(tagged)],
    ) -> Iterator[dict[str, str]]:
        tags.expect_again(left)
        yield left
        tags.expect_again(left)

    @plain.get("/threads/{kind}/{tag}")
    def dependency_endpoint_and_exit_in_threads_of_their_own(
        tag: int,
        left: Annotated[dict[str, str], Depends(tagged_until_the_end, scope="function")],
    ) -> int:
        tags.expect_again(left)
        return tag

    @app.get("/held/{kind}/{tag}", dependencies=[Depends(get_db)])
    async def several_calls_on_one_connection(kind: str, tag: int) -> int:
        await db.run(tags.expect, {})
        left = await db.run(tags.leave, kind, tag)
        await asyncio.gather(*(db.run(tags.expect_again, left) for _ in range(2)))
        return tag

    @app.get("/calls/{kind}/{tag}")
    async def several_calls_on_a_connection_each(kind: str, tag: int) -> int:
        await db.run(tags.all_of_it, kind, tag)
        await db.run(tags.expect, {})
        return tag

    @app.get("/atomic/{kind}/{tag}")
    async def nested_blocks(kind: str, tag: int) -> int:
        with suppress(_Undo):
            async with db.atomic():
                await db.run(tags.expect, {})
                with suppress(_Undo):
                    async with db.atomic():
                        left = await db.run(tags.leave, kind, tag, begin=False)
                        await db.run(tags.expect_again, left)
                        raise _Undo
                await db.run(sync_nested, kind, tag)
                raise _Undo
        return tag

    def sync_nested(kind: str, tag: int) -> None:
        if kind == "row":  # the savepoint before has taken the first one back
            tags.expect({})
            with db.atomic():
                tags.expect_again(tags.leave(kind, tag, begin=False))

    @app.get("/background/{kind}/{tag}")
    def in_a_background_task(kind: str, tag: int, background: BackgroundTasks) -> int:
        tags.expect({})
        background.add_task(later, kind, tag)
        return tag

    def later(kind: str, tag: int) -> None:
        try:
            tags.all_of_it(kind, tag)
        except Mixed as error:
            mixed.append(repr(error.detail))

    @plain.get("/blocking/{kind}/{tag}")
    def waits_in_a_thread(kind: str, tag: int) -> int:
        with db.connection_context():
            tags.all_of_it(kind, tag)
        return tag

    @plain.get("/thread")
    def needs_a_thread_and_no_connection() -> None:
        pass

    @app.get("/hold")
    async def hold() -> None:
        async with db.connection_context():
            await db.run(tags.expect, {})
            await asyncio.wait_for(released.wait(), 60)

    app.include_router(plain)
    return beside(
        app,
        {
            **observations(db),
            "/_mixed": lambda: mixed,
            "/_release": released.set,
            "/_refusals": recorded_refusals(db.pool).copy,
        },
    )


def guarded() -> ASGIApp:
    """An application that takes what the database takes, over tables that are full of canaries."""
    logging.basicConfig(level=logging.INFO)
    db = connect(os.environ["DATABASE_URL"])

    class Team(db.Model):
        class Meta:
            table_name = "canary teams"

    class Member(db.Model):
        email = peewee.CharField(column_name="canary_email", unique=True, max_length=30)
        team = peewee.ForeignKeyField(
            Team, column_name="canary_team", object_id_name="team_id", constraint_name="canary_fk"
        )
        age = peewee.SmallIntegerField(
            column_name="canary_age", constraints=[peewee.Check("canary_age >= 0")], default=1
        )
        price = peewee.FloatField(column_name="canary_price", default=1.0)
        note = peewee.CharField(column_name="canary_note", null=True, max_length=20)
        hidden = peewee.CharField(column_name="canary_hidden", default="canary of another's")

        class Meta:
            table_name = "canary members"

    def create() -> None:
        db.create_tables([Team, Member])
        for _ in range(2):
            Team.create()
        Member.create(email="taken@example.com", team=1)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with suppress(PoolError):  # it may be away
            await db.run(create)
        logging.info("a line at INFO")  # noqa: LOG015
        yield

    class MemberIn(BaseModel):
        email: str
        team: int
        age: int = 1
        price: float = 1.0
        note: str | None = None

    class MemberPatch(BaseModel):
        email: str | None = None
        team: int | None = None
        age: int | None = None
        price: float | None = None
        note: str | None = None

    class MemberOut(BaseModel):
        id: int
        email: str
        team_id: int
        note: str | None

    app = FastAPI(lifespan=lifespan)
    Peewee(db).init_app(app)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own repeats the input, which may be impossible to encode.
        details = [{key: part[key] for key in ("type", "loc")} for part in error.errors()]
        return JSONResponse({"detail": details}, 422)

    @app.post("/members/", response_model=MemberOut)
    def create_member(member: MemberIn) -> Any:
        return Member.create(**member.model_dump())

    @app.get("/members/", response_model=list[MemberOut])
    async def read_members(
        email: str = "", limit: Annotated[int, Query(ge=0, le=1000)] = 10
    ) -> Any:
        return Member.select().where(Member.email.contains(email)).order_by(Member.id).limit(limit)

    @app.get("/members/{number}", response_model=MemberOut)
    async def read_member(number: int) -> Any:
        return Member.select().where(Member.id == number)

    @app.patch("/members/{number}")
    async def change_member(number: int, member: MemberPatch, held: InTransaction) -> int:
        values = member.model_dump(exclude_unset=True)
        if not values:
            raise HTTPException(422, "nothing to do")
        query = Member.update(**values).where(Member.id == number)
        changed: int = await db.run(query.execute)
        return changed

    @app.delete("/members/{number}")
    def delete_member(number: int) -> None:
        Member.get_by_id(number).delete_instance()

    @app.delete("/teams/{number}")
    def delete_team(number: int) -> None:
        Team.delete_by_id(number)

    return app


def recorded_refusals(pool: Pool) -> list[tuple[str, float, float]]:
    """Record, from now on, each time that the pool gives no lease.

    Returns a list of: the error's name; seconds from asking for a lease until the error; by how
    many seconds a bare timer of the event loop, set to the pool's `timeout` when the lease was
    asked for, was late (0 if it didn't come to that).
    """
    refusals: list[tuple[str, float, float]] = []
    acquire = pool.acquire

    async def recording() -> Any:
        # Not the loop's time, which stands still while a callback runs.
        start = time.monotonic()
        fired: list[float] = []
        timer = asyncio.get_running_loop().call_later(
            pool.timeout, lambda: fired.append(time.monotonic())
        )
        try:
            return await acquire()
        except PoolError as error:
            late = fired[0] - start - pool.timeout if fired else 0.0
            refusals.append((type(error).__name__, time.monotonic() - start, late))
            raise
        finally:
            timer.cancel()

    pool.acquire = recording  # type: ignore[method-assign]
    return refusals


def echoing() -> ASGIApp:
    """`GET /echo/{number}`, and the same at `/aecho`, answers with the process and the number,
    which has been to the database and back. Before the application is made, connections are open: a
    thread's, and three of the pool.
    """
    db = connect(os.environ["DATABASE_URL"], pool_size=4)

    def echo(number: int) -> list[int]:
        rows = db.execute_sql(f"SELECT {number}").fetchall()
        return [os.getpid(), int(rows[0][0])]

    async def warm_up() -> None:
        async with asyncio.TaskGroup() as group:
            inside = asyncio.Barrier(3)

            async def hold() -> None:
                async with db.connection_context():
                    await inside.wait()
                    await db.run(echo, 0)

            for _ in range(3):
                group.create_task(hold())

    if not asyncio.events._get_running_loop():  # uvicorn imports us on its loop
        db.connect()
        asyncio.run(warm_up())

    app = FastAPI()
    Peewee(db).init_app(app)
    app.get("/echo/{number}")(echo)

    @app.get("/aecho/{number}")
    async def aecho(number: int) -> list[int]:
        async with db.atomic():
            return await db.run(echo, number)

    return beside(app, observations(db))


def finishing() -> ASGIApp:
    """`/sync` and `/async` write a row, and wait for the file `GO_ON` before they commit it."""
    db, go_on = connect(os.environ["DATABASE_URL"], pool_size=8), os.environ["GO_ON"]

    class Note(db.Model):
        text = peewee.CharField()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await db.acreate_tables([Note])
        yield

    app = FastAPI(lifespan=lifespan)
    Peewee(db).init_app(app)

    @app.get("/sync")
    def sync() -> int:
        with db.atomic():
            note = Note.create(text="sync")
            while not os.access(go_on, os.F_OK):
                time.sleep(0.005)
        return int(note.id)

    @app.get("/async")
    async def asynchronous() -> int:
        async with db.atomic():
            note = await Note.acreate(text="async")
            while not os.access(go_on, os.F_OK):
                await asyncio.sleep(0.005)
        return int(note.id)

    return beside(app, observations(db))


def streaming() -> ASGIApp:
    """`/rows` streams 20,000 rows; `/written` streams without end, in a transaction that has
    written one more; `/count` says how many there are.
    """
    db = connect(os.environ["DATABASE_URL"], pool_size=2)

    class Note(db.Model):
        text = peewee.CharField()

    def fill() -> None:
        db.create_tables([Note])
        for rows in peewee.chunked([{"text": "x" * 200}] * 20_000, 1000):
            Note.insert_many(rows).execute()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await db.run(fill)
        yield

    app = FastAPI(lifespan=lifespan)
    Peewee(db).init_app(app)

    @app.get("/rows")
    async def rows() -> Any:
        return respond(Note.select(), list[schema(Note)], stream=True)  # type: ignore[misc]

    @app.get("/written", response_class=StreamingResponse)
    async def written() -> AsyncIterator[bytes]:
        async with db.atomic():
            await Note.acreate(text="written")
            while True:
                yield b"x" * 2**16

    @app.get("/count")
    def count() -> int:
        return int(Note.select().count())

    return beside(app, observations(db))
