"""Piccolo, as in the application that its command `piccolo asgi new` writes.

Piccolo knows no lists of related rows, so users' items take a second query by hand. On SQLite it
opens a connection for each query, or for each transaction: so the two are in one.
"""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import asyncpg
from fastapi import FastAPI
from piccolo.columns import Boolean, ForeignKey, Serial, Varchar
from piccolo.engine import PostgresEngine, SQLiteEngine
from piccolo.table import Table
from piccolo.utils.pydantic import create_pydantic_model

from . import contract

engine: Any
if contract.SQLITE_FILE:
    engine = SQLiteEngine(contract.SQLITE_FILE, timeout=contract.BUSY_TIMEOUT)
else:
    engine = PostgresEngine({"dsn": contract.DATABASE_URL})


class User(Table, tablename="user", db=engine):
    id = Serial(primary_key=True)
    email = Varchar(255, unique=True)
    hashed_password = Varchar(255)
    is_active = Boolean(default=True)


class Item(Table, tablename="item", db=engine):
    id = Serial(primary_key=True)
    title = Varchar(255, index=True)
    description = Varchar(255, index=True, null=True, default=None)
    owner_id = ForeignKey(User)


ItemRead: Any = create_pydantic_model(Item, include_default_columns=True, model_name="ItemRead")
UserBase: Any = create_pydantic_model(
    User,
    exclude_columns=(User.hashed_password,),
    include_default_columns=True,
    model_name="UserBase",
)


class UserRead(UserBase):
    items: list[ItemRead]


COLUMNS = [User.id, User.email, User.is_active]


async def with_items(query: Any) -> list[dict[str, Any]]:
    async with engine.transaction() if contract.SQLITE_FILE else nullcontext():
        users = {user["id"]: {**user, "items": []} for user in await query}
        if users:
            items = Item.select().where(Item.owner_id.is_in(list(users))).order_by(Item.id)
            for item in await items:
                users[item["owner_id"]]["items"].append(item)
    return list(users.values())


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    if contract.SQLITE_FILE:
        yield
    else:
        await engine.start_connection_pool(min_size=contract.POOL_SIZE, max_size=contract.POOL_SIZE)
        yield
        await engine.close_connection_pool()


app = FastAPI(lifespan=lifespan, max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/", response_model=list[UserRead])
async def read_users(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    return await with_items(User.select(*COLUMNS).order_by(User.id).offset(skip).limit(limit))


@app.get("/users/{user_id}", response_model=UserRead)
async def read_user(user_id: contract.UserId) -> Any:
    for user in await with_items(User.select(*COLUMNS).where(User.id == user_id)):
        return user
    raise contract.user_not_found()


@app.post("/users/{user_id}/items/", response_model=ItemRead)
async def create_item_for_user(user_id: contract.UserId, item: contract.ItemCreate) -> Any:
    created = Item(**item.model_dump(), owner_id=user_id)
    try:
        await created.save()
    except (sqlite3.IntegrityError, asyncpg.ForeignKeyViolationError) as error:
        raise contract.user_not_found() from error
    return created.to_dict()


@app.get("/items/", response_model=list[ItemRead])
async def read_items(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    return await Item.select().order_by(Item.id).offset(skip).limit(limit)
