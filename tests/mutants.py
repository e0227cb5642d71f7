"""Bugs planted on purpose, and the tests that must catch them: `make mutants`.

A mutant replaces a statement or an expression of one function. It is found by what it says, not by
where it stands: comments, formatting and the rest of the function may change. One that no longer
applies is an error, and has to be written anew.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import fastapi_peewee

PACKAGE = Path(fastapi_peewee.__file__).parent
ROOT = Path(__file__).parents[1]
#: A mutant that makes a test hang is caught by its time limit.
_TEST_TIMEOUT = 40
_RUN_TIMEOUT = 400


class DoesNotApplyError(Exception):
    """The code that a mutant changes isn't there, or is there twice."""


@dataclass(frozen=True)
class Edit:
    """In `function` (a qualified name; "" for the module) of `module`, `old` becomes `new`."""

    module: str
    function: str
    old: str
    new: str

    def apply(self, source: str) -> str:
        tree = ast.parse(source)
        place: ast.AST = tree
        for name in filter(None, self.function.split(".")):
            found = [
                node
                for node in ast.walk(place)
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and node.name == name
            ]
            if len(found) != 1:
                raise DoesNotApplyError(f"{self.module}.py has {len(found)} of {self.function}")
            [place] = found
        old, new = _parsed(self.old), _parsed(self.new)
        if isinstance(old, ast.Expr) and isinstance(new, ast.Expr):
            old, new = old.value, new.value
        replacing = _Replacing(old, new)
        replacing.visit(place)
        if replacing.count != 1:
            raise DoesNotApplyError(
                f"{self.module}.py, {self.function}: found {replacing.count} times: {self.old}"
            )
        return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _parsed(text: str) -> ast.AST:
    body = ast.parse(textwrap.dedent(text)).body
    return body[0] if len(body) == 1 else ast.If(ast.Constant(True), body, [])


class _Replacing(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._type, self._text, self._new = type(old), ast.unparse(old), new
        self.count = 0

    def visit(self, node: ast.AST) -> ast.AST:
        if type(node) is self._type and ast.unparse(node) == self._text:
            self.count += 1
            return self._new
        return self.generic_visit(node)


@dataclass(frozen=True)
class Mutant:
    """A bug, as it is planted, and what pytest is told to run."""

    name: str
    edits: tuple[Edit, ...]
    tests: str

    def plant(self, package: Path) -> None:
        for edit in self.edits:
            path = package / f"{edit.module}.py"
            path.write_text(edit.apply(path.read_text()))


CANCELLATION = "tests/test_cancellation.py"
REQUESTS = "tests/test_cancelled_requests.py"
BLOCKS = "tests/test_transaction_machine.py"
POOL = "tests/test_pool_machine.py"
LIBPQ = "tests/test_libpq.py tests/test_single_statements.py"
CANCELLED_REQUESTS = "tests/test_cancelled_requests.py"
INLINE = "tests/test_inline_reads.py"
GROUP = "tests/test_group_commit.py"

MUTANTS = [
    Mutant(
        "a group of statements isn't committed",
        (Edit("group_commit", "GroupCommit._write_together", 'conn.execute("COMMIT")', "None"),),
        GROUP,
    ),
    Mutant(
        "what a group's rollback has undone is answered",
        (Edit("group_commit", "_Write.undo", "self.cursor, self.error = None, error", "None"),),
        GROUP,
    ),
    Mutant(
        "a group is interrupted though somebody waits for it",
        (
            Edit(
                "group_commit",
                "GroupCommit._abandon",
                "all(one.gone for one in self._batch)",
                "True",
            ),
        ),
        GROUP,
    ),
    Mutant(
        "a writer interrupted as its turn comes keeps it",
        (Edit("writers", "Writers.enter", "gate.release()", "None"),),
        "tests/test_writers.py -k passes_it_on",
    ),
    Mutant(
        "a transaction that fails isn't rolled back",
        (Edit("blocks", "_SafeTransaction._abandon", "self.db.rollback()", "None"),),
        BLOCKS,
    ),
    Mutant(
        "a request's transaction is committed after the response",
        (
            Edit("lifecycle", "", 'Depends(transaction, scope="function")', "Depends(transaction)"),
            Edit(
                "lifecycle",
                "_before_response",
                """(request.transactions
                or any(
                    block.root.state["transactions"]
                    for block, task in request.blocks.items()
                    if not block.streams and _answers(task)
                )
                or any(
                    _left_open(request, held)
                    for held in request.leases.values() if isinstance(held, Lease)
                ))""",
                "False",
            ),
        ),
        "tests/test_transaction_dependency.py",
    ),
    Mutant(
        "a second cancellation ends the wait for the thread",
        (
            Edit(
                "calls",
                "result_of",
                "await uninterrupted(call.end())",
                "await call.end()",
            ),
        ),
        CANCELLATION,
    ),
    Mutant(
        "the wait for the thread isn't shielded",
        (Edit("calls", "uninterrupted", "anyio.CancelScope(shield=True)", "anyio.CancelScope()"),),
        f"{CANCELLATION} -k scope",
    ),
    Mutant(
        "a waiter that is cancelled as it gets its slot takes it along",
        (
            Edit(
                "gate",
                "Gate.acquire",
                "if not self._leave(waiter):\n    self.release()",
                "self._leave(waiter)",
            ),
        ),
        "tests/test_gate.py -k cancelled",
    ),
    Mutant(
        "the same, against the pool's model",
        (
            Edit(
                "gate",
                "Gate.acquire",
                "if not self._leave(waiter):\n    self.release()",
                "self._leave(waiter)",
            ),
        ),
        POOL,
    ),
    Mutant(
        "a waiter that gives up stays in the queue",
        (Edit("gate", "Gate._leave", "self._waiters.pop(waiter, None)", "None"),),
        POOL,
    ),
    Mutant(
        "a newcomer overtakes those who wait",
        (
            Edit(
                "gate",
                "Gate.release",
                "self._waiters.popitem(last=False)",
                "self._waiters.popitem()",
            ),
        ),
        "tests/test_gate.py",
    ),
    Mutant(
        "the awaiting task releases, not the thread",
        (
            Edit(
                "calls",
                "Call._work",
                "try:\n    result = context.run(self._body)\nfinally:\n    self._let_go()",
                "result = context.run(self._body)",
            ),
            Edit("calls", "Call.give_up", "return False", "return self._let_go()"),
            Edit(
                "calls",
                "result_of",
                "return call.result()",
                "try:\n    return call.result()\nfinally:\n    call._let_go()",
            ),
        ),
        CANCELLATION,
    ),
    Mutant(
        "a connection goes back while its thread runs",
        (Edit("calls", "Call.give_up", "self._take()", "self._take() or True"),),
        CANCELLATION,
    ),
    Mutant(
        "a connection goes back with an answer on its way",
        (
            Edit("postgresql", "PostgresqlDatabase._on_the_loop", "conn.close()", "None"),
            Edit("postgresql", "PostgresqlDatabase._on_the_loop", "self._was_sent(conn)", "False"),
            Edit(
                "postgresql", "PostgresqlDatabase.clean", "status != TransactionStatus.IDLE", "()"
            ),
        ),
        "tests/test_cancellation_databases.py -k event_loop",
    ),
    Mutant(
        "a COMMIT that hasn't begun is dropped on cancellation",
        (Edit("calls", "result_of", "certain or not call.give_up()", "not call.give_up()"),),
        CANCELLATION,
    ),
    Mutant(
        "a block that was entered as its task was cancelled is never left",
        (
            Edit(
                "blocks",
                "_Block.aenter_unbound",
                "await leave(db, lease, partial(self._end, error) if entered else _nothing)",
                "await leave(db, lease, _nothing)",
            ),
        ),
        CANCELLATION,
    ),
    Mutant(
        "a block whose wait for its children is cancelled, too, ends under them",
        (Edit("blocks", "leave", "if not waiting.cancelled():\n    break", "break"),),
        "tests/test_leases.py -k all_tasks",
    ),
    Mutant(
        "after_commit runs what a savepoint has rolled back",
        (
            Edit(
                "blocks",
                "_MarkedSavepoint.rollback",
                "self.covers(callback.lease)",
                "False",
            ),
        ),
        BLOCKS,
    ),
    Mutant(
        "async callbacks are forgotten if the task is cancelled as it commits",
        (
            Edit(
                "blocks",
                "_Block.aexit_unbound",
                """
                try:
                    await leave(self.db, self._lease, partial(self._end, error))
                finally:
                    await run_follow_ups(self._lease)
                """,
                """
                await leave(self.db, self._lease, partial(self._end, error))
                await run_follow_ups(self._lease)
                """,
            ),
        ),
        f"{CANCELLATION} -k callbacks",
    ),
    Mutant(
        "a connection isn't cleaned for its next user",
        (
            Edit(
                "pool",
                "Pool._take_back",
                "reusable = self._opener.clean(held.conn, lease)",
                "reusable = True",
            ),
        ),
        "tests/test_leases.py -k session_is_clean",
    ),
    Mutant(
        "a connection is kept though it was renewed",
        (Edit("pool", "Pool._take_back", "held.epoch == self._epoch", "True"),),
        POOL,
    ),
    Mutant(
        "a thread and the end of its request both give a connection back",
        (
            Edit(
                "blocks",
                "LeaseContext.__exit__",
                "lease.contexts or not self._request.drop(self.db, lease)",
                "lease.contexts or (self._request.drop(self.db, lease) and False)",
            ),
        ),
        f"{REQUESTS} -k dependency",
    ),
    Mutant(
        "a block whose request is over keeps the turn",
        (
            Edit(
                "blocks",
                "_Block.__exit__",
                """
                if self._on is not None and not self.db._state.has(self._on):
                    if lease is not None:
                        lease.give_turn()
                    if exc_type is None and self._keeps_work:
                        raise LeaseEnded
                    return
                """,
                """
                if self._on is not None and not self.db._state.has(self._on):
                    return
                """,
            ),
        ),
        f"{REQUESTS} -k plain",
    ),
    Mutant(
        "a child process uses its parent's pool",
        (Edit("pool", "Pool._forked", "self._start()", "None"),),
        POOL,
    ),
    Mutant(
        "a cancelled write runs on",
        (
            Edit(
                "postgresql",
                "PostgresqlDatabase._on_the_loop",
                "await uninterrupted(loop.run_in_executor(None, self._end_statement, conn))",
                "loop",
            ),
        ),
        f"{LIBPQ} -k cancelled",
    ),
    Mutant(
        "a write whose answer is lost has failed",
        (
            Edit(
                "postgresql",
                "PostgresqlDatabase._on_the_loop",
                "unsure and self.lost(conn, error)",
                "False",
            ),
        ),
        f"{LIBPQ} -k unknown",
    ),
    Mutant(
        "psycopg deallocates what was prepared",
        (
            Edit(
                "postgresql",
                "PostgresqlDatabase.prepare_session",
                "conn.prepare_threshold = None",
                "pass",
            ),
        ),
        f"{LIBPQ} -k prepared_by_us",
    ),
    Mutant(
        "a socket that the event loop has forgotten isn't looked at",
        (Edit("sockets", "_Looks._look", "watch.read()", "pass"),),
        f"{LIBPQ} -k forgets",
    ),
    Mutant(
        "the watch of a connection that is closed stays",
        (Edit("libpq", "connection_class", "self.watch.end()", "None"),),
        f"{LIBPQ} -k closing",
    ),
    Mutant(
        "a read on SQLite's event loop is never stopped",
        (Edit("inline", "InlineReader._is_late", "self._clock() > self._deadline", "False"),),
        INLINE,
    ),
    Mutant(
        "a read on SQLite's event loop waits for another loop's",
        (
            Edit(
                "inline",
                "InlineReader.read",
                "self._lock.acquire(blocking=False)",
                "self._lock.acquire()",
            ),
        ),
        INLINE,
    ),
    Mutant(
        "a child process reads through its parent's connection",
        (Edit("inline", "InlineReader.ready", "self._generation != generation()", "False"),),
        INLINE,
    ),
    Mutant(
        "a generator that its request didn't wait for keeps what it has taken",
        (Edit("blocks", "LeaseContext.__enter__", "request.over", "False"),),
        CANCELLED_REQUESTS,
    ),
    Mutant(
        "a thread whose request was cancelled keeps its place in the queue",
        (Edit("lifecycle", "PeeweeMiddleware.__call__", "request.cancelled = True", "pass"),),
        CANCELLED_REQUESTS,
    ),
    Mutant(
        "a thread whose stream was left by its client keeps its place in the queue",
        (Edit("blocks", "_UnlessCancelled._check", "anyio.from_thread.check_cancelled()", "pass"),),
        CANCELLED_REQUESTS,
    ),
    Mutant(
        "a thread goes on in a transaction that its cancelled request has rolled back",
        (Edit("blocks", "_Block.__exit__", "self._on.closing = True", "pass"),),
        CANCELLED_REQUESTS,
    ),
    Mutant(
        "`with db:` has forgotten its block when the request is over",
        (Edit("database", "Database.__enter__", "self._owing.blocks.append(block)", "None"),),
        CANCELLED_REQUESTS,
    ),
    Mutant(
        "a half-read cursor keeps an interrupted transaction from being rolled back",
        (Edit("sqlite", "SqliteDatabase.rollback", "self._state.conn.close_cursors()", "None"),),
        "tests/test_time_limits.py -k half_read",
    ),
    Mutant(
        "a fork leaves SQLite's idle connections open",
        (
            Edit(
                "sqlite", "SqliteDatabase.close_unused", "self.pool.close_idle(wait=False)", "None"
            ),
        ),
        "tests/test_files.py -k nobody_uses",
    ),
    Mutant(
        "a forked process uses a file of SQLite's that was open",
        (Edit("files", "_forked", "_open_at_fork.update(conn.files)", "None"),),
        "tests/test_files.py -k in_use",
    ),
    Mutant(
        "a model's own select() is asked for the first request only",
        (
            Edit(
                "plans",
                "_Around.holds",
                "return all(self._says_the_same(*each) for each in self._asked)",
                "return True",
            ),
        ),
        "tests/test_relation_plans.py -k not_everybody",
    ),
    Mutant(
        "where no relation is loaded, it is read without its query",
        (Edit("response_types", "Response._asks", "asks(self.type)", "False"),),
        "tests/test_annotations.py -k without_its_query",
    ),
    Mutant(
        "a value is converted anew as its statement comes to be remembered",
        (
            Edit(
                "sql_cache",
                "SqlCache._statement",
                "return Statement(made[0]), made[1]",
                "return self._bound(template, shape.values, lambda: query) if template else None",
            ),
        ),
        "tests/test_sql_cache.py -k converted_once",
    ),
    Mutant(
        "startup closes a connection that somebody holds",
        (
            Edit(
                "database",
                "Database.close_if_unused",
                "state.bound or own['closed'] or own['ctx'] or own['transactions']",
                "own['closed']",
            ),
        ),
        "tests/test_lifecycle.py -k startup",
    ),
]


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant
    #: The first test that failed; None if the mutant has survived.
    caught_by: str | None
    seconds: float


def run(tests: str, package: Path | None = None) -> tuple[int, str]:
    """Run some tests with the package of a folder, or with ours. Returns the exit status and what
    pytest said."""
    # Random histories need some length to come to a bug.
    environment = {"MACHINE_STEPS": "5000", "MACHINE_ANY": "1", **os.environ}
    if package is not None:
        environment["PYTHONPATH"] = str(package.parent)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:randomly", f"--timeout={_TEST_TIMEOUT}", *_words(tests)]
    try:
        process = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_RUN_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, "FAILED the time limit"
    return process.returncode, process.stdout


def _words(tests: str) -> list[str]:
    return [*tests.split(), "-m", "not slow", "--hypothesis-seed=0"]


def try_out(mutant: Mutant) -> Verdict:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        package = Path(folder, "fastapi_peewee")
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        mutant.plant(package)
        status, output = run(mutant.tests, package)
    seconds = time.monotonic() - begun
    if status == 0:
        return Verdict(mutant, None, seconds)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.*?)(?: - .*)?$", output, re.MULTILINE)
    if status in (2, 4, 5) and failed is None:
        raise RuntimeError(f"{mutant.name}: pytest could not run the tests:\n{output[-3000:]}")
    return Verdict(mutant, failed[1] if failed else "a time limit or a crash", seconds)


def verdicts(mutants: list[Mutant], jobs: int) -> Iterator[Verdict]:
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(try_out, mutant) for mutant in mutants]):
            yield future.result()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("-k", metavar="WORDS", default="", help="those whose name has these words")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (2)")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.k in mutant.name]
    if not mutants:
        parser.error(f"no mutant has {options.k!r} in its name")

    print("without a mutant: ", end="", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        every = list(dict.fromkeys(mutant.tests for mutant in mutants))
        for tests, (status, output) in zip(every, pool.map(run, every), strict=True):
            if status:
                print(f"{tests} fails:\n{output[-3000:]}")
                return 2
            print(".", end="", flush=True)
    print(" all tests pass")

    found = []
    for number, verdict in enumerate(verdicts(mutants, options.jobs), 1):
        outcome = "caught" if verdict.caught_by else "SURVIVED"
        print(
            f"{number:2}/{len(mutants)} {outcome} in {verdict.seconds:.0f} s:"
            f" {verdict.mutant.name}",
            flush=True,
        )
        found.append(verdict)
    found.sort(key=lambda verdict: mutants.index(verdict.mutant))
    width = max(len(mutant.name) for mutant in mutants)
    print(f"\n{'mutant':{width}}  caught by")
    for verdict in found:
        print(f"{verdict.mutant.name:{width}}  {verdict.caught_by or 'NOTHING'}")
    survivors = sum(verdict.caught_by is None for verdict in found)
    print(f"\n{len(found) - survivors} of {len(found)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
