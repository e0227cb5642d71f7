"""What FastAPI's routes can do, as one table: `test_routing` runs it on two classes of routes.

A case adds routes to the application that it is given, and names the requests to make.
"""

import asyncio
import contextvars
import dataclasses
import datetime
import decimal
import enum
import functools
import inspect
import json
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import anyio.from_thread
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    File,
    Form,
    Header,
    HTTPException,
    Query,
    Request,
    Response,
    Security,
    UploadFile,
)
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    StreamingResponse,
)
from fastapi.routing import APIRoute
from fastapi.security import OAuth2PasswordBearer, SecurityScopes
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field, RootModel, computed_field, field_validator
from starlette.background import BackgroundTask
from typing_extensions import TypedDict  # of Python 3.12, as Pydantic wants it

T = TypeVar("T")


class Site:
    """An application whose routes, and those of its routers and parts, are of one class.

    Attributes:
        rows: of a query, and whether `one` row is meant: what an endpoint returns of it.
    """

    def __init__(
        self, route_class: type[APIRoute], app: FastAPI, rows: Callable[..., Any] = list
    ) -> None:
        self.route_class = route_class
        self.app = app
        self.rows = rows
        app.router.route_class = route_class
        self.log: list[Any] = []

    def router(self, **options: Any) -> APIRouter:
        return APIRouter(route_class=self.route_class, **options)

    def part(self, **options: Any) -> FastAPI:
        part = FastAPI(**options)
        part.router.route_class = self.route_class
        return part


class Ask(NamedTuple):
    method: str
    path: str
    options: dict[str, Any]


class Case(NamedTuple):
    build: Callable[[Site], None]
    asks: list[Ask]
    needs: str | None
    app_options: dict[str, Any]


CASES: dict[str, Case] = {}


def ask(line: str, **options: Any) -> Ask:
    method, path = line.split(" ")
    return Ask(method, path, options)


def case(
    *asks: str | Ask,
    needs: str | None = None,
    cases: dict[str, Case] = CASES,
    **app_options: Any,
) -> Callable[[Callable[[Site], None]], Callable[[Site], None]]:
    def add(build: Callable[[Site], None]) -> Callable[[Site], None]:
        assert build.__name__ not in cases
        requests = [ask(each) if isinstance(each, str) else each for each in asks]
        cases[build.__name__] = Case(build, requests, needs, app_options)
        return build

    return add


def all_async(route_class: type[APIRoute]) -> type[APIRoute]:
    """The same routes, but every `def` endpoint has become an `async def` one."""

    def init(self: APIRoute, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        route_class.__init__(self, path, as_async(endpoint), **options)

    return type(route_class.__name__, (route_class,), {"__init__": init})


def as_async(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    inner = inspect.unwrap(endpoint)
    if (
        not inspect.isfunction(endpoint)
        or inspect.iscoroutinefunction(inner)
        or inspect.isgeneratorfunction(inner)
        or inspect.isasyncgenfunction(inner)
    ):
        return endpoint

    @functools.wraps(endpoint)
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        return endpoint(*args, **kwargs)

    return coroutine


class Part(BaseModel):
    name: str = "part"
    size: int | None = None


class Thing(BaseModel):
    id: int = Field(alias="thingId", default=1)
    title: str = "a"
    note: str | None = None
    part: Part = Part()
    parts: list[Part] = []

    model_config = ConfigDict(populate_by_name=True)


THING = {"thingId": 7, "title": "a", "part": {"name": "x"}, "parts": [{"size": 1}, {}]}


# What the response model keeps.


@case("GET /def", "GET /async")
def response_model_include_and_exclude(site: Site) -> None:
    options: Any = {
        "response_model": Thing,
        "response_model_include": {"id": True, "part": {"name"}, "parts": {"__all__": {"size"}}},
        "response_model_exclude": {"title"},
    }

    @site.app.get("/def", **options)
    def plain() -> Any:
        return THING

    @site.app.get("/async", **options)
    async def coroutine() -> Any:
        return THING


@case("GET /include", "GET /exclude")
def response_model_include_or_exclude(site: Site) -> None:
    @site.app.get("/include", response_model=Thing, response_model_include={"title", "note"})
    def included() -> Any:
        return THING

    @site.app.get("/exclude", response_model=Thing, response_model_exclude={"title", "parts"})
    def excluded() -> Any:
        return Thing.model_validate(THING)


@case("GET /alias", "GET /name")
def response_model_by_alias(site: Site) -> None:
    @site.app.get("/alias", response_model_by_alias=True)
    def alias() -> Thing:
        return Thing(id=3)

    @site.app.get("/name", response_model_by_alias=False)
    def name() -> Thing:
        return Thing(id=3)


@case("GET /unset", "GET /defaults", "GET /none")
def response_model_exclude_unset_defaults_none(site: Site) -> None:
    @site.app.get("/unset", response_model=Thing, response_model_exclude_unset=True)
    def unset() -> Any:
        return {"thingId": 1, "note": None}

    @site.app.get("/defaults", response_model=Thing, response_model_exclude_defaults=True)
    def defaults() -> Any:
        return {"thingId": 1, "title": "b"}

    @site.app.get("/none", response_model=Thing, response_model_exclude_none=True)
    def none() -> Any:
        return THING


@case("GET /a", "GET /b", "GET /c", "GET /d", "GET /e", "GET /f")
def kinds_of_response_model(site: Site) -> None:
    class Box(BaseModel, Generic[T]):
        content: T

    class Names(RootModel[list[str]]):
        pass

    class Row(TypedDict):
        id: int

    class Counted(BaseModel):
        items: list[int]

        @computed_field
        def count(self) -> int:
            return len(self.items)

    @dataclasses.dataclass
    class Point:
        x: int
        y: float = 0.5

    app = site.app
    app.get("/a", response_model=list[Thing])(lambda: [THING, Thing(id=2)])
    app.get("/b", response_model=Box[Part])(lambda: {"content": {"size": 2}})
    app.get("/c", response_model=Names)(lambda: ["a", "b"])
    app.get("/d", response_model=list[Row])(lambda: [{"id": "1", "more": 2}])
    app.get("/e", response_model=Counted | Point)(lambda: {"items": [1, 2]})
    app.get("/f", response_model=dict[str, Point])(lambda: {"p": Point(1)})


@case("GET /annotated", "GET /no-model", "GET /no-annotation", "GET /attributes")
def return_annotations(site: Site) -> None:
    class Read(BaseModel):
        model_config = ConfigDict(from_attributes=True)

        title: str

    class Stored:
        title = "stored"
        secret = "s"

    @site.app.get("/annotated")
    def annotated() -> list[Thing]:
        return [Thing(id=1)]

    @site.app.get("/no-model", response_model=None)
    def no_model() -> Thing:
        return Thing(id=1)

    @site.app.get("/no-annotation")
    def no_annotation():  # type: ignore[no-untyped-def]
        return Thing(id=1, note="n")

    @site.app.get("/attributes", response_model=Read)
    def attributes() -> Any:
        return Stored()


@case("GET /things", "GET /none", "GET /text", "GET /number", "GET /nan", "GET /generator")
def no_response_model(site: Site) -> None:
    class Colour(enum.Enum):
        red = "r"

    @site.app.get("/things", response_model=None)
    def things() -> Any:
        when = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
        return {
            "when": when,
            "price": decimal.Decimal("1.50"),
            "colour": Colour.red,
            "bytes": b"b",
            "path": Path("a/b"),
            "models": (Part(), Part(size=1)),
            "letters": {"ä"},
            "for": datetime.timedelta(seconds=90),
        }

    site.app.get("/none", response_model=None)(lambda: None)
    site.app.get("/text", response_model=None)(lambda: 'a "text" ü')
    site.app.get("/number", response_model=None)(lambda: 1.0)
    site.app.get("/nan", response_model=None)(lambda: float("nan"))
    site.app.get("/generator", response_model=None)(lambda: (n for n in range(3)))


# Status, headers, cookies.


@case("GET /201", "GET /204", "GET /304", "GET /418")
def status_codes(site: Site) -> None:
    @site.app.get("/201", status_code=201)
    def created() -> Thing:
        return Thing(id=1)

    @site.app.get("/204", status_code=204)
    def empty() -> None:
        return None

    @site.app.get("/304", status_code=304, response_model=None)
    def unchanged() -> Any:
        return {"never": "sent"}

    @site.app.get("/418", status_code=418)
    async def teapot() -> Thing:
        return Thing(id=1)


@case("GET /", "GET /204")
def status_headers_and_cookies_set_on_the_response_parameter(site: Site) -> None:
    @site.app.get("/", status_code=201)
    def cookies(response: Response) -> Part:
        response.status_code = 202
        response.headers["X-One"] = "1"
        response.headers.append("X-Two", "2")
        response.headers.append("X-Two", "3")
        response.set_cookie("a", "1", httponly=True)
        response.set_cookie("b", "2", max_age=60)
        response.set_cookie("c", max_age=0, expires="Thu, 01 Jan 1970 00:00:00 GMT")
        return Part()

    @site.app.get("/204", response_model=None)
    def none(response: Response) -> None:
        response.status_code = 204
        response.headers["X-One"] = "1"


@case("GET /")
def headers_set_in_dependencies(site: Site) -> None:
    def sync(response: Response) -> None:
        response.headers["X-Sync"] = "1"
        response.status_code = 203

    async def coroutine(response: Response) -> None:
        response.headers["X-Async"] = "2"

    @site.app.get("/", dependencies=[Depends(sync), Depends(coroutine)])
    def endpoint(response: Response) -> Part:
        response.headers["X-Sync"] += "3"
        return Part()


@case("GET /json", "GET /bytes", "GET /annotated", "GET /either?json=1", "GET /either", "GET /sub")
def returned_responses(site: Site) -> None:
    class Teapot(Response):
        media_type = "text/tea"

    @site.app.get("/json", status_code=201, response_model=Thing)
    def as_json(response: Response) -> Any:
        response.headers["X-Lost"] = "1"
        return JSONResponse({"not": "validated"}, headers={"X-Own": "1"})

    @site.app.get("/bytes", response_model=None)
    def as_bytes() -> Response:
        return Response(b"\x00\xff", 203, media_type="application/octet-stream")

    @site.app.get("/annotated")
    def annotated() -> Response:
        return Response("text", media_type="text/plain")

    @site.app.get("/either", response_model=None)
    def either(json: bool = False) -> Response | dict[str, int]:
        return {"a": 1} if json else RedirectResponse("/json")

    @site.app.get("/sub", response_model=Part)
    def sub() -> Any:
        return Teapot("tea", 418)


# Response classes.


class SpacedJSON(JSONResponse):
    media_type = "application/spaced+json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, indent=1, sort_keys=True).encode()


@case("GET /html", "GET /text", "GET /nothing", "GET /redirect", "GET /redirect-301")
def plain_response_classes(site: Site) -> None:
    app = site.app
    app.get("/html", response_class=HTMLResponse)(lambda: "<p>ü</p>")
    app.get("/text", response_class=PlainTextResponse, response_model=None)(lambda: "text")
    app.get("/nothing", response_class=PlainTextResponse)(lambda: None)
    app.get("/redirect", response_class=RedirectResponse)(lambda: "/html?a=b c")
    app.get("/redirect-301", response_class=RedirectResponse, status_code=301)(lambda: "/html")


@case("GET /model", "GET /no-model", "GET /filtered", "GET /explicit")
def json_response_classes(site: Site) -> None:
    @site.app.get("/model", response_class=SpacedJSON)
    def model() -> Thing:
        return Thing(id=1, parts=[Part()])

    @site.app.get("/no-model", response_class=SpacedJSON, response_model=None)
    def no_model() -> Any:
        return {"b": 1, "a": decimal.Decimal(1)}

    @site.app.get(
        "/filtered",
        response_class=SpacedJSON,
        response_model_by_alias=False,
        response_model_exclude_unset=True,
    )
    def filtered() -> list[Thing]:
        return [Thing(id=1)]

    @site.app.get("/explicit", response_class=JSONResponse)
    def explicit() -> Thing:
        return Thing(id=1, title="ü </script>")


@case("GET /path", "GET /returned", ask("GET /returned", headers={"Range": "bytes=2-5"}))
def file_responses(site: Site) -> None:
    @site.app.get("/path", response_class=FileResponse)
    def path() -> str:
        return __file__

    @site.app.get("/returned")
    def returned() -> FileResponse:
        return FileResponse(__file__, filename="cases.py", headers={"X-Own": "1"})


@case("GET /sync", "GET /async", "GET /def-generator", "GET /async-generator", "GET /bytes")
def streaming_responses(site: Site) -> None:
    def letters() -> Iterator[str]:
        yield from "abc"

    async def aletters() -> AsyncIterator[str]:
        for letter in "abc":
            yield letter

    @site.app.get("/sync")
    def sync() -> StreamingResponse:
        return StreamingResponse(letters(), 201, media_type="text/plain")

    @site.app.get("/async")
    def asynchronous() -> StreamingResponse:
        return StreamingResponse(aletters())

    @site.app.get("/def-generator", response_class=StreamingResponse, status_code=203)
    def generator(response: Response) -> Iterator[str]:
        response.headers["X-One"] = "1"
        yield from "abc"

    @site.app.get("/async-generator", response_class=StreamingResponse)
    async def agenerator() -> AsyncIterator[str]:
        yield "a"
        await asyncio.sleep(0)
        yield "b"

    @site.app.get("/bytes", response_class=StreamingResponse)
    def chunks() -> Any:
        return [b"a", b"b"]


@case("GET /own", "GET /default", "GET /router", default_response_class=SpacedJSON)
def default_response_classes(site: Site) -> None:
    router = site.router(default_response_class=PlainTextResponse)

    @router.get("/router")
    def in_router() -> str:
        return "text"

    @site.app.get("/own", response_class=JSONResponse)
    def own() -> Part:
        return Part()

    @site.app.get("/default")
    def default() -> Part:
        return Part()

    site.app.include_router(router)


# Dependencies.


@case("GET /")
def dependency_overrides(site: Site) -> None:
    def real() -> str:
        raise AssertionError("overridden")

    @site.app.get("/")
    def endpoint(value: Annotated[str, Depends(real)]) -> str:
        return value

    site.app.dependency_overrides[real] = lambda: "fake"


@case("GET /ok", "GET /raise", "GET /http", "GET /converted")
def dependencies_with_yield(site: Site) -> None:
    def sync() -> Iterator[str]:
        site.log.append("sync in")
        try:
            yield "s"
        except ZeroDivisionError as error:
            site.log.append("sync saw")
            raise HTTPException(409, "converted") from error
        finally:
            site.log.append("sync out")

    async def asynchronous(outer: Annotated[str, Depends(sync)]) -> AsyncIterator[str]:
        site.log.append("async in")
        try:
            yield outer + "a"
        except Exception as error:
            site.log.append(type(error).__name__)
            raise
        finally:
            site.log.append("async out")

    Both = Annotated[str, Depends(asynchronous)]

    @site.app.get("/ok")
    def ok(both: Both) -> str:
        site.log.append("endpoint")
        return both

    @site.app.get("/raise")
    def failing(both: Both) -> str:
        raise KeyError(both)

    @site.app.get("/http")
    def http(both: Both) -> str:
        raise HTTPException(400, both)

    @site.app.get("/converted")
    def converted(both: Both) -> str:
        raise ZeroDivisionError


@case("GET /ok", "GET /raise", "GET /invalid")
def dependencies_in_function_scope(site: Site) -> None:
    def sync() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            site.log.append(type(error).__name__)
            raise
        finally:
            site.log.append("sync out")

    async def asynchronous() -> AsyncIterator[None]:
        yield
        site.log.append("async out")

    both = [Depends(sync, scope="function"), Depends(asynchronous, scope="function")]

    @site.app.get("/ok", dependencies=both)
    def ok(tasks: BackgroundTasks) -> str:
        tasks.add_task(site.log.append, "background")
        return "ok"

    @site.app.get("/raise", dependencies=both)
    def failing() -> str:
        raise ValueError("failed")

    @site.app.get("/invalid", dependencies=both, response_model=int)
    def invalid() -> Any:
        return "no number"


@case("GET /")
def context_variables(site: Site) -> None:
    variable = contextvars.ContextVar("variable", default="unset")

    async def asynchronous() -> None:
        variable.set("set in async dependency")

    @site.app.get("/", dependencies=[Depends(asynchronous)])
    def endpoint(tasks: BackgroundTasks) -> str:
        seen = variable.get()
        variable.set("set in endpoint")
        tasks.add_task(lambda: site.log.append(variable.get()))
        return seen


@case("GET /", "GET /a", ask("GET /a", headers={"Authorization": "Bearer t"}))
def security_scopes(site: Site) -> None:
    scheme = OAuth2PasswordBearer(tokenUrl="token", scopes={"a": "A", "b": "B"})

    def user(scopes: SecurityScopes, token: Annotated[str, Depends(scheme)]) -> str:
        return f"{token} {scopes.scope_str}"

    def admin(name: Annotated[str, Security(user, scopes=["b"])]) -> str:
        return name + "!"

    @site.app.get("/", dependencies=[Security(user, scopes=["a"])])
    def listed() -> None: ...

    @site.app.get("/a")
    def one(name: Annotated[str, Security(admin, scopes=["a"])]) -> str:
        return name


@case(
    "GET /?limit=3&tag=a&tag=b",
    "GET /?limit=x",
    ask("GET /", headers={"X-Key": "k", "Cookie": "session=s"}),
    ask("GET /models?limit=1&more=2", headers={"X-Key": "k"}),
)
def parameters(site: Site) -> None:
    class Filter(BaseModel):
        model_config = ConfigDict(extra="forbid")

        limit: int = 5

    class Headers(BaseModel):
        x_key: str

    @site.app.get("/")
    def endpoint(
        request: Request,
        limit: Annotated[int, Query(ge=1)] = 10,
        tag: Annotated[list[str] | None, Query()] = None,
        x_key: Annotated[str | None, Header()] = None,
        session: Annotated[str | None, Cookie()] = None,
    ) -> dict[str, Any]:
        return {"all": [limit, tag, x_key, session], "url": str(request.url)}

    @site.app.get("/models")
    def models(
        query: Annotated[Filter, Query()], headers: Annotated[Headers, Header()]
    ) -> dict[str, Any]:
        return {"limit": query.limit, "key": headers.x_key}


# Routers.


@case("GET /a/x/1?q=a", "GET /b/1?q=b", "GET /b/x/1?q=b", "POST /a/x/1?q=a", "GET /a/x/no?q=a")
def nested_and_repeated_routers(site: Site) -> None:
    def tagged(q: str) -> None:
        site.log.append(q)

    inner = site.router(prefix="/x", tags=["inner"], dependencies=[Depends(tagged)])
    outer = site.router(tags=["outer"])

    @inner.get("/{number}", responses={418: {"description": "tea"}})
    def read(number: int) -> Thing:
        return Thing(id=number)

    @outer.get("/{number}")
    def flat(number: int, request: Request) -> str:
        return str(request.url_for("read", number=3))

    outer.include_router(inner)
    site.app.include_router(outer, prefix="/a", responses={410: {"description": "gone"}})
    site.app.include_router(
        outer, prefix="/b", deprecated=True, default_response_class=SpacedJSON, tags=["b"]
    )


@case("GET /one", "GET /two")
def a_router_included_with_dependencies_of_each_place(site: Site) -> None:
    router = site.router()

    @router.get("", response_model_exclude_none=True)
    def endpoint(response: Response) -> Part:
        return Part()

    def marked(name: str) -> Any:
        def mark(response: Response) -> None:
            response.headers["X-Mark"] = name

        return Depends(mark)

    site.app.include_router(router, prefix="/one", dependencies=[marked("one")])
    site.app.include_router(router, prefix="/two", dependencies=[marked("two")])


@case("GET /part/1", "GET /part/none", "GET /part/error", "GET /part/openapi.json")
def sub_applications(site: Site) -> None:
    part = site.part(title="Part", default_response_class=SpacedJSON)

    @part.get("/error")
    def error() -> int:
        raise KeyError("part")

    @part.get("/{number}", response_model=int, openapi_extra={"x-own": 1})
    def read(number: int, request: Request) -> Any:
        return f"{number}"

    @part.exception_handler(KeyError)
    async def handle(request: Request, error: KeyError) -> Response:
        return PlainTextResponse(str(error), 410)

    site.app.mount("/part", part)


@case("HEAD /many", "GET /many", "PUT /many", "DELETE /many", "GET /several", "GET /many/")
def methods(site: Site) -> None:
    def many(request: Request) -> str:
        return request.method

    for method in ("GET", "HEAD", "PUT"):
        site.app.add_api_route("/many", many, methods=[method], name=f"many {method}")
    # FastAPI would give the two methods one operation id, and warn.
    site.app.api_route("/several", methods=["GET", "HEAD"], include_in_schema=False)(many)


# Background tasks.


@case("GET /one", "GET /several", "GET /kwargs", "GET /dependency", "GET /generator")
def background_tasks(site: Site) -> None:
    def sync(*args: Any, **kwargs: Any) -> None:
        site.log.append(("sync", args, kwargs))

    async def asynchronous(*args: Any) -> None:
        await asyncio.sleep(0)
        site.log.append(("async", args))

    class Callable_:  # noqa: N801
        async def __call__(self, number: int) -> None:
            site.log.append(("object", number))

    def adding(tasks: BackgroundTasks) -> None:
        tasks.add_task(sync, "dependency")

    @site.app.get("/one", status_code=202)
    def one(tasks: BackgroundTasks) -> Part:
        tasks.add_task(sync, 1)
        return Part()

    @site.app.get("/several")
    def several(tasks: BackgroundTasks) -> Part:
        for number in range(3):
            tasks.add_task(sync, number)
            tasks.add_task(asynchronous, number)
        tasks.add_task(Callable_(), 7)
        tasks.add_task(functools.partial(asynchronous, "partial"), 8)
        return Part()

    @site.app.get("/kwargs")
    async def kwargs(tasks: BackgroundTasks) -> Part:
        tasks.add_task(sync, name="n", values=2)
        return Part()

    @site.app.get("/dependency", dependencies=[Depends(adding)])
    def dependency(tasks: BackgroundTasks) -> Part:
        tasks.add_task(asynchronous)
        return Part()

    @site.app.get("/generator")
    def generator(tasks: BackgroundTasks) -> Iterable[int]:
        tasks.add_task(sync, "after")
        yield 1


@case("GET /task", "GET /tasks", "GET /both", "GET /fails")
def background_tasks_of_a_returned_response(site: Site) -> None:
    def sync(number: int) -> None:
        site.log.append(number)

    async def asynchronous(number: int) -> None:
        site.log.append(-number)

    def failing() -> None:
        raise KeyError("background")

    @site.app.get("/task")
    def task() -> Response:
        return Response("x", background=BackgroundTask(sync, 1))

    @site.app.get("/tasks")
    async def tasks() -> Response:
        both = BackgroundTasks()
        both.add_task(sync, 2)
        both.add_task(asynchronous, 2)
        return Response("x", background=both)

    @site.app.get("/both")
    def both(tasks: BackgroundTasks) -> Response:
        tasks.add_task(sync, 3)
        return Response("x")

    @site.app.get("/fails")
    def fails(tasks: BackgroundTasks) -> str:
        tasks.add_task(failing)
        tasks.add_task(sync, 4)
        return "sent before"


@case("GET /function", "GET /object", "GET /subclass")
def background_work_that_is_no_background_task(site: Site) -> None:
    class Work:
        async def __call__(self) -> None:
            site.log.append("object")

    class Subclass(BackgroundTask):
        def __init__(self) -> None:
            pass

        async def __call__(self) -> None:
            site.log.append("subclass")

    async def function() -> None:
        site.log.append("function")

    def responding(background: Any) -> Callable[[], Response]:
        return lambda: Response("x", background=background)

    site.app.get("/function")(responding(function))
    site.app.get("/object")(responding(Work()))
    site.app.get("/subclass")(responding(Subclass()))


# Streams.


@case("GET /def", "GET /async", "GET /events")
def server_sent_events(site: Site) -> None:
    @site.app.get("/def", response_class=EventSourceResponse)
    def sync() -> Iterable[Part]:
        yield Part(size=1)
        yield Part(size=2)

    @site.app.get("/async", response_class=EventSourceResponse, status_code=201)
    async def asynchronous(response: Response) -> AsyncIterable[Part]:
        response.headers["X-One"] = "1"
        yield Part()

    @site.app.get("/events", response_class=EventSourceResponse)
    def events() -> Iterator[ServerSentEvent]:
        yield ServerSentEvent(data={"a": 1}, event="e", id="1", retry=5)
        yield ServerSentEvent(raw_data="raw", comment="c")


@case("GET /def", "GET /async", "GET /invalid")
def json_lines(site: Site) -> None:
    @site.app.get("/def", response_model_exclude_none=True)
    def sync() -> Iterable[Part]:
        yield Part(size=1)
        yield Part()

    @site.app.get("/async")
    async def asynchronous() -> AsyncIterable[Part]:
        yield Part(size=1)

    @site.app.get("/invalid")
    def invalid() -> Iterable[Part]:
        yield {"size": "no number"}  # type: ignore[misc]


# Bodies.


@case(
    ask("POST /form", data={"name": "n", "size": "1"}),
    ask("POST /form", data={"size": "x"}),
    ask("POST /files", files={"one": ("a.txt", b"aaa", "text/plain")}, data={"note": "n"}),
    ask("POST /files", files={"many": ("b.txt", b"bbb")}),
    ask("POST /model", data={"name": "n"}),
    needs="python_multipart",
)
def forms_and_files(site: Site) -> None:
    @site.app.post("/form")
    def form(name: Annotated[str, Form()], size: Annotated[int, Form()] = 0) -> Part:
        return Part(name=name, size=size)

    @site.app.post("/files", status_code=201)
    def files(
        one: UploadFile, note: Annotated[str, Form()], raw: Annotated[bytes | None, File()] = None
    ) -> dict[str, Any]:
        return {"name": one.filename, "read": one.file.read().decode(), "note": note, "raw": raw}

    @site.app.post("/model")
    def model(part: Annotated[Part, Form()]) -> Part:
        return part


@case(
    ask("POST /one", json={"name": "n"}),
    ask("POST /one", json={"size": "x"}),
    ask("POST /one", content=b"{", headers={"Content-Type": "application/json"}),
    ask("POST /one", content=b"{}"),
    ask("POST /one", content=b'{"size": 2}', headers={"Content-Type": "application/x+json"}),
    ask("PUT /several", json={"part": {}, "thing": {"thingId": 1}, "number": 5}),
    ask("PUT /several", json={"part": {}}),
    ask("PATCH /embedded", json={"part": {"size": 3}}),
    ask("PUT /union", json=[1, "b"]),
)
def json_bodies(site: Site) -> None:
    @site.app.post("/one", status_code=201)
    def one(part: Part) -> Part:
        return part

    @site.app.put("/several")
    def several(part: Part, thing: Thing, number: Annotated[int, Body()]) -> dict[str, Any]:
        return {"part": part, "thing": thing, "number": number}

    @site.app.patch("/embedded")
    async def embedded(part: Annotated[Part, Body(embed=True)]) -> Part:
        return part

    @site.app.put("/union")
    def union(items: list[int | Literal["b"]]) -> list[int | str]:
        return [*items]


@case(
    ask("POST /small", json={"name": "n" * 40}),
    ask("POST /small", json={"name": "n" * 400}),
    ask("POST /large", json={"name": "n" * 400}),
    ask("POST /small", data={"name": "n" * 400}),
    max_body_size=100,
)
def limited_bodies(site: Site) -> None:
    def echo(part: Part) -> int:
        return len(part.name)

    site.app.post("/small")(echo)
    site.app.post("/large", max_body_size=1000)(echo)


# Kinds of endpoints.


@case("GET /async", "GET /instance", "GET /async-instance", "GET /method", "GET /class")
def kinds_of_callables(site: Site) -> None:
    class Endpoint:
        def __call__(self, q: int = 1) -> int:
            return q

        def method(self, q: int = 2) -> Part:
            return Part(size=q)

    class AsyncEndpoint:
        async def __call__(self, q: int = 3) -> int:
            return q

    @site.app.get("/async")
    async def coroutine() -> Part:
        return Part()

    site.app.get("/method")(Endpoint().method)
    site.app.get("/class", response_model=Part)(Part)
    for path, endpoint in (("/instance", Endpoint()), ("/async-instance", AsyncEndpoint())):
        site.app.get(path, name=path, operation_id=path, summary=path)(endpoint)


@case("GET /def", "GET /async", "GET /def?b=5", "GET /twice")
def partial_endpoints(site: Site) -> None:
    def sync(a: int, b: int = 2) -> list[int]:
        return [a, b]

    async def coroutine(a: int, b: int = 2) -> list[int]:
        return [a, b]

    twice = functools.partial(functools.partial(sync, b=3), a=1)
    for path, endpoint in (
        ("/def", functools.partial(sync, a=1)),
        ("/async", functools.partial(coroutine, a=1)),
        ("/twice", twice),
    ):
        site.app.get(path, name=path, operation_id=path)(endpoint)


@case("GET /def", "GET /async", "GET /def-around-async")
def decorated_endpoints(site: Site) -> None:
    def counted(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def inner(*args: Any, **kwargs: Any) -> Any:
            site.log.append(fn.__name__)
            return fn(*args, **kwargs)

        return inner

    def acounted(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            site.log.append(fn.__name__)
            return await fn(*args, **kwargs)

        return inner

    @site.app.get("/def")
    @counted
    def sync(q: int = 1) -> Part:
        """Documented."""
        return Part(size=q)

    @site.app.get("/async")
    @acounted
    async def asynchronous(q: int = 2) -> Part:
        return Part(size=q)

    @site.app.get("/def-around-async")
    @counted
    async def around(q: int = 3) -> Part:
        return Part(size=q)


@case("GET /", ask("POST /", json={"name": "n"}))
def subclasses_of_the_route_class(site: Site) -> None:
    base: Any = site.route_class

    class Marking(base):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                response: Response = await handler(request)
                response.headers["X-Marked"] = request.method
                return response

            return handle

    site.app.router.route_class = Marking

    @site.app.get("/")
    def read() -> Part:
        return Part()

    @site.app.post("/", status_code=201)
    def write(part: Part) -> Part:
        return part


# Errors.


class Unusual(BaseException):
    pass


# No GeneratorExit: on Python 3.12 it ends the task of the test's own runner.
ERRORS = [
    ValueError("value"),
    StopIteration("stop"),
    StopAsyncIteration("stop"),
    asyncio.CancelledError("cancelled"),
    TimeoutError("late"),
    Unusual("unusual"),
    ExceptionGroup("group", [KeyError("a")]),
]


@case(*(f"GET /{kind}/{n}" for kind in ("def", "async") for n in range(len(ERRORS))))
def exceptions(site: Site) -> None:
    @site.app.get("/def/{number}")
    def sync(number: int) -> None:
        raise ERRORS[number]

    @site.app.get("/async/{number}")
    async def asynchronous(number: int) -> None:
        raise ERRORS[number]


@case("GET /text", "GET /detail", "GET /204", "GET /dependency")
def http_exceptions(site: Site) -> None:
    def dependency() -> None:
        raise HTTPException(403)

    @site.app.get("/text", status_code=201)
    def text(response: Response, tasks: BackgroundTasks) -> None:
        response.headers["X-Lost"] = "1"
        tasks.add_task(site.log.append, "never")
        raise HTTPException(404, "not here")

    @site.app.get("/detail")
    def detail() -> None:
        raise HTTPException(402, {"a": [1]}, headers={"X-Error": "e"})

    @site.app.get("/204")
    def empty() -> None:
        raise HTTPException(204)

    app_dependency = Depends(dependency)
    site.app.get("/dependency", dependencies=[app_dependency])(lambda: 1)


@case("GET /def", "GET /async", "GET /list", "GET /raising")
def response_validation_errors(site: Site) -> None:
    class Strict(BaseModel):
        size: int

        @field_validator("size")
        @classmethod
        def small(cls, size: int) -> int:
            if size > 1000:
                raise KeyError("not a validation error")
            return size

    @site.app.get("/def", response_model=Strict)
    def sync() -> Any:
        return {"size": "no number"}

    @site.app.get("/async", response_model=Strict)
    async def asynchronous() -> Any:
        return {"size": "no number"}

    @site.app.get("/list", response_model=list[Strict], status_code=201)
    def several() -> Any:
        return [{"size": 1}, {}]

    @site.app.get("/raising", response_model=Strict)
    def raising() -> Any:
        return {"size": 1001}


@case("GET /part/request/x", "GET /part/response/1")
def the_text_of_validation_errors(site: Site) -> None:
    part = site.part()

    @part.get("/request/{number}")
    def request(number: int) -> int:
        return number

    @part.get("/response/{number}", response_model=int)
    def response(number: int) -> Any:
        return {"body": number}

    async def handle(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError | ResponseValidationError)
        content = {"text": str(error), "errors": str(error.errors()), "body": error.body}
        return JSONResponse(content, 430)

    part.add_exception_handler(RequestValidationError, handle)
    part.add_exception_handler(ResponseValidationError, handle)
    site.app.mount("/part", part)


@case("GET /value", "GET /base", "GET /http", "GET /any")
def exception_handlers(site: Site) -> None:
    class Base(Exception):
        pass

    class Derived(Base):
        pass

    @site.app.exception_handler(ValueError)
    async def value_error(request: Request, error: ValueError) -> Response:
        return PlainTextResponse(f"{error} at {request.url.path}", 420)

    @site.app.exception_handler(Base)
    def base(request: Request, error: Base) -> Response:
        return JSONResponse({"name": type(error).__name__}, 421)

    @site.app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"own": error.detail}, error.status_code)

    def raising(error: Exception) -> Callable[[], None]:
        def endpoint() -> None:
            raise error

        return endpoint

    site.app.get("/value")(raising(ValueError("v")))
    site.app.get("/base")(raising(Derived()))
    site.app.get("/http")(raising(HTTPException(409, "h")))
    site.app.get("/any")(raising(KeyError("k")))


# What only the documentation shows.


@case("GET /items/1", "POST /items/1")
def documentation(site: Site) -> None:
    callback = APIRouter()

    @callback.post("{$callback_url}/done")
    def done(body: Part) -> None: ...

    @site.app.get(
        "/items/{number}",
        responses={404: {"description": "My own", "model": Part}, 418: {"description": "Tea"}},
        deprecated=True,
        operation_id="own_id",
        summary="Summary",
        tags=["tag"],
        response_description="Described",
        openapi_extra={"x-extra": {"a": 1}},
    )
    def read(number: int) -> Part:
        """Read one.

        More about it.
        """
        return Part()

    @site.app.post(
        "/items/{number}",
        responses={409: {"description": "My own"}},
        callbacks=callback.routes,
        description="Described here",
        name="a name",
    )
    def write(number: int, callback_url: str | None = None) -> Part:
        return Part()

    site.app.get("/hidden", include_in_schema=False)(lambda: 1)
    site.app.webhooks.post("hook")(done)


@case("GET /a", "GET /r/b", generate_unique_id_function=lambda route: f"app-{route.name}")
def operation_ids(site: Site) -> None:
    router = site.router(generate_unique_id_function=lambda route: f"router-{route.name}")

    @site.app.get("/a", tags=["t"])
    def first() -> int:
        return 1

    @router.get("/b")
    def second() -> int:
        return 2

    site.app.include_router(router, prefix="/r")


@case(
    "GET /",
    "GET /r",
    dependencies=[Depends(lambda: None)],
    responses={451: {"description": "from the application"}},
    separate_input_output_schemas=False,
    redirect_slashes=False,
)
def options_of_the_application(site: Site) -> None:
    router = site.router(responses={503: {"description": "My own"}}, redirect_slashes=False)

    @site.app.get("/", responses={503: {"description": "Mine, too"}})
    def root(request: Request) -> str:
        return request.url.path

    @router.get("/r")
    def routed(request: Request) -> str:
        return str(request.url_for("root"))

    site.app.include_router(router)


@case("GET /")
def threads_of_an_endpoint(site: Site) -> None:
    @site.app.get("/")
    def spawning() -> list[int]:
        results: list[int] = []
        threads = [threading.Thread(target=results.append, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(results)


@case("GET /")
def asyncio_run_in_an_endpoint(site: Site) -> None:
    async def coroutine() -> int:
        await asyncio.sleep(0)
        return 3

    @site.app.get("/")
    def endpoint() -> int:
        return asyncio.run(coroutine())


@case("GET /", "GET /background")
def calls_back_into_the_event_loop(site: Site) -> None:
    async def coroutine(number: int) -> int:
        await asyncio.sleep(0)
        return number

    @site.app.get("/")
    def endpoint() -> int:
        return anyio.from_thread.run(coroutine, 4)

    def task() -> None:
        site.log.append(anyio.from_thread.run(coroutine, 5))

    @site.app.get("/background")
    def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(task)
