"""A server process for each batch of calls, and an empty database for each server.

The countdown of ``/slowusers/`` starts with the process, and the unprotected side never recovers
from a batch: so that all batches meet the same conditions, none shares a process or a database
with another.
"""

import itertools
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import peewee
import psutil

from fastapi_peewee import connect

APPLICATIONS = {
    "unprotected": "experiment.unprotected:app",
    "protected": "experiment.protected:app",
}

_ROOT = Path(__file__).parents[1]
_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 5.0
_RECORD = re.compile(r"(INFO|WARNING|ERROR|CRITICAL): ")  # how uvicorn's log records begin

_COUNT_SESSIONS = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = %s",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = %s",
}
# A server that was killed may not have let go of its connections yet.
_DROP = {
    "postgresql": "DROP DATABASE IF EXISTS {} WITH (FORCE)",
    "mysql": "DROP DATABASE IF EXISTS {}",
}


class ExperimentError(Exception):
    """The experiment can't go on; the message is for the user."""


class SqliteFile:
    """A database file that nobody but the server opens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"

    def count_connections(self, pid: int) -> int:
        """How often process ``pid`` has the file open: once for each connection."""
        files = psutil.Process(pid).open_files()
        return sum(Path(file.path) == self.path for file in files)


class ServerDatabase:
    """A database on a PostgreSQL or MySQL server, with a name of its own."""

    def __init__(self, server_url: str) -> None:
        parts = urlsplit(server_url)
        self._kind = "mysql" if parts.scheme == "mysql" else "postgresql"
        self.name = f"experiment_{secrets.token_hex(4)}"
        self._server = connect(server_url)
        self.url = parts._replace(path=f"/{self.name}").geturl()

    def create(self, template: str | None = None) -> None:
        """Make it, empty or (on PostgreSQL) as a copy of another."""
        copying = f" TEMPLATE {template}" if template else ""
        self._server.execute_sql(f"CREATE DATABASE {self.name}{copying}")

    def count_connections(self, pid: int) -> int:
        """How many connections to it the database server lists."""
        cursor = self._server.execute_sql(_COUNT_SESSIONS[self._kind], (self.name,))
        count: int = cursor.fetchone()[0]
        return count

    def drop(self) -> None:
        self._server.execute_sql(_DROP[self._kind].format(self.name))
        self._server.close()


@contextmanager
def temporary_database(
    server_url: str | None, template: SqliteFile | ServerDatabase | None = None
) -> Iterator[SqliteFile | ServerDatabase]:
    """Make a database, and remove it afterwards.

    Args:
        server_url: a PostgreSQL or MySQL database whose user may create others beside it, which
            is where this one is made; None for a temporary SQLite file.
        template: what it is a copy of, a SQLite file or a PostgreSQL database that nobody uses
            meanwhile; without, it is empty.

    Raises:
        ExperimentError: the server can't be reached, or the user may not create a database.
    """
    if server_url is None:
        # SQLite may still write its last files while the folder goes away.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            file = SqliteFile(Path(folder).resolve() / "experiment.db")
            if isinstance(template, SqliteFile):
                shutil.copyfile(template.path, file.path)
            yield file
        return
    try:
        database = ServerDatabase(server_url)
        database.create(template.name if isinstance(template, ServerDatabase) else None)
    except peewee.PeeweeException as error:
        raise ExperimentError(f"Could not make a database beside the one given: {error}") from error
    try:
        yield database
    finally:
        database.drop()


@dataclass
class Server:
    """A running server. Its errors are known once it has stopped."""

    url: str
    pid: int
    errors: Counter[str] = field(default_factory=Counter)


@contextmanager
def serve(
    application: str,
    settings: Mapping[str, str],
    *,
    port: int = 0,
    python: str = sys.executable,
    runner: str = "uvicorn",
    options: Sequence[str] = (),
) -> Iterator[Server]:
    """Run an application in a process of its own, which is ended in any case.

    Args:
        application: as uvicorn is told it, ``package.module:app``.
        settings: environment variables.
        port: 0 for a free one.
        python: the interpreter, and with it the virtual environment.
        runner: the module that takes uvicorn's command line.
        options: more of uvicorn's options.

    Raises:
        ExperimentError: it doesn't start; the message ends with its log's last lines.
    """
    command = [python, "-m", runner, application, "--app-dir", str(_ROOT)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--lifespan", "on"]
    command += ["--no-access-log", "--no-use-colors", "--timeout-graceful-shutdown", "1", *options]
    environment = {**os.environ, **settings}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            server = Server(_wait_until_ready(process, log, application), process.pid)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        server.errors.update(errors_in(_read(log)))


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, application: str) -> str:
    """The address that uvicorn says it listens on."""
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        text = _read(log)
        if ready := re.search(r"Uvicorn running on (http://[\d.]+:\d+)", text):
            return ready[1]
        stopped = process.poll() is not None
        if stopped or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    if "address already in use" in text:
        reason = "its port is taken by another program"
    elif stopped:
        reason = f"it stopped with exit code {process.returncode}"
    else:
        reason = f"it is not ready after {_START_TIMEOUT:.0f} seconds"
    tail = "\n".join(f"    {line}" for line in text.splitlines()[-15:])
    raise ExperimentError(f"The server of {application} did not start: {reason}. It said:\n{tail}")


def errors_in(log: str) -> Counter[str]:
    """What uvicorn logged of each request that ended in an exception: its traceback's last line.

    In the order of their first appearance.
    """
    errors: Counter[str] = Counter()
    for report in log.split("ERROR:    Exception in ASGI application")[1:]:
        traceback = itertools.takewhile(lambda line: not _RECORD.match(line), report.splitlines())
        if last_lines := [line for line in traceback if line[:1].isalpha()]:
            errors[last_lines[-1]] += 1
    return errors
