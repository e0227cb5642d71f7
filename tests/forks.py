"""Programs that fork. `tests.test_everywhere` runs each in an interpreter of its own:

DATABASE_URL=… python -m tests.forks after_a_query
"""

import asyncio
import contextvars
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import peewee

from fastapi_peewee import LeaseForked, connect
from fastapi_peewee.state import RequestScope
from tests.apps import client, make_app

db = connect(os.environ["DATABASE_URL"])

#: A fork closes what nobody uses of its connections, and makes a file unusable that is in use.
ON_SQLITE = isinstance(db, peewee.SqliteDatabase)


class User(db.Model):
    name = peewee.CharField(unique=True)


def session() -> object:
    """What tells a connection from all others, also those of other processes."""
    if isinstance(db, peewee.PostgresqlDatabase):
        return db.execute_sql("SELECT pg_backend_pid()").fetchone()[0]
    if isinstance(db, peewee.MySQLDatabase):
        return db.execute_sql("SELECT connection_id()").fetchone()[0]
    return (os.getpid(), id(db.execute_sql("SELECT 1").connection))


def names() -> list[str]:
    return sorted([user.name for user in User.select()])


def in_child(code: Callable[[], object], *, end: Callable[[int], object] = sys.exit) -> int:
    """Run code in a forked process, which ends as programs end: whatever it holds is finalised."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        code()
    except SystemExit:
        raise  # this child's own child
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        end(1)
    end(0)
    raise AssertionError("unreachable")


def succeeded(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def refusal(code: Callable[[], object]) -> str:
    try:
        code()
    except LeaseForked as error:
        return str(error)
    return ""


def assert_refused() -> None:
    """SQLite's file was in use as this process was forked: it is told so, again and again."""
    for ask in (
        names,
        lambda: asyncio.run(db.run(names)),
        lambda: asyncio.run(db.list(User.select())),
    ):
        assert refusal(ask) == LeaseForked.OPEN_FILE
    assert db.pool_stats.in_use == 0


def after_a_query() -> None:
    """The child opens a connection of its own; the parent's stays as it is."""
    User.create(name="parent, before")
    before = session()
    connection = None if ON_SQLITE else db.connection()

    def child() -> None:
        assert db.is_closed()
        assert db.connect(reuse_if_open=True)
        assert session() != before
        assert db.connection() is not connection
        with db.atomic():
            User.create(name="child")
        assert db.close()
        User.create(name="child, again")

    assert succeeded(in_child(child))
    assert db.is_closed() is ON_SQLITE
    if not ON_SQLITE:
        assert session() == before
        assert db.connection() is connection
    with db.atomic():
        User.create(name="parent, after")
    assert names() == ["child", "child, again", "parent, after", "parent, before"]


async def warm_up(count: int = 3) -> set[object]:
    """Fill the pool with connections."""
    inside = asyncio.Barrier(count)

    async def task() -> object:
        async with db.connection_context():
            await inside.wait()
            return await db.run(session)

    return set(await asyncio.gather(*(task() for _ in range(count))))


def with_a_warm_pool() -> None:
    """The child begins with an empty pool; the parent's connections stay in the parent's."""
    sessions = asyncio.run(warm_up())
    assert len(sessions) == db.pool_stats.idle == 3

    def child() -> None:
        assert db.pool_stats.idle == 0

        async def code() -> None:
            await User.acreate(name="child")
            assert not sessions & await warm_up()
            await db.close_pool()
            await User.acreate(name="child, again")

        asyncio.run(code())

    assert succeeded(in_child(child))
    assert db.pool_stats.idle == (0 if ON_SQLITE else 3)
    assert asyncio.run(warm_up()) == sessions or ON_SQLITE
    assert asyncio.run(db.run(names)) == ["child", "child, again"]


def inside_a_transaction() -> None:
    """The child has no part in the parent's transaction, which commits as if nothing had been."""
    with db.atomic():
        User.create(name="parent, before")

        def child() -> None:
            assert not db.in_transaction()
            if ON_SQLITE:
                assert_refused()
            else:
                assert names() == []

        # A process that is forked inside a block doesn't leave the block: `multiprocessing` ends
        # its children like this.
        assert succeeded(in_child(child, end=os._exit))
        assert db.in_transaction()
        User.create(name="parent, after")
    assert names() == ["parent, after", "parent, before"]


def leaving_an_inherited_block() -> None:
    """A child that leaves a block in which it was forked does nothing to the transaction."""
    with db.atomic():
        User.create(name="parent, before")
        assert succeeded(in_child(lambda: None))  # by `sys.exit`, which passes through the block
        User.create(name="parent, after")
    assert names() == ["parent, after", "parent, before"]


def inside_run() -> None:
    """A connection lent before the fork is refused in the child; a new context gets a new one."""

    def code() -> None:
        with db.atomic():
            User.create(name="parent, before")

            def child() -> None:
                try:
                    User.select().count()
                except LeaseForked:
                    pass
                else:
                    raise AssertionError("not refused")
                counts: list[int] = []

                def count() -> None:
                    if ON_SQLITE:
                        assert_refused()
                    counts.append(0 if ON_SQLITE else User.select().count())

                thread = threading.Thread(target=count)
                thread.start()
                thread.join()
                assert counts == [0]

            assert succeeded(in_child(child, end=os._exit))
            User.create(name="parent, after")

    asyncio.run(db.run(code))
    assert asyncio.run(db.run(names)) == ["parent, after", "parent, before"]
    assert db.pool_stats.in_use == 0


def all_at_once() -> None:
    """Children, their children and the parent write at the same time, each where it should."""
    User.create(name="parent")
    asyncio.run(warm_up())

    def write(who: str) -> None:
        for number in range(10):
            User.create(name=f"{who} {number}")

        async def code() -> None:
            for number in range(10, 20):
                await User.acreate(name=f"{who} {number}")

        asyncio.run(code())

    def child(who: str) -> None:
        write(who)
        grandchild = in_child(lambda: write(f"{who}'s child"))
        write(f"{who}, again")
        assert succeeded(grandchild)

    children = [in_child(lambda who=who: child(f"child {who}")) for who in range(3)]  # type: ignore[misc]
    write("parent")
    assert [succeeded(pid) for pid in children] == [True] * 3
    write("parent, again")
    assert User.select().count() == 1 + 20 * (2 + 3 * 3)


class Leaving(RequestScope):
    """A request whose thread stands still while it gives back its connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stands, self.go_on = threading.Event(), threading.Event()

    def drop(self, db: Any, held: Any) -> bool:
        self.stands.set()
        assert self.go_on.wait(30)
        return super().drop(db, held)


def while_a_request_gives_back() -> None:
    """The child serves requests, whatever a thread of the parent's was about to decide."""

    def serve(request: RequestScope, name: str) -> None:
        RequestScope.current.set(request)
        with db.connection_context():
            User.create(name=name)

    def child() -> None:
        if ON_SQLITE:  # a thread of the parent's had a connection
            assert_refused()
            return
        thread = threading.Thread(target=serve, args=(RequestScope(), "child"), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()

    leaving = Leaving()
    thread = threading.Thread(target=serve, args=(leaving, "parent"))
    thread.start()
    assert leaving.stands.wait(30)
    try:
        assert succeeded(in_child(child))
    finally:
        leaving.go_on.set()
        thread.join()
    assert names() == (["parent"] if ON_SQLITE else ["child", "parent"])


def job(number: int) -> object:
    with db.connection_context():
        User.create(name=f"job {number}")
        return session()


def async_job(number: int) -> None:
    async def code() -> None:
        async with db.atomic():
            await User.acreate(name=f"async job {number}")

    asyncio.run(code())


def with_multiprocessing() -> None:
    """`multiprocessing` forks processes from one with connections: all of them go on working."""
    User.create(name="parent, before")
    before = session()
    sessions = asyncio.run(warm_up())

    fork: Any = multiprocessing.get_context("fork")
    with fork.Pool(2) as pool:
        assert not {before, *sessions} & set(pool.map(job, range(10), chunksize=1))
        pool.close()
        pool.join()
    processes = [fork.Process(target=async_job, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0

    assert session() == before or ON_SQLITE
    assert asyncio.run(warm_up()) == sessions or ON_SQLITE
    User.create(name="parent, after")
    assert User.select().count() == 14


def with_a_parent_that_closes() -> None:
    """What a child commits is there, also when the parent closes all its connections meanwhile."""
    fork: Any = multiprocessing.get_context("fork")
    begun, closed = fork.Event(), fork.Event()

    def child() -> None:
        User.create(name="child")
        begun.set()
        assert closed.wait(30)
        for number in range(20):
            User.create(name=f"child {number}")
        assert User.select().count() == 21
        os._exit(0)  # as a process ends that is killed

    assert User.select().count() == 0
    asyncio.run(warm_up())
    process = fork.Process(target=child)
    process.start()
    assert begun.wait(30)
    assert User.select().count() == 1
    db.close()
    asyncio.run(db.close_pool())
    closed.set()
    process.join()
    assert process.exitcode == 0
    assert User.select().count() == 21


def while_another_thread_writes() -> None:
    """A child of a process that is writing is told at once if it can't use the database. One that
    is forked later can."""
    writing, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with db.connection_context(), db.atomic():
            User.create(name="parent")
            writing.set()
            assert go_on.wait(30)

    thread = threading.Thread(target=write)
    thread.start()
    assert writing.wait(30)
    try:
        assert succeeded(in_child(assert_refused if ON_SQLITE else lambda: job(1)))
    finally:
        go_on.set()
        thread.join()
    assert succeeded(in_child(lambda: job(2)))
    assert names() == (["job 2", "parent"] if ON_SQLITE else ["job 1", "job 2", "parent"])


def in_every_way() -> list[object]:
    """The sessions of a child that uses the database as a script does."""

    async def code() -> object:
        async with db.atomic(read_only=True):
            return await db.run(session)

    found = [session(), asyncio.run(db.run(session)), asyncio.run(code())]
    with db.connection_context():
        found.append(session())
    with db.atomic(read_only=True):
        found.append(session())
    assert not db.in_transaction()
    return found


def with_multiprocessing_in_a_request() -> None:
    """A process that is forked inside of a request or a block works as any other, at once; both go
    on in the parent. On SQLite it is refused if there is a transaction."""
    fork: Any = multiprocessing.get_context("fork")
    app = make_app(db)

    def child() -> list[object]:
        with ProcessPoolExecutor(1, mp_context=fork) as processes:
            found = processes.submit(in_every_way).result(30)
        assert len(found) == 5
        return found

    @app.get("/def")
    def endpoint() -> None:
        before = session()
        assert before not in child()
        assert session() == before or ON_SQLITE
        User.create(name="def")

    @app.get("/async")
    async def in_no_block() -> None:
        child()

    @app.get("/block")
    async def in_a_block() -> None:
        async with db.atomic():
            await User.acreate(name="block, before")
            before = await db.run(session)
            if ON_SQLITE:
                assert refusal(child) == LeaseForked.OPEN_FILE
            else:
                assert before not in child()
            assert await db.run(session) == before
            await User.acreate(name="block, after")

    @app.get("/context")
    async def in_a_context() -> None:
        def run() -> None:
            before = session()
            assert before not in child()
            assert session() == before or ON_SQLITE

        await db.run(run)

    async def code() -> None:
        async with client(app, raises=True) as http:
            for path in ("/def", "/async", "/block", "/context"):
                assert (await http.get(path)).status_code == 200
        assert db.pool_stats.in_use == 0

    asyncio.run(code())
    assert names() == ["block, after", "block, before", "def"]


def in_a_context_of_its_own() -> None:
    """What a child is told to do that `os.fork()` made inside of a block helps."""

    def child() -> None:
        assert "contextvars.Context().run(fn)" in refusal(session)
        contextvars.Context().run(assert_refused if ON_SQLITE else in_every_way)

    async def code() -> None:
        async with db.atomic():
            await User.acreate(name="parent, before")
            assert succeeded(in_child(child, end=os._exit))
            await User.acreate(name="parent, after")

    asyncio.run(code())
    assert names() == ["parent, after", "parent, before"]


if __name__ == "__main__":
    with db.connection_context():
        db.create_tables([User])
    globals()[sys.argv[1]]()
    if isinstance(db, peewee.SqliteDatabase):
        assert db.pragma("integrity_check") == "ok"
    db.close()
    asyncio.run(db.close_pool())
    print("done")
