"""`await User.aget(…)` and the like: the names of `playhouse.pwasyncio`.

Thin calls of `db.run`, or of `db.run_single` for those that execute one query.
"""

import inspect
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Self

import peewee

from .exceptions import BlockingQuery
from .single import Creation, Single, without_queries

if TYPE_CHECKING:
    from .database import Database


def _database(model: Any) -> "Database":
    db: Any = model._meta.database
    if isinstance(db, peewee.Proxy):
        db = db.obj
    if not hasattr(db, "run_single"):
        raise peewee.InterfaceError(
            f"{model._meta.name} is bound to {type(db).__name__}, which has no async methods. "
            "Make the database with `fastapi_peewee.connect(url)`."
        )
    return db


#: Methods of Peewee's that execute one query, and those that they call for it. A model that
#: overrides one of these may do more.
_SINGLE = {
    "create": ("__init__", "save", "insert", "update"),
    "save": ("insert", "update"),
    "get": ("select",),
    "get_or_none": ("get", "select"),
    "get_by_id": ("get", "select"),
    "set_by_id": ("insert", "update"),
    "delete_by_id": ("delete",),
    "delete_instance": ("delete",),
}


@lru_cache(maxsize=1024)
def _is_single(model: Any, method: str) -> bool:
    """Whether this method executes one query, and does nothing else that may wait."""
    return all(
        inspect.getattr_static(model, name) is inspect.getattr_static(peewee.Model, name)
        for name in (method, *_SINGLE[method])
    )


async def _run_single(model: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    fn = partial(getattr(model, method), *args, **kwargs)
    db = _database(model)
    cls: Any = model if isinstance(model, type) else type(model)
    if _is_single(cls, method):
        return await db.run_single(Single(fn), reads=method.startswith("get"))
    return await db.run(fn)


async def _run(model: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    return await _database(model).run(getattr(model, method), *args, **kwargs)


class AsyncModelMixin:
    """Adds the async methods to a model class of your own; `db.Model` has them.

    Each takes the arguments of the method without the leading `a`, returns and raises the same.
    """

    if TYPE_CHECKING:
        _meta: Any
        __rel__: dict[str, Any]

    @classmethod
    async def acreate(cls, **query: Any) -> Self:
        model: Any = cls
        db = _database(model)
        if not (db.writes_on_the_loop and _is_single(model, "create")):
            return await _run(cls, "create", **query)
        try:
            instance = without_queries(cls, **query)
        except BlockingQuery:  # a default value asks the database
            return await _run(cls, "create", **query)
        await db.run_single(Creation(instance, db), reads=False)
        return instance

    @classmethod
    async def aget(cls, *query: Any, **filters: Any) -> Self:
        return await _run_single(cls, "get", *query, **filters)

    @classmethod
    async def aget_or_none(cls, *query: Any, **filters: Any) -> Self | None:
        return await _run_single(cls, "get_or_none", *query, **filters)

    @classmethod
    async def aget_by_id(cls, pk: Any) -> Self:
        return await _run_single(cls, "get_by_id", pk)

    @classmethod
    async def aget_or_create(cls, **kwargs: Any) -> tuple[Self, bool]:
        return await _run(cls, "get_or_create", **kwargs)

    @classmethod
    async def aset_by_id(cls, key: Any, value: dict[Any, Any]) -> int:
        return await _run_single(cls, "set_by_id", key, value)

    @classmethod
    async def adelete_by_id(cls, pk: Any) -> int:
        return await _run_single(cls, "delete_by_id", pk)

    @classmethod
    async def abulk_create(cls, model_list: Any, batch_size: int | None = None) -> Any:
        return await _run(cls, "bulk_create", model_list, batch_size)

    @classmethod
    async def abulk_update(cls, model_list: Any, fields: Any, batch_size: int | None = None) -> int:
        return await _run(cls, "bulk_update", model_list, fields, batch_size)

    async def asave(self, force_insert: bool = False, only: Any = None) -> Any:
        model: Any = self
        cls: Any = type(self)
        if only is not None:
            only = list(only)  # `save` is called more than once
        elif self._meta.only_save_dirty and not force_insert and _is_single(cls, "save"):
            only = model.dirty_fields or None  # what is assigned meanwhile stays dirty
        return await _run_single(self, "save", force_insert, only)

    async def adelete_instance(self, recursive: bool = False, delete_nullable: bool = False) -> int:
        run = _run if recursive else _run_single
        return await run(self, "delete_instance", recursive, delete_nullable)

    async def afetch(self, field: Any) -> Any:
        """The object that a foreign key refers to: `await item.afetch(Item.owner)`.

        Raises:
            ValueError: not a foreign key, or one with `lazy_load=False`.
        """
        if isinstance(field, str):
            field = self._meta.combined[field]
        if not isinstance(field, peewee.ForeignKeyField):
            raise ValueError(f"afetch() takes a foreign-key field, got: {field!r}")
        if field.name in self.__rel__:
            return self.__rel__[field.name]
        if not field.lazy_load:
            raise ValueError(f"{field!r} is declared with lazy_load=False.")
        return await _database(self).run(getattr, self, field.name)


class AsyncModel(AsyncModelMixin, peewee.Model):
    """Peewee's `Model` with the async methods."""
