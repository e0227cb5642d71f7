"""A wire that can be slowed down, sliced, cut and stopped: a proxy before a database server."""

import asyncio
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlencode, urlsplit

_PORTS = {"postgresql": 5432, "mysql": 3306}


class Proxy:
    """A proxy on a port of this machine, with an event loop and a thread of its own.

    Faults are attributes; they hold from the next piece of data on, for all connections.

    Args:
        url: of a PostgreSQL or MySQL database.

    Attributes:
        direct_url: the one given.
        url: of the same database through the proxy. Without TLS, which would hide what is said.
        latency: seconds that each piece of data waits, in either direction.
        slice_to: forward the server's data in pieces of at most so many bytes, each in a packet of
            its own; None for pieces as they come.
        swallowing: take data, and forward none: what a firewall does that has lost its memory.
        swallow_from: be swallowing from the moment on when a client sends this; None for never.
        refusing: close new connections at once.
        cut_before: cut a connection on which the client sends this; None for never. The server
            doesn't get it.
        cut_after: the same, except that the server gets it. The client never gets an answer.
        cut_answer_at: forward so many bytes more from the server, to whomever, and cut the
            connection in the middle of them; None for never.
        resets: cut with an RST instead of a FIN.
        tried: connections that clients have asked for until now.
        cuts: connections cut until now.
    """

    def __init__(self, url: str) -> None:
        self.direct_url = url
        self.latency = 0.0
        self.slice_to: int | None = None
        self.swallowing = self.refusing = self.resets = False
        self.swallow_from: bytes | None = None
        self.cut_before: bytes | None = None
        self.cut_after: bytes | None = None
        self.cut_answer_at: int | None = None
        self.tried = self.cuts = 0
        self._open: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}  # client: server
        self._silenced: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        parts = urlsplit(url)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        port = parts.port or _PORTS[parts.scheme]
        if parts.scheme == "postgresql":
            folder = options.pop("host", None)
            path = str(Path(folder, f".s.PGSQL.{port}")) if folder else None
            options["sslmode"] = options["gssencmode"] = "disable"
        else:
            path = options.pop("unix_socket", None)
            options["ssl_disabled"] = "true"
        host = parts.hostname or "localhost"
        self._connect: Callable[[], Coroutine[Any, Any, tuple[Any, Any]]] = (
            (lambda: asyncio.open_unix_connection(path))
            if path
            else (lambda: asyncio.open_connection(host, port))
        )
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        who = f"{parts.netloc.rpartition('@')[0] or 'root'}@{address}"
        self.url = parts._replace(netloc=who, query=urlencode(options)).geturl()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._serve, sock=self._listening))
        return self

    def __exit__(self, *exc: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def heal(self) -> None:
        """No faults from now on. What is cut stays so."""
        self.latency, self.slice_to = 0.0, None
        self.swallowing = self.refusing = self.resets = False
        self.swallow_from = self.cut_before = self.cut_after = self.cut_answer_at = None

    def cut(self) -> None:
        """Cut all connections that are open now."""

        async def cut() -> None:
            for client in list(self._open):
                self._cut(client)

        self._do(cut())

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _close(self) -> None:
        self._server.close()
        for client in list(self._open):
            self._cut(client)
        me = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not me]
        if tasks:  # those whose connection was cut end by themselves
            await asyncio.wait(tasks, timeout=1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cut(self, client: asyncio.StreamWriter) -> None:
        server = self._open.pop(client, None)
        if server is None:
            return
        self.cuts += 1
        if self.resets:
            linger = struct.pack("ii", 1, 0)
            with suppress(OSError):  # it is closed already
                sock = client.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        for writer in (client, server):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.tried += 1
        if self.refusing:
            client.transport.abort()
            return
        try:
            from_server, server = await self._connect()
        except OSError:  # there is no server at the moment
            client.transport.abort()
            return
        self._open[client] = server
        client.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._to_server(reader, client, server))
                group.create_task(self._to_client(from_server, client, server))
        finally:
            self._open.pop(client, None)
            for writer in (client, server):
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    async def _to_server(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, server: Any
    ) -> None:
        with suppress(OSError):
            while data := await self._read(reader):
                if self.swallow_from and self.swallow_from in data:
                    self.swallowing = True
                    continue
                if self.cut_before and self.cut_before in data:
                    self._cut(client)
                    return
                if self.cut_after and self.cut_after in data:
                    self._silenced.add(client)
                server.write(data)
                await server.drain()
        server.close()

    async def _to_client(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, server: Any
    ) -> None:
        with suppress(OSError):
            while data := await self._read(reader):
                if client in self._silenced:
                    self._cut(client)
                    return
                left = self.cut_answer_at
                if left is not None:
                    data = data[:left]
                    self.cut_answer_at = left - len(data)
                size = self.slice_to or len(data) or 1
                for start in range(0, len(data), size):
                    client.write(data[start : start + size])
                    await client.drain()
                    if self.slice_to:
                        await asyncio.sleep(0)  # else the pieces leave together
                if self.cut_answer_at == 0:
                    self.cut_answer_at = None
                    self._cut(client)
                    return
        client.close()

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        while data := await reader.read(2**16):
            if self.latency:
                await asyncio.sleep(self.latency)
            if not self.swallowing:
                break
        return data
