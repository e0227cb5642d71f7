"""The ceiling on SQLite: one statement that makes JSON, which is sent as it is.

`def` endpoints and a connection for each thread, as in driver_sqlite.py.
"""

import sqlite3
from typing import Any

from fastapi import FastAPI, Response

from . import contract
from .driver_sqlite import connection

_ITEM = "json_object('title', title, 'description', description, 'id', id, 'owner_id', owner_id)"
# ORDER BY in a subquery, not in the aggregate: SQLite has that since 3.44 only.
# What is JSON already needs no json() around it, which would parse it again.
_ITEMS = f"SELECT json_group_array({_ITEM}) FROM (SELECT * FROM item"
_USER = f"""
    json_object(
        'email', email, 'id', id, 'is_active', iif(is_active, json('true'), json('false')),
        'items', ({_ITEMS} WHERE owner_id = user.id ORDER BY id))
    )
"""
READ_USERS = f"""
    SELECT json_group_array({_USER})
    FROM (SELECT * FROM user ORDER BY id LIMIT ? OFFSET ?) AS user
"""
READ_USER = f"SELECT {_USER} FROM user WHERE id = ?"
READ_ITEMS = f"{_ITEMS} ORDER BY id LIMIT ? OFFSET ?)"
CREATE_ITEM = f"INSERT INTO item (title, description, owner_id) VALUES (?, ?, ?) RETURNING {_ITEM}"


def answer(statement: str, *parameters: Any) -> Response:
    rows = connection().execute(statement, parameters).fetchall()
    if not rows:
        raise contract.user_not_found()
    return Response(rows[0][0], media_type="application/json")


app = FastAPI(max_body_size=contract.MAX_BODY_SIZE)


@app.get("/users/")
def read_users(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Response:
    return answer(READ_USERS, limit, skip)


@app.get("/users/{user_id}")
def read_user(user_id: contract.UserId) -> Response:
    return answer(READ_USER, user_id)


@app.post("/users/{user_id}/items/")
def create_item_for_user(user_id: contract.UserId, item: contract.ItemCreate) -> Response:
    try:
        return answer(CREATE_ITEM, item.title, item.description, user_id)
    except sqlite3.IntegrityError as error:
        raise contract.user_not_found() from error


@app.get("/items/")
def read_items(skip: contract.Skip = 0, limit: contract.Limit = 100) -> Response:
    return answer(READ_ITEMS, limit, skip)
