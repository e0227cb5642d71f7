"""What a run looks like while it goes on, and in the end."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.table import Column, Table

from .killing import Kills
from .running import Report

_RUNNING = ("", "rounds", "operations", "a second", "done", "failed", "unknown", "faults", "wrong")


def running_table(reports: Sequence[Report]) -> Table:
    """One row for each database, with what has happened on it until now."""
    table = _table(_RUNNING)
    for report in reports:
        outcomes = [report.outcomes[name] for name in ("done", "failed", "unknown")]
        wrong = len(report.violations) + len(report.leaks)
        numbers = [report.rounds, report.operations, report.rate, *outcomes, report.faults.total()]
        table.add_row(report.database, *map(_number, numbers), _number(wrong, bad=True))
    return table


def closing_table(reports: Sequence[Report]) -> Table:
    """What was done to each database, what came of it, and what was wrong."""
    table = _table(("", *(report.database for report in reports)))

    def rows(counters: Sequence[Counter[str]]) -> None:
        for name, _ in sum(counters, Counter[str]()).most_common():
            table.add_row(name, *(_number(counter[name]) for counter in counters))
        table.add_section()

    table.add_row("operations", *(_number(report.operations) for report in reports))
    rows([report.outcomes for report in reports])
    rows([report.errors for report in reports])
    rows([report.faults for report in reports])
    table.add_row("violations", *(_number(len(r.violations), bad=True) for r in reports))
    table.add_row("leaks", *(_number(len(r.leaks), bad=True) for r in reports))
    return table


def kills_table(kills: Mapping[str, Kills]) -> Table:
    """One row for each kind of process that was killed."""
    table = _table(
        ("killed", "times", "acknowledged", "unknown", "slowest recovery", "lost or torn")
    )
    for name, now in kills.items():
        slowest = f"{max(now.recovered):.2f} s" if now.recovered else ""
        numbers = map(_number, (now.cycles, now.acknowledged, now.unknown))
        table.add_row(name, *numbers, slowest, _number(len(now.violations), bad=True))
    return table


def _table(headings: Sequence[str]) -> Table:
    first, *others = headings
    table = Table(Column(first, no_wrap=True))
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _number(number: int, *, bad: bool = False) -> str:
    text = f"{number:,}"
    return f"[bold red]{text}" if bad and number else text
