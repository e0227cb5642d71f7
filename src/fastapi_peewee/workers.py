"""Threads that run calls. Knows nothing of databases.

`concurrent.futures` does the same; but its future and its locks take longer for each call than many
a statement, and let other threads have the interpreter in between.
"""

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue


class Workers:
    """As many threads as there is work at a time, at most `most`; further work waits for one.

    Invariant: whoever puts work in has taken a token of `_idle`, which a thread left when it had
    done its last work, or has started a thread, unless all are started. So work waits only while
    all threads are busy.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle: deque[None] = deque()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ended = False
        _started_here.add(self)

    def put(self, work: Callable[[], None]) -> None:
        """Have `work()` called in a thread. It must not raise.

        Raises:
            RuntimeError: there is no thread, and none could be started.
        """
        try:
            self._idle.pop()
        except IndexError:
            self._start()
        self._queue.put(work)
        if self._ended:  # in between, and nobody may have seen what was put in
            self._start()
            self._queue.put(None)

    def end(self, *, wait: bool) -> None:
        """Have the threads end when all that was put in is done."""
        self._ended = True
        with self._lock:
            threads, self._threads = self._threads, []
        for _ in threads:
            self._queue.put(None)
        for thread in threads if wait else ():
            thread.join()

    def _start(self) -> None:
        with self._lock:
            if len(self._threads) >= self._most:
                return
            # Daemons, since others would keep the interpreter from ending; see `_end_all`.
            thread = threading.Thread(
                target=_run,
                args=(self._queue, self._idle),
                name=f"{self._name}_{len(self._threads)}",
                daemon=True,
            )
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    raise
            else:
                self._threads.append(thread)


def _run(queue: "SimpleQueue[Callable[[], None] | None]", idle: "deque[None]") -> None:
    while True:
        work = queue.get()
        if work is None:
            return
        work()
        del work  # not kept while this waits
        idle.append(None)


_started_here: "weakref.WeakSet[Workers]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """What runs is finished before the interpreter ends: a COMMIT, say."""
    for workers in list(_started_here):
        workers.end(wait=True)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_started_here.clear)  # a child has none of these threads
