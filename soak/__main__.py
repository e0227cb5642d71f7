"""``python -m soak``: random faults until the time is over, or processes killed again and again."""

import argparse
import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from experiment import command

from .killing import Kills, kill_server, kill_writers
from .reporting import closing_table, kills_table, running_table
from .running import DATABASES, SERVERS, Report, run_rounds, sqlite_url, target_on
from .servers import Server, UnavailableError

#: How many times processes are killed by `--kills`, on a file and on a server.
_KILLS = {"sqlite": 10_000, "postgresql": 500, "mysql": 500}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if nothing was lost, torn, mixed up or left behind."""
    options = _parse(arguments)
    console = Console()
    # What the library warns of is what we do to it.
    logging.getLogger("fastapi_peewee").addHandler(logging.NullHandler())
    try:
        clean = (_soak if options.kills is None else _kill)(options, console)
    except UnavailableError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. The servers are stopped and their databases removed.")
        return 130
    return int(not clean)


def _soak(options: argparse.Namespace, console: Console) -> bool:
    reports = [Report(database) for database in options.databases]
    console.print(f"seed {options.seed}", highlight=False)
    with Live(console=console, refresh_per_second=4) as live:

        def on_progress() -> None:
            live.update(running_table(reports))

        for report in reports:
            on_progress()
            seconds = 60 * options.minutes / len(reports)
            asyncio.run(_rounds(report, options, time.monotonic() + seconds, on_progress))
    console.print(closing_table(reports))
    for report in reports:
        pauses = "" if options.pauses == 1 else f"--pauses {options.pauses:g} "
        same = f"--seed {options.seed} --database {report.database} {pauses}--round …"
        again = f'make soak ARGS="{same}"'
        for words in (*report.violations, *report.leaks):
            console.print(f"{report.database}, {words}", style="red", markup=False)
        if not report.clean:
            console.print(f"The same operations and faults again: {again}", markup=False)
    return all(report.clean for report in reports)


async def _rounds(
    report: Report, options: argparse.Namespace, deadline: float, on_progress: Callable[[], None]
) -> None:
    with target_on(report.database) as target:
        rounds = run_rounds(
            report,
            target,
            options.seed,
            options.operations,
            on_progress,
            options.round or 0,
            options.pauses,
        )
        async for _ in rounds:
            on_progress()
            if options.round is not None or time.monotonic() > deadline:
                return


def _kill(options: argparse.Namespace, console: Console) -> bool:
    kills: dict[str, Kills] = {}
    with Live(console=console, refresh_per_second=4) as live:

        def on_cycle(what: str) -> Callable[[Kills], None]:
            def show(now: Kills) -> None:
                kills[what] = now
                live.update(kills_table(kills))

            return show

        for database in options.databases:
            count = options.kills or _KILLS[database]
            with _url_and_server(database) as (url, server):
                kill_writers(url, count, options.seed, on_cycle(f"a writer, {database}"))
                if server is not None:
                    killing = kill_server(server, count, options.seed, on_cycle(database))
                    asyncio.run(killing)
    for result in kills.values():
        for words in result.violations:
            console.print(words, style="red", markup=False)
    return not any(result.violations for result in kills.values())


@contextmanager
def _url_and_server(database: str) -> Iterator[tuple[str, Server | None]]:
    if database == "sqlite":
        with sqlite_url() as url:
            yield url, None
    else:
        with SERVERS[database]() as server:
            yield server.url, server


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument(
        "--seed", type=int, help="repeats the operations and faults of a run (default: a new one)"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="in all (default: %(default)s)")
    parser.add_argument(
        "--database",
        dest="databases",
        action="append",
        choices=DATABASES,
        help="may be given more than once (default: all three)",
    )
    parser.add_argument(
        "--operations", type=int, default=2000, help="of a round (default: %(default)s)"
    )
    parser.add_argument(
        "--pauses",
        type=float,
        default=1.0,
        help="times as long between faults, so that more operations are done (default: 1)",
    )
    parser.add_argument("--round", type=int, help="only this one")
    parser.add_argument(
        "--kills",
        type=int,
        nargs="?",
        const=0,
        help="kill processes instead, so many times (default: 10000 on SQLite, 500 on a server)",
    )
    options = parser.parse_args(arguments)
    options.databases = options.databases or list(DATABASES)
    if options.seed is None:
        options.seed = random.randrange(1_000_000)
    return options


if __name__ == "__main__":
    command.run(main)
