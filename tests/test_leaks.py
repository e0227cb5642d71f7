"""Connections that are held too long, or forgotten: who did it is told, the pool has them back."""

import asyncio
import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fastapi_peewee import Database, LeaseEnded, connect
from fastapi_peewee.gate import Gate
from fastapi_peewee.leaks import Watch
from fastapi_peewee.state import Lease
from tests.apps import back_to_rest, connected, until
from tests.apps import note as note
from tests.test_pool import Clock

LIMIT = 0.02


@pytest.fixture
async def db(sqlite_url: str) -> AsyncIterator[Database]:
    async with connected(sqlite_url, pool_size=1, leak_detection_threshold=LIMIT) as db:
        yield db


def lease() -> Lease:
    """A lease of no pool's, which nobody has to give back."""
    made = Lease(slot=Gate(1))
    made.dropped = lambda _: None
    return made


def messages(log: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in log.records if each.name == "fastapi_peewee"]


def test_what_is_held_for_too_long_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A lease that is out for longer than the limit is one warning, with the stack that took it."""
    clock = Clock()
    watch = Watch(10, clock)
    held, given_back = lease(), lease()
    watch.begin(held)
    watch.begin(given_back)
    clock.now = 9.9
    watch.look()
    assert messages(caplog) == []
    watch.end(given_back)
    clock.now = 10
    watch.look()
    watch.look()
    [message] = messages(caplog)
    assert caplog.records[0].levelno == logging.WARNING
    assert "more than 10 s" in message
    assert message.rstrip().endswith("watch.begin(held)")
    assert "test_what_is_held_for_too_long_is_logged_once" in message
    watch.end(held)


def test_a_place_in_memory_that_is_used_again_is_watched_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever takes a lease after one that was logged is told as well."""
    clock, held = Clock(), lease()
    watch = Watch(10, clock)
    for _ in range(2):
        watch.begin(held)
        clock.now += 10
        watch.look()
        watch.end(held)
    assert len(messages(caplog)) == 2


async def test_the_log_says_where_it_was_taken_and_where_it_is_used(
    db: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a call that takes too long it names the line that made it and the line that it is at."""
    begun, go_on = threading.Event(), threading.Event()
    clock = Clock()
    monkeypatch.setattr(db.pool._watch, "_clock", clock)

    def slow() -> None:  # one line, which it is at from the moment that it says so
        assert any(step() for step in (begun.set, go_on.wait))

    call = asyncio.create_task(db.run(slow))
    await asyncio.to_thread(begun.wait, 30)
    clock.now += LIMIT
    await asyncio.to_thread(until, lambda: messages(caplog))
    go_on.set()
    await call
    [message] = messages(caplog)
    taken, used = message.split("In use just now")
    assert "test_leaks.py" not in taken or "db.run" in taken
    assert "assert any(step() for step" in used


async def test_a_block_that_is_held_for_too_long_is_logged(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A transaction in which somebody waits for something else is logged while it is open."""
    caplog.clear()
    async with db.atomic():
        await asyncio.to_thread(until, lambda: messages(caplog))
    assert "async with db.atomic():" in messages(caplog)[0]


async def test_a_thread_that_holds_one_for_too_long_is_logged(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """So is one that a thread has waited for."""
    taken = db.pool.acquire_blocking()
    await asyncio.to_thread(until, lambda: messages(caplog))
    db.pool.give_back(taken)
    assert "taken = db.pool.acquire_blocking()" in messages(caplog)[0]


@pytest.mark.parametrize("enabled", [True, False])
async def test_nothing_is_collected_while_the_frames_are_asked_for(
    db: Database, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    """Python 3.11 may freeze if the collector comes just then: it is stopped for that moment, and
    left as it was."""
    states, ask = [], sys._current_frames

    def current_frames() -> dict[int, Any]:
        states.append(gc.isenabled())
        return ask()

    monkeypatch.setattr(sys, "_current_frames", current_frames)
    async with db.atomic():
        if not enabled:
            gc.disable()
        try:
            await asyncio.to_thread(until, lambda: states)
            await asyncio.to_thread(until, lambda: gc.isenabled() is enabled)
        finally:
            gc.enable()
    assert states == [False]


async def test_nobody_looks_when_nothing_is_held(db: Database) -> None:
    """The thread that looks ends when all is given back, and is there again when it is needed."""

    def watching() -> bool:
        return any(thread.name == "fastapi-peewee-leaks" for thread in threading.enumerate())

    for _ in range(2):
        async with db.connection_context():
            assert watching()
        await asyncio.to_thread(until, lambda: not watching())


async def test_without_a_threshold_nothing_is_watched(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default no stack is taken."""
    monkeypatch.setattr("fastapi_peewee.leaks._stack", lambda *_: 1 / 0)
    async with connected(sqlite_url) as db, db.atomic():
        pass


def test_without_a_thread_that_looks_the_next_lease_starts_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If no thread can be started, a lease is taken all the same, and the next one tries again."""
    started: list[str] = []

    def start(thread: threading.Thread) -> None:
        started.append(thread.name)
        if len(started) == 1:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    watch, leases = Watch(LIMIT), [lease() for _ in range(3)]
    for each in leases:
        watch.begin(each)
    assert started == ["fastapi-peewee-leaks"] * 2


@pytest.mark.parametrize("threshold", [0, -1, float("nan")])
def test_a_threshold_that_makes_no_sense_is_refused(threshold: float) -> None:
    """A limit that isn't above zero is a `ValueError` that quotes it."""
    with pytest.raises(ValueError, match=r"leak_detection_threshold .* got: "):
        connect("sqlite:///:memory:", leak_detection_threshold=threshold)


# Dropped without being given back.


OURS = "dropped without being"


@asynccontextmanager
async def told() -> AsyncIterator[list[str]]:
    """The texts of the `ResourceWarning` that comes meanwhile, from whichever thread."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
        # A thread that has just ended a call, and the event loop, may hold it for a moment yet.
        async with asyncio.timeout(30):
            while not texts:
                gc.collect()
                await asyncio.sleep(0.001)
                # psycopg warns, too, of its connection, which is kept all the same.
                found = [str(each.message) for each in caught]
                texts += [text for text in found if OURS in text]


@pytest.mark.parametrize("database_url", ["sqlite", "postgres", "mysql"], indirect=True)
async def test_a_block_that_was_dropped_gives_its_connection_back(database_url: str) -> None:
    """A block that was entered by hand and forgotten is a `ResourceWarning`. What was open is
    rolled back, the slot is free, and the next user finds a clean connection."""
    async with connected(database_url, pool_size=1, timeout=30) as db:
        await db.aexecute_sql("CREATE TABLE t (x INTEGER)")

        async def forget() -> None:
            await db.atomic().__aenter__()
            await db.aexecute_sql("INSERT INTO t VALUES (1)")

        async with told() as texts:
            await asyncio.create_task(forget())
        [text] = texts
        assert "dropped without being given back" in text
        assert "leak_detection_threshold=" in text
        assert (await db.aexecute_sql("SELECT count(*) FROM t")).fetchone() == (0,)
        assert db.pool_stats.in_use == 0


async def test_the_warning_says_where_it_was_taken_if_that_is_known(db: Database) -> None:
    """With a threshold the warning has the stack."""

    async def forget() -> None:
        await db.connection_context().__aenter__()

    async with told() as texts:
        await asyncio.create_task(forget())
    assert "await db.connection_context().__aenter__()" in texts[0]
    await back_to_rest(db)


async def test_a_nested_block_that_was_dropped_lets_the_outer_one_end(
    db: Database, note: Any
) -> None:
    """The block around a forgotten one has its turn back, and ends as it would."""

    async def forget() -> None:
        await db.atomic().__aenter__()

    async with db.atomic():
        await note.acreate(text="outer")
        async with told() as texts:
            await asyncio.create_task(forget())
        assert "A nested block was entered and dropped without being left." in texts
        await note.acreate(text="more")
    assert await db.count(note.select()) == 2


def test_a_dropped_block_gives_the_turn_back() -> None:
    """What the collector's thread does, in one that can be looked into: no later use of the block
    is possible, and the one around it has its turn."""
    outer = lease()
    nested = Lease(parent=outer)
    with pytest.warns(ResourceWarning, match="without being left"):
        nested.dropped(nested)
    with pytest.raises(LeaseEnded):
        nested.check()
    assert outer.turn.acquire_nowait()


async def test_a_lease_may_be_collected_under_any_lock(db: Database) -> None:
    """The collector comes when it likes, also to a thread that has the locks it would need."""
    dropped = [await db.pool.acquire()]
    async with told():
        with db.pool._gate._lock, db.pool._lock:
            dropped.clear()
            gc.collect()
        await back_to_rest(db)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
async def test_a_child_drops_what_it_has_inherited_in_silence(db: Database) -> None:
    """A forked child collects its parent's leases, and watches its own."""
    held = [await db.pool.acquire()]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            held.clear()
            gc.collect()
            fresh = db.pool.acquire_blocking()
            assert db.pool.stats.in_use == 1
            db.pool.give_back(fresh)
            code = 0
        finally:
            os._exit(code)
    assert (await asyncio.to_thread(os.waitpid, child, 0))[1] == 0
    db.pool.give_back(held[0])
