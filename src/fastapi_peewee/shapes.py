"""What two queries have in common that differ in their values only: one SQL text, made once.

`shape_of()` takes a query apart, into a key and the values; `templates` makes of a shape the SQL
that binds the values of all queries with that key. `param()` stands for a value that comes later.

What belongs here is what Peewee makes SQL of: its nodes, and what their SQL depends on. What does
not: caches, connections, and how rows become objects. With `templates` and `state` this is all that
looks at what Peewee keeps private, and a node that it doesn't know is never guessed at.
"""

from collections.abc import Callable, Hashable
from itertools import repeat
from types import GeneratorType, MethodType
from typing import Any, NamedTuple

import peewee
from peewee import CTE, Expression, Field, FieldAlias, Model, ModelAlias, ModelBase, Node, Value

#: How many values a statement has at most of which something is remembered, here or by the server.
#: What that takes grows with them, and lists of many lengths are as many statements. `bulk_update`
#: of 100 rows has 300 values, and takes half as long where it is known.
MANY = 320


class Shape(NamedTuple):
    """A query without its values.

    Attributes:
        key: equal only for queries of which Peewee makes the same SQL, on the same database, with
            the same converters, row type and joins, whatever their values are. It holds what it
            names (fields, models, functions), so that nothing can take the place of what is gone;
            it holds no values, but for those that stand in `SQL("…")`.
        values: the values as they were given, not converted yet.
        query: the query itself, for `compile_template()`. Don't keep it: it holds the values.
        parameters: whether `param(…)` is allowed in it; then its template is for it alone.
    """

    key: Hashable
    values: list[Any]
    query: Any
    parameters: bool

    @property
    def names(self) -> frozenset[str]:
        """Of the `param(…)`s in it."""
        return frozenset(value.name for value in self.values if type(value) is Parameter)

    @property
    def models(self) -> set[Any]:
        """Those that it reads from, and some that it only names."""
        assert isinstance(self.key, tuple)
        return {token for token in self.key if isinstance(token, ModelBase)}


class Parameter(peewee.ColumnBase):
    """A value that comes later, by name. See `param()`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"param({self.name!r})"

    def __sql__(self, ctx: Any) -> Any:
        if isinstance(ctx, Recorder):
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


class Unknown(Exception):
    """There is something in the query of which we can't say how Peewee renders it."""


# --- The key -------------------------------------------------------------------------------------
#
# The tokens of a key are the tree in prefix order: for each node its type, what else its SQL
# depends on, then its children, with a length before each list. So a key can be read in one way
# only, and equal keys mean equal trees. Fields can't be tokens, since `==` of two fields makes an
# expression, which is always true. `MethodType(_is, field)` can: a bound method equals another if
# both are bound to the same object. And it keeps the object, whose `id()` could be another's later.
#
# A table, alias or subquery is a number, in the order of appearance, since Peewee numbers its
# aliases t1, t2, … in such an order; what else is to be known of it stands where it appears first.
# `seen` has the numbers, by what Peewee tells sources apart by: `_hash`, or identity.

_VALUE, _LIST, _SOURCE, _MODEL, _WITH = "?", "list", "source", "model", "with"
PARAMETERS = "whether there may be parameters"  # in `seen`

#: What a converter may return that is rendered, not bound.
SQL_MAKERS = (Node, ModelBase)

NULL_TESTS = (peewee.OP.IS, peewee.OP.IS_NOT)
_LIST_TESTS = (peewee.OP.IN, peewee.OP.NOT_IN)
_LISTS = frozenset((list, tuple))
_SELECTS = (peewee.Select, peewee.ModelSelect, peewee.ManyToManyQuery)
_COMPOUNDS = (peewee.CompoundSelectQuery, peewee.ModelCompoundSelectQuery)
QUERIES = frozenset(_SELECTS + _COMPOUNDS)
WRITES = frozenset((peewee.ModelDelete, peewee.ModelInsert, peewee.ModelUpdate))
_SOURCES = QUERIES | {peewee.Table, peewee.ValuesList, CTE}
EXPRESSIONS = (Expression, peewee.StringExpression)

#: What the SQL of a node, or the conversion of the column that it makes, depends on.
ATTRIBUTES: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(_SELECTS, ("_lateral", "_simple_distinct", "_is_default")),
    **dict.fromkeys(_COMPOUNDS, ("op",)),
    peewee.Select: ("_lateral", "_simple_distinct"),
    CTE: ("_recursive", "_materialized"),
    peewee.Alias: ("_alias", "_coerce", "_converter"),
    peewee.BitwiseNegated: ("_coerce", "_converter"),
    peewee.Case: ("_converter",),
    peewee.Cast: ("_cast", "_coerce", "_converter"),
    peewee.Entity: ("_path", "_converter"),
    peewee.ForUpdate: ("_expr", "_nowait", "_skip_locked"),
    peewee.Function: ("name", "_coerce", "_converter", "_python_value"),
    peewee.Join: ("join_type",),
    peewee.Negated: ("_coerce", "_converter"),
    peewee.NodeList: ("glue", "parens", "_converter"),
    peewee.Ordering: ("direction", "collation", "nulls", "_coerce", "_converter"),
    peewee.ValuesList: ("_columns",),
    peewee.Window: ("_alias", "_inline", "frame_type"),
    peewee.WindowAlias: (),
}

#: The attributes that hold other nodes, or lists of them, or values.
CHILDREN: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(ATTRIBUTES, ("node",)),
    **dict.fromkeys(EXPRESSIONS, ("lhs", "rhs")),
    **dict.fromkeys(
        _SELECTS,
        (
            *("_distinct", "_returning", "_from_list", "_where", "_group_by", "_having"),
            *("_windows", "_order_by", "_limit", "_offset", "_for_update"),
        ),
    ),
    **dict.fromkeys(_COMPOUNDS, ("lhs", "rhs", "_order_by", "_limit", "_offset")),
    CTE: ("_columns", "_query"),
    peewee.Case: ("predicate", "expression_tuples", "default"),
    peewee.Entity: (),
    peewee.ForUpdate: ("_of",),
    peewee.Function: ("arguments", "_order_by", "_filter"),
    peewee.Join: ("lhs", "rhs", "_on"),
    peewee.ModelDelete: ("_where", "_order_by", "_limit", "_offset", "_returning"),
    peewee.ModelInsert: ("_returning",),
    peewee.ModelUpdate: ("_where", "_order_by", "_limit", "_offset", "_returning"),
    peewee.NodeList: ("nodes",),
    peewee.ValuesList: ("_values",),
    peewee.Window: ("partition_by", "order_by", "start", "end", "_exclude"),
    peewee.WindowAlias: ("window",),
}


def _is(_: Any) -> None:
    """Never called: see above."""


def _token(value: Any) -> Any:
    """An attribute as a token: texts and flags by value, anything else by identity."""
    cls = type(value)
    if value is None or cls is str or cls is bool or cls is MethodType:
        return value  # a bound method is another object whenever one asks for it
    return tuple(map(_token, value)) if cls in (tuple, list) else MethodType(_is, value)


def walk(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    _WALKS.get(type(node), _walk_other)(node, tokens, values, seen)


def _walk_node(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    cls = type(node)
    tokens.append(cls)
    if cls in _SOURCES:
        tokens.append(_number(node, tokens, seen))
    tokens.extend([_token(getattr(node, name)) for name in ATTRIBUTES[cls]])
    children = node.__dict__
    for name in CHILDREN[cls]:
        child = children[name]
        if child is None:
            tokens.append(None)
        else:
            _WALKS.get(type(child), _walk_other)(child, tokens, values, seen)


def _walk_query(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if node._cte_list:
        tokens += _WITH, len(node._cte_list)
        for cte in node._cte_list:  # the definitions; elsewhere a CTE is but its name
            if type(cte) is not CTE:
                raise Unknown
            _walk_node(cte, tokens, values, seen)
    if type(node) not in (peewee.Select, peewee.CompoundSelectQuery):
        number = _number(node.model, tokens, seen)
        tokens += _MODEL, number
    _walk_node(node, tokens, values, seen)


def _walk_write(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> int:
    """Returns how many columns are written."""
    cls, columns = type(node), 0
    if node._cte_list or getattr(node, "_from", None) is not None:
        raise Unknown
    number = _number(node.model, tokens, seen)
    tokens += cls, number
    if cls is not peewee.ModelDelete:
        written = node._update if cls is peewee.ModelUpdate else _inserted(node)
        columns = len(written)
        tokens.append(columns)
        for field, value in written.items():
            if not isinstance(field, Field):
                raise Unknown
            walk(field, tokens, values, seen)
            if cls is peewee.ModelUpdate and isinstance(value, Node):
                _walk_assigned(value, tokens, values, seen)
            elif isinstance(value, SQL_MAKERS):
                raise Unknown
            elif cls is peewee.ModelUpdate and type(field).to_value is not Field.to_value:
                raise Unknown  # converted as the SQL is made, not when it is bound: JSON
            else:
                _walk_value(value, tokens, values, seen)  # a list is one value, too
    for name in CHILDREN[cls]:
        child = getattr(node, name)
        if child is None:
            tokens.append(None)
        else:
            walk(child, tokens, values, seen)
    return columns


def _inserted(node: Any) -> dict[Any, Any]:
    """The one row of an INSERT that says all that is to be known of its columns."""
    row = node._insert
    if type(row) is not dict or not row or node._columns or node._on_conflict is not None:
        raise Unknown
    if any(field not in row for field in node.model._meta.defaults):
        raise Unknown  # the value of a default is made with the SQL
    return row


def _walk_assigned(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    """An expression such as `Counter.value + 1`; a model is one to Peewee, too, but not to us."""
    if isinstance(node, Model | Parameter):
        raise Unknown
    walk(node, tokens, values, seen)


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


def _walk_field(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if node.model not in seen:
        _number(node.model, tokens, seen)
    tokens.append(MethodType(_is, node))


def _walk_source(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    tokens.append(_number(node, tokens, seen))


def _walk_column(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    number = _number(node.source, tokens, seen)
    tokens += peewee.Column, number, _token(node.name), _token(node._converter)


def _walk_expression(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    op, lhs, rhs = node.op, node.lhs, node.rhs
    tokens += type(node), _token(op), not node.flat, _token(node._converter)
    _WALKS.get(type(lhs), _walk_other)(lhs, tokens, values, seen)
    if rhs is None and op in NULL_TESTS:
        tokens.append(None)  # `IS NULL`: no parameter
        return
    if type(rhs) is Parameter and op in _LIST_TESTS:
        raise TypeError(f"{rhs!r} can't be a list: its length is part of the SQL.")
    _WALKS.get(type(rhs), _walk_other)(rhs, tokens, values, seen)


def _walk_value_node(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    # The converter of a list is that of its items. False and 0 mean: none, whatever the context.
    tokens += Value, node.multi, _token(node.converter or node.converter is None)
    tokens.append(_token(node._converter))
    if node.multi:
        _walk_list(node.values, tokens, values, seen)
    else:
        _walk_bare(node.value, tokens, values, seen)


def _walk_bare(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    """A value where a list is one value, too, and where a node would be something else."""
    if type(node) in (Parameter, NamedTag):
        _walk_parameter(node, tokens, values, seen)
    elif isinstance(node, SQL_MAKERS):
        raise Unknown
    else:
        _walk_value(node, tokens, values, seen)


def _walk_sql(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    params = node.params or ()
    if type(params) not in _LISTS:
        raise Unknown
    tokens += peewee.SQL, _token(node.sql), len(params), _token(node._converter)
    for value in params:
        _walk_bare(value, tokens, values, seen)


def _walk_rows(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    """What has a list of lists, of whatever can be iterated over: perhaps but once."""
    rows = node.expression_tuples if type(node) is peewee.Case else node._values
    if type(rows) not in _LISTS or not _LISTS.issuperset(map(type, rows)):
        raise Unknown
    _walk_node(node, tokens, values, seen)


def _walk_window(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if node._extends is not None:
        raise Unknown
    _walk_node(node, tokens, values, seen)


def _walk_parameter(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if not seen[PARAMETERS]:
        raise Unknown
    tokens += Parameter, node.name
    values.append(node)


def _walk_instance(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    tokens += Model, node.model if type(node) is InstanceTag else type(node)
    values.append(node)


def _walk_other(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    """What is known by a base class: fields, aliased fields, models, their instances, values."""
    cls = type(node)
    if isinstance(node, FieldAlias):  # each has a class of its own
        if cls.__sql__ is not FieldAlias.__sql__:
            raise Unknown
        number = _number(node.source, tokens, seen)
        tokens += FieldAlias, number, MethodType(_is, node.field), not node._coerce
    elif isinstance(node, Field):
        if cls.__sql__ is not Field.__sql__ or cls.column is not Field.column:
            raise Unknown
        _WALKS[cls] = _walk_field
        _walk_field(node, tokens, values, seen)
    elif isinstance(node, Model):
        meta = node._meta
        if cls.__sql__ is not Model.__sql__ or meta.composite_key or meta.primary_key is False:
            raise Unknown
        _walk_instance(node, tokens, values, seen)
    elif isinstance(node, ModelBase):
        _walk_source(node, tokens, values, seen)
    elif isinstance(node, Node | peewee.Context | GeneratorType):
        raise Unknown
    elif isinstance(node, peewee.multi_types):
        _walk_list(node, tokens, values, seen)
    else:
        _walk_value(node, tokens, values, seen)


def _number(source: Any, tokens: list[Any], seen: dict[Any, Any]) -> int:
    """The number of a source. If it's new, what there is to know of it comes before the node."""
    cls = type(source)
    if cls in _SOURCES:
        number = seen.get(source._hash)
        if number is None:
            number = seen[source._hash] = len(seen)
            path = source._path if cls is peewee.Table else None
            tokens += _SOURCE, number, cls, _token(source._alias), path
        return number
    if cls is not ModelAlias and not isinstance(source, ModelBase):
        raise Unknown
    number = seen.get(source)
    if number is None and cls is ModelAlias:
        meta = source.model._meta
        number = seen[source] = len(seen)
        tokens += _SOURCE, number, source.model, _token(source.alias), meta.table._path
        tokens += meta.schema, meta.table_name  # renamed since the table was made, maybe
    elif number is None:
        table = source._meta.table
        number = seen[source] = seen.setdefault(table._hash, len(seen))
        tokens += _SOURCE, number, source, _token(table._alias), table._path
    return number


class Tag:
    """In the place of a value, when a template is compiled: nothing else is the same object."""


class NamedTag:
    def __init__(self, name: str) -> None:
        self.name = name


class InstanceTag(Node):
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


class Slot(NamedTuple):
    tag: Any
    convert: Callable[[Any], Any] | None


class Recorder(peewee.Context):
    """Makes the SQL as Peewee does, and collects which tag goes where."""

    def as_new(self) -> Any:
        return Recorder(**self.state.settings)

    def value(self, value: Any, converter: Any = None, add_param: bool = True) -> Any:
        if type(value) not in TAGS and type(value) is not Parameter:
            return super().value(value, converter, add_param)
        if not converter:
            converter = self.state.converter if converter is None else None
        return self.tag(value, converter, add_param)

    def tag(self, tag: Any, convert: Any, add_param: bool = True) -> Any:
        self._values.append(Slot(tag, convert))
        return self.literal(self.state.param or "?") if add_param else self


TAGS = frozenset((Tag, NamedTag, InstanceTag))
_WALKS: dict[Any, Callable[[Any, list[Any], list[Any], dict[Any, Any]], None]] = {
    **dict.fromkeys((bool, bytes, float, int, str, type(None), Tag), _walk_value),
    **dict.fromkeys((list, tuple), _walk_list),
    **dict.fromkeys(ATTRIBUTES, _walk_node),
    **dict.fromkeys((CTE, ModelAlias, peewee.Table), _walk_source),
    **dict.fromkeys(EXPRESSIONS, _walk_expression),
    **dict.fromkeys(QUERIES, _walk_query),
    **dict.fromkeys((Parameter, NamedTag), _walk_parameter),
    **dict.fromkeys((peewee.Case, peewee.ValuesList), _walk_rows),
    peewee.Column: _walk_column,
    peewee.SQL: _walk_sql,
    peewee.Window: _walk_window,
    Value: _walk_value_node,
    InstanceTag: _walk_instance,
}
_PLAIN = frozenset(cls for cls, walk in _WALKS.items() if walk is _walk_value)


def shape_of_write(query: Any) -> Shape | None:
    """The shape of an INSERT of one row, an UPDATE or a DELETE, or None.

    None if there is anything in it that we don't know, for rows that lack columns for which the
    model has defaults, and for more than `MANY` values besides one for each column.
    """
    if type(query) not in WRITES:
        return None
    tokens: list[Any] = []
    values: list[Any] = []
    try:
        columns = _walk_write(query, tokens, values, {PARAMETERS: False})
    except Unknown:
        return None
    if len(values) - columns > MANY:
        return None
    return Shape(tuple(tokens), values, query, parameters=False)


def shape_of(query: Any, *, parameters: bool = False) -> Shape | None:
    """The shape of a SELECT, or None if there is anything in it that we don't know.

    None for INSERT, UPDATE, DELETE and raw queries; for `with_related()`, which makes further
    queries; for classes of nodes that aren't Peewee's own or have their own `__sql__`; for more
    than `MANY` values, unless it may contain `param(…)`.

    Arguments:
        parameters: whether the query may contain `param(…)`. Its template is its own then, by no
            means to be found by the key: the other values remain those of the query.
    """
    if type(query) not in QUERIES or getattr(query, "_load_tree", None):
        return None
    tokens: list[Any] = [query._row_type, _token(query._constructor)]
    values: list[Any] = []
    seen: dict[Any, Any] = {PARAMETERS: parameters}
    try:
        _walk_query(query, tokens, values, seen)
        for source, joins in (getattr(query, "_joins", None) or {}).items():
            # Not in the SQL: under which names the rows of joined tables are attached.
            tokens += _number(source, tokens, seen), len(joins)
            for dest, attribute, constructor, _ in joins:
                alias = type(constructor) is ModelAlias
                made = _number(constructor, tokens, seen) if alias else _token(constructor)
                tokens += _number(dest, tokens, seen), attribute, made
    except Unknown:
        return None
    if len(values) > MANY and not parameters:
        return None
    return Shape(tuple(tokens), values, query, parameters)
