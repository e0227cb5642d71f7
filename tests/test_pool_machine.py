"""The pool against a model of it, in random histories: tasks, threads, faults, a clock of ours.

`MACHINE_STEPS=100000` says how many steps to take; by default they are few.
"""

import asyncio
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fastapi_peewee import DatabaseUnavailable, PoolClosed, PoolTimeout, TooManyWaiting
from fastapi_peewee.pool import CHECK_AFTER, Pool
from fastapi_peewee.state import Lease
from tests.test_pool import Driver

# Threads wait by the clock on the wall: longer than any history takes.
SIZE, MAX_WAITING, TIMEOUT, LIFETIME = 2, 3, 1000.0, 1500.0
STEPS_AT_ONCE = 50


def machine_settings() -> settings:
    steps = int(os.environ.get("MACHINE_STEPS", "0")) or 8 * settings().max_examples
    # A planted bug needs no smallest history that shows it.
    shrinks = "MACHINE_ANY" not in os.environ
    return settings(
        phases=settings().phases if shrinks else [Phase.generate],
        max_examples=max(1, steps // STEPS_AT_ONCE),
        stateful_step_count=STEPS_AT_ONCE,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose time goes on only when it is told to."""

    now = 0.0

    def time(self) -> float:
        return self.now


@dataclass(eq=False)
class Conn:
    """What the model knows of a connection."""

    number: int
    opened_at: float
    used_at: float
    worn: bool = False


@dataclass(eq=False)
class Held:
    """A lease, in the model."""

    lease: Lease
    conn: Conn | None = None
    #: It is of the pool that was there before the last drain.
    of_before: bool = False
    #: It was waited for so long that hardly any time is left to connect.
    hurried: bool = False


@dataclass(eq=False)
class Waiter:
    """Somebody who waits for a lease: a task, or a thread."""

    begun: float
    deadline: float
    task: asyncio.Task[Lease] | None = None
    thread: threading.Thread | None = None
    #: What the thread got.
    outcome: list[Any] = field(default_factory=list)


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()
        self.driver = Driver()
        self.pool = Pool(
            self.driver,
            size=SIZE,
            timeout=TIMEOUT,
            max_waiting=MAX_WAITING,
            max_lifetime=LIFETIME,
            clock=self.loop.time,
        )
        self.leases: list[Held] = []
        self.idle: list[Conn] = []
        self.queue: list[Waiter] = []
        self.opened = self.discarded = self.timed_out = self.refused = 0
        self.draining: asyncio.Task[bool] | None = None
        self.drained_by = 0.0
        #: When a connection was last found dead, and when an attempt at a new one last failed.
        self.doubted_at = self.failed_at = float("-inf")
        #: How many attempts have failed since one succeeded.
        self.failures = 0

    # Helpers: the model's half of what happens.

    @property
    def in_use(self) -> int:
        return sum(not held.of_before for held in self.leases)

    @property
    def can_enter(self) -> bool:
        return self.in_use < SIZE and not self.queue

    def settle(self) -> None:
        """Let the event loop do what there is to do at this moment."""

        async def rounds() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        self.loop.run_until_complete(rounds())

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for other threads."""
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            self.settle()

    def granted(self, waiter: Waiter) -> None:
        """It has a lease now."""
        if waiter.task is not None:
            self.settle()
            lease = waiter.task.result()
        else:
            assert waiter.thread is not None
            waiter.thread.join(30)
            [lease] = waiter.outcome
        assert isinstance(lease, Lease)
        # A thread, which waits by the clock on the wall, may get one after its time.
        hurried = waiter.begun + TIMEOUT <= self.loop.now
        self.leases.append(Held(lease, hurried=hurried))

    def sent_away(self, waiter: Waiter, error: type[Exception]) -> None:
        if waiter.task is not None:
            self.settle()
            assert type(waiter.task.exception()) is error
        else:
            assert waiter.thread is not None
            waiter.thread.join(30)
            assert [type(found) for found in waiter.outcome] == [error]

    def discard(self, conn: Conn, *, counts: bool = True) -> None:
        assert self.driver.closed.count(conn.number) == 1
        self.discarded += counts

    def returned(self, held: Held) -> None:
        """What becomes of the connection of a lease that was given back just now."""
        self.leases.remove(held)
        conn = held.conn
        if conn is None:
            return
        clean = not held.lease.tainted and conn.number not in self.driver.dirty
        if not clean and conn.number in self.driver.dead:
            self.doubted_at = self.loop.now
        if clean and not conn.worn and self.loop.now - conn.opened_at < LIFETIME:
            conn.used_at = self.loop.now
            self.idle.append(conn)
        else:
            self.discard(conn)

    # Rules

    @initialize(count=st.integers(0, SIZE + MAX_WAITING))
    def begin_busy(self, count: int) -> None:
        for _ in range(count):
            self.acquire()

    @rule()
    def acquire(self) -> None:
        task = self.loop.create_task(self.pool.acquire())
        waiter = Waiter(self.loop.now, self.loop.now + TIMEOUT, task)
        self.settle()
        self._asked(waiter)

    @rule()
    def acquire_in_a_thread(self) -> None:
        waiter = Waiter(self.loop.now, float("inf"))

        def ask() -> None:
            try:
                waiter.outcome.append(self.pool.acquire_blocking())
            except Exception as error:
                waiter.outcome.append(error)

        waiter.thread = threading.Thread(target=ask)
        waiting = self.pool.stats.waiting
        waiter.thread.start()
        self.until(lambda: bool(waiter.outcome) or self.pool.stats.waiting > waiting)
        self._asked(waiter)

    def _asked(self, waiter: Waiter) -> None:
        if self.draining is not None:
            self.sent_away(waiter, PoolClosed)
        elif self.can_enter:
            self.granted(waiter)
        elif len(self.queue) == MAX_WAITING:
            self.sent_away(waiter, TooManyWaiting)
            self.refused += 1
        else:
            assert not waiter.outcome
            assert waiter.task is None or not waiter.task.done()
            self.queue.append(waiter)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def connect(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.leases))
        if held.conn is not None:
            self.pool.connect(held.lease)
            return
        found = None
        while self.idle and found is None:
            conn = self.idle.pop()
            if not self.is_doubtful(conn) or conn.number not in self.driver.dead:
                found = conn
            else:
                self.discarded += 1
                self.doubted_at = self.loop.now
        # After two failures nobody tries for a moment, which is over when time has passed here. Who
        # has hardly any time left doesn't try after one.
        refused = self.failures > 1 and self.failed_at == self.loop.now
        refused = refused or (held.hurried and self.failures > 0)
        if found is None and (self.driver.unreachable or refused):
            with pytest.raises(DatabaseUnavailable):
                self.pool.connect(held.lease)
            if not refused:
                self.failed_at, self.failures = self.loop.now, self.failures + 1
            return
        self.pool.connect(held.lease)
        if found is None:
            self.opened += 1
            self.failures = 0
            found = Conn(self.driver.opened[-1], self.loop.now, self.loop.now)
        held.conn = found

    def is_doubtful(self, conn: Conn) -> bool:
        """Whether it has to be asked before it is used."""
        idle = self.loop.now - conn.used_at
        return conn.used_at < self.doubted_at or idle >= CHECK_AFTER

    @precondition(lambda self: any(held.conn is None for held in self.leases))
    @rule(data=st.data())
    def connect_at_once(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from([held for held in self.leases if held.conn is None]))
        there = bool(self.idle) and not self.is_doubtful(self.idle[-1])
        assert self.pool.connect_at_once(held.lease) is there
        if there:
            held.conn = self.idle.pop()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), tainted=st.booleans())
    def give_back(self, data: st.DataObject, tainted: bool) -> None:
        held = data.draw(st.sampled_from(self.leases))
        held.lease.tainted = tainted
        self.pool.give_back(held.lease)
        self.returned(held)
        if self.queue and not held.of_before:
            self.granted(self.queue.pop(0))

    @precondition(lambda self: self.queue and self.queue[0].task and self.in_use)
    @rule(data=st.data())
    def give_back_to_one_that_is_cancelled(self, data: st.DataObject) -> None:
        """It was granted the slot, and is cancelled before it runs again: the next one has it."""
        held = data.draw(st.sampled_from([held for held in self.leases if not held.of_before]))
        self.pool.give_back(held.lease)
        self.returned(held)
        first = self.queue.pop(0)
        assert first.task is not None
        first.task.cancel()
        self.settle()
        assert first.task.cancelled()
        if self.queue:
            self.granted(self.queue.pop(0))

    @precondition(lambda self: any(waiter.task for waiter in self.queue))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from([each for each in self.queue if each.task]))
        assert waiter.task is not None
        waiter.task.cancel()
        self.settle()
        assert waiter.task.cancelled()
        self.queue.remove(waiter)

    @rule(seconds=st.sampled_from([0.5, CHECK_AFTER, 4.0, TIMEOUT, LIFETIME]))
    def time_passes(self, seconds: float) -> None:
        self.time_goes_on(seconds)

    def time_goes_on(self, seconds: float) -> None:
        self.loop.now += seconds
        self.settle()
        for waiter in [each for each in self.queue if each.deadline <= self.loop.now]:
            self.queue.remove(waiter)
            self.sent_away(waiter, PoolTimeout)
            self.timed_out += 1
        self._finish_draining()

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def an_idle_connection_dies(self, data: st.DataObject) -> None:
        self.driver.dead.add(data.draw(st.sampled_from(self.idle)).number)

    @precondition(lambda self: any(held.conn for held in self.leases))
    @rule(data=st.data())
    def a_connection_in_use_dies(self, data: st.DataObject) -> None:
        conns = [held.conn.number for held in self.leases if held.conn]
        self.driver.dirty.add(data.draw(st.sampled_from(conns)))

    @rule()
    def the_database_goes_or_comes(self) -> None:
        self.driver.unreachable = not self.driver.unreachable

    @rule()
    def renew(self) -> None:
        self.pool.renew()
        self._closed_idle()
        self._wear_out_those_in_use()

    @rule()
    def close_idle(self) -> None:
        self.pool.close_idle()
        self._closed_idle()

    def _closed_idle(self) -> None:
        for conn in self.idle:
            self.discard(conn, counts=False)
        self.idle.clear()

    def _wear_out_those_in_use(self) -> None:
        self.failures = 0  # new connections may be opened in another way
        for held in self.leases:
            if held.conn is not None:
                held.conn.worn = True

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def wear_out(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.leases))
        self.pool.wear_out(held.lease)
        if held.conn is not None:
            held.conn.worn = True

    @precondition(lambda self: self.draining is None)
    @rule(grace=st.sampled_from([0.0, 5.0]))
    def drain(self, grace: float) -> None:
        self.draining = self.loop.create_task(self.pool.drain(grace))
        self.drained_by = self.loop.now + grace
        self.settle()
        for waiter in self.queue:
            self.sent_away(waiter, PoolClosed)
        self.queue.clear()
        self._finish_draining()

    def _finish_draining(self) -> None:
        if self.draining is None:
            return
        if self.in_use and self.loop.now < self.drained_by:
            assert not self.draining.done()
            return
        self.until(self.draining.done)
        assert self.draining.result() is (self.in_use == 0)
        self.draining = None
        self._closed_idle()
        self._wear_out_those_in_use()
        for held in self.leases:
            held.of_before = True

    @precondition(lambda self: hasattr(os, "fork"))
    @rule()
    def fork_aside(self) -> None:
        """A child has a pool of its own, as new, and leaves the parent's connections alone."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                self._in_the_child()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0

    def _in_the_child(self) -> None:
        closed = list(self.driver.closed)
        self.driver.unreachable = False
        assert self.pool.stats[:3] == (0, 0, 0)
        fresh = [self.pool.acquire_blocking() for _ in range(SIZE)]
        for lease in fresh:
            self.pool.connect(lease)
        for held in self.leases:
            self.pool.give_back(held.lease)
        assert self.pool.stats[:3] == (SIZE, 0, 0)
        assert len(self.driver.opened) == self.opened + SIZE
        for lease in fresh:
            self.pool.give_back(lease)
        assert self.pool.stats[:3] == (0, SIZE, 0)
        assert self.driver.closed == closed

    # What always holds

    @invariant()
    def counters_are_right(self) -> None:
        assert self.pool.stats == (
            self.in_use,
            len(self.idle),
            len(self.queue),
            self.opened,
            self.discarded,
            self.timed_out,
            self.refused,
        )

    @invariant()
    def every_connection_is_in_one_place(self) -> None:
        places = [held.conn.number for held in self.leases if held.conn]
        places += [conn.number for conn in self.idle]
        assert sorted(places + self.driver.closed) == self.driver.opened
        for held in self.leases:
            assert held.lease.state["conn"] == (held.conn and held.conn.number)

    @invariant()
    def there_are_never_too_many(self) -> None:
        of_before = sum(held.of_before and held.conn is not None for held in self.leases)
        connected = sum(held.conn is not None for held in self.leases) - of_before
        assert connected + len(self.idle) <= SIZE or of_before
        assert not self.queue or self.in_use == SIZE

    def teardown(self) -> None:
        try:
            while self.leases:
                held = self.leases.pop()
                self.pool.give_back(held.lease)
                if self.queue and not held.of_before:
                    self.granted(self.queue.pop(0))
            self.time_goes_on(2 * TIMEOUT)
            assert (self.pool.stats.in_use, self.pool.stats.waiting) == (0, 0)
        finally:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()


@pytest.mark.timeout(3600)
def test_the_pool_does_what_its_model_does() -> None:
    """In whatever order leases are taken, given back, cancelled, timed out, and connections die,
    are renewed, closed and drained: counters, connections and queue are as the model's."""
    run_state_machine_as_test(PoolMachine, settings=machine_settings())
