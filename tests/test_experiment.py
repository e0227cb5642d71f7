"""The experiment of docs/experiment.md, with short sleeps: it shows what it says it shows."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from experiment.measuring import run_batch
from experiment.serving import ExperimentError, errors_in, serve, temporary_database

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEP = 0.02
# In a hundred calls at once, about forty fail: see docs/experiment.md.
ENOUGH = 100


def test_unprotected_fails_with_peewees_own_error(server_url: str | None) -> None:
    """With thread-local state some calls get 500, each since Peewee says: already opened."""
    batch = run_batch("unprotected", ENOUGH, step=STEP, server_url=server_url)
    assert set(batch.statuses) == {200, 500}
    assert dict(batch.errors) == {
        "peewee.OperationalError: Connection already opened.": batch.statuses[500]
    }


@pytest.mark.parametrize("count", [10, ENOUGH])
def test_protected_answers_all_and_leaves_nothing_open(server_url: str | None, count: int) -> None:
    """sql_app answers every call with 200, and afterwards all its connections are in its pool."""
    batch = run_batch("protected", count, step=STEP, server_url=server_url)
    assert batch.statuses == {200: count}
    assert not batch.errors
    assert batch.left_open == 0
    assert 1 <= batch.idle <= 10


def test_calls_are_made_at_once() -> None:
    """The calls overlap: the first is not answered before the last is sent."""
    batch = run_batch("protected", 10, step=STEP)
    assert max(call.start for call in batch.calls) < min(call.end for call in batch.calls)


def test_command_prints_a_table_and_draws_a_picture(tmp_path: Path) -> None:
    """One command runs both sides, prints what became of the calls, and draws them."""
    picture = tmp_path / "timeline.png"
    done = command("--calls", "5", "100", "--step", str(STEP), "--picture", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("unprotected", "protected", "5 × 200", "100 × 200", "already opened"):
        assert expected in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_port_that_is_taken_is_named_as_the_reason(tmp_path: Path) -> None:
    """Where a server can't start, the command says why, shows its log and exits with 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = command("--port", port, "--picture", str(tmp_path / "timeline.png"))
    assert done.returncode == 1
    assert "its port is taken by another program" in done.stdout
    assert "error while attempting to bind" in done.stdout


def test_an_application_that_does_not_start_is_reported_with_its_log() -> None:
    """The message of a server that stopped at once holds the last lines it logged."""
    with (
        temporary_database(None) as database,
        pytest.raises(ExperimentError, match=r"exit code \d+(.|\n)*Could not import module"),
        serve("experiment.missing:app", {"DATABASE_URL": database.url}),
    ):
        pytest.fail("it started")


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_no_server_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end the command's server with it."""
    arguments = ["--calls", "10", "--step", "10", "--picture", str(tmp_path / "timeline.png")]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiment", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    servers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while not (servers and servers[0].net_connections()):  # until it listens
            assert time.monotonic() < deadline
            time.sleep(0.1)
            servers = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert not any(server.is_running() for server in servers)
    finally:
        process.kill()
        process.wait()


def test_errors_are_the_last_lines_of_the_tracebacks() -> None:
    """Of each failed request the log gives one error: the one that reached uvicorn."""
    log = """\
INFO:     Uvicorn running on http://127.0.0.1:8000 (Press CTRL+C to quit)
ERROR:    Exception in ASGI application
Traceback (most recent call last):
  File "a.py", line 1, in a
    a()
KeyError: 'a'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 1, in b
    b()
package.SomeError: b
ERROR:    Exception in ASGI application
Traceback (most recent call last):
  File "c.py", line 1, in c
    c()
ValueError: c
INFO:     Shutting down
"""
    assert errors_in(log) == {"package.SomeError: b": 1, "ValueError: c": 1}


@pytest.fixture(params=["sqlite", "postgres", "mysql"])
def server_url(request: pytest.FixtureRequest) -> str | None:
    """What `run_batch` takes; the test runs once on each of the three databases."""
    if request.param == "sqlite":
        return None
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiment", *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "120"},
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
