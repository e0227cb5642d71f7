"""Load from wrk, on a core of its own."""

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from experiment.serving import ExperimentError, Server

from .databases import USERS
from .stacks import Workload

_SCRIPT = Path(__file__).with_name("load.lua")
_TIMEOUT = 10  # seconds after which a request counts as failed
_WARM_UP = 0.5  # seconds


def require_wrk() -> str:
    """wrk's version. It is installed where that takes no more than a command.

    Raises:
        ExperimentError: it can't be had.
    """
    if shutil.which("wrk") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in ("update", "install --yes --no-install-recommends wrk"):
            subprocess.run(["apt-get", "-qq", *command.split()], capture_output=True, check=False)
    if shutil.which("wrk") is None:
        raise ExperimentError(
            "wrk, which makes the load, is not installed, and could not be installed from here "
            "(Debian: apt-get install wrk)."
        )
    said = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False)
    return said.stdout.split()[1].removeprefix("debian/")


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Bind what this thread does and starts meanwhile to one core; None leaves it as it is."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_cores() -> tuple[int, int] | tuple[None, None]:
    """One for the server and one for the load; nothing where a process can't be bound to one."""
    if not hasattr(os, "sched_getaffinity"):
        return None, None
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


@dataclass(frozen=True)
class Sample:
    """One measurement: requests a second, those that failed, seconds until an answer.

    `busy` is the share of the time that the server's process worked, `load_busy` that wrk did: near
    1 for wrk, it would be wrk that is measured.
    """

    rate: float
    failed: int
    median: float
    p99: float
    busy: float
    load_busy: float


def measure(server: Server, workload: Workload, seconds: int, connections: int) -> Sample:
    """Warm the server up, then load it, with so many connections at a time."""
    command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}s"]
    command += [f"--timeout={_TIMEOUT}s", f"--script={_SCRIPT}", server.url, "--"]
    command += [workload.measured.path, str(USERS)]
    if workload.measured.json is not None:
        command.append(json.dumps(workload.measured.json))
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, check=False, timeout=_WARM_UP)
    process = psutil.Process(server.pid)
    before, load_before, start = _cpu(process), _children_cpu(), time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - start
    try:
        said = json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ExperimentError(f"wrk said: {ran.stdout}{ran.stderr}") from error
    return Sample(
        rate=said["requests"] / said["microseconds"] * 1e6,
        failed=said["refused"] + said["socket_errors"],
        median=said["p50"] / 1e6,
        p99=said["p99"] / 1e6,
        busy=(_cpu(process) - before) / took,
        load_busy=(_children_cpu() - load_before) / took,
    )


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
