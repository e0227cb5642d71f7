"""Transactions whose results show it if one is lost, torn or mixed up with another.

Three kinds: transfers between accounts, of which every reader must see the same total; lists, which
transactions append to and read (see `history`); and notes, written by single statements. The first
two run as synchronous code in `db.run(…)` or in `async with db.atomic():`, some with retries.
"""

import asyncio
import random
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import peewee

from fastapi_peewee import Database, DatabaseUnavailable, OutcomeUnknown

from .history import FORBIDDEN, Append, Outcome, Read, Transaction, violations

_ACCOUNTS = 8
_BALANCE = 100
_LISTS_AT_A_TIME = 4
_TRANSACTIONS_PER_LIST = 12

_MOMENT = 0.1
#: Seconds in which a database that is back has to be of use.
_PATIENCE = 10.0

#: What a transaction may end with, faults or not.
EXPECTED = (peewee.DatabaseError, peewee.InterfaceError)


def levels(db: Database) -> list[str | None]:
    """The isolation levels worth trying. SQLite has but one."""
    if isinstance(db, peewee.SqliteDatabase):
        return [None]
    if isinstance(db, peewee.PostgresqlDatabase):
        return [None, "REPEATABLE READ", "SERIALIZABLE"]
    return [None, "SERIALIZABLE"]


def _forbidding(db: Database, level: str | None) -> str:
    """The level of `FORBIDDEN` that a database's level comes to."""
    if isinstance(db, peewee.SqliteDatabase):
        return "SERIALIZABLE"
    if level == "REPEATABLE READ" and isinstance(db, peewee.PostgresqlDatabase):
        return level
    return level if level == "SERIALIZABLE" else "READ COMMITTED"  # and so is MySQL's default


assert {"READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"} == set(FORBIDDEN)


class Way(NamedTuple):
    """How a transaction is run: as synchronous code, and tried again when it was not to blame."""

    sync: bool
    retries: bool = False


class Workload:
    """Operations on one database, by number: the same seed and number are the same operation.

    Attributes:
        outcomes: how many transactions ended how, by outcome.
        errors: what those that were not done ended with, by the error's name.
        found: what was wrong, in words.
    """

    #: Of all balances, at all times.
    TOTAL = _ACCOUNTS * _BALANCE

    def __init__(self, db: Database) -> None:
        class Account(db.Model):  # type: ignore[name-defined]
            balance = peewee.IntegerField()

        class Entry(db.Model):  # type: ignore[name-defined]
            transfer = peewee.IntegerField()
            account = peewee.IntegerField()
            amount = peewee.IntegerField()

        class Note(db.Model):  # type: ignore[name-defined]
            number = peewee.IntegerField()
            version = peewee.IntegerField(default=1)

        class Items(db.Model):  # type: ignore[name-defined]
            text = peewee.TextField()

        self.db = db
        self._transfers: dict[int, Outcome] = {}
        self._notes: dict[int, list[int]] = {}
        self._history: list[Transaction] = []
        self._account, self._entry, self._items, self._note = Account, Entry, Items, Note
        self._serial = isinstance(db, peewee.SqliteDatabase)
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.found: list[str] = []

    async def begin(self, seed: object, count: int, level: str | None) -> None:
        """Empty the tables, and fill them for `count` operations."""
        self._seed, self._level = seed, level
        self._transfers, self._notes, self._history = {}, {}, []

        def fill() -> None:
            models = [self._account, self._entry, self._items, self._note]
            self.db.drop_tables(models)
            self.db.create_tables(models)
            numbers = range(1, _ACCOUNTS + 1)
            self._account.insert_many([{"id": n, "balance": _BALANCE} for n in numbers]).execute()
            lists = range(count // _TRANSACTIONS_PER_LIST + _LISTS_AT_A_TIME + 1)
            with self.db.atomic():
                for rows in peewee.chunked([{"id": n + 1, "text": ""} for n in lists], 300):
                    self._items.insert_many(rows).execute()

        for left in reversed(range(5)):
            try:
                await self.db.run(fill)
                return
            except peewee.OperationalError:  # on a busy machine it may take longer than the limit
                if not left:
                    raise

    async def operate(self, number: int) -> None:
        """Operation `number`, which may be cancelled at any time. While the database is away it
        takes a moment, or none would be left for later."""
        dice = random.Random(f"{self._seed}/{number}")
        sync, retries = dice.random() < 0.5, dice.random() < 0.3
        way = Way(sync, retries)
        kind = dice.random()
        if kind < 0.3:
            await self.transfer(dice, number, way)
        elif kind < 0.4:
            await self._read_balances(way)
        elif kind < 0.5:
            await self.note(number)
        else:
            await self._use_lists(dice, number, way)

    async def end(self) -> list[str]:
        """Everything that is wrong, once all operations are over and nothing disturbs."""
        await asyncio.to_thread(self.db.close_all)  # some were lost while nobody used them
        await self._until_back()
        found, self.found = self.found, []
        found += await self.db.run(self._wrong_accounts)
        found += await self.db.run(self._wrong_notes)
        rows = await self.db.list(self._items.select(self._items.id, self._items.text).tuples())
        final = {key: _values(text) for key, text in rows}
        found += violations(self._history, final, _forbidding(self.db, self._level))
        return found

    async def _until_back(self) -> None:
        # After a failure the database is asked again only after a pause.
        async with asyncio.timeout(_PATIENCE):
            while True:
                with suppress(DatabaseUnavailable):
                    await self.db.aexecute_sql("SELECT 1")
                    return
                await asyncio.sleep(0.01)

    # Transfers

    async def transfer(self, dice: random.Random, number: int, way: Way) -> Outcome:
        """One transfer, of two rows in one transaction."""
        source, target = dice.sample(range(1, _ACCOUNTS + 1), 2)
        amount = dice.randint(1, _BALANCE)
        account, entry = self._account, self._entry

        def debit() -> None:
            self._lock([source, target])
            balance = account.get_by_id(source).balance
            if balance < amount:
                raise _TooLittle
            account.update(balance=balance - amount).where(account.id == source).execute()
            entry.create(transfer=number, account=source, amount=-amount)

        def credit() -> None:
            query = account.update(balance=account.balance + amount)
            query.where(account.id == target).execute()
            entry.create(transfer=number, account=target, amount=amount)

        outcome = await self._attempt([debit, credit], way)
        self._transfers[number] = outcome
        return outcome

    def _lock(self, accounts: list[int]) -> None:
        query = self._account.select().where(self._account.id << accounts)
        if not self._serial:
            list(query.order_by(self._account.id).for_update())

    async def _read_balances(self, way: Way) -> None:
        """All of them, in two statements of one snapshot."""
        account, balances = self._account, dict[int, int]()

        def read(first: int) -> None:
            query = account.select().where(account.id.between(first, first + _ACCOUNTS // 2 - 1))
            balances.update({row.id: row.balance for row in query})

        steps = [lambda: read(1), lambda: read(1 + _ACCOUNTS // 2)]
        options: dict[str, Any] = {"read_only": True}
        if not self._serial:
            options["isolation_level"] = "REPEATABLE READ"
        if await self._attempt(steps, way, **options) is Outcome.DONE:
            self._check_balances(balances)

    def _check_balances(self, balances: dict[int, int]) -> None:
        if sum(balances.values()) != self.TOTAL or min(balances.values()) < 0:
            self.found.append(f"the balances {balances} don't add up")

    def _wrong_accounts(self) -> list[str]:
        account, entry = self._account, self._entry
        self._check_balances({row.id: row.balance for row in account.select()})
        found, self.found = self.found, []
        entries: Counter[int] = Counter()
        moved: Counter[int] = Counter()
        for number, owner, amount in entry.select(
            entry.transfer, entry.account, entry.amount
        ).tuples():
            entries[number] += 1
            moved[owner] += amount
        found += [
            f"account {row.id} has {row.balance}, its entries say {_BALANCE + moved[row.id]}"
            for row in account.select()
            if row.balance != _BALANCE + moved[row.id]
        ]
        allowed = {Outcome.DONE: (2,), Outcome.FAILED: (0,), Outcome.UNKNOWN: (0, 2)}
        found += [
            f"transfer {number} was {outcome.value} and has {entries[number]} entries of 2"
            for number, outcome in self._transfers.items()
            if entries[number] not in allowed[outcome]
        ]
        return found

    # Notes

    async def note(self, number: int) -> Outcome:
        """Two statements, each of which is a transaction of its own: two versions; 0 is no note."""
        made = self._note(number=number)
        for version in (1, 2):
            made.version = version
            self._notes[number] = [
                version - 1,
                version,
            ]  # what may be there, whatever we hear of it
            outcome = await self._outcome(made.asave, lambda: True)
            if outcome is Outcome.DONE:
                self._notes[number] = [version]
            elif outcome is Outcome.FAILED:
                self._notes[number] = [version - 1]
            if outcome is not Outcome.DONE:
                break
        return outcome

    def _wrong_notes(self) -> list[str]:
        there: dict[int, list[int]] = {number: [] for number in self._notes}
        for number, version in self._note.select(self._note.number, self._note.version).tuples():
            there[number].append(version)
        return [
            f"note {number} is there as {versions}, not once as one of {self._notes[number]}"
            for number, versions in there.items()
            if len(versions) > 1 or sum(versions) not in self._notes[number]
        ]

    # Lists

    async def _use_lists(self, dice: random.Random, number: int, way: Way) -> None:
        first = 1 + number // _TRANSACTIONS_PER_LIST
        transaction = Transaction(number)
        steps: list[Callable[[], None]] = []
        for step in range(dice.randint(1, 4)):
            key = first + dice.randrange(_LISTS_AT_A_TIME)
            if dice.random() < 0.5:
                append = Append(key, number * 10 + step)
                transaction.operations.append(append)  # it may be there, whatever we hear of it
                steps.append(self._appending(append))
            else:
                transaction.operations.append(Read(key, ()))
                steps.append(self._reading(transaction, step, key))
        options = {} if self._level is None else {"isolation_level": self._level}
        self._history.append(transaction)
        transaction.outcome = await self._attempt(steps, way, **options)

    def _appending(self, append: Append) -> Callable[[], None]:
        items, text = self._items, f"{append.value},"
        mysql = isinstance(self.db, peewee.MySQLDatabase)
        longer = peewee.fn.CONCAT(items.text, text) if mysql else items.text.concat(text)
        return lambda: items.update(text=longer).where(items.id == append.key).execute()

    def _reading(self, transaction: Transaction, step: int, key: int) -> Callable[[], None]:
        def read() -> None:
            values = _values(self._items.get_by_id(key).text)
            transaction.operations[step] = Read(key, values)

        return read

    # All

    async def _attempt(
        self, steps: Sequence[Callable[[], None]], way: Way, **options: Any
    ) -> Outcome:
        """Run the steps in a transaction. Nobody knows of one that was cancelled while it ended,
        nor if we are told so; what fails otherwise must not be there."""
        ending = False

        def body() -> None:
            nonlocal ending
            ending = False
            for step in steps:
                step()
            ending = True

        async def abody() -> None:
            nonlocal ending
            ending = False
            for step in steps:
                await self.db.run(step)
            ending = True

        async def run() -> None:
            if way.sync:
                whole = self.db.retry(body, retries=2, **options) if way.retries else None
                await self.db.run(whole or self.db.atomic(**options)(body))
            elif way.retries:
                await self.db.retry(abody, retries=2, **options)()
            else:
                async with self.db.atomic(**options):
                    await abody()

        return await self._outcome(run, lambda: ending)

    async def _outcome(
        self, run: Callable[[], Awaitable[Any]], ending: Callable[[], bool]
    ) -> Outcome:
        """Nobody knows of what was cancelled when it was `ending`."""
        outcome = Outcome.DONE
        try:
            await run()
        except _TooLittle:
            outcome = Outcome.FAILED
        except (*EXPECTED, asyncio.CancelledError) as error:
            cancelled = isinstance(error, asyncio.CancelledError) and ending()
            unknown = cancelled or isinstance(error, OutcomeUnknown)
            outcome = Outcome.UNKNOWN if unknown else Outcome.FAILED
            self.errors[type(error).__name__] += 1
            if isinstance(error, DatabaseUnavailable):
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(_MOMENT)
        except Exception as error:
            outcome = Outcome.UNKNOWN if ending() else Outcome.FAILED
            places = traceback.extract_tb(error.__traceback__)[-8:]
            where = ", ".join(f"{Path(p.filename).name}:{p.lineno} {p.name}" for p in places)
            self.found.append(f"an error that nobody expects: {error!r} ({where})")
        self.outcomes[outcome.value] += 1
        return outcome


class _TooLittle(Exception):
    """There is less on an account than is to be taken from it."""


def _values(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))
