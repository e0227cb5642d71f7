"""The plans: the ways from a query and a response type to the response.

Three, from the fastest to the most general; each is taken where the one before can't be:

- *json*: one statement, in which the database builds the JSON;
- *rows*: one statement for each relation, of the needed columns; Pydantic validates dictionaries;
- *instances*: Peewee's model instances, with their relations loaded; Pydantic validates them.

All give the same JSON. Nothing is kept here: `loading` keeps what `JsonPlan.compile()` makes, and
uses it while what it was made of is the same (`_Around`).
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from inspect import getattr_static
from itertools import islice
from typing import Any, Literal, NamedTuple

import peewee
from peewee import SQL, BaseModelSelect

from .columns import Narrowed, Unplannable, base_model, check, check_relations, completed
from .exceptions import SchemaError
from .json_sql import NoJson, writer
from .reading import complete, count_relations, dictionaries, one_snapshot
from .reads import NotBuilt, encoded
from .response_types import Response
from .shapes import Shape, shape_of
from .state import translate_driver_errors
from .templates import Template, compile_template
from .trees import Relation, Tree

_ONE = SQL("1")


class Texts:
    """What a json plan has read, as the database sent it: the rows of a list, which are `many`, or
    one text, which is the whole answer; none, for the row that isn't there.
    """

    __slots__ = ("many", "texts")

    def __init__(self, texts: Sequence[bytes], many: bool) -> None:
        self.texts = texts
        self.many = many

    def body(self) -> bytes:
        if self.many:
            return b"[" + b",".join(self.texts) + b"]"
        return self.texts[0] if self.texts else b"null"


class Plan:
    """How the rows of queries of one shape become a response.

    Attributes:
        kind: the name of the plan.
        reason: why it isn't a faster one; empty for json.
    """

    kind: Literal["json", "rows", "instances"]

    def __init__(self, response: Response, reason: str = "") -> None:
        self.response = response
        self.reason = reason

    def statement(self, db: Any) -> tuple[str, list[Any]]:
        """The (first) statement and its parameters."""
        raise NotImplementedError

    def load(self, db: Any) -> Any:
        """Read everything, on the connection in force: `Texts`, or what Pydantic can validate."""
        raise NotImplementedError

    def stream(self, db: Any, size: int) -> Generator[list[bytes]]:
        """The JSON of the rows, `size` at a time, while the others stay with the server."""
        raise NotImplementedError


class JsonPlan(Plan):
    """One statement: text before, the query's own text, and text after it."""

    kind = "json"

    def __init__(self, response: Response, db: Any, tree: Tree, narrowed: Narrowed, by_alias: bool):
        super().__init__(response)
        self._rows = RowPlan(response, tree, narrowed, "the database couldn't build the JSON")
        self._tree = tree
        self._by_alias = by_alias
        self._made: tuple[str, list[Any]] | None = None
        sql = writer(db)(db, by_alias)
        self._before, self._after = around = sql.around(tree, narrowed)
        listed = sql.listed(tree, narrowed, *around) if response.many else None
        # A stream needs the rows one by one.
        self._before_all = listed or self._before
        self._many = response.many and listed is None
        self._params = sql.params
        self._query = sql.inner(tree, narrowed)

    def statement(self, db: Any) -> tuple[str, list[Any]]:
        return self._statement(db, self._before_all)

    def _statement(self, db: Any, before: str) -> tuple[str, list[Any]]:
        text, params = self._made or db.get_sql_context().parse(self._query)
        return before + text + self._after, self._params + params

    def load(self, db: Any) -> Any:
        try:
            return _run(db, *self.statement(db), self._many)
        except NotBuilt:
            return self._rows.load(db)

    def stream(self, db: Any, size: int) -> Generator[list[bytes]]:
        sent, alone = 0, not db.in_transaction()
        with one_snapshot(db, 2):  # the rows that are read in another way must be the same
            try:
                statement = self._statement(db, self._before)
                with _refused_json(db), closing(db.stream(*statement, size)) as chunks:
                    for rows in chunks:
                        texts = encoded(rows)
                        try:
                            yield texts
                        except GeneratorExit:
                            if alone:
                                db.drop_unread()
                            raise
                        sent += len(texts)
            except NotBuilt:
                yield from self._rows.stream(db, size, sent)

    def compile(self, db: Any, shape: Shape) -> "Compiled | None":
        """What loads all queries of this shape. None if values and parameters can't be matched."""
        around = _Around(db, self._tree, shape if shape.parameters else None)
        if shape.parameters:
            template = compile_template(self._query, shape, db)
        else:  # what `load()` needs as well is made once: it converts the values
            self._made = db.get_sql_context().parse(self._query)
            template = compile_template(self._query, shape, db, self._made)
        # Something may have become another since the text was made, and before that was noted.
        if template is None or not (around.holds(on_loop=False) and self._is_the_same(db)):
            return None
        sql = self._before_all + template.sql + self._after
        return Compiled(db, sql, self._params, template, self._many, around)

    def _is_the_same(self, db: Any) -> bool:
        if not any(self._tree.relations):
            return True
        again = JsonPlan(self.response, db, self._tree, self._rows.narrowed, self._by_alias)
        ours, theirs = (each._before_all + each._after for each in (self, again))
        return ours == theirs and _equal(self._params, again._params)


def _run(db: Any, sql: str, params: Sequence[Any], many: bool) -> Texts:
    """Raises `NotBuilt` if the rows have to be read in another way."""
    with _refused_json(db), translate_driver_errors:
        return Texts(db.read_texts(sql, params), many)


@contextmanager
def _refused_json(db: Any) -> Iterator[None]:
    try:
        yield
    except peewee.DatabaseError as error:
        if db.refuses_json(error):
            raise NotBuilt from error
        raise


class _Around:
    """What a json plan's statement was made of besides the query that is executed.

    The relations' rows are read by the text around that query. It is the same for every request,
    unless a model's `select()` is the program's own (which may look at the user of the request), a
    relation's query has nodes or converters that are, or a table gets another name.

    Args:
        db: the database.
        tree: of the response.
        shape: of the query itself, if that is part of the text.
    """

    def __init__(self, db: Any, tree: Tree, shape: Shape | None) -> None:
        self._db = db
        models = set() if shape is None else shape.models
        #: Those that have to be asked anew, and what they said.
        self._asked: list[tuple[Relation, tuple[str, list[Any]]]] = []
        for relation in (relation for each in tree.all() for relation in each.relations):
            models |= {relation.tree.model, relation.fk.model}
            same = not relation.own_select
            if relation.query is not None:
                shape = shape_of(relation.query)
                template = None if shape is None else compile_template(relation.query, shape, db)
                same = template is not None and template.converts_alone
                models |= set() if shape is None else shape.models
            if not same:
                self._asked.append((relation, self._ask(relation)))
        self._tables = [(model._meta, *_table(model._meta)) for model in models]

    def _ask(self, relation: Relation) -> tuple[str, list[Any]]:
        sql, params = self._db.get_sql_context().parse(relation.children())
        return sql, params

    def _says_the_same(self, relation: Relation, said: tuple[str, list[Any]]) -> bool:
        sql, params = self._ask(relation)
        return sql == said[0] and _equal(params, said[1])

    @property
    def renamed(self) -> bool:
        """Whether a table is another one now, so that the statement is of no more use."""
        return any(
            meta.table is not table or meta.schema is not schema or meta.table_name is not name
            for meta, table, schema, name in self._tables
        )

    def holds(self, *, on_loop: bool) -> bool:
        """Whether it would be made in the same way now; on an event loop, where nothing may wait,
        not if the program's own code has to be asked.
        """
        if not self._tables:
            return True
        if self.renamed or (on_loop and self._asked):
            return False
        return all(self._says_the_same(*each) for each in self._asked)


def _table(meta: Any) -> tuple[Any, Any, Any]:
    return meta.table, meta.schema, meta.table_name  # Peewee makes the table anew, or should


def _equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether these parameters are the same to a database: 1 and True aren't."""
    try:
        return len(one) == len(other) and all(map(_is_equal, one, other))
    except Exception:  # of an array, say
        return False


def _is_equal(one: Any, other: Any) -> bool:
    if one is other or type(one) is not type(other):
        return one is other
    if getattr_static(one, "__eq__") is object.__eq__:  # as what psycopg puts around JSON
        state = one.__getstate__()
        return state is not None and bool(state == other.__getstate__())
    return bool(one == other)


class Compiled(NamedTuple):
    """A json plan's statement, for queries that differ from the one it was made of in values.

    It's kept, so it has nothing of that query's values.
    """

    db: Any
    sql: str
    params: list[Any]
    template: Template
    many: bool
    around: "_Around"

    def load(self, params: Sequence[Any]) -> Texts:
        """Raises `NotBuilt` if the rows have to be read in another way."""
        all_params = [*self.params, *params] if self.params else params
        return _run(self.db, self.sql, all_params, self.many)

    async def aload(self, params: Sequence[Any]) -> Texts | None:
        """The same on the event loop; None where that can't be, or not now."""
        all_params = [*self.params, *params] if self.params else params
        try:
            with _refused_json(self.db):
                texts = await self.db.aread_texts(self.sql, all_params)
        except NotBuilt:
            return None
        return None if texts is None else Texts(texts, self.many)


class RowPlan(Plan):
    """One statement for the query, and one for each relation."""

    kind = "rows"

    def __init__(self, response: Response, tree: Tree, narrowed: Narrowed, reason: str) -> None:
        super().__init__(response, reason)
        self._tree = tree
        self.narrowed = narrowed

    def statement(self, db: Any) -> tuple[str, list[Any]]:
        sql, params = db.get_sql_context().parse(self.narrowed.query)
        return sql, params

    def load(self, db: Any) -> Any:
        with one_snapshot(db, 1 + count_relations(self._tree)):
            rows = list(self.narrowed.query.tuples().execute(db))
            found = dictionaries(db, self._tree, self.narrowed, rows)
        return found if self.response.many else (found[0] if found else None)

    def stream(self, db: Any, size: int, skipped: int = 0) -> Generator[list[bytes]]:
        with one_snapshot(db, 2):
            for rows in _chunks(self.narrowed.query.tuples(), db, size, skipped):
                yield self.response.dump(dictionaries(db, self._tree, self.narrowed, rows))


class InstancePlan(Plan):
    """Peewee's instances, with the relations that the response needs."""

    kind = "instances"

    def __init__(self, response: Response, query: Any, reason: str) -> None:
        super().__init__(response, reason)
        self._query = query
        self._rows = rows_of(query, response)

    def statement(self, db: Any) -> tuple[str, list[Any]]:
        sql, params = db.get_sql_context().parse(self._query)
        return sql, params

    def load(self, db: Any) -> Any:
        with one_snapshot(db, self._statements()):
            rows = self._rows
            if rows is None:
                query = self._complete().clone()
                query._cursor_wrapper = None
                rows = list(query.execute(db))
            found = complete(db, rows, self.response)
        if not self.response.one:
            return found
        return found[0] if found else None

    def _statements(self) -> int:
        model = getattr(self._query, "model", None)
        if self.response.schema is None or model is None:
            return 1
        loads = getattr(self._query, "_load_tree", None) or ()
        return 1 + len(loads) + count_relations(self.response.tree(base_model(self._query)))

    def _complete(self) -> Any:
        """The query with every column that the response needs."""
        query = self._query
        if self.response.schema is None or not isinstance(query, BaseModelSelect):
            return query
        return completed(query, self.response.tree(base_model(query)))

    def stream(self, db: Any, size: int) -> Generator[list[bytes]]:
        # `with_related()` loads for all rows at once.
        if getattr(self._query, "_load_tree", None) or self._rows is not None:
            found = self.load(db)
            for start in range(0, len(found), size):
                yield self.response.dump(found[start : start + size])
            return
        with one_snapshot(db, 2):
            for rows in _chunks(self._complete(), db, size):
                yield self.response.dump(complete(db, rows, self.response))


def _chunks(query: Any, db: Any, size: int, skipped: int = 0) -> Iterator[list[Any]]:
    query = query.clone()  # the caller's may be shared by threads, and keeps what it has read
    rows = islice(db.open_rows(query.bind(db)), skipped, None)
    while chunk := list(islice(rows, size)):
        yield chunk


def plan(
    query: Any, response: Response, db: Any, *, by_alias: bool = True, in_python: str = ""
) -> Plan:
    """Choose the plan for a query. The database must be connected.

    Args:
        query: any of Peewee's queries that read.
        response: what is wanted.
        db: the database, of ours.
        by_alias: whether the JSON has the schema's aliases as keys.
        in_python: why the JSON has to be made in Python, if that was decided before.

    Raises:
        SchemaError: the response type contains itself, to no stated depth.
    """
    _check_depth(query, response)
    if rows_of(query, response) is not None:
        return InstancePlan(response, query, "it has been executed: its rows are sent")
    if response.one and isinstance(query, BaseModelSelect):
        query = query.limit(_ONE) if query._limit is None else query
    try:
        if response.schema is None:
            raise Unplannable("the response is neither a Pydantic model nor a list of one")
        if not isinstance(query, BaseModelSelect):
            raise Unplannable(f"a {type(query).__name__} isn't built of parts that can be changed")
        if query._load_tree:
            raise Unplannable("the query says how its relations are loaded, with_related()")
        tree = response.tree(base_model(query))
        check_relations(tree)
        for each in tree.all():
            if each.instances:
                raise Unplannable(each.instances[0])
        check(query, tree)
        narrowed = Narrowed(query, tree)
    except Unplannable as error:
        return InstancePlan(response, query, str(error))
    if in_python:
        return RowPlan(response, tree, narrowed, in_python)
    try:
        return JsonPlan(response, db, tree, narrowed, by_alias)
    except NoJson as error:
        return RowPlan(response, tree, narrowed, str(error))


def rows_of(query: Any, response: Response) -> list[Any] | None:
    """The rows of a query that was executed, and read to its end: they are what the endpoint has
    seen, and maybe changed. None if it has to be read: also where they lack columns that the
    response has, and after `iterator()`, which keeps none.
    """
    found = getattr(query, "_cursor_wrapper", None)
    if found is None or not found.populated or len(found.row_cache) != found.count:
        return None
    of_a_model = response.schema is not None and isinstance(query, BaseModelSelect)
    if of_a_model and completed(query, response.tree(base_model(query))) is not query:
        return None
    return list(found.row_cache)


def _check_depth(query: Any, response: Response) -> None:
    """Refuse what would be a query for each row, of rows without end."""
    model = getattr(query, "model", None)
    if response.schema is None or model is None or query._row_type not in (None, peewee.ROW.MODEL):
        return
    for tree in response.tree(base_model(query)).all():
        if tree.endless:
            raise SchemaError(tree.endless[0])
