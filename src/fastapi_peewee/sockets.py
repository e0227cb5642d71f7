"""The sockets of PostgreSQL's connections, as event loops watch them.

Nothing here knows of SQL.
"""

import asyncio
import os
import weakref
from collections.abc import Generator
from typing import Any

#: Seconds after which a socket is looked at though the event loop said nothing: uvloop forgets one
#: with an error (POLLERR), as that of a server that was killed, without calling anybody.
_LOOK_EVERY = 0.1


#: What asks for something in one or more steps: a generator that yields a function of libpq's which
#: waits for an answer, and its arguments, and is sent the last result.
Steps = Generator[tuple[str, Any], Any, Any]

#: The functions of libpq's that only send, for those that wait.
_SENDERS = {
    "exec_params": "send_query_params",
    "exec_prepared": "send_query_prepared",
    "prepare": "send_prepare",
}


class Unwatchable(Exception):
    """This event loop can't watch this socket."""


class Watch:
    """A connection's socket, as one event loop watches it, from one statement to the next.

    It has a descriptor of its own, since libpq closes the other one when a connection is lost, in
    any thread. Its number may be another socket's then, which the event loop would take for watched
    already.

    Raises:
        Unwatchable: as on Windows, where a socket is no descriptor; or there is none left.
    """

    def __init__(self, pgconn: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pgconn = pgconn
        self._answered: asyncio.Future[None] | None = None
        self._results: list[Any] = []
        self._looks = _looks.setdefault(loop, _Looks())
        number = pgconn.socket
        try:
            fd = self._fd = os.dup(number)
        except OSError as error:
            raise Unwatchable from error
        self._is_sending = False
        #: Stop watching. To be called once or more, in any thread.
        self.end = weakref.finalize(self, _unwatch_soon, loop, fd)
        self.end.atexit = False
        try:
            loop.add_reader(fd, _read, weakref.ref(self))
        except NotImplementedError as error:
            self.end.detach()
            os.close(fd)
            raise Unwatchable from error

    @classmethod
    def of(cls, conn: Any) -> "Watch":
        """The watch of a connection, for the running event loop; made if need be."""
        watch: Watch | None = conn.watch
        loop = asyncio.get_running_loop()
        if watch is None or watch.loop is not loop or not watch.end.alive:
            if watch is not None:
                watch.end()
            watch = conn.watch = cls(conn.pgconn, loop)
        return watch

    async def ask(self, steps: Steps) -> Any:
        """What these steps return, which are taken without waiting in the thread."""
        self._looks.watches.add(self)
        self._looks.go_on(self.loop)
        result = None
        try:
            while True:
                method, arguments = steps.send(result)
                # In no variable: an error that it has would have this frame, and the frame it.
                self._answered = self.loop.create_future()
                getattr(self._pgconn, _SENDERS[method])(*arguments)
                if self._pgconn.flush():  # the rest is sent when the socket takes it
                    self.loop.add_writer(self._fd, self.send)
                    self._is_sending = True
                await self._answered
                self._has_sent()
                result, self._results = self._results[-1], []
        except StopIteration as done:
            return done.value
        finally:
            self._has_sent()
            self._answered, self._results = None, []
            self._looks.watches.discard(self)

    def send(self) -> None:
        """Give the socket more of what is to be sent."""
        try:
            if self._answered is None or self._pgconn.flush():
                return
        except Exception as error:
            _settle(self._answered, error)
        self._has_sent()

    def _has_sent(self) -> None:
        # The number of a watch that has ended may be another's by now.
        if self._is_sending and self.end.alive:
            self.loop.remove_writer(self._fd)
        self._is_sending = False

    def read(self) -> None:
        """Take what has come."""
        if self._answered is None:  # what a thread has asked for, or the server has hung up
            self.end()
            return
        try:
            self._pgconn.consume_input()
            while not self._pgconn.is_busy():
                result = self._pgconn.get_result()
                if result is None:
                    _settle(self._answered)
                    return
                self._results.append(result)
        except Exception as error:
            _settle(self._answered, error)
            self.end()


def _read(watch: "weakref.ref[Watch]") -> None:
    if (found := watch()) is not None:
        found.read()


def _unwatch_soon(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    try:
        loop.call_soon_threadsafe(_unwatch, loop, fd)
    except RuntimeError:  # it is closed
        os.close(fd)


def _unwatch(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    loop.remove_reader(fd)
    loop.remove_writer(fd)
    os.close(fd)


class _Looks:
    """Has all sockets that tasks of one event loop wait for looked at, now and then."""

    def __init__(self) -> None:
        self.watches: set[Watch] = set()
        self._is_due = False

    def go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_due:
            self._is_due = True
            loop.call_later(_LOOK_EVERY, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_due = False
        for watch in list(self.watches):
            watch.read()
        if self.watches:
            self.go_on(loop)


_looks: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Looks]"
_looks = weakref.WeakKeyDictionary()


def _settle(future: "asyncio.Future[None] | None", error: Exception | None = None) -> None:
    if future is not None and not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
