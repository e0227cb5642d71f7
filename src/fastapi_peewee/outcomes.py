"""What has become of a statement or a transaction: done, failed, or unknown.

Three things that a database does would otherwise pass for a success, or for a failure that can be
tried again: it loses the connection before it has answered a COMMIT; it rolls a whole transaction
back while the block around it goes on; it answers COMMIT with ROLLBACK.
"""

import re
from typing import TYPE_CHECKING, Any

import peewee

from .blocks import Transaction
from .exceptions import OutcomeUnknown, TransactionAborted
from .sql_cache import Known

if TYPE_CHECKING:
    from .state import PeeweeConnectionState

#: A SELECT may call a function that writes, which nobody can tell; a WITH shows what it does.
_READS = re.compile(
    r"[\s(]*(SELECT|VALUES|SHOW|DESCRIBE|PRAGMA|"
    r"(WITH|EXPLAIN)(?!.*\b(INSERT|UPDATE|DELETE|MERGE|REPLACE)\b))\b",
    re.IGNORECASE | re.DOTALL,
)


#: Whether nothing is unknown of a statement that isn't answered.
only_reads = Known(lambda sql: _READS.match(sql) is not None).__getitem__


class Outcomes(peewee.Database):
    """A database that never takes a transaction for another, or a lost answer for a failure.

    The state's `aborted` is the error by which the database has ended the open transaction.
    """

    if TYPE_CHECKING:
        _state: PeeweeConnectionState

    def commit(self) -> None:
        """As Peewee's.

        Raises:
            OutcomeUnknown: the connection was lost before the database had answered.
            TransactionAborted: it was rolled back earlier, so there is nothing to commit.
        """
        aborted, self._state.aborted = getattr(self._state, "aborted", None), None
        conn = None if self.is_closed() else self._state.conn
        if aborted is not None or (conn is not None and self.failed(conn)):
            raise TransactionAborted(aborted)
        # What is lost before it is sent has certainly not been done.
        unsure = conn is not None and self.is_open(conn)
        try:
            super().commit()
        except Exception as error:
            if unsure and self.lost(conn, error):
                raise OutcomeUnknown("COMMIT was sent") from error
            raise
        for block in self._state.transactions[:1]:
            if isinstance(block, Transaction):  # `txn.commit()`, in the middle of it
                block.committed = True

    def rollback(self) -> None:
        try:
            super().rollback()
        finally:
            self._state.aborted = None

    def _execute_cursor(self, sql: str, params: Any, **options: Any) -> Any:
        state = self._state
        inside, unsure = bool(state.transactions), False
        if inside and not isinstance(state.transactions[0], Transaction):
            inside = False  # `manual_commit()`: who knows
        elif inside:
            aborted = getattr(state, "aborted", None)
            if aborted is not None:
                raise TransactionAborted(aborted)
        elif not only_reads(sql):
            unsure = self.is_closed() or state.conn is None or self.is_open(state.conn)
        try:
            return super()._execute_cursor(sql, params, **options)
        except Exception as error:
            conn = state.conn if (inside or unsure) and not self.is_closed() else None
            if conn is None:
                raise
            lost = self.lost(conn, error)
            if unsure and lost:
                raise OutcomeUnknown("A statement that writes was sent") from error
            if inside and (lost or self.ended(conn, error)):
                state.aborted = error
            raise

    # What differs between databases.

    def is_open(self, conn: Any) -> bool:
        """Whether the connection is alive, for all that has come from the server; asks nobody."""
        raise NotImplementedError

    def lost(self, conn: Any, error: Exception) -> bool:
        """Whether an error means that the connection is lost, and so isn't the server's answer."""
        raise NotImplementedError

    def failed(self, conn: Any) -> bool:
        """Whether the open transaction can only be rolled back, and COMMIT would do that."""
        return False

    def ended(self, conn: Any, error: Exception) -> bool:
        """Whether the database has rolled back the transaction in which an error occurred, in such
        a way that a further statement would be one of its own.
        """
        return False

    def is_in_transaction(self, conn: Any) -> bool:
        """Whether a transaction is open when a COMMIT, ROLLBACK or BEGIN has failed."""
        return False

    def is_idle(self, conn: Any) -> bool:
        """Whether no transaction is open, after a statement that has not failed."""
        return not self.is_in_transaction(conn)

    def transient(self, error: BaseException | None) -> bool:
        """Whether a transaction failed only since others ran beside it: it may succeed anew."""
        raise NotImplementedError
