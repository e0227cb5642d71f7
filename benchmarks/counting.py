"""How many statements the database is sent for a request.

SQLite runs in the server's process, which keeps a log of them (see `benchmarks.tracing`). Before
PostgreSQL we put a relay that understands what the database answers: it says when a statement is
complete, and when a round trip is. So both count whatever is sent, by any library, the beginnings
and ends of transactions and the resets of sessions included.
"""

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

_STILL = 0.1  # seconds without a statement after which a request has sent its last one


class Counts(NamedTuple):
    statements: float
    round_trips: float


class Tally:
    """Counts that grow, and how to hand a server its part."""

    def __init__(self, url: str, settings: dict[str, str], read: Callable[[], Counts]) -> None:
        self.settings = {"DATABASE_URL": url, **settings}
        self._read = read

    def settled(self) -> Counts:
        """The counts, once they stand still: a connection may be reset after the answer."""
        while True:
            before = self._read()
            time.sleep(_STILL)
            if self._read() == before:
                return before


@contextmanager
def counted(database_url: str) -> Iterator[Tally]:
    """Count what is sent to a database by a server that gets the counter's settings."""
    if database_url.startswith("sqlite:"):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            log = Path(folder, "statements")
            log.touch()

            def read() -> Counts:
                statements = log.read_bytes().count(b"\n")
                return Counts(statements, statements)

            yield Tally(database_url, {"STATEMENT_LOG": str(log)}, read)
    else:
        relay = _Relay(database_url)
        try:
            yield Tally(relay.url, {}, relay.read)
        finally:
            relay.close()


class _Relay:
    """Passes on what clients and PostgreSQL send each other, and counts the server's messages."""

    _ENCRYPTIONS = (80877103, 80877104)  # the requests for TLS and GSSAPI

    def __init__(self, database_url: str) -> None:
        parts = urlsplit(database_url)
        self._server = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        credentials, at, _ = parts.netloc.rpartition("@")
        port = self._listener.getsockname()[1]
        self.url = parts._replace(netloc=f"{credentials}{at}127.0.0.1:{port}").geturl()
        self._lock = threading.Lock()
        # CommandComplete; PortalSuspended, after as many rows as were wanted; ReadyForQuery
        self._messages = dict.fromkeys(b"CsZ", 0)
        threading.Thread(target=self._accept, daemon=True).start()

    def read(self) -> Counts:
        with self._lock:
            complete, suspended, ready = self._messages.values()
        return Counts(complete + suspended, ready)

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            while True:
                start = client.recv(8, socket.MSG_WAITALL)
                if int.from_bytes(start[4:]) not in self._ENCRYPTIONS:
                    break
                client.sendall(b"N")
            with socket.create_connection(self._server) as server:
                server.sendall(start)
                back = threading.Thread(target=self._pass_on_answers, args=[server, client])
                back.start()
                while data := client.recv(65536):
                    server.sendall(data)
                server.shutdown(socket.SHUT_WR)
                back.join()

    def _pass_on_answers(self, server: socket.socket, client: socket.socket) -> None:
        begun = b""  # of a message: its type, and four bytes of its length
        missing = 0  # bytes of the message that are still to come
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
                at = 0
                while at < len(data):
                    if missing:
                        taken = min(missing, len(data) - at)
                        missing -= taken
                    else:
                        taken = min(5 - len(begun), len(data) - at)
                        begun += data[at : at + taken]
                        if len(begun) == 5:
                            missing = int.from_bytes(begun[1:]) - 4
                            self._count(begun[0])
                            begun = b""
                    at += taken
            client.shutdown(socket.SHUT_WR)

    def _count(self, message: int) -> None:
        if message in self._messages:
            with self._lock:
                self._messages[message] += 1
