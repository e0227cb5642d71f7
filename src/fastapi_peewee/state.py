"""Where Peewee finds its connection: in the context, else in the request, else in the thread.

Peewee keeps connection and transaction state in `db._state`. This file replaces that object, and
is the only one that imports what Peewee keeps private. It knows nothing of pools or FastAPI.
"""

import math
import os
import threading
import warnings
import weakref
from _thread import start_new_thread
from asyncio.events import _get_running_loop
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from sys import _getframe, modules
from types import FrameType
from typing import Any, NoReturn

import peewee
from peewee import (
    ConnectionContext,
    CursorWrapper,
    ForeignKeyAccessor,
    __exception_wrapper__,
    _atomic,
    _ConnectionState,
    _manual,
    _savepoint,
    _transaction,
)

from .exceptions import (
    BlockingQuery,
    BlockingQueryWarning,
    LazyLoad,
    LeaseEnded,
    LeaseForked,
    NoLease,
    TurnTimeout,
)
from .gate import Gate

__all__ = [
    "ConnectionContext",
    "CursorWrapper",
    "Lease",
    "PeeweeConnectionState",
    "RequestScope",
    "_atomic",
    "_manual",
    "_savepoint",
    "_transaction",
    "allow_sync",
    "called_by_peewee",
    "called_by_stream",
    "called_by_suspended",
    "caller",
    "closed_state",
    "forbid_lazy_load",
    "generation",
    "lazy_loads_forbidden",
    "translate_driver_errors",
]

#: Peewee's own translation of a driver's exceptions into `peewee.…Error`, a context manager.
translate_driver_errors = __exception_wrapper__

_generation = 0  # how many forks lie between this process and the one that imported us
_inherited: list[Any] = []  # a parent's connections: kept, since closing one would end the parent's
_sync_allowed: ContextVar[bool] = ContextVar("fastapi_peewee_sync_allowed", default=False)


_states: "weakref.WeakSet[PeeweeConnectionState]" = weakref.WeakSet()


def _forked() -> None:
    global _generation
    _generation += 1
    # It calls this before its child's target, in that thread. It isn't imported, which takes 5 ms.
    util = modules.get("multiprocessing.util")
    if util is not None:
        util.register_after_fork(_states, _leave_inherited)


def _leave_inherited(states: "weakref.WeakSet[PeeweeConnectionState]") -> None:
    """Forget the request and the blocks inside of which this process was forked: its code never
    returns to them.
    """
    request = RequestScope.current
    _inherited.append(request.get())
    request.set(None)
    for state in states:
        _inherited.append(state._state.get())
        state.bind(None)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_forked)


def generation() -> int:
    """How many forks ago this package was imported: what another one made isn't ours to use."""
    return _generation


def closed_state() -> dict[str, Any]:
    """Peewee's state of a connection that isn't open."""
    return {
        "closed": True,
        "conn": None,
        "ctx": [],
        "transactions": [],
        "commit_callbacks": [],
        "between": [],
        "aborted": None,
        "writing": None,
    }


class Lease:
    """One pooled connection, or one transaction block on it, bound to a context.

    Everyone whose context holds the lease shares it, one at a time: who has the `turn` may use
    the connection. A nested block is a lease of its own over the same connection, which holds its
    parent's turn until it ends.

    Attributes:
        state: Peewee's state of the connection; the same dictionary in a nested lease.
        turn: a gate with one slot; the maker of a lease has the first turn.
        owner: the thread that has the turn for a running call or block, as `get_ident()` has it.
        call: what runs in that thread, if a task awaits it.
        parent: the lease that this one is nested in, or None.
        root: the outermost of them, which is what the pool gave out; the rest is of the root only.
        slot: the pool's gate, to which the slot goes back.
        held: the pool's record of the connection; None before the first call.
        tainted: the session may have been changed; reset before the next user.
        handed_out: the driver's connection or a cursor was asked for. A thread that a cancelled
            request doesn't wait for may have it still.
        server_cursors: PostgreSQL's; kept until the lease ends, since one that is collected earlier
            would speak to the server at a time of the collector's choosing.
        contexts: how many `connection_context()` blocks share it, if threads of a request took it.
        follow_ups: `async` callbacks of committed transactions, to be awaited on the event loop;
            None where there is none.
        closing: its block is being left; the one whose turn it is finishes, newcomers are refused.
        ended: given back; whoever still comes with it gets an error.
        patience: seconds that are left of the time to wait for a connection, after a wait in the
            queue.
        dropped: called with it, in a thread, if it is collected and hasn't ended.
    """

    __slots__ = (
        "__weakref__",
        "_outermost",
        "call",
        "closing",
        "contexts",
        "dropped",
        "ended",
        "follow_ups",
        "generation",
        "handed_out",
        "held",
        "owner",
        "parent",
        "patience",
        "server_cursors",
        "slot",
        "state",
        "tainted",
        "turn",
    )

    def __init__(self, *, slot: Gate | None = None, parent: "Lease | None" = None) -> None:
        self.parent = parent
        # None in the outermost, which would refer to itself when it has ended.
        self._outermost: Lease | None = None
        self.state: dict[str, Any]
        self.turn = Gate(1, free=0)  # whoever makes the lease has the first turn
        self.owner: int | None = None
        self.call: Any = None
        self.closing = self.ended = False
        self.dropped: Callable[[Lease], None] = _drop_block
        self.generation = _generation
        if parent is not None:
            self._outermost, self.state = parent.root, parent.state
            return
        assert slot is not None
        # `ctx` is never empty, so that `with db:` and `with db.connection_context():` inside a
        # lease can't close its connection when they end.
        self.state = {**closed_state(), "closed": False, "ctx": [self]}
        self.slot = slot
        self.held: Any = None
        self.patience = math.inf
        self.tainted = self.handed_out = False
        self.contexts = 0
        self.server_cursors: list[Any] = []
        self.follow_ups: list[Callable[[], Awaitable[Any]]] | None = []

    def __del__(self) -> None:
        # The collector comes in any thread, under any lock, of the gate's or of `threading`'s. So
        # what is to be done is done elsewhere, in a thread that is started without a lock.
        if not self.ended and not self.foreign:
            with suppress(RuntimeError):  # the interpreter ends
                start_new_thread(self.dropped, (self,))

    @property
    def root(self) -> "Lease":
        return self._outermost or self

    @property
    def foreign(self) -> bool:
        """Whether it was made before a fork, in the parent process."""
        return self.generation != _generation

    def within(self, other: "Lease") -> bool:
        """Whether it is the other one, or nested in it."""
        lease: Lease | None = self
        while lease is not None and lease is not other:
            lease = lease.parent
        return lease is other

    def check(self) -> None:
        """Raise unless this lease, and every one it is nested in, is still usable here."""
        lease: Lease | None = self
        while lease is not None:
            if lease.ended:
                raise LeaseEnded
            lease = lease.parent
        if self.foreign:
            raise LeaseForked

    async def take_turn(self, timeout: float) -> None:
        if not await self.turn.acquire(timeout):
            raise TurnTimeout(timeout)
        self._check_turn()

    def take_turn_blocking(self, timeout: float) -> None:
        if not self.turn.acquire_blocking(timeout):
            raise TurnTimeout(timeout)
        self._check_turn()

    def _check_turn(self) -> None:
        try:
            self.check()  # it may have ended while we waited
            if self.closing:
                raise LeaseEnded
        except BaseException:
            self.turn.release()
            raise

    def give_turn(self) -> None:
        self.owner = None
        self.turn.release()


def _drop_block(lease: Lease) -> None:
    """End a nested block that nobody will leave, so that the one around it can end."""
    lease.ended = True
    assert lease.parent is not None
    lease.parent.give_turn()
    warnings.warn(
        "A nested block was entered and dropped without being left.", ResourceWarning, stacklevel=1
    )


class RequestScope:
    """What one request (or websocket) holds: set by the middleware, seen by all of the request.

    It is mutable on purpose: a dependency that FastAPI runs in a thread, with a copy of the
    context, must be able to leave a lease for the endpoint, which runs with another copy.
    """

    __slots__ = (
        "app",
        "blocks",
        "cancelled",
        "databases",
        "forbids_lazy_loads",
        "leases",
        "over",
        "owners",
        "response_started",
        "sharing",
        "transactions",
        "undone",
    )

    current: "ContextVar[RequestScope | None]" = ContextVar("fastapi_peewee_request", default=None)

    def __init__(self) -> None:
        #: The innermost application with databases, and these; the one initialised first is last.
        self.app: Any = None
        self.databases: list[Any] = []
        #: What `Depends(get_db)` or a thread's `connection_context()` left: a lease or, for a
        #: database of Peewee's own, its state.
        self.leases: dict[PeeweeConnectionState, Lease | dict[str, Any]] = {}
        #: The databases that these belong to.
        self.owners: dict[PeeweeConnectionState, Any] = {}
        #: Held while it is decided who gives back what the request holds. Each request has its own:
        #: in a forked process there is nobody left to release one that a parent's thread had. And
        #: the collector may close a generator of this request just then.
        self.sharing = threading.RLock()
        #: The async blocks that are open, and the tasks that have entered them.
        self.blocks: dict[Any, Any] = {}
        #: How many transaction dependencies are open.
        self.transactions = 0
        #: Of databases on which a transaction was rolled back since the request was cancelled: what
        #: its threads would do now is no part of that any more.
        self.undone: tuple[PeeweeConnectionState, ...] = ()
        self.response_started = False
        #: Whether the request has ended, though threads of it may go on, and whether by cancelling.
        self.over = self.cancelled = False
        #: Whether a query that runs while a response is validated is an error.
        self.forbids_lazy_loads = False

    @property
    def holds_anything(self) -> bool:
        return bool(self.leases or self.blocks or self.transactions)

    def hold(self, db: Any, held: Any) -> Any:
        """Hold this for the request, unless something is held already. Returns what is held."""
        self.owners.setdefault(db._state, db)
        return self.leases.setdefault(db._state, held)

    def drop(self, db: Any, held: Any) -> bool:
        """Hold this no longer. Returns False if it wasn't held: then somebody else gives it back.

        Threads of the request and its event loop may do so at once: call it under `sharing`.
        """
        if self.leases.get(db._state) is not held:
            return False
        del self.leases[db._state], self.owners[db._state]
        return True


class PeeweeConnectionState(_ConnectionState):
    """A replacement for `db._state` of any Peewee database, correct across threads and tasks.

    Databases made by `fastapi_peewee.connect()` have one. For any other Peewee database (plain or
    pooled, SQLite, PostgreSQL or MySQL) assign it as soon as the database is made::

        db = peewee.SqliteDatabase("test.db", check_same_thread=False)
        db._state = PeeweeConnectionState()

    The connection is looked for in this order:

    1. in the context variable `_state`: a lease, or a dictionary of Peewee's state that an async
       dependency sets for each request (`db._state._state.set({…})`, then `db._state.reset()`);
    2. in the request, where `Depends(get_db)` leaves a lease;
    3. in the thread, as Peewee itself does it: scripts, shells, workers and tests.

    In a request, the third is refused with `NoLease`: a thread serves many requests.
    """

    _state: ContextVar[Any]
    _thread: threading.local

    def __init__(self) -> None:
        set_attribute = super().__setattr__
        set_attribute("_state", ContextVar("fastapi_peewee_state", default=None))
        set_attribute("_thread", threading.local())
        _states.add(self)

    def lease(self) -> Lease | None:
        """The lease in force here, or None. Raises `LeaseEnded` or `LeaseForked` if it is over."""
        bound = self._bound()
        if isinstance(bound, Lease):
            bound.check()
            return bound
        return None

    def has(self, lease: Lease) -> bool:
        """Whether this lease is in force here, and not over."""
        return self._bound() is lease and not lease.ended

    def _bound(self) -> Any:
        bound = self._state.get()
        if bound is None:
            request = RequestScope.current.get()
            bound = None if request is None else request.leases.get(self)
        return bound

    def bound_lease(self) -> Lease | None:
        """As `lease()`, but without the request's: that of a call or block around this code."""
        return self.lease() if self._state.get() is not None else None

    @property
    def bound(self) -> bool:
        """Whether a lease, or another state, is in force in this context, perhaps one that is over:
        then the thread's own isn't.
        """
        return self._bound() is not None

    def own_cell(self) -> dict[str, Any]:
        """Peewee's state of this thread's own connection, whatever lease is in force."""
        return self._thread_cell()

    def own_lease(self) -> Lease | None:
        """The lease in force here, or None, also if it is over."""
        bound = self._bound()
        return bound if isinstance(bound, Lease) and not (bound.ended or bound.foreign) else None

    def bind(self, bound: Lease | None) -> Token[Any]:
        return self._state.set(bound)

    @property
    def homeless(self) -> bool:
        """Whether this is a place in a request that holds no connection."""
        if self._state.get() is not None:
            return False
        request = RequestScope.current.get()
        return request is not None and self not in request.leases

    def guard(self) -> None:
        """Raise where no query may run.

        Raises:
            BlockingQuery: here it would block the event loop of a server.
            NoLease: this is a place in a request that holds no connection.
        """
        self.guard_loop()
        if self.homeless:
            raise NoLease

    def guard_loop(self) -> None:
        """Refuse (in a request or under a lease) or warn (elsewhere) on a running event loop."""
        if _get_running_loop() is not None and not _sync_allowed.get():
            if self._state.get() is not None or RequestScope.current.get() is not None:
                raise BlockingQuery
            warnings.warn(
                str(BlockingQuery()), BlockingQueryWarning, stacklevel=_distance_to_caller()
            )

    def reset(self) -> None:
        if self.homeless:
            # Peewee's `connect()` resets before it connects: refusing here leaks no connection.
            raise NoLease
        super().reset()

    def cell(self) -> dict[str, Any]:
        """What Peewee's state is kept in here, which stays the same if the lease ends meanwhile."""
        bound = self._state.get()
        if bound is None:
            request = RequestScope.current.get()
            if request is None:
                return self._thread_cell()
            bound = request.leases.get(self)
            if bound is None:
                return closed_state()
        if isinstance(bound, Lease):
            bound.check()
            return bound.state
        return bound

    def _thread_cell(self) -> dict[str, Any]:
        thread = self._thread
        if getattr(thread, "generation", None) != _generation:
            if hasattr(thread, "cell"):
                _inherited.append(thread.cell)
            thread.cell, thread.generation = closed_state(), _generation
        return thread.cell

    def __getattr__(self, name: str) -> Any:
        # Called for names that aren't found otherwise: of Peewee's state, all but `conn`.
        try:
            return self.cell()[name]
        except KeyError:
            raise AttributeError(f"Peewee's connection state has no attribute {name!r}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.cell()[name] = value

    @property
    def conn(self) -> Any:
        """The connection, for use: hence the guard."""
        self.guard()
        return self.cell()["conn"]


@contextmanager
def allow_sync() -> Iterator[None]:
    """Allow synchronous queries on the event loop inside the block: for notebooks and consoles."""
    token = _sync_allowed.set(True)
    try:
        yield
    finally:
        _sync_allowed.reset(token)


class lazy_loads_forbidden:  # noqa: N801 (a context manager, called as a function is)
    """Raise `LazyLoad` if this thread runs a query inside, while it validates a response.

    Args:
        endpoint: whose response it is.
        why: if for another reason than that it is a query for each row.
    """

    __slots__ = ("_around", "_endpoint", "_error", "_why")

    def __init__(self, endpoint: str, why: str = "") -> None:
        self._endpoint, self._why = endpoint, why
        self._error: LazyLoad | None = None

    def __enter__(self) -> None:
        self._around, _validating.now = _validating.now, self

    def __exit__(self, *_: object) -> None:
        _validating.now = self._around
        error, self._error = self._error, None  # its traceback has this
        if error is not None:  # Pydantic has made one of its own of it
            try:
                raise error
            finally:
                del error

    def refuse(self) -> NoReturn:
        what, relation = _what_is_read()
        error = LazyLoad(what, self._endpoint, relation=relation, why=self._why)
        self._error = self._error or error
        try:
            raise error
        finally:
            del error


class _Validating(threading.local):
    now: lazy_loads_forbidden | None = None


_validating = _Validating()


def forbid_lazy_load() -> None:
    """Called before a query runs."""
    if _validating.now is not None:
        _validating.now.refuse()


def _what_is_read() -> tuple[str, bool]:
    """The relation whose access makes Peewee run a query, or else the query, and which of the two
    it is: what the frames above say.
    """
    found, frame = ("Something", False), _getframe(3)
    while frame.f_back is not None:
        it = frame.f_locals.get("self")
        if isinstance(it, ForeignKeyAccessor) and "instance" in frame.f_locals:
            return f"{type(frame.f_locals['instance']).__name__}.{it.name}", True
        if isinstance(it, peewee.ModelSelect):
            found = f"A query of {it.model.__name__}", False
            field = getattr(it._where, "lhs", None)
            if isinstance(field, peewee.ForeignKeyField) and it.model is field.model:
                found = f"{field.rel_model.__name__}.{field.backref}", True
        frame = frame.f_back
    return found


_OURS = os.path.dirname(__file__) + os.sep
_PEEWEES = (
    peewee.__file__,
    os.path.join(os.path.dirname(peewee.__file__), "playhouse") + os.sep,
)
_NOT_THE_CALLER = (_OURS, *_PEEWEES)


def _distance_to_caller() -> int:
    """The `stacklevel` of the first frame that is neither ours nor Peewee's."""
    frame, level = _getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        frame, level = frame.f_back, level + 1
    return level


def caller() -> FrameType:
    """The first frame that is neither ours nor Peewee's."""
    return _getframe(_distance_to_caller() - 1)


def called_by_suspended() -> str | None:
    """Of which package a server is that runs the calling generator step by step, each in some
    thread; None if none does.

    Such are sync `yield` dependencies, which anyio runs, and streams, whatever they use: an
    `ExitStack`, say, or the user's own context manager. That may be a generator as well, but isn't
    one that a server runs: elsewhere the code inside its `with` runs in the same thread.
    """
    below, frame = _getframe(0), _getframe(1)
    while frame.f_back is not None:
        package, _, inside = str(frame.f_globals.get("__name__")).partition(".")
        if inside and package in ("anyio", "starlette", "fastapi"):
            return package if below.f_code.co_flags & CO_GENERATOR else None
        if package != "contextlib":
            below = frame
        frame = frame.f_back
    return None


def called_by_stream() -> bool:
    """Whether this is called by an async generator that somebody reads, such as a stream: not by a
    dependency or another context manager, whose generator `contextlib` runs.

    Any response, in any task, may be the reader, and other generators may be in between: it's the
    outermost one that counts.
    """
    streams, frame = False, _getframe(1)
    while frame.f_back is not None:
        package, _, inside = str(frame.f_back.f_globals.get("__name__")).partition(".")
        if frame.f_code.co_flags & CO_ASYNC_GENERATOR:
            streams = package != "contextlib"
        if inside and package in ("starlette", "fastapi"):
            break
        frame = frame.f_back
    return streams


def called_by_peewee() -> bool:
    """Whether the first caller that isn't ours is Peewee."""
    frame = _getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(_PEEWEES)
