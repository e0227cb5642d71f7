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
from peewee import CTE, Expression, Field, FieldAlias, Model, ModelAlias, ModelBase, Node, Value

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


class Template:
    """A compiled statement: the SQL, and which value goes where through which converter.

    Attributes:
        sql: the text, as Peewee made it.
        names: of the `param(…)`s, if it was compiled to be bound by name.
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

        Only for what was compiled of `shape_of(query, parameters=True)`: it has kept the values
        of that query that are no `param(…)`.

        Raises:
            TypeError: a name is missing, or there is no such `param(…)` in the query.
        """
        if named.keys() != self.names:
            wrong = [f"missing {name!r}" for name in sorted(self.names - named.keys())]
            wrong += [f"unknown {name!r}" for name in sorted(named.keys() - self.names)]
            raise TypeError(f"Values for the query's parameters: {', '.join(wrong)}.")
        assert self._values is not None
        return self.bind([named[v.name] if type(v) is Parameter else v for v in self._values])


class Parameter(peewee.ColumnBase):
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
_PARAMETERS = "whether there may be parameters"  # in `seen`

#: What a converter may return that is rendered, not bound.
_SQL_MAKERS = (Node, ModelBase)

_NULL_TESTS = (peewee.OP.IS, peewee.OP.IS_NOT)
_LIST_TESTS = (peewee.OP.IN, peewee.OP.NOT_IN)
_SELECTS = (peewee.Select, peewee.ModelSelect, peewee.ManyToManyQuery)
_COMPOUNDS = (peewee.CompoundSelectQuery, peewee.ModelCompoundSelectQuery)
_QUERIES = frozenset(_SELECTS + _COMPOUNDS)
_SOURCES = _QUERIES | {peewee.Table, peewee.ValuesList, CTE}
_EXPRESSIONS = (Expression, peewee.StringExpression)

#: What the SQL of a node, or the conversion of the column that it makes, depends on.
_ATTRIBUTES: dict[Any, tuple[str, ...]] = {
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
_CHILDREN: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(_ATTRIBUTES, ("node",)),
    **dict.fromkeys(_EXPRESSIONS, ("lhs", "rhs")),
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


def _walk(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    _WALKS.get(type(node), _walk_other)(node, tokens, values, seen)


def _walk_node(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    cls = type(node)
    tokens.append(cls)
    if cls in _SOURCES:
        tokens.append(_number(node, tokens, seen))
    tokens.extend([_token(getattr(node, name)) for name in _ATTRIBUTES[cls]])
    children = node.__dict__
    for name in _CHILDREN[cls]:
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
                raise _UnknownError
            _walk_node(cte, tokens, values, seen)
    if type(node) not in (peewee.Select, peewee.CompoundSelectQuery):
        number = _number(node.model, tokens, seen)
        tokens += _MODEL, number
    _walk_node(node, tokens, values, seen)


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
    if rhs is None and op in _NULL_TESTS:
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
    if type(node) in (Parameter, _NamedTag):
        _walk_parameter(node, tokens, values, seen)
    elif isinstance(node, _SQL_MAKERS):
        raise _UnknownError
    else:
        _walk_value(node, tokens, values, seen)


def _walk_sql(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    params = node.params or ()
    tokens += peewee.SQL, _token(node.sql), len(params), _token(node._converter)
    for value in params:
        _walk_bare(value, tokens, values, seen)


def _walk_window(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if node._extends is not None:
        raise _UnknownError
    _walk_node(node, tokens, values, seen)


def _walk_parameter(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    if not seen[_PARAMETERS]:
        raise _UnknownError
    tokens += Parameter, node.name
    values.append(node)


def _walk_instance(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    tokens += Model, node.model if type(node) is _InstanceTag else type(node)
    values.append(node)


def _walk_other(node: Any, tokens: list[Any], values: list[Any], seen: dict[Any, Any]) -> None:
    """What is known by a base class: fields, aliased fields, models, their instances, values."""
    cls = type(node)
    if isinstance(node, FieldAlias):  # each has a class of its own
        if cls.__sql__ is not FieldAlias.__sql__:
            raise _UnknownError
        number = _number(node.source, tokens, seen)
        tokens += FieldAlias, number, MethodType(_is, node.field), not node._coerce
    elif isinstance(node, Field):
        if cls.__sql__ is not Field.__sql__ or cls.column is not Field.column:
            raise _UnknownError
        _WALKS[cls] = _walk_field
        _walk_field(node, tokens, values, seen)
    elif isinstance(node, Model):
        meta = node._meta
        if cls.__sql__ is not Model.__sql__ or meta.composite_key or meta.primary_key is False:
            raise _UnknownError
        _walk_instance(node, tokens, values, seen)
    elif isinstance(node, ModelBase):
        _walk_source(node, tokens, values, seen)
    elif isinstance(node, Node | peewee.Context | GeneratorType):
        raise _UnknownError
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
        raise _UnknownError
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


_TAGS = frozenset((_Tag, _NamedTag, _InstanceTag))
_WALKS: dict[Any, Callable[[Any, list[Any], list[Any], dict[Any, Any]], None]] = {
    **dict.fromkeys((bool, bytes, float, int, str, type(None), _Tag), _walk_value),
    **dict.fromkeys((list, tuple), _walk_list),
    **dict.fromkeys(_ATTRIBUTES, _walk_node),
    **dict.fromkeys((CTE, ModelAlias, peewee.Table), _walk_source),
    **dict.fromkeys(_EXPRESSIONS, _walk_expression),
    **dict.fromkeys(_QUERIES, _walk_query),
    **dict.fromkeys((Parameter, _NamedTag), _walk_parameter),
    peewee.Column: _walk_column,
    peewee.SQL: _walk_sql,
    peewee.Window: _walk_window,
    Value: _walk_value_node,
    _InstanceTag: _walk_instance,
}
_PLAIN = frozenset(cls for cls, walk in _WALKS.items() if walk is _walk_value)


def shape_of(query: Any, *, parameters: bool = False) -> Shape | None:
    """The shape of a SELECT, or None if there is anything in it that we don't know.

    None for INSERT, UPDATE, DELETE and raw queries; for `with_related()`, which makes further
    queries; for classes of nodes that aren't Peewee's own or have their own `__sql__`.

    Arguments:
        parameters: whether the query may contain `param(…)`. Its template is its own then, by no
            means to be found by the key: the other values remain those of the query.
    """
    if type(query) not in _QUERIES or getattr(query, "_load_tree", None):
        return None
    tokens: list[Any] = [query._row_type, _token(query._constructor)]
    values: list[Any] = []
    seen: dict[Any, Any] = {_PARAMETERS: parameters}
    try:
        _walk_query(query, tokens, values, seen)
        for source, joins in (getattr(query, "_joins", None) or {}).items():
            # Not in the SQL: under which names the rows of joined tables are attached.
            tokens += _number(source, tokens, seen), len(joins)
            for dest, attribute, constructor, _ in joins:
                alias = type(constructor) is ModelAlias
                made = _number(constructor, tokens, seen) if alias else _token(constructor)
                tokens += _number(dest, tokens, seen), attribute, made
    except _UnknownError:
        return None
    return Shape(tuple(tokens), values, query, parameters)


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


class _Recorder(peewee.Context):
    """Makes the SQL as Peewee does, and collects which tag goes where."""

    def as_new(self) -> Any:
        return _Recorder(**self.state.settings)

    def value(self, value: Any, converter: Any = None, add_param: bool = True) -> Any:
        if type(value) not in _TAGS and type(value) is not Parameter:
            return super().value(value, converter, add_param)
        if not converter:
            converter = self.state.converter if converter is None else None
        return self.tag(value, converter, add_param)

    def tag(self, tag: Any, convert: Any, add_param: bool = True) -> Any:
        self._values.append(_Slot(tag, convert))
        return self.literal(self.state.param or "?") if add_param else self


def _copied(node: Any, leaf: Callable[[Any], Any]) -> Any:
    """A copy with `leaf(value)` in the place of each value; what holds none is not copied."""
    cls = type(node)
    if cls in (peewee.SQL, Value) or (cls in _CHILDREN and cls is not CTE):
        return _copied_node(node, leaf)
    if isinstance(node, peewee.multi_types):
        items = [_copied(child, leaf) for child in node]
        return tuple(items) if cls is tuple else items
    if isinstance(node, _SQL_MAKERS) and not isinstance(node, Parameter | Model):
        return node
    return leaf(node)


def _copied_node(node: Any, leaf: Callable[[Any], Any]) -> Any:
    cls = type(node)
    copy = object.__new__(cls)
    attributes = copy.__dict__
    attributes.update(node.__dict__)  # `_hash` included: as a source it remains the same
    if cls is peewee.SQL:
        attributes["params"] = [leaf(value) for value in node.params or ()]
    elif cls is Value and not node.multi:
        attributes["value"] = leaf(node.value)
    elif cls is Value:
        attributes["values"] = _copied(node.values, leaf)
    else:
        if cls in _QUERIES and node._cte_list:
            attributes["_cte_list"] = [_copied_node(cte, leaf) for cte in node._cte_list]
        for name in _CHILDREN[cls]:
            if attributes[name] is not None or cls in _EXPRESSIONS:
                attributes[name] = _copied(attributes[name], leaf)  # None in `x < None` is a value
        if cls in _EXPRESSIONS and node.rhs is None and node.op in _NULL_TESTS:
            attributes["rhs"] = None  # in `x IS NULL` it's not
    return copy


def _tag(value: Any) -> Any:
    if isinstance(value, Model):
        return _InstanceTag(type(value))
    return _NamedTag(value.name) if type(value) is Parameter else _Tag()


def with_values(query: Any, named: Mapping[str, Any]) -> Any:
    """A copy of a query with values in the place of its `param(…)`s. Its shape must be known."""
    result = _copied(query, lambda leaf: named[leaf.name] if type(leaf) is Parameter else leaf)
    result._cursor_wrapper = None
    return result


def _changed(query: Any, original: Any, tagged: Any) -> Any:
    """`query`, a clone of `original` with another select list, with the tags of `tagged`."""
    cls = type(query)
    if cls is not type(original):
        raise _UnknownError
    result = object.__new__(cls)
    result.__dict__.update(query.__dict__)
    for name in (*_CHILDREN[cls], "_cte_list"):
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
        if type(item) is peewee.Alias:
            pairs.append((item.node, tag.node))
        for node, copy in pairs:
            # Twice the same object: the next query may have two, so whose values are they?
            known[id(node)] = None if id(node) in known else copy
    selection = []
    for item in ours:
        copy = known.get(id(item))
        if copy is None and type(item) is peewee.Alias:
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
    if database.context_class is not peewee.Context:
        return None
    tagged = _copied(shape.query, _tag)
    again = shape_of(tagged, parameters=True)
    if again is None or again.key != shape.key:
        return None
    index_of = {tag: index for index, tag in enumerate(again.values)}
    if len(index_of) != len(shape.values) or not _TAGS.issuperset(map(type, again.values)):
        return None  # a value was overlooked
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
    context = _Recorder(**options) if shape.names else database.get_sql_context()
    real_sql, real_parameters = context.parse(query)
    if sql != real_sql or len(slots) != len(real_parameters):
        return None  # a value has been made into SQL, by a converter
    return Template(sql, plan, constants, shape.values if shape.parameters else None)
