"""Threads that run calls: as many as there is work, none too many, and to its end."""

import subprocess
import sys
import threading

import pytest

from fastapi_peewee.workers import Workers


def test_there_are_as_many_threads_as_there_is_work_and_no_more_than_asked_for() -> None:
    """Work that comes while all are busy waits; threads that are done take the next."""
    workers = Workers(2, "test")
    started, go, done = threading.Semaphore(0), threading.Event(), threading.Semaphore(0)
    used: set[int] = set()

    def work() -> None:
        used.add(threading.get_ident())
        started.release()
        go.wait()
        done.release()

    workers.put(work)
    assert started.acquire(timeout=10)
    assert len(workers._threads) == 1
    for _ in range(3):
        workers.put(work)
    assert started.acquire(timeout=10)
    assert not started.acquire(timeout=0.05)
    go.set()
    for _ in range(4):
        assert done.acquire(timeout=10)
    assert len(used) == len(workers._threads) == 2
    workers.end(wait=True)


def test_one_piece_of_work_at_a_time_takes_one_thread() -> None:
    """A thread that has done its work is taken again before another one is started."""
    workers = Workers(5, "test")
    for _ in range(100):
        done = threading.Event()
        workers.put(done.set)
        assert done.wait(10)
        while not workers._idle:  # it says so a moment after
            pass
    assert len(workers._threads) == 1
    workers.end(wait=True)


def test_what_was_put_in_is_done_before_the_threads_end() -> None:
    """`end(wait=True)` returns when all of it is done, and no thread is left."""
    workers = Workers(1, "test")
    done: list[int] = []
    for number in range(100):
        workers.put(lambda number=number: done.append(number))  # type: ignore[misc]
    threads = workers._threads
    workers.end(wait=True)
    assert done == list(range(100))
    assert not any(thread.is_alive() for thread in threads)


def test_the_interpreter_waits_for_what_runs() -> None:
    """A COMMIT that is under way when the program ends is carried out."""
    program = """
import sys, threading
from fastapi_peewee.workers import Workers
begun, workers = threading.Event(), Workers(1, "test")
def work():
    begun.set()
    threading.Event().wait(0.3)
    print("committed", flush=True)
workers.put(work)
begun.wait()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (ran.stdout, ran.returncode) == (b"committed\n", 0), ran.stderr


def test_if_no_thread_can_be_started_one_that_is_there_does_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any thread it is an error, and the work isn't done later by surprise."""
    workers = Workers(2, "test")
    start = threading.Thread.start

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    surprise = threading.Event()
    with pytest.raises(RuntimeError, match="can't start"):
        workers.put(surprise.set)
    monkeypatch.setattr(threading.Thread, "start", start)
    begun, go, done = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        go.wait()

    workers.put(first)
    assert begun.wait(10)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    workers.put(done.set)
    go.set()
    assert done.wait(10)
    assert not surprise.is_set()
    workers.end(wait=True)


def test_work_that_comes_as_the_threads_end_is_done() -> None:
    """Another event loop may put something in while this one closes the pool."""
    workers = Workers(2, "test")
    first, late = threading.Event(), threading.Event()
    workers.put(first.set)
    assert first.wait(10)
    workers.end(wait=True)
    workers.put(late.set)
    assert late.wait(10)
