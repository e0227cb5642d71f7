"""`Annotated[list[ItemOut], query]`: which rows of a relation; never those of another parent."""

from collections.abc import Callable
from typing import Annotated, Any

import peewee
import pytest
from peewee import SQL
from pydantic import BaseModel, Field, create_model, field_validator

from fastapi_peewee import Database, SchemaError
from tests.apps import client, make_app
from tests.apps import db as db
from tests.shop import BareUserOut, ItemOut, Models


class Checked(BareUserOut):
    """Not for the database to build."""

    @field_validator("name")
    @classmethod
    def same(cls, name: str) -> str:
        return name


@pytest.fixture
async def models(db: Database) -> Models:
    """Ada owns a and b, Bob owns c and d."""
    models = Models(db)
    await db.acreate_tables([models.User, models.Item])
    for name, titles in (("Ada", "ab"), ("Bob", "cd")):
        user = await models.User.acreate(name=name)
        for title in titles:
            await models.Item.acreate(title=title, owner=user)
    return models


def with_items(base: type[BaseModel], query: Any) -> Any:
    items: Any = (Annotated[list[ItemOut], query], ...)
    made: Any = create_model("WithItems", __base__=base, items=items)
    return list.__class_getitem__(made)


QUERIES: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "raw OR": (lambda model: model.select().where(SQL("title = 'a' OR title = 'c'")), ["a", "c"]),
    "raw OR and more": (
        lambda model: model.select().where(SQL("title = 'a' OR title = 'c'")).where(model.id > 0),
        ["a", "c"],
    ),
    "OR": (
        lambda model: model.select().where((model.title == "a") | (model.title == "c")),
        ["a", "c"],
    ),
    "alias": (lambda model: model.alias("q").select(), ["ab", "cd"]),
    "limit": (lambda model: model.select().order_by(model.id.desc()).limit(1), ["b", "d"]),
    "distinct": (lambda model: model.select().distinct(), ["ab", "cd"]),
    "union inside": (
        lambda model: model.select().where(
            model.id.in_(
                model.select(model.id).where(model.title == "a")
                | model.select(model.id).where(model.title == "d")
            )
        ),
        ["a", "d"],
    ),
}


@pytest.mark.parametrize("base", [BareUserOut, Checked], ids=["json", "rows"])
@pytest.mark.parametrize("name", QUERIES)
async def test_a_parent_has_its_own_rows_only(
    db: Database, models: Models, name: str, base: type[BaseModel]
) -> None:
    """Whatever a relation's query says, each parent gets those of its rows that are the parent's"""
    make, expected = QUERIES[name]
    type_ = with_items(base, make(models.Item))
    app = make_app(db)
    users = models.User.select().order_by(models.User.id)
    app.get("/query", response_model=type_)(lambda: users)
    app.get("/distinct", response_model=type_)(lambda: users.distinct())
    app.get("/instances", response_model=type_)(lambda: list(users.clone()))
    async with client(app, raises=True) as http:
        for path in ("/query", "/distinct", "/instances"):
            found = (await http.get(path)).json()
            titles = ["".join(item["title"] for item in user["items"]) for user in found]
            assert titles == expected, path


async def test_what_can_not_be_a_relation_s_query(db: Database, models: Models) -> None:
    """A UNION, a raw query, rows that are no instances, or another model: refused, with a reason"""
    User, Item = models.User, models.Item
    app = make_app(db)
    for number, (query, reason) in enumerate(
        [
            (Item.select() | Item.select(), r"UNION, write `Item\.select\(\)\.where\(Item\.id"),
            (Item.raw("SELECT * FROM item"), "ModelRaw can't be limited"),
            (Item.select().dicts(), "instances of its model"),
            (User.select(), "the relation is to"),
        ]
    ):
        app.get(f"/{number}", response_model=with_items(BareUserOut, query))(lambda: User.select())
        async with client(app, raises=True) as http:
            with pytest.raises(SchemaError, match=rf"relation WithItems\.items .*{reason}"):
                await http.get(f"/{number}")

    class Owned(BaseModel):
        owner: Annotated[BareUserOut, User.select().where(User.id > 1)]

    app.get("/owned", response_model=list[Owned])(lambda: Item.select())
    async with client(app, raises=True) as http:
        with pytest.raises(SchemaError, match=r"Owned\.owner .* leads to one row"):
            await http.get("/owned")


async def test_fields_with_names_like_those_in_the_statement(db: Database) -> None:
    """A field may have any name: `q` and `r`, quotes, percent signs, backslashes, or none."""

    class Pixel(db.Model):
        r = peewee.IntegerField()
        q = peewee.IntegerField()
        t1 = peewee.IntegerField(column_name="b`l\"u'e\\")

    def out(alias: str) -> Any:
        class PixelOut(BaseModel):
            r: int
            q: int
            t1: int

        PixelOut.model_fields["t1"].serialization_alias = alias
        PixelOut.model_rebuild(force=True)
        return list.__class_getitem__(PixelOut)

    await db.acreate_tables([Pixel])
    await Pixel.acreate(r=1, q=2, t1=3)
    aliases = ["t1", "", "a'b\"c`d", "%s%%(a)s{v}", "\\' || 'x", "a\0b", "é" * 70]
    app = make_app(db)
    for number, alias in enumerate(aliases):
        app.get(f"/{number}", response_model=out(alias))(lambda: Pixel.select())
        async with client(app, raises=True) as http:
            assert (await http.get(f"/{number}")).json() == [{"r": 1, "q": 2, alias: 3}]


async def test_a_relation_that_two_fields_read(db: Database, models: Models) -> None:
    """Two fields may read one relation; with different queries they are refused, not mixed up.

    Pydantic finds the rows of both under one name.
    """

    class Ids(BaseModel):
        id: int

    class Both(BareUserOut):
        items: list[ItemOut]
        ids: list[Ids] = Field(validation_alias="items")

    class Differing(BareUserOut):
        items: list[ItemOut]
        last: Annotated[list[Ids], models.Item.select().order_by(models.Item.id.desc())] = Field(
            validation_alias="items"
        )

    app = make_app(db)

    @app.get("/both", response_model=Both)
    def both() -> Any:
        return models.User.select().where(models.User.name == "Bob")

    @app.get("/differing", response_model=Differing)
    def differing() -> Any:
        return models.User.select()

    async with client(app, raises=True) as http:
        assert (await http.get("/both")).json() == {
            "id": 2,
            "name": "Bob",
            "items": [{"id": 3, "title": "c"}, {"id": 4, "title": "d"}],
            "ids": [{"id": 3}, {"id": 4}],
        }
        with pytest.raises(SchemaError, match=r"Differing\.items and last both read 'items'"):
            await http.get("/differing")
