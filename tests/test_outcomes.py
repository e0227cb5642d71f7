"""What was done, what was not, and what nobody knows: each of them is told from the others."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import peewee
import pytest

from fastapi_peewee import (
    Database,
    InTransaction,
    OutcomeUnknown,
    TransactionAborted,
    connect,
)
from fastapi_peewee.outcomes import only_reads
from fastapi_peewee.refusals import kind_of
from soak.proxy import Proxy
from tests.apps import BLOCKS, client, make_app
from tests.apps import connected as open_database
from tests.modes import (
    Mode,
    Note,
    Oops,
    Seen,
    User,
    fixtures,
    in_each_mode,
    on,
    oops_gets_out,
    with_tables,
)

connected, _, mode, observer, seen = fixtures
SERVERS = on("postgres", "mysql")


def unknown() -> pytest.RaisesExc[OutcomeUnknown]:
    return pytest.raises(OutcomeUnknown)


def aborted() -> pytest.RaisesExc[TransactionAborted]:
    return pytest.raises(TransactionAborted)


def lost() -> pytest.RaisesExc[Exception]:
    """What tells for certain that something wasn't done, since the database was away."""

    def for_certain(error: Exception) -> bool:
        return kind_of(error) == "unavailable" and not isinstance(error, OutcomeUnknown)

    errors = (peewee.OperationalError, peewee.InterfaceError)
    return pytest.raises(errors, check=for_certain)


@pytest.fixture
def wire(database_url: str) -> Iterator[Proxy]:
    with Proxy(database_url) as wire:
        yield wire


@pytest.fixture
def db(database_url: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    """On the far side of the wire, except for SQLite."""
    if not database_url.startswith("sqlite"):
        database_url = request.getfixturevalue("wire").url
    with with_tables(connect(database_url)) as database:
        yield database


FAULTS = pytest.mark.parametrize("fault", ["cut_before", "cut_after"])


@SERVERS
@FAULTS
@in_each_mode
async def test_a_commit_that_was_not_answered_is_unknown(
    mode: Mode, wire: Proxy, seen: Seen, fault: str
) -> None:
    """Whether it got to the server or not: the client can't tell. No callback is called."""
    called: list[int] = []
    with unknown() as failure:
        async with mode.block(mode.db.atomic()):
            await mode.do(User.create, name="ann")
            mode.db.after_commit(lambda: called.append(1))
            setattr(wire, fault, b"COMMIT")
    assert isinstance(failure.value.__cause__, peewee.PeeweeException)
    assert (seen(), called) == (["ann"] if fault == "cut_after" else [], [])


@SERVERS
async def test_a_commit_that_the_watchdog_cuts_is_unknown(database_url: str, wire: Proxy) -> None:
    """The server may have got it, though it says nothing within `statement_timeout`."""

    async def block(limited: Database) -> None:
        async with limited.atomic():
            await limited.aexecute_sql("SELECT 1")
            wire.swallowing = True

    async with open_database(wire.url, statement_timeout=1.0) as limited:
        with unknown():
            await block(limited)


@SERVERS
@FAULTS
@in_each_mode
async def test_a_write_of_its_own_that_was_not_answered_is_unknown(
    mode: Mode, wire: Proxy, seen: Seen, fault: str
) -> None:
    """An INSERT outside of a transaction commits itself."""
    await mode.do(User.select().count)
    setattr(wire, fault, b"INSERT")
    with unknown():
        await mode.do(User.create, name="ann")
    assert seen() == (["ann"] if fault == "cut_after" else [])


@SERVERS
@in_each_mode
async def test_a_read_that_was_not_answered_is_a_failure(mode: Mode, wire: Proxy) -> None:
    """Nothing is unknown after a SELECT: it may be repeated."""
    wire.cut_before = b"SELECT"
    with lost():
        await mode.do(User.select().count)


@SERVERS
@in_each_mode
async def test_what_is_not_sent_is_not_done(mode: Mode, wire: Proxy, seen: Seen) -> None:
    """Where the connection was lost earlier, a write and a COMMIT fail for certain."""
    await mode.do(User.select().count)
    wire.cut()
    with lost():
        await mode.do(User.create, name="ann")
    assert seen() == []


@SERVERS
@in_each_mode
async def test_a_commit_after_a_lost_connection_is_not_sent(
    mode: Mode, wire: Proxy, seen: Seen
) -> None:
    """The transaction is over for certain: `database unavailable`, not unknown."""
    with lost():
        async with mode.block(mode.db.atomic()):
            await mode.do(User.create, name="ann")
            wire.cut()
    assert seen() == []


@SERVERS
@in_each_mode
async def test_a_lost_connection_ends_its_transaction(mode: Mode, wire: Proxy, seen: Seen) -> None:
    """No statement after it is carried out, nor is the block's end, whatever was caught."""
    with aborted() as failure:
        async with mode.block(mode.db.atomic()):
            await mode.do(User.create, name="ann")
            wire.cut_after = b"INSERT"
            with lost() as loss:  # for certain, since it was part of what is rolled back
                await mode.do(User.create, name="bob")
            wire.cut_after = None
            with pytest.raises(TransactionAborted, match="another `atomic"):
                async with mode.block(mode.db.atomic()):
                    await mode.do(User.create, name="cid")
    assert failure.value.__cause__ is loss.value
    assert kind_of(failure.value) == "unavailable"
    assert seen() == []


@SERVERS
@pytest.mark.parametrize("kind", ["dependency", "retried", "block", "autocommit"])
async def test_an_unknown_outcome_is_answered_as_such(
    db: Database, wire: Proxy, seen: Seen, kind: str
) -> None:
    """503, said to be unknown, without Retry-After; it was tried once."""
    app = make_app(db)
    tries = []

    def write() -> None:
        tries.append(1)
        User.create(name="ann")

    def in_dependency(held: InTransaction) -> None:
        write()

    endpoints: dict[str, Any] = {
        "dependency": in_dependency,
        "retried": db.retry(write),
        "block": db.atomic()(write),
        "autocommit": write,
    }
    app.post("/")(endpoints[kind])
    wire.cut_after = b"INSERT" if kind == "autocommit" else b"COMMIT"
    async with client(app) as http:
        answer = await http.post("/")
        wire.cut_after = None
        assert (answer.status_code, answer.json()) == (503, {"detail": "outcome unknown"})
        assert "Retry-After" not in answer.headers
        assert (seen(), tries) == (["ann"], [1])
        described = (await http.get("/openapi.json")).json()["paths"]["/"]["post"]["responses"]
    assert "outcome unknown" in described["503"]["content"]["application/json"]["examples"]


@SERVERS
async def test_an_unknown_outcome_is_not_retried(db: Database, wire: Proxy, seen: Seen) -> None:
    """Neither by `db.run` nor by an `async def` function: it would be done twice."""
    tries: list[str] = []

    def sync(name: str) -> None:
        tries.append(name)
        User.create(name=name)

    @db.retry
    async def asynchronous(name: str) -> None:
        tries.append(name)
        await User.acreate(name=name)

    for name in ("ann", "bob"):
        await User.acreate(name=f"before {name}")
        wire.cut_after = b"COMMIT"
        with unknown():
            await (db.run(sync, name, retries=3) if name == "ann" else asynchronous(name))
        wire.cut_after = None
    assert tries == ["ann", "bob"]
    assert [name for name in seen() if name in tries] == tries


@SERVERS
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_end_as_they_began_when_the_connection_is_lost(
    db: Database, wire: Proxy, block: str
) -> None:
    """The error that gets out is the connection's, and the thread's next block has a new one."""
    with lost(), BLOCKS[block](db):
        User.create(name="ann")
        wire.cut()
        User.create(name="bob")
    db.close()  # where Peewee has connected by itself, without a block
    with BLOCKS[block](db):
        User.create(name="cid")


@SERVERS
@pytest.mark.parametrize("method", ["commit", "rollback"])
def test_a_connection_lost_half_way_hides_no_error(
    db: Database, wire: Proxy, seen: Seen, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that leaves the block gets out, also if the connection was a thread's own."""
    before = getattr(db, method)

    def and_is_lost() -> None:
        before()
        wire.cut()

    with oops_gets_out(), db.atomic() as transaction:
        User.create(name="ann")
        with monkeypatch.context() as patch, lost():
            patch.setattr(db, method, and_is_lost)
            getattr(transaction, method)()
        with aborted():
            User.create(name="bob")
        raise Oops
    assert seen() == (["ann"] if method == "commit" else [])
    with db.atomic():
        User.create(name="cid")


# What the database says.


@on("postgres")
async def test_an_error_in_answer_to_commit_is_a_failure(db: Database) -> None:
    """A deferred constraint: rolled back, for certain."""
    await db.aexecute_sql(
        'CREATE TABLE child (parent int REFERENCES "user" DEFERRABLE INITIALLY DEFERRED)'
    )
    with pytest.raises(peewee.IntegrityError):
        async with db.atomic():
            await db.aexecute_sql("INSERT INTO child VALUES (7)")
    assert await db.run(lambda: db.execute_sql("TABLE child").fetchall()) == []


async def test_an_error_that_was_caught_does_not_pass_for_a_success(
    db: Database, seen: Seen, database_url: str
) -> None:
    """PostgreSQL then answers COMMIT with ROLLBACK; the others only undo the statement."""

    async def block() -> None:
        async with db.atomic():
            await User.acreate(name="ann")
            with pytest.raises(peewee.IntegrityError):
                await User.acreate(name="ann")

    if database_url.startswith("postgres"):
        with aborted() as failure:
            await block()
        assert kind_of(failure.value) is None  # a mistake of the program
        assert seen() == []
    else:
        await block()
        assert seen() == ["ann"]


async def test_an_error_in_a_savepoint_may_be_caught(db: Database, seen: Seen) -> None:
    """What is around it goes on, and is committed."""
    async with db.atomic():
        await User.acreate(name="ann")
        with pytest.raises(peewee.IntegrityError):
            async with db.atomic():
                await User.acreate(name="ann")
        await User.acreate(name="bob")
    assert seen() == ["ann", "bob"]


@in_each_mode
async def test_a_savepoint_that_is_gone_does_not_hide_why_it_was_needed(
    mode: Mode, seen: Seen
) -> None:
    """The error gets out, not the one of ROLLBACK TO; what couldn't be undone isn't committed."""

    def undo() -> None:
        mode.db.top_transaction().rollback()
        User.create(name="ann")

    with aborted() as failure:
        async with mode.block(mode.db.atomic()):
            with oops_gets_out() as oops:
                async with mode.block(mode.db.atomic()):
                    await mode.do(undo)
                    raise Oops
    assert failure.value.__cause__ is oops.value
    assert seen() == []


@in_each_mode
async def test_a_savepoint_that_cant_be_released_ends_the_transaction(
    mode: Mode, seen: Seen
) -> None:
    """What was done in it may be lost, so nothing around it is committed either."""

    def lose() -> None:
        mode.db.top_transaction().rollback()
        User.create(name="ann")

    with aborted() as failure:
        async with mode.block(mode.db.atomic()):
            with pytest.raises(peewee.DatabaseError) as gone:
                async with mode.block(mode.db.atomic()):
                    await mode.do(lose)
    assert failure.value.__cause__ is gone.value
    assert seen() == []


async def deadlock(db: Database, nested: bool, caught: Callable[[Any], Any]) -> None:
    """Have this task's transaction be the victim. `caught(error)` is awaited inside the block."""
    await User.acreate(name="ann")
    await User.acreate(name="bob")
    rows = {name: User.update(name=User.name).where(User.name == name) for name in ("ann", "bob")}
    async with db.atomic():
        await rows["ann"].aexecute()
        async with asyncio.TaskGroup() as group:
            locked, told = asyncio.Event(), asyncio.Event()
            group.create_task(_other(db, rows, locked, told))
            await locked.wait()
            told.set()
            try:
                async with db.atomic() if nested else nullcontext():
                    await rows["bob"].aexecute()
            except peewee.OperationalError as error:
                await caught(error)


async def _other(db: Database, rows: Any, locked: asyncio.Event, told: asyncio.Event) -> None:
    db._state.bind(None)  # a transaction of its own
    async with db.atomic():
        # InnoDB fails the transaction that has changed fewer rows.
        await db.run(lambda: [Note.create(text="weight") for _ in range(10)])
        await rows["bob"].aexecute()
        locked.set()
        await told.wait()
        await rows["ann"].aexecute()


@on("mysql")
@pytest.mark.parametrize("nested", [False, True])
async def test_after_a_deadlock_mysql_carries_out_no_half_transaction(
    db: Database, seen: Seen, nested: bool
) -> None:
    """It has rolled back the whole, and would take what follows for statements of their own. The
    savepoint that is gone doesn't hide the reason.
    """
    found: list[Any] = []

    async def caught(error: Exception) -> None:
        found.append(kind_of(error))
        with aborted():
            await User.acreate(name="half")
        with aborted():
            await db.run(lambda: list(db.stream("SELECT 1", (), 1)))

    with aborted() as failure:
        await deadlock(db, nested, caught)
    assert [*found, kind_of(failure.value)] == ["busy", "busy"]
    assert db.transient(failure.value)
    assert seen() == ["ann", "bob"]


@on("sqlite")
@in_each_mode
async def test_what_sqlite_has_rolled_back_itself_is_over(mode: Mode, seen: Seen) -> None:
    """A full disk ends the whole transaction."""

    def fill() -> None:
        pages = mode.db.execute_sql("PRAGMA page_count").fetchone()[0]
        mode.db.execute_sql(f"PRAGMA max_page_count = {pages}")
        with suppress(peewee.OperationalError):
            User.create(name="x" * 10**6)
        mode.db.execute_sql("PRAGMA max_page_count = 100000")

    with aborted() as failure:
        async with mode.block(mode.db.atomic()):
            await mode.do(User.create, name="ann")
            await mode.do(fill)
            await mode.do(User.create, name="bob")
    assert kind_of(failure.value) == "full"
    assert seen() == []


@on("postgres")
@in_each_mode
async def test_a_commit_that_fails_half_way_ends_the_block(mode: Mode, seen: Seen) -> None:
    """PostgreSQL has rolled back: what follows would be stored whatever becomes of the block."""

    def commit() -> None:
        mode.db.execute_sql(
            'CREATE TABLE child (parent int REFERENCES "user" DEFERRABLE INITIALLY DEFERRED)'
        )
        mode.db.execute_sql("INSERT INTO child VALUES (7)")
        with pytest.raises(peewee.IntegrityError):
            mode.db.top_transaction().commit()
        with aborted():
            User.create(name="ann")

    with aborted() as failure:
        async with mode.block(mode.db.atomic()):
            await mode.do(commit)
    assert isinstance(failure.value.__cause__, peewee.IntegrityError)
    assert seen() == []


@on("sqlite")
@in_each_mode
async def test_a_commit_that_sqlite_refuses_half_way_may_be_tried_again(
    mode: Mode, seen: Seen
) -> None:
    """There the transaction is still open."""

    def commit() -> None:
        mode.db.execute_sql("PRAGMA defer_foreign_keys = 1")
        note = Note.create(user=7)
        with pytest.raises(peewee.IntegrityError):
            mode.db.top_transaction().commit()
        note.delete_instance()
        User.create(name="ann")
        mode.db.top_transaction().commit()
        User.create(name="bob")

    with oops_gets_out():
        async with mode.block(mode.db.atomic()):
            await mode.do(commit)
            raise Oops
    assert seen() == ["ann"]


@on("sqlite")
@in_each_mode
@pytest.mark.parametrize("method", ["commit", "rollback"])
async def test_a_transaction_that_is_over_stays_over_whatever_is_called(
    mode: Mode, seen: Seen, method: str
) -> None:
    """Neither a COMMIT nor a ROLLBACK that fails makes a new one of what follows."""

    def end() -> None:
        User.create(name="ann")
        with pytest.raises(peewee.IntegrityError):
            mode.db.execute_sql("INSERT OR ROLLBACK INTO user (name) VALUES ('ann')")
        with pytest.raises(peewee.OperationalError):
            getattr(mode.db.top_transaction(), method)()
        with aborted():
            User.create(name="bob")

    with aborted() as failure:
        async with mode.block(mode.db.atomic()):
            await mode.do(end)
    assert isinstance(failure.value.__cause__, peewee.IntegrityError)
    assert seen() == []


@on("sqlite")
@in_each_mode
@pytest.mark.parametrize("method", ["commit", "rollback"])
async def test_a_transaction_that_cannot_begin_half_way_ends_the_block(
    mode: Mode, seen: Seen, observer: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has begun to write in between: what follows isn't stored on its own."""

    def end() -> None:
        User.create(name="ann")
        mode.db.execute_sql("PRAGMA busy_timeout = 0")
        before = getattr(mode.db, method)

        def and_another_begins() -> None:
            before()
            observer.execute_sql("BEGIN IMMEDIATE")

        with monkeypatch.context() as patch, pytest.raises(peewee.OperationalError):
            patch.setattr(mode.db, method, and_another_begins)
            getattr(mode.db.top_transaction(), method)()
        observer.execute_sql("ROLLBACK")
        with aborted():
            User.create(name="bob")

    with aborted() as failure:
        async with mode.block(mode.db.atomic()):
            await mode.do(end)
    assert kind_of(failure.value) == "busy"
    assert seen() == (["ann"] if method == "commit" else [])


def test_a_transaction_begun_by_hand_is_the_users(sqlite_url: str) -> None:
    """In `manual_commit()` nobody knows what an error has ended."""
    with with_tables(connect(sqlite_url)) as db, db.connection_context(), db.manual_commit():
        User.create(name="ann")
        with pytest.raises(peewee.IntegrityError):
            User.create(name="ann")
        User.create(name="bob")
        db.begin()
        User.create(name="cid")
        db.rollback()
        assert [user.name for user in User.select()] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("sql", "reads"),
    [
        ("SELECT 1", True),
        ("(SELECT 1) UNION (SELECT 2)", True),
        ("  select 1", True),
        ('WITH a AS (SELECT 1) SELECT * FROM "a"', True),
        ("WITH a AS (SELECT 1)\nINSERT INTO b SELECT * FROM a", False),
        ("EXPLAIN SELECT 1", True),
        ("EXPLAIN ANALYZE DELETE FROM a", False),
        ("INSERT INTO a VALUES (1)", False),
        ("CALL a()", False),
        ("SELECTED", False),
    ],
)
def test_what_only_reads(sql: str, reads: bool) -> None:
    """A statement of which nothing is unknown when it isn't answered."""
    assert only_reads(sql) == reads
