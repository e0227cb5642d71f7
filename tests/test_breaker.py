"""The circuit breaker: who may try to connect while the database is away."""

from fastapi_peewee.breaker import Breaker
from tests.test_pool import Clock


def make(clock: Clock, share: float = 1.0) -> Breaker:
    return Breaker(clock, lambda least, most: least + share * (most - least))


def test_while_all_is_well_everybody_may() -> None:
    """No attempt waits for another one."""
    breaker = make(Clock())
    assert breaker.admits()
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.admits()


def test_after_failures_one_at_a_time_may_after_a_pause() -> None:
    """The pauses double up to 0.4 s; while one tries, and until its pause is over, nobody may. One
    failure is no failure yet."""
    clock = Clock()
    breaker = make(clock)
    for _ in range(2):
        assert breaker.admits()
        breaker.failed()
    for pause in (0.05, 0.1, 0.2, 0.4, 0.4, 0.4):
        clock.now += pause - 0.001
        assert not breaker.admits()
        clock.now += 0.002
        assert breaker.admits()
        assert not breaker.admits()
        breaker.failed()
    clock.now += 0.5
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.admits()
    assert breaker.admits()


def test_pauses_are_cut_short_by_chance() -> None:
    """By up to a half, so that many processes don't come back at the same moment."""
    clock = Clock()
    breaker = make(clock, share=0.0)
    breaker.failed()
    breaker.failed()
    assert not breaker.admits()
    clock.now += 0.026
    assert breaker.admits()


def test_many_failures_of_attempts_that_ran_together() -> None:
    """The pause has a bound, however many failed."""
    clock = Clock()
    breaker = make(clock)
    for _ in range(2000):
        breaker.failed()
    clock.now += 0.41
    assert breaker.admits()


def test_an_attempt_that_says_nothing_changes_nothing() -> None:
    """After one that came to nothing for another reason, the next one may try at once."""
    clock = Clock()
    breaker = make(clock)
    for _ in range(2):
        breaker.failed()
    clock.now += 1
    assert breaker.admits()
    assert not breaker.admits()
    breaker.undecided()
    assert breaker.admits()
    assert not breaker.admits()


def test_who_is_in_a_hurry_may_not_after_a_single_failure() -> None:
    """Whose time is nearly over doesn't find out whether the failure was a matter of chance."""
    breaker = make(Clock())
    assert breaker.admits(hurried=True)
    breaker.failed()
    assert not breaker.admits(hurried=True)
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.admits(hurried=True)
