"""What annotations ask of relations, queries and depths, wherever they stand.

Only annotations are looked at: no core schema, no model, no database.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin, get_type_hints

import peewee
from pydantic import BaseModel

from .trees import Depth

_ASKED = (peewee.BaseQuery, Depth)


def asked(field: Any) -> list[Any]:
    """The queries and depths of one field, outer ones first.

    They may stand around the list, around its items, in an alias of a type, or beside `None`.

    Args:
        field: Pydantic's description of it.
    """
    return list(filter(_is_asked, (*field.metadata, *_parts(field.annotation, {}))))


def asks(annotation: Any) -> bool:
    """Whether there is a query or a depth in this, or in a field of a class that it leads to."""
    return any(map(_is_asked, _all_parts(annotation, {})))


def _is_asked(part: Any) -> bool:
    return issubclass(type(part), _ASKED)  # what `isinstance` looks at may be somebody's code


def _parts(annotation: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """The annotation and what is inside of it, in classes excepted. `seen` is by `id()`."""
    if id(annotation) in seen:
        return  # an alias that contains itself
    seen[id(annotation)] = annotation
    yield annotation
    origin = get_origin(annotation)
    for alias in (annotation, origin):
        if type(alias).__name__ == "TypeAliasType":  # of `typing`, or of `typing_extensions`
            yield from _parts(alias.__value__, seen)
    if origin is not Literal:
        for argument in get_args(annotation):  # of Annotated, what it adds as well
            yield from _parts(argument, seen)


def _all_parts(annotation: Any, classes: dict[int, Any]) -> Iterator[Any]:
    for part in _parts(annotation, {}):
        yield part
        if issubclass(type(part), type) and id(part) not in classes:
            classes[id(part)] = part
            for each in _annotations_in(part):
                yield from _all_parts(each, classes)


def _annotations_in(cls: Any) -> list[Any]:
    # Nothing that is wrong with a class is ours to say: a name that can't be found, say.
    with suppress(Exception):
        if issubclass(cls, BaseModel):
            if not (cls is BaseModel or cls.__pydantic_complete__):
                cls.model_rebuild(raise_errors=False)
            fields = cls.model_fields.values()
            return [part for field in fields for part in (field.annotation, *field.metadata)]
        if dataclasses.is_dataclass(cls) or hasattr(cls, "__total__") or hasattr(cls, "_fields"):
            return list(get_type_hints(cls, include_extras=True).values())
    return []
