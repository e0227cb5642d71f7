"""A circuit breaker: while the database is away, few ask for it, and nobody waits for it."""

import random
import threading
from collections.abc import Callable

#: Failures in a row, with which the database counts as away: one may be a matter of chance.
_AWAY = 2
#: Seconds before the next attempt then, and the most there are between two.
_FIRST, _MOST = 0.05, 0.4


class Breaker:
    """Says who may try to connect.

    While attempts succeed, everybody may. After two that failed, one at a time may, each after a
    pause: 50 ms, then 100, 200 and 400, less a random part of up to a half, so that the processes
    of a service don't come back all at once. Most of the time, then, nobody waits for a database
    that is away.

    Args:
        clock: monotonic seconds.
        uniform: as `random.uniform`.
    """

    def __init__(
        self, clock: Callable[[], float], uniform: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._clock = clock
        self._uniform = uniform
        self._lock = threading.Lock()
        self._failures = 0
        self._next = 0.0
        self._trying = False

    def admits(self, *, hurried: bool = False) -> bool:
        """Whether to try now. Who is told so owes one call of one of the methods below.

        Who has hardly any time left, and is `hurried`, may not after a single failure.
        """
        with self._lock:
            if self._failures < (1 if hurried else _AWAY):
                return True
            if hurried:
                return False
            if self._trying or self._clock() < self._next:
                return False
            self._trying = True
            return True

    def succeeded(self) -> bool:
        """Returns whether the database had counted as away."""
        with self._lock:
            was_away = self._failures >= _AWAY
            self._failures, self._trying = 0, False
            return was_away

    def undecided(self) -> None:
        """The attempt ended in a way that says nothing about the database."""
        with self._lock:
            self._trying = False

    def failed(self) -> bool:
        """Returns whether the database counts as away since just now."""
        with self._lock:
            self._failures = min(self._failures + 1, 10)
            pause = min(_MOST, _FIRST * 2.0 ** (self._failures - _AWAY))
            self._next = self._clock() + self._uniform(pause / 2, pause)
            self._trying = False
            return self._failures == _AWAY
