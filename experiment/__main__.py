"""``python -m experiment``: the how-to's experiment, measured and drawn."""

import argparse
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from .command import count, run
from .drawing import draw_timeline
from .measuring import Batch, Call, run_batch
from .serving import APPLICATIONS, ExperimentError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if the protected side answered every call, otherwise 1."""
    options = _parse(arguments)
    console = Console()
    try:
        batches = _run_batches(options, console)
    except ExperimentError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. The servers are stopped and their databases removed.")
        return 130
    console.print(_table(batches))
    for sentence in _findings(batches):
        console.print(sentence, highlight=False)
    draw_timeline(batches, options.picture, _conditions(options))
    console.print(f"The timeline is in {options.picture}.", highlight=False)
    return int(any(batch.failed for batch in batches if batch.side == "protected"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiment",
        description="Sends the same slow requests at once to an application with Peewee's own "
        "thread-local connection state and to sql_app, and shows what becomes of them.",
    )
    parser.add_argument(
        "--url",
        type=_server_url,
        help="a PostgreSQL or MySQL database; the experiment makes databases of its own beside it "
        "and drops them at the end (default: temporary SQLite files)",
    )
    parser.add_argument(
        "--step",
        type=_seconds,
        default=0.2,
        help="each call sleeps this much shorter than the one before, from nine steps down to "
        "none; seconds (default: %(default)s; on the page it is 1)",
    )
    parser.add_argument(
        "--calls",
        type=count,
        nargs="+",
        default=[10, 100],
        metavar="N",
        help="how many calls at once, one batch for each number (default: 10 100)",
    )
    parser.add_argument(
        "--picture",
        type=_picture,
        default=Path("experiment.png"),
        help="where to draw the timeline (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, default=0, help="for the servers (default: any that is free)"
    )
    return parser.parse_args(arguments)


def _server_url(text: str) -> str:
    if urlsplit(text).scheme not in ("postgresql", "postgres", "mysql"):
        raise argparse.ArgumentTypeError(
            f"must begin with postgresql:// or mysql://; for SQLite leave it out, got: {text}"
        )
    return text


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 60:
        raise argparse.ArgumentTypeError(f"must be from 0 to 60, got: {text}")
    return seconds


def _picture(text: str) -> Path:
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def _run_batches(options: argparse.Namespace, console: Console) -> list[Batch]:
    batches = []
    with Progress(
        TextColumn("{task.description:<17}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]:<17}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        rows = [
            (
                progress.add_task(f"{side} × {count}", total=count, start=False, state=""),
                side,
                count,
            )
            for side in APPLICATIONS
            for count in dict.fromkeys(options.calls)
        ]
        for row, side, count in rows:
            batches.append(_run_batch(options, progress, row, side, count))
    return batches


def _run_batch(
    options: argparse.Namespace, progress: Progress, row: TaskID, side: str, count: int
) -> Batch:
    failed = 0

    def on_start() -> None:
        progress.start_task(row)
        progress.update(row, state="waiting")

    def on_answer(call: Call) -> None:
        nonlocal failed
        failed += not call.succeeded
        progress.update(row, advance=1, state=f"{failed} failed")

    progress.update(row, state="starting a server")
    return run_batch(
        side,
        count,
        step=options.step,
        server_url=options.url,
        port=options.port,
        on_start=on_start,
        on_answer=on_answer,
    )


def _table(batches: Sequence[Batch]) -> Table:
    table = Table(
        title="/slowusers/, all calls at once",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for heading in ("side", "calls", "answers", "first error in the server's log"):
        table.add_column(heading)
    for heading in ("left open", "longest", "median"):
        table.add_column(heading, justify="right")
    for batch in batches:
        statuses = sorted(batch.statuses.items(), key=lambda item: item[0] or 999)
        first_error = next(iter(batch.errors), "–")
        if len(batch.errors) > 1:
            first_error += f" (and {len(batch.errors) - 1} other kinds)"
        table.add_row(
            batch.side,
            str(len(batch.calls)),
            "\n".join(f"{number} × {status or 'no answer'}" for status, number in statuses),
            first_error,
            str(batch.left_open),
            f"{batch.longest:.2f} s",
            f"{batch.median:.2f} s",
        )
    return table


def _findings(batches: Sequence[Batch]) -> Iterator[str]:
    """What the table says, in words; also where it isn't what the page leads one to expect."""
    for batch in batches:
        calls = len(batch.calls)
        if batch.side == "protected" and batch.failed:
            yield f"{batch.failed} of {calls} protected calls failed, which must not happen."
        elif batch.side == "unprotected" and not batch.failed:
            yield (
                f"Unprotected, all {calls} calls succeeded this time: whether two requests meet in "
                "one thread is a matter of chance. Run it again, or with more calls."
            )
    if waiting := max(batch.idle for batch in batches):
        yield (
            f"“Left open” leaves out the connections in the pool of sql_app (up to {waiting}), "
            "which wait for the next request."
        )


def _conditions(options: argparse.Namespace) -> str:
    scheme = urlsplit(options.url or "sqlite:").scheme
    database = {"sqlite": "SQLite", "mysql": "MySQL"}.get(scheme, "PostgreSQL")
    versions = (f"{name} {version(name.lower())}" for name in ("FastAPI", "Peewee"))
    return f"{', '.join(versions)}; {database}; sleeps of 9, 8, … 0 × {options.step:g} s"


if __name__ == "__main__":
    run(main)
