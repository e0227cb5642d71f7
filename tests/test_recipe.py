"""The how-to's recipe, as it was written, on any database of Peewee's own."""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Annotated, Any, NamedTuple

import httpx
import peewee
import pytest
from fastapi import Depends, FastAPI, HTTPException
from playhouse import pool
from playhouse.db_url import parse
from pydantic import BaseModel, BeforeValidator, ConfigDict

from fastapi_peewee import NoLease, Peewee, PeeweeConnectionState, PeeweeRoute
from fastapi_peewee import get_db as our_get_db
from fastapi_peewee import reset_db_state as our_reset_db_state
from tests.apps import Watched, client

REQUESTS = 60
TOGETHER = 5  # so many endpoints are inside at a time


class Kind(NamedTuple):
    plain: Any
    pooled: Any
    options: dict[str, Any]
    in_flight: int


KINDS = {
    "sqlite": Kind(
        peewee.SqliteDatabase,
        pool.PooledSqliteDatabase,
        # The first is the page's; the second spares the disk.
        {"check_same_thread": False, "pragmas": {"synchronous": 0}},
        REQUESTS,
    ),
    # A server has few connections, which other test processes want, too.
    "postgres": Kind(peewee.PostgresqlDatabase, pool.PooledPostgresqlDatabase, {}, 20),
    "mysql": Kind(peewee.MySQLDatabase, pool.PooledMySQLDatabase, {}, 20),
}


class Setup(NamedTuple):
    """A database of Peewee's own, and how the application has it."""

    db: Any  # perhaps a proxy
    real: Any
    in_flight: int

    def checked_out(self) -> int:
        return len(getattr(self.real, "_in_use", ()))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["plain", "pooled"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[
        None,
        pytest.param(peewee.DatabaseProxy, marks=pytest.mark.slow),
        pytest.param(peewee.Proxy, marks=pytest.mark.slow),
    ]
)
def proxy(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def setup(request: pytest.FixtureRequest, kind: str, form: str, proxy: Any) -> Iterator[Setup]:
    options = dict(parse(request.getfixturevalue(f"{kind}_url"), unquote_user=True))
    name, known = options.pop("database"), KINDS[kind]
    options |= known.options
    if form == "pooled":
        real = known.pooled(name, max_connections=known.in_flight, **options)
    else:
        real = known.plain(name, **options)
    if kind == "sqlite":
        real.timeout = 30  # seconds that a write waits for the others
    db = real
    if proxy is not None:
        db = proxy()
        db.initialize(real)
    setup = Setup(db, real, known.in_flight)
    yield setup
    assert setup.checked_out() == 0
    if form == "pooled":
        real.close_all()
    gc.collect()  # a connection that somebody forgot makes a ResourceWarning, an error here


def the_page(db: Any) -> FastAPI:
    """The page's `database.py`, `models.py`, `schemas.py`, `crud.py` and `main.py` in one."""
    real_db = db.obj if isinstance(db, peewee.Proxy) else db

    # database.py
    db_state_default = {"closed": None, "conn": None, "ctx": None, "transactions": None}
    real_db._state = PeeweeConnectionState()

    # models.py
    class User(peewee.Model):
        email = peewee.CharField(unique=True, index=True)

        class Meta:
            database = db

    class Item(peewee.Model):
        title = peewee.CharField(index=True)
        owner = peewee.ForeignKeyField(User, backref="items")

        class Meta:
            database = db

    # schemas.py
    class ItemRead(BaseModel):
        model_config = ConfigDict(from_attributes=True)

        title: str

    class UserRead(BaseModel):
        model_config = ConfigDict(from_attributes=True)

        email: str
        items: Annotated[list[ItemRead], BeforeValidator(list)]

    # main.py
    db.connect()
    db.create_tables([User, Item])
    db.close()

    app = FastAPI()

    async def reset_db_state() -> None:
        real_db._state._state.set(db_state_default.copy())
        real_db._state.reset()

    def get_db(db_state: Annotated[None, Depends(reset_db_state)]) -> Iterator[None]:
        try:
            db.connect()
            yield
        finally:
            if not db.is_closed():
                db.close()

    together = threading.Barrier(TOGETHER)
    using: dict[int, str] = {}

    @app.post("/users/{email}", response_model=UserRead, dependencies=[Depends(get_db)])
    def create_user(email: str) -> Any:
        connection = id(db.connection())
        assert using.setdefault(connection, email) == email, "two requests share a connection"
        with db.atomic():
            user = User.create(email=email)
            for title in ("a", "b"):
                Item.create(title=email + title, owner=user)
        together.wait(30)
        assert id(db.connection()) == connection
        assert using.pop(connection) == email
        return User.get(User.email == email)

    @app.get("/users/", response_model=list[UserRead], dependencies=[Depends(get_db)])
    def read_users() -> Any:
        return list(User.select().order_by(User.email))

    @app.post("/undone/{email}", dependencies=[Depends(get_db)])
    def undone(email: str) -> None:
        with db.atomic():
            User.create(email=email)
            raise HTTPException(418)

    return app


def user(email: str) -> dict[str, Any]:
    return {"email": email, "items": [{"title": email + "a"}, {"title": email + "b"}]}


async def at_once(in_flight: int, calls: list[Callable[[], Any]]) -> list[httpx.Response]:
    free = asyncio.Semaphore(in_flight)

    async def one(call: Callable[[], Any]) -> httpx.Response:
        async with free:
            response: httpx.Response = await call()
            return response

    return await asyncio.gather(*(one(call) for call in calls))


@pytest.mark.parametrize("ours", [False, True], ids=["as on the page", "with our middleware"])
async def test_the_recipe_as_it_was_written(setup: Setup, ours: bool) -> None:
    """Sixty parallel requests: each has a connection to itself, in all of its threads."""
    app = await asyncio.to_thread(the_page, setup.db)
    if ours:
        Peewee(setup.db).init_app(app)
    emails = [f"user{number:02}" for number in range(REQUESTS)]
    async with client(app) as http:
        responses = await at_once(
            setup.in_flight, [partial(http.post, f"/users/{email}") for email in emails]
        )
        assert [response.status_code for response in responses] == [200] * REQUESTS
        assert [response.json() for response in responses] == [user(email) for email in emails]
        assert (await http.get("/users/")).json() == [user(email) for email in emails]


@pytest.mark.parametrize("proxy", [None], indirect=True)
@pytest.mark.parametrize("ours", [False, True], ids=["as on the page", "with our middleware"])
async def test_what_a_request_of_the_recipe_leaves_behind(setup: Setup, ours: bool) -> None:
    """A failed block is undone, and the next request on the same thread finds nothing of it."""
    app = await asyncio.to_thread(the_page, setup.db)
    if ours:
        Peewee(setup.db).init_app(app)
    async with client(app) as http:
        for _ in range(3):
            assert (await http.post("/undone/a")).status_code == 418
            assert (await http.get("/users/")).json() == []
        assert setup.checked_out() == 0


@pytest.mark.parametrize("proxy", [None], indirect=True)
@pytest.mark.parametrize("form", ["plain"], indirect=True)
async def test_the_four_keys_of_the_page_are_enough(setup: Setup) -> None:
    """State that Peewee has added since then is there after `reset`, and isn't shared."""
    state: Any = PeeweeConnectionState()
    setup.real._state = state
    default = {"closed": None, "conn": None, "ctx": None, "transactions": None}
    first: dict[str, Any] = default.copy()

    def reset() -> None:
        state._state.set(first)
        state.reset()
        assert state.closed is True
        assert (state.ctx, state.transactions, state.commit_callbacks) == ([], [], [])
        assert setup.real.is_closed()
        assert not hasattr(state, "unknown")

    await asyncio.to_thread(reset)
    assert first["closed"] is True
    assert default == {"closed": None, "conn": None, "ctx": None, "transactions": None}
    assert state._state.get() is None


def test_a_context_variable_of_the_pages_own_does_no_harm() -> None:
    """The page makes its variable at module level, with a default; ours needs none."""
    own: ContextVar[dict[str, Any]] = ContextVar("db_state", default={"closed": None})  # noqa: B039
    db = peewee.SqliteDatabase(":memory:")
    db._state = PeeweeConnectionState()
    with db:
        assert db.execute_sql("SELECT 1").fetchone() == (1,)
    assert own.get() == {"closed": None}
    assert db.is_closed()


# A database of Peewee's own with our dependencies.


def with_our_dependencies(db: Any, dependency: Any) -> FastAPI:
    app = FastAPI()
    Peewee(db).init_app(app)

    class User(peewee.Model):
        email = peewee.CharField(unique=True)

        class Meta:
            database = db

    with db.connection_context():
        db.create_tables([User])
    together = threading.Barrier(TOGETHER)
    using: dict[int, str] = {}

    def look(email: str) -> None:
        assert using.setdefault(id(db.connection()), email) == email

    @app.post("/users/{email}", dependencies=[Depends(dependency), Depends(look)])
    def create_user(email: str) -> str:
        look(email)
        with db.atomic():
            User.create(email=email)
        together.wait(30)
        assert using.pop(id(db.connection())) == email
        return str(User.get(User.email == email).email)

    @app.get("/users/", dependencies=[Depends(dependency)])
    def read_users() -> list[str]:
        return [user.email for user in User.select().order_by(User.email)]

    @app.get("/users/{number}", dependencies=[Depends(dependency)])
    def read_user(number: int) -> str:
        return str(User.get_by_id(number).email)

    @app.post("/again/{email}", dependencies=[Depends(dependency)])
    def again(email: str) -> None:
        with db.atomic():
            User.create(email=email)
            User.create(email=email)

    @app.post("/left-open/{email}", dependencies=[Depends(dependency)])
    def left_open(email: str) -> None:
        db.atomic().__enter__()
        User.create(email=email)

    @app.get("/nothing")
    def nothing() -> None:
        User.select().count()

    return app


def pages_get_db(db: Any) -> Callable[..., Iterator[None]]:
    def get_db(state: Annotated[None, Depends(our_reset_db_state)]) -> Iterator[None]:
        db.connect()
        try:
            yield
        finally:
            db.close()

    return get_db


@pytest.mark.parametrize("dependency", ["get_db", "reset_db_state"])
async def test_our_dependencies_on_a_database_of_peewees_own(setup: Setup, dependency: str) -> None:
    """Sixty parallel requests with `get_db`, or with `reset_db_state` under the page's `get_db`."""
    chosen = our_get_db if dependency == "get_db" else pages_get_db(setup.db)
    app = await asyncio.to_thread(with_our_dependencies, setup.db, chosen)
    emails = [f"user{number:02}" for number in range(REQUESTS)]
    watched = Watched(app, setup.checked_out)
    async with client(watched) as http:
        responses = await at_once(
            setup.in_flight, [partial(http.post, f"/users/{email}") for email in emails]
        )
        assert [response.status_code for response in responses] == [200] * REQUESTS
        assert [response.json() for response in responses] == emails
        watched.seen.clear()
        assert (await http.get("/users/")).json() == emails
        if dependency == "get_db":  # it is closed before the response starts
            assert watched.seen == [0]


@pytest.mark.parametrize("proxy", [None, peewee.DatabaseProxy], indirect=True)
async def test_errors_on_a_database_of_peewees_own(setup: Setup) -> None:
    """Errors are answered as on one of ours, and whatever was left open is undone and closed."""
    app = await asyncio.to_thread(with_our_dependencies, setup.db, our_get_db)
    async with client(app) as http:
        response = await http.get("/users/1")
        assert (response.status_code, response.json()) == (404, {"detail": "User not found"})
        response = await http.post("/again/a")
        assert response.status_code == 409
        assert response.json()["detail"][0]["loc"][-1] == "email"
        await http.post("/left-open/b")
        assert (await http.get("/users/")).json() == []
    assert setup.checked_out() == 0


@pytest.mark.parametrize("proxy", [None], indirect=True)
async def test_a_query_without_get_db_on_a_database_of_peewees_own(setup: Setup) -> None:
    """In a request that holds no connection, a query is refused: none is opened to be forgotten."""
    app = await asyncio.to_thread(with_our_dependencies, setup.db, our_get_db)
    async with client(app, raises=True) as http:
        with pytest.raises(NoLease, match=r"Depends\(get_db\)"):
            await http.get("/nothing")
    assert setup.checked_out() == 0


AWAY = {
    "sqlite": lambda: peewee.SqliteDatabase("/nowhere/at/all.db", check_same_thread=False),
    "postgres": lambda: peewee.PostgresqlDatabase("nowhere", host="127.0.0.1", port=1),
    "mysql": lambda: peewee.MySQLDatabase("nowhere", host="127.0.0.1", port=1),
}


@pytest.mark.parametrize("name", AWAY)
async def test_a_database_of_peewees_own_that_is_away(name: str) -> None:
    """503 with `Retry-After`, each time anew."""
    db = AWAY[name]()
    app = FastAPI()
    Peewee(db).init_app(app)
    app.get("/", dependencies=[Depends(our_get_db)])(lambda: 1)
    async with client(app) as http:
        for _ in range(3):
            response = await http.get("/")
            assert response.status_code == 503
            assert response.json() == {"detail": "database unavailable"}
            assert "retry-after" in response.headers


async def test_peewee_route_needs_a_database_of_ours(tmp_path: Any) -> None:
    """On a database of Peewee's own, `PeeweeRoute` has no pool to take from: it says so."""
    db = peewee.SqliteDatabase(tmp_path / "a.db", check_same_thread=False)
    app = FastAPI()
    Peewee(db).init_app(app)
    app.get("/plain")(lambda: 1)
    app.router.route_class = PeeweeRoute
    app.get("/")(lambda: 1)
    async with client(app) as http:
        assert (await http.get("/plain")).json() == 1
    async with client(app, raises=True) as http:
        with pytest.raises(RuntimeError, match=r"connect\("):
            await http.get("/")
