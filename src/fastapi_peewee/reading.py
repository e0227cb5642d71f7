"""Relations read with statements of their own, one for each: as dictionaries or as instances.

It is what the plans fall back on where the database can't build the JSON, and what completes the
instances that an endpoint returns.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import peewee
from peewee import Model

from .columns import Narrowed, completed
from .exceptions import SchemaError
from .response_types import Response
from .trees import Relation, Tree

#: How many keys one statement asks for at most; SQLite takes 32,766 parameters.
_KEYS_AT_ONCE = 10_000


def complete(db: Any, instances: list[Any], response: Response) -> list[Any]:
    """Instances with every relation that the response needs; the given ones aren't changed."""
    if response.schema is None or not all(isinstance(each, Model) for each in instances):
        return instances
    models = {type(each) for each in instances}
    if len(models) != 1:
        return instances
    tree = response.tree(models.pop())
    with one_snapshot(db, count_relations(tree)):
        return _with_relations(db, tree, instances)


def one_snapshot(db: Any, statements: int) -> AbstractContextManager[Any]:
    """Several statements must see the same rows."""
    if statements < 2 or db.in_transaction():
        return nullcontext()
    level = None if isinstance(db, peewee.SqliteDatabase) else "REPEATABLE READ"
    return db.atomic(level, read_only=True)


def count_relations(tree: Tree) -> int:
    """How many relations there are to be read."""
    return sum(len(list(each.relations)) for each in tree.all())


def _chunks(keys: Any) -> Iterator[list[Any]]:
    keys = [key for key in dict.fromkeys(keys) if key is not None]
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        yield keys[start : start + _KEYS_AT_ONCE]


def dictionaries(db: Any, tree: Tree, narrowed: Narrowed, rows: list[Any]) -> list[dict[str, Any]]:
    places = [(leaf.key, narrowed.place(leaf)) for leaf in tree.leaves]
    found = [{key: row[place] for key, place in places} for row in rows]
    for relation in tree.relations:
        place = narrowed.place(relation)
        children = _children(db, relation, [row[place] for row in rows])
        for row, values in zip(rows, found, strict=True):
            values[relation.key] = _of(relation, children, row[place])
    for end in tree.ends:
        for values in found:
            values[end.key] = [] if end.many else None
    return found


def _of(relation: Relation, children: dict[Any, list[Any]], key: Any) -> Any:
    if relation.many:
        return children.get(key, [])
    rows = children.get(key)
    return rows[0] if rows else None


def _children(db: Any, relation: Relation, keys: Any) -> dict[Any, list[dict[str, Any]]]:
    """A relation's rows as dictionaries, by the parents' keys."""

    def read(keys: list[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        query, target = relation.of_many_parents(keys)
        narrowed = Narrowed(query, relation.tree)
        clone = narrowed.query.clone()
        clone._returning = [*clone._returning, target.alias("fastapi_peewee_key")]
        rows = list(clone.tuples().execute(db))
        values_of = dictionaries(db, relation.tree, narrowed, rows)
        return zip((row[-1] for row in rows), values_of, strict=True)

    return _limited(relation, _by_parent(relation, keys, read))


def _by_parent(
    relation: Relation, keys: Any, read: Callable[[list[Any]], Iterable[tuple[Any, Any]]]
) -> dict[Any, list[Any]]:
    """The rows by the parents' keys, of what `read` returns for some of these: keys and rows."""
    found: dict[Any, list[Any]] = {}
    for chunk in _chunks(keys):
        found.update(_by_asked(chunk, read))
        if not relation.many:  # a row comes once, also if two of the keys are one to the database
            missing = [key for key in chunk if isinstance(key, str) and key not in found]
            if missing:
                found.update(_by_asked(missing, read))
    return found


def _by_asked(
    keys: list[Any], read: Callable[[list[Any]], Iterable[tuple[Any, Any]]]
) -> dict[Any, list[Any]]:
    """The same by the keys that were asked for, to which the rows' may be equal to the database
    only: by its collation, or as `"1"` is 1. Such a key is looked for by halves.
    """
    rows: dict[Any, list[Any]] = {}
    for key, row in read(keys):
        rows.setdefault(key if len(keys) > 1 else keys[0], []).append(row)
    if rows.keys() <= set(keys):
        return rows
    middle = len(keys) // 2
    return _by_asked(keys[:middle], read) | _by_asked(keys[middle:], read)


def _limited(relation: Relation, found: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    """A relation's limit and offset are for each parent."""
    query = relation.children() if relation.own_select else relation.query
    if query is None or (query._limit is None and query._offset is None):
        return found
    start = query._offset or 0
    stop = None if query._limit is None else start + query._limit
    return {key: rows[start:stop] for key, rows in found.items()}


def _with_relations(db: Any, tree: Tree, instances: list[Any]) -> list[Any]:
    if not instances or not (any(tree.relations) or any(tree.ends)):
        return instances
    copies = []
    for instance in instances:
        clone = copy.copy(instance)
        clone.__rel__ = dict(instance.__rel__)
        copies.append(clone)
    for relation in tree.relations:
        if relation.many:
            _add_lists(db, relation, copies)
        else:
            _add_rows(db, relation, copies)
    for end in tree.ends:
        for each in copies:
            if end.many:
                _put_list(each, end, [])
            else:
                each.__rel__[end.fk.name] = None
    return copies


def _add_rows(db: Any, relation: Relation, instances: list[Any]) -> None:
    name, key = relation.fk.name, relation.fk.rel_field.name

    def read(keys: list[Any]) -> Iterator[tuple[Any, Any]]:
        query = relation.tree.model.select().where(relation.fk.rel_field << keys)
        return ((each.__data__[key], each) for each in query.execute(db))

    missing = [each for each in instances if _is_missing(each, relation)]
    if any(each.__data__.get(name) is not None for each in missing):
        relation.check_database()
    found = _by_parent(relation, (each.__data__.get(name) for each in missing), read)
    for each in missing:
        rows = found.get(each.__data__.get(name))
        if rows or name not in each.__rel__:
            each.__rel__[name] = rows[0] if rows else None  # else Peewee would look for it again
    there = [each for each in instances if each.__rel__.get(name) is not None]
    rows = _with_relations(db, relation.tree, [each.__rel__[name] for each in there])
    for each, row in zip(there, rows, strict=True):
        each.__rel__[name] = row


def _is_missing(instance: Any, relation: Relation) -> bool:
    """Whether the row isn't there, or lacks columns: those that a join didn't select."""
    name = relation.fk.name
    if name not in instance.__rel__:
        return True
    row = instance.__rel__[name]
    fields = [leaf.field for leaf in relation.tree.leaves if leaf.field is not None]
    fields += [below.link for below in relation.tree.relations]
    return row is not None and not all(field.name in row.__data__ for field in fields)


def _add_lists(db: Any, relation: Relation, instances: list[Any]) -> None:
    link = relation.link.name
    given: dict[int, Any] = {id(each): each.__dict__.get(relation.key) for each in instances}
    missing = [each for each in instances if not isinstance(given[id(each)], list)]

    def read(keys: list[Any]) -> Iterator[tuple[Any, Any]]:
        query, target = relation.of_many_parents(keys)
        query = completed(query, relation.tree).select_extend(target.alias("fastapi_peewee_key"))
        if relation.through is not None:  # else the key would become the link's attribute
            query = query.objects()
        return ((row.fastapi_peewee_key, row) for row in query.execute(db))

    found = _by_parent(relation, (each.__data__.get(link) for each in missing), read)
    found = _limited(relation, found)
    for each in missing:
        given[id(each)] = found.get(each.__data__.get(link), [])
    every = [row for each in instances for row in given[id(each)]]
    rest = iter(_with_relations(db, relation.tree, every))
    for each in instances:
        _put_list(each, relation, [next(rest) for _ in given[id(each)]])


def _put_list(instance: Any, relation: Relation, rows: list[Any]) -> None:
    backref = relation.fk.backref
    if relation.through is None:
        instance.__dict__[relation.key] = rows
    elif backref in ("+", "!"):  # then it looks nowhere, and reads all rows when it is asked
        if relation.query is not None or relation.ended:
            raise SchemaError(
                f"{relation.name} has a query or a depth of its own, which can't be kept to where "
                f"instances are validated: {relation.fk!r} has the backref {backref!r}, so that "
                "Peewee reads all rows. Give that foreign key a backref with a name."
            )
    else:
        # What Peewee's accessor looks for: rows of the link table that were loaded before.
        instance.__dict__[backref] = [
            SimpleNamespace(**{relation.through.name: row}) for row in rows
        ]
