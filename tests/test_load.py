"""Many requests over few connections: none fails, none meets another's, none waits for ever."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import peewee
import pytest

from fastapi_peewee import Database, connect
from tests import live
from tests.live import Answer, LiveServer, Request, serve
from tests.live_apps import Tags

UNAVAILABLE = {"detail": "database unavailable"}

#: Endpoints of the application `tagging`, and how many of a hundred requests go to each.
ENDPOINTS = {
    "route": 45,
    "plain": 12,
    "threads": 3,
    "held": 10,
    "calls": 10,
    "atomic": 8,
    "background": 12,
}
#: Kinds of tags; some cost a new connection.
KINDS = {"nothing": 40, "setting": 12, "table": 3, "row": 35, "failed": 10}


def mixed_requests(count: int, kinds: dict[str, int] = KINDS) -> Iterator[Request]:
    """Requests for `tagging`, each with a tag of its own."""
    dice = random.Random(count)
    endpoints = dice.choices(list(ENDPOINTS), list(ENDPOINTS.values()), k=count)
    chosen = dice.choices(list(kinds), list(kinds.values()), k=count)
    for tag, (endpoint, kind) in enumerate(zip(endpoints, chosen, strict=True), 1_000_001):
        yield Request(f"/{endpoint}/{kind}/{tag}")


def check_tag(request: Request, answer: Answer) -> None:
    tag = int(request.path.rpartition("/")[2])
    assert (answer.status, answer.body) == (200, b"%d" % tag), (request, answer)


async def check_at_rest(server: LiveServer, database_url: str, *, pool_size: int) -> None:
    """All is given back, as the pool, the drivers and the database see it."""
    stats = await live.stats(server)
    assert (stats.in_use, stats.waiting) == (0, 0)
    assert stats.idle <= pool_size
    connections = await live.driver_connections(server)
    assert connections.in_transaction == 0
    assert connections.open == stats.idle
    await check_no_transaction(database_url)
    assert server.errors == []


async def check_no_transaction(database_url: str) -> None:
    async def none_is_open() -> bool:
        return await asyncio.to_thread(live.idle_transactions, database_url) == 0

    # MariaDB refreshes what it says of transactions ten times a second.
    await live.until(none_is_open, "no transaction is open in the database", timeout=2)


# /slowusers/


@pytest.mark.slow
@pytest.mark.parametrize("calls", [10, 100, 200])
async def test_parallel_calls_of_slowusers_all_succeed_and_leave_nothing_checked_out(
    calls: int, database_url: str
) -> None:
    """Of 10, 100 and 200 parallel `/slowusers/` over a pool of 10 every one is answered with 200
    and the users; right afterwards no connection is in use and no transaction open."""
    with serve("sql_app", DATABASE_URL=database_url, SLOWUSERS_STEP="0.1") as server:
        for name in ("a", "b"):
            user = {"email": f"{name}@example.com", "password": "long enough"}
            user_id = (await live.ask(server, "/users/", user)).json()["id"]
            item = await live.ask(server, f"/users/{user_id}/items/", {"title": "one"})
            assert item.status == 200
        users = (await live.ask(server, "/users/")).json()
        assert [len(user["items"]) for user in users] == [1, 1]

        answers = await live.ask_at_once(server, [Request("/slowusers/")] * calls)

        stats = await live.stats(server)
        assert Counter(answer.status for answer in answers) == {200: calls}
        assert all(answer.json() == users for answer in answers)
        assert (stats.in_use, stats.waiting) == (0, 0)
        assert stats.opened == 10
        await check_at_rest(server, database_url, pool_size=10)


# Isolation


@pytest.mark.parametrize(
    "count",
    [
        1_000,
        # Times three databases, 50,000. On two idle cores that is half a minute each.
        pytest.param(16_700, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
async def test_no_request_sees_what_another_left_on_its_connection(
    count: int, database_url: str
) -> None:
    """64 clients over a pool of 4 call sync and async endpoints that leave session settings,
    temporary tables and open or failed transactions behind; none finds another's, and all find
    their own as long as they hold the connection."""
    with serve("tagging", DATABASE_URL=database_url, POOL_SIZE="4", POOL_TIMEOUT="60") as server:
        await live.ask_by_clients(server, 64, mixed_requests(count), check_tag)

        await until_free(server)
        assert (await live.ask(server, "/_mixed")).json() == []
        assert (await live.stats(server)).timed_out == 0
        await check_at_rest(server, database_url, pool_size=4)
    assert rows_in_mark(database_url) == 0


def rows_in_mark(database_url: str) -> int:
    with closing(live.plain_database(database_url)) as db:
        count: int = db.execute_sql("SELECT count(*) FROM mark").fetchone()[0]
        return count


async def until_free(server: LiveServer) -> None:
    """Background tasks take their connections after the last answer."""

    async def free() -> bool:
        stats = await live.stats(server)
        return (stats.in_use, stats.waiting) == (0, 0)

    await live.until(free, "all connections are back")


Leave = Callable[[Database], object]


def sql(*statements: str) -> Leave:
    return lambda db: [db.execute_sql(statement) for statement in statements]


def half_read(db: Database) -> None:
    db.execute_sql("INSERT INTO mark VALUES (7), (7)")
    db.kept = db.execute_sql("SELECT tag FROM mark")
    db.kept.fetchone()
    db.execute_sql("DELETE FROM mark")


def caught(statement: str) -> Leave:
    def leave(db: Database) -> None:
        db.begin()
        db.execute_sql("INSERT INTO mark VALUES (7)")
        with pytest.raises(peewee.DatabaseError):
            db.execute_sql(statement)

    return leave


EVERYWHERE: dict[str, Leave] = {
    "begin()": lambda db: db.begin(),
    "begin() and a row": lambda db: (db.begin(), db.execute_sql("INSERT INTO mark VALUES (7)")),
    "BEGIN and a row": sql("BEGIN", "INSERT INTO mark VALUES (7)"),
    "a failed transaction": caught("SELECT no_such_column FROM mark"),
    "a temporary table": sql("CREATE TEMPORARY TABLE tag (tag INTEGER)"),
    "a temporary table in lower case": sql("create temporary table tag (tag integer)"),
    "a temporary table, in a transaction": sql(
        "BEGIN", "CREATE TEMPORARY TABLE tag (tag INTEGER)", "COMMIT"
    ),
    "a temporary table after a comment": sql(
        "/* for later */ CREATE TEMPORARY TABLE tag (tag INTEGER)"
    ),
    "a temporary table, by a cursor": lambda db: db.cursor().execute(
        "CREATE TEMPORARY TABLE tag (tag INTEGER)"
    ),
    "a temporary table, by the connection": lambda db: (
        db.connection().cursor().execute("CREATE TEMPORARY TABLE tag (tag INTEGER)")
    ),
}
WAYS: dict[str, dict[str, Leave]] = {
    "sqlite": {
        "a result half read": half_read,
        "a pragma": sql("PRAGMA cache_size = -7000"),
        "a pragma in lower case": sql("pragma cache_size = -7000"),
        "a pragma by attribute": lambda db: setattr(db, "cache_size", -7000),
        "foreign keys off": sql("PRAGMA foreign_keys = 0"),
        "query_only": sql("PRAGMA query_only = 1"),
        "a table in temp": sql("CREATE TABLE temp.tag (tag INTEGER)"),
        "a savepoint": sql("SAVEPOINT s", "INSERT INTO mark VALUES (7)"),
        "an attached database": sql("ATTACH ':memory:' AS other"),
    },
    "postgres": {
        "SET": sql("SET live.tag = '7'"),
        "SET in lower case": sql("set live.tag = '7'"),
        "SET LOCAL and a row": sql("BEGIN", "SET LOCAL live.tag = '7'"),
        "set_config": sql("SELECT set_config('live.tag', '7', false)"),
        "set_config in WITH": sql(
            "WITH tagged AS (SELECT set_config('live.tag', '7', false)) SELECT * FROM tagged"
        ),
        "SET after another statement": sql("SELECT 1; SET live.tag = '7'"),
        "the time zone": sql("SET TIME ZONE 'Asia/Tokyo'"),
        "set_time_zone": lambda db: db.set_time_zone("Asia/Tokyo"),
        "the search path": sql("SET search_path = pg_catalog"),
        "a read-only session": sql("SET default_transaction_read_only = on"),
        "SELECT INTO a temporary table": sql("SELECT 7 AS tag INTO TEMPORARY tag"),
        "SELECT INTO temp": sql("SELECT 7 AS tag INTO TEMP TABLE tag"),
        "a table in pg_temp": sql("CREATE TABLE pg_temp.tag (tag INTEGER)"),
        "a lock": sql("SELECT pg_advisory_lock(7)"),
        "a prepared statement": sql("PREPARE tag AS SELECT 7"),
        "a channel": sql("LISTEN tag"),
        "a cursor": sql("DECLARE tag CURSOR WITH HOLD FOR SELECT 7"),
        "a role": sql("SET ROLE pg_monitor"),
    },
    "mysql": {
        "a variable": sql("SET @tag = 7"),
        "a variable in lower case": sql("set @tag = 7"),
        "a variable by :=": sql("SELECT @tag := 7"),
        "a variable by INTO": sql("SELECT 7 INTO @tag"),
        "a quoted variable": sql("SET @`tag` = 7"),
        "a quoted variable by :=": sql("SELECT @`tag` := 7"),
        "SET SESSION": sql("SET SESSION sql_mode = ''"),
        "SET LOCAL": sql("SET LOCAL sql_mode = ''"),
        "SET @@": sql("SET @@sql_mode = ''"),
        "the time zone": sql("SET time_zone = '+09:00'"),
        "autocommit": sql("SET autocommit = 0"),
        "the next transaction": sql("SET TRANSACTION READ ONLY"),
        "a lock": sql("SELECT GET_LOCK('tag', 0)"),
        "locked tables": sql("LOCK TABLES mark READ"),
        "another database": sql("USE information_schema"),
        "a prepared statement": sql("PREPARE tag FROM 'SELECT 7'"),
    },
}
LOOK = {
    "sqlite": [
        "SELECT * FROM pragma_cache_size, pragma_foreign_keys",
        "SELECT count(*) FROM sqlite_temp_master",
        "SELECT name FROM pragma_database_list",
    ],
    "postgres": [
        "SELECT COALESCE(current_setting('live.tag', true), ''), current_setting('TimeZone'),"
        " current_setting('search_path'), to_regclass('pg_temp.tag'), current_user,"
        " now() = statement_timestamp(), pg_current_xact_id_if_assigned()",
        "SELECT * FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        "SELECT name FROM pg_prepared_statements WHERE from_sql AND name = 'tag'",
        "SELECT pg_listening_channels()",
        "SELECT name FROM pg_cursors WHERE name = 'tag'",
    ],
    "mysql": [
        "SELECT @tag, @@sql_mode, @@time_zone, @@autocommit, DATABASE(),"
        " COALESCE(IS_USED_LOCK('tag') = CONNECTION_ID(), 0)",
    ],
}
FAILING_LOOK = {"mysql": ["SELECT tag FROM tag", "EXECUTE tag"]}


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind, ways in WAYS.items() for way in (*EVERYWHERE, *ways)],
)
async def test_whatever_a_call_leaves_in_its_session_is_gone_for_the_next(
    kind: str, way: str, request: pytest.FixtureRequest
) -> None:
    """In which words ever a call changes its session or leaves a transaction open, the next one
    on the only connection of the pool finds a session as new, and can write."""
    db = connect(request.getfixturevalue(f"{kind}_url"), pool_size=1)

    def session() -> list[Any]:
        found = [list(db.execute_sql(statement).fetchall()) for statement in LOOK[kind]]
        for statement in FAILING_LOOK.get(kind, []):
            with pytest.raises(peewee.DatabaseError):
                db.execute_sql(statement)
        with db.atomic() as transaction:
            found.append(list(db.execute_sql("SELECT tag FROM mark").fetchall()))
            db.execute_sql("INSERT INTO mark VALUES (1)")
            transaction.rollback()
        return found

    try:
        await db.run(Tags(db).create)
        new = await db.run(session)

        await db.run((EVERYWHERE | WAYS[kind])[way], db)

        assert await db.run(session) == new
        assert db.pool_stats.in_use == 0
    finally:
        await db.close_pool()


# A pool smaller than the number of threads


@asynccontextmanager
async def all_connections_held(server: LiveServer, pool_size: int) -> Any:
    """Requests that hold every connection of the pool until the block ends."""
    holding = asyncio.ensure_future(live.ask_at_once(server, [Request("/hold")] * pool_size))

    async def held() -> bool:
        return (await live.stats(server)).in_use == pool_size

    try:
        await live.until(held, "all connections are held")
        yield
    finally:
        await live.ask(server, "/_release")
        assert Counter(answer.status for answer in await holding) == {200: pool_size}


def one_of_each(count: int) -> list[Request]:
    """So many requests, evenly spread over the endpoints that wait on the event loop."""
    names = list(ENDPOINTS)
    return [Request(f"/{names[n % len(names)]}/nothing/{n}") for n in range(count)]


@pytest.mark.slow
async def test_200_clients_of_endpoints_of_every_kind_over_a_pool_of_5_all_get_an_answer(
    database_url: str,
) -> None:
    """200 clients call `def` endpoints on both route classes, async transactions and nested
    calls over a pool of 5: nobody waits for ever, all succeed, and the server is at rest again
    with no more threads and descriptors than after the first such load."""
    requests = [*mixed_requests(800, {"nothing": 1, "row": 1})]
    with serve("tagging", DATABASE_URL=database_url, POOL_SIZE="5", POOL_TIMEOUT="60") as server:
        await live.ask_by_clients(server, 200, requests, check_tag)
        await until_free(server)
        first = await live.stats(server)

        await live.ask_by_clients(server, 200, requests, check_tag)
        await until_free(server)
        await check_at_rest(server, database_url, pool_size=5)

        async def no_more_than_before() -> bool:
            stats = await live.stats(server)
            return (
                stats.threads <= max(first.threads, 51) and stats.descriptors <= first.descriptors
            )

        await live.until(no_more_than_before, f"as many descriptors as in {first}")
        assert (await live.stats(server)).timed_out == 0


async def test_waiting_for_a_connection_takes_no_thread(sqlite_url: str) -> None:
    """While all connections are held, 200 requests of every kind wait without a worker thread:
    others that need threads are answered meanwhile, and all 200 afterwards."""
    with serve("tagging", DATABASE_URL=sqlite_url, POOL_SIZE="5", POOL_TIMEOUT="60") as server:
        async with all_connections_held(server, 5):
            before = await live.stats(server)
            waiting = asyncio.ensure_future(live.ask_at_once(server, one_of_each(200)))

            async def all_wait() -> bool:
                return (await live.stats(server)).waiting == 200

            await live.until(all_wait, "200 requests wait")
            assert (await live.stats(server)).threads == before.threads
            threaded = await live.ask_at_once(server, [Request("/thread")] * 80)
            assert Counter(answer.status for answer in threaded) == {200: 80}
            assert (await live.stats(server)).waiting == 200

        answers = await waiting
        assert Counter(answer.status for answer in answers) == {200: 200}
        await until_free(server)
        await check_at_rest(server, sqlite_url, pool_size=5)


@pytest.mark.slow
async def test_past_the_time_limit_every_kind_of_endpoint_answers_503_with_retry_after(
    database_url: str,
) -> None:
    """Who has waited for a connection as long as the pool's `timeout` is refused within 100 ms of
    that limit, in the pool; the client gets 503 with `Retry-After` and nothing of the database's.
    """
    limit = 0.5
    with serve(
        "tagging", DATABASE_URL=database_url, POOL_SIZE="5", POOL_TIMEOUT=str(limit)
    ) as server:
        async with all_connections_held(server, 5):
            answers = await live.ask_at_once(server, one_of_each(105))
            # End to end, on a machine with other things to do: the best of some.
            alone = [await live.ask(server, "/route/nothing/1") for _ in range(3)]
            assert (await live.stats(server)).in_use == 5

        for answer in [*answers, *alone]:
            check_unavailable(answer)
            assert answer.seconds >= limit - 0.01
        assert min(answer.seconds for answer in alone) < limit + 0.1

        refusals = (await live.ask(server, "/_refusals")).json()
        assert Counter(name for name, _, _ in refusals) == {"PoolTimeout": 108}
        for _, seconds, timer_was_late in refusals:
            # A timer of the loop's own shows how late anything can be here.
            assert limit - 0.01 <= seconds <= limit + 0.1 + timer_was_late

        stats = await live.stats(server)
        assert (stats.timed_out, stats.refused) == (108, 0)
        after = await live.ask_at_once(server, one_of_each(7))
        assert Counter(answer.status for answer in after) == {200: 7}
        await until_free(server)
        await check_at_rest(server, database_url, pool_size=5)


async def test_when_the_queue_is_full_every_kind_of_endpoint_answers_503_at_once(
    database_url: str,
) -> None:
    """With `max_waiting` requests in the queue, the next are refused without waiting, with 503 and
    `Retry-After`, while those in the queue keep their places and succeed."""
    with serve(
        "tagging",
        DATABASE_URL=database_url,
        POOL_SIZE="5",
        POOL_TIMEOUT="60",
        POOL_MAX_WAITING="20",
    ) as server:
        async with all_connections_held(server, 5):
            queue = asyncio.ensure_future(live.ask_at_once(server, one_of_each(20)))

            async def full() -> bool:
                return (await live.stats(server)).waiting == 20

            await live.until(full, "20 requests wait")
            answers = await live.ask_at_once(server, one_of_each(105))
            assert (await live.stats(server)).waiting == 20

        for answer in answers:
            check_unavailable(answer)
        refusals = (await live.ask(server, "/_refusals")).json()
        assert Counter(name for name, _, _ in refusals) == {"TooManyWaiting": 105}
        # All but five of them, on a machine with other things to do.
        assert sorted(seconds for _, seconds, _ in refusals)[99] < 0.02

        assert Counter(answer.status for answer in await queue) == {200: 20}
        await until_free(server)
        stats = await live.stats(server)
        assert (stats.timed_out, stats.refused) == (0, 105)
        await check_at_rest(server, database_url, pool_size=5)


def check_unavailable(answer: Answer) -> None:
    assert (answer.status, answer.json()) == (503, UNAVAILABLE)
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.slow
async def test_threads_that_wait_for_a_connection_do_not_starve_the_requests_that_hold_one(
    sqlite_url: str,
) -> None:
    """`def` endpoints that wait with `with db.connection_context():`, more of them than there are
    threads, don't keep those that hold a connection from finishing."""
    requests = [
        Request(f"/{endpoint}/nothing/{n}")
        for n in range(100)
        for endpoint in ("plain", "blocking")
    ]
    with serve("tagging", DATABASE_URL=sqlite_url, POOL_SIZE="5", POOL_TIMEOUT="5") as server:
        answers = await live.ask_at_once(server, requests)

        assert Counter(answer.status for answer in answers) == {200: 200}
        assert (await live.stats(server)).timed_out == 0
        await check_at_rest(server, sqlite_url, pool_size=5)


# Starting


@pytest.mark.slow
async def test_servers_that_start_at_once_on_an_empty_database_all_start(
    database_url: str, tmp_path: Path
) -> None:
    """`sql_app` creates its tables and indexes at start, also when six of its processes start
    together."""

    def started() -> int:
        with serve(
            "sql_app_starting_together",
            DATABASE_URL=database_url,
            MEETING=str(tmp_path / "meeting"),
            TOGETHER="6",
        ) as server:
            return asyncio.run(live.ask(server, "/users/")).status

    (tmp_path / "meeting").mkdir()
    with ThreadPoolExecutor(6) as pool:
        statuses = [pool.submit(started) for _ in range(6)]
    assert [status.result() for status in statuses] == [200] * 6
    with closing(live.plain_database(database_url)) as db:
        indexes = {
            (table, *index.columns, index.unique)
            for table in ("user", "item")
            for index in db.get_indexes(table)
        }
    assert indexes >= {
        ("user", "email", True),
        ("item", "title", False),
        ("item", "description", False),
        ("item", "owner_id", False),
    }
