"""The SQL of ordinary Peewee queries, made once for all that differ in their values only."""

from collections.abc import Callable
from typing import Any, TypeVar

from .shapes import MANY, SQL_MAKERS, WRITES, Shape, shape_of, shape_of_write
from .templates import Template, compile_template

#: How many shapes a database keeps, and how many kinds of rows.
_KEPT = 1000
#: How long a text is at most of which something is remembered. It may be full of literals.
_LONGEST = 20_000

T = TypeVar("T")


class Statement(str):
    """The SQL of a query of Peewee's, of whose cursor nobody but Peewee will know."""

    __slots__ = ()


class Known(dict[str, T]):
    """What a function says of SQL, which is remembered: `Known(function)[sql]`. Of what has many
    values, or is long, it is asked each time.
    """

    def __init__(self, ask: Callable[[str], T]) -> None:
        self._ask = ask

    def __missing__(self, sql: str) -> T:
        said = self._ask(sql)
        if len(sql) <= _LONGEST and sql.count("?") + sql.count("%s") <= MANY:
            if len(self) >= _KEPT:
                self.clear()
            self[sql] = said
        return said


class SqlCache:
    """What one database remembers. A template is made when a shape comes for the second time.

    Threads share it without a lock: at worst, two of them make the same template.
    """

    def __init__(self, database: Any) -> None:
        self._database = database
        #: None: the shape was seen once. False: it can't be cached.
        self._templates: dict[Any, Template | bool | None] = {}
        #: Those of INSERTs, with the tables that they are for.
        self._insertions: dict[Any, tuple[Any, Template]] = {}

    def statement(self, query: Any) -> tuple[str, list[Any]] | None:
        """The SQL and the parameters of a query, or None: then Peewee has to make them."""
        shape = shape_of_write(query) if type(query) in WRITES else shape_of(query)
        return None if shape is None else self._statement(query, shape)

    def insertion(self, model: Any, row: dict[str, Any]) -> tuple[str, list[Any]] | None:
        """The same of `model.insert(**row)`, which is made for the first such rows only.

        Args:
            model: a class that has Peewee's `insert`.
            row: values, by the names of the model's fields.
        """
        names = (model, self._database.returning_clause, *row)
        # Peewee makes the table anew when a model gets another name, schema or field. It is read
        # first: a thread may do that meanwhile.
        table = model._meta.table
        known = self._insertions.get(names)
        if known is not None and known[0] is table:
            values = list(row.values())
            for value in values:
                if isinstance(value, SQL_MAKERS):
                    return None
            return self._bound(known[1], values, lambda: model.insert(**row))
        query = model.insert(**row)
        shape = shape_of_write(query)
        if shape is None:
            return None
        statement, template = self._statement(query, shape), self._templates.get(shape.key)
        # Not two names of one field, as a column's and its own.
        if isinstance(template, Template) and len(shape.values) == len(row):
            if len(self._insertions) >= _KEPT:
                self._insertions.clear()
            self._insertions[names] = table, template
        return statement

    def _statement(self, query: Any, shape: Shape) -> tuple[str, list[Any]] | None:
        template = self._templates.get(shape.key, True)
        if template is True:
            if len(self._templates) >= _KEPT:
                self._templates.clear()  # shapes without end: queries put together by clients, say
            self._templates[shape.key] = None
            return None
        if template is None:
            # What is executed now. Made once: to convert a value may be to read a file.
            made = self._database.get_sql_context().parse(query)
            template = compile_template(query, shape, self._database, made) or False
            if isinstance(template, Template):
                template.sql = Statement(template.sql)
            self._templates[shape.key] = template
            return Statement(made[0]), made[1]
        if not isinstance(template, Template):
            return None
        return self._bound(template, shape.values, lambda: query)

    def _bound(
        self, template: Template, values: list[Any], query: Callable[[], Any]
    ) -> tuple[str, list[Any]]:
        parameters, whole = template.convert(values)
        if whole:
            return template.sql, parameters
        sql, parameters = template.made_anew(query(), self._database, values, parameters)
        return Statement(sql), parameters
