"""The gate: who gets in, in which order, and that no slot is ever lost."""

import asyncio
import math
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from fastapi_peewee import PoolClosed, TooManyWaiting
from fastapi_peewee.gate import Gate

LONG = 30.0


def at_rest(gate: Gate) -> bool:
    return (
        gate.held == 0
        and gate.waiting == 0
        and all(gate.acquire_nowait() for _ in range(gate.slots))
    )


async def until_waiting(gate: Gate, count: int) -> None:
    async with asyncio.timeout(LONG):
        while gate.waiting < count:
            await asyncio.sleep(0)


async def test_slots_are_given_in_the_order_in_which_they_were_asked_for() -> None:
    """Whoever asked first gets in first, also if somebody asks just as a slot becomes free."""
    gate = Gate(1)
    order: list[int] = []
    await gate.acquire(LONG)

    async def wait(number: int) -> None:
        await gate.acquire(LONG)
        order.append(number)
        gate.release()

    tasks = []
    for number in range(5):
        tasks.append(asyncio.create_task(wait(number)))
        await until_waiting(gate, number + 1)
    gate.release()
    assert not gate.acquire_nowait(), "a newcomer overtook those who wait"
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]
    assert at_rest(gate)


async def test_a_wait_ends_at_its_time_limit() -> None:
    """A waiter that runs out of time returns False and leaves the queue."""
    gate = Gate(1)
    await gate.acquire(LONG)
    assert not await gate.acquire(0.01)
    assert not await asyncio.to_thread(gate.acquire_blocking, 0.01)
    gate.release()
    assert at_rest(gate)


async def test_a_wait_may_be_without_a_limit() -> None:
    """Who waits at most infinitely long, task or thread, waits until it is let in."""
    gate = Gate(1, free=0)
    task = asyncio.create_task(gate.acquire(math.inf))
    thread = asyncio.create_task(asyncio.to_thread(gate.acquire_blocking, math.inf))
    while gate.waiting < 2 and not thread.done():
        await asyncio.sleep(0)
    for waiting in (task, thread):
        gate.release()
        assert await waiting
    gate.release()
    assert at_rest(gate)


async def test_the_queue_is_bounded() -> None:
    """With `max_waiting` in the queue, the next one is refused at once."""
    gate = Gate(1, max_waiting=1)
    await gate.acquire(LONG)
    waiting = asyncio.create_task(gate.acquire(LONG))
    await until_waiting(gate, 1)
    with pytest.raises(TooManyWaiting):
        await gate.acquire(LONG)
    with pytest.raises(TooManyWaiting):
        gate.acquire_blocking(LONG)
    gate.release()
    assert await waiting
    gate.release()
    assert at_rest(gate)


async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    """Cancelling a waiter that has no slot yet takes nothing from the others."""
    gate = Gate(1)
    await gate.acquire(LONG)
    first, second = (asyncio.create_task(gate.acquire(LONG)) for _ in range(2))
    await until_waiting(gate, 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert gate.waiting == 1
    gate.release()
    assert await second
    gate.release()
    assert at_rest(gate)


async def test_a_waiter_cancelled_after_the_grant_passes_its_slot_on() -> None:
    """A slot that was granted to a waiter which is cancelled at that moment isn't lost."""
    gate = Gate(1)
    await gate.acquire(LONG)
    first, second = (asyncio.create_task(gate.acquire(LONG)) for _ in range(2))
    await until_waiting(gate, 2)
    gate.release()  # grants to the first, whose task has not run yet
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second
    gate.release()
    assert at_rest(gate)


@contextmanager
def left_behind(gate: Gate) -> Iterator[None]:
    """A task that waits, of an event loop that is closed."""
    loop = asyncio.new_event_loop()
    abandoned = loop.create_task(gate.acquire(LONG))
    loop.run_until_complete(until_waiting(gate, 1))
    loop.close()
    yield
    abandoned.get_coro().close()
    abandoned._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_waiter_whose_loop_is_closed_is_passed_over() -> None:
    """A slot is not handed to a task of an event loop that exists no more."""
    gate = Gate(1, free=0)
    with left_behind(gate):
        gate.release()
        assert at_rest(gate)


class Late(Gate):
    """A slot becomes free after somebody has asked for one, and before he gets into the queue."""

    def acquire_nowait(self) -> bool:
        taken = super().acquire_nowait()
        if not taken:
            self.release()
        return taken


async def test_a_slot_that_becomes_free_on_the_way_to_the_queue_is_taken() -> None:
    """Nobody waits for a slot that is free already, since nobody would wake him."""
    assert await Late(1, free=0).acquire(LONG)
    assert Late(1, free=0).acquire_blocking(LONG)


@pytest.mark.parametrize("granted", [False, True])
def test_a_thread_that_is_interrupted_as_it_waits_keeps_no_slot(
    monkeypatch: pytest.MonkeyPatch, granted: bool
) -> None:
    """Ctrl-C takes the thread out of the queue; a slot that it was granted just then goes on."""
    gate = Gate(1, free=0)

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if granted:
                gate.release()
            raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Event", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        gate.acquire_blocking(LONG)
    if not granted:
        gate.release()
    assert at_rest(gate)


@pytest.mark.parametrize("granted", [False, True])
def test_a_thread_that_is_woken_from_outside_waits_no_longer(
    granted: bool,
) -> None:
    """It leaves the queue as if its time were over; a slot that it was granted just then is its
    own."""
    gate = Gate(1, free=0)

    class Woken(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            self.set()
            if granted:
                gate.release()
            return super().wait(timeout)

    assert gate.acquire_blocking(LONG, Woken()) is granted
    assert gate.waiting == 0
    gate.release()
    assert at_rest(gate)


def test_closing_passes_over_a_loop_that_is_closed() -> None:
    """Those who wait elsewhere are sent away all the same."""
    gate = Gate(1, free=0)
    with left_behind(gate), ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(gate.acquire_blocking, LONG)
        asyncio.run(until_waiting(gate, 2))
        gate.close()
        with pytest.raises(PoolClosed):
            waiting.result()


async def test_closing_sends_everybody_away() -> None:
    """Who waits when the gate is closed, and who asks afterwards, gets `PoolClosed`."""
    gate = Gate(1)
    await gate.acquire(LONG)
    task = asyncio.create_task(gate.acquire(LONG))
    thread = asyncio.create_task(asyncio.to_thread(gate.acquire_blocking, LONG))
    await until_waiting(gate, 2)
    gate.close()
    for waiter in (task, thread):
        with pytest.raises(PoolClosed):
            await waiter
    with pytest.raises(PoolClosed):
        gate.acquire_nowait()
    gate.release()
    assert gate.held == 0


@contextmanager
def holding(gate: Gate, inside: list[int], peak: list[int]) -> Iterator[None]:
    inside.append(1)
    peak.append(len(inside))
    try:
        yield
    finally:
        inside.pop()
        gate.release()


def test_no_slot_is_lost_among_loops_threads_and_cancellations() -> None:
    """After thousands of waiters in three loops and two threads, most of them cancelled or woken at
    random moments, never more than all slots were out, and all are back."""
    gate = Gate(4)
    inside: list[int] = []
    peak: list[int] = []
    seeds = iter(range(100))
    lock = threading.Lock()

    async def wait(rng: random.Random) -> None:
        if await gate.acquire(rng.choice([0.001, LONG])):
            with holding(gate, inside, peak):
                await asyncio.sleep(0)

    async def many() -> None:
        with lock:
            rng = random.Random(next(seeds))
        tasks: list[asyncio.Task[None]] = []
        for _ in range(1000):
            tasks.append(asyncio.create_task(wait(rng)))
            if rng.random() < 0.7:
                rng.choice(tasks).cancel()
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)

    def thread() -> None:
        for number in range(300):
            woken = threading.Event()
            timer = threading.Timer(number % 3 / 1000, woken.set)
            timer.start()
            if gate.acquire_blocking(LONG, woken):
                with holding(gate, inside, peak):
                    pass
            timer.join()

    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(asyncio.run, many()) for _ in range(3)]
        jobs += [pool.submit(thread) for _ in range(2)]
        for job in jobs:
            job.result()
    assert max(peak) <= gate.slots
    assert at_rest(gate)
