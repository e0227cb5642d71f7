"""Peewee's own way to FastAPI: `playhouse.pwasyncio` and `playhouse.pydantic_utils`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import peewee
from fastapi import Depends, FastAPI
from playhouse.db_url import parse
from playhouse.pwasyncio import AsyncPostgresqlDatabase, AsyncSqliteDatabase
from playhouse.pydantic_utils import to_pydantic

from . import contract

db: Any
if contract.SQLITE_FILE:
    db = AsyncSqliteDatabase(
        contract.SQLITE_FILE,
        pragmas={"journal_mode": "wal", **contract.PRAGMAS},
        timeout=contract.BUSY_TIMEOUT,
        pool_size=contract.POOL_SIZE,
    )
else:
    parameters = parse(contract.DATABASE_URL, unquote_password=True, unquote_user=True)
    db = AsyncPostgresqlDatabase(pool_size=contract.POOL_SIZE, **parameters)


class User(db.Model):
    email = peewee.CharField(unique=True)
    hashed_password = peewee.CharField()
    is_active = peewee.BooleanField(default=True)


class Item(db.Model):
    title = peewee.CharField(index=True)
    description = peewee.CharField(index=True, null=True)
    owner = peewee.ForeignKeyField(User, backref="items")


ItemCreate: Any = to_pydantic(Item, exclude={"owner"}, model_name="ItemCreate")
ItemRead: Any = to_pydantic(Item, exclude_autofield=False, model_name="ItemRead")
UserRead: Any = to_pydantic(
    User,
    exclude={"hashed_password"},
    exclude_autofield=False,
    model_name="UserRead",
    relationships={User.items: list[ItemRead]},
)


#: Does what `aprefetch` does, but faster: it names the users instead of selecting them once more.
WITH_ITEMS = peewee.Load(
    User.items, Item.select().order_by(Item.id), strategy=peewee.PREFETCH_TYPE.MATERIALIZE
)


async def get_db() -> AsyncIterator[None]:
    async with db:
        yield


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await db.close_pool()


app = FastAPI(lifespan=lifespan, max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/", response_model=list[UserRead], dependencies=[Depends(get_db)])
async def read_users(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    users = User.select().order_by(User.id).offset(skip).limit(limit)
    return await db.list(users.with_related(WITH_ITEMS))


@app.get("/users/{user_id}", response_model=UserRead, dependencies=[Depends(get_db)])
async def read_user(user_id: contract.UserId) -> Any:
    users = User.select().where(User.id == user_id)
    try:
        return await db.get(users.with_related(WITH_ITEMS))
    except User.DoesNotExist as error:
        raise contract.user_not_found() from error


@app.post("/users/{user_id}/items/", response_model=ItemRead, dependencies=[Depends(get_db)])
async def create_item_for_user(user_id: contract.UserId, item: ItemCreate) -> Any:
    try:
        return await Item.acreate(**item.model_dump(), owner=user_id)
    except peewee.IntegrityError as error:
        raise contract.user_not_found() from error


@app.get("/items/", response_model=list[ItemRead], dependencies=[Depends(get_db)])
async def read_items(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    return await db.list(Item.select().order_by(Item.id).offset(skip).limit(limit))
