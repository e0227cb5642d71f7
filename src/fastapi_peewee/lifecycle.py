"""`Peewee(db).init_app(app)`: what a database needs of an application, and the dependencies.

The middleware gives every request a scope, in which nothing is held until something asks for it.
"""

import asyncio
from asyncio.events import _get_running_loop
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeAlias

import peewee
from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .blocks import leave
from .calls import detached, run_follow_ups
from .database import Database
from .handlers import UNAVAILABLE, add_handlers
from .retries import is_retried
from .routing import PeeweeRoute, is_generator
from .state import Lease, PeeweeConnectionState, RequestScope, closed_state

#: Where the middleware is that stands around each application's routes, in whichever task.
_INNERMOST = ExceptionMiddleware.__module__


class Peewee:
    """Connects a database to an application.

    ::

        app = FastAPI()
        Peewee(db).init_app(app)      # before the routes

    Args:
        db: from `connect()`. A database (or initialised proxy) of Peewee's own works too: then
            `Depends(get_db)` opens a connection for each request, as Peewee does it, and there
            is no pool, no `async` side and no `PeeweeRoute`.
        grace: seconds that shutdown waits for connections in use.
        forbid_lazy_loads: raise `LazyLoad` if a relation is read while a response is validated,
            one query a row; by default if the application is made with `debug=True`. For
            development and tests.
    """

    def __init__(
        self, db: Any, *, grace: float = 10.0, forbid_lazy_loads: bool | None = None
    ) -> None:
        if isinstance(db, peewee.Proxy):
            db = db.obj
        if not isinstance(db, peewee.Database):
            raise TypeError(  # not the thing itself, which may be a URL with its password
                f"Peewee() takes a database, initialised if it is a proxy; got: {type(db).__name__}"
            )
        if not isinstance(db._state, PeeweeConnectionState):
            db._state = PeeweeConnectionState()
        self.db = db
        self.grace = grace
        self.forbid_lazy_loads = forbid_lazy_loads

    def init_app(self, app: FastAPI) -> None:
        """Add the middleware, the error handlers, the lifespan, and `PeeweeRoute`.

        Call it before the routes are added: `PeeweeRoute` becomes the class of those that follow.
        Routers choose it themselves: `APIRouter(route_class=PeeweeRoute)`. Plain routes work with
        `Depends(get_db)` and the `async` methods.
        """
        if self._install(app) and app.router.lifespan_context != self.lifespan:
            theirs = app.router.lifespan_context

            @asynccontextmanager
            async def both(app: FastAPI) -> AsyncIterator[Any]:
                async with self.lifespan(app), theirs(app) as state:
                    yield state

            app.router.lifespan_context = both

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Closes the pool at shutdown, and at startup the connection of the thread's own that was
        opened as modules were imported (`db.create_tables`, say), which no request would use.

        Also for `FastAPI(lifespan=Peewee(db).lifespan)`, which does all that `init_app` does but
        one thing: routes name `PeeweeRoute` themselves.
        """
        if self._install(app):
            app.middleware_stack = app.build_middleware_stack()
        if isinstance(self.db, Database):
            self.db.close_if_unused()
        try:
            yield
        finally:
            if isinstance(self.db, Database):
                await self.db.close_pool(self.grace)

    def _install(self, app: FastAPI) -> bool:
        """Returns False if it has been done before."""
        installed: list[Any] = app.user_middleware
        for middleware in installed:
            if middleware.cls is PeeweeMiddleware and middleware.kwargs["db"] is self.db:
                return False
        started, app.middleware_stack = app.middleware_stack, None
        app.add_middleware(PeeweeMiddleware, db=self.db, forbid_lazy_loads=self.forbid_lazy_loads)
        app.middleware_stack = started
        add_handlers(app)
        if isinstance(self.db, Database):
            app.router.route_class = PeeweeRoute
            app.router.responses = {**UNAVAILABLE, **app.router.responses}
        return True

    async def get_db(self) -> Any:
        """As the function `get_db`, for this database: for applications that have several."""
        return await _hold(_scope(), self.db)


class PeeweeMiddleware:
    """Gives each request and websocket its scope, and takes back what it holds.

    What `Depends(get_db)` took goes back before the first byte of the response is sent, or when a
    websocket ends.
    """

    def __init__(self, app: ASGIApp, db: Any, forbid_lazy_loads: bool | None = None) -> None:
        self.app = app
        self.db = db
        self.forbid_lazy_loads = forbid_lazy_loads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _get_running_loop() is None and isinstance(self.db, Database):
            raise RuntimeError(
                "fastapi-peewee runs on asyncio (uvicorn's loops, uvloop among them), not on trio. "
                'In tests, let a fixture `anyio_backend` return "asyncio"; `TestClient` uses it by '
                "default."
            )
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request: RequestScope | None = scope.get("fastapi_peewee")
        if request is not None:  # another database's middleware, or an application around this one
            self._enter(request, scope)
            await self._inner()(scope, receive, send)
            return
        request = scope["fastapi_peewee"] = RequestScope()
        self._enter(request, scope)
        token = RequestScope.current.set(request)

        async def send_free(message: Message) -> None:
            if not request.response_started:
                if message["type"] == "http.response.start":
                    request.response_started = True
                    if request.holds_anything:
                        await _before_response(request)
                elif message["type"] == "websocket.accept":
                    request.response_started = True
            await send(message)

        try:
            await self._inner()(scope, receive, send_free)
        except asyncio.CancelledError:
            request.cancelled = True
            raise
        finally:
            RequestScope.current.reset(token)
            request.over = True  # before what it holds is looked at: see `LeaseContext`
            if request.holds_anything:
                await _release(request, over=True)

    def _enter(self, request: RequestScope, scope: Scope) -> None:
        if request.app is not scope.get("app"):
            request.app, request.databases = scope.get("app"), []
        request.databases.append(self.db)
        forbid = self.forbid_lazy_loads
        request.forbids_lazy_loads = bool(
            getattr(request.app, "debug", False) if forbid is None else forbid
        )

    def _inner(self) -> ASGIApp:
        return self.app if self.db._state._state.get() is None else self._unbound

    async def _unbound(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A request made inside of another, in one process, must not inherit its connection.
        outer = self.db._state._state.get()
        self.db._state.bind(None)
        try:
            await self.app(scope, receive, send)
        finally:
            self.db._state.bind(outer)


async def _before_response(request: RequestScope) -> None:
    if (
        request.transactions
        or any(
            block.root.state["transactions"]
            for block, task in request.blocks.items()
            if not block.streams and _answers(task)
        )
        or any(
            _left_open(request, held) for held in request.leases.values() if isinstance(held, Lease)
        )
    ):
        raise RuntimeError(
            "A transaction would be committed after the response, so that a failing COMMIT could "
            "no longer be reported. Use the alias `InTransaction`, or "
            '`Depends(…, scope="function")` for a `yield` dependency that holds a transaction. A '
            "stream enters its own in the generator that it sends."
        )
    await _release(request)


def _left_open(request: RequestScope, held: Lease) -> bool:
    """Whether a transaction on what the request holds is open, other than a running task's or a
    sync generator's, which may be an event stream: that begins before its response does.
    """
    outermost = next(iter(held.state["transactions"]), None)
    if outermost is None or getattr(outermost, "streams", False):
        return False
    # The turn is held: by a block of a task that answers, or by a task that is busy, such as the
    # producer of an event stream, which begins before its response does.
    return not held.turn.held or any(
        block.root is held and not block.streams and _answers(task)
        for block, task in request.blocks.items()
    )


def _answers(task: asyncio.Task[Any]) -> bool:
    """Whether a task that has an open block sends the response that is about to start: this one,
    or one under a `BaseHTTPMiddleware`, which has the application run in a task of its own.
    """
    if task is asyncio.current_task():
        return True
    step: Any = task.get_coro()
    while step is not None:
        frame = getattr(step, "cr_frame", None)
        if frame is not None and frame.f_globals.get("__name__") == _INNERMOST:
            return True
        step = getattr(step, "cr_await", None)
    return False


async def _release(request: RequestScope, *, over: bool = False) -> None:
    """Give back what the request holds; blocks of its threads keep theirs until it is over.

    All of it is begun before any of it is awaited, in tasks of their own: if the request was
    cancelled, the first `await` here raises.
    """
    # A block left open by the request's own task, or by one that has ended, is in a generator that
    # nobody reads any more.
    current = asyncio.current_task()
    abandoned = [
        detached(block.abandon())
        for block, task in reversed(list(request.blocks.items()))
        if over and (task is current or task.done())
    ]
    try:
        if abandoned:
            await asyncio.wait(abandoned)
    finally:
        leaving = []
        for state, held in list(request.leases.items()):
            with request.sharing:
                if not over and isinstance(held, Lease) and held.contexts:
                    continue
                db = request.owners.get(state)
                if over and isinstance(held, Lease) and held.state["transactions"]:
                    request.undone += (state,)
                if db is None or not request.drop(db, held):
                    continue  # a thread of this request has given it back meanwhile
            if not isinstance(held, Lease):
                leaving.append(detached(run_in_threadpool(_close, db, held)))
                continue
            in_use = held.turn.held
            task = detached(_leave(db, held))
            # A task of this request may still use it. The response doesn't wait for that, since the
            # task may wait for the response, as the producer of an event stream does.
            if not in_use:
                leaving.append(task)
    if leaving:
        await asyncio.wait(leaving)
    for task in abandoned + leaving:
        task.result()


async def _leave(db: Database, lease: Lease) -> None:
    await leave(db, lease, lambda _: None)
    await run_follow_ups(lease)


def _connect(request: RequestScope, db: Any, state: dict[str, Any]) -> None:
    db._state._state.set(state)
    db.connect()
    with request.sharing:
        held = request.leases.get(db._state) is state
    if not held:  # the request was cancelled, and ended before there was anything to close
        _close(db, state)


def _close(db: Any, state: dict[str, Any]) -> None:
    db._state._state.set(state)
    close = db.close
    while db.transaction_depth():
        try:
            db.pop_transaction().rollback(False)
        except Exception:  # a thread of a request that was cancelled is still using the connection
            close = getattr(db, "manual_close", close)  # not for others: that of `playhouse.pool`
    if not db.is_closed():
        close()


def _scope() -> RequestScope:
    request = RequestScope.current.get()
    if request is None:
        raise RuntimeError(
            "Database dependencies need `Peewee(db).init_app(app)` on the application."
        )
    return request


def _only_database() -> Any:
    databases = _scope().databases
    if len(databases) > 1:
        raise RuntimeError(
            "This application has several databases. Say which one: with "
            "`peewee = Peewee(db)`, `Depends(peewee.get_db)`."
        )
    return databases[0]


async def _hold(request: RequestScope, db: Any) -> Any:
    if not isinstance(db, Database):
        if db._state not in request.leases:
            await run_in_threadpool(_connect, request, db, request.hold(db, closed_state()))
    elif db._state.lease() is None:  # there may be one already: a transaction dependency's, say
        lease = await db.pool.acquire()
        with request.sharing:
            held = request.hold(db, lease)
        if held is lease:
            lease.turn.release()
        else:  # another task of this request was faster
            db.pool.give_back(lease)
    return db


async def get_db() -> Any:
    """A dependency: hold one connection for this request, until its response starts.

    ::

        @app.get("/report", dependencies=[Depends(get_db)])

    Everything in the request then uses that connection, one at a time: sync dependencies, the
    endpoint, `db.run`, `db.atomic()`. Streams and background tasks, which come after the response
    has started, take their own. In a websocket it is held until the socket is closed.

    Returns the database.
    """
    return await _hold(_scope(), _only_database())


async def reset_db_state() -> None:
    """A dependency: forget the connection state that this request has inherited.

    For applications in the style of FastAPI's former how-to, over a database of Peewee's own:
    `def get_db(_=Depends(reset_db_state))` that connects, yields and closes. `get_db` above does
    all of it.
    """
    db = _only_database()
    if not isinstance(db, Database):
        db._state._state.set(closed_state())


async def transaction(connection: HTTPConnection) -> AsyncIterator[Database]:
    """A dependency: run the whole request in a transaction, committed *before* the response.

    ::

        @app.post("/orders")
        async def create(order: OrderIn, db: InTransaction): ...

    An exception, also an `HTTPException` or a response that fails its validation, rolls back; a
    returned response commits, whatever its status. It must have `scope="function"`, as
    the alias `InTransaction` has: FastAPI ends other `yield` dependencies after the response.

    Raises:
        RuntimeError: the endpoint is a generator, whose body would run after the commit; or it is
            decorated with `@db.retry`, which makes the transaction itself.
    """
    if is_generator(connection.scope.get("endpoint")):
        raise RuntimeError(
            "A transaction dependency ends before the body of a generator endpoint begins. Enter "
            "`async with db.atomic():` inside the generator."
        )
    if is_retried(connection.scope.get("endpoint")):
        raise RuntimeError(
            "A transaction dependency keeps `@db.retry` from retrying the endpoint, which would be "
            "a part of its transaction only. Remove the dependency: the decorator makes the "
            "transaction, and commits it before the response."
        )
    request, db = _scope(), _only_database()
    request.transactions += 1
    try:
        async with db.atomic():
            yield db
    finally:
        request.transactions -= 1


#: A parameter's type: the database, with one connection held for the request.
ConnectedDb: TypeAlias = Annotated[Database, Depends(get_db)]

#: A parameter's type: the database, in a transaction that is committed before the response.
InTransaction: TypeAlias = Annotated[Database, Depends(transaction, scope="function")]
