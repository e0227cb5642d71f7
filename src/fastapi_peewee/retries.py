"""Whole transactions, run anew when the database says that they may succeed the next time.

Never a part of one, and never one whose COMMIT may have been carried out.
"""

import asyncio
import inspect
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .blocks import Atomic
    from .database import Database


class Backoff(NamedTuple):
    """How long to wait before the next try: "full jitter", anything up to a bound that doubles.

    Those who have met once would meet again if they waited equally long.

    Args:
        first: the bound before the second try, in seconds.
        most: the greatest bound, in seconds.
        random: a number from 0 to 1.
        sleep: in a thread, so many seconds.
        asleep: the same on the event loop.
    """

    first: float = 0.05
    most: float = 1.0
    random: Callable[[], float] = random.random
    sleep: Callable[[float], Any] = time.sleep
    asleep: Callable[[float], Awaitable[Any]] = asyncio.sleep

    def delays(self, retries: int) -> Iterator[float]:
        """Seconds to wait after each try that fails, but the last."""
        for failures in range(retries):
            yield self.random() * min(self.most, self.first * 2**failures)


class _TryAgain(Exception):
    """A transaction was rolled back; after `delay` seconds it may succeed."""

    def __init__(self, delay: float) -> None:
        self.delay = delay


class Retrying:
    """A function as one transaction, with as many tries as it takes and is granted."""

    def __init__(
        self, db: "Database", fn: Callable[..., Any], retries: int, options: dict[str, Any]
    ) -> None:
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(
                f"{fn.__qualname__} is a generator: what it has yielded can't be taken back. "
                "Retry a function that returns."
            )
        if not retries >= 0:
            raise ValueError(f"retries must be a number of tries, 0 or more, got: {retries!r}")
        self.db = db
        self._fn = fn
        self._retries = retries
        self._options = options

    def function(self) -> Callable[..., Any]:
        """The function that tries again. It isn't kept here: it refers to this object."""
        fn = self._fn

        @wraps(fn)
        def synchronous(*args: Any, **kwargs: Any) -> Any:
            once = partial(self._once, self._delays(), *args, **kwargs)
            while True:
                try:
                    return once()
                except _TryAgain as failed:
                    delay = failed.delay
                self.db.backoff.sleep(delay)
                lease = self.db._state.lease()
                if lease is not None and lease.call is not None and lease.call.cancelled:
                    raise asyncio.CancelledError  # in `db.run`, which raises it in any case

        @wraps(fn)
        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            return await self._atries(partial(self._aonce, self._delays(), *args, **kwargs))

        chosen: Any = asynchronous if inspect.iscoroutinefunction(fn) else synchronous
        chosen._fastapi_peewee_retrying = self
        return chosen

    def made(self, fn: Any) -> bool:
        """Whether a function is ours. A decorator above it has copied its attributes, but not what
        `functools.wraps` says, and wants to be called itself.
        """
        return getattr(fn, "__wrapped__", None) is self._fn

    async def on_loop(
        self, fn: Callable[..., Any], call: Callable[[Callable[..., Any]], Awaitable[Any]]
    ) -> Any:
        """`call(a function like fn)` for each try: it runs that in a thread; we wait on the loop.

        Args:
            fn: the function that was decorated, or the method, bound.
        """
        once = partial(self._once, self._delays())
        if (bound := getattr(fn, "__self__", None)) is not None:
            once = partial(once, bound)
        return await self._atries(partial(call, once))

    async def _atries(self, once: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await once()
            except _TryAgain as failed:
                delay = failed.delay
            await self.db.backoff.asleep(delay)

    def _delays(self) -> Iterator[float]:
        return self.db.backoff.delays(self._retries)

    def _once(self, delays: Iterator[float], /, *args: Any, **kwargs: Any) -> Any:
        block = self.db.atomic(**self._options)
        try:
            with block:
                return self._fn(*args, **kwargs)
        except Exception as error:
            self._judge(block, error, delays)
            raise

    async def _aonce(self, delays: Iterator[float], /, *args: Any, **kwargs: Any) -> Any:
        block = self.db.atomic(**self._options)
        try:
            async with block:
                return await self._fn(*args, **kwargs)
        except Exception as error:
            self._judge(block, error, delays)
            raise

    def _judge(self, block: "Atomic", error: Exception, delays: Iterator[float]) -> None:
        if block.whole and self.db.transient(error):
            for delay in delays:
                raise _TryAgain(delay)


def is_retried(fn: Any) -> bool:
    """Whether `@db.retry` is among a function's decorators."""
    return hasattr(fn, "_fastapi_peewee_retrying")


def retrying(fn: Any) -> Retrying | None:
    """What `@db.retry` has made of a function, if it is the outermost decorator; else None."""
    found: Retrying | None = getattr(fn, "_fastapi_peewee_retrying", None)
    return found if found is not None and found.made(fn) else None
