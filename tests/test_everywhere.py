"""One `db` and one set of models outside of FastAPI: scripts, shells, tests, workers, forks."""

import asyncio
import copy
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import peewee
import pytest

import fastapi_peewee
from fastapi_peewee import (
    BlockingQuery,
    BlockingQueryWarning,
    Database,
    LazyLoad,
    LeaseEnded,
    LeaseForked,
    NoLease,
    OutcomeUnknown,
    TransactionAborted,
    TurnTimeout,
)
from fastapi_peewee.refusals import kind_of, refused_fields
from tests import modes
from tests.modes import (
    Note,
    Oops,
    Seen,
    User,
    connections_become,
    open_connections,
)

connected, db, mode, observer, seen = modes.fixtures

_ROOT = Path(__file__).parents[1]
_MODELS = """
    import os

    import peewee
    from fastapi_peewee import connect

    db = connect(os.environ["DATABASE_URL"])


    class User(db.Model):
        name = peewee.CharField(unique=True)
"""


class Project:
    """A folder with a module `models`, and the environment to run programs there."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if "PYTEST" not in name},
            "DATABASE_URL": url,
            "PYTHONWARNINGS": "error",
        }
        self.write("models.py", _MODELS)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(dedent(text).lstrip())

    def run(
        self,
        *command: str | Path,
        status: int = 0,
        stdin: str = "",
        stderr: int = subprocess.PIPE,
        **environment: str,
    ) -> str:
        """Run a program; returns what it prints. It must write nothing to a stderr of its own."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            input=dedent(stdin),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=100,
            check=False,
        )
        assert not done.stderr, done.stderr
        assert done.returncode == status, done.stdout
        return done.stdout

    def python(self, *arguments: str, **options: Any) -> str:
        return self.run(sys.executable, *arguments, **options)


@pytest.fixture
def project(tmp_path: Path, database_url: str) -> Project:
    folder = tmp_path / "project"
    folder.mkdir()
    return Project(folder, database_url)


# Scripts


def test_a_script(project: Project, database_url: str) -> None:
    """A script uses the models synchronously, then in `asyncio.run`, then synchronously again."""
    project.write(
        "script.py",
        """
        import asyncio
        from models import User, db


        async def main():
            async with db.atomic():
                await User.acreate(name="bob")
            print(await db.count(User.select()), "users")
            await asyncio.gather(*(User.acreate(name=f"task {n}") for n in range(3)))
            await db.close_pool()


        with db:
            db.create_tables([User])
            User.create(name="ann")
        asyncio.run(main())
        with db.connection_context():
            print(*sorted(user.name for user in User.select()), sep=", ")
        """,
    )
    assert project.python("script.py") == "2 users\nann, bob, task 0, task 1, task 2\n"
    assert connections_become(database_url, 0)


def test_a_script_that_closes_nothing(project: Project, database_url: str) -> None:
    """A script that forgets to close its connections ends all the same, and they with it."""
    project.write(
        "script.py",
        """
        import asyncio
        from models import User, db

        db.create_tables([User])
        User.create(name="ann")
        asyncio.run(User.acreate(name="bob"))
        print(User.select().count())
        """,
    )
    assert project.python("script.py", PYTHONWARNINGS="") == "2\n"
    assert connections_become(database_url, 0)


def test_several_event_loops(project: Project) -> None:
    """A script may call `asyncio.run` again and again: the pool belongs to no event loop."""
    project.write(
        "script.py",
        """
        import asyncio
        from threading import Thread
        from models import User, db

        with db.connection_context():
            db.create_tables([User])
        for number in range(3):
            asyncio.run(User.acreate(name=f"user {number}"))
        threads = [Thread(target=asyncio.run, args=[User.acreate(name=n)]) for n in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(asyncio.run(db.count(User.select())), db.pool_stats.in_use)
        asyncio.run(db.close_pool())
        """,
    )
    assert project.python("script.py") == "6 0\n"


# pwmigrate


def test_pwmigrate(project: Project, observer: Any) -> None:
    """Peewee's `pwmigrate` makes migrations for the database, applies, lists and reverts them."""
    pwmigrate = Path(sys.executable).with_name("pwmigrate")
    project.write(".pwmigrate", "database = models.db\nmodels = models\n")

    def columns() -> list[str]:
        return [column.name for column in observer.get_columns("user")]

    assert project.run(pwmigrate, "initial") == "migrations/0001_initial.py\n"
    assert project.run(pwmigrate, "status", status=1) == "[ ] 0001_initial\n"
    assert project.run(pwmigrate, "up") == "applied: 0001_initial\n"
    assert columns() == ["id", "name"]
    observer.execute(User.insert(name="ann"))

    project.write("models.py", _MODELS + "        karma = peewee.IntegerField(default=7)\n")
    assert project.run(pwmigrate, "generate", "add karma") == "migrations/0002_add_karma.py\n"
    assert project.run(pwmigrate, "up") == "applied: 0002_add_karma\n"
    karma = peewee.Table("user", ["name", "karma"]).select()
    assert list(observer.execute(karma).fetchall()) == [("ann", 7)]
    assert "[x] 0002_add_karma" in project.run(pwmigrate, "status")
    assert project.run(pwmigrate, "diff") == "schema matches models.\n"

    assert project.run(pwmigrate, "down") == "reverted: 0002_add_karma\n"
    assert columns() == ["id", "name"]
    assert project.run(pwmigrate, "create", "by hand") == "migrations/0003_by_hand.py\n"


# Tests


def test_pytest(project: Project, database_url: str) -> None:
    """Tests use the models in the main thread, and in event loops that come and go."""
    project.write(
        "test_users.py",
        """
        import asyncio

        import pytest
        from models import User, db


        @pytest.fixture(scope="session", autouse=True)
        def tables():
            with db.connection_context():
                db.create_tables([User])
                yield
                db.drop_tables([User])
            asyncio.run(db.close_pool())


        @pytest.fixture
        def undone():
            with db.atomic() as txn:
                yield
                txn.rollback()


        @pytest.mark.parametrize("time", [1, 2])
        def test_in_a_transaction(undone, time):
            User.create(name="ann")
            assert User.select().count() == 1


        def test_in_an_event_loop():
            assert asyncio.run(db.count(User.select())) == 0
            asyncio.run(User.acreate(name="bob"))
            assert [user.name for user in User.select()] == ["bob"]
            assert User.delete().execute() == 1
        """,
    )
    quick = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    output = project.python("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", **quick)
    assert "3 passed" in output
    assert connections_become(database_url, 0)


def test_in_the_main_thread(db: Database, seen: Seen) -> None:
    """A test of the user's own calls synchronous code as it is, and rolls back what it did."""
    User.create(name="ann")
    with db.atomic() as txn:
        User.create(name="bob")
        assert [user.name for user in User.select()] == ["ann", "bob"]
        txn.rollback()
    assert seen() == ["ann"]
    assert asyncio.run(db.count(User.select())) == 1


# Threads


def test_a_thread_pool(connected: Callable[..., Database], database_url: str) -> None:
    """Threads outside of requests have a connection each, as many as they are, and close it."""
    db = connected(pool_size=2)
    together = threading.Barrier(16, timeout=60)

    def job(number: int) -> int:
        assert User.select().count() == 0
        together.wait()
        count = open_connections(database_url) if together.wait() == 0 else 0
        together.wait()
        with db.atomic():
            User.create(name=f"user {number}")
            mine = User.select().where(User.name == f"user {number}").count()
        db.close()
        return count * mine

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(job, range(16))) == 16
        assert connections_become(database_url, 0)
    assert User.select().count() == 16


def test_jobs_of_a_worker(db: Database, database_url: str, seen: Seen) -> None:
    """A worker's job in `connection_context` has a connection, and leaves none, if it fails too."""

    def job(number: int) -> bool:
        assert db.is_closed()
        with db.connection_context():
            assert not db.in_transaction()
            User.create(name=f"begun {number:02}")
            with db.atomic():
                User.create(name=f"ended {number:02}")
                if number % 4 == 0:
                    raise Oops
            return not db.is_closed()

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(job, number) for number in range(40)]
        results = [job.exception() or job.result() for job in jobs]
        assert connections_become(database_url, int(bool(seen())))  # the one that looks

    assert [result is True for result in results] == [number % 4 != 0 for number in range(40)]
    assert all(isinstance(result, Oops) for result in results[::4])
    assert len(seen()) == 40 + 30


def test_threads_beside_an_event_loop(db: Database, seen: Seen) -> None:
    """Synchronous threads and an event loop with its own use the database at the same time."""

    async def tasks() -> None:
        await asyncio.gather(*(User.acreate(name=f"task {number}") for number in range(20)))

    def job(number: int) -> None:
        with db.connection_context():
            User.create(name=f"thread {number}")

    with ThreadPoolExecutor(4) as pool:
        loop = pool.submit(asyncio.run, tasks())
        list(pool.map(job, range(20)))
        loop.result()
    assert len(seen()) == 40


# Notebooks and shells


async def test_notebooks_allow_synchronous_queries(db: Database, seen: Seen) -> None:
    """Where an event loop runs already, `with db.allow_sync():` permits synchronous queries."""
    with db.allow_sync():
        ann = User.create(name="ann")
        Note.create(user=ann)
        with db.atomic():
            User.create(name="bob")
        assert [note.user.name for note in Note.select()] == ["ann"]
        db.close()
    assert seen() == ["ann", "bob"]


async def test_synchronous_queries_warn_on_an_event_loop(db: Database) -> None:
    """Without it, a synchronous query on an event loop warns where it stands, and runs."""
    with pytest.warns(BlockingQueryWarning, match="event loop") as caught:
        assert User.select().count() == 0
    assert {warning.filename for warning in caught} == {__file__}


async def test_lazy_relations_warn_on_an_event_loop(db: Database) -> None:
    """So does a relation that is loaded when it is looked at, and a query that is iterated."""
    await Note.acreate(user=await User.acreate(name="ann"))
    note = await Note.aget()

    with pytest.warns(BlockingQueryWarning):
        assert note.user.name == "ann"
    with pytest.warns(BlockingQueryWarning):
        assert len(note.user.notes) == 1


async def test_allow_sync_ends_with_its_block(db: Database) -> None:
    """After the block of `allow_sync`, and in tasks made before it, queries warn as before."""
    go = asyncio.Event()

    async def elsewhere() -> None:
        await go.wait()
        with pytest.warns(BlockingQueryWarning):
            User.select().count()

    task = asyncio.create_task(elsewhere())
    with db.allow_sync():
        go.set()
        await task
        assert User.select().count() == 0
    with pytest.warns(BlockingQueryWarning):
        User.select().count()


async def test_synchronous_queries_are_refused_in_a_block(db: Database, seen: Seen) -> None:
    """Inside `async with db.atomic()`, a synchronous query raises, unless it is allowed."""
    async with db.atomic():
        with pytest.raises(BlockingQuery):
            User.create(name="ann")
        with db.allow_sync():
            User.create(name="bob")
        assert seen() == []
    assert seen() == ["bob"]


def test_a_shell_with_an_event_loop(project: Project) -> None:
    """In `python -m asyncio`, as in a notebook, both ways work from one statement to the next."""
    session = """
        from models import User, db
        await db.acreate_tables([User])
        with db.allow_sync(): print("created", User.create(name="ann").name)

        async with db.atomic(): print("created", (await User.acreate(name="bob")).name)

        print("counted", await db.count(User.select()))
        with db.allow_sync(): print("closed", db.close())

        await db.close_pool()
        """
    output = project.python("-m", "asyncio", stdin=session, stderr=subprocess.STDOUT)
    printed = re.findall(r"(?:created|counted|closed) \w+", output)
    assert printed == ["created ann", "created bob", "counted 2", "closed True"], output
    assert "Traceback" not in output
    assert "Warning" not in output


# Errors that go from one process to another


def assert_is_again(error: BaseException) -> Any:
    """Pickled in every way, and copied. Returns the pickled one."""
    again = [pickle.loads(pickle.dumps(error, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*again, copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert (str(other), other.args) == (str(error), error.args)
    return again[-1]


def test_errors_are_pickled_and_copied() -> None:
    """Process pools and job queues hand our errors on: with their text, once."""
    made = [
        BlockingQuery(),
        LazyLoad("User.team", "users"),
        LeaseEnded(),
        LeaseForked(),
        NoLease(),
        OutcomeUnknown("A COMMIT was sent"),
        TransactionAborted(),
        TurnTimeout(2.5),
    ]
    public = [getattr(fastapi_peewee, name) for name in fastapi_peewee.__all__]
    classes = [it for it in public if isinstance(it, type) and issubclass(it, Exception)]
    plain = [each("text") for each in classes if "__init__" not in vars(each)]
    own = {type(each) for each in made}
    assert {type(each) for each in plain} | own == set(classes)
    for error in made + plain:
        error.add_note("a note")
        assert assert_is_again(error).__notes__ == ["a note"]


def test_what_a_database_refused_is_pickled_and_copied(db: Database, seen: Seen) -> None:
    """Process pools and job queues hand on what a statement raised, as Peewee's own: with its SQL,
    and without the database and the values."""
    with db.connection_context():
        User.create(name="ann")
        with pytest.raises(peewee.IntegrityError) as failure:
            User.create(name="ann")
    again = assert_is_again(failure.value)
    assert kind_of(again) == "unique"
    assert refused_fields(again, "unique") == [User.name]
    database, sql, params = again.statement
    assert (database, type(sql), params) == (None, str, ())
    assert sql.startswith("INSERT")


# Forks


@pytest.mark.parametrize(
    "program",
    [
        "after_a_query",
        "with_a_warm_pool",
        "inside_a_transaction",
        "leaving_an_inherited_block",
        "inside_run",
        "all_at_once",
        "while_a_request_gives_back",
        "with_multiprocessing",
        "with_a_parent_that_closes",
        "while_another_thread_writes",
        "with_multiprocessing_in_a_request",
        "in_a_context_of_its_own",
    ],
)
def test_forks(program: str, project: Project, database_url: str) -> None:
    """After a fork, parent and child go on working, each with connections of its own. A child that
    can't, on SQLite, is told so."""
    # The connections that a child inherits stay open in it, by intention; and Python 3.12 warns of
    # any fork where there are threads.
    ignored = "ignore::ResourceWarning,ignore:This process:DeprecationWarning"
    output = project.python(
        "-m",
        "tests.forks",
        program,
        PYTHONPATH=os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        PYTHONWARNINGS=f"error,{ignored}",
    )
    assert output == "done\n"
    assert connections_become(database_url, 0)
