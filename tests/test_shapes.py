"""Shapes: a template binds the values of every query with its key, and of no other."""

import datetime
import gc
import random
import uuid
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import peewee
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peewee import JOIN, SQL, Case, Cast, EnclosedNodeList, Value, ValuesList, Window, fn

from fastapi_peewee import templates
from fastapi_peewee.shapes import Shape, Tag, param, shape_of, shape_of_write
from fastapi_peewee.templates import Template, compile_template, with_values

SQLITE = peewee.SqliteDatabase(None)
POSTGRES = peewee.PostgresqlDatabase(None)
MYSQL = peewee.MySQLDatabase(None)
DATABASES = [SQLITE, POSTGRES, MYSQL]


class Base(peewee.Model):
    class Meta:
        database = SQLITE


class User(Base):
    name = peewee.CharField(unique=True)
    age = peewee.IntegerField(null=True)
    active = peewee.BooleanField(default=True)
    joined = peewee.DateTimeField(null=True)
    manager = peewee.ForeignKeyField("self", null=True, backref="staff")


class Label(Base):
    id = peewee.UUIDField(primary_key=True)
    text = peewee.TextField()
    data = peewee.BlobField(null=True)


class Item(Base):
    owner = peewee.ForeignKeyField(User, backref="items")
    title = peewee.CharField(column_name="headline")
    price = peewee.DecimalField(null=True)
    document = peewee.JSONField(null=True)


class ItemLabel(Base):
    item = peewee.ForeignKeyField(Item, backref="labels")
    label = peewee.ForeignKeyField(Label, backref="items")
    weight = peewee.FloatField(default=1.0)

    class Meta:
        schema = "other"


class Note(Base):
    author = peewee.ForeignKeyField(User, field="name", backref="notes")


class Membership(Base):
    user = peewee.ForeignKeyField(User)
    group = peewee.CharField()

    class Meta:
        primary_key = peewee.CompositeKey("user", "group")


def taken(query: Any) -> Shape:
    shape = shape_of(query)
    assert shape is not None
    return shape


def compiled(query: Any, database: Any = SQLITE) -> Template:
    template = compile_template(query, taken(query), database)
    assert template is not None
    return template


def exactly(parameters: Any) -> list[Any]:
    """1, 1.0 and True are equal; as parameters they are not the same."""
    return [(type(parameter), parameter) for parameter in parameters]


def assert_binds(template: Template, query: Any, database: Any = SQLITE) -> None:
    sql, parameters = database.get_sql_context().parse(query)
    bound = template.bind(taken(query).values)
    assert bound is not None
    assert (template.sql, exactly(bound)) == (sql, exactly(parameters))


#: Each makes a query of two values; the values differ in value only.
Make = Callable[[int, str], Any]


def recursive(i: int, s: str) -> Any:
    base = User.select(User.id, User.manager, Value(i).alias("depth")).where(User.name == s)
    cte = base.cte("chain", recursive=True, columns=("id", "manager_id", "depth"))
    parent = User.alias()
    step = parent.select(parent.id, parent.manager, cte.c.depth + i).join(
        cte, on=(parent.id == cte.c.manager_id)
    )
    cte = cte.union_all(step)
    return cte.select_from(cte.c.id, cte.c.depth).where(cte.c.depth < i).order_by(cte.c.depth)


def lateral(i: int, s: str) -> Any:
    newest = (
        Item.select(Item.title).where((Item.owner == User.id) & (Item.title != s)).limit(i)
    ).alias("newest")
    return User.select(User.name, newest.c.headline).join(newest, JOIN.LEFT_LATERAL, on=True)


def windows(i: int, s: str) -> Any:
    window = Window(
        partition_by=[User.active, User.age + i], order_by=[User.id.desc()], alias="win"
    )
    return (
        User.select(fn.SUM(User.age + i).over(window), fn.RANK().over(order_by=[User.name != s]))
        .window(window)
        .where(User.age > i)
    )


def aliased(i: int, s: str) -> Any:
    boss, other = User.alias("boss"), User.alias()
    return (
        User.select(User.name, boss.name, other.age)
        .join(boss, on=(User.manager == boss.id))
        .switch(User)
        .join(other, JOIN.LEFT_OUTER, on=((other.id == User.id) & (other.age > i)))
        .where((boss.name == s) | (other.manager == i))
    )


def values_list(i: int, s: str) -> Any:
    rows = ValuesList([(i, s), (i + 1, "b")], columns=("k", "v"), alias="vals")
    return User.select(User.id, rows.c.v).join(rows, on=(rows.c.k == User.id))


def common(i: int, s: str) -> Any:
    cte = Item.select(Item.owner).where(Item.price > i).cte("rich", columns=["owner"])
    return User.select().join(cte, on=(User.id == cte.c.owner)).where(User.name == s).with_cte(cte)


QUERIES: dict[str, Make] = {
    "two conditions": lambda i, s: User.select().where(User.id == i, User.name == s),
    "all operators": lambda i, s: User.select().where(
        (User.age + i - 1 > 2 * i)
        | ~(User.name % s)
        | User.name.regexp(s)
        | User.age.between(i, i + 5)
        | User.age.is_null()
        | (User.age.bin_and(i) != 0)
        | (i < User.age)
        | User.name.in_([s, "x"])
        | User.age.not_in([])
        | User.name.contains(s)
        | (User.name + s == s + User.name)
        | (User.active == bool(i))
    ),
    "a list": lambda i, s: User.select().where(User.id << list(range(i, i + 12)), User.name << {s}),
    "a tuple": lambda i, s: User.select().where(
        EnclosedNodeList((User.id, User.name)).in_([(i, s), (2, "b")])
    ),
    "an instance": lambda i, s: Item.select().where(Item.owner == User(id=i), Item.title == s),
    "instances": lambda i, s: Item.select().where(Item.owner.in_([User(id=i), User(id=i + 1), i])),
    "an instance elsewhere": lambda i, s: Item.select().where(Item.id == User(id=i)),
    "an instance in a function": lambda i, s: Item.select(fn.COALESCE(User(id=i), s)),
    "an instance of another model": lambda i, s: Item.select().where(Item.owner == Item(id=i)),
    "an instance by another column": lambda i, s: Note.select().where(
        (Note.author == User(id=i, name=s)) | (Note.id == User(id=i, name=s))
    ),
    "a backref": lambda i, s: User(id=i).items.where(Item.title == s),
    "a uuid": lambda i, s: ItemLabel.select().where(
        ItemLabel.label == Label(id=uuid.UUID(int=i)), ItemLabel.label != str(uuid.UUID(int=i))
    ),
    "converters": lambda i, s: Label.select().where(
        (Label.data == s.encode()) | (Label.text == i) | (Label.id == uuid.UUID(int=i))
    ),
    "values": lambda i, s: User.select(Value(i), Value([i, s]), Value((i, s), unpack=False)).where(
        (User.name == Value(i, converter=False)) & (User.age == Value(s, converter=len))
    ),
    "joins": lambda i, s: (
        Item.select(Item, User)
        .join(User, JOIN.LEFT_OUTER)
        .switch(Item)
        .join(ItemLabel)
        .join(Label)
        .where(User.name == s, ItemLabel.weight > i)
        .order_by(Item.price.desc(), User.name.collate("NOCASE"))
        .limit(i)
        .offset(i)
    ),
    "aliases": aliased,
    "lateral": lateral,
    "grouped": lambda i, s: (
        Item.select(Item.owner, fn.COUNT(Item.id).alias("n"), fn.SUM(Item.price * i))
        .group_by(Item.owner, Item.price > i)
        .having((fn.COUNT(Item.id) > i) & (fn.MAX(Item.title) != s))
        .order_by(SQL("n"))
    ),
    "select list": lambda i, s: User.select(
        fn.COALESCE(User.age, i).alias("n"), (User.age + i).alias("m"), Value(s)
    ),
    "distinct": lambda i, s: User.select(User.name).distinct().where(User.age > i),
    "functions": lambda i, s: User.select(
        fn.LOWER(s), fn.COUNT(User.id).filter(User.age > i), fn.GROUP_CONCAT(User.name, s)
    ).where(fn.SUBSTR(User.name, i, 2) == fn.UPPER(s)),
    "ordered aggregate": lambda i, s: User.select(
        fn.string_agg(User.name, s).order_by(User.age + i, User.id.desc())
    ),
    "a case": lambda i, s: User.select(
        Case(User.age, ((i, s), (i + 1, "b")), "c").alias("x"), Case(None, ((User.age > i, i),))
    ).where(Case(User.name, [(s, 1)], 0) == i),
    "a cast": lambda i, s: User.select(Cast(Value(s), "TEXT"), User.age.cast("TEXT")).where(
        User.age.cast("TEXT") == i
    ),
    "raw SQL": lambda i, s: User.select().where(SQL("age > ? AND name = ?", [i, s])),
    "a subquery": lambda i, s: User.select().where(
        User.id.in_(Item.select(Item.owner).where(Item.price > i)),
        fn.EXISTS(Item.select().where(Item.owner == User.id, Item.title == s)),
    ),
    "a whole subquery": lambda i, s: ItemLabel.select().where(
        ItemLabel.item << Item.select().where(Item.price > i)
    ),
    "from a subquery": lambda i, s: (
        lambda inner: inner.select_from(inner.c.name, fn.COUNT(inner.c.name)).where(inner.c.n < i)
    )(User.select(User.name, (User.age + i).alias("n")).where(User.name != s)),
    "a scalar subquery": lambda i, s: User.select(
        User.name,
        Item.select(fn.COUNT(Item.id)).where(Item.owner == User.id, Item.price > i).alias("n"),
    ),
    "compound": lambda i, s: (
        (
            User.select(User.name).where(User.age > i)
            | Label.select(Label.text).where(Label.text == s)
            | Item.select(Item.title).where(Item.price < i)
        )
        .order_by(SQL("1"))
        .limit(i)
    ),
    "compound of limits": lambda i, s: (
        User.select(User.name).limit(i)
        + (User.select(User.name).where(User.name == s).order_by(User.id).limit(i) - User.select())
    ),
    "a common table": common,
    "recursive": recursive,
    "windows": windows,
    "values list": values_list,
    "none": lambda i, s: User.select(fn.COALESCE(None, i or None), Value(None)).where(
        peewee.Expression(i or None, "IS", User.age)
        | peewee.Expression(User.age, "<", i or None)
        | peewee.Expression(User.age, "IS NOT", None)
        | peewee.Tuple(i or None, None).in_([None, i or None, s])
    ),
    "offset alone": lambda i, s: User.select().where(User.id > i).offset(i),
    "nulls": lambda i, s: User.select().order_by((User.age + i).asc(nulls="last"), User.name == s),
    "limit 0": lambda i, s: User.select().where(User.active == True).limit(1).offset(0),  # noqa: E712
    "aliased expressions": lambda i, s: (
        lambda n: User.select(n).where(n > i).order_by(n.desc(), n)
    )((User.age + i).alias("n")),
    "a shared condition": lambda i, s: (lambda c: User.select().where(c | (c & c)))(User.age > i),
    "tables": lambda i, s: (
        lambda t: t.select(t.c.a, t.c.b).where(t.c.a == i, t.c.b == s).order_by(t.c.a)
    )(peewee.Table("t").alias("x")),
    "joined tables": lambda i, s: (
        lambda a, b: a.select(a.c.x).join(b, on=(a.c.x == b.c.y)).where(b.c.z == i)
    )(peewee.Table("a"), peewee.Table("b", schema="s")),
    "a json document": lambda i, s: Item.select().where(Item.document == {"a": i, "b": [s]}),
    "by kwargs": lambda i, s: Item.filter(owner__name=s, price__gt=i, owner__manager__age=i),
}
ON_POSTGRES_ALONE: dict[str, Make] = {
    "for update": lambda i, s: User.select().where(User.id == i).for_update(of=User, nowait=True),
    "distinct on": lambda i, s: User.select(User.name).distinct(User.age + i, User.name),
}


@pytest.mark.parametrize("database", DATABASES, ids=lambda database: type(database).__name__)
@pytest.mark.parametrize("name", QUERIES)
def test_a_template_binds_the_values_of_another_query(name: str, database: Any) -> None:
    """What is compiled of one query gives exactly the SQL and parameters of the next."""
    make = QUERIES[name]
    template = compiled(make(1, "a"), database)
    assert taken(make(1, "a")).key == taken(make(7, "b")).key
    assert_binds(template, make(7, "b"), database)
    assert_binds(template, make(0, ""), database)
    assert_binds(compiled(make(0, "1"), database), make(1, "0"), database)


@pytest.mark.parametrize("name", ON_POSTGRES_ALONE)
def test_what_only_postgres_has_is_cached_too(name: str) -> None:
    """FOR UPDATE and DISTINCT ON have shapes as everything else."""
    make = ON_POSTGRES_ALONE[name]
    assert_binds(compiled(make(1, "a"), POSTGRES), make(7, "b"), POSTGRES)


def test_no_two_of_these_queries_have_one_key() -> None:
    """Queries that differ in more than values have different keys."""
    makes = {**QUERIES, **ON_POSTGRES_ALONE}
    keys = [taken(make(1, "a")).key for make in makes.values()]
    assert len(set(keys)) == len(makes)


@pytest.mark.parametrize(
    "nodes",
    [
        (fn.F([1, 2], 3), fn.F([1], 2, 3), fn.F([1, 2, 3]), fn.F(1, 2, 3), fn.F([], 1, 2, 3)),
        (fn.F(fn.F(1), 2), fn.F(fn.F(1, 2)), fn.F(fn.F(), 1, 2)),
        (SQL("?"), SQL("?", [1]), SQL("??", [1, 2])),
        (User.age == 1, User.age == None, User.age.is_null(False), User.age != 1),  # noqa: E711
        (Case(None, [(1, 2)]), Case(1, [(2, 3)]), Case(None, [(1, 2)], 3), Case(1, [(2, 3)], 4)),
        (Value(1), Value([1]), Value(1, False), Value(1, str), Value([1], False)),
        (fn.F(1).filter(User.age), fn.F(1).order_by(User.age), fn.F(1, User.age)),
        (User.age + 1 + 2, User.age + (1 + User.age), peewee.NodeList((User.age, 1, 2))),
    ],
    ids=["lists", "calls", "raw", "null", "cases", "values", "clauses", "sums"],
)
def test_near_misses(nodes: tuple[Any, ...]) -> None:
    """Nodes with the same values in another arrangement have other keys."""
    keys = {taken(User.select().where(node)).key for node in nodes}
    assert len(keys) == len(nodes)
    for one in nodes:
        template = compiled(User.select().where(one))
        assert template.sql == User.select().where(one).sql()[0]


def window(order_by: Any = None, **options: Any) -> Any:
    window = Window(order_by=[User.id], **options)
    return User.select(fn.RANK().over(window), fn.SUM(1).over(order_by=order_by)).window(window)


def frame(**options: Any) -> Any:
    return User.select(fn.SUM(User.age).over(order_by=[User.id], **options))


def one_window(inline: bool) -> Any:
    return peewee.Select((User,), (SQL("1"),)).window(Window(order_by=[User.id], _inline=inline))


def locked(**options: Any) -> Any:
    return User.select().for_update("FOR UPDATE", **options)


def listed(*columns: str) -> Any:
    rows = ValuesList([(1, 2)], columns=columns, alias="v")
    return rows.select(SQL("*"))


def with_columns(*columns: str) -> Any:
    cte = User.select(User.id, User.age).cte("x", columns=columns)
    return cte.select_from(SQL("*"))


def two_tables(left: int, right: int, first: int) -> Any:
    tables = peewee.Table("a").alias("x"), peewee.Table("b").alias("y")
    on = tables[left].c.i == tables[right].c.j
    return tables[first].join(tables[1 - first], on=on).select(*(table.c.i for table in tables))


def two_subqueries(left: int, right: int) -> Any:
    inner = [peewee.Table("a").select(SQL("1")) for _ in range(2)]
    return peewee.Select(inner, (SQL("1"),)).where(inner[left].c.i == inner[right].c.i)


@pytest.mark.parametrize(
    "queries",
    [
        [window(alias="w"), window(alias="v"), window([User.id], alias="w")],
        [one_window(True), one_window(False)],
        [
            frame(),
            *(
                frame(start=Window.preceding(n), frame_type=t)
                for n in (1, 2)
                for t in (None, "RANGE")
            ),
            frame(start=Window.preceding(1), end=Window.CURRENT_ROW),
            frame(start=Window.preceding(1), exclude=Window.TIES),
        ],
        [locked(), locked(nowait=True), locked(skip_locked=True), locked(of=User)],
        [listed("a", "b"), listed("b", "a"), listed("a")],
        [with_columns("a", "b"), with_columns("b", "a"), with_columns("a")],
        [two_tables(*numbers) for numbers in ((0, 1, 0), (1, 0, 0), (0, 0, 0), (0, 1, 1))],
        [two_subqueries(*numbers) for numbers in ((0, 1), (0, 0), (1, 0))],
        [User.select().where(node == "1") for node in (~User.age, (~User.age).coerce(False))],
    ],
    ids=["windows", "inline", "frames", "locks", "values", "tables", "joins", "subqueries", "not"],
)
def test_near_misses_of_queries(queries: list[Any]) -> None:
    """What differs in a window, a lock, a source or its columns only has another key."""
    made = {}
    for query in queries:
        sql, parameters = POSTGRES.get_sql_context().parse(query)
        made[taken(query).key] = sql, repr(exactly(parameters))
        assert_binds(compiled(query, POSTGRES), query, POSTGRES)
    assert len(made) == len(queries)
    assert len(set(made.values())) == len(queries)


def with_list(query: Any, *items: Any) -> Any:
    clone = query.clone()
    clone._returning = list(items)
    return clone


def test_a_clone_may_select_something_else() -> None:
    """Values that the clone's select list doesn't have are left out; the others stay in place."""

    def make(i: int) -> Any:
        n = fn.COALESCE(User.age, i).alias("n")
        return User.select(User, n, (User.age + i + 1)).where(User.id == i + 2).limit(i + 3)

    def only_fields(query: Any) -> Any:
        return with_list(query, User.id.alias("c0"), User.name.alias("c1"))

    def swapped(query: Any) -> Any:
        *_, n, other = query._returning
        return with_list(query, other.alias("c0"), User.id.alias("c1"), n.node.alias("c2"))

    for narrow in (only_fields, swapped):
        first = make(1)
        template = compile_template(narrow(first), taken(first), SQLITE)
        assert template is not None
        second = make(10)
        bound = template.bind(taken(second).values)
        assert (template.sql, bound) == narrow(second).sql()


def test_a_clone_with_values_of_its_own_is_refused() -> None:
    """A value that the query hasn't got has no place in a template of its shape."""
    query = User.select().where(User.id == 1)
    for clone in (
        with_list(query, User.id + 1),
        query.where(User.age == 1),
        query.limit(1),
        User.select(User.id).where(User.id == 1),
    ):
        assert compile_template(clone, taken(query), SQLITE) is None
    assert compile_template(query.limit(SQL("1")), taken(query), SQLITE) is not None


def test_the_same_node_twice_in_a_select_list_is_refused() -> None:
    """Of two items that are one object, a clone doesn't say which of their values it takes."""
    n = User.age + 1
    query = User.select(n, n.alias("n"))
    assert compile_template(with_list(query, n), taken(query), SQLITE) is None
    assert_binds(compiled(query), query)


def prepared(query: Any, database: Any = SQLITE) -> Template:
    shape = shape_of(query, parameters=True)
    assert shape is not None
    template = compile_template(query, shape, database)
    assert template is not None
    return template


def test_parameters_are_bound_by_name() -> None:
    """A `param` becomes what a plain value in its place would."""

    def make(owner: Any, label: Any, title: Any, i: Any) -> Any:
        return (
            Item.select(Item.title, fn.COALESCE(Item.price, i))
            .join(ItemLabel)
            .where(
                (Item.owner == owner) | (Item.owner << [owner, 5]),
                ItemLabel.label == label,
                Item.title == fn.LOWER(title),
                SQL("x > ?", [i]),
                Item.price > 3,
            )
            .limit(i)
            .offset(i)
        )

    query = make(param("owner"), param("label"), param("title"), param("i"))
    template = prepared(query)
    assert template.names == {"owner", "label", "title", "i"}
    for owner in (7, "7", User(id=7)):
        named = {"owner": owner, "label": uuid.UUID(int=1), "title": "t", "i": 2}
        sql, parameters = make(**named).sql()
        bound = template.bind_named(named)
        assert bound is not None
        assert (template.sql, exactly(bound)) == (sql, exactly(parameters))
        assert with_values(query, named).sql() == (sql, parameters)


@pytest.mark.parametrize("name", QUERIES)
def test_parameters_are_bound_wherever_a_value_can_be(name: str) -> None:
    """The same holds for any query: template and copy give what the plain query does."""

    def named(node: Any) -> Any:  # a `param` in the place of every number of the query
        if type(node) is not int or isinstance(node, bool):
            return node
        numbers.append(node)
        return param(f"p{len(numbers)}")

    numbers: list[int] = []
    plain = QUERIES[name](3, "a")
    query = templates.copied(plain, named)
    values = {f"p{index}": number for index, number in enumerate(numbers, 1)}
    assert taken(with_values(query, values)).key == taken(plain).key
    assert with_values(query, values).sql() == plain.sql()
    template = prepared(query)
    assert template.names == values.keys()
    bound = template.bind_named(values)
    assert bound is not None
    assert (template.sql, exactly(bound)) == (plain.sql()[0], exactly(plain.sql()[1]))


def test_names_must_be_those_of_the_query() -> None:
    """A missing or an unknown name raises, and is named."""
    template = prepared(User.select().where(User.id == param("user_id")).limit(param("limit")))
    with pytest.raises(TypeError, match="missing 'limit', unknown 'user'"):
        template.bind_named({"user_id": 1, "user": 1})


def test_a_query_with_parameters_cant_be_executed_directly() -> None:
    """It says what is missing, instead of sending an object to the driver."""
    query = User.select().where(User.id == param("user_id"))
    assert shape_of(query) is None
    with pytest.raises(peewee.InterfaceError, match=r"param\('user_id'\).* prepare it"):
        query.sql()


def test_a_parameter_cant_be_a_list() -> None:
    """The length of a list is part of the SQL, so it's refused when the query is prepared."""
    query = User.select().where(User.id << param("ids"))
    with pytest.raises(TypeError, match="can't be a list"):
        shape_of(query, parameters=True)


def test_what_is_not_known_is_not_guessed_at() -> None:
    """Writing queries, nodes of other classes and with their own `__sql__` have no shape."""

    class OwnField(peewee.CharField):
        def __sql__(self, ctx: Any) -> Any:
            return ctx.literal("own")

    class OwnFunction(peewee.Function):
        pass

    class Other(Base):
        own = OwnField()

        @classmethod
        def elsewhere(cls) -> Any:
            return peewee.Column(peewee.SQL("x"), "y")

    plain = User.select()
    for query in (
        User.insert(name="a"),
        User.update(name="a"),
        User.delete(),
        User.raw("SELECT 1"),
        User.noop(),
        plain.with_related(User.items),
        Other.select(),
        Other.select(Other.elsewhere()),
        plain.where(OwnFunction("x", ())),
        plain.where(Item.document["a"] == 1),
        plain.where(peewee.ValueLiterals(Value(1))),
        plain.where(User.id == Membership()),
        plain.where(Membership._meta.primary_key == (1, "a")).where(Membership._meta.primary_key),
        plain.where(SQL("?", [User.age])),
        plain.where(Value(User.age)),
        plain.where(fn.COALESCE(n for n in (1, 2))),
        plain.where(User.id == SQLITE.get_sql_context()),
        plain.window(Window(extends="w")),
        plain.with_cte(User),
        plain.where(User.id == param("x")),
    ):
        assert shape_of(query) is None, query


def test_a_converter_that_makes_sql_makes_the_template_useless() -> None:
    """A value that became SQL isn't a parameter: then Peewee makes the query."""

    class Shouting(peewee.CharField):
        def db_value(self, value: Any) -> Any:
            return fn.UPPER(value) if value == "loud" else value

    class Speech(Base):
        text = Shouting()

    quiet, loud = (Speech.select().where(Speech.text == text) for text in ("quiet", "loud"))
    assert compile_template(loud, taken(loud), SQLITE) is None
    template = compiled(quiet)
    assert template.bind(taken(quiet).values) == ["quiet"]
    assert template.bind(taken(loud).values) is None


def test_what_a_converter_raises_is_raised() -> None:
    """As Peewee does for a value that its field can't take."""

    class Positive(peewee.IntegerField):
        def db_value(self, value: Any) -> Any:
            if value < 0:
                raise ValueError("negative")
            return value

    class Count(Base):
        of = Positive()

    good, bad = (Count.select().where(Count.of == value) for value in (1, -1))
    template = compiled(good)
    for attempt in (
        bad.sql,
        lambda: template.bind(taken(bad).values),
        lambda: compile_template(bad, taken(bad), SQLITE),
    ):
        with pytest.raises(ValueError, match="negative"):
            attempt()


def test_an_instance_of_another_class_has_another_key() -> None:
    """How an instance is converted depends on its class; and a foreign key tells it from an id."""
    keys = {taken(Item.select().where(Item.owner == other)).key for other in (User(), Item(), 1)}
    assert len(keys) == 3


def test_what_becomes_of_the_rows_is_part_of_the_key() -> None:
    """Row types, attributes of joined rows and conversions of columns don't show in the SQL."""
    query = Item.select(Item, User).join(User)
    queries = [
        query,
        query.dicts(),
        query.tuples(),
        query.objects(),
        query.objects(dict),
        Item.select(Item, User).join(User, on=(Item.owner == User.id).alias("seller")),
        User.select(Item, User).join(Item),
    ]
    column = Item.price + 1
    nodes = [
        *(column, column.converter(str), column.converter(int)),
        *(fn.ABS(column), fn.ABS(column).python_value(str), fn.ABS(column, coerce=False)),
        *(column.alias("x"), column.converter(str).alias("x"), SQL("1"), SQL("1").converter(str)),
        *(Item.price, Item.price.coerce(False), Item.price.converter(str)),
    ]
    queries += [Item.select(node) for node in nodes]
    keys = {taken(query).key for query in queries}
    assert len(keys) == len(queries)


def test_a_renamed_table_has_another_key() -> None:
    """A template isn't used for a table, or a schema, of another name."""

    class Moving(Base):
        pass

    alias = Moving.alias()
    queries = [Moving.select(), alias.select(), peewee.Select((Moving,), (SQL("1"),))]
    meta = Moving._meta
    for attribute, value in (("schema", "s"), ("table_name", "other")):
        before = [(taken(query).key, query.sql()[0]) for query in queries]
        setattr(meta, attribute, value)
        for (key, sql), query in zip(before, queries, strict=True):
            assert (taken(query).key == key) == (query.sql()[0] == sql)
        del meta.table


def test_a_key_keeps_what_it_names() -> None:
    """No new field or model can take the place of one that is gone."""

    def key() -> Any:
        class Gone(Base):
            text = peewee.TextField()

        return taken(Gone.select().where(Gone.text == "a")).key

    keys = set()
    for count in range(1, 20):
        keys.add(key())
        gc.collect()
        assert len(keys) == count


def test_a_template_keeps_no_values() -> None:
    """What was in the query that it was compiled of can be freed."""

    class Big(str):
        pass

    value = Big("a")
    shape = taken(User.select().where(User.name == value, User.name << [value]))
    template = compile_template(shape.query, shape, SQLITE)
    assert template is not None
    cache, watch = {shape.key: template}, weakref.ref(value)
    del value, shape
    gc.collect()
    assert watch() is None
    assert len(cache) == 1


def test_queries_are_read_only() -> None:
    """Neither taking the shape nor compiling changes a query, which several threads may share."""
    for make in QUERIES.values():
        query = make(1, "a")
        before = [(id(node), dict(vars(node))) for node in parts(query, {})]
        compiled(query)
        after = [(id(node), dict(vars(node))) for node in parts(query, {})]
        assert [each[0] for each in before] == [each[0] for each in after]
        for (_, old), (_, new) in zip(before, after, strict=True):
            assert old.keys() == new.keys()
            assert all(old[name] is new[name] for name in old)


def test_threads_may_share_a_query() -> None:
    """Each gets the same shape, and a template that fits."""
    query = QUERIES["joins"](1, "a")
    key, (sql, parameters) = taken(query).key, query.sql()

    def work(_: int) -> bool:
        shape = taken(query)
        template = compiled(query)
        return (shape.key, template.sql, template.bind(shape.values)) == (key, sql, parameters)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_a_database_with_a_context_of_its_own_has_no_templates() -> None:
    """It may render anything in any way."""

    class Context(peewee.Context):
        pass

    class Database(peewee.SqliteDatabase):
        context_class = Context

    query = User.select()
    assert compile_template(query, taken(query), Database(None)) is None


def test_a_query_that_has_changed_since_is_refused() -> None:
    """A shape is of its moment."""
    query = User.select().where(User.id == 1)
    shape = taken(query)
    query._where = User.age == 1
    assert compile_template(query, shape, SQLITE) is None


def test_a_clone_of_another_kind_is_refused() -> None:
    """A union has other parts than the query that it is made of."""
    query = User.select().where(User.id == 1)
    assert compile_template(query | query, taken(query), SQLITE) is None


def test_a_clone_may_lack_a_clause() -> None:
    """What is left out has no values."""
    query = User.select().where(User.id == 1).order_by(User.age + 2)
    clone = query.clone()
    clone._order_by = None
    template = compile_template(clone, taken(query), SQLITE)
    assert template is not None
    assert (template.sql, template.bind(taken(query).values)) == clone.sql()


def test_a_shape_that_has_other_values_is_refused() -> None:
    """It isn't the query's, whatever its key says."""
    query = User.select().where(User.id == 1)
    shape = taken(query)
    assert compile_template(query, shape._replace(values=[1, 2]), SQLITE) is None


def test_a_tag_that_comes_from_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a value of the clone's overlooked, the SQL would still show it."""
    monkeypatch.setattr(templates, "_refuse_values", lambda node: None)
    query = User.select().where(User.id == 1)
    clone = query.limit(Tag())
    assert compile_template(clone, taken(query), SQLITE) is None


def test_an_instance_that_the_foreign_key_can_not_convert_is_its_key() -> None:
    """An item where something else belongs: Peewee takes the item's own key."""

    class Whole(peewee.IntegerField):
        def db_value(self, value: Any) -> Any:
            return int(value)

    class Thing(Base):
        id = Whole(primary_key=True)

    class Part(Base):
        thing = peewee.ForeignKeyField(Thing)

    def make(number: int) -> Any:
        return Part.select().where(Part.thing == Item(id=number))

    template = compiled(make(1))
    assert (template.sql, template.bind(taken(make(7)).values)) == make(7).sql()


def test_what_does_not_write_has_no_shape_of_a_write() -> None:
    """Nor has a write one of a SELECT."""
    assert shape_of_write(User.select()) is None
    assert shape_of_write(User.raw("SELECT 1")) is None
    assert shape_of(User.delete()) is None


def test_an_aliased_field_of_ones_own_is_not_known() -> None:
    """Whoever writes SQL in a subclass says in it what we can't see."""
    name = User.alias("u").name

    class Own(type(name)):  # type: ignore[misc]
        def __sql__(self, ctx: Any) -> Any:
            return ctx.literal("1")

    own = Own.__new__(Own)
    own.__dict__.update(name.__dict__)
    assert shape_of(User.select(own)) is None


# --- Random queries ------------------------------------------------------------------------------

MODELS = [User, Item, ItemLabel, Label]
NUMBERS = [0, 1, 2, 7, -1, True, False, "1", 1.0, 1.5, Decimal("1"), Decimal("2.50")]
ANYTHING = [*NUMBERS, "a", "a%", "", b"1", b"x", datetime.date.min, datetime.timedelta(1)]
PLAIN_OPS = [
    *("=", "!=", "<", "<=", ">", ">=", "LIKE", "ILIKE", "REGEXP", "&", "|", "+", "-", "*", "/"),
    *("||", "IS", "IS NOT", "XOR", "SIMILAR TO"),
]


class Builder:
    """A query of two sources: its structure is read from bytes, its values are random."""

    def __init__(self, structure: bytes, seed: int) -> None:
        self.structure = iter(structure)
        self.random = random.Random(seed)
        self.sources: list[Any] = []
        self.reusable: list[Any] = []

    def pick(self, count: int) -> int:
        return next(self.structure, 0) % count

    def one(self, items: Any) -> Any:
        return items[self.pick(len(items))]

    def some(self, make: Callable[[], Any], most: int = 3) -> list[Any]:
        return [make() for _ in range(self.pick(most + 1))]

    def integer(self) -> int:
        return self.random.randrange(4)

    def value(self, field: Any = None) -> Any:
        """A plain value that the field's converter takes."""
        if isinstance(field, peewee.ForeignKeyField):
            field = field.rel_field
        if isinstance(field, peewee.UUIDField):
            return uuid.UUID(int=self.integer())
        if isinstance(field, peewee.DecimalField | peewee.FloatField):
            return self.random.choice(NUMBERS)
        return self.random.choice(ANYTHING)

    def value_or_none(self) -> Any:
        """Where None is a parameter as any other."""
        return self.random.choice([*[None] * 4, *ANYTHING])

    def field(self) -> Any:
        source = self.one(self.sources)
        if isinstance(source, peewee.Source):
            return getattr(source.c, self.one(["a", "b"]))
        model = source.model if isinstance(source, peewee.ModelAlias) else source
        names = [field.name for field in model._meta.sorted_fields]
        return getattr(source, self.one([name for name in names if name != "document"]))

    def instance(self) -> Any:
        return self.one([User, Item])(id=self.integer())

    def operand(self, field: Any, depth: int) -> Any:
        kind = self.pick(8)
        if kind == 0 and depth:
            return self.expression(depth - 1) if self.pick(3) else self.select(depth - 1)
        if kind == 1:
            return self.instance() if isinstance(field, peewee.ForeignKeyField) else self.field()
        if kind == 2:
            converter = self.one([None, False, str, repr])
            return Value(self.value(field), converter=converter)
        return self.value(field)

    def expression(self, depth: int) -> Any:
        field = self.field()
        if not depth:
            return field
        if self.reusable and self.pick(5) == 1:
            return self.one(self.reusable)
        made = self._expression(field, depth - 1)
        self.reusable.append(made)
        return made

    def _expression(self, field: Any, depth: int) -> Any:
        kind = self.pick(17)
        inner = self.expression(depth) if kind > 1 else field
        if kind == 2:
            return peewee.Expression(self.value_or_none(), self.one(PLAIN_OPS), inner)
        if kind == 3:
            return inner + self.value(field)
        if kind == 4:
            name = self.one(["COALESCE", "LOWER", "COUNT", "SUM", "cast"])
            arguments = [
                inner,
                *self.some(self.value_or_none),
                *self.some(lambda: self.expression(depth)),
            ]
            return peewee.Function(name, tuple(arguments), coerce=bool(self.pick(2)))
        if kind == 5:
            function = fn.SUM(inner, self.value_or_none())
            return function.filter(self.condition(depth)) if self.pick(2) else function
        if kind == 6:
            return fn.string_agg(inner, "x").order_by(*self.orderings(depth))
        if kind == 7:
            return inner.cast(self.one(["TEXT", "INT"]))
        if kind == 8:
            pairs = [(self.condition(depth), self.value_or_none()) for _ in range(1 + self.pick(2))]
            return Case(None, pairs, self.one([None, 1]))
        if kind == 9:
            return Case(inner, ((self.value(), self.expression(depth)),), self.value() or 0)
        if kind == 10:
            return inner.collate(self.one(["NOCASE", "BINARY"]))
        if kind == 11:
            return SQL(self.one(["x + ?", "y - ?"]), [self.value()])
        if kind == 12:
            return peewee.BitwiseNegated(inner) if self.pick(2) else ~inner
        if kind == 13:
            start = self.one([None, Window.preceding(), Window.preceding(2)])
            frame = self.one([None, "ROWS", "RANGE"])
            partition = self.some(lambda: self.expression(depth)) or None
            orders = self.orderings(depth) or None
            return fn.SUM(inner, self.value()).over(partition, orders, start, frame_type=frame)
        if kind == 14:
            inner = self.select(depth)
            return self.one([fn.ANY(inner), Cast(inner, "TEXT"), peewee.NodeList((inner, inner))])
        if kind == 15:
            return inner.concat(self.value())
        if kind == 16:
            return Value(
                [self.value_or_none() for _ in range(self.pick(3))], unpack=bool(self.pick(2))
            )
        return peewee.Entity(*self.one([("a",), ("a", "b")])) if kind else field

    def condition(self, depth: int) -> Any:
        field = self.field() if self.pick(2) else self.expression(depth)
        kind = self.pick(13)
        if kind == 0:
            return field == self.operand(field, depth) if self.pick(2) else field.is_null()
        if kind == 1 and depth:
            conditions = self.condition(depth - 1), self.condition(depth - 1)
            return conditions[0] & conditions[1] if self.pick(2) else conditions[0] | conditions[1]
        if kind == 2:
            return ~(field == self.value(field))
        if kind == 3:
            values = [self.value(field) for _ in range(self.one([0, 1, 2, 3, 12]))]
            kept = self.one([list, tuple])(values)
            return field.in_(kept) if self.pick(2) else field.not_in(kept)
        if kind == 4:
            return field.in_([self.instance() for _ in range(self.pick(3))])
        if kind == 5:
            return field.in_(self.select(depth - 1 if depth else 0))
        if kind == 6:
            return field.between(self.value(field), self.value(field))
        if kind == 7:
            text = self.one(["a", "a_b", "%"])
            return self.one([field.contains, field.startswith, field.endswith])(text)
        if kind == 8:
            return fn.EXISTS(self.select(depth - 1 if depth else 0))
        if kind == 9 and depth:
            return peewee.Tuple(field, self.expression(depth - 1)) == (
                self.value(),
                self.value_or_none(),
            )
        op = self.one(PLAIN_OPS)
        nullable = self.pick(4) == 1 and not op.startswith("IS")
        rhs = self.value_or_none() if nullable else self.operand(field, depth)
        return peewee.Expression(field, op, rhs, flat=bool(self.pick(2)))

    def orderings(self, depth: int) -> list[Any]:
        def ordering() -> Any:
            node = self.expression(depth)
            kind = self.pick(5)
            if kind == 1:
                return node.desc()
            if kind == 2:
                return node.asc(collation="NOCASE")
            if kind == 3:
                return node.desc(nulls=self.one(["first", "last"]))
            return node

        return self.some(ordering, 2)

    def source(self) -> Any:
        model = self.one(MODELS)
        kind = self.pick(6)
        if kind == 1:
            return model.alias()
        if kind == 2:
            return model.alias(self.one(["x", "y"]))
        if kind == 3:
            return peewee.Table("t", schema=self.one([None, "s"])).alias(self.one(["x", "z"]))
        if kind == 4:
            rows = [[self.value(), self.value_or_none()] for _ in range(1 + self.pick(2))]
            return ValuesList(rows, columns=["a", "b"], alias=self.one(["v", "w"]))
        return model

    def select(self, depth: int) -> Any:
        outer = self.sources
        model = self.one(MODELS)
        base = model.alias() if self.pick(4) == 1 else model
        self.sources = [*outer[-1:], base]
        query = base.select()
        for _ in range(self.pick(3)):
            joined = self.source() if not depth or self.pick(4) else self.select(0).alias("sub")
            join_type = self.one([JOIN.INNER, JOIN.LEFT_OUTER, JOIN.CROSS])
            self.sources.append(joined)
            on = None if join_type == JOIN.CROSS else self.condition(depth)
            query = query.join_from(base, joined, join_type, on=on)
        if self.pick(3):
            items = [self.expression(depth) for _ in range(1 + self.pick(2))]
            items += [self.select(depth - 1)] if depth and self.pick(4) == 1 else []
            query = query.select(
                *[item.alias(self.one(["n", "m"])) if self.pick(3) == 1 else item for item in items]
            )
        conditions = self.some(lambda: self.condition(depth))
        query = query.where(*conditions) if conditions else query
        if self.pick(3) == 1:
            query = query.group_by(*self.some(lambda: self.expression(depth)))
            query = query.having(self.condition(depth)) if self.pick(2) else query
        query = query.order_by(*self.orderings(depth))
        query = query.limit(self.integer()) if self.pick(2) else query
        query = query.offset(self.integer()) if self.pick(3) == 1 else query
        query = query.distinct() if self.pick(6) == 1 else query
        if depth and self.pick(5) == 1:
            parts = self.select(depth - 1), self.select(depth - 1)
            cte = parts[0].cte("cte", recursive=bool(self.pick(2)), columns=["a", "b"])
            cte = cte.union_all(parts[1]) if self.pick(2) else cte
            self.sources.append(cte)
            query = query.join_from(base, cte, on=self.condition(0)).with_cte(cte)
        if depth and self.pick(5) == 1:
            other = self.select(depth - 1)
            query = self.one([query.union, query.union_all, query.except_])(other)
            query = query.order_by(*self.orderings(0)).limit(self.one([None, 1]))
        self.sources = outer
        return query


def built(structure: bytes, seed: int) -> tuple[Any, Any]:
    """A query, and a database for it."""
    builder = Builder(structure, seed)
    database = builder.one(DATABASES)
    return builder.select(2), database


class Cache:
    """What is compiled of all queries so far: whichever has an equal key must fit exactly."""

    def __init__(self) -> None:
        self.templates: dict[Any, Template] = {}
        self.hits = 0

    def check(self, query: Any, database: Any) -> Any:
        shape = taken(query)
        key = database, shape.key
        template = self.templates.get(key)
        if template is None:
            template = compile_template(query, shape, database)
            assert template is not None
            self.templates[key] = template
        else:
            self.hits += 1
        assert_binds(template, query, database)
        return shape.key


STRUCTURES = st.binary(min_size=8, max_size=100)
SEEDS = st.integers(0, 2**32)
RANDOM_QUERIES = settings(
    max_examples=50 * settings().max_examples,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)


def test_whatever_has_one_key_has_one_template() -> None:
    """Over random queries, and ones that differ in one decision: equal keys mean equal SQL."""
    cache = Cache()

    @RANDOM_QUERIES
    @given(STRUCTURES, SEEDS, st.integers(0, 60), st.integers(1, 255))
    def check(structure: bytes, seed: int, place: int, change: int) -> None:
        keys = [cache.check(*built(structure, seed + i)) for i in range(2)]
        assert keys[0] == keys[1], "the same structure must be found again"
        place %= len(structure)
        changed = bytes([(structure[place] + change) % 256])
        cache.check(*built(structure[:place] + changed + structure[place + 1 :], seed))

    check()
    assert cache.hits > RANDOM_QUERIES.max_examples


def parts(node: Any, found: dict[int, Any]) -> Iterator[Any]:
    """The nodes of a query that it doesn't share with others."""
    if isinstance(node, list | tuple):
        for child in node:
            yield from parts(child, found)
        return
    shared = peewee.Field | peewee.ModelAlias | peewee.Model | peewee.Table
    if isinstance(node, peewee.Node) and not isinstance(node, shared) and id(node) not in found:
        found[id(node)] = node
        yield node
        for child in list(vars(node).values()):
            yield from parts(child, found)


def damage(query: Any, which: int, how: int) -> str:
    """Change one attribute of one node, whatever it is; says which."""
    places = [
        (node, name)
        for node in parts(query, {})
        for name in vars(node)
        if name not in ("_database", "_cursor_wrapper", "_hash", "_path", "model", "_load_tree")
    ]
    node, name = places[which % len(places)]
    old = getattr(node, name)
    new: list[Any]
    if isinstance(old, bool) or old is None:
        new = [not old, SQL("changed"), "last", None]
    elif isinstance(old, str):
        new = [old + "x", "DESC", "<>", "FIRST"]
    elif isinstance(old, list | tuple):
        new = [type(old)([*old, 1]), old[:-1], old[::-1], type(old)([*old, User.age])]
    elif isinstance(old, peewee.Node):
        new = [SQL("changed"), User.age, 1, Value(2, converter=False)]
    else:
        new = [None, "a", User.name, str]
    setattr(node, name, new[how % 4])
    if name == "_alias" and hasattr(node, "_hash"):
        node._alias = "other"
        node._update_hash()  # as whatever changes an alias in Peewee does
    return f"{type(node).__name__}.{name}: {old!r} becomes {new[how % 4]!r}"


def test_no_attribute_of_a_node_is_forgotten() -> None:
    """Whatever is changed in a query, in whichever node: an equal key still means equal SQL."""
    cache = Cache()
    same, different = [0], [0]

    @RANDOM_QUERIES
    @given(STRUCTURES, SEEDS, st.integers(0, 10_000), st.integers(0, 3))
    def check(structure: bytes, seed: int, which: int, how: int) -> None:
        query, database = built(structure, seed)
        key = cache.check(query, database)
        query, database = built(structure, seed + 1)
        said = damage(query, which, how)
        try:
            database.get_sql_context().parse(query)
            shape = shape_of(query)
        except Exception:  # Peewee can't make SQL of it, so there is nothing to compare
            return
        if shape is not None and shape.key == key:
            assert_binds(cache.templates[database, key], query, database)
            same[0] += 1
        elif shape is not None:
            assert shape.key != key, said
            different[0] += 1

    check()
    assert different[0] > RANDOM_QUERIES.max_examples / 5
    assert same[0] > RANDOM_QUERIES.max_examples / 17, (
        "a change of a value must not be a change of the shape"
    )


class Odd(peewee.CharField):
    def adapt(self, value: Any) -> Any:  # which Peewee's `db_value` calls
        return value.lower()


class Place(Base):
    name = Odd(primary_key=True)


class Visit(Base):
    place = peewee.ForeignKeyField(Place)
    date = peewee.DateField()
    guest = peewee.ForeignKeyField(User)


@pytest.mark.parametrize(
    ("condition", "alone"),
    [
        (Visit.date == datetime.date(2024, 1, 2), True),
        (Visit.guest == 1, True),
        (Visit.id << [1, 2], True),
        (Place.name == "A", False),
        (Visit.place == "A", False),
        (Visit.date == Value("A", converter=str.lower), False),
        (Visit.date == Value("A", converter={"A": "a"}.get), False),
        (Visit.date == Value("A", converter=lambda value: value), False),
    ],
    ids=["date", "key", "list", "field", "key of a field", "builtin", "bound", "function"],
)
def test_whose_code_converts_the_values(condition: Any, alone: bool) -> None:
    """Peewee's converts a value in the same way each time; who knows what others' does."""
    query = (Visit if condition.lhs.model is Visit else Place).select().where(condition)
    template = compile_template(query, taken(query), SQLITE)
    assert template is not None
    assert template.converts_alone is alone
