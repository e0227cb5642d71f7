"""Of a shape, the SQL of all queries that have it: `compile_template()`.

Which parameter is which value can't be told from the values: 1, True and 1 again are all the
same. So the SQL is made of a copy of the query, with a tag of its own in the place of every value.
Where a tag comes out, there goes the value. What comes out and is no tag, is a constant of
Peewee's. The copy must have the key of the query: that the walk of the copy finds nothing but tags
shows that no value was overlooked.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import peewee
from peewee import CTE, Model, Node, Value

from .shapes import (
    CHILDREN,
    EXPRESSIONS,
    NULL_TESTS,
    PARAMETERS,
    QUERIES,
    SQL_MAKERS,
    TAGS,
    WRITES,
    InstanceTag,
    NamedTag,
    Parameter,
    Recorder,
    Shape,
    Slot,
    Tag,
    Unknown,
    shape_of,
    shape_of_write,
    walk,
)


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

    @property
    def converts_alone(self) -> bool:
        """Whether nobody's code but Peewee's own converts the values: always in the same way."""
        return all(convert is None or _converts_alone(convert) for _, convert in self._plan)

    def bind(self, values: Sequence[Any]) -> list[Any] | None:
        """The parameters for `sql`: the values of a query with the same key, converted.

        None if a converter made SQL of a value (as those of JSON fields may): then the text is
        another one, and Peewee has to make it. What a converter raises is raised.
        """
        parameters, whole = self.convert(values)
        return parameters if whole else None

    def convert(self, values: Sequence[Any]) -> tuple[list[Any], bool]:
        """The same, and whether these are all: else the last of them is what became SQL."""
        if self._constants:
            values = [*values, *self._constants]
        parameters: list[Any] = []
        for index, convert in self._plan:
            value = values[index]
            if convert is not None:
                value = convert(value)
                if isinstance(value, SQL_MAKERS):
                    return [*parameters, value], False
            parameters.append(value)
        return parameters, True

    def made_anew(
        self, query: Any, database: Any, values: Sequence[Any], converted: list[Any]
    ) -> tuple[str, list[Any]]:
        """The statement of a query of which `convert(values)` has converted some: these aren't
        converted again.
        """
        context = _Converted(**database.get_context_options())
        for (index, convert), value in zip(self._plan, converted, strict=False):
            if convert is not None:
                context.known.setdefault(id(values[index]), []).append((convert, value))
        sql, parameters = context.parse(query)
        return sql, parameters

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


class _Converted(peewee.Context):
    """Makes the SQL as Peewee does, of values of which some have been converted."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        #: By the `id()` of the value: the converters and what they have returned, in order.
        self.known: dict[int, list[tuple[Any, Any]]] = {}

    def as_new(self) -> Any:
        context = _Converted(**self.state.settings)
        context.known = self.known
        return context

    def value(self, value: Any, converter: Any = None, add_param: bool = True) -> Any:
        if not converter:
            converter = self.state.converter if converter is None else None
        made = self.known.get(id(value), [])
        found = next((each for each in made if each[0] == converter), None)
        if found is None:
            return super().value(value, converter or False, add_param)
        made.remove(found)  # if the same value comes again, it's the next one's turn
        return super().value(found[1], False, add_param)


def _converts_alone(convert: Any) -> bool:
    owner = getattr(convert, "__self__", None)
    if isinstance(owner, peewee.ForeignKeyField) and not _converts_alone(owner.rel_field.db_value):
        return False
    return is_peewees(type(owner) if isinstance(owner, peewee.Field) else convert)


def is_peewees(thing: Any) -> bool:
    """Whether a class or function is Peewee's own, and nobody else's code."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in ("peewee", "playhouse")


def copied(node: Any, leaf: Callable[[Any], Any]) -> Any:
    """A copy with `leaf(value)` in the place of each value; what holds none is not copied."""
    cls = type(node)
    if cls in (peewee.SQL, Value) or (cls in CHILDREN and cls is not CTE):
        return _copied_node(node, leaf)
    if isinstance(node, peewee.multi_types):
        items = [copied(child, leaf) for child in node]
        return tuple(items) if cls is tuple else items
    if isinstance(node, SQL_MAKERS) and not isinstance(node, Parameter | Model):
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
        attributes["values"] = copied(node.values, leaf)
    else:
        if cls in QUERIES and node._cte_list:
            attributes["_cte_list"] = [_copied_node(cte, leaf) for cte in node._cte_list]
        for name in ("_insert", "_update") if cls in WRITES else ():
            if name in attributes:
                attributes[name] = {
                    field: copied(value, leaf) if isinstance(value, Node) else leaf(value)
                    for field, value in attributes[name].items()
                }
        for name in CHILDREN[cls]:
            if attributes[name] is not None or cls in EXPRESSIONS:
                attributes[name] = copied(attributes[name], leaf)  # None in `x < None` is a value
        if cls in EXPRESSIONS and node.rhs is None and node.op in NULL_TESTS:
            attributes["rhs"] = None  # in `x IS NULL` it's not
    return copy


def _tag(value: Any) -> Any:
    if isinstance(value, Model):
        return InstanceTag(type(value))
    return NamedTag(value.name) if type(value) is Parameter else Tag()


def with_values(query: Any, named: Mapping[str, Any]) -> Any:
    """A copy of a query with values in the place of its `param(…)`s. Its shape must be known."""
    result = copied(query, lambda leaf: named[leaf.name] if type(leaf) is Parameter else leaf)
    result._cursor_wrapper = None
    return result


def _changed(query: Any, original: Any, tagged: Any) -> Any:
    """`query`, a clone of `original` with another select list, with the tags of `tagged`."""
    cls = type(query)
    if cls is not type(original):
        raise Unknown
    result = object.__new__(cls)
    result.__dict__.update(query.__dict__)
    for name in (*CHILDREN[cls], "_cte_list"):
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
        walk(node, [], values, {PARAMETERS: True})
    if values:
        raise Unknown


def compile_template(
    query: Any, shape: Shape, database: Any, made: tuple[str, list[Any]] | None = None
) -> Template | None:
    """The statement of all queries with this shape, or None if it can't be proven to be theirs.

    It costs some three times as much as `query.sql()`. What that raises, is raised.

    Arguments:
        query: the query whose shape it is, or a clone of it with another select list, or another
            limit. The clone's values must be in nodes that it has in common with the query: in
            items of the select list (or in what these are aliases of), or in a whole clause.
        database: the template is for this one, and others that are set up in the same way.
        made: what Peewee makes of the query, where the caller has had that made already: values
            are converted as it is.
    """
    if database.context_class is not peewee.Context:
        return None
    tagged = copied(shape.query, _tag)
    write = type(query) in WRITES
    again = shape_of_write(tagged) if write else shape_of(tagged, parameters=True)
    if again is None or again.key != shape.key:
        return None
    index_of = {tag: index for index, tag in enumerate(again.values)}
    if len(index_of) != len(shape.values) or not TAGS.issuperset(map(type, again.values)):
        return None  # a value was overlooked
    try:
        if query is not shape.query:
            tagged = _changed(query, shape.query, tagged)
    except Unknown:
        return None
    options = database.get_context_options()
    context = Recorder(**options) if shape.names else database.get_sql_context()
    real_sql, real_parameters = made or context.parse(query)
    try:
        sql, slots = Recorder(**options).parse(tagged)
    except Exception:
        return None  # a field's own code has met a tag
    plan: list[tuple[int, Callable[[Any], Any] | None]] = []
    constants: list[Any] = []
    for slot in slots:
        if type(slot) is not Slot:
            plan.append((len(shape.values) + len(constants), None))
            constants.append(slot)
        elif slot.tag in index_of:
            plan.append((index_of[slot.tag], slot.convert))
        else:
            return None
    if sql != real_sql or len(slots) != len(real_parameters):
        return None  # a value has been made into SQL, by a converter
    # In a SELECT there may be values that are rendered elsewhere: of a window, say.
    if write and not index_of.keys() <= {slot.tag for slot in slots if type(slot) is Slot}:
        return None  # a field's own code has made something of a tag
    return Template(sql, plan, constants, shape.values if shape.parameters else None)
