"""The ceiling on PostgreSQL: one statement that makes JSON, which is sent as it is.

Nothing here changes a session, so the pool needn't reset it after each use.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from fastapi import FastAPI, Response

from . import contract

_ITEM = (
    "json_build_object('title', title, 'description', description, 'id', id, 'owner_id', owner_id)"
)
_USER = f"""
    json_build_object(
        'email', email, 'id', id, 'is_active', is_active, 'items', (
            SELECT coalesce(json_agg({_ITEM} ORDER BY id), '[]') FROM item
            WHERE owner_id = "user".id
        )
    )
"""
READ_USERS = f"""
    SELECT coalesce(json_agg({_USER} ORDER BY id), '[]')
    FROM (SELECT * FROM "user" ORDER BY id LIMIT $1 OFFSET $2) AS "user"
"""
READ_USER = f'SELECT {_USER} FROM "user" WHERE id = $1'
READ_ITEMS = f"""
    SELECT coalesce(json_agg({_ITEM} ORDER BY id), '[]')
    FROM (SELECT * FROM item ORDER BY id LIMIT $1 OFFSET $2) AS item
"""
CREATE_ITEM = f"""
    INSERT INTO item (title, description, owner_id) VALUES ($1, $2, $3) RETURNING {_ITEM}
"""
pool: Any


async def leave_as_it_is(connection: Any) -> None:
    pass


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    global pool
    async with asyncpg.create_pool(
        contract.DATABASE_URL,
        min_size=contract.POOL_SIZE,
        max_size=contract.POOL_SIZE,
        reset=leave_as_it_is,
    ) as pool:
        yield


async def answer(statement: str, *parameters: Any) -> Response:
    body = await pool.fetchval(statement, *parameters)
    if body is None:
        raise contract.user_not_found()
    return Response(body, media_type="application/json")


app = FastAPI(lifespan=lifespan, max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/")
async def read_users(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Response:
    return await answer(READ_USERS, limit, skip)


@app.get("/users/{user_id}")
async def read_user(user_id: contract.UserId) -> Response:
    return await answer(READ_USER, user_id)


@app.post("/users/{user_id}/items/")
async def create_item_for_user(user_id: contract.UserId, item: contract.ItemCreate) -> Response:
    try:
        return await answer(CREATE_ITEM, item.title, item.description, user_id)
    except asyncpg.ForeignKeyViolationError as error:
        raise contract.user_not_found() from error


@app.get("/items/")
async def read_items(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Response:
    return await answer(READ_ITEMS, limit, skip)
