"""A fair semaphore for tasks of any event loop and for threads. Knows nothing of databases."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable

from .exceptions import PoolClosed, TooManyWaiting


class _Waiter:
    __slots__ = ("granted", "wake")

    def __init__(self, wake: Callable[[], object]) -> None:
        self.wake = wake
        self.granted = False


class Gate:
    """Lets `slots` holders in at a time, in the order in which they asked.

    asyncio's and anyio's semaphores belong to one event loop; several loops (tests, reloads,
    worker threads) and plain threads share a pool, hence this class.

    Invariants, all under `_lock`: a slot is free, or held, or granted to exactly one waiter; a
    slot is free only while nobody waits. The releaser hands its slot to the first waiter, so
    newcomers can't overtake; a waiter that gives up removes itself or, if the slot was granted in
    the meantime, passes it on.
    """

    __slots__ = ("_closed", "_free", "_lock", "_waiters", "max_waiting", "slots")

    def __init__(self, slots: int, *, free: int | None = None, max_waiting: int | None = None):
        self.slots = slots
        self.max_waiting = max_waiting
        self._free = slots if free is None else free
        self._closed = False
        self._lock = threading.Lock()
        self._waiters: OrderedDict[_Waiter, None] = OrderedDict()

    @property
    def held(self) -> int:
        return self.slots - self._free

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def acquire_nowait(self) -> bool:
        """Take a slot if one is free and nobody waits for it. Returns whether it was so."""
        with self._lock:
            return self._take()

    def acquire_unless_locked(self) -> bool:
        """The same, also where this thread may be just inside of a method of the gate."""
        # What isn't locked now, this thread can't have locked: others are soon done.
        return not self._lock.locked() and self.acquire_nowait()

    async def acquire(self, timeout: float | None) -> bool:
        """Wait for a slot, at most `timeout` seconds. Returns whether one was given.

        With a `timeout` of None it waits for as long as it takes.

        Raises:
            TooManyWaiting: `max_waiting` others wait already.
            PoolClosed: the gate was closed, before or while waiting.
        """
        if self.acquire_nowait():
            return True
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        waiter = _Waiter(lambda: loop.call_soon_threadsafe(_set, woken))
        if self._enqueue(waiter):
            return True
        timer = None if timeout is None else loop.call_later(timeout, _set, woken)
        try:
            await woken
        except BaseException:
            if not self._leave(waiter):
                self.release()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return self._outcome(waiter)

    def acquire_blocking(self, timeout: float | None, woken: threading.Event | None = None) -> bool:
        """The same for a thread, which it blocks. Never call it on an event loop.

        Who sets `woken`, an event of this wait only, ends it as if its time were over; what its
        `wait()` raises, the caller gets.
        """
        if self.acquire_nowait():
            return True
        woken = woken or threading.Event()
        waiter = _Waiter(woken.set)
        if self._enqueue(waiter):
            return True
        try:
            # A lock knows no longer time, such as infinity, which tasks may wait for.
            woken.wait(timeout if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        except BaseException:  # KeyboardInterrupt, or of `woken`
            if not self._leave(waiter):
                self.release()
            raise
        return self._outcome(waiter)

    def release(self) -> None:
        """Give a slot back; the one who waits longest gets it."""
        with self._lock:
            while self._waiters:
                waiter, _ = self._waiters.popitem(last=False)
                waiter.granted = True
                try:
                    waiter.wake()
                except RuntimeError:  # its event loop is closed: nobody is there any more
                    waiter.granted = False
                else:
                    return
            self._free += 1

    def close(self) -> None:
        """Send everyone who waits away with `PoolClosed`, and everyone who asks from now on."""
        with self._lock:
            self._closed = True
            waiters, self._waiters = self._waiters, OrderedDict()
        for waiter in waiters:
            try:
                waiter.wake()
            except RuntimeError:  # its event loop is closed
                continue

    def _take(self) -> bool:
        if self._closed:
            raise PoolClosed("The pool is being closed.")
        if self._free and not self._waiters:
            self._free -= 1
            return True
        return False

    def _enqueue(self, waiter: _Waiter) -> bool:
        with self._lock:
            if self._take():
                return True
            if self.max_waiting is not None and len(self._waiters) >= self.max_waiting:
                raise TooManyWaiting(
                    f"All {self.slots} connections are in use and {self.max_waiting} callers wait "
                    "for one (max_waiting)."
                )
            self._waiters[waiter] = None
            return False

    def _leave(self, waiter: _Waiter) -> bool:
        """Stop waiting. Returns False if the waiter holds a slot, which is its caller's now."""
        with self._lock:
            self._waiters.pop(waiter, None)
            return not waiter.granted

    def _outcome(self, waiter: _Waiter) -> bool:
        if not self._leave(waiter):
            return True
        if self._closed:
            raise PoolClosed("The pool is being closed.")
        return False


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
