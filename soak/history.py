"""A history of transactions that append to lists and read them, and what it must never show.

After the list-append histories of Elle (Kingsbury and Alvaro, 2020): since every value is appended
once, and a list shows in which order, who depends on whom can be read from the lists alone. The
names of what is forbidden are Adya's.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import NamedTuple


class Outcome(Enum):
    """How a transaction ended, as far as its client can tell."""

    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Append(NamedTuple):
    key: int
    value: int


class Read(NamedTuple):
    key: int
    values: tuple[int, ...]


@dataclass
class Transaction:
    number: int
    outcome: Outcome = Outcome.FAILED
    operations: list[Append | Read] = field(default_factory=list)

    @property
    def appends(self) -> Iterator[Append]:
        return (step for step in self.operations if isinstance(step, Append))

    @property
    def reads(self) -> Iterator[Read]:
        return (step for step in self.operations if isinstance(step, Read))


Graph = dict[int, set[int]]  # a transaction: those that come before it

#: Isolation levels by what they forbid: G0 (cycles of writes) and G1 (reads of what was never
#: committed, or not in its final form; cycles of writes and reads) always; then G-single, a cycle
#: with one transaction that read what another overwrote; then G2, one with any number of them.
FORBIDDEN = {
    "READ COMMITTED": 1,
    "REPEATABLE READ": 2,
    "SERIALIZABLE": 3,
}


def violations(
    history: Iterable[Transaction], final: Mapping[int, Sequence[int]], level: str
) -> list[str]:
    """What is wrong with a history, in words; nothing if it is as the isolation level promises.

    Args:
        history: all transactions that were tried.
        final: all lists as they are after the last of them.
        level: one of `FORBIDDEN`.
    """
    transactions = {transaction.number: transaction for transaction in history}
    writers = {a.value: t for t in transactions.values() for a in t.appends}
    found = list(_broken_promises(transactions.values(), final))
    committed = [t for t in transactions.values() if _committed(t, final)]
    found += _broken_reads(committed, writers, final)
    if not found:
        found += _cycles(committed, writers, final, FORBIDDEN[level])
    return found


def _committed(transaction: Transaction, final: Mapping[int, Sequence[int]]) -> bool:
    if transaction.outcome is Outcome.UNKNOWN:
        return any(a.value in final.get(a.key, ()) for a in transaction.appends)
    return transaction.outcome is Outcome.DONE


def _broken_promises(
    transactions: Iterable[Transaction], final: Mapping[int, Sequence[int]]
) -> Iterator[str]:
    for key, values in final.items():
        if len(set(values)) != len(values):
            yield f"list {key}: a value is there twice: {list(values)}"
    there = {key: set(values) for key, values in final.items()}
    for transaction in transactions:
        kept = [append.value in there.get(append.key, ()) for append in transaction.appends]
        if transaction.outcome is Outcome.DONE and not all(kept):
            yield f"lost: {transaction} was acknowledged"
        if transaction.outcome is Outcome.FAILED and any(kept):
            yield f"there all the same: {transaction} had failed"
        if transaction.outcome is Outcome.UNKNOWN and any(kept) and not all(kept):
            yield f"torn: {transaction} is there in part"


def _broken_reads(
    committed: Iterable[Transaction],
    writers: Mapping[int, Transaction],
    final: Mapping[int, Sequence[int]],
) -> Iterator[str]:
    for transaction in committed:
        appended: dict[int, list[int]] = defaultdict(list)
        for step in transaction.operations:
            if isinstance(step, Append):
                appended[step.key].append(step.value)
                continue
            key, values = step
            own = appended[key]
            if own and list(values[-len(own) :]) != own:
                yield f"its own appends are missing in {step} of {transaction}"
            if tuple(final.get(key, ()))[: len(values)] != values:
                failed = [
                    value
                    for value in values
                    if value not in writers or writers[value].outcome is Outcome.FAILED
                ]
                what = f"G1a, reads {failed} of a failed transaction" if failed else "another order"
                yield f"{what}: {step} of {transaction}, in the end {list(final.get(key, ()))}"
            elif values and (writer := writers[values[-1]]) is not transaction:
                last = [append.value for append in writer.appends if append.key == key][-1]
                if values[-1] != last:
                    yield f"G1b, reads half of {writer}: {step} of {transaction}"


def _cycles(
    committed: Sequence[Transaction],
    writers: Mapping[int, Transaction],
    final: Mapping[int, Sequence[int]],
    forbidden: int,
) -> Iterator[str]:
    write_write: Graph = defaultdict(set)
    write_read: Graph = defaultdict(set)
    read_write: Graph = defaultdict(set)
    for values in final.values():
        for before, after in pairwise(values):
            write_write[writers[after].number].add(writers[before].number)
    for transaction in committed:
        for key, values in transaction.reads:
            if values:
                write_read[transaction.number].add(writers[values[-1]].number)
            if len(values) < len(final.get(key, ())):
                overwriter = writers[final[key][len(values)]]
                read_write[overwriter.number].add(transaction.number)
    for name, graph in (
        ("G0", _merged(write_write)),
        ("G1c", dependencies := _merged(write_write, write_read)),
    ):
        if cycle := _cycle(graph):
            yield f"{name}: a cycle of {cycle}"
            return
    if forbidden >= FORBIDDEN["SERIALIZABLE"]:
        if cycle := _cycle(_merged(dependencies, read_write)):
            yield f"G2: a cycle of {cycle}"
    elif forbidden >= FORBIDDEN["REPEATABLE READ"]:
        for after, readers in read_write.items():
            for reader in readers - {after}:
                if _reaches(dependencies, reader, after):
                    yield f"G-single: {reader} depends on {after}, which overwrote what it read"


def _merged(*graphs: Graph) -> Graph:
    merged: Graph = defaultdict(set)
    for graph in graphs:
        for after, before in graph.items():
            merged[after] |= before - {after}
    return merged


def _cycle(graph: Graph) -> list[int] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[int] = error.args[1]
        return cycle
    return None


def _reaches(graph: Graph, later: int, earlier: int) -> bool:
    """Whether one transaction depends on another, by any number of steps."""
    todo, seen = [later], {later}
    while todo:
        for before in graph.get(todo.pop(), set()) - seen:
            if before == earlier:
                return True
            seen.add(before)
            todo.append(before)
    return False
