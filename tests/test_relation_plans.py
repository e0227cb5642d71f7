"""What a relation's query says is done for each parent, whichever plan reads the rows."""

import math
from asyncio import _get_running_loop
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import peewee
import pytest
from peewee import SQL, fn
from psycopg.types.json import Jsonb
from pydantic import BaseModel, create_model, model_validator

from fastapi_peewee import SchemaError, connect, depth, param, prepared, templates
from fastapi_peewee import plans as plans_module
from fastapi_peewee.loading import Plans
from fastapi_peewee.plans import InstancePlan, JsonPlan, RowPlan, plan
from fastapi_peewee.trees import Relation
from tests.apps import client, connected, make_app
from tests.fidelity import connection
from tests.test_loading import answer, read


class ItemOut(BaseModel):
    title: str


class UserName(BaseModel):
    name: str


class CountOut(BaseModel):
    title: str
    total: int


@pytest.fixture
def db(database_url: str) -> Iterator[Any]:
    with connection(database_url) as db:
        yield db


@pytest.fixture
def models(db: Any) -> SimpleNamespace:
    """Ada owns a, a and b, Bob owns a and c, Eve nothing; Ada's tags are red and blue, Bob's blue.

    Of Ada's tags blue is the first by `place`. The link table has no names for its back-references.
    """

    class User(db.Model):
        name = peewee.CharField()

    class Item(db.Model):
        title = peewee.CharField()
        owner = peewee.ForeignKeyField(User, backref="items")

    class Part(db.Model):
        title = peewee.CharField()
        item = peewee.ForeignKeyField(Item, backref="parts")

    class Tag(db.Model):
        title = peewee.CharField()

    class Tagged(db.Model):
        user = peewee.ForeignKeyField(User, backref="+")
        tag = peewee.ForeignKeyField(Tag, backref="+")
        place = peewee.IntegerField()

    field = peewee.ManyToManyField(User, backref="tags", through_model=Tagged)
    Tag._meta.add_field("users", field)
    db.create_tables([User, Item, Part, Tag, Tagged])
    for name in ("Ada", "Bob", "Eve"):
        User.create(name=name)
    for owner, title in [(1, "a"), (1, "a"), (1, "b"), (2, "a"), (2, "c")]:
        Item.create(owner=owner, title=title)
    for item, title in [(5, "p1"), (1, "p2"), (4, "p3")]:
        Part.create(item=item, title=title)
    for title in ("red", "blue"):
        Tag.create(title=title)
    for user, tag, place in [(1, 1, 2), (1, 2, 1), (2, 2, 1)]:
        Tagged.create(user=user, tag=tag, place=place)
    return SimpleNamespace(User=User, Item=Item, Part=Part, Tag=Tag, Tagged=Tagged)


def users_with(**fields: Any) -> Any:
    made: Any = create_model("UserOut", name=(str, ...), **fields)
    return list.__class_getitem__(made)


def by_every_plan(query: Any, type_: Any, db: Any, instances: bool = True) -> Any:
    """What all plans answer with: the chosen one, that of rows and that of instances."""
    plans = Plans(type_)
    best = plans.plan(query)
    rows = plan(query, plans.response, db, in_python="asked for")
    assert isinstance(rows, RowPlan), rows.reason
    found = [best, rows, *([InstancePlan(plans.response, query, "asked for")] * instances)]
    first, *others = [answer(each, plans, db) for each in found]
    for each, other in zip(found[1:], others, strict=True):
        assert other == first, each.kind
    return first


def titles(users: list[dict[str, Any]], key: str = "items") -> list[str]:
    return [" ".join(row["title"] for row in user[key]) for user in users]


QUERIES: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "distinct": (lambda item: item.select(item.title).distinct(), ["a b", "a c", ""]),
    "grouped": (lambda item: item.select(item.title).group_by(item.title), ["a b", "a c", ""]),
    "grouped by the key": (lambda item: item.select().group_by(item.id), ["a a b", "a c", ""]),
    "the groups of some": (
        lambda item: item.select(item.title).group_by(item.title).having(fn.COUNT(item.id) > 1),
        ["a", "", ""],
    ),
    "limited groups": (
        lambda item: (
            item.select(item.title).group_by(item.title).order_by(item.title.desc()).limit(1)
        ),
        ["b", "c", ""],
    ),
    "by the name of what is selected": (
        lambda item: item.select().order_by(SQL("title DESC"), SQL("id")),
        ["b a a", "c a", ""],
    ),
    "by the place of what is selected": (
        lambda item: item.select(item.id, item.title, item.owner).order_by(SQL("2 DESC")),
        ["b a a", "c a", ""],
    ),
}


@pytest.mark.parametrize("name", QUERIES)
def test_rows_of_each_parent(db: Any, models: SimpleNamespace, name: str) -> None:
    """Groups, distinct rows, limits and orders are of one parent's rows, never of all."""
    make, expected = QUERIES[name]
    type_ = users_with(items=(Annotated[list[ItemOut], make(models.Item)], ...))
    users = models.User.select().order_by(models.User.id)
    assert titles(by_every_plan(users, type_, db)) == expected


def test_counts_of_each_parent(db: Any, models: SimpleNamespace) -> None:
    """A group has those rows only that are of the parent."""
    query = models.Item.select(models.Item.title, fn.COUNT(models.Item.id).alias("total"))
    query = query.group_by(models.Item.title).order_by(models.Item.title)
    type_ = users_with(items=(Annotated[list[CountOut], query], ...))
    users = models.User.select().order_by(models.User.id)
    found = [
        [(item["title"], item["total"]) for item in user["items"]]
        for user in by_every_plan(users, type_, db)
    ]
    assert found == [[("a", 2), ("b", 1)], [("a", 1), ("c", 1)], []]


def test_the_first_of_each_title(db: Any, models: SimpleNamespace) -> None:
    """PostgreSQL's DISTINCT ON takes the first of each parent's."""
    if not isinstance(db, peewee.PostgresqlDatabase):
        pytest.skip("DISTINCT ON is PostgreSQL's")
    Item = models.Item
    users = models.User.select().order_by(models.User.id)
    for query in (
        Item.select().distinct(Item.title).order_by(Item.title, Item.id.desc()),
        Item.select().distinct(Item.title),
    ):
        type_ = users_with(items=(Annotated[list[ItemOut], query], ...))
        assert titles(by_every_plan(users, type_, db)) == ["a b", "a c", ""]


def test_one_row_of_many(db: Any, models: SimpleNamespace) -> None:
    """An aggregate without GROUP BY is refused: it would be of all parents' rows, or of none's."""
    Item = models.Item
    for query in (
        Item.select(Item.title, fn.Count(Item.id).alias("total")),
        Item.select(Item.title, fn.COALESCE(fn.SUM(Item.id), 0).alias("total")),
        Item.select(Item.title, (fn.COUNT(Item.id) + 1).cast("integer").alias("total")),
        Item.select(fn.MAX(Item.title).alias("title")),
        Item.select(Item.title).having(fn.COUNT(Item.id) > 1),
    ):
        type_ = users_with(items=(Annotated[list[CountOut], query], ...))
        with pytest.raises(SchemaError, match=r"UserOut\.items .* without GROUP BY"):
            Plans(type_).plan(models.User.select())


def test_what_is_no_aggregate(db: Any, models: SimpleNamespace) -> None:
    """SQLite's MAX of two values, a window's, and one in a subquery are of each row."""
    Item, users = models.Item, models.User.select().order_by(models.User.id)

    def type_of(value: Any) -> Any:
        query = Item.select(Item.title, value.alias("total"))
        return users_with(items=(Annotated[list[CountOut], query], ...))

    values = [fn.COUNT(Item.id).over(partition_by=[Item.owner])]
    if isinstance(db, peewee.SqliteDatabase):
        values.append(fn.MAX(Item.id - Item.id, 0) + 3)
    for value in values:
        [ada, *_] = by_every_plan(users, type_of(value), db)
        assert [item["total"] for item in ada["items"]] == [3, 3, 3]
    inner = Item.alias()
    subquery = inner.select(fn.COUNT(inner.id)).where(inner.owner == Item.owner)
    assert Plans(type_of(subquery)).plan(users).reason  # it is not refused


def test_an_order_by_a_window(db: Any, models: SimpleNamespace) -> None:
    """What a window function sees doesn't depend on the plan."""
    Item = models.Item
    counted = fn.COUNT(Item.id).over(partition_by=[Item.title])
    query = Item.select().order_by(counted.desc(), Item.id.desc()).limit(1)
    type_ = users_with(items=(Annotated[list[ItemOut], query], ...))
    users = models.User.select().order_by(models.User.id)
    assert titles(by_every_plan(users, type_, db)) == ["a", "a", ""]


def test_a_link_table_that_is_joined_already(db: Any, models: SimpleNamespace) -> None:
    """A query of many to many may name the link table: with a join of its own, or without."""
    Tag, Tagged = models.Tag, models.Tagged
    users = models.User.select().order_by(models.User.id)
    for query in (
        Tag.select().join(Tagged).order_by(Tagged.place),
        Tag.select().order_by(Tagged.place),
    ):
        type_ = users_with(tags=(Annotated[list[ItemOut], query], ...))
        found = by_every_plan(users, type_, db, instances=False)
        assert titles(found, "tags") == ["blue red", "blue", ""]
    used = Tagged.select(Tagged.tag).distinct().alias("used")
    query = Tag.select().join(used, on=(used.c.tag_id == Tag.id)).order_by(Tag.title)
    type_ = users_with(tags=(Annotated[list[ItemOut], query], ...))
    found = by_every_plan(users, type_, db, instances=False)
    assert titles(found, "tags") == ["blue red", "blue", ""]
    query = Tag.select(Tag.title).group_by(Tag.title)
    type_ = users_with(tags=(Annotated[list[ItemOut], query], ...))
    assert titles(by_every_plan(users, type_, db, instances=False), "tags") == [
        "blue red",
        "blue",
        "",
    ]


def test_a_link_table_without_a_back_reference(db: Any, models: SimpleNamespace) -> None:
    """Where Peewee would read all rows for a validator, a relation's query isn't left out."""
    Tag, User = models.Tag, models.User
    some: Any = Annotated[list[ItemOut], Tag.select().where(Tag.title != "red")]

    class Whole(BaseModel):
        name: str
        tags: some

        @model_validator(mode="after")
        def same(self) -> "Whole":
            return self

    class Bare(BaseModel):
        name: str
        tags: list[ItemOut]

    query = User.select().where(User.name == "Ada")
    plans = Plans(list[Whole])
    assert plans.plan(query).kind == "instances"
    with pytest.raises(SchemaError, match=r"^tags has a query .*Tagged\.user.* backref '\+'"):
        plans.load(query)
    plans = Plans(Bare)
    assert titles([read(plans.load(query.get()), plans)], "tags") == ["red blue"]


def test_an_alias_on_two_levels(db: Any, models: SimpleNamespace) -> None:
    """The rows below a row are that row's, also where both queries call their table the same."""
    items = models.Item.alias("x").select()
    below = models.Part.alias("x").select()

    class PartOut(BaseModel):
        title: str

    class WithParts(BaseModel):
        title: str
        parts: Annotated[list[PartOut], below]

    type_ = users_with(items=(Annotated[list[WithParts], items], ...))
    users = models.User.select().where(models.User.name == "Bob")
    [bob] = by_every_plan(users, type_, db)
    assert titles(bob["items"], "parts") == ["p3", "p1"]


def test_one_query_on_many_levels(db: Any) -> None:
    """A relation to the same class may have a query with an alias."""

    class Node(db.Model):
        title = peewee.CharField()
        above = peewee.ForeignKeyField("self", null=True, backref="below")

    db.create_tables([Node])
    for above, title in [(None, "a"), (1, "b"), (2, "c"), (1, "d")]:
        Node.create(above=above, title=title)
    alias = Node.alias("n")

    class NodeOut(BaseModel):
        title: str
        below: Annotated[list["NodeOut"], alias.select(), depth(3)]

    NodeOut.model_rebuild(_types_namespace={"NodeOut": NodeOut, "alias": alias, "depth": depth})
    [top] = by_every_plan(Node.select().where(Node.above.is_null()), list[NodeOut], db)
    assert titles([top, *top["below"]], "below") == ["b d", "c", ""]


def test_keys_that_are_one_to_the_database(db: Any) -> None:
    """A row that refers to `ada` as `ADA`, where the database doesn't mind, is found from both."""
    if isinstance(db, peewee.PostgresqlDatabase):
        pytest.skip("such keys are two to PostgreSQL")
    sqlite = isinstance(db, peewee.SqliteDatabase)
    collated = {"constraints": [SQL("COLLATE NOCASE")]} if sqlite else {}

    class User(db.Model):
        name = peewee.CharField(primary_key=True, **collated)

    class Item(db.Model):
        title = peewee.CharField()
        owner = peewee.ForeignKeyField(User, backref="items", null=True, **collated)

    db.create_tables([User, Item])
    User.create(name="ada", force_insert=True)
    for title, owner in [("a", "ada"), ("b", "ADA"), ("c", "Ada"), ("d", None)]:
        Item.create(title=title, owner=owner)

    class UserOut(BaseModel):
        name: str

    class Owned(ItemOut):
        owner: UserOut | None

    assert titles(by_every_plan(User.select(), users_with(items=(list[ItemOut], ...)), db)) == [
        "a b c"
    ]
    found = by_every_plan(Item.select().order_by(Item.id), list[Owned], db)
    assert [item["owner"] and item["owner"]["name"] for item in found] == ["ada"] * 3 + [None]


def test_one_odd_key_among_many(mysql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for who is meant by a key costs some statements, not one for each parent."""
    with connection(mysql_url) as db:

        class User(db.Model):
            name = peewee.CharField(primary_key=True)

        class Item(db.Model):
            title = peewee.CharField()
            owner = peewee.ForeignKeyField(User, backref="items")

        db.create_tables([User, Item])
        User.insert_many([{"name": f"u{number:03}"} for number in range(500)]).execute()
        Item.insert_many(
            [{"title": "a", "owner": f"u{number:03}"} for number in range(500)]
        ).execute()
        Item.create(title="b", owner="U007")
        plans = Plans(users_with(items=(list[ItemOut], ...)))
        query = User.select().order_by(User.name)
        seen: list[str] = []
        execute = db.execute_sql

        def noting(sql: str, params: Any = None) -> Any:
            seen.append(sql)
            return execute(sql, params)

        monkeypatch.setattr(db, "execute_sql", noting)
        found = answer(plan(query, plans.response, db, in_python="asked for"), plans, db)
        assert titles(found[5:9]) == ["a", "a", "a b", "a"]
        assert len([sql for sql in seen if sql.startswith("SELECT")]) < 25


def test_an_instance_whose_key_is_a_text(db: Any, models: SimpleNamespace) -> None:
    """Instances that hold their keys as they came in have their rows."""
    plans = Plans(create_model("Out", items=(list[ItemOut], ...)))
    assert titles([read(plans.load(models.User(id="2")), plans)]) == ["a c"]
    owned = create_model("Owned", owner=(create_model("Owner", name=(str, ...)), ...))
    plans = Plans(owned)
    assert read(plans.load(models.Item(owner="2")), plans) == {"owner": {"name": "Bob"}}


def test_rows_of_which_the_parent_s_key_is_all(db: Any, models: SimpleNamespace) -> None:
    """Of a list's rows nothing may be wanted but what they belong to."""
    keys: Any = create_model("Keys", owner_id=(int, ...))
    users = models.User.select().order_by(models.User.id)
    found = by_every_plan(users, users_with(items=(list[keys], ...)), db)
    assert [[item["owner_id"] for item in user["items"]] for user in found] == [
        [1] * 3,
        [2] * 2,
        [],
    ]
    both: Any = create_model("Both", owner_id=(int, ...), title=(str, ...))
    found = by_every_plan(users, users_with(items=(list[both], ...)), db)
    assert [[item["owner_id"] for item in user["items"]] for user in found] == [
        [1] * 3,
        [2] * 2,
        [],
    ]


# Statements are kept. What may be another text for the next request isn't, or not without asking.

VISIBLE: ContextVar[str] = ContextVar("visible", default="")


def answers(plans: Plans, query: Callable[[], Any], visible: Iterable[str]) -> list[Any]:
    """What is answered to these users, one after the other, by one statement that is kept."""
    found = []
    for name in visible:
        VISIBLE.set(name)
        found.append(read(plans.load(query()), plans))
    return found


class Odd:
    """As arrays do, it has no truth value for `==`."""

    def __eq__(self, other: object) -> Any:
        raise ValueError("The truth value of an array is ambiguous.")

    __hash__ = None  # type: ignore[assignment]


class Visible(peewee.Node):
    """A node of the program's own, which is another value for each request."""

    def __sql__(self, ctx: Any) -> Any:
        return ctx.value(VISIBLE.get())


def looked_up(_: Any) -> Any:
    return VISIBLE.get()


SEEN_BY_ONE: dict[str, Callable[[Any], Any]] = {
    "a node": lambda item: item.select().where(item.title == Visible()),
    "a converter": lambda item: item.select().where(
        item.title == peewee.Value(None, converter=looked_up)
    ),
}


@pytest.mark.parametrize("how", ["select()", *SEEN_BY_ONE])
def test_rows_that_not_everybody_may_see(
    db: Any, models: SimpleNamespace, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks gets what a relation's query says for them, though others asked before."""
    items: Any = list[ItemOut]
    if how == "select()":
        own_select(
            monkeypatch,
            models.Item,
            lambda query: query.where(models.Item.title == VISIBLE.get()),
        )
    else:
        items = Annotated[items, SEEN_BY_ONE[how](models.Item)]
    wanted = users_with(items=(items, ...))
    by_one, ordered = models.User.name == "Ada", models.User.select().order_by(models.User.id)
    expected = {"a": "a a", "b": "b", "": ""}
    for query in (lambda: ordered.where(by_one), lambda: ordered.where(models.User.id << [1, 1])):
        found = answers(Plans(wanted), query, "abab")
        assert [titles(each) for each in found] == [[expected[name]] for name in "abab"]
    read_users = prepared(ordered.where(models.User.name == param("name")), wanted)
    found = answers(Plans(wanted), lambda: read_users(name="Ada"), ["a", "b", "", "a"])
    assert [titles(each) for each in found] == [["a a"], ["b"], [""], ["a a"]]


def test_a_query_that_is_the_same_for_all_is_not_asked_again(
    db: Any, models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peewee's own `select()`, and a query of Peewee's own nodes, cost later requests nothing."""
    item = models.Item
    some = item.select().where(item.title != "b").order_by(item.title.desc()).limit(1)
    plans = Plans(users_with(items=(Annotated[list[ItemOut], some], ...)))

    def by_name(name: str) -> Any:
        return models.User.select().where(models.User.name == name)

    assert titles(read(plans.load(by_name("Ada")), plans)) == ["a"]

    def refuse(_: Any) -> Any:
        raise AssertionError("the relation's query was made anew")

    monkeypatch.setattr(Relation, "children", refuse)
    assert titles(read(plans.load(by_name("Bob")), plans)) == ["c"]


def renamed(db: Any, model: Any) -> None:
    """The model's table is another one from now on, which is empty."""
    table, other = model._meta.table_name, f"{model._meta.table_name}_2"
    quoted = f"`{table}`" if isinstance(db, peewee.MySQLDatabase) else f'"{table}"'
    db.execute_sql(f"CREATE TABLE {other} AS SELECT * FROM {quoted} WHERE 1 = 0")
    model._meta.set_table_name(other)


@pytest.mark.parametrize("name", ["Item", "Tagged", "Part"])
def test_a_table_that_is_given_another_name(db: Any, models: SimpleNamespace, name: str) -> None:
    """The rows are those of the table that the model has now: the relation's, a link table's, or
    one that a relation's query names."""
    item, ada = models.Item, models.User.select().where(models.User.name == "Ada")
    key, rows, before = {
        "Item": ("items", list[ItemOut], "a a b"),
        "Tagged": ("tags", list[ItemOut], "red blue"),
        "Part": ("items", Annotated[list[ItemOut], item.select().join(models.Part)], "a"),
    }[name]
    plans = Plans(users_with(**{key: (rows, ...)}))
    assert isinstance(plans.plan(ada), JsonPlan)
    for expected in (before, ""):
        for _ in range(2):
            assert titles(read(plans.load(ada), plans), key) == [expected]
        if expected:
            renamed(db, getattr(models, name))


def test_a_prepared_query_of_a_table_that_is_given_another_name(
    db: Any, models: SimpleNamespace
) -> None:
    """It reads from the table that the model has now."""
    type_ = users_with()
    ada = prepared(models.User.select().where(models.User.name == param("name")), type_)
    plans = Plans(type_)
    for expected in ([{"name": "Ada"}], []):
        for _ in range(2):
            assert read(plans.load(ada(name="Ada")), plans) == expected
        if expected:
            renamed(db, models.User)


def own_select(monkeypatch: pytest.MonkeyPatch, model: Any, change: Callable[[Any], Any]) -> None:
    """The model's `select()` is the program's own: Peewee's, changed in some way."""
    theirs = model.select
    mine = classmethod(lambda _, *fields: change(theirs(*fields)))
    monkeypatch.setattr(model, "select", mine)


def test_rows_whose_select_is_built_in_another_way_each_time(
    db: Any, models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request is answered by the plan that its own query allows, limits included."""

    def change(query: Any) -> Any:
        if VISIBLE.get() == "odd":  # without a name of its own, so it can't be wrapped
            return query.select_extend(fn.UPPER(models.Item.title))
        return query.limit(1) if VISIBLE.get() == "one" else query

    own_select(monkeypatch, models.Item, change)

    def users() -> Any:
        return models.User.select().order_by(models.User.id)

    expected = {"odd": ["a a b", "a c", ""], "": ["a a b", "a c", ""], "one": ["a", "a", ""]}
    for names in (["odd", "", "one", "odd", ""], ["", "one", "odd"]):
        type_ = users_with(items=(list[ItemOut], ...))
        found = answers(Plans(type_), users, names)
        assert [titles(each) for each in found] == [expected[name] for name in names]
        VISIBLE.set("one")
        in_rows = plan(users(), Plans(type_).response, db, in_python="asked for")
        assert titles(answer(in_rows, Plans(type_), db)) == expected["one"]


def test_a_row_that_the_select_of_its_model_hides(
    db: Any, models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is null in each plan, and isn't looked for again."""
    own_select(monkeypatch, models.User, lambda query: query.where(models.User.name != "Ada"))
    owner: Any = create_model("Owner", name=(str, ...))
    out: Any = create_model("Out", title=(str, ...), owner=(owner | None, ...))
    items = models.Item.select().where(models.Item.title != "a").order_by(models.Item.id)
    expected = [{"title": "b", "owner": None}, {"title": "c", "owner": {"name": "Bob"}}]
    assert by_every_plan(items, list[out], db) == expected
    plans = Plans(list[out])
    assert read(plans.load(list(items)), plans) == expected


def test_rows_that_are_there_already(db: Any, models: SimpleNamespace) -> None:
    """What a join has selected of the other row, one that isn't stored, and one that is gone, are
    sent as they are, though they lack a column that can't be read."""

    class Owner(BaseModel):
        name: str
        id: int | None = None

    class Owned(BaseModel):
        title: str
        owner: Owner | None

    user, item = models.User, models.Item
    joined = item.select(item, user.name).join(user).where(item.title == "c")
    given = item.get(item.title == "c")
    given.owner = user(id=77, name="Gone")
    plans = Plans(Owned)
    for returned, owner in (
        (joined.get(), {"name": "Bob", "id": None}),
        (given, {"name": "Gone", "id": 77}),
        (item(title="c", owner=user(name="New")), {"name": "New", "id": None}),
    ):
        assert read(plans.load(returned), plans) == {"title": "c", "owner": owner}


def test_a_select_that_is_another_one_meanwhile(
    db: Any, models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement isn't kept if what it is made of changes while it is made."""
    turns = cycle("ab")
    own_select(
        monkeypatch, models.Item, lambda query: query.where(models.Item.title == next(turns))
    )
    plans = Plans(users_with(items=(list[ItemOut], ...)))
    for _ in range(3):
        assert isinstance(plans.plan(models.User.select()), JsonPlan)
        plans.load(models.User.select())
    assert not plans._compiled


def test_a_table_that_is_renamed_while_a_statement_is_made(
    db: Any, models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It isn't kept, and the next one reads from the table that there is now."""
    names = iter(["Item"])

    def renaming(*args: Any) -> Any:
        template = templates.compile_template(*args)
        for name in names:
            renamed(db, getattr(models, name))
        return template

    monkeypatch.setattr(plans_module, "compile_template", renaming)
    plans = Plans(users_with(items=(list[ItemOut], ...)))
    ada = models.User.select().where(models.User.name == "Ada")
    assert titles(read(plans.load(ada), plans)) == ["a a b"]
    assert not plans._compiled
    for _ in range(2):
        assert titles(read(plans.load(ada), plans)) == [""]
    assert plans._compiled


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([1, "a"], [1, "a"], True),
        ([1], [True], False),
        ([1], [1.0], False),
        ([1], [1, 2], False),
        ([math.nan], [float("nan")], False),
        ([Odd()], [Odd()], False),
        ([Jsonb({"a": [1]})], [Jsonb({"a": [1]})], True),
        ([Jsonb({"a": [1]})], [Jsonb({"a": [2]})], False),
    ],
)
def test_parameters_that_are_the_same(one: list[Any], other: list[Any], same: bool) -> None:
    """To a database 1 and True are two things. Where nobody can say, they aren't the same."""
    assert plans_module._equal(one, other) is same


def test_a_relation_in_another_database(db: Any, models: SimpleNamespace, tmp_path: Path) -> None:
    """It is refused with words, by every plan, and not read from a table of that name here."""
    other = connect(f"sqlite:///{tmp_path}/other.db")
    models.Item.bind(other, bind_refs=False, bind_backrefs=False)
    plans = Plans(users_with(items=(list[ItemOut], ...)))
    for given in (models.User.select(), list(models.User.select())):
        with pytest.raises(SchemaError, match="items: Item is in another database than User"):
            plans.load(given)
    owned = Plans(create_model("Owned", owner=(create_model("Owner", name=(str, ...)), ...)))
    with pytest.raises(SchemaError, match="owner: User is in another database than Item"):
        owned.load(models.Item(title="a", owner=1))

    class OwnedOrNot(BaseModel):
        title: str
        owner: UserName | None

    either = Plans(OwnedOrNot)  # nothing has to be read for these
    assert read(either.load(models.Item(title="a")), either) == {"title": "a", "owner": None}
    unsaved = models.Item(title="a", owner=models.User(name="Zoe"))
    assert read(either.load(unsaved), either) == {"title": "a", "owner": {"name": "Zoe"}}
    loaded = models.Item(title="a", owner=models.User.get())
    assert read(owned.load(loaded), owned) == {"owner": {"name": "Ada"}}
    proxy = peewee.DatabaseProxy()
    proxy.initialize(db)
    models.Item.bind(proxy, bind_refs=False, bind_backrefs=False)
    assert titles(read(plans.load(models.User.select()), plans)) == ["a a b", "a c", ""]


async def test_rows_that_not_everybody_may_see_of_an_async_endpoint(database_url: str) -> None:
    """The program's own `select()` is asked in a thread, not on the event loop."""
    reads = {"inline_reads": 30.0} if database_url.startswith("sqlite") else {}
    async with connected(database_url, **reads) as db:

        class User(db.Model):
            name = peewee.CharField()

        class Item(db.Model):
            title = peewee.CharField()
            owner = peewee.ForeignKeyField(User, backref="items")

            @classmethod
            def select(cls, *fields: Any) -> Any:
                assert _get_running_loop() is None
                return super().select(*fields).where(cls.title == VISIBLE.get())

        await db.acreate_tables([User, Item])
        ada = await User.acreate(name="Ada")
        for title in ("a", "b"):
            await Item.acreate(title=title, owner=ada)
        app, type_ = make_app(db), users_with(items=(list[ItemOut], ...))
        everybody = prepared(User.select(), type_)

        @app.get("/{name}", response_model=type_)
        async def users(name: str, *, kept: bool) -> Any:
            VISIBLE.set(name)
            return everybody() if kept else User.select()

        async with client(app, raises=True) as http:
            for kept in (False, True):
                for name in "abab":
                    found = (await http.get(f"/{name}", params={"kept": kept})).json()
                    assert titles(found) == [name]
