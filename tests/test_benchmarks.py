"""The benchmarks: answers are compared, and the command writes down what it measured."""

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import rows, steps
from benchmarks.checking import Answer, Answers, differences
from benchmarks.counting import Counts
from benchmarks.limits.__main__ import Result as Waited
from benchmarks.limits.__main__ import markdown as table_of_limits
from benchmarks.limits.__main__ import tables
from benchmarks.loading import Sample
from benchmarks.reporting import markdown
from benchmarks.results import Report, Result
from benchmarks.stacks import CONTROL, OURS, WORKLOADS, Request
from tests.live import plain_database

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk, which makes the load, is missing")
def test_the_command_compares_measures_and_writes_down(tmp_path: Path) -> None:
    """One short round on SQLite: the ceiling answers what sql_app answers, and has a ratio."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--databases", "sqlite"]
    command += ["--stacks", "driver-json", "--workloads", "create", "--python", sys.executable]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = Report.load(tmp_path / "benchmarks.json")
    assert [result.stack for result in report.results] == [OURS, "driver-json"]
    for result in report.results:
        assert result.difference is None
        assert result.failed == 0
        assert result.rate > 0
        assert result.counts is not None
        assert result.counts.statements >= 1
    assert report.ratio(report.results[1]) is not None
    assert "driver-json" in done.stdout
    assert "driver-json" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def answered(**bodies: object) -> Answers:
    return {
        name: [(request, Answer(200, bodies.get(name))) for request in WORKLOADS[name].compared]
        for name in WORKLOADS
    }


def test_a_difference_is_named() -> None:
    """Where answers differ, the request and the place are named; other workloads are unharmed."""
    ours = answered(user={"id": 1, "active": True}, items=[1, 2])
    assert differences(ours, answered(user={"active": True, "id": 1}, items=[1, 2])) == {}
    found = differences(ours, answered(user={"id": 1, "active": 1}, items=[1, 2]))
    assert set(found) == {"user"}
    assert found["user"].startswith("GET /users/1: ")
    assert '"active": 1' in found["user"]


def test_another_status_is_a_difference() -> None:
    """The same body with another status is another answer."""
    request = Request("/users/1001")
    ours: Answers = {"user": [(request, Answer(404, None))]}
    assert set(differences(ours, {"user": [(request, Answer(200, None))]})) == {"user"}


def test_there_is_no_ratio_where_answers_differ_or_fail(tmp_path: Path) -> None:
    """A ratio is printed only between those that gave the same answers, and all of them."""

    def result(
        stack: str, rate: float, *, failed: int = 0, difference: str | None = None
    ) -> Result:
        sample = Sample(rate, failed, 0.01, 0.02, 1.0, 0.5)
        return Result("sqlite", stack, "user", Counts(2, 2), difference, [sample] * 3)

    report = Report({"machine": "two cores"})
    report.results += [
        result(OURS, 3000),
        result("recipe", 1000),
        result("driver", 1500, failed=1),
        result("piccolo", 500, difference="GET /users/1: something else"),
        result("sqlmodel", 0),
        result(CONTROL, 9000),
    ]
    ratios = {result.stack: report.ratio(result) for result in report.results}
    assert ratios.pop("recipe") == 3
    assert set(ratios.values()) == {None}
    text = markdown(report)
    assert "| recipe | 1,000 (3.00×) |" in text
    assert "| piccolo | 500 (differs) |" in text
    assert "| driver | 1,500, 3 failed |" in text
    for remark in ("something else", "3 requests failed", "not one request was answered"):
        assert remark in text
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["conditions"] == report.conditions


def test_the_cost_of_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m benchmarks.rows` says what a row costs by each plan, in responses of all sizes."""
    monkeypatch.setattr(rows, "SIZES", (1, 3))
    monkeypatch.setattr(rows, "_SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["rows"])
    rows.main()
    shown = capsys.readouterr().out
    assert shown.count("items") >= 3
    for word in ("json", "rows", "instances", "streamed"):
        assert word in shown


def test_the_steps_of_a_request(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m benchmarks.steps` says what each step of a request costs, and leaves no table."""
    monkeypatch.setattr(steps, "_RUNS", 1)
    monkeypatch.setattr(steps, "_CALLS", 20)
    for url in ([], [postgres_url]):
        monkeypatch.setattr(sys, "argv", ["steps", *url])
        steps.main()
        output = capsys.readouterr().out
        for words in ("a prepared query", "of ten at a time", "a lease", "in a def endpoint"):
            assert words in output
    with closing(plain_database(postgres_url)) as db:
        assert db.get_tables() == []


def test_how_late_errors_were() -> None:
    """The limits' table says who hung, who was late by how much, and who knew it earlier."""

    def result(last: float, hung: int = 0) -> str:
        return Waited("psycopg_pool", "first", 1.0, last, hung, {"PoolTimeout": 50 - hung}).text

    assert [result(1.03), result(0.99), result(0.02), result(1.0, 10)] == [
        "+30",
        "-10",
        "after 20",
        "10 hung",
    ]
    [(what, rows)] = tables([Waited("psycopg_pool", "first", 1.0, 1.03, 0, {"PoolTimeout": 50})])
    assert "| psycopg_pool | +30 | PoolTimeout |" in table_of_limits(what, rows)
