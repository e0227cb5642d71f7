"""What Peewee documents of choosing a database at run time: `bind`, proxies, `init`."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peewee
import pytest
from playhouse.shortcuts import ThreadSafeDatabaseMetadata

from fastapi_peewee import AsyncModel, Database
from tests import modes
from tests.modes import (
    Mode,
    Note,
    Oops,
    Seen,
    User,
    in_each_mode,
    on,
    oops_gets_out,
)

connected, db, mode, observer, seen = modes.fixtures
other = modes.other


def names() -> list[str]:
    return [user.name for user in User.select()]


def test_bind(db: Database, other: Database) -> None:
    """`bind` makes models use another database from now on, and those they refer to."""
    other.bind([Note])
    assert User._meta.database is other
    assert names() == ["other"]
    db.bind([Note], bind_refs=False)
    assert (User._meta.database, Note._meta.database) == (other, db)
    User.bind(db)
    assert names() == []
    other.close()


def test_bind_ctx(db: Database, other: Database) -> None:
    """`bind_ctx` makes models use another database inside the block, also if it fails."""
    with oops_gets_out(), other.bind_ctx([User, Note]):
        assert names() == ["other"]
        with db.bind_ctx([User]):
            assert names() == []
        assert names() == ["other"]
        raise Oops
    assert (User._meta.database, Note._meta.database) == (db, db)
    assert names() == []
    other.close()


def test_model_bind_ctx(db: Database, other: Database) -> None:
    """`Model.bind_ctx` binds the models that refer to it as well, unless told not to."""
    with User.bind_ctx(other):
        assert (User._meta.database, Note._meta.database) == (other, other)
    with User.bind_ctx(other, bind_backrefs=False):
        assert (User._meta.database, Note._meta.database) == (other, db)
        assert names() == ["other"]
    assert (User._meta.database, Note._meta.database) == (db, db)
    other.close()


async def test_async_methods_follow_the_binding(db: Database, other: Database) -> None:
    """The async methods use the database that a model is bound to when they are called."""
    await User.acreate(name="ann")
    with other.bind_ctx([User, Note]):
        assert (await User.aget()).name == "other"
        async with other.atomic():
            await User.acreate(name="bob")
        assert await other.count(User.select()) == 2
    assert (await User.aget()).name == "ann"


def test_thread_safe_binding(db: Database, other: Database) -> None:
    """With `ThreadSafeDatabaseMetadata` a thread binds a model for itself."""

    class Person(peewee.Model):
        name = peewee.CharField()

        class Meta:
            database = db
            table_name = "user"
            model_metadata_class = ThreadSafeDatabaseMetadata

    def job() -> list[str]:
        with other.bind_ctx([Person]), other.connection_context():
            assert Person._meta.database is other
            return [person.name for person in Person.select()]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(job).result() == ["other"]
    assert Person._meta.database is db
    assert list(Person.select()) == []


@pytest.mark.parametrize("proxy_class", [peewee.Proxy, peewee.DatabaseProxy])
def test_a_proxy_without_a_database(proxy_class: type[peewee.Proxy]) -> None:
    """Using a proxy before it is initialised raises `AttributeError`."""
    proxy = proxy_class()
    with pytest.raises(AttributeError, match="uninitialized"):
        proxy.connect()


@in_each_mode
async def test_a_database_proxy(mode: Mode, seen: Seen) -> None:
    """A `DatabaseProxy` becomes the database it is initialised with; its blocks work with `with`.

    For `async with`, the blocks are those of `proxy.obj`.
    """
    proxy = peewee.DatabaseProxy()
    told: list[Any] = []
    proxy.attach_callback(told.append)

    class Person(AsyncModel):
        name = peewee.CharField()

        class Meta:
            database = proxy
            table_name = "user"

    proxy.initialize(mode.db)
    assert told == [mode.db]

    def code() -> None:
        with proxy.connection_context(), proxy.atomic() as txn:
            Person.create(name="ann")
            txn.commit()
            with oops_gets_out(), proxy.atomic():
                Person.create(name="bob")
                raise Oops
            Person.create(name="cid")
            with proxy.savepoint() as savepoint:
                Person.create(name="dan")
                savepoint.rollback()
        assert proxy.atomic()(Person.create)(name="eve").name == "eve"
        with proxy.transaction() as txn:
            Person.create(name="flo")
            txn.rollback()

    await mode.do(code)
    async with mode.block(proxy.obj.atomic()):
        await mode.do(Person.create, name="gus")
    assert seen() == ["ann", "cid", "eve", "gus"]


@in_each_mode
async def test_a_plain_proxy(mode: Mode, seen: Seen) -> None:
    """A `Proxy` delegates everything to its database, the blocks for `async with` included."""
    proxy = peewee.Proxy()
    proxy.initialize(mode.db)

    with oops_gets_out():
        async with mode.block(proxy.atomic()):
            await mode.do(User.create, name="ann")
            raise Oops
    async with mode.block(proxy.connection_context()), mode.block(proxy.transaction()):
        await mode.do(User.create, name="bob")
    assert seen() == ["bob"]


async def test_async_methods_through_a_proxy(db: Database) -> None:
    """A model whose database is a proxy has the async methods if it is an `AsyncModel`."""
    proxy = peewee.DatabaseProxy()

    class Person(AsyncModel):
        name = peewee.CharField()

        class Meta:
            database = proxy
            table_name = "user"

    with pytest.raises(peewee.InterfaceError):
        await Person.aget_or_none()
    proxy.initialize(db)
    await Person.acreate(name="ann")
    assert [person.name for person in await Person.select().aexecute()] == ["ann"]
    assert await proxy.count(Person.select()) == 1


@on("sqlite")
def test_init_changes_the_database(db: Database, tmp_path: Path) -> None:
    """`init` makes a database another one: it closes the connection, and the next goes there."""
    User.create(name="ann")
    db.init(str(tmp_path / "other.db"))
    assert db.is_closed()
    db.create_tables([User, Note])
    assert User.select().count() == 0
    assert db.foreign_keys == 1


@on("sqlite")
async def test_init_changes_the_database_of_the_pool(db: Database, tmp_path: Path) -> None:
    """After `init`, the pool opens its connections to the other database."""
    await User.acreate(name="ann")
    db.init(str(tmp_path / "other.db"))
    await db.acreate_tables([User, Note])
    assert await db.count(User.select()) == 0


def test_deferred_initialisation(db: Database) -> None:
    """Without a name, a database raises `InterfaceError` when it is used; `init` gives it one."""
    name = db.database
    db.init(None)  # type: ignore[arg-type]
    with pytest.raises(peewee.InterfaceError):
        db.connect()
    with pytest.raises(peewee.InterfaceError):
        User.select().count()

    db.init(name)
    assert User.select().count() == 0


async def test_deferred_initialisation_for_tasks(db: Database) -> None:
    """So do the async methods and blocks of a database without a name."""
    name = db.database
    db.init(None)  # type: ignore[arg-type]
    try:
        with pytest.raises(peewee.InterfaceError):
            await db.count(User.select())
        with pytest.raises(peewee.InterfaceError):
            await db.run(User.create, name="ann")
        with pytest.raises(peewee.InterfaceError):
            async with db.atomic():
                pass
    finally:
        db.init(name)
    assert await db.count(User.select()) == 0
