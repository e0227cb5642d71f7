"""`PeeweeRoute` answers as FastAPI's own route does, in one worker thread."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NamedTuple

import peewee
import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, HTTPException, Response
from fastapi.exceptions import ResponseValidationError
from fastapi.routing import APIRoute
from opentelemetry import trace
from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator, model_serializer
from starlette.background import BackgroundTask
from starlette.routing import Mount

from fastapi_peewee import (
    Database,
    LeaseEnded,
    NoLease,
    Peewee,
    PeeweeRoute,
    connect,
    without_lease,
)
from tests.apps import chain, client, connected
from tests.query_cases import MODELS, QUERY_CASES, fill, loaded, queries, rows_of
from tests.route_cases import CASES, Ask, Case, Site, all_async


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connected("sqlite:///:memory:") as db:
        yield db


async def answer(app: FastAPI, ask: Ask) -> Any:
    """All that a client, or a server that runs the application, can see."""
    async with client(app, raises=True) as http:
        try:
            response = await http.request(ask.method, ask.path, **ask.options)
        except BaseException as error:
            return [(type(e).__name__, str(e), getattr(e, "body", None)) for e in chain(error)]
    return response.status_code, response.headers.multi_items(), response.content


#: Of each case, the `def` endpoints as they are, or as `async def` ones.
KINDS = {"def": lambda route_class: route_class, "async": all_async}


def sites(
    case: Case, db: Database, kind: str = "def", rows: tuple[Any, Any] = (list, list)
) -> tuple[Site, Site]:
    """The case built with FastAPI's routes, and with ours; `rows` of each, as `Site` has them."""
    if case.needs is not None:
        pytest.importorskip(case.needs)
    classes = [KINDS[kind](each) for each in (APIRoute, PeeweeRoute)]
    theirs = Site(classes[0], FastAPI(**case.app_options), rows[0])
    app = FastAPI(**case.app_options)
    Peewee(db).init_app(app)
    ours = Site(classes[1], app, rows[1])
    case.build(theirs)
    case.build(ours)
    return theirs, ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
async def test_a_peewee_route_answers_as_a_route_of_fastapi_does(
    db: Database, name: str, kind: str
) -> None:
    """Status, headers, body, exceptions and side effects are those of `APIRoute`."""
    if kind == "async" and name == "asyncio_run_in_an_endpoint":
        pytest.skip("asyncio.run() is for threads")
    await check(CASES[name], db, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUERY_CASES)
async def test_a_returned_query_is_answered_as_its_rows_are(
    db: Database, name: str, kind: str
) -> None:
    """A query on our route, and the loaded rows on FastAPI's: the same status, headers and body."""

    def prepare() -> list[Any]:
        db.bind(MODELS)
        db.create_tables(MODELS)
        fill()
        return loaded()

    found = await db.run(prepare)
    await check(QUERY_CASES[name], db, kind, (rows_of(found), queries))


async def check(case: Case, db: Database, kind: str, rows: Any = (list, list)) -> None:
    theirs, ours = sites(case, db, kind, rows)
    for ask in case.asks:
        expected = await asyncio.wait_for(answer(theirs.app, ask), 10)
        actual = await asyncio.wait_for(answer(ours.app, ask), 10)
        if not ask.path.endswith("/openapi.json"):  # compared below
            assert actual == expected, ask
        assert ours.log == theirs.log, ask
        assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("name", CASES)
def test_a_peewee_route_is_documented_as_a_route_of_fastapi_is(name: str) -> None:
    """OpenAPI differs from that of `APIRoute` only in the errors that the database adds."""
    theirs, ours = sites(CASES[name], connect("sqlite:///never_opened.db"))
    parts = [
        (their.app, our.app)
        for their, our in zip(theirs.app.routes, ours.app.routes, strict=True)
        if isinstance(their, Mount) and isinstance(our, Mount)
    ]
    for their_app, our_app in [(theirs.app, ours.app), *parts]:
        assert isinstance(their_app, FastAPI)
        assert isinstance(our_app, FastAPI)
        expected, actual = their_app.openapi(), our_app.openapi()
        for document in (expected, actual):
            document.setdefault("components", {}).setdefault("schemas", {})
        remove_errors_of_the_database(actual, expected)
        assert actual == expected


def remove_errors_of_the_database(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for path, operations in actual["paths"].items():
        for method, operation in operations.items():
            theirs = expected["paths"][path][method]["responses"]
            added = operation["responses"].keys() - theirs.keys()
            possible = {"503"}
            if "{" in path:
                possible.add("404")
            if method in {"post", "put", "patch", "delete"}:
                possible.add("409")
            assert added <= possible, f"{method} {path}"
            for status in added:
                del operation["responses"][status]
    for name in ("DatabaseErrorDetail", "DatabaseFieldError", "DatabaseFieldErrors"):
        actual["components"]["schemas"].pop(name, None)


class Spans(trace.TracerProvider, trace.Tracer):
    """Remembers each span: its name, the one around it, and of which function it speaks."""

    class Span(trace.NonRecordingSpan):
        name: str = "none"

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        return self

    def start_span(self, name: str, *args: Any, attributes: Any = None, **kwargs: Any) -> Span:
        span = self.Span(trace.INVALID_SPAN_CONTEXT)
        span.name = name
        parent = getattr(trace.get_current_span(), "name", None)
        self.seen.append((name, parent, (attributes or {}).get("code.function.name")))
        return span

    @contextmanager
    def start_as_current_span(self, name: str, *args: Any, **kwargs: Any) -> Iterator[Span]:  # type: ignore[override]
        span = self.start_span(name, *args, **kwargs)
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            yield span


@pytest.mark.parametrize("path", ["/model", "/plain", "/response", "/raises", "/async", "/task"])
async def test_the_spans_of_telemetry_are_those_of_fastapi(db: Database, path: str) -> None:
    """Name, nesting and function of every OpenTelemetry span are as on FastAPI's own route."""

    def build(route_class: type[APIRoute], peewee: Peewee | None) -> tuple[FastAPI, Spans]:
        spans = Spans()
        app = FastAPI(telemetry={"tracer_provider": spans})
        if peewee is not None:
            peewee.init_app(app)
        app.router.route_class = route_class

        @app.get("/model")
        def model() -> int:
            return 1

        @app.get("/plain", response_model=None)
        def plain() -> int:
            return 1

        @app.get("/response")
        def response() -> Response:
            return Response()

        @app.get("/raises")
        def raises() -> int:
            raise ValueError("no")

        @app.get("/async")
        async def coroutine() -> int:
            return 1

        def background() -> None:
            with spans.start_as_current_span("in background"):
                pass

        @app.get("/task")
        def task(tasks: BackgroundTasks) -> int:
            with spans.start_as_current_span("in endpoint"):
                tasks.add_task(background)
            return 1

        return app, spans

    theirs, expected = build(APIRoute, None)
    ours, actual = build(PeeweeRoute, Peewee(db))
    for app in (theirs, ours):
        async with client(app) as http:
            await http.get(path)
    assert expected.seen
    assert actual.seen == expected.seen


class Seen(NamedTuple):
    thread: str
    in_use: int


async def test_an_endpoint_takes_one_thread_and_lends_a_connection_for_no_longer_than_needed(
    db: Database,
) -> None:
    """Endpoint and validation share a thread and a lease; the dump has the thread alone."""
    seen: dict[str, Seen] = {}

    def look(name: str) -> None:
        seen[name] = Seen(threading.current_thread().name, db.pool_stats.in_use)

    class Answer(BaseModel):
        number: int

        @field_validator("number", mode="before")
        @classmethod
        def validate_number(cls, number: int) -> int:
            look("validation")
            return number + 1

        @model_serializer
        def dump(self) -> dict[str, int]:
            look("dump")
            return {"number": self.number}

    app = FastAPI()
    Peewee(db).init_app(app)

    @app.get("/", response_model=Answer)
    def endpoint() -> Any:
        look("endpoint")
        return {"number": 1}

    async with client(app) as http:
        assert (await http.get("/")).json() == {"number": 2}
    thread = seen["endpoint"].thread
    assert thread.startswith("fastapi-peewee")
    assert seen == {
        "endpoint": Seen(thread, 1),
        "validation": Seen(thread, 1),
        "dump": Seen(thread, 0),
    }


async def test_relations_are_loaded_by_the_validation(db: Database) -> None:
    """A response model may read a lazy relation: it is validated while the lease is held."""

    class Author(db.Model):
        name = peewee.CharField()

    class Book(db.Model):
        title = peewee.CharField()
        author = peewee.ForeignKeyField(Author, backref="books")

    class BookRead(BaseModel):
        model_config = ConfigDict(from_attributes=True)

        title: str

    class AuthorRead(BaseModel):
        model_config = ConfigDict(from_attributes=True)

        name: str
        books: Annotated[list[BookRead], BeforeValidator(list)]

    await db.acreate_tables([Author, Book])
    author = await Author.acreate(name="Ann")
    await Book.acreate(title="Ours", author=author)
    app = FastAPI()
    Peewee(db).init_app(app)

    @app.get("/{number}", response_model=AuthorRead)
    def read(number: int) -> Any:
        return Author.get_by_id(number)

    async with client(app) as http:
        response = await http.get(f"/{author.id}")
    assert response.json() == {"name": "Ann", "books": [{"title": "Ours"}]}


@pytest.mark.parametrize("marked", [True, False])
async def test_an_endpoint_without_lease_takes_no_connection(db: Database, marked: bool) -> None:
    """`@without_lease` spares an endpoint the pool: it answers even if all is in use."""
    app = FastAPI()
    Peewee(db).init_app(app)

    def health() -> int:
        return db.pool_stats.in_use

    app.get("/health")(without_lease(health) if marked else health)
    async with client(app) as http:
        assert (await http.get("/health")).json() == (0 if marked else 1)


async def test_a_query_in_an_endpoint_without_lease_says_what_to_do(db: Database) -> None:
    """`@without_lease` means it: a query there is refused, and the error names the ways out."""
    app = FastAPI()
    Peewee(db).init_app(app)

    @app.get("/")
    @without_lease
    def endpoint() -> None:
        db.execute_sql("SELECT 1")

    async with client(app, raises=True) as http:
        with pytest.raises(NoLease, match="PeeweeRoute"):
            await http.get("/")


async def test_a_peewee_route_without_init_app_says_what_is_missing() -> None:
    """An application that has no `Peewee(db)` gets an error that names `init_app`."""
    app = FastAPI()
    router = APIRouter(route_class=PeeweeRoute)

    @router.get("/")
    def endpoint() -> int:
        return 1

    app.include_router(router)
    async with client(app, raises=True) as http:
        with pytest.raises(RuntimeError, match=r"init_app\(app\)"):
            await http.get("/")


async def test_init_app_makes_peewee_route_the_class_of_the_routes_that_follow(
    db: Database,
) -> None:
    """`app.get` makes PeeweeRoutes after `init_app`; a router chooses its class itself."""
    app = FastAPI()
    Peewee(db).init_app(app)
    plain, own = APIRouter(), APIRouter(route_class=PeeweeRoute)
    classes: dict[str, Any] = {}
    for name, router in (("app", app), ("plain", plain), ("own", own)):
        router.get(f"/{name}")(lambda: threading.current_thread().name)
    app.include_router(plain)
    app.include_router(own)
    async with client(app) as http:
        for name in ("app", "plain", "own"):
            thread = (await http.get(f"/{name}")).json()
            classes[name] = thread.startswith("fastapi-peewee")
    assert classes == {"app": True, "plain": False, "own": True}


async def test_the_body_of_a_response_validation_error_is_what_the_endpoint_returned(
    db: Database,
) -> None:
    """A handler of `ResponseValidationError` finds the very object, and where it comes from."""
    app = FastAPI()
    Peewee(db).init_app(app)
    returned = object()

    @app.get("/wrong", response_model=int)
    def endpoint() -> Any:
        return returned

    async with client(app, raises=True) as http:
        with pytest.raises(ResponseValidationError) as failure:
            await http.get("/wrong")
    assert failure.value.body is returned
    text = str(failure.value)
    assert f'File "{__file__}", line {endpoint.__code__.co_firstlineno}' in text
    assert "GET /wrong" in text


async def test_a_failing_endpoint_gives_its_connection_back(db: Database) -> None:
    """Whatever an endpoint raises, its lease is over; twice as often as there are connections."""
    app = FastAPI()
    Peewee(db).init_app(app)

    class Odd(BaseException):
        pass

    errors = [ValueError, StopIteration, asyncio.CancelledError, Odd, HTTPException]

    @app.get("/{number}")
    def endpoint(number: int) -> None:
        db.execute_sql("SELECT 1")
        raise errors[number](400)

    async with client(app, raises=True) as http:
        for _ in range(2 * db.pool.size):
            for number in range(len(errors)):
                with suppress(Exception, asyncio.CancelledError, Odd):
                    await asyncio.wait_for(http.get(f"/{number}"), 10)
                assert db.pool_stats.in_use == 0
    assert db.pool_stats.opened == 1


async def test_a_thread_in_the_context_of_an_endpoint_cannot_hang_it(sqlite_url: str) -> None:
    """A thread that shares its endpoint's lease, and is waited for there, gets an error in time."""
    async with connected(sqlite_url, timeout=0.1) as db:
        app = FastAPI()
        Peewee(db).init_app(app)

        @app.get("/")
        def endpoint() -> str:
            with ThreadPoolExecutor(1) as threads:
                context = contextvars.copy_context()
                job = threads.submit(context.run, db.execute_sql, "SELECT 1")
                return type(job.exception()).__name__

        async with client(app) as http:
            assert (await http.get("/")).json() == "TurnTimeout"


async def test_a_thread_that_outlives_its_endpoint_is_refused(db: Database) -> None:
    """A thread in the endpoint's context can't use the connection once that has gone back."""
    app = FastAPI()
    Peewee(db).init_app(app)
    answered = threading.Event()
    results: list[Future[Any]] = []

    with ThreadPoolExecutor(1) as threads:

        def late() -> None:
            assert answered.wait(10)
            db.execute_sql("SELECT 1")

        @app.get("/")
        def endpoint() -> None:
            results.append(threads.submit(contextvars.copy_context().run, late))

        async with client(app) as http:
            assert (await http.get("/")).status_code == 200
        answered.set()
    assert isinstance(results[0].exception(), LeaseEnded)


async def test_a_plain_thread_of_an_endpoint_inherits_nothing(db: Database) -> None:
    """A thread started without the context has a connection of its own, as Peewee has it."""
    app = FastAPI()
    Peewee(db).init_app(app)

    def query(results: list[Any]) -> None:
        with db.connection_context():
            results.append(db.connection())

    @app.get("/")
    def endpoint() -> bool:
        results: list[Any] = []
        thread = threading.Thread(target=query, args=(results,))
        thread.start()
        thread.join()
        return results[0] is not db.connection()

    async with client(app) as http:
        assert (await http.get("/")).json() is True


async def test_sync_background_tasks_have_a_connection_each_after_the_endpoints_is_back(
    db: Database,
) -> None:
    """Background tasks that are `def` run queries on leases of their own, one after the other."""
    app = FastAPI()
    Peewee(db).init_app(app)
    log: list[Any] = []

    def task(name: str) -> None:
        log.append((name, db.execute_sql("SELECT 1").fetchone()[0], db.pool_stats.in_use))

    async def atask(name: str) -> None:
        log.append((name, db.pool_stats.in_use))

    @app.get("/added")
    def added(tasks: BackgroundTasks) -> None:
        tasks.add_task(task, "a")
        tasks.add_task(atask, "b")
        tasks.add_task(task, "c")

    @app.get("/attached")
    async def attached() -> Response:
        return Response(background=BackgroundTask(task, "d"))

    async with client(app) as http:
        await http.get("/added")
        await http.get("/attached")
    assert log == [("a", 1, 1), ("b", 0), ("c", 1, 1), ("d", 1, 1)]
