"""Connections that are held too long, and where they were taken. Knows nothing of databases."""

import gc
import logging
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from os.path import dirname
from types import CodeType, FrameType
from typing import NamedTuple

from .state import Lease

logger = logging.getLogger("fastapi_peewee")

#: How many frames of a stack are kept: those nearest to the call.
_MOST = 50

_OURS = dirname(__file__)

#: Of each frame, the innermost first: its code and where in it. Lines are for who reads them.
_Stack = list[tuple[CodeType, int]]


class _Taken(NamedTuple):
    lease: "weakref.ref[Lease]"
    at: float
    stack: _Stack


class Watch:
    """Logs a lease, once, that is out for longer than `limit` seconds.

    A thread looks four times in that while. It ends when no lease is out, and is started again by
    the next one: so taking a lease costs no more than a walk over its stack.

    Args:
        limit: seconds.
        clock: monotonic seconds.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not limit > 0:
            raise ValueError(
                f"leak_detection_threshold must be a number of seconds above 0, got: {limit!r}"
            )
        self.limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._is_running = False
        self._out: dict[int, _Taken] = {}
        self._told: set[int] = set()

    def begin(self, lease: Lease) -> None:
        self._out[id(lease)] = _Taken(weakref.ref(lease), self._clock(), _stack())
        with self._lock:
            if self._is_running:
                return
            with suppress(RuntimeError):  # no thread can be started: by the next one, perhaps
                threading.Thread(target=self._run, name="fastapi-peewee-leaks", daemon=True).start()
                self._is_running = True

    def end(self, lease: Lease) -> None:
        self._out.pop(id(lease), None)
        self._told.discard(id(lease))

    def taken(self, lease: Lease) -> str:
        """The stack that took it, as text."""
        return _text(self._out[id(lease)].stack)

    def look(self) -> None:
        """Log those that are out for too long, and haven't been logged."""
        oldest = self._clock() - self.limit
        for key, taken in list(self._out.items()):
            lease = taken.lease()
            if taken.at > oldest or key in self._told or lease is None:
                continue
            self._told.add(key)
            frame = _frame_of(lease.owner)
            now = f"In use just now, here:\n{_text(_stack(frame))}" if frame is not None else ""
            logger.warning(
                "A database connection is held for more than %g s. It was taken here:\n%s%s",
                self.limit,
                _text(taken.stack),
                now,
            )

    def _run(self) -> None:
        while True:
            time.sleep(self.limit / 4)
            self.look()
            with self._lock:
                if not self._out:  # who puts one in from now on sees that nobody looks
                    self._is_running = False
                    return


def _frame_of(thread: int | None) -> FrameType | None:
    """Where a thread is just now."""
    # Up to Python 3.11.8 the whole interpreter stops for ever if the collector comes meanwhile:
    # https://github.com/python/cpython/issues/106883
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames().get(thread or 0)
    finally:
        if collects:
            gc.enable()


def _stack(frame: FrameType | None = None) -> _Stack:
    """What `traceback` would make of the frames, for a fraction of its price."""
    frame = frame or sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    found: _Stack = []
    next_frame: FrameType | None = frame
    while next_frame is not None and len(found) < _MOST:
        found.append((next_frame.f_code, next_frame.f_lasti))
        next_frame = next_frame.f_back
    return found


def _text(stack: _Stack) -> str:
    frames = [(code.co_filename, _line(code, at), code.co_name, None) for code, at in stack]
    return "".join(traceback.StackSummary.from_list(frames[::-1]).format())


def _line(code: CodeType, at: int) -> int:
    lines = (line for start, end, line in code.co_lines() if start <= at < end)
    return next(lines, None) or code.co_firstlineno
