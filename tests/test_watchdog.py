"""The watchdog: it cuts what is over its limit, that and nothing else, once."""

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastapi_peewee import watchdog as module
from fastapi_peewee.watchdog import Stepwise, Waiting, Watchdog, limit_for_database
from tests.test_pool import Clock


@dataclass(eq=False)
class Held:
    conn: Any = "connection"
    waiting: float | Stepwise | None = None
    transaction: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    cut: bool = False


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own thread doesn't look; the tests do."""
    monkeypatch.setattr(module, "_patrol", lambda _: None)


def make(
    clock: Callable[[], float], cut: list[Any], goes_on: bool = False, **limits: Any
) -> Watchdog:
    settings = {"statement": 1.0, "transaction": 10.0, **limits}

    def cut_off(held: Any, reason: str) -> bool:
        cut.append((held, reason))
        return goes_on

    return Watchdog(cut=cut_off, clock=clock, **settings)


def test_a_statement_over_its_limit_is_cut_once() -> None:
    """Not before its time is over, and not again."""
    cut: list[Any] = []
    clock, held = Clock(), Held()
    watchdog = make(clock, cut)
    watchdog.watch(held)
    with Waiting(held, clock):
        clock.now = 1.0
        assert watchdog.look()
        assert cut == []
        clock.now = 1.01
        assert watchdog.look()
        assert watchdog.look()
    assert cut == [(held, "A statement took longer than 1 s (statement_timeout)")]
    assert held.cut


def test_the_steps_of_a_statement_count_together() -> None:
    """Those that follow the first one that was come upon; what lies between them doesn't count, nor
    does another statement."""
    cut: list[Any] = []
    clock, held = Clock(), Held()
    watchdog = make(clock, cut)
    watchdog.watch(held)
    steps = Stepwise(held, clock)
    assert steps.anew() is steps
    for _ in range(3):  # in all 0.9 s, from the first look on
        with steps:
            watchdog.look()
            clock.now += 0.3
            watchdog.look()
        clock.now += 100
        watchdog.look()
    with steps.anew():
        clock.now += 0.9
        watchdog.look()
    assert cut == []
    with steps:
        clock.now += 0.05
        watchdog.look()
        assert cut == []
        clock.now += 0.06
        watchdog.look()
    assert [found for found, _ in cut] == [held]
    assert held.waiting is None


@pytest.mark.parametrize("kind", ["waiting", "transaction"])
def test_a_connection_that_goes_on_is_cut_again(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While the same statement or transaction lasts, which the log has once; and for the next."""
    cut: list[Any] = []
    clock, held = Clock(), Held()
    watchdog = make(clock, cut, goes_on=True)
    watchdog.watch(held)
    for number in (1, 2):
        setattr(held, kind, clock())
        clock.now += 10.1
        watchdog.look()
        clock.now += 0.1
        watchdog.look()
        setattr(held, kind, None)
        watchdog.look()
        assert len(cut) == 2 * number
        assert caplog.text.count("its connection was cut") == number
    assert not held.cut


@pytest.mark.parametrize(("limit", "told"), [(None, None), (5, 4.8), (1, 0.8), (0.25, 0.2)])
def test_the_database_is_told_a_little_less(limit: float | None, told: float | None) -> None:
    """So its answer, after which the connection can be kept, comes before the connection is cut."""
    assert limit_for_database(limit) == told


def test_each_statement_has_its_time() -> None:
    """Statements one after the other may take longer together."""
    cut: list[Any] = []
    clock, held = Clock(), Held()
    watchdog = make(clock, cut)
    watchdog.watch(held)
    for _ in range(5):
        with Waiting(held, clock):
            clock.now += 0.9
            watchdog.look()
    clock.now += 100
    watchdog.look()
    assert cut == []


def test_without_a_limit_nothing_is_cut() -> None:
    """None is for any time."""
    cut: list[Any] = []
    clock, held = Clock(), Held(waiting=0.0, transaction=0.0)
    watchdog = make(clock, cut, statement=None, transaction=None)
    watchdog.watch(held)
    clock.now = 1e6
    assert watchdog.look()
    assert cut == []


def test_a_statement_that_ends_as_it_is_looked_at_is_let_go() -> None:
    """Nobody's connection is cut for what another one did: under its lock it is looked at again."""
    cut: list[Any] = []
    clock, held = Clock(), Held(waiting=0.0)

    class EndsInTime:
        def __enter__(self) -> None:
            held.waiting = 5.0  # the next one's

        def __exit__(self, *_: object) -> None:
            pass

    held.lock = EndsInTime()  # type: ignore[assignment]
    watchdog = make(clock, cut)
    watchdog.watch(held)
    clock.now = 5.5
    watchdog.look()
    assert cut == []


def test_a_failing_cut_is_logged_and_the_others_are_looked_at(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One connection that can't be cut doesn't protect the rest."""
    cut: list[Any] = []
    clock = Clock()

    def fail(held: Any, reason: str) -> bool:
        cut.append(held)
        raise OSError("bad descriptor")

    watchdog = Watchdog(1.0, None, fail, clock)
    for _ in range(2):
        watchdog.watch(Held(waiting=0.0))
    clock.now = 2.0
    watchdog.look()
    assert len(cut) == 2
    assert caplog.text.count("could not be cut") == 2


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a thread to spare costs one connection, and not the limits of all that are
    opened later."""

    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    cut: list[Any] = []
    clock, lost, held = Clock(), Held(waiting=0.0), Held(waiting=0.0)
    watchdog = make(clock, cut)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"):
        patch.setattr(threading.Thread, "start", full)
        watchdog.watch(lost)
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
    watchdog.watch(held)
    assert len(started) == 1
    clock.now = 2.0
    watchdog.look()
    assert [found for found, _ in cut] == [held]


def test_its_thread_lives_while_there_is_something_to_look_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends when no connection is left, is started anew for the next, and keeps no pool alive."""
    monkeypatch.undo()
    monkeypatch.setattr(module, "_EVERY", 0.001)
    cut: list[Any] = []
    watchdog = make(Clock(), cut)

    def gone(thread: threading.Thread | None) -> None:
        assert thread is not None
        thread.join(10)
        assert not thread.is_alive()

    for _ in range(2):
        held = Held()
        watchdog.watch(held)
        thread = watchdog._thread
        watchdog.forget(held)
        gone(thread)
    watchdog = make(time.monotonic, cut)
    held = Held(waiting=time.monotonic() - 60)
    watchdog.watch(held)
    thread = watchdog._thread
    while not cut:
        time.sleep(0.001)
    del watchdog
    gc.collect()
    gone(thread)
