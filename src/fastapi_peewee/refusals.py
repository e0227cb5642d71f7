"""What a database refused, in a word, and the fields that it is about.

What happened tell the codes of driver and server, never the words of a message. Which field it is
about PostgreSQL says in fields of its error. SQLite and MySQL say it in a message only; of that
nothing is read but names, at places that are the same in every language (`_from_sqlite`,
`_from_mysql`). Names that no model declares don't get out of here, whoever said them.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import peewee

from .exceptions import OutcomeUnknown, PoolError, TransactionAborted, driver_error
from .state import RequestScope
from .values import max_length

Kind = Literal[
    "unique", "reference", "check", "missing", "data", "busy", "unavailable", "unknown", "full"
]

# What drivers and servers report. PostgreSQL: appendix A of its manual, by class or by code.
# SQLite: sqlite.org/rescode.html. MySQL and MariaDB: their server and client error references.
_SQLSTATE: dict[str, Kind] = {
    "23505": "unique",
    "23P01": "unique",
    "23503": "reference",
    "23001": "reference",
    "23514": "check",
    "44000": "check",
    "23502": "missing",
    "22": "data",
    "54000": "data",
    "40": "busy",
    "40003": "unknown",
    "55P03": "busy",
    "57014": "busy",
    "08": "unavailable",
    "08007": "unknown",
    "57P": "unavailable",
    "25P03": "unavailable",
    "25P04": "unavailable",
    "53300": "unavailable",
    "53100": "full",
}
_SQLITE: dict[int, Kind] = {
    2067: "unique",
    1555: "unique",
    2579: "unique",
    787: "reference",
    275: "check",
    1299: "missing",
    3091: "data",
    18: "data",
    20: "data",
    5: "busy",
    6: "busy",
    9: "busy",
    13: "full",
    10: "unavailable",
    14: "unavailable",
}
_MYSQL: dict[int, Kind] = {
    **dict.fromkeys((1022, 1062, 1169, 1586, 1761, 1762), "unique"),
    **dict.fromkeys((1216, 1217, 1451, 1452), "reference"),
    **dict.fromkeys((1369, 3819, 4025), "check"),
    **dict.fromkeys((1048, 1138, 1263, 1364), "missing"),
    **dict.fromkeys((1153, 1264, 1265, 1292, 1366, 1406, 1411, 1441, 1690, 3140), "data"),
    **dict.fromkeys((1020, 1205, 1213, 1317, 1969, 3024, 3572), "busy"),
    **dict.fromkeys((0, 1040, 1053, 1203, 1226, 1927, 2002, 2003, 2006, 2013, 2055), "unavailable"),
    **dict.fromkeys((4031,), "unavailable"),
    **dict.fromkeys((3, 1021, 1114), "full"),
}
#: SQLite reports a reference that is restricted (ON DELETE RESTRICT) as what a trigger raised.
_SQLITE_TRIGGER, _SQLITE_RESTRICTED = 1811, "FOREIGN KEY constraint failed"

#: As many as libpq sends with one statement.
_MOST_PARAMETERS = 65535


def kind_of(error: Exception) -> Kind | None:
    """What happened, in a word; None if it is a mistake of the program."""
    if isinstance(error, PoolError):
        return "unavailable"
    if isinstance(error, OutcomeUnknown):
        return "unknown"
    if isinstance(error, TransactionAborted):
        ended_by = kind_of(error.__cause__) if isinstance(error.__cause__, Exception) else None
        return ended_by if ended_by in ("busy", "unavailable", "full") else None
    cause = driver_error(error)
    if type(cause).__module__.startswith("pymysql"):
        code = cause.args[0] if cause.args else None
        if not isinstance(code, int):  # the driver's own refusal: NaN and the infinite
            return "data" if not all(map(_is_finite, _Statement.of(error).params)) else None
        return _MYSQL.get(code)
    if hasattr(cause, "sqlite_errorcode"):
        code = cause.sqlite_errorcode
        if code == _SQLITE_TRIGGER:
            return "reference" if str(cause) == _SQLITE_RESTRICTED else None
        return _SQLITE.get(code) or _SQLITE.get(code & 0xFF)
    state: str | None = getattr(cause, "sqlstate", None)
    if state is not None:
        return next((_SQLSTATE[part] for n in (5, 3, 2) if (part := state[:n]) in _SQLSTATE), None)
    if isinstance(error, peewee.DataError):  # the driver's own refusal: NUL, an integer too large
        return "data"
    if hasattr(cause, "pgconn") and isinstance(error, peewee.OperationalError):
        if len(_Statement.of(error).params) > _MOST_PARAMETERS:
            return None  # nothing was sent
        return "unavailable"  # libpq reports a lost connection without a state
    return None


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def refused_fields(error: Exception, kind: Kind) -> list[Any]:
    """The fields that a refused value was for; none if nobody tells.

    A row that can't be deleted, since others refer to it, was refused for no field of its own.
    """
    statement = _Statement.of(error)
    if kind == "reference" and statement.verb == "DELETE":
        return []
    cause = driver_error(error)
    if hasattr(cause, "diag"):
        found = _from_postgres(cause.diag, kind, statement)
    elif hasattr(cause, "sqlite_errorcode"):
        found = _from_sqlite(str(cause), kind, statement)
    elif len(cause.args) > 1 and isinstance(cause.args[0], int):
        found = _from_mysql(cause.args[0], str(cause.args[1]), kind, statement)
    else:
        found = []
    if not found and kind == "data":
        bits = 64 if isinstance(cause, OverflowError) else None
        found = statement.unfit(bits)
    return found


# What the drivers tell.


def _from_postgres(diag: Any, kind: Kind, statement: "_Statement") -> list[Any]:
    models = statement.models(diag.table_name, diag.schema_name)
    if not diag.table_name:
        return []
    if kind == "reference" and statement.table not in (None, diag.table_name):
        return []  # rows of that table refer to this one's
    if diag.column_name:
        return _fields(models, [diag.column_name])
    if not diag.constraint_name:
        return []
    declared = _constrained(models, diag.constraint_name)
    if declared:
        return declared
    # A constraint that is no model's: "(a, b)=(1, 2)" stands in the detail in every language.
    # What follows may be a client's text.
    columns = re.match(r"[^(]*\(([^()]+)\)=\(", diag.message_detail or "")
    return _fields(models, _unquoted(columns[1]) if columns else [])


def _from_sqlite(message: str, kind: Kind, statement: "_Statement") -> list[Any]:
    # SQLite has one text for each error, in its source (sqlite3UniqueConstraint and others), and no
    # translations: "… failed: " and "table.column, table.column", "index 'name'" or, for a check,
    # its name or else its expression, of which only the first name is left if that is in quotes.
    # Otherwise nothing is quoted. About a reference there is nothing.
    if kind == "reference":
        return statement.only_reference()
    what = message.partition(": ")[2]
    if kind == "check":
        models = statement.models(statement.table)
        return _constrained(models, what) or _fields(models, [what])
    if what.startswith("index '"):
        return _constrained(statement.models(None), what[len("index '") : -1])
    if kind == "data":  # "cannot store TEXT value in INTEGER column table.column"
        what = message.rpartition(" column ")[2]
    for model in statement.models(None):
        first, *places = what.split(f"{model._meta.table_name}.")
        fields = _fields([model], [place.removesuffix(", ") for place in places])
        if not first and fields:
            return fields
    return []


def _from_mysql(code: int, message: str, kind: Kind, statement: "_Statement") -> list[Any]:
    # A translated message has the same arguments in the same order, though not always the quotes
    # around them in pairs, and a client's value comes before the name of what refused it: so the
    # name that comes last is it. English: "Duplicate entry '…' for key 'index'" (MySQL:
    # 'table.index'), "Incorrect … value: '…' for column `database`.`table`.`column` at row 1",
    # "Column 'column' cannot be null", "CONSTRAINT `check` failed for `database`.`table`".
    models = statement.models(statement.table)
    if kind == "reference":
        # A part of the table's definition, in SQL. Of another table, if that one's rows refer.
        columns = re.search(r"FOREIGN KEY \(((?:`(?:[^`]|``)+`(?:, )?)+)\)", message)
        mine = code not in (1217, 1451)
        return _fields(models, _unquoted(columns[1]) if columns and mine else [])
    if kind == "unique":
        declared = {name for model in models for name, _ in _constraints(model)}
        return _constrained(models, _last(message, declared)[0])
    if kind == "check":  # the name, or `table.column`, comes first, and no value of the client's
        check = re.search(r"`(?:[^`]|``)+`|'[^']+'", message)
        name = _unquote(check[0]) if check else ""
        return _constrained(models, name) or _fields(models, [name.rpartition(".")[2]])
    name, rest = _last(message, {name for model in models for name in model._meta.columns})
    # "Truncated incorrect … value: '…'": what ends with a value names no column.
    return _fields(models, [name]) if rest or code != 1292 else []


def _last(message: str, names: Iterable[str]) -> tuple[str, str]:
    """The one of these names that is the last in a message, in quotes, and what follows."""
    places = [
        (message.rfind(form), form, name)
        for name in names
        for form in (f"'{name}'", f".{name}'", f"`{name.replace('`', '``')}`")
    ]
    ends = [(start + len(form), name) for start, form, name in places if start >= 0]
    end, name = max(ends, default=(len(message), ""))
    return name, message[end:]


def _unquote(name: str) -> str:
    quote = name[:1]
    return name[1:-1].replace(quote * 2, quote) if quote in ('"', "`", "'") else name


def _unquoted(names: str) -> list[str]:
    return [_unquote(name) for name in re.findall(r'"(?:[^"]|"")+"|`(?:[^`]|``)+`|[^ ,]+', names)]


# What was asked of the database.

_NAME = r'(?:"(?:[^"]|"")+"|`(?:[^`]|``)+`|\w+)'
_VERB = re.compile(
    rf"\s*(INSERT|REPLACE|UPDATE|DELETE)\b(?: OR \w+| IGNORE)?(?: INTO| FROM)? "
    rf"(?:({_NAME})\.)?({_NAME})(?: \(({_NAME}(?:, {_NAME})*)\) VALUES )?",
    re.IGNORECASE,
)
_ROWS = re.compile(r"(?:(?:, )?\((?:%s|\?)(?:, (?:%s|\?))*\))+")
_SET = re.compile(rf"(?:({_NAME}) = )?(?:%s|\?)")


class _Statement(NamedTuple):
    """The statement that failed, as far as it is one that writes."""

    database: Any = None
    sql: str = ""
    params: Sequence[Any] = ()
    verb: str | None = None
    schema: str | None = None
    table: str | None = None
    columns: str = ""  # of an INSERT whose values follow
    values: str = ""

    @classmethod
    def of(cls, error: Exception) -> "_Statement":
        wrapped: Any = error  # it may have come through two of Peewee's wrappers
        while not hasattr(wrapped, "statement") and hasattr(wrapped, "orig"):
            wrapped = wrapped.orig
        database, sql, given = getattr(wrapped, "statement", (None, "", ()))
        params = given if isinstance(given, list | tuple) else ()
        match = _VERB.match(sql)
        if match is None:
            return cls(database, sql, params)
        verb, schema, table, columns = match.groups()
        return cls(
            database,
            sql,
            params,
            verb.upper(),
            schema and _unquote(schema),
            _unquote(table),
            columns or "",
            sql[match.end() :],
        )

    def models(self, table: str | None, schema: str | None = None) -> list[Any]:
        """The models of a table, the likeliest first.

        Those of the database that refused; if it isn't known, of the request's, if any are.

        Args:
            table: the table that the database has named; None if it names none or hasn't yet.
            schema: the schema that it has named. Models mostly don't say theirs.
        """
        request = RequestScope.current.get()
        databases = [self.database] if self.database else request.databases if request else []
        ours = [id(db) for db in databases]
        found, todo = [], list(peewee.Model.__subclasses__())
        while todo:
            model = todo.pop(0)
            todo += model.__subclasses__()
            if not table or model._meta.table_name == table:
                found.append(model)
        theirs = [m for m in found if id(_database(m)) in ours] or found
        named = schema or (self.schema if table == self.table else None)
        return [m for m in theirs if named and m._meta.schema == named] or [
            m for m in theirs if not (table and named and m._meta.schema)
        ]

    def only_reference(self) -> list[Any]:
        """The foreign key of a row that is inserted, if the table has one only."""
        models = self.models(self.table) if self.verb == "INSERT" and self.table else []
        fields = list(models[0]._meta.refs) if models else []
        return fields if len(fields) == 1 else []

    def unfit(self, bits: int | None) -> list[Any]:
        """The fields that were given what they can't hold, going by what their models say."""
        models = self.models(self.table, self.schema) if self.table else []
        return [
            field
            for column, values in self._written().items()
            for field in _fields(models[:1], [column])
            if not all(_fits(field, value, bits) for value in values)
        ]

    def _written(self) -> dict[str, Sequence[Any]]:
        """The values that were written, by column, where the statement has them in plain sight."""
        if self.columns:
            names = _unquoted(self.columns)
            rows = _ROWS.match(self.values)
            count = rows[0].count("(") if rows else 0
            params = self.params[: count * len(names)]
            return {name: params[i :: len(names)] for i, name in enumerate(names)}
        if self.verb != "UPDATE":
            return {}
        places = zip(_SET.finditer(self.values.partition(" WHERE ")[0]), self.params, strict=False)
        return {_unquote(place[1]): [value] for place, value in places if place[1]}


# What models declare.


def _database(model: Any) -> Any:
    database = model._meta.database
    return getattr(database, "obj", database)


def _fields(models: Sequence[Any], columns: Sequence[str]) -> list[Any]:
    """The fields of these columns, of the first model that has them all."""
    for model in models:
        if columns and all(column in model._meta.columns for column in columns):
            return [model._meta.columns[column] for column in columns]
    return []


def _constrained(models: Sequence[Any], *names: str) -> list[Any]:
    """The fields of the constraint or index that has one of these names."""
    for model in models:
        for declared, fields in _constraints(model):
            # PostgreSQL cuts names at 63 bytes.
            if any(name == declared or name == declared[:63] for name in names):
                return list(fields)
    return []


def _constraints(model: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    """The names that the database has, by itself or by the model, for what it checks.

    SQLite has a check's expression for the name that it lacks.
    """
    meta = model._meta
    table = meta.table_name
    yield "PRIMARY", meta.get_primary_keys()
    yield f"{table}_pkey", meta.get_primary_keys()
    for index in meta.fields_to_index():
        if isinstance(index, peewee.Index):
            yield index._name, list(dict.fromkeys(_fields_in(index._expressions)))
    for field in meta.sorted_fields:
        if isinstance(field, peewee.ForeignKeyField):
            yield field.get_constraint_name(), [field]
        for suffix in ("fkey", "key", "check"):
            yield f"{table}_{field.column_name}_{suffix}", [field]
        for constraint in field.constraints or ():
            for name in _names(constraint):
                yield name, [field]
    for constraint in meta.constraints or ():
        words = re.findall(_NAME, _sql(constraint))
        columns = dict.fromkeys(name for word in words if (name := _unquote(word)) in meta.columns)
        for name in _names(constraint):
            yield name, [meta.columns[column] for column in columns]


def _fields_in(node: Any) -> Iterator[Any]:
    if isinstance(node, peewee.Field):
        yield node
    elif isinstance(node, list | tuple):
        for part in node:
            yield from _fields_in(part)
    elif isinstance(node, peewee.Node):
        for part in (getattr(node, name, None) for name in ("node", "lhs", "rhs", "arguments")):
            yield from _fields_in(part)


def _sql(node: Any) -> str:
    return str(peewee.Context().sql(node).query()[0])


def _names(constraint: Any) -> Iterator[str]:
    parts = re.match(
        rf"(?:CONSTRAINT ({_NAME}) )?(?:CHECK \((.*)\)$)?", _sql(constraint), re.I | re.S
    )
    assert parts is not None
    yield from (_unquote(part) for part in parts.groups() if part)


_BITS = {"SMALLINT": 16, "INT": 32, "AUTO": 32, "IDENT": 32, "BIGINT": 64, "BIGAUTO": 64}


def _encodable(text: str) -> bool:
    try:
        text.encode()  # to look at each character takes seconds for what is many megabytes long
    except UnicodeEncodeError:
        return False
    return True


def _fits(field: Any, value: Any, bits: int | None) -> bool:
    if isinstance(field, peewee.DecimalField) and isinstance(value, str | int | float | Decimal):
        try:
            return abs(Decimal(value)) < 10 ** (field.max_digits - field.decimal_places)
        except ArithmeticError:  # it is no number
            return False
    if isinstance(value, str):
        limit = max_length(field)
        return (limit is None or len(value) <= limit) and "\0" not in value and _encodable(value)
    if isinstance(value, int) and str(field.field_type) in _BITS:
        largest = 2 ** ((bits or _BITS[field.field_type]) - 1)
        return -largest <= value < largest
    return _is_finite(value)
