"""Shapes: a template binds the values of every query with its key, and of no other."""

import uuid
from collections.abc import Callable
from typing import Any

import peewee
import pytest
from peewee import JOIN, SQL, Case, Cast, EnclosedNodeList, Value, ValuesList, Window, fn

from fastapi_peewee.shapes import Shape, Template, compile_template, param, shape_of

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

    template = prepared(make(param("owner"), param("label"), param("title"), param("i")))
    assert template.names == {"owner", "label", "title", "i"}
    for owner in (7, "7", User(id=7)):
        named = {"owner": owner, "label": uuid.UUID(int=1), "title": "t", "i": 2}
        sql, parameters = make(**named).sql()
        bound = template.bind_named(named)
        assert bound is not None
        assert (template.sql, exactly(bound)) == (sql, exactly(parameters))


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
