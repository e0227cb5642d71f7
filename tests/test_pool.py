"""The pool: which connection a lease gets, and what becomes of it. Mostly with a driver of ours."""

import asyncio
import gc
import logging
import math
import os
import threading
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastapi_peewee import (
    Database,
    DatabaseUnavailable,
    PoolClosed,
    PoolTimeout,
    TooManyWaiting,
    connect,
)
from fastapi_peewee.pool import CHECK_AFTER, Pool
from fastapi_peewee.state import Lease
from tests.apps import connected, until

LONG = 30.0


@dataclass
class Driver:
    """Connections are numbers. `dead` fail their check, `dirty` can't be cleaned."""

    opened: list[int] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    cleaned: list[int] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)
    dirty: set[int] = field(default_factory=set)
    interrupted: list[int] = field(default_factory=list)
    were_cut: list[int] = field(default_factory=list)
    #: Whether one that was cut goes on.
    goes_on: bool = False
    unreachable: bool = False
    #: The time that the last attempt to connect, or the last question, had.
    limit: float = 0.0
    #: The time that was left of it when the session was prepared.
    prepared_within: float = 0.0

    connect_timeout: float = 5.0
    if_unreachable: str = "Is there a route?"

    def open_connection(self, limit: float) -> int:
        self.limit = limit
        if self.unreachable:
            raise OSError("no route to host")
        self.opened.append(len(self.opened))
        return self.opened[-1]

    def close_connection(self, conn: int) -> None:
        self.closed.append(conn)

    def is_alive(self, conn: int, limit: float) -> bool:
        self.limit = limit
        self.checked.append(conn)
        return conn not in self.dead

    def prepare_session(self, conn: int, statement_timeout: float | None, limit: float) -> None:
        self.prepared_within = limit

    def is_open(self, conn: int) -> bool:
        return conn not in self.dead

    def interrupt(self, conn: int) -> bool:
        self.interrupted.append(conn)
        return conn not in self.dirty

    def cut(self, conn: int) -> bool:
        self.were_cut.append(conn)
        return self.goes_on

    def clean(self, conn: int, lease: Lease) -> bool:
        self.cleaned.append(conn)
        if conn in self.dirty:
            raise OSError("connection lost")
        return not lease.tainted


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(driver: Driver, clock: Clock) -> Iterator[Pool]:
    pool = Pool(driver, size=2, timeout=LONG, max_waiting=1, max_lifetime=60, clock=clock)
    yield pool
    while taken:
        lease = taken.pop()
        if not lease.ended:
            pool.give_back(lease)


def of_one(driver: Driver, **options: Any) -> Pool:
    """A pool of one connection."""
    settings = {"size": 1, "timeout": LONG, "max_waiting": 1, "max_lifetime": 60}
    return Pool(driver, **{**settings, **options})


#: The leases of a test; those that it doesn't give back itself go back in the end.
taken: list[Lease] = []


def take(pool: Pool) -> Lease:
    lease = pool.acquire_blocking()
    taken.append(lease)
    try:
        pool.connect(lease)
    except BaseException:
        pool.give_back(lease)
        raise
    return lease


def test_nothing_is_opened_before_it_is_needed(pool: Pool, driver: Driver) -> None:
    """A lease opens no connection until it is connected, and only one."""
    lease = pool.acquire_blocking()
    assert driver.opened == []
    pool.connect(lease)
    pool.connect(lease)
    assert driver.opened == [0]
    assert lease.state["conn"] == 0
    pool.give_back(lease)


def test_the_connection_used_last_is_used_next(pool: Pool, driver: Driver) -> None:
    """An idle connection is reused, the most recently used one first."""
    first, second = take(pool), take(pool)
    pool.give_back(second)
    pool.give_back(first)
    assert take(pool).state["conn"] == 0
    assert driver.opened == [0, 1]


def test_a_connection_in_steady_use_is_never_checked(
    pool: Pool, driver: Driver, clock: Clock
) -> None:
    """No round trip is spent on a connection that was used within the last second."""
    pool.give_back(take(pool))
    clock.now += CHECK_AFTER * 0.9
    pool.give_back(take(pool))
    assert driver.checked == []


def test_a_connection_that_has_idled_is_checked(pool: Pool, driver: Driver, clock: Clock) -> None:
    """After a second of idling a connection is checked, and used if it is alive."""
    pool.give_back(take(pool))
    clock.now += CHECK_AFTER
    assert take(pool).state["conn"] == 0
    assert driver.checked == [0]


def test_dead_connections_are_replaced(pool: Pool, driver: Driver, clock: Clock) -> None:
    """Idle connections that fail their check are closed, and a new one is opened."""
    first, second = take(pool), take(pool)
    pool.give_back(first)
    pool.give_back(second)
    driver.dead = {0, 1}
    clock.now += CHECK_AFTER
    assert take(pool).state["conn"] == 2
    assert sorted(driver.closed) == [0, 1]
    assert pool.stats.discarded == 2


def test_an_old_connection_is_replaced_when_it_comes_back(
    pool: Pool, driver: Driver, clock: Clock
) -> None:
    """A connection older than `max_lifetime` is closed when it is given back."""
    lease = take(pool)
    clock.now += 60
    pool.give_back(lease)
    assert driver.closed == [0]
    assert pool.stats.idle == 0


@pytest.mark.parametrize("fault", ["tainted", "broken"])
def test_what_cant_be_cleaned_is_closed(pool: Pool, driver: Driver, fault: str) -> None:
    """A connection that is not as good as new after cleaning isn't lent again."""
    lease = take(pool)
    if fault == "tainted":
        lease.tainted = True
    else:
        driver.dirty.add(0)
    pool.give_back(lease)
    assert driver.cleaned == [0]
    assert driver.closed == [0]
    assert pool.stats == (0, 0, 0, 1, 1, 0, 0)


def test_a_failed_connection_attempt_gives_its_slot_back(
    pool: Pool, driver: Driver, clock: Clock
) -> None:
    """With the database away, each attempt fails with `DatabaseUnavailable` and costs no slot."""
    driver.unreachable = True
    for _ in range(3 * pool.size):
        clock.now += 1
        with pytest.raises(DatabaseUnavailable) as failure:
            take(pool)
        assert isinstance(failure.value.__cause__, OSError)
    assert pool.stats.in_use == 0
    driver.unreachable = False
    clock.now += 1
    assert take(pool).state["conn"] == 0


def test_an_outage_is_logged_once_and_each_error_has_its_cause(
    pool: Pool, driver: Driver, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning as the database counts as away, without the driver's words, which DEBUG has, and
    one as it is back. Who is refused meanwhile learns the driver's words as well."""
    caplog.set_level(logging.DEBUG, "fastapi_peewee")
    driver.unreachable = True
    for _ in range(5):
        clock.now += 1
        with pytest.raises(DatabaseUnavailable, match="a new connection failed"):
            take(pool)
    with pytest.raises(DatabaseUnavailable, match=r"one at a time.* Is there a route\?") as refused:
        take(pool)
    assert str(refused.value.__cause__) == "OSError: no route to host"
    driver.unreachable = False
    clock.now += 1
    for _ in range(2):
        take(pool)
    warned = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING]
    away, back = warned
    assert away.startswith("The database can't be reached.")
    assert back == "The database can be reached again."
    reasons = [str(line.exc_info[1]) for line in caplog.records if line.exc_info]
    assert reasons == ["no route to host"] * 5


async def test_waiting_is_bounded_in_time_and_in_number(driver: Driver) -> None:
    """Past `timeout` a caller gets `PoolTimeout`, past `max_waiting` `TooManyWaiting` at once."""
    pool = of_one(driver, timeout=0.01)
    lease = await pool.acquire()
    with pytest.raises(PoolTimeout, match=r"0\.01 s; all 1 are in use"):
        await pool.acquire()
    pool.timeout = LONG
    waiting = asyncio.create_task(pool.acquire())
    while not pool.stats.waiting:
        await asyncio.sleep(0)
    with pytest.raises(TooManyWaiting):
        await pool.acquire()
    with pytest.raises(TooManyWaiting):
        pool.acquire_blocking()
    pool.give_back(lease)
    pool.give_back(await waiting)
    assert pool.stats == (0, 0, 0, 0, 0, 1, 2)


async def test_draining_waits_for_what_is_in_use(pool: Pool, driver: Driver) -> None:
    """Draining sends waiters away, lets leases finish, closes all, and leaves a pool as new."""
    lease, idle = take(pool), take(pool)
    pool.give_back(idle)
    other = await pool.acquire()
    waiting = asyncio.create_task(pool.acquire())
    while not pool.stats.waiting:
        await asyncio.sleep(0)
    draining = asyncio.create_task(pool.drain(LONG))
    with pytest.raises(PoolClosed):
        await waiting
    with pytest.raises(PoolClosed):
        await pool.acquire()
    assert not draining.done()
    pool.give_back(lease)
    pool.give_back(other)
    assert await draining
    assert sorted(driver.closed) == [0, 1]
    assert take(pool).state["conn"] == 2


async def test_draining_doesnt_wait_for_ever(pool: Pool, driver: Driver, clock: Clock) -> None:
    """What is still in use when the grace is over is closed when it comes back."""
    lease = take(pool)
    assert not await pool.drain(0)
    assert driver.closed == []
    pool.give_back(lease)
    assert driver.closed == [0]
    assert pool.stats.in_use == 0


async def test_draining_that_is_cancelled_leaves_a_pool_as_new(pool: Pool, driver: Driver) -> None:
    """Whoever waits no longer has closed what was idle, and what is in use when it comes back; the
    pool's next use opens it again."""
    lease, idle = take(pool), take(pool)
    pool.give_back(idle)
    draining = asyncio.create_task(pool.drain(LONG))
    await asyncio.sleep(0)
    with pytest.raises(PoolClosed):
        await pool.acquire()
    draining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await draining
    until(lambda: driver.closed == [1])
    assert take(pool).state["conn"] == 2
    pool.give_back(lease)
    assert driver.closed == [1, 0]


async def test_of_two_that_drain_at_a_time_one_opens_the_pool_again(pool: Pool) -> None:
    """The slots and threads that are in use since then stay in use when the other one ends."""
    lease = take(pool)
    draining = asyncio.create_task(pool.drain(LONG))
    await asyncio.sleep(0)
    assert not await pool.drain(0)
    take(pool)
    workers = pool.workers
    pool.give_back(lease)
    assert await draining
    assert pool.stats.in_use == 1
    assert pool.workers is workers


def test_renewing_replaces_connections_in_use_too(pool: Pool, driver: Driver) -> None:
    """After `renew()` neither idle connections nor those in use are lent again."""
    in_use, idle = take(pool), take(pool)
    pool.give_back(idle)
    pool.renew()
    assert driver.closed == [1]
    pool.give_back(in_use)
    assert driver.closed == [1, 0]
    assert pool.stats.idle == 0


@pytest.mark.parametrize(
    "setting", [{"size": 0}, {"timeout": -1}, {"timeout": float("nan")}, {"max_waiting": -1}]
)
def test_impossible_settings_are_refused(driver: Driver, setting: dict[str, Any]) -> None:
    """A size, limit or time that makes no sense is a `ValueError` that quotes it."""
    settings = {"size": 1, "timeout": 1, "max_waiting": 1, "max_lifetime": 1, **setting}
    with pytest.raises(ValueError, match="got: "):
        Pool(driver, **settings)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_begins_with_a_pool_of_its_own(pool: Pool, driver: Driver) -> None:
    """A child neither uses nor closes the parent's connections, and has all slots."""
    in_use, idle = take(pool), take(pool)
    pool.give_back(idle)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stats = pool.stats
            fresh = take(pool), take(pool)
            pool.give_back(in_use)  # inherited: neither the child's slot nor its connection
            numbers = [lease.state["conn"] for lease in fresh]
            os.write(write, repr((stats.in_use, stats.idle, numbers, driver.closed)).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read, "rb") as pipe:
        assert pipe.read().decode() == "(0, 0, [2, 3], [])"
    pool.give_back(in_use)
    assert pool.stats[:2] == (0, 2)


def test_a_connection_outlives_the_lease_that_was_dropped(driver: Driver) -> None:
    """The collector doesn't take it along: PyMySQL's would be closed while it is given back."""

    class Conn:
        def __del__(self) -> None:
            collected.append(1)

    collected: list[int] = []
    driver.open_connection = lambda _: Conn()  # type: ignore[method-assign, return-value, assignment]
    pool = of_one(driver)
    lease = pool.acquire_blocking()
    pool.connect(lease)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del lease
        gc.collect()
        until(lambda: pool.stats.in_use == 0)
    assert pool.stats.idle == 1
    assert collected == []
    assert pool._lent == set()


@pytest.mark.parametrize("threshold", [None, 60.0])
def test_a_lease_that_was_dropped_is_given_back_and_told(
    driver: Driver, threshold: float | None
) -> None:
    """The collector's thread does what nobody did; the warning has the place where that is known.

    Here in a thread that one can look into; `test_leaks` has the collector's.
    """
    pool = of_one(driver, leak_detection_threshold=threshold)
    lease = pool.acquire_blocking()
    pool.connect(lease)
    with pytest.warns(ResourceWarning, match="dropped without being given back") as warned:
        lease.dropped(lease)
    assert lease.ended
    assert pool.stats[:2] == (0, 1)
    hint = "leak_detection_threshold=" if threshold is None else "pool.acquire_blocking()"
    assert hint in str(warned[0].message)


def test_a_connection_that_an_interrupt_may_still_hit_is_not_used_again(
    pool: Pool, driver: Driver
) -> None:
    """Where the database can't say that the interrupt has come, the connection is closed."""
    lease = pool.acquire_blocking()
    pool.interrupt(lease)  # before it has one
    pool.wear_out(lease)
    assert driver.interrupted == []
    pool.connect(lease)
    pool.interrupt(lease)
    pool.give_back(lease)
    lease = take(pool)
    assert lease.state["conn"] == 0
    driver.dirty.add(0)
    pool.interrupt(lease)
    driver.dirty.clear()
    pool.give_back(lease)
    assert (driver.interrupted, driver.closed) == ([0, 0], [0])


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_a_connection_that_cant_be_prepared_is_closed(
    pool: Pool, driver: Driver, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """It is lent to nobody, and its slot is free."""

    def prepare(conn: int, statement_timeout: float | None, limit: float) -> None:
        raise error

    monkeypatch.setattr(driver, "prepare_session", prepare)
    with pytest.raises(DatabaseUnavailable if error is OSError else ValueError):
        take(pool)
    assert (driver.closed, pool.stats.in_use) == ([0], 0)
    monkeypatch.undo()
    assert take(pool).state["conn"] == 1


def test_a_connection_that_cant_be_closed_is_gone_all_the_same(
    pool: Pool, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saying goodbye to a server that is away fails, and hurts nobody."""

    def close(conn: int) -> None:
        raise OSError("broken pipe")

    monkeypatch.setattr(driver, "close_connection", close)
    lease = take(pool)
    pool.wear_out(lease)
    pool.give_back(lease)
    assert pool.stats == (0, 0, 0, 1, 1, 0, 0)


def test_a_connection_that_can_neither_be_prepared_nor_closed(
    pool: Pool, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the two errors counts, for its caller and for the breaker."""

    def fail(*_: Any) -> None:
        raise ValueError("the second")

    def prepare(conn: int, statement_timeout: float | None, limit: float) -> None:
        raise OSError("the first")

    monkeypatch.setattr(driver, "prepare_session", prepare)
    monkeypatch.setattr(driver, "close_connection", fail)
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match="a new connection failed"):
            take(pool)
    with pytest.raises(DatabaseUnavailable, match="one at a time"):
        take(pool)


# The names of playhouse.pool, on real databases.


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with connected(database_url) as db:
        both = threading.Barrier(2)
        await asyncio.gather(db.run(both.wait), db.run(both.wait))  # opens two connections
        assert db.pool_stats.idle == 2
        yield db


async def answers(db: Database) -> bool:
    return (await db.aexecute_sql("SELECT 1")).fetchone() == (1,)


async def test_close_idle(db: Database) -> None:
    """`close_idle()` closes what nobody uses; what is in use goes on, and is kept afterwards."""
    async with db.connection_context():
        assert await answers(db)
        db.close_idle()
        assert db.pool_stats.idle == 0
        assert await answers(db)
    assert db.pool_stats.idle == 1
    assert db.pool_stats.opened == 2


async def test_close_all(db: Database) -> None:
    """`close_all()` closes what nobody uses now, and what is in use when it comes back."""
    async with db.connection_context():
        assert await answers(db)
        db.close_all()
        assert db.pool_stats.idle == 0
        assert await answers(db)
    assert db.pool_stats.idle == 0
    assert await answers(db)
    assert db.pool_stats.opened == 3


async def test_manual_close(db: Database) -> None:
    """`manual_close()` has the connection in use closed when it comes back, and only that one."""
    async with db.connection_context():
        assert await answers(db)
        assert await db.run(db.manual_close) is True
        assert await answers(db)
    assert db.pool_stats.idle == 1
    assert await answers(db)
    assert db.pool_stats.opened == 2


def test_manual_close_outside_of_a_lease(database_url: str) -> None:
    """For synchronous code `manual_close()` closes this thread's connection, as `close()` does."""
    db = connect(database_url)
    assert db.manual_close() is False
    db.connect()
    assert db.manual_close() is True
    assert db.is_closed()


def test_while_the_database_is_away_one_at_a_time_asks_for_it(
    pool: Pool, driver: Driver, clock: Clock
) -> None:
    """After a failed attempt the next ones fail at once, until a pause is over."""
    driver.unreachable = True
    attempts = 0

    def refuse(limit: float) -> int:
        nonlocal attempts
        attempts += 1
        raise OSError("no route to host")

    driver.open_connection = refuse  # type: ignore[method-assign]
    for _ in range(1000):
        with pytest.raises(DatabaseUnavailable):
            take(pool)
        clock.now += 0.01  # ten seconds in all
    assert 10 / 0.41 < attempts < 60
    assert pool.stats.in_use == 0


@pytest.mark.parametrize("connect_timeout", [0.05, 0.001])
def test_with_little_time_to_connect_a_failure_is_no_end(
    pool: Pool, driver: Driver, clock: Clock, connect_timeout: float
) -> None:
    """However small `connect_timeout` is, somebody tries again after a failure."""
    driver.connect_timeout, driver.unreachable = connect_timeout, True
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable):
            take(pool)
    driver.unreachable = False
    clock.now += 0.5
    pool.give_back(take(pool))


def test_when_one_connection_is_lost_the_idle_ones_are_asked(
    pool: Pool, driver: Driver, clock: Clock
) -> None:
    """A connection that was lost in use makes those doubtful that lay idle then, however short."""
    first, second = take(pool), take(pool)
    pool.give_back(second)
    clock.now += 0.01
    driver.dead, driver.dirty = {0, 1}, {0}
    pool.give_back(first)
    clock.now += 0.01
    third = take(pool)
    assert (third.state["conn"], driver.checked) == (2, [1])
    pool.give_back(third)
    assert take(pool).state["conn"] == 2
    assert driver.checked == [1]


async def test_who_has_waited_has_the_rest_of_the_time_to_connect(
    driver: Driver, clock: Clock
) -> None:
    """Waiting for a slot and connecting together take no longer than `timeout`; who hasn't waited
    has all of `connect_timeout`."""
    pool = of_one(driver, timeout=10, clock=clock)
    first = take(pool)
    assert driver.limit == driver.connect_timeout
    for waited, left in ((2, driver.connect_timeout), (7, 3), (10, 0.05)):
        waiting = asyncio.ensure_future(pool.acquire())
        await asyncio.sleep(0)
        clock.now += waited
        pool.wear_out(first)
        pool.give_back(first)
        first = await waiting
        pool.connect(first)
        assert driver.limit == left
    pool.give_back(first)


def test_preparing_a_session_is_a_part_of_opening_a_connection(
    driver: Driver, clock: Clock
) -> None:
    """It has what is left of the time that there is for both."""
    pool, open_connection = of_one(driver, timeout=10, clock=clock), driver.open_connection

    def slow(limit: float) -> int:
        clock.now += 0.75
        return open_connection(limit)

    driver.open_connection = slow  # type: ignore[method-assign]
    for patience, left in ((math.inf, 4.25), (1.0, 0.25), (0.75, 0.05)):
        lease = pool.acquire_blocking()
        lease.patience = patience
        pool.connect(lease)
        assert driver.prepared_within == left
        pool.wear_out(lease)
        pool.give_back(lease)


def test_a_silent_connection_takes_half_of_the_time(
    pool: Pool, driver: Driver, clock: Clock
) -> None:
    """A connection that doesn't answer is replaced in the other half. Nothing is asked of the
    others, which may be as silent, until somebody needs them."""
    asked: list[float] = []

    def silent(conn: int, limit: float) -> bool:
        asked.append(limit)
        clock.now += limit
        return False

    both = [take(pool), take(pool)]
    for lease in both:
        pool.give_back(lease)
    clock.now += 2
    driver.is_alive = silent  # type: ignore[method-assign]
    take(pool)
    assert asked == [2.5]
    assert driver.limit == 2.5
    assert pool.stats.idle == 1


def test_who_had_hardly_any_time_says_nothing_about_the_database(
    driver: Driver, clock: Clock
) -> None:
    """An attempt that ends since its caller's time is over doesn't count as a failure."""
    pool = of_one(driver, timeout=10, clock=clock)

    def silent(limit: float) -> int:
        clock.now += limit
        raise OSError("timed out")

    open_connection, driver.open_connection = driver.open_connection, silent  # type: ignore[method-assign]
    lease = pool.acquire_blocking()
    lease.patience = 1.0
    for _ in range(5):
        with pytest.raises(DatabaseUnavailable, match="a new connection failed"):
            pool.connect(lease)
    driver.open_connection = open_connection  # type: ignore[method-assign]
    pool.connect(lease)
    pool.give_back(lease)


def test_a_connection_that_was_cut_is_not_used_again(driver: Driver, clock: Clock) -> None:
    """Even if it looks alive: what was on its way may still come."""
    pool = of_one(driver, statement_timeout=1, transaction_timeout=5, clock=clock)
    assert pool._watchdog is not None
    lease = take(pool)
    with pool.waiting(lease):
        clock.now += 0.9
        pool._watchdog.look()
        assert driver.were_cut == []  # the database may end it by itself
        clock.now += 0.2
        pool._watchdog.look()
        pool._watchdog.look()
        assert driver.were_cut == [0]
        assert "aborted" not in {key for key, value in lease.state.items() if value}
    pool.give_back(lease)
    lease = take(pool)
    assert lease.state["conn"] == 1

    pool.transaction(lease, begun=True)
    clock.now += 5.3
    pool._watchdog.look()
    assert driver.were_cut == [0, 1]
    assert "transaction_timeout" in str(lease.state["aborted"])
    pool.give_back(lease)


def test_a_connection_that_was_cut_and_goes_on_ends_with_its_lease(
    driver: Driver, clock: Clock
) -> None:
    """It is watched as before until then, and what it did isn't held against the next transaction
    of the lease, not even if it is cut as the transaction ends."""
    driver.goes_on = True
    pool = of_one(driver, statement_timeout=1, transaction_timeout=5, clock=clock)
    assert pool._watchdog is not None
    lease = take(pool)
    for _ in range(2):
        pool.transaction(lease, begun=True)
        clock.now += 5.3
        pool._watchdog.look()
        assert "transaction_timeout" in str(lease.state["aborted"])
        lease.state["aborted"] = None  # as the first step of its end
        driver.were_cut.clear()
        pool._watchdog.look()
        assert driver.were_cut[0] == 0
        pool.transaction(lease, begun=False)
        assert lease.state["aborted"] is None
    pool.give_back(lease)
    assert driver.closed == [0]


def test_a_connection_that_cannot_be_watched_is_closed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started for its limits, it isn't used without them, nor kept."""

    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = of_one(driver, statement_timeout=1)
    lease = pool.acquire_blocking()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"):
        patch.setattr(threading.Thread, "start", full)
        pool.connect(lease)
    pool.give_back(lease)
    assert driver.closed == driver.opened == [0]
    pool.give_back(take(pool))
    assert pool.stats.idle == 1


@pytest.mark.parametrize("name", ["statement_timeout", "transaction_timeout"])
def test_limits_are_checked(name: str, driver: Driver) -> None:
    """A limit of no time is a mistake, and said to be one."""
    with pytest.raises(ValueError, match=rf"{name} must be more than 0 seconds or None, got: 0"):
        of_one(driver, **{name: 0})
