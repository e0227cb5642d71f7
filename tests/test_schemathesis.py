"""`sql_app` keeps to its OpenAPI: Schemathesis asks for whatever that allows, and for what not."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import live
from tests.live import serve
from tests.servers import OwnDatabase

SOAK = int(os.environ.get("SCHEMATHESIS_REQUESTS", 0))
CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
#: Requests for one operation and phase; about 12 times as many come of it in all.
EXAMPLES = 40

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("schemathesis") is None,
        reason="Schemathesis is one of the development requirements (requirements/dev.txt)",
    ),
    pytest.mark.parametrize("database", ["sqlite", "postgres"]),
]


@pytest.mark.slow
@pytest.mark.timeout(300)  # seconds, on a machine with much else to do
def test_whatever_is_asked_the_answer_is_declared(
    database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """About 700 requests on each database, well-formed and malformed, alone and in sequences, pass
    all of Schemathesis's checks: no error of the server's, no undeclared status, header or body."""
    assert run(database, request, tmp_path, seeds=[1]) >= 500


@pytest.mark.skipif(not SOAK, reason="for a soak: SCHEMATHESIS_REQUESTS=10000 (on each database)")
@pytest.mark.timeout(0)
def test_ten_thousand_answers_are_declared(
    database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The same, with other seeds, as often as `SCHEMATHESIS_REQUESTS` says."""
    assert run(database, request, tmp_path, seeds=range(2, 1000)) >= SOAK


def run(database: str, request: pytest.FixtureRequest, folder: Path, seeds: Any) -> int:
    """Run Schemathesis with one seed after the other, until there are enough requests.

    Returns how many they were.
    """
    if database == "sqlite":
        url = f"sqlite:///{folder / 'test.db'}"
    else:
        own: OwnDatabase = request.getfixturevalue(f"{database}_database")
        own.empty()
        url = own.url
    count = 0
    with serve("sql_app_with_quick_hashes", DATABASE_URL=url, SLOWUSERS_STEP="0") as server:
        for seed in seeds:
            report = folder / f"{seed}.json"
            command = [sys.executable, "-m", "schemathesis.cli", "--config-file", CONFIGURATION]
            command += ["run", f"{server.url}/openapi.json", "--checks", "all", "--no-color"]
            command += ["--seed", seed, "--max-examples", 200 if SOAK else EXAMPLES]
            command += ["--generation-database", "none"]
            command += ["--report", "json", "--report-json-path", report]
            done = subprocess.run(
                [str(word) for word in command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout
            summary = json.loads(report.read_text())
            assert summary["operations"]["tested"] == summary["operations"]["total"] == 6
            for phase in ("coverage", "fuzzing", "stateful"):
                assert summary["phases"][phase]["status"] == "success", done.stdout
            count += summary["test_cases"]["generated"]
            print(f"{database}, seed {seed}: {count} requests so far", flush=True)
            if count >= SOAK:
                break
        assert server.errors == []
        assert asyncio.run(live.stats(server)).in_use == 0
    return count
