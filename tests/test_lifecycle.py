"""`Peewee(db)` at startup and shutdown, and in the documentation."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from typing import Any

import peewee
import pytest
from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from fastapi_peewee import (
    BlockingQueryWarning,
    Database,
    InTransaction,
    Peewee,
    PeeweeRoute,
    connect,
    get_db,
    lifecycle,
    reset_db_state,
)
from fastapi_peewee.state import RequestScope
from tests.apps import client, connected, make_app


async def answer(db: Database, app: FastAPI, waiting: int) -> Any:
    """What is answered if so many wait for a connection before they have one, of a pool of two."""
    taken = [await db.pool.acquire(), await db.pool.acquire()]
    async with client(app) as http:
        asked = asyncio.create_task(http.get("/"))
        while db.pool_stats.waiting < waiting:
            await asyncio.sleep(0.001)
        for lease in taken:
            db.pool.give_back(lease)
        response = await asked
    assert db.pool_stats.in_use == 0
    return response.json()


async def test_tasks_of_a_request_that_hold_its_connection_at_once_hold_one(
    database_url: str,
) -> None:
    """`get_db` in two tasks at a time takes one connection for the request, and it goes back."""
    async with connected(database_url, pool_size=2) as db:
        app, extension = FastAPI(), Peewee(db)
        extension.init_app(app)

        @app.get("/")
        async def read() -> int:
            await asyncio.gather(*(extension.get_db() for _ in range(3)))
            return db.pool_stats.in_use

        assert await answer(db, app, waiting=3) == 1


async def test_threads_of_a_request_that_hold_its_connection_at_once_hold_one(
    database_url: str,
) -> None:
    """So do `connection_context()`s in several threads: what was taken twice goes back at once."""
    async with connected(database_url, pool_size=2) as db:
        app = make_app(db, APIRoute)
        both = threading.Barrier(2)

        def hold() -> int:
            with db.connection_context():
                both.wait(30)
                in_use = db.pool_stats.in_use
                both.wait(30)
            return in_use

        @app.get("/")
        def read() -> list[int]:
            with ThreadPoolExecutor(2) as threads:
                held = [threads.submit(copy_context().run, hold) for _ in range(2)]
                return [each.result() for each in held]

        assert await answer(db, app, waiting=2) == [1, 1]


async def test_what_a_thread_gives_back_as_its_request_ends_is_given_back_once(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two comes first does it, and the other one nothing."""
    async with connected(sqlite_url) as db:
        request, lease = RequestScope(), await db.pool.acquire()
        request.hold(db, lease)

        @contextmanager
        def sharing() -> Iterator[None]:
            request.drop(db, lease)  # by a thread, before we have the lock
            yield

        monkeypatch.setattr(request, "sharing", sharing())
        await lifecycle._release(request, over=True)
        assert not lease.ended
        db.pool.give_back(lease)


async def test_a_thread_that_comes_as_the_last_one_leaves_takes_a_connection_of_its_own(
    database_url: str,
) -> None:
    """What a thread of a request gives back no other one holds as well, to give it back again."""
    async with connected(database_url) as db:
        request: Any = RequestScope()

        def come_and_go() -> None:
            RequestScope.current.set(request)
            last, lock = db.connection_context(), request.sharing
            last.__enter__()

            @contextmanager
            def sharing() -> Iterator[None]:
                request.sharing = lock
                last.__exit__(None, None, None)  # in its thread, before we have the lock
                with lock:
                    yield

            request.sharing = sharing()
            with db.connection_context():
                assert db.execute_sql("SELECT 7").fetchone()[0] == 7
                assert db.pool_stats.in_use == 1

        await asyncio.to_thread(come_and_go)
        assert db.pool_stats.in_use == 0
        assert not request.holds_anything


async def test_what_a_thread_comes_to_hold_as_the_response_starts_it_keeps(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response gives back what no thread holds when it does it, not what none held before."""
    async with connected(sqlite_url) as db:
        request, lease = RequestScope(), await db.pool.acquire()
        request.hold(db, lease)
        lease.turn.release()

        @contextmanager
        def sharing() -> Iterator[None]:
            lease.contexts += 1  # by a thread, before we have the lock
            yield

        monkeypatch.setattr(request, "sharing", sharing())
        await lifecycle._release(request)
        assert not lease.ended
        assert lease.turn.acquire_nowait()
        db.pool.give_back(lease)


async def test_a_thread_that_waits_for_a_connection_doesnt_need_the_event_loop_to_go_on(
    sqlite_url: str,
) -> None:
    """It has FastAPI lend one thread more meanwhile, and doesn't wait for that to be taken back."""
    async with connected(sqlite_url, pool_size=1) as db:
        taken, limiter = await db.pool.acquire(), to_thread.current_default_thread_limiter()
        at_rest, has_one = limiter.total_tokens, threading.Event()

        def hold() -> None:
            RequestScope.current.set(RequestScope())
            with db.connection_context():
                has_one.set()

        thread = asyncio.create_task(to_thread.run_sync(hold))
        while not db.pool_stats.waiting:
            await asyncio.sleep(0.001)
        assert limiter.total_tokens == at_rest + 1
        db.pool.give_back(taken)
        assert has_one.wait(30)  # while the loop stands still
        await thread
        assert limiter.total_tokens == at_rest
        assert db.pool_stats.in_use == 0


async def test_a_thread_keeps_its_connection_while_the_response_is_sent(
    database_url: str,
) -> None:
    """What a `yield` dependency holds with `connection_context()` it holds to its own end."""
    async with connected(database_url) as db:
        app = make_app(db, APIRoute)
        after: list[Any] = []

        def held() -> Iterator[None]:
            with db.connection_context():
                yield
                after.append(db.execute_sql("SELECT 7").fetchone()[0])

        @app.get("/", dependencies=[Depends(held)])
        def read() -> int:
            return int(db.execute_sql("SELECT 1").fetchone()[0])

        async with client(app) as http:
            assert (await http.get("/")).json() == 1
        assert after == [7]
        assert db.pool_stats.in_use == 0


def test_a_database_of_peewees_own_has_a_lifespan_too(sqlite_url: str) -> None:
    """There is no pool to close; asked for twice, it is one connection, and goes back."""
    db = peewee.SqliteDatabase(sqlite_url.removeprefix("sqlite:///"), check_same_thread=False)
    extension = Peewee(db)
    app = FastAPI(lifespan=extension.lifespan)

    @app.get("/", dependencies=[Depends(get_db)])
    async def read() -> bool:
        held = db._state.closed, await extension.get_db()
        return held == (False, db) and not db.is_closed()

    with TestClient(app) as http:
        assert http.get("/").json() is True
    assert db.is_closed()


async def test_with_db_that_can_not_begin_gives_back_what_it_took(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread of a request that holds no connection, `with db:` takes one for itself."""
    async with connected(database_url) as db:
        app = make_app(db, APIRoute)

        @app.get("/")
        def read() -> int:
            with db:
                return db.pool_stats.in_use

        async with client(app) as http:
            assert (await http.get("/")).json() == 1

            def refuse(*args: Any, **options: Any) -> None:
                raise peewee.OperationalError("no")

            monkeypatch.setattr(db, "begin", refuse)
            assert (await http.get("/")).status_code == 500
            assert db.pool_stats.in_use == 0
            monkeypatch.undo()
            assert (await http.get("/")).json() == 1


async def test_reset_db_state_does_nothing_to_a_database_with_a_pool(sqlite_url: str) -> None:
    """It may stay in an application that has come over from FastAPI's how-to."""
    async with connected(sqlite_url) as db:
        app = make_app(db)

        @app.get("/", dependencies=[Depends(get_db), Depends(reset_db_state)])
        def read() -> list[int]:
            return [db.execute_sql("SELECT 7").fetchone()[0], db.pool_stats.in_use]

        async with client(app) as http:
            assert (await http.get("/")).json() == [7, 1]


# Startup and shutdown.


def declared(db: Database, lifespan: Any = None) -> FastAPI:
    app = FastAPI(lifespan=lifespan)
    Peewee(db).init_app(app)
    return app


def as_lifespan(db: Database, lifespan: Any = None) -> FastAPI:
    assert lifespan is None
    return FastAPI(lifespan=Peewee(db).lifespan)


def both(db: Database, lifespan: Any = None) -> FastAPI:
    assert lifespan is None
    peewee = Peewee(db)
    app = FastAPI(lifespan=peewee.lifespan)
    peewee.init_app(app)
    peewee.init_app(app)
    return app


WAYS = pytest.mark.parametrize("make", [declared, as_lifespan, both])


@WAYS
def test_the_pool_is_closed_at_shutdown_and_works_again_on_the_next_start(
    database_url: str, make: Callable[..., FastAPI]
) -> None:
    """An application may be started and stopped several times, as tests do it."""
    db = connect(database_url)
    app = make(db)

    @app.get("/", dependencies=[Depends(get_db)])
    def endpoint() -> list[int]:
        return [db.execute_sql("SELECT 1").fetchone()[0], db.pool_stats.in_use]

    for starts in (1, 2):
        with TestClient(app) as http:
            for _ in range(3):
                assert http.get("/").json() == [1, 1]
            assert db.pool_stats.idle == 1
            assert db.pool_stats.opened == starts
        assert db.pool_stats.idle == 0
        assert db.pool_stats.in_use == 0


@WAYS
def test_both_ways_to_declare_a_database_install_the_same(
    sqlite_url: str, make: Callable[..., FastAPI]
) -> None:
    """`init_app` and `lifespan=` bring the scope and the error handlers, and do so once."""
    db = connect(sqlite_url)

    class Note(db.Model):
        text = peewee.CharField()

    app = make(db)
    router = APIRouter(route_class=PeeweeRoute)

    @router.get("/{number}")
    def endpoint(number: int) -> str:
        return str(Note.get_by_id(number).text)

    @router.get("/")
    async def plain() -> int:
        return await db.run(lambda: db.pool_stats.in_use)

    app.include_router(router)
    with TestClient(app) as http:
        with db:
            db.create_tables([Note])
        response = http.get("/7")
        assert (response.status_code, response.json()) == (404, {"detail": "Note not found"})
        assert http.get("/").json() == 1
    assert len(app.user_middleware) == 1


def test_the_lifespan_of_the_application_runs_inside_of_ours(database_url: str) -> None:
    """The user's lifespan may use the database until its very end, and hands its state on."""
    db = connect(database_url)
    log: list[Any] = []

    class Note(db.Model):
        text = peewee.CharField()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        await db.acreate_tables([Note])
        await Note.acreate(text="startup")
        yield {"answer": 42}
        log.append(await db.count(Note.select()))
        log.append(db.pool_stats.idle)

    app = declared(db, lifespan)

    @app.get("/")
    def endpoint(request: Request) -> Any:
        Note.create(text="request")
        return request.state.answer

    with TestClient(app) as http:
        assert http.get("/").json() == 42
        assert log == []
    assert log == [2, 1]
    assert db.pool_stats.idle == 0


def test_a_startup_that_fails_is_told_and_closes_the_pool(sqlite_url: str) -> None:
    """What the user's lifespan raises stops the start; no connection stays open."""
    db = connect(sqlite_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await db.run(db.execute_sql, "SELECT 1")
        if app.title != "configured":
            raise LookupError("no settings")
        yield

    with pytest.raises(LookupError, match="no settings"), TestClient(declared(db, lifespan)):
        pass
    assert db.pool_stats.opened == 1
    assert db.pool_stats.idle == 0


def test_a_sync_query_in_a_lifespan_warns(sqlite_url: str) -> None:
    """Outside of requests, a query on the event loop runs, with a warning that names the place."""
    db = connect(sqlite_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with pytest.warns(BlockingQueryWarning, match=r"await db\.run") as warnings:
            found.append(db.execute_sql("SELECT 1").fetchone())
        with db.allow_sync():
            db.close()
        assert {warning.filename for warning in warnings} == {__file__}
        yield

    found: list[Any] = []
    with TestClient(declared(db, lifespan)):
        assert found == [(1,)]


async def test_shutdown_waits_for_connections_in_use(sqlite_url: str) -> None:
    """The pool is closed when the last lease is back, and no request is cut."""
    db = connect(sqlite_url)
    app = declared(db)
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @app.get("/")
    def endpoint() -> int:
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(10)
        return int(db.execute_sql("SELECT 7").fetchone()[0])

    async with client(app) as http:
        async with app.router.lifespan_context(app):
            request = asyncio.create_task(http.get("/"))
            await begun.wait()
            loop.call_later(0.05, go_on.set)
        assert (await request).json() == 7
    assert db.pool_stats.in_use == 0
    assert db.pool_stats.idle == 0


async def test_shutdown_waits_no_longer_than_its_grace(sqlite_url: str) -> None:
    """After `grace` seconds the shutdown goes on; the straggler's connection is closed later."""
    db = connect(sqlite_url)
    app = FastAPI()
    Peewee(db, grace=0.05).init_app(app)
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @app.get("/")
    def endpoint() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(10)
        db.execute_sql("SELECT 1")

    async with client(app) as http:
        async with app.router.lifespan_context(app):
            request = asyncio.create_task(http.get("/"))
            await begun.wait()
        assert not request.done()
        go_on.set()
        assert (await request).status_code == 200
    assert db.pool_stats.idle == 0
    assert (await db.aexecute_sql("SELECT 1")) == [(1,)]
    await db.close_pool()


def test_what_is_no_database_is_refused() -> None:
    """`Peewee(…)` takes a database; a proxy must have been initialised."""
    for wrong in (None, "sqlite:///app.db", peewee.DatabaseProxy(), peewee.Proxy()):
        with pytest.raises(TypeError, match="database, initialised if it is a proxy"):
            Peewee(wrong)


async def test_the_dependencies_say_what_is_missing_without_init_app() -> None:
    """`get_db` and `InTransaction` on an application without a database name `init_app`."""
    app = FastAPI()
    app.get("/get_db", dependencies=[Depends(get_db)])(lambda: 1)

    @app.get("/transaction")
    def endpoint(db: InTransaction) -> None: ...

    async with client(app, raises=True) as http:
        for path in ("/get_db", "/transaction"):
            with pytest.raises(RuntimeError, match=r"init_app\(app\)"):
                await http.get(path)


async def test_startup_closes_what_the_import_of_modules_has_opened(database_url: str) -> None:
    """The connection of `db.create_tables([…])` at import, which no request would use."""
    async with connected(database_url) as db:
        app = make_app(db)
        with db.allow_sync():
            db.execute_sql("SELECT 7")
            assert not db.is_closed()
            async with app.router.lifespan_context(app):
                assert db.is_closed()


@contextmanager
def connected_by_hand(db: Database) -> Iterator[None]:
    db.autoconnect = False
    db.connect()
    yield
    db.close()


@contextmanager
def begun_by_hand(db: Database) -> Iterator[None]:
    db.begin()
    yield
    db.rollback()


@contextmanager
def set_by_hand(db: Database) -> Iterator[None]:
    db._state._state.set({"closed": True, "conn": None, "ctx": [], "transactions": []})
    yield
    db._state._state.set(None)
    db.close()


HOLDING: dict[str, Callable[[Database], Any]] = {
    "with db": lambda db: db,
    "connection_context": lambda db: db.connection_context(),
    "atomic": lambda db: db.atomic(),
    "begin": begun_by_hand,
    "connect": connected_by_hand,
    "another state": set_by_hand,
}


@pytest.mark.parametrize("how", HOLDING)
async def test_startup_closes_no_connection_that_somebody_holds(
    database_url: str, how: str
) -> None:
    """Not that of a block around it, of an open transaction, or of who connects by hand."""
    async with connected(database_url) as db:
        app = make_app(db)
        with db.allow_sync():
            if how == "another state":
                db.execute_sql("SELECT 7")
            with HOLDING[how](db):
                own = db._state.own_cell()
                if how != "another state":
                    db.execute_sql("SELECT 7")
                async with app.router.lifespan_context(app):
                    assert not own["closed"]
            db.close()


# The documentation.


async def test_openapi_documents_what_the_database_may_answer(sqlite_url: str) -> None:
    """503 everywhere; 404 with path parameters; 409 where something is written."""
    async with connected(sqlite_url) as db:
        app = make_app(db)
        plain = APIRouter()
        for router in (app, plain):
            name = "app" if router is app else "plain"
            router.get(f"/{name}")(lambda: 1)
            router.get(f"/{name}/{{number}}")(lambda number: number)
            router.post(f"/{name}")(lambda: 1)
            router.put(f"/{name}/{{number}}")(lambda number: number)
        app.include_router(plain)
        async with client(app) as http:
            document = (await http.get("/openapi.json")).json()
        found = {
            f"{method} {path}": "".join(
                status + " " for status in operation["responses"] if re.match("4|5", status)
            ).split()
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        }
        for statuses in found.values():
            statuses.sort()
        assert found == {
            "get /app": ["503"],
            "get /app/{number}": ["404", "422", "503"],
            "post /app": ["409", "503"],
            "put /app/{number}": ["404", "409", "422", "503"],
            "get /plain": ["503"],
            "get /plain/{number}": ["422", "503"],
            "post /plain": ["503"],
            "put /plain/{number}": ["422", "503"],
        }
        responses = document["paths"]["/app/{number}"]["put"]["responses"]
        for status, schema in (
            ("404", "DatabaseErrorDetail"),
            ("409", "DatabaseFieldErrors"),
            ("503", "DatabaseErrorDetail"),
        ):
            reference = responses[status]["content"]["application/json"]["schema"]["$ref"]
            assert reference == f"#/components/schemas/{schema}"
