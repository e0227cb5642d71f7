"""asyncpg by hand: `async def` endpoints, its pool, a response model."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from fastapi import FastAPI

from . import contract

ITEM = "SELECT id, title, description, owner_id FROM item"
USER = 'SELECT id, email, is_active FROM "user"'
pool: Any


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    global pool
    async with asyncpg.create_pool(
        contract.DATABASE_URL, min_size=contract.POOL_SIZE, max_size=contract.POOL_SIZE
    ) as pool:
        yield


async def with_items(connection: Any, rows: list[Any]) -> list[dict[str, Any]]:
    users: dict[int, dict[str, Any]] = {row["id"]: {**row, "items": []} for row in rows}
    query = f"{ITEM} WHERE owner_id = ANY($1) ORDER BY id"
    for row in await connection.fetch(query, list(users)):
        users[row["owner_id"]]["items"].append(dict(row))
    return list(users.values())


app = FastAPI(lifespan=lifespan, max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/", response_model=list[contract.User])
async def read_users(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    async with pool.acquire() as connection:
        rows = await connection.fetch(f"{USER} ORDER BY id LIMIT $1 OFFSET $2", limit, skip)
        return await with_items(connection, rows)


@app.get("/users/{user_id}", response_model=contract.User)
async def read_user(user_id: contract.UserId) -> Any:
    async with pool.acquire() as connection:
        rows = await connection.fetch(f"{USER} WHERE id = $1", user_id)
        if not rows:
            raise contract.user_not_found()
        return (await with_items(connection, rows))[0]


@app.post("/users/{user_id}/items/", response_model=contract.Item)
async def create_item_for_user(user_id: contract.UserId, item: contract.ItemCreate) -> Any:
    try:
        number = await pool.fetchval(
            "INSERT INTO item (title, description, owner_id) VALUES ($1, $2, $3) RETURNING id",
            item.title,
            item.description,
            user_id,
        )
    except asyncpg.ForeignKeyViolationError as error:
        raise contract.user_not_found() from error
    return {"id": number, "owner_id": user_id, **item.model_dump()}


@app.get("/items/", response_model=list[contract.Item])
async def read_items(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Any:
    rows = await pool.fetch(f"{ITEM} ORDER BY id LIMIT $1 OFFSET $2", limit, skip)
    return [dict(row) for row in rows]
