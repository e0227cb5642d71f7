"""Peewee, first-class in FastAPI: one `db` object for `def` and `async def`, and no surprises."""

from .backends import connect
from .database import Database
from .exceptions import (
    BlockingQuery,
    BlockingQueryWarning,
    DatabaseUnavailable,
    LazyLoad,
    LeaseEnded,
    LeaseError,
    LeaseForked,
    NoLease,
    OutcomeUnknown,
    PoolClosed,
    PoolError,
    PoolTimeout,
    SchemaError,
    TooManyWaiting,
    TransactionAborted,
    TurnTimeout,
)
from .lifecycle import ConnectedDb, InTransaction, Peewee, get_db, reset_db_state, transaction
from .loading import Explanation, explain, prepared
from .pool import PoolStats
from .responses import respond
from .routing import PeeweeRoute, without_lease
from .schemas import create_schema, patch_schema, schema
from .shapes import param
from .state import PeeweeConnectionState
from .trees import depth
from .verbs import AsyncModel, AsyncModelMixin

__all__ = [
    "AsyncModel",
    "AsyncModelMixin",
    "BlockingQuery",
    "BlockingQueryWarning",
    "ConnectedDb",
    "Database",
    "DatabaseUnavailable",
    "Explanation",
    "InTransaction",
    "LazyLoad",
    "LeaseEnded",
    "LeaseError",
    "LeaseForked",
    "NoLease",
    "OutcomeUnknown",
    "Peewee",
    "PeeweeConnectionState",
    "PeeweeRoute",
    "PoolClosed",
    "PoolError",
    "PoolStats",
    "PoolTimeout",
    "SchemaError",
    "TooManyWaiting",
    "TransactionAborted",
    "TurnTimeout",
    "connect",
    "create_schema",
    "depth",
    "explain",
    "get_db",
    "param",
    "patch_schema",
    "prepared",
    "reset_db_state",
    "respond",
    "schema",
    "transaction",
    "without_lease",
]
