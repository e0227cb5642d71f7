"""What a route can do with a query that its endpoint returns: cases as those of `route_cases`.

With FastAPI's own route, the endpoint returns the same rows, loaded.
"""

import functools
from typing import Any

import peewee
from fastapi import (
    BackgroundTasks,
    Depends,
    FastAPI,
    HTTPException,
    Request,
    Response,
)
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator

from tests.route_cases import Case, Site, SpacedJSON, ask, case

QUERY_CASES: dict[str, Case] = {}


class Author(peewee.Model):
    name = peewee.CharField()
    note = peewee.CharField(null=True)


class Book(peewee.Model):
    title = peewee.CharField()
    price = peewee.FloatField()
    author = peewee.ForeignKeyField(Author, backref="books")


MODELS = [Author, Book]


def fill() -> None:
    for number, name in enumerate(["Ada", 'Zoë "Z"'], 1):
        Author.create(id=number, name=name, note=None if number == 1 else "n\\n")
        for book in range(number):
            Book.create(title=f"{number}.{book}", price=book / 3, author=number)


def loaded() -> list[Any]:
    """All authors with their books, as `fill()` writes them."""
    authors = list(Author.select().order_by(Author.id))
    for author in authors:
        author.__dict__["books"] = list(author.books.order_by(Book.id))
    return authors


class BookOut(BaseModel):
    title: str
    price: float


class AuthorOut(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    id: int = Field(alias="authorId")
    name: str
    note: str | None = None
    books: list[BookOut]


class Checked(AuthorOut):
    @field_validator("name")
    @classmethod
    def loud(cls, name: str) -> str:
        return name.upper()

    @computed_field
    def number(self) -> int:
        return len(self.books)


def authors(limit: int = 9) -> Any:
    return Author.select().order_by(Author.id).limit(limit)


query_case = functools.partial(case, cases=QUERY_CASES)


@query_case("GET /list", "GET /one", "GET /optional", "GET /annotated", "GET /none", "GET /checked")
def kinds_of_response_model(site: Site) -> None:
    @site.app.get("/list", response_model=list[AuthorOut])
    def many() -> Any:
        return site.rows(authors())

    @site.app.get("/one", response_model=AuthorOut)
    def one() -> Any:
        return site.rows(authors(1), one=True)

    @site.app.get("/optional", response_model=AuthorOut | None)
    def optional() -> Any:
        return site.rows(authors(1), one=True)

    @site.app.get("/annotated")
    def annotated() -> list[AuthorOut]:
        found: list[AuthorOut] = site.rows(authors())
        return found

    @site.app.get("/none", response_model=list[AuthorOut])
    def none() -> Any:
        return site.rows(authors(0))

    @site.app.get("/checked", response_model=list[Checked])
    def checked() -> Any:
        return site.rows(authors())


OPTIONS: list[dict[str, Any]] = [
    {"response_model_include": {"name"}},
    {"response_model_include": {"id": True, "books": {"__all__": {"title"}}}},
    {"response_model_exclude": {"books"}},
    {"response_model_exclude_none": True},
    {"response_model_exclude_unset": True},
    {"response_model_exclude_defaults": True},
    {"response_model_by_alias": False},
    {"response_class": JSONResponse},
    {"response_class": SpacedJSON},
    {"status_code": 201},
    {"status_code": 299, "response_model_by_alias": False, "response_class": SpacedJSON},
    {"response_model": None, "response_class": Response, "status_code": 204},
]


@query_case(
    *(f"GET /{kind}/{n}" for kind in ("many", "one", "checked") for n in range(len(OPTIONS)))
)
def options_of_the_route(site: Site) -> None:
    for number, options in enumerate(OPTIONS):

        def returns(type_: Any, query: Any, one: bool, path: str, options: Any) -> None:
            @site.app.get(path, **{"response_model": type_, **options})
            def endpoint() -> Any:
                if options.get("status_code") == 204:
                    return Response(status_code=204)
                return site.rows(query, one=one)

        returns(list[AuthorOut], authors(), False, f"/many/{number}", options)
        returns(AuthorOut, authors(1), True, f"/one/{number}", options)
        returns(list[Checked], authors(), False, f"/checked/{number}", options)


@query_case("GET /own", "GET /router/default", default_response_class=SpacedJSON)
def default_response_classes(site: Site) -> None:
    router = site.router(default_response_class=JSONResponse)

    @site.app.get("/own", response_model=list[AuthorOut])
    def own() -> Any:
        return site.rows(authors())

    @router.get("/default", response_model=list[AuthorOut])
    def default() -> Any:
        return site.rows(authors())

    site.app.include_router(router, prefix="/router")


@query_case("GET /", "GET /?status=202")
def the_response_parameter(site: Site) -> None:
    def dependency(response: Response) -> None:
        response.headers["x-dependency"] = "yes"

    @site.app.get("/", response_model=list[AuthorOut], dependencies=[Depends(dependency)])
    def endpoint(response: Response, status: int = 200) -> Any:
        response.headers["x-endpoint"] = "yes"
        response.headers.append("vary", "a")
        response.set_cookie("c", "1")
        response.status_code = status
        return site.rows(authors())


@query_case("GET /")
def background_tasks(site: Site) -> None:
    def before(tasks: BackgroundTasks) -> None:
        tasks.add_task(site.log.append, "before")

    @site.app.get("/", response_model=list[AuthorOut], dependencies=[Depends(before)])
    def endpoint(tasks: BackgroundTasks) -> Any:
        async def task(number: int) -> None:
            site.log.append(number)

        tasks.add_task(task, 1)
        tasks.add_task(site.log.append, 2)
        site.log.append("endpoint")
        return site.rows(authors())


@query_case("GET /yield", "GET /refused", "GET /error")
def dependencies(site: Site) -> None:
    def around(request: Request) -> Any:
        site.log.append("in")
        try:
            yield request.url.path
        except Exception as error:
            site.log.append(type(error).__name__)
            raise
        finally:
            site.log.append("out")

    @site.app.get("/yield", response_model=list[AuthorOut])
    def endpoint(path: str = Depends(around)) -> Any:
        site.log.append(path)
        return site.rows(authors())

    @site.app.get("/refused", response_model=list[AuthorOut], dependencies=[Depends(around)])
    def refused() -> Any:
        raise HTTPException(403, "no")

    @site.app.get("/error", response_model=list[AuthorOut], dependencies=[Depends(around)])
    def error() -> Any:
        raise KeyError


@query_case(
    "GET /api/v1/1", "GET /api/v2/1", "GET /part/", "HEAD /head", "POST /head", "GET /api/v1/x"
)
def routers_parts_and_methods(site: Site) -> None:
    router = site.router()

    @router.get("/{number}", response_model=AuthorOut)
    def endpoint(number: int) -> Any:
        return site.rows(Author.select().where(Author.id == number), one=True)

    site.app.include_router(router, prefix="/api/v1")
    site.app.include_router(router, prefix="/api/v2")
    part: FastAPI = site.part()

    @part.get("/", response_model=list[AuthorOut])
    def all_of_them() -> Any:
        return site.rows(authors())

    site.app.mount("/part", part)

    @site.app.api_route("/head", methods=["GET", "HEAD", "POST"], response_model=list[AuthorOut])
    def several() -> Any:
        return site.rows(authors())


@query_case(ask("GET /", params={"limit": 1}), "GET /?limit=2", "GET /?limit=x", "GET /")
def queries_of_one_shape(site: Site) -> None:
    @site.app.get("/", response_model=list[AuthorOut])
    def endpoint(limit: int = 9) -> Any:
        return site.rows(authors(limit))


def rows_of(found: list[Any]) -> Any:
    """For FastAPI's own routes: what the queries of the cases find, of instances in memory."""

    def rows(query: Any, *, one: bool = False) -> Any:
        limit = len(found) if query._limit is None else query._limit
        return found[0] if one else found[:limit]

    return rows


def queries(query: Any, *, one: bool = False) -> Any:
    return query
