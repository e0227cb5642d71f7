"""`make soak`: rounds of operations under random faults, and how it ends."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from soak import workload
from soak.__main__ import main
from soak.faults import schedule
from soak.history import Outcome
from soak.running import DATABASES, Report, run_rounds, target_on
from soak.servers import UnavailableError
from tests.servers import give_up


@pytest.mark.parametrize(
    ("database", "rounds", "operations"),
    [
        ("sqlite", 1, 300),
        # 10,000 in all, at each isolation level.
        pytest.param("sqlite", 1, 3400, marks=pytest.mark.slow),
        pytest.param("postgresql", 3, 1100, marks=pytest.mark.slow),
        pytest.param("mysql", 2, 1650, marks=pytest.mark.slow),
    ],
)
async def test_transactions_under_random_faults(
    database: str, rounds: int, operations: int
) -> None:
    """Whatever is cut, killed, cancelled or locked, every transaction is there as a whole if its
    client was told so, not at all if it failed, and no reader sees what its isolation level
    forbids; after each round nothing is left behind."""
    report = Report(database)
    try:
        with target_on(database) as target:
            async for _ in run_rounds(report, target, "test", operations):
                if report.rounds == rounds:
                    break
    except UnavailableError as reason:
        give_up(database.replace("postgresql", "postgres"), reason)
    assert report.violations == []
    assert report.leaks == []
    assert report.operations == rounds * operations
    assert report.outcomes["done"] > report.operations / 10


@pytest.mark.parametrize("database", DATABASES)
def test_a_seed_repeats_the_faults(database: str) -> None:
    """The same seed plans the same faults, another seed others; in time all of them come."""
    faults, again, others = (list(islice(schedule(database, seed), 500)) for seed in (7, 7, 8))
    assert faults == again != others
    assert {fault.name for fault in faults} == {fault.name for fault in others}


def test_the_command_ends_well_if_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    """A run without violations ends with 0, and names its seed."""
    arguments = ["--seed", "7", "--minutes", "0", "--operations", "50", "--database", "sqlite"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "seed 7" in output
    assert "violations" in output


def test_the_command_fails_if_something_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that was there though its client was told that it had failed is a violation:
    the command says which one, and how to have the same again, and ends with 1."""
    attempt = workload.Workload._attempt

    async def failed(self: Any, *args: Any, **options: Any) -> Outcome:
        await attempt(self, *args, **options)
        return Outcome.FAILED

    monkeypatch.setattr(workload.Workload, "_attempt", failed)
    assert main(["--seed", "7", "--database", "sqlite", "--operations", "50", "--round", "3"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "sqlite, round 3 (default): transfer" in output
    assert "--seed 7 --database sqlite --round" in output


@pytest.mark.slow
def test_the_command_that_kills(capsys: pytest.CaptureFixture[str]) -> None:
    """`--kills` counts what was killed, and ends with 0 if nothing was lost."""
    assert main(["--kills", "2", "--database", "sqlite"]) == 0
    assert "a writer, sqlite" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--kills"], ["--kills", "3"]])
def test_what_the_command_does(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """`--kills` kills processes, also without a number, and without it there are random faults."""
    done: list[str] = []

    def note(what: str) -> Callable[..., bool]:
        def run(*_: Any) -> bool:
            done.append(what)
            return True

        return run

    monkeypatch.setattr("soak.__main__._kill", note("kills"))
    monkeypatch.setattr("soak.__main__._soak", note("faults"))
    assert main(arguments) == 0
    assert done == ["kills" if arguments else "faults"]
