"""What endpoints return, read: queries by their plan, compiled once; instances completed.

Nothing here knows of requests; `routing` and `responses` call it where a connection is.
"""

import functools
from collections.abc import Hashable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import peewee
from peewee import Model

from .columns import base_model
from .database import Database
from .exceptions import BlockingQuery
from .plans import Compiled, JsonPlan, Plan, Texts, plan, rows_of
from .reading import complete
from .reads import NotBuilt
from .response_types import Response
from .shapes import Shape, shape_of
from .single import without_queries
from .templates import with_values
from .trees import Leaf, Relation, Tree

#: How many compiled statements a response type keeps.
_SHAPES_KEPT = 256


def is_query(value: Any) -> bool:
    """Whether this is something that one can execute."""
    return isinstance(value, (peewee.BaseQuery, PreparedQuery))  # no union, which is made anew


class Plans:
    """The plans of one response type: an endpoint's, say.

    Args:
        type_: the response type; None if there is none.
        by_alias, in_python: as for `plan`.
    """

    def __init__(self, type_: Any, *, by_alias: bool = True, in_python: str = "") -> None:
        self._type = type_
        self._by_alias = by_alias
        self._in_python = in_python
        # The values hold the databases, so that no other can have the same `id()`.
        self._compiled: dict[tuple[int, Hashable], Compiled] = {}

    @functools.cached_property
    def response(self) -> Response:
        return Response(self._type)

    def needs_database(self, value: Any) -> bool:
        """Whether something must be read for what an endpoint returned."""
        return is_query(value) or self.incomplete(value)

    def incomplete(self, value: Any) -> bool:
        """Whether these are instances whose relations may have to be read."""
        if self._type is None:
            return False
        if isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, Model) or self.response.schema is None:
            return False
        return any(self.response.tree(type(value)).relations)

    def load(self, value: Any) -> Any:
        """What the endpoint returned as `Texts`, or as what Pydantic can validate.

        Raises:
            peewee.DoesNotExist: there is no row, and the type is neither a list nor optional.
            TypeError: a query that can't be answered with.
        """
        if not self.needs_database(value):
            return self.ready(value)
        db = database_of(value)
        # Of an application's databases, a route holds a connection of the first one.
        elsewhere = isinstance(db, Database) and db._state.homeless
        with db.connection_context() if elsewhere else nullcontext():
            return self._load_query(value) if is_query(value) else self._complete(db, value)

    def ready(self, value: Any) -> Any:
        """The same of what needs no database."""
        if value is None and self._type is not None:
            self._check_missing(None)
        return value

    def plan(self, query: Any) -> Plan:
        """The plan for a query, which isn't kept."""
        db = database_of(query)
        if isinstance(query, PreparedQuery):
            query = query.query
        return plan(query, self.response, db, by_alias=self._by_alias, in_python=self._in_python)

    def _complete(self, db: Any, value: Any) -> Any:
        if isinstance(value, list):
            return complete(db, value, self.response)
        return complete(db, [value], self.response)[0]

    def _load_query(self, query: Any) -> Any:
        if not isinstance(query, PreparedQuery):
            loaded = self._load_plain(query)
        elif self._by_alias and not self._in_python and query.type == self._type:
            loaded = query.load()
        else:
            loaded = self._load_plain(query.query)
        if loaded is None or (isinstance(loaded, Texts) and not (loaded.many or loaded.texts)):
            self._check_missing(getattr(query, "model", None))
        return loaded

    def _load_plain(self, query: Any) -> Any:
        if self._type in (None, Any):
            raise TypeError(
                "A query was returned, but the route has no response model, which would say what "
                "to read. Add `response_model=list[…]`, or return a list of the query's rows."
            )
        if not isinstance(query, peewee.SelectBase | peewee.RawQuery):
            raise TypeError(
                f"A {type(query).__name__} was returned that has not been executed. Call its "
                "`execute()` and return what the client should see."
            )
        shape, db = self._shape(query), database_of(query)
        if found := self._find(db, shape):
            with suppress(NotBuilt):
                return found[0].load(found[1])
        chosen = self.plan(query)
        known = None if shape is None else self._compiled.get((id(db), shape.key))
        # One that doesn't hold now may hold for the next request, unless it was for other tables.
        if shape and isinstance(chosen, JsonPlan) and (known is None or known.around.renamed):
            compiled = chosen.compile(db, shape)
            if compiled is not None:
                if len(self._compiled) >= _SHAPES_KEPT:
                    self._compiled.clear()  # shapes without end, as in `SqlCache`
                self._compiled[id(db), shape.key] = compiled
        return chosen.load(db)

    def _find(
        self, db: Any, shape: Shape | None, *, on_loop: bool = False
    ) -> tuple[Compiled, list[Any]] | None:
        """The statement that was compiled for queries of this shape, and its parameters."""
        compiled = None if shape is None else self._compiled.get((id(db), shape.key))
        if compiled is None or shape is None or not compiled.around.holds(on_loop=on_loop):
            return None
        params = compiled.template.bind(shape.values)
        return None if params is None else (compiled, params)  # None: the SQL depends on a value

    async def aload(self, query: Any) -> Texts | None:
        """`load()` of a query on the event loop, without a thread.

        None where that can't be: nothing was compiled yet, the database can't or is busy with
        something else. Then `load()` has to do it.
        """
        db = database_of(query)
        if self._in_python or not (isinstance(db, Database) and db.on_the_loop(reads=True)):
            return None
        found = None
        with suppress(BlockingQuery):  # a converter asks the database
            found = without_queries(self._find_on_loop, db, query)
        if found is None:
            return None
        loaded = await found[0].aload(found[1])
        if loaded is not None and not (loaded.many or loaded.texts):
            self._check_missing(getattr(query, "model", None))
        return loaded

    def _find_on_loop(self, db: Any, query: Any) -> tuple[Compiled, list[Any]] | None:
        if isinstance(query, PreparedQuery):
            prepared = self._by_alias and query.type == self._type
            return query.find_on_loop(db) if prepared else None
        return self._find(db, self._shape(query), on_loop=True)

    def _shape(self, query: Any) -> Shape | None:
        """By which its statement is kept; None if it has to be read otherwise."""
        executed = getattr(query, "_cursor_wrapper", None) is not None
        if self._in_python or (executed and rows_of(query, self.response) is not None):
            return None
        return shape_of(query)

    def _check_missing(self, model: Any) -> None:
        if self.response.one and not self.response.nullable:
            raise (peewee.DoesNotExist if model is None else model.DoesNotExist)


#: What a route may leave out of an object, each time anew.
_LEFT_OUT = frozenset(
    f"response_model_{option}"
    for option in ("include", "exclude", "exclude_unset", "exclude_defaults", "exclude_none")
)


def plans_of_route(
    type_: Any,
    *,
    response_class: Any = None,
    response_model_by_alias: bool = True,
    **left_out: Any,
) -> Plans:
    """The plans of a route with this response model and, under FastAPI's names, these options.

    Args:
        response_class: None for FastAPI's default.
    """
    if unknown := left_out.keys() - _LEFT_OUT:
        raise TypeError(
            "Of a route's options, a plan depends on response_class and those that begin with "
            f"response_model_; got: {', '.join(sorted(unknown))}"
        )
    why = ", ".join(name for name, value in left_out.items() if value)
    if response_class is not None:
        why = f"response_class={getattr(response_class, '__name__', response_class)}"
    in_python = f"the route has {why}" if why else ""
    return Plans(type_, by_alias=response_model_by_alias, in_python=in_python)


def prepared(query: Any, type_: Any) -> "Prepared":
    """A query that is planned and compiled once, for an endpoint that is called often.

    ::

        read_user = prepared(User.select().where(User.id == param("user_id")), UserOut)

        @app.get("/users/{user_id}", response_model=UserOut)
        def user(user_id: int):
            return read_user(user_id=user_id)

    Args:
        query: a SELECT with `param(…)` in the place of values.
        type_: the response type. Where it isn't the endpoint's response model, nothing is gained:
            the query is read as any other.

    Returns what makes of named values something to be returned from an endpoint, as a query is.

    Raises:
        TypeError: the query isn't a SELECT, or contains what can't be compiled.
    """
    return Prepared(query, type_)


class Prepared:
    """See `prepared()`."""

    def __init__(self, query: Any, type_: Any) -> None:
        shape = shape_of(query, parameters=True)
        if shape is None:
            raise TypeError(
                "This query can't be prepared: it isn't a SELECT of a model, or contains nodes of "
                "your own, or with_related(). Return it from the endpoint as it is, with the "
                f"values in it; got: {query!r}"
            )
        self.plain = query.clone()  # which has no rows, and gets none
        self.type = type_
        self.plans = Plans(type_)
        self._shape = shape
        self._names = shape.names
        self._compiled: dict[int, Compiled | None] = {}

    def __call__(self, **values: Any) -> "PreparedQuery":
        """The query with these values.

        Raises:
            TypeError: a value is missing, or there is no `param(…)` of that name.
        """
        if values.keys() != self._names:
            raise TypeError(
                f"The prepared query takes {', '.join(sorted(self._names)) or 'no values'}; "
                f"got: {', '.join(sorted(values)) or 'none'}."
            )
        return PreparedQuery(self, values)

    def load(self, values: Mapping[str, Any]) -> Any:
        db = database_of(self.plain)
        compiled = self._compiled.get(id(db), True)
        if compiled is True or (compiled and compiled.around.renamed):
            chosen = self.plans.plan(self.plain)
            # The same values and parameters, but perhaps of other tables.
            shape = shape_of(self.plain, parameters=True) or self._shape
            compiled = chosen.compile(db, shape) if isinstance(chosen, JsonPlan) else None
            self._compiled[id(db)] = compiled
        if found := self.find(db, values):
            with suppress(NotBuilt):
                return found[0].load(found[1])
        return self.plans.load(with_values(self.plain, values))

    def find(
        self, db: Any, values: Mapping[str, Any], *, on_loop: bool = False
    ) -> tuple[Compiled, list[Any]] | None:
        """The compiled statement and its parameters, if there is one."""
        compiled = self._compiled.get(id(db))
        if compiled is None or not compiled.around.holds(on_loop=on_loop):
            return None
        params = compiled.template.bind_named(values)
        return None if params is None else (compiled, params)


class PreparedQuery:
    """A prepared query and its values: to be returned from an endpoint, or given to `respond()`."""

    __slots__ = ("_prepared", "_values")

    def __init__(self, prepared: Prepared, values: Mapping[str, Any]) -> None:
        self._prepared = prepared
        self._values = values

    def load(self) -> Any:
        return self._prepared.load(self._values)

    def find_on_loop(self, db: Any) -> tuple[Compiled, list[Any]] | None:
        return self._prepared.find(db, self._values, on_loop=True)

    @property
    def type(self) -> Any:
        """The response type that it was prepared for."""
        return self._prepared.type

    @property
    def query(self) -> Any:
        """The same as a query of Peewee's."""
        return with_values(self._prepared.plain, self._values)

    @property
    def model(self) -> Any:
        return self._prepared.plain.model


@dataclass(frozen=True)
class Explanation:
    """How a query would be answered; `print()` it.

    Attributes:
        plan: "json" (one statement, in which the database builds the JSON), "rows" (one statement
            for each relation, validated by Pydantic) or "instances" (Peewee's, likewise).
        reason: why it isn't a faster plan; empty for "json".
        sql, params: the statement, of "rows" and "instances" the first one.
        warnings: what will make it slow, and which nulls will be sent that the type doesn't allow.
    """

    plan: str
    reason: str
    sql: str
    params: list[Any]
    warnings: list[str]

    def __str__(self) -> str:
        lines = [f"plan: {self.plan}", self.sql, f"with {self.params!r}" if self.params else ""]
        if self.reason:
            lines[0] += f", since {self.reason}"
        return "\n".join(filter(None, lines + [f"warning: {each}" for each in self.warnings]))


def explain(query: Any, type_: Any, **options: Any) -> Explanation:
    """Say how an endpoint with this response type would answer with this query.

    ::

        print(explain(User.select(), list[UserOut]))
        print(explain(User.select(), list[UserOut], response_model_exclude_none=True))

    Args:
        query: as the endpoint would return it.
        type_: the response model, or the type given to `respond()`.
        options: those of the route that begin with `response_model_`, and its `response_class`.

    It asks the database for its indexes, so call it as other synchronous code: in a script or a
    shell, or with `await db.run(explain, query, type_)`.
    """
    plain = query.query if isinstance(query, PreparedQuery) else query
    plans, db = plans_of_route(type_, **options), database_of(plain)
    db.connection()  # what the server is decides what it understands
    chosen = plans.plan(plain)
    sql, params = chosen.statement(db)
    warnings: list[str] = []
    if plans.response.schema is not None and isinstance(plain, peewee.BaseModelSelect):
        for tree in plans.response.tree(base_model(plain)).all():
            if chosen.kind == "json":
                warnings += _nulls(tree)
            for relation in tree.relations:
                if relation.many and not _indexed(db, relation.fk):
                    table, column = relation.fk.model._meta.table_name, relation.fk.column_name
                    warnings.append(
                        f"{relation.name}: there is no index on {table}.{column}, so the whole "
                        f"table is read for each row of {tree.model._meta.table_name}."
                    )
    return Explanation(chosen.kind, chosen.reason, sql, list(params), warnings)


def _nulls(tree: Tree) -> Iterator[str]:
    """Columns that may be NULL where the response type has no `None`: the database doesn't mind."""
    for part in tree.fields:
        field = part.fk if isinstance(part, Relation) and not part.many else None
        field = part.field if isinstance(part, Leaf) else field
        if field is not None and field.null and not part.nullable and not part.excluded:
            yield (
                f"{part.name}: {field.model._meta.table_name}.{field.column_name} may be NULL, "
                f"which is sent as null, though {tree.schema.__name__}.{part.name} isn't optional."
            )


def _indexed(db: Any, field: Any) -> bool:
    """Whether an index, or the primary key, begins with this column."""
    meta = field.model._meta
    indexes = [index.columns for index in db.get_indexes(meta.table_name, meta.schema)]
    indexes.append(db.get_primary_keys(meta.table_name, meta.schema))
    return any(columns[:1] == [field.column_name] for columns in indexes)


def database_of(value: Any) -> Any:
    """The database of a query, of an instance, or of a list of these."""
    if isinstance(value, list):
        value = value[0]
    if isinstance(value, PreparedQuery):
        value = value._prepared.plain
    db = value._meta.database if isinstance(value, Model) else value._database
    return db.obj if isinstance(db, peewee.Proxy) else db
