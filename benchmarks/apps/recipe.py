"""The recipe of FastAPI's former page on Peewee, with today's FastAPI, Pydantic and Peewee.

Two things aren't the page's: a pool of connections from `playhouse.pool`, since the page opens one
for each request; and the getter for lists of queries, which Pydantic 2 has replaced by validators.
"""

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Annotated, Any

import peewee
from fastapi import Depends, FastAPI
from playhouse import pool
from playhouse.db_url import parse
from pydantic import BeforeValidator

from . import contract

db_state_default = {"closed": None, "conn": None, "ctx": None, "transactions": None}
db_state: ContextVar[dict[str, Any]] = ContextVar("db_state", default=db_state_default.copy())  # noqa: B039


class PeeweeConnectionState(peewee._ConnectionState):
    def __init__(self, **kwargs: Any) -> None:
        super().__setattr__("_state", db_state)
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        self._state.get()[name] = value

    def __getattr__(self, name: str) -> Any:
        return self._state.get()[name]


# As many as FastAPI has threads: a request gives its connection back after it has been answered,
# when its client may have sent the next one already.
options: dict[str, Any] = {"max_connections": 40, "timeout": 10}
db: Any
if contract.SQLITE_FILE:
    db = pool.PooledSqliteDatabase(
        contract.SQLITE_FILE,
        pragmas=contract.PRAGMAS,
        check_same_thread=False,
        **options,
    )
else:
    options |= parse(contract.DATABASE_URL, unquote_password=True, unquote_user=True)
    db = pool.PooledPostgresqlDatabase(prefer_psycopg3=True, **options)
db._state = PeeweeConnectionState()


class User(peewee.Model):
    email = peewee.CharField(unique=True, index=True)
    hashed_password = peewee.CharField()
    is_active = peewee.BooleanField(default=True)

    class Meta:
        database = db


class Item(peewee.Model):
    title = peewee.CharField(index=True)
    description = peewee.CharField(index=True, null=True)
    owner = peewee.ForeignKeyField(User, backref="items")

    class Meta:
        database = db


class UserRead(contract.User):
    items: Annotated[
        list[contract.Item], BeforeValidator(lambda items: list(items.order_by(Item.id)))
    ]


async def reset_db_state() -> None:
    db._state._state.set(db_state_default.copy())
    db._state.reset()


def get_db(db_state: Annotated[None, Depends(reset_db_state)]) -> Iterator[None]:
    try:
        db.connect()
        yield
    finally:
        if not db.is_closed():
            db.close()


app = FastAPI(max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/", response_model=list[UserRead], dependencies=[Depends(get_db)])
def read_users(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    return list(User.select().order_by(User.id).offset(skip).limit(limit))


@app.get("/users/{user_id}", response_model=UserRead, dependencies=[Depends(get_db)])
def read_user(user_id: contract.UserId) -> Any:
    user = User.filter(User.id == user_id).first()
    if user is None:
        raise contract.user_not_found()
    return user


@app.post("/users/{user_id}/items/", response_model=contract.Item, dependencies=[Depends(get_db)])
def create_item_for_user(user_id: contract.UserId, item: contract.ItemCreate) -> Any:
    created = Item(**item.model_dump(), owner_id=user_id)
    try:
        created.save()
    except peewee.IntegrityError as error:
        raise contract.user_not_found() from error
    return created


@app.get("/items/", response_model=list[contract.Item], dependencies=[Depends(get_db)])
def read_items(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    return list(Item.select().order_by(Item.id).offset(skip).limit(limit))
