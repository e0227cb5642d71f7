"""What Peewee documents of the async methods of models holds for databases of `connect()`."""

from typing import Any

import peewee
import pytest
from playhouse import signals
from playhouse.test_utils import assert_query_count

from fastapi_peewee import AsyncModel, AsyncModelMixin, Database
from tests import modes
from tests.modes import (
    Note,
    Seen,
    User,
    on,
)

connected, db, mode, observer, seen = modes.fixtures
ann, three = modes.rows


async def test_acreate(db: Database, seen: Seen) -> None:
    """`acreate` inserts a row and returns the instance, with its primary key."""
    user = await User.acreate(name="ann")
    assert isinstance(user, User)
    assert user.name == "ann"
    assert seen() == ["ann"]
    assert (await User.aget()).id == user.id


@pytest.mark.parametrize(
    "values",
    [{}, {"text": "a"}, {"id": 1007}, {"user": 1}, {"user": "ann"}, {"user": None, "text": "b"}],
    ids=str,
)
async def test_acreate_makes_what_create_makes(ann: Any, db: Database, values: Any) -> None:
    """The same instance, whether the SQL is new, seen again or known: its values, its relations and
    what is dirty of it."""
    if values.get("user") == "ann":
        values = {**values, "user": ann}

    def found(note: Note) -> Any:
        assert note._pk == note.id
        data = {name: value for name, value in note.__data__.items() if name != "id"}
        return data, note.__rel__, note.dirty_fields

    for _ in range(4):
        await db.run(Note.delete().execute)
        theirs = await db.run(lambda: Note.create(**values))
        await db.run(theirs.delete_instance)
        ours = await Note.acreate(**values)
        assert found(ours) == found(theirs)
        assert ours.id == values.get("id", ours.id)
        assert await Note.aget() == ours


async def test_aget(three: list[Any]) -> None:
    """`aget` takes expressions or filters, and raises `DoesNotExist` if there is no such row."""
    assert await User.aget(User.name == "bob") == three[1]
    assert await User.aget(User.name > "a", User.name.endswith("d")) == three[2]
    assert await User.aget(name="ann") == three[0]
    with pytest.raises(User.DoesNotExist):
        await User.aget(User.name == "dan")


async def test_aget_or_none(three: list[Any]) -> None:
    """`aget_or_none` returns None if there is no such row."""
    assert await User.aget_or_none(User.name == "bob") == three[1]
    assert await User.aget_or_none(name="dan") is None


async def test_aget_by_id(ann: Any) -> None:
    """`aget_by_id` gets the row with a primary key, or raises `DoesNotExist`."""
    assert await User.aget_by_id(ann.id) == ann
    with pytest.raises(User.DoesNotExist):
        await User.aget_by_id(ann.id + 1)


async def test_aget_or_create(ann: Any) -> None:
    """`aget_or_create` returns the row, and whether it had to make it, with these defaults."""
    assert await User.aget_or_create(name="ann") == (ann, False)
    note, created = await Note.aget_or_create(user=ann, defaults={"text": "new"})
    assert (note.text, created) == ("new", True)
    again, created = await Note.aget_or_create(user=ann, defaults={"text": "newer"})
    assert (again.text, created) == ("new", False)


async def test_aset_by_id_and_adelete_by_id(ann: Any, seen: Seen) -> None:
    """`aset_by_id` updates the row with a primary key, `adelete_by_id` deletes it."""
    assert await User.aset_by_id(ann.id, {"name": "anna"}) == 1
    assert seen() == ["anna"]
    assert await User.adelete_by_id(ann.id) == 1
    assert await User.adelete_by_id(ann.id) == 0
    assert seen() == []


async def test_abulk_create(db: Database, seen: Seen) -> None:
    """`abulk_create` inserts many instances, `batch_size` in a statement."""
    with assert_query_count(3):
        await User.abulk_create([User(name=name) for name in "abcde"], batch_size=2)
    assert seen() == list("abcde")


@on("postgres")
async def test_abulk_create_sets_primary_keys(db: Database) -> None:
    """On PostgreSQL the instances given to `abulk_create` get their primary keys."""
    users = [User(name=name) for name in "abc"]
    await User.abulk_create(users)
    assert [user.id for user in users] == [user.id for user in await db.list(User.select())]


async def test_abulk_update(three: list[Any], seen: Seen) -> None:
    """`abulk_update` updates the given fields of many instances, `batch_size` in a statement."""
    for user in three:
        user.name += "!"
    with assert_query_count(2):
        assert await User.abulk_update(three, fields=[User.name], batch_size=2) == 3
    assert seen() == ["ann!", "bob!", "cid!"]


async def test_asave(db: Database, seen: Seen) -> None:
    """`asave` inserts a new instance, updates one with a primary key, and returns the row count."""
    user = User(name="ann")
    assert await user.asave() == 1
    user.name = "anna"
    assert await user.asave() == 1
    assert seen() == ["anna"]

    assert await User(id=user.id + 7, name="bob").asave(force_insert=True) == 1
    assert seen() == ["anna", "bob"]
    note = await Note.acreate(user=user, text="old")
    note.text, note.user = "new", None
    assert await note.asave(only=[Note.text]) == 1
    assert (await Note.aget()).user_id == user.id


async def test_asave_of_nothing(db: Database) -> None:
    """`asave` returns False if there is nothing to save and `only_save_dirty` is set."""

    class Person(AsyncModel):
        name = peewee.CharField()

        class Meta:
            database = db
            table_name = "user"
            only_save_dirty = True

    person = await Person.acreate(name="ann")
    with assert_query_count(0):
        assert await person.asave() is False


async def test_adelete_instance(three: list[Any], seen: Seen) -> None:
    """`adelete_instance` deletes the row; with `recursive=True`, also what refers to it."""
    ann, bob, _ = three
    await Note.acreate(user=ann)
    assert await bob.adelete_instance() == 1
    with pytest.raises(peewee.IntegrityError):
        await ann.adelete_instance()
    assert await ann.adelete_instance(recursive=True, delete_nullable=True) == 1
    assert seen() == ["cid"]
    assert not await Note.select().aexecute()


async def test_async_methods_use_the_methods_of_the_model(db: Database) -> None:
    """`asave` and the others call what the model overrides: the hooks of `playhouse.signals`."""

    class Person(AsyncModelMixin, signals.Model):
        name = peewee.CharField()

        class Meta:
            database = db
            table_name = "user"

    told: list[Any] = []

    def receiver(sender: Any, instance: Any, **more: bool) -> None:
        told.append((instance.name, more))

    signals.pre_delete.connect(receiver, sender=Person)
    signals.post_save.connect(receiver, sender=Person)
    try:
        person = await Person.acreate(name="ann")
        person.name = "anna"
        await person.asave()
        await person.adelete_instance()
    finally:
        signals.pre_delete.disconnect(receiver, sender=Person)
        signals.post_save.disconnect(receiver, sender=Person)
    assert told == [("ann", {"created": True}), ("anna", {"created": False}), ("anna", {})]


async def test_models_of_another_database(tmp_path: Any) -> None:
    """The async methods of a model on a database of Peewee's own raise `InterfaceError`."""
    database = peewee.SqliteDatabase(tmp_path / "plain.db")

    class Person(AsyncModel):
        class Meta:
            pass

    with pytest.raises(peewee.InterfaceError):
        await Person.aget()
    with Person.bind_ctx(database), pytest.raises(peewee.InterfaceError, match="SqliteDatabase"):
        await Person.acreate()


async def test_database_model(db: Database) -> None:
    """`db.Model` is a base class with the async methods; it is bound to the database."""

    class Person(db.Model):
        name = peewee.CharField()

    assert issubclass(Person, AsyncModel)
    assert db.Model is db.Model
    await db.acreate_tables([Person])
    assert (await Person.acreate(name="ann")).name == "ann"


# afetch()


@pytest.fixture
async def annotated(ann: Any) -> Any:
    """A note whose user is not loaded."""
    await Note.acreate(user=ann)
    return await Note.aget()


async def test_afetch(ann: Any, annotated: Any) -> None:
    """`afetch` gets the row that a foreign key refers to, once; then it is a plain attribute."""
    with assert_query_count(1):
        assert (await annotated.afetch(Note.user)).name == "ann"
    with assert_query_count(0):
        assert annotated.user.name == "ann"
        assert await annotated.afetch(Note.user) is annotated.user


async def test_afetch_by_name(annotated: Any) -> None:
    """`afetch` takes the field's name as well."""
    assert (await annotated.afetch("user")).name == "ann"


async def test_afetch_of_what_was_joined(annotated: Any, db: Database) -> None:
    """`afetch` makes no query for what a join has loaded."""
    note = await db.get(Note.select(Note, User).join(User))
    with assert_query_count(0):
        assert (await note.afetch(Note.user)).name == "ann"


async def test_afetch_of_nothing(db: Database) -> None:
    """`afetch` of a foreign key that is null returns None."""
    await Note.acreate()
    assert await (await Note.aget()).afetch(Note.user) is None


async def test_afetch_takes_foreign_keys(annotated: Any) -> None:
    """`afetch` of another field raises `ValueError`."""
    with pytest.raises(ValueError, match="foreign-key"):
        await annotated.afetch(Note.text)


async def test_afetch_without_lazy_load(db: Database, annotated: Any) -> None:
    """`afetch` of a field with `lazy_load=False` raises `ValueError`."""

    class Remark(AsyncModel):
        user = peewee.ForeignKeyField(User, lazy_load=False, backref="+")

        class Meta:
            database = db
            table_name = "note"

    remark = await Remark.aget()
    with pytest.raises(ValueError, match="lazy_load"):
        await remark.afetch(Remark.user)
    assert (await User.aget_by_id(remark.user_id)).name == "ann"
