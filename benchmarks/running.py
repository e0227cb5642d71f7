"""A run: first all answers are compared and all statements counted, then round after round."""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from experiment.serving import ExperimentError, Server, serve

from .checking import Answers, answers, ask, differences
from .counting import Counts, Tally, counted
from .databases import USERS, Filled, filled_database
from .loading import measure, pinned, require_wrk, two_cores
from .results import OTHER_WORK, Report, Result
from .stacks import CONTROL, DATABASES, OURS, STACKS, WORKLOADS, Workload

_PACKAGES = (
    "fastapi",
    "starlette",
    "pydantic",
    "uvicorn",
    "uvloop",
    "httptools",
    "peewee",
    "psycopg",
    "asyncpg",
    "aiosqlite",
    "sqlalchemy",
    "sqlmodel",
    "tortoise-orm",
    "piccolo",
)
_UVICORN = ("--workers", "1", "--loop", "uvloop", "--http", "httptools")
_SYNCHRONOUS = {"0": "OFF", "1": "NORMAL", "2": "FULL", "3": "EXTRA"}
_WARMING_REQUESTS = 80
_COUNTED_REQUESTS = 10


ROOT = Path(__file__).parents[1]
_BENCH = ROOT / ".venv-bench" / "bin" / "python"
#: The interpreter that has the packages of all that is compared.
PYTHON = _BENCH if _BENCH.exists() else Path(sys.executable)


@dataclass(frozen=True)
class Plan:
    stacks: list[str]
    workloads: list[str]
    #: Server URLs by database; None is for a SQLite file.
    databases: dict[str, str | None]
    seconds: int
    rounds: int
    connections: int
    #: The interpreter that runs the servers.
    python: str

    @property
    def steps(self) -> int:
        """How many times `on_step` is called, at most."""
        measured = self.rounds * len(self.workloads)
        return len(self.databases) * len(self.stacks) * (1 + measured)


def run(plan: Plan, on_step: Callable[[str], None]) -> Report:
    """Measure what is planned.

    Args:
        plan: what.
        on_step: called before each step with what is done next.

    Raises:
        ExperimentError: wrk, a database or our own application can't be had.
    """
    server_core, load_core = two_cores()
    report = Report(_conditions(plan, require_wrk(), server_core is not None))
    with ExitStack() as stack:
        filled = {
            name: stack.enter_context(filled_database(url)) for name, url in plan.databases.items()
        }
        for name, database in filled.items():
            report.conditions[DATABASES[name]] = database.version
            if level := _SYNCHRONOUS.get(database.synchronous):
                report.conditions["SQLite’s journal"] = f"WAL, synchronous {level}"
        stack.enter_context(pinned(load_core))
        started = [
            (name, stack_name)
            for name in plan.databases
            for stack_name in _check(plan, name, filled[name], report, on_step)
        ]
        errors: Counter[str] = Counter()
        for number in range(1, plan.rounds + 1):
            for name, stack_name in started:
                with _serving(plan, name, stack_name, filled[name], server_core) as server:
                    for result in report.results:
                        if (result.database, result.stack) == (name, stack_name):
                            on_step(f"round {number}: {stack_name}, {result.workload}, {name}")
                            workload = WORKLOADS[result.workload]
                            sample = measure(server, workload, plan.seconds, plan.connections)
                            result.samples.append(sample)
                for error, count in server.errors.items():
                    errors[f"{stack_name}, {name}, in the server’s log: {error}"] += count
    report.notes += [f"{error} ({count} ×)" for error, count in errors.items()]
    return report


def _check(
    plan: Plan, database: str, filled: Filled, report: Report, on_step: Callable[[str], None]
) -> Iterator[str]:
    """Compare and count; what is found goes into the report. Gives the stacks that do start."""
    ours: Answers | None = None
    for stack in plan.stacks:
        on_step(f"answers and statements: {stack}, {database}")
        try:
            found, counts = _answers_and_counts(plan, database, stack, filled)
        except (ExperimentError, httpx.HTTPError) as error:
            if stack == OURS:
                raise
            report.notes.append(f"{stack}, {database}: not measured. {error}")
            continue
        if ours is None:
            ours = found
        differing = {} if stack == CONTROL else differences(ours, found)
        for workload in plan.workloads:
            report.results.append(
                Result(database, stack, workload, counts[workload], differing.get(workload))
            )
        yield stack


def _answers_and_counts(
    plan: Plan, database: str, stack: str, filled: Filled
) -> tuple[Answers, dict[str, Counts]]:
    runner = "benchmarks.tracing" if database == "sqlite" else "uvicorn"
    with (
        filled.copy() as copy,
        counted(copy.url) as counter,
        serve(
            STACKS[stack].application.format(database=database),
            _settings(filled) | counter.settings,
            python=plan.python,
            runner=runner,
            options=_UVICORN,
        ) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client,
    ):
        found = answers(client, plan.workloads)
        return found, {name: _count(client, counter, WORKLOADS[name]) for name in plan.workloads}


def _count(client: httpx.Client, counter: Tally, workload: Workload) -> Counts:
    """What one request of a workload sends, when all that is done once has been done."""

    def request(number: int) -> None:
        path = workload.measured.path.replace("{id}", str(number * 97 % USERS + 1))
        status, body = ask(client, workload.measured._replace(path=path))
        if status != 200:
            raise ExperimentError(f"{path} was answered with {status}: {body}")

    with ThreadPoolExecutor(10) as threads:  # all connections are opened
        list(threads.map(request, range(_WARMING_REQUESTS)))
    before = counter.settled()
    for number in range(_COUNTED_REQUESTS):
        request(number)
    after = counter.settled()
    counts = zip(before, after, strict=True)
    return Counts(*((later - earlier) / _COUNTED_REQUESTS for earlier, later in counts))


@contextmanager
def _serving(
    plan: Plan, database: str, stack: str, filled: Filled, core: int | None
) -> Iterator[Server]:
    """The application on a fresh copy of the database, bound to a core."""
    with ExitStack() as exits:
        copy = exits.enter_context(filled.copy())
        options = STACKS[stack].sqlite_options if database == "sqlite" else ""
        with pinned(core):
            server = exits.enter_context(
                serve(
                    STACKS[stack].application.format(database=database),
                    _settings(filled) | {"DATABASE_URL": copy.url + options},
                    python=plan.python,
                    options=_UVICORN,
                )
            )
        yield server


def _settings(filled: Filled) -> dict[str, str]:
    root = str(ROOT)
    return {
        "SQLITE_SYNCHRONOUS": filled.synchronous,
        "PGSSLMODE": "disable",  # on one machine, and for the relay that counts
        "PYTHONPATH": root,
    }


def _conditions(plan: Plan, wrk: str, is_pinned: bool) -> dict[str, str]:
    """How it was measured, and with which versions."""
    code = (
        "import json, platform\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "found = {'Python': platform.python_version()}\n"
        f"for name in {_PACKAGES}:\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    said = subprocess.run([plan.python, "-c", code], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(said.stdout)
    return {
        "machine": _machine(),
        "load": f"{plan.connections} connections, {plan.rounds} × {plan.seconds} s",
        OTHER_WORK: f"{psutil.cpu_percent(interval=2):.0f} %",
        "cores": "the server on one, wrk on another" if is_pinned else "not bound to any",
        "wrk": wrk,
        **versions,
    }


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{cores} cores ({model}), {platform.system()}"
