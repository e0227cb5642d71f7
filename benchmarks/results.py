"""What was measured, as data: it goes into a JSON file and comes back from it."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .counting import Counts
from .loading import Sample
from .stacks import CONTROL, OURS

OTHER_WORK = "in use before"


@dataclass
class Result:
    """One workload of one stack on one database, in all rounds."""

    database: str
    stack: str
    workload: str
    #: For one request; None if they weren't counted.
    counts: Counts | None = None
    #: Where its answers differ from ours; None if they don't.
    difference: str | None = None
    samples: list[Sample] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests a second: the median over the rounds."""
        return statistics.median(sample.rate for sample in self.samples)

    @property
    def cpu(self) -> float:
        """Processor time of the server for a request: the median, in seconds."""
        return statistics.median(sample.busy / max(sample.rate, 1) for sample in self.samples)

    @property
    def failed(self) -> int:
        return sum(sample.failed for sample in self.samples)

    @property
    def comparable(self) -> bool:
        """It answers what we answer, and it answers all."""
        return (
            self.stack != CONTROL and self.difference is None and not self.failed and self.rate > 0
        )


@dataclass
class Report:
    """A whole run: under which conditions, what came out, and what couldn't be measured."""

    conditions: dict[str, str]
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def databases(self) -> list[str]:
        return list(dict.fromkeys(result.database for result in self.results))

    def stacks(self) -> list[str]:
        return list(dict.fromkeys(result.stack for result in self.results))

    def workloads(self) -> list[str]:
        return list(dict.fromkeys(result.workload for result in self.results))

    def find(self, database: str, stack: str, workload: str) -> Result | None:
        """None if it wasn't measured."""
        for result in self.results:
            if (result.database, result.stack, result.workload) == (database, stack, workload):
                return result if result.samples else None
        return None

    def ratio(self, result: Result) -> float | None:
        """How many times as many requests we answer; None where that means nothing."""
        ours = self.find(result.database, OURS, result.workload)
        if ours is None or result is ours or not (ours.comparable and result.comparable):
            return None
        return ours.rate / result.rate

    def remarks(self) -> Iterator[str]:
        """What a reader of the numbers has to know, worst first."""
        yield from self.notes
        other_work = float(self.conditions.get(OTHER_WORK, "0").removesuffix(" %"))
        if other_work > 10:
            yield (
                f"The machine had other work to do: before, its cores were in use {other_work:g} % "
                "of the time. So the rates are low, uneven and unfair, since a server with many "
                "threads then gets more of a core than one with one. Processor times suffer less. "
                "Measure again when it has none."
            )
        for result in self.results:
            where = f"{result.stack}, {result.workload}, {result.database}"
            if result.difference and result.stack != CONTROL:
                yield f"{where}: answers differently, so there is no ratio. {result.difference}"
            if result.failed:
                yield f"{where}: {result.failed} requests failed, so there is no ratio."
            elif result.samples and not result.rate:
                yield f"{where}: in most rounds not one request was answered."
            busiest = max((sample.load_busy for sample in result.samples), default=0.0)
            if busiest > 0.9:
                yield f"{where}: wrk was busy {busiest:.0%} of the time, so it was a limit, too."

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        data = json.loads(path.read_text())
        results = []
        for values in data["results"]:
            counts = values.pop("counts")
            samples = [Sample(**sample) for sample in values.pop("samples")]
            results.append(Result(**values, counts=counts and Counts(*counts), samples=samples))
        return cls(data["conditions"], results, data["notes"])
