"""The SQL of ordinary Peewee queries, made once for all that differ in their values only."""

from typing import Any

from .shapes import WRITES, shape_of, shape_of_write
from .templates import Template, compile_template

#: How many shapes a database keeps.
_KEPT = 1000


class Statement(str):
    """The SQL of a query of Peewee's, of whose cursor nobody but Peewee will know."""

    __slots__ = ()


class SqlCache:
    """What one database remembers. A template is made when a shape comes for the second time.

    Threads share it without a lock: at worst, two of them make the same template.
    """

    def __init__(self, database: Any) -> None:
        self._database = database
        #: None: the shape was seen once. False: it can't be cached.
        self._templates: dict[Any, Template | bool | None] = {}

    def statement(self, query: Any) -> tuple[str, list[Any]] | None:
        """The SQL and the parameters of a query, or None: then Peewee has to make them."""
        shape = shape_of_write(query) if type(query) in WRITES else shape_of(query)
        if shape is None:
            return None
        template = self._templates.get(shape.key, True)
        if template is True:
            if len(self._templates) >= _KEPT:
                self._templates.clear()  # shapes without end: lists of many lengths, say
            self._templates[shape.key] = None
            return None
        if template is None:
            template = compile_template(query, shape, self._database) or False
            if isinstance(template, Template):
                template.sql = Statement(template.sql)
            self._templates[shape.key] = template
        if not isinstance(template, Template):
            return None
        parameters = template.bind(shape.values)
        return None if parameters is None else (template.sql, parameters)
