"""`PeeweeRoute`: a `def` endpoint as one call in one worker thread, a returned query as response.

FastAPI alone takes a `def` endpoint through two thread hops and more (the endpoint, the validation
of what it returns, each sync dependency), none of which could share a connection. The names that
FastAPI keeps private are imported here and nowhere else.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn, TypeVar

import peewee
from fastapi import Request, Response
from fastapi.datastructures import DefaultPlaceholder
from fastapi.dependencies.models import (
    _is_async_gen_callable,
    _is_coroutine_callable,
    _is_gen_callable,
)
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import ResponseValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import (
    APIRoute,
    _effective_route_context_var,
    _endpoint_context_cache,
    _extract_endpoint_context,
)
from pydantic import ValidationError
from starlette.background import BackgroundTask, BackgroundTasks

from .database import Database
from .handlers import CONFLICT, NOT_FOUND
from .loading import database_of, is_query, plans_of_route
from .plans import Texts
from .responses import QueryResponse
from .retries import retrying
from .state import RequestScope, lazy_loads_forbidden

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


class PeeweeRoute(APIRoute):
    """A route whose `def` endpoint runs with a database connection of its own.

    ::

        router = APIRouter(route_class=PeeweeRoute)

    `Peewee(db).init_app(app)` makes it the class of the application's own routes. The endpoint and
    the validation of what it returns (which may load relations) run in one worker thread under one
    lease; the response is serialised there too, after the lease has been given back. Sync
    background tasks get a lease of their own. Generators are FastAPI's, and so is an endpoint
    marked with `@without_lease`.

    An endpoint, `def` or `async def`, may return a query that wasn't executed: the response model
    decides what is read. A model that isn't a list takes the first row; if there is none, or if the
    endpoint returns `None`, the response is `null` where the model is optional, otherwise 404.
    Returned model instances get the relations that the response model has.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        responses = dict(kwargs.pop("responses", None) or {})
        if "{" in path:
            responses = {**NOT_FOUND, **responses}
        if set(kwargs.get("methods") or ()) & {"POST", "PUT", "PATCH", "DELETE"}:
            responses = {**CONFLICT, **responses}
        super().__init__(path, endpoint, responses=responses, **kwargs)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        theirs = cls.get_route_handler
        ours = [base for base in cls.__mro__[1:] if issubclass(base, PeeweeRoute)]
        if any(theirs is base.__dict__.get("get_route_handler") for base in ours):
            return

        @functools.wraps(theirs)
        def get_route_handler(self: Any) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = theirs(self)

            async def handle(request: Request) -> Response:
                # A subclass may have set background tasks on what our handler returned.
                return _leased(await handler(request))

            return handle

        cls.get_route_handler = get_route_handler  # type: ignore[method-assign]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        # An included router's route is built once more for each inclusion, from this context.
        route: Any = _effective_route_context_var.get()
        if route is None or route.original_route is not self:
            route = self
        endpoint = route.dependant.call
        if is_generator(endpoint) or not getattr(endpoint, "_fastapi_peewee_lease", True):
            return _with_leased_background(super().get_route_handler())
        dependant, field = route.dependant, route.response_field
        route.dependant = copy.copy(dependant)
        route.dependant.call = _answering(route, endpoint, field)
        route.response_field = _OUTCOME
        try:
            handler = super().get_route_handler()
        finally:
            route.dependant, route.response_field = dependant, field
        return _with_leased_background(handler)


def without_lease(endpoint: Endpoint) -> Endpoint:
    """Mark an endpoint that needs no database: it runs as on a plain route.

    It goes under the route's decorator::

        @app.get("/health")
        @without_lease
        def health(): ...
    """
    endpoint._fastapi_peewee_lease = False  # type: ignore[attr-defined]
    return endpoint


def is_generator(endpoint: Any) -> bool:
    """Whether FastAPI streams what this endpoint yields."""
    return _is_gen_callable(endpoint) or _is_async_gen_callable(endpoint)


class _Outcome:
    """What the thread made of a call: the response's body, or errors of validation."""

    __slots__ = ("content", "errors", "returned")

    def __init__(self, returned: Any, content: Any, errors: list[Any]) -> None:
        self.returned = returned
        self.content = content
        self.errors = errors


class _OutcomeField:
    """Stands where FastAPI expects a response field, and hands over what is ready."""

    def validate(self, value: Any, values: Any, *, loc: Any) -> tuple[Any, list[Any]]:
        return value, value.errors

    def serialize(self, value: Any, **options: Any) -> Any:
        return value.content

    serialize_json = serialize


_OUTCOME = _OutcomeField()


def _refuse(value: Any) -> NoReturn:
    name = type(value).__name__
    raise TypeError(
        f"A {name} was returned, but the route has no response model, which would say what of it "
        "to send. Add `response_model=…`, or return what the client should see: "
        "`instance.__data__` is a dictionary of all columns, `list(query)` has its rows."
    )


#: Where no response model says what to send. FastAPI would take a row apart, columns that are not
#: for clients included, and each query for an endless thing.
_REFUSED: dict[Any, Callable[[Any], Any]] = {peewee.Model: _refuse, peewee.BaseQuery: _refuse}


class _Answers:
    """What becomes of what one route's endpoint returns."""

    def __init__(self, route: Any, endpoint: Callable[..., Any], field: Any) -> None:
        self._field = field
        self.name = f"{getattr(endpoint, '__qualname__', repr(endpoint))} ({route.path})"
        self._as_bytes = isinstance(route.response_class, DefaultPlaceholder)
        self._options = {
            "include": route.response_model_include,
            "exclude": route.response_model_exclude,
            "by_alias": route.response_model_by_alias,
            "exclude_unset": route.response_model_exclude_unset,
            "exclude_defaults": route.response_model_exclude_defaults,
            "exclude_none": route.response_model_exclude_none,
        }
        self.plans = plans_of_route(
            route.response_model,
            response_class=None if self._as_bytes else route.response_class,
            **{f"response_model_{name}": value for name, value in self._options.items()},
        )

    def load(self, returned: Any) -> tuple[Any, Any, list[Any]]:
        """Read and validate, with a connection: what was returned, the response, the errors."""
        if isinstance(returned, QueryResponse):
            return returned, returned.load(), []
        if isinstance(returned, Response):
            return returned, None, []
        value = self.plans.load(returned)
        if isinstance(value, Texts):
            return returned, value, []
        with self._no_lazy_loads():
            return self._validated(returned, value)

    def ready(self, returned: Any) -> tuple[Any, Any, list[Any]]:
        """The same of what needs no database, on the event loop."""
        value = self.plans.ready(returned)
        # A query would be refused here, but Pydantic would hide why.
        with lazy_loads_forbidden(self.name):
            return self._validated(returned, value)

    def _validated(self, returned: Any, value: Any) -> tuple[Any, Any, list[Any]]:
        with self.plans.response.guard(value, read=is_query(returned)):
            if self._field is None:
                return returned, jsonable_encoder(value, custom_encoder=_REFUSED), []
            value, errors = self._field.validate(value, {}, loc=("response",))
            try:
                return returned, self.plans.response.read(value), errors
            except ValidationError as error:
                return returned, None, list(error.errors())

    def _no_lazy_loads(self) -> AbstractContextManager[None]:
        request = RequestScope.current.get()
        forbidden = request is not None and request.forbids_lazy_loads
        return lazy_loads_forbidden(self.name) if forbidden else nullcontext()

    def serialise(self, outcome: tuple[Any, Any, list[Any]]) -> Any:
        returned, value, errors = outcome
        if isinstance(returned, QueryResponse):
            returned.finish(value)
        if isinstance(returned, Response):
            return returned
        if errors:
            return _Outcome(returned, None, errors)
        if isinstance(value, Texts):
            value = value.body()
        elif self._field is not None:
            serialize = self._field.serialize_json if self._as_bytes else self._field.serialize
            value = serialize(value, **self._options)
        elif self._as_bytes:
            value = JSONResponse(value).body
        return _Outcome(returned, value, [])


def _answering(
    route: Any, endpoint: Callable[..., Any], field: Any
) -> Callable[..., Coroutine[Any, Any, Any]]:
    answers = _Answers(route, endpoint, field)
    again = retrying(endpoint)

    @functools.wraps(endpoint)
    async def in_one_hop(**values: Any) -> Any:
        def call(fn: Callable[..., Any], db: Any) -> Any:
            return db.call(lambda: answers.load(fn(**values)), answers.serialise)

        if again is None:
            return await call(endpoint, _database())
        return await again.on_loop(endpoint, lambda once: call(once, again.db))

    @functools.wraps(endpoint)
    async def on_the_loop(**values: Any) -> Any:
        returned = await endpoint(**values)
        if isinstance(returned, Response):
            return returned
        if answers.plans.needs_database(returned):
            if is_query(returned) and (texts := await answers.plans.aload(returned)) is not None:
                return answers.serialise((returned, texts, []))
            db = database_of(returned)
            db = db if isinstance(db, Database) else _database()
            return await db.call(partial(answers.load, returned), answers.serialise)
        return answers.serialise(answers.ready(returned))

    call = on_the_loop if _is_coroutine_callable(endpoint) else in_one_hop
    # FastAPI names the endpoint's file and line in its errors. What it remembers by `id()` has to
    # go with the function, or it would be said of the next one with that `id()`.
    _endpoint_context_cache[id(call)] = _extract_endpoint_context(endpoint)
    weakref.finalize(call, _endpoint_context_cache.pop, id(call), None)
    return call


def _database() -> Any:
    request = RequestScope.current.get()
    if request is None:
        raise RuntimeError(
            "PeeweeRoute needs `Peewee(db).init_app(app)` on the application that serves it."
        )
    db = request.databases[-1]
    if not hasattr(db, "call"):
        raise RuntimeError(
            f"PeeweeRoute takes connections from a pool; a {type(db).__name__} of Peewee's own "
            "has none. Make the database with `fastapi_peewee.connect(url)`, or use plain "
            "routes with `Depends(get_db)`."
        )
    return db


def _with_leased_background(
    handler: Callable[[Request], Coroutine[Any, Any, Response]],
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def handle(request: Request) -> Response:
        try:
            response = await handler(request)
        except ResponseValidationError as error:
            if isinstance(error.body, _Outcome):
                error.body = error.body.returned
            raise
        return _leased(response)

    return handle


def _leased(response: Response) -> Response:
    background = getattr(response, "background", None)
    if isinstance(background, BackgroundTasks):
        background.tasks = _LeasedTasks(background.tasks)
    elif background is not None:
        _lease(background)
    return response


class _LeasedTasks(list[BackgroundTask]):
    """What a running task adds to the list gets a lease, too."""

    def __init__(self, tasks: Iterable[BackgroundTask]) -> None:
        super().__init__(tasks)
        for task in self:
            _lease(task)

    def append(self, task: BackgroundTask) -> None:
        _lease(task)
        super().append(task)


def _lease(task: Any) -> None:
    # Whatever can be called serves as a background task, also a subclass that lacks its attributes.
    if not isinstance(task, BackgroundTask) or getattr(task, "is_async", True):
        return
    fn = task.func

    @functools.wraps(fn)
    async def leased(*args: Any, **kwargs: Any) -> None:
        await _database().run_with(fn, args, kwargs)

    task.func, task.is_async = leased, True
