"""Queries and depths of relations are done wherever they stand, or refused; never ignored."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import peewee
import pytest
from pydantic import AfterValidator, BaseModel, Field, RootModel, create_model
from typing_extensions import TypeAliasType, TypedDict

from fastapi_peewee import LazyLoad, SchemaError, depth, respond
from fastapi_peewee.annotations import asks
from fastapi_peewee.loading import Plans
from tests.apps import client, connected, make_app
from tests.fidelity import connection
from tests.test_loading import read

T = TypeVar("T")


class ItemOut(BaseModel):
    title: str


class Other(BaseModel):
    nick: str


class Pair(NamedTuple, Generic[T]):
    first: T


@dataclass
class Held(Generic[T]):
    users: T


@pytest.fixture
def db(database_url: str) -> Iterator[Any]:
    with connection(database_url) as db:
        yield db


@pytest.fixture
def shop(db: Any) -> SimpleNamespace:
    return make(db)


def make(db: Any) -> SimpleNamespace:
    """Ada owns an item that everybody may see, and one that nobody may."""

    class User(db.Model):
        name = peewee.CharField()
        boss = peewee.ForeignKeyField("self", null=True, backref="reports")

        @property
        def best(self) -> Any:
            return self.items

        @property
        def me(self) -> Any:
            return User.get_by_id(self.id)

        @property
        def all(self) -> Any:
            return list(Item.select().where(Item.owner == self))

    class Item(db.Model):
        title = peewee.CharField()
        public = peewee.BooleanField()
        owner = peewee.ForeignKeyField(User, backref="items")

    db.create_tables([User, Item])
    ada = User.create(name="Ada")
    for title, public in (("shown", True), ("hidden", False)):
        Item.create(owner=ada, title=title, public=public)
    return SimpleNamespace(User=User, Item=Item, public=Item.select().where(Item.public))


def user_out(**fields: Any) -> Any:
    return create_model("UserOut", name=(str, ...), **fields)


#: Where the query stands, in the type of the field.
DONE: dict[str, Callable[[Any], Any]] = {
    "around the list": lambda public: Annotated[list[ItemOut], public],
    "beside None": lambda public: Annotated[list[ItemOut], public] | None,
    "around the items": lambda public: list[Annotated[ItemOut, public]],
    "in an alias": lambda public: TypeAliasType("Public", Annotated[list[ItemOut], public]),
    "in an alias with a parameter": lambda public: TypeAliasType(
        "Public",
        Annotated[list[T], public],
        type_params=(T,),  # type: ignore[arg-type]
    )[ItemOut],
    "beside others": lambda public: Annotated[list[ItemOut], Field(title="Items"), public],
}


@pytest.mark.parametrize("where", DONE)
def test_a_query_is_done_wherever_it_stands(db: Any, shop: SimpleNamespace, where: str) -> None:
    """Around the list, its items, an alias, or beside None; of queries and of instances."""
    plans = Plans(list[user_out(items=(DONE[where](shop.public), ...))])  # type: ignore[misc]
    for returned in (shop.User.select(), list(shop.User.select())):
        assert read(plans.load(returned), plans) == [{"name": "Ada", "items": [{"title": "shown"}]}]


LATER = """
from __future__ import annotations
from typing import Annotated
from fastapi_peewee import depth
from pydantic import BaseModel

PUBLIC = None

class UserOut(BaseModel):
    name: str
    items: Annotated[list[ItemOut], PUBLIC]

class OwnedOut(BaseModel):
    title: str
    owner: UserOut

class Node(BaseModel):
    name: str
    reports: Annotated[list[Node], depth(1)]

class ItemOut(BaseModel):
    title: str
"""


def test_annotations_that_name_what_comes_later(
    db: Any, shop: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `from __future__ import annotations` a class isn't complete before those that it names
    are there. Its query and its depth count all the same."""
    name = f"later_{id(db)}"
    (tmp_path / f"{name}.py").write_text(LATER)
    monkeypatch.syspath_prepend(tmp_path)
    later: Any = importlib.import_module(name)
    later.PUBLIC = shop.public
    assert not later.UserOut.__pydantic_complete__
    owner = {"name": "Ada", "items": [{"title": "shown"}]}
    plans = Plans(list[later.OwnedOut])
    shown = shop.Item.select().where(shop.Item.public)
    assert read(plans.load(shown), plans) == [{"title": "shown", "owner": owner}]
    plans = Plans(list[later.UserOut])
    assert read(plans.load(shop.User.select()), plans) == [owner]
    shop.User.create(name="Bob", boss=1)
    plans = Plans(list[later.Node])
    found = read(plans.load(shop.User.select().where(shop.User.name == "Ada")), plans)
    assert found == [{"name": "Ada", "reports": [{"name": "Bob", "reports": []}]}]


class Node(BaseModel):
    name: str
    reports: "Annotated[list[Node], depth(1)]"


#: Fields that no query can be done for.
REFUSED: dict[str, tuple[str, Any]] = {
    "a tuple": ("items", tuple[ItemOut, ...]),
    "a set": ("items", set[ItemOut]),
    "a union": ("items", list[ItemOut | Other]),
    "None among them": ("items", list[ItemOut | None]),
    "root models": ("items", list[RootModel[ItemOut]]),
    "a property": ("best", list[ItemOut]),
    "a column": ("name", str),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_query_that_can_not_be_done_is_refused(db: Any, shop: SimpleNamespace, how: str) -> None:
    """Of a field that isn't a plain list of one model, which Pydantic would read without it."""
    name, type_ = REFUSED[how]
    fields: dict[str, Any] = {name: (Annotated[type_, shop.public], ...)}
    plans = Plans(list[create_model("Out", **fields)])  # type: ignore[misc]
    for returned in (shop.User.select(), list(shop.User.select())):
        with pytest.raises(SchemaError, match=rf"Out\.{name} has a query or a depth\(\), but"):
            plans.load(returned)


def test_a_field_that_the_model_does_not_have(db: Any, shop: SimpleNamespace) -> None:
    """It may have a query, which is for other models: there is nothing to be read."""
    other: Any = (Annotated[list[ItemOut], shop.public], [])
    plans = Plans(list[user_out(items=(list[ItemOut], ...), others=other)])  # type: ignore[misc]
    [found] = read(plans.load(shop.User.select()), plans)
    assert (len(found["items"]), found["others"]) == (2, [])


def typed(out: Any) -> Any:
    class Kept(TypedDict):
        users: list[out]

    return Kept


#: Response types, and what is returned, that no relation is loaded for.
UNDONE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a union": (lambda out: out | Other, lambda user: user.select()),
    "a list of a union": (lambda out: list[out | Other], lambda user: user.select()),  # type: ignore[valid-type]
    "a root model": (lambda out: RootModel[out], lambda user: user.select()),  # type: ignore[valid-type]
    "a limited list": (
        lambda out: Annotated[list[out], Field(max_length=9)],  # type: ignore[valid-type]
        lambda user: user.select(),
    ),
    "a dictionary": (lambda out: dict[str, out], lambda user: {"a": user.get()}),  # type: ignore[valid-type]
    "a tuple": (lambda out: list[out], lambda user: tuple(user.select())),  # type: ignore[valid-type]
    "a page": (
        lambda out: create_model("Page", users=(list[out], ...)),  # type: ignore[valid-type]
        lambda user: {"users": list(user.select())},
    ),
    "a dataclass": (
        lambda out: Held[list[out]],  # type: ignore[valid-type]
        lambda user: {"users": list(user.select())},
    ),
    "a named tuple": (lambda out: Pair[out], lambda user: Pair(user.get())),  # type: ignore[valid-type]
    "a typed dictionary": (
        lambda out: typed(out),
        lambda user: {"users": list(user.select())},
    ),
    "a property": (
        lambda out: list[create_model("Outer", me=(out, ...))],  # type: ignore[misc]
        lambda user: user.select(),
    ),
}


@pytest.mark.parametrize("how", UNDONE)
async def test_where_no_relation_is_loaded_none_is_read_without_its_query(
    database_url: str, how: str
) -> None:
    """Pydantic would read all rows of the relation: that is an error, and nothing is sent."""
    type_, returned = UNDONE[how]
    async with connected(database_url) as db:
        shop = await db.run(make, db)
        app = make_app(db)
        out = type_(user_out(items=(Annotated[list[ItemOut], shop.public], ...)))
        deep = type_(user_out(reports=(Annotated[list[Node], depth(1)], ...)))
        plain = type_(user_out(items=(list[ItemOut], ...)))
        app.get("/", response_model=out)(lambda: returned(shop.User))
        app.get("/depth", response_model=deep)(lambda: returned(shop.User))
        app.get("/plain", response_model=plain)(lambda: returned(shop.User))
        app.get("/respond", response_model=None)(lambda: respond(returned(shop.User), out))
        async with client(app, raises=True) as http:
            queried = how in ("a union", "a list of a union")
            for path in ("/", "/depth", *(["/respond"] if queried else [])):
                with pytest.raises(LazyLoad, match="without what its annotation asks for") as lazy:
                    await http.get(path)
                assert "while the response of type" in str(lazy.value)
            assert "hidden" in (await http.get("/plain")).text


async def test_rows_with_a_query_may_read_other_things(database_url: str) -> None:
    """Where the relations are loaded, what else a property reads costs a query, and is no error."""
    async with connected(database_url) as db:
        shop = await db.run(make, db)
        app = make_app(db)
        items = (Annotated[list[ItemOut], shop.public, AfterValidator(list)], ...)
        out: Any = user_out(items=items, all=(list[ItemOut], ...))
        app.get("/", response_model=list[out])(lambda: shop.User.select())
        async with client(app, raises=True) as http:
            [found] = (await http.get("/")).json()
        assert found["items"] == [{"title": "shown"}]
        assert {"title": "hidden"} in found["all"]


class Leaf(BaseModel):
    leaves: "list[Leaf]"


@pytest.mark.parametrize("type_", [int, list[Leaf], Leaf | Other, dict[str, Pair[int]], Held[int]])
def test_types_that_ask_nothing(type_: Any) -> None:
    """Those that contain themselves are looked at once."""
    assert not asks(type_)
