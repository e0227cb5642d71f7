"""``python -m benchmarks``: measure, show, and write down."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiment import command
from experiment.serving import ExperimentError

from .databases import find_postgresql
from .drawing import draw
from .reporting import markdown, screen_tables, write_page
from .results import Report
from .running import PYTHON, ROOT, Plan, run
from .stacks import DATABASES, OURS, STACKS, WORKLOADS


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if all was measured, and all answers are the same."""
    options = _parse(arguments)
    console = Console()
    try:
        report = Report.load(options.read) if options.read else _measure(options, console)
    except ExperimentError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. The servers are stopped and their databases removed.")
        return 130
    written = _write(report, options)
    for table in screen_tables(report):
        console.print(table, "")
    for remark in report.remarks():
        console.print(remark, markup=False, highlight=False)
    for path in written:
        console.print(f"Written: {path}", highlight=False)
    incomplete = any(result.difference or not result.samples for result in report.results)
    return int(incomplete or bool(report.notes))


def _measure(options: argparse.Namespace, console: Console) -> Report:
    databases = _databases(options, console)
    plan = Plan(
        stacks=[name for name in STACKS if name in options.stacks or name == OURS],
        workloads=[name for name in WORKLOADS if name in options.workloads],
        databases=databases,
        seconds=options.seconds,
        rounds=options.rounds,
        connections=options.connections,
        python=str(options.python),
    )
    with Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    ) as progress:
        row = progress.add_task("filling the databases", total=plan.steps)
        begun = 0

        def on_step(what: str) -> None:
            nonlocal begun
            progress.update(row, completed=begun, description=what)
            begun += 1

        report = run(plan, on_step)
        progress.update(row, completed=plan.steps, description="done")
    return report


def _databases(options: argparse.Namespace, console: Console) -> dict[str, str | None]:
    """The server URL of each database that is to be measured, and can be."""
    found: dict[str, str | None] = {}
    for name in options.databases:
        if name == "sqlite":
            found[name] = None
        elif url := find_postgresql(options.postgresql):
            found[name] = url
        else:
            console.print(
                "No PostgreSQL lets us in at 127.0.0.1 without a password, so it is left out. "
                "Name one with --postgresql URL.",
                style="yellow",
                highlight=False,
            )
    if not found:
        raise ExperimentError("There is no database to measure on.")
    return found


def _write(report: Report, options: argparse.Namespace) -> list[Path]:
    """The files, either in a folder of their own or where docs/ has them."""
    if options.docs:
        docs = ROOT / "docs"
        data, page, picture = (
            docs / "benchmarks.json",
            docs / "benchmarks.md",
            docs / "images" / "benchmarks.png",
        )
        write_page(report, page)
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        data, page, picture = (
            options.output / f"benchmarks.{kind}" for kind in ("json", "md", "png")
        )
        page.write_text(markdown(report) + "\n")
    report.save(data)
    draw(report, picture)
    return [data, page, picture]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures how many requests a second the same API answers, built in several "
        "ways. The answers are compared first: there is no ratio where they differ.",
    )
    for name, choices in (("stacks", STACKS), ("workloads", WORKLOADS), ("databases", DATABASES)):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=list(choices),
            default=list(choices),
            metavar="NAME",
            help=f"some of: {', '.join(choices)} (default: all)",
        )
    parser.add_argument(
        "--seconds", type=command.count, metavar="N", help="for one measurement (default: 2)"
    )
    parser.add_argument(
        "--rounds", type=command.count, metavar="N", help="of which the median counts (default: 3)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round of one second: to see that all works, not to compare",
    )
    parser.add_argument(
        "--connections",
        type=command.count,
        default=10,
        help="that wrk has open, and so requests at a time; all pools hold 10 (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--postgresql",
        metavar="URL",
        help="a database beside which others are made, and dropped at the end (default: the server "
        "at 127.0.0.1, if it takes no password)",
    )
    parser.add_argument(
        "--python",
        type=Path,
        default=PYTHON,
        help="the interpreter that has the packages of all stacks (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        help="the folder for the results (default: %(default)s)",
    )
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write the results into docs/ instead: its page, its picture and its data",
    )
    parser.add_argument(
        "--read",
        type=Path,
        metavar="JSON",
        help="measure nothing, but show and write the results of an earlier run",
    )
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (1 if options.quick else 2)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


if __name__ == "__main__":
    command.run(main)
