"""Transactions of requests: what is answered is committed, what fails is undone, at any moment."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import peewee
import pytest
from fastapi import BackgroundTasks, Depends, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import EventSourceResponse

from fastapi_peewee import ConnectedDb, Database, InTransaction, get_db, transaction
from tests.apps import Watched, back_to_rest, client, connected, make_app
from tests.apps import db as db
from tests.apps import note as note

KINDS = pytest.mark.parametrize("kind", ["def", "async"])


# Committed before the response.


@KINDS
async def test_the_transaction_is_committed_when_the_response_starts(
    db: Database, note: Any, kind: str
) -> None:
    """As the first byte leaves, another connection sees the row, and none is held."""
    app = make_app(db)

    def sync(held: InTransaction) -> bool:
        note.create(text="a")
        return held.in_transaction()

    async def asynchronous(held: InTransaction) -> bool:
        await note.acreate(text="a")
        return await held.run(held.in_transaction)

    endpoint: Any = sync if kind == "def" else asynchronous
    app.post("/", status_code=201)(endpoint)

    async def look() -> Any:
        return db.pool_stats.in_use, await db.count(note.select())

    watched = Watched(app, look)
    async with client(watched) as http:
        response = await http.post("/")
    assert (response.status_code, response.json()) == (201, True)
    assert watched.seen == [(0, 1)]


@KINDS
@pytest.mark.parametrize("database", ["postgres_url", "sqlite_url"])
async def test_a_commit_that_fails_is_answered_with_an_error(
    request: pytest.FixtureRequest, database: str, kind: str
) -> None:
    """A constraint that is only checked at COMMIT gives a 422, not a success."""
    async with connected(request.getfixturevalue(database)) as db:

        class Owner(db.Model):
            name = peewee.CharField()

        class Item(db.Model):
            owner = peewee.ForeignKeyField(Owner, deferrable="INITIALLY DEFERRED")

        await db.acreate_tables([Owner, Item])
        app = make_app(db)
        inserted: list[int] = []

        def sync(held: InTransaction) -> None:
            inserted.append(Item.create(owner=404).id)

        async def asynchronous(held: InTransaction) -> None:
            await held.run(sync, held)

        endpoint: Any = sync if kind == "def" else asynchronous
        app.post("/", status_code=201)(endpoint)
        async with client(app) as http:
            response = await http.post("/")
        assert len(inserted) == 1, "the statement itself was refused"
        assert response.status_code == 422
        assert await db.count(Item.select()) == 0


@KINDS
@pytest.mark.parametrize(
    ("outcome", "status", "kept"),
    [
        ("value", 201, True),
        ("returned", 409, True),
        ("HTTPException", 409, False),
        ("not found", 404, False),
        ("ValueError", 500, False),
        ("request invalid", 422, False),
        ("response invalid", 500, False),
        ("after endpoint", 500, False),
    ],
)
async def test_how_a_transaction_of_a_request_ends(
    db: Database, note: Any, kind: str, outcome: str, status: int, kept: bool
) -> None:
    """What is raised rolls back, so does a response that fails its validation; the rest commits."""
    app = make_app(db)

    async def written(held: InTransaction) -> AsyncIterator[None]:
        await note.acreate(text="dependency")
        yield
        if outcome == "after endpoint":
            raise ValueError

    def act() -> Any:
        if outcome == "returned":
            return JSONResponse({}, 409)
        if outcome == "HTTPException":
            raise HTTPException(409)
        if outcome == "not found":
            note.get_by_id(404)
        if outcome == "ValueError":
            raise ValueError
        return "no number" if outcome == "response invalid" else 1

    def sync(number: int) -> Any:
        note.create(text="endpoint")
        return act()

    async def asynchronous(number: int) -> Any:
        await note.acreate(text="endpoint")
        return await db.run(act)

    endpoint: Any = sync if kind == "def" else asynchronous
    dependencies = [Depends(written, scope="function")]
    app.post("/", status_code=201, response_model=int, dependencies=dependencies)(endpoint)
    app.get("/")(lambda: db.in_transaction())
    async with client(app) as http:
        response = await http.post("/", params={"number": "x" if "request" in outcome else 1})
        assert response.status_code == status
        assert db.pool_stats.in_use == 0
        assert await db.count(note.select()) == (2 if kept else 0)
        assert (await http.get("/")).json() is False


@pytest.mark.parametrize("block", ["with", "async with", "decorated def", "decorated async def"])
async def test_a_block_in_the_endpoint_is_committed_before_its_response_is_validated(
    db: Database, note: Any, block: str
) -> None:
    """A block of the endpoint's own ends with it: a response that is invalid comes too late."""
    app = make_app(db)

    def with_block() -> Any:
        with db.atomic():
            note.create(text="a")
            return "no number"

    async def async_with_block() -> Any:
        async with db.atomic():
            await note.acreate(text="a")
            return "no number"

    @db.atomic()
    def decorated() -> Any:
        note.create(text="a")
        return "no number"

    @db.atomic()
    async def async_decorated() -> Any:
        await note.acreate(text="a")
        return "no number"

    endpoints: dict[str, Any] = {
        "with": with_block,
        "async with": async_with_block,
        "decorated def": decorated,
        "decorated async def": async_decorated,
    }
    app.post("/", response_model=int)(endpoints[block])
    async with client(app) as http:
        assert (await http.post("/")).status_code == 500
    assert await db.count(note.select()) == 1
    assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("fail", [True, False])
@KINDS
async def test_decorated_endpoints_are_transactions(
    db: Database, note: Any, kind: str, fail: bool
) -> None:
    """`@db.atomic()` under a route's decorator: parameters still arrive, failures roll back."""
    app = make_app(db)

    @db.atomic()
    def sync(number: int) -> int:
        note.create(text="a")
        if fail:
            raise HTTPException(400)
        return number

    @db.atomic()
    async def asynchronous(number: int) -> int:
        await note.acreate(text="a")
        if fail:
            raise HTTPException(400)
        return number

    endpoint: Any = sync if kind == "def" else asynchronous
    app.post("/{number}")(endpoint)
    async with client(app) as http:
        response = await http.post("/7")
    assert (response.status_code, response.json() == 7) == ((400, False) if fail else (200, True))
    assert await db.count(note.select()) == (0 if fail else 1)


async def test_background_tasks_come_after_the_commit(db: Database, note: Any) -> None:
    """A background task finds committed what its request has written, on a lease of its own."""
    app = make_app(db)
    found: list[Any] = []

    async def task() -> None:
        found.append((await db.count(note.select()), await db.run(db.in_transaction)))

    @app.post("/")
    def endpoint(held: InTransaction, tasks: BackgroundTasks) -> None:
        note.create(text="a")
        tasks.add_task(task)

    async with client(app) as http:
        await http.post("/")
    assert found == [(1, False)]


@pytest.mark.parametrize("fail", [True, False])
async def test_callbacks_run_once_the_request_is_committed(
    db: Database, note: Any, fail: bool
) -> None:
    """`after_commit` callbacks, plain and async, run before the response and not on rollback."""
    app = make_app(db)
    log: list[str] = []

    async def asynchronous() -> None:
        log.append(f"async {await db.count(note.select())}")

    @app.post("/")
    def endpoint(held: InTransaction) -> None:
        held.after_commit(lambda: log.append("plain"))
        held.after_commit(asynchronous)
        note.create(text="a")
        assert log == []
        if fail:
            raise HTTPException(400)

    watched = Watched(app, lambda: log.append("response"))
    async with client(watched) as http:
        await http.post("/")
    assert log == (["response"] if fail else ["plain", "async 1", "response"])


async def test_savepoints_of_a_request_in_a_transaction(db: Database, note: Any) -> None:
    """Inside `InTransaction`, blocks are savepoints; sync and async code and tasks share it."""
    app = make_app(db)

    async def failing() -> None:
        async with db.atomic():
            await note.acreate(text="lost")
            raise LookupError

    def sync(text: str) -> None:
        with db.atomic():
            note.create(text=text)

    @app.post("/", dependencies=[Depends(get_db)])
    async def endpoint(held: InTransaction) -> int:
        with contextlib.suppress(LookupError):
            await failing()
        await asyncio.gather(*(db.run(sync, str(number)) for number in range(5)))
        return db.pool_stats.in_use

    async with client(app) as http:
        assert (await http.post("/")).json() == 1
    assert await db.count(note.select()) == 5


# Refused.


async def _own_transaction(db: ConnectedDb) -> AsyncIterator[None]:
    async with db.atomic():
        yield


def _own_sync_transaction(db: ConnectedDb) -> Iterator[None]:
    with db.atomic():
        yield


@KINDS
@pytest.mark.parametrize("dependency", [transaction, _own_transaction, _own_sync_transaction])
@pytest.mark.parametrize("held", [True, False])
async def test_a_transaction_in_the_default_scope_is_refused(
    db: Database, note: Any, kind: str, dependency: Any, held: bool
) -> None:
    """`Depends(transaction)` would commit too late, as one's own dependency would: an error that
    says so, and nothing is kept."""
    app = make_app(db)
    if held or dependency is transaction:
        dependencies = [Depends(dependency)]
    else:  # without `get_db`

        async def alone() -> AsyncIterator[None]:
            async with db.atomic():
                yield

        def sync_alone() -> Iterator[None]:
            with db.connection_context(), db.atomic():
                yield

        dependencies = [Depends(alone if dependency is _own_transaction else sync_alone)]

    def sync() -> None:
        note.create(text="a")

    async def asynchronous() -> None:
        await note.acreate(text="a")

    endpoint: Any = sync if kind == "def" else asynchronous
    app.post("/", dependencies=dependencies)(endpoint)
    async with client(app) as http:
        assert (await http.post("/")).status_code == 500
    async with client(app, raises=True) as http:
        with pytest.raises(RuntimeError, match='scope="function"'):
            await http.post("/")
    assert await db.count(note.select()) == 0
    assert db.pool_stats.in_use == 0


@pytest.mark.parametrize("how", ["stack", "helper", "helper with a generator"])
async def test_a_transaction_that_an_endpoint_leaves_open_is_refused(
    db: Database, note: Any, how: str
) -> None:
    """Nobody would leave it before the response: an error says so, and nothing is kept."""
    app = make_app(db)
    stack = contextlib.AsyncExitStack()

    async def inner() -> AsyncIterator[None]:
        async with db.atomic():
            yield

    @contextlib.asynccontextmanager
    async def helper() -> AsyncIterator[None]:
        async with db.atomic():
            yield

    @contextlib.asynccontextmanager
    async def delegating() -> AsyncIterator[None]:
        async for _ in inner():
            yield

    blocks: dict[str, Callable[[], contextlib.AbstractAsyncContextManager[Any]]] = {
        "stack": db.atomic,
        "helper": helper,
        "helper with a generator": delegating,
    }

    @app.post("/")
    async def endpoint() -> None:
        await stack.enter_async_context(blocks[how]())
        await note.acreate(text="lost")

    async with client(app, raises=True) as http:
        with pytest.raises(RuntimeError, match="in the generator that it sends"):
            await asyncio.create_task(http.post("/"))
    await back_to_rest(db)
    assert await db.count(note.select()) == 0


def _letters() -> Iterator[str]:
    yield "a"


async def _aletters() -> AsyncIterator[str]:
    yield "a"


class _Letters:
    def __call__(self) -> Iterator[str]:
        yield "a"


class _ALetters:
    async def __call__(self) -> AsyncIterator[str]:
        yield "a"


@pytest.mark.parametrize("response_class", [None, StreamingResponse, EventSourceResponse])
@pytest.mark.parametrize(
    "endpoint",
    [
        _letters,
        _aletters,
        functools.partial(_letters),
        functools.partial(_aletters),
        _Letters(),
        _ALetters(),
    ],
    ids=["def", "async", "partial", "async partial", "object", "async object"],
)
async def test_a_transaction_on_a_generator_endpoint_is_refused(
    sqlite_url: str, endpoint: Any, response_class: Any
) -> None:
    """The body of a generator endpoint would run after the commit: the request is an error."""
    async with connected(sqlite_url) as db:
        app = make_app(db)
        options = {} if response_class is None else {"response_class": response_class}
        dependencies = [Depends(transaction, scope="function")]
        app.get("/", name="letters", dependencies=dependencies, **options)(endpoint)
        async with client(app, raises=True) as http:
            with pytest.raises(RuntimeError, match="generator endpoint"):
                await http.get("/")


async def test_a_stream_that_is_returned_from_a_transaction(db: Database, note: Any) -> None:
    """A returned stream comes after the commit, and takes a connection of its own."""
    app = make_app(db)

    async def texts() -> AsyncIterator[str]:
        async for row in db.iterate(note.select()):
            yield row.text
        yield str(await db.run(db.in_transaction))

    @app.post("/")
    def endpoint(held: InTransaction) -> StreamingResponse:
        note.create(text="a")
        return StreamingResponse(texts())

    watched = Watched(app, lambda: db.pool_stats.in_use)
    async with client(watched) as http:
        assert (await http.post("/")).text == "aFalse"
    assert watched.seen == [0]


# Cancelled.


class Cancelling:
    """Calls `cancel` before or after one of the steps that a database is asked for."""

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = asyncio.get_running_loop()
        self.cancel: Callable[[], object] = lambda: None
        self.at: Callable[[int], bool] = lambda moment: False
        self.moments: list[str] = []
        for name in ("begin", "commit", "rollback", "execute_sql", "clean"):
            monkeypatch.setattr(db, name, self._around(name, getattr(db, name)))

    def _around(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **kwargs: Any) -> Any:
            self._moment("before " + name)
            try:
                return method(*args, **kwargs)
            finally:
                self._moment("after " + name)

        return around

    def _moment(self, name: str) -> None:
        self.moments.append(name)
        if not self.at(len(self.moments)):
            return
        cancelled = threading.Event()

        def cancel() -> None:
            self.cancel()
            cancelled.set()

        self.loop.call_soon_threadsafe(cancel)
        assert cancelled.wait(10)


@pytest.mark.parametrize("repeatedly", [False, True], ids=["once", "repeatedly"])
@pytest.mark.parametrize("how", ["task", "anyio"])
@pytest.mark.parametrize("endpoint", ["atomic", "atomic under get_db", "def", "async"])
async def test_a_request_that_is_cancelled_at_any_moment_is_done_or_undone(
    db: Database,
    note: Any,
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
    how: str,
    repeatedly: bool,
) -> None:
    """Cancelled before or after any statement: all or nothing, and the next request is clean.

    Until the COMMIT is on its way, it is nothing.
    """
    app = make_app(db)
    holding = [Depends(get_db)] if "get_db" in endpoint else []

    @app.post("/atomic", dependencies=holding)
    async def atomic() -> None:
        async with db.atomic():
            await note.acreate(text="a")
            await note.acreate(text="b")

    @app.post("/def")
    def sync(held: InTransaction) -> None:
        note.create(text="a")
        note.create(text="b")

    @app.post("/async")
    async def asynchronous(held: InTransaction) -> None:
        await atomic()

    path = "/" + endpoint.split()[0]
    cancelling = Cancelling(db, monkeypatch)

    async with client(app) as http:

        async def post() -> int:
            return (await http.post(path)).status_code

        async def post_in_scope() -> int | None:
            with anyio.CancelScope() as scope:
                cancelling.cancel = scope.cancel
                return await post()
            return None

        assert await post() == 200
        count = len(cancelling.moments)
        assert count >= 8, cancelling.moments
        rows = 2
        for chosen in range(1, count + 1):
            cancelling.moments.clear()
            task: asyncio.Task[int | None] = asyncio.create_task(
                post() if how == "task" else post_in_scope()
            )
            if how == "task":
                cancelling.cancel = task.cancel
            cancelling.at = chosen.__le__ if repeatedly else chosen.__eq__
            done, _ = await asyncio.wait({task}, timeout=20)
            assert done, "hangs"
            cancelling.at = lambda moment: False
            answered = not task.cancelled() and task.result() is not None
            committing = "before commit" in cancelling.moments[:chosen]
            now = await db.count(note.select())
            if answered:
                assert task.result() == 200
                assert now == rows + 2
            elif committing:
                assert now in (rows, rows + 2)
            else:
                assert now == rows, cancelling.moments
            await back_to_rest(db)
            assert await post() == 200
            rows = now + 2
        assert await db.count(note.select()) == rows


@pytest.mark.parametrize("how", ["asyncio", "anyio"])
@pytest.mark.parametrize("place", ["run", "await"])
async def test_a_timeout_around_a_transaction_undoes_it(
    db: Database, note: Any, how: str, place: str
) -> None:
    """`asyncio.timeout` and anyio's scopes, late in a thread or in an await, roll back.

    The endpoint may then go on.
    """
    app = make_app(db)
    loop = asyncio.get_running_loop()

    async def work(expire: Callable[[], None]) -> None:
        def write() -> None:
            note.create(text="lost")
            if place == "run":
                loop.call_soon_threadsafe(expire)

        async with db.atomic():
            await db.run(write)
            expire()
            await asyncio.Event().wait()

    @app.post("/")
    async def endpoint() -> str:
        timed_out = False
        if how == "asyncio":
            try:
                async with asyncio.timeout(None) as limit:
                    await work(lambda: limit.reschedule(loop.time()))
            except TimeoutError:
                timed_out = True
        else:
            with anyio.CancelScope() as scope:
                await work(scope.cancel)
            timed_out = scope.cancelled_caught
        await note.acreate(text="kept")
        return f"{timed_out} {db.pool_stats.in_use}"

    async with client(app) as http:
        assert (await http.post("/")).json() == "True 0"
    assert [row.text for row in await note.select().aexecute()] == ["kept"]


async def test_a_nested_block_that_is_cancelled_as_it_begins_leaves_the_outer_one_whole(
    db: Database, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A savepoint whose task is cancelled while it is made is undone; the transaction goes on."""
    app = make_app(db)
    cancelling = Cancelling(db, monkeypatch)

    @app.post("/")
    async def endpoint() -> int:
        async with db.atomic():
            await note.acreate(text="before")
            with anyio.CancelScope() as scope:
                cancelling.cancel = scope.cancel
                cancelling.at = lambda moment: True
                async with db.atomic():
                    raise AssertionError("not cancelled")
            cancelling.at = lambda moment: False
            assert scope.cancelled_caught
            await note.acreate(text="after")
            return await db.run(db.transaction_depth)

    async with client(app) as http:
        response = await http.post("/")
    assert (response.status_code, response.json()) == (200, 1)
    assert await db.count(note.select()) == 2


async def test_a_block_cancelled_while_it_waits_for_a_child_is_undone(
    db: Database, note: Any
) -> None:
    """Leaving a block waits for a call that is still running; cancelled then, it rolls back."""
    app = make_app(db)
    loop = asyncio.get_running_loop()
    inside, go_on = asyncio.Event(), threading.Event()
    children: list[asyncio.Task[None]] = []

    def slow() -> None:
        note.create(text="child")
        loop.call_soon_threadsafe(inside.set)
        assert go_on.wait(10)

    @app.post("/")
    async def endpoint() -> None:
        async with db.atomic():
            await note.acreate(text="parent")
            children.append(asyncio.create_task(db.run(slow)))
            await inside.wait()
            # The next await is the block's end, which can't get on before the child does.
            loop.call_soon(task.cancel)
            loop.call_later(0.05, go_on.set)

    async with client(app) as http:
        task = asyncio.create_task(http.post("/"))
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.gather(*children)
    assert await db.count(note.select()) == 0
    await back_to_rest(db)


async def test_a_task_in_a_block_of_its_own_holds_no_response_back(db: Database, note: Any) -> None:
    """What a task goes on with after the response is no transaction of a dependency's."""
    app = make_app(db)
    inside, go_on = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def write() -> None:
        async with db.atomic():
            await note.acreate(text="later")
            inside.set()
            await go_on.wait()

    @app.post("/")
    async def endpoint() -> str:
        tasks.append(asyncio.create_task(write()))
        await inside.wait()
        return "accepted"

    async with client(app) as http:
        response = await http.post("/")
    assert (response.status_code, response.json()) == (200, "accepted")
    go_on.set()
    await asyncio.gather(*tasks)
    assert await db.count(note.select()) == 1
    await back_to_rest(db)


async def test_requests_cancelled_while_they_wait_leave_the_queue(sqlite_url: str) -> None:
    """A request cancelled while it waits for `get_db` is out, and its neighbour is served."""
    async with connected(sqlite_url, pool_size=1, timeout=30) as db:
        app = make_app(db)
        inside, go_on = asyncio.Event(), asyncio.Event()

        @app.get("/hold", dependencies=[Depends(get_db)])
        async def hold() -> None:
            inside.set()
            await go_on.wait()

        @app.get("/", dependencies=[Depends(get_db)])
        async def endpoint() -> int:
            return await db.run(lambda: 1)

        async with client(app) as http:
            holder = asyncio.create_task(http.get("/hold"))
            await inside.wait()
            waiting = [asyncio.create_task(http.get("/")) for _ in range(6)]
            with anyio.fail_after(10):
                while db.pool_stats.waiting < 6:
                    await anyio.lowlevel.checkpoint()
            for task in waiting[::2]:
                task.cancel()
            with anyio.fail_after(10):
                while db.pool_stats.waiting > 3:
                    await anyio.lowlevel.checkpoint()
            go_on.set()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert (await holder).status_code == 200
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        served = [result for result in results[1::2] if isinstance(result, httpx.Response)]
        assert [response.json() for response in served] == [1, 1, 1]
