"""Time limits that hold: a connection whose thread doesn't come back is cut from outside.

A driver's own limits don't see a server that is frozen: the connection is alive, and silent. A
thread can't be stopped either, but its socket can be shut down, and then the driver returns.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

logger = logging.getLogger("fastapi_peewee")

#: Seconds between two looks.
_EVERY = 0.05


def limit_for_database(seconds: float | None) -> float | None:
    """How many seconds the database is told that a statement may take, if it may take so many here.

    Fewer, so that the database's own answer is there before the connection would be cut.
    """
    return None if seconds is None else seconds - min(0.2, seconds / 5)


class Watched(Protocol):
    """A connection, for the watchdog.

    Attributes:
        waiting: since when its thread waits for the database, in seconds, or the statement that
            knows it; None: it doesn't.
        transaction: since when a transaction is open; None: none is.
        lock: guards `waiting`, `transaction` and `cut`, so that nobody's connection is cut for
            what somebody had done with it before.
        cut: whether it was cut, and is dead. SQLite's goes on, and is looked at again.
    """

    conn: Any
    waiting: "float | Stepwise | None"
    transaction: float | None
    lock: threading.Lock
    cut: bool


class Waiting:
    """`with Waiting(held, clock):` around whatever waits for the database."""

    __slots__ = ("_clock", "_held")

    def __init__(self, held: Watched, clock: Callable[[], float]) -> None:
        self._held = held
        self._clock = clock

    def __enter__(self) -> None:
        self._held.waiting = self._clock()

    def __exit__(self, *_: object) -> None:
        with self._held.lock:
            self._held.waiting = None


class Stepwise:
    """A statement that its own thread works for, in steps: at each row that it is asked for.

    Its time is that of the steps together, and not what lies between them. To ask the clock at each
    would take as long as the row, so they only leave word that they go on, until the watchdog has
    come upon one; from then on they are timed. It knows no cursor: the watchdog may be the last to
    have it, and closing a cursor waits for what runs on its connection.

    Attributes:
        held: its connection.
        begun: when the step that goes on would have begun if there had been nothing between those
            before it; None: the watchdog hasn't come upon one.
    """

    __slots__ = ("_clock", "_spent", "begun", "held")

    def __init__(self, held: Watched, clock: Callable[[], float]) -> None:
        self.held = held
        self._clock = clock
        self.begun: float | None = None
        self._spent = 0.0

    def anew(self) -> "Stepwise":
        """For another statement: this one, if the watchdog hasn't come upon it."""
        return self if self.begun is None else Stepwise(self.held, self._clock)

    def since(self, now: float) -> float:
        """The watchdog has come upon a step. Returns since when its statement takes time."""
        if self.begun is None:
            self.begun = now
        return self.begun

    def __enter__(self) -> None:
        if self.begun is not None:
            self.begun = self._clock() - self._spent
        self.held.waiting = self

    def __exit__(self, *_: object) -> None:
        self.held.waiting = None
        self.end_step()

    def end_step(self) -> None:
        if self.begun is not None:
            with self.held.lock:  # what is just being cut ends before something else begins
                self._spent = self._clock() - self.begun


class Watchdog:
    """Looks at the connections of a pool, in a thread that lives while there are any.

    Args:
        statement, transaction: seconds; None for no limit.
        cut: breaks a connection off, or ends what runs on it; the first argument is the connection,
            the second says why. It returns whether the connection goes on. If so it is called again
            and again while the same statement or transaction lasts: what was just about to run
            isn't ended by it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        statement: float | None,
        transaction: float | None,
        cut: Callable[[Any, str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._statement = statement
        self._transaction = transaction
        self._cut = cut
        self._clock = clock
        self.start_anew()

    def start_anew(self) -> None:
        """Forget everything: after a fork, say, when there is no thread any more."""
        self._lock = threading.Lock()
        #: For each connection, the `waiting` and the `transaction` for which it was cut last.
        self._watched: dict[Any, dict[str, Any]] = {}
        self._thread: threading.Thread | None = None

    def watch(self, held: Any) -> None:
        """Look at this connection from now on.

        Raises:
            RuntimeError: no thread could be started.
        """
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(
                    target=_patrol,
                    args=(weakref.ref(self),),
                    name="fastapi-peewee-watchdog",
                    daemon=True,
                )
                thread.start()  # if there can be none now, the next connection tries again
                self._thread = thread
            self._watched[held] = {}

    def forget(self, held: Any) -> None:
        self._watched.pop(held, None)  # in one step, without the lock: before a fork nobody waits

    def look(self) -> bool:
        """Cut what is over its limit. Returns whether there is anything left to look at."""
        with self._lock:
            watched = list(self._watched.items())
            if not watched:
                self._thread = None
                return False
        now = self._clock()
        for held, ended in watched:
            self._check(held, ended, "waiting", "statement", self._statement, now)
            self._check(held, ended, "transaction", "transaction", self._transaction, now)
        return True

    def _check(
        self,
        held: Watched,
        ended: dict[str, Any],
        name: str,
        what: str,
        limit: float | None,
        now: float,
    ) -> None:
        found = getattr(held, name)
        if found is None or limit is None:
            return
        stepwise = isinstance(found, Stepwise)
        if now - (found.since(now) if stepwise else found) <= limit:
            return
        with held.lock:
            # The same one still? Floats are compared by identity: each begins with one of its own.
            if getattr(held, name) is not found or held.cut:
                return
            reason = f"A {what} took longer than {limit:g} s ({what}_timeout)"
            if ended.get(name) is not found:
                logger.warning("%s; its connection was cut.", reason)
            ended[name] = found
            held.cut = True
            try:
                held.cut = not self._cut(held, reason)
            except Exception:
                logger.exception("A connection could not be cut.")


def _patrol(watchdog: "weakref.ref[Watchdog]") -> None:
    while (found := watchdog()) is not None and found.look():
        del found  # a pool that nobody has any more shall not be kept by this thread
        time.sleep(_EVERY)
