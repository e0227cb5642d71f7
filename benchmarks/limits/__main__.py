"""``python -m benchmarks.limits``: measure, show, and write down."""

import argparse
import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiment import command
from experiment.serving import ExperimentError, temporary_database
from soak.proxy import Proxy

from ..databases import find_postgresql
from ..running import PYTHON, ROOT

POOLS = (
    "asyncio.sleep",
    "fastapi-peewee, async",
    "fastapi-peewee, def",
    "fastapi-peewee, thread",
    "psycopg_pool",
    "asyncpg",
    "SQLAlchemy + asyncpg",
    "playhouse.pool",
    "playhouse.pwasyncio",
)
MODES = {
    "refused": "connections are lost, the port refuses new ones",
    "swallowed": "nothing comes back; the connections were in use just now",
    "idle": "nothing comes back; the connections had been idle for a second",
    "first": "nothing comes back; no connection was open",
    "held": "all connections are held, and nobody gives one back",
}
LIMITS = (5.0, 1.0, 0.25)
WAITERS = 50
SIZE = 10
#: Seconds past the limit after which nobody believes in an end.
PATIENCE = 5.0
#: Seconds over the limit that need no second attempt to be believed.
SMALL = 0.05


@dataclass
class Result:
    """What became of those who waited, in the best of several attempts.

    Attributes:
        last: seconds until the last one had its error.
        hung: how many had none when the patience was over.
        errors: how many had which.
    """

    pool: str
    mode: str
    limit: float
    last: float
    hung: int
    errors: dict[str, int]
    attempts: int = 1

    @property
    def over(self) -> float:
        """Milliseconds over the limit. Less than 0: all had their error earlier."""
        return 1000 * (self.last - self.limit)

    @property
    def text(self) -> str:
        if self.hung:
            return f"{self.hung} hung"
        return f"{self.over:+.0f}" if self.over >= -50 else f"after {1000 * self.last:.0f}"


def attempt(pool: str, mode: str, limit: float, url: str, python: str) -> Result:
    """Let them all ask one pool, under one fault."""
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(url))
        if mode == "first":
            proxy.swallowing = True
        words = [pool, mode, proxy.url, *map(str, (limit, WAITERS, SIZE, limit + PATIENCE))]
        process = subprocess.Popen(
            [python, "-m", "benchmarks.limits.pools", *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            if mode == "refused":
                stack.close()  # nobody listens there any more
            elif mode != "held":
                proxy.swallowing = True
            answer, complaints = process.communicate("go\n", timeout=60)
        finally:
            process.kill()
            process.wait()
        if ready != "ready\n" or not answer:
            raise ExperimentError(f"{pool}, {mode}: {complaints}")
    found = json.loads(answer.splitlines()[-1])
    times = [seconds for seconds, _ in found if seconds is not None]
    errors = Counter(error or "no error" for seconds, error in found if seconds is not None)
    return Result(pool, mode, limit, max(times, default=0), len(found) - len(times), dict(errors))


def best(pool: str, mode: str, limit: float, url: str, python: str, attempts: int) -> Result:
    """The best of some attempts; none is repeated that can't become better by much."""
    result = attempt(pool, mode, limit, url, python)
    for number in range(2, attempts + 1):
        if not result.hung and result.last - limit <= SMALL:
            break
        again = attempt(pool, mode, limit, url, python)
        result = min(result, again, key=lambda each: (each.hung, each.last))
        result.attempts = number
        time.sleep(0.1)
    return result


def tables(results: Sequence[Result]) -> Iterator[tuple[str, list[list[str]]]]:
    """For each mode what it is, and a table whose first row is its heading."""
    for mode, what in MODES.items():
        rows = [result for result in results if result.mode == mode]
        if not rows:
            continue
        limits = sorted({result.limit for result in rows}, reverse=True)
        table = [["", *(f"{limit:g} s" for limit in limits), "errors"]]
        for pool in dict.fromkeys(result.pool for result in rows):
            mine = {result.limit: result for result in rows if result.pool == pool}
            cells = [mine[limit].text if limit in mine else "" for limit in limits]
            errors = dict.fromkeys(error for result in mine.values() for error in result.errors)
            table.append([pool, *cells, ", ".join(errors)])
        yield what, table


def on_screen(what: str, rows: list[list[str]]) -> Table:
    heading, *others = rows
    table = Table(*heading, title=what)
    for row in others:
        table.add_row(*row)
    return table


def markdown(what: str, rows: list[list[str]]) -> str:
    heading, *others = rows
    rule = ["---", *["--:"] * (len(heading) - 2), "---"]
    lines = ["| " + " | ".join(row) + " |" for row in (heading, rule, *others)]
    return f"**{what[0].upper()}{what[1:]}:**\n\n" + "\n".join(lines)


def write_page(results: Sequence[Result]) -> None:
    page = ROOT / "docs" / "reliability.md"
    before, begin, rest = page.read_text().partition("<!-- limits -->\n")
    _, end, after = rest.partition("<!-- end of limits -->")
    found = "\n\n".join(markdown(what, rows) for what, rows in tables(results))
    page.write_text(f"{before}{begin}\n{found}\n\n{end}{after}")


def main() -> int:
    """Returns the exit code: 0 if none of ours hung, nor had its error 100 ms after its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    for name, choices in (("pools", POOLS), ("modes", MODES)):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=list(choices),
            default=list(choices),
            metavar="NAME",
            help=f"some of: {'; '.join(choices)} (default: all)",
        )
    parser.add_argument("--limits", nargs="+", type=float, default=LIMITS, metavar="SECONDS")
    parser.add_argument(
        "--attempts", type=command.count, default=3, help="of which the best counts"
    )
    parser.add_argument("--postgresql", metavar="URL", help="a server (default: at 127.0.0.1)")
    parser.add_argument("--python", type=Path, default=PYTHON)
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--read", type=Path, metavar="JSON", help="show an earlier run's")
    parser.add_argument("--docs", action="store_true", help="write them into docs/reliability.md")
    options = parser.parse_args()
    console = Console()
    if options.read:
        results = [Result(**each) for each in json.loads(options.read.read_text())]
    else:
        results = measure(options, console)
    for what, rows in tables(results):
        console.print(on_screen(what, rows), "")
    if options.docs:
        write_page(results)
    ours = [result for result in results if result.pool.startswith("fastapi-peewee")]
    late = [r for r in ours if r.hung or r.over > 100]
    return int(bool(late))


def measure(options: argparse.Namespace, console: Console) -> list[Result]:
    results: list[Result] = []
    with temporary_database(find_postgresql(options.postgresql)) as database:
        for mode, limit, pool in product(options.modes, options.limits, options.pools):
            python = str(options.python)
            result = best(pool, mode, limit, database.url, python, options.attempts)
            results.append(result)
            console.print(f"{mode}, {limit:g} s, {pool}: {result.text}", highlight=False)
            if options.output:
                found = json.dumps([asdict(result) for result in results], indent=1)
                options.output.write_text(found + "\n")
    return results


if __name__ == "__main__":
    command.run(main)
