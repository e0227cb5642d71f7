"""What annotations ask of relations, queries and depths, wherever they stand.

Only annotations are looked at: no core schema, no model, no database.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, get_args, get_origin, get_type_hints

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
    parts = (*field.metadata, *_parts(field.annotation, []))
    return [part for part in parts if isinstance(part, _ASKED)]


def asks(annotation: Any) -> bool:
    """Whether there is a query or a depth in this, or in a field of a class that it leads to."""
    return any(isinstance(part, _ASKED) for part in _all_parts(annotation, set()))


def _parts(annotation: Any, seen: list[Any]) -> Iterator[Any]:
    """The annotation and what is inside of it, in classes excepted."""
    if any(each is annotation for each in seen):
        return  # an alias that contains itself
    seen.append(annotation)
    yield annotation
    for alias in (annotation, get_origin(annotation)):
        if type(alias).__name__ == "TypeAliasType":  # of `typing`, or of `typing_extensions`
            yield from _parts(alias.__value__, seen)
    for argument in get_args(annotation):  # of Annotated, what it adds as well
        yield from _parts(argument, seen)


def _all_parts(annotation: Any, classes: set[Any]) -> Iterator[Any]:
    for part in _parts(annotation, []):
        yield part
        if isinstance(part, type) and part not in classes:
            classes.add(part)
            for each in _annotations_in(part):
                yield from _all_parts(each, classes)


def _annotations_in(cls: Any) -> Iterator[Any]:
    if issubclass(cls, BaseModel):
        if not cls.__pydantic_complete__:
            cls.model_rebuild(raise_errors=False)
        for field in cls.model_fields.values():
            yield field.annotation
            yield from field.metadata
    elif dataclasses.is_dataclass(cls) or hasattr(cls, "__total__") or hasattr(cls, "_fields"):
        with suppress(Exception):  # a name that can't be found, which is Pydantic's to say
            yield from get_type_hints(cls, include_extras=True).values()
