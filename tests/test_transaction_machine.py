"""Nested blocks against a model of them, in random histories: what is in the database after each
step, what other connections see of it, and which `after_commit` callbacks have run.

`MACHINE_STEPS=100000` says how many steps to take; by default they are few.
"""

import asyncio
import sqlite3
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peewee
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fastapi_peewee import connect
from tests.modes import Oops
from tests.test_pool_machine import machine_settings

NAMES = tuple("abcdef")
NAMES_OF_BLOCKS = st.sampled_from(["atomic", "transaction", "savepoint"])


@dataclass
class Level:
    """A block that is open."""

    block: Any
    entered: Any
    #: "transaction"; "savepoint"; or "nothing", which `transaction()` is inside of one.
    kind: str
    #: What was there when it began, and how many callbacks waited.
    rows: set[str]
    callbacks: int


class Blocks(RuleBasedStateMachine):
    @abstractmethod
    def do(self, fn: Callable[..., Any], *args: Any) -> Any: ...

    @abstractmethod
    def enter_block(self, block: Any) -> Any: ...

    @abstractmethod
    def exit_block(self, block: Any, error: BaseException | None) -> None: ...

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name, "test.db")
        self.db = connect(f"sqlite:///{path}", pool_size=1, pragmas={"synchronous": 0})

        class Row(self.db.Model):
            name = peewee.CharField(unique=True)

        self.row = Row
        self.observer = sqlite3.connect(path)
        self.levels: list[Level] = []
        self.rows: set[str] = set()
        self.committed: set[str] = set()
        self.waiting: list[int] = []
        self.fired: list[int] = []
        self.really_fired: list[int] = []
        self.count = 0

    # The model's half.

    def commits(self) -> None:
        self.committed = set(self.rows)
        self.fired += self.waiting
        self.waiting.clear()

    def rolls_back_to(self, level: Level) -> None:
        self.rows = set(level.rows)
        del self.waiting[level.callbacks :]

    # Rules

    @initialize(names=st.lists(NAMES_OF_BLOCKS, max_size=4))
    def begin_inside(self, names: list[str]) -> None:
        for name in names:
            self.enter(name)

    @precondition(lambda self: len(self.levels) < 6)
    @rule(names=st.lists(NAMES_OF_BLOCKS, min_size=1, max_size=3))
    def enter_some(self, names: list[str]) -> None:
        for name in names:
            self.enter(name)

    def enter(self, name: str) -> None:
        if not self.levels:
            name = "transaction" if name == "savepoint" else name
            kind = "transaction"
        else:
            kind = "nothing" if name == "transaction" else "savepoint"
        block = getattr(self.db, name)()
        entered = self.enter_block(block)
        self.levels.append(Level(block, entered, kind, set(self.rows), len(self.waiting)))

    @precondition(lambda self: self.levels)
    @rule()
    def leave(self) -> None:
        level = self.levels.pop()
        self.exit_block(level.block, None)
        if level.kind == "transaction":
            self.commits()

    @precondition(lambda self: self.levels)
    @rule()
    def leave_by_an_error(self) -> None:
        level = self.levels.pop()
        self.exit_block(level.block, Oops())
        if level.kind != "nothing":
            self.rolls_back_to(level)

    @precondition(lambda self: self.levels and self.levels[-1].kind != "nothing")
    @rule()
    def commit(self) -> None:
        level = self.levels[-1]
        self.do(level.entered.commit)
        if level.kind == "transaction":
            self.commits()
        level.rows, level.callbacks = set(self.rows), len(self.waiting)

    @precondition(lambda self: self.levels and self.levels[-1].kind != "nothing")
    @rule()
    def roll_back(self) -> None:
        level = self.levels[-1]
        self.do(level.entered.rollback)
        self.rolls_back_to(level)

    @rule(name=st.sampled_from(NAMES))
    def insert(self, name: str) -> None:
        if name in self.rows:
            with pytest.raises(peewee.IntegrityError):
                self.do(lambda: self.row.create(name=name))
            return
        self.do(lambda: self.row.create(name=name))
        self.rows.add(name)
        if not self.levels:
            self.committed.add(name)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        assert self.do(self.row.delete().where(self.row.name == name).execute) == (
            name in self.rows
        )
        self.rows.discard(name)
        if not self.levels:
            self.committed.discard(name)

    @rule(kind=st.sampled_from(["plain", "failing"]))
    def after_commit(self, kind: str) -> None:
        self.count += 1
        number = self.count
        # Where there is no transaction it is called at once, and what it raises is the caller's.
        raises = kind == "failing" and bool(self.levels)

        def callback() -> None:
            self.really_fired.append(number)
            if raises:
                raise Oops

        self.do(self.db.after_commit, callback)
        (self.waiting if self.levels else self.fired).append(number)

    # What always holds

    @invariant()
    def the_rows_are_there(self) -> None:
        names, depth = self.do(
            lambda: ({row.name for row in self.row.select()}, self.db.transaction_depth())
        )
        assert names == self.rows
        assert depth == sum(level.kind != "savepoint" for level in self.levels)

    @invariant()
    def others_see_what_is_committed(self) -> None:
        assert {name for (name,) in self.observer.execute("SELECT name FROM row")} == self.committed

    @invariant()
    def callbacks_have_run(self) -> None:
        assert self.really_fired == self.fired

    def teardown(self) -> None:
        try:
            while self.levels:
                self.exit_block(self.levels.pop().block, Oops())
        finally:
            self.observer.close()
            self.close()
            self.folder.cleanup()

    @abstractmethod
    def close(self) -> None: ...


class InThread(Blocks):
    """`with` in a thread of its own, as scripts and workers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.db.create_tables([self.row])

    def do(self, fn: Callable[..., Any], *args: Any) -> Any:
        return fn(*args)

    def enter_block(self, block: Any) -> Any:
        return block.__enter__()

    def exit_block(self, block: Any, error: BaseException | None) -> None:
        block.__exit__(type(error) if error else None, error, None)

    def close(self) -> None:
        self.db.close()


class OnLoop(Blocks):
    """`async with`, and `db.run` for what is between: all in one context."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.runner.run(self.db.acreate_tables([self.row]))

    def do(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.runner.run(self.db.run(fn, *args))

    def enter_block(self, block: Any) -> Any:
        return self.runner.run(block.__aenter__())

    def exit_block(self, block: Any, error: BaseException | None) -> None:
        self.runner.run(block.__aexit__(type(error) if error else None, error, None))

    @precondition(lambda self: self.levels)
    @rule()
    def leave_by_cancellation(self) -> None:
        """The task is cancelled in the block's body: `CancelledError` comes to its end."""
        level = self.levels.pop()
        self.exit_block(level.block, asyncio.CancelledError())
        if level.kind != "nothing":
            self.rolls_back_to(level)

    @invariant()
    def one_connection_is_in_use(self) -> None:
        assert self.db.pool_stats.in_use == bool(self.levels)

    def close(self) -> None:
        try:
            assert self.runner.run(self.db.close_pool())
        finally:
            self.runner.close()


class AsyncCallbacks(OnLoop):
    """The same, with `async` callbacks."""

    @rule()
    def after_commit(self) -> None:
        self.count += 1
        number = self.count

        async def callback() -> None:
            await asyncio.sleep(0)
            self.really_fired.append(number)

        self.do(self.db.after_commit, callback)
        (self.waiting if self.levels else self.fired).append(number)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [InThread, OnLoop, AsyncCallbacks])
def test_blocks_do_what_their_model_does(machine: type[Blocks]) -> None:
    """However blocks are nested, committed, rolled back and left: rows and callbacks are as the
    model's, and others see what is committed, and nothing else."""
    run_state_machine_as_test(machine, settings=machine_settings())
