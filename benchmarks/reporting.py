"""The results as tables: for the screen, and for docs/benchmarks.md."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from .results import Report, Result
from .stacks import DATABASES, OURS, WORKLOADS

_BEGIN, _END = "<!-- results: written by the command -->", "<!-- end of the results -->"
_PICTURE = """\
![Bars: requests a second of each way, for each kind of request on each database. The numbers are in
the tables below.](images/benchmarks.png)"""
_DATA = """\
The same numbers, round by round, with the time until an answer came and the share of its core that
the server used: [benchmarks.json](benchmarks.json)."""
_CPU = "the server’s processor time for a request, in microseconds"
_COUNTS = {
    "sqlite": "statements for a request",
    "postgresql": "statements for a request, and round trips",
}


def screen_tables(report: Report) -> Iterator[Table]:
    for database in report.databases():
        table = _table(f"{DATABASES[database]}: requests a second; how many times that we answer")
        table.add_column("stack")
        for workload in report.workloads():
            table.add_column(workload, justify="right")
            table.add_column("ours", justify="right")
        for stack in report.stacks():
            cells = []
            for workload in report.workloads():
                result = report.find(database, stack, workload)
                cells += [_rate(result), _ratio(report, result)]
            table.add_row(stack, *cells, style="bold" if stack == OURS else "")
        yield table
    for database in report.databases():
        for what, rows in (
            (_COUNTS[database], _count_rows(report, database)),
            (_CPU, _cpu_rows(report, database)),
        ):
            table = _table(f"{DATABASES[database]}: {what}")
            for heading in next(rows):
                table.add_column(heading, justify="right" if table.columns else "left")
            for row in rows:
                table.add_row(*row)
            yield table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )


def markdown(report: Report) -> str:
    """The tables and the conditions, as they stand in docs/benchmarks.md."""
    parts = []
    for database in report.databases():
        rows = [["", *(WORKLOADS[name].title for name in report.workloads())]]
        for stack in report.stacks():
            cells = []
            for workload in report.workloads():
                result = report.find(database, stack, workload)
                ratio = _ratio(report, result)
                cells.append(f"{_rate(result)} ({ratio})" if ratio else _rate(result))
            rows.append([_bold(stack), *(_bold(cell, stack) for cell in cells)])
        title = "requests a second, and how many times as many sql_app answers"
        parts.append(f"### {DATABASES[database]}: {title}\n\n{_markdown_table(rows)}")
    for database in report.databases():
        counts = _markdown_table(list(_count_rows(report, database)))
        parts.append(f"### {DATABASES[database]}: {_COUNTS[database]}\n\n{counts}")
        cpu = _markdown_table(list(_cpu_rows(report, database)))
        parts.append(f"### {DATABASES[database]}: {_CPU}\n\n{cpu}")
    parts.append("### Conditions\n\n" + "; ".join(_conditions(report)) + ".")
    if remarks := list(report.remarks()):
        parts.append("### Remarks\n\n" + "\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join(parts)


def write_page(report: Report, page: Path) -> None:
    """Put the results into docs/benchmarks.md, where its markers are."""
    before, begin, rest = page.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {_BEGIN} and {_END}")
    results = f"{_PICTURE}\n\n{markdown(report)}\n\n{_DATA}"
    page.write_text(f"{before}{begin}\n\n{results}\n\n{end}{after}")


def _bold(text: str, stack: str | None = None) -> str:
    return f"**{text}**" if (stack or text) == OURS else text


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def _rate(result: Result | None) -> str:
    if result is None:
        return "–"
    failed = f", {result.failed} failed" if result.failed else ""
    return f"{result.rate:,.0f}{failed}"


def _ratio(report: Report, result: Result | None) -> str:
    if result is None:
        return ""
    if result.difference:
        return "differs"
    ratio = report.ratio(result)
    return "" if ratio is None else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def _count_rows(report: Report, database: str) -> Iterator[list[str]]:
    """The headings, then a row for each stack."""
    yield ["stack", *report.workloads()]
    for stack in report.stacks():
        found = (report.find(database, stack, name) for name in report.workloads())
        yield [stack, *(_counts(result) for result in found)]


def _cpu_rows(report: Report, database: str) -> Iterator[list[str]]:
    yield ["stack", *report.workloads()]
    for stack in report.stacks():
        found = (report.find(database, stack, name) for name in report.workloads())
        yield [stack, *(f"{result.cpu * 1e6:,.0f}" if result else "–" for result in found)]


def _counts(result: Result | None) -> str:
    if result is None or result.counts is None:
        return "–"
    statements, round_trips = result.counts
    if result.database == "sqlite":
        return f"{statements:g}"
    return f"{statements:g} in {round_trips:g}"


def _conditions(report: Report) -> Iterator[str]:
    named = {"machine": "", "load": "", "cores": "cores: "}
    for name, value in report.conditions.items():
        yield f"{named[name]}{value}" if name in named else f"{name} {value}"
