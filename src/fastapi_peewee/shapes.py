"""What two queries have in common that differ in their values only: one SQL text, made once.

`shape_of()` takes a query apart, into a key and the values; `compile_template()` makes of a shape
what binds the values of all queries with that key. `param()` stands for a value that comes later.

What belongs here is what Peewee makes SQL of: its nodes, and how it renders them. What does not:
caches, connections, and how rows become objects. Besides `state.py`, this is the only file that
looks at what Peewee keeps private, and a node that it doesn't know is never guessed at.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import repeat
from operator import is_
from types import GeneratorType, MethodType
from typing import Any, NamedTuple

import peewee
from peewee import (
    CTE,
    SQL,
    Alias,
    BitwiseNegated,
    Case,
    Cast,
    Column,
    ColumnBase,
    CompoundSelectQuery,
    Context,
    Entity,
    Expression,
    Field,
    FieldAlias,
    ForUpdate,
    Function,
    Join,
    ManyToManyQuery,
    Model,
    ModelAlias,
    ModelBase,
    ModelCompoundSelectQuery,
    ModelSelect,
    Negated,
    Node,
    NodeList,
    Ordering,
    Select,
    StringExpression,
    Table,
    Value,
    ValuesList,
    Window,
    WindowAlias,
    multi_types,
)

__all__ = ["Shape", "Template", "compile_template", "param", "shape_of", "with_values"]


class Shape(NamedTuple):
    """A query without its values.

    Attributes:
        key: equal only for queries of which Peewee makes the same SQL, on the same database, with
            the same converters, row type and joins, whatever their values are. It holds what it
            names (fields, models, functions), so that nothing can take the place of what is gone;
            it holds no values, but for those that stand in `SQL("…")`.
        values: the values as they were given, not converted yet.
        query: the query itself, for `compile_template()`. Don't keep it: it holds the values.
    """

    key: Hashable
    values: list[Any]
    query: Any

    @property
    def names(self) -> frozenset[str]:
        """Of the `param(…)`s in it."""
        return frozenset(value.name for value in self.values if type(value) is Parameter)


class Template:
    """A compiled statement: the SQL, and which value goes where through which converter.

    Attributes:
        sql: the text, as Peewee made it.
        names: of the `param(…)`s; a template that has any belongs to its query alone.
    """

    __slots__ = ("_constants", "_plan", "_values", "names", "sql")

    def __init__(
        self,
        sql: str,
        plan: list[tuple[int, Callable[[Any], Any] | None]],
        constants: list[Any],
        values: list[Any] | None,
    ) -> None:
        self.sql = sql
        self._plan = plan
        self._constants = constants  # of Peewee's own, as `LIMIT -1` where only OFFSET is given
        self._values = values
        self.names = frozenset(v.name for v in values or () if type(v) is Parameter)

    def bind(self, values: Sequence[Any]) -> list[Any] | None:
        """The parameters for `sql`: the values of a query with the same key, converted.

        None if a converter made SQL of a value (as those of JSON fields may): then the text is
        another one, and Peewee has to make it. What a converter raises is raised.
        """
        if self._constants:
            values = [*values, *self._constants]
        parameters = []
        for index, convert in self._plan:
            value = values[index]
            if convert is not None:
                value = convert(value)
                if isinstance(value, _SQL_MAKERS):
                    return None
            parameters.append(value)
        return parameters

    def bind_named(self, named: Mapping[str, Any]) -> list[Any] | None:
        """The parameters for `sql`, with a value for each `param(…)`. None as in `bind()`.

        Raises:
            TypeError: a name is missing, or there is no such `param(…)` in the query.
        """
        if named.keys() != self.names:
            wrong = [f"missing {name!r}" for name in sorted(self.names - named.keys())]
            wrong += [f"unknown {name!r}" for name in sorted(named.keys() - self.names)]
            raise TypeError(f"Values for the query's parameters: {', '.join(wrong)}.")
        values = self._values or ()
        return self.bind([named[v.name] if type(v) is Parameter else v for v in values])


class Parameter(ColumnBase):
    """A value that comes later, by name. See `param()`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"param({self.name!r})"

    def __sql__(self, ctx: Any) -> Any:
        if isinstance(ctx, _Recorder):
            return ctx.value(self)
        raise peewee.InterfaceError(
            f"This query contains {self!r}, which has no value yet. It can't be executed as it "
            "is: prepare it, and give the values by name."
        )


def param(name: str) -> Any:
    """A value of a prepared query that comes later, by its name.

    It goes where a plain value can go, and is converted as that would be: `User.id ==
    param("user_id")`, `.limit(param("limit"))`, `.offset(param("skip"))`, `fn.COALESCE(User.name,
    param("name"))`, `Item.owner == param("owner")` (a user or an id), `User.id.in_([param("a"),
    param("b")])`. The same name twice takes the same value.

    It can't be used where Peewee, when it builds the query, looks at the value itself:

    - `User.id.in_(param("ids"))`: the length of a list is part of the SQL. Refused with TypeError.
    - `User.name == param("name")` with None: that remains `= NULL`, which is never true. Write
      `.is_null()`.
    - `contains()`, `startswith()`, `endswith()`: they search, but `%` and `_` in the value remain
      wildcards, since Peewee escapes only what it can see.
    - `paginate()` reckons with its numbers: use `limit()` and `offset()`.
    - What a JSON field is compared with: its value is made into SQL by the field.
    """
    return Parameter(name)


class _UnknownError(Exception):
    """There is something in the query of which we can't say how Peewee renders it."""


# --- The key -------------------------------------------------------------------------------------
#
# The tokens of a key are the tree in prefix order: for each node its type, the attributes that its
# SQL depends on, then its children, with a length before each list. So a key can only be read in
# one way, and equal keys mean equal trees. Identity stands for identity: fields compare, and hash,
# as Peewee wants it, and `==` of two fields is an expression, which is always true. Hence
# `MethodType(_is, field)`: a bound method equals another if their objects are the same object.
#
# A table, alias or subquery is a number, in the order of appearance, since Peewee numbers its
# aliases t1, t2, … in such an order; what else is to be known of it stands where it appears first.
# `seen` has the numbers, by what Peewee tells sources apart by: `_hash`, or identity.

_Walk = Callable[[Any, list[Any], list[Any], dict[Any, Any]], None]

_VALUE, _AS_IS, _CONVERTED, _LIST, _SOURCE, _END = "?", "as is", "converted", "list", "source", "."
_WITH, _INSTANCE = "with", "instance"
_PARAMETERS = "parameters allowed"

#: What a converter may return that is rendered, not bound.
_SQL_MAKERS = (Node, ModelBase)


def _is(_: Any) -> None:
    """Never called: see above."""


def _function(function: Any) -> Any:
    """A token for a function. A bound method is made anew whenever one asks for it."""
    if function is None or type(function) is MethodType:
        return function
    return MethodType(_is, function)


def _walk(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    _WALKS.get(type(node), _walk_other)(node, tokens, values, seen)


def _walk_value(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    tokens.append(_VALUE)
    values.append(node)


def _walk_list(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    tokens += _LIST, len(node)
    if len(node) > 8 and _PLAIN.issuperset(map(type, node)):
        tokens.extend(repeat(_VALUE, len(node)))  # a long IN list, at the speed of C
        values.extend(node)
        return
    for child in node:
        _WALKS.get(type(child), _walk_other)(child, tokens, values, seen)


def _walk_other(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    """What is known by a base class: fields, aliased fields, models, their instances, values."""
    cls = type(node)
    if isinstance(node, FieldAlias):  # each has a class of its own
        if cls.__sql__ is not FieldAlias.__sql__:
            raise _UnknownError
        index = _number(node.source, tokens, seen)
        tokens += FieldAlias, index, MethodType(_is, node.field), node._coerce
    elif isinstance(node, Field):
        if cls.__sql__ is not Field.__sql__ or cls.column is not Field.column:
            raise _UnknownError
        _WALKS[cls] = _walk_field
        _walk_field(node, tokens, values, seen)
    elif isinstance(node, Model):
        meta = node._meta
        if cls.__sql__ is not Model.__sql__ or meta.composite_key or meta.primary_key is False:
            raise _UnknownError
        tokens += _INSTANCE, cls
        values.append(node)
    elif isinstance(node, ModelBase):
        index = _number(node, tokens, seen)
        tokens += Model, index
    elif isinstance(node, Node | Context | GeneratorType):
        raise _UnknownError
    elif isinstance(node, multi_types):
        _walk_list(node, tokens, values, seen)
    else:
        _walk_value(node, tokens, values, seen)


def _number(source: Any, tokens: list[Any], seen: dict[Any, Any]) -> int:
    """The number of a source. If it's new, what there is to know of it goes before the node."""
    cls = type(source)
    if cls is ModelAlias:
        index = seen.get(source)
        if index is None:
            meta = source.model._meta
            index = seen[source] = len(seen)
            tokens += _SOURCE, index, source.alias, source.model, meta.table._path
            tokens += meta.schema, meta.table_name  # another table has gone by that name, maybe
        return index
    if cls in _SOURCES:
        index = seen.get(source._hash)
        if index is None:
            index = seen[source._hash] = len(seen)
            tokens += _SOURCE, index, source._alias, cls, source._path if cls is Table else None
        return index
    if isinstance(source, ModelBase):
        index = seen.get(source)
        if index is None:
            table = source._meta.table
            index = seen.get(table._hash)
            if index is None:
                index = seen[table._hash] = len(seen)
                tokens += _SOURCE, index, table._alias, source, table._path
            seen[source] = index
        return index
    raise _UnknownError


def _walk_field(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if node.model not in seen:
        _number(node.model, tokens, seen)
    tokens.append(MethodType(_is, node))


def _walk_source(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    """A table, an alias, or a CTE where it's used: by its name."""
    index = _number(node, tokens, seen)
    tokens += type(node), index


def _walk_column(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    index = _number(node.source, tokens, seen)
    tokens += Column, index, node.name, _function(node._converter)


def _walk_expression(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    op, lhs, rhs = node.op, node.lhs, node.rhs
    tokens += type(node), op, node.flat, _function(node._converter)
    _WALKS.get(type(lhs), _walk_other)(lhs, tokens, values, seen)
    if rhs is None and op in _NULL_TESTS:
        tokens.append(None)  # `IS NULL`: no parameter
        return
    if type(rhs) is Parameter and op in _LIST_TESTS:
        raise TypeError(f"{rhs!r} can't be a list: its length is part of the SQL.")
    _WALKS.get(type(rhs), _walk_other)(rhs, tokens, values, seen)


def _walk_value_node(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if node._converter is not None:
        tokens += Value, _function(node._converter)
    if node.multi:
        _walk_list(node.values, tokens, values, seen)
        return
    value, converter = node.value, node.converter
    if isinstance(value, _SQL_MAKERS):
        raise _UnknownError
    if converter is None:
        tokens.append(_VALUE)
    elif converter:
        tokens += _CONVERTED, _function(converter)
    else:
        tokens.append(_AS_IS)
    values.append(value)


def _walk_sql(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    params = node.params or ()
    tokens += SQL, node.sql, len(params), _function(node._converter)
    for value in params:
        if type(value) in (Parameter, _NamedTag):
            _walk(value, tokens, values, seen)
        elif isinstance(value, _SQL_MAKERS):
            raise _UnknownError
        else:
            _walk_value(value, tokens, values, seen)


def _walk_entity(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    tokens += Entity, tuple(node._path), _function(node._converter)


def _walk_function(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    order_by, condition = node._order_by, node._filter
    tokens += Function, node.name, node._coerce, len(node.arguments)
    tokens += _function(node._python_value), _function(node._converter)
    for child in node.arguments:
        _WALKS.get(type(child), _walk_other)(child, tokens, values, seen)
    if order_by:
        _walk_list(order_by, tokens, values, seen)
    if condition is not None:
        tokens.append("FILTER")
        _walk(condition, tokens, values, seen)
    tokens.append(_END)


def _walk_select(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    cls = type(node)
    index = _number(node, tokens, seen)
    if cls is not Select:
        model = _number(node.model, tokens, seen)
        tokens += cls, index, node._lateral, model, node._is_default
    else:
        tokens += cls, index, node._lateral
    if node._cte_list:
        _walk_with(node, tokens, values, seen)
    if node._distinct is not None:
        tokens.append("DISTINCT ON")
        _walk_list(node._distinct, tokens, values, seen)
    elif node._simple_distinct:
        tokens.append("DISTINCT")
    _walk_list(node._returning, tokens, values, seen)
    _walk_list(node._from_list, tokens, values, seen)
    if node._where is not None:
        tokens.append("WHERE")
        _walk(node._where, tokens, values, seen)
    if node._group_by:
        tokens.append("GROUP BY")
        _walk_list(node._group_by, tokens, values, seen)
    if node._having is not None:
        tokens.append("HAVING")
        _walk(node._having, tokens, values, seen)
    if node._windows is not None:
        tokens.append("WINDOW")
        _walk_list(node._windows, tokens, values, seen)
    if node._for_update is not None:
        tokens.append("FOR UPDATE")
        _walk(node._for_update, tokens, values, seen)
    _walk_tail(node, tokens, values, seen)


def _walk_compound(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    index = _number(node, tokens, seen)
    tokens += type(node), index, node.op
    if node._cte_list:
        _walk_with(node, tokens, values, seen)
    _walk(node.lhs, tokens, values, seen)
    _walk(node.rhs, tokens, values, seen)
    _walk_tail(node, tokens, values, seen)


def _walk_tail(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if node._order_by:
        tokens.append("ORDER BY")
        _walk_list(node._order_by, tokens, values, seen)
    if node._limit is not None:
        tokens.append("LIMIT")
        _walk(node._limit, tokens, values, seen)
    if node._offset is not None:
        tokens.append("OFFSET")
        _walk(node._offset, tokens, values, seen)
    tokens.append(_END)


def _walk_with(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    tokens += _WITH, len(node._cte_list)
    for cte in node._cte_list:
        if type(cte) is not CTE:
            raise _UnknownError
        index = _number(cte, tokens, seen)
        kept = cte._materialized  # None, True or False; 0 isn't False here
        tokens += index, bool(cte._recursive), bool(kept), kept is False
        _walk_list(cte._columns or (), tokens, values, seen)
        _walk(cte._query, tokens, values, seen)


def _walk_values_list(
    node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]
) -> None:
    index = _number(node, tokens, seen)
    tokens += ValuesList, index, tuple(node._columns or ())
    _walk_list(node._values, tokens, values, seen)


def _walk_window(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if node._extends is not None:
        raise _UnknownError
    _walk_simple(node, tokens, values, seen)


def _walk_window_alias(
    node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]
) -> None:
    tokens += WindowAlias, node.window._alias


def _walk_parameter(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if not seen[_PARAMETERS]:
        raise _UnknownError
    tokens += Parameter, node.name
    values.append(node)


def _walk_simple(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    """By the tables: a node with a fixed set of attributes and children."""
    cls = type(node)
    tokens += cls, _function(getattr(node, "_converter", None))
    for name in _ATTRIBUTES[cls]:
        tokens.append(getattr(node, name))
    for name in _CHILDREN[cls]:
        child = getattr(node, name)
        if child is None:
            tokens.append(None)
        else:
            _walk(child, tokens, values, seen)


_NULL_TESTS = (peewee.OP.IS, peewee.OP.IS_NOT)
_LIST_TESTS = (peewee.OP.IN, peewee.OP.NOT_IN)
_SELECTS = (Select, ModelSelect, ManyToManyQuery)
_COMPOUNDS = (CompoundSelectQuery, ModelCompoundSelectQuery)
_SOURCES = frozenset((Table, CTE, ValuesList, *_SELECTS, *_COMPOUNDS))

#: What the SQL of the simpler nodes depends on, besides their children.
_ATTRIBUTES: dict[Any, tuple[str, ...]] = {
    Alias: ("_alias", "_coerce"),
    BitwiseNegated: ("_coerce",),
    Case: (),
    Cast: ("_cast", "_coerce"),
    ForUpdate: ("_expr", "_nowait", "_skip_locked"),
    Join: ("join_type",),
    Negated: ("_coerce",),
    NodeList: ("glue", "parens"),
    Ordering: ("direction", "collation", "nulls", "_coerce"),
    Window: ("_alias", "_inline", "frame_type"),
}

#: The attributes that hold other nodes, or lists of them, or values.
_CHILDREN: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((Alias, BitwiseNegated, Cast, Negated, Ordering), ("node",)),
    **dict.fromkeys((Expression, StringExpression), ("lhs", "rhs")),
    **dict.fromkeys(
        _SELECTS,
        (
            *("_cte_list", "_distinct", "_returning", "_from_list", "_where", "_group_by"),
            *("_having", "_windows", "_for_update", "_order_by", "_limit", "_offset"),
        ),
    ),
    **dict.fromkeys(_COMPOUNDS, ("_cte_list", "lhs", "rhs", "_order_by", "_limit", "_offset")),
    CTE: ("_columns", "_query"),
    Case: ("predicate", "expression_tuples", "default"),
    ForUpdate: ("_of",),
    Function: ("arguments", "_order_by", "_filter"),
    Join: ("lhs", "rhs", "_on"),
    NodeList: ("nodes",),
    ValuesList: ("_values",),
    Window: ("partition_by", "order_by", "start", "end", "_exclude"),
}


class _Tag:
    """In the place of a value, when a template is compiled: nothing else is the same object."""


class _NamedTag:
    def __init__(self, name: str) -> None:
        self.name = name


class _InstanceTag(Node):
    """In the place of an instance of a model, which is a node itself."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __sql__(self, ctx: Any) -> Any:
        # As `Model.__sql__`: a foreign key converts the instance; elsewhere it's the primary key.
        primary_key = self.model._meta.primary_key
        by_foreign_key = ctx.state.converter if ctx.state.is_fk_expr else None

        def convert(instance: Any) -> Any:
            if by_foreign_key is not None:
                try:
                    converted = by_foreign_key(instance)
                except (TypeError, ValueError):
                    converted = instance
                if converted is not instance:
                    return converted
            return primary_key.db_value(getattr(instance, primary_key.name))

        return ctx.tag(self, convert)


def _walk_instance_tag(
    node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]
) -> None:
    tokens += _INSTANCE, node.model
    values.append(node)


_WALKS: dict[Any, _Walk] = {
    **dict.fromkeys((bool, bytes, float, int, str, type(None), _Tag), _walk_value),
    **dict.fromkeys((list, tuple), _walk_list),
    **dict.fromkeys(_ATTRIBUTES, _walk_simple),
    **dict.fromkeys((CTE, ModelAlias, Table), _walk_source),
    **dict.fromkeys((Expression, StringExpression), _walk_expression),
    **dict.fromkeys(_SELECTS, _walk_select),
    **dict.fromkeys(_COMPOUNDS, _walk_compound),
    **dict.fromkeys((Parameter, _NamedTag), _walk_parameter),
    Column: _walk_column,
    Entity: _walk_entity,
    Function: _walk_function,
    SQL: _walk_sql,
    Value: _walk_value_node,
    ValuesList: _walk_values_list,
    Window: _walk_window,
    WindowAlias: _walk_window_alias,
    _InstanceTag: _walk_instance_tag,
}
_PLAIN = frozenset(cls for cls, walk in _WALKS.items() if walk is _walk_value)


def shape_of(query: Any, *, parameters: bool = False) -> Shape | None:
    """The shape of a SELECT, or None if there is anything in it that we don't know.

    None for INSERT, UPDATE, DELETE and raw queries; for `with_related()`, which makes further
    queries; for classes of nodes that aren't Peewee's own or have their own `__sql__`.

    Arguments:
        parameters: whether the query may contain `param(…)`. If it does, its template is its own,
            by no means to be found by the key: the other values remain those of the query.
    """
    walk = _WALKS.get(type(query))
    if walk not in (_walk_select, _walk_compound) or getattr(query, "_load_tree", None):
        return None
    tokens: list[Any] = [query._row_type, _function(query._constructor)]
    values: list[Any] = []
    seen: dict[Any, Any] = {_PARAMETERS: parameters}
    try:
        walk(query, tokens, values, seen)
        for source, joins in (getattr(query, "_joins", None) or {}).items():
            # Not in the SQL: under which names the rows of joined tables are attached.
            tokens += _number(source, tokens, seen), len(joins)
            for dest, attribute, constructor, _ in joins:
                alias = type(constructor) is ModelAlias
                made = _number(constructor, tokens, seen) if alias else _function(constructor)
                tokens += _number(dest, tokens, seen), attribute, made
    except _UnknownError:
        return None
    return Shape(tuple(tokens), values, query)


# --- The template --------------------------------------------------------------------------------
#
# Which parameter is which value can't be told from the values: 1, True and 1 again are all the
# same. So the SQL is made of a copy of the query, with a tag of its own in the place of every
# value. Where a tag comes out, there goes the value. What comes out and is no tag, is a constant of
# Peewee's. The copy must have the key of the query: that the walk of the copy finds nothing but
# tags shows that no value was overlooked.


class _Slot(NamedTuple):
    tag: Any
    convert: Callable[[Any], Any] | None


class _Recorder(Context):
    """Makes the SQL as Peewee does, and collects which tag goes where."""

    def as_new(self) -> Any:
        return _Recorder(**self.state.settings)

    def value(self, value: Any, converter: Any = None, add_param: bool = True) -> Any:
        if type(value) not in (_Tag, _NamedTag, Parameter):
            return super().value(value, converter, add_param)
        if not converter:
            converter = self.state.converter if converter is None else None
        return self.tag(value, converter, add_param)

    def tag(self, tag: Any, convert: Any, add_param: bool = True) -> Any:
        self._values.append(_Slot(tag, convert))
        return self.literal(self.state.param or "?") if add_param else self


def _tagged(node: Any) -> Any:
    """A copy with tags for values; what holds no values is not copied."""
    cls = type(node)
    children = _CHILDREN.get(cls)
    if children is not None or cls in (SQL, Value):
        copy = object.__new__(cls)
        attributes = copy.__dict__
        attributes.update(node.__dict__)  # `_hash` included: as a source it remains the same
        if cls is SQL:
            attributes["params"] = [_tagged_value(value) for value in node.params or ()]
        elif cls is Value:
            if node.multi:
                attributes["values"] = _tagged(node.values)
            else:
                attributes["value"] = _Tag()
        else:
            compared = children == ("lhs", "rhs") and node.op not in _NULL_TESTS
            for name in children or ():
                if attributes[name] is not None or compared:
                    attributes[name] = _tagged(attributes[name])
        return copy
    if isinstance(node, multi_types):
        children = tuple(_tagged(child) for child in node)
        return children if cls is tuple else list(children)
    if isinstance(node, Model):
        return _InstanceTag(cls)
    if isinstance(node, _SQL_MAKERS) and cls is not Parameter:
        return node
    return _tagged_value(node)


def _tagged_value(value: Any) -> Any:
    return _NamedTag(value.name) if type(value) is Parameter else _Tag()


def with_values(query: Any, named: Mapping[str, Any]) -> Any:
    """A copy of a query with values in the place of its `param(…)`s. Its shape must be known."""

    def copied(node: Any) -> Any:
        cls = type(node)
        if cls is Parameter:
            return named[node.name]
        if isinstance(node, multi_types):
            return cls(copied(child) for child in node)
        names = {SQL: ("params",), Value: ("value",)}.get(cls) or _CHILDREN.get(cls)
        if names is None:
            return node
        if cls is Value and node.multi:
            names = ("values",)
        copy = object.__new__(cls)
        copy.__dict__.update(node.__dict__)  # `_hash` included: as a source it remains the same
        copy.__dict__.update((name, copied(node.__dict__[name])) for name in names)
        return copy

    result = copied(query)
    result._cursor_wrapper = None
    return result


def _changed(query: Any, original: Any, tagged: Any) -> Any:
    """`query`, a clone of `original` with another select list, with the tags of `tagged`."""
    cls = type(query)
    if cls is not type(original):
        raise _UnknownError
    result = object.__new__(cls)
    result.__dict__.update(query.__dict__)
    for name in _CHILDREN[cls]:
        ours, theirs = getattr(query, name), getattr(original, name)
        tags: Any = getattr(tagged, name)
        if name == "_returning":
            tags = _selection(ours, theirs, tags)
        elif not _same(ours, theirs):
            _refuse_values(ours)
            tags = ours
        result.__dict__[name] = tags
    return result


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(is_, ours, theirs))
    return ours is theirs


def _selection(ours: Sequence[Any], theirs: Sequence[Any], tags: Sequence[Any]) -> list[Any]:
    known: dict[int, Any] = {}
    for item, tag in zip(theirs, tags, strict=True):
        pairs = [(item, tag)]
        if type(item) is Alias:
            pairs.append((item.node, tag.node))
        for node, copy in pairs:
            # Twice the same object: the next query may have two, so whose values are they?
            known[id(node)] = None if id(node) in known else copy
    selection = []
    for item in ours:
        copy = known.get(id(item))
        if copy is None and type(item) is Alias:
            inner = known.get(id(item.node))
            copy = None if inner is None else item.clone()
            if copy is not None:
                copy.node = inner
        if copy is None:
            _refuse_values(item)
            copy = item
        selection.append(copy)
    return selection


def _refuse_values(node: Any) -> None:
    values: list[Any] = []
    if node is not None:
        _walk(node, [], values, {_PARAMETERS: True})
    if values:
        raise _UnknownError


def compile_template(query: Any, shape: Shape, database: Any) -> Template | None:
    """The statement of all queries with this shape, or None if it can't be proven to be theirs.

    It costs some three times as much as `query.sql()`. What that raises, is raised.

    Arguments:
        query: the query whose shape it is, or a clone of it with another select list, or another
            limit. The clone's values must be in nodes that it has in common with the query: in
            items of the select list (or in what these are aliases of), or in a whole clause.
        database: the template is for this one, and others that are set up in the same way.
    """
    if database.context_class is not Context:
        return None
    tagged = _tagged(shape.query)
    again = shape_of(tagged, parameters=True)
    if again is None or again.key != shape.key:
        return None
    index_of = {tag: index for index, tag in enumerate(again.values)}
    if len(index_of) != len(shape.values):
        return None
    try:
        if query is not shape.query:
            tagged = _changed(query, shape.query, tagged)
    except _UnknownError:
        return None
    options = database.get_context_options()
    sql, slots = _Recorder(**options).parse(tagged)
    plan: list[tuple[int, Callable[[Any], Any] | None]] = []
    constants: list[Any] = []
    for slot in slots:
        if type(slot) is not _Slot:
            plan.append((len(shape.values) + len(constants), None))
            constants.append(slot)
        elif slot.tag in index_of:
            plan.append((index_of[slot.tag], slot.convert))
        else:
            return None
    named = any(type(value) is Parameter for value in shape.values)
    context = _Recorder(**options) if named else database.get_sql_context()
    real_sql, real_parameters = context.parse(query)
    if sql != real_sql or len(slots) != len(real_parameters):
        return None  # a value has been made into SQL, by a converter
    return Template(sql, plan, constants, shape.values if named else None)
