"""What is asked of a model for a response: a tree of columns and relations.

`response_types` makes it. Of queries, only a relation's is looked at here, to have it give the rows
of each parent; no SQL is written.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Any

import peewee

from .exceptions import SchemaError


class Depth:
    """See `depth()`. Each is another: by which one a relation is followed is counted."""

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def __repr__(self) -> str:
        return f"depth({self.levels})"


def depth(levels: int) -> Any:
    """How deep a response class that contains itself is read.

    ::

        class CategoryOut(BaseModel):
            name: str
            children: Annotated[list["CategoryOut"], depth(3)]

    From the top of the response down, the relation is followed so many times. There, lists are
    empty and rows, which must be optional, are null: also where the database has more. In a circle
    of classes one of the fields must say it.

    Args:
        levels: how many times; 1 is the row's own children and nothing below them.

    Raises:
        ValueError: `levels` is less than 1.
    """
    if levels < 1:
        raise ValueError(f"depth() takes the number of levels, 1 or more; got: {levels!r}")
    return Depth(levels)


@dataclass(slots=True)
class Leaf:
    """A field of the schema that is one column, or one expression that the query selects.

    Attributes:
        name: the schema's field.
        alias: its name in JSON, where aliases are used.
        key: the attribute of the instance that Pydantic would read.
        field: the model's field; None where the query must select something of the name `key`.
        core: Pydantic's schema of one value, without defaults and `None`.
        excluded: it is validated but not in the JSON.
        nullable: whether `None` is a value.
    """

    name: str
    alias: str
    key: str
    field: Any
    core: dict[str, Any]
    excluded: bool = False
    nullable: bool = False

    @property
    def column(self) -> Any:
        """The field that says how the column is stored: at the end of a chain of foreign keys."""
        field = self.field
        while isinstance(field, peewee.ForeignKeyField):
            field = field.rel_field
        return field


@dataclass(slots=True)
class Relation:
    """A field of the schema that is another row, or a list of them.

    Attributes:
        name, alias, key, excluded: as in `Leaf`.
        tree: what is wanted of the other model.
        many: whether it is a list.
        fk: the foreign key: on this model (a row), or on the other one or the link table (a list).
        through: the link table's foreign key to the other model, of a many-to-many relation.
        query: selects, orders and limits the list, for each parent; None for all in key order.
        nullable: whether there may be no row.
        ended: its stated depth is reached, so that nothing is read for it.
    """

    name: str
    alias: str
    key: str
    tree: "Tree"
    many: bool
    fk: Any
    through: Any = None
    query: Any = None
    nullable: bool = False
    excluded: bool = False
    ended: bool = False

    @property
    def link(self) -> Any:
        """The field of this model whose value the other rows are found by."""
        return self.fk.rel_field if self.many else self.fk

    def children(self) -> Any:
        """The other model's rows of all parents, unordered if nothing is said of their order.

        Raises:
            SchemaError: they are in another database.
        """
        self.check_database()
        query = self.tree.model.select() if self.query is None else self.query
        if self.through is not None and not reads_from(query, self.through.model):
            target = self.through.rel_field
            query = query.switch(query.model).join(
                self.through.model, on=(self.through == getattr(query.model, target.name))
            )
        if self.many and not query._order_by:
            query = query.order_by(*_by_key(query))
        return query

    @property
    def own_select(self) -> bool:
        """Whether what the rows are depends on a `select()` that isn't Peewee's: it may be another
        query for each request.
        """
        return self.query is None and getattr_static(self.tree.model, "select") is not _SELECT

    def check_database(self) -> None:
        """Raise `SchemaError` if the rows are in another database than their parents."""
        theirs = _database(self.link.model)
        for model in (self.tree.model, self.fk.model):
            if _database(model) not in (theirs, None):
                raise SchemaError(
                    f"{self.name}: {model.__name__} is in another database than "
                    f"{self.link.model.__name__}, so one can't be read with the other. Read it in "
                    "the endpoint, and return instances or dictionaries that have it."
                )

    def of_many_parents(self, keys: list[Any]) -> tuple[Any, Any]:
        """The rows of these parents: the query, and the column of it that holds the parent's key.

        What the caller's query does for each parent is done so: its groups are a parent's own. Its
        limit and offset are left out.
        """
        query = self.children()
        target = self.target(query)
        query = self.only(query.clone(), target << keys)
        query._limit = query._offset = None
        if query._group_by:
            query._group_by = (target, *query._group_by)
        if query._distinct:  # DISTINCT ON
            query._distinct = (target, *query._distinct)
            query._order_by = (target, *query._order_by)
        return query, target

    def target(self, query: Any) -> Any:
        """The column of `children()` that holds the parent's `link`."""
        if self.through is not None:
            return self.fk
        return getattr(query.model, self.fk.name if self.many else self.fk.rel_field.name)

    @staticmethod
    def only(query: Any, condition: Any) -> Any:
        """The query with one more condition."""
        where = query._where
        if where is not None and not isinstance(where, peewee.Expression):
            query = query.clone()  # `SQL("a OR b")`, which `AND` would take apart
            query._where = peewee.NodeList((where,), parens=True)
        return query.where(condition)


@dataclass(slots=True)
class Tree:
    """One model's part of a response.

    Attributes:
        model: Peewee's class.
        schema: Pydantic's class.
        fields: in the schema's order.
        reasons: why the database can't build the JSON.
        instances: why a dictionary can't stand for the row.
        endless: which relations lead to the same class again, to no stated depth.
        checked: the queries of the relations have been looked at.
    """

    model: Any
    schema: Any
    fields: list[Leaf | Relation] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    instances: list[str] = field(default_factory=list)
    endless: list[str] = field(default_factory=list)
    checked: bool = False

    @property
    def leaves(self) -> Iterator[Leaf]:
        return (part for part in self.fields if isinstance(part, Leaf))

    @property
    def relations(self) -> Iterator[Relation]:
        """Those that are followed."""
        return (part for part in self.fields if isinstance(part, Relation) and not part.ended)

    @property
    def ends(self) -> Iterator[Relation]:
        """Those that aren't."""
        return (part for part in self.fields if isinstance(part, Relation) and part.ended)

    @property
    def columns(self) -> Iterator[tuple[Leaf | Relation, Any]]:
        """What something is read for, each with its field; None where it must be selected."""
        for part in self.fields:
            if isinstance(part, Leaf):
                yield part, part.field
            elif not part.ended:
                yield part, part.link

    @property
    def levels(self) -> int:
        """How deep it is."""
        return 1 + max((relation.tree.levels for relation in self.relations), default=0)

    def all(self) -> "Iterator[Tree]":
        """This tree and those of its relations."""
        yield self
        for relation in self.relations:
            yield from relation.tree.all()


_SELECT = getattr_static(peewee.Model, "select")


def _database(model: Any) -> Any:
    db = model._meta.database
    return db.obj if isinstance(db, peewee.Proxy) else db


def primary_key(model: Any) -> list[Any]:
    """The fields of the key; of an alias, those of the alias. Empty if there is none."""
    return [getattr(model, field.name) for field in model._meta.get_primary_keys()]


def sources(query: Any) -> list[Any]:
    """What a SELECT reads from: models, aliases and queries, joined ones among them."""
    found, todo = [], list(query._from_list or ())
    while todo:
        source = todo.pop()
        if isinstance(source, peewee.Join):
            todo += [source.lhs, source.rhs]
        else:
            found.append(source)
    return found


def reads_from(query: Any, model: Any) -> bool:
    """Whether a model, or an alias, is one of the sources (to which `==` may be an expression)."""
    return any(source is model for source in sources(query))


def same(one: Any, other: Any) -> bool:
    """Whether two nodes are the same field of the same source (`==` builds an expression)."""
    if isinstance(one, peewee.FieldAlias) and isinstance(other, peewee.FieldAlias):
        return one.source is other.source and one.field is other.field
    return one is other


def among(node: Any, nodes: Iterable[Any]) -> bool:
    return any(same(node, each) for each in nodes)


def _by_key(query: Any) -> list[Any]:
    """What orders the rows by their keys, or else what a database lets such a query order by."""
    keys = primary_key(query.model)
    if query._group_by:
        allowed = list(query._group_by)
    elif query._simple_distinct or query._distinct == ():
        allowed = [node.unwrap() for node in query._returning]
    else:
        return [*(query._distinct or ()), *keys]
    return keys if all(among(key, allowed) for key in keys) else allowed
