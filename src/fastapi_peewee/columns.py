"""The caller's query with the columns that a response needs: which rows, in which order, stays.

A plan wraps the query, `SELECT … FROM (<query>) q`, so every column must have a name of its own.
"""

from collections.abc import Iterator
from typing import Any

import peewee
from peewee import Alias, CompoundSelectQuery, FieldAlias, ModelAlias, ModelSelect

from .trees import Leaf, Relation, Tree, among, primary_key, reads_from, same


class Unplannable(Exception):
    """This query can't be wrapped, and the message says why: its instances are needed."""


class Narrowed:
    """A query that selects what a tree needs.

    Attributes:
        query: the query, never the caller's own object if anything was changed.
        nodes: what it selects.
        names: the names of the columns, in the same order.
        places: for each part of the tree, by its `id()`, the index of its column. A relation's is
            that of its `link`.
        pruned: whether its columns could be chosen, and so could expressions in their place.
    """

    def __init__(self, query: Any, tree: Tree) -> None:
        self.nodes: list[Any] = list(query._returning)
        self.names: list[str] = []
        self.places: dict[int, int] = {}
        self.pruned = _prunable(query)
        if self.pruned:
            self.query = self._prune(query, tree)
        else:
            self.query = query
            self._find(query, tree)

    def place(self, part: Leaf | Relation) -> int:
        return self.places[id(part)]

    def _prune(self, query: Any, tree: Tree) -> Any:
        model = query.model
        selected, others = self.nodes, []
        # Expressions of the caller's stay, since ORDER BY may name them.
        kept = [node for node in selected if not isinstance(node, peewee.Field | FieldAlias)]
        only_fields = not kept
        self.nodes, places = [], {}
        for part, field in tree.columns:
            if field is None:
                others.append(part)
                continue
            if field.name not in places:
                node = getattr(model, field.name)
                if not (only_fields or query._group_by or among(node, selected)):
                    raise Unplannable(f"{field.name} isn't selected, and expressions are")
                places[field.name] = len(self.nodes)
                self.nodes.append(node.alias(f"c{len(self.nodes)}"))
            self.places[id(part)] = places[field.name]
        self.names = [node.name for node in self.nodes]
        for node in kept:
            name = _name(node)
            if name is None or name.lower() in map(str.lower, self.names):
                raise Unplannable(f"it selects an expression without a name of its own: {name!r}")
            self.names.append(name)
            self.nodes.append(node)
        for part in others:
            if part.key not in self.names[len(places) :]:
                raise Unplannable(f"nothing of the name {part.key!r} is selected")
            self.places[id(part)] = self.names.index(part.key)
        if not self.nodes:
            raise Unplannable("the response has no fields")
        clone = query.clone()
        clone._returning = self.nodes
        clone._is_default = False
        clone._cursor_wrapper = None
        return clone

    def _find(self, query: Any, tree: Tree) -> None:
        names = [_name(node) for node in self.nodes]
        if None in names or len({name.lower() for name in names}) != len(names):
            raise Unplannable("it selects columns without names or with equal ones")
        self.names = names
        model = query.model
        for part, field in tree.columns:
            if field is None:
                place = next((i for i, name in enumerate(names) if name == part.key), None)
            else:
                node = getattr(model, field.name)
                place = next((i for i, each in enumerate(self.nodes) if same(each, node)), None)
            if place is None:
                raise Unplannable(f"{part.key!r} isn't selected, and more can't be added")
            self.places[id(part)] = place


def check(query: Any, tree: Tree) -> None:
    """Raise `Unplannable` for queries whose instances hold more than their columns say."""
    if query._row_type not in (None, peewee.ROW.MODEL):
        raise Unplannable("it doesn't return instances of its model")
    if getattr(query, "_lateral", None) or getattr(query, "_windows", None):
        raise Unplannable("it has LATERAL or named windows")
    base = query
    while isinstance(base, CompoundSelectQuery):
        base = base.lhs
    relations = {relation.key: relation for relation in (*tree.relations, *tree.ends)}
    leaves = {leaf.key for leaf in tree.leaves if leaf.field is not None}
    for source, joins in getattr(base, "_joins", {}).items():
        for dest, attr, *_ in joins:
            if attr in leaves or (
                attr in relations and relations[attr].tree.model is not _model(dest)
            ):
                raise Unplannable(f"a join stores another row as {attr!r}")
            if _selects(base, dest) and not _follows(base, source, dest, attr):
                raise Unplannable(f"a join says which row is stored as {attr!r}")
    for node in base._returning:
        if isinstance(node, Alias) and (node.name in relations or node.name in leaves):
            raise Unplannable(f"it selects something else by the name {node.name!r}")


def check_relations(tree: Tree) -> None:
    """Note in the trees which relations' queries can't be wrapped.

    Raises:
        Unplannable: one can't that may be another one for the next request.
    """
    for own in (False, True):
        for each in [] if tree.checked and not own else tree.all():
            for relation in each.relations:
                why = _unplannable(relation) if relation.own_select is own else None
                if why and own:
                    raise Unplannable(why)
                if why:
                    each.instances.append(why)
        tree.checked = True


def _unplannable(relation: Relation) -> str | None:
    query = relation.children()
    try:
        check(query, relation.tree)
        Narrowed(query, relation.tree)
    except Unplannable as error:
        return f"{relation.name}: {error}"
    return None


def completed(query: Any, tree: Tree) -> Any:
    """The query with those columns of the tree that it leaves out, if it selects columns only."""
    if not _prunable(query) or query._row_type not in (None, peewee.ROW.MODEL):
        return query
    selected = list(query._returning)
    if not all(isinstance(node, peewee.Field | FieldAlias) for node in selected):
        return query
    wanted = [getattr(query.model, field.name) for _, field in tree.columns if field is not None]
    missing = [node for node in wanted if not among(node, selected)]
    return query.select_extend(*missing) if missing else query


def _selects(query: Any, source: Any) -> bool:
    """Whether rows of this source, or of one joined to it, become parts of the instances."""
    for node in query._returning:
        node = node.unwrap() if isinstance(node, peewee.Node) else node
        if isinstance(node, FieldAlias):
            found = node.source
        elif isinstance(node, peewee.Field):
            found = node.model
        else:
            found = getattr(node, "source", None)
        if found is source:
            return True
    return any(_selects(query, dest) for dest, *_ in query._joins.get(source, ()))


def _follows(query: Any, source: Any, dest: Any, attr: str) -> bool:
    """Whether the join is by the foreign key `attr` and nothing else, or by none of `source`'s."""
    field = _model(source)._meta.fields.get(attr) if _is_model(source) else None
    if not isinstance(field, peewee.ForeignKeyField):
        return True
    joins = [*query._from_list]
    while joins:
        join = joins.pop()
        if isinstance(join, peewee.Join):
            joins += [join.lhs, join.rhs]
            if join.rhs is dest:
                on = join._on
                key, target = getattr(source, attr), getattr(dest, field.rel_field.name)
                return (
                    isinstance(on, peewee.Expression)
                    and on.op == peewee.OP.EQ
                    and any(
                        same(on.lhs, one) and same(on.rhs, other)
                        for one, other in ((key, target), (target, key))
                    )
                )
    return False


def _is_model(source: Any) -> bool:
    return isinstance(source, ModelAlias) or (
        isinstance(source, type) and issubclass(source, peewee.Model)
    )


def _prunable(query: Any) -> bool:
    """Whether columns can be added and left out without changing the rows."""
    if not isinstance(query, ModelSelect) or query._simple_distinct:
        return False
    if not reads_from(query, query.model) or any(map(names_output, query._order_by or ())):
        return False
    if query._distinct is not None and not query._distinct:
        return False
    if query._group_by:
        grouped = list(query._group_by)
        keys = primary_key(query.model)
        return bool(keys) and all(among(key, grouped) for key in keys)
    return query._having is None


def names_output(ordering: Any) -> bool:
    """Whether this may order by the position or the name of what is selected."""
    node = ordering.node if isinstance(ordering, peewee.Ordering) else ordering
    return isinstance(node, peewee.SQL | peewee.Entity)


def _model(source: Any) -> Any:
    return source.model if isinstance(source, ModelAlias) else source


def base_model(query: Any) -> Any:
    return _model(query.model)


def _name(node: Any) -> Any:
    if isinstance(node, Alias):
        return node.name
    if isinstance(node, peewee.Field | FieldAlias):
        return node.column_name
    return None


def expressions(narrowed: Narrowed, tree: Tree) -> Iterator[tuple[Leaf, Any]]:
    """The leaves that are no column of the model, each with what the query selects for it."""
    for leaf in tree.leaves:
        if leaf.field is None:
            yield leaf, narrowed.nodes[narrowed.place(leaf)].unwrap()
