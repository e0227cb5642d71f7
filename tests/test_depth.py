"""Response classes that contain themselves: read to the depth that is stated, or refused."""

from types import SimpleNamespace
from typing import Annotated, Any

import peewee
import pytest
from pydantic import BaseModel, Field, field_validator

from fastapi_peewee import Database, LazyLoad, SchemaError, depth, explain, respond, schema
from fastapi_peewee.loading import Plans
from tests.apps import client, make_app
from tests.apps import db as db
from tests.test_loading import every_plan, only

CHAIN = 9


class PartOut(BaseModel):
    name: str
    parts: Annotated[list["PartOut"], depth(2)]


class Up(BaseModel):
    name: str
    whole: Annotated["Up | None", depth(2)]


class Both(BaseModel):
    """Up and down, in any order, each once."""

    name: str
    whole: Annotated["Both | None", depth(1)]
    parts: Annotated[list["Both"], depth(1)]


class LabelOut(BaseModel):
    text: str
    parts: list["LabelledOut"]


class LabelledOut(BaseModel):
    """A circle of two classes, which says its depth in one place."""

    name: str
    labels: Annotated[list[LabelOut], depth(1)]


class Inherited(PartOut):
    pass


class Endless(BaseModel):
    name: str
    parts: list["Endless"]


class EndlessUp(BaseModel):
    name: str
    whole: "EndlessUp | None"


class Round(BaseModel):
    parts: list["Rounded"]


class Rounded(BaseModel):
    labels: list[Round]


@pytest.fixture
async def models(db: Database) -> SimpleNamespace:
    """The whole is 1, its parts are 2 and 3; 4 is a part of 2, 5 of 4, and so on to 9.

    1 and 2 are red.
    """

    class Part(db.Model):
        name = peewee.CharField()
        whole = peewee.ForeignKeyField("self", null=True, backref="parts")

    class Label(db.Model):
        text = peewee.CharField()
        parts = peewee.ManyToManyField(Part, backref="labels")

    through = Label.parts.get_through_model()

    def fill() -> None:
        db.create_tables([Part, Label, through])
        for number in range(1, CHAIN + 1):
            whole = {1: None, 2: 1, 3: 1, 4: 2}.get(number, number - 1)
            Part.insert(id=number, name=str(number), whole=whole).execute()
        Label.insert(id=1, text="red").execute()
        for number in (1, 2):
            through.insert(part=number, label=1).execute()

    await db.run(fill)
    return SimpleNamespace(Part=Part, Label=Label)


@pytest.fixture
async def statements(db: Database, models: SimpleNamespace) -> list[str]:
    """The SQL that the database is sent once the tables are there."""
    seen: list[str] = []
    db.query_hooks.append(lambda event: seen.append(event.sql))
    return seen


def part(name: int, *parts: Any) -> dict[str, Any]:
    return {"name": str(name), "parts": list(parts)}


def up(name: int, whole: Any = None) -> dict[str, Any]:
    return {"name": str(name), "whole": whole}


THREE_LEVELS = part(1, part(2, part(4)), part(3))


def first(models: SimpleNamespace) -> Any:
    return models.Part.select().where(models.Part.id == 1)


async def test_a_class_that_contains_itself(db: Database, models: SimpleNamespace) -> None:
    """Down, up, both and round: every plan reads to the stated depth, and ends empty or null."""
    Part = models.Part
    fifth = Part.select().where(Part.id == 5)
    last_of_two = Part.select().order_by(Part.id.desc()).limit(1)

    class Limited(BaseModel):
        name: str
        parts: Annotated[list["Limited"], last_of_two, depth(2)]

    for query, type_, expected in [
        (first(models), PartOut, THREE_LEVELS),
        (first(models), Inherited, THREE_LEVELS),
        (fifth, Up, up(5, up(4, up(2)))),
        (
            Part.select().where(Part.id == 2),
            Both,
            {
                "name": "2",
                "whole": {
                    "name": "1",
                    "whole": None,
                    "parts": [
                        {"name": "2", "whole": None, "parts": []},
                        {"name": "3", "whole": None, "parts": []},
                    ],
                },
                "parts": [
                    {
                        "name": "4",
                        "whole": {"name": "2", "whole": None, "parts": []},
                        "parts": [],
                    }
                ],
            },
        ),
        (
            first(models),
            LabelledOut,
            {
                "name": "1",
                "labels": [
                    {
                        "text": "red",
                        "parts": [{"name": "1", "labels": []}, {"name": "2", "labels": []}],
                    }
                ],
            },
        ),
        (first(models), Limited, part(1, part(3))),
    ]:
        answers = await db.run(every_plan, query, list.__class_getitem__(type_), db)
        assert only(answers) == [expected], type_


async def test_statements(db: Database, models: SimpleNamespace, statements: list[str]) -> None:
    """One where the database builds the JSON, else one for each level: not one for each row."""

    class Checked(BaseModel):
        name: str
        parts: Annotated[list["Checked"], depth(2)]

        @field_validator("name")
        @classmethod
        def same(cls, name: str) -> str:
            return name

    app = make_app(db)
    app.get("/json", response_model=PartOut)(lambda: first(models))
    app.get("/rows", response_model=Checked)(lambda: first(models))
    app.get("/instances", response_model=PartOut)(lambda: models.Part.get_by_id(1))

    @app.get("/async", response_model=PartOut)
    async def read() -> Any:
        return first(models)

    @app.get("/responded", response_model=None)
    async def responded() -> Any:
        return respond(first(models), list[PartOut], stream=True)

    async with client(app, raises=True) as http:
        for path, number in [("json", 1), ("async", 1), ("rows", 3), ("instances", 3)]:
            statements.clear()
            assert (await http.get(f"/{path}")).json() == THREE_LEVELS
            assert sum("FROM" in each for each in statements) == number, path
        assert (await http.get("/responded")).json() == [THREE_LEVELS]


async def test_instances_that_have_loaded_more(db: Database, models: SimpleNamespace) -> None:
    """The type says how deep, whatever instances have loaded; those are not changed."""
    whole = await db.run(lambda: first(models).get())
    inner = await db.run(lambda: list(models.Part.select().where(models.Part.id.in_([2, 4, 5]))))
    for instance, below in zip([whole, *inner], [*inner, None], strict=True):
        instance.__dict__["parts"] = [] if below is None else [below]
    app = make_app(db)
    app.get("/", response_model=PartOut)(lambda: whole)
    async with client(app, raises=True) as http:
        assert (await http.get("/")).json() == part(1, part(2, part(4)))
    assert inner[1].parts == [inner[2]]


async def test_without_a_depth(db: Database, models: SimpleNamespace) -> None:
    """A query is refused: the error names the field and what to write. Nothing is read."""
    Part = models.Part
    app = make_app(db)
    for path, type_, words in [
        ("/down", Endless, r'Endless\.parts .*`parts: Annotated\[list\["Endless"\], depth\(3\)\]`'),
        ("/up", EndlessUp, r'EndlessUp\.whole .*Annotated\["EndlessUp \| None", depth\(3\)\]`'),
        ("/round", Rounded, r"Round\.parts leads to Rounded again"),
    ]:
        many = list.__class_getitem__(type_)
        app.get(path, response_model=type_)(lambda: Part.select())
        app.get(f"{path}/related", response_model=type_)(
            lambda: Part.select().with_related(Part.parts)
        )
        app.get(f"{path}/raw", response_model=type_)(lambda: Part.raw("SELECT * FROM part"))
        app.get(f"{path}/stream", response_model=None)(
            lambda many=many: respond(Part.select(), many, stream="csv")
        )
        async with client(app, raises=True) as http:
            for way in ("", "/related", "/raw", "/stream"):
                with pytest.raises(SchemaError, match=words):
                    await http.get(path + way)
    with pytest.raises(SchemaError, match="Endless"):
        await db.run(explain, Part.select(), list[Endless])


async def test_instances_without_a_depth(db: Database, models: SimpleNamespace) -> None:
    """Of returned instances, what is loaded is sent; the first lazy load is an error."""
    Part = models.Part
    app = make_app(db)

    def loaded() -> Any:
        rows = {row.id: row for row in Part.select().order_by(Part.id)}
        for row in rows.values():
            row.__dict__["parts"] = [each for each in rows.values() if each.whole_id == row.id]
        return rows[1]

    app.get("/loaded", response_model=Endless)(loaded)
    app.get("/dict", response_model=Endless)(lambda: part(1, part(2)))
    app.get("/lazy", response_model=Endless)(lambda: Part.get_by_id(1))
    app.get("/up", response_model=EndlessUp)(lambda: Part.get_by_id(5))
    app.get("/responded")(lambda: respond(Part.get_by_id(1), Endless))
    async with client(app, raises=True) as http:
        found = (await http.get("/loaded")).json()
        for name in ("1", "2", "4", "5", "6", "7", "8", "9"):
            assert found["name"] == name
            found = next(iter(found["parts"]), None)
        assert (await http.get("/dict")).json() == part(1, part(2))
        for path in ("/lazy", "/up", "/responded"):
            with pytest.raises(LazyLoad, match=r"Part\.(parts|whole) was read .*depth\(\)"):
                await http.get(path)


async def test_what_can_not_be_a_depth(db: Database, models: SimpleNamespace) -> None:
    """No levels; a row that can't be None in the end; two fields that would end differently."""
    with pytest.raises(ValueError, match="1 or more; got: 0"):
        depth(0)

    class Never(BaseModel):
        whole: Annotated["Never", depth(2)]

    class Twice(BaseModel):
        parts: Annotated[list["Twice"], depth(1)]
        again: Annotated[list["Twice"], depth(2)] = Field(validation_alias="parts")

    class Wide(BaseModel):
        whole: Annotated["Wide | None", depth(9)]
        parts: Annotated[list["Wide"], depth(9)]

    for type_, words in [
        (Never, r'Never\.whole ends after depth\(2\) .*"Never \| None"'),
        (Twice, r"Twice\.parts and again both read 'parts', but to a stated depth"),
        (Wide, r"more than 1000 relations: its depths multiply"),
    ]:
        with pytest.raises(SchemaError, match=words):
            await db.run(explain, models.Part.select(), type_)


async def test_a_made_schema(db: Database, models: SimpleNamespace) -> None:
    """`schema` takes a depth in relations, of a class that it is making."""
    made = schema(
        models.Part,
        include=[models.Part.name],
        relations={models.Part.parts: Annotated[list["PartMade"], depth(2)]},  # noqa: F821
        name="PartMade",
    )
    assert only(await db.run(every_plan, first(models), made, db)) == THREE_LEVELS


async def test_deeper_than_the_database_can_parse(db: Database, models: SimpleNamespace) -> None:
    """A statement that is too deep for the parser is found out beforehand, and rows are read."""

    class Deep(BaseModel):
        name: str
        parts: Annotated[list["Deep"], depth(70)]

    def read() -> Any:
        plans = Plans(Deep)
        value = plans.load(first(models))
        kind = plans.plan(first(models)).kind
        body = (
            value.body()
            if kind == "json"
            else plans.response.adapter.dump_json(plans.response.adapter.validate_python(value))
        )
        return kind, Deep.model_validate_json(body)

    kind, found = await db.run(read)
    if type(db).__name__ == "MySQLDatabase":
        assert kind == "rows"
    for number in (1, 2, *range(4, CHAIN + 1)):
        assert found.name == str(number)
        found = next(iter(found.parts), None)
    assert found is None
