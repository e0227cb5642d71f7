"""Queries and depths of relations are done wherever they stand, or refused; never ignored."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import peewee
import pytest
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    RootModel,
    SerializeAsAny,
    create_model,
    field_validator,
)
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
    assert asks(later.UserOut | None)
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


async def test_a_validator_that_asks_the_database(database_url: str) -> None:
    """It may, where all that the response asks for was read: also of a query, also in a stream."""
    async with connected(database_url) as db:
        shop = await db.run(make, db)
        app = make_app(db)

        class Counted(BaseModel):
            name: str
            items: Annotated[list[ItemOut], shop.public]

            @field_validator("name")
            @classmethod
            def count(cls, name: str) -> str:
                return f"{name} of {shop.User.select().count()}"

        app.get("/", response_model=list[Counted])(lambda: shop.User.select())
        app.get("/respond", response_model=None)(
            lambda stream: respond(shop.User.select(), list[Counted], stream=stream == "1")
        )
        expected = [{"name": "Ada of 1", "items": [{"title": "shown"}]}]
        async with client(app, raises=True) as http:
            for path in ("/", "/respond?stream=0", "/respond?stream=1"):
                assert (await http.get(path)).json() == expected


#: Two modules, of which one needs the other's class only where it is checked, as is usual.
LATER_ELSEWHERE = {
    "first": """
from __future__ import annotations
from typing import TYPE_CHECKING
from pydantic import BaseModel
if TYPE_CHECKING:
    from {second} import ItemOut

class UserOut(BaseModel):
    name: str
    items: list[ItemOut]
""",
    "second": """
from pydantic import BaseModel
from {first} import UserOut

class ItemOut(BaseModel):
    title: str

class OwnedOut(BaseModel):
    title: str
    owner: UserOut

OwnedOut.model_rebuild()
""",
}


@pytest.mark.parametrize("public", [False, True])
def test_a_class_whose_names_are_known_where_it_is_used(
    db: Any, shop: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: bool
) -> None:
    """Pydantic leaves such a class incomplete: it is read as the class that leads to it was."""
    names = {key: f"{key}_{id(db)}_{public}" for key in LATER_ELSEWHERE}
    for key, text in LATER_ELSEWHERE.items():
        for other, name in names.items():
            text = text.replace(f"{{{other}}}", name)
        if public:
            text = text.replace("items: list[ItemOut]", "items: Annotated[list[ItemOut], PUBLIC]")
            text = text.replace("import TYPE_CHECKING", "import TYPE_CHECKING, Annotated")
            text = text.replace("class UserOut", "PUBLIC = None\n\nclass UserOut")
        (tmp_path / f"{names[key]}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    first: Any = importlib.import_module(names["first"])
    first.PUBLIC = shop.public
    second: Any = importlib.import_module(names["second"])
    assert not first.UserOut.__pydantic_complete__
    plans = Plans(list[second.OwnedOut])
    [found] = read(plans.load(shop.Item.select().where(shop.Item.public)), plans)
    assert len(found["owner"]["items"]) == (1 if public else 2)


def test_a_class_whose_names_nobody_knows(db: Any, shop: SimpleNamespace) -> None:
    """A text that may hold a query is refused where it can't be read; others are as they were."""
    hidden = shop.public

    def made(annotation: str) -> Any:
        fields = {"__annotations__": {"name": str, "items": annotation}, "__module__": __name__}
        inner: Any = type("Inner", (BaseModel,), fields)

        class Local(BaseModel):
            title: str

        class Outer(BaseModel):
            title: str
            owner: inner

        Outer.model_rebuild(_types_namespace={"Local": Local, "hidden": hidden})
        assert not inner.__pydantic_complete__
        return list.__class_getitem__(Outer)

    plans = Plans(made("list[Local]"))
    assert len(read(plans.load(shop.Item.select()), plans)) == 2
    plans = Plans(made("Annotated[list[Local], hidden]"))
    with pytest.raises(SchemaError, match=r"Inner.items names what can't be found from here"):
        plans.load(shop.Item.select())


class Strange(type):
    """Of such a class hardly anything can be asked."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(cls, other: object) -> bool:
        raise RuntimeError

    def __getattr__(cls, name: str) -> Any:
        raise RuntimeError(name)


class Odd(metaclass=Strange):
    pass


class Envelope(BaseModel):
    data: SerializeAsAny[BaseModel]


class Leaf(BaseModel):
    leaves: "list[Leaf]"


@pytest.mark.parametrize(
    "type_",
    [
        *(int, list[Leaf], Leaf | Other, dict[str, Pair[int]], Held[int], BaseModel, Envelope),
        *(Odd, Literal["a", 1], Callable[[int], str], T, "Text", Ellipsis),
    ],
)
def test_types_that_ask_nothing(type_: Any) -> None:
    """Those that contain themselves are looked at once, and nothing that is strange is an error."""
    assert not asks(type_)
