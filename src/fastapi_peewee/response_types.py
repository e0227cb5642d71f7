"""What a response type asks of a model, as a tree of columns and relations.

It reads Pydantic's core schema and Peewee's metadata, once for each pair. Where something can't be
told, the tree holds the reason in words, and `plans` takes a more general way.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from inspect import getattr_static
from typing import Any, ForwardRef, NamedTuple

import peewee
from peewee import BackrefAccessor, ManyToManyFieldAccessor
from pydantic import TypeAdapter

from .annotations import asked, asks
from .exceptions import SchemaError
from .state import lazy_loads_forbidden
from .templates import is_peewees
from .trees import Depth, Leaf, Relation, Tree

#: Settings of a Pydantic class that change nothing in the JSON of what came from the database.
_HARMLESS_CONFIG = {
    "extra_fields_behavior",
    "from_attributes",
    "frozen",
    "loc_by_alias",
    "serialize_by_alias",
    "title",
    "validate_by_alias",
    "validate_by_name",
    "validate_default",
    "validation_error_cause",
}

#: Those of SQL that Peewee's users write; there are others.
_AGGREGATES = {
    *("ARRAY_AGG", "AVG", "COUNT", "GROUP_CONCAT", "JSONB_AGG", "JSON_AGG", "JSON_ARRAYAGG"),
    *("JSON_GROUP_ARRAY", "MAX", "MIN", "STRING_AGG", "SUM", "TOTAL"),
}
#: What Pydantic puts around a schema that has validators or serialisers.
_AROUND = {
    *("default", "definition-ref", "nullable"),
    *("function-after", "function-before", "function-wrap"),
}

#: An `Iterable` is validated as it is read.
_LISTS = ("list", "generator")

_UNASKED = (
    "without what its annotation asks for, a query or a depth(). That is done where the response "
    "is a model or a list of one, and where rows of one model are returned, in a list if they are "
    "many. Return them so, or load the relation in the endpoint."
)

#: Two fields of one class that are followed 10 levels deep are 184,756 ways through them.
_MOST_RELATIONS = 1000


class _Step(NamedTuple):
    """A relation that is followed on the way from the top."""

    schema: Any
    name: str
    depth: Depth | None


class Response:
    """A response type taken apart: a list of models, one model, or neither.

    Attributes:
        adapter: Pydantic's.
        many: whether it is a list.
        one: whether it is a model, or a union of nothing but models.
        nullable: whether `None` is an answer.
        whole: whether a list has a validator or a serialiser around it, which needs all rows.
        schema: the core schema of the model; None for other types, unions among them.
        endless: whether, for a model met so far, it contains itself to no stated depth.
    """

    def __init__(self, type_: Any) -> None:
        self.type = type_
        self.adapter: TypeAdapter[Any] = TypeAdapter(type_)
        self._definitions: dict[str, Any] = {}
        core, self.nullable, self._odd = self._unwrap(self.adapter.core_schema)
        self._lazy = core["type"] == "generator"
        self.many = core["type"] in _LISTS and not set(core) - {"type", "items_schema", "metadata"}
        self.whole = self.many and self._odd
        if self.many:
            core, optional_items, odd = self._unwrap(core["items_schema"])
            self._odd |= odd
            if optional_items:
                core = {"type": "nullable"}
        self.schema = core if core["type"] == "model" and not core.get("root_model") else None
        self.one = not self.many and self._is_one(core)
        self.endless = False
        #: A field that is left to Pydantic, though there is a query or a depth further down.
        self._left: str | None = None
        self._trees: dict[Any, Tree] = {}

    def tree(self, model: Any) -> Tree:
        """What the response asks of `model`. `self.schema` must not be None."""
        tree = self._trees.get(model)
        if tree is None:
            made: list[Tree] = []
            tree = self._tree(self.schema, model, (), made)
            self.endless |= any(each.endless for each in made)
            if self._odd:
                tree.instances.append("the response has a validator or a serialiser around it")
            self._trees[model] = tree  # complete: other threads may see it from now on
        return tree

    @functools.cached_property
    def names(self) -> list[str]:
        """The keys of a model's JSON."""
        assert self.schema is not None
        fields, cls = _fields(self.schema), self.schema["cls"].__name__
        if fields["type"] != "model-fields":
            raise TypeError(f"{cls} has no fields, so there are no columns")
        if "serialization" in self.schema:
            raise TypeError(
                f"{cls} has a serialiser of the whole model, which alone knows what the columns "
                "are. Stream it as JSON lines, or as a class whose fields are the columns."
            )
        return [
            part.get("serialization_alias", name)
            for name, part in fields["fields"].items()
            if not part.get("serialization_exclude")
        ] + [each.get("alias", each["property_name"]) for each in fields.get("computed_fields", ())]

    def dump(self, rows: list[Any]) -> list[bytes]:
        """Validate the rows of a list and serialise each.

        Raises:
            pydantic.ValidationError: one doesn't fit the type.
        """
        # Each as a list of one: for what has no type of its own, as NaN in a JSON column, Pydantic
        # asks the configuration of the outermost type, which a model alone would be.
        listed = iter if self._lazy else list
        dump = self.adapter.dump_json
        made = self.validated(rows, read=True)
        return [dump(listed([value]), by_alias=True)[1:-1] for value in made]

    def validated(self, value: Any, *, read: bool) -> Any:
        """What Pydantic makes of instances or dictionaries. `read` is as in `guard()`.

        Raises:
            pydantic.ValidationError: it doesn't fit the type.
        """
        with self.guard(value, read=read):
            return self.read(self.adapter.validate_python(value, from_attributes=True))

    def read(self, value: Any) -> Any:
        """Have an `Iterable` validated, while there is a connection for the relations."""
        return iter(list(value)) if self._lazy and isinstance(value, Iterator) else value

    def guard(self, value: Any, *, read: bool) -> AbstractContextManager[None]:
        """Around the validation of what an endpoint returned, completed if that was possible.

        A relation that isn't loaded, and that no depth is stated for, would be a query for each
        row. One that has a query, or a depth, would be read without.

        Args:
            read: whether it was read for a query that was returned, as dictionaries perhaps.
        """
        if self.endless:
            return lazy_loads_forbidden(f"type {self.type}")
        done = self.schema is not None and self._left is None and _are_rows(value, read=read)
        if not done and self._asks:
            return lazy_loads_forbidden(f"type {self.type}", _UNASKED)
        return nullcontext()

    @functools.cached_property
    def _asks(self) -> bool:
        return asks(self.type)

    def _leave(self, tree: Tree, name: str, why: str) -> None:
        """Leave a field to Pydantic, which knows nothing of queries and depths.

        Raises:
            SchemaError: the field has one. `why` says why it can't be done; if that is empty,
                nothing would be read.
        """
        field = tree.schema.model_fields[name]
        if why and asked(field):
            raise SchemaError(
                f"{tree.schema.__name__}.{name} has a query or a depth(), but {why}: rows that it "
                "leaves out would be sent. A relation is `list[Model]`, or a model or None."
            )
        if asks(field.annotation):
            self._left = name

    def _resolve(self, core: Any) -> tuple[Any, bool]:
        """Follow references, defaults and `Optional`. Returns what is left, and if it's optional"""
        nullable = False
        while True:
            kind = core["type"]
            if kind == "definitions":
                self._definitions.update({each["ref"]: each for each in core["definitions"]})
                core = core["schema"]
            elif "serialization" in core:  # of this place: what it is around has none
                return core, nullable
            elif kind == "definition-ref":
                core = self._definitions[core["schema_ref"]]
            elif kind == "nullable":
                nullable, core = True, core["schema"]
            elif kind == "default" and core.get("on_error", "raise") == "raise":
                core = core["schema"]
            else:
                return core, nullable

    def _unwrap(self, core: Any) -> tuple[Any, bool, bool]:
        """As `_resolve`, and look through validators and serialisers; the last says if any."""
        core, nullable = self._resolve(core)
        odd = False
        while core["type"] in _AROUND:
            odd, kind = True, core["type"]
            referred = self._definitions.get(core.get("schema_ref"))
            core, optional = self._resolve(referred or core["schema"])
            nullable |= optional or kind == "nullable"
        return core, nullable, odd or "serialization" in core

    def _is_one(self, core: Any, in_root: bool = False) -> bool:
        """Root models count as what is in them, unless that is one again: it may be the same."""
        core, nullable, _ = self._unwrap(core)
        self.nullable |= nullable
        if core["type"] == "model":
            return not core.get("root_model") or (
                not in_root and self._is_one(core["schema"], in_root=True)
            )
        choices = core["choices"] if core["type"] in ("union", "tagged-union") else ()
        if isinstance(choices, dict):
            choices = choices.values()
        cores = [each[0] if isinstance(each, tuple) else each for each in choices]
        return bool(cores) and all(self._is_one(each, in_root) for each in cores)

    def _tree(self, core: Any, model: Any, above: tuple[_Step, ...], made: list[Tree]) -> Tree:
        """What a class asks of a model; `above` is the way to it, `made` are all trees so far."""
        schema = core["cls"]
        _complete(schema, above)
        tree = Tree(model, schema)
        made.append(tree)
        if len(made) > _MOST_RELATIONS:
            raise SchemaError(
                f"{self.type} asks for more than {_MOST_RELATIONS} relations: its depths multiply."
                " State smaller ones, or give the inner rows a class with fewer relations."
            )
        fields = core["schema"]
        if (
            fields["type"] != "model-fields"
            or core.get("custom_init")
            or "serialization" in core
            or getattr(schema, "__pydantic_root_model__", False)
        ):
            tree.reasons.append(f"{schema.__name__} has validators or serialisers of its own")
            fields = _fields(core)
            if fields["type"] != "model-fields":
                tree.instances.append(f"{schema.__name__} is validated as a whole")
                return tree
            if fields is not core["schema"]:
                tree.instances.append(f"{schema.__name__} has a validator of the whole model")
        if not is_peewees(model.__init__):
            tree.instances.append(f"{model.__name__} has an __init__ of its own")
        if core.get("post_init"):
            tree.reasons.append(f"{schema.__name__} has private attributes or model_post_init")
        if fields.get("computed_fields"):
            tree.reasons.append(f"{schema.__name__} has computed fields")
        if fields.get("extras_schema"):
            tree.reasons.append(f"{schema.__name__} takes extra fields")
        config = core.get("config") or {}
        if odd := sorted(set(config) - _HARMLESS_CONFIG):
            tree.reasons.append(f"the settings of {schema.__name__} may matter: {', '.join(odd)}")
        by_alias = config.get("validate_by_alias", True)
        by_name = config.get("validate_by_name", config.get("populate_by_name", False))
        for name, part in fields["fields"].items():
            paths = (
                _paths(part["validation_alias"]) if by_alias and "validation_alias" in part else []
            )
            if by_name or not paths:
                paths.append([name])
            if any(len(path) > 1 for path in paths):
                tree.instances.append(f"{name} is read by a path")
            keys = [path[0] for path in paths]
            if "serialization_exclude_if" in part:
                tree.reasons.append(f"{name} is excluded now and then")
            self._add(tree, name, keys, part, above, made)
        return tree

    def _add(
        self,
        tree: Tree,
        name: str,
        keys: list[str],
        part: Any,
        above: tuple[_Step, ...],
        made: list[Tree],
    ) -> None:
        model = tree.model
        alias = part.get("serialization_alias", name)
        excluded = bool(part.get("serialization_exclude"))
        core, nullable = self._resolve(part["schema"])
        key, found = next(
            ((key, found) for key in keys if (found := _attribute(model, key)) is not None),
            (keys[0], None),
        )
        if found is None:
            if getattr_static(model, key, None) is not None:
                self._leave(tree, name, f"{key!r} is no relation of {model.__name__}")
                tree.instances.append(f"{key} is an attribute of {model.__name__}, but no column")
            else:  # selected beside the model's columns, or the plan is one with instances
                self._leave(tree, name, "")
                tree.fields.append(Leaf(name, alias, key, None, core, excluded, nullable))
            return
        if isinstance(found, peewee.Field) and not _is_relation(model, key, found):
            self._leave(tree, name, f"{key!r} is a column")
            tree.fields.append(Leaf(name, alias, key, found, core, excluded, nullable))
            if not is_peewees(type(getattr_static(model, key))):
                tree.instances.append(f"{key} is read by an accessor of its own")
            return
        many = not isinstance(found, peewee.ForeignKeyField)
        core, nullable, odd = self._unwrap(part["schema"])
        if many:
            if core["type"] not in _LISTS:
                self._leave(tree, name, "it isn't a plain list")
                tree.instances.append(f"{key} is a list of rows, but {name} isn't a plain list")
                return
            if set(core) - {"type", "items_schema", "metadata"}:
                tree.reasons.append(f"{name} is limited in length or strict")
            core, optional_items, odd_items = self._unwrap(core["items_schema"])
            odd |= odd_items
            if optional_items:
                self._leave(tree, name, "its items may be None")
                tree.instances.append(f"{name} is a list whose items may be None")
                return
        if core["type"] != "model" or core.get("root_model"):
            self._leave(tree, name, "what it holds isn't one Pydantic model")
            tree.instances.append(f"{key} is another row, but {name} isn't a Pydantic model")
            return
        field = tree.schema.model_fields[name]
        if isinstance(field.annotation, ForwardRef) and "Annotated" in str(field.annotation):
            raise SchemaError(
                f"{tree.schema.__name__}.{name} names what can't be found from here, so that "
                f"nobody knows what it asks for: {field.annotation.__forward_arg__!r}. Call "
                f"`{tree.schema.__name__}.model_rebuild()` where the names are known."
            )
        given = asked(field)
        query, depth = _first(given, peewee.BaseQuery), _first(given, Depth)
        fk, through, other = found, None, None
        if isinstance(found, BackrefAccessor):
            fk, other = found.field, found.rel_model
        elif isinstance(found, ManyToManyFieldAccessor):
            fk, through, other = found.src_fk, found.dest_fk, found.rel_model
        else:
            other = found.rel_model
        if query is not None:
            _check_query(query, f"{tree.schema.__name__}.{name}", other if many else None)
        step = _Step(tree.schema, name, depth)
        way = (*above, step)
        if _is_endless(way, core["cls"]):
            cls = core["cls"].__name__
            shown = f'list["{cls}"]' if many else f'"{cls} | None"'
            tree.endless.append(
                f"{tree.schema.__name__}.{name} leads to {cls} again, and nothing says how deep it "
                f"is to be read. Say it, here or on the way: `{name}: Annotated[{shown}, depth(3)]`"
            )
            return
        ended = step.depth is not None and _followed(way, step.depth) > step.depth.levels
        if ended and not (many or nullable):
            raise SchemaError(
                f"{tree.schema.__name__}.{name} ends after {step.depth!r} with None, which it must "
                f'allow: `{name}: Annotated["{core["cls"].__name__} | None", {step.depth!r}]`'
            )
        below = Tree(other, core["cls"]) if ended else self._tree(core, other, way, made)
        if odd:
            below.instances.append(f"{name} has a validator or a serialiser around it")
        relation = Relation(
            name, alias, key, below, many, fk, through, query, nullable, excluded, ended
        )
        for twin in [*tree.relations, *tree.ends]:
            if twin.key == key:
                _check_twins(tree, twin, relation)
                tree.instances.append(f"{twin.name} and {name} both read {key!r}")
        tree.fields.append(relation)


def _complete(schema: Any, above: tuple[_Step, ...]) -> None:
    """Have Pydantic read the annotations anew of a class that names others that came later.

    They may be known only where the classes are that lead to it.
    """
    if not schema.__pydantic_complete__:
        names: dict[str, Any] = {}
        for step in above:
            names.update(vars(sys.modules[step.schema.__module__]))
        schema.model_rebuild(raise_errors=False, _types_namespace=names)


def _first(given: list[Any], cls: type[Any]) -> Any:
    return next((each for each in given if isinstance(each, cls)), None)


def _are_rows(value: Any, *, read: bool) -> bool:
    """Whether these are rows that have all their relations: what `complete()` or `dictionaries()`
    have made.
    """
    rows = value if isinstance(value, list) else [value]
    kinds = {type(row) for row in rows}
    return len(kinds) == 1 and (isinstance(rows[0], peewee.Model) or (read and dict in kinds))


def _followed(way: tuple[_Step, ...], depth: Depth) -> int:
    return sum(step.depth is depth for step in way)


def _is_endless(way: tuple[_Step, ...], cls: Any) -> bool:
    """Whether the way leads from `cls` to `cls` again, and no step of it says how often."""
    for step in reversed(way):
        if step.depth is not None:
            return False
        if step.schema is cls:
            return True
    return False


def _check_twins(tree: Tree, one: Relation, other: Relation) -> None:
    """Refuse two fields that read one relation, if Pydantic would have to find different rows."""
    differ = ""
    if one.query is not other.query:
        differ = "with different queries"
    elif any([one.ended, other.ended]) or any(
        any(each.ends) for relation in (one, other) for each in relation.tree.all()
    ):
        differ = "to a stated depth"
    if differ:
        raise SchemaError(
            f"{tree.schema.__name__}.{one.name} and {other.name} both read {one.key!r}, but "
            f"{differ}. Where Pydantic validates, they would get the same rows: put one of them "
            "into a model of its own."
        )


def _fields(core: Any) -> Any:
    """What a model's core schema says of its fields, without the model's validators around it."""
    fields = core["schema"]
    while fields["type"] != "model-fields" and "schema" in fields:
        fields = fields["schema"]
    return fields


def _check_query(query: Any, name: str, model: Any) -> None:
    """Refuse what can't be limited to the rows of one parent, or isn't of the related model."""
    if model is None:
        problem = "a foreign key leads to one row, which no query can choose"
    elif not isinstance(query, peewee.ModelSelect):
        problem = (
            f"a {type(query).__name__} can't be limited to the rows of each parent; of a UNION, "
            f"write `{model.__name__}.select().where({model.__name__}.id.in_(union))`"
        )
    elif query._row_type not in (None, peewee.ROW.MODEL):
        problem = "it doesn't return instances of its model"
    elif (alias := query.model) is not model and getattr_static(alias, "model", None) is not model:
        problem = f"it selects from {query.model!r}, but the relation is to {model!r}"
    elif not query._group_by and (query._having is not None or any(map(_sums, query._returning))):
        problem = (
            "it makes one row of many without GROUP BY, so that its rows belong to no parent; "
            "group them by what they have in common"
        )
    else:
        return
    raise SchemaError(f"The query that is given for the relation {name} can't be used: {problem}.")


def _sums(node: Any) -> bool:
    """Whether there is an aggregate in this, neither in a subquery nor over a window."""
    node = node.unwrap() if isinstance(node, peewee.Node) else node
    if isinstance(node, peewee.Expression):
        return _sums(node.lhs) or _sums(node.rhs)
    if not isinstance(node, peewee.Function):
        return False
    name, arguments = node.name.upper(), node.arguments
    of_one_row = name in ("MAX", "MIN") and len(arguments) > 1  # SQLite's, of several values
    return (name in _AGGREGATES and not of_one_row) or any(map(_sums, arguments))


def _paths(alias: Any) -> list[list[Any]]:
    """What an alias of Pydantic's core schema looks at, in order; each begins with a name."""
    if isinstance(alias, str):
        return [[alias]]
    return [alias] if isinstance(alias[0], str) else list(alias)


def _attribute(model: Any, key: str) -> Any:
    """The field, the foreign key or the accessor of other rows that `instance.key` reads."""
    accessor = getattr_static(model, key, None)
    if isinstance(accessor, ManyToManyFieldAccessor | BackrefAccessor):
        return accessor
    field = getattr(accessor, "field", None)
    return field if isinstance(field, peewee.Field) else None


def _is_relation(model: Any, key: str, field: Any) -> bool:
    return (
        isinstance(field, peewee.ForeignKeyField)
        and key == field.name
        and field.lazy_load
        and key != field.object_id_name
    )
