"""Pydantic schemas from Peewee models: `schema` for what is sent, `create_schema` and
`patch_schema` for what comes in.

They differ in what they hold values to. A response has plain types and nothing else, so that what
is in the database can be sent, and a query that makes the JSON can be compiled from the
annotations. An input has the limits that all databases share (`values`), so that what is accepted
can be stored.

The conventions are those of `playhouse.pydantic_utils.to_pydantic`, but we don't call it: it has
one schema for both directions, ignores names that it doesn't know, and its types, optionality and
descriptions would each have to be taken out of the result and replaced. What `values` uses of it
is its reading of a column's type, for field classes that are not Peewee's.
"""

import difflib
import enum
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    TypedDict,
    TypeVar,
    Unpack,
    get_args,
    get_origin,
    overload,
)

import peewee
from pydantic import BaseModel, Field, TypeAdapter, create_model
from pydantic_core import MISSING

from .exceptions import SchemaError
from .values import input_type, max_length, nullable, python_type

Base = TypeVar("Base", bound=BaseModel)
#: Fields of a model, or their names; or one of them.
Names = Iterable[Any] | Any

_RELATIONS = (peewee.ForeignKeyField, peewee.BackrefAccessor, peewee.ManyToManyField)


class _Options(TypedDict, total=False):
    include: Names
    exclude: Names
    name: str | None


class _OutOptions(_Options, total=False):
    relations: Mapping[Any, Any] | None


@overload
def schema(model: Any, **options: Unpack[_OutOptions]) -> type[BaseModel]: ...
@overload
def schema(model: Any, *, base: type[Base], **options: Unpack[_OutOptions]) -> type[Base]: ...
def schema(
    model: Any,
    *,
    include: Names = None,
    exclude: Names = (),
    relations: Mapping[Any, Any] | None = None,
    name: str | None = None,
    base: Any = BaseModel,
) -> Any:
    """A schema of what is sent: `schema(User, relations={User.items: list[ItemOut]})`.

    Args:
        model: the Peewee model.
        include: the fields to have, if not all; relations need not be named here.
        exclude: the fields to leave out.
        relations: foreign keys, back-references and many-to-many fields, each with its schema.
        name: of the class, if not the model's.
        base: a class to inherit from; what it declares itself stays as it is.
    """
    related = {each[0]: each for each in _checked(model, relations or {})}
    fields: dict[str, Any] = {}
    for field in _chosen(model, include, exclude):
        if field.name not in related:
            typed = python_type(field)
            described = _described(field, typed)
            fields[_name(field)] = (nullable(typed, field.null), Field(**described))
    for key, relation, typed in related.values():
        is_column = isinstance(relation, peewee.ForeignKeyField)
        described = _described(relation, typed) if is_column else {}
        fields[key] = (typed, Field(**described))
    return _made(model, name or model.__name__, base, fields, {"from_attributes": True})


@overload
def create_schema(model: Any, **options: Unpack[_Options]) -> type[BaseModel]: ...
@overload
def create_schema(model: Any, *, base: type[Base], **options: Unpack[_Options]) -> type[Base]: ...
def create_schema(
    model: Any,
    *,
    include: Names = None,
    exclude: Names = (),
    name: str | None = None,
    base: Any = BaseModel,
) -> Any:
    """A schema of what comes in with POST: `User.create(**user.model_dump())`.

    It has no keys that the database numbers, unless `include` names them. What has a default may be
    left out; if it is the database that knows the default, so is the value.
    """
    fields: dict[str, Any] = {}
    for field in _chosen(model, include, exclude):
        made = _made_by_database(field)
        if include is None and (made == "always" or field.auto_increment):
            continue
        typed = input_type(field)
        described = _described(field, typed)
        if callable(field.default):
            described["default_factory"] = _default_factory(field, typed)
        elif field.default is not None and not isinstance(field.default, peewee.Node):
            described["default"] = _as_input(field, TypeAdapter(typed), field.default)
        elif made or field.null:
            described["default"] = MISSING if made else None
        fields[_name(field)] = (nullable(typed, field.null), Field(**described))
    return _made(model, name or f"{model.__name__}Create", base, fields, {"extra": "forbid"})


@overload
def patch_schema(model: Any, **options: Unpack[_Options]) -> type[BaseModel]: ...
@overload
def patch_schema(model: Any, *, base: type[Base], **options: Unpack[_Options]) -> type[Base]: ...
def patch_schema(
    model: Any,
    *,
    include: Names = None,
    exclude: Names = (),
    name: str | None = None,
    base: Any = BaseModel,
) -> Any:
    """A schema of what comes in with PATCH: `model_dump()` has what the client sent, and no more.

    Everything may be left out, and then is Pydantic's `MISSING`; null is a value, where the column
    allows it. There is no primary key, unless `include` names it: Peewee's `save()` would take a
    new one for another row.
    """
    fields: dict[str, Any] = {}
    keys = [key.name for key in model._meta.get_primary_keys()]
    for field in _chosen(model, include, exclude):
        if include is None and (field.name in keys or _made_by_database(field) == "always"):
            continue
        typed = input_type(field)
        described = {**_described(field, typed), "default": MISSING}
        fields[_name(field)] = (nullable(typed, field.null), Field(**described))
    return _made(model, name or f"{model.__name__}Patch", base, fields, {"extra": "forbid"})


def _made(model: Any, name: str, base: Any, fields: dict[str, Any], config: dict[str, Any]) -> Any:
    fields = {key: value for key, value in fields.items() if key not in base.model_fields}
    if extra := _together(model, {*fields, *base.model_fields}):
        config["json_schema_extra"] = extra
    if any(_has_bytes(typed) for typed, _ in fields.values()):
        # Not for all: a setting keeps a query from being compiled from the schema.
        config["ser_json_bytes"] = "base64"
    caller = sys._getframe(2).f_globals  # whose name pickle looks for, as with namedtuple
    return create_model(
        name,
        __base__=base,
        __module__=caller.get("__name__", __name__),
        __cls_kwargs__={key: v for key, v in config.items() if key not in base.model_config},
        **fields,
    )


def _default_factory(field: Any, typed: Any) -> Callable[[], Any]:
    adapter = TypeAdapter(typed)
    return lambda: _as_input(field, adapter, field.default())


def _as_input(field: Any, adapter: TypeAdapter[Any], default: Any) -> Any:
    """A default as if it had come in: Peewee takes 0 for a decimal as well, Pydantic doesn't."""
    try:
        value = adapter.validate_python(field.adapt(default))
    except (TypeError, ValueError):
        return default
    return default if type(value) is type(default) else value


def _has_bytes(type_: Any) -> bool:
    return type_ is bytes or any(map(_has_bytes, get_args(type_)))


def _name(field: Any) -> str:
    """The attribute with the value: of a foreign key, the one with the id."""
    return str(getattr(field, "object_id_name", None) or field.name)


def _chosen(model: Any, include: Names, exclude: Names) -> Iterator[Any]:
    """The fields of a model, in its order, that are asked for."""
    fields = model._meta.sorted_fields
    known = {f.column_name: f.name for f in fields}  # what is another's name, too, means the other
    known |= {name: f.name for f in fields for name in (_name(f), f.name)}

    def resolved(argument: str, given: Names) -> set[str]:
        single = isinstance(given, (str, peewee.Field, peewee.BackrefAccessor))
        found = set()
        for each in (given,) if single else given:
            ours = not isinstance(each, peewee.Field) or issubclass(model, each.model)
            name = getattr(each, "name", each) if ours else each
            if not isinstance(name, str) or name not in known:
                raise _unknown(model, argument, each, known)
            found.add(known[name])
        return found

    included = {*known.values()} if include is None else resolved("include", include)
    wanted = included - resolved("exclude", exclude or ())
    return (field for field in fields if field.name in wanted)


def _unknown(model: Any, argument: str, given: Any, known: Iterable[str]) -> SchemaError:
    text = f"{argument}= has {given!r}, which is no field of {model.__name__}. "
    if isinstance(getattr(model, given, None) if isinstance(given, str) else given, _RELATIONS[1:]):
        return SchemaError(f"{text}It is a relation, and there only if relations= has it.")
    close = difflib.get_close_matches(str(given), known, 1)
    text += f"Did you mean {close[0]!r}? " if close else ""
    return SchemaError(f"{text}Its fields: {', '.join(map(_name, model._meta.sorted_fields))}.")


def _checked(model: Any, relations: Mapping[Any, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Of each relation: its attribute, what Peewee has there, and the type for it."""
    for key, wanted in relations.items():
        relation = getattr(model, key, None) if isinstance(key, str) else key
        if not isinstance(relation, _RELATIONS) or not issubclass(model, relation.model):
            names = (n for n in dir(model) if isinstance(getattr(model, n, None), _RELATIONS))
            has = [n for n in names if getattr(getattr(model, n), "object_id_name", "") != n]
            raise SchemaError(
                f"relations= has {key!r}, which is no relation of {model.__name__}. Most likely it "
                f"is another model's, or a plain field. Its relations: {', '.join(has) or 'none'}."
            )
        many = not isinstance(relation, peewee.ForeignKeyField)
        is_backref = isinstance(relation, peewee.BackrefAccessor)
        name = relation.field.backref if is_backref else relation.name
        inner, *metadata = get_args(wanted) if get_origin(wanted) is Annotated else (wanted,)
        if many is not (get_origin(inner) is list):
            is_class = isinstance(inner, type) and not get_args(inner)
            shown = inner.__name__ if is_class else str(inner)
            raise SchemaError(
                f"{model.__name__}.{name} is a relation to {'many rows' if many else 'one row'}, "
                f"but relations= gives it {shown}. "
                + (
                    f"Write list[{shown}], also if there is one row at most."
                    if many
                    else "Write a schema, without list[…]."
                )
            )
        if not many:
            inner = nullable(inner, relation.null)
        yield name, relation, Annotated[inner, *metadata] if metadata else inner


def _described(field: Any, typed: Any) -> dict[str, Any]:
    """What the JSON schema of a field says beyond its type."""
    extra: dict[str, Any] = {}
    choices = dict(field.choices or ())
    parts = [field.help_text] if field.help_text else []
    if choices:
        values = [(getattr(value, "value", value), label) for value, label in choices.items()]
        labels = (f"{repr(v) if isinstance(v, str) else v} = {label}" for v, label in values)
        parts.append(f"Choices: {', '.join(labels)}")
    if choices and get_origin(typed) is not Literal and not isinstance(typed, enum.EnumMeta):
        extra["enum"] = [*dict.fromkeys([*choices, None] if field.null else choices)]
    elif typed is str and (limit := max_length(field)):
        extra["maxLength"] = limit
    if field.unique or (field.primary_key and not field.model._meta.composite_key):
        extra["x-unique"] = True
    elif field.index:
        extra["x-index"] = True
    found = {"title": field.verbose_name, "description": " | ".join(parts)}
    return {key: each for key, each in {**found, "json_schema_extra": extra}.items() if each}


def _together(model: Any, shown: set[str]) -> dict[str, Any]:
    """The indexes of several columns that a schema shows all of."""
    meta = model._meta
    unique = [list(map(_name, meta.get_primary_keys()))] if meta.composite_key else []
    found = {"x-unique-together": unique, "x-index-together": []}
    for index in meta.fields_to_index():
        parts = getattr(index, "_expressions", ())
        if len(parts) > 1 and all(isinstance(part, peewee.Field) for part in parts):
            is_unique = index._unique and index._where is None
            found[f"x-{'unique' if is_unique else 'index'}-together"].append([*map(_name, parts)])
    shown_only = {key: [i for i in each if shown.issuperset(i)] for key, each in found.items()}
    return {key: each for key, each in shown_only.items() if each}


_CONSTRAINT = re.compile(r"\s*(?:CONSTRAINT\s+\S+\s+)?(DEFAULT\b|GENERATED\b|AS\s*\()", re.I)


def _made_by_database(field: Any) -> str | None:
    """Whether a value that isn't sent comes from the database: always, or by default."""
    for constraint in field.constraints or ():
        found = _CONSTRAINT.match(getattr(constraint, "sql", str(constraint)))
        if found:
            return "default" if found[1].upper() == "DEFAULT" else "always"
    default = field.sequence or field.auto_increment or isinstance(field.default, peewee.Node)
    return "default" if default else None
