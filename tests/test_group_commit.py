"""Single statements that write on SQLite: those of one moment share a COMMIT, and nothing else."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from contextvars import Context, ContextVar  # an empty context: what runs in it is in no block
from pathlib import Path
from typing import Any

import peewee
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_peewee import Database, PoolClosed, PoolTimeout, TooManyWaiting, connect
from fastapi_peewee.group_commit import GroupCommit
from tests.apps import back_to_rest, connected


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with connected(f"sqlite:///{tmp_path}/app.db", pool_size=4) as db:
        yield db


@pytest.fixture
async def note(db: Database) -> Any:
    return await make(db)


async def make(db: Database) -> Any:
    class Note(db.Model):
        text = peewee.TextField(unique=True)
        parent = peewee.DeferredForeignKey("Note", null=True)

    def create() -> None:
        db.execute_sql(
            "CREATE TABLE note (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE,"
            " parent_id INTEGER REFERENCES note (id) DEFERRABLE INITIALLY DEFERRED)"
        )
        db.execute_sql(
            "CREATE TRIGGER rolls_back BEFORE INSERT ON note WHEN new.text LIKE 'roll back%'"
            " BEGIN SELECT RAISE(ROLLBACK, 'rolled back'); END"
        )
        for text, count in ("slow", 10**8), ("a while", 10**6):
            db.execute_sql(
                f"CREATE TRIGGER '{text}' BEFORE INSERT ON note WHEN new.text = '{text}' BEGIN"
                " SELECT count(*) FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL"
                f" SELECT i + 1 FROM n LIMIT {count}) SELECT i FROM n); END"
            )

    await db.run(create)
    for text in "ab":  # the SQL of a query is kept when one like it has been seen before
        first = await Note.acreate(text=text)
        second = await Note.acreate(text=text * 2, parent=first.id)
        first.text *= 3
        await first.asave()
        await Note.aset_by_id(first.id, {"text": "c"})
        await second.adelete_instance()
        await first.adelete_instance()
    return Note


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was executed together, by the texts."""
    seen: list[list[str]] = []
    together = GroupCommit._write_together

    def noting(self: GroupCommit, conn: Any, lease: Any, writes: list[Any]) -> None:
        seen.append([write.params[0] for write in writes])
        together(self, conn, lease, writes)

    monkeypatch.setattr(GroupCommit, "_write_together", noting)
    return seen


def texts(db: Any) -> list[str]:
    """What is committed, in the order in which it was written: asked of another connection."""
    with closing(sqlite3.connect(db.database)) as conn:
        return [text for (text,) in conn.execute("SELECT text FROM note ORDER BY id")]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def at_rest(db: Any) -> None:
    await back_to_rest(db)
    gate = db._writers._gate
    assert (gate.held, gate.waiting) == (0, 0)
    await until(lambda: not any(group._serving for group in db._groups.values()))
    for group in db._groups.values():
        assert (group._queue, group._batch, group._call) == ([], [], None)


async def create_all(note: Any, *wanted: Any) -> list[Any]:
    """At one moment; what came of each."""
    made = (note.acreate(**(each if isinstance(each, dict) else {"text": each})) for each in wanted)
    return await asyncio.gather(*made, return_exceptions=True)


async def test_keys_that_the_insert_returns(tmp_path: Path) -> None:
    """They are the instances' keys, as those that the driver tells are."""
    options: dict[str, Any] = {"returning_clause": True}
    async with connected(f"sqlite:///{tmp_path}/returning.db", **options) as db:
        Note = await make(db)
        made = [await Note.acreate(text=text) for text in ("one", "two", "three")]
        assert [(await Note.aget(Note.text == note.text)).id for note in made] == [
            note.id for note in made
        ]
        assert (await db.run(Note.create, text="four")).id == made[-1].id + 1


async def test_what_comes_in_one_moment_shares_a_commit(
    db: Database, note: Any, batches: list[list[str]]
) -> None:
    """They are executed in their order, by one thread, with one connection and one COMMIT."""
    opened = db.pool_stats.opened
    made = await create_all(note, *"abcdef")
    assert [each.id for each in made] == [1, 2, 3, 4, 5, 6]
    assert texts(db) == list("abcdef")
    assert batches == [list("abcdef")]
    assert db.pool_stats.opened == opened
    made[0].text = "A"
    one, two, three = await asyncio.gather(
        made[0].asave(), made[1].adelete_instance(), note.aset_by_id(3, {"text": "C"})
    )
    assert (one, two, three) == (1, 1, 1)
    assert texts(db) == list("ACdef")
    assert len(batches) == 2
    await at_rest(db)


async def test_nobody_is_answered_before_the_commit(db: Database, note: Any) -> None:
    """Whoever has been told sees it from another connection, at once."""

    async def create(text: str) -> None:
        await note.acreate(text=text)
        assert text in texts(db)

    await asyncio.gather(*(create(str(number)) for number in range(50)))


async def test_a_statement_alone_needs_no_transaction(
    db: Database, note: Any, batches: list[list[str]]
) -> None:
    """It commits itself, as ever."""
    await note.acreate(text="a")
    assert texts(db) == ["a"]
    assert not batches


async def test_who_comes_meanwhile_is_in_the_next_one(
    db: Database, note: Any, batches: list[list[str]]
) -> None:
    """What comes while a COMMIT is under way doesn't wait for another moment."""
    first = [asyncio.create_task(note.acreate(text=text)) for text in "ab"]
    await until(lambda: batches)
    await create_all(note, *"cd")
    await asyncio.gather(*first)
    assert batches == [["a", "b"], ["c", "d"]]


async def test_what_is_refused_harms_no_other(db: Database, note: Any) -> None:
    """A constraint, or a value that can't be sent, is the error of its own statement."""
    huge = {"text": "c", "parent": 2**70}
    made = await create_all(note, "a", "a", None, "\ud800", huge, "b")
    assert [getattr(each, "text", type(each)) for each in made] == [
        "a",
        peewee.IntegrityError,
        peewee.IntegrityError,
        peewee.DataError,
        peewee.DataError,
        "b",
    ]
    assert texts(db) == ["a", "b"]
    await at_rest(db)


async def test_a_statement_that_rolls_everything_back(
    db: Database, note: Any, batches: list[list[str]]
) -> None:
    """RAISE(ROLLBACK) ends the transaction that others share; they are executed anew."""
    made = await create_all(note, "a", "roll back 1", "b", "a", "roll back 2", "c")
    first, *others = [getattr(each, "text", str(each)) for each in made]
    second = others.pop(2)
    # Each in a thread of its own by then: either may be the first.
    assert {first, second} == {"a", "UNIQUE constraint failed: note.text"}
    assert others == ["rolled back", "b", "rolled back", "c"]
    assert sorted(texts(db)) == ["a", "b", "c"]
    assert len(batches) == 1
    await at_rest(db)


async def test_what_commit_refuses(db: Database, note: Any) -> None:
    """A deferred foreign key is checked at the end: only its own statement is refused."""
    made = await create_all(note, "a", {"text": "b", "parent": 99}, {"text": "c", "parent": 1})
    assert [getattr(each, "text", str(each)) for each in made] == [
        "a",
        "FOREIGN KEY constraint failed",
        "c",
    ]
    assert sorted(texts(db)) == ["a", "c"]
    await at_rest(db)


async def test_a_full_disk(tmp_path: Path) -> None:
    """Who has no more room gets SQLite's error; what was answered is there."""
    pragmas = {"max_page_count": 20}
    async with connected(f"sqlite:///{tmp_path}/app.db", pragmas=pragmas) as db:
        note = await make(db)
        wanted = [f"{number:4}" * 200 for number in range(200)]
        made = await create_all(note, *wanted)
        failed = [each for each in made if isinstance(each, BaseException)]
        assert failed
        assert {str(each) for each in failed} == {"database or disk is full"}
        assert sorted(texts(db)) == sorted(each.text for each in made if each not in failed)
        await at_rest(db)


class Failing:
    """A connection whose COMMIT fails."""

    def __init__(self, conn: Any, error: BaseException) -> None:
        self._conn = conn
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)

    def execute(self, sql: str, *params: Any) -> Any:
        if sql == "COMMIT":
            raise self._error
        return self._conn.execute(sql, *params)


@pytest.mark.parametrize(
    "error", [MemoryError(), sqlite3.ProgrammingError("Cannot operate on a closed database.")]
)
async def test_a_commit_that_fails_otherwise(
    db: Database, note: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Whatever COMMIT raises, nobody is told that something was committed."""
    together = GroupCommit._write_together
    monkeypatch.setattr(
        GroupCommit,
        "_write_together",
        lambda self, conn, *args: together(self, Failing(conn, error), *args),
    )
    made = await create_all(note, *"ab")
    assert all(isinstance(each, BaseException) for each in made)
    assert {str(each) for each in made} == {str(error)}
    assert texts(db) == []
    await at_rest(db)


async def test_an_error_in_the_thread(
    db: Database, note: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug of ours is everybody's error, and no success."""

    def fail(self: Any, conn: Any, lease: Any, writes: list[Any]) -> None:
        for write in writes:
            write.execute(conn)
        raise ZeroDivisionError

    monkeypatch.setattr(GroupCommit, "_write_together", fail)
    assert {type(each) for each in await create_all(note, *"ab")} == {ZeroDivisionError}
    await at_rest(db)


async def test_what_is_refused_while_another_error_is_handled(db: Database, note: Any) -> None:
    """The error that the caller is handling isn't taken for the driver's."""
    await note.acreate(text="a")
    for create in (note.acreate, lambda **values: db.run(lambda: _handling(note.create, **values))):
        try:
            "\ud800".encode()
        except UnicodeEncodeError:
            with pytest.raises(peewee.IntegrityError):
                await create(text="a")
            with pytest.raises(peewee.DataError):
                await create(text="\ud800")


def _handling(fn: Any, **values: Any) -> None:
    try:
        "\ud800".encode()
    except UnicodeEncodeError:
        fn(**values)


# Cancellation


async def test_who_is_cancelled_in_the_queue_writes_nothing(
    db: Any, note: Any, batches: list[list[str]]
) -> None:
    """Before its turn a statement is dropped at once; those beside it are executed."""
    async with db.atomic():
        tasks = [asyncio.create_task(note.acreate(text=text), context=Context()) for text in "abc"]
        await until(lambda: db._writers._gate.waiting)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
    await asyncio.gather(tasks[0], tasks[2])
    assert texts(db) == ["a", "c"]
    assert batches == [["a", "c"]]
    await at_rest(db)


async def test_a_turn_to_write_that_comes_when_all_are_cancelled(
    db: Any, note: Any, batches: list[list[str]]
) -> None:
    """Nothing is begun then, and the turn goes on to the next."""
    async with db.atomic():
        task = asyncio.create_task(note.acreate(text="a"), context=Context())
        await until(lambda: db._writers._gate.waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await at_rest(db)
    await note.acreate(text="b")
    assert texts(db) == ["b"]
    assert batches == []


async def test_who_is_cancelled_while_others_write(db: Database, note: Any) -> None:
    """What has begun is over when `CancelledError` comes; the others have their answers."""
    for count in range(30):
        wanted = [f"{count} {number}" for number in range(4)]
        tasks = [asyncio.create_task(note.acreate(text=text)) for text in wanted]
        for _ in range(count):
            await asyncio.sleep(0)
        tasks[count % 4].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        there = set(texts(db)).intersection(wanted)
        for text, each in zip(wanted, found, strict=True):
            if isinstance(each, asyncio.CancelledError):
                there.discard(text)
            else:
                assert getattr(each, "text", each) == text
                there.remove(text)
        assert not there
    await at_rest(db)


@pytest.mark.parametrize("count", [1, 3])
async def test_when_all_are_cancelled_it_is_interrupted(
    db: Database, note: Any, batches: list[list[str]], count: int
) -> None:
    """A statement that lasts is ended when nobody waits for it, nor for those beside it."""
    wanted = ["slow", "b", "c"][:count]
    tasks = [asyncio.create_task(note.acreate(text=text)) for text in wanted]
    await _begun(db)
    for task in tasks:
        assert not task.done()
        task.cancel()
    start = time.monotonic()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert time.monotonic() - start < 2
    assert {type(each) for each in found} == {asyncio.CancelledError}
    assert texts(db) == []
    await at_rest(db)


async def _begun(db: Any) -> None:
    """Wait until a thread has taken statements, which have to last."""
    await until(lambda: any(group._batch for group in db._groups.values()))


async def test_one_of_those_who_wait_for_a_long_statement(db: Database, note: Any) -> None:
    """While somebody waits, it isn't interrupted: then the others would lose what they wrote."""
    made = note.acreate(text="a while"), note.acreate(text="b")
    tasks = [asyncio.create_task(each) for each in made]
    await _begun(db)
    tasks[1].cancel()
    assert (await tasks[0]).text == "a while"
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert texts(db)[0] == "a while"
    await at_rest(db)


def test_an_event_loop_that_ends(tmp_path: Path) -> None:
    """`asyncio.run` cancels all tasks, those that serve the writers, too: none is left hanging."""

    async def main() -> None:
        async with connected(f"sqlite:///{tmp_path}/app.db") as db:
            note = await make(db)

            async def write() -> None:
                for number in range(1000):
                    await note.acreate(text=f"{id(asyncio.current_task())} {number}")

            for _ in range(5):
                asyncio.get_running_loop().create_task(write())
            while len(texts(db)) < 10:
                await asyncio.sleep(0.001)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await note.acreate(text="the last one")
            assert texts(db)[-1] == "the last one"
            await at_rest(db)

    asyncio.run(main())


async def test_whoever_serves_the_writers_may_be_cancelled(db: Any, note: Any) -> None:
    """The task that does it is one of all tasks; those who wait have their answers all the same."""
    tasks = [asyncio.create_task(note.acreate(text=text)) for text in ("a while", "b")]
    await _begun(db)
    [group] = db._groups.values()
    group._serving.cancel()
    later = asyncio.create_task(note.acreate(text="c"))
    assert [(await task).text for task in (*tasks, later)] == ["a while", "b", "c"]
    assert texts(db) == ["a while", "b", "c"]
    await at_rest(db)


def test_a_loop_that_is_closed_while_it_writes(tmp_path: Path) -> None:
    """It is kept no longer than until another loop writes; its connection goes back."""
    db: Any = connect(f"sqlite:///{tmp_path}/app.db")
    notes: list[Any] = []

    async def begin() -> None:
        notes.append(await make(db))
        asyncio.get_running_loop().create_task(notes[0].acreate(text="a while"))
        await _begun(db)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending!"
    loop.close()

    async def write() -> None:
        await notes[0].acreate(text="b")
        await back_to_rest(db)
        await db.close_pool()

    asyncio.run(write())
    assert loop not in db._groups
    assert "b" in texts(db)


async def test_temporary_tables_are_for_a_connection_of_their_own(db: Any, note: Any) -> None:
    """What may be found by the next user of a connection isn't written together with others."""

    class Draft(db.Model):
        text = peewee.TextField()

        class Meta:
            schema = "temp"

    def write() -> int:
        db.create_tables([Draft], temporary=True)
        for text in "abc":
            Draft.create(text=text)
        return Draft.select().count()

    assert await db.run(write) == 3
    with pytest.raises(peewee.OperationalError, match="no such table"):
        await Draft.acreate(text="d")


# Limits


async def test_patience_counts_from_when_one_came(db: Any, note: Any) -> None:
    """Whoever waits behind a long transaction gets "database is locked" after `busy_timeout`."""
    db._writers.patience = 0.3
    waited: list[float] = []

    async def write(text: str) -> None:
        start = time.monotonic()
        with pytest.raises(peewee.OperationalError, match="database is locked"):
            await note.acreate(text=text)
        waited.append(time.monotonic() - start)

    async with db.atomic():
        tasks = []
        for text in "abc":
            tasks.append(asyncio.create_task(write(text), context=Context()))
            await asyncio.sleep(0.1)
        await asyncio.gather(*tasks)
    assert len(waited) == 3
    assert all(0.29 < seconds < 0.6 for seconds in waited), waited
    await at_rest(db)


async def test_another_process_that_writes(tmp_path: Path) -> None:
    """SQLite's own patience is kept with those outside; the error is the one of all."""
    url = f"sqlite:///{tmp_path}/app.db"
    async with connected(url, busy_timeout=0.1) as db:
        note = await make(db)
        with closing(sqlite3.connect(tmp_path / "app.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            found = await create_all(note, *"abc")
            assert {str(each) for each in found} == {"database is locked"}
            assert all(db.transient(each) for each in found)
            other.execute("ROLLBACK")
        await create_all(note, *"abc")
        assert texts(db) == ["a", "b", "c"]
        await at_rest(db)


async def test_another_process_outlasts_the_patience_of_one(tmp_path: Path) -> None:
    """Of those that would be written together, each waits for another process's writer as long as
    its own patience lasts, and no longer; who has gone meanwhile isn't written."""
    url = f"sqlite:///{tmp_path}/app.db"
    async with connected(url, pool_size=4, busy_timeout=2) as db:
        note = await make(db)
        with closing(sqlite3.connect(tmp_path / "app.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            turn, _ = db._writers.enter()
            begun = time.monotonic()
            first = asyncio.ensure_future(note.acreate(text="first"))
            await until(lambda: db._writers._gate.waiting)
            await asyncio.sleep(1)
            second, gone = (asyncio.ensure_future(note.acreate(text=text)) for text in "ab")
            await asyncio.sleep(0)
            turn.release()
            group = db._group()
            await until(lambda: group._batch)
            gone.cancel()
            with pytest.raises(peewee.OperationalError, match="database is locked"):
                await first
            assert 1.9 < time.monotonic() - begun < 2.7
            other.execute("ROLLBACK")
        assert (await second).text == "a"
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert texts(db) == ["a"]
        await at_rest(db)


async def test_when_all_connections_are_in_use(tmp_path: Path) -> None:
    """They wait for one as everybody does, for as long, and in the same queue."""
    async with connected(f"sqlite:///{tmp_path}/app.db", pool_size=1, timeout=0.2) as db:
        note = await make(db)
        async with db.connection_context():
            await db.run(note.select().count)
            start = time.monotonic()
            tasks = [asyncio.create_task(note.acreate(text=t), context=Context()) for t in "ab"]
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(each) for each in found} == {PoolTimeout}
            assert 0.19 < time.monotonic() - start < 0.5
        await create_all(note, *"ab")
        assert texts(db) == ["a", "b"]
        await at_rest(db)


async def test_who_is_cancelled_when_all_connections_are_in_use(tmp_path: Path) -> None:
    """At whichever moment: the others of that moment have their answers, and nobody is left."""
    async with connected(f"sqlite:///{tmp_path}/app.db", pool_size=1) as db:
        note = await make(db)
        async with db.connection_context():
            await db.run(note.select().count)
            others = []
            for turns in range(8):
                tasks = [
                    asyncio.create_task(note.acreate(text=f"{turns} {name}"), context=Context())
                    for name in "abc"
                ]
                others += [tasks[0], tasks[2]]
                for _ in range(turns):
                    await asyncio.sleep(0)
                tasks[1].cancel()
                with pytest.raises(asyncio.CancelledError):
                    await tasks[1]
        await asyncio.gather(*others)
        await at_rest(db)
        assert sorted(texts(db)) == sorted(f"{turns} {name}" for turns in range(8) for name in "ac")


async def test_a_pool_that_is_being_closed(db: Any, note: Any) -> None:
    """Who comes then learns it."""
    db.pool._gate.close()
    found = await create_all(note, *"ab")
    assert {type(each) for each in found} == {PoolClosed}


async def test_a_statement_beyond_its_limit(tmp_path: Path) -> None:
    """`statement_timeout` ends the statement that lasts; the others are executed anew."""
    async with connected(f"sqlite:///{tmp_path}/app.db", statement_timeout=0.3) as db:
        note = await make(db)
        found = await create_all(note, "a", "slow", "b")
        assert [getattr(each, "text", type(each)) for each in found] == [
            "a",
            peewee.OperationalError,
            "b",
        ]
        assert sorted(texts(db)) == ["a", "b"]
        await at_rest(db)


async def test_patience_of_those_behind_one_who_is_cancelled(db: Any, note: Any) -> None:
    """When the time of one who has gone is over, that of the others isn't."""
    db._writers.patience = 0.4
    async with db.atomic():
        first = asyncio.create_task(note.acreate(text="first"), context=Context())
        await asyncio.sleep(0.25)
        second = asyncio.create_task(note.acreate(text="second"), context=Context())
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.25)
        assert not second.done()
    assert (await second).text == "second"
    assert texts(db) == ["second"]
    await at_rest(db)


async def test_not_more_than_max_waiting_wait(tmp_path: Path) -> None:
    """They are counted among the pool's, and those beyond go the ordinary way, which ends, too."""
    url = f"sqlite:///{tmp_path}/app.db"
    async with connected(url, pool_size=3, max_waiting=5) as db:
        note = await make(db)
        async with db.atomic():
            tasks = []
            for number in range(40):
                create = note.acreate(text=str(number))
                tasks.append(asyncio.create_task(create, context=Context()))
                if number == 4:
                    await until(lambda: db._writers._gate.waiting)
                    assert db.pool_stats.waiting == 5
            await until(lambda: sum(task.done() for task in tasks) == 40 - 5 - 1 - 5)
            assert db.pool_stats.waiting == 10  # in either queue; one has the connection
            refused = [task for task in tasks if task.done()]
            assert {type(task.exception()) for task in refused} == {TooManyWaiting}
        await asyncio.gather(*(task for task in tasks if task not in refused))
        assert len(texts(db)) == 11
        await at_rest(db)


# Surroundings


async def test_functions_that_sql_calls_may_query(db: Any) -> None:
    """On the same connection, in the transaction: they see what those before have written."""
    note = await make(db)
    db.register_function(lambda: note.select().count(), "how_many", 0)
    await db.aexecute_sql(
        "CREATE TRIGGER counts AFTER INSERT ON note BEGIN"
        " UPDATE note SET text = text || how_many() WHERE id = new.id; END"
    )
    await create_all(note, *"abc")
    await note.acreate(text="d")
    assert texts(db) == ["a1", "b2", "c3", "d4"]
    await at_rest(db)


async def test_attached_files_are_not_locked(tmp_path: Path, db: Any, note: Any) -> None:
    """A transaction would lock them as well, so each statement is executed alone."""
    db.attach(str(tmp_path / "other.db"), "other")
    await db.run(note.select().count)
    with closing(sqlite3.connect(tmp_path / "other.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await create_all(note, *"abc")
        other.execute("ROLLBACK")
    assert sorted(texts(db)) == ["a", "b", "c"]


async def test_functions_that_sql_calls_see_the_context_of_their_request(db: Any) -> None:
    """Each statement is executed in the context of the task that awaits it."""
    user: ContextVar[str] = ContextVar("user", default="nobody")
    db.register_function(user.get, "current_user_name", 0)
    note = await make(db)
    await db.aexecute_sql(
        "CREATE TRIGGER signs AFTER INSERT ON note BEGIN"
        " UPDATE note SET text = text || ' of ' || current_user_name() WHERE id = new.id; END"
    )

    async def create(name: str) -> None:
        user.set(name)
        await note.acreate(text="note")

    await asyncio.gather(*(create(name) for name in ("ada", "bob", "eve")))
    assert texts(db) == ["note of ada", "note of bob", "note of eve"]


async def test_who_watches_statements_sees_each(
    db: Any, note: Any, batches: list[list[str]]
) -> None:
    """With a hook, or Peewee's log, they are executed one by one, where the hook is called."""
    seen: list[str] = []
    db.query_hooks.append(lambda event: seen.append(event.sql))
    await create_all(note, *"abc")
    assert sum(sql.startswith("INSERT") for sql in seen) == 3
    assert not batches


def test_several_event_loops(tmp_path: Path) -> None:
    """Each has its own writers; all of them write."""
    url = f"sqlite:///{tmp_path}/app.db"

    async def main() -> None:
        async with connected(url, busy_timeout=30) as db:
            note = await make(db)

            async def other(loop: int) -> None:
                await create_all(note, *(f"{loop} {number}" for number in range(40)))

            await asyncio.gather(
                *(asyncio.to_thread(asyncio.run, other(loop)) for loop in range(4)), other(4)
            )
            assert sorted(texts(db)) == sorted(f"{i} {n}" for i in range(5) for n in range(40))
            await at_rest(db)

    asyncio.run(main())


step = st.tuples(
    st.sampled_from(["write", "same", "roll back", "orphan", "block", "wait"]),
    st.integers(0, 6),  # after so many turns of the event loop
    st.none() | st.integers(0, 12),  # cancelled after so many
)


@given(steps=st.lists(step, max_size=30))
def test_random_writers(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    """Whatever writes together, is refused or cancelled: what was answered is there once, what was
    refused is not, what was cancelled may be.
    """
    url = f"sqlite:///{tmp_path_factory.mktemp('random')}/app.db"

    async def main() -> None:
        async with connected(url, pool_size=3, busy_timeout=30) as db:
            note = await make(db)
            await note.acreate(text="same")
            allowed: dict[str, set[int]] = {"same": {1}}

            async def write(number: int, kind: str, cancel: int | None) -> None:
                text = "same" if kind == "same" else f"{kind} {number}"
                values: dict[str, Any] = {"text": text}
                if kind == "orphan":
                    values["parent"] = 10**9
                if kind == "block":

                    async def create() -> None:
                        async with db.atomic():
                            await note.acreate(**values)

                    task = asyncio.create_task(create())
                else:
                    task = asyncio.create_task(note.acreate(**values))
                for _ in range(cancel or 0):
                    await asyncio.sleep(0)
                if cancel is not None:
                    task.cancel()
                refused = kind in ("same", "roll back", "orphan")
                try:
                    await task
                    assert not refused
                    allowed[text] = {1}
                except peewee.DatabaseError:
                    assert refused
                    allowed.setdefault(text, {0})
                except asyncio.CancelledError:
                    allowed.setdefault(text, {0} if refused else {0, 1})

            tasks = []
            for number, (kind, turns, cancel) in enumerate(steps):
                for _ in range(turns):
                    await asyncio.sleep(0)
                if kind == "wait":
                    await asyncio.sleep(0.001)
                else:
                    tasks.append(asyncio.create_task(write(number, kind, cancel)))
            await asyncio.gather(*tasks)
            there = texts(db)
            assert set(there) <= set(allowed)
            for text, counts in allowed.items():
                assert there.count(text) in counts, text
            await at_rest(db)

    asyncio.run(main())
