"""The wire to the server is cut, reset, sliced and slowed down: in every mode, on both servers."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from typing import Any

import anyio
import peewee
import pytest
from fastapi import FastAPI

from fastapi_peewee import Database, InTransaction, respond, schema
from soak.proxy import Proxy
from tests import apps, modes
from tests.apps import (
    assert_unavailable,
    back_to_rest,
    client,
    make_app,
    refusal,
    with_all_uses,
)
from tests.faults import LOST, as_if_idle, until_well
from tests.faults import nothing_left as nothing_left
from tests.faults import wire as wire
from tests.modes import Mode, Seen, UnderRun, User, in_each_mode

connected, db, mode, *_ = modes.fixtures


@pytest.fixture
def database_url(wire: Proxy) -> str:
    """Of `db`."""
    return wire.url


@pytest.fixture
def observer(wire: Proxy) -> Iterator[Any]:
    with closing(modes.plain(wire.direct_url)) as database:
        yield database


@pytest.fixture
def seen(observer: Any) -> Seen:
    """The names of the users that have been committed, seen past the wire."""
    query = User.select(User.name).order_by(User.id)
    return lambda: [name for (name,) in observer.execute(query)]


def kill_sessions(wire: Proxy) -> None:
    """Have the server end all sessions that came through the wire."""
    with closing(modes.plain(wire.direct_url)) as admin:
        if isinstance(admin, peewee.PostgresqlDatabase):
            admin.execute_sql(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            return
        others = "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> "
        for (number,) in admin.execute_sql(others + "connection_id()").fetchall():
            admin.execute_sql(f"KILL {number}")


def reset(wire: Proxy) -> None:
    wire.resets = True
    wire.cut()


LOSSES: dict[str, Callable[[Proxy], None]] = {
    "cut": Proxy.cut,
    "reset": reset,
    "killed by the server": kill_sessions,
}
in_all_ways = pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)


# Transactions


async def check_next(mode: Mode, seen: Seen) -> None:
    """The next transaction has a new connection, unless it is still the same `db.run(…)`, which
    has one for all its length."""
    if isinstance(mode, UnderRun):
        with pytest.raises(LOST):
            User.create(name="next")
        return
    before = seen()
    async with mode.block(mode.db.atomic()):
        await mode.do(User.create, name="next")
    assert seen() == [*before, "next"]


@in_all_ways
@in_each_mode
async def test_a_lost_connection_poisons_its_transaction(
    mode: Mode, wire: Proxy, seen: Seen, lose: Callable[[Proxy], None]
) -> None:
    """Once the connection is lost, every further statement of the block fails, and so does its
    COMMIT, even if all errors were caught: never is the rest of it committed by a new connection.
    """
    with pytest.raises(LOST):
        async with mode.block(mode.db.atomic()):
            await mode.do(User.create, name="before")
            lose(wire)
            for name in ("after", "again"):
                with pytest.raises(LOST):
                    await mode.do(User.create, name=name)
            with pytest.raises(LOST):
                async with mode.block(mode.db.atomic()):
                    await mode.do(User.create, name="nested")
    assert seen() == []
    await check_next(mode, seen)


@in_each_mode
async def test_a_connection_that_is_lost_before_its_commit_commits_nothing(
    mode: Mode, wire: Proxy, seen: Seen
) -> None:
    """Where the server doesn't get the COMMIT, the block raises, and nothing is there."""
    with pytest.raises(LOST):
        async with mode.block(mode.db.atomic()):
            await mode.do(User.create, name="ann")
            wire.cut_before = b"COMMIT"
    wire.heal()
    assert seen() == []
    await check_next(mode, seen)


@in_each_mode
async def test_a_commit_whose_answer_is_lost_raises_and_is_not_repeated(
    mode: Mode, wire: Proxy, seen: Seen
) -> None:
    """Where only the answer to COMMIT is lost, the block raises too: it was committed, once, and
    its `after_commit` callbacks don't run, since nobody knows."""
    called: list[str] = []
    with pytest.raises(LOST):
        async with mode.block(mode.db.atomic()):
            await mode.do(User.create, name="ann")
            mode.db.after_commit(lambda: called.append("ann"))
            wire.cut_after = b"COMMIT"
    wire.heal()
    assert seen() == ["ann"]
    await check_next(mode, seen)
    assert called == []


@in_all_ways
@in_each_mode
async def test_a_connection_lost_between_transactions_fails_at_most_one(
    mode: Mode, wire: Proxy, seen: Seen, lose: Callable[[Proxy], None]
) -> None:
    """A connection that was lost while nobody used it fails the next block as a whole or is
    replaced in time; the block after it works."""
    async with mode.block(mode.db.atomic()):
        await mode.do(User.create, name="ann")
    lose(wire)
    if isinstance(mode, UnderRun):
        await check_next(mode, seen)
        return
    names = ["ann"]
    for name in ("bob", "cid"):
        try:
            async with mode.block(mode.db.atomic()):
                await mode.do(User.create, name=name)
        except LOST:
            assert name == "bob"
        else:
            names.append(name)
    assert seen() == names


# Requests


@pytest.fixture
async def app_db(wire: Proxy) -> AsyncIterator[Database]:
    async with apps.connected(wire.url, timeout=5) as db:
        yield db


async def statuses(http: Any, path: str, times: int) -> list[int]:
    found = []
    for _ in range(times):
        response = await http.get(path)
        if response.status_code != 200:
            assert_unavailable(response)
        found.append(response.status_code)
    return found


@in_all_ways
async def test_requests_over_connections_that_were_lost_while_idle(
    app_db: Database, wire: Proxy, lose: Callable[[Proxy], None]
) -> None:
    """If the connection has idled for a second, it is replaced, and the request is answered as if
    nothing had been; in steady use one request gets 503 with `Retry-After`, and the next is right.
    """
    app = make_app(app_db)
    paths = with_all_uses(app, app_db)
    async with client(app) as http:
        for path in paths:
            assert await statuses(http, path, 1) == [200]
            lose(wire)
            as_if_idle(app_db)
            assert await statuses(http, path, 2) == [200, 200]
            lose(wire)
            assert await statuses(http, path, 3) in ([503, 200, 200], [200, 200, 200])
            assert app_db.pool_stats.in_use == 0


async def test_requests_while_connections_are_refused(app_db: Database, wire: Proxy) -> None:
    """While no connection can be opened, every request is 503; soon afterwards all are 200."""
    app = make_app(app_db)
    paths = with_all_uses(app, app_db)
    async with client(app) as http:
        for path in paths:
            wire.refusing = True
            wire.cut()
            assert await statuses(http, path, 3) == [503] * 3
            wire.heal()
            await until_well(http, path)
            assert await statuses(http, path, 2) == [200, 200]


async def test_a_connection_that_is_cut_while_it_is_opened(wire: Proxy) -> None:
    """A handshake that is cut after any number of bytes, or while the session is set up, is 503,
    and costs nothing."""
    async with apps.connected(wire.url, statement_timeout=30) as db:
        app = make_app(db)
        app.get("/")(lambda: db.execute_sql("SELECT 1").fetchone()[0])
        async with client(app) as http:
            for after in itertools.count(0, 13):
                cuts, wire.cut_answer_at = wire.cuts, after
                [status] = await statuses(http, "/", 1)
                assert status == (200 if wire.cuts == cuts else 503)
                if status == 200:
                    break
                await until_well(http, "/")
                await asyncio.to_thread(db.close_all)
            assert after > 100


def long_text(number: int) -> str:
    return f"{number} äöü€ " + "x" * (number * 97 % 250)


@pytest.fixture
async def notes(app_db: Database, wire: Proxy) -> Any:
    """A model with 300 rows."""

    class Note(app_db.Model):
        text = peewee.CharField(max_length=300)
        number = peewee.IntegerField()

    await app_db.acreate_tables([Note])
    rows = [{"text": long_text(n), "number": n} for n in range(300)]
    await app_db.aexecute(Note.insert_many(rows))
    return Note


def with_all_reads(app: FastAPI, db: Database, notes: Any, count: int = 300) -> list[str]:
    """Adds an endpoint for each way of reading the first rows."""
    rows_type: Any = list[schema(notes)]  # type: ignore[misc]

    query = notes.select().order_by(notes.id).limit(count)

    def rows() -> Any:
        return [note.__data__ for note in query.clone()]

    async def iterated() -> Any:
        return [note.__data__ async for note in db.iterate(query.clone())]

    async def returned() -> Any:
        return query.clone()

    async def streamed() -> Any:
        return respond(query.clone(), rows_type, stream=True)

    app.get("/rows")(rows)
    app.get("/iterated")(iterated)
    app.get("/returned", response_model=rows_type)(returned)
    app.get("/streamed")(streamed)
    return ["/rows", "/iterated", "/returned", "/streamed"]


async def test_answers_over_a_slow_wire_of_single_bytes(
    app_db: Database, wire: Proxy, notes: Any
) -> None:
    """What comes byte by byte, or late, is read as what comes at once."""
    app = make_app(app_db)
    paths = with_all_reads(app, app_db, notes, 20)
    expected = [{"id": n + 1, "text": long_text(n), "number": n} for n in range(20)]
    wire.slice_to, wire.latency = 1, 0.001
    async with client(app) as http:
        app_db.close_all()
        for path in paths:
            assert (await http.get(path)).json() == expected


@pytest.mark.parametrize("after", [1, 3000, 20_000])
async def test_an_answer_that_is_cut_in_the_middle(
    app_db: Database, wire: Proxy, notes: Any, after: int
) -> None:
    """Half a result is never taken for a whole one: the request is 503, and the next one right."""
    app = make_app(app_db)
    paths = with_all_reads(app, app_db, notes)
    async with client(app) as http:
        for path in paths:
            for _ in range(2):
                assert len((await http.get(path)).json()) == 300
                wire.cut_answer_at = after
                cuts = wire.cuts
                assert_unavailable(await http.get(path))
                assert wire.cuts == cuts + 1
                await back_to_rest(app_db)
            assert len((await http.get(path)).json()) == 300


async def test_a_stream_whose_reading_is_cut(app_db: Database, wire: Proxy, notes: Any) -> None:
    """Where the response has begun, a lost connection breaks it off: the application raises what
    has happened, upon which a server closes the client's connection."""
    copied = notes.select(notes.text, notes.number).limit(500)
    for _ in range(10):
        await app_db.aexecute(notes.insert_from(copied, [notes.text, notes.number]))
    app = make_app(app_db)
    with_all_reads(app, app_db, notes, 5000)
    wire.cut_answer_at = 300_000
    async with client(app, raises=True) as http:
        with refusal(peewee.OperationalError, ""):
            await http.get("/streamed")
        await back_to_rest(app_db)
        assert len((await http.get("/streamed")).json()) == 5000


async def test_a_request_whose_commit_is_not_answered(
    app_db: Database, wire: Proxy, notes: Any
) -> None:
    """503, unknown, where the connection is lost at COMMIT: before it got to the server nothing is
    there, afterwards it is there once. It is not tried again."""
    app = make_app(app_db)

    @app.post("/{number}")
    def write(number: int, held: InTransaction) -> None:
        notes.create(text="new", number=number)

    async with client(app) as http:
        for number, fault in ((1001, "cut_before"), (1002, "cut_after"), (1003, None)):
            if fault:
                setattr(wire, fault, b"COMMIT")
                answer = await http.post(f"/{number}")
                assert (answer.status_code, answer.json()) == (503, {"detail": "outcome unknown"})
            else:
                assert (await http.post(f"/{number}")).status_code == 200
            wire.heal()
    found = await app_db.list(notes.select(notes.number).where(notes.number > 1000).tuples())
    assert found == [(1002,), (1003,)]


# Time


async def test_requests_cut_by_chance_leave_the_pool_whole(app_db: Database, wire: Proxy) -> None:
    """Of 200 requests whose connections are cut at any moment, each is 200 or 503; then the pool
    has all its slots, and no more connections are open than it knows."""
    app = make_app(app_db)
    paths = with_all_uses(app, app_db)
    wire.latency = 0.0005

    async def cutting() -> None:
        while True:
            await asyncio.to_thread(wire.cut)
            await asyncio.sleep(0.005)

    async with client(app) as http:
        cutter = asyncio.create_task(cutting())
        requests = [http.get(paths[n % len(paths)]) for n in range(200)]
        responses = await asyncio.gather(*requests)
        cutter.cancel()
        # "outcome unknown" where it was a COMMIT, if only of a SELECT, that was not answered
        assert {response.status_code for response in responses} <= {200, 503}
        await back_to_rest(app_db)
        wire.cut()
        as_if_idle(app_db)
        wire.heal()
        await until_well(http, paths[0])
        responses = await asyncio.gather(*(http.get(path) for path in paths * 4))
        assert {response.status_code for response in responses} == {200}
        with anyio.fail_after(10):
            while wire.connections != app_db.pool_stats.idle:
                await anyio.sleep(0.01)
