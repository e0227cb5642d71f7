"""Calls in worker threads: whatever happens around one, its connection comes back, once."""

import asyncio
import logging
import os
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from fastapi_peewee import Database, connect
from fastapi_peewee.calls import running
from tests.apps import back_to_rest, connected, until


@pytest.fixture
async def db(sqlite_url: str) -> AsyncIterator[Database]:
    async with connected(sqlite_url, pool_size=1) as db:
        yield db


async def test_without_a_thread_it_fails_and_holds_nothing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started, the error is raised, and connection and turn are free."""

    def refuse(work: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(db.pool.workers, "put", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            await db.run(lambda: None)
    async with db.atomic():
        with monkeypatch.context() as patched:
            patched.setattr(db.pool.workers, "put", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                await db.run(lambda: None)
        assert await db.run(lambda: 7) == 7


@pytest.mark.parametrize("begun", [False, True])
async def test_a_call_that_was_put_in_for_no_thread_to_come(
    db: Database, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """What fails after a call was put in has failed, unless a thread that was there has begun it:
    that one carries it out. Its connection comes back once."""
    put = db.pool.workers.put

    def fail(work: Callable[[], None]) -> None:
        if begun:
            done = threading.Event()

            def work_and_say() -> None:
                work()
                done.set()

            put(work_and_say)
            assert done.wait(30)
        else:
            late.append(work)
        raise RuntimeError("can't start new thread")

    late: list[Callable[[], None]] = []
    with monkeypatch.context() as patched:
        patched.setattr(db.pool.workers, "put", fail)
        if begun:
            assert await db.run(lambda: 7) == 7
        else:
            with pytest.raises(RuntimeError, match="can't start"):
                await db.run(lambda: 7)
    for work in late:
        work()
    assert db.pool_stats.in_use == 0
    assert await db.run(lambda: 8) == 8


async def test_without_a_thread_a_block_fails_and_holds_nothing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started, a block isn't entered, and connection and turn are free."""

    def refuse(work: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    async def fail() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(db.pool.workers, "put", refuse)
            async with db.atomic():
                pass

    # While the errors are there, so are the leases: nobody collects what was forgotten.
    with pytest.raises(RuntimeError, match="can't start") as outer:
        await fail()
    assert db.pool_stats.in_use == 0
    async with db.atomic():
        with pytest.raises(RuntimeError, match="can't start") as inner:
            await fail()
        assert await db.run(lambda: 7) == 7
    del outer, inner


async def test_without_a_thread_to_interrupt_it_a_call_is_waited_for(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started, nothing ends a cancelled call; it is waited for."""
    begun, go_on, refused = threading.Event(), threading.Event(), asyncio.Event()
    ended: list[bool] = []
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if "interrupt" in thread.name:
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    def call() -> None:
        begun.set()
        ended.append(go_on.wait(30))

    monkeypatch.setattr(threading.Thread, "start", start_others)
    task = asyncio.create_task(db.run(call))
    await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    await refused.wait()
    was_done = task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not was_done
    assert ended == [True]
    assert db.pool_stats.in_use == 0


async def test_what_is_cancelled_before_its_thread_begins_is_not_done(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is free at once, and the thread that comes later does nothing."""
    put: list[Callable[[], None]] = []
    done: list[int] = []
    monkeypatch.setattr(db.pool.workers, "put", put.append)
    task = asyncio.create_task(db.run(done.append, 1))
    while not put:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert db.pool_stats.in_use == 0
    await asyncio.to_thread(put[0])
    assert done == []


async def test_a_call_that_is_cancelled_as_it_ends_is_waited_for_no_longer(db: Database) -> None:
    """Its thread is done and the event loop is about to hear of it: nobody waits for ever."""
    begun, go_on = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        assert go_on.wait(30)

    task = asyncio.create_task(db.run(call))
    await asyncio.to_thread(begun.wait, 30)
    go_on.set()
    until(lambda: db.pool.workers._idle)
    task.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert db.pool_stats.in_use == 0


async def test_an_interrupt_that_fails_is_tried_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the call has ended; then nobody is interrupted any more."""
    tried: list[Any] = []
    begun = threading.Event()

    def fail(conn: Any) -> bool:
        tried.append(conn)
        raise OSError("no route to host")

    def call() -> None:
        begun.set()
        until(lambda: len(tried) > 2)

    monkeypatch.setattr(db, "interrupt", fail)
    task = asyncio.create_task(db.run(call))
    await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    interrupting = [each for each in threading.enumerate() if "interrupt" in each.name]
    for thread in interrupting:
        await asyncio.to_thread(thread.join, 30)
        assert not thread.is_alive()
    ended = len(tried)
    assert await db.run(lambda: 7) == 7
    assert len(tried) == ended


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
async def test_a_process_that_a_call_forks_has_no_part_in_it(db: Database) -> None:
    """It isn't cancelled with the call."""
    ended, begun = list[int](), threading.Event()

    def call() -> None:
        begun.set()
        running_here = running.call
        assert running_here is not None
        until(lambda: running_here.cancelled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
            if child == 0:
                os._exit(running.call is not None)
        ended.append(os.waitpid(child, 0)[1])

    task = asyncio.create_task(db.run(call))
    await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    await asyncio.wait({task})
    assert ended == [0]


async def test_a_connection_that_cant_be_released_is_logged(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller has what came of the call, which has succeeded."""
    give_back = db.pool.give_back

    def fail(lease: Any) -> None:
        give_back(lease)
        raise OSError("disk I/O error")

    monkeypatch.setattr(db.pool, "give_back", fail)
    assert await db.run(lambda: 7) == 7
    assert "Releasing a database connection failed" in caplog.text


def test_a_loop_that_is_closed_before_its_call_has_ended_keeps_no_connection(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread gives the connection back; there is nobody left to tell the result."""
    caplog.set_level(logging.DEBUG, "fastapi_peewee")
    db = connect(sqlite_url)
    begun, go_on = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        assert go_on.wait(30)

    loop = asyncio.new_event_loop()
    task = loop.create_task(db.run(call))
    while not begun.is_set():
        loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    go_on.set()
    until(lambda: "closed before its database call had ended" in caplog.text)
    asyncio.run(back_to_rest(db))
    task.get_coro().close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    asyncio.run(db.close_pool())
