"""The statement in which the database builds the JSON of a response, one text for each row.

Only what prints exactly as Pydantic prints it may be in the tables below: the key is the field's
class and Pydantic's type, both exactly. Everything else raises `NoJson`, and the rows are read
instead. A test compares both ways over random models, schemas and rows.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from types import MappingProxyType
from typing import Any

import peewee

from .columns import Narrowed, expressions, names_output
from .state import translate_driver_errors
from .trees import Leaf, Relation, Tree, among, primary_key, sources


class NoJson(Exception):
    """The database can't build this JSON; the message says why."""


_KEYS = (peewee.AutoField, peewee.BigAutoField, peewee.IdentityField, peewee.PrimaryKeyField)
_INTEGERS = (
    peewee.BigIntegerField,
    peewee.BitField,
    peewee.IntegerField,
    peewee.SmallIntegerField,
)
_FLOATS = (peewee.DoubleField, peewee.FloatField)
_TEXTS = (peewee.CharField, peewee.TextField)

#: What Pydantic's type may say beside its name: nothing that a value could fail or be changed by.
_NEUTRAL = {"type", "metadata", "microseconds_precision", "ref"}

#: The names of what is around the caller's queries begin so. An alias of the caller's by the same
#: name would hide them, and so would, in `row_to_json()`, a column.
_SOURCE = "_fp"


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def _table(*rows: tuple[tuple[type | str, ...], str, str]) -> dict[tuple[str, str], str]:
    """Templates by field class and Pydantic type. Classes that cost an import are named."""
    return {
        (cls if isinstance(cls, str) else _path(cls), kind): template
        for classes, kind, template in rows
        for cls in classes
    }


_DASHES = (
    "substr({0},1,8)||'-'||substr({0},9,4)||'-'||substr({0},13,4)||'-'||substr({0},17,4)"
    "||'-'||substr({0},21)"
)
_HEX = "replace({v},'-','')"
_PG_JSON = ("playhouse.postgres_ext.JSONField", "playhouse.postgres_ext.BinaryJSONField")
_PG_SECONDS = (
    "to_char({v}, CASE WHEN date_trunc('second', {v}) = {v} "
    "THEN 'YYYY-MM-DD\"T\"HH24:MI:SS' ELSE 'YYYY-MM-DD\"T\"HH24:MI:SS.US' END)"
)

#: A column of SQLite's may hold anything. What isn't as Peewee writes it ends the statement with
#: "malformed JSON", and the rows are read instead. (A constant would be evaluated beforehand.)
_MALFORMED = "json('?'||{v})"
_STRANGE = f"ELSE {_MALFORMED} END"
#: Numbers come before all texts there, and blobs after them.
_ONLY_TEXT = (
    f"CASE WHEN {{v}} COLLATE BINARY NOT BETWEEN '' AND x'' THEN {_MALFORMED} ELSE {{v}} END"
)
#: As Python reads them: 5.0 as 5, and '7', in a column of texts, as 7.
_ONLY_INTEGER = f"CASE WHEN {{v}} IS NOT ({{v}}|0) THEN {_MALFORMED} ELSE {{v}}|0 END"
_SPACES = "".join(map(chr, filter(lambda i: chr(i).isspace(), range(1, 0x3001))))
_T = "replace({v},' ','T')"
_ZONED = "replace(replace({v},' ','T'),'+00:00','Z')"


def _moment(form: str, start: int, whole: str) -> str:
    """The case of a time, or date and time: as Python writes it, or with milliseconds.

    Args:
        form: what it looks like without a fraction and a zone, to GLOB.
        start: how long that is.
        whole: SQL that makes the JSON, if it has no zone.
    """
    rest = f"substr({{v}},{start + 1})"
    fraction, zone = f"substr({{v}},{start + 1},7)", f"substr({{v}},{start + 8})"
    micro, milli = "GLOB '.?[0-9]?[0-9]?[0-9]'", "GLOB '.??[0-9]'"
    is_zone = "GLOB '[+-]??:??' AND substr({v},-6) <> '-00:00'"
    return (
        # Nearly all are one of these two.
        f"WHEN {{v}} GLOB '{form}.?[0-9]?[0-9]?[1-9]' THEN {whole} "
        f"WHEN {{v}} GLOB '{form}' THEN {whole} "
        f"WHEN {{v}} GLOB '{form}*' THEN CASE length({{v}}) "
        f"WHEN {start + 7} THEN CASE WHEN {rest} = '.000000' THEN substr({whole},1,{start}) "
        f"WHEN {rest} {micro} THEN {whole} {_STRANGE} "
        f"WHEN {start + 4} THEN CASE WHEN {rest} = '.000' THEN substr({whole},1,{start}) "
        f"WHEN {rest} {milli} THEN {whole}||'000' {_STRANGE} "
        f"WHEN {start + 6} THEN CASE WHEN {rest} {is_zone} THEN {_ZONED} {_STRANGE} "
        f"WHEN {start + 13} THEN CASE WHEN {fraction} {micro} AND {fraction} <> '.000000' "
        f"AND {zone} {is_zone} THEN {_ZONED} {_STRANGE} {_STRANGE} "
    )


SQLITE = _table(
    (_KEYS, "int", "{v}"),
    (_INTEGERS, "int", _ONLY_INTEGER),
    (_FLOATS, "float", "json(fastapi_peewee_float({v}))"),
    (_TEXTS, "str", _ONLY_TEXT),
    (
        (peewee.FixedCharField,),
        "str",
        f"trim(substr(trim({{v}},'{_SPACES}'),1,{{n}}),'{_SPACES}')",
    ),
    (
        (peewee.BooleanField,),
        "bool",
        f"CASE {{v}} WHEN 1 THEN json('true') WHEN 0 THEN json('false') {_STRANGE}",
    ),
    ((peewee.DateField,), "date", f"CASE WHEN {{v}} GLOB '????-??-??' THEN {{v}} {_STRANGE}"),
    (
        (peewee.TimeField,),
        "time",
        f"CASE {_moment('??:??:??', 8, '{v}')}{_STRANGE}",
    ),
    (
        (peewee.DateTimeField,),
        "datetime",
        f"CASE {_moment('????-??-??[ T]??:??:??', 19, _T)}"
        f"WHEN {{v}} GLOB '????-??-??' THEN {{v}}||'T00:00:00' {_STRANGE}",
    ),
    (
        (peewee.TimestampField,),
        "datetime",
        "CASE WHEN typeof({v}) IN ('integer','null') "
        f"THEN strftime('%Y-%m-%dT%H:%M:%S', {{v}}, 'unixepoch') {_STRANGE}",
    ),
    (
        (peewee.UUIDField,),
        "uuid",
        f"CASE WHEN length({{v}}) IN (32,36) THEN lower({_DASHES.format(_HEX)}) {_STRANGE}",
    ),
    (
        (peewee.BinaryUUIDField,),
        "uuid",
        f"CASE length({{v}}) WHEN 16 THEN lower({_DASHES.format('hex({v})')}) {_STRANGE}",
    ),
    (
        (peewee.IPField,),
        "str",
        "CASE WHEN typeof({v}) = 'integer' AND {v} BETWEEN 0 AND 4294967295 "
        "THEN ({v}>>24)||'.'||(({v}>>16)&255)||'.'||(({v}>>8)&255)||'.'||({v}&255) "
        f"{_STRANGE}",
    ),
    (
        # A blob isn't read as JSON by Peewee.
        (peewee.JSONField, "playhouse.sqlite_ext.JSONField"),
        "any",
        "json(CASE typeof({v}) WHEN 'blob' THEN '?' ELSE {v} END)",
    ),
)

POSTGRESQL = _table(
    ((*_KEYS, *_INTEGERS), "int", "{v}"),
    (_FLOATS, "float", "CASE WHEN abs({v}) < 'Infinity' THEN {v} END"),
    ((peewee.DecimalField,), "decimal", "{v}::text"),
    (_TEXTS, "str", "{v}"),
    ((peewee.FixedCharField,), "str", f"btrim({{v}}::text,'{_SPACES}')"),
    ((peewee.BooleanField,), "bool", "{v}"),
    ((peewee.DateField,), "date", "{v}"),
    (
        (peewee.TimeField,),
        "time",
        "to_char({v}, CASE WHEN date_trunc('second', {v}) = {v}::interval "
        "THEN 'HH24:MI:SS' ELSE 'HH24:MI:SS.US' END)",
    ),
    ((peewee.DateTimeField,), "datetime", _PG_SECONDS),
    (
        ("playhouse.postgres_ext.DateTimeTZField",),
        "datetime",
        _PG_SECONDS + "||CASE WHEN extract(timezone FROM {v}) = 0 THEN 'Z' "
        "ELSE to_char({v}, 'TZH:TZM') END",
    ),
    (
        (peewee.TimestampField,),
        "datetime",
        "to_char(to_timestamp({v}) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS')",
    ),
    ((peewee.UUIDField,), "uuid", "{v}"),
    ((peewee.BinaryUUIDField,), "uuid", "encode({v},'hex')::uuid"),
    ((peewee.IPField,), "str", "host('0.0.0.0'::inet + {v})"),
    (
        (
            peewee.JSONField,
            "playhouse.postgres_ext.JSONField",
            "playhouse.postgres_ext.BinaryJSONField",
        ),
        "any",
        "{v}",
    ),
)

_MYSQL_UUID = _DASHES.replace("||", ",")

MARIADB = _table(
    ((*_KEYS, *_INTEGERS), "int", "{v}"),
    (_FLOATS, "float", "{v}"),
    ((peewee.DecimalField,), "decimal", "CAST({v} AS CHAR)"),
    (_TEXTS, "str", "{v}"),
    ((peewee.FixedCharField,), "str", "TRIM({v})"),
    ((peewee.BooleanField,), "bool", "CASE WHEN {v} THEN TRUE WHEN NOT {v} THEN FALSE END"),
    ((peewee.DateField,), "date", "{v}"),
    (
        (peewee.TimeField,),
        "time",
        # What is rounded up to 24:00:00 is read as 00:00:00.
        "DATE_FORMAT(ADDTIME('2000-01-01 00:00:00', {v}), "
        "IF(MICROSECOND({v}), '%H:%i:%s.%f', '%H:%i:%s'))",
    ),
    (
        (peewee.DateTimeField,),
        "datetime",
        "DATE_FORMAT({v}, IF(MICROSECOND({v}), '%Y-%m-%dT%H:%i:%s.%f', '%Y-%m-%dT%H:%i:%s'))",
    ),
    (
        (peewee.UUIDField,),
        "uuid",
        "lower(concat(" + _MYSQL_UUID.format(_HEX) + "))",
    ),
    ((peewee.BinaryUUIDField,), "uuid", "lower(concat(" + _MYSQL_UUID.format("hex({v})") + "))"),
    ((peewee.IPField,), "str", "INET_NTOA({v})"),
    ((peewee.JSONField, "playhouse.mysql_ext.MySQLJSONField"), "any", "JSON_EXTRACT({v},'$')"),
)

MYSQL = MARIADB | _table(
    # A FLOAT is read as the six digits that it is sent as.
    ((peewee.FloatField,), "float", "CAST(CAST({v} AS CHAR) AS DOUBLE)"),
    # TRUE is 1.
    (
        (peewee.BooleanField,),
        "bool",
        "CASE WHEN {v} THEN CAST('true' AS JSON) WHEN NOT {v} THEN CAST('false' AS JSON) END",
    ),
)

#: Levels of rows in rows that every database's parser has room for. That of SQLite 3.40
#: ends at 7 or so, MariaDB's at 63.
_SURELY_PARSED = 3

_FORMATTED = (peewee.DateField, peewee.DateTimeField, peewee.TimeField)


#: What a value's text is made of: text, nodes of Peewee's, or what writes into Peewee's context.
Part = Any


class JsonSql:
    """Writes the text around a query; one object for one plan.

    Args:
        db: the database, for its dialect.
        by_alias: whether the JSON's keys are the schema's aliases.

    Attributes:
        leaves: templates by field class and Pydantic type.
        references: what foreign keys have instead of their target's templates, by Pydantic type.
        params: of the text before the query, in order.
    """

    leaves: dict[tuple[str, str], str]
    references: Mapping[str, str] = MappingProxyType({})
    most_pairs = 1000
    longest_key = 1000
    no_rows: str

    def __init__(self, db: Any, by_alias: bool) -> None:
        self.db = db
        self.by_alias = by_alias
        self.params: list[Any] = []
        self._sources = 0
        # By a tree's `id()`: a foreign key of which the parent's key is the value, and that key.
        self._known: dict[int, tuple[Any, Part]] = {}

    def around(self, tree: Tree, narrowed: Narrowed) -> tuple[str, str]:
        """What goes before and after the text of `narrowed.query`.

        Raises:
            NoJson: this can't be built by the database.
        """
        raise NotImplementedError

    def listed(self, tree: Tree, narrowed: Narrowed, before: str, after: str) -> str | None:
        """What goes before the query, instead of what `around()` has given, if all rows are to be
        one text, the list of them. None: that is no faster, or not possible.
        """
        return None

    def inner(self, tree: Tree, narrowed: Narrowed) -> Any:
        """`narrowed.query` as it must be written inside."""
        return narrowed.query

    def checked_inside(self, tree: Tree, narrowed: Narrowed) -> dict[int, str]:
        """The columns whose template is applied by `inner()`, by place."""
        return {}

    def child(self, relation: Relation, link: Part) -> Part:
        """The JSON of a relation's row or rows; `link` is the parent's column."""
        raise NotImplementedError

    def _pairs(
        self, tree: Tree, narrowed: Narrowed, column: Callable[[int], Part]
    ) -> Iterator[tuple[str, list[Part]]]:
        """The keys and values of one object; `column(i)` is a source's i-th column."""
        if tree.reasons or tree.instances:
            raise NoJson((tree.reasons + tree.instances)[0])
        for leaf, node in expressions(narrowed, tree):
            counts = isinstance(node, peewee.Function) and node.name == "COUNT"
            selected = narrowed.nodes[narrowed.place(leaf)]
            if not counts or node._converter or selected._converter:
                raise NoJson(f"{leaf.key} is an expression")
        inside = self.checked_inside(tree, narrowed)
        known, parents = self._known.get(id(tree), (None, None))
        shown = [part for part in tree.fields if not part.excluded]
        if not 0 < len(shown) <= self.most_pairs:
            raise NoJson(f"{tree.schema.__name__} has no fields or more than {self.most_pairs}")
        for part in shown:
            key = part.alias if self.by_alias else part.name
            if not key or len(key.encode()) > self.longest_key or "\0" in key or "\\" in key:
                raise NoJson(f"{key!r} is too long or too odd a name")
            if isinstance(part, Relation) and part.ended:
                yield key, [self.no_rows if part.many else "NULL"]
                continue
            value = column(narrowed.place(part))
            if isinstance(part, Relation):
                yield key, [self.child(part, value)]
                continue
            template = self._template(part)
            if part.field is not None and part.field is known:
                yield key, [parents]
            else:
                template = "{v}" if narrowed.place(part) in inside else template
                yield key, _filled(self._literal(template), value)

    def _template(self, leaf: Leaf) -> str:
        kind = leaf.core["type"]
        if leaf.field is None:
            if kind == "int" and not set(leaf.core) - _NEUTRAL:
                return "{v}"
            raise NoJson(f"{leaf.name} is an expression that isn't read as int")
        column = leaf.column
        if kind.startswith("function-"):
            raise NoJson(f"{leaf.name} has a validator, or a type that is one")
        if "serialization" in leaf.core:
            raise NoJson(f"{leaf.name} has a serialiser")
        template = self.leaves.get((_path(type(column)), kind))
        if template is not None and leaf.field is not column:
            template = self.references.get(kind, template)
        if template is None:
            raise NoJson(f"{leaf.name} is a {type(column).__name__} read as {kind}")
        odd = set(leaf.core) - _NEUTRAL
        if odd == {"max_length"}:
            longest = getattr(column, "max_length", None)
            odd = set() if longest and longest <= leaf.core["max_length"] else odd
        if odd:
            raise NoJson(f"{leaf.name} is constrained: {', '.join(sorted(odd))}")
        if isinstance(column, _FORMATTED) and column.formats is not type(column).formats:
            raise NoJson(f"{leaf.name} has date formats of its own")
        if isinstance(column, peewee.TimestampField) and (column.resolution > 1 or not column.utc):
            raise NoJson(f"{leaf.name} is a timestamp with fractions or in local time")
        if isinstance(column, peewee.DecimalField) and column.decimal_places > 6:
            raise NoJson(f"{leaf.name} has more than 6 decimal places")
        if kind == "any" and not _plain_json(column):
            raise NoJson(f"{leaf.name} has a JSON encoder of its own")
        return template.replace("{n}", str(getattr(column, "max_length", "")))

    def _literal(self, text: str) -> str:
        """Text of ours, as it is written where the driver looks for placeholders."""
        return text.replace("%", "%%")

    def _children(self, relation: Relation, link: Any) -> Any:
        query = relation.children()  # it has been seen that it can be narrowed
        if any(map(_is_window, query._order_by or ())):
            raise NoJson(f"{relation.name} is ordered by a window function")
        return relation.only(query, relation.target(query) == link)

    def _name(self) -> str:
        self._sources += 1
        return f"{_SOURCE}{self._sources}"


class _Wrapping(JsonSql):
    """Databases where a source in FROM may name the row around it."""

    function: str
    aggregate: str

    def around(self, tree: Tree, narrowed: Narrowed) -> tuple[str, str]:
        before, after = f"SELECT {self._object(tree, narrowed, _SOURCE)} FROM (", f") {_SOURCE}"
        self._check_depth(tree, narrowed, before, after)
        return before, after

    def _check_depth(self, tree: Tree, narrowed: Narrowed, before: str, after: str) -> None:
        """Have it parsed, if it is deep, around another query: the caller's may lack its values."""
        if tree.levels <= _SURELY_PARSED:
            return
        columns = ", ".join(f"NULL AS {self._quote(name)}" for name in narrowed.names)
        try:
            with translate_driver_errors, closing(self.db.cursor()) as cursor:
                cursor.execute(f"EXPLAIN {before}SELECT {columns}{after}", self.params)
                cursor.fetchall()
        except peewee.DatabaseError as error:
            raise NoJson(f"the database refuses a statement so deep: {error}") from error

    def child(self, relation: Relation, link: Part) -> Part:
        narrowed = Narrowed(self._children(relation, peewee.SQL(link)), relation.tree)
        name = self._name()
        value = self._object(relation.tree, narrowed, name)
        text, params = self._text(relation.tree, narrowed)
        self.params += params
        if relation.many:
            value = self.aggregate.format(value)
        return f"(SELECT {value} FROM ({text}) {name})"

    def _object(self, tree: Tree, narrowed: Narrowed, name: str) -> str:
        pairs = self._pairs(tree, narrowed, self._columns_of(narrowed, name))
        inside = ", ".join(f"{self._string(key)}, {''.join(value)}" for key, value in pairs)
        return f"{self.function}({inside})"

    def _columns_of(self, narrowed: Narrowed, name: str) -> Callable[[int], str]:
        return lambda i: f"{name}.{self._quote(narrowed.names[i])}"

    def _text(self, tree: Tree, narrowed: Narrowed) -> tuple[str, list[Any]]:
        text, params = self.db.get_sql_context().parse(self.inner(tree, narrowed))
        return text, params

    def _quote(self, name: str) -> str:
        return self._literal('"' + name.replace('"', '""') + '"')

    def _string(self, text: str) -> str:
        return self._literal("'" + text.replace("'", "''") + "'")


class SqliteJson(_Wrapping):
    leaves = SQLITE
    #: A key is an integer; what refers to it may be anything, where nobody enforces it.
    references = MappingProxyType({"int": _ONLY_INTEGER})
    function = "json_object"
    aggregate = "json_group_array({})"
    most_pairs = 60  # a function has at most 127 arguments
    no_rows = "json_array()"

    def listed(self, tree: Tree, narrowed: Narrowed, before: str, after: str) -> str | None:
        value = before.removeprefix("SELECT ").removesuffix(" FROM (")
        listed = f"SELECT {self.aggregate.format(value)} FROM ("
        try:
            self._check_depth(tree, narrowed, listed, after)
        except NoJson:
            return None
        return listed

    def child(self, relation: Relation, link: Part) -> Part:
        key, leaves = relation.fk.rel_field, relation.tree.leaves
        # With nothing of its own, SQLite takes an aggregate for one of the query around it.
        own = any(leaf.field is not relation.fk and not leaf.excluded for leaf in leaves)
        if own and relation.many and relation.through is None and type(key) in _KEYS:
            self._known[id(relation.tree)] = relation.fk, link  # an integer, without a look
        return super().child(relation, link)

    def inner(self, tree: Tree, narrowed: Narrowed) -> Any:
        checks = self.checked_inside(tree, narrowed)
        if not checks:
            return narrowed.query
        query = narrowed.query.clone()
        query._returning = [
            _checked(checks[place], node.unwrap(), name) if place in checks else node
            for place, (node, name) in enumerate(zip(narrowed.nodes, narrowed.names, strict=True))
        ]
        return query

    def checked_inside(self, tree: Tree, narrowed: Narrowed) -> dict[int, str]:
        """Values that only have to be looked at: outside of the query SQLite copies them for each
        look. Not those of a relation's link, which would lose its column's affinity, nor of a query
        that may look at more rows than it returns.
        """
        if not narrowed.pruned or not _looks_at_no_more_than_it_returns(narrowed.query):
            return {}
        links = {narrowed.place(relation) for relation in tree.relations}
        known, _ = self._known.get(id(tree), (None, None))
        return {
            place: template
            for leaf in tree.leaves
            if leaf.field is not None
            and leaf.field is not known
            and not leaf.excluded
            and (place := narrowed.place(leaf)) not in links
            and (template := self._template(leaf)) in (_ONLY_TEXT, _ONLY_INTEGER)
        }

    def _literal(self, text: str) -> str:
        return text


class PostgresqlJson(_Wrapping):
    leaves = POSTGRESQL
    longest_key = 63  # longer names are cut, silently
    no_rows = "'[]'::json"

    def around(self, tree: Tree, narrowed: Narrowed) -> tuple[str, str]:
        values = self._values(tree, narrowed, _SOURCE)
        before = f"SELECT row_to_json({_SOURCE}r)::text FROM (SELECT {values} FROM ("
        return before, f") {_SOURCE}) {_SOURCE}r"

    def child(self, relation: Relation, link: Part) -> Part:
        narrowed = Narrowed(self._children(relation, peewee.SQL(link)), relation.tree)
        name = self._name()
        values = self._values(relation.tree, narrowed, name)
        text, params = self._text(relation.tree, narrowed)
        self.params += params
        rows = f"SELECT row_to_json({name}r) FROM (SELECT {values} FROM ({text}) {name}) {name}r"
        return f"array_to_json(array({rows}))" if relation.many else f"({rows})"

    def _values(self, tree: Tree, narrowed: Narrowed, name: str) -> str:
        pairs = self._pairs(tree, narrowed, self._columns_of(narrowed, name))
        return ", ".join(f"{''.join(value)} AS {self._quote(key)}" for key, value in pairs)


class MysqlJson(_Wrapping):
    """MySQL from 8.0.17."""

    leaves = MYSQL
    function = "JSON_OBJECT"
    aggregate = "COALESCE(JSON_ARRAYAGG({}), JSON_ARRAY())"
    no_rows = "JSON_ARRAY()"

    def _quote(self, name: str) -> str:
        return self._literal("`" + name.replace("`", "``") + "`")

    def inner(self, tree: Tree, narrowed: Narrowed) -> Any:
        query = narrowed.query
        return query if query._limit is not None else query.limit(_ALL)


#: Without a limit, MySQL and MariaDB forget the order of a query in FROM.
_ALL = peewee.SQL("18446744073709551615")


class MariadbJson(MysqlJson):
    """MariaDB, where a source in FROM can't name the row around it: lists are aggregated directly.

    Each list's query is rendered in a context of its own, with other numbers for its tables, so
    that it can name a column of the query around it.
    """

    leaves = MARIADB

    def __init__(self, db: Any, by_alias: bool) -> None:
        super().__init__(db, by_alias)
        self._above: set[str] = set()  # aliases of the lists around, which must not be hidden

    def child(self, relation: Relation, link: Part) -> Part:
        if isinstance(link, str):
            text, params = self._flat(relation, link)
            self.params += params
            return text

        def write(ctx: Any) -> None:
            start = len(ctx._sql)
            ctx.sql(link)
            name = "".join(ctx._sql[start:])
            del ctx._sql[start:]
            text, params = self._flat(relation, name)
            ctx.literal(text)
            ctx._values.extend(params)

        return write

    def _flat(self, relation: Relation, link: str) -> tuple[str, list[Any]]:
        query = self._children(relation, peewee.SQL(link))
        aliases = {name.lower() for name in map(_alias, sources(query)) if name}
        if aliases & self._above:
            raise NoJson(f"{relation.name}: an alias means something else in the rows around it")
        if any(map(names_output, query._order_by or ())):
            raise NoJson(f"{relation.name} is ordered by what it selects")
        if (
            isinstance(query, peewee.CompoundSelectQuery)
            or query._group_by
            or query._having is not None
            or query._simple_distinct
            or query._distinct is not None
            or query._offset is not None
        ):
            raise NoJson(f"{relation.name}: MariaDB can neither group, skip nor unite its rows")
        narrowed = Narrowed(query, relation.tree)
        parts: list[Part] = ["JSON_OBJECT("]
        pairs = self._pairs(relation.tree, narrowed, lambda i: narrowed.nodes[i].unwrap())
        around, self._above = self._above, self._above | aliases  # until it is rendered, below
        for number, (key, value) in enumerate(pairs):
            parts += [", " if number else "", self._string(key), ", ", *value]
        parts.append(")")
        query = narrowed.query.clone()
        if relation.many:
            ordering = peewee.CommaNodeList(query._order_by or ())
            limit = [" LIMIT ", _limit(query._limit)] if query._limit is not None else []
            order = [" ORDER BY ", ordering] if query._order_by else []
            parts = ["COALESCE(JSON_ARRAYAGG(", *parts, *order, *limit, "), JSON_ARRAY())"]
            query._order_by = query._limit = None
        query._returning = [_Text(*parts)]
        ctx = self.db.get_sql_context()
        self._sources += 1
        ctx.alias_manager._counter = 100 * self._sources
        text, params = ctx.parse(query)
        self._above = around
        return f"({text})", params


def _filled(template: str, value: Part) -> list[Part]:
    first, *others = template.split("{v}")
    parts: list[Part] = [first]
    for other in others:
        parts += [value, other]
    return parts


def _checked(template: str, node: Any, name: str) -> Any:
    """Of Peewee's nodes, which statements that are kept may contain (`shapes`)."""
    parts = _filled(template, node)
    nodes = [peewee.SQL(part) if isinstance(part, str) else part for part in parts]
    return peewee.Alias(peewee.NodeList(nodes, glue=""), name)


def _looks_at_no_more_than_it_returns(query: Any) -> bool:
    """Whether SQLite computes what is selected for the rows that are returned only."""
    if query._limit is None and query._offset is None:
        return True
    # Else a page of a table in the order of its key, by which SQLite stores the rows.
    if query._where is not None or query._group_by or len(sources(query)) > 1:
        return False
    order = [
        each.node
        if isinstance(each, peewee.Ordering) and not (each.collation or each.nulls)
        else each
        for each in query._order_by or ()
    ]
    key = primary_key(query.model) if type(query.model._meta.primary_key) in _KEYS else []
    return not order or (len(order) == 1 and among(order[0], key))


def _is_window(ordering: Any) -> bool:
    node = ordering.node if isinstance(ordering, peewee.Ordering) else ordering
    nodes = node.nodes if isinstance(node, peewee.NodeList) else ()
    return any(isinstance(each, peewee.Window) for each in nodes)


def _alias(source: Any) -> Any:
    """The name that the caller has given to a source."""
    return (
        source.alias if isinstance(source, peewee.ModelAlias) else getattr(source, "_alias", None)
    )


def _limit(limit: Any) -> Any:
    return str(limit) if isinstance(limit, int) else limit


class _Text(peewee.ColumnBase):
    """Text with nodes in between, and with functions that write what depends on the context."""

    def __init__(self, *parts: Part) -> None:
        self._parts = parts

    def __sql__(self, ctx: Any) -> Any:
        for part in self._parts:
            if isinstance(part, str):
                ctx.literal(part)
            elif isinstance(part, peewee.Node):
                ctx.sql(part)
            else:
                part(ctx)
        return ctx


def writer(db: Any) -> type[JsonSql]:
    """The class that writes for this database."""
    if isinstance(db, peewee.SqliteDatabase):
        return SqliteJson
    if isinstance(db, peewee.PostgresqlDatabase):
        return PostgresqlJson
    return MariadbJson if db.mariadb else MysqlJson


def _plain_json(field: Any) -> bool:
    """Whether Python's own encoder and decoder are used."""
    names = ("_dumps", "_json_dumps", "dumps"), ("_loads", "_json_loads", "loads")
    return all(
        getattr(field, name, None) in (None, default)
        for alternatives, default in zip(names, (json.dumps, json.loads), strict=True)
        for name in alternatives
    )
